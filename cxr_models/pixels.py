"""Every image decoded and resized once into one memory-mapped uint8 array, which all trials read."""

import hashlib
import json
from pathlib import Path
from threading import Lock

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from cxr_models.dataset import DataError, Manifest, Progress, in_threads
from cxr_models.images import read_picture
from cxr_models.storage import written_whole

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
    """Decode every image of the manifest, unless a run before has done so.

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
        OSError: the disk has no room for the array.
    """
    channels = 1 if manifest.grey else 3
    shape = (len(manifest.records), side, side, channels)
    contents = json.dumps([DECODE_VERSION, *(record.sha256 for record in manifest.records)])
    name = f"{hashlib.sha256(contents.encode()).hexdigest()[:24]}-{side}px-{channels}ch"
    path = cache_dir / "pixels" / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not _is_whole(path, shape):
            with written_whole(path) as scratch:
                _write(scratch, manifest, shape, progress)
    return path


def mask_array(manifest: Manifest, side: int, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Read the lung mask of every image, unless a run before has done so.

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
        OSError: the disk has no room for the array.
    """
    files = [manifest.root / record.mask for record in manifest.records]
    try:
        digests = in_threads(lambda file: hashlib.sha256(file.read_bytes()).hexdigest(), files, None)
    except OSError as error:
        raise _mask_error(Path(str(error.filename)), error) from error
    contents = json.dumps([MASK_VERSION, *digests])
    path = cache_dir / "masks" / f"{hashlib.sha256(contents.encode()).hexdigest()[:24]}-{side}px.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(files), side, side, 1)
    with FileLock(path.with_suffix(".lock")):
        if not _is_whole(path, shape):
            masks = in_threads(lambda file: _decode_mask(file, side), files, progress)
            with written_whole(path) as scratch:
                np.save(scratch, np.stack(masks))
    return path


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


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        pixels = np.lib.format.open_memmap(path, mode="r")
        whole_bytes = pixels.offset + pixels.nbytes
        return pixels.shape == shape and pixels.dtype == np.uint8 and path.stat().st_size == whole_bytes
    except (OSError, ValueError):  # absent, cut short or no array
        return False


def _write(path: Path, manifest: Manifest, shape: tuple[int, int, int, int], progress: Progress | None) -> None:
    """Write the array as images get ready. Not through a memory map: a full disk would end the process by a signal."""
    _, side, _, channels = shape
    one_at_a_time = Lock()
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        first = file.tell()

        def fill(index: int) -> None:
            pixels = _decode_listed(manifest.root / manifest.records[index].path, side, channels)
            with one_at_a_time:
                file.seek(first + index * pixels.nbytes)
                file.write(pixels.tobytes())

        in_threads(fill, range(len(manifest.records)), progress)


def _decode_listed(path: Path, side: int, channels: int) -> NDArray[np.uint8]:
    try:
        return decode(path, side, channels)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(path)!r} could be read when the data set was listed, and now it cannot: {error}\n"
            "  remedy: leave the images alone while a sweep starts, and start it again"
        ) from error
