"""The lease of a run folder at a URL: one machine at a time works on a sweep.

Object stores have no locks. Who works on a sweep writes its name into an object, again and again; who finds one that
changes leaves the sweep alone. Clocks are not compared: they differ between machines.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import psutil

from cxr_models.storage import boot_id
from sweep.folder_lock import FolderInUse
from sweep.remote import NothingThere, StorageError, Store, ThereAlready

LEASE = "state/lease.json"
RENEWED_EVERY_S = 15.0
EXPIRES_AFTER_S = 60.0  # without a change
LOOKED_EVERY_S = 5.0
SETTLED_AFTER_S = 2.0  # after which of two that took one lease the last has it


class Lease:
    """Held from `acquire` on, and renewed by a thread of its own until `release`.

    Args:
        store: of the run folder.
        told: gets a line before it is waited whether another machine still works.
    """

    def __init__(self, store: Store, told: Callable[[str], None] = lambda line: None) -> None:
        self._store, self._told = store, told
        self._id = uuid.uuid4().hex
        self._beat = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.lost_to = ""

    def acquire(self, *, new: bool = False) -> None:
        """Take the lease; waits up to a minute where the one that is there was not released.

        Args:
            new: there must be none yet.

        Raises:
            FolderInUse: another process works on the sweep.
            ThereAlready: there is one, and `new`.
            StorageError: the storage cannot be reached, or takes nothing.
        """
        try:
            # Not only `new`: there are storages that take no notice of it.
            if found := _read(self._store):
                raise ThereAlready(f"{self._store.url} is there already: {_owner(found)} has begun it")
            self._write(new=True)
        except ThereAlready:
            if new:
                raise
            self._await_end()
            self._write()
            time.sleep(SETTLED_AFTER_S)
        self.check()
        self._thread.start()

    def check(self) -> None:
        """Look whether it is still ours.

        Raises:
            FolderInUse: another machine has taken it.
            StorageError: the storage cannot be reached.
        """
        found = _read(self._store)
        if found.get("id") != self._id:
            self.lost_to = _owner(found)
            raise FolderInUse(f"{self._store.url} is in use: {self.lost_to} works on this sweep")

    def release(self) -> None:
        """Let others have it at once; where the storage cannot be reached they have to wait."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(EXPIRES_AFTER_S)
        try:
            self.check()
            self._write(released=True)
        except (FolderInUse, StorageError):
            pass

    def _await_end(self) -> None:
        first = _read(self._store)
        if not first or first.get("released") or _is_dead_here(first):
            return
        in_use = (
            f"{self._store.url} is in use: {_owner(first)} works on this sweep; wait for its end, or end it with Ctrl-C"
        )
        if first.get("place") == _place():
            raise FolderInUse(in_use)
        self._told(f"{_owner(first)} has not said that it is done with {self._store.url}: looking whether it works on")
        until = time.monotonic() + EXPIRES_AFTER_S
        while time.monotonic() < until:
            time.sleep(min(LOOKED_EVERY_S, EXPIRES_AFTER_S / 4))
            found = _read(self._store)
            if found.get("released"):
                return
            if found != first:
                raise FolderInUse(in_use)

    def _renew(self) -> None:
        while not self._released.wait(RENEWED_EVERY_S):
            try:
                self.check()
                self._write()
            except FolderInUse:
                return
            except StorageError:
                continue  # an outage; whoever looks meanwhile sees nothing either

    def _write(self, *, new: bool = False, released: bool = False) -> None:
        self._beat += 1
        entry = {
            "id": self._id,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "place": _place(),
            "started": psutil.Process().create_time(),
            "beat": self._beat,
            "at": time.time(),
            "released": released,
        }
        self._store.write(LEASE, json.dumps(entry).encode(), new=new)


def _read(store: Store) -> Mapping[str, Any]:
    """What the lease says; nothing where there is none, or none of ours."""
    try:
        found = json.loads(store.read(LEASE))
    except (NothingThere, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _owner(found: Mapping[str, Any]) -> str:
    return f"process {found.get('process')} on {found.get('host')}" if found.get("host") else "another process"


def _place() -> str:
    """Where the number of a process means something: this start of this machine, and of a container in it."""
    with suppress(OSError):
        return f"{boot_id()} {os.readlink('/proc/self/ns/pid')}"
    return boot_id()


def _is_dead_here(found: Mapping[str, Any]) -> bool:
    """Whether its process ran here, and does no more."""
    if found.get("place") != _place():
        return False
    try:
        return psutil.Process(int(found["process"])).create_time() != found.get("started")
    except (psutil.Error, KeyError, TypeError, ValueError):
        return True
