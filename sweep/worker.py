"""A child process that trains one trial after another, started in a fraction of a second with TensorFlow loaded.

Training lives apart from whoever schedules it: a crash, a leak or a killed trial there is a message here, and the
scheduler's own process never imports TensorFlow. The child is forked from a server that has done the slow imports
but no TensorFlow operation yet, so threads and devices can still be chosen.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import psutil

from cxr_models.trial import EpochMetrics, Objective, TrialConfig, TrialData

Program = Callable[["TrialJob"], Generator[EpochMetrics, bool, None]]

# A child above this is replaced before its next trial: Keras leaks tens of MB a trial in one process.
MEMORY_BOUND_BYTES = 2 * 1024**3
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Work:
    """What every trial of a sweep has in common.

    Attributes:
        folder: each trial keeps its weights and validation scores in a folder of its own below it.
        threads: of TensorFlow's operations.
        program: `module:function`, the generator that trains.
        preload: modules it needs that are slow to import; a worker's fork server imports them once.
    """

    data: TrialData
    objective: Objective
    folder: Path
    threads: int
    program: str = "sweep.worker:train"
    preload: tuple[str, ...] = ("cxr_models.training",)


@dataclass(frozen=True)
class TrialJob:
    """One trial as a worker gets it."""

    trial_id: str
    config: TrialConfig
    work: Work

    @property
    def folder(self) -> Path:
        return self.work.folder / self.trial_id


@dataclass(frozen=True)
class TrialEnd:
    """A trial came to its end; `error` is empty unless it failed."""

    error: str = ""
    traceback: str = ""


def train(job: TrialJob) -> Generator[EpochMetrics, bool, None]:
    """The program of every real trial."""
    from cxr_models import steps, training

    steps.configure(job.work.threads)
    return training.run_trial(job.trial_id, job.config, job.work.data, job.folder, job.work.objective)


def load_program(name: str) -> Program:
    module, _, function = name.partition(":")
    program: Program = getattr(importlib.import_module(module), function)
    return program


def failure(error: Exception) -> TrialEnd:
    """An exception of a trial as its end."""
    first_line = str(error).strip().partition("\n")[0]
    return TrialEnd(f"{type(error).__name__}: {first_line}".removesuffix(": "), traceback.format_exc())


class TrialEvents:
    """A trial in this process, one event after the other; what its program raises is its end."""

    def __init__(self, job: TrialJob) -> None:
        self._job = job
        self._epochs: Generator[EpochMetrics, bool, None] | None = None

    def begin(self) -> EpochMetrics | TrialEnd:
        """Start the program and wait for its first epoch."""
        try:
            self._epochs = load_program(self._job.work.program)(self._job)
            return next(self._epochs)
        except StopIteration:
            return TrialEnd()
        except Exception as error:
            return failure(error)

    def answer(self, go_on: bool) -> EpochMetrics | TrialEnd:
        """Tell the program whether to go on after its last event, and wait for the next."""
        if self._epochs is None:
            raise RuntimeError("answer() before begin()")
        try:
            return self._epochs.send(go_on)
        except StopIteration:
            return TrialEnd()
        except Exception as error:
            return failure(error)


class TrialProcess:
    """The parent's side of the child.

    Args:
        log: file for what the child's libraries print.
        preload: see `Work`.
    """

    def __init__(self, log: Path, preload: tuple[str, ...]) -> None:
        self._log = log
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["sweep.worker", *preload])
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._child: Literal["idle", "training", "waiting"] = "idle"  # waiting for the order to go on or end

    def start(self, job: TrialJob) -> None:
        """Begin a trial; one that is still running is stopped first."""
        self.stop()
        if self._process is not None and _resident_bytes(self._process.pid) > MEMORY_BOUND_BYTES:
            self.close()
        if self._process is None or not self._process.is_alive():
            self._spawn()
        self._send(job)
        self._child = "training"

    def next(self) -> EpochMetrics | TrialEnd:
        """Wait for the trial's next epoch, or its end. Asking for another epoch is the order to go on."""
        if self._child == "idle" or self._connection is None:
            return TrialEnd("the trial was not started")
        if self._child == "waiting":
            self._send(True)
        try:
            event: EpochMetrics | TrialEnd = self._connection.recv()
        except (EOFError, ConnectionError):
            return self._died()
        self._child = "waiting" if isinstance(event, EpochMetrics) else "idle"
        return event

    def stop(self) -> None:
        """End the running trial after the epoch it reported; a child in the middle of one, or silent, is killed."""
        if self._child == "idle":
            return
        if self._child == "training" or self._connection is None:
            self.close()
            return
        self._child = "idle"
        self._send(False)
        try:
            if self._connection.poll(STOP_TIMEOUT_S):
                self._connection.recv()
            else:
                self.close()
        except (EOFError, ConnectionError):
            self.close()

    def close(self) -> None:
        """Kill the child. It holds nothing that is not on disk."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None
        self._child = "idle"

    def _spawn(self) -> None:
        self.close()
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(theirs, self._log), daemon=True)
        self._process.start()
        theirs.close()

    def _send(self, message: object) -> None:
        try:
            if self._connection is not None:
                self._connection.send(message)
        except ConnectionError:
            pass  # the child is gone; the next `recv` finds out and says how it died

    def _died(self) -> TrialEnd:
        if self._process is None:
            return TrialEnd("the trial's process is gone")
        self._process.join(STOP_TIMEOUT_S)
        code = self._process.exitcode
        self.close()
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"
        memory = "; the system may have run out of memory" if code == -signal.SIGKILL else ""
        return TrialEnd(f"the trial's process {how}{memory} (its output: {self._log})")


def serve(connection: Connection, log: Path) -> None:
    """The child: train what arrives until the other side closes."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means for running trials
    redirect_output(log)
    while True:
        try:
            job = connection.recv()
            _serve_trial(connection, job)
        except (EOFError, ConnectionError):
            return


def _serve_trial(connection: Connection, job: TrialJob) -> None:
    trial = TrialEvents(job)
    event = trial.begin()
    while isinstance(event, EpochMetrics):
        connection.send(event)
        event = trial.answer(connection.recv())
    connection.send(event)


def _die_with_parent() -> None:
    """Wait for the parent's end, in the middle of an epoch too.

    The kernel's own signal would wait for the fork server's end, and that server lives as long as its children.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def redirect_output(log: Path) -> None:
    """TensorFlow's C++ side writes to the descriptors themselves, so those are replaced."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _resident_bytes(pid: int | None) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
