"""Where the time of a sweep goes: start-up, trials, features; on the driver's clock."""

from dataclasses import replace

import pytest

from cxr_models.trial import METRICS, PIXELS, EpochMetrics
from sweep import timeline
from sweep.timeline import Timeline

BEGUN_S = 7.0  # the program had run this long when the sweep began


class Sweep:
    """A timeline with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(timeline.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(timeline.time, "time", lambda: 5e8 + self.now)
        monkeypatch.setattr(timeline.psutil.Process, "create_time", lambda process: 5e8 + 1000.0 - BEGUN_S)
        self.timeline = Timeline()

    def epoch(
        self, at: float, *, trial: float, features: float = 0.0, name: str = "t", number: int = 1, source: str = PIXELS
    ) -> None:
        """An epoch heard of `at` seconds from the sweep's begin, `trial` seconds after its trial began."""
        self.now = 1000.0 + at
        values = dict.fromkeys(METRICS, 0.5)
        self.timeline.epoch(
            EpochMetrics(name, number, 0, 0.1, values, values, 1.0, 1.0, "CPU", source, features, trial)
        )


@pytest.fixture
def sweep(monkeypatch) -> Sweep:
    return Sweep(monkeypatch)


def test_without_an_epoch_there_are_no_times(sweep):
    assert sweep.timeline.seconds == {"features": 0.0}


def test_epochs_of_earlier_sessions_count_but_their_times_were_on_another_clock():
    metrics = EpochMetrics("a", 1, 0, 0.1, {}, {}, 1.0, 1.0, source="conv1", features_seconds=3.0)
    timeline = Timeline([metrics, replace(metrics, epoch=2, source="pixels", features_seconds=0.0)])
    assert timeline.seconds == {"features": 3.0}
    assert timeline.epochs_from_features == 1


def test_a_trial_that_began_in_an_earlier_session_began_no_earlier_than_the_program(sweep):
    sweep.epoch(20.0, trial=500.0)
    assert sweep.timeline.seconds == pytest.approx({"startup": 0.0, "features": 0.0, "trials": BEGUN_S + 20.0})


def test_the_start_counts_from_the_program_to_the_first_trial_in_a_worker(sweep):
    sweep.epoch(20.0, trial=5.0)
    assert sweep.timeline.seconds == pytest.approx({"startup": BEGUN_S + 15.0, "features": 0.0, "trials": 5.0})


def test_the_trials_last_from_the_first_one_begun_to_the_last_epoch(sweep):
    sweep.epoch(20.0, trial=5.0, name="short")
    sweep.epoch(22.0, trial=12.0, name="long")  # heard of later, begun before
    sweep.epoch(30.0, trial=1.0, name="next")
    sweep.now += 100.0  # the test set, the report
    assert sweep.timeline.seconds == pytest.approx({"startup": BEGUN_S + 10.0, "features": 0.0, "trials": 20.0})


def test_what_workers_spent_on_features_is_summed(sweep):
    sweep.epoch(20.0, trial=5.0, features=3.0, name="a")
    sweep.epoch(20.0, trial=5.0, features=2.5, name="b")
    sweep.epoch(21.0, trial=6.0, name="a", number=2)
    assert sweep.timeline.seconds["features"] == pytest.approx(5.5)


def test_epochs_that_ran_frozen_layers_are_told_from_those_that_were_spared(sweep):
    for source in ("pixels", "block_15_add", "pixels: the cache may take 1 MB", "out_relu-average"):
        sweep.epoch(20.0, trial=5.0, source=source)
    assert sweep.timeline.epochs_from_features == 2


def test_the_program_began_before_the_sweep():
    measured = Timeline()
    values = dict.fromkeys(METRICS, 0.5)
    measured.epoch(EpochMetrics("t", 1, 0, 0.1, values, values, 1.0, 1.0))
    assert measured.seconds["startup"] > 0.05, "this process has been up for longer"
