"""The files of a sweep as a worker on a node has them: fetched from the depot; what trials leave is brought home."""

import os
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from cxr_models.checksums import forget, is_sound, seal, sums_file
from cxr_models.storage import DAY_S, told_of_space, written_whole
from cxr_models.trial import TrialConfig, TrialData
from sweep.caching import room_for_features
from sweep.depot import CHUNK_BYTES, TRIALS, Asking, DepotDamaged, Home, Listed, left_in
from sweep.worker import Work

NODE_CACHE = "SWEEP_NODE_CACHE"  # environment variable of a node: where its own cache lies
MOST_ATTEMPTS = 5  # at a moment in which a training changes none of its files


def files_for(data: TrialData, config: TrialConfig) -> list[Path]:
    """Those that one trial reads."""
    of_side = [data.masks[config.image_side]] if config.image_side in data.masks else []
    weights = data.weights.get((config.backbone, config.weights, config.image_side))
    return [data.pictures(config), *of_side, *([weights] if weights else [])]


def moved(work: Work, places: Mapping[Path, Path]) -> Work:
    """The same work for a machine where folders of the driver lie elsewhere.

    Args:
        work: with the driver's paths.
        places: folder of the driver -> where what is below it lies here.
    """

    def each(paths: Mapping[Any, Path]) -> dict[Any, Path]:
        return {key: moved_path(path, places) for key, path in paths.items()}

    data = work.data
    features = data.features and replace(data.features, folder=moved_path(data.features.folder, places))
    here = replace(
        data,
        pixels=each(data.pixels),
        masks=each(data.masks),
        masked=each(data.masked),
        weights=each(data.weights),
        features=features,
    )
    return replace(work, data=here, folder=moved_path(work.folder, places))


def moved_path(path: Path, places: Mapping[Path, Path]) -> Path:
    """One path; of folders inside each other the innermost counts, and a path below none stays as it is."""
    for folder in sorted(places, key=lambda folder: len(folder.parts), reverse=True):
        if path.is_relative_to(folder):
            return places[folder] / path.relative_to(folder)
    return path


