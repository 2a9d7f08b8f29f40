import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cxr_models.trial import METRICS, Diagnosis, EpochMetrics, Objective, Outcome, TrialConfig, TrialResult
from sweep import backlog, tracking
from sweep.mlflow_runs import MlflowRuns
from sweep.record import Record, RunFolder
from sweep.tracked import MetricNames, flat_params, matrix_page
from sweep.tracking import DatasetInfo, Tracker

mlflow = pytest.importorskip("mlflow")

CLASSES = ("COVID-like", "Focal opacity", "Normal")
OBJECTIVE = Objective("macro_f1", "max")
SPEC = """\
name: small
data: {source: phantom, seed: 0}
search: {algorithm: random, trials: 3, halving: {grace_epochs: 1}}
space:
  backbone: mobilenet_v2_0.35
  learning_rate: {low: 0.0001, high: 0.01, log: true}
"""
DATASET = DatasetInfo(
    name="phantom",
    digest="0123456789abcdef" * 4,
    source="phantom",
    images=600,
    patients=300,
    classes={
        "train": {"Normal": 240, "COVID-like": 180},
        "val": {"Normal": 50, "COVID-like": 40},
        "test": {"Normal": 90},
    },
)
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Suggested:
    number: int
    trial_id: str
    config: TrialConfig


def suggested(number: int) -> Suggested:
    config = TrialConfig("mobilenet_v2_0.35", freeze="convs:1", learning_rate=3e-3, hidden_units=(64, 32), seed=number)
    return Suggested(number, config.digest, config)


def epoch(trial: Suggested, number: int, value: float) -> EpochMetrics:
    figures = {**dict.fromkeys(METRICS, value), **{f"recall/{name}": value for name in CLASSES}}
    return EpochMetrics(trial.trial_id, number, 0, 3e-3, {**figures, "loss": value / 2}, figures, 2.5, 300.0)


def result(trial: Suggested, outcome: Outcome, values: list[float], error: str = "") -> TrialResult:
    best = int(np.argmax(values)) + 1 if values else 0
    return TrialResult(
        trial.trial_id,
        trial.config,
        outcome,
        epochs=len(values),
        best_epoch=best,
        val=epoch(trial, best, values[best - 1]).val if values else {},
        trainable_parameters=1200,
        frozen_parameters=410_000,
        train_seconds=7.5,
        device="CPU",
        error=error,
        traceback=f"Traceback (most recent call last):\n{error}\n" if error else "",
    )


def run_folder(path: Path) -> RunFolder:
    folder = RunFolder.create(path, "small sweep", exactly=True)
    folder.spec.write_text(SPEC)
    folder.split.write_text("path,label,patient,split\n")
    return folder


class RecordedTracker(Tracker):
    """With the record, which hears of everything first."""

    def __init__(self, folder: RunFolder, *arguments, **options) -> None:
        super().__init__(folder, *arguments, **options)
        self._record = Record(folder, OBJECTIVE)

    def started(self, trial: Suggested) -> None:
        self._record.started(trial)
        super().started(trial)

    def epoch(self, metrics: EpochMetrics) -> None:
        self._record.epoch(metrics)
        super().epoch(metrics)

    def ended(self, number: int, result: TrialResult) -> None:
        self._record.ended(number, result)
        super().ended(number, result)


def tracker(folder: RunFolder, **options) -> Tracker:
    return RecordedTracker(folder, "small", objective=OBJECTIVE, classes=CLASSES, dataset=DATASET, **options)


def run_trial(target: Tracker, folder: RunFolder, trial: Suggested, values: list[float]) -> None:
    target.started(trial)
    for number, value in enumerate(values, start=1):
        target.epoch(epoch(trial, number, value))
    if values:
        labels = np.array([0, 0, 1, 1, 2, 2])
        scores = np.log(np.eye(3)[[0, 1, 1, 1, 2, 2]] * 0.9 + 0.1 / 3)
        folder.trial(trial.trial_id).mkdir(parents=True)
        np.savez(folder.trial(trial.trial_id) / "validation.npz", index=np.arange(6), labels=labels, scores=scores)


