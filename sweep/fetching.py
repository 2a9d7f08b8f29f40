"""Data sets and weights at a URL, fetched once into the cache.

What is there already, by the size and the stamp of the listing, is not fetched again, and what is there no longer is
dropped. A file lies in its place whole or not at all, so that a fetch that was interrupted goes on where it was.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from cxr_models.dataset import Progress
from cxr_models.kept import keep, kept
from cxr_models.listing import data_error, is_picture
from cxr_models.storage import told_of_space
from cxr_models.tables import TABLE_SUFFIXES, listed_files
from sweep.remote import Entry, NothingThere, StorageError, Store, digest_of

AT_ONCE = 16
ATTEMPTS = 4
FIRST_PAUSE_S = 1.0
SPARE_BYTES = 64 * 1024**2  # of the disk, that a fetch leaves free
MEGABYTE = 1e6
# Beside pictures, what layouts and labels are read from.
_TABLES = (*TABLE_SUFFIXES, ".xlsx")
# What is read of an earlier run folder that weights or lung masks come from.
RUN_FILES = ("best/model.keras", "best/config.json", "split.csv", "summary.json")

Described = Callable[[str], Progress]


@dataclass(frozen=True)
class Wanted:
    """A file that is to be brought here.

    Attributes:
        name: of the object in its store.
        size: in bytes; -1 where it is not known.
        target: where the file is to lie.
    """

    name: str
    size: int
    target: Path


def fetch_data(url: str, cache_dir: Path, progress: Described | None = None) -> Path:
    """The folder or CSV file at a URL as one in the cache, with all that a data set is read from.

    Of a CSV file that names images by path these are fetched, of one that names them by id all below its folder.

    Args:
        url: of the folder or the file.
        cache_dir: the copy lies below it, in `fetched/`.
        progress: given a description, where to report it.

    Raises:
        StorageError: it cannot be had.
        DataError: a name there would leave the folder.
        NoSpace: the disk has no room for it.
    """
    store = Store(url)
    file = store.file()
    if file is None:
        found = {name: entry for name, entry in store.files().items() if _is_data(name) or ".." in _parts(name)}
        return _kept_copy(store, url, found, cache_dir, progress)
    around, name = store.parent, store.name
    folder = _kept_copy(around, url, {name: file}, cache_dir, progress, drops=False)
    listed = listed_files(folder / name)
    beside = around.files()
    for path in listed or ():
        if path.startswith(("/", "..")):
            raise data_error(
                f"paths below the folder of {url}", repr(path), "put the CSV file into the folder that holds all images"
            )
    chosen = {each for each in beside if is_picture(_parts(each))} if listed is None else listed
    found = {each: entry for each, entry in beside.items() if each in chosen}
    return _kept_copy(around, url, {**found, name: file}, cache_dir, progress) / name


def fetch_file(url: str, cache_dir: Path, progress: Described | None = None) -> Path:
    """The file at a URL as one in the cache, or of the run folder there what an earlier model is read from.

    Raises:
        StorageError: it cannot be had.
        NoSpace: the disk has no room for it.
    """
    store = Store(url)
    file = store.file()
    if file is not None:
        return _kept_copy(store.parent, url, {store.name: file}, cache_dir, progress) / store.name
    found = {}
    for name in RUN_FILES:
        with suppress(NothingThere):
            if entry := Store(store.address(name)).file():
                found[name] = entry
    return _kept_copy(store, url, found, cache_dir, progress)


def bring(
    store: Store,
    wanted: Iterable[Wanted],
    scratch: Path,
    shown: Progress | None,
    whole: Callable[[Wanted], None] = lambda file: None,
) -> None:
    """Fetch files, several at once, each into its place when it is whole and on the disk.

    Args:
        store: they lie in.
        wanted: what is to be fetched.
        scratch: a folder on the same disk, for what is not whole yet; emptied before.
        shown: is told of the megabytes.
        whole: hears of each file that lies in its place.

    Raises:
        StorageError: a file cannot be had; those that were fetched before stay.
        NoSpace: the disk has no room for all of them; nothing was fetched then, unless others have filled it since.
    """
    files = list(wanted)
    total = sum(max(file.size, 0) for file in files)
    with told_of_space(scratch / "scratch", total):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        if total + SPARE_BYTES > shutil.disk_usage(scratch).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch / "scratch"))
    given_up = threading.Event()
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch")
    done_bytes, megabytes = 0, max(1, round(total / MEGABYTE))
    try:
        waiting = {
            pool.submit(_bring_one, store, file, scratch / str(number), given_up): file
            for number, file in enumerate(files)
        }
        while waiting:
            done, _ = wait(waiting, timeout=1.0, return_when=FIRST_EXCEPTION)
            for future in sorted(done, key=lambda future: future.exception() is not None):  # what has come counts
                future.result()
                file = waiting.pop(future)
                whole(file)
                done_bytes += max(file.size, 0)
            if shown and done:
                shown(megabytes if not waiting else min(megabytes - 1, int(done_bytes / MEGABYTE)), megabytes)
    finally:
        given_up.set()
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _bring_one(store: Store, file: Wanted, scratch: Path, given_up: threading.Event) -> None:
    pause_s = FIRST_PAUSE_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with told_of_space(file.target, max(file.size, 0)):
                _bring_whole(store, file, scratch)
            return
        except StorageError as error:
            if not error.transient or attempt == ATTEMPTS or given_up.wait(pause_s):
                raise
            pause_s *= 2


def _bring_whole(store: Store, file: Wanted, scratch: Path) -> None:
    store.get(file.name, scratch)
    found = scratch.stat().st_size
    if file.size not in (-1, found):
        raise StorageError(
            f"expected {file.size:,} bytes of {store.address(file.name)}\n  found: {found:,}\n  remedy: it was cut "
            "short, or changes while it is read; give the same command once more",
            transient=True,
        )
    with scratch.open("rb") as opened:
        os.fsync(opened.fileno())
    try:
        file.target.parent.mkdir(parents=True, exist_ok=True)
        scratch.replace(file.target)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise StorageError(
            f"expected {store.address(file.name)} to be a file or a folder\n  found: it is both\n"
            "  remedy: rename one of the two"
        ) from error


class _Inventory:
    """What a copy in the cache holds: size and stamp of each object, and the time of the file that was made of it.

    It is kept whole at the end of a fetch; meanwhile each file that has come adds a line to a journal.
    """

    def __init__(self, folder: Path) -> None:
        self._whole, self._journal = folder / "here.json", folder / "here.jsonl"
        self._held: dict[str, list[Any]] = dict(kept(self._whole) or {})
        for entry in _whole_lines(self._journal):
            self._held[entry[0]] = entry[1:]

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def has(self, name: str, entry: Entry, path: Path) -> bool:
        """Whether the file that was made of an object is here as it was."""
        try:
            status = path.lstat()
        except OSError:
            return False
        return self._held.get(name) == [entry.size, entry.stamp, status.st_mtime_ns] and status.st_size == entry.size

    def add(self, name: str, entry: Entry, path: Path) -> None:
        self._held[name] = [entry.size, entry.stamp, path.stat().st_mtime_ns]
        with told_of_space(self._journal), self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, *self._held[name]]) + "\n")

    def drop(self, name: str) -> None:
        del self._held[name]

    def close(self) -> None:
        """Keep all of it whole."""
        keep(self._whole, self._held)
        self._journal.unlink(missing_ok=True)


def _whole_lines(path: Path) -> Iterator[list[Any]]:
    with suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):  # the last one may have been cut short
                yield json.loads(line)


def _kept_copy(
    store: Store,
    url: str,
    found: Mapping[str, Entry],
    cache_dir: Path,
    progress: Described | None,
    *,
    drops: bool = True,
) -> Path:
    """A folder in the cache that holds these objects, and with `drops` no others."""
    root = cache_dir / "fetched" / digest_of(url)
    folder = root / (store.name or "files")
    with told_of_space(root):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "lock"):
        inventory = _Inventory(root)
        lacking = [name for name in found if not inventory.has(name, found[name], below(folder, name, url))]
        if drops:
            for name in [name for name in inventory.names if name not in found]:
                _drop(folder, name)
                inventory.drop(name)
        wanted = [Wanted(name, found[name].size, folder / name) for name in lacking]
        if wanted:
            shown = progress(f"fetching {url} (MB)") if progress else None
            try:
                bring(
                    store,
                    wanted,
                    root / "scratch",
                    shown,
                    lambda file: inventory.add(file.name, found[file.name], file.target),
                )
            except StorageError as error:
                here = sum(inventory.has(name, found[name], folder / name) for name in found)
                raise StorageError(
                    f"{error}\n  {here:,} of {len(found):,} files are here: the same command fetches the others",
                    transient=error.transient,
                ) from error
        inventory.close()
    return folder


def _drop(folder: Path, name: str) -> None:
    """Remove a file, and the folders that are empty then."""
    (folder / name).unlink(missing_ok=True)
    for around in (folder / name).parents:
        if around == folder:
            return
        try:
            around.rmdir()
        except OSError:
            return


def below(folder: Path, name: str, url: str) -> Path:
    """Where the file of an object lies.

    Raises:
        DataError: its name would leave the folder.
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise data_error(
            f"names below {url} that can be those of files", repr(name), "rename the object, or move it elsewhere"
        )
    return folder / name


def _is_data(name: str) -> bool:
    parts = _parts(name)
    return is_picture(parts) or (parts[-1].lower().endswith(_TABLES) and not parts[-1].startswith("."))


def _parts(name: str) -> tuple[str, ...]:
    return tuple(name.split("/"))
