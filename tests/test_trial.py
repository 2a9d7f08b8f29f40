"""The vocabulary: valid once built, equal after JSON, named by content."""

import json
import math
from dataclasses import replace

import pytest

from cxr_models.trial import AXES, METRICS, EpochMetrics, Objective, Outcome, TrialConfig, TrialResult

CONFIG = TrialConfig("mobilenet_v2_0.35", freeze="all>stages:1", hidden_units=(1024, 512), learning_rate=3e-4, seed=7)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_norm", "on", "batch_norm must be one of frozen, affine, train, but got 'on'"),
        ("optimizer", "lion", "optimizer must be one of adam, adamw, rmsprop, sgd"),
        ("batch_size", 0, "batch_size must be at least 1, but got 0"),
        ("patience", -1, "patience must be at least 0, but got -1"),
        ("dropout", 1.0, r"dropout must lie in \[0, 1\), but got 1.0"),
        ("dropout", math.nan, "dropout must lie"),
        ("learning_rate", 0.0, "learning_rate must be above 0 and finite"),
        ("learning_rate", math.inf, "learning_rate must be above 0 and finite, but got inf"),
        ("weight_decay", -0.1, "weight_decay must be at least 0"),
        (
            "augmentation",
            "flip",
            "augmentation must be one of none, light, strong, wide, geometry, exposure, but got 'flip'",
        ),
        (
            "optimizer",
            "adam>lion",
            "must be one of adam, adamw, rmsprop, sgd, or one for each phase joined by",
        ),
        ("schedule", "linear", "schedule must be one of constant, cosine, plateau, exponential, or one for each phase"),
        ("warmup", 1.0, r"warmup must lie in \[0, 1\), but got 1.0"),
        ("label_smoothing", -0.1, r"label_smoothing must lie in \[0, 1\)"),
        ("layer_decay", 0.0, "layer_decay must lie above 0 and be at most 1, but got 0.0"),
        ("probe_share", 1.0, "probe_share must lie between 0 and 1, but got 1.0"),
        ("focal_gamma", -1.0, "focal_gamma must be at least 0 and finite, but got -1.0"),
        ("augmentation_strength", 0.0, "augmentation_strength must be above 0 and finite, but got 0.0"),
        ("taps", 0, "taps must be at least 1, but got 0"),
        ("augmented_views", -1, "augmented_views must be at least 0, but got -1"),
        ("hidden_units", (8, 0), r"hidden_units must each be at least 1, but got \[8, 0\]"),
    ],
)
def test_impossible_values(field, value, message):
    with pytest.raises(ValueError, match=message):
        TrialConfig(**{"backbone": "vanilla_cnn", field: value})


def test_several_depths_are_pooled_never_flattened():
    with pytest.raises(ValueError, match="taps above 1 need pooling average or max, but got taps 3 with flatten"):
        TrialConfig("vanilla_cnn", taps=3, pooling="flatten")


def test_a_phase_has_its_own_optimizer_schedule_and_rate():
    config = TrialConfig("x", optimizer="adam>rmsprop", schedule="plateau", learning_rate=0.1, phase_rate=0.5)
    assert [config.in_phase("optimizer", phase) for phase in (0, 1)] == ["adam", "rmsprop"]
    assert [config.in_phase("schedule", phase) for phase in (0, 1)] == ["plateau", "plateau"]
    assert [config.rate_in_phase(phase) for phase in (0, 1, 2)] == pytest.approx([0.1, 0.05, 0.025])
    config = TrialConfig("x", learning_rate=0.1, phase_rate="0.1>2")
    assert [config.rate_in_phase(phase) for phase in (0, 1, 2)] == pytest.approx([0.1, 0.01, 0.02])


@pytest.mark.parametrize("given", [0.0, "0.1>0", "0.1>", "much", "1>inf"])
def test_a_ratio_of_rates_is_above_0_in_each_phase(given):
    with pytest.raises(ValueError, match=f"phase_rate must be above 0 and finite, or one .*, but got {given!r}"):
        TrialConfig("x", phase_rate=given)


