"""A real MLflow server that is down, slow, killed, or whose answers get lost: nothing is lost, nothing there twice."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from sweep import sync, tracking
from sweep.evaluation import register_champion
from sweep.keras_child import keras_child
from sweep.ledger import Ledger
from sweep.record import RunFolder
from tests.mlflow_servers import Faults, MlflowServer, Proxy
from tests.tracked_sweeps import TrackedSweep, check_exactly_once, run_folder

MlflowClient = pytest.importorskip("mlflow").MlflowClient
ViewType = pytest.importorskip("mlflow.entities").ViewType
pytestmark = pytest.mark.slow
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = MlflowServer(tmp_path_factory.mktemp("server"))
    found.start()
    yield found
    found.kill()


def whole_sweep(folder: RunFolder, uri: str, trials: int = 4, epochs: int = 6, pause_s: float = 0.0) -> TrackedSweep:
    sweep = TrackedSweep(folder, uri)
    for number in range(trials):
        sweep.trial(number, epochs, pause_s)
    sweep.finish()
    return sweep


def test_lost_and_refused_answers_leave_everything_there_once(tmp_path, server, monkeypatch):
    monkeypatch.setattr(tracking, "FIRST_PAUSE_S", 0.01)
    faults = Faults(0, 0.3)
    proxy = Proxy(server, faults)
    folder = run_folder(tmp_path, proxy.uri)
    sweep = whole_sweep(folder, proxy.uri)
    sweep.tracker.close(DEADLINE_S)
    proxy.close()
    assert sweep.tracker.problem == ""
    assert {kind for kind, _ in faults.happened} == {"lost", "refused", "cut"}
    writes = {"runs/create", "runs/log-batch", "runs/update", "runs/log-inputs", "experiments/create"}
    assert writes <= {asked for kind, asked in faults.happened if kind == "lost"}
    assert sweep.slowest < 0.2
    check_exactly_once(server.database, folder)


def test_answers_that_come_too_late_leave_everything_there_once(tmp_path, server, monkeypatch):
    """The client gives up, while the server still works on what was asked: some runs are made late."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    chance, slow = random.Random(1), iter((4.0, 0.0, 4.0, 4.0))

    def late(method: str, path: str) -> str:
        if path.endswith("runs/create"):
            time.sleep(next(slow, 0.0))  # until long after the client has made another
        elif chance.random() < 0.15:
            time.sleep(1.5)
        return ""

    proxy = Proxy(server, late)
    folder = run_folder(tmp_path, proxy.uri)
    sweep = whole_sweep(folder, proxy.uri)
    sweep.tracker.close(DEADLINE_S)
    proxy.close()
    assert sweep.tracker.problem == ""
    check_exactly_once(server.database, folder)
    client = MlflowClient(server.database)
    experiment = client.get_experiment_by_name("small").experiment_id
    deleted = client.search_runs([experiment], run_view_type=ViewType.DELETED_ONLY)
    assert [run for run in deleted if run.data.tags["sweep_id"] == Ledger(folder).sweep_id]


