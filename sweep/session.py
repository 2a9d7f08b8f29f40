"""One session of a sweep, from its plan, or from what an earlier session left, to its report."""

import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from cxr_models.backbones import BACKBONES
from cxr_models.pixels import mask_array, pixel_array
from cxr_models.splits import write_split_csv
from cxr_models.storage import NoSpace, told_of_space, written_whole
from cxr_models.trial import SEGMENT, TEST, TrialData, TrialResult
from sweep.audit_record import audit_tags, write_audit
from sweep.champion import note_champion
from sweep.evaluation import FinalEvaluation, evaluate_finalists
from sweep.finals import FinalTrainings
from sweep.halving import Halving
from sweep.interruption import deferred
from sweep.lung_masks import input_tags
from sweep.masking import masked_arrays
from sweep.plan import Plan
from sweep.progress import EvaluationProgress, StepProgress, SweepProgress
from sweep.record import Record, RunFolder, ranked, read_epochs, write_json
from sweep.report import write_report
from sweep.resume import SessionEnd, Sessions, begin_session, end_session
from sweep.retries import SweepFailed
from sweep.runner import Conductor, Listener, run_inline
from sweep.samples import take_samples, write_samples
from sweep.search import Search
from sweep.segment_evaluation import evaluate_segmentation
from sweep.segment_verdict import judge_segmentation
from sweep.summary import summarise
from sweep.timeline import Timeline
from sweep.tracking import DatasetInfo, RunStatus, Tracker
from sweep.verdict import judge
from sweep.weights import fetch_weights, kept_weights
from sweep.worker import Work

TRACKING_TIMEOUT_S = 120.0
TRACKING_TIMEOUT_OF_INTERRUPTED_S = 5.0  # the rest is kept for `sweep.sync`, or for when the sweep goes on
STATUS: Mapping[SessionEnd, RunStatus] = {
    SessionEnd.DONE: "FINISHED",
    SessionEnd.FAILED: "FAILED",
    SessionEnd.INTERRUPTED: "KILLED",
}
# What `Work` runs for a segmentation.
SEGMENTING: Mapping[str, Any] = {"program": "sweep.worker:segment", "preload": ("cxr_models.segmentation",)}


@dataclass(frozen=True)
class Ended:
    """How a sweep ended.

    Attributes:
        results: every ended trial, in the order of suggestion.
        failure: what ended the sweep before its time, if anything did; a traceback where it was unforeseen.
        tracking_problem: what kept MLflow from taking everything, if anything did.
        ui_command: opens MLflow's pages, or where they are.
        ui_address: the page of the sweep's runs.
    """

    summary: dict[str, Any]
    results: tuple[TrialResult, ...]
    interrupted: bool
    failure: str
    tracking_problem: str
    ui_command: str
    ui_address: str


class Stopwatch:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Count the seconds of a block as a part."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - begun

    @property
    def seconds(self) -> dict[str, float]:
        """Of each part, and in `total` since the beginning."""
        return {"total": time.perf_counter() - self._begun, **self._parts}


