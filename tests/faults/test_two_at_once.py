"""Two sweeps on one machine, with one cache, one tracking store and one name: each is as if it were alone."""

import csv
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

ROOT = Path(__file__).parent.parent.parent
SPACE = """\
name: twin
data: {source: phantom, subset: 0.25}
objective: macro_f1
search: {trials: 4, halving: {grace_epochs: 1}}
resources: {concurrency: 1, cpus_per_trial: 1}
space:
  backbone: mobilenet_v2_0.35
  weights: bundled
  image_side: 32
  freeze: [all, "convs:2"]
  learning_rate: {low: 1e-4, high: 1e-2, log: true}
  dropout: 0.2
  batch_size: 8
  epochs: 3
"""
TIMES = {"train_seconds"}


def begun(tmp_path: Path, *, cache: str, store: str) -> "subprocess.Popen[str]":
    (tmp_path / "twin.yaml").write_text(SPACE)
    command = [sys.executable, "-m", "sweep.run", str(tmp_path / "twin.yaml"), "--out", str(tmp_path / "runs")]
    command += ["--cache-dir", str(tmp_path / cache), "--tracking-uri", f"sqlite:///{tmp_path / store}"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(*sweeps: "subprocess.Popen[str]") -> None:
    for sweep in sweeps:
        said, _ = sweep.communicate(timeout=500)
        assert sweep.returncode == 0, said
        assert "MLflow at" not in said


def trials_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_sweeps_at_once_are_each_as_if_alone(tmp_path):
    ended(begun(tmp_path, cache="alone", store="alone.db"))
    ended(begun(tmp_path, cache="shared", store="shared.db"), begun(tmp_path, cache="shared", store="shared.db"))
    alone, *others = (trials_of(tmp_path / "runs" / name) for name in ("twin", "twin-2", "twin-3"))
    assert len(alone) == 4
    assert others == [alone, alone]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'shared.db'}")
    (experiment,) = (each for each in client.search_experiments() if each.name == "twin")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 2
    for parent in parents:
        own = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert sorted(run.data.tags["trial_id"] for run in own) == sorted(row["trial_id"] for row in alone)
        assert all(run.info.status == "FINISHED" for run in (parent, *own))
    assert len(client.search_model_versions("name = 'twin'")) == 2
