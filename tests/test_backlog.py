"""What MLflow gets when: short trials once, long ones every few seconds, the running ones first."""

import pytest

from cxr_models.trial import METRICS, EpochMetrics, Outcome, Suggestion, TrialConfig, TrialResult
from sweep.backlog import INTERVAL_S, Backlog


def suggestion(number: int) -> Suggestion:
    return Suggestion(number, f"t{number}", TrialConfig("vanilla_cnn", seed=number))


def epoch(number: int, epoch: int) -> EpochMetrics:
    values = dict.fromkeys(METRICS, 0.5)
    return EpochMetrics(f"t{number}", epoch, 0, 1e-3, values, values, 1.0, 10.0)


def result(number: int) -> TrialResult:
    return TrialResult(f"t{number}", suggestion(number).config, Outcome.COMPLETED)


def test_a_trial_that_ends_soon_is_written_once_with_all_its_epochs():
    backlog = Backlog()
    backlog.started(suggestion(0), 1, 0.0)
    for number in (1, 2, 3):
        backlog.epoch(epoch(0, number), number)
    backlog.ended(0, result(0), 4)
    trial, when = backlog.next(1.0)
    assert when == 1.0
    assert [metrics.epoch for _, metrics in trial.epochs] == [1, 2, 3]
    assert (trial.begun_ms, trial.ended_ms, trial.result) == (1, 4, result(0))
    backlog.take(trial, 1.0)
    assert backlog.next(1.0) is None
    assert backlog.unwritten() == ()


def test_a_running_trial_is_due_every_few_seconds_while_it_has_news():
    backlog = Backlog()
    backlog.started(suggestion(0), 1, 100.0)
    trial, when = backlog.next(100.0)
    assert when == 100.0 + INTERVAL_S
    backlog.take(trial, when)
    trial.described = True
    assert backlog.next(when) is None
    backlog.epoch(epoch(0, 1), 1)
    assert backlog.next(when) == (trial, when + INTERVAL_S)


def test_running_trials_that_are_due_go_before_any_number_of_ended_ones():
    backlog = Backlog()
    backlog.started(suggestion(0), 1, 0.0)
    for number in range(1, 50):
        backlog.ended(number, result(number), 2)
    assert backlog.next(INTERVAL_S - 0.1)[0].suggestion.trial_id == "t1"
    assert backlog.next(INTERVAL_S)[0].suggestion.trial_id == "t0"
    assert [trial.suggestion.number for trial in backlog.unwritten()] == [*range(1, 50), 0]


def test_a_running_trial_that_could_not_be_written_keeps_its_epochs_and_waits():
    backlog = Backlog()
    backlog.started(suggestion(0), 1, 0.0)
    backlog.epoch(epoch(0, 1), 1)
    trial, when = backlog.next(INTERVAL_S)
    backlog.take(trial, when)
    assert backlog.next(when) == (trial, when + INTERVAL_S)
    assert trial.epochs == [(1, epoch(0, 1))]


def test_an_epoch_of_no_running_trial_is_an_error():
    with pytest.raises(LookupError, match="an epoch of trial t3 came in, but that trial does not run"):
        Backlog().epoch(epoch(3, 1), 1)