def run_sweep(
    plan: Plan,
    folder: RunFolder,
    data: TrialData,
    cache_dir: Path,
    *,
    inline: bool,
    address: str,
    console: Console,
    sessions: Sessions = Sessions(),  # noqa: B008 - frozen
) -> Ended:
    """Run every trial, evaluate each strategy's best one, and write everything into the run folder.

    The test set is opened once, for that evaluation. A sweep that was interrupted or failed keeps its finished trials,
    and the last epochs of the others: with its `sessions`, the next call goes on from there. Unless the last trial had
    ended, its test set stays sealed.
    """
    watch = Stopwatch()
    write_inputs(plan, folder)
    begin_session(folder, plan, data)
    patients = np.array([record.patient for record in plan.manifest.records])
    write_samples(folder.samples, take_samples(data, patients, plan.spec.space))
    record = Record(folder, plan.spec.objective)
    tracker = open_tracker(plan, folder)
    progress = SweepProgress(
        console,
        plan.spec.objective,
        trials=plan.trials,
        max_epochs=plan.max_epochs,
        gpus_per_trial=plan.allotment.gpus_per_trial,
        features=plan.cache.budget.folder if plan.cache.budget else None,
    )
    timeline = Timeline(metrics for epochs in record.past.epochs.values() for metrics in epochs)
    conductor = _conductor(plan, folder, data, (record, tracker, progress, timeline), progress, sessions)
    tests = bool(len(plan.indices(TEST)))
    trainings = FinalTrainings(
        conductor,
        plan.spec.objective,
        seeds=plan.spec.final.seeds if tests else 1,
        strategies=None if tests else 1,
        results=lambda: record.results,
        epochs=lambda: read_epochs(folder.epoch_record),
        told=progress.trained_again,
        retried=progress.retried,
        journal=folder.final_record,
    )
    evaluation = FinalEvaluation(plan, folder, cache_dir)
    failure, end = "", SessionEnd.DONE
    try:
        with told_of_space(folder.summary):
            if sessions.past:
                _take_up(conductor, record, progress, console)
            if not inline:
                console.print(f"connecting to Ray at {address}" if address else "starting Ray and its workers")
            with watch.time("search"):
                _run_trials(trainings, plan, folder, inline=inline, address=address, progress=progress)
            if ranked(record.results, plan.spec.objective):
                console.print(_opening(plan.spec.task, tests=tests))
                with watch.time("evaluate"):
                    _evaluate(plan, record.results, trainings, folder, data, tracker, console, evaluation)
    except KeyboardInterrupt:
        end = SessionEnd.INTERRUPTED
    except (SweepFailed, NoSpace) as error:
        failure, end = str(error), SessionEnd.FAILED
    except Exception:
        failure, end = traceback.format_exc(), SessionEnd.FAILED
    summary: dict[str, Any] = {}
    try:
        with deferred(), told_of_space(folder.summary):
            conductor.close()
            record.close()
            summary = summarise(
                plan,
                record.results,
                seconds={
                    **watch.seconds,
                    **timeline.seconds,
                    "train": sum(result.train_seconds for result in record.results),
                },
                epochs_run=conductor.epochs_run,
                epochs_from_features=timeline.epochs_from_features,
                interrupted=end is not SessionEnd.DONE,
                curves=read_epochs(folder.epoch_record),
                evaluation=evaluation,
            )
            _publish(plan, folder, summary, tracker, end)
        tracker.close(TRACKING_TIMEOUT_OF_INTERRUPTED_S if end is SessionEnd.INTERRUPTED else TRACKING_TIMEOUT_S)
        end_session(folder, end)
    except KeyboardInterrupt:  # what MLflow did not take yet is kept
        end = SessionEnd.INTERRUPTED
    except NoSpace as error:
        failure, end = failure or str(error), SessionEnd.FAILED
    return Ended(
        summary,
        record.results,
        end is SessionEnd.INTERRUPTED,
        failure,
        tracker.problem,
        tracker.ui_command,
        tracker.ui_address,
    )


def _evaluate(
    plan: Plan,
    results: tuple[TrialResult, ...],
    trainings: FinalTrainings,
    folder: RunFolder,
    data: TrialData,
    tracker: Tracker,
    console: Console,
    evaluation: FinalEvaluation,
) -> None:
    """The final evaluation of either task, and its verdict."""
    if plan.spec.task == SEGMENT:
        evaluate_segmentation(plan, results, trainings, folder, data, tracker, evaluation)
        evaluation.verdict = judge_segmentation(plan, results, folder, evaluation)
    else:
        evaluate_finalists(plan, results, trainings, folder, data, tracker, EvaluationProgress(console), evaluation)
        evaluation.verdict = judge(plan, results, folder, evaluation)


def _take_up(conductor: Conductor, record: Record, progress: SweepProgress, console: Console) -> None:
    progress.taken_up(record.past)
    if not conductor.resume(record.past):
        console.print(
            "note: this version of Optuna would have suggested other trials; those of the record are kept, and what "
            "comes after them may differ from an uninterrupted sweep"
        )


def write_inputs(plan: Plan, folder: RunFolder) -> None:
    """The resolved spec, the split and the audit, before anything runs."""
    with written_whole(folder.spec) as scratch:
        scratch.write_text(plan.spec.to_yaml(), encoding="utf-8")
    write_split_csv(folder.split, plan.manifest, plan.splits, plan.folds)
    write_audit(folder, plan.audit, plan.manifest)
    if plan.manifest.unreadable:
        rows = [asdict(bad) for bad in plan.manifest.unreadable]
        with written_whole(folder.unreadable) as scratch:
            pd.DataFrame(rows).to_csv(scratch, index=False, errors="surrogateescape")


