"""Labels and scores -> metrics. Every figure of an evaluation comes from one set of predictions.

Scores are log-probabilities: a loss computed from probabilities saturates where the network is most wrong. Every figure
is defined for images that count any number of times, and computed for many such countings at once: that is what a
bootstrap asks for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]

CONFIDENCE_BINS = 15  # of the expected calibration error, as in Guo et al. (ICML 2017)

# What the final evaluation adds to `trial.METRICS`, and for each class to its recall.
FURTHER_METRICS = ("macro_precision", "macro_specificity", "auprc", "kappa", "mcc", "brier", "ece")
FURTHER_BY_CLASS = ("precision", "specificity", "f1", "auroc", "auprc")


def confusion_matrix(labels: IntArray, scores: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """Images by true class (rows) and predicted class (columns), (classes, classes).

    Args:
        labels: (images,) true class.
        scores: (images, classes) log-probabilities; the first of equal ones is the prediction.
        weights: (images,) how often each image counts, once by default.
    """
    matrix: FloatArray = _matrices(labels, scores, _as_draw(labels, weights))[0]
    return matrix


def evaluate(
    labels: IntArray, scores: FloatArray, classes: Sequence[str], weights: FloatArray | None = None
) -> dict[str, float]:
    """The metrics of `trial.METRICS` and `recall/<class>`: what every epoch is told.

    Macro figures are means over the classes present in the labels; a class never predicted has f1 and recall 0. The
    area under the ROC curve is one class against the rest, averaged over the classes.

    Args:
        labels: (images,) true class as an index into `classes`.
        scores: (images, classes) log-probabilities.
        classes: names of the classes.
        weights: (images,) how often each image counts, once by default.
    """
    return _alone(measure(labels, scores, classes, _as_draw(labels, weights)))


def evaluate_further(
    labels: IntArray, scores: FloatArray, classes: Sequence[str], weights: FloatArray | None = None
) -> dict[str, float]:
    """What `evaluate` gives and, for the final evaluation, `FURTHER_METRICS` and `FURTHER_BY_CLASS`.

    - Precision, specificity, f1 and both areas of each class are those of the class against the rest; recall is also
      called sensitivity, and its mean over the classes is the balanced accuracy. A class never predicted has precision
      0; a class without images has none of these but the specificity (NaN) and is left out of the means.
    - `auprc` is the mean average precision: precision at each positive image's score, averaged (no interpolation).
    - `kappa` is Cohen's, unweighted; NaN where chance alone would agree always. `mcc` is Matthews' correlation for
      several classes (Gorodkin, 2004), 0 where one class alone is true or predicted.
    - `brier` sums the squared error over the classes, so it lies between 0 and 2 (Brier, 1950).
    - `ece` is the expected calibration error of the predicted class in 15 bins of equal width (Naeini et al., 2015).

    Arguments as in `evaluate`.
    """
    return _alone(measure(labels, scores, classes, _as_draw(labels, weights), further=True))


def measure(
    labels: IntArray,
    scores: FloatArray,
    classes: Sequence[str],
    weights: FloatArray,
    *,
    further: bool = False,
    areas: bool = True,
) -> dict[str, FloatArray]:
    """The figures of `evaluate`, or of `evaluate_further`, for many countings of the same images.

    Args:
        labels: (images,) true class as an index into `classes`.
        scores: (images, classes) log-probabilities.
        classes: names of the classes.
        weights: (images, draws) how often each image counts in each draw.
        further: whether those of `evaluate_further` are wanted too.
        areas: whether the areas under the curves are; they take longest.

    Returns:
        metric -> (draws,)
    """
    total = weights.sum(axis=0)
    found = {
        "loss": -_weighted(scores[np.arange(len(labels)), labels].astype(np.float64), weights) / total,
        **from_matrices(_matrices(labels, scores, weights), classes, further=further),
    }
    if areas:
        for kind, values in _areas(labels, scores, weights, precision_too=further).items():
            found[kind] = _mean(values)
            if further:
                found |= {f"{kind}/{name}": values[:, k] for k, name in enumerate(classes)}
    if further:
        probabilities = np.exp(scores.astype(np.float64))
        errors = ((probabilities - np.eye(len(classes))[labels]) ** 2).sum(axis=1)
        found["brier"] = _weighted(errors, weights) / total
        found["ece"] = _calibration_error(labels, probabilities, weights) / total
    return found


def _as_draw(labels: IntArray, weights: FloatArray | None) -> FloatArray:
    """(images, 1)"""
    return np.ones((len(labels), 1)) if weights is None else weights[:, None].astype(np.float64)


def _alone(found: dict[str, FloatArray]) -> dict[str, float]:
    return {name: float(values[0]) for name, values in found.items()}


def _weighted(values: FloatArray, weights: FloatArray) -> FloatArray:
    """(draws,) sums of values (images,). Not by BLAS, whose threads would take cores from a trial that trains."""
    found: FloatArray = np.einsum("i,id->d", values, weights)
    return found


def _matrices(labels: IntArray, scores: FloatArray, weights: FloatArray) -> FloatArray:
    """The confusion matrix of each draw, (draws, classes, classes)."""
    classes = scores.shape[1]
    cells = labels.astype(np.int64) * classes + scores.argmax(axis=1)
    return _sums(cells, classes * classes, weights).T.reshape(-1, classes, classes)


def _sums(groups: IntArray, count: int, values: FloatArray) -> FloatArray:
    """(count, draws) from `values`, (images, draws): the images of each group together."""
    if values.shape[1] == 1:
        return np.bincount(groups, values[:, 0], minlength=count)[:, None].astype(np.float64)
    order = np.argsort(groups.astype(np.uint16), kind="stable")  # numpy sorts short integers in linear time
    ordered = groups[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sums = np.zeros((count, values.shape[1]))
    sums[ordered[first]] = np.add.reduceat(values[order], first, axis=0)
    return sums


def _mean(by_class: FloatArray) -> FloatArray:
    """(draws,) from (draws, classes): the mean of those that are defined, NaN if none is."""
    defined = ~np.isnan(by_class)
    return _ratio(np.where(defined, by_class, 0.0).sum(axis=1), defined.sum(axis=1), undefined=np.nan)


def from_matrices(matrices: FloatArray, classes: Sequence[str], *, further: bool = False) -> dict[str, FloatArray]:
    """The figures of `measure` that follow from confusion matrices (draws, classes, classes), true class by row."""
    hits, actual, predicted = matrices.diagonal(axis1=1, axis2=2), matrices.sum(axis=2), matrices.sum(axis=1)
    total = actual.sum(axis=1)
    present = actual > 0
    recall = _ratio(hits, actual, undefined=np.nan)
    f1 = np.where(present, _ratio(2 * hits, actual + predicted), np.nan)
    found = {
        "accuracy": hits.sum(axis=1) / total,
        "macro_f1": _mean(f1),
        "balanced_accuracy": _mean(recall),
        **{f"recall/{name}": recall[:, k] for k, name in enumerate(classes)},
    }
    if further:
        others = total[:, None] - actual
        by_class = {
            "precision": np.where(present, _ratio(hits, predicted), np.nan),
            "specificity": _ratio(others - predicted + hits, others, undefined=np.nan),
            "f1": f1,
        }
        for kind, values in by_class.items():
            found |= {f"{kind}/{name}": values[:, k] for k, name in enumerate(classes)}
        found["macro_precision"] = _mean(by_class["precision"])
        found["macro_specificity"] = _mean(np.where(present, by_class["specificity"], np.nan))
        agreed, expected = hits.sum(axis=1) * total, (actual * predicted).sum(axis=1)
        found["kappa"] = _ratio(agreed - expected, total**2 - expected, undefined=np.nan)
        spread = (total**2 - (actual**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
        found["mcc"] = _ratio(agreed - expected, np.sqrt(np.maximum(spread, 0.0)))
    return found


def _areas(labels: IntArray, scores: FloatArray, weights: FloatArray, *, precision_too: bool) -> dict[str, FloatArray]:
    """(draws, classes) areas under the curves of each class against the rest: `auroc` and, if asked for, `auprc`.

    NaN where a class is absent or alone, and everywhere if some score is not finite.
    """
    classes, kinds = scores.shape[1], ("auroc", "auprc") if precision_too else ("auroc",)
    if not np.isfinite(scores).all():
        return {kind: np.full((weights.shape[1], classes), np.nan) for kind in kinds}
    falling = np.ascontiguousarray(-scores.T)
    found = [_class_areas(labels == k, falling[k], weights, precision_too=precision_too) for k in range(classes)]
    return {kind: np.stack([areas[place] for areas in found], axis=1) for place, kind in enumerate(kinds)}


def _class_areas(
    positive: NDArray[np.bool_], falling: FloatArray, weights: FloatArray, *, precision_too: bool
) -> tuple[FloatArray, ...]:
    """(draws,) areas from running sums of weights, the images sorted once for all draws; `falling` is minus the scores.

    The area under the ROC curve is how often a positive image scores above a negative one, equal scores counting half
    (Hanley and McNeil, 1982). The bootstrap asks for it thousands of times; scikit-learn's would take minutes.
    """
    order = np.argsort(falling)
    is_positive, ordered = positive[order], falling[order]
    places = np.flatnonzero(is_positive)
    positives, negatives = order[places], order[~is_positive]
    above = not_below = places - np.arange(len(places))  # how many negatives
    differs = ordered[1:] != ordered[:-1]
    if tied := not differs.all():
        bounds = np.concatenate([[0], np.flatnonzero(differs) + 1, [len(order)]])
        run = np.concatenate([[0], np.cumsum(differs)])[places]  # of images with the same score
        before = np.concatenate([[0], np.cumsum(~is_positive)])
        above, not_below = before[bounds[run]], before[bounds[run + 1]]
    weight, passed = weights[positives], _running(weights[negatives])
    wrong = passed[not_below]
    halved = (passed[above] + wrong) / 2 if tied else wrong
    pairs = weight.sum(axis=0) * passed[-1]
    auroc = _ratio(pairs - np.einsum("pd,pd->d", weight, halved), pairs, undefined=np.nan)
    if not precision_too:
        return (auroc,)
    as_high = bounds[run + 1] - not_below if tied else np.arange(1, len(places) + 1)  # how many positives
    right = _running(weight)[as_high]
    precision = _ratio(right, right + wrong)
    return auroc, _ratio((weight * precision).sum(axis=0), weight.sum(axis=0), undefined=np.nan)


def _running(weights: FloatArray) -> FloatArray:
    """(images + 1, draws) sums over the first 0, 1, 2, ... rows."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _calibration_error(labels: IntArray, probabilities: FloatArray, weights: FloatArray) -> FloatArray:
    """(draws,) sums over the bins of how far confidence and accuracy lie apart, times the images in the bin."""
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(len(labels)), predicted]
    edges = np.linspace(0.0, 1.0, CONFIDENCE_BINS + 1)[1:-1]
    bins = np.searchsorted(edges, confidence, "left")
    gaps = (predicted == labels) - confidence
    error: FloatArray = np.abs(_sums(bins, CONFIDENCE_BINS, gaps[:, None] * weights)).sum(axis=0)
    return error


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


def _ratio(part: FloatArray, whole: FloatArray, undefined: float = 0.0) -> FloatArray:
    found: FloatArray = np.divide(part, whole, out=np.full(np.shape(whole), undefined), where=whole > 0)
    return found
