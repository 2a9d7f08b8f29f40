"""Labels and scores -> metrics. Every figure of an evaluation comes from one set of predictions.

Scores are log-probabilities: a loss computed from probabilities saturates where the network is most wrong.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; NaN bounds where it cannot be computed."""

    value: float
    low: float
    high: float


def confusion_matrix(labels: IntArray, scores: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """Images by true class (rows) and predicted class (columns), (classes, classes).

    Args:
        labels: (images,) true class.
        scores: (images, classes) log-probabilities; the first of equal ones is the prediction.
        weights: (images,) how often each image counts, once by default.
    """
    classes = scores.shape[1]
    cells = labels.astype(np.int64) * classes + scores.argmax(axis=1)
    counts = np.ones(len(labels)) if weights is None else weights
    return np.bincount(cells, counts, minlength=classes * classes).astype(float).reshape(classes, classes)


def evaluate(
    labels: IntArray, scores: FloatArray, classes: Sequence[str], weights: FloatArray | None = None
) -> dict[str, float]:
    """The metrics of `trial.METRICS` and `recall/<class>`.

    Macro figures are means over the classes present in the labels; a class never predicted has f1 and recall 0. The
    area under the ROC curve is one class against the rest, averaged over the classes.

    Args:
        labels: (images,) true class as an index into `classes`.
        scores: (images, classes) log-probabilities.
        classes: names of the classes.
        weights: (images,) how often each image counts, once by default.
    """
    counts = np.ones(len(labels)) if weights is None else weights
    matrix = confusion_matrix(labels, scores, counts)
    hits, actual, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hits / actual
        f1 = np.where(actual > 0, 2 * hits / (actual + predicted), np.nan)
    return {
        "loss": float(-(counts * scores[np.arange(len(labels)), labels]).sum() / counts.sum()),
        "accuracy": float(hits.sum() / matrix.sum()),
        "macro_f1": float(np.nanmean(f1)),
        "balanced_accuracy": float(np.nanmean(recall)),
        "auroc": _macro_auroc(labels, scores, counts),
        **{f"recall/{name}": float(value) for name, value in zip(classes, recall, strict=True)},
    }


def _macro_auroc(labels: IntArray, scores: FloatArray, counts: FloatArray) -> float:
    """Mean one-against-rest area under the ROC curve; NaN if scores are not finite or one class only is present."""
    if not np.isfinite(scores).all():
        return float("nan")
    areas = [_auroc(labels == k, scores[:, k], counts) for k in range(scores.shape[1])]
    defined = [area for area in areas if not np.isnan(area)]
    return float(np.mean(defined)) if defined else float("nan")


def _auroc(positive: NDArray[np.bool_], scores: FloatArray, counts: FloatArray) -> float:
    """How often a positive image scores above a negative one, equal scores counting half (Hanley and McNeil, 1982).

    The bootstrap asks for it thousands of times; scikit-learn's checks would take most of a sweep's last minute.
    """
    _, rank = np.unique(scores, return_inverse=True)
    positives, negatives = (np.bincount(rank, np.where(side, counts, 0.0)) for side in (positive, ~positive))
    below = np.cumsum(negatives) - negatives / 2
    pairs = positives.sum() * negatives.sum()
    return float((positives * below).sum() / pairs) if pairs else float("nan")


def patient_intervals(
    labels: IntArray,
    scores: FloatArray,
    classes: Sequence[str],
    patients: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Metrics with percentile bootstrap intervals that resample patients, not images (Efron and Tibshirani, 1993).

    Images of one patient resemble each other; drawing images as if they were independent gives intervals that are
    too narrow.

    Args:
        labels: (images,) true class as an index into `classes`.
        scores: (images, classes) log-probabilities.
        classes: names of the classes.
        patients: (images,) patient of each image.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    draws: dict[str, list[float]] = {}
    for weights in _resampled(patients, resamples, seed):
        for name, value in evaluate(labels, scores, classes, weights).items():
            draws.setdefault(name, []).append(value)
    return {
        name: Interval(value, *_percentiles(draws[name])) for name, value in evaluate(labels, scores, classes).items()
    }


def mean_intervals(
    values: Mapping[str, FloatArray], patients: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Means over images, with intervals as those of `patient_intervals`.

    Args:
        values: name -> (images,) figure of each image.
        patients: (images,) patient of each image.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    draws = list(_resampled(patients, resamples, seed))
    return {
        name: Interval(float(own.mean()), *_percentiles([float(np.average(own, weights=one)) for one in draws]))
        for name, own in values.items()
    }


def _resampled(patients: Sequence[str], resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each image, (images,), is drawn with its patient, for each bootstrap sample."""
    _, owner = np.unique(np.asarray(patients), return_inverse=True)
    number = int(owner.max()) + 1
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = np.bincount(generator.integers(number, size=number), minlength=number)
        yield drawn[owner].astype(float)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return float("nan"), float("nan")
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)


def classification_report(labels: IntArray, scores: FloatArray, classes: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, f1 and support per class, with macro and weighted averages.

    The same dictionary as scikit-learn's, whose own takes as long as training a cached trial for some epochs. A figure
    that is undefined, such as the precision of a class never predicted, is 0.
    """
    return matrix_report(confusion_matrix(labels, scores), classes)


def matrix_report(matrix: FloatArray, classes: Sequence[str]) -> dict[str, Any]:
    """`classification_report` of a confusion matrix (classes, classes), true class by row; recall is sensitivity."""
    hits, support, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    columns = {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, support),
        "f1-score": _ratio(2 * hits, support + predicted),
    }
    total = float(support.sum())
    rows: dict[str, Any] = {
        name: {**{column: float(values[k]) for column, values in columns.items()}, "support": float(support[k])}
        for k, name in enumerate(classes)
    }
    rows["accuracy"] = float(hits.sum() / total)
    for name, weights in (("macro avg", np.ones(len(classes))), ("weighted avg", support)):
        means = {column: float((values * weights).sum() / weights.sum()) for column, values in columns.items()}
        rows[name] = {**means, "support": total}
    return rows


def _ratio(part: FloatArray, whole: FloatArray) -> FloatArray:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
