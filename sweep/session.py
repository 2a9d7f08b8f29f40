"""One sweep from its plan to its report."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cxr_models.backbones import BACKBONES
from cxr_models.dataset import write_split_csv
from cxr_models.pixels import pixel_array
from cxr_models.storage import written_whole
from cxr_models.trial import TrialResult
from sweep.evaluation import (
    best_model,
    evaluate_test,
    keras_child,
    record_predictions,
    register_champion,
    save_and_predict,
)
from sweep.halving import Halving
from sweep.plan import Plan
from sweep.progress import StepProgress, SweepProgress
from sweep.record import Record, RunFolder, ranked, write_json
from sweep.report import write_report
from sweep.runner import Conductor, Listener, RayError, run_inline
from sweep.search import Search
from sweep.summary import summarise
from sweep.tracking import DatasetInfo, RunStatus, Tracker
from sweep.weights import fetch_weights
from sweep.worker import Work

TRACKING_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Ended:
    """How a sweep ended.

    Attributes:
        results: every ended trial, in the order of suggestion.
        failure: why Ray ended the sweep before its last trial, if it did.
        tracking_problem: what kept MLflow from taking everything, if anything did.
        ui_command: opens MLflow's pages.
    """

    summary: dict[str, Any]
    results: tuple[TrialResult, ...]
    interrupted: bool
    failure: str
    tracking_problem: str
    ui_command: str


class Stopwatch:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - begun

    @property
    def seconds(self) -> dict[str, float]:
        return {"total": time.perf_counter() - self._begun, **self._parts}


def run_sweep(
    plan: Plan,
    folder: RunFolder,
    *,
    cache_dir: Path,
    inline: bool,
    address: str,
    console: Console,
) -> Ended:
    """Run every trial, open the test set once for the best one, and write everything into the run folder.

    A sweep that was interrupted, or that Ray ended, keeps its finished trials; its test set stays sealed.

    Raises:
        ConnectionError: no Ray answers at `address`.
        ValueError: weights could not be fetched.
    """
    watch = Stopwatch()
    write_inputs(plan, folder)
    tracker = open_tracker(plan, folder)
    record = Record(folder, plan.spec.objective)
    failure = ""
    interrupted = False
    test: dict[str, Any] | None = None
    pixels: dict[int, Path] = {}
    conductor: Conductor | None = None
    try:
        with watch.time("prepare"):
            pixels = prepare(plan, cache_dir, StepProgress(console))
        progress = SweepProgress(console, plan.spec.objective, trials=plan.trials, max_epochs=plan.max_epochs)
        conductor = _conductor(plan, folder, pixels, (record, tracker, progress))
        if not inline:
            console.print(f"connecting to Ray at {address}" if address else "starting Ray and its workers")
        with watch.time("search"):
            _run_trials(conductor, plan, folder, inline=inline, address=address, progress=progress)
        best = ranked(record.results, plan.spec.objective)
        if best:
            with watch.time("evaluate"):
                console.print("opening the test set for the best trial")
                test = _evaluate(plan, best[0], folder, pixels, tracker)
    except KeyboardInterrupt:
        interrupted = True
    except RayError as error:
        failure = str(error)
    summary = summarise(
        plan,
        record.results,
        seconds={**watch.seconds, "train": sum(result.train_seconds for result in record.results)},
        epochs_run=conductor.epochs_run if conductor else 0,
        interrupted=interrupted or bool(failure),
        test=test,
    )
    _publish(plan, folder, summary, tracker, "KILLED" if interrupted else "FAILED" if failure else "FINISHED")
    return Ended(summary, record.results, interrupted, failure, tracker.problem, tracker.ui_command)


def write_inputs(plan: Plan, folder: RunFolder) -> None:
    """The resolved spec and the split, before anything runs."""
    with written_whole(folder.spec) as scratch:
        scratch.write_text(plan.spec.to_yaml(), encoding="utf-8")
    write_split_csv(folder.split, plan.manifest, plan.splits)


def open_tracker(plan: Plan, folder: RunFolder) -> Tracker:
    spec, manifest = plan.spec, plan.manifest
    tracker = Tracker(
        folder,
        spec.name,
        uri=spec.tracking.uri or "",
        experiment=spec.tracking.experiment or "",
        objective=spec.objective,
        classes=manifest.classes,
        dataset=DatasetInfo(
            name=Path(spec.data.source).name,
            digest=manifest.digest,
            source=str(manifest.root),
            images=len(manifest.records),
            patients=manifest.patients,
            classes=plan.class_counts(),
        ),
    )
    tracker.opened()
    return tracker


def prepare(plan: Plan, cache_dir: Path, progress: StepProgress) -> dict[int, Path]:
    """Fetch the weights that are not here yet, and decode every image once per side."""
    for (backbone, _, side), weights in plan.weights.items():
        if weights.fetch and not weights.path.is_file():
            fetch_weights(BACKBONES[backbone], side)
    return {
        side: pixel_array(plan.manifest, side, cache_dir, progress(f"decoding at {side} px")) for side in plan.sides
    }


def _conductor(plan: Plan, folder: RunFolder, pixels: dict[int, Path], listeners: tuple[Listener, ...]) -> Conductor:
    spec = plan.spec
    work = Work(plan.trial_data(pixels), spec.objective, folder.state / "trials", plan.allotment.threads)
    halving = None
    if plan.rungs and spec.search.halving:
        halving = Halving(plan.rungs, spec.search.halving.reduction_factor, spec.objective.mode)
    return Conductor(work, Search(spec, folder.study), halving, plan.parameters, listeners)


def _run_trials(
    conductor: Conductor, plan: Plan, folder: RunFolder, *, inline: bool, address: str, progress: SweepProgress
) -> None:
    if inline:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its chatter would run into ours
        with progress.shown():
            run_inline(conductor)
        return
    from sweep import trials

    allotment = plan.allotment
    with trials.ray_cluster(address, cores=plan.machine.cores, gpus=plan.machine.gpus), progress.shown():
        placement = trials.Placement(allotment.cpus_per_trial, allotment.gpus_per_trial, allotment.concurrency)
        trials.run_on_ray(conductor, placement, total=plan.trials, folder=folder.state)


def _evaluate(
    plan: Plan, result: TrialResult, folder: RunFolder, pixels: dict[int, Path], tracker: Tracker
) -> dict[str, Any]:
    best = best_model(plan, result, folder, pixels)
    with keras_child(folder.log("evaluation")) as call:
        probabilities = call(save_and_predict, best)
        record_predictions(plan, best, result, probabilities, folder)
        if tracker.parent_run_id:
            try:
                call(register_champion, best, tracker.uri, tracker.parent_run_id, plan.spec.name)
            except Exception as error:  # the model is in the run folder; MLflow's copy is a convenience
                tracker.note(f"the best model was not registered: {error}")
    return evaluate_test(plan, best, probabilities)


def _publish(plan: Plan, folder: RunFolder, summary: dict[str, Any], tracker: Tracker, status: RunStatus) -> None:
    write_json(folder.summary, summary)
    write_report(folder)
    files = (folder.summary, folder.report, folder.trials, folder.predictions)
    tracker.finished(summary, [path for path in files if path.is_file()], status)
    tracker.close(TRACKING_TIMEOUT_S)
