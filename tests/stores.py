"""A storage of fsspec's in memory that fails when it is told to: `faulty://bucket/...`."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FaultyFileSystem(MemoryFileSystem):
    """Every object lies in memory; `fails` may raise, or wait, at each call that reads or writes one."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fails: ClassVar[Callable[[str, str], None]] = staticmethod(lambda call, path: None)
    calls: ClassVar[list[tuple[str, str]]] = []
    lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("faulty://"))

    def _note(self, call: str, path: str) -> None:
        with self.lock:
            self.calls.append((call, path))
        type(self).fails(call, path)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._note("list", path)
        return super().find(path, *args, **kwargs)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        self._note("get", rpath)
        super().get_file(rpath, lpath, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self._note("read", path)
        return super().cat_file(path, *args, **kwargs)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self._note("put", rpath)
        with self.lock:  # an object is replaced at once
            super().put_file(lpath, rpath, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._note("write", path)
        with self.lock:
            super().pipe_file(path, value, mode=mode, **kwargs)

    def rm_file(self, path: str) -> None:
        self._note("remove", path)
        super().rm_file(path)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


@contextmanager
def failing(fails: Callable[[str, str], None]) -> Iterator[None]:
    """Within the block every call asks `fails(call, path)` first."""
    FaultyFileSystem.fails = staticmethod(fails)
    try:
        yield
    finally:
        FaultyFileSystem.fails = staticmethod(lambda call, path: None)


def put_folder(folder: Path, url: str) -> None:
    """Put all files of a folder at a URL."""
    filesystem, root = fsspec.core.url_to_fs(url)
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def objects(url: str) -> dict[str, bytes]:
    """Name below the URL -> contents, of all objects there."""
    filesystem, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{root}/"): filesystem.store[path].getvalue() for path in filesystem.find(root)}


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until it holds; fail where it never does."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)
