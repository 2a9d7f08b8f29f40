"""The lock of a run folder: one process at a time works on a sweep."""

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from cxr_models.storage import told_of_space


class FolderInUse(RuntimeError):  # noqa: N818 - what is so, not an error of a caller
    """Another process works on the sweep."""


class FolderLock:
    """Held from `with` to the end of its block, or to the end of the process, however it ends.

    The file stays when the lock is let go: whoever removed it could take it from under a third process.

    Args:
        path: of the lock file, `RunFolder.lock`.

    Raises:
        FolderInUse: on entering, while another process holds it.
        NoSpace: on entering, where the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def __enter__(self) -> Self:
        with told_of_space(self._path):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").split()
            os.close(descriptor)
            who = f"process {holder[1]} on {holder[0]}" if len(holder) == 2 else "another process"
            raise FolderInUse(
                f"{self._path.parent.parent} is in use: {who} works on this sweep; wait for its end, or end it"
            ) from None
        with told_of_space(self._path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode())
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
