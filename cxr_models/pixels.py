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
