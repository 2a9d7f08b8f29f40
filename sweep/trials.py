"""The Ray side of trials: warm workers that run many of them in turn, and our decisions in Ray's words.

Ray Tune places trials on CPUs and GPUs; which trial comes next, whether it goes on and what is recorded is the
conductor's business. Nothing in this file may raise into Ray's loop: an exception there ends the whole sweep.
"""

import errno
import json
import logging
import math
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from weakref import WeakValueDictionary

from sweep.ray_cluster import LOOP, asked_for  # before Ray, which reads what it sets

# isort: split
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune import ProgressReporter
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from cxr_models.storage import NEXT_TO_NOTHING, NoSpace, no_space
from cxr_models.trial import EpochMetrics
from sweep.depot import Home, files_of
from sweep.interruption import deferred
from sweep.machine import Node
from sweep.nodes import Slots
from sweep.ray_depot import depot_at_home
from sweep.ray_worker import FilesOfNodes, RayTrial
from sweep.retries import SweepFailed
from sweep.runner import WAIT, Conducting, Wait
from sweep.worker import Fault, TrialEnd, TrialJob

Answer = TypeVar("Answer")

# After an interruption: how long running epochs may take to end, and then Ray to stop the workers.
GRACE_S = 5.0
STOPPING_TIMEOUT_S = 12.0
# How often Ray's loop may fail without an epoch between.
MOST_IN_VAIN = 3
PATIENCE_S = 30.0  # how long a trial waits for room on its node while another has a free slot
RAY = "ray"  # name of Tune's own folder
NODE_ID = "ray.io/node-id"  # label that each node bears


@dataclass(frozen=True)
class Placement:
    """What each trial takes, and how many run at once where no cluster says that.

    Attributes:
        cores: of the machine a trial has to itself where it is to be alone; 0 for no more than its own.
    """

    cpus_per_trial: float
    gpus_per_trial: float
    concurrency: int
    cores: int = 0

    def of_trial(self, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """What Ray sets aside for a trial as it was handed out, and on which node if it was given to one."""
        cpus, gpus = self.cpus_per_trial, self.gpus_per_trial
        if config["alone"]:
            cpus, gpus = max(cpus, self.cores, config["cores"]), float(math.ceil(gpus))
        where = {"bundle_label_selector": [{NODE_ID: config["node"]}]} if config["node"] else {}
        return tune.PlacementGroupFactory([{"CPU": cpus, "GPU": gpus}], **where)


@dataclass(frozen=True)
class Cluster:
    """What trials need where they may run on several nodes.

    Attributes:
        slots: of its nodes.
        cache_dir: of the driver.
        told: hears of what was carried between nodes.
        most: trials that the sweep can use slots for at once, for an autoscaler.
    """

    slots: Slots
    cache_dir: Path
    told: Callable[[str], None]
    most: int


def run_on_ray(conductor: Conducting, placement: Placement, *, folder: Path, cluster: Cluster | None = None) -> None:
    """Run every trial on the connected Ray.

    A trial whose worker, node or process is lost goes on with another one, as the conductor says. Where Ray's own loop
    fails, a new one takes all of them up.

    Args:
        conductor: decides; its methods are called from one thread of this process.
        placement: what each trial takes.
        folder: for Ray's own state and the workers' logs; that of the trials lies in it.
        cluster: given, each trial is told its node, and needs to see none of the driver's files there.

    Raises:
        KeyboardInterrupt: handed on after running trials were ended; finished ones are recorded.
        SweepFailed: the conductor could not go on, or Ray failed again and again; finished trials are recorded.
        NoSpace: Ray failed, and the disk of the folder is full.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what happens to a trial is told by the conductor
    _retry_what_the_memory_monitor_kills()
    with ExitStack() as stack:
        files = None
        if cluster:
            home = Home(cluster.cache_dir, folder)
            ask = stack.enter_context(depot_at_home(home, files_of(conductor.work.data), cluster.told))
            files = FilesOfNodes(home, ask)
            stack.enter_context(asked_for(placement.cpus_per_trial, placement.gpus_per_trial, cluster.most))
        slots = cluster.slots if cluster else Slots.here(placement.concurrency)
        _run_to_the_end(conductor, _Reference(conductor, slots), placement, folder, files)


def _run_to_the_end(
    conductor: Conducting, reference: "_Reference", placement: Placement, folder: Path, files: FilesOfNodes | None
) -> None:
    in_vain = 0
    while failed := _run_once(conductor, reference, placement, folder, files):
        if shutil.disk_usage(folder).free < NEXT_TO_NOTHING and not reference.failure:
            raise no_space(folder / RAY, errno.ENOSPC)  # what Ray itself makes of that says nothing
        in_vain = 0 if reference.take_heard() else in_vain + 1
        if in_vain < MOST_IN_VAIN:
            reference.all_lost(f"Ray failed: {failed.strip().splitlines()[-1]}")
        if reference.failure or in_vain == MOST_IN_VAIN:
            raise SweepFailed(reference.failure or failed)


def _run_once(
    conductor: Conducting, reference: "_Reference", placement: Placement, folder: Path, files: FilesOfNodes | None
) -> str:
    """Run trials until all have ended; what ended Ray's loop before, if anything did."""
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(RayTrial, work=conductor.work, logs=folder / "logs", files=files), placement.of_trial
        ),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # as many as the conductor hands out
            search_alg=_ConductorSearcher(reference),
            scheduler=_ConductorScheduler(reference),
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


