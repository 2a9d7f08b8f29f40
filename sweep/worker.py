"""A child process that trains one trial after another, started in a fraction of a second with TensorFlow loaded.

Training lives apart from whoever schedules it: a crash, a leak or a killed trial there is a message here, and the
scheduler's own process never imports TensorFlow. The child is forked from a server that has done the slow imports
but no TensorFlow operation yet, so threads and devices can still be chosen.
"""

import errno
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from cxr_models.trial import EpochMetrics, Objective, TrialConfig, TrialData

Program = Callable[["TrialJob"], Generator[EpochMetrics, bool, None]]

# Epochs of a fraction of a second are handed on in batches of this span: whoever schedules has work with each batch.
BATCH_SPAN_S = 0.2
# How long an order to end may take, for a child that waits for orders and for one that is training.
STOP_TIMEOUT_S = 10.0
STOP_GRACE_S = 0.2

# What TensorFlow, XLA and CUDA say, by an exception's name or in its text, where a device's memory is too small.
NO_MEMORY_ERRORS = ("ResourceExhaustedError", "MemoryError")
NO_MEMORY_WORDS = ("OOM when allocating", "RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY", "Out of memory")
NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Work:
    """What every trial of a sweep has in common.

    Attributes:
        folder: each trial keeps its weights and validation scores in a folder of its own below it.
        threads: of TensorFlow's operations.
        program: `module:function`, the generator that trains.
        preload: modules it needs that are slow to import; a worker's fork server imports them once.
        memory_bound_bytes: a child above this is replaced before its next trial: Keras leaks tens of MB a trial in
            one process.
    """

    data: TrialData
    objective: Objective
    folder: Path
    threads: int
    program: str = "sweep.worker:train"
    preload: tuple[str, ...] = ("cxr_models.training",)
    memory_bound_bytes: int = 2 * 1024**3


@dataclass(frozen=True)
class TrialJob:
    """One training as a worker gets it.

    Attributes:
        decisions: epochs after which it waits to hear whether it goes on. After all others it trains on.
        again: the validation losses of an earlier training of the configuration, up to its best epoch: it is trained
            again that long, on training and validation images. Empty for a trial.
        known: how many of its epochs have been recorded before. A checkpoint in its folder
            is gone on from; the recorded epochs are not reported once more, whether or not there is one.
        alone: it has its device to itself.
    """

    trial_id: str
    config: TrialConfig
    work: Work
    decisions: frozenset[int] = frozenset()
    again: tuple[float, ...] = ()
    known: int = 0
    alone: bool = False

    @property
    def folder(self) -> Path:
        return self.work.folder / self.trial_id

    def waits_after(self, epoch: int) -> bool:
        """Whether the trial waits for a decision there. After its own last epoch there is nothing left to decide."""
        return epoch in self.decisions and epoch < self.config.epochs


class Fault(StrEnum):
    """What kept a trial from going on, though nothing is wrong with it."""

    LOST = "lost"  # its process, its worker or its node is gone
    PREEMPTED = "preempted"  # the node was taken away, with notice
    NO_MEMORY = "no memory"  # of the device
    NO_SPACE = "no space"  # on the disk


@dataclass(frozen=True)
class TrialEnd:
    """A trial came to its end; `error` is empty unless it failed.

    Attributes:
        fault: why it failed, where that was no fault of its own.
    """

    error: str = ""
    traceback: str = ""
    fault: Fault | None = None


def train(job: TrialJob) -> Generator[EpochMetrics, bool, None]:
    """The program of every real trial of a classifier."""
    from cxr_models import steps, training

    steps.configure(job.work.threads)
    work = job.work
    if job.again:
        return training.train_again(
            job.trial_id, job.config, work.data.together(), job.folder, job.again, known=job.known
        )
    return training.run_trial(
        job.trial_id, job.config, work.data, job.folder, work.objective, decisions=job.decisions, known=job.known
    )


def segment(job: TrialJob) -> Generator[EpochMetrics, bool, None]:
    """The program of every real trial of a segmentation."""
    from cxr_models import segmentation, steps

    steps.configure(job.work.threads)
    work = job.work
    if job.again:
        return segmentation.train_again(
            job.trial_id, job.config, work.data.together(), job.folder, job.again, known=job.known
        )
    return segmentation.run_segmentation(
        job.trial_id, job.config, work.data, job.folder, work.objective, decisions=job.decisions, known=job.known
    )


def load_program(name: str) -> Program:
    """The program of a `module:function` name."""
    module, _, function = name.partition(":")
    program: Program = getattr(importlib.import_module(module), function)
    return program