@dataclass(frozen=True)
class Tracked:
    """A sweep of three trials in MLflow, read back."""

    folder: RunFolder
    tracker: Tracker
    client: "mlflow.MlflowClient"
    parent: "mlflow.entities.Run"
    children: "dict[str, mlflow.entities.Run]"

    def artifact(self, run_id: str, name: str) -> Path:
        return Path(self.client.download_artifacts(run_id, name))

    def artifacts(self, run_id: str) -> set[str]:
        return {file.path for file in self.client.list_artifacts(run_id)}


def read_back(folder: RunFolder, target: Tracker) -> Tracked:
    client = mlflow.MlflowClient(target.uri)
    parent = client.get_run(target.parent_run_id)
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{target.parent_run_id}'", max_results=100
    )
    return Tracked(folder, target, client, parent, {run.data.tags["trial_id"]: run for run in found})


FOUND = (Diagnosis("loss_at_chance", True, "a", "b"), Diagnosis("best_epoch_first", False, "c", "d"))
SUMMARY = {
    "trials": {"total": 3, "completed": 1, "stopped_early": 1, "failed": 1},
    "best": {
        "trial_id": suggested(0).trial_id,
        "config": {},
        "val": {"macro_f1": 0.8, "recall/Normal": 0.9},
        "doctor": [asdict(diagnosis) for diagnosis in FOUND],
    },
    "test": {
        "macro_f1": {"value": 0.75, "low": 0.7, "high": 0.8},
        "recall/Normal": {"value": 0.9, "low": None, "high": None},
        "mcc": {"value": 1.0, "low": float("nan"), "high": float("nan")},  # as it is before it becomes JSON
        "precision/Normal": {"value": 0.9, "low": 0.8, "high": 1.0},
        "confusion_matrix": [[8, 1, 1], [0, 5, 5], [0, 0, 10]],
        "classes": list(CLASSES),
    },
    "verdict": {"sentence": "`all` is the only strategy that was tried: there is nothing to compare it with."},
}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Tracked:
    folder = run_folder(tmp_path_factory.mktemp("runs"))
    target = tracker(folder)
    target.opened()
    completed, stopped, failed = (suggested(number) for number in range(3))
    run_trial(target, folder, completed, [0.5, 0.8, 0.7])
    target.ended(0, replace(result(completed, Outcome.COMPLETED, [0.5, 0.8, 0.7]), doctor=FOUND))
    run_trial(target, folder, stopped, [0.4])
    target.ended(1, result(stopped, Outcome.STOPPED_EARLY, [0.4]))
    run_trial(target, folder, failed, [])
    target.ended(2, result(failed, Outcome.FAILED, [], error="ResourceExhaustedError: out of memory"))
    target.evaluated(completed.trial_id, {"train": {"accuracy": 0.9}, "test": {"accuracy": 0.7, "loss": 0.6}})
    folder.summary.write_text(json.dumps(SUMMARY))
    target.finished(SUMMARY, [folder.summary])
    target.close(DEADLINE_S)
    assert target.problem == ""
    return read_back(folder, target)


def test_the_sweep_is_a_run_named_as_its_folder_with_the_spec_and_the_split(tracked):
    assert tracked.parent.info.run_name == "small sweep"
    assert tracked.parent.info.status == "FINISHED"
    assert tracked.parent.data.params["search.trials"] == "3"
    assert json.loads(tracked.parent.data.params["space.learning_rate"]) == {"low": 0.0001, "high": 0.01, "log": True}
    assert tracked.parent.data.tags["sweep"] == "small"
    assert tracked.artifact(tracked.parent.info.run_id, "spec.yaml").read_text() == SPEC
    assert tracked.artifact(tracked.parent.info.run_id, "split.csv").is_file()


def test_the_data_set_is_an_input_of_the_sweep_with_its_digest(tracked):
    (given,) = tracked.parent.inputs.dataset_inputs
    assert given.dataset.name == "phantom"
    assert given.dataset.digest == DATASET.digest[:36]
    assert json.loads(given.dataset.profile)["classes"]["train"] == {"Normal": 240, "COVID-like": 180}
    assert {tag.key: tag.value for tag in given.tags} == {"mlflow.data.context": "training"}


