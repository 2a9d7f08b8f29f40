"""Images as one `.npy` file below a cache folder: made once, whole, and verified before it is used again."""

import errno
import io
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from cxr_models.checksums import Blocks, forget, is_sound, write_sums
from cxr_models.storage import no_space, told_of_space, written_whole

# Takes images (n, side, side, channels) and the place of the first; from any thread, in any order.
Put = Callable[[int, NDArray[np.uint8]], None]


def kept_array(path: Path, shape: tuple[int, int, int, int], fill: Callable[[Put], None]) -> Path:
    """The array at a path, unless a sound one is there made now.

    A damaged one is removed, and made again as another file: who has the old one open keeps it. Of several processes
    asking at once one makes it and the others wait.

    Args:
        path: of the `.npy` file, named after all that its contents depend on.
        shape: (images, side, side, channels).
        fill: puts in every image.

    Returns:
        `path`: uint8, 0 to 255. Open it with `np.load(path, mmap_mode="r")`.

    Raises:
        NoSpace: the disk has no room for it, or fails.
    """
    size = math.prod(shape)
    with told_of_space(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not _is_kept(path, shape):
                forget(path)
                _write(path, shape, fill)
                if not _is_kept(path, shape):
                    raise no_space(path, errno.EIO, size)  # it does not read back as it was written
    return path


def _is_kept(path: Path, shape: tuple[int, ...]) -> bool:
    if not is_sound(path):
        return False
    found = np.load(path, mmap_mode="r")
    return bool(found.shape == shape and found.dtype == np.uint8)


def _write(path: Path, shape: tuple[int, int, int, int], fill: Callable[[Put], None]) -> None:
    """Write the array as images get ready. Not through a memory map: a full disk would end the process by a signal."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    first_byte, image_bytes = header.tell(), math.prod(shape[1:])
    blocks = Blocks(first_byte + shape[0] * image_bytes, first_byte, image_bytes)
    sums = [zlib.crc32(header.getvalue()), *([0] * shape[0])]
    one_at_a_time = Lock()
    with written_whole(path, blocks.size) as scratch:
        with scratch.open("r+b") as file:
            file.write(header.getvalue())

            def put(first: int, images: NDArray[np.uint8]) -> None:
                written = [image.tobytes() for image in images]
                sums[1 + first : 1 + first + len(written)] = map(zlib.crc32, written)
                with one_at_a_time:
                    file.seek(first_byte + first * image_bytes)
                    file.writelines(written)

            fill(put)
        write_sums(path, blocks, sums)
