"""The Ray side of trials: warm workers that run many of them in turn, and our decisions in Ray's words.

Ray Tune places trials on CPUs and GPUs; which trial comes next, whether it goes on and what is recorded is the
conductor's business. Nothing in this file may raise into Ray's loop: an exception there ends the whole sweep.
"""

import errno
import json
import logging
import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from weakref import WeakValueDictionary

from sweep.ray_cluster import LOOP  # before Ray, which reads what it sets

# isort: split
import ray
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune import ProgressReporter
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from cxr_models.storage import NEXT_TO_NOTHING, NoSpace, no_space
from cxr_models.trial import EpochMetrics, TrialConfig
from sweep.interruption import deferred
from sweep.retries import SweepFailed
from sweep.runner import Conducting, Wait
from sweep.worker import Fault, TrialEnd, TrialJob, TrialProcess, Work

Answer = TypeVar("Answer")

# After an interruption: how long running epochs may take to end, and then Ray to stop the workers.
GRACE_S = 5.0
STOPPING_TIMEOUT_S = 12.0
# How often Ray's loop may fail without an epoch between.
MOST_IN_VAIN = 3
RAY = "ray"  # name of Tune's own folder


@dataclass(frozen=True)
class Placement:
    """What each trial takes, and how many run at once.

    Attributes:
        cores: of the machine a trial has to itself where it is to be alone; 0 for no more than its own.
    """

    cpus_per_trial: float
    gpus_per_trial: float
    concurrency: int
    cores: int = 0

    def of_trial(self, config: dict[str, Any]) -> dict[str, float]:
        """What Ray sets aside for a trial as it was handed out."""
        if not config["alone"]:
            return {"cpu": self.cpus_per_trial, "gpu": self.gpus_per_trial}
        return {"cpu": max(self.cpus_per_trial, self.cores), "gpu": float(math.ceil(self.gpus_per_trial))}


