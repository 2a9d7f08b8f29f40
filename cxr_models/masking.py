"""Lung masks laid over pixel arrays: what lies outside the lungs becomes 0."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_models.arrays import Put, kept_array
from cxr_models.dataset import Progress

MASKING_VERSION = 1  # raise it with any change of what `masked_array` writes
INSIDE = 128  # of a mask's 255, or of a probability in steps of 1/255

IMAGES_AT_ONCE = 64


def masked_array(pixels: Path, masks: Path, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Set the pixels outside the masks to 0, unless a run before has done so and the array is sound.

    Args:
        pixels: `.npy` file, uint8 (images, side, side, channels), named after its contents.
        masks: `.npy` file, uint8 (images, mask side, mask side, 1) of the same images, named after its contents: 255
            inside, 0 outside, or a probability in steps of 1/255. Masks of another side are resized bilinearly.
        cache_dir: the result is kept below it.
        progress: called with the images done.

    Returns:
        `.npy` file of the shape of `pixels`.

    Raises:
        NoSpace: the disk has no room for the array.
    """
    contents = f"{MASKING_VERSION} {pixels.name} {masks.name}"
    path = cache_dir / "pixels" / f"{hashlib.sha256(contents.encode()).hexdigest()[:24]}-{pixels.stem}-masked.npy"
    plain, inside = np.load(pixels, mmap_mode="r"), np.load(masks, mmap_mode="r")
    return kept_array(path, plain.shape, lambda put: _lay(put, plain, inside, progress))


def _lay(put: Put, plain: NDArray[np.uint8], masks: NDArray[np.uint8], progress: Progress | None) -> None:
    for some in chunks(len(plain)):
        inside = np.stack([_resized(mask, plain.shape[1]) for mask in masks[some]]) >= INSIDE
        put(some.start, (plain[some] * inside).astype(np.uint8))
        if progress:
            progress(min(some.stop, len(plain)), len(plain))


def chunks(images: int) -> Iterator[slice]:
    """Slices of a few images each that cover them all."""
    return (slice(first, first + IMAGES_AT_ONCE) for first in range(0, images, IMAGES_AT_ONCE))


def in_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Pixels (images, side, side, 1 or 3) as grey (luminance, as Pillow rounds it) or as RGB."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    red, green, blue = np.moveaxis(pixels.astype(np.uint32), -1, 0)
    grey: NDArray[np.uint32] = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return grey.astype(np.uint8)[..., np.newaxis]


def _resized(mask: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    if len(mask) == side:
        return mask
    resized = Image.fromarray(mask[..., 0]).resize((side, side), Image.Resampling.BILINEAR)
    found: NDArray[np.uint8] = np.asarray(resized).reshape(side, side, 1)
    return found
