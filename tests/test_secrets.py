"""What is secret stays so in a real sweep with an MLflow server that wants a password; MLflow's pages stay at home."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.channels import SECRET, Channel
from tests.mlflow_servers import MlflowServer, free_port
from tests.test_sweep import ROOT, sweep_command
from tests.tracked_sweeps import TrackedSweep, run_folder
from tests.watching import Seen, files_with, watch

mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.slow
PASSWORD, TOKEN = "correct-horse-of-nobody", "fedcba9876543210" * 4
SPACE = """\
name: small
data: {data}
objective: macro_f1
search: {{trials: 1}}
space: {{backbone: mobilenet_v2_0.35, weights: bundled, freeze: all, image_side: 96, epochs: 2}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[MlflowServer]:
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    found = MlflowServer(tmp_path_factory.mktemp("server"), password=PASSWORD)
    found.start()
    yield found
    found.kill()


@pytest.fixture
def channel() -> Iterator[Channel]:
    found = Channel()
    yield found
    found.close()


@pytest.mark.parametrize("by", ["environment", "file"])
@pytest.mark.parametrize("arguments", [("--inline",), ()], ids=["inline", "ray"])
def test_a_server_s_password_a_webhook_and_a_token_are_kept_nowhere(
    by, arguments, tmp_path, radiography_folder, cache_dir, server, channel, monkeypatch
):
    space, out, home = tmp_path / "small.yaml", tmp_path / "runs", tmp_path / "home"
    space.write_text(SPACE.format(data=radiography_folder))
    login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    secrets = {"SWEEP_WEBHOOK_URL": channel.url, "RAY_AUTH_TOKEN": TOKEN, "HOME": str(home)}
    (home / ".mlflow").mkdir(parents=True)
    if by == "environment":
        secrets |= login
    else:
        lines = (f"{name.lower()} = {value}\n" for name, value in login.items())
        (home / ".mlflow" / "credentials").write_text(f"[mlflow]\n{''.join(lines)}")
    command = sweep_command(space, out, cache_dir, "--tracking-uri", server.uri, *arguments)
    done, seen = watch(command, cwd=ROOT, env={**os.environ, **secrets})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: MLflow" not in done.stdout
    for name, value in login.items():
        monkeypatch.setenv(name, value)
    run_id = json.loads((out / "small" / "summary.json").read_text())["mlflow_run_id"]
    assert mlflow.MlflowClient(server.uri).get_run(run_id).info.status == "FINISHED"
    (text,) = channel.texts
    assert f"\nMLflow: {server.uri}/#/experiments/" in text
    for name, secret in {"password": PASSWORD, "webhook": SECRET, "token": TOKEN}.items():
        assert files_with(secret, out, cache_dir, Path(server.database.removeprefix("sqlite:///")).parent) == [], name
        assert secret not in done.stdout + done.stderr + text, name
        assert not [command for command in seen.commands if secret in " ".join(command)], name
    assert seen.reachable == set()


def test_the_server_shows_nothing_without_the_password(server, monkeypatch):
    client = mlflow.MlflowClient(server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(mlflow.exceptions.MlflowException, match="401"):
        client.search_experiments()


def test_mlflow_s_pages_are_on_loopback_whatever_the_environment_says(tmp_path):
    sweep = TrackedSweep(run_folder(tmp_path))
    sweep.trial(0, 1)
    sweep.finish()
    sweep.tracker.close(60.0)
    port = free_port()
    command = shlex.split(sweep.tracker.ui_command.replace("--port 5000", f"--port {port}"))
    assert command[0] == sys.executable
    seen = Seen()
    environment = {**os.environ, "MLFLOW_HOST": "0.0.0.0"}
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as ui:
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                with socket.socket() as asking:
                    if asking.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            time.sleep(5)  # until its workers have come up, too
            seen.look(psutil.Process(ui.pid))
        finally:
            for process in (*psutil.Process(ui.pid).children(recursive=True), ui):
                process.terminate()
    assert seen.addresses, (tmp_path / "log").read_text()
    assert seen.reachable == set()
