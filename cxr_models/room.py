"""What features take on the disk, and what gives way when others need the room."""

import fcntl
from contextlib import suppress
from pathlib import Path

from cxr_models.checksums import forget
from cxr_models.storage import size_text

UNFINISHED = ".partial"


def make_room(folder: Path, limit_bytes: int, wanted_bytes: int) -> str:
    """Remove what was not used for longest until there is room; what is in use stays. The store is locked.

    Args:
        folder: of the store.
        limit_bytes: of all its features.
        wanted_bytes: of those to come.

    Returns:
        Why there is no room for them, or an empty string.
    """
    if wanted_bytes > limit_bytes:
        return f"the cache may take {size_text(limit_bytes)}"
    while (excess := (taken := sum(size for _, _, size in files_of(folder))) + wanted_bytes - limit_bytes) > 0:
        idle = [(path, size) for _, path, size in sorted(files_of(folder)) if not in_use(path)]
        removed = 0
        if sum(size for _, size in idle) >= excess:  # nothing goes in vain
            for path, size in idle:
                if removed < excess and _removed(path):
                    removed += size
        if not removed:
            return f"and {size_text(taken)} of the cache are in use"
    return ""


def files_of(folder: Path) -> list[tuple[float, Path, int]]:
    """(last use, path, bytes) of each cut's file in a store."""
    found = []
    for one in passes(folder):
        with suppress(FileNotFoundError):  # evicted by another sweep
            for path in (*one.glob("*.f32"), *one.glob(f"*.f32{UNFINISHED}")):
                status = path.stat()
                found.append((max(status.st_atime, status.st_mtime), path, status.st_size))
    return found


def passes(folder: Path) -> list[Path]:
    """The folder of each pass over images, finished or not, in a store."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []


def in_use(path: Path) -> bool:
    """Whether somebody uses a file, or it is not this user's to remove."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):
        return True
    return False


def _removed(path: Path) -> bool:
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            forget(path)
    except OSError:  # in use
        return False
    with suppress(OSError):  # other cuts lie there
        path.parent.rmdir()
    return True
