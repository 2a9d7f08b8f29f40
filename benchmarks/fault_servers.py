"""A real MLflow server that is stopped and restarted while a sweep writes to it, on SQLite and on PostgreSQL."""

import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from fault_checks import QUIET, tracking_differences
from fault_kills import SHOWN_COMPLAINTS, ended_well
from fault_runs import Attempt, Row, Setting, phase_of
from measuring import ROOT, ProgramFailed

RESTARTS = 5
READY_TIMEOUT_S = 120.0
# Longer than the other sweeps, so that the server comes back within it.
OPTIONS = ("--max-epochs", "30", "--set", "search.halving=none")
Store = Callable[[Path], AbstractContextManager[str]]


class MlflowServer:
    """`mlflow server` on loopback, which can be stopped and started again at the same port.

    Args:
        store: URI of its backend.
        folder: for artifacts and its log.
    """

    def __init__(self, store: str, folder: Path) -> None:
        self._port = free_port()
        self._log = folder / "server.log"
        self._command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
        self._command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
        self._command += ["--host", "127.0.0.1", "--port", str(self._port)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ProgramFailed: it does not.
        """
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **QUIET},
                start_new_session=True,
            )
        until = time.monotonic() + READY_TIMEOUT_S
        while not self._answers():
            if time.monotonic() > until or self._process.poll() is not None:
                self.stop(signal.SIGKILL)
                raise ProgramFailed(f"mlflow server does not answer:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.2)

    def stop(self, number: signal.Signals) -> None:
        """End it and its workers by a signal, in the middle of whatever they do."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)
            self._process.wait(READY_TIMEOUT_S)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def free_port() -> int:
    """A port of loopback that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def sqlite_store(folder: Path) -> Iterator[str]:
    """The URI of a new SQLite file."""
    yield f"sqlite:///{folder / 'server.db'}"


@contextmanager
def postgresql_store(folder: Path) -> Iterator[str]:
    """The URI of a new PostgreSQL, which runs for the length of the block; not as root, which it refuses."""
    port, user = free_port(), ordinary_user()
    files = Path(tempfile.mkdtemp(prefix="postgresql-"))  # where other users may pass
    if user:
        shutil.chown(files, user)

    def control(program: str, *arguments: str) -> None:
        log = folder / "postgresql.log"
        command = [str(postgresql_program(program)), "-D", str(files), *arguments]
        with log.open("ab") as output:
            done = subprocess.run(command, stdout=output, stderr=output, user=user, cwd=files, check=False)
        if done.returncode:
            raise ProgramFailed(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")

    control("initdb", "--username", "mlflow", "--auth", "trust")
    control("pg_ctl", "start", "-w", "-o", f"-p {port} -h 127.0.0.1 -k {files}", "-l", str(files / "log"))
    try:
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        control("pg_ctl", "stop", "-w", "-m", "immediate")
        shutil.rmtree(files)


def ordinary_user() -> str | None:
    """Whom to run PostgreSQL as in place of root; None for whoever runs this."""
    if os.geteuid():
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def postgresql_program(program: str) -> Path | None:
    """A program of PostgreSQL, on the path or where Debian keeps it; None if it is not installed."""
    on_path = shutil.which(program)
    if on_path:
        return Path(on_path).resolve()
    return next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), reverse=True)), None)


def stores() -> dict[str, Store]:
    """Name -> each store that can be tried here."""
    found: dict[str, Store] = {"SQLite": sqlite_store}
    if postgresql_program("pg_ctl") is None:
        print("PostgreSQL is not tried: pg_ctl is not found", flush=True)
    elif importlib.util.find_spec("psycopg2") is None:
        print("PostgreSQL is not tried: psycopg2 is not installed (pip install psycopg2-binary)", flush=True)
    else:
        found["PostgreSQL"] = postgresql_store
    return found


def restart_servers(setting: Setting) -> Iterator[Row]:
    """A sweep against a server on each store; a row a sweep."""
    found = stores()
    setting.runs = len(found)
    for name, store in found.items():
        folder = setting.scratch / f"server-{name.lower()}"
        folder.mkdir()
        with store(folder) as uri:
            server = MlflowServer(uri, folder)
            server.start()
            try:
                yield {"store": name, **restarted(setting, server, f"tracked-{name.lower()}")}
            finally:
                server.stop(signal.SIGKILL)


def restarted(setting: Setting, server: MlflowServer, name: str) -> Row:
    """A sweep whose tracking server is restarted, the last time only after the sweep's end: then the rest is sent.

    Every second time the server is killed, else told to end; it stays away for a random while.
    """
    generator = random.Random(setting.seed)
    place = replace(setting.place(name), options=[*OPTIONS, *setting.options, "--tracking-uri", server.uri])
    attempt, stops, away = Attempt.start(place, 0), [], 0.0
    for number in range(RESTARTS):
        last = number == RESTARTS - 1
        due = attempt.seconds + generator.uniform(2.0, 6.0)
        if not attempt.wait_until(partial(_is_due, attempt, due, last=last)):
            break
        stops.append({"phase": phase_of(attempt), "second": attempt.seconds})
        stopped = time.monotonic()
        server.stop(signal.SIGKILL if number % 2 else signal.SIGTERM)
        if last:
            attempt.wait()
        else:
            time.sleep(generator.uniform(0.0, 5.0))
        server.start()
        away += time.monotonic() - stopped
    complaints = ended_well(attempt)
    if len(stops) < RESTARTS:
        complaints.append(f"the sweep ended after {len(stops)} restarts of {RESTARTS}")
    command = [sys.executable, "-m", "sweep.sync", str(place.run.path)]
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    synced = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=own, check=False)
    if synced.returncode:
        complaints.append(f"sweep.sync ended with {synced.returncode}: {(synced.stdout + synced.stderr)[-1500:]}")
    if place.run.summary.is_file():
        complaints += tracking_differences(place.run, server.uri)
    where = ", ".join(f"{stop['second']:.0f} s ({stop['phase']})" for stop in stops)
    return {
        "stops": stops,
        "away_seconds": away,
        "seconds": attempt.seconds,
        "told": f"server stopped at {where}",
        "complaints": complaints[:SHOWN_COMPLAINTS],
    }


def _is_due(attempt: Attempt, second: float, *, last: bool) -> bool:
    """Whether the server is to be stopped now: the last time in the final trainings or later, else while trials run."""
    phase = phase_of(attempt)
    return attempt.seconds >= second and (
        phase in ("final trainings", "evaluation", "report") if last else phase != "reading data"
    )
