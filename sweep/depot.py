"""Files of a sweep for nodes that share no disk with its driver, and the way home of what trials leave there.

The driver's machine is home: its cache and the state of its run folder. A depot there hands out the files of the cache
that the sweep uses, and takes the folders of trials back. A node that sees those folders itself copies nothing.
"""

import os
import re
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import Any, Protocol

from cxr_models.checksums import sums_file
from cxr_models.storage import size_text, told_of_space, written_whole
from cxr_models.trial import CHECKPOINT, TrialData
from sweep.wording import count, duration

CHUNK_BYTES = 8 * 1024**2
TRIALS = "trials"  # folder of the state for those of trials
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # names of trials, and of what they leave


class DepotRefused(ValueError):  # noqa: N818 - what happened
    """A file that the depot was not given, or a trial that has gone on elsewhere."""


class DepotDamaged(OSError):  # noqa: N818 - what happened
    """A file that arrived as something else than was sent."""


@dataclass(frozen=True)
class Home:
    """Where a sweep's files lie on its driver's machine, and how a node finds out that it sees them itself.

    Attributes:
        cache: folder of decoded pixels and the like.
        state: of the run folder; `trials` in it has a folder for each trial.
        token: random; a file of this name lies in both folders.
    """

    cache: Path
    state: Path
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    def mark(self) -> None:
        """Put the markers there.

        Raises:
            NoSpace: a disk is full.
        """
        for marker in self._markers():
            with written_whole(marker, durable=False) as scratch:
                scratch.write_text(self.token)

    def unmark(self) -> None:
        """Take them away."""
        for marker in self._markers():
            with suppress(OSError):
                marker.unlink()

    def is_seen(self, folder: Path) -> bool:
        """Whether this machine sees one of the two folders, not merely one of the same name."""
        try:
            return self._marker(folder).read_text() == self.token
        except OSError:
            return False

    def _marker(self, folder: Path) -> Path:
        return folder / f"home-{self.token}"

    def _markers(self) -> tuple[Path, Path]:
        return self._marker(self.cache), self._marker(self.state)


@dataclass(frozen=True)
class Listed:
    """A file as the depot has it."""

    size: int
    mtime_ns: int


@dataclass
class Carried:
    """What went one way.

    Attributes:
        seconds: that nodes waited for it, added up.
    """

    files: int = 0
    size: int = 0
    seconds: float = 0.0


def files_of(data: TrialData) -> frozenset[Path]:
    """Every file that trials of a sweep read."""
    maps: tuple[Mapping[Any, Path], ...] = (data.pixels, data.masks, data.masked, data.weights)
    return frozenset(path for each in maps for path in each.values())


