"""Files that are either whole or absent, and their sizes in words."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a scratch path that takes the place of `path` only if the block succeeds.

    The scratch file lies in the same folder and keeps its ending, because libraries choose the format by it.
    A reader therefore sees the old file or the new one, never a part.

    Args:
        path: of the file.
        durable: wait for the disk, so that it holds after a power failure too. Without, such a failure may leave a
            part, which the reader must be able to tell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield scratch
        if durable:
            with scratch.open("rb") as written:
                os.fsync(written.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def remove_scratch(path: Path) -> None:
    """Remove the scratch files of processes that were killed while they wrote `path`."""
    for scratch in path.parent.glob(f".*-{glob.escape(path.name)}"):
        scratch.unlink(missing_ok=True)


def size_text(size: int) -> str:
    """`1.2 GB`, `34.5 MB`, `0.6 kB`."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"
