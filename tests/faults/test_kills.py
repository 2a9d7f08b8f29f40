"""A driver and a worker that are killed; nothing is lost but the epoch that ran."""

import random
from pathlib import Path

import pytest
from fault_checks import finished_epochs, tracking_differences, trained_again
from fault_kills import killed_and_resumed, with_lost_workers
from fault_runs import Attempt, Place, Setting, training_children

from sweep.record import RunFolder, read_lines
from tests.programs import value_of

TRIALS, EPOCHS = 3, 6
SPACE = f"""\
name: faults
data: {{source: phantom, subset: 0.25}}
objective: macro_f1
search: {{algorithm: grid, trials: {TRIALS}}}
resources: {{concurrency: 1, cpus_per_trial: 1}}
space: {{backbone: vanilla_cnn, weights: none, seed: [0, 1, 2], epochs: {EPOCHS}}}
"""
# Of the real sweeps.
QUICK = ("--max-epochs", "4", "--set", "final.seeds=1")


@pytest.fixture
def fake(tmp_path: Path, cache_dir: Path) -> Place:
    """A sweep of three trainings that train nothing, through the real command and Ray."""
    (tmp_path / "space.yaml").write_text(SPACE)
    return Place(tmp_path, "fake", TRIALS, (), tmp_path / "space.yaml", cache_dir, "tests.faults.launch")


@pytest.fixture
def started(fake: Place):
    """Starts the sweep, and again; whatever is left of it ends with the test."""
    attempts: list[Attempt] = []

    def start() -> Attempt:
        attempts.append(Attempt.start(fake, len(attempts)))
        return attempts[-1]

    yield start
    for attempt in attempts:
        attempt.clear()


def middle_of_the_second_trial(attempt: Attempt) -> bool:
    return len(finished_epochs(attempt.place.run)) >= EPOCHS + EPOCHS // 2


def assert_nothing_lost(place: Place, finished: dict[tuple[str, int], int]) -> None:
    trials = [*read_lines(place.run.trial_record)]
    assert sorted(entry["config"]["seed"] for entry in trials) == [0, 1, 2]
    assert {entry["outcome"] for entry in trials} == {"completed"}
    seeds = {entry["trial_id"]: entry["config"]["seed"] for entry in trials}
    epochs = [(seeds[entry["trial_id"]], entry["epoch"]) for entry in read_lines(place.run.epoch_record)]
    assert sorted(epochs) == [(seed, epoch) for seed in range(TRIALS) for epoch in range(1, EPOCHS + 1)]
    for entry in read_lines(place.run.epoch_record):
        assert entry["val"]["macro_f1"] == value_of(seeds[entry["trial_id"]], entry["epoch"])
    assert trained_again(finished, place.run) == []
    assert tracking_differences(place.run, models=0) == []


def assert_found_if_planted(run: RunFolder) -> None:
    """What MLflow has once too often is found: the check above can fail."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.tracking_database}")
    experiment = client.get_experiment_by_name(run.path.name).experiment_id
    (trial,) = client.search_runs([experiment], "params.seed = '1'")
    client.log_metric(trial.info.run_id, "val_macro_f1", 0.5, timestamp=1, step=3)
    client.set_terminated(client.create_run(experiment, tags=trial.data.tags).info.run_id)
    name = trial.data.tags["trial_id"]
    found = tracking_differences(run, models=1)
    assert f"MLflow's run of {name}: val_macro_f1 0.5 at epoch 3 stands there 1 time, not 0 times" in found
    assert f"MLflow's runs of trials: {name} stands there 2 times, not 1 time" in found
    assert "MLflow's registry: the sweep's model stands there 0 times, not 1 time" in found


def test_a_driver_that_was_killed_goes_on_where_it_was(fake, started):
    first = started()
    assert first.wait_until(lambda: middle_of_the_second_trial(first)), first.said
    finished = finished_epochs(fake.run)
    first.kill_driver()
    again = started()
    assert again.resumed
    assert again.wait() == 0, again.said
    assert first.seconds_to_die() is not None
    assert_nothing_lost(fake, finished)
    assert_found_if_planted(fake.run)


@pytest.mark.slow
def test_a_worker_that_was_killed_costs_the_running_epoch(fake, started):
    sweep = started()
    assert sweep.wait_until(lambda: middle_of_the_second_trial(sweep)), sweep.said
    (child,) = training_children(sweep)
    finished = finished_epochs(fake.run)
    child.kill()
    assert sweep.wait() == 0, sweep.said
    assert_nothing_lost(fake, finished)


@pytest.mark.slow
def test_real_trainings_of_a_killed_driver_end_with_the_same_bits(tmp_path):
    setting = Setting(tmp_path, TRIALS, 1, 0, QUICK)
    reference = setting.reference()
    moment = reference.reached["search"] + 1.0
    row = killed_and_resumed(setting.place("killed"), [moment, moment], reference)
    assert row["kills"]
    assert row["complaints"] == []


@pytest.mark.slow
def test_real_trainings_that_lose_workers_end_with_the_same_bits(tmp_path):
    setting = Setting(tmp_path, TRIALS, 1, 0, QUICK)
    reference = setting.reference()
    first = reference.reached["search"] + 1.0
    row = with_lost_workers(setting.place("lost"), [first, first + 2.0], reference, random.Random(0))
    assert row["kills"]
    assert row["complaints"] == []
