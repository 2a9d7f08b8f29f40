"""Intervals know that patients own their images."""

import math

import numpy as np
import pytest

from cxr_models.intervals import Interval, known_within, mean_intervals, patient_intervals, patients_needed, resampled
from cxr_models.metrics import evaluate_further
from tests.test_metrics import CLASSES, random_case, scores_of


def test_a_patient_is_drawn_with_all_images_and_as_many_patients_as_there_are():
    patients = ["b", "a", "b", "c", "a", "b"]
    draws = np.concatenate(list(resampled(patients, 7, seed=0)), axis=1)
    assert draws.shape == (6, 7)
    assert (draws[0] == draws[2]).all()
    assert (draws[0] == draws[5]).all()
    assert (draws[1] == draws[4]).all()
    assert (draws[[0, 1, 3]].sum(axis=0) == 3).all()


def test_many_images_are_resampled_in_parts():
    patients = [str(k) for k in range(150_000)]
    parts = list(resampled(patients, 5, seed=0))
    assert [part.shape[1] for part in parts] == [2, 2, 1]


def test_the_value_lies_inside_and_is_that_of_all_images():
    labels, scores = random_case(0)
    found = patient_intervals(labels, scores, CLASSES, [str(i // 2) for i in range(200)], resamples=100)
    whole = evaluate_further(labels, scores, CLASSES)
    assert found.keys() == whole.keys()
    for name, interval in found.items():
        assert interval.value == whole[name]
        assert interval.low < interval.high
        # Resampling breaks bins up and lines errors up: a calibration error is larger then.
        assert interval.low < interval.value < interval.high or name == "ece"


def test_the_seed_decides():
    labels, scores = random_case(0, images=60)
    patients = [str(i // 3) for i in range(60)]
    first, again, other = (
        patient_intervals(labels, scores, CLASSES, patients, resamples=50, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first["loss"] != other["loss"]


def test_names_of_patients_do_not_matter():
    labels, scores = random_case(0, images=60)
    owner = np.repeat(np.arange(20), 3)
    named = [f"p{number:02}" for number in owner]
    assert patient_intervals(labels, scores, CLASSES, named, resamples=20) == patient_intervals(
        labels, scores, CLASSES, owner.tolist(), resamples=20
    )


def test_copies_of_an_image_add_nothing():
    """Four copies of each patient's image: by image the interval would halve, by patient it stays."""
    labels, scores = random_case(0, images=100)
    owner = np.repeat(np.arange(100), 4)
    copied = labels[owner], scores[owner], CLASSES
    by_patient, by_image = (
        patient_intervals(*copied, patients, resamples=300)["accuracy"]
        for patients in ([str(number) for number in owner], [str(image) for image in range(400)])
    )
    single = patient_intervals(labels, scores, CLASSES, [str(i) for i in range(100)], resamples=300)["accuracy"]
    assert by_patient.high - by_patient.low == pytest.approx(single.high - single.low, rel=1e-9)
    assert 1.7 < (by_patient.high - by_patient.low) / (by_image.high - by_image.low) < 2.3


def test_coverage():
    """Of simulated test sets of patients with their own difficulty, about 95 % have the truth inside."""
    generator = np.random.default_rng(0)
    sets, patients, images, inside = 80, 60, 4, 0
    for _ in range(sets):
        skill = generator.beta(3, 1, patients).repeat(images)  # mean 0.75
        labels = generator.integers(2, size=patients * images)
        right = generator.random(len(labels)) < skill
        owner = [str(number) for number in np.repeat(np.arange(patients), images)]
        scores = scores_of(np.where(right, labels, 1 - labels), 2)
        found = patient_intervals(labels, scores, CLASSES[:2], owner, resamples=100)["accuracy"]
        inside += found.low <= 0.75 <= found.high
    assert 70 <= inside < sets


def test_what_cannot_be_computed_has_no_bounds():
    labels, scores = np.zeros(6, int), random_case(0, images=6, classes=2)[1]
    found = patient_intervals(labels, scores, CLASSES[:2], list("abcdef"), resamples=10)["auroc"]
    assert all(math.isnan(bound) for bound in (found.value, found.low, found.high))


@pytest.mark.parametrize("patients", [6, 40])
def test_the_true_mean_lies_as_near_as_is_said_however_few_the_patients(patients):
    """Images of one patient resemble each other; the percentiles alone hold the truth less often."""
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(patients), 3)
    inside = between = 0
    for _ in range(300):
        values = generator.normal(size=patients)[owner] + generator.normal(size=len(owner))
        found = mean_intervals({"dice": values}, owner.tolist(), resamples=200)["dice"]
        inside += abs(found.value) <= known_within(found, patients)
        between += found.low <= 0 <= found.high
    assert 0.92 <= inside / 300 <= 0.98
    assert between <= inside


@pytest.mark.parametrize(("patients", "half"), [(2, 0.02), (6, 0.04), (6, 0.008), (300, 0.0101)])
def test_with_the_patients_needed_the_truth_lies_within(patients, half):
    found = Interval(0.9, 0.9 - half, 0.9 + half)
    needed = patients_needed(found, patients, 0.01)
    shrunk = half * math.sqrt(patients / needed * (needed - 1) / needed * patients / (patients - 1))
    assert known_within(Interval(0.9, 0.9 - shrunk, 0.9 + shrunk), needed) == pytest.approx(0.01)
    assert needed > patients


def test_patients_that_are_enough_are_all_that_is_needed():
    assert patients_needed(Interval(0.9, 0.895, 0.905), 50, 0.01) == 50


def test_patients_without_a_spread_tell_nothing():
    assert math.isnan(patients_needed(Interval(0.9, 0.9, 0.9), 10, 0.01))
    assert math.isnan(known_within(Interval(0.9, 0.9, 0.9), 10))
    assert math.isnan(known_within(Interval(0.9, 0.8, 1.0), 1))
    assert math.isnan(known_within(Interval(0.9, math.nan, math.nan), 10))
