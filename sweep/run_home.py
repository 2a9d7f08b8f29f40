"""Where run folders lie: a folder, or a URL, whose run folders are worked on in the cache and mirrored."""

import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cxr_models.dataset import Progress
from sweep.commit import COMMIT, Commit, note_mirror, noted_mirror, read_commit
from sweep.fetching import Wanted, below, bring
from sweep.folder_lock import FolderInUse, FolderLock
from sweep.lease import LEASE, Lease
from sweep.mirror import LEDGER, RECORD, TRIALS, Mirror, stamps_of
from sweep.record import RunFolder
from sweep.remote import NothingThere, StorageError, Store, ThereAlready, digest_of, is_url

PULLS_TRIED = 3  # of a sweep that runs elsewhere and replaces what is being fetched
SOON_S = 3.0
# How long the end of a sweep waits for its mirror.
PATIENCE_S = 1800.0
PATIENCE_OF_INTERRUPTED_S = 60.0

Described = Callable[[str], Progress]


class RunHome:
    """A place for run folders.

    Args:
        out: a folder, or a URL.
        cache_dir: of a URL's run folders the working copies lie in `runs/` below it.

    Attributes:
        out: where the run folders, or their working copies, lie.

    Raises:
        StorageError: the URL cannot be used.
    """

    def __init__(self, out: str, cache_dir: Path) -> None:
        self._store = Store(out) if is_url(out) else None
        self.out = cache_dir / "runs" / digest_of(out) if self._store else Path(out)
        self._lease: Lease | None = None
        self._mirror: Mirror | None = None
        self._working: RunFolder | None = None
        self._told: Callable[[str], None] = lambda line: None

    def check(self) -> None:
        """Try whether run folders can be put there, before hours are spent on what goes there.

        Raises:
            StorageError: they cannot.
        """
        if self._store:
            name = f".check-{uuid.uuid4().hex}"
            self._store.write(name, b"to be removed at once")
            self._store.read(name)
            self._store.remove(name)

    def refuse_taken(self, name: str) -> None:
        """Tell before any work is done what `create` with `exactly` would find.

        Raises:
            ValueError: the name is taken.
        """
        if self._store and name in self._store.folders():
            raise ValueError(f"{self._store.address(name)} has an earlier sweep in it; choose another --name or --out")
        RunFolder.refuse_taken(self.out, name)

    def create(self, name: str, *, exactly: bool) -> RunFolder:
        """Make the folder of a new sweep, as `RunFolder.create`.

        Raises:
            ValueError: the name is taken, or there can be no folder.
            StorageError: the storage takes nothing.
        """
        if self._store is None:
            return RunFolder.create(self.out, name, exactly=exactly)
        if exactly:
            self.refuse_taken(name)
        taken = self._store.folders()
        for number in count(1):
            own = name if number == 1 else f"{name}-{number}"
            if own in taken or (self.out / own).exists():
                continue
            lease = Lease(self._store.child(own))
            try:
                lease.acquire(new=True)  # two sweeps may race for one name; whoever has the lease has it
            except ThereAlready:
                if exactly:
                    raise
                continue
            self._lease = lease
            folder = RunFolder.create(self.out, own, exactly=True)
            note_mirror(folder.path, self._store.address(own), Commit())
            return folder
        raise AssertionError("there is always another number")

    def latest(self, name: str, *, exactly: bool) -> RunFolder:
        """The folder of a sweep that is gone on with, as `RunFolder.latest`; of a URL it may have to be brought first.

        Raises:
            ValueError: there is none.
            StorageError: the storage cannot be reached.
        """
        if self._store is None:
            return RunFolder.latest(self.out, name, exactly=exactly)
        there = self._store.folders()
        numbered = re.compile(re.escape(name) + r"-([1-9][0-9]*)")
        later = {int(found[1]): each for each in there if (found := numbered.fullmatch(each))}
        own = name if exactly or not later else later[max(later)]
        if own not in there and not noted_mirror(self.out / own).url:
            raise ValueError(
                f"expected the run folder of a sweep at {self._store.address(own)}, but found nothing there; --resume "
                "goes on with a sweep that was begun: name its folder with --out and --name, or leave --resume out to "
                "begin"
            )
        return RunFolder(self.out / own)

    @contextmanager
    def held(self, folder: RunFolder, console: Console, progress: Described | None = None) -> Iterator[None]:
        """Within the block no other process works on a run folder, and its mirror is kept up to date.

        A working copy that is missing, or older than what lies at the URL, is brought first.

        Raises:
            FolderInUse: another process works on it.
            StorageError: the storage cannot be reached, or what lies there cannot be used.
        """

        def told(line: str) -> None:
            console.print(Text(f"note: {line}", style="yellow"), soft_wrap=True)

        self._told = told
        if self._store is None:
            with FolderLock(folder.lock):
                yield
            return
        store = self._store.child(folder.path.name)
        if self._lease is None:
            lease = Lease(store, told)
            lease.acquire()
            self._lease = lease
        try:
            self.bring(folder, progress)
            with FolderLock(folder.lock):
                self._working = folder
                self._mirror = Mirror(folder, store, self._lease, told)
                self._mirror.start()
                try:
                    yield
                finally:
                    self.settle(interrupted=True)  # what the end of the sweep has waited for is there already
        finally:
            self._lease.release()

    def bring(self, folder: RunFolder, progress: Described | None = None) -> None:
        """Make the working copy of a run folder the one that lies at the URL, unless it is as new.

        Raises:
            StorageError: it cannot be had.
            NoSpace: the disk has no room for it.
        """
        if self._store is None:
            return
        store = self._store.child(folder.path.name)
        for tried in range(1, PULLS_TRIED + 1):
            commit = read_commit(store)
            if commit is None:
                folder.state.mkdir(parents=True, exist_ok=True)  # its first session was killed before it was there
                return
            noted = noted_mirror(folder.path)
            if noted.number > commit.number or noted.is_of(commit):
                return
            try:
                shown = progress(f"fetching the run folder {store.url} (MB)") if progress else None
                pull(store, commit, folder.path, shown)
                return
            except StorageError as error:
                if tried == PULLS_TRIED or not (error.transient or isinstance(error, NothingThere)):
                    raise

    def settle(self, *, interrupted: bool) -> str:
        """Wait until the mirror has everything; what a person should know where it has not, else an empty string."""
        if self._mirror is None or self._working is None:
            return ""
        mirror, self._mirror = self._mirror, None
        try:
            if not mirror.finish(SOON_S):
                self._told(f"sending the last of the run folder to {self.shown(self._working.path)}")
            mirror.close(PATIENCE_OF_INTERRUPTED_S if interrupted else PATIENCE_S)
        except KeyboardInterrupt:
            mirror.close(0.0)
        if not mirror.problem:
            return ""
        folder = self._working.path
        return (
            f"{self.shown(folder)} lacks the last of this sweep ({mirror.problem}); all of it is kept in {folder}, "
            f"and `python -m sweep.sync {folder}` sends it"
        )

    def shown(self, path: Path) -> str:
        """Where a person finds a file of a run folder."""
        if self._store is None or not path.is_relative_to(self.out):
            return str(path)
        return self._store.address(path.relative_to(self.out).as_posix())


