"""What each patient adds to the difference between two sets of predictions, and as how many patients that counts.

A difference that rests on two patients of a rare class is known as badly as one between two patients, however many
others were tested. Leaving patients out one by one does not show it: where both say the same, either can go.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.stats import rankdata

from cxr_models.metrics import FloatArray, IntArray, confusion_matrix, from_matrices

EXACT, DEALINGS = 10, 2000
ROUNDING = 1e-9


def contributions(
    labels: IntArray, one: FloatArray, other: FloatArray, classes: Sequence[str], owners: IntArray, metric: str
) -> FloatArray:
    """How much each patient adds to a metric of `one` minus that of `other`, to first order: (patients, classes).

    A patient with images of several classes adds by each. Of metrics of the predicted classes it is the change as these
    images are given the other's predictions; of the loss, their share in its mean; of the area under the ROC curve,
    half the change of their placements among the images of the other classes (DeLong, DeLong and Clarke-Pearson, 1988),
    for which the two need no common scale of scores. Nothing adds to what is undefined.

    Args:
        labels: (images,) true class as an index into `classes`.
        one: (images, classes) log-probabilities.
        other: the same, of the other.
        classes: names of the classes.
        owners: (images,) number of the patient, from 0.
        metric: a name in `trial.METRICS`.
    """
    cells = owners * len(classes) + labels
    size = (int(owners.max()) + 1) * len(classes)
    if metric == "loss":
        images = np.arange(len(labels))
        with np.errstate(invalid="ignore"):  # of infinite losses the difference is undefined
            shares = (other[images, labels].astype(np.float64) - one[images, labels]) / len(labels)
        shares = shares if np.isfinite(shares).all() else np.zeros(len(labels))
    elif metric == "auroc":
        defined = np.isfinite(one).all() and np.isfinite(other).all()
        shares = (_placements(labels, one) - _placements(labels, other)) / 2 if defined else np.zeros(len(labels))
    else:
        return _exchanged(labels, one, other, classes, cells, size, metric).reshape(-1, len(classes))
    return np.bincount(cells, shares, minlength=size).astype(np.float64).reshape(-1, len(classes))


def effective_number(shares: FloatArray) -> float:
    """As how many contributions of one size these count, (sum of squares)^2 / (sum of fourth powers); 0 for none."""
    squares = (shares / np.abs(shares).max()) ** 2 if shares.any() else np.zeros(0)
    return float(squares.sum() ** 2 / (squares**2).sum()) if len(squares) else 0.0


def chance_of_signs(shares: FloatArray, seed: int) -> float:
    """How often contributions whose signs are dealt by chance sum to as much, either way: Fisher's randomisation test.

    Exact for at most `EXACT` contributions, else of so many random dealings that a p of 5 % is known to half a percent.

    Args:
        shares: contribution of each patient.
        seed: of the dealings.
    """
    own = shares[shares != 0]
    if len(own) <= EXACT:
        turned = np.array(list(product((0, 1), repeat=len(own))), np.int8)
    else:
        turned = np.random.default_rng(seed).integers(2, size=(DEALINGS, len(own)), dtype=np.int8)
        turned[0] = 0  # the signs that were found are one dealing
    reached = np.abs(own.sum() - 2 * (turned @ own)) >= abs(own.sum()) * (1 - ROUNDING)
    return float(reached.mean())


def _exchanged(
    labels: IntArray,
    one: FloatArray,
    other: FloatArray,
    classes: Sequence[str],
    cells: IntArray,
    size: int,
    metric: str,
) -> FloatArray:
    """(size,) means of two changes: `one` minus itself with a cell's predictions by `other`, and the reverse."""
    predicted, predicted_other = one.argmax(axis=1), other.argmax(axis=1)
    differs = predicted != predicted_other
    differing, place = np.unique(cells[differs], return_inverse=True)
    change = np.zeros((len(differing), len(classes), len(classes)))
    np.add.at(change, (place, labels[differs], predicted[differs]), 1.0)
    np.add.at(change, (place, labels[differs], predicted_other[differs]), -1.0)

    def figure(matrices: FloatArray) -> FloatArray:
        return from_matrices(matrices, classes)[metric]

    whole, whole_other = confusion_matrix(labels, one)[None], confusion_matrix(labels, other)[None]
    found = np.zeros(size)
    lost = figure(whole) - figure(whole - change)
    found[differing] = (lost + figure(whole_other + change) - figure(whole_other)) / 2
    return found


def _placements(labels: IntArray, scores: FloatArray) -> FloatArray:
    """(images,) shares of the mean area over the classes; they sum to twice the area, once by each side of it."""
    found = np.zeros(len(labels))
    defined = [k for k in np.unique(labels) if (labels != k).any()]
    for k in defined:
        positive = labels == k
        ranks = rankdata(scores[:, k])
        for side, sign in ((positive, 1.0), (~positive, -1.0)):
            beyond = sign * (ranks[side] - rankdata(scores[side, k]))
            pairs = int(side.sum()) * int((~side).sum())
            found[side] += (beyond if sign > 0 else beyond + (~side).sum()) / pairs / len(defined)
    return found