def open_tracker(plan: Plan, folder: RunFolder) -> Tracker:
    """Begin the tracking of a sweep in MLflow."""
    spec, manifest = plan.spec, plan.manifest
    tracker = Tracker(
        folder,
        spec.name,
        uri=spec.tracking.uri or "",
        experiment=spec.tracking.experiment or "",
        objective=spec.objective,
        classes=manifest.classes,
        dataset=DatasetInfo(
            name=" + ".join(Path(source.source).name for source in spec.data.all_sources),
            digest=manifest.digest,
            source=str(manifest.root),
            images=len(manifest.records),
            patients=manifest.patients,
            classes={part: dict(counts) for part, counts in plan.class_counts().items()},
        ),
        inputs={**input_tags(plan.lung_masks), **audit_tags(plan.audit)},
    )
    tracker.opened()
    return tracker


def prepare(plan: Plan, cache_dir: Path, progress: StepProgress) -> TrialData:
    """Fetch the weights that are not here yet, decode every image once per side, and keep both for the sweep.

    What a sweep needs of lung masks is made here too.

    Raises:
        DataError: an image or a mask can no longer be read.
        WeightsError: weights could not be fetched.
    """
    for (backbone, _, side), weights in plan.weights.items():
        if weights.fetch and not weights.path.is_file():
            fetch_weights(BACKBONES[backbone], side)
    pixels = {
        side: pixel_array(plan.manifest, side, cache_dir, progress(f"decoding at {side} px")) for side in plan.sides
    }
    masks = {}
    if plan.spec.task == SEGMENT:
        masks = {
            side: mask_array(plan.manifest, side, cache_dir, progress(f"reading lung masks at {side} px"))
            for side in plan.sides
        }
    return plan.trial_data(
        pixels,
        {key: kept_weights(file.path, cache_dir) for key, file in plan.weights.items()},
        masks=masks,
        masked=masked_arrays(plan, pixels, cache_dir, progress),
    )


def _opening(task: str, *, tests: bool) -> str:
    """What the final evaluation is about to do."""
    if task == SEGMENT:
        return (
            "opening the test set, once, for the final U-Net"
            if tests
            else "no test part: the best U-Net is evaluated on the images it was chosen by"
        )
    return (
        "opening the test set, once, for the final models of each strategy"
        if tests
        else "no test part: the best trial of each strategy is evaluated on the images it was chosen by"
    )


def _conductor(
    plan: Plan,
    folder: RunFolder,
    data: TrialData,
    listeners: tuple[Listener, ...],
    progress: SweepProgress,
    sessions: Sessions,
) -> Conductor:
    spec = plan.spec
    work = Work(
        data,
        spec.objective,
        folder.state / "trials",
        plan.allotment.threads,
        **SEGMENTING if spec.task == SEGMENT else {},
    )
    halving = None
    if plan.halving.rungs and spec.search.halving:
        halving = Halving(
            plan.halving.rungs,
            spec.search.halving.reduction_factor,
            spec.objective.mode,
            least_survivors=spec.search.halving.least_survivors,
            journal=folder.halving,
        )
    stages = sessions.stages(spec.search.trials)
    search = Search(spec, folder.study, order=plan.order, stages=stages, resumed=bool(sessions.past))
    return Conductor(
        work,
        search,
        halving,
        plan.parameters,
        listeners,
        head_parameters=plan.head_parameters,
        max_failures=spec.resources.max_failures,
        retried=progress.retried,
    )


def _run_trials(
    conductor: FinalTrainings, plan: Plan, folder: RunFolder, *, inline: bool, address: str, progress: SweepProgress
) -> None:
    allotment = plan.allotment
    if inline:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its chatter would run into ours
        if not allotment.gpus_per_trial:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        with progress.shown():
            run_inline(conductor)
        return
    from sweep import trials

    with trials.ray_cluster(address, cores=plan.machine.cores, gpus=plan.machine.gpus), progress.shown():
        cores = 0 if address else plan.machine.cores
        placement = trials.Placement(allotment.cpus_per_trial, allotment.gpus_per_trial, allotment.concurrency, cores)
        trials.run_on_ray(conductor, placement, folder=folder.state)


def _publish(plan: Plan, folder: RunFolder, summary: dict[str, Any], tracker: Tracker, end: SessionEnd) -> None:
    if tracker.parent_run_id:
        summary["mlflow_run_id"] = tracker.parent_run_id
    write_json(folder.summary, summary)
    note_champion(folder, summary)
    write_report(folder)
    overlays = sorted(folder.overlays.glob("*.png"))
    files = (folder.summary, folder.report, folder.trials, folder.predictions, folder.masks, folder.audit, *overlays)
    tracker.finished(summary, [path for path in files if path.is_file()], STATUS[end])
