"""One real sweep from end to end, on Ray, and what a user finds afterwards."""

import ast
import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_models.doctor import diagnose
from cxr_models.metrics import confusion_matrix
from sweep.readback import read_run
from sweep.record import RunFolder
from tests.channels import SECRET, Channel
from tests.watching import Seen, files_with, watch

ROOT = Path(__file__).parent.parent
SPACE = """\
name: small
data: {data}
objective: macro_f1
search:
  trials: 4
  halving: {{grace_epochs: 1, least_survivors: 4}}
  fixed:
    - {{backbone: mobilenet_v2_0.35, freeze: "convs:1", learning_rate: 1e-3}}
    - {{backbone: vanilla_cnn, learning_rate: 1e-3}}
    - {{backbone: mobilenet_v2_0.35, freeze: all, learning_rate: 3.0e+38}}
space:
  backbone: [mobilenet_v2_0.35, vanilla_cnn]
  weights: bundled
  freeze:
    choices: ["convs:1", all]
    when: [{{if: {{backbone: vanilla_cnn}}, value: none}}]
  learning_rate: {{low: 1e-3, high: 3.0e+38, log: true}}
  dropout: 0.2
  image_side: 72
  epochs: 3
"""


def sweep_command(space: Path, out: Path, cache_dir: Path, *arguments: str) -> list[str]:
    # Relative folders, because Ray's workers run elsewhere.
    relative = [os.path.relpath(path, ROOT) for path in (out, cache_dir)]
    command = [sys.executable, "-m", "sweep.run", str(space), "--out", relative[0], "--cache-dir", relative[1]]
    return [*command, *arguments]


