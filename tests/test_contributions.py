"""What patients add makes up the difference, and counts as many patients as carry it."""

import numpy as np
import pytest
from scipy.stats import binomtest

from cxr_models.contributions import chance_of_signs, contributions, effective_number
from cxr_models.metrics import evaluate
from tests.test_comparison import CLASSES, images_of, scores_of


def predictions(classes: np.ndarray) -> np.ndarray:
    return np.log(0.85 * np.eye(3)[classes] + 0.05)


@pytest.mark.parametrize("metric", ["loss", "accuracy", "macro_f1", "balanced_accuracy", "auroc"])
def test_contributions_sum_to_the_difference(metric):
    generator = np.random.default_rng(0)
    labels, patients = images_of(generator, 200)
    one, other = scores_of(generator, labels, patients, (0.3, 0.0))
    found = contributions(labels, one, other, CLASSES, np.array(patients, int), metric)
    assert found.shape == (200, 3)
    assert np.count_nonzero(found, axis=1).max() == 1  # a patient has one class
    difference = evaluate(labels, one, CLASSES)[metric] - evaluate(labels, other, CLASSES)[metric]
    exact = metric in ("loss", "accuracy", "balanced_accuracy", "auroc")
    assert found.sum() == pytest.approx(difference, rel=1e-6 if exact else 0.05)
    reverse = contributions(labels, other, one, CLASSES, np.array(patients, int), metric)
    assert reverse == pytest.approx(-found)


@pytest.mark.parametrize("metric", ["loss", "macro_f1", "auroc"])
def test_only_patients_whose_images_differ_add_anything(metric):
    """Equal scores add nothing; of the area, what others' scores do to their place is far less."""
    generator = np.random.default_rng(0)
    labels, patients = images_of(generator, 200)
    (one,) = scores_of(generator, labels, patients, (0.0,))
    owners = np.array(patients, int)
    other = np.where((owners == 7)[:, None], np.roll(one, 1, axis=1), one)
    found = contributions(labels, one, other, CLASSES, owners, metric).sum(axis=1)
    assert np.abs(found).argmax() == 7
    assert effective_number(found) == pytest.approx(1.0, abs=0.05)
    assert not contributions(labels, one, one, CLASSES, owners, metric).any()


def test_patients_of_a_rare_class_count_more():
    labels = np.repeat([0, 1, 2], [50, 46, 4])
    one, other = labels.copy(), labels.copy()
    one[[0, 60, 97]] = other[[1, 61, 98]] = [1, 0, 0]
    found = contributions(labels, predictions(one), predictions(other), CLASSES, np.arange(100), "balanced_accuracy")
    assert found[[97, 98], 2] == pytest.approx([-1 / 12, 1 / 12])
    assert found[[0, 1], 0] == pytest.approx([-1 / 150, 1 / 150])
    assert effective_number(found.sum(axis=1)) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("metric", ["loss", "auroc"])
def test_what_is_undefined_is_made_up_of_nothing(metric):
    labels = np.array([0, 1, 2, 0])
    scores = predictions(labels)
    scores[0, 0] = -np.inf
    assert not contributions(labels, scores, predictions(labels), CLASSES, np.arange(4), metric).any()
    assert not contributions(labels, scores, scores, CLASSES, np.arange(4), metric).any()


@pytest.mark.parametrize(("shares", "expected"), [([], 0.0), ([0.0, 0.0], 0.0), ([2.0, -2.0, 0.0], 2.0), ([5.0], 1.0)])
def test_contributions_of_one_size_count_as_many_as_they_are(shares, expected):
    assert effective_number(np.array(shares)) == pytest.approx(expected)


@pytest.mark.parametrize(("for_one", "for_other"), [(2, 0), (6, 0), (5, 3), (9, 1), (14, 5), (40, 20)])
def test_of_equal_contributions_the_chance_of_signs_is_the_sign_test(for_one, for_other):
    shares = 0.01 * np.repeat([1.0, -1.0, 0.0], [for_one, for_other, 30])
    exact = binomtest(for_one, for_one + for_other).pvalue
    assert chance_of_signs(shares, seed=0) == pytest.approx(exact, abs=1e-9 if for_one + for_other <= 10 else 0.02)


def test_no_contributions_show_nothing():
    assert chance_of_signs(np.zeros(5), seed=0) == 1.0
