"""The output of a frozen prefix, computed once and shared by every trial and every later sweep that needs it.

Workers that need the same features compute them together: each takes the next batch of images that nobody has taken.
What they write is one memory-mapped float32 array per cut, named after everything its bits depend on, with a checksum
for each batch.
"""

import errno
import fcntl
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil
from filelock import FileLock
from numpy.typing import NDArray

from cxr_models.checksums import Blocks, begin_sums, forget, is_sound_file, put_sum, sums_file
from cxr_models.cuts import Cut
from cxr_models.room import UNFINISHED, files_of, in_use, make_room, passes
from cxr_models.storage import DAY_S, NoSpace, size_text, written_whole

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]

FEATURES_VERSION = 4  # raise it with any change of what is stored: features of before are then not used again
WAIT_S = 0.02
MOST_ATTEMPTS = 3  # at features that read back as something else
DONE = "pass.done"
LOCK = "lock"  # of a whole store, held while files are made or removed


class NoRoomError(OSError):
    """The budget or the disk has no room for the features."""


class _DamagedError(Exception):
    """Features were damaged, and have been removed."""


@dataclass(frozen=True)
class FeatureBudget:
    """Where features lie, how many bytes they may take, and what this sweep wants kept.

    Attributes:
        folder: of the features of every sweep.
        limit_bytes: of all files in the folder.
        cuts: (backbone, weights, image side) of a `TrialConfig` -> the cuts that trials of the sweep use. A pass over
            the images stores all of them that are missing.
    """

    folder: Path
    limit_bytes: int
    cuts: Mapping[tuple[str, str, int], tuple[Cut, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Extraction:
    """A pass of a frozen prefix over images.

    Attributes:
        title: what a person is told of it.
        key: everything the outcome depends on, as JSON has it.
        images: how many.
        pixels: positions among them -> what the prefix is given.
        prefix: cuts -> the function that runs it.
        images_at_once: a whole number of the prefix' batches.
    """

    title: str
    key: Mapping[str, object]
    images: int
    pixels: Callable[[Rows], Pixels]
    prefix: Callable[[Sequence[Cut]], Callable[[Pixels], list[Floats]]]
    images_at_once: int

    @property
    def digest(self) -> str:
        """Name of the folder its features lie in."""
        described = json.dumps([FEATURES_VERSION, self.images, self.key], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:24]

    def bytes_of(self, cut: Cut) -> int:
        """Size of all features of a cut."""
        return self.images * cut.bytes_per_image

    def blocks_of(self, cut: Cut) -> Blocks:
        """How the file of a cut is divided for its checksums: by shares."""
        return Blocks(self.bytes_of(cut), 0, self.images_at_once * cut.bytes_per_image)

    @property
    def shares(self) -> int:
        """How many parts workers take it in."""
        return -(-self.images // self.images_at_once)

    def positions(self, share: int) -> Rows:
        """Places of a share's images among all."""
        first = share * self.images_at_once
        return np.arange(first, min(first + self.images_at_once, self.images))


class Features:
    """What is stored of some images; in use, and therefore never evicted, until it is closed.

    Attributes:
        array: float32 (images, *cut.shape).
        missed: they were not there when `obtain` was asked for them.
    """

    def __init__(self, file: BinaryIO, cut: Cut, images: int) -> None:
        self._file = file
        self.missed = False
        shape = (images, *cut.shape)
        self.array: Floats = np.memmap(file, np.float32, mode="r", shape=shape)

    def close(self) -> None:
        """End the use: from now on the features may be evicted."""
        fcntl.flock(self._file, fcntl.LOCK_UN)  # a map of the file that somebody still has would go on holding it
        self._file.close()


@dataclass(frozen=True)
class UnderWay:
    """A pass that workers are computing at the moment: its title with its cuts, and its parts."""

    title: str
    done: int
    parts: int


def obtain(budget: FeatureBudget, extraction: Extraction, cut: Cut, *, wanted: Sequence[Cut] = ()) -> Features:
    """The features of one cut, from the store or computed now, together with other processes that want them.

    Args:
        budget: where they lie.
        extraction: how they are computed.
        cut: whose features.
        wanted: cuts that will be needed too; those that are missing are stored in the same pass, if there is room. To
            these and `cut` alone the prefix can be run: its later layers may have been trained since.

    Raises:
        NoRoomError: the budget or the disk has no room for them, or its file system refuses what they need.
    """
    begun, damaged, missed = _Pass(budget.folder / extraction.digest), 0, False
    try:
        budget.folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                if (found := _open(begun.finished(cut), cut, extraction.images)) is not None:
                    found.missed = missed
                    return found
            except _DamagedError:
                damaged += 1
                if damaged == MOST_ATTEMPTS:
                    raise NoRoomError("its features read back as something else than was written") from None
            missed = True
            with ExitStack() as stack:
                with FileLock(budget.folder / LOCK):
                    mine = _can_join(begun, budget, extraction, cut, wanted)
                    part = stack.enter_context(_opened(begun)) if mine else None
                if part:
                    _take_part(extraction, part)
                else:
                    time.sleep(WAIT_S)
    except NoRoomError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, NoSpace) else error  # a trial has a line for it
        raise NoRoomError(f"its features could not be kept: {reason}") from error


def stored_bytes(folder: Path) -> int:
    """What all features in a folder take, unfinished ones included."""
    return sum(size for _, _, size in files_of(folder))


def under_way(folder: Path) -> dict[str, UnderWay]:
    """The passes that workers of any sweep are computing at the moment, by their digests."""
    found = {}
    for begun in map(_Pass, passes(folder)):
        with suppress(FileNotFoundError):  # ended
            parts = begun.done.read_bytes()
            if begun.has_workers():
                title, cuts = begun.described()
                cut_names = " and ".join(cut.name for cut in cuts)
                found[begun.folder.name] = UnderWay(f"{title}, up to {cut_names}", sum(parts), len(parts))
    return found


def _open(path: Path, cut: Cut, images: int) -> Features | None:
    """What is stored, verified; None if it is not there, or was evicted in this moment."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        whole = os.fstat(file.fileno()).st_size == images * cut.bytes_per_image and is_sound_file(file, path)
        status = os.fstat(file.fileno())
        if status.st_nlink and not whole:
            _remove_damaged(path, status.st_ino)
        if not status.st_nlink or not whole:
            file.close()
            return None
        with suppress(PermissionError):  # another user's; reading it tells of the use too, if not as exactly
            os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
        return Features(file, cut, images)
    except BaseException:
        file.close()
        raise


def _remove_damaged(path: Path, inode: int) -> None:
    """Remove a file, unless another process has, and raise `_DamagedError`. Who has it open keeps it."""
    with FileLock(path.parent.parent / LOCK), suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            forget(path)
    raise _DamagedError


@dataclass(frozen=True)
class _Pass:
    """An extraction that has begun: which cuts it stores, and which shares are done. Lives in files."""

    folder: Path

    @property
    def plan(self) -> Path:
        return self.folder / "pass.json"

    @property
    def done(self) -> Path:
        """One byte a share: 1 when its features are written."""
        return self.folder / DONE

    def unfinished(self, cut: Cut) -> Path:
        return self.folder / f"{cut.name}.f32{UNFINISHED}"

    def finished(self, cut: Cut) -> Path:
        return self.folder / f"{cut.name}.f32"

    def files(self, cuts: Iterable[Cut]) -> list[Path]:
        """Those that a pass over some cuts writes into."""
        features = [self.unfinished(cut) for cut in cuts]
        return [self.done, *features, *map(sums_file, features)]

    def described(self) -> tuple[str, list[Cut]]:
        """Its title and its cuts; no cuts where it has not begun, or what it noted is damaged."""
        try:
            plan = json.loads(self.plan.read_text())
            return plan["title"], [
                Cut(layer, pooling, tuple(shape), tuple(taps)) for layer, pooling, shape, taps in plan["cuts"]
            ]
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # absent, or damaged
            return "", []

    def cuts(self) -> list[Cut]:
        return self.described()[1]

    def is_intact(self, shares: int) -> bool:
        """Whether it can be gone on with. A crash of the machine may have lost what is marked as done."""
        cuts = self.cuts()
        if not cuts or not all(path.exists() for path in self.files(cuts)):
            return False
        status = self.done.stat()
        return status.st_size == shares and status.st_mtime > psutil.boot_time()

    def has_workers(self) -> bool:
        return any(in_use(self.unfinished(cut)) for cut in self.cuts()[:1])

    def is_stale(self) -> bool:
        """Whether killed processes have left it that nobody goes on with: it cannot be, or has not been for a day."""
        left = [*self.folder.glob(f"*{UNFINISHED}")]
        if not left or any(in_use(path) for path in left):
            return False
        if not self.cuts() or not all(path.exists() for path in self.files(self.cuts())):
            return True
        changed = self.done.stat().st_mtime
        return changed < psutil.boot_time() or time.time() - changed > DAY_S

    def begin(self, cut: Cut, wanted: Sequence[Cut], extraction: Extraction) -> None:
        """Begin with `cut` and those of `wanted` that the disk has room for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _reserve(self.unfinished(cut), extraction.bytes_of(cut))
        chosen = [cut]
        for other in wanted:
            with suppress(NoRoomError):
                _reserve(self.unfinished(other), extraction.bytes_of(other))
                chosen.append(other)
        for one in chosen:
            begin_sums(sums_file(self.unfinished(one)), extraction.blocks_of(one))
        self.done.write_bytes(bytes(extraction.shares))
        with written_whole(self.plan) as scratch:  # last: from here on the pass is one
            cuts = [[one.layer, one.pooling, one.shape, one.taps] for one in chosen]
            scratch.write_text(json.dumps({"title": extraction.title, "cuts": cuts}))

    def finish(self) -> None:
        for cut in self.cuts():
            for of in (sums_file, Path):  # the sums first: features are never without them
                of(self.unfinished(cut)).replace(of(self.finished(cut)))
        self._forget()

    def discard(self) -> None:
        """Remove what there is of it."""
        self._forget()
        for path in self.folder.glob(f"*{UNFINISHED}*"):
            path.unlink(missing_ok=True)

    def _forget(self) -> None:
        for path in (self.plan, self.done):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Part:
    """A process' part in a pass: its cuts, descriptors of each one's file and sums, and one of the shares done."""

    begun: _Pass
    cuts: Sequence[Cut]
    files: Sequence[int]
    sums: Sequence[int]
    done: int


def _can_join(begun: _Pass, budget: FeatureBudget, extraction: Extraction, cut: Cut, wanted: Sequence[Cut]) -> bool:
    """Begin a pass unless one is under way; whether this process can take part in it. The store is locked."""
    if begun.finished(cut).exists():
        return False
    if begun.is_intact(extraction.shares):
        can_compute = {*begun.cuts()} <= {cut, *wanted}
        if can_compute or begun.has_workers():
            return can_compute
    begun.discard()
    for other_pass in map(_Pass, passes(budget.folder)):
        if other_pass.is_stale():
            other_pass.discard()
            with suppress(OSError):  # finished cuts lie there
                other_pass.folder.rmdir()
    if refused := make_room(budget.folder, budget.limit_bytes, extraction.bytes_of(cut)):
        raise NoRoomError(f"its features take {size_text(extraction.bytes_of(cut))}, {refused}")
    others, free = [], budget.limit_bytes - stored_bytes(budget.folder) - extraction.bytes_of(cut)
    for other in wanted:
        if other != cut and not begun.finished(other).exists() and extraction.bytes_of(other) <= free:
            others.append(other)
            free -= extraction.bytes_of(other)
    try:
        begun.begin(cut, others, extraction)
    except OSError:
        begun.discard()
        raise
    return True


def _reserve(path: Path, size: int) -> None:
    """Give a file its place on the disk now: a full one is to be noticed before anything is computed."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _unwritten(error) from error


def _unwritten(error: OSError) -> NoRoomError:
    return NoRoomError(f"its features could not be written: {error.strerror}")


@contextmanager
def _opened(begun: _Pass) -> Iterator[_Part]:
    """Take part in a pass: as long as one process does, its files are in use. The store is locked on entering."""
    with ExitStack() as stack:
        paths = begun.files(cuts := begun.cuts())
        done, *files = (stack.enter_context(path.open("r+b", buffering=0)).fileno() for path in paths)
        for file in files[: len(cuts)]:
            fcntl.flock(file, fcntl.LOCK_SH)
        yield _Part(begun, cuts, files[: len(cuts)], files[len(cuts) :], done)


def _take_part(extraction: Extraction, part: _Part) -> None:
    """Compute shares nobody else computes until all are done."""
    run = extraction.prefix(part.cuts)
    while missing := [share for share, byte in enumerate(os.pread(part.done, extraction.shares, 0)) if not byte]:
        for share in missing:
            if not os.fstat(part.done).st_nlink:
                return  # another process has discarded the pass
            with _claimed(part.done, share) as mine:
                if not mine or os.pread(part.done, 1, share) != b"\0":
                    continue
                positions = extraction.positions(share)
                _write(part, share, int(positions[0]), run(extraction.pixels(positions)))
                os.pwrite(part.done, b"\1", share)
        time.sleep(WAIT_S)  # for the shares of others
    _end(part, part.begun.finish)


def _write(part: _Part, share: int, first: int, found: Sequence[Floats]) -> None:
    """Write the features of a share's images, from the `first` on; where that fails, the pass is over for everybody."""
    try:
        for cut, file, sums, values in zip(part.cuts, part.files, part.sums, found, strict=True):
            rest, place = memoryview(values.tobytes()), first * cut.bytes_per_image
            put_sum(sums, 1 + share, zlib.crc32(rest))
            while rest:
                written = os.pwrite(file, rest, place)
                rest, place = rest[written:], place + written
            for one in (file, sums):
                os.fdatasync(one)  # before the share is marked as done: another machine may read it from then on
    except OSError as error:
        _end(part, part.begun.discard)
        raise _unwritten(error) from error


def _end(part: _Part, how: Callable[[], None]) -> None:
    """End a pass, unless another process has."""
    with FileLock(part.begun.folder.parent / LOCK):
        if os.fstat(part.done).st_nlink:
            how()


@contextmanager
def _claimed(done: int, share: int) -> Iterator[bool]:
    """Whether this process alone has a share now. The claim of a process that dies ends with it."""
    try:
        fcntl.lockf(done, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, share)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):  # a file system without such locks
            raise
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(done, fcntl.LOCK_UN, 1, share)