def test_every_trial_is_a_child_with_its_axes_and_how_it_ended(tracked):
    statuses = {run.data.tags["outcome"]: run.info.status for run in tracked.children.values()}
    assert statuses == {"completed": "FINISHED", "stopped_early": "FINISHED", "failed": "FAILED"}
    for number in range(3):
        trial = suggested(number)
        run = tracked.children[trial.trial_id]
        assert run.info.run_name == f"mobilenet_v2_0.35 convs:1 lr 3e-03 · {trial.trial_id}"
        assert run.data.params["hidden_units"] == "[64, 32]"
        assert set(run.data.params) == set(trial.config.to_json())
        assert run.data.tags["strategy"] == "convs:1"
        assert run.data.tags["backbone"] == "mobilenet_v2_0.35"
        assert run.data.tags["device"] == "CPU"


def test_epochs_are_steps(tracked):
    run = tracked.children[suggested(0).trial_id]

    def history(name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in tracked.client.get_metric_history(run.info.run_id, name)]

    assert history("val_macro_f1") == [(1, 0.5), (2, 0.8), (3, 0.7)]
    assert history("train_loss") == [(1, 0.25), (2, 0.4), (3, 0.35)]
    assert history("val_recall/Focal opacity") == history("val_macro_f1")
    assert history("epoch_seconds") == [(1, 2.5), (2, 2.5), (3, 2.5)]
    assert {"learning_rate", "images_per_second"} <= set(run.data.metrics)
    assert not [name for name in run.data.metrics if name.startswith("train_recall")]


def test_a_trial_ends_with_its_best_epoch_confusion_matrix_and_report(tracked):
    run = tracked.children[suggested(0).trial_id]
    assert run.data.metrics["best_val_macro_f1"] == 0.8
    assert run.data.metrics["best_epoch"] == 2
    assert run.data.metrics["trainable_parameters"] == 1200
    assert run.data.metrics["frozen_parameters"] == 410_000
    reports = {"classification_report.json", "classification_report.txt"}
    assert tracked.artifacts(run.info.run_id) == reports | {"confusion_matrix.html"}
    page = tracked.artifact(run.info.run_id, "confusion_matrix.html").read_text()
    assert cells(page) == [
        ["1 50.0 %", "1 50.0 %", "0 0.0 %"],
        ["0 0.0 %", "2 100.0 %", "0 0.0 %"],
        ["0 0.0 %", "0 0.0 %", "2 100.0 %"],
    ]
    report = json.loads(tracked.artifact(run.info.run_id, "classification_report.json").read_text())
    assert report["COVID-like"]["recall"] == 0.5
    assert report["accuracy"] == pytest.approx(5 / 6)
    text = tracked.artifact(run.info.run_id, "classification_report.txt").read_text()
    assert re.search(r"COVID-like +1\.000 +0\.500 +0\.667 +2\n", text)


