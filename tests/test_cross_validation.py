"""A sweep with folds from end to end: what it goes by are predictions of trainings that had not seen the images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_models.metrics import evaluate
from cxr_models.trial import BEST_WEIGHTS
from sweep.cross_validation import HeldOut
from tests import layouts

ROOT = Path(__file__).parent.parent
FOLDS, REPEATS = 3, 2
SPACE = """\
name: folded
data: {{source: {data}, folds: 3, repeats: 2{more}}}
objective: macro_f1
search: {{algorithm: grid, trials: 4, halving: {{grace_epochs: 1}}}}
space:
  backbone: mobilenet_v2_0.35
  weights: bundled
  freeze: [all, "convs:1"]
  image_side: 32
  learning_rate: [1e-2, 1e-3]
  epochs: 2
"""


pytestmark = pytest.mark.slow


def sweep(folder: Path, more: str = "") -> tuple[Path, str]:
    data = layouts.nested(folder / "data", images=40)
    (folder / "space.yaml").write_text(SPACE.format(data=data, more=more))
    command = [sys.executable, "-m", "sweep.run", str(folder / "space.yaml"), "--inline"]
    arguments = ["--out", str(folder / "runs"), "--cache-dir", str(folder / "cache")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "folded", done.stdout


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return sweep(tmp_path_factory.mktemp("folded"))


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_the_split_file_tells_the_fold_of_each_image(folded: tuple[Path, str]) -> None:
    split = pd.read_csv(folded[0] / "split.csv")
    assert [*split.columns] == ["path", "label", "patient", "split", "pixels", "fold_1", "fold_2"]
    assert {*split["split"]} == {"train", "test"}
    pool = split[split["split"] == "train"]
    assert split[split["split"] == "test"][["fold_1", "fold_2"]].isna().all().all()
    for column in ("fold_1", "fold_2"):
        assert {*pool[column]} == {1, 2, 3}
        assert pool.groupby("patient")[column].nunique().max() == 1


def test_a_trial_ranks_by_the_mean_over_its_folds(folded: tuple[Path, str]) -> None:
    folder, said = folded
    summary = summary_of(folder)
    assert summary["data"]["folds"] == FOLDS
    for row in summary["strategies"]:
        assert len(row["by_fold"]) == FOLDS * REPEATS
        assert row["best_val"] == pytest.approx(np.mean(row["by_fold"]))
        assert row["val"]["macro_f1"] == pytest.approx(row["best_val"])
        assert "train" not in row
        assert not (folder / "state" / "trials" / row["trial_id"] / BEST_WEIGHTS).exists()
    assert "the mean over 3 folds, dealt 2 times: 6 trainings a trial" in said


def test_the_predictions_kept_are_those_of_the_held_out_images(folded: tuple[Path, str]) -> None:
    folder, _ = folded
    summary, table = summary_of(folder), pd.read_parquet(folder / "predictions.parquet")
    split = pd.read_csv(folder / "split.csv").set_index("path")
    classes = summary["data"]["classes"]
    for row in summary["strategies"]:
        own = table[(table["trial_id"] == row["trial_id"]) & (table["fitted_on"] == "other folds")]
        assert {*own["split"]} == {"val"}
        assert own.groupby("image").size().eq(REPEATS).all()
        assert {*own["image"]} == {*split[split["split"] == "train"].index}
        for repeat in range(1, REPEATS + 1):
            dealt = own[own["repeat"] == repeat].set_index("image")["fold"].astype(int)
            assert (dealt == split.loc[dealt.index, f"fold_{repeat}"]).all()
        values = []
        for _, rows in own.groupby(["repeat", "fold"]):
            labels = np.array([classes.index(name) for name in rows["true"]])
            scores = np.log(rows[[f"score:{name}" for name in classes]].to_numpy())
            values.append(evaluate(labels, scores, classes)["macro_f1"])
        assert values == pytest.approx(row["by_fold"])
    tested = table[table["fitted_on"] == "all folds"]
    assert json.loads((folder / "best" / "config.json").read_text())["fitted_on"] == "all folds"
    assert {*tested["split"]} == {"test"}
    assert tested["fold"].isna().all()


def test_the_report_shows_each_fold(folded: tuple[Path, str]) -> None:
    page = (folded[0] / "report.html").read_text()
    assert '<table id="folds">' in page
    assert "Validation figures are means over the folds" in page
    assert "trained again, on the images of all folds together" in page
    trials = pd.read_csv(folded[0] / "trials.csv")
    assert trials["val_macro_f1"].notna().all()


def test_without_a_test_set_the_figures_are_those_of_the_folds(tmp_path: Path) -> None:
    folder, said = sweep(tmp_path, ", split: {train: 0.8, val: 0.2}")
    summary = summary_of(folder)
    assert "test" not in summary
    assert "the images it was chosen by" in said
    assert (folder / "best" / "model.keras").is_file()
    page = (folder / "report.html").read_text()
    assert "This sweep has folds only" in page
    assert "Validation set, class by class" in page


def test_absent_predictions_are_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"expected the held-out predictions of every fold in .*validation.npz"):
        HeldOut.read(tmp_path / "validation.npz")
