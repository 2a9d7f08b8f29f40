"""What a person sees: every start and end, epochs of long trials, and a time left that start-up does not distort."""

import io
import re

import pytest
from rich.console import Console

from cxr_models.trial import METRICS, EpochMetrics, Objective, Outcome, Suggestion, TrialConfig, TrialResult
from sweep import progress
from sweep.progress import LINE_INTERVAL_S, SweepProgress


class Sweep:
    """A sweep's progress on a console that is no terminal, with a clock of its own."""

    def __init__(self, trials: int, epochs: int) -> None:
        self.now = 0.0
        self.epochs = epochs
        self._file = io.StringIO()
        console = Console(file=self._file, width=200)
        objective = Objective("macro_f1", "max")
        self.told = SweepProgress(console, objective, trials=trials, max_epochs=epochs, gpus_per_trial=0)

    def trial(self, number: int, *, epoch_s: float, value: float = 0.5, outcome: Outcome = Outcome.COMPLETED) -> None:
        config = TrialConfig("vanilla_cnn", epochs=self.epochs, seed=number)
        self.told.started(Suggestion(number, f"t{number}", config))
        values = dict.fromkeys(METRICS, value)
        for epoch in range(1, self.epochs + 1):
            self.now += epoch_s
            self.told.epoch(EpochMetrics(f"t{number}", epoch, 0, 1e-3, values, values, epoch_s, 1.0))
        error = "it broke" if outcome is Outcome.FAILED else ""
        end = TrialResult(f"t{number}", config, outcome, epochs=self.epochs, best_epoch=1, val=values, error=error)
        self.told.ended(number, end)

    @property
    def lines(self) -> list[str]:
        return self._file.getvalue().splitlines()


@pytest.fixture
def sweep(monkeypatch):
    def make(trials: int, epochs: int) -> Sweep:
        made = Sweep(trials, epochs)
        monkeypatch.setattr(progress.time, "monotonic", lambda: made.now)
        return made

    return make


def test_short_trials_have_a_line_at_their_start_and_two_at_their_end(sweep):
    shown = sweep(3, 20)
    for number in range(3):
        shown.trial(number, epoch_s=0.01)
    assert len(shown.lines) == 9
    assert not [line for line in shown.lines if re.search(r"epoch \d+:", line)]


def test_a_long_trial_tells_its_epochs_every_few_seconds(sweep):
    shown = sweep(1, 12)
    shown.trial(0, epoch_s=LINE_INTERVAL_S / 4)
    assert re.findall(r"epoch (\d+):", "\n".join(shown.lines)) == ["4", "8", "12"]


def test_every_epoch_of_slow_ones_is_told(sweep):
    shown = sweep(1, 3)
    shown.trial(0, epoch_s=60.0)
    assert re.findall(r"epoch (\d+):", "\n".join(shown.lines)) == ["1", "2", "3"]


def test_the_time_left_follows_the_pace_of_the_trials_not_of_the_start(sweep):
    shown = sweep(11, 10)
    shown.now = 100.0  # starting the workers
    for number in range(6):
        shown.trial(number, epoch_s=1.0)
    assert shown.lines[-1].startswith("6 of 11 trials ended (60 epochs), 6 completed")
    assert "about 50 s left" in shown.lines[-1]


def test_the_best_is_that_of_trials_that_may_rank(sweep):
    shown = sweep(4, 1)
    shown.trial(0, epoch_s=1.0, value=0.6)
    shown.trial(1, epoch_s=1.0, value=0.9, outcome=Outcome.FAILED)
    shown.trial(2, epoch_s=1.0, value=float("nan"))
    assert "2 completed, 1 failed, best val macro_f1 0.600" in shown.lines[-1]
    shown.trial(3, epoch_s=1.0, value=0.7)
    assert "best val macro_f1 0.700" in shown.lines[-1]