class _Reference:
    """Finds the conductor in this process again, and keeps what it raises away from Ray.

    Ray pickles what it is given, and a conductor cannot be. What goes wrong in the conductor or a listener (a full
    disk, say) ends the sweep, but by our own decision: `failure` says why.
    """

    _conductors: ClassVar[WeakValueDictionary[int, Conducting]] = WeakValueDictionary()
    _failures: ClassVar[dict[int, str]] = {}
    _slots: ClassVar[dict[int, Slots]] = {}
    _heard: ClassVar[set[int]] = set()

    def __init__(self, conductor: Conducting, slots: Slots) -> None:
        self._key = id(conductor)
        self._conductors[self._key] = conductor
        self._failures[self._key] = ""
        self._slots[self._key] = slots

    @property
    def failure(self) -> str:
        return self._failures[self._key]

    @property
    def interrupted_at(self) -> float | None:
        return self._conductors[self._key].interrupted_at

    def next_job(self) -> tuple[TrialJob, Node] | Wait | None:
        """The next trial, with the node it is given to."""
        return self._guarded(self._placed, None)

    def _placed(self, conductor: Conducting) -> tuple[TrialJob, Node] | Wait | None:
        slots = self._slots[self._key]
        if conductor.interrupted_at is None and not slots.is_free():
            return WAIT
        job = conductor.next_job()
        return (job, slots.take(job.trial_id, job.config)) if isinstance(job, TrialJob) else job

    def is_gone(self, node_id: str) -> bool:
        """Whether the node of a trial has left."""
        return self._slots[self._key].is_gone(node_id)

    def take_heard(self) -> bool:
        """Whether an epoch was heard since this was last asked."""
        heard = self._key in self._heard
        self._heard.discard(self._key)
        return heard

    def epoch(self, metrics: EpochMetrics) -> bool:
        self._heard.add(self._key)
        return self._guarded(lambda conductor: conductor.epoch(metrics), False)

    def is_free_beside(self, node_id: str) -> bool:
        """Whether a trial could be given to another node."""
        return self._slots[self._key].is_free_beside(node_id)

    def stopped(self, trial_id: str) -> None:
        """A trial was told to end."""
        self._slots[self._key].release(trial_id)

    def ended(self, trial_id: str, end: TrialEnd) -> None:
        self._slots[self._key].release(trial_id, lost=end.fault in (Fault.LOST, Fault.PREEMPTED))
        self._guarded(lambda conductor: conductor.ended(trial_id, end), None)

    def all_lost(self, cause: str) -> None:
        self._slots[self._key].release_all()
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
        placed = self._reference.next_job()
        if placed is None:
            return Searcher.FINISHED
        if isinstance(placed, Wait):
            return None  # Ray asks again
        job, node = placed
        # As text, because Ray walks through every value of a configuration again and again.
        texts = {"config": job.config.to_json(), "decisions": sorted(job.decisions), "again": job.again}
        plain = {"trial_id": job.trial_id, "known": job.known, "alone": job.alone}
        plain |= {"node": node.node_id, "cores": node.cores}
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
        self._waits_since: dict[str, float] = {}  # Ray's name of a trial -> when it was first seen to wait for room

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        go_on = [self._reference.epoch(metrics) for metrics in result["events"]]
        if not go_on[-1]:
            self._reference.stopped(trial.config["trial_id"])
        return str(FIFOScheduler.CONTINUE if go_on[-1] else FIFOScheduler.STOP)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        told = Path(trial.error_file)
        text = told.read_text(encoding="utf-8").strip() if told.is_file() else ""
        cause = next(reversed(text.splitlines()), "the worker was lost")
        fault = Fault.PREEMPTED if "preempt" in text else Fault.LOST
        self._reference.ended(trial.config["trial_id"], TrialEnd(f"the Ray worker failed: {cause}", fault=fault))

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        waiting = set(tune_controller._actor_manager.pending_actors)  # for room
        for trial in [trial for trial in tune_controller.get_live_trials() if trial.status == Trial.PENDING]:
            node_id = trial.config["node"]
            if self._reference.is_gone(node_id):
                self._take_back(tune_controller, trial, "its node left before it began")
            elif tune_controller._trial_to_actor.get(trial) not in waiting or trial.config["alone"]:
                self._waits_since.pop(trial.trial_id, None)
            elif self._waits_long(trial.trial_id) and self._reference.is_free_beside(node_id):
                self._take_back(tune_controller, trial, "its node has no room, others use it")
        return super().choose_trial_to_run(tune_controller)

    def _waits_long(self, name: str) -> bool:
        now = time.monotonic()
        return now - self._waits_since.setdefault(name, now) > PATIENCE_S

    def _take_back(self, tune_controller: Any, trial: Any, why: str) -> None:
        """Let a trial that has not begun be given to another node: Ray would wait for this one for ever."""
        self._waits_since.pop(trial.trial_id, None)
        if trial in tune_controller._staged_trials:  # else Ray keeps no worker warm from now on
            tune_controller._unstage_trial_with_resources(trial)
        tune_controller.stop_trial(trial)
        self._reference.ended(trial.config["trial_id"], TrialEnd(why, fault=Fault.PREEMPTED))


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
