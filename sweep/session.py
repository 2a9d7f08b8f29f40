"""One session of a sweep, from its plan, or from what an earlier session left, to its report."""

import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.text import Text

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
from sweep.metering import Meter
from sweep.nodes import Slots
from sweep.plan import Plan
from sweep.progress import EvaluationProgress, StepProgress, SweepProgress
from sweep.record import Record, RunFolder, ranked, read_epochs, read_lines, write_json
from sweep.remote import is_url
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
from sweep.wording import count
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
    keep_earlier(folder, sessions)
    write_inputs(plan, folder)
    begin_session(folder, plan, data)
    patients = np.array([record.patient for record in plan.manifest.records])
    write_samples(folder.samples, take_samples(data, patients, plan.spec.space))
    session = _Session(plan, folder, data, cache_dir, console, sessions)
    end, failure = session.run(inline=inline, address=address)
    summary: dict[str, Any] = {}
    patience_s = TRACKING_TIMEOUT_OF_INTERRUPTED_S if end is SessionEnd.INTERRUPTED else TRACKING_TIMEOUT_S
    try:
        with deferred(), told_of_space(folder.summary):
            summary = session.write_down(end)
            end_session(folder, end)
    except KeyboardInterrupt:  # all is written down; MLflow need not be waited for
        patience_s = TRACKING_TIMEOUT_OF_INTERRUPTED_S
    except NoSpace as error:
        failure, end = failure or str(error), SessionEnd.FAILED
    tracker = session.tracker
    try:
        tracker.close(patience_s)
    except KeyboardInterrupt:
        tracker.close(0.0)
    interrupted = end is SessionEnd.INTERRUPTED
    told = tracker.problem, tracker.ui_command, tracker.ui_address
    return Ended(summary, session.record.results, interrupted, failure, *told)


class _Session:
    """The parts of one session, wired together.

    Attributes:
        record: the truth.
        tracker: MLflow.
    """

    def __init__(
        self, plan: Plan, folder: RunFolder, data: TrialData, cache_dir: Path, console: Console, sessions: Sessions
    ) -> None:
        self._plan, self._folder, self._data, self._console = plan, folder, data, console
        self._cache_dir = cache_dir
        self._goes_on = bool(sessions.past)
        self._watch = Stopwatch()
        self.record = Record(folder, plan.spec.objective)
        self.tracker = open_tracker(plan, folder, told=self._note)
        self._progress = SweepProgress(
            console,
            plan.spec.objective,
            trials=plan.trials,
            max_epochs=plan.max_epochs,
            gpus_per_trial=plan.allotment.gpus_per_trial,
            features=plan.cache.budget.folder if plan.cache.budget else None,
        )
        self._timeline = Timeline(metrics for epochs in self.record.past.epochs.values() for metrics in epochs)
        self._meter = Meter(
            plan.spec.objective,
            self.record.past,
            trials=plan.trials,
            running=lambda: self._conductor.training,
            left_s=self._progress.seconds_left,
            lacking=self.tracker.lacking,
        )
        listeners = (self.record, self.tracker, self._progress, self._timeline, self._meter)
        self._conductor = _conductor(plan, folder, data, listeners, self._progress, sessions)
        tests = bool(len(plan.indices(TEST)))
        self._trainings = FinalTrainings(
            self._conductor,
            plan.spec.objective,
            seeds=plan.spec.final.seeds if tests else 1,
            strategies=None if tests else 1,
            results=lambda: self.record.results,
            epochs=lambda: read_epochs(folder.epoch_record),
            told=self._progress.trained_again,
            retried=self._progress.retried,
            journal=folder.final_record,
        )
        self._evaluation = FinalEvaluation(plan, folder, cache_dir)

    def run(self, *, inline: bool, address: str) -> tuple[SessionEnd, str]:
        """Run what is left of the search, and the final evaluation; how it ended, and why it failed if it did."""
        try:
            with told_of_space(self._folder.summary):
                if self._goes_on:
                    self._take_up()
                self._search(inline=inline, address=address)
                if ranked(self.record.results, self._plan.spec.objective):
                    self._console.print(_opening(self._plan, self._folder))
                    with self._watch.time("evaluate"):
                        self._evaluate()
        except KeyboardInterrupt:
            return SessionEnd.INTERRUPTED, ""
        except (SweepFailed, NoSpace) as error:
            return SessionEnd.FAILED, str(error)
        except Exception:
            return SessionEnd.FAILED, traceback.format_exc()
        return SessionEnd.DONE, ""

    def write_down(self, end: SessionEnd) -> dict[str, Any]:
        """Write what there is into the run folder, and hand it to MLflow; the summary."""
        self._conductor.close()
        self.record.close()
        summary = summarise(
            self._plan,
            self.record.results,
            seconds={
                **self._watch.seconds,
                **self._timeline.seconds,
                "train": sum(result.train_seconds for result in self.record.results),
            },
            epochs_run=self._conductor.epochs_run,
            epochs_from_features=self._timeline.epochs_from_features,
            interrupted=end is not SessionEnd.DONE,
            curves=read_epochs(self._folder.epoch_record),
            evaluation=self._evaluation,
        )
        _publish(self._folder, summary, self.tracker, end)
        return summary

    def _note(self, line: str) -> None:
        self._console.print(Text(f"note: {line}", style="yellow"), soft_wrap=True)

    def _take_up(self) -> None:
        self._progress.taken_up(self.record.past)
        if not self._conductor.resume(self.record.past):
            self._console.print(
                "note: this version of Optuna would have suggested other trials; those of the record are kept, and "
                "what comes after them may differ from an uninterrupted sweep"
            )

    def _search(self, *, inline: bool, address: str) -> None:
        if not inline:
            self._console.print(f"connecting to Ray at {address}" if address else "starting Ray and its workers")
        with self._watch.time("search"):
            _run_trials(
                self._trainings,
                self._plan,
                self._folder,
                inline=inline,
                address=address,
                progress=self._progress,
                cache_dir=self._cache_dir,
                told=self._note,
                meter=self._meter,
            )

    def _evaluate(self) -> None:
        """The final evaluation of either task, and its verdict."""
        plan, folder, found = self._plan, self._folder, self._evaluation
        given = plan, self.record.results, self._trainings, folder, self._data, self.tracker
        if plan.spec.task == SEGMENT:
            evaluate_segmentation(*given, found)
            found.verdict = judge_segmentation(plan, self.record.results, folder, found)
        else:
            evaluate_finalists(*given, EvaluationProgress(self._console), found)
            found.verdict = judge(plan, self.record.results, folder, found)


