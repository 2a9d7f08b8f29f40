"""Choosing the best of equal trials flatters it by as much as is estimated; a trial that is better is not corrected."""

import numpy as np
import pytest

from cxr_models.metrics import evaluate
from cxr_models.selection import LEADERS, mean_optimism, selection_optimism

CLASSES = ("a", "b", "c")
PATIENTS = [str(k // 2) for k in range(240)]


def trials_of(seed: int, accuracies: list[float], metric: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels, and the scores of trials with these true accuracies, the best by the metric first."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=len(PATIENTS))
    found = []
    for accuracy in accuracies:
        right = generator.random(len(labels)) < accuracy
        predicted = np.where(right, labels, (labels + generator.integers(1, 3, len(labels))) % 3)
        found.append(np.log(np.eye(3)[predicted] * 0.85 + 0.05))
    sign = -1 if metric == "loss" else 1
    return labels, sorted(found, key=lambda scores: -sign * evaluate(labels, scores, CLASSES)[metric])


@pytest.mark.parametrize("number", [2, 20])
def test_the_best_of_equal_trials_is_corrected_to_what_all_of_them_are(number):
    found = []
    for seed in range(30):
        labels, trials = trials_of(seed, [0.8] * number, "accuracy")
        found.append(selection_optimism(labels, trials, CLASSES, PATIENTS, "accuracy", "max", resamples=60, seed=seed))
    assert np.mean([each.best for each in found]) > 0.81
    assert np.mean([each.corrected for each in found]) == pytest.approx(0.8, abs=0.015)


def test_of_more_trials_the_best_is_flattered_more():
    gains: dict[int, list[float]] = {2: [], 30: []}
    for number, found in gains.items():
        for seed in range(10):
            labels, trials = trials_of(seed, [0.8] * number, "macro_f1")
            chosen = selection_optimism(labels, trials, CLASSES, PATIENTS, "macro_f1", "max", resamples=50)
            found.append(chosen.gain)
    assert np.mean(gains[30]) > 1.5 * np.mean(gains[2])


def test_a_trial_that_is_far_better_owes_nothing_to_the_choice():
    labels, trials = trials_of(0, [0.95, 0.6, 0.6, 0.6], "accuracy")
    found = selection_optimism(labels, trials, CLASSES, PATIENTS, "accuracy", "max")
    assert found.best == evaluate(labels, trials[0], CLASSES)["accuracy"]
    assert found.gain < 0.01
    assert found.trials == 4


def test_all_trials_are_counted_though_the_weak_are_not_chosen_from_again():
    labels, trials = trials_of(0, [0.8] * LEADERS + [0.4] * 10, "accuracy")
    found = selection_optimism(labels, trials, CLASSES, PATIENTS, "accuracy", "max", resamples=20)
    leading = selection_optimism(labels, trials[:LEADERS], CLASSES, PATIENTS, "accuracy", "max", resamples=20)
    assert (found.trials, leading.trials) == (LEADERS + 10, LEADERS)
    assert found.gain == leading.gain


def test_the_best_of_losses_is_the_lowest():
    labels, trials = trials_of(0, [0.8] * 12, "loss")
    found = selection_optimism(labels, trials, CLASSES, PATIENTS, "loss", "min")
    assert found.corrected > found.best
    assert found.gain == found.corrected - found.best


def test_resamples_that_leave_nobody_out_are_not_counted():
    labels, scores = np.array([0, 1]), np.log(np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]))
    found = selection_optimism(labels, [scores, scores[::-1]], CLASSES, ["p", "q"], "accuracy", "max", resamples=40)
    assert (found.best, found.corrected, found.gain) == (1.0, 1.0, 0.0)


def test_of_a_mean_over_images_it_is_the_same():
    """Accuracy is the mean of which images are right."""
    labels, trials = trials_of(0, [0.8] * 5, "accuracy")
    classified = selection_optimism(labels, trials, CLASSES, PATIENTS, "accuracy", "max", resamples=50)
    right = [(scores.argmax(axis=1) == labels).astype(float) for scores in trials]
    found = mean_optimism(right, PATIENTS, "max", resamples=50)
    assert (found.trials, found.best) == (classified.trials, pytest.approx(classified.best))
    assert found.corrected == pytest.approx(classified.corrected)
    assert found.gain == pytest.approx(classified.gain) != 0


def test_with_folds_the_best_is_the_mean_over_them():
    labels, trials = trials_of(0, [0.8] * 6, "macro_f1")
    folds = np.arange(len(labels)) // 80
    found = selection_optimism(labels, trials, CLASSES, PATIENTS, "macro_f1", "max", folds=folds)
    by_fold = [evaluate(labels[folds == k], trials[0][folds == k], CLASSES)["macro_f1"] for k in range(3)]
    assert found.best == pytest.approx(np.mean(by_fold))
    values = np.random.default_rng(0).random(240)
    means = mean_optimism([values, values - 0.1], PATIENTS, "max", folds=np.arange(240) // 200)
    assert means.best == pytest.approx((values[:200].mean() + values[200:].mean()) / 2)


def test_what_a_macro_figure_loses_on_fewer_patients_is_not_blamed_on_the_choice():
    """Of a rare class hardly anyone is left out: macro F1 is another one there, whichever trial is chosen."""
    generator = np.random.default_rng(0)
    labels = np.array([0] * 3 + [1] * 60 + [2] * 57)
    patients = [str(k) for k in range(120)]
    right = generator.random(120) < 0.8
    predicted = np.where(right, labels, (labels + 1) % 3)
    best = np.log(np.eye(3)[predicted] * 0.85 + 0.05)
    far_worse = np.log(np.eye(3)[(labels + 1) % 3] * 0.85 + 0.05)
    found = selection_optimism(labels, [best, far_worse], CLASSES, patients, "macro_f1", "max")
    assert found.gain == 0.0
    assert found.corrected == found.best
