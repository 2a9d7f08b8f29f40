"""The conductor and the inline runner, with trials that only pretend to train."""

import json
import math
from dataclasses import replace

import pytest

from cxr_models.trial import EpochMetrics, Objective, Outcome, best_epoch
from sweep.runner import WAIT, Conductor, run_inline
from sweep.worker import TrialEnd
from tests.programs import ODD_ONE, measured, value_of
from tests.sweeps import Heard, fake_sweep


def test_every_trial_ends_with_its_best_epoch(tmp_path):
    conductor, heard = fake_sweep(tmp_path, "quick", trials=5, epochs=3)
    run_inline(conductor)
    assert sorted(heard.results) == [0, 1, 2, 3, 4]
    assert conductor.epochs_run == 15
    for seed, result in heard.by_seed.items():
        assert result.outcome is Outcome.COMPLETED
        assert (result.epochs, result.best_epoch) == (3, 3)
        assert result.val["macro_f1"] == value_of(seed, 3)
        assert (result.trainable_parameters, result.frozen_parameters) == (10 + seed, 100)
        assert result.device.startswith("GPU")
        assert result.train_seconds == 1.5, "of the trial itself, not of its worker's start"


def test_listeners_hear_everything_in_order(tmp_path):
    conductor, heard = fake_sweep(tmp_path, "quick", trials=2, epochs=2)
    run_inline(conductor)
    ids = [suggestion.trial_id for suggestion in heard.begun]
    assert heard.order == [
        (what, trial_id, epoch)
        for trial_id in ids
        for what, epoch in (("started", 0), ("epoch", 1), ("epoch", 2), ("ended", 2))
    ]


def test_a_failing_trial_does_not_stop_the_sweep(tmp_path):
    conductor, heard = fake_sweep(tmp_path, "raising", trials=5)
    run_inline(conductor)
    failed = heard.by_seed[ODD_ONE]
    assert failed.outcome is Outcome.FAILED
    assert failed.error == "ValueError: no such luck"
    assert "and more of it" in failed.traceback
    assert failed.epochs == 1
    others = [result.outcome for seed, result in heard.by_seed.items() if seed != ODD_ONE]
    assert others == [Outcome.COMPLETED] * 4


@pytest.mark.parametrize(
    ("program", "error"),
    [("empty", "the trial ended without an epoch"), ("undefined", "the trial ended without a validation macro_f1")],
)
def test_a_trial_that_measured_nothing_has_failed(program, error, tmp_path):
    conductor, heard = fake_sweep(tmp_path, program, trials=2)
    run_inline(conductor)
    assert [result.error for result in heard.results.values()] == [error] * 2
    assert all(result.best_epoch == 0 and result.val == {} for result in heard.results.values())


def test_halving_ends_weak_trials_early(tmp_path):
    conductor, heard = fake_sweep(tmp_path, "quick", trials=8, epochs=8, rungs=(2, 4))
    run_inline(conductor)
    stopped = [result for result in heard.results.values() if result.outcome is Outcome.STOPPED_EARLY]
    completed = [result for result in heard.results.values() if result.outcome is Outcome.COMPLETED]
    assert len(stopped) + len(completed) == 8
    assert stopped
    assert completed
    assert {result.epochs for result in stopped} <= {2, 4}
    assert all(result.epochs == 8 for result in completed)
    assert all(result.val["macro_f1"] == value_of(result.config.seed, result.epochs) for result in stopped)
    best = max(range(8), key=lambda seed: value_of(seed, 8))
    assert heard.by_seed[best].outcome is Outcome.COMPLETED
    assert [trial_id for what, trial_id, _ in heard.order if what == "ended"] == [
        suggestion.trial_id for suggestion in heard.begun
    ]


def test_the_last_epoch_is_never_an_early_stop(tmp_path):
    """Where trials differ in length, a rung may be the last epoch of a short one: nothing is left to save."""
    conductor, heard = fake_sweep(tmp_path, "quick", trials=6, epochs=3, rungs=(3,))
    run_inline(conductor)
    assert {result.outcome for result in heard.results.values()} == {Outcome.COMPLETED}


def test_a_last_epoch_at_a_rung_counts_for_the_others(tmp_path):
    """Short trials end at the rung by themselves; longer ones are judged against them all the same."""
    conductor, heard = fake_sweep(tmp_path, "quick", trials=8, epochs=2, rungs=(2,))
    halving = conductor._halving
    run_inline(conductor)
    best = max(result.val["macro_f1"] for result in heard.results.values())
    assert halving is not None
    assert not halving.keep("longer", replace(heard.results[0].config, epochs=3), 2, best - 1.0)