def run_folder_at(url: str, cache_dir: Path) -> tuple[RunHome, RunFolder]:
    """A run folder by its own URL: the home it lies in, and its working copy, which may have to be brought first.

    Raises:
        StorageError: there is none, or the storage cannot be reached.
    """
    around, _, name = url.rstrip("/").rpartition("/")
    home = RunHome(around, cache_dir)
    try:
        return home, home.latest(name, exactly=True)
    except StorageError:
        raise
    except ValueError as error:
        raise StorageError(str(error)) from None


def pull(store: Store, commit: Commit, folder: Path, shown: Progress | None = None) -> None:
    """Make a folder hold what a commit says, in place of what is in it.

    Raises:
        StorageError: something cannot be had, or has been cut short.
        NoSpace: the disk has no room for it.
    """
    fresh, scratch = (folder.with_name(f".{folder.name}.{what}") for what in ("fetched", "scratch"))
    shutil.rmtree(fresh, ignore_errors=True)
    apart = {COMMIT, LEASE, *RECORD, *LEDGER}
    wanted = [
        Wanted(name, entry.size, below(fresh, name, store.url))
        for name, entry in store.files().items()
        if name not in apart and not name.startswith(f"{TRIALS}/")
    ]
    wanted += [Wanted(key, size, below(fresh, name, store.url)) for name, (key, size) in commit.kept.items()]
    wanted += [Wanted(name, -1, below(fresh, name, store.url)) for name in commit.record]
    bring(store, wanted, scratch, shown)
    for name, size in commit.record.items():
        path = fresh / name
        if path.stat().st_size < size:
            raise StorageError(
                f"expected {size:,} bytes of {store.address(name)}\n  found: {path.stat().st_size:,}\n  remedy: the "
                "run folder was damaged from outside; begin anew under another --name"
            )
        with path.open("r+b") as file:
            file.truncate(size)
    (fresh / "state").mkdir(parents=True, exist_ok=True)
    note_mirror(fresh, store.url, commit, stamps_of(fresh))
    if folder.exists():
        shutil.rmtree(folder)
    fresh.rename(folder)


def send_rest(folder: RunFolder) -> str:
    """Bring the mirror of a run folder up to date, after a sweep that could not; its URL, "" if it has none.

    Raises:
        StorageError: the storage takes nothing.
        FolderInUse: another machine works on the sweep, or has gone on with it.
    """
    noted = noted_mirror(folder.path)
    if not noted.url:
        return ""
    store = Store(noted.url)
    lease = Lease(store)
    lease.acquire()
    try:
        there = read_commit(store)
        if there and there.writer != noted.writer and there.number >= noted.number:
            raise FolderInUse(
                f"{noted.url} is newer than {folder.path}: the sweep has gone on elsewhere; nothing was sent"
            )
        Mirror(folder, store, lease, lambda line: None).send_all()
    finally:
        lease.release()
    return noted.url