def failure(error: Exception) -> TrialEnd:
    """An exception of a trial as its end."""
    first_line = str(error).strip().partition("\n")[0]
    fault = _fault(error)
    said = str(error) if fault is Fault.NO_SPACE else f"{type(error).__name__}: {first_line}".removesuffix(": ")
    return TrialEnd(said, traceback.format_exc(), fault)


def _fault(error: Exception) -> Fault | None:
    if isinstance(error, OSError) and error.errno in NO_SPACE_ERRNOS:
        return Fault.NO_SPACE
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if names.intersection(NO_MEMORY_ERRORS) or any(words in text for words in NO_MEMORY_WORDS):
        return Fault.NO_MEMORY
    return None


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
        self._trial: TrialJob | None = None  # the running one
        self._waiting = False  # the child, for a decision

    def start(self, job: TrialJob) -> None:
        """Begin a trial; one that is still running is stopped first."""
        self.stop()
        if self._process is not None and _resident_bytes(self._process.pid) > job.work.memory_bound_bytes:
            self.close()
        if self._process is None or not self._process.is_alive():
            self._spawn()
        self._send(job)
        self._trial = job

    def next(self) -> list[EpochMetrics | TrialEnd]:
        """Wait for what the trial does next: at least one event, and those that follow within a fraction of a second.

        A batch ends with the trial or where it waits for a decision; asking for another batch is the order to go on.
        """
        if self._trial is None or self._connection is None:
            return [TrialEnd("the trial was not started", fault=Fault.LOST)]
        if self._waiting:
            self._waiting = False
            self._send(True)
        events = [self._receive(self._connection)]
        until = time.monotonic() + BATCH_SPAN_S
        while self._trial and not self._waiting and self._connection.poll(max(0.0, until - time.monotonic())):
            events.append(self._receive(self._connection))
        return events

    def stop(self) -> None:
        """End the running trial after the epoch it reported; a child in the middle of one, or silent, is killed."""
        if self._trial is None or self._connection is None:
            return
        timeout_s = STOP_TIMEOUT_S if self._waiting else STOP_GRACE_S
        self._trial, self._waiting = None, False
        self._send(False)
        if not _ends(self._connection, timeout_s):
            self.close()

    def close(self) -> None:
        """Kill the child. It holds nothing that is not on disk."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = self._trial = None
        self._waiting = False

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

    def _receive(self, connection: Connection) -> EpochMetrics | TrialEnd:
        try:
            event: EpochMetrics | TrialEnd = connection.recv()
        except (EOFError, OSError):
            return self._died()
        if isinstance(event, TrialEnd):
            self._trial = None
            if event.fault is Fault.NO_MEMORY:
                self.close()  # what it holds of the device's memory is free for the next
        else:
            self._waiting = self._trial is not None and self._trial.waits_after(event.epoch)
        return event

    def _died(self) -> TrialEnd:
        if self._process is None:
            return TrialEnd("the trial's process is gone", fault=Fault.LOST)
        self._process.join(STOP_TIMEOUT_S)
        code = self._process.exitcode
        self.close()
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"
        memory = "; the system may have run out of memory" if code == -signal.SIGKILL else ""
        return TrialEnd(f"the trial's process {how}{memory} (its output: {self._log})", fault=Fault.LOST)


def serve(connection: Connection, log: Path) -> None:
    """The child: train what arrives until the other side closes."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means for running trials
    redirect_output(log)
    while True:
        try:
            message = connection.recv()
            if isinstance(message, TrialJob):  # else an order to end that came after the end
                _serve_trial(connection, message)
        except (EOFError, ConnectionError):
            return


def _serve_trial(connection: Connection, job: TrialJob) -> None:
    trial = TrialEvents(job)
    event = trial.begin()
    while isinstance(event, EpochMetrics):
        connection.send(event)
        told = job.waits_after(event.epoch) or connection.poll()
        event = trial.answer(connection.recv() if told else True)
    connection.send(event)


def _ends(connection: Connection, timeout_s: float) -> bool:
    """Whether the trial at the other side ends in time; epochs it still reports are dropped."""
    until = time.monotonic() + timeout_s
    try:
        while connection.poll(max(0.0, until - time.monotonic())):
            if isinstance(connection.recv(), TrialEnd):
                return True
    except (EOFError, OSError):
        pass  # it died, and a new child is started when one is needed
    return False


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
    """Of its own: mapped files, such as pixels and features, are the machine's to take back."""
    try:
        memory = psutil.Process(pid).memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))
    except psutil.Error:
        return 0