def run_on_ray(conductor: Conducting, placement: Placement, *, folder: Path) -> None:
    """Run every trial on the connected Ray.

    A trial whose worker, node or process is lost goes on with another one, as the conductor says. Where Ray's own loop
    fails, a new one takes all of them up.

    Args:
        conductor: decides; its methods are called from one thread of this process.
        placement: what each trial takes.
        folder: for Ray's own state and the workers' logs.

    Raises:
        KeyboardInterrupt: handed on after running trials were ended; finished ones are recorded.
        SweepFailed: the conductor could not go on, or Ray failed again and again; finished trials are recorded.
        NoSpace: Ray failed, and the disk of the folder is full.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what happens to a trial is told by the conductor
    _retry_what_the_memory_monitor_kills()
    reference = _Reference(conductor)
    in_vain = 0
    while failure := _run_once(conductor, reference, placement, folder):
        if shutil.disk_usage(folder).free < NEXT_TO_NOTHING and not reference.failure:
            raise no_space(folder / RAY, errno.ENOSPC)  # what Ray itself makes of that says nothing
        in_vain = 0 if reference.take_heard() else in_vain + 1
        if in_vain < MOST_IN_VAIN:
            reference.all_lost(f"Ray failed: {failure.strip().splitlines()[-1]}")
        if reference.failure or in_vain == MOST_IN_VAIN:
            raise SweepFailed(reference.failure or failure)


def _run_once(conductor: Conducting, reference: "_Reference", placement: Placement, folder: Path) -> str:
    """Run trials until all have ended; what ended Ray's loop before, if anything did."""
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_RayTrial, work=conductor.work, logs=folder / "logs"), placement.of_trial
        ),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # as many as the conductor hands out
            search_alg=_ConductorSearcher(reference),
            scheduler=_ConductorScheduler(reference),
            max_concurrent_trials=placement.concurrency,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=RAY,
            storage_path=str(folder),
            verbose=0,
            progress_reporter=_Silent(),
            callbacks=[_Ends(reference)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    failures: list[str] = []
    over = threading.Event()

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException:  # whatever ends this thread early ends the sweep, and must be told
            failures.append(traceback.format_exc())
        finally:
            over.set()

    # Off the main thread Ray leaves the signal handlers alone, so Ctrl-C arrives here.
    threading.Thread(target=fit, name=LOOP, daemon=True).start()
    try:
        # Not Thread.join: up to Python 3.12, one that is interrupted takes the thread for ended.
        while not over.wait(0.2):
            pass
    except KeyboardInterrupt:
        # A second one would shut Ray down below the running loop, which aborts the whole process.
        with deferred():
            conductor.interrupt()
            over.wait(STOPPING_TIMEOUT_S)
        raise
    return reference.failure or "".join(failures)


def _retry_what_the_memory_monitor_kills() -> None:
    """A worker killed by Ray's memory monitor is one that was lost.

    Ray 2.60 takes the error for neither a worker's nor a task's, and ends the whole loop over it.
    """
    failed = RayActorManager._actor_task_failed
    if getattr(failed, "_knows_the_memory_monitor", False):
        return

    def task_failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        failed(self, tracked_actor_task, exception)

    task_failed._knows_the_memory_monitor = True  # type: ignore[attr-defined]
    RayActorManager._actor_task_failed = task_failed


class _RayTrial(tune.Trainable):  # type: ignore[misc]
    """A warm worker: Ray hands it one trial after another, a child process trains them."""

    def setup(self, config: dict[str, Any], work: Work, logs: Path) -> None:
        if not ray.get_gpu_ids():
            # Ray leaves a CPU trial the sight of every GPU, and TensorFlow would take them.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        self._process = TrialProcess(logs / f"worker-{os.getpid()}.log", work.preload)
        self._work = work
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._start(new_config)
        return True

    def _start(self, config: dict[str, Any]) -> None:
        trial = TrialConfig.from_json(json.loads(config["config"]))
        decisions, again = frozenset(json.loads(config["decisions"])), tuple(json.loads(config["again"]))
        known, alone = config["known"], config["alone"]
        self._process.start(TrialJob(config["trial_id"], trial, self._work, decisions, again, known, alone))

    def step(self) -> dict[str, Any]:
        events = self._process.next()
        return {"events": events, "done": isinstance(events[-1], TrialEnd)}

    def cleanup(self) -> None:
        self._process.close()


class _Reference:
    """Finds the conductor in this process again, and keeps what it raises away from Ray.

    Ray pickles what it is given, and a conductor cannot be. What goes wrong in the conductor or a listener (a full
    disk, say) ends the sweep, but by our own decision: `failure` says why.
    """

    _conductors: ClassVar[WeakValueDictionary[int, Conducting]] = WeakValueDictionary()
    _failures: ClassVar[dict[int, str]] = {}
    _heard: ClassVar[set[int]] = set()

    def __init__(self, conductor: Conducting) -> None:
        self._key = id(conductor)
        self._conductors[self._key] = conductor
        self._failures[self._key] = ""

    @property
    def failure(self) -> str:
        return self._failures[self._key]

    @property
    def interrupted_at(self) -> float | None:
        return self._conductors[self._key].interrupted_at

    def next_job(self) -> TrialJob | Wait | None:
        return self._guarded(lambda conductor: conductor.next_job(), None)

    def take_heard(self) -> bool:
        """Whether an epoch was heard since this was last asked."""
        heard = self._key in self._heard
        self._heard.discard(self._key)
        return heard

    def epoch(self, metrics: EpochMetrics) -> bool:
        self._heard.add(self._key)
        return self._guarded(lambda conductor: conductor.epoch(metrics), False)

    def ended(self, trial_id: str, end: TrialEnd) -> None:
        self._guarded(lambda conductor: conductor.ended(trial_id, end), None)

    def all_lost(self, cause: str) -> None:
        self._guarded(lambda conductor: conductor.all_lost(cause), None)

    def _guarded(self, call: Callable[[Conducting], Answer], otherwise: Answer) -> Answer:
        conductor = self._conductors[self._key]
        try:
            return call(conductor)
        except (SweepFailed, NoSpace) as error:
            self._fail(conductor, str(error))
        except Exception:
            self._fail(conductor, traceback.format_exc())
        return otherwise

    def _fail(self, conductor: Conducting, cause: str) -> None:
        self._failures[self._key] = self._failures[self._key] or cause
        conductor.interrupt()


class _ConductorSearcher(Searcher):  # type: ignore[misc]
    """Hands Ray the conductor's next trial."""

    def __init__(self, reference: _Reference) -> None:
        super().__init__()
        self._reference = reference

    def suggest(self, trial_id: str) -> Any:
        job = self._reference.next_job()
        if job is None:
            return Searcher.FINISHED
        if isinstance(job, Wait):
            return None  # Ray asks again
        # As text, because Ray walks through every value of a configuration again and again.
        texts = {"config": job.config.to_json(), "decisions": sorted(job.decisions), "again": job.again}
        plain = {"trial_id": job.trial_id, "known": job.known, "alone": job.alone}
        return {**plain, **{name: json.dumps(value) for name, value in texts.items()}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass  # the scheduler hears of it, with the trial's configuration

    def save(self, checkpoint_path: str) -> None:
        pass  # the study keeps its own journal

    def restore(self, checkpoint_path: str) -> None:
        pass


class _ConductorScheduler(FIFOScheduler):  # type: ignore[misc]
    """Tells the conductor of every epoch of a trial that goes on, and of workers that were lost."""

    def __init__(self, reference: _Reference) -> None:
        super().__init__()
        self._reference = reference

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        go_on = [self._reference.epoch(metrics) for metrics in result["events"]]
        return str(FIFOScheduler.CONTINUE if go_on[-1] else FIFOScheduler.STOP)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        told = Path(trial.error_file)
        text = told.read_text(encoding="utf-8").strip() if told.is_file() else ""
        cause = next(reversed(text.splitlines()), "the worker was lost")
        fault = Fault.PREEMPTED if "preempt" in text else Fault.LOST
        self._reference.ended(trial.config["trial_id"], TrialEnd(f"the Ray worker failed: {cause}", fault=fault))


class _Ends(tune.Callback):  # type: ignore[misc]
    """Tells the conductor of trials that came to their end, and ends Ray's loop when an interruption waited too long.

    What a callback raises ends the sweep.
    """

    def __init__(self, reference: _Reference) -> None:
        self._reference = reference

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        # Ray keeps every trial's last result to the end of the sweep, and would keep the epochs with it.
        *epochs, end = result.pop("events")
        if isinstance(end, TrialEnd):  # the scheduler is not asked about it
            for metrics in epochs:
                self._reference.epoch(metrics)
            self._reference.ended(trial.config["trial_id"], end)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        interrupted_at = self._reference.interrupted_at
        if interrupted_at is not None and time.monotonic() > interrupted_at + GRACE_S:
            raise RuntimeError("interrupted")


class _Silent(ProgressReporter):  # type: ignore[misc]
    """Our own progress is shown instead."""

    def should_report(self, trials: Any, done: bool = False) -> bool:
        return False

    def report(self, trials: Any, done: bool, *sys_info: Any) -> None:
        pass
