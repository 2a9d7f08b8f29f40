"""A run folder as it is at a URL, so that another machine can go on from there.

Object stores replace objects whole and cannot append. What a sweep goes on from must nevertheless be of one moment: no
record may speak of an epoch whose checkpoint is not there, no checkpoint of best weights that are another epoch's. So
each round of the mirror looks at one moment of the folder, puts what is new there under names of its own, and last one
small object, the *commit*, which says what belongs together: how far each file of the record counts, and which object
holds which file of a trial. Everything else (report, table, model, logs) is for people and lies there by its own name.
"""

import math
import os
import re
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from sweep.commit import COMMIT, Commit, Stamp, note_mirror, noted_mirror, read_commit
from sweep.folder_lock import FolderInUse
from sweep.lease import Lease
from sweep.record import RunFolder
from sweep.remote import NothingThere, StorageError, Store

AT_ONCE = 8
ROUND_EVERY_S = 2.0
LAZY_EVERY_S = 30.0  # files that always change: MLflow's database, logs
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
OUTAGE_TOLD_AFTER_S = 10.0
PATIENCE_S = 20.0  # at the end of a sweep, with a storage that takes nothing
MOMENTS_TRIED = 20

TRIALS = "state/trials"
# What a sweep goes on from; grows by whole lines only.
RECORD = tuple(
    f"state/{name}"
    for name in (
        "suggestions.jsonl",
        "epochs.jsonl",
        "trials.jsonl",
        "halving.jsonl",
        "finals.jsonl",
        "sessions.jsonl",
        "test_openings.jsonl",
        "study.journal",
    )
)
# A line in one of these may take a trial's files away, or let it go on.
_DECISIONS = ("state/trials.jsonl", "state/halving.jsonl", "state/finals.jsonl")
# What MLflow has been sent: must not be ahead of MLflow's own database where that lies in the run folder.
LEDGER = ("state/tracking.jsonl", "state/tracking_spool.jsonl")
DATABASE = "mlflow.db"
LOGS = "state/logs/"
_NOT_MIRRORED = re.compile(r"state/(lock|split-now\.csv|mirror\.json|lease\.json)|mlflow\.db-.*|.*\.lock")


def stamps_of(folder: Path) -> dict[str, Stamp]:
    """Those of all files of a run folder."""
    return {path.relative_to(folder).as_posix(): stamp for path, stamp in _stamps_below(folder, set())}