class Depot:
    """Hands out the files of a sweep, and takes back what its trials leave. Safe to call from several threads.

    Only the files that it was given are handed out, and only plain names in the folders of trials written. A trial's
    files are taken from whoever has begun it last: a node that was cut off and comes back changes nothing.

    Args:
        home: where the files lie.
        files: of the cache that may be handed out; their sums go with them.
    """

    def __init__(self, home: Home, files: frozenset[Path]) -> None:
        self._home = home
        self._files = files | {sums_file(path) for path in files}
        self._owners: dict[str, str] = {}
        self._carried = {"out": Carried(), "home": Carried()}
        self._lock = RLock()

    def listed(self, name: str) -> Listed | None:
        """A file of the cache, by its path in it; None where there is none.

        Raises:
            DepotRefused: it is not one of the sweep's.
        """
        return listed_file(self._file(name))

    def read(self, name: str, offset: int) -> tuple[bytes, int]:
        """A part of a file of the cache, with its CRC-32."""
        return _read(self._file(name), offset)

    def begin(self, trial_id: str, owner: str) -> dict[str, Listed]:
        """A trial begins, or goes on, with an owner; what it has left so far, by name.

        Raises:
            DepotRefused: it is no name of a trial.
        """
        folder = self._folder(trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._owners[trial_id] = owner
            for path in folder.glob(".incoming-*"):  # of an owner before
                path.unlink(missing_ok=True)
            return {path.name: found for path in left_in(folder) if (found := listed_file(path))}

    def read_of_trial(self, trial_id: str, name: str, offset: int) -> tuple[bytes, int]:
        """A part of what a trial has left, with its CRC-32."""
        return _read(self._folder(trial_id) / _plain(name), offset)

    def put(self, trial_id: str, owner: str, name: str, offset: int, data: bytes, crc: int) -> None:
        """Take a part of a file that a trial has left. It counts when `keep` says so.

        Raises:
            DepotRefused: the trial has gone on elsewhere, or a name is not plain.
            DepotDamaged: it is not what was sent.
            NoSpace: the disk is full.
        """
        if zlib.crc32(data) != crc:
            raise DepotDamaged(f"a part of {name} of trial {trial_id} arrived damaged")
        self._check_owner(trial_id, owner)
        path = self._incoming(trial_id, owner, name)
        with told_of_space(path):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | (0 if offset else os.O_TRUNC), 0o666)
            try:
                rest = memoryview(data)
                while rest:
                    written = os.pwrite(file, rest, offset)
                    rest, offset = rest[written:], offset + written
            finally:
                os.close(file)

    def keep(self, trial_id: str, owner: str, sizes: Mapping[str, int], names: Sequence[str]) -> None:
        """Let what was put take its place, all of it at once, and remove what the trial has left no longer.

        Args:
            trial_id: of the trial.
            owner: who has begun it.
            sizes: name -> size of each file that was put.
            names: of all files that the trial has left now.

        Raises:
            DepotRefused, DepotDamaged: as `put`.
        """
        folder = self._folder(trial_id)
        with self._lock:
            self._check_owner(trial_id, owner)
            incoming = {name: self._incoming(trial_id, owner, name) for name in sizes}
            for name, path in incoming.items():
                if (found := listed_file(path)) is None or found.size != sizes[name]:
                    raise DepotDamaged(f"{name} of trial {trial_id} arrived in part")
            for name in sorted(incoming, key=_checkpoint_last):
                incoming[name].replace(folder / name)
            for path in left_in(folder):
                if path.name not in names:
                    path.unlink(missing_ok=True)

    def count(self, way: str, files: int, size: int, seconds: float) -> None:
        """Note what a node says has gone a way, `out` or `home`, and how long it took."""
        with self._lock:
            carried = self._carried[way]
            carried.files, carried.size = carried.files + files, carried.size + size
            carried.seconds += seconds

    def carried(self) -> dict[str, Carried]:
        """What has gone each way so far."""
        with self._lock:
            return {way: replace(carried) for way, carried in self._carried.items()}

    def _file(self, name: str) -> Path:
        path = self._home.cache / name
        if path not in self._files:  # neither is one with .. in it, nor one from outside
            raise DepotRefused(f"{name!r} is no file of this sweep's cache")
        return path

    def _folder(self, trial_id: str) -> Path:
        return self._home.state / TRIALS / _plain(trial_id)

    def _check_owner(self, trial_id: str, owner: str) -> None:
        with self._lock:
            if self._owners.get(trial_id) != owner:
                raise DepotRefused(f"trial {trial_id} has gone on elsewhere")

    def _incoming(self, trial_id: str, owner: str, name: str) -> Path:
        return self._folder(trial_id) / f".incoming-{_plain(owner)}-{_plain(name)}"


class Asking(Protocol):
    """How a node asks the depot, wherever that is."""

    def __call__(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Begin a call of a method of `Depot`; what is returned waits for its answer, and raises what it raised."""
        ...


def directly(depot: Depot) -> Asking:
    """Ask a depot in this process."""

    def ask(method: str, *arguments: Any) -> Callable[[], Any]:
        return lambda: getattr(depot, method)(*arguments)

    return ask


def carried_text(carried: Mapping[str, Carried]) -> str:
    """What went to other nodes and came back, for a person; an empty string where nothing did."""
    told = []
    for way, what in (("out", "went to other nodes"), ("home", "of trials came back")):
        if (own := carried[way]).files:
            size = size_text(own.size)
            told.append(f"{count(own.files, 'file')} ({size}) {what}, which took them {duration(own.seconds)} in all")
    return "; ".join(told)


def listed_file(path: Path) -> Listed | None:
    """What the depot says of a file; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return Listed(status.st_size, status.st_mtime_ns)


def _read(path: Path, offset: int) -> tuple[bytes, int]:
    with path.open("rb") as file:
        data = os.pread(file.fileno(), CHUNK_BYTES, offset)
    return data, zlib.crc32(data)


def _plain(name: str) -> str:
    if not _PLAIN.fullmatch(name):
        raise DepotRefused(f"expected the plain name of a trial or of a file, got {name!r}")
    return name


def _checkpoint_last(name: str) -> bool:
    """What a checkpoint relies on is there before it."""
    return name == CHECKPOINT


def left_in(folder: Path) -> list[Path]:
    """What a trial has left: files with plain names. What is being written has another."""
    with suppress(FileNotFoundError):
        return [path for path in folder.iterdir() if _PLAIN.fullmatch(path.name) and path.is_file()]
    return []
