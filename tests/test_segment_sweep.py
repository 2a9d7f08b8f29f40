"""A segmentation sweep from end to end, then a classifier sweep that looks at the lungs it found."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_models.phantom import CLASSES, draw, patient_drawings
from cxr_models.trial import TrialConfig
from cxr_models.unet import count_parameters
from tests.test_report import Page

ROOT = Path(__file__).parent.parent
SIDE = 32
SEGMENT = """\
name: lungs
task: segment
data: {{source: {data}, patient: '^(P\\d+)_'}}
objective: dice
search: {{algorithm: grid, trials: 2}}
space:
  backbone: unet
  unet_filters: 4
  unet_depth: 2
  image_side: 32
  mask_loss: [dice, both]
  augmentation: light
  learning_rate: 1e-2
  batch_size: 8
  epochs: 4
"""
CLASSIFY = """\
name: masked
data: {{source: {data}, patient: '^(P\\d+)_'}}
objective: accuracy
search: {{algorithm: grid, trials: 2}}
space:
  backbone: mobilenet_v2_0.35
  weights: none
  freeze: all
  image_side: 48
  lung_mask: [none, '{run}']
  epochs: 1
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Phantoms of two classes, some of them without a mask."""
    root = tmp_path_factory.mktemp("chests")
    for label in CLASSES[:2]:
        for patient in range(1, 21):
            number = patient + 100 * CLASSES.index(label)
            image, mask = draw(patient_drawings(0, number, label)[0], 48)
            for kind, pixels in (("images", image), ("masks", mask.astype(np.uint8))):
                if kind == "images" or patient < 20:
                    (root / label / kind).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(root / label / kind / f"P{number:04d}_1.png")
    return root


def sweep(space: str, folder: Path, *arguments: str) -> tuple[Path, str]:
    folder.mkdir(exist_ok=True)
    file = folder / "space.yaml"
    file.write_text(space)
    command = [sys.executable, "-m", "sweep.run", str(file), "--out", str(folder / "runs")]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--cache-dir", str(folder / "cache"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs", done.stdout


@pytest.fixture(scope="module")
def segmented(images, tmp_path_factory) -> tuple[Path, str]:
    runs, said = sweep(SEGMENT.format(data=images), tmp_path_factory.mktemp("segment"), "--inline")
    return runs / "lungs", said


def test_the_plan_says_what_the_trials_have(segmented):
    folder, said = segmented
    config = TrialConfig("unet", image_side=SIDE, unet_filters=4, unet_depth=2)
    assert f"{count_parameters(config, 1):,}" in said
    assert "images without a mask, which are left out: 2" in said
    with (folder / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [trial["outcome"] for trial in trials] == ["completed"] * 2
    assert {int(trial["trainable_parameters"]) for trial in trials} == {count_parameters(config, 1)}
    assert {trial["mask_loss"] for trial in trials} == {"dice", "both"}
    assert {"val_dice", "val_iou", "val_pixel_accuracy", "val_loss", "unet_filters", "lung_mask"} <= trials[0].keys()
    assert "val_accuracy" not in trials[0]


def test_the_test_figures_are_those_of_the_images(segmented):
    folder, said = segmented
    summary = json.loads((folder / "summary.json").read_text())
    table = pd.read_csv(folder / "masks.csv", keep_default_na=False)
    tested = table[table["split"] == "test"]
    for name in ("dice", "iou", "pixel_accuracy"):
        found = summary["test"][name]
        assert found["value"] == pytest.approx(tested[name].mean())
        assert found["low"] <= found["value"] <= found["high"]
        assert f"{name} {found['value']:.3f} (95 % interval" in said
    assert summary["best"]["val"]["dice"] == pytest.approx(table[table["split"] == "val"]["dice"].mean(), abs=1e-3)
    assert summary["task"] == "segment"
    assert set(table["split"]) == {"val", "test"}


def test_the_saved_model_finds_what_was_recorded(segmented, images):
    import keras

    folder, _ = segmented
    table = pd.read_csv(folder / "masks.csv", keep_default_na=False)
    model = keras.saving.load_model(folder / "best" / "model.keras", safe_mode=True)
    config = json.loads((folder / "best" / "config.json").read_text())
    assert (config["task"], config["channels"], config["image_side"]) == ("segment", 1, SIDE)
    for row in table[table["split"] == "test"].to_dict("records")[:3]:
        image = Image.open(images / row["image"]).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        truth = Image.open(images / row["image"].replace("images", "masks")).point(lambda level: 255 * (level > 0))
        truth = np.asarray(truth.resize((SIDE, SIDE), Image.Resampling.BOX)) >= 128
        (found,) = model.predict(np.asarray(image, np.float32)[None, ..., None], verbose=0)
        inside = found[..., 0] >= 0.5
        dice = 2 * (inside & truth).sum() / (inside.sum() + truth.sum())
        assert dice == pytest.approx(row["dice"], abs=0.02)


def test_the_report_shows_masks(segmented):
    folder, _ = segmented
    page = (folder / "report.html").read_text()
    table = pd.read_csv(folder / "masks.csv", keep_default_na=False)
    shown = table[table["overlay"] != ""]
    assert set(shown["split"]) == {"test"}
    assert page.count("data:image/png;base64") == len(shown) == len(list((folder / "best" / "overlays").iterdir()))
    assert "Test Dice" in page
    assert "Val accuracy" not in page


def test_the_verdict_is_about_the_test_images_and_shown(segmented):
    folder, said = segmented
    summary = json.loads((folder / "summary.json").read_text())
    verdict, test = summary["verdict"], summary["test"]
    assert verdict["sentence"].startswith(f"The final U-Net reaches Dice {test['dice']['value']:.3f} on ")
    assert {name: verdict["known"][name] for name in ("value", "low", "high")} == test["dice"]
    assert (verdict["images"], verdict["patients"]) == (test["images"], test["patients"])
    assert verdict["optimism"]["best"] == pytest.approx(summary["best"]["val"]["dice"])
    assert verdict["optimism"]["trials"] == 2
    assert verdict["comparisons"] == []
    assert verdict["sentence"] in " ".join(said.split())
    assert verdict["sentence"] in (folder / "report.html").read_text()


def test_nobody_is_told_of_freeze_strategies(segmented):
    folder, said = segmented
    shown, _, _ = Page(folder / "report.html").text.partition("spec.yaml, as resolved")
    assert "A U-Net of 4 filters and depth 2 has the highest validation Dice" in shown
    for text in (shown, said):
        assert "strategy" not in text
        assert "freeze" not in text.lower()
        assert "frozen layers" not in text
        assert "unet none" not in text


def test_mlflow_has_the_figures_the_pictures_and_the_model(segmented):
    folder, _ = segmented
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run = client.get_run(json.loads((folder / "summary.json").read_text())["mlflow_run_id"])
    assert {"test_dice", "test_iou", "best_val_dice"} <= run.data.metrics.keys()
    assert run.data.tags["task"] == "segment"
    assert run.data.tags["verdict"] == json.loads((folder / "summary.json").read_text())["verdict"]["sentence"]
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"masks.csv", "worst-1.png", "report.html"} <= kept
    assert int(client.get_model_version_by_alias("lungs", "champion").version) == 1


@pytest.mark.slow
def test_a_classifier_may_see_the_lungs_alone(segmented, images, tmp_path):
    earlier, _ = segmented
    # The images without a mask make the two splits differ: the U-Net has learned from masks of the test images.
    runs, said = sweep(CLASSIFY.format(data=images, run=earlier), tmp_path, "--inline")
    assert "lungs as found by" in said.replace("\n", " ")
    assert "warning: earlier_masks_saw_test: The U-Net that finds lungs" in said.replace("\n", " ")
    summary = json.loads((runs / "masked" / "summary.json").read_text())
    assert summary["trials"]["completed"] == 2
    assert any("The U-Net that finds lungs" in caution for caution in summary["verdict"]["warnings"])
    (source,) = summary["inputs"]
    assert source["lung_mask"] == str(earlier)
    assert source["mlflow_run_id"] == json.loads((earlier / "summary.json").read_text())["mlflow_run_id"]
    client = mlflow.MlflowClient(f"sqlite:///{runs}/masked/mlflow.db")
    tags = client.get_run(summary["mlflow_run_id"]).data.tags
    assert tags["input.lung_mask.sha256"] == source["sha256"]
    config = json.loads((runs / "masked" / "best" / "config.json").read_text())
    assert config["lung_mask"] == summary["best"]["config"]["lung_mask"]
    page = (runs / "masked" / "report.html").read_text()
    assert ("This model expects pixels" in page) == (config["lung_mask"] != "none")

    (masked,) = (tmp_path / "cache" / "pixels").glob("*masked.npy")
    plain = next(path for path in masked.parent.glob("*-48px-1ch.npy") if path.stem in masked.name)
    (found,) = (tmp_path / "cache" / "masks").glob("*.npy")
    seen, whole, lungs = (np.load(path) for path in (masked, plain, found))
    assert lungs.shape == (40, SIDE, SIDE, 1)
    for one, image, lung in zip(seen, whole, lungs, strict=True):
        scaled = np.asarray(Image.fromarray(lung[..., 0]).resize((48, 48), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(one[..., 0], np.where(scaled >= 128, image[..., 0], 0))
    assert 0 < (seen > 0).mean() < (whole > 0).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [pytest.param("", id="test set"), pytest.param(", split: {train: 0.8, val: 0.2}", id="no test set")],
)
def test_folds_of_a_segmentation(images, tmp_path, split):
    space = (
        SEGMENT.format(data=images)
        .replace("(P\\d+)_'}", f"(P\\d+)_', folds: 3{split}}}")
        .replace("epochs: 4", "epochs: 2")
    )
    assert "folds: 3" in space
    runs, said = sweep(space, tmp_path, "--inline")
    folder = runs / "lungs"
    summary = json.loads((folder / "summary.json").read_text())
    (row,) = summary["strategies"]
    masks = pd.read_csv(folder / "masks.csv")
    pool = pd.read_csv(folder / "split.csv").query("split == 'train'")
    validated = masks[masks["split"] == "val"].merge(pool[["path", "fold"]], left_on="image", right_on="path")
    assert sorted(validated["image"]) == sorted(pool["path"])
    by_fold = validated.groupby("fold")["dice"].mean()
    assert by_fold.tolist() == pytest.approx(row["by_fold"], abs=1e-5)
    assert row["best_val"] == pytest.approx(by_fold.mean(), abs=1e-5)
    assert (folder / "best" / "model.keras").is_file()
    assert bool(list((folder / "best" / "overlays").glob("*.png"))) == ("test" in summary) == (not split)
    assert '<table id="folds">' in (folder / "report.html").read_text()
    assert "the mean over 3 folds" in said
