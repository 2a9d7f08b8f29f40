"""Pixel arrays with lung masks laid over them, made once before the first trial; a U-Net runs in a child process."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxr_models.arrays import Put, kept_array
from cxr_models.dataset import Manifest, Progress
from cxr_models.masking import chunks, in_channels, masked_array
from cxr_models.pixels import mask_array, pixel_array
from sweep.keras_child import keras_child
from sweep.lung_masks import EarlierModel
from sweep.machine import this_machine
from sweep.plan import Plan


def masked_arrays(
    plan: Plan, pixels: Mapping[int, Path], cache_dir: Path, progress: Callable[[str], Progress]
) -> dict[tuple[str, int], Path]:
    """The arrays that trials with a lung mask read, by (lung_mask, image side).

    Args:
        plan: of the sweep.
        pixels: image side -> the images as they are.
        cache_dir: arrays are kept below it.
        progress: given a description, where to report it.

    Raises:
        DataError: an image or a mask can no longer be read.
        RuntimeError: the earlier sweep's model cannot be run.
    """
    found = {}
    for source in plan.lung_masks:
        for side in source.sides:
            if source.model is None:
                masks = mask_array(plan.manifest, side, cache_dir, progress(f"reading lung masks at {side} px"))
            else:
                masks = _found_lungs(plan.manifest, source.model, this_machine().cores, cache_dir, progress)
            laid = progress(f"masking images at {side} px")
            found[source.value, side] = masked_array(pixels[side], masks, cache_dir, laid)
    return found


def _found_lungs(
    manifest: Manifest, model: EarlierModel, threads: int, cache_dir: Path, progress: Callable[[str], Progress]
) -> Path:
    """A U-Net's probability of lung for every image, in steps of 1/255, at the side of the U-Net."""
    side = model.image_side
    pixels = pixel_array(manifest, side, cache_dir, progress(f"decoding at {side} px"))
    path = cache_dir / "masks" / f"{pixels.stem}-{model.sha256[:24]}.npy"
    finding = progress("finding lungs")
    images = len(manifest.records)

    def find_all(put: Put) -> None:
        with keras_child(cache_dir / "logs" / "lung_masks.log") as call:
            for some in chunks(images):
                put(some.start, call(find_lungs, model, pixels, some, threads))
                finding(min(some.stop, images), images)

    return kept_array(path, (images, side, side, 1), find_all)


def find_lungs(model: EarlierModel, pixels: Path, some: slice, threads: int) -> NDArray[np.uint8]:
    """In the child: probability of lung (images, side, side, 1) in steps of 1/255 for some of the images."""
    from cxr_models import segmentation

    unet = segmentation.load_unet(model.path, threads)
    images = in_channels(np.load(pixels, mmap_mode="r")[some], model.channels)
    return np.rint(255 * segmentation.predict_masks(unet, images)).astype(np.uint8)
