"""The output of a frozen prefix, computed once and shared by every trial and every later sweep that needs it.

Workers that need the same features compute them together: each takes the next batch of images that nobody has taken.
What they write is one memory-mapped float32 array per cut, named after everything its bits depend on.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from cxr_models.cuts import Cut

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]

FEATURES_VERSION = 1  # raise it with any change of what is stored: features of before are then not used again
WAIT_S = 0.02
UNFINISHED = ".partial"


class NoRoomError(OSError):
    """The budget or the disk has no room for the features."""


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
        key: everything the outcome depends on, as JSON has it.
        images: how many.
        pixels: positions among them -> what the prefix is given.
        prefix: cuts -> the function that runs it.
        images_at_once: a whole number of the prefix' batches.
    """

    key: Mapping[str, object]
    images: int
    pixels: Callable[[Rows], Pixels]
    prefix: Callable[[Sequence[Cut]], Callable[[Pixels], list[Floats]]]
    images_at_once: int

    @property
    def digest(self) -> str:
        described = json.dumps([FEATURES_VERSION, self.images, self.key], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:24]

    def bytes_of(self, cut: Cut) -> int:
        return self.images * cut.bytes_per_image

    @property
    def shares(self) -> int:
        """How many parts workers take it in."""
        return -(-self.images // self.images_at_once)

    def positions(self, share: int) -> Rows:
        first = share * self.images_at_once
        return np.arange(first, min(first + self.images_at_once, self.images))


class Features:
    """What is stored of some images; in use, and therefore never evicted, until it is closed.

    Attributes:
        array: float32 (images, *cut.shape).
    """

    def __init__(self, file: BinaryIO, cut: Cut, images: int) -> None:
        self._file = file
        shape = (images, *cut.shape)
        self.array: Floats = np.memmap(file, np.float32, mode="r", shape=shape)

    def close(self) -> None:
        self._file.close()


def obtain(
    budget: FeatureBudget,
    extraction: Extraction,
    cut: Cut,
    *,
    wanted: Sequence[Cut] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """The features of one cut, from the store or computed now, together with other processes that want them.

    Args:
        budget: where they lie.
        extraction: how they are computed.
        cut: whose features.
        wanted: cuts that will be needed too; those that are missing are stored in the same pass, if there is room.
        progress: told (done, total) images while they are computed.

    Raises:
        NoRoomError: the budget or the disk has no room for them.
    """
    folder = budget.folder / extraction.digest
    while True:
        if (found := _open(folder / f"{cut.name}.f32", cut, extraction.images)) is not None:
            return found
        with FileLock(_made(budget.folder) / "lock"):
            _begin(budget, extraction, folder, cut, wanted)
        _take_part(extraction, folder, progress)


def stored_bytes(folder: Path) -> int:
    """What all features in a folder take, unfinished ones included."""
    return sum(size for _, _, size in _files(folder))


def under_way(folder: Path) -> tuple[int, int]:
    """(done, total) parts of all passes that workers are computing at the moment."""
    done = total = 0
    for path in folder.glob("*/pass.done"):
        with suppress(FileNotFoundError):
            parts = path.read_bytes()
            done, total = done + sum(parts), total + len(parts)
    return done, total


def _open(path: Path, cut: Cut, images: int) -> Features | None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    status = os.fstat(file.fileno())
    if not status.st_nlink or status.st_size != images * cut.bytes_per_image:
        file.close()  # evicted in this moment, or damaged
        if status.st_nlink:
            path.unlink(missing_ok=True)
        return None
    os.utime(file.fileno())
    return Features(file, cut, images)


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
        return self.folder / "pass.done"

    def cuts(self) -> list[Cut]:
        try:
            rows = json.loads(self.plan.read_text())
        except FileNotFoundError:
            return []
        return [Cut(layer, pooling, tuple(shape)) for layer, pooling, shape in rows]

    def unfinished(self, cut: Cut) -> Path:
        return self.folder / f"{cut.name}.f32{UNFINISHED}"

    def begin(self, cuts: Sequence[Cut], extraction: Extraction) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for cut in cuts:
            with self.unfinished(cut).open("wb") as file:
                file.truncate(extraction.bytes_of(cut))
        self.done.write_bytes(bytes(extraction.shares))
        self.plan.write_text(json.dumps([[cut.layer, cut.pooling, cut.shape] for cut in cuts]))

    def end(self, *, whole: bool) -> None:
        for cut in self.cuts():
            if whole:
                self.unfinished(cut).replace(self.folder / f"{cut.name}.f32")
            else:
                self.unfinished(cut).unlink(missing_ok=True)
        self.plan.unlink(missing_ok=True)
        self.done.unlink(missing_ok=True)


def _begin(budget: FeatureBudget, extraction: Extraction, folder: Path, cut: Cut, wanted: Sequence[Cut]) -> None:
    """Begin a pass unless one is under way; the store is locked."""
    begun = _Pass(folder)
    if (folder / f"{cut.name}.f32").exists():
        return
    if (under_way := begun.cuts()) and all(begun.unfinished(one).exists() for one in under_way):
        return
    others = [one for one in wanted if one != cut and not (folder / f"{one.name}.f32").exists()]
    _make_room(budget, extraction.bytes_of(cut))
    chosen, free = [cut], budget.limit_bytes - stored_bytes(budget.folder) - extraction.bytes_of(cut)
    for other in others:
        if extraction.bytes_of(other) <= free:
            chosen.append(other)
            free -= extraction.bytes_of(other)
    begun.begin(chosen, extraction)


def _take_part(extraction: Extraction, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Compute shares nobody else computes until all are done."""
    under_way = _Pass(folder)
    with _opened(under_way) as (cuts, files, done):
        if not cuts:
            return  # another process has ended it meanwhile
        run = extraction.prefix(cuts)
        while missing := [share for share, byte in enumerate(os.pread(done, extraction.shares, 0)) if not byte]:
            for share in missing:
                with _claimed(done, share) as mine:
                    if not mine or os.pread(done, 1, share) != b"\0":
                        continue
                    try:
                        _write_share(extraction, share, run, cuts, files)
                    except OSError as error:
                        under_way.end(whole=False)
                        raise NoRoomError(f"its features could not be written: {error.strerror}") from error
                    os.pwrite(done, b"\1", share)
                if progress is not None:
                    finished = sum(os.pread(done, extraction.shares, 0))
                    progress(min(extraction.images, finished * extraction.images_at_once), extraction.images)
            time.sleep(WAIT_S)  # for the shares of others
        for file in files:
            os.fsync(file)
    with FileLock(folder.parent / "lock"):
        if under_way.cuts() == cuts and all(under_way.done.read_bytes()):
            under_way.end(whole=True)


def _write_share(
    extraction: Extraction,
    share: int,
    run: Callable[[Pixels], list[Floats]],
    cuts: Sequence[Cut],
    files: Sequence[int],
) -> None:
    positions = extraction.positions(share)
    for cut, file, found in zip(cuts, files, run(extraction.pixels(positions)), strict=True):
        rest, place = memoryview(found.tobytes()), int(positions[0]) * cut.bytes_per_image
        while rest:
            written = os.pwrite(file, rest, place)
            rest, place = rest[written:], place + written


@contextmanager
def _opened(under_way: _Pass) -> Iterator[tuple[list[Cut], list[int], int]]:
    """The cuts of a pass, a descriptor for each one's file, in use, and one of the shares done."""
    cuts = under_way.cuts()
    descriptors: list[int] = []
    try:
        try:
            for path in (under_way.done, *map(under_way.unfinished, cuts)):
                descriptors.append(os.open(path, os.O_RDWR))
                fcntl.flock(descriptors[-1], fcntl.LOCK_SH)
        except FileNotFoundError:
            cuts = []
        yield cuts, descriptors[1:], descriptors[0] if descriptors else -1
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def _claimed(done: int, share: int) -> Iterator[bool]:
    """Whether this process alone has a share now. The claim of a process that dies ends with it."""
    try:
        fcntl.lockf(done, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, share)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(done, fcntl.LOCK_UN, 1, share)


def _make_room(budget: FeatureBudget, wanted_bytes: int) -> None:
    """Remove what was not used for longest until there is room; what is in use stays. The store is locked."""
    if wanted_bytes > budget.limit_bytes:
        raise NoRoomError(f"its features take {_size(wanted_bytes)}, the cache may take {_size(budget.limit_bytes)}")
    taken = stored_bytes(budget.folder)
    for _, path, size in sorted(_files(budget.folder)):
        if taken + wanted_bytes <= budget.limit_bytes:
            return
        if _removed(path):
            taken -= size
    if taken + wanted_bytes > budget.limit_bytes:
        raise NoRoomError(f"its features take {_size(wanted_bytes)}, and {_size(taken)} of the cache are in use")


def _removed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:  # in use
        return False
    with suppress(OSError):  # other cuts lie there
        path.parent.rmdir()
    return True


def _files(folder: Path) -> list[tuple[float, Path, int]]:
    """(last use, path, bytes) of each cut's file."""
    found = []
    for path in folder.glob("*/*.f32*"):
        with suppress(FileNotFoundError):  # evicted by another sweep
            status = path.stat()
            found.append((status.st_mtime, path, status.st_size))
    return found


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 10_000_000 else f"{number / 1e6:.2f} MB"