def cells(page: str) -> list[list[str]]:
    """The cells of a table without its headings, as a reader sees them."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, flags=re.DOTALL)[1:]
    found = [re.findall(r"<td.*?>(.*?)</td>", row) for row in rows]
    return [[re.sub(r"<.*?>", " ", cell).strip() for cell in row] for row in found]


def test_a_strategys_best_trial_has_its_final_figures(tracked):
    found = tracked.children[suggested(0).trial_id].data.metrics
    final = {name: value for name, value in found.items() if name.startswith("final_")}
    assert final == {"final_train_accuracy": 0.9, "final_test_accuracy": 0.7, "final_test_loss": 0.6}
    assert tracked.children[suggested(0).trial_id].info.status == "FINISHED"


def test_a_confusion_matrix_shows_names_as_they_are_and_rows_without_images():
    page = matrix_page(np.array([[3.0, 1.0], [0.0, 0.0]]), ["<b>", "Säuglinge"], "a & b")
    assert cells(page) == [["3 75.0 %", "1 25.0 %"], ["0 –", "0 –"]]
    assert "&lt;b&gt; (4)" in page
    assert "a &amp; b" in page
    assert "<b>" not in page


def test_a_failed_trial_keeps_its_traceback(tracked):
    run = tracked.children[suggested(2).trial_id]
    assert tracked.artifacts(run.info.run_id) == {"error.txt"}
    assert "Traceback" in tracked.artifact(run.info.run_id, "error.txt").read_text()
    assert run.data.tags["error"] == "ResourceExhaustedError: out of memory"
    assert "best_epoch" not in run.data.metrics


def test_what_the_doctor_found_is_a_tag_of_the_trial_and_of_the_sweep_whose_best_it_is(tracked):
    tags = {trial_id: run.data.tags.get("doctor") for trial_id, run in tracked.children.items()}
    assert tags.pop(suggested(0).trial_id) == "loss_at_chance;best_epoch_first"
    assert set(tags.values()) == {None}
    assert tracked.parent.data.tags["best_doctor"] == "loss_at_chance;best_epoch_first"


def test_the_sweep_ends_with_test_figures_and_their_intervals(tracked):
    metrics = tracked.parent.data.metrics
    assert (metrics["test_macro_f1_low"], metrics["test_macro_f1"], metrics["test_macro_f1_high"]) == (0.7, 0.75, 0.8)
    assert metrics["best_val_macro_f1"] == 0.8
    assert metrics["trials_failed"] == 1
    assert metrics["test_recall/Normal"] == 0.9
    assert "test_recall/Normal_low" not in metrics
    assert {name for name in metrics if name.startswith("test_mcc")} == {"test_mcc"}
    assert "test_precision/Normal" not in metrics
    assert tracked.parent.data.tags["verdict"] == SUMMARY["verdict"]["sentence"]
    assert tracked.parent.data.tags["best_trial_id"] == suggested(0).trial_id
    assert {"summary.json", "test_confusion_matrix.html"} <= tracked.artifacts(tracked.parent.info.run_id)


def test_published_figures_are_no_parameters(tmp_path):
    """They may be longer than what MLflow takes as one."""
    folder = run_folder(tmp_path)
    folder.spec.write_text(SPEC + "reference: {source: a report, note: " + "x" * 9000 + "}\n")
    target = tracker(folder)
    target.opened()
    target.close(DEADLINE_S)
    assert target.problem == ""
    assert not any(name.startswith("reference") for name in read_back(folder, target).parent.data.params)


def test_everything_lies_in_the_run_folder(tracked):
    assert tracked.tracker.uri == f"sqlite:///{tracked.folder.tracking_database}"
    assert list(tracked.folder.tracking_artifacts.rglob("confusion_matrix.html"))
    command = shlex.split(tracked.tracker.ui_command)
    assert command == [
        *f"{sys.executable} -m mlflow ui --backend-store-uri".split(),
        tracked.tracker.uri,
        *["--host", "127.0.0.1", "--port", "5000"],
    ]


def test_an_interrupted_sweep_ends_as_killed_with_its_open_trials(tmp_path, tracked):
    folder = run_folder(tmp_path)
    target = tracker(folder, uri=tracked.tracker.uri)
    target.opened()
    run_trial(target, folder, suggested(0), [0.5])
    target.finished({"trials": {"total": 0}, "best": None, "test": None}, [], "KILLED")
    target.close(DEADLINE_S)
    found = read_back(folder, target)
    assert target.problem == ""
    assert found.parent.info.status == "KILLED"
    assert found.parent.info.experiment_id == tracked.parent.info.experiment_id  # one store, one name
    assert found.children[suggested(0).trial_id].info.status == "KILLED"


def test_one_lost_file_is_told_and_does_not_stop_the_rest(tmp_path, tracked):
    folder = run_folder(tmp_path)
    folder.split.unlink()
    target = tracker(folder, uri=tracked.tracker.uri)
    target.opened()
    run_trial(target, folder, suggested(0), [0.5])
    target.ended(0, result(suggested(0), Outcome.COMPLETED, [0.5]))
    target.finished({}, [folder.report])
    target.close(DEADLINE_S)
    assert "split.csv" in target.problem
    assert "the sweep goes on" in target.problem
    found = read_back(folder, target)
    assert found.parent.info.status == "FINISHED"
    assert found.children[suggested(0).trial_id].data.metrics["val_macro_f1"] == 0.5


def test_a_trial_whose_start_was_missed_is_still_shown(tmp_path, tracked):
    folder = run_folder(tmp_path)
    target = tracker(folder, uri=tracked.tracker.uri)
    target.opened()
    target.ended(4, result(suggested(4), Outcome.COMPLETED, [0.5]))
    target.close(DEADLINE_S)
    run = read_back(folder, target).children[suggested(4).trial_id]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["best_val_macro_f1"] == 0.5


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The MLflow calls of every client, by the name of the method."""
    made: list[str] = []

    def counted(name: str):
        method = getattr(mlflow.MlflowClient, name)

        def call(*arguments, **options):
            made.append(name)
            return method(*arguments, **options)

        return call

    for name in ("create_run", "log_batch", "set_terminated", "log_artifacts", "get_run"):
        monkeypatch.setattr(mlflow.MlflowClient, name, counted(name))
    return made