def sync_command(folder: RunFolder, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sweep.sync", str(folder.path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_server_that_was_killed_again_and_again_has_everything_once(tmp_path, monkeypatch):
    """It is down at the start, dies at random moments while metrics flow, and comes back each time."""
    monkeypatch.setattr(tracking, "OUTAGE_TOLD_AFTER_S", 0.0)
    server = MlflowServer(tmp_path)
    folder = run_folder(tmp_path / "runs", server.uri)
    chance = random.Random(0)
    sweep = TrackedSweep(folder, server.uri)
    number = 0
    try:
        for _ in range(4):
            server.begin()
            until = time.monotonic() + 18.0 + chance.uniform(0.0, 6.0)
            while time.monotonic() < until:
                sweep.trial(number, 5, 0.05)
                number += 1
            server.kill()
        sweep.finish()
        begun = time.monotonic()
        sweep.tracker.close(DEADLINE_S)
        assert time.monotonic() - begun < 20.0
        assert f"-m sweep.sync {folder.path}" in sweep.tracker.problem
        assert f"MLflow at {server.uri} answers again" in sweep.told
        assert sweep.slowest < 0.2
        down = sync_command(folder)
        assert down.returncode == 1, down.stderr
        assert "left, and kept" in down.stderr
        server.start()
        for _ in range(2):
            done = sync_command(folder)
            assert done.returncode == 0, done.stderr
        assert "nothing is left to send" in done.stdout
    finally:
        server.kill()
    check_exactly_once(server.database, folder)


def test_a_sweep_whose_process_was_killed_goes_on_in_the_same_runs(tmp_path, server):
    folder = run_folder(tmp_path, server.uri)
    code = (
        "import sys, time, pathlib; from sweep.record import RunFolder; from tests.tracked_sweeps import TrackedSweep\n"
        "s = TrackedSweep(RunFolder(pathlib.Path(sys.argv[1])), sys.argv[2])\n"
        "s.trial(0, 4); s.start(1); s.epochs(1, [1, 2, 3])\n"
        "time.sleep(float(sys.argv[3])); print('now', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(folder.path), server.uri, "9"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.kill()
    before = check_exactly_once(server.database, folder, finished=False)
    assert before.statuses == {"": "RUNNING", "t0": "FINISHED", "t1": "RUNNING"}
    assert sync_command(folder).returncode == 0
    killed = check_exactly_once(server.database, folder, finished=False)
    assert killed.statuses == {"": "KILLED", "t0": "FINISHED", "t1": "KILLED"}
    sweep = TrackedSweep(folder, server.uri)
    sweep.epochs(1, [4, 5])
    sweep.end(1, 5)
    sweep.trial(2, 2)
    sweep.finish()
    sweep.tracker.close(DEADLINE_S)
    assert sweep.tracker.problem == ""
    after = check_exactly_once(server.database, folder)
    for trial_id in ("", "t0", "t1"):
        assert after.runs[trial_id][0].info.run_id == before.runs[trial_id][0].info.run_id


def test_everything_goes_to_another_server_too(tmp_path, server, capsys):
    """One that knows nothing of the sweep: as one that lost its store."""
    folder = run_folder(tmp_path)
    sweep = whole_sweep(folder, "", trials=2)
    sweep.tracker.close(DEADLINE_S)
    check_exactly_once(sweep.tracker.uri, folder)
    assert sync.main([str(folder.path), "--tracking-uri", server.uri]) == 0
    check_exactly_once(server.database, folder)
    assert sync.main([str(folder.path)]) == 0
    check_exactly_once(sweep.tracker.uri, folder)
    assert "has everything" in capsys.readouterr().out


MODEL = """
import sys, keras
inputs = keras.Input((8, 8, 1))
x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x)).save(sys.argv[1])
"""


def test_a_model_whose_registration_failed_is_registered_once_by_sync(tmp_path, server):
    """Even where the server did register it, and the answer was lost."""
    lost: list[str] = []

    def fault(method: str, path: str) -> str:
        if path.endswith("model-versions/create") and not lost:
            lost.append(path)
            return "lost"
        return ""

    proxy = Proxy(server, fault)
    folder = run_folder(tmp_path, proxy.uri)
    folder.model.parent.mkdir()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", MODEL, str(folder.model)], check=True, env=environment)
    sweep = TrackedSweep(folder, proxy.uri)
    sweep.trial(0, 2)
    example = np.zeros((1, 8, 8, 1), np.float32)
    assert sweep.tracker.champion("t0", example)
    with keras_child(folder.log("evaluation")) as call, pytest.raises(RuntimeError) as failed:
        call(register_champion, folder.model, example, proxy.uri, sweep.tracker.parent_run_id, "small", "t0")
    sweep.tracker.note(f"the best model was not registered: {failed.value}")
    sweep.finish()
    sweep.tracker.close(DEADLINE_S)
    assert lost
    assert "the best model was not registered" in sweep.tracker.problem
    assert f"-m sweep.sync {folder.path}" in sweep.tracker.problem
    for said in ("registering the best model", "nothing is left to send"):
        done = sync_command(folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout
    proxy.close()
    check_exactly_once(server.database, folder)
    client = MlflowClient(server.database)
    (version,) = client.search_model_versions("name = 'small'")
    assert version.run_id == sweep.tracker.parent_run_id
    assert client.get_model_version_by_alias("small", "champion").version == version.version
