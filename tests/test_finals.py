"""The final trainings follow the search: each strategy's best configuration, once for every seed."""

from dataclasses import replace

import pytest

from cxr_models.trial import EpochMetrics, Objective, Outcome, TrialConfig, TrialResult
from sweep.finals import FinalTraining, FinalTrainings
from sweep.runner import WAIT, run_inline
from sweep.worker import Fault, TrialEnd, TrialJob
from tests.sweeps import Heard, fake_sweep

OBJECTIVE = Objective("macro_f1", "max")


class Finals:
    """Final trainings behind a fake sweep, and what is told of them."""

    def __init__(
        self, tmp_path, *, seeds=2, strategies=None, program="quick", results=None, journal=None, **sweep
    ) -> None:
        self.conductor, self.heard = fake_sweep(tmp_path, program, **sweep)
        self.told: list[tuple[str, int, int, int]] = []
        self.jobs: list[TrialJob] = []
        self.trainings = FinalTrainings(
            self.conductor,
            OBJECTIVE,
            seeds=seeds,
            strategies=strategies,
            results=results or (lambda: tuple(self.heard.results[number] for number in sorted(self.heard.results))),
            epochs=lambda: epochs_of(self.heard),
            told=lambda training, *numbers: self.told.append((training.training_id, *numbers)),
            journal=journal,
        )
        give = self.trainings.next_job

        def next_job():
            job = give()
            if isinstance(job, TrialJob):
                self.jobs.append(job)
            return job

        self.trainings.next_job = next_job


def epochs_of(heard: Heard) -> dict[str, list[EpochMetrics]]:
    found: dict[str, list[EpochMetrics]] = {}
    for metrics in heard.epochs:
        found.setdefault(metrics.trial_id, []).append(metrics)
    return found


def test_the_best_trial_is_trained_again_for_its_best_number_of_epochs(tmp_path):
    finals = Finals(tmp_path, trials=5, epochs=4)
    run_inline(finals.trainings)
    best = max(finals.heard.results.values(), key=lambda result: result.val["macro_f1"])
    assert [job.again for job in finals.jobs] == [()] * 5 + [
        tuple(metrics.val["loss"] for metrics in epochs_of(finals.heard)[best.trial_id][: best.best_epoch])
    ] * 2
    assert [job.trial_id for job in finals.jobs[5:]] == [f"{best.trial_id}-final-{number}" for number in (1, 2)]
    assert [job.config for job in finals.jobs[5:]] == [
        best.config,
        replace(best.config, seed=best.config.seed + 1),
    ]
    assert finals.told == [(f"{best.trial_id}-final-1", 0, 0, 2), (f"{best.trial_id}-final-2", 1, 1, 2)]
    assert [training.number for training in finals.trainings.of(best)] == [0, 1]
    assert finals.trainings.problem(best) == ""


def test_the_search_hears_nothing_of_them(tmp_path):
    finals = Finals(tmp_path, trials=3, epochs=3)
    run_inline(finals.trainings)
    assert len(finals.heard.results) == 3
    assert finals.conductor.epochs_run == len(finals.heard.epochs) == 9


def test_no_final_training_begins_before_the_last_trial_has_ended(tmp_path):
    finals = Finals(tmp_path, trials=2, epochs=1).trainings
    first, second = finals.next_job(), finals.next_job()
    assert finals.next_job() is WAIT
    for job in (first, second):
        assert finals.next_job() is WAIT
        value = 0.5 if job is first else 0.6
        metrics = EpochMetrics(job.trial_id, 1, 0, 0.1, {"loss": 1.0}, {"loss": 1.0, "macro_f1": value}, 0.1, 1.0)
        finals.epoch(metrics)
        finals.ended(job.trial_id, TrialEnd())
    again = finals.next_job()
    assert again.trial_id == f"{second.trial_id}-final-1"
    assert again.again == (1.0,)


def test_of_trainings_that_run_at_once_none_is_counted_as_done(tmp_path):
    finals = Finals(tmp_path, trials=1, epochs=1)
    trial = finals.trainings.next_job()
    metrics = EpochMetrics(trial.trial_id, 1, 0, 0.1, {"loss": 1.0}, {"loss": 1.0, "macro_f1": 0.5}, 0.1, 1.0)
    finals.trainings.epoch(metrics)
    finals.trainings.ended(trial.trial_id, TrialEnd())
    finals.trainings.next_job()
    finals.trainings.next_job()
    assert [numbers for _, *numbers in finals.told] == [[0, 0, 2], [1, 0, 2]]


def test_every_strategy_has_its_first_seed_before_any_has_its_second(tmp_path):
    finals = Finals(tmp_path, trials=1, epochs=1, results=lambda: results)
    strategies = {"all": 0.7, "none": 0.9, "stages:1": 0.8}
    results = tuple(
        TrialResult(name, TrialConfig("x", freeze=name), Outcome.COMPLETED, 1, 1, {"macro_f1": value})
        for name, value in strategies.items()
    )
    metrics = EpochMetrics("", 1, 0, 0.1, {"loss": 1.0}, {"loss": 1.0, "macro_f1": 0.5}, 0.1, 1.0)
    finals.heard.epochs.extend(replace(metrics, trial_id=name) for name in strategies)
    run_inline(finals.trainings)
    order = [name for name, *_ in finals.told]
    assert order == [f"{name}-final-{number}" for number in (1, 2) for name in ("none", "stages:1", "all")]