def test_a_short_trial_is_written_in_three_calls_however_many_epochs_it_has(tmp_path, tracked, calls):
    folder = run_folder(tmp_path)
    target = tracker(folder, uri=tracked.tracker.uri)
    target.opened()
    assert target.parent_run_id
    calls.clear()
    values = [number / 20 for number in range(20)]
    for number in range(3):
        run_trial(target, folder, suggested(number), values)
        target.ended(number, result(suggested(number), Outcome.COMPLETED, values))
    target.close(DEADLINE_S)
    assert target.problem == ""
    of_trials = calls[calls.index("create_run") :]  # the sweep's own run may still be described
    assert of_trials == ["create_run", "log_batch", "set_terminated"] * 3
    found = read_back(folder, target)
    for run in found.children.values():
        history = found.client.get_metric_history(run.info.run_id, "val_macro_f1")
        assert [(metric.step, metric.value) for metric in history] == list(enumerate(values, start=1))
        assert run.data.tags["outcome"] == "completed"


def test_the_curves_of_a_running_trial_are_shown_while_it_runs(tmp_path, tracked, monkeypatch):
    monkeypatch.setattr(backlog, "INTERVAL_S", 0.05)
    folder = run_folder(tmp_path)
    target = tracker(folder, uri=tracked.tracker.uri)
    target.opened()
    run_trial(target, folder, suggested(0), [0.5, 0.8])
    shown = await_epochs(folder, target, 2)
    assert shown.info.status == "RUNNING"
    assert shown.data.params["freeze"] == "convs:1"
    target.epoch(epoch(suggested(0), 3, 0.7))
    await_epochs(folder, target, 3)
    target.ended(0, result(suggested(0), Outcome.COMPLETED, [0.5, 0.8, 0.7]))
    target.close(DEADLINE_S)
    assert target.problem == ""
    (run,) = read_back(folder, target).children.values()
    assert (run.info.status, run.data.metrics["best_val_macro_f1"]) == ("FINISHED", 0.8)


