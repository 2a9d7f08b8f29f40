"""What a meter reads is passed on to Ray: of gauges the value, of counters what is new; and nothing comes back."""

import time

import pytest

from cxr_models.trial import Objective, Outcome, TrialConfig, TrialResult
from sweep.metering import Meter
from sweep.nodes import SlotFigures
from sweep.record import Past

pytest.importorskip("ray")

from sweep import ray_metrics
from sweep.ray_metrics import exported


class Instrument:
    """In place of Ray's counters and gauges."""

    made: dict[str, "Instrument"]

    def __init__(self, name: str, meaning: str, tag_keys: tuple[str, ...]) -> None:
        self.tag_keys = tag_keys
        self.told: list[tuple[float, dict[str, str]]] = []
        self.made[name] = self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        if value <= 0:
            raise ValueError(f"value must be >0, got {value}")  # as Ray has it
        self.set(value, tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.told.append((value, tags))


@pytest.fixture
def instruments(monkeypatch) -> dict[str, Instrument]:
    monkeypatch.setattr(Instrument, "made", {}, raising=False)
    for name in ("Counter", "Gauge"):
        monkeypatch.setattr(ray_metrics, name, Instrument)
    monkeypatch.setattr(ray_metrics, "INTERVAL_S", 0.02)
    return Instrument.made


def meter(running) -> Meter:
    return Meter(
        Objective("macro_f1", "max"), Past(), trials=8, running=running, left_s=lambda: 0.0, lacking=lambda epochs: 0
    )


def result(number: int, outcome: Outcome, value: float) -> TrialResult:
    error = "of the test" if outcome is Outcome.FAILED else ""
    return TrialResult(str(number), TrialConfig("vanilla_cnn"), outcome, 1, 1, {"macro_f1": value}, error=error)


def wait_for(what) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_counters_are_told_what_is_new_and_gauges_what_is(instruments):
    running = [3]
    found, problems = meter(lambda: running[0]), []
    with exported(found, "depth", lambda: SlotFigures(8, 3, 2), problems.append):
        for number in range(4):
            outcome = Outcome.FAILED if number == 2 else Outcome.COMPLETED
            found.ended(number, result(number, outcome, 0.5))
            told = instruments["cxr_sweep_trials_total"].told
            wait_for(lambda number=number, told=told: sum(value for value, _ in told) == number + 1)
        running[0] = 0
        found.ended(4, result(4, Outcome.COMPLETED, 0.75))
    by_outcome: dict[str, float] = {}
    for value, tags in instruments["cxr_sweep_trials_total"].told:
        assert tags["sweep"] == "depth"
        by_outcome[tags["outcome"]] = by_outcome.get(tags["outcome"], 0) + value
    assert by_outcome == {"completed": 4, "failed": 1}
    gauge = instruments["cxr_sweep_running_trials"].told
    assert gauge[0] == (3, {"sweep": "depth"})
    assert gauge[-1] == (0, {"sweep": "depth"}), "the last state is told, too"
    assert instruments["cxr_sweep_best_value"].told[-1] == (0.75, {"sweep": "depth", "metric": "macro_f1"})
    assert problems == []


def test_what_goes_wrong_is_told_once_and_stops_nothing(instruments):
    def broken() -> int:
        raise RuntimeError("of the test")

    problems: list[str] = []
    with exported(meter(broken), "depth", lambda: SlotFigures(8, 3, 2), problems.append):
        wait_for(lambda: problems)
        time.sleep(0.1)
    assert problems == ["Prometheus is told nothing more of this sweep: RuntimeError: of the test"]