def test_a_trial_that_gave_itself_up_is_stopped_early_and_told_to_the_study_as_pruned(tmp_path):
    conductor, heard = fake_sweep(tmp_path, "blind", trials=4, epochs=8)
    run_inline(conductor)
    for seed, result in heard.by_seed.items():
        if seed % 2:
            assert (result.outcome, result.epochs, result.error) == (Outcome.STOPPED_EARLY, 3, "")
            assert result.val["macro_f1"] == 1 / 3, "it may rank"
            assert result.doctor_names == "constant_predictor"
        else:
            assert (result.outcome, result.epochs) == (Outcome.COMPLETED, 8)
            assert "constant_predictor" not in result.doctor_names
    states = [trial.state.name for trial in conductor._search._model._ended]
    assert states == ["COMPLETE", "PRUNED"] * 2


def test_a_trial_that_gave_itself_up_takes_nobody_s_place_and_the_next_comes_to_its_end(tmp_path):
    conductor, heard = fake_sweep(tmp_path, "blind", trials=3, epochs=8, rungs=(2, 4))
    blind = {"auroc": 0.5, "recall/a": 1.0, "recall/b": 0.0, "accuracy": 0.5}
    dead, late, later = (conductor.next_job() for _ in range(3))
    assert all(conductor.epoch(measured(dead, epoch, 0.60, **blind)) for epoch in (1, 2, 3, 4, 5))
    conductor.ended(dead.trial_id, TrialEnd())
    assert (heard.results[0].outcome, heard.results[0].epochs) == (Outcome.STOPPED_EARLY, 5)
    assert all(conductor.epoch(measured(late, epoch, 0.59)) for epoch in range(1, 9)), "the best of those alive"
    conductor.ended(late.trial_id, TrialEnd())
    assert heard.results[1].outcome is Outcome.COMPLETED
    assert [conductor.epoch(measured(later, epoch, 0.58)) for epoch in (1, 2)] == [True, False]


def test_a_blind_trial_that_has_no_epoch_left_is_completed(tmp_path):
    conductor, heard = fake_sweep(tmp_path, "blind", trials=2, epochs=3)
    run_inline(conductor)
    assert heard.by_seed[1].outcome is Outcome.COMPLETED
    assert heard.by_seed[1].doctor_names == "constant_predictor"


def test_every_ended_trial_is_examined_the_failed_one_too(tmp_path):
    conductor, heard = fake_sweep(tmp_path, "quick", trials=1, epochs=4, head_parameters=lambda config: 109)
    job = conductor.next_job()
    for epoch in (1, 2, 3):
        conductor.epoch(measured(job, epoch, 1 / epoch))
    conductor.ended(job.trial_id, TrialEnd("OOM: no memory", "Traceback ..."))
    assert heard.results[0].outcome is Outcome.FAILED
    assert heard.results[0].doctor_names == "unstable_validation;head_holds_parameters"


