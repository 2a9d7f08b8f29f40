"""What MLflow gets although calls fail, answers are lost and sweeps are interrupted: everything, once."""

import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cxr_models.trial import METRICS, EpochMetrics
from sweep import sync, tracking
from sweep.folder_lock import FolderLock
from sweep.record import append_line, read_lines
from tests.tracked_sweeps import FINAL, TrackedSweep, check_exactly_once, run_folder, shown

mlflow = pytest.importorskip("mlflow")

DEADLINE_S = 60.0
WRITES = ("create_run", "log_batch", "set_terminated", "log_inputs", "log_artifact", "update_run")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """One store for all, whose tables take seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'shared.db'}"
    mlflow.MlflowClient(uri).create_experiment("small", (folder / "artifacts").as_uri())
    return uri


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(tracking, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.3)
    monkeypatch.setattr(sync, "PATIENCE_S", 0.3)
    monkeypatch.setattr(sync, "PAUSE_S", 0.01)


Fault = Callable[[str, tuple], str]  # (name of the call, its arguments) -> "", "before", "after"


@pytest.fixture
def faults(monkeypatch) -> Callable[[Fault], None]:
    """Have calls of MLflow fail before or after they have done what was asked."""

    def install(fault: Fault) -> None:
        def failing(name: str):
            method = getattr(mlflow.MlflowClient, name)

            def call(*arguments, **options):
                happens = fault(name, arguments)
                if happens == "before":
                    raise ConnectionError("refused")
                found = method(*arguments, **options)
                if happens == "after":
                    raise mlflow.exceptions.MlflowException("API request to x failed with exception: answer lost")
                return found

            return call

        for name in (*WRITES, "search_runs", "get_experiment_by_name"):
            monkeypatch.setattr(mlflow.MlflowClient, name, failing(name))

    return install


def small_sweep(folder, uri: str) -> TrackedSweep:
    sweep = TrackedSweep(folder, uri)
    for number in range(3):
        sweep.trial(number, 4)
    sweep.finish()
    return sweep


def test_calls_that_fail_and_answers_that_are_lost_leave_everything_there_once(tmp_path, store, faults):
    chance, lost = random.Random(0), set()

    def fault(name: str, arguments: tuple) -> str:
        if name in WRITES and name not in lost:
            lost.add(name)
            return "after"
        return chance.choice(("before", "after")) if chance.random() < 0.3 else ""

    faults(fault)
    folder = run_folder(tmp_path)
    sweep = small_sweep(folder, store)
    sweep.tracker.close(DEADLINE_S)
    assert sweep.tracker.problem == ""
    assert {"create_run", "log_batch", "set_terminated"} <= lost
    check_exactly_once(store, folder)
    client = mlflow.MlflowClient(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert client.search_runs(experiments, run_view_type=mlflow.entities.ViewType.DELETED_ONLY) == []


def test_an_outage_from_the_start_is_made_good_by_sync_and_only_once(tmp_path, store, faults, capsys):
    down = [True]
    faults(lambda name, arguments: "before" if down[0] else "")
    folder = run_folder(tmp_path, store)
    sweep = small_sweep(folder, store)
    assert sweep.tracker.parent_run_id == ""
    sweep.tracker.close(DEADLINE_S)
    assert sweep.slowest < 0.2
    assert sweep.tracker.problem.endswith(
        f"what it lacks is kept, and `{sys.executable} -m sweep.sync {folder.path}` sends it"
    )
    assert sync.main([str(folder.path)]) == 1
    said = capsys.readouterr()
    assert "12 epochs, 3 trial ends, 4 notes left, and kept" in said.err
    assert said.out.endswith("4 notes\nno answer yet; trying for 0.3 s\n")  # said once
    down[0] = False
    assert sync.main([str(folder.path)]) == 0
    assert "has everything" in capsys.readouterr().out
    check_exactly_once(store, folder)
    assert sync.main([str(folder.path)]) == 0
    assert "nothing is left to send" in capsys.readouterr().out
    assert sync.main([str(folder.path), "--tracking-uri", store]) == 0
    check_exactly_once(store, folder)


def test_an_outage_costs_no_memory(tmp_path, store, faults):
    down = [True]
    faults(lambda name, arguments: "before" if down[0] else "")
    folder = run_folder(tmp_path)
    sweep = TrackedSweep(folder, store)
    sweep.start(0)
    sweep.epochs(0, range(1, 101))
    assert sweep.tracker.parent_run_id == ""
    assert sweep.tracker._sender.backlog.epochs == 0
    down[0] = False
    sweep.end(0, 100)
    sweep.finish()
    sweep.tracker.close(DEADLINE_S)
    assert sweep.tracker.problem == ""
    check_exactly_once(store, folder)


def test_an_interrupted_sweep_goes_on_in_the_same_runs(tmp_path, store):
    folder = run_folder(tmp_path)
    first = TrackedSweep(folder, store)
    first.trial(0, 2)
    first.start(1)
    first.epochs(1, [1, 2])
    first.tracker.finished({"trials": {"total": 1}}, [], "KILLED")
    first.tracker.close(DEADLINE_S)
    before = shown(store, folder)
    assert before.statuses == {"": "KILLED", "t0": "FINISHED", "t1": "KILLED"}
    second = TrackedSweep(folder, store)
    second.epochs(1, [2, 3])  # the second once more
    assert second.tracker.parent_run_id == before.runs[""][0].info.run_id
    second.start(1)
    second.tracker.evaluated("t0", FINAL)
    while not shown(store, folder).rows["t0"][-1][0].startswith("final_"):
        pass
    assert shown(store, folder).statuses == {"": "RUNNING", "t0": "FINISHED", "t1": "RUNNING"}
    second.end(1, 3)
    second.tracker.evaluated("t0", FINAL)  # the evaluation was interrupted too, and is done again
    second.finish()
    second.tracker.close(DEADLINE_S)
    assert second.tracker.problem == ""
    after = shown(store, folder)
    assert {trial: run.info.run_id for trial, (run,) in after.runs.items()} == {
        trial: run.info.run_id for trial, (run,) in before.runs.items()
    }
    assert set(after.statuses.values()) == {"FINISHED"}
    assert [step for name, _, _, step in after.rows["t1"] if name == "val_loss"] == [1, 2, 3]
    assert sum(name == "final_test_loss" for name, *_ in after.rows["t0"]) == 1
    assert [value for name, value, *_ in after.rows[""] if name == "trials_total"] == [1.0, 3.0]


def test_what_was_kept_of_an_interrupted_sweep_does_not_end_the_one_that_goes_on(tmp_path, store, faults):
    """MLflow was down until the sweep had been resumed."""
    down = [True]
    faults(lambda name, arguments: "before" if down[0] else "")
    folder = run_folder(tmp_path)
    first = TrackedSweep(folder, store)
    first.start(0)
    first.epochs(0, [1])
    first.tracker.finished({"trials": {"total": 1}}, [], "KILLED")
    first.tracker.close(DEADLINE_S)
    down[0] = False
    second = TrackedSweep(folder, store)
    second.epochs(0, [2])
    while "t0" not in (found := shown(store, folder)).rows or found.rows["t0"][-1][3] < 2:
        pass
    assert found.statuses == {"": "RUNNING", "t0": "RUNNING"}
    second.end(0, 2)
    second.finish()
    second.tracker.close(DEADLINE_S)
    check_exactly_once(store, folder)


def test_a_sweep_that_was_killed_is_ended_by_sync(tmp_path, store, faults, monkeypatch):
    """Its process can tell nothing more; what it had not sent is sent, and its runs are shown as killed."""
    faults(lambda name, arguments: "before" if name == "log_batch" and killed[0] else "")
    killed = [False]
    folder = run_folder(tmp_path, store)
    sweep = TrackedSweep(folder, store)
    sweep.trial(0, 2)
    assert sweep.tracker.parent_run_id
    killed[0] = True
    sweep.start(1)
    sweep.epochs(1, [1, 2, 3])
    sweep.tracker._stopped.set()
    sweep.tracker._news.set()
    sweep.tracker._thread.join()
    killed[0] = False
    assert sync.main([str(folder.path)]) == 0
    found = check_exactly_once(store, folder, finished=False)
    assert found.statuses == {"": "KILLED", "t0": "FINISHED", "t1": "KILLED"}


def test_one_bad_value_is_told_and_everything_else_sent(tmp_path, store):
    folder = run_folder(tmp_path)
    sweep = TrackedSweep(folder, store)
    sweep.start(0)
    figures = {**dict.fromkeys(METRICS, 0.5), "a name?": 1.0}
    metrics = EpochMetrics("t0", 1, 0, 1e-3, figures, figures, 0.1, 10.0, ended_ms=1_700_000_000_000)
    append_line(folder.epoch_record, metrics.to_json())
    sweep.epochs(0, [2])
    sweep.end(0, 2)
    sweep.finish()
    sweep.tracker.close(DEADLINE_S)
    assert "_a name?: " in sweep.tracker.problem
    assert "sweep.sync" not in sweep.tracker.problem  # there is nothing that it could do
    found = shown(store, folder)
    assert found.statuses == {"": "FINISHED", "t0": "FINISHED"}
    assert sorted(step for name, _, _, step in found.rows["t0"] if name == "val_loss") == [1, 2]
    assert len([row for row in found.rows["t0"] if row[3] == 1]) == 2 * len(METRICS) + 3


def test_a_line_of_the_record_that_nobody_understands_is_told_and_left_out(tmp_path, store):
    folder = run_folder(tmp_path)
    sweep = TrackedSweep(folder, store)
    sweep.start(0)
    with folder.epoch_record.open("a") as record:
        record.write("no line of a record\n{}\n")
    sweep.epochs(0, [1, 2])
    sweep.end(0, 2)
    sweep.tracker.close(DEADLINE_S)
    assert "the record has a line that cannot be understood: JSONDecodeError" in sweep.tracker.problem
    assert [step for name, _, _, step in shown(store, folder).rows["t0"] if name == "val_loss"] == [1, 2]


def test_a_file_that_mlflow_cannot_store_does_not_block_the_rest(tmp_path, store, monkeypatch):
    """It answers with an error of its own each time."""

    def broken(*arguments):
        raise mlflow.exceptions.MlflowException("no such bucket")

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", broken)
    folder = run_folder(tmp_path)
    sweep = small_sweep(folder, store)
    sweep.tracker.close(DEADLINE_S)
    assert "split.csv: MlflowException: no such bucket" in sweep.tracker.problem
    check_exactly_once(store, folder)


def test_a_password_that_an_earlier_version_kept_in_the_spec_is_not_sent(tmp_path, store):
    folder = run_folder(tmp_path, "postgresql://me:secret@127.0.0.1:9/mlflow")
    sweep = small_sweep(folder, store)
    sweep.tracker.close(DEADLINE_S)
    assert sweep.tracker.problem == ""
    (parent,) = check_exactly_once(store, folder).runs[""]
    assert parent.data.params["tracking.uri"] == "postgresql://me:***@127.0.0.1:9/mlflow"
    kept = Path(mlflow.MlflowClient(store).download_artifacts(parent.info.run_id, "spec.yaml", str(tmp_path)))
    assert kept.read_text() == folder.spec.read_text().replace("secret", "***")


def test_a_run_that_someone_deleted_stays_so_and_blocks_nothing(tmp_path, store):
    folder = run_folder(tmp_path)
    sweep = TrackedSweep(folder, store)
    sweep.trial(0, 2)
    sweep.trial(1, 2)
    while set((found := shown(store, folder)).runs) != {"", "t0", "t1"} or found.statuses["t1"] != "FINISHED":
        pass
    mlflow.MlflowClient(store).delete_run(found.runs["t1"][0].info.run_id)
    sweep.finish()
    sweep.tracker.close(DEADLINE_S)
    assert sync.main([str(folder.path), "--tracking-uri", store]) == 0
    assert shown(store, folder).statuses == {"": "FINISHED", "t0": "FINISHED"}


def test_sync_refuses_what_is_no_sweep_and_a_sweep_that_runs(tmp_path, capsys):
    assert sync.main([str(tmp_path)]) == 2
    assert "expected the folder of a sweep" in capsys.readouterr().err
    folder = run_folder(tmp_path)
    with FolderLock(folder.state / "lock"):
        assert sync.main([str(folder.path)]) == 2
    assert "is in use: process" in capsys.readouterr().err
    assert sync.main([str(folder.path)]) == 0
    assert "kept nothing for MLflow" in capsys.readouterr().out


def test_sync_can_be_interrupted(tmp_path, store, faults, monkeypatch, capsys):
    faults(lambda name, arguments: "before" if down[0] else "")
    down = [True]
    folder = run_folder(tmp_path, store)
    small_sweep(folder, store).tracker.close(DEADLINE_S)
    down[0] = False
    calls = itertools.count()
    log_batch = mlflow.MlflowClient.log_batch

    def interrupted(*arguments, **options):
        log_batch(*arguments, **options)
        if next(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", interrupted)
    assert sync.main([str(folder.path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert sync.main([str(folder.path)]) == 0
    check_exactly_once(store, folder)


def test_the_ledger_is_made_good_where_its_last_lines_are_lost(tmp_path, store):
    """As after a machine lost power: runs are found again by their tags, figures are dropped where they are."""
    folder = run_folder(tmp_path, store)
    small_sweep(folder, store).tracker.close(DEADLINE_S)
    ledger = Path(folder.state / "tracking.jsonl")
    lines = ledger.read_text().splitlines(keepends=True)
    for kept in range(1, len(lines), 6):
        ledger.write_text("".join(lines[:kept]) + lines[kept][:5])
        assert sync.main([str(folder.path)]) == 0
        check_exactly_once(store, folder)
    assert len([entry for entry in read_lines(ledger) if "sweep_id" in entry]) == 1
