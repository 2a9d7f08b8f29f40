"""Every image decoded and resized once into one memory-mapped uint8 array, which all trials read."""

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_models.arrays import Put, kept_array
from cxr_models.dataset import DataError, Manifest, Progress, in_threads
from cxr_models.images import read_picture

DECODE_VERSION = 1  # raise it with any change of what `decode` returns: arrays of before are then not used again
MASK_VERSION = 1  # the same for `mask_array`


def decode(path: Path, side: int, channels: int) -> NDArray[np.uint8]:
    """Read one image as the network will see it.

    The picture is `images.read_picture`'s, resized by Pillow's antialiased bilinear filter to a square. The aspect
    ratio is not kept: nothing is cropped and nothing is padded.

    Args:
        path: a PNG, JPEG, BMP, TIFF, GIF or WebP file.
        side: height and width of the result, in pixels.
        channels: 1 for luminance, 3 for RGB.

    Returns:
        (side, side, channels), 0 to 255.

    Raises:
        OSError, ValueError: as `images.read_picture`.
    """
    picture = read_picture(path).convert("L" if channels == 1 else "RGB")
    small = picture.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=None)
    return np.asarray(small).reshape(side, side, channels)


def pixel_array(manifest: Manifest, side: int, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Decode every image of the manifest, unless a run before has done so and the array is sound.

    The file is named after the contents of the images, so other data, labels and splits of the same images in the same
    order share it. Of several processes asking at once one decodes and the others wait for it.

    Args:
        manifest: whose images to decode.
        side: height and width of every image, in pixels.
        cache_dir: the array is kept below it.
        progress: called after every image decoded.

    Returns:
        `.npy` file, uint8 (images, side, side, channels) in the order of `manifest.records`; one channel where all
        images are grey, else three. Open it with `np.load(path, mmap_mode="r")`.

    Raises:
        DataError: an image can no longer be read.
        NoSpace: the disk has no room for the array.
    """
    channels = 1 if manifest.grey else 3
    shape = (len(manifest.records), side, side, channels)
    contents = json.dumps([DECODE_VERSION, *(record.sha256 for record in manifest.records)])
    name = f"{hashlib.sha256(contents.encode()).hexdigest()[:24]}-{side}px-{channels}ch"

    def decode_all(put: Put) -> None:
        def fill(index: int) -> None:
            record = manifest.records[index]
            put(index, _decode_listed(manifest.root / record.path, side, channels)[np.newaxis])

        in_threads(fill, range(len(manifest.records)), progress)

    return kept_array(cache_dir / "pixels" / f"{name}.npy", shape, decode_all)


def mask_array(manifest: Manifest, side: int, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Read the lung mask of every image, unless a run before has done so and the array is sound.

    A pixel of a mask file is inside where it is brighter than half of the file's brightest, so that masks of 0 and 1
    serve as well as those of 0 and 255. The mask is resized by averaging, and a pixel of the result is inside where
    more than half of what it covers is.

    Args:
        manifest: every record of it has a mask.
        side: height and width of every mask, in pixels.
        cache_dir: the array is kept below it, named after the contents of the masks.
        progress: called after every mask read.

    Returns:
        `.npy` file, uint8 (images, side, side, 1), 0 or 255, in the order of `manifest.records`.

    Raises:
        DataError: a mask cannot be read.
        NoSpace: the disk has no room for the array.
    """
    files = [manifest.root / record.mask for record in manifest.records]
    try:
        digests = in_threads(lambda file: hashlib.sha256(file.read_bytes()).hexdigest(), files, None)
    except OSError as error:
        raise _mask_error(Path(str(error.filename)), error) from error
    contents = json.dumps([MASK_VERSION, *digests])
    path = cache_dir / "masks" / f"{hashlib.sha256(contents.encode()).hexdigest()[:24]}-{side}px.npy"

    def read_all(put: Put) -> None:
        def fill(index: int) -> None:
            put(index, _decode_mask(files[index], side)[np.newaxis])

        in_threads(fill, range(len(files)), progress)

    return kept_array(path, (len(files), side, side, 1), read_all)


def _decode_mask(path: Path, side: int) -> NDArray[np.uint8]:
    try:
        grey = np.asarray(read_picture(path).convert("L"))
    except (OSError, ValueError) as error:
        raise _mask_error(path, error) from error
    inside = Image.fromarray(np.where(2 * grey.astype(np.int32) > grey.max(), 255, 0).astype(np.uint8))
    small = np.asarray(inside.resize((side, side), Image.Resampling.BOX))
    return np.where(small >= 128, 255, 0).astype(np.uint8).reshape(side, side, 1)


def _mask_error(path: Path, error: Exception) -> DataError:
    return DataError(
        f"expected a lung mask in {str(path)!r}\n  found: {error}\n"
        "  remedy: copy the mask again, or move it away to leave its image without one"
    )


def _decode_listed(path: Path, side: int, channels: int) -> NDArray[np.uint8]:
    try:
        return decode(path, side, channels)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(path)!r} could be read when the data set was listed, and now it cannot: {error}\n"
            "  remedy: leave the images alone while a sweep starts, and start it again"
        ) from error