def await_epochs(folder: RunFolder, target: Tracker, epochs: int) -> "mlflow.entities.Run":
    """The only trial's run, once MLflow has as many of its epochs."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        found = read_back(folder, target)
        for run in found.children.values():
            if len(found.client.get_metric_history(run.info.run_id, "val_macro_f1")) == epochs:
                return run
        time.sleep(0.05)
    raise AssertionError(f"MLflow did not get {epochs} epochs")


def test_the_writer_rests_while_trials_run_and_catches_up_at_the_end(tmp_path, tracked, monkeypatch, calls):
    monkeypatch.setattr(tracking, "REST", 1e6)
    folder = run_folder(tmp_path)
    target = tracker(folder, uri=tracked.tracker.uri)
    target.opened()
    assert target.parent_run_id
    calls.clear()
    target.started(suggested(9))  # runs all the time
    for number in range(3):
        run_trial(target, folder, suggested(number), [0.5])
        target.ended(number, result(suggested(number), Outcome.COMPLETED, [0.5]))
    time.sleep(0.5)
    assert calls.count("create_run") <= 1
    target.finished({}, [])
    target.close(DEADLINE_S)
    found = read_back(folder, target)
    statuses = {name: run.info.status for name, run in found.children.items()}
    ended = {suggested(number).trial_id: "FINISHED" for number in range(3)}
    assert statuses == {**ended, suggested(9).trial_id: "KILLED"}


def test_two_sweeps_at_once_have_two_stores(tmp_path):
    folders = [run_folder(tmp_path / name) for name in "ab"]
    targets = [tracker(folder) for folder in folders]
    for target in targets:
        target.opened()
    for target, folder, number in zip(targets, folders, (0, 1), strict=True):
        run_trial(target, folder, suggested(number), [0.5])
        target.ended(number, result(suggested(number), Outcome.COMPLETED, [0.5]))
        target.finished({}, [])
    for target, folder, number in zip(targets, folders, (0, 1), strict=True):
        target.close(DEADLINE_S)
        assert target.problem == ""
        assert set(read_back(folder, target).children) == {suggested(number).trial_id}


def test_an_unreachable_server_neither_stops_nor_slows_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.5)
    monkeypatch.setattr(tracking, "OUTAGE_TOLD_AFTER_S", 0.5)
    folder = run_folder(tmp_path)
    told: list[str] = []
    target = tracker(folder, uri="http://127.0.0.1:9", told=told.append)
    slowest = 0.0
    for call in (
        target.opened,
        lambda: run_trial(target, folder, suggested(0), [0.5]),
        lambda: target.ended(0, result(suggested(0), Outcome.COMPLETED, [0.5])),
        lambda: target.finished({}, []),
    ):
        start = time.perf_counter()
        call()
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 0.1
    assert target.parent_run_id == ""
    deadline = time.monotonic() + DEADLINE_S
    while not told and time.monotonic() < deadline:
        time.sleep(0.1)
    target.close(DEADLINE_S)
    assert told == [
        "MLflow at http://127.0.0.1:9: it cannot be reached; training goes on, and what MLflow lacks is "
        "kept until it answers"
    ]
    assert target.problem.startswith("MLflow at http://127.0.0.1:9: it cannot be reached; the sweep goes on")
    assert target.problem.endswith(
        f"; what it lacks is kept, and `{sys.executable} -m sweep.sync '{folder.path}'` sends it"
    )
    assert target.ui_command == "http://127.0.0.1:9"


KILLED_AT_A_STATEMENT = """
import os, signal, sys
from sqlalchemy import Engine, event
from sweep.mlflow_runs import MlflowRuns
left = [int(sys.argv[2])]
@event.listens_for(Engine, "before_cursor_execute")
def before(connection, cursor, statement, *rest):
    left[0] -= "TABLE" in statement
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
MlflowRuns(sys.argv[1], "small", None, "of-this-sweep")
"""


def test_a_store_whose_maker_was_killed_is_made_by_the_next(tmp_path):
    """MLflow's own way leaves tables there which it cannot make a second time: no process could open the store."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_A_STATEMENT, uri, "20"], check=False)
    assert killed.returncode == -signal.SIGKILL
    MlflowRuns(uri, "small", None, "of-this-sweep").create("trial", 0, {})
    assert [path.name for path in tmp_path.glob("*mlflow.db")] == ["mlflow.db"]


