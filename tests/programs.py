"""Fake trainings, run by workers in place of real ones: `tests.programs:<function>`. Nothing heavy is imported.

A trial's `seed` is its place in the sweep, so that one program can treat one trial differently.
"""

import errno
import json
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import numpy as np

from cxr_models.hopeless import is_hopeless
from cxr_models.trial import METRICS, EpochMetrics, Objective, TrialConfig, TrialData
from sweep.worker import TrialJob, Work

Epochs = Generator[EpochMetrics, bool, None]

MEETING_TIMEOUT_S = 60
ODD_ONE = 2  # the trial with this seed is the one that fails or dies


def value_of(seed: int, epoch: int) -> float:
    """Validation score of a fake trial: rises with the epochs, and higher from the start for some seeds."""
    return math.sin(seed + 1) ** 2 / 2 + 0.4 * (1 - 1 / epoch)


def measured(job: TrialJob, epoch: int, value: float, **facts: float) -> EpochMetrics:
    values = {**dict.fromkeys(METRICS, value), **facts}
    device = f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"
    known = {"device": device, "trial_seconds": 0.5 * epoch}
    return EpochMetrics(job.trial_id, epoch, 0, 0.1, {"loss": 1 - value}, values, 0.01, 100.0, **known)


def told_epochs(job: TrialJob, happens: Callable[[int], None]) -> Epochs:
    """Every epoch tells which process it ran in; `happens` runs before it is told. It goes on after the known ones."""
    for epoch in range(job.known + 1, job.config.epochs + 1):
        happens(epoch)
        value = value_of(job.config.seed, epoch)
        if not (yield measured(job, epoch, value, pid=os.getpid(), parent=os.getppid())):
            return


def quick(job: TrialJob) -> Epochs:
    return told_epochs(job, lambda epoch: None)


def raising(job: TrialJob) -> Epochs:
    def happens(epoch: int) -> None:
        if job.config.seed == ODD_ONE and epoch == 2:
            raise ValueError("no such luck\nand more of it")

    return told_epochs(job, happens)


def killed(job: TrialJob) -> Epochs:
    """Its second epoch never comes through."""

    def happens(epoch: int) -> None:
        if job.config.seed == ODD_ONE and epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    return told_epochs(job, happens)


def killed_once(job: TrialJob) -> Epochs:
    """Its second epoch kills it when it is first tried."""
    tried = job.work.folder / f"tried-{job.trial_id}"

    def happens(epoch: int) -> None:
        if job.config.seed == ODD_ONE and epoch == 2 and not tried.exists():
            tried.parent.mkdir(parents=True, exist_ok=True)
            tried.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return told_epochs(job, happens)


def hungry_once(job: TrialJob) -> Epochs:
    """Its second epoch takes 4 GB when it is first tried, and holds them."""
    tried = job.work.folder / f"tried-{job.trial_id}"

    def happens(epoch: int) -> None:
        if job.config.seed == ODD_ONE and epoch == 2 and not tried.exists():
            tried.parent.mkdir(parents=True, exist_ok=True)
            tried.touch()
            held = np.ones(2**29)
            time.sleep(60)
            del held

    return told_epochs(job, happens)


class ResourceExhaustedError(Exception):
    """As TensorFlow names it."""


def greedy(job: TrialJob) -> Epochs:
    """Does not fit beside others where its batch is above 16, and above 32 not at all."""

    def happens(epoch: int) -> None:
        if job.config.batch_size > (32 if job.alone else 16):
            raise ResourceExhaustedError("OOM when allocating tensor with shape[64,3,3]")

    return told_epochs(job, happens)


def broken(job: TrialJob) -> Epochs:
    """Fails before its first epoch, whatever the configuration."""

    def happens(epoch: int) -> None:
        raise ImportError("libcudnn.so.9: cannot open shared object file")

    return told_epochs(job, happens)