def sweep(space: Path, out: Path, cache_dir: Path, *arguments: str) -> tuple[Path, str]:
    command = sweep_command(space, out, cache_dir, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "small", done.stdout


@pytest.fixture(scope="module")
def space(tmp_path_factory, radiography_folder) -> Path:
    file = tmp_path_factory.mktemp("space") / "small.yaml"
    file.write_text(SPACE.format(data=radiography_folder))
    return file


class Watched(NamedTuple):
    """A sweep on Ray that had secrets, and what could be seen of it meanwhile."""

    folder: Path
    said: str
    errors: str
    seen: Seen
    channel: Channel
    secrets: Mapping[str, str]


@pytest.fixture(scope="module")
def watched(tmp_path_factory, space, cache_dir) -> Iterator[Watched]:
    out, channel = tmp_path_factory.mktemp("ray"), Channel()
    secrets = {
        "SWEEP_WEBHOOK_URL": channel.url,
        "MLFLOW_TRACKING_PASSWORD": "password-of-nobody",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    }
    command = sweep_command(space, out, cache_dir, "--concurrency", "1")
    done, seen = watch(command, cwd=ROOT, env={**os.environ, **secrets})
    assert done.returncode == 0, done.stdout + done.stderr
    yield Watched(out / "small", done.stdout, done.stderr, seen, channel, secrets)
    channel.close()


@pytest.fixture(scope="module")
def on_ray(watched) -> tuple[Path, str]:
    return watched.folder, watched.said


def test_no_secret_is_kept_or_shown(watched, cache_dir):
    """The webhook's path is what is secret of its address."""
    secrets = [*watched.secrets.values(), SECRET]
    words = {word for command in watched.seen.commands for word in command}
    assert any("raylet" in word for word in words)
    assert len(list(watched.folder.rglob("*"))) > 50
    assert (watched.folder / "mlflow.db").is_file()
    for secret in secrets:
        assert files_with(secret, watched.folder, cache_dir) == []
        assert secret not in watched.said + watched.errors
        assert not [word for word in words if secret in word]


def test_nobody_else_can_reach_any_process_of_a_sweep(watched):
    assert watched.seen.addresses
    assert watched.seen.reachable == set()


def test_the_webhook_is_told_how_it_ended(watched):
    (text,) = watched.channel.texts
    summary = json.loads((watched.folder / "summary.json").read_text())
    figure = summary["test"]["macro_f1"]
    first, best, trials, folder = text.splitlines()
    assert re.fullmatch(r"cxr-sweep small finished on \S+ after (\d+ min )?\d+ s", first)
    interval = f"(95 % interval {figure['low']:.3f} to {figure['high']:.3f})"
    assert f"test macro F1 {figure['value']:.3f} {interval}" in best
    assert trials == "trials: 4 of 4 ended, 3 completed, 1 failed"
    assert folder == f"run folder: {watched.folder}"


def trials_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_trial_is_told(on_ray):
    folder, said = on_ray
    assert re.search(r"\n\d+ of \d+ epochs were trained from stored features of frozen layers; computing", said)
    trials = trials_of(folder)
    of = {(trial["backbone"], trial["freeze"], trial["learning_rate"]): trial for trial in trials}
    assert sorted(trial["outcome"] for trial in trials) == ["completed", "completed", "completed", "failed"]
    (failed,) = (trial for trial in trials if trial["outcome"] == "failed")
    assert "DivergedError: diverged in epoch" in failed["error"]
    assert len(of) == 4
    deep = next(trial for trial in trials if trial["freeze"] == "convs:1")
    assert deep["frozen_parameters"] == "266848"
    assert {trial["weights"] for trial in trials if trial["backbone"] == "vanilla_cnn"} == {"none"}
    assert {"epochs", "best_epoch", "val_macro_f1", "val_recall/COVID", "train_seconds", "learning_rate"} <= deep.keys()


def test_what_the_doctor_found_is_the_same_everywhere(on_ray):
    folder, shown = on_ray
    in_table = {trial["trial_id"]: trial["doctor"] for trial in trials_of(folder)}
    run = read_run(RunFolder(folder))
    split = Counter(run.split[run.split["split"] == "val"]["label"])
    for result in run.results:
        epochs = run.epochs.get(result.trial_id, ())
        found = diagnose(epochs, result.config, run.objective, class_counts=split)
        assert result.doctor == found
        assert in_table[result.trial_id] == ";".join(diagnosis.name for diagnosis in found)
    summary, best = json.loads((folder / "summary.json").read_text()), run.ranking[0]
    assert summary["best"]["doctor"] == [asdict(diagnosis) for diagnosis in best.doctor]
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{summary['mlflow_run_id']}'")
    tags = {child.data.tags["trial_id"]: child.data.tags.get("doctor", "") for child in children}
    assert tags == in_table
    for diagnosis in best.doctor:
        assert f"! {diagnosis.name}. {diagnosis.evidence}" in shown


def test_the_summary_says_what_the_record_says(on_ray):
    folder, shown = on_ray
    summary, trials = json.loads((folder / "summary.json").read_text()), trials_of(folder)
    assert summary["trials"]["total"] == len(trials) == 4
    able = [trial for trial in trials if trial["outcome"] != "failed"]
    best = max(able, key=lambda trial: float(trial["val_macro_f1"]))
    assert summary["best"]["val"]["macro_f1"] == float(best["val_macro_f1"])
    assert summary["data"]["splits"]["train"]["images"] + summary["data"]["splits"]["test"]["images"] < 48
    for name in ("accuracy", "macro_f1", "auroc"):
        figure = summary["test"][name]
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert "mlflow ui --backend-store-uri" in shown
    assert "#/experiments/1/runs?workflowType=machine_learning" in shown
    assert str(folder / "report.html") in shown


def test_every_decision_of_halving_is_kept(on_ray):
    folder, said = on_ray
    lines = [json.loads(line) for line in (folder / "state" / "halving.jsonl").read_text().splitlines()]
    trials = {trial["trial_id"]: trial for trial in trials_of(folder)}
    judged = {line["trial_id"]: line for line in lines if "struck" not in line}
    assert {line["struck"] for line in lines if "struck" in line} == {
        trial_id for trial_id, trial in trials.items() if trial["outcome"] == "failed"
    }
    summary = json.loads((folder / "summary.json").read_text())
    for trial_id, line in judged.items():
        assert (line["backbone"], line["freeze"]) == (trials[trial_id]["backbone"], trials[trial_id]["freeze"])
        assert line["images"] == summary["data"]["splits"]["train"]["images"]
        assert line["goes_on"], "four of each may"
    assert summary["halving"].startswith("after epoch 1 (")
    assert summary["halving"].split(",")[0] in " ".join(said.split())
    assert "Halving: after epoch 1 (" in (folder / "report.html").read_text()


def test_the_split_is_written_and_shares_no_patient(on_ray):
    split = pd.read_csv(on_ray[0] / "split.csv")
    assert list(split.columns) == ["path", "label", "patient", "split", "pixels"]
    assert (split.groupby("patient")["split"].nunique() == 1).all()
    assert set(split["split"]) == {"train", "val", "test"}


def test_an_unreadable_image_is_named_and_left_out(on_ray):
    folder, shown = on_ray
    (left_out,) = pd.read_csv(folder / "unreadable.csv").to_dict("records")
    assert left_out["path"] == "COVID/images/broken.png"
    assert left_out["reason"]
    assert "COVID/images/broken.png" in shown
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["data"]["unreadable"] == 1
    assert [finding["name"] for finding in summary["audit"]] == ["unreadable_files"]
    (found,) = json.loads((folder / "audit.json").read_text())["findings"]
    assert found["examples"][0]["paths"] == ["COVID/images/broken.png"]
    assert "COVID/images/broken.png" not in set(pd.read_csv(folder / "split.csv")["path"])


def predictions(folder: Path, trial_id: str = "", *parts: str) -> pd.DataFrame:
    """Of a trial, the best one by default, or of its final model, on some parts; the test part by default."""
    frame = pd.read_parquet(folder / "predictions.parquet")
    best = json.loads((folder / "summary.json").read_text())["best"]["trial_id"]
    return frame[(frame["trial_id"] == (trial_id or best)) & frame["split"].isin(parts or ("test",))]


def raw_pixels(folder: Path, data: Path, paths: list[str]) -> np.ndarray:
    images = [Image.open(data / path).resize((72, 72), Image.Resampling.BILINEAR) for path in paths]
    return np.stack([np.asarray(image, np.float32)[..., None] for image in images])


def test_the_saved_model_predicts_what_was_recorded(on_ray, radiography_folder):
    import keras

    folder, _ = on_ray
    recorded = predictions(folder)
    scores = recorded.filter(like="score:").to_numpy()
    pixels = raw_pixels(folder, radiography_folder, recorded["image"].tolist())
    model = keras.saving.load_model(folder / "best" / "model.keras", safe_mode=True)
    np.testing.assert_allclose(model.predict(pixels, verbose=0), scores, atol=1e-5)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    champion = mlflow.pyfunc.load_model("models:/small@champion")
    np.testing.assert_allclose(champion.predict(pixels), scores, atol=1e-5)


def test_the_readme_shows_how_to_use_the_model(on_ray, radiography_folder, tmp_path):
    folder, _ = on_ray
    recorded = predictions(folder).iloc[0]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (snippet,) = (block for block in blocks if "load_model" in block)
    image = radiography_folder / recorded["image"]
    snippet = snippet.replace("runs/radiography", str(folder)).replace("x-ray.png", str(image))
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True, cwd=ROOT)
    shown = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert shown == pytest.approx({name: recorded[f"score:{name}"] for name in shown}, abs=2e-3)
    assert len(shown) == 4


