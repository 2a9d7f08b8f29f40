"""What Prometheus is told of a sweep, from what is heard of it."""

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cxr_models.trial import METRICS as VALIDATED
from cxr_models.trial import EpochMetrics, Objective, Outcome, Suggestion, TrialConfig, TrialResult
from sweep.metering import METRICS, Meter
from sweep.nodes import SlotFigures
from sweep.record import Past
from sweep.runner import run_inline
from tests.sweeps import Heard, fake_sweep

ROOT = Path(__file__).parent.parent
SLOTS = SlotFigures(8, 3, 2)
OF_SLOTS = {("cxr_sweep_slots", ""): 8, ("cxr_sweep_busy_slots", ""): 3, ("cxr_sweep_nodes", ""): 2}
NAMES = {metric.name for metric in METRICS}


def epoch(trial: str, number: int, source: str = "pixels", found: int = 0, missed: int = 0) -> EpochMetrics:
    values = dict.fromkeys(VALIDATED, 0.5)
    made = EpochMetrics(trial, number, 0, 0.1, values, values, 2.0, 1.0, source=source, features_seconds=0.5)
    return replace(made, features_found=found, features_missed=missed)


def result(trial: str, outcome: Outcome, value: float | None) -> TrialResult:
    val = {} if value is None else {"macro_f1": value, "loss": value}
    error = "of the test" if outcome is Outcome.FAILED else ""
    return TrialResult(trial, TrialConfig("vanilla_cnn"), outcome, 1, 1, val, error=error)


def meter(past: Past = Past(), *, metric: str = "macro_f1", mode: str = "max", **kinds) -> Meter:  # noqa: B008 - frozen
    given = {"trials": 6, "running": lambda: 0, "left_s": lambda: 0.0, "lacking": lambda epochs: sum(epochs.values())}
    return Meter(Objective(metric, mode), past, **{**given, **kinds})


def test_before_anything_happened():
    assert meter().readings(SLOTS) == {
        ("cxr_sweep_running_trials", ""): 0,
        ("cxr_sweep_waiting_trials", ""): 6,
        ("cxr_sweep_mlflow_lacking_epochs", ""): 0,
        **OF_SLOTS,
    }


def test_what_is_heard_is_counted():
    found = meter(running=lambda: 2, left_s=lambda: 90.0)
    found.epoch(epoch("a", 1, "out_relu", missed=2))
    found.epoch(epoch("a", 2, "out_relu", found=1))
    found.epoch(epoch("b", 1, "pixels: the cache may take 1 kB"))
    found.ended(0, result("a", Outcome.COMPLETED, 0.5))
    found.ended(1, result("b", Outcome.STOPPED_EARLY, 0.75))
    found.ended(2, result("c", Outcome.FAILED, 0.9))
    found.ended(3, result("d", Outcome.FAILED, None))
    assert found.readings(SLOTS) == {
        ("cxr_sweep_trials_total", "completed"): 1,
        ("cxr_sweep_trials_total", "stopped_early"): 1,
        ("cxr_sweep_trials_total", "failed"): 2,
        ("cxr_sweep_epochs_total", "features"): 2,
        ("cxr_sweep_epochs_total", "pixels"): 1,
        ("cxr_sweep_epoch_seconds_total", ""): 6.0,
        ("cxr_sweep_feature_requests_total", "hit"): 1,
        ("cxr_sweep_feature_requests_total", "miss"): 2,
        ("cxr_sweep_feature_seconds_total", ""): 1.5,
        ("cxr_sweep_running_trials", ""): 2,
        ("cxr_sweep_waiting_trials", ""): 0,
        ("cxr_sweep_best_value", "macro_f1"): 0.75,
        ("cxr_sweep_left_seconds", ""): 90.0,
        ("cxr_sweep_mlflow_lacking_epochs", ""): 3,
        **OF_SLOTS,
    }


def test_of_a_loss_the_lowest_is_the_best():
    found = meter(metric="loss", mode="min")
    for number, value in enumerate((0.5, 0.25, float("nan"), 0.75)):
        found.ended(number, result(str(number), Outcome.COMPLETED, value))
    assert found.readings(SLOTS)["cxr_sweep_best_value", "loss"] == 0.25


def test_earlier_sessions_are_not_counted_again():
    config = TrialConfig("vanilla_cnn")
    begun = [(Suggestion(number, name, config), 0) for number, name in enumerate("ab")]
    past = Past(begun, [(0, result("a", Outcome.COMPLETED, 0.9))], {"a": [epoch("a", 1)], "b": [epoch("b", 1)]})
    found = meter(past)
    found.epoch(epoch("b", 2))
    readings = found.readings(SLOTS)
    assert readings["cxr_sweep_epochs_total", "pixels"] == 1
    assert "cxr_sweep_trials_total" not in {name for name, _ in readings}
    assert readings["cxr_sweep_waiting_trials", ""] == 5
    assert readings["cxr_sweep_best_value", "macro_f1"] == 0.9
    assert readings["cxr_sweep_mlflow_lacking_epochs", ""] == 3


def test_every_reading_is_a_metric_and_every_metric_is_read():
    found = meter(left_s=lambda: 1.0)
    found.epoch(epoch("a", 1, "out_relu", 1, 1))
    found.ended(0, result("a", Outcome.COMPLETED, 0.5))
    assert {name for name, _ in found.readings(SLOTS)} == NAMES
    labelled = {metric.name for metric in METRICS if metric.label}
    assert {name for name, label in found.readings(SLOTS) if label} == labelled


def test_names_follow_the_conventions():
    for metric in METRICS:
        assert metric.name.startswith("cxr_sweep_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert len(NAMES) == len(METRICS)


def test_the_guide_has_each_with_its_label_and_meaning():
    section = (ROOT / "docs" / "CLUSTER.md").read_text().partition("\n## Watching\n")[2]
    for metric in METRICS:
        label = f'{{{metric.label}="' if metric.label else ""
        assert f"`ray_{metric.name}{label}" in section, metric.name
        assert metric.meaning in section, metric.name


class Watched(Heard):
    """Reads a meter at every epoch, from another thread as Ray's exporter does."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = meter(trials=4, running=lambda: self.conductor.training)
        self.readings: list[dict[tuple[str, str], float]] = []

    def epoch(self, metrics: EpochMetrics) -> None:
        super().epoch(metrics)
        self.meter.epoch(metrics)
        thread = threading.Thread(target=lambda: self.readings.append(self.meter.readings(SLOTS)))
        thread.start()
        thread.join()

    def ended(self, number: int, result: TrialResult) -> None:
        super().ended(number, result)
        self.meter.ended(number, result)


@pytest.mark.parametrize("program", ["quick", "raising"])
def test_trials_that_run_and_wait_are_those_of_the_conductor(tmp_path, program):
    heard = Watched()
    heard.conductor, _ = fake_sweep(tmp_path, program, trials=4, epochs=2, heard=heard)
    run_inline(heard.conductor)
    assert {each["cxr_sweep_running_trials", ""] for each in heard.readings} == {1}
    assert sorted({each["cxr_sweep_waiting_trials", ""] for each in heard.readings}) == [0, 1, 2, 3]
    last = heard.meter.readings(SLOTS)
    ended = {label: value for (name, label), value in last.items() if name == "cxr_sweep_trials_total"}
    assert ended == Counter(str(result.outcome) for result in heard.results.values())
    assert (last["cxr_sweep_running_trials", ""], last["cxr_sweep_waiting_trials", ""]) == (0, 0)
