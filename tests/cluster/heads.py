"""A Ray head on this machine, with a token and ports of its own, and a connection to it that can be cut."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
STARTING_TIMEOUT_S = 180.0


def free_ports(number: int) -> list[int]:
    """Ports that nothing listens on at the moment."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [int(server.getsockname()[1]) for server in servers]
    for server in servers:
        server.close()
    return ports


@dataclass(frozen=True)
class Head:
    """A head that runs.

    Attributes:
        port: of the dashboard, on loopback.
        folder: that it was started in.
        session: Ray's own folder.
    """

    port: int
    token: str
    folder: Path
    session: Path

    def log(self, job_id: str) -> str:
        """All that a job has written."""
        (file,) = self.session.glob(f"session_2*/logs/job-driver-{job_id}.log")
        return file.read_text()


@contextmanager
def ray_head(folder: Path, cores: int) -> Iterator[Head]:
    """`ray start --head` in a folder, and the end of every process of it."""
    (gcs, dashboard, *others) = free_ports(9)
    token = secrets.token_hex(32)
    # Unix sockets have short names.
    session = Path(tempfile.mkdtemp(prefix="ray-"))
    named = ("node-manager-port", "object-manager-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    named += ("runtime-env-agent-port", "metrics-export-port", "ray-client-server-port")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--num-cpus={cores}"]
    command += [f"--temp-dir={session}", f"--object-store-memory={100 * 1024**2}"]
    command += [f"--{name}={port}" for name, port in zip(named, others, strict=True)]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        _wait(process, dashboard, token, folder / "head.log")
        yield Head(dashboard, token, folder, session)
    finally:
        _end(process, session)
        shutil.rmtree(session, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], port: int, token: str, log: Path) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/version", headers={"Authorization": f"Bearer {token}"}
    )
    deadline = time.monotonic() + STARTING_TIMEOUT_S
    while True:
        with suppress(OSError), urllib.request.urlopen(request, timeout=5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the head did not start: {log.read_text()[-3000:]}")
        time.sleep(0.3)


def _end(process: subprocess.Popen[bytes], session: Path) -> None:
    """Kill the head, what it started, and what of it has lost its parent."""
    found = {process.pid}
    with suppress(psutil.NoSuchProcess):
        found |= {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if str(session) in " ".join(each.cmdline()):
                found |= {each.pid, *(child.pid for child in each.children(recursive=True))}
    for pid in found:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
    process.wait()


class Wire:
    """A connection to a port of this machine, through a port of its own, that can be cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._is_cut = False
        self.passed = 0
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections, in the middle of whatever they carry, and take no new ones."""
        self._is_cut = True
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._is_cut = False

    def close(self) -> None:
        self.cut()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            if self._is_cut:
                self.refused += 1
                near.close()
                continue
            self.passed += 1
            far = socket.create_connection(("127.0.0.1", self._target))
            self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                sink.sendall(content)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._open.discard(end)