class InterruptAt(Heard):
    """Ctrl-C in the third trial, after an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.at = epoch
        self.conductor: Conductor | None = None

    def epoch(self, metrics: EpochMetrics) -> None:
        super().epoch(metrics)
        if len(self.begun) == 3 and metrics.epoch == self.at:
            self.conductor.interrupt()


class TestInterruption:
    @pytest.fixture
    def interrupted(self, tmp_path):
        def run(epoch: int) -> tuple[Conductor, InterruptAt]:
            listener = InterruptAt(epoch)
            conductor, _ = fake_sweep(tmp_path, "quick", trials=6, epochs=3, heard=listener)
            listener.conductor = conductor
            run_inline(conductor)
            return conductor, listener

        return run

    def test_finished_trials_stay_and_the_running_one_has_no_result(self, interrupted):
        conductor, heard = interrupted(1)
        assert conductor.interrupted
        assert len(heard.begun) == 3
        assert sorted(heard.results) == [0, 1]
        assert [entry for entry in heard.order if entry[1] == heard.begun[2].trial_id] == [
            ("started", heard.begun[2].trial_id, 0),
            ("epoch", heard.begun[2].trial_id, 1),
        ]

    def test_a_trial_in_its_last_epoch_is_finished(self, interrupted):
        _, heard = interrupted(3)
        assert [result.outcome for result in heard.results.values()] == [Outcome.COMPLETED] * 3

    def test_a_trial_that_had_ended_by_then_is_finished(self, tmp_path):
        """Epochs come in batches: an interruption may be noticed when the trial is over."""
        conductor, heard = fake_sweep(tmp_path, "quick", trials=2, epochs=9)
        job = conductor.next_job()
        conductor.interrupt()
        assert not any(conductor.epoch(measured(job, epoch, 0.5)) for epoch in (1, 2))
        conductor.ended(job.trial_id, TrialEnd())
        assert (heard.results[0].outcome, heard.results[0].epochs) == (Outcome.COMPLETED, 2)

    def test_no_trial_is_given_out_afterwards(self, tmp_path):
        conductor, heard = fake_sweep(tmp_path, "quick")
        conductor.interrupt()
        assert conductor.next_job() is None
        assert heard.order == []


class TestConductor:
    def test_trials_end_in_any_order(self, tmp_path):
        conductor, heard = fake_sweep(tmp_path, "quick", trials=2, epochs=2)
        first, second = conductor.next_job(), conductor.next_job()
        assert conductor.next_job() is WAIT, "one of the two may have to be run again"
        for epoch in (1, 2):
            assert conductor.epoch(measured(first, epoch, 0.5))
            assert conductor.epoch(measured(second, epoch, 0.6))
        conductor.ended(second.trial_id, TrialEnd())
        conductor.ended(first.trial_id, TrialEnd())
        assert list(heard.results) == [1, 0]
        assert conductor.next_job() is None

    def test_what_comes_after_a_decided_end_is_ignored(self, tmp_path):
        """Ray may still deliver an epoch of a trial that was stopped, and then its end."""
        conductor, heard = fake_sweep(tmp_path, "quick", trials=4, epochs=4, rungs=(1,))
        jobs = [conductor.next_job() for _ in range(4)]
        assert conductor.epoch(measured(jobs[0], 1, 0.9))
        assert not conductor.epoch(measured(jobs[1], 1, 0.1))
        told = json.dumps(heard.order)
        assert not conductor.epoch(measured(jobs[1], 2, 0.95))
        conductor.ended(jobs[1].trial_id, TrialEnd("killed"))
        assert json.dumps(heard.order) == told
        assert heard.results[1].outcome is Outcome.STOPPED_EARLY

    def test_a_trial_waits_where_halving_may_end_it(self, tmp_path):
        conductor, _ = fake_sweep(tmp_path, "quick", trials=1, epochs=4, rungs=(1, 4))
        job = conductor.next_job()
        assert [epoch for epoch in range(1, 5) if job.waits_after(epoch)] == [1]

    def test_a_trial_that_failed_ends_no_more_others(self, tmp_path):
        conductor, _ = fake_sweep(tmp_path, "quick", trials=3, epochs=4, rungs=(1,))
        jobs = [conductor.next_job() for _ in range(3)]
        assert conductor.epoch(measured(jobs[0], 1, 0.9))
        assert not conductor.epoch(measured(jobs[1], 1, 0.8))
        conductor.ended(jobs[0].trial_id, TrialEnd("DivergedError: in epoch 2"))
        assert conductor.epoch(measured(jobs[2], 1, 0.7))

    def test_a_failure_keeps_the_epochs_before_it(self, tmp_path):
        conductor, heard = fake_sweep(tmp_path, "quick", trials=1)
        job = conductor.next_job()
        conductor.epoch(measured(job, 1, 0.7))
        conductor.epoch(measured(job, 2, 0.6))
        conductor.ended(job.trial_id, TrialEnd("OOM: no memory", "Traceback ..."))
        result = heard.results[0]
        assert (result.outcome, result.epochs, result.best_epoch) == (Outcome.FAILED, 2, 1)
        assert (result.error, result.traceback) == ("OOM: no memory", "Traceback ...")


class TestBestEpoch:
    @pytest.fixture
    def epochs_with(self, tmp_path):
        conductor, _ = fake_sweep(tmp_path, "quick", trials=1)
        job = conductor.next_job()
        return lambda *values: [measured(job, epoch, value) for epoch, value in enumerate(values, start=1)]

    @pytest.mark.parametrize(
        ("mode", "values", "expected"),
        [
            ("max", (0.1, 0.5, 0.3), 2),
            ("min", (0.3, 0.1, 0.5), 2),
            ("max", (0.5, 0.2, 0.5), 1),  # the first of equals: its weights are those on disk
            ("max", (math.nan, 0.2, math.nan), 2),
            ("min", (math.nan, math.inf, 3.0), 3),
        ],
    )
    def test_the_first_of_the_best(self, mode, values, expected, epochs_with):
        assert best_epoch(epochs_with(*values), Objective("macro_f1", mode)).epoch == expected

    @pytest.mark.parametrize("values", [(), (math.nan, math.nan)])
    def test_none(self, values, epochs_with):
        assert best_epoch(epochs_with(*values), Objective("macro_f1", "max")) is None


@pytest.mark.parametrize(("values", "phase"), [((0.9, 0.5), 0), ((0.5, 0.9), 1)])
def test_parameters_are_those_of_the_phase_that_the_kept_weights_are_of(tmp_path, values, phase):
    conductor, heard = fake_sweep(tmp_path, "quick", trials=1, epochs=2, freeze="all>none")
    job = conductor.next_job()
    for number, value in enumerate(values):
        val = {"loss": 1.0, "macro_f1": value}
        conductor.epoch(EpochMetrics(job.trial_id, number + 1, number, 0.1, {"loss": 1.0}, val, 0.1, 1.0))
    conductor.ended(job.trial_id, TrialEnd())
    assert heard.results[0].trainable_parameters == 10 + phase
