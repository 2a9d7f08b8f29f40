"""Files that are whole or absent, records that grow by whole lines, disks that take no more, and sizes in words."""

import errno
import fcntl
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil

FULL = (errno.ENOSPC, errno.EDQUOT)
FAILING = (errno.EIO, errno.EROFS)
NEXT_TO_NOTHING = 64 * 1024  # bytes; a disk with less is full
DAY_S = 24 * 3600.0
CLOCK_S = 3600.0  # by how much the clock may have been set since a process started, or that of a server be wrong
# Process, host, and start of the host with the process numbers that count there; see `_origin`.
_SCRATCH = re.compile(r"\.(\d+)-([0-9a-f]{8})([0-9a-f]{8})-.+")


class NoSpace(OSError):  # noqa: N818 - reads as what happened
    """A disk that takes no more: it is full, a quota is used up, or it fails. Its text is for a person."""

    @property
    def path(self) -> Path:
        """The file that could not be written."""
        return Path(self.filename)

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def written_whole(path: Path, size: int = 0, *, durable: bool = True) -> Iterator[Path]:
    """Yield a scratch path that takes the place of `path` only if the block succeeds.

    The scratch file lies in the same folder and keeps its ending, because libraries choose the format by it.
    A reader therefore sees the old file or the new one, never a part. What killed processes left there is removed.

    Args:
        path: of the file.
        size: in bytes, of a file that is large: the scratch file gets its place on the disk now, so that a full disk
            is noticed before the block has worked for an hour. The block opens it with `r+b`.
        durable: wait for the disk, so that it holds after a power failure too. Without, such a failure may leave a
            part, which the reader must be able to tell.

    Raises:
        NoSpace: the disk takes no more.
    """
    scratch = path.with_name(f".{os.getpid()}-{_origin()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        if size:
            with scratch.open("wb") as reserved:
                os.posix_fallocate(reserved.fileno(), 0, size)
        yield scratch
        if durable:
            with scratch.open("rb") as written:
                os.fsync(written.fileno())
        scratch.replace(path)
    except Exception as error:
        refused = _refusal(error, path.parent)
        with suppress(OSError):
            scratch.unlink(missing_ok=True)  # the room it took is free in what is told
        if refused:
            raise no_space(path, refused, size) from error
        raise
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextmanager
def told_of_space(path: Path, size: int = 0) -> Iterator[None]:
    """Let what fails in the block because the disk of `path` takes no more raise `NoSpace`; `size` as there."""
    try:
        yield
    except Exception as error:
        if refused := _refusal(error, path.parent):
            raise no_space(path, refused, size) from error
        raise


def append_whole(path: Path, text: str, *, durable: bool = True) -> None:
    """Add text to the end of a file; all of it or nothing.

    Args:
        path: of the file.
        text: to be added.
        durable: wait for the disk, so that it holds after a power failure too.

    Raises:
        NoSpace: the disk takes no more; the file is as long as before.
    """
    with told_of_space(path), path.open("ab", buffering=0) as file:
        with suppress(OSError):  # a file system without locks: only one process may write there
            fcntl.flock(file, fcntl.LOCK_EX)
        before = os.fstat(file.fileno()).st_size
        try:
            rest = memoryview(text.encode())
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
            if durable:
                os.fdatasync(file.fileno())
        except BaseException:
            with suppress(OSError):  # a disk that fails altogether
                os.ftruncate(file.fileno(), before)
            raise


def sync(path: Path) -> None:
    """Wait until a file, if it exists, is on the disk."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        os.fdatasync(file.fileno())


def no_space(path: Path, code: int, size: int = 0) -> NoSpace:
    """What a person is told of a file that its disk did not take.

    Args:
        path: of the file.
        code: the number of the error, such as `errno.ENOSPC`.
        size: of the file in bytes; 0 where nobody knows.
    """
    reason = os.strerror(code)
    what = f"{path} ({size_text(size)})" if size else f"{path}"
    try:
        free = f"; {size_text(shutil.disk_usage(_existing(path)).free)} are free there"
    except OSError:
        free = ""
    elsewhere = "use another disk: --cache-dir for caches, --out for run folders"
    if code in FULL:
        text = f"expected room on the disk for {what}\n  found: {reason}{free}\n  remedy: make room, or {elsewhere}"
    else:
        text = f"expected to write {what}\n  found: {reason}\n  remedy: have the disk examined, or {elsewhere}"
    return NoSpace(code, text, str(path))


def remove_stale(folder: Path) -> None:
    """Remove the scratch files that killed processes left in a folder.

    Of this start of this host they are known by their process numbers. Those of other hosts that share the disk, and
    of other containers, may be in use as long as they change: they go when they have not for a day.
    """
    with suppress(FileNotFoundError, PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            if found := _SCRATCH.fullmatch(entry.name):
                with suppress(OSError):  # gone meanwhile, or not ours to remove
                    if _is_stale(int(found[1]), found[2], found[3], entry.stat(follow_symlinks=False).st_mtime):
                        os.unlink(entry.path)


def _is_stale(process: int, host: str, start: str, changed: float) -> bool:
    if host + start == _origin():
        return not _lives(process, changed)
    if host == _origin()[:8] and changed < psutil.boot_time() - CLOCK_S:
        return True
    return time.time() - changed > DAY_S


def _lives(process: int, since: float) -> bool:
    """Whether a process that wrote at a time lives; another may have got its number."""
    try:
        found = psutil.Process(process)
        return found.status() != psutil.STATUS_ZOMBIE and found.create_time() < since + CLOCK_S
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


@cache
def boot_id() -> str:
    """Names this start of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{platform.node()} {round(psutil.boot_time())}"


@cache
def _origin() -> str:
    """Names where the number of a process means something: the host, and its start. A container has numbers of its own.

    16 hexadecimal digits, the first half of the host alone.
    """
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    host, start = platform.node(), f"{boot_id()} {numbers}"
    return f"{zlib.crc32(host.encode()):08x}{zlib.crc32(start.encode()):08x}"


def _refusal(error: Exception, folder: Path) -> int:
    """The number of the error if the disk of a folder takes no more, else 0. Libraries do not always pass it on."""
    if isinstance(error, NoSpace) or not isinstance(error, OSError | RuntimeError):
        return 0
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        elsewhere = error.filename is not None and Path(os.fsdecode(error.filename)).parent not in (
            folder,
            *folder.parents,
        )
        return 0 if elsewhere or error.errno not in (*FULL, *FAILING) else error.errno
    for code in (*FULL, *FAILING):
        if os.strerror(code) in str(error):  # as HDF5 has it
            return code
    if isinstance(error, OSError):  # as NumPy and Pillow have it
        with suppress(OSError):
            if shutil.disk_usage(_existing(folder)).free < NEXT_TO_NOTHING:
                return errno.ENOSPC
    return 0


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def size_text(size: int) -> str:
    """`1.2 GB`, `34.5 MB`, `0.6 kB`."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"