def keep_earlier(folder: RunFolder, sessions: Sessions) -> None:
    """Keep the summary and the report of a sweep that came to its end and now grows, until it does so again."""
    if sessions.past and sessions.past[-1].end is SessionEnd.DONE:
        kept = folder.earlier(sessions.past[-1].trials)
        results = (folder.summary, folder.report, folder.trials, folder.predictions, folder.masks)
        for path in (*results, folder.model, folder.best_config):
            if path.is_file():
                with written_whole(kept / path.relative_to(folder.path)) as scratch:
                    shutil.copyfile(path, scratch)


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


def open_tracker(plan: Plan, folder: RunFolder, *, told: Callable[[str], None]) -> Tracker:
    """Begin the tracking of a sweep in MLflow, which may tell of an outage."""
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
            source=spec.data.name if any(is_url(each.source) for each in spec.data.all_sources) else str(manifest.root),
            images=len(manifest.records),
            patients=manifest.patients,
            classes=plan.class_counts(),
        ),
        inputs={**input_tags(plan.lung_masks), **audit_tags(plan.audit)},
        told=told,
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


def _opening(plan: Plan, folder: RunFolder) -> str:
    """What the final evaluation is about to do."""
    segments = plan.spec.task == SEGMENT
    if not len(plan.indices(TEST)):
        best = "the best U-Net" if segments else "the best trial of each strategy"
        return f"no test part: {best} is evaluated on the images it was chosen by"
    before = sum(1 for _ in read_lines(folder.test_openings))
    times = f"again ({count(before, 'time')} before)" if before else "once"
    return f"opening the test set, {times}, for the final {'U-Net' if segments else 'models of each strategy'}"


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
    conductor: FinalTrainings,
    plan: Plan,
    folder: RunFolder,
    *,
    inline: bool,
    address: str,
    progress: SweepProgress,
    cache_dir: Path,
    told: Callable[[str], None],
    meter: Meter,
) -> None:
    allotment = plan.allotment
    if inline:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its chatter would run into ours
        if not allotment.gpus_per_trial:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        with progress.shown():
            run_inline(conductor)
        return
    from sweep import ray_cluster, ray_metrics, trials

    connected = ray_cluster.ray_cluster(address, cores=plan.machine.cores, gpus=plan.machine.gpus)
    with connected, progress.shown(), ExitStack() as told_meanwhile:
        cores, cluster = plan.machine.cores, None
        if address:
            slots = Slots.of_nodes(allotment, ray_cluster.cluster_nodes, plan.prefix, told)
            most = plan.trials if allotment.most is None else min(plan.trials, allotment.most)
            cores, cluster = 0, trials.Cluster(slots, cache_dir, told, most)
            told_meanwhile.enter_context(ray_metrics.exported(meter, plan.spec.name, lambda: slots.figures, told))
        placement = trials.Placement(allotment.cpus_per_trial, allotment.gpus_per_trial, allotment.concurrency, cores)
        trials.run_on_ray(conductor, placement, folder=folder.state, cluster=cluster)


def _publish(folder: RunFolder, summary: dict[str, Any], tracker: Tracker, end: SessionEnd) -> None:
    if tracker.parent_run_id:
        summary["mlflow_run_id"] = tracker.parent_run_id
    write_json(folder.summary, summary)
    note_champion(folder, summary)
    write_report(folder)
    overlays = sorted(folder.overlays.glob("*.png"))
    files = (folder.summary, folder.report, folder.trials, folder.predictions, folder.masks, folder.audit, *overlays)
    tracker.finished(summary, [path for path in files if path.is_file()], STATUS[end])