def test_the_test_figures_come_from_the_predictions(on_ray):
    folder, _ = on_ray
    summary = json.loads((folder / "summary.json").read_text())
    test = predictions(folder, "", "test")
    labels = test["true"].map(summary["test"]["classes"].index).to_numpy()
    matrix = confusion_matrix(labels, test.filter(like="score:").to_numpy())
    assert matrix.astype(int).tolist() == summary["test"]["confusion_matrix"]
    assert summary["test"]["accuracy"]["value"] == pytest.approx((test["true"] == test["predicted"]).mean())


def test_the_validation_figure_of_the_best_trial_is_that_of_its_predictions(on_ray):
    folder, _ = on_ray
    summary = json.loads((folder / "summary.json").read_text())
    val = predictions(folder, "", "val")
    assert summary["best"]["val"]["accuracy"] == pytest.approx((val["true"] == val["predicted"]).mean())


def test_every_strategys_best_trial_is_evaluated_on_every_part(on_ray):
    folder, shown = on_ray
    summary, split = json.loads((folder / "summary.json").read_text()), pd.read_csv(folder / "split.csv")
    assert len(summary["strategies"]) == 2, "the third one diverges"
    trials = {trial["trial_id"]: trial for trial in trials_of(folder)}
    for row in summary["strategies"]:
        for part in ("train", "val", "test"):
            found = predictions(folder, row["trial_id"], part)
            assert len(found) == row[part]["images"] == (split["split"] == part).sum()
            assert row[part]["accuracy"] == pytest.approx((found["true"] == found["predicted"]).mean())
            own = found.apply(lambda line: line[f"score:{line['true']}"], axis=1)
            assert row[part]["loss"] == pytest.approx(-np.log(own).mean(), rel=1e-3)
            assert row[part]["report"]["macro avg"]["f1-score"] == pytest.approx(row[part]["macro_f1"])
        assert row["val"]["loss"] == pytest.approx(float(trials[row["trial_id"]]["val_loss"]), rel=1e-3)
        assert 1 <= row["best_epoch_by_loss"] <= 3
        assert 1 <= row["best_epoch_by_accuracy"] <= 3
        assert f"{row['train']['accuracy']:.3f} │ {row['val']['accuracy']:.3f} │ {row['test']['accuracy']:.3f}" in shown
    assert "evaluating 2 of 2 strategies on 48 images" in shown