def test_without_a_test_part_only_the_best_strategy_is_trained_again(tmp_path):
    results = tuple(
        TrialResult(name, TrialConfig("x", freeze=name), Outcome.COMPLETED, 1, 1, {"macro_f1": value})
        for name, value in {"all": 0.7, "none": 0.9}.items()
    )
    finals = Finals(tmp_path, trials=1, epochs=1, seeds=1, strategies=1, results=lambda: results)
    metrics = EpochMetrics("none", 1, 0, 0.1, {"loss": 1.0}, {"loss": 1.0, "macro_f1": 0.5}, 0.1, 1.0)
    finals.heard.epochs.append(metrics)
    run_inline(finals.trainings)
    assert [name for name, *_ in finals.told] == ["none-final-1"]


def test_a_training_that_fails_is_told_and_leaves_the_others(tmp_path):
    finals = Finals(tmp_path, trials=1, epochs=2, program="failing_again")
    run_inline(finals.trainings)
    (best,) = finals.heard.results.values()
    assert finals.trainings.problem(best) == "final training: ValueError: no luck the second time"
    assert [training.number for training in finals.trainings.of(best)] == [0]


def test_an_interruption_ends_them(tmp_path):
    finals = Finals(tmp_path, trials=1, epochs=1).trainings
    trial = finals.next_job()
    metrics = EpochMetrics(trial.trial_id, 1, 0, 0.1, {"loss": 1.0}, {"loss": 1.0, "macro_f1": 0.5}, 0.1, 1.0)
    finals.epoch(metrics)
    finals.ended(trial.trial_id, TrialEnd())
    again = finals.next_job()
    assert finals.epoch(replace(metrics, trial_id=again.trial_id, val={}))
    finals.interrupt()
    assert not finals.epoch(replace(metrics, trial_id=again.trial_id, val={}))
    finals.ended(again.trial_id, TrialEnd())
    assert finals.done == []
    assert finals.next_job() is None


def test_a_final_training_has_a_seed_and_a_folder_of_its_own():
    trial = TrialResult("abc", TrialConfig("x", seed=7), Outcome.COMPLETED, 1, 1, {"macro_f1": 0.5})
    trainings = [FinalTraining(trial, number) for number in range(3)]
    assert [training.config.seed for training in trainings] == [7, 8, 9]
    assert len({training.training_id for training in trainings}) == 3


def test_what_was_trained_before_a_restart_is_not_trained_again_what_failed_is(tmp_path):
    journal = tmp_path / "finals.jsonl"
    first = Finals(tmp_path, trials=1, epochs=2, seeds=3, program="failing_again", journal=journal)
    run_inline(first.trainings)
    (best,) = first.heard.results.values()
    for number in (1, 3):
        weights = tmp_path / "trials" / f"{best.trial_id}-final-{number}" / "best.npz"
        weights.parent.mkdir(parents=True)
        weights.touch()
    weights.unlink()  # of the third: lost
    again = Finals(tmp_path, trials=1, epochs=2, seeds=3, journal=journal)
    run_inline(again.trainings)
    assert [name for name, *_ in again.told] == [f"{best.trial_id}-final-{number}" for number in (2, 3)]
    assert [training.number for training in again.trainings.of(best)] == [0, 1, 2]
    assert again.trainings.problem(best) == ""


def test_a_checkpoint_stays_no_longer_than_its_training(tmp_path):
    finals = Finals(tmp_path, trials=1, epochs=1, journal=tmp_path / "finals.jsonl").trainings
    trial = finals.next_job()
    metrics = EpochMetrics(trial.trial_id, 1, 0, 0.1, {"loss": 1.0}, {"loss": 1.0, "macro_f1": 0.5}, 0.1, 1.0)
    finals.epoch(metrics)
    finals.ended(trial.trial_id, TrialEnd())
    job = finals.next_job()
    checkpoint = job.folder / "checkpoint.npz"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    finals.ended(job.trial_id, TrialEnd("killed", fault=Fault.LOST))
    assert checkpoint.exists(), "it goes on from there"
    finals.ended(finals.next_job().trial_id, TrialEnd())
    assert not checkpoint.exists()


def test_one_whose_worker_was_lost_is_trained_again_twice(tmp_path):
    finals = Finals(tmp_path, trials=1, epochs=1).trainings
    trial = finals.next_job()
    metrics = EpochMetrics(trial.trial_id, 1, 0, 0.1, {"loss": 1.0}, {"loss": 1.0, "macro_f1": 0.5}, 0.1, 1.0)
    finals.epoch(metrics)
    finals.ended(trial.trial_id, TrialEnd())
    names = []
    for _ in range(3):
        job = finals.next_job()
        names.append(job.trial_id)
        finals.ended(job.trial_id, TrialEnd("killed", fault=Fault.LOST))
    assert names == [f"{trial.trial_id}-final-1"] * 3
    assert finals.problems == {f"{trial.trial_id}-final-1": "killed; so were 2 earlier attempts"}


@pytest.mark.parametrize("seeds", [0, "many"])
def test_there_is_at_least_one_seed(seeds, tmp_path):
    from sweep.document import SpecError
    from sweep.spec import read_spec

    fake_sweep(tmp_path, "quick")
    with pytest.raises(SpecError, match=r"final\.seeds"):
        read_spec(tmp_path / "fake.yaml", [f"final.seeds={seeds}"])
