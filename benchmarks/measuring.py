"""A program run and watched: its wall time and the memory of its processes; and the machine it ran on."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

from sweep.machine import this_machine

ROOT = Path(__file__).parent.parent
PACKAGES = ("tensorflow", "keras", "numpy", "ray", "optuna", "mlflow", "keras-tuner", "pillow")
SAMPLING_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Memory:
    """Peak resident memory of the processes of one kind, in bytes. Pages that processes share count in each.

    Attributes:
        largest: of a single process.
        together: of all processes of the kind at one moment.
    """

    largest: int = 0
    together: int = 0

    def and_then(self, resident: Sequence[int]) -> "Memory":
        """The peak after another sample, the resident bytes of every process of the kind."""
        return Memory(max(self.largest, *resident), max(self.together, sum(resident)))


@dataclass(frozen=True)
class Watched:
    """A program that has ended.

    Attributes:
        wall_seconds: from its start to its exit.
        memory: kind of process (`driver`, `ray`, `worker`) -> peak.
    """

    wall_seconds: float
    memory: Mapping[str, Memory]


class ProgramFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """A measured program ended with an error; there is no figure to report."""


def run_watched(command: Sequence[str], log: Path) -> Watched:
    """Run a program to its end, on CPUs, from the repository's root.

    Args:
        command: the program and its arguments.
        log: for everything it prints.

    Raises:
        ProgramFailed: it exited with another status than 0.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    begun = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        with _sampling(process.pid) as memory:
            status = process.wait()
        seconds = time.perf_counter() - begun
    if status:
        tail = log.read_text(errors="replace")[-3000:]
        raise ProgramFailed(f"{' '.join(command)}\nexited with status {status}; the end of its output:\n{tail}")
    return Watched(seconds, memory)


@contextmanager
def _sampling(pid: int) -> Iterator[dict[str, Memory]]:
    memory: dict[str, Memory] = {}
    over = Event()

    def sample() -> None:
        while not over.wait(SAMPLING_INTERVAL_S):
            for kind, resident in _resident_bytes(pid).items():
                memory[kind] = memory.get(kind, Memory()).and_then(resident)

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


def _resident_bytes(pid: int) -> dict[str, list[int]]:
    """Kind -> resident bytes of each process below `pid`, itself included."""
    found: dict[str, list[int]] = {}
    try:
        driver = psutil.Process(pid)
        for process in (driver, *driver.children(recursive=True)):
            try:
                kind = "driver" if process == driver else _kind(process.name(), " ".join(process.cmdline()))
                found.setdefault(kind, []).append(process.memory_info().rss)
            except psutil.Error:
                continue  # it ended between being listed and being asked
    except psutil.Error:
        pass
    return found


def _kind(name: str, command: str) -> str:
    """`worker` for processes that train or evaluate, `ray` for what Ray itself runs, with actors whose child trains."""
    if "multiprocessing" in command:  # the product's children; their command names a file of Ray's too
        return "worker"
    if name in ("raylet", "gcs_server") or "/ray/" in command or command.startswith(("ray::_RayTrial", "ray::IDLE")):
        return "ray"
    return "worker"


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, commit, date and the exact command, to stand beside every figure."""
    machine = this_machine()
    return {
        "cpu": _cpu_model(),
        "cores": machine.cores,
        "memory_bytes": machine.memory_bytes,
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *command]),
    }


def own_command() -> list[str]:
    """This program's command line, with the script's path from the repository's root.

    What lies below the folder `CXR_REAL_DATA` is told by that name: where it is on this machine helps nobody.
    """
    real, shown = os.environ.get("CXR_REAL_DATA"), [os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]
    return [part.replace(real, "$CXR_REAL_DATA") for part in shown] if real else shown


def write_result(result: Mapping[str, Any], file: Path) -> None:
    """Keep a result as JSON, in a folder that need not exist yet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit, with `+` where the working tree holds more; `unknown` outside a repository."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return (found.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")