class Mirror:
    """Keeps a run folder's mirror up to date, from a thread of its own: nothing waits for it or fails because of it.

    Args:
        folder: of the sweep.
        store: of its mirror.
        lease: held by us; who loses it sends nothing any more.
        told: gets a line when the storage cannot be had for a while, and one when it is back; from the thread.

    Attributes:
        problem: why the mirror lacks something, "" where nothing is known to be lacking.
    """

    def __init__(self, folder: RunFolder, store: Store, lease: Lease, told: Callable[[str], None]) -> None:
        self._root, self._store, self._lease, self._told = folder.path, store, lease, told
        self._staging = folder.path.with_name(f".{folder.path.name}.mirror")
        self._writer = uuid.uuid4().hex
        self._commit: Commit | None = None  # the last one, once it has been read
        self._stamps: dict[str, Stamp] = {}  # of the files as they were put there
        self._loose: dict[tuple[str, Stamp], str] = {}  # of trials, put there since the last commit: their objects
        self._lazy_at = -math.inf
        self._ledger: dict[str, int] = {}
        self._closing, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self.problem = "it has not been written yet"

    def start(self) -> None:
        """Begin to mirror."""
        self._thread.start()

    def finish(self, timeout_s: float) -> bool:
        """Wait until everything is there, but no longer than `timeout_s`; whether it goes on no more."""
        self._closing.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self, timeout_s: float) -> None:
        """The same, and give up then; not long where nothing gets through."""
        finished = self.finish(timeout_s)
        self._stopped.set()
        if not finished:
            self.problem = self.problem or f"not everything got there within {timeout_s:g} s"

    def send_all(self) -> None:
        """Bring the mirror up to date now, in this thread.

        Raises:
            StorageError: the storage took something not.
            FolderInUse: another machine has taken the sweep over.
        """
        self._round(everything=True)
        self._note_all()
        shutil.rmtree(self._staging, ignore_errors=True)
        self.problem = ""

    def _run(self) -> None:
        pause_s, failing_since, outage = FIRST_PAUSE_S, 0.0, _Outage(self._told, self._store.url)
        while not self._stopped.is_set():
            last, begun = self._closing.is_set(), time.monotonic()
            try:
                self._round(everything=last)
                self.problem, pause_s, failing_since = "", FIRST_PAUSE_S, 0.0
                outage.ended()
                if last:
                    self._note_all()
                    break
                # So that a slow line is not busy all the time.
                self._closing.wait(max(ROUND_EVERY_S, time.monotonic() - begun))
            except FolderInUse as error:
                self.problem = f"{error}; nothing more is sent there from here"
                self._told(self.problem)
                break
            except Exception as error:  # nothing that happens here may end the thread unsaid
                self.problem = _cause(error)
                failing_since = failing_since or time.monotonic()
                if last and time.monotonic() - failing_since >= PATIENCE_S:
                    break
                if last:
                    self._stopped.wait(FIRST_PAUSE_S)
                    continue
                outage.goes_on(self.problem)
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        shutil.rmtree(self._staging, ignore_errors=True)

    def _round(self, *, everything: bool) -> None:
        """Look at one moment of the folder, put there what is new, and commit it."""
        last = self._commit = self._commit or self._first_commit()
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        lazy = everything or time.monotonic() - self._lazy_at >= LAZY_EVERY_S
        moment = self._moment(last)
        if moment is None:  # trials end faster than one can look; the next round may have more luck
            if everything:
                raise StorageError("the run folder still changes", transient=True)
            return
        record, kept, trials = moment
        ledger = self._sizes(LEDGER) if lazy or not (self._root / DATABASE).is_file() else self._ledger
        plain = list(self._plain(lazy=lazy))  # after the record, which says that they are written
        # A commit may have got there although no answer came: what it names must stay as it is.
        unique = uuid.uuid4().hex[:12]
        names, uploads = dict(last.kept), []
        for name, (staged, stamp) in trials.items():
            key = self._loose.get((name, stamp), f"{name}.{unique}")
            names[name] = key, stamp[2]
            if (name, stamp) not in self._loose:
                uploads.append((name, stamp, key, staged))
        names = {name: names[name] for name in kept}
        commit = Commit(last.number + 1, self._writer, {**record, **ledger}, names)
        # Of an earlier session one knows how far its objects count, not whether they are those of this folder.
        mine = last.writer == self._writer
        grown = [name for name, size in commit.record.items() if not mine or last.record.get(name) != size]
        news = not mine or commit.record != last.record or commit.kept != last.kept
        if not (news or plain):
            return
        self._lease.check()
        note_mirror(self._root, self._store.url, commit if news else last)
        self._upload(plain, grown, uploads)
        self._ledger = ledger
        if lazy:
            self._lazy_at = time.monotonic()
        if not news:
            return
        self._lease.check()  # again: that may have taken long
        self._store.write(COMMIT, commit.to_json())
        self._commit = commit
        self._stamps |= {name: stamp for name, (_, stamp) in trials.items()}
        held = {key for key, _ in commit.kept.values()}
        old = {*self._loose.values(), *(key for key, _ in last.kept.values())}
        self._loose = {}
        if everything:
            old |= self._left_over()
        for key in old - held:
            with suppress(StorageError):  # what stays there is of no harm
                self._store.remove(key)

    def _first_commit(self) -> Commit:
        """What an earlier session has left there; who is about to commit counts on from what it has noted."""
        noted, found = noted_mirror(self._root), read_commit(self._store) or Commit()
        if noted.is_of(found):
            self._stamps = dict(noted.stamps)
        return replace(found, number=max(found.number, noted.number))

    def _note_all(self) -> None:
        if self._commit:
            note_mirror(self._root, self._store.url, self._commit, self._stamps)

    def _left_over(self) -> set[str]:
        """Objects of trials there; among them are those of rounds that were cut short."""
        try:
            return {f"{TRIALS}/{name}" for name in self._store.child(TRIALS).files()}
        except NothingThere:
            return set()

    def _moment(self, last: Commit) -> tuple[dict[str, int], set[str], dict[str, tuple[Path, Stamp]]] | None:
        """The record, the files of trials, and copies of those among them that are new, as they were at one moment.

        A checkpoint may be ahead of the record, as after a crash, but by no decision. None if that did not come about.
        """
        for _ in range(MOMENTS_TRIED):
            record = self._sizes(RECORD)
            if record != self._sizes(RECORD):
                continue
            kept: set[str] = set()
            trials: dict[str, tuple[Path, Stamp]] = {}
            whole = all(self._take_trial(folder, last, kept, trials) for folder in _folders(self._root / TRIALS))
            if whole and all(record.get(name) == size for name, size in self._sizes(_DECISIONS).items()):
                return record, kept, trials
            shutil.rmtree(self._staging)
            self._staging.mkdir()
        return None

    def _take_trial(self, folder: Path, last: Commit, kept: set[str], trials: dict[str, tuple[Path, Stamp]]) -> bool:
        """Take the files of a trial as they stand beside each other; whether that came about.

        They are never changed, only replaced: a second name for each holds it as it is.
        """
        for _ in range(MOMENTS_TRIED):
            taken: dict[str, tuple[Path, Stamp]] = {}
            files = _stamps_in(folder)
            for path, stamp in files.items():
                name = path.relative_to(self._root).as_posix()
                if name in last.kept and self._stamps.get(name) == stamp:
                    continue
                staged = self._staging / f"{stamp[0]}-{path.name}"
                with suppress(FileNotFoundError, FileExistsError):
                    _second_name(path, staged)
                taken[name] = staged, stamp
            if _stamps_in(folder) == files:
                kept |= {path.relative_to(self._root).as_posix() for path in files}
                trials |= taken
                return True
        return False

    def _sizes(self, names: tuple[str, ...]) -> dict[str, int]:
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = (self._root / name).stat().st_size
        return found

    def _plain(self, *, lazy: bool) -> Iterator[tuple[str, Stamp]]:
        """What else is new in the folder."""
        apart = {*RECORD, *LEDGER}
        for path, stamp in _stamps_below(self._root, {self._root / TRIALS, self._root / "state/ray"}):
            name = path.relative_to(self._root).as_posix()
            if name in apart or _NOT_MIRRORED.fullmatch(name):
                continue
            if (name == DATABASE or name.startswith(LOGS)) and not lazy:
                continue
            if self._stamps.get(name) != stamp:
                yield name, stamp

    def _upload(
        self, plain: list[tuple[str, Stamp]], grown: list[str], trials: list[tuple[str, Stamp, str, Path]]
    ) -> None:
        """Put files there, several at once; what has got there is not put there again if another fails."""

        def put_trial(item: tuple[str, Stamp, str, Path]) -> None:
            name, stamp, key, staged = item
            self._store.put(key, staged)
            self._loose[name, stamp] = key

        def put_plain(item: tuple[str, Stamp]) -> None:
            name, stamp = item
            with suppress(FileNotFoundError):  # gone again
                self._put_copy(name)
                self._stamps[name] = stamp

        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="mirror")
        try:
            for _ in pool.map(put_trial, trials):
                pass
            for _ in pool.map(put_plain, plain):
                pass
            for _ in pool.map(self._put_copy, grown):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def _put_copy(self, name: str) -> None:
        """Put a file there that may grow meanwhile."""
        path, copy = self._root / name, self._staging / name.replace("/", "-")
        if name == DATABASE:
            _copy_database(path, copy)
        else:
            shutil.copyfile(path, copy)
        try:
            self._store.put(name, copy)
        finally:
            copy.unlink()


