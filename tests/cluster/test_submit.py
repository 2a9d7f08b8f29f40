"""Sweeps sent to a real Ray head with a token: followed over a cut connection, stopped, gone on with, fetched."""

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweep.parcel import FILES
from tests.cluster.heads import ROOT, Head, Wire

SPACE = """\
name: small
data: phantom
objective: macro_f1
search: {{algorithm: grid, trials: 2}}
space:
  backbone: mobilenet_v2_0.35
  weights: bundled
  image_side: 32
  freeze: [all, "convs:1"]
  learning_rate: 3e-3
  epochs: {epochs}
resources: {{concurrency: 1}}
"""
TIMEOUT_S = 600.0


class Desk:
    """The machine that sweeps are submitted from: a folder and a token of its own."""

    def __init__(self, folder: Path, port: int, token: str) -> None:
        self.folder, self.port = folder, port
        self._environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(folder),
            "PLANTED_SECRET": "hunter2-of-this-machine",
            **({"RAY_AUTH_TOKEN": token} if token else {}),
        }

    def started(self, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sweep.submit", *map(str, words)]
        if "--address" not in command:
            command += ["--address", f"http://127.0.0.1:{self.port}"]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def done(self, *words: object) -> tuple[int, str]:
        process = self.started(*words)
        said, _ = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, said


@pytest.fixture
def desk(head, tmp_path) -> Desk:
    return Desk(tmp_path, head.port, head.token)


def write_space(desk: Desk, epochs: int) -> Path:
    file = desk.folder / "small.yaml"
    file.write_text(SPACE.format(epochs=epochs))
    return file


def submitted_id(said: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith("submitted to ")]
    return line.split()[-1]


@pytest.mark.slow
class TestSubmit:
    @pytest.mark.parametrize(("token", "said"), [("", "there is none here"), ("0" * 64, "does not take the token")])
    def test_without_the_token_nothing_is_taken(self, head, tmp_path, token, said):
        stranger = Desk(tmp_path, head.port, token)
        status, words = stranger.done(write_space(stranger, 1))
        assert (status, said in words) == (2, True), words
        status, words = stranger.done("--list")
        assert (status, said in words) == (2, True), words

    def test_a_sweep_over_a_connection_that_is_cut(self, head, desk):
        wire = Wire(head.port)
        desk.port = wire.port
        local = desk.folder / "fetched"
        process = desk.started(write_space(desk, 3), "--fetch-to", local)
        lines = []
        try:
            for line in process.stdout:
                lines.append(line)
                if line.startswith("run folder: "):
                    wire.cut()
                    time.sleep(6)
                    wire.mend()
            assert process.wait(timeout=TIMEOUT_S) == 0, "".join(lines)
        finally:
            wire.close()
            process.kill()
        said = "".join(lines)
        assert wire.refused > 0, "the connection was never missed"
        assert "connected again" in said
        job_id = submitted_id(said)

        written = head.log(job_id).splitlines(keepends=True)
        ours = ("submitted", "Ctrl-C", "no answer", "the answer of", "http://", "connected", "fetched", job_id)
        assert [line for line in lines if not line.startswith(ours)] == written, "no line twice, none lost"
        assert sum("run folder: " in line for line in lines) == 1

        (remote,) = [Path(line.removeprefix("run folder: ").strip()) for line in lines if line.startswith("run folder")]
        assert remote == head.folder / "runs" / "small", "relative paths are those of the folder Ray was started in"
        for name in FILES:
            assert (local / name).read_bytes() == (remote / name).read_bytes()
        with (local / "trials.csv").open(newline="") as file:
            assert [row["outcome"] for row in csv.DictReader(file)] == ["completed"] * 2
        spec = (remote / "spec.yaml").read_text()
        assert "hunter2" not in spec + head.log(job_id)

        status, listed = desk_at(desk, head).done("--list")
        assert status == 0
        (row,) = [line.split() for line in listed.splitlines() if line.startswith(job_id)]
        assert row[1:3] == ["small", "SUCCEEDED"]
        assert row[-1] == "0"

    def test_wrong_data_is_answered_with_the_sweeps_own_status(self, desk):
        status, said = desk.done(write_space(desk, 1), "--data", "/nowhere/at/all")
        assert status == 2, said
        assert "/nowhere/at/all" in said
        assert "paths are those of the cluster" in said

    def test_stopped_and_gone_on_with(self, head, desk):
        epochs = 25
        status, said = desk.done(write_space(desk, epochs), "--name", "long", "--set", "freeze=none", "--detach")
        assert status == 0, said
        job_id = submitted_id(said)
        run = head.folder / "runs" / "long"
        deadline = time.monotonic() + TIMEOUT_S
        while epochs_in(run) < 3:
            assert time.monotonic() < deadline, head.log(job_id)
            time.sleep(0.5)
        status, said = desk.done("--stop", job_id)
        assert status == 0, said
        assert "has ended with exit status 130: it was stopped" in said
        begun = epochs_in(run)
        assert begun < epochs, "it was stopped in the middle"
        status, attached = desk.done("--attach", job_id)
        assert status == 130
        assert "are kept in" in attached

        (command,) = [line.removeprefix("to go on: ") for line in said.splitlines() if line.startswith("to go on: ")]
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "sweep.submit"]
        words.remove("--detach")
        status, said = desk.done(*words[3:])
        assert status == 0, said
        entries = [json.loads(line) for line in (run / "state" / "epochs.jsonl").read_text().splitlines()]
        told = [(entry["trial_id"], entry["epoch"]) for entry in entries]
        assert len(told) == len(set(told)), "each epoch once"
        assert f"the run folder is on this machine: {run}" in said


def desk_at(desk: Desk, head: Head) -> Desk:
    desk.port = head.port
    return desk


def epochs_in(run: Path) -> int:
    try:
        return len((run / "state" / "epochs.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0