class NodeFiles:
    """The files of a sweep as a worker on a node has them: home's own where it sees them, else copies in its cache.

    Args:
        home: the driver's machine.
        ask: the depot there.

    Attributes:
        places: folder of the driver -> where it lies here.
    """

    def __init__(self, home: Home, ask: Asking) -> None:
        self._home, self._ask = home, ask
        self._cache = own_cache(home)
        self.places: dict[Path, Path] = {}
        if self._cache != home.cache or not home.is_seen(home.cache):
            self.places[home.cache] = self._cache
        self._keeps_trials = not home.is_seen(home.state)
        if self._keeps_trials:
            self.places[home.state] = self._cache / TRIALS / home.token
        self._here: set[Path] = set()  # files that have been verified
        self._owner = ""
        self._sent: dict[str, tuple[int, int, int]] = {}  # name -> the file of it that is home

    def work(self, work: Work) -> Work:
        """The work with the paths of this machine.

        Raises:
            NoSpace: the disk of its cache is full.
            OSError: there can be no cache.
        """
        if self.places:
            _make_cache(self._cache)
            _remove_old_trials(self._cache / TRIALS)
        here = moved(work, self.places)
        features = here.data.features
        if features is None or self._home.cache not in self.places:
            return here
        limit = min(features.limit_bytes, room_for_features(features.folder))
        return replace(here, data=replace(here.data, features=replace(features, limit_bytes=limit)))

    def ready(self, work: Work, trial_id: str, config: TrialConfig) -> None:
        """Have all that a trial needs here before it begins: what it reads, and what it left when it ran elsewhere.

        Args:
            work: with the driver's paths.
            trial_id: of the trial.
            config: of the trial.

        Raises:
            NoSpace: the disk is full.
            DepotRefused, DepotDamaged: see `Depot`.
        """
        for path in files_for(work.data, config):
            self._fetch(path)
        self._owner, self._sent = secrets.token_hex(8), {}
        left: dict[str, Listed] = self._ask("begin", trial_id, self._owner)()
        if not self._keeps_trials:
            return
        folder = self._folder(trial_id)
        shutil.rmtree(folder, ignore_errors=True)  # it may be of an earlier attempt
        folder.mkdir(parents=True)
        begun = time.perf_counter()
        for name, listed in left.items():
            path = folder / name
            with written_whole(path, durable=False) as scratch:
                self._receive(scratch, listed.size, "read_of_trial", trial_id, name)
            self._sent[name] = _stamp(path.stat())
        self._count("out", [listed.size for listed in left.values()], begun)

    def bring_home(self, trial_id: str) -> None:
        """Bring what the trial has left home, as it is at one moment; what has not changed since is there already.

        Raises:
            DepotRefused, DepotDamaged, NoSpace: see `Depot`.
        """
        if not self._keeps_trials:
            return
        begun = time.perf_counter()
        with _opened(self._folder(trial_id)) as files:
            stamps = {name: _stamp(os.fstat(file)) for name, file in files.items()}
            changed = [name for name in files if stamps[name] != self._sent.get(name)]
            if not changed and stamps.keys() == self._sent.keys():
                return
            for name in changed:
                self._send(trial_id, name, files[name], stamps[name][0])
            sizes = {name: stamps[name][0] for name in changed}
            self._ask("keep", trial_id, self._owner, sizes, list(files))()
        self._sent = stamps
        self._count("home", list(sizes.values()), begun)

    def forget(self, trial_id: str) -> None:
        """The trial has ended here."""
        if self._keeps_trials:
            shutil.rmtree(self._folder(trial_id), ignore_errors=True)

    def moved(self, path: Path) -> Path:
        """One path of the driver, as it is here."""
        return moved_path(path, self.places)

    def _folder(self, trial_id: str) -> Path:
        return self.places[self._home.state] / TRIALS / trial_id

    def _fetch(self, driver_path: Path) -> None:
        """Have a file of the driver's cache here; whoever comes first on this machine fetches it, once."""
        path = moved_path(driver_path, self.places)
        if self._home.cache not in self.places or path in self._here:
            return
        name = str(driver_path.relative_to(self._home.cache))
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not is_sound(path):
                self._copy(name, path)
        self._here.add(path)

    def _copy(self, name: str, path: Path) -> None:
        begun = time.perf_counter()
        listed: Listed | None = self._ask("listed", name)()
        if listed is None:
            raise FileNotFoundError(f"{name} is gone from the cache of the sweep's own machine")
        sums = sums_file(path)
        of_sums: Listed | None = self._ask("listed", f"{name}.sums")()
        forget(path)
        if of_sums is not None:
            with written_whole(sums) as scratch:
                self._receive(scratch, of_sums.size, "read", f"{name}.sums")
        with written_whole(path, listed.size) as scratch:
            self._receive(scratch, listed.size, "read", name)
            os.utime(scratch, ns=(listed.mtime_ns, listed.mtime_ns))  # features are named after it
        if of_sums is None:
            seal(path)
        if not is_sound(path):
            forget(path)
            raise DepotDamaged(f"{path} is not what was sent")
        self._count("out", [listed.size], begun)

    def _receive(self, path: Path, size: int, method: str, *of: str) -> None:
        """Write what the depot reads to a file; the next part is on its way meanwhile."""
        with told_of_space(path), path.open("r+b" if path.exists() else "wb") as file:
            following = self._ask(method, *of, 0)
            for offset in range(0, size, CHUNK_BYTES):
                data, crc = following()
                following = self._ask(method, *of, offset + CHUNK_BYTES)
                if zlib.crc32(data) != crc or len(data) != min(CHUNK_BYTES, size - offset):
                    raise DepotDamaged(f"a part of {of[-1]} arrived damaged, or it has changed meanwhile")
                file.write(data)

    def _send(self, trial_id: str, name: str, file: int, size: int) -> None:
        """Bring one file home; a part is read while the one before is on its way."""
        waiting: Callable[[], Any] = lambda: None  # noqa: E731
        for offset in range(0, max(size, 1), CHUNK_BYTES):
            data = os.pread(file, CHUNK_BYTES, offset)
            waiting()
            waiting = self._ask("put", trial_id, self._owner, name, offset, data, zlib.crc32(data))
        waiting()

    def _count(self, way: str, sizes: Sequence[int], begun: float) -> None:
        if sizes:
            self._ask("count", way, len(sizes), sum(sizes), time.perf_counter() - begun)()


def own_cache(home: Home) -> Path:
    """Where a node keeps its copies: where its environment says, else at the path of the driver's cache."""
    given = os.environ.get(NODE_CACHE)
    return Path(given).expanduser().resolve() if given else home.cache


def _make_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"expected a folder for this node's copies of images and weights, got {cache}: {error.strerror}; set "
            f"{NODE_CACHE} before `ray start` there",
        ) from error


def _remove_old_trials(folder: Path) -> None:
    """Remove what killed workers of other sweeps left; a trial that runs changes its folder now and then."""
    with suppress(FileNotFoundError):
        for own in folder.iterdir():
            if time.time() - max(path.stat().st_mtime for path in (own, *own.glob("*/*"))) > DAY_S:
                shutil.rmtree(own, ignore_errors=True)


@contextmanager
def _opened(folder: Path) -> Iterator[dict[str, int]]:
    """Descriptors of all files in a trial's folder as they are at one moment, while training goes on."""
    with ExitStack() as stack:
        for _ in range(MOST_ATTEMPTS):
            files = {}
            for path in left_in(folder):
                with suppress(FileNotFoundError):
                    files[path.name] = stack.enter_context(path.open("rb")).fileno()
            now = {path.name: found for path in left_in(folder) if (found := _stamp_of(path))}
            if now == {name: _stamp(os.fstat(file)) for name, file in files.items()}:
                break
        yield files


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        return _stamp(path.stat())
    except FileNotFoundError:
        return None
