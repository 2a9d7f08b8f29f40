"""A few training images, and augmented views of them, kept in the run folder for the report."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_models.augmentation import augmented
from cxr_models.storage import written_whole
from cxr_models.trial import TrialData
from sweep.space import Space

SIDE = 112  # pixels; larger images are made smaller
PER_CLASS = 4
VIEWED = 4  # images shown augmented
VIEWS = 3  # of each

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Samples:
    """Thumbnails, uint8 with 1 or 3 channels.

    Attributes:
        classes: (images,) class of each.
        images: (images, side, side, channels).
        kinds: the augmentations that the search space has, without `none`.
        originals: (viewed, side, side, channels).
        views: (kinds, viewed, views, side, side, channels).
    """

    classes: tuple[str, ...]
    images: Pictures
    kinds: tuple[str, ...]
    originals: Pictures
    views: Pictures

    def of_class(self, name: str) -> Pictures:
        """The images of one class."""
        found: Pictures = self.images[np.array(self.classes) == name]
        return found


def take_samples(data: TrialData, patients: NDArray[np.str_], space: Space) -> Samples:
    """Choose by the images' contents: the same images give the same samples, of as many patients as possible.

    Args:
        data: of the sweep; only its training images are looked at.
        patients: (images,) of all images of the data set.
        space: tells which augmentations there are.
    """
    side = max(data.pixels)
    pixels = np.load(data.pixels[side], mmap_mode="r")
    chosen = [_chosen(data, patients, label) for label in range(len(data.classes))]
    images = np.concatenate(chosen)
    viewed = np.array([own[0] for own in chosen if len(own)][:VIEWED], np.int64)
    kinds = _kinds(space)
    originals = pixels[viewed]
    ids = data.image_ids[viewed]
    views = [
        [
            augmented(originals, ids, kind=kind, seed=0, view=view, flip=_is_mirrored(space, kind))
            for view in range(1, VIEWS + 1)
        ]
        for kind in kinds
    ]
    small = [np.stack([_small(each) for each in of_kind], axis=1) for of_kind in views]
    return Samples(
        tuple(data.classes[data.labels[index]] for index in images),
        _small(pixels[images]),
        kinds,
        _small(originals),
        np.stack(small) if small else np.zeros((0, len(viewed), VIEWS, *_small(originals).shape[1:]), np.uint8),
    )


def _chosen(data: TrialData, patients: NDArray[np.str_], label: int) -> NDArray[np.int64]:
    own = data.train[data.labels[data.train] == label]
    own = own[np.argsort(data.image_ids[own], kind="stable")]
    _, first = np.unique(patients[own], return_index=True)
    first = np.sort(first)
    others = np.setdiff1d(np.arange(len(own)), first)
    found: NDArray[np.int64] = own[np.concatenate([first, others])[:PER_CLASS]]
    return found


def _kinds(space: Space) -> tuple[str, ...]:
    if "augmentation" not in space.axes:
        return ()
    return tuple(sorted(str(kind) for (kind,) in space.combinations("augmentation") if kind != "none"))


def _is_mirrored(space: Space, kind: str) -> bool:
    """Whether some trial mirrors views of this kind."""
    both = ("augmentation", "horizontal_flip")
    return {*both} <= space.axes.keys() and (kind, "random") in space.combinations(*both)


def _small(pixels: Pictures) -> Pictures:
    if pixels.shape[1] <= SIDE:
        return np.asarray(pixels)
    grey = pixels.shape[-1] == 1
    pictures = [Image.fromarray(image[..., 0] if grey else image).resize((SIDE, SIDE)) for image in pixels]
    return np.array([np.asarray(picture).reshape(SIDE, SIDE, -1) for picture in pictures], np.uint8).reshape(
        len(pixels), SIDE, SIDE, pixels.shape[-1]
    )


def write_samples(path: Path, samples: Samples) -> None:
    """Keep samples in one `.npz` file."""
    with written_whole(path) as scratch, scratch.open("wb") as file:
        np.savez_compressed(
            file,
            classes=np.array(samples.classes, np.str_),
            images=samples.images,
            kinds=np.array(samples.kinds, np.str_),
            originals=samples.originals,
            views=samples.views,
        )


def read_samples(path: Path) -> Samples:
    """Read what `write_samples` kept.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with np.load(path) as kept:
            classes, kinds = (tuple(map(str, kept[name])) for name in ("classes", "kinds"))
            return Samples(classes, kept["images"], kinds, kept["originals"], kept["views"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"expected sample images in {path}, but it cannot be read: {error}; delete the file"
        ) from error
