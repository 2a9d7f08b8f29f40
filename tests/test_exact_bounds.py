"""A figure of exactly 1 or 0 has an interval too: one that knows how few patients it rests on."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binomtest

from cxr_models.exact_bounds import TAIL, share_bounds, worst_mean
from cxr_models.intervals import mean_intervals, patient_intervals
from tests.test_metrics import CLASSES, scores_of


def intervals(labels, predicted, patients=None, *, classes: int = 3, resamples: int = 60):
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    owners = [str(image) for image in (range(len(labels)) if patients is None else patients)]
    return patient_intervals(
        labels, scores_of(predicted, classes), CLASSES[:classes], owners, resamples=resamples, seed=len(labels)
    )


@pytest.mark.parametrize(("right", "patients"), [(12, 12), (0, 5), (9, 30)])
def test_a_share_of_whole_patients_has_the_exact_binomial_interval(right, patients):
    exact = binomtest(right, patients).proportion_ci(method="exact")
    assert share_bounds(right / patients, patients) == pytest.approx((exact.low, exact.high))


def test_no_patient_tells_nothing():
    assert all(map(math.isnan, share_bounds(1.0, 0)))


def test_no_figure_of_a_test_set_without_an_error_is_certain():
    labels = np.repeat([0, 1, 2], 12)
    found = intervals(labels, labels)
    for name in ("accuracy", "macro_f1", "balanced_accuracy", "auroc", "macro_precision", "macro_specificity"):
        assert 0.7 < found[name].low < found[name].value == found[name].high == 1.0, name
    for name in CLASSES[:3]:
        assert found[f"recall/{name}"].low == pytest.approx(TAIL ** (1 / 12))
        assert found[f"specificity/{name}"].low == pytest.approx(TAIL ** (1 / 24))
        assert found[f"precision/{name}"].low == pytest.approx(TAIL ** (1 / 12))
        assert found[f"auroc/{name}"].low == pytest.approx(TAIL ** (1 / 12))
    assert found["accuracy"].low == pytest.approx(TAIL ** (1 / 36))
    assert found["balanced_accuracy"].low == pytest.approx(found["accuracy"].low)  # the classes are equally large
    assert math.isnan(found["kappa"].low)  # nothing can be said of it


def test_images_of_one_patient_are_no_further_evidence():
    labels = np.repeat([0, 1, 2], 12)
    alone, many = intervals(labels, labels), intervals(labels.repeat(5), labels.repeat(5), np.arange(36).repeat(5))
    for name, bounds in alone.items():
        assert (many[name].low, many[name].high) == pytest.approx((bounds.low, bounds.high), nan_ok=True), name
    single = intervals(labels, labels, np.zeros(36, int))
    assert (single["accuracy"].low, single["accuracy"].high) == pytest.approx((TAIL, 1.0))
    assert math.isnan(single["loss"].low)


def test_bounds_of_a_constant_predictor_hold_its_figures():
    labels = np.repeat([0, 1, 2], 20)
    found = intervals(labels, np.zeros(60, int))
    recall = [found[f"recall/{name}"] for name in CLASSES[:3]]
    assert [each.value for each in recall] == [1.0, 0.0, 0.0]
    assert [each.low for each in recall] == pytest.approx([TAIL ** (1 / 20), 0.0, 0.0])
    assert [each.high for each in recall] == pytest.approx([1.0, 1 - TAIL ** (1 / 20), 1 - TAIL ** (1 / 20)])
    assert found["balanced_accuracy"].low < 1 / 3 < found["balanced_accuracy"].high
    assert math.isnan(found[f"precision/{CLASSES[1]}"].low)  # of no image at all


def test_where_resamples_differ_the_bootstrap_stays():
    labels = np.repeat([0, 1, 2], 12)
    wrong_once = labels.copy()
    wrong_once[0] = 1
    found, whole = intervals(labels, wrong_once, resamples=400), intervals(labels, labels)
    assert found["accuracy"].low == pytest.approx(33 / 36, abs=0.03)  # of resamples, 2.5 % hold it four times or more
    assert found["accuracy"].high == 1.0
    # An error more never makes the interval of a macro figure much narrower.
    for name in ("accuracy", "balanced_accuracy"):
        assert whole[name].low > found[name].low - 0.02


def test_means_over_images_have_bounds_too():
    found = mean_intervals({"dice": np.ones(30)}, np.repeat(list("abc"), 10).tolist())["dice"]
    assert (found.value, found.low, found.high) == pytest.approx((1.0, TAIL ** (1 / 3), 1.0))


@pytest.mark.parametrize("patients", [(12, 12, 12), (2, 30), (1, 5, 5, 200), (7,), (0.5, 3.5)])
def test_the_worst_mean_is_the_smallest_that_the_patients_allow(patients):
    """Against a general optimiser."""
    counts = np.array(patients)
    room = {"type": "ineq", "fun": lambda p: counts @ np.log(p) - math.log(TAIL)}
    found = minimize(np.mean, np.full(len(counts), 0.999), bounds=[(1e-9, 1)] * len(counts), constraints=[room])
    assert worst_mean(patients) == pytest.approx(found.fun, abs=1e-4)


@pytest.mark.parametrize(
    ("truth", "images", "names"),
    [
        (0.9, 1, ("recall/COVID", "accuracy", "balanced_accuracy", "macro_f1")),
        (0.95, 1, ("recall/COVID", "accuracy", "balanced_accuracy", "macro_f1")),
        (0.99, 1, ("recall/COVID", "accuracy", "balanced_accuracy", "macro_f1")),
        (0.95, 3, ("recall/COVID",)),
        (0.99, 3, ("recall/COVID", "accuracy", "balanced_accuracy", "macro_f1")),
    ],
)
def test_coverage_of_few_patients(truth, images, names):
    """Twelve patients a class, whose images are recognised at rates of their own: the truth is inside.

    A recall of 0.95 is seen as 1 in half of the test sets with one image a patient; a bootstrap alone misses it there.
    """
    generator = np.random.default_rng(0)
    sets, inside = 150, dict.fromkeys(names, 0)
    labels, owner = np.repeat([0, 1], 12 * images), np.repeat(np.arange(24), images)
    for _ in range(sets):
        skill = generator.beta(10 * truth, 10 * (1 - truth), 24)[owner]
        predicted = np.where(generator.random(len(labels)) < skill, labels, 1 - labels)
        found = intervals(labels, predicted, owner, classes=2, resamples=100)
        for name in inside:
            inside[name] += found[name].low <= truth <= found[name].high
    assert min(inside.values()) / sets >= 0.93, inside
