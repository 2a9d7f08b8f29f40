"""One temperature, fitted on other images, makes probabilities believable and changes no predicted class."""

import numpy as np
import pytest

from cxr_models.calibration import TEMPERATURES, calibrate, fit_temperature, tempered
from cxr_models.metrics import evaluate_further

CLASSES = ("a", "b", "c")


def honest(seed: int, images: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the very probabilities that are given as scores."""
    generator = np.random.default_rng(seed)
    logits = 1.5 * generator.normal(size=(images, 3))
    scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    labels = (generator.random((images, 1)) > np.exp(scores).cumsum(axis=1)).sum(axis=1)
    return labels, scores.astype(np.float32)


@pytest.mark.parametrize("planted", [0.5, 1.0, 2.5])
def test_the_planted_temperature_is_found(planted):
    labels, scores = honest(0)
    assert fit_temperature(labels, scores * planted) == pytest.approx(planted, rel=0.08)


def test_a_network_too_sure_of_itself_is_calibrated_on_images_it_was_not_fitted_on():
    (labels, scores), (test_labels, test_scores) = honest(1), honest(2)
    sure, test_sure = (tempered(each, 1 / 2.5) for each in (scores, test_scores))
    found = calibrate((labels, sure), (test_labels, test_sure))
    assert found.temperature == pytest.approx(2.5, rel=0.08)
    assert found.before["ece"] > 0.15
    assert found.after["ece"] < 0.03
    assert found.after["loss"] < found.before["loss"]
    assert found.after["brier"] < found.before["brier"]
    assert found.before["loss"] == pytest.approx(evaluate_further(test_labels, test_sure, CLASSES)["loss"])


def test_no_predicted_class_changes():
    labels, scores = honest(3, 500)
    for temperature in (0.3, 4.0):
        changed = tempered(scores, temperature)
        assert np.exp(changed).sum(axis=1) == pytest.approx(1.0)
        assert (changed.argsort(axis=1) == scores.astype(np.float64).argsort(axis=1)).all()
        before, after = (evaluate_further(labels, each, CLASSES) for each in (scores, changed))
        assert before["macro_f1"] == after["macro_f1"]


def test_two_classes_keep_the_order_of_their_images():
    labels, scores = honest(4, 500)
    two = np.log(np.exp(scores[:, :2]) / np.exp(scores[:, :2]).sum(axis=1, keepdims=True))
    before, after = (evaluate_further(labels % 2, each, ("a", "b")) for each in (two, tempered(two, 3.0)))
    assert before["auroc"] == pytest.approx(after["auroc"])
    assert before["auprc"] == pytest.approx(after["auprc"])


def test_images_without_an_error_give_the_lowest_temperature_not_zero():
    labels = np.arange(30) % 3
    scores = np.log(np.eye(3)[labels] * 0.7 + 0.1)
    assert fit_temperature(labels, scores) == pytest.approx(TEMPERATURES[0], rel=0.1)
    assert np.isfinite(tempered(scores, TEMPERATURES[0])).all()
