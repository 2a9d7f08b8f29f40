"""Random views of an image, each a function of (seed, view, image) alone, so that trials can share them.

Nothing is mirrored unless asked for: in a chest X-ray left and right are not alike. The heart lies left and the liver
right; a mirrored image shows what hardly anybody has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from PIL import Image

AUGMENTATION_VERSION = 1  # raise it with any change of what `augmented` returns: views kept from before are then stale

# A byte -> a standard normal deviate: cheaper than drawing 50,000 of them, and the same with every version of numpy.
_DEVIATES = np.array([NormalDist().inv_cdf((byte + 0.5) / 256) for byte in range(256)], np.float32)

Coefficients = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Augmentation:
    """How far a view may lie from its image. Each is drawn evenly from minus to plus its bound, except noise.

    Attributes:
        rotation_degrees: about the middle of the image.
        zoom: about the middle; share by which lengths grow or shrink, the same across and down.
        shift: across and, on its own, down; share of the image side.
        contrast: share by which differences to the image's mean grey grow or shrink.
        brightness: added to every pixel; share of 255.
        noise_deviation: standard deviation of the normal noise of each pixel, in grey levels; 0 for none.
    """

    rotation_degrees: float
    zoom: float
    shift: float
    contrast: float
    brightness: float
    noise_deviation: float = 0.0


# Set by judgement, not tuned: `light` looks like another exposure of the same patient, `strong` like a poorer one.
# `wide` is what introductions to Keras write: RandomRotation(0.1), a tenth of a full turn, RandomZoom(0.1) and
# RandomContrast(0.1). `geometry` and `exposure` are the two halves of `strong`.
AUGMENTATIONS: Mapping[str, Augmentation] = {
    "light": Augmentation(rotation_degrees=5.0, zoom=0.05, shift=0.04, contrast=0.10, brightness=0.05),
    "strong": Augmentation(
        rotation_degrees=10.0, zoom=0.10, shift=0.08, contrast=0.20, brightness=0.10, noise_deviation=4.0
    ),
    "wide": Augmentation(rotation_degrees=36.0, zoom=0.10, shift=0.0, contrast=0.10, brightness=0.0),
    "geometry": Augmentation(rotation_degrees=10.0, zoom=0.10, shift=0.08, contrast=0.0, brightness=0.0),
    "exposure": Augmentation(
        rotation_degrees=0.0, zoom=0.0, shift=0.0, contrast=0.20, brightness=0.10, noise_deviation=4.0
    ),
}
MIRROR = 1  # the random stream of mirroring
MOST_ZOOM = 0.9  # a strength may not shrink an image to nothing


def view_of_epoch(epoch: int, views: int) -> int:
    """The view that an epoch sees.

    Args:
        epoch: 1 for the first.
        views: how many views there are, taken in turn; 0 gives every epoch one of its own.

    Returns:
        1 for the first.
    """
    return epoch if views == 0 else (epoch - 1) % views + 1


def augmented(
    pixels: NDArray[np.uint8],
    image_ids: NDArray[np.uint64],
    *,
    kind: str,
    seed: int,
    view: int,
    strength: float = 1.0,
    flip: bool = False,
) -> NDArray[np.uint8]:
    """One view of each image.

    What happens to an image follows from `seed`, `view` and its id, whatever else is in the batch; rotation, zoom and
    shift (in shares of the side) do not depend on its size or channels either. Where a view reaches over the border
    it shows the image's reflection: black would make a sharp edge, and repeating the outermost pixels makes broad bars
    of the thin frames that many X-rays have. Pillow's bilinear filter rounds down, which makes a view half a grey level
    darker on average.

    Args:
        pixels: (images, side, side, channels), with 1 or 3 channels.
        image_ids: (images,), of the images' content: equal images get equal views.
        kind: a name in `AUGMENTATIONS`.
        seed: at least 0, below 2**64.
        view: as `view_of_epoch`.
        strength: factor on every bound, above 0. Zoom stays below `MOST_ZOOM`.
        flip: mirror every other view, drawn by chance, left to right.

    Returns:
        An array of the shape of `pixels`.

    Raises:
        ValueError: `kind` is unknown, or the arrays do not fit each other.
    """
    if kind not in AUGMENTATIONS:
        raise ValueError(
            f"kind must be one of {', '.join(AUGMENTATIONS)}, but got {kind!r}; without augmentation use the pixels"
        )
    possible = [(*pixels.shape[:2], *pixels.shape[1:2], channels) for channels in (1, 3)]
    if pixels.dtype != np.uint8 or pixels.shape not in possible:
        raise ValueError(f"pixels must be uint8 (images, side, side, 1 or 3), but got {pixels.dtype} {pixels.shape}")
    if image_ids.dtype != np.uint64 or image_ids.shape != pixels.shape[:1]:
        raise ValueError(
            f"image_ids must be uint64 ({len(pixels)},), one an image, but got {image_ids.dtype} {image_ids.shape}"
        )
    return _drawn(_view, pixels, image_ids, _scaled(AUGMENTATIONS[kind], strength), (seed, view), flip=flip)


def augmented_masks(
    masks: NDArray[np.uint8],
    image_ids: NDArray[np.uint64],
    *,
    kind: str,
    seed: int,
    view: int,
    strength: float = 1.0,
    flip: bool = False,
) -> NDArray[np.uint8]:
    """The masks of the views that `augmented` gives, moved as their images are.

    Args:
        masks: (images, side, side, 1), 0 or 255.
        image_ids: (images,), of the images, not of the masks.
        kind: as in `augmented`.
        seed: as in `augmented`.
        view: as in `augmented`.
        strength: as in `augmented`.
        flip: as in `augmented`.

    Returns:
        An array of the shape of `masks`, 0 or 255.
    """
    return _drawn(_mask_view, masks, image_ids, _scaled(AUGMENTATIONS[kind], strength), (seed, view), flip=flip)


def _drawn(
    draw: Callable[[NDArray[np.uint8], Augmentation, np.random.Generator], NDArray[np.uint8]],
    images: NDArray[np.uint8],
    image_ids: NDArray[np.uint64],
    bounds: Augmentation,
    key: tuple[int, int],
    *,
    flip: bool,
) -> NDArray[np.uint8]:
    views = np.empty(images.shape, np.uint8)
    for index, image_id in enumerate(image_ids.tolist()):
        views[index] = draw(images[index], bounds, _generator(*key, image_id))
        if flip and _is_mirrored(*key, image_id):
            views[index] = views[index, :, ::-1]
    return views


def _is_mirrored(seed: int, view: int, image_id: int) -> bool:
    """Whether a view is mirrored; a stream of its own, because noise takes as much as an image has pixels."""
    return bool(_generator(seed, view, image_id, MIRROR).random() < 0.5)


def _scaled(bounds: Augmentation, strength: float) -> Augmentation:
    scaled = Augmentation(**{name: strength * bound for name, bound in asdict(bounds).items()})
    return replace(scaled, zoom=min(MOST_ZOOM, scaled.zoom))


def _generator(seed: int, view: int, image_id: int, purpose: int = 0) -> np.random.Generator:
    # Words of a fixed number: of a list of integers numpy takes as many as each needs, and two lists may then be alike.
    words = np.array([seed, view, image_id, *([purpose] if purpose else [])], "<u8").view("<u4")
    return np.random.default_rng(np.random.SeedSequence(words))


def _view(pixels: NDArray[np.uint8], bounds: Augmentation, generator: np.random.Generator) -> NDArray[np.uint8]:
    *moves, contrast, brightness = generator.uniform(-1.0, 1.0, 6)
    side = len(pixels)
    source = _moved(side, bounds, moves)
    mean = pixels.mean()
    gain, offset = 1.0 + bounds.contrast * contrast, 255.0 * bounds.brightness * brightness
    levels = mean + offset + gain * (np.arange(256) - mean)  # what each grey level becomes
    warped = _warped(pixels, source)
    if bounds.noise_deviation == 0.0:
        return _rounded(levels).take(warped)
    # The same for all channels: an X-ray's noise has no colour.
    noise = _DEVIATES.take(np.frombuffer(generator.bytes(side * side), np.uint8)).reshape(side, side, 1)
    return _rounded(levels.astype(np.float32).take(warped) + np.float32(bounds.noise_deviation) * noise)


def _mask_view(mask: NDArray[np.uint8], bounds: Augmentation, generator: np.random.Generator) -> NDArray[np.uint8]:
    *moves, _, _ = generator.uniform(-1.0, 1.0, 6)
    return np.where(_warped(mask, _moved(len(mask), bounds, moves)) >= 128, 255, 0).astype(np.uint8)


def _moved(side: int, bounds: Augmentation, moves: Sequence[float]) -> Coefficients:
    """`_source_of` a view, from what was drawn for it."""
    rotation, zoom, right, down = moves
    return _source_of(
        side,
        radians=math.radians(bounds.rotation_degrees) * rotation,
        scale=1.0 + bounds.zoom * zoom,
        right=bounds.shift * side * right,
        down=bounds.shift * side * down,
    )


def _rounded(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    return (values.clip(0.0, 255.0) + 0.5).astype(np.uint8)


def _source_of(side: int, *, radians: float, scale: float, right: float, down: float) -> Coefficients:
    """The affine map from a place (x, y) of the view, in pixels, to that it shows: (a x + b y + c, d x + e y + f)."""
    cos, sin, middle = math.cos(radians) / scale, math.sin(radians) / scale, side / 2
    x, y = middle + right, middle + down  # where the view has the middle of the image
    return cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y


def _warped(pixels: NDArray[np.uint8], coefficients: Coefficients) -> NDArray[np.uint8]:
    a, b, c, d, e, f = coefficients
    side = len(pixels)
    corners = [place for x in (0, side) for y in (0, side) for place in (a * x + b * y + c, d * x + e * y + f)]
    margin = math.ceil(max(0.0, -min(corners), max(corners) - side)) + 1
    wide = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    image = Image.fromarray(wide[..., 0] if pixels.shape[-1] == 1 else wide)
    moved = (a, b, c + margin, d, e, f + margin)
    view = image.transform((side, side), Image.Transform.AFFINE, moved, Image.Resampling.BILINEAR)
    return np.asarray(view).reshape(pixels.shape)