def test_closing_does_not_wait_longer_than_told(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and answers nothing
        target = tracker(run_folder(tmp_path), uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        target.opened()
        start = time.perf_counter()
        target.close(0.2)
        assert time.perf_counter() - start < 1.0
    assert "did not take everything within 0.2 s" in target.problem


def test_metric_names_are_in_mlflows_characters_and_stay_different():
    names = MetricNames(["a/b", "a?b", "Lungenentzündung", ".."])
    figures = {"recall/a/b": 0.1, "recall/a?b": 0.2, "recall/Lungenentzündung": 0.3, "recall/..": 0.4}
    metrics = names.of_epoch(replace(epoch(suggested(0), 1, 0.5), train={}, val=figures))
    recalls = {name: value for name, value in metrics.items() if "recall" in name}
    assert recalls == {
        "val_recall/a_b": 0.1,
        "val_recall/a_b_2": 0.2,
        "val_recall/Lungenentzündung": 0.3,
        "val_recall/_": 0.4,
    }


def test_a_spec_becomes_one_parameter_per_key():
    spec = {"name": "x", "search": {"trials": 3, "halving": {"grace_epochs": 1}}, "tracking": {}}
    assert flat_params(spec) == {"name": "x", "search.trials": "3", "search.halving": '{"grace_epochs": 1}'}


def modules_after(code: str) -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in shown.stdout.split()}


def test_importing_waits_for_no_heavy_library():
    assert not {"mlflow", "matplotlib", "tensorflow", "keras", "sklearn"} & modules_after("import sweep.tracking")


CHAMPION = """
    import sys, keras, numpy as np, mlflow
    from sweep.tracking import log_champion, registered_champion

    uri, run_id, out = sys.argv[1:]
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))
    pixels = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 1)).astype("float32")
    where = {"uri": uri, "run_id": run_id, "name": "small"}
    first = log_champion(model, pixels, **where, trial_id="one")
    second = log_champion(model, pixels, **where, trial_id="two")
    again = [registered_champion(**where, trial_id=trial_id) for trial_id in ("three", "one", "two")]
    own = model.predict(pixels, verbose=0)
    served = mlflow.pyfunc.load_model(second)
    signature = served.metadata.signature
    np.savez(
        out,
        own=own,
        pyfunc=served.predict(pixels),
        loaded=mlflow.tensorflow.load_model("models:/small@champion").predict(pixels, verbose=0),
        uris=[first, second],
        again=again,
        input=signature.inputs.inputs[0].shape,
        output=signature.outputs.inputs[0].shape,
    )
"""


NOTED = {
    "best": {"trial_id": "one", "val": {}, "doctor": [{"name": "still_improving"}]},
    "strategies": [
        {"trial_id": "two", "final_doctor": [{"name": "class_never_predicted"}]},
        {"trial_id": "one", "final_doctor": [{"name": "constant_predictor"}, {"name": "still_improving"}]},
    ],
    "audit": [
        {"name": "earlier_model_saw_test", "severity": "leak"},
        {"name": "blank_images", "severity": "warning"},
        {"name": "exact_duplicates", "severity": "note"},
    ],
    "verdict": {"sentence": "`all` is the only strategy."},
}


def test_the_champion_is_registered_and_predicts_as_the_model_does(tmp_path, tracked):
    folder = run_folder(tmp_path)
    target = tracker(folder, uri=tracked.tracker.uri)
    target.opened()
    parent = target.parent_run_id
    out = tmp_path / "found.npz"
    child = [sys.executable, "-c", textwrap.dedent(CHAMPION), target.uri, parent, str(out)]
    done = subprocess.run(child, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(target.uri)
    assert client.get_run(parent).info.status == "RUNNING"  # the sweep ends its run, not the child
    target.finished(NOTED, [])
    target.close(DEADLINE_S)
    assert target.problem == ""
    found = np.load(out)
    assert found["uris"].tolist() == ["models:/small/1", "models:/small/2"]
    assert found["again"].tolist() == ["", "models:/small/1", "models:/small/2"], "of each trial its own"
    np.testing.assert_array_equal(found["pyfunc"], found["own"])
    np.testing.assert_array_equal(found["loaded"], found["own"])
    assert found["input"].tolist() == [-1, 8, 8, 1]
    assert found["output"].tolist() == [-1, 3]
    champion = client.get_model_version_by_alias("small", "champion")
    assert int(champion.version) == 2
    assert champion.run_id == parent
    assert champion.tags == {
        "trial_id": "two",
        "doctor": "still_improving;constant_predictor",
        "audit": "earlier_model_saw_test;blank_images",
        "verdict": "`all` is the only strategy.",
    }
    assert client.get_run(parent).info.status == "FINISHED"
    assert len(client.get_run(parent).outputs.model_outputs) == 2
    assert list(tracked.folder.tracking_artifacts.rglob("model.keras"))