class _Outage:
    """Tells once of each time that the storage takes nothing, and of its end."""

    def __init__(self, told: Callable[[str], None], url: str) -> None:
        self._told, self._url = told, url
        self._since = 0.0
        self._said = False

    def goes_on(self, cause: str) -> None:
        self._since = self._since or time.monotonic()
        if not self._said and time.monotonic() - self._since >= OUTAGE_TOLD_AFTER_S:
            self._said = True
            self._told(f"{self._url} takes nothing ({cause}); the sweep goes on, and what is lacking there is kept")

    def ended(self) -> None:
        if self._said:
            self._told(f"{self._url} takes what it is sent again")
        self._since, self._said = 0.0, False


def _cause(error: Exception) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, StorageError):
        return next((line.strip().removeprefix("found: ") for line in lines if "found:" in line), lines[0])
    return f"{type(error).__name__}: {lines[0][:300]}"


def _second_name(path: Path, staged: Path) -> None:
    """Hold a file as it is, whatever takes its place."""
    try:
        os.link(path, staged)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:  # a file system without links
        shutil.copyfile(path, staged)


def _copy_database(path: Path, copy: Path) -> None:
    """A copy of an SQLite database as it was at one moment, though others write to it."""
    with (
        closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=30.0)) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def _folders(path: Path) -> list[Path]:
    try:
        return [Path(each.path) for each in os.scandir(path) if each.is_dir()]
    except FileNotFoundError:
        return []


def _stamps_in(folder: Path) -> dict[Path, Stamp]:
    """The files of a folder that are no scratch files."""
    found = {}
    with suppress(FileNotFoundError):
        for each in os.scandir(folder):
            with suppress(FileNotFoundError):
                if not each.name.startswith(".") and each.is_file():
                    status = each.stat()
                    found[Path(each.path)] = status.st_ino, status.st_mtime_ns, status.st_size
    return found


def _stamps_below(folder: Path, without: set[Path]) -> Iterator[tuple[Path, Stamp]]:
    yield from _stamps_in(folder).items()
    for below in _folders(folder):
        if below not in without and not below.name.startswith("."):
            yield from _stamps_below(below, without)
