"""The studies' ways of fine-tuning, on real X-rays with real ImageNet weights."""

import csv
import html
import json

import pandas as pd
import pytest

from sweep.readback import read_epochs
from sweep.record import RunFolder
from sweep.run import DONE, main

pytestmark = pytest.mark.slow
WEIGHTS = "mobilenet_v2_0.35_224_imagenet_notop.weights.h5"

PLAIN = {
    "pooling": "average",
    "hidden_units": [],
    "dropout": 0.0,
    "class_weights": "none",
    "augmentation": "none",
    "phase_rate": 0.1,
    "learning_rate": 1e-3,
}
LARGE = {"pooling": "flatten", "hidden_units": [1024, 512]}
HIDDEN = {"hidden_units": [128], "dropout": 0.5}
LIGHT = {"class_weights": "balanced", "augmentation": "light"}
STRONG = {"class_weights": "balanced", "augmentation": "strong"}
THEN = {"optimizer": "adam>rmsprop", "schedule": "constant>plateau", "phase_rate": 0.3}
# R1: three depths and everything, behind a pooled and a flattened map. R4: three depths with a hidden layer. R5: class
# weights, augmentation, the head first and then the last layers, with Adam and with RMSprop after it.
POINTS = [
    *({"freeze": freeze} for freeze in ("all", "convs:1", "convs:2")),
    *({"freeze": freeze, **LARGE} for freeze in ("all", "convs:1", "convs:2")),
    {"freeze": "none", **LARGE, "learning_rate": 3e-4},
    *({"freeze": freeze, **HIDDEN} for freeze in ("all", "first:135")),
    {"freeze": "none", **HIDDEN, "learning_rate": 3e-4},
    {"freeze": "all>last:100", **LIGHT, "optimizer": "adam", "schedule": "constant"},
    {"freeze": "all>last:50", **LIGHT},
    {"freeze": "all>last:100", **STRONG, **THEN},
    {"freeze": "all>stages:1", **STRONG, "phase_rate": 1.0},
]
STUDIES = """\
name: studies
data: {data}
objective: macro_f1
search:
  algorithm: tpe
  trials: 14
  fixed: {points}
space:
  backbone: mobilenet_v2_0.35
  weights: {weights}
  image_side: 128
  freeze: [all, "convs:1", "convs:2", "first:135", "all>last:50", "all>last:100", "all>stages:1", none]
  batch_norm: frozen
  pooling: [average, flatten]
  hidden_units: [[], [128], [1024, 512]]
  dropout: [0.0, 0.5]
  optimizer:
    choices: [adam]
    when: [{{if: {{freeze: "all>last:100"}}, choices: [adam, "adam>rmsprop"]}}]
  schedule:
    choices: [constant]
    when: [{{if: {{freeze: "all>last:100"}}, choices: [constant, "constant>plateau"]}}]
  phase_rate: [0.1, 0.3, 1.0]
  learning_rate: {{low: 1e-4, high: 1e-3, log: true}}
  class_weights: [none, balanced]
  augmentation: [none, light, strong]
  batch_size: 32
  epochs: 8
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, real_data) -> RunFolder:
    folder = tmp_path_factory.mktemp("studies")
    space = folder / "studies.yaml"
    points = json.dumps([PLAIN | point for point in POINTS])
    weights = real_data / "weights" / WEIGHTS
    space.write_text(STUDIES.format(points=points, data=real_data / "data" / "cxr3", weights=weights))
    assert main([str(space), "--out", str(folder), "--cache-dir", str(folder / "cache")]) == DONE
    return RunFolder(folder / "studies")


def test_no_validation_loss_explodes_where_batch_norms_are_frozen(run):
    curves = read_epochs(run.epoch_record)
    assert len(curves) == 14
    highest = {trial: max(metrics.val["loss"] for metrics in epochs) for trial, epochs in curves.items()}
    assert max(highest.values()) <= 10, highest


def test_no_validation_accuracy_is_stuck_at_the_share_of_a_class(run):
    """A constant predictor has its class's share as accuracy; no trial ends as one, or stays one for three epochs."""
    split = pd.read_csv(run.split)
    shares = split[split["split"] == "val"]["label"].value_counts(normalize=True)
    for trial, epochs in read_epochs(run.epoch_record).items():
        constant = [bool((abs(shares - metrics.val["accuracy"]) < 1e-9).any()) for metrics in epochs]
        assert not constant[-1], trial
        assert not any(all(constant[start : start + 3]) for start in range(len(constant) - 2)), trial


def test_every_strategy_learns_and_is_evaluated(run):
    summary = json.loads(run.summary.read_text())
    assert len(summary["strategies"]) == 8
    for row in summary["strategies"]:
        assert row["test"]["accuracy"] > 0.6, row["freeze"]
        assert row["test"]["images"] == summary["test"]["images"]
    with run.trials.open() as file:
        assert {row["outcome"] for row in csv.DictReader(file)} == {"completed"}


def test_the_audit_the_split_and_the_verdict_are_told(run):
    """On the images of DarkCovidNet: 806 people own the 1,124 X-rays, 21 of them in both NIH classes."""
    summary = json.loads(run.summary.read_text())
    split = pd.read_csv(run.split)
    assert (len(split), split["patient"].nunique()) == (1124, 806)
    assert split.groupby("patient")["split"].nunique().max() == 1
    findings = {finding["name"]: finding for finding in summary["audit"]}
    assert findings["patient_in_two_classes"]["evidence"].startswith("21 patients of 806 ")
    assert findings["class_follows_from_size"]["severity"] == "warning"
    verdict = summary["verdict"]
    assert any("The class follows from the size of the files" in caution for caution in verdict["warnings"])
    assert len(verdict["comparisons"]) == 8 * 7 / 2
    for row in verdict["comparisons"]:
        found = row["differences"]["macro_f1"]
        assert found["low"] <= found["value"] <= found["high"]
        assert (row["better"] is not None) == (found["p_holm"] <= verdict["alpha"])
    own = [row for row in verdict["comparisons"] if row["first"] == verdict["reference"]]
    assert ("cannot tell" in verdict["sentence"]) == any(row["better"] is None for row in own)
    assert ("is better than" in verdict["sentence"]) == any(row["better"] for row in own)
    page = html.unescape(run.report.read_text().replace("<code>", "`").replace("</code>", "`"))
    assert verdict["sentence"] in page