def test_without_augmentation_every_seed_sees_the_same_images():
    plain = TrialConfig("x")
    assert replace(plain, seed=3, horizontal_flip="random", augmentation_strength=2.0).views == plain.views
    light = replace(plain, augmentation="light")
    others = [{"seed": 3}, {"horizontal_flip": "random"}, {"augmentation_strength": 2.0}, {"augmentation": "strong"}]
    assert len({light.views, *(replace(light, **other).views for other in others)}) == 5


def test_a_configuration_survives_json():
    text = json.dumps(CONFIG.to_json())
    assert TrialConfig.from_json(json.loads(text)) == CONFIG
    assert tuple(CONFIG.to_json()) == AXES


def test_a_configuration_of_before_an_axis_existed_is_read_with_its_default():
    later = ("augmentation", "augmented_views")
    values = {name: value for name, value in CONFIG.to_json().items() if name not in later}
    assert TrialConfig.from_json(values) == CONFIG


def test_a_configuration_is_named_by_its_content():
    """The same in every process; every axis changes it."""
    assert TrialConfig("vanilla_cnn").digest == "811070a6"
    assert TrialConfig.from_json(CONFIG.to_json()).digest == CONFIG.digest
    others = {
        "backbone": "resnet50", "weights": "bundled", "image_side": 64, "freeze": "none", "batch_norm": "train",
        "pooling": "max", "taps": 2, "hidden_units": (8,), "dropout": 0.1, "output": "sigmoid", "optimizer": "sgd",
        "learning_rate": 1e-4, "weight_decay": 0.1, "batch_size": 8, "epochs": 3, "patience": 2,
        "phase_rate": 0.5, "probe_share": 0.5, "schedule": "cosine", "warmup": 0.1, "layer_decay": 0.5,
        "loss": "focal", "focal_gamma": 1.0, "label_smoothing": 0.1, "sampling": "balanced",
        "augmentation_strength": 2.0, "horizontal_flip": "random",
        "lung_mask": "dataset", "unet_filters": 8, "unet_depth": 3, "mask_loss": "dice",
        "class_weights": "balanced", "augmentation": "light", "augmented_views": 2, "seed": 1,
    }  # fmt: skip
    assert others.keys() == set(AXES)
    digests = {TrialConfig(**{"backbone": "vanilla_cnn", axis: value}).digest for axis, value in others.items()}
    assert len(digests | {TrialConfig("vanilla_cnn").digest}) == len(AXES) + 1


@pytest.mark.parametrize("mode", ["max", "min"])
def test_better(mode):
    objective = Objective("loss", mode)
    good, bad = (1.0, 0.0) if mode == "max" else (0.0, 1.0)
    assert objective.better(good, bad)
    assert not objective.better(bad, good)
    assert not objective.better(good, good)
    assert objective.better(bad, objective.worst)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_nan_beats_nothing(mode):
    objective = Objective("auroc", mode)
    assert not objective.better(math.nan, objective.worst)
    assert not objective.better(math.nan, math.nan)
    assert objective.better(0.5, math.nan)


def test_the_error_belongs_to_failed_trials_and_to_no_other():
    with pytest.raises(ValueError, match="exactly the failed trials carry an error"):
        TrialResult("a", CONFIG, Outcome.FAILED)
    with pytest.raises(ValueError, match="outcome completed with error='boom'"):
        TrialResult("a", CONFIG, Outcome.COMPLETED, error="boom")


def test_results_and_epochs_are_json():
    result = TrialResult("a", CONFIG, Outcome.STOPPED_EARLY, epochs=2, best_epoch=1, val={"loss": 0.5})
    written = json.loads(json.dumps(result.to_json()))
    assert written["outcome"] == "stopped_early"
    assert TrialConfig.from_json(written["config"]) == CONFIG
    values = dict.fromkeys(METRICS, 0.5)
    epoch = EpochMetrics("a", 1, 0, 1e-3, values, values, 0.1, 10.0)
    for each in (epoch, replace(epoch, folds=(values, values), ended_ms=1_800_000_000_123)):
        assert EpochMetrics.from_json(json.loads(json.dumps(each.to_json()))) == each


def test_an_epoch_that_an_earlier_version_wrote_down_is_read():
    values = dict.fromkeys(METRICS, 0.5)
    written = EpochMetrics("a", 1, 0, 1e-3, values, values, 0.1, 10.0).to_json()
    del written["ended_ms"]
    assert EpochMetrics.from_json(written).ended_ms == 0