def test_the_verdict_is_about_the_predictions_and_shown(on_ray):
    folder, shown = on_ray
    summary = json.loads((folder / "summary.json").read_text())
    verdict, (first, second) = summary["verdict"], summary["strategies"]
    assert verdict["sentence"] in " ".join(shown.split())
    assert list(verdict["strategies"].values()) == [first["trial_id"], second["trial_id"]]
    assert verdict["reference"] == next(iter(verdict["strategies"]))
    (comparison,) = verdict["comparisons"]
    difference = comparison["differences"][verdict["metric"]]["value"]
    assert difference == pytest.approx(first["test"][verdict["metric"]] - second["test"][verdict["metric"]])
    right = [(found["true"] == found["predicted"]).to_numpy() for found in on_test_images(folder, first, second)]
    assert comparison["mcnemar"]["first"] == (right[0] & ~right[1]).sum()
    assert comparison["mcnemar"]["second"] == (right[1] & ~right[0]).sum()
    assert verdict["optimism"]["best"] == pytest.approx(summary["best"]["val"][verdict["metric"]])
    assert first["calibration"]["before"]["loss"] == pytest.approx(first["test"]["loss"])


def on_test_images(folder: Path, *rows: dict) -> list[pd.DataFrame]:
    return [predictions(folder, row["trial_id"], "test") for row in rows]


def test_the_test_set_is_opened_once_for_all_finalists(on_ray):
    folder, _ = on_ray
    (line,) = (folder / "state" / "test_openings.jsonl").read_text().splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    assert json.loads(line)["trials"] == [row["trial_id"] for row in summary["strategies"]]


def test_the_report_shows_samples(on_ray):
    page = (on_ray[0] / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 16


def test_mlflow_has_parent_children_curves_and_artifacts(on_ray):
    folder, _ = on_ray
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "small"]
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(parents) == 1
    assert len(children) == 4
    assert sorted(run.data.tags["outcome"] for run in children) == sorted(
        trial["outcome"] for trial in trials_of(folder)
    )
    for trial in trials_of(folder):
        (run,) = [run for run in children if run.data.tags["trial_id"] == trial["trial_id"]]
        history = client.get_metric_history(run.info.run_id, "val_macro_f1")
        assert [metric.step for metric in history] == list(range(1, int(trial["epochs"]) + 1))
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["strategies"]:
        (run,) = [run for run in children if run.data.tags["trial_id"] == row["trial_id"]]
        assert run.data.metrics["final_train_accuracy"] == row["train"]["accuracy"]
        assert run.data.metrics["final_test_loss"] == row["test"]["loss"]
    assert parents[0].data.tags["verdict"] == summary["verdict"]["sentence"]
    assert parents[0].data.metrics["test_accuracy_low"] == summary["test"]["accuracy"]["low"]
    assert parents[0].data.metrics.get("test_mcc_low") == summary["test"]["mcc"]["low"]  # it may have none
    assert parents[0].inputs.dataset_inputs[0].dataset.digest
    assert {"spec.yaml", "split.csv", "report.html"} <= {
        found.path for found in client.list_artifacts(parents[0].info.run_id)
    }


@pytest.mark.slow
def test_inline_and_ray_give_the_same_trials(on_ray, space, cache_dir, tmp_path):
    """Also: the same seed twice gives the same sweep."""
    folder, _ = sweep(space, tmp_path, cache_dir, "--inline")
    timeless = [
        [{key: value for key, value in trial.items() if key != "train_seconds"} for trial in trials_of(run)]
        for run in (on_ray[0], folder)
    ]
    assert timeless[0] == timeless[1]


def test_a_run_folder_is_never_overwritten(on_ray, space, cache_dir, tmp_path):
    folder, _ = on_ray
    command = [sys.executable, "-m", "sweep.run", str(space), "--out", str(folder.parent), "--name", "small"]
    done = subprocess.run(
        [*command, "--cache-dir", str(cache_dir)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert "is a folder with an earlier sweep; choose another --name or --out" in done.stderr