def without_space(job: TrialJob) -> Epochs:
    """The disk is full in the second epoch of the third trial, until the file `room` exists."""

    def happens(epoch: int) -> None:
        if job.config.seed == ODD_ONE and epoch == 2 and not (job.work.folder / "room").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(job.folder / "checkpoint.npz"))

    return told_epochs(job, happens)


def blind(job: TrialJob) -> Epochs:
    """Odd seeds give every image the same class and scores, and give up as real trials do."""
    course: list[EpochMetrics] = []
    for epoch in range(1, job.config.epochs + 1):
        facts = {"auroc": 0.5, "recall/a": 1.0, "recall/b": 0.0, "accuracy": 0.5} if job.config.seed % 2 else {}
        course.append(measured(job, epoch, 1 / 3, **facts))
        if not (yield course[-1]) or is_hopeless(course, job.config):
            return


def slow(job: TrialJob) -> Epochs:
    return told_epochs(job, lambda epoch: time.sleep(0.2))


def brisk(job: TrialJob) -> Epochs:
    """Epochs as short as those of a head over stored features."""
    return told_epochs(job, lambda epoch: time.sleep(0.01))


def noting(job: TrialJob) -> Epochs:
    """Writes down each epoch that it begins, whether or not anybody asks."""
    job.folder.mkdir(parents=True)

    def happens(epoch: int) -> None:
        with (job.folder / "begun").open("a") as file:
            file.write(f"{epoch}\n")

    return told_epochs(job, happens)


def meeting(job: TrialJob) -> Epochs:
    """Waits until as many trials run at once as the file `peers` says, and writes down when and on which device."""
    wanted = int((job.work.folder / "peers").read_text())
    begun = time.time()
    job.folder.mkdir()

    def happens(epoch: int) -> None:
        while len(list(job.work.folder.glob("*/"))) < wanted and time.time() - begun < MEETING_TIMEOUT_S:
            time.sleep(0.02)
        time.sleep(0.1)
        span = {"begun": begun, "ended": time.time(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}
        (job.folder / "span.json").write_text(json.dumps(span))

    return told_epochs(job, happens)


def truncated_file(job: TrialJob) -> Epochs:
    yield measured(job, 1, 0.5)
    raise EOFError("of the program")


def lost_server(job: TrialJob) -> Epochs:
    yield measured(job, 1, 0.5)
    raise ConnectionResetError("of the program")


def hanging(job: TrialJob) -> Epochs:
    """Its second epoch never ends, and it does not end when told to."""
    yield measured(job, 1, 0.5, pid=os.getpid())
    time.sleep(60)


def talking(job: TrialJob) -> Epochs:
    """Writes as Python does, and as libraries in C++ do."""
    print("python", flush=True)
    os.write(2, b"descriptor\n")
    yield measured(job, 1, 0.5)


def exiting(job: TrialJob) -> Epochs:
    yield measured(job, 1, 0.5)
    os._exit(3)


def empty(job: TrialJob) -> Epochs:
    """Ends before its first epoch."""
    yield from ()


def undefined(job: TrialJob) -> Epochs:
    """Never measures the objective."""
    yield measured(job, 1, math.nan)


def work(folder: Path, program: str) -> Work:
    """What the trials of a fake sweep have in common; there are no images."""
    nothing = np.zeros(0, np.int64)
    data = TrialData(("a", "b"), nothing.astype(np.int32), nothing, nothing, 1, {})
    objective = Objective("macro_f1", "max")
    return Work(data, objective, folder, 1, f"tests.programs:{program}", preload=())


def job(folder: Path, program: str, seed: int = 0, epochs: int = 3, decisions: Iterable[int] = ()) -> TrialJob:
    config = TrialConfig("vanilla_cnn", epochs=epochs, seed=seed)
    return TrialJob(f"t{seed}", config, work(folder, program), frozenset(decisions))


def failing_again(job: TrialJob) -> Epochs:
    """A second final training fails."""

    def happens(epoch: int) -> None:
        if job.trial_id.endswith("-final-2"):
            raise ValueError("no luck the second time")

    return told_epochs(job, happens)
