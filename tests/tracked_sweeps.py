"""Sweeps without training, tracked in MLflow, and what MLflow must then have of them."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cxr_models.trial import METRICS, EpochMetrics, Objective, Outcome, Suggestion, TrialConfig, TrialResult
from sweep.readback import read_epochs
from sweep.record import Record, RunFolder, read_lines
from sweep.tracked import MetricNames
from sweep.tracking import DatasetInfo, Tracker

CLASSES = ("COVID-like", "Normal")
OBJECTIVE = Objective("macro_f1", "max")
SPEC = """\
name: small
data: {source: phantom, seed: 0}
objective: macro_f1
search: {algorithm: random, trials: 3}
space: {backbone: vanilla_cnn, weights: none, freeze: none, learning_rate: {low: 0.0001, high: 0.01, log: true}}
"""
DATASET = DatasetInfo("phantom", "0123456789abcdef" * 4, "phantom", 10, 5, {"train": Counter(Normal=5, other=5)})
FINAL = {"val": {"accuracy": 0.75}, "test": {"accuracy": 0.5, "loss": 0.625}}
SUMMARY = {
    "trials": {"total": 3},
    "best": {"trial_id": "t0", "val": {"macro_f1": 0.5}, "doctor": []},
    "test": {"macro_f1": {"value": 0.75, "low": 0.5, "high": 1.0}},
}
Rows = list[tuple[str, float, int, int]]  # metric, value, time (ms), step


def run_folder(path: Path, uri: str = "") -> RunFolder:
    folder = RunFolder.create(path, "small", exactly=True)
    folder.spec.write_text(SPEC + (f"tracking: {{uri: '{uri}'}}\n" if uri else ""))
    folder.split.write_text("path,label,patient,split\n")
    return folder


def suggestion(number: int) -> Suggestion:
    return Suggestion(number, f"t{number}", TrialConfig("vanilla_cnn", freeze="none", seed=number))


class TrackedSweep:
    """A tracker with its record, as a sweep has them; a second one on the same folder resumes the sweep.

    Attributes:
        slowest: seconds of the longest call of the tracker.
        told: what a person saw of outages.
    """

    def __init__(self, folder: RunFolder, uri: str = "") -> None:
        self.folder = folder
        self.slowest = 0.0
        self.told: list[str] = []
        self._record = Record(folder, OBJECTIVE)
        self.tracker = self._timed(self._open, uri)

    def _open(self, uri: str) -> Tracker:
        tracker = Tracker(
            self.folder,
            "small",
            uri=uri,
            objective=OBJECTIVE,
            classes=CLASSES,
            dataset=DATASET,
            told=self.told.append,
        )
        tracker.opened()
        return tracker

    def start(self, number: int) -> None:
        self._record.started(suggestion(number))
        self._timed(self.tracker.started, suggestion(number))

    def epochs(self, number: int, which: Iterable[int], pause_s: float = 0.0) -> None:
        for epoch in which:
            figures = {**dict.fromkeys(METRICS, 1 / (number + epoch + 1)), "recall/Normal": 0.5}
            now = int(time.time() * 1000)
            metrics = EpochMetrics(f"t{number}", epoch, 0, 1e-3, figures, figures, 0.1, 10.0, ended_ms=now)
            self._record.epoch(metrics)
            self._timed(self.tracker.epoch, metrics)
            time.sleep(pause_s)

    def end(self, number: int, epochs: int) -> None:
        val = dict.fromkeys(METRICS, 1 / (number + 2))
        result = TrialResult(f"t{number}", suggestion(number).config, Outcome.COMPLETED, epochs, 1, val)
        result = TrialResult.from_json({**result.to_json(), "ended_ms": int(time.time() * 1000)})
        self._record.ended(number, result)
        self._timed(self.tracker.ended, number, result)

    def trial(self, number: int, epochs: int, pause_s: float = 0.0) -> None:
        self.start(number)
        self.epochs(number, range(1, epochs + 1), pause_s)
        self.end(number, epochs)

    def finish(self) -> None:
        self._timed(self.tracker.test_opened, 1, "today")
        self._timed(self.tracker.evaluated, "t0", FINAL)
        self._timed(self.tracker.finished, SUMMARY, [self.folder.trials])

    def _timed(self, call, *arguments):
        begun = time.perf_counter()
        found = call(*arguments)
        self.slowest = max(self.slowest, time.perf_counter() - begun)
        return found


@dataclass(frozen=True)
class Shown:
    """What MLflow has of a sweep, read from its database.

    Attributes:
        runs: trial -> its runs, "" -> the sweep's own.
        rows: trial -> every row of every metric's history.
    """

    runs: Mapping[str, list]
    rows: Mapping[str, Rows]

    @property
    def statuses(self) -> dict[str, str]:
        return {trial_id: run.info.status for trial_id, (run,) in self.runs.items()}


def shown(database: str, folder: RunFolder) -> Shown:
    import mlflow

    client = mlflow.MlflowClient(database)
    (sweep_id,) = (entry["sweep_id"] for entry in read_lines(folder.state / "tracking.jsonl") if "sweep_id" in entry)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.sweep_id = '{sweep_id}'", max_results=1000)
    runs, rows = {}, {}
    for run in found:
        trial_id = run.data.tags.get("trial_id", "")
        runs.setdefault(trial_id, []).append(run)
        for name in run.data.metrics:
            for each in client.get_metric_history(run.info.run_id, name):
                rows.setdefault(trial_id, []).append((each.key, each.value, each.timestamp, each.step))
    return Shown(runs, rows)


def check_exactly_once(database: str, folder: RunFolder, *, finished: bool = True) -> Shown:
    """Everything the record has is in MLflow, once, and nothing else."""
    names, found = MetricNames(CLASSES), shown(database, folder)
    begun = {entry["trial_id"] for entry in read_lines(folder.suggestion_record)}
    assert {trial_id: len(runs) for trial_id, runs in found.runs.items()} == dict.fromkeys(begun | {""}, 1)
    expected: dict[str, Rows] = {trial_id: [] for trial_id in begun}
    for trial_id, epochs in read_epochs(folder.epoch_record).items():
        for each in epochs:
            expected[trial_id] += [
                (key, value, each.ended_ms, each.epoch) for key, value in names.of_epoch(each).items()
            ]
    for entry in read_lines(folder.trial_record):
        result = TrialResult.from_json({key: value for key, value in entry.items() if key != "number"})
        for key, value in names.of_result(result).items():
            expected[result.trial_id].append((key, float(value), result.ended_ms, 0))
    rows = {trial_id: sorted(found.rows.get(trial_id, [])) for trial_id in begun}
    final = names.of_evaluation(FINAL) if finished else {}
    if "t0" in rows:
        told = [row for row in rows["t0"] if row[0].startswith("final_")]
        assert {row[0]: row[1] for row in told} == final
        assert len(told) == len(final)
        rows["t0"] = [row for row in rows["t0"] if row not in told]
    assert rows == {trial_id: sorted(each) for trial_id, each in expected.items()}
    for trial_id in begun:
        (run,) = found.runs[trial_id]
        assert run.data.params["seed"] == trial_id.removeprefix("t")
    (parent,) = found.runs[""]
    if finished:
        figures = names.of_summary(SUMMARY)
        assert sorted((row[0], row[1]) for row in found.rows[""]) == sorted(figures.items())
        assert parent.data.tags["test_opening_1"] == "today"
        assert set(found.statuses.values()) == {"FINISHED"}
    return found
