"""95 % bounds where a bootstrap has none: every resample gives the same figure, such as a recall of exactly 1.

Twelve patients of twelve recognised do not show that none is ever missed. What counts is how many patients a figure
rests on: a patient, whose images resemble each other, counts as one trial, however many images there are.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cxr_models.metrics import IntArray

TAIL = 0.025  # on either side
Bounds = tuple[float, float]
UNKNOWN: Bounds = (math.nan, math.nan)

# Means over the classes -> the figures of the classes.
MEANS = {
    "balanced_accuracy": "recall",
    "macro_precision": "precision",
    "macro_specificity": "specificity",
    "macro_f1": "f1",
    "auroc": "auroc",
}
SHARES = ("recall", "precision", "specificity")  # of images that are right: all of them where the figure is 1
CLASS_FIGURES = (*SHARES, "f1", "auroc")


def share_bounds(share: float, patients: float) -> Bounds:
    """Bounds of a share, or of a mean of figures from 0 to 1 (Clopper and Pearson, 1934).

    Where a share p of all images would be right, those of n patients are all right with a probability of at most p to
    the power n, whatever the images of a patient have in common: so the bounds of a share of 1, and of 0, are safe.

    Args:
        share: what was seen, from 0 to 1.
        patients: how many it rests on; with none, there are no bounds.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not patients or math.isnan(share):
        return UNKNOWN
    low, high = proportion_confint(share * patients, patients, alpha=2 * TAIL, method="beta")
    return float(low), float(high)


def figure_bounds(
    values: Mapping[str, float],
    names: Iterable[str],
    labels: IntArray,
    predicted: IntArray,
    classes: Sequence[str],
    patients: Sequence[str],
) -> dict[str, Bounds]:
    """Bounds of some figures of `metrics.evaluate_further`.

    - Accuracy, recall, precision and specificity are shares: `share_bounds`, with the patients who have an image that
      counts for the figure.
    - F1 is 2 J / (1 + J), where J is the share of hits among the images that are of the class or predicted as it, and
      its bounds follow from those of J.
    - AUROC is the share of pairs in order. Pairs of different patients are independent of each other only where they
      have no patient in common, so it rests on as many as there are such pairs.
    - A mean over the classes has the means of their bounds, as if all were at their worst at once: safe, and wide. For
      a mean of shares that are all 1, the lower bound is the smallest mean with which a test set without an error is
      not rarer than 2.5 % (Buehler, 1957).
    - Other figures (AUPRC, kappa, Matthews correlation, Brier score, calibration error, loss) have none.

    Args:
        values: all figures.
        names: those whose bounds are wanted.
        labels: (images,) true class as an index into `classes`.
        predicted: (images,) likewise.
        classes: names of the classes.
        patients: (images,) patient of each image.

    Returns:
        name -> its bounds; NaN where there are none.
    """
    _, owner = np.unique(np.asarray(patients), return_inverse=True)
    rests = _Rests(labels, predicted, owner)

    def of_class(kind: str, place: int) -> Bounds:
        value = values[f"{kind}/{classes[place]}"]
        if kind != "f1":
            return share_bounds(value, rests.patients(kind, place))
        low, high = share_bounds(value / (2 - value), rests.patients(kind, place))
        return 2 * low / (1 + low), 2 * high / (1 + high)

    def of(name: str) -> Bounds:
        kind, _, own = name.partition("/")
        if name == "accuracy":
            return share_bounds(values[name], rests.all_patients)
        if own and kind in CLASS_FIGURES:
            return of_class(kind, classes.index(own))
        if name not in MEANS:
            return UNKNOWN
        kind = MEANS[name]
        counted = [k for k in rests.present if not math.isnan(values[f"{kind}/{classes[k]}"])]
        if kind in SHARES and values[name] == 1.0:
            return worst_mean(rests.divided(kind, counted)), 1.0
        low, high = np.mean([of_class(kind, place) for place in counted] or [UNKNOWN], axis=0)
        return float(low), float(high)

    return {name: of(name) for name in names}


def worst_mean(patients: Sequence[float]) -> float:
    """The smallest mean of several shares with which n trials of each, all of them right, are not rarer than 2.5 %.

    The shares p minimise their sum where the sum of n log p is at least log 0.025. That set is convex, so the minimum
    is where p is in proportion to n, and at most 1.

    Args:
        patients: n of each share, above 0.
    """
    rising = sorted(patients)
    for free in range(1, len(rising) + 1):  # the others have so many patients that their share is 1
        own = np.array(rising[:free])
        scale = math.exp((math.log(TAIL) - float(own @ np.log(own))) / float(own.sum()))
        if free == len(rising) or scale * rising[free] >= 1.0:
            break
    return float(np.minimum(1.0, scale * np.array(rising)).mean())


class _Rests:
    """How many patients a figure rests on.

    Args:
        labels, predicted: (images,) true and predicted class.
        owner: (images,) number of the patient.
    """

    def __init__(self, labels: IntArray, predicted: IntArray, owner: NDArray[np.intp]) -> None:
        self._labels, self._predicted, self._owner = labels, predicted, owner
        self.all_patients = int(owner.max()) + 1
        self.present = np.unique(labels).tolist()

    def patients(self, kind: str, place: int) -> int:
        """Those of a figure of a class."""
        if kind != "auroc":
            return len(self._those(self._counting(kind, place)))
        own, others = (len(self._those(images)) for images in (self._labels == place, self._labels != place))
        return min(own, others, self.all_patients // 2)  # pairs that have no patient in common

    def divided(self, kind: str, places: Sequence[int]) -> list[float]:
        """Those of a share of each class; who counts for several classes counts for a part in each."""
        having = np.zeros((len(places), self.all_patients))
        for row, place in enumerate(places):
            having[row, self._those(self._counting(kind, place))] = 1.0
        found: list[float] = (having / np.maximum(having.sum(axis=0), 1.0)).sum(axis=1).tolist()
        return found

    def _counting(self, kind: str, place: int) -> NDArray[np.bool_]:
        """(images,) whether each counts for a figure of a class."""
        own: NDArray[np.bool_] = self._labels == place
        taken: NDArray[np.bool_] = self._predicted == place
        return {"recall": own, "precision": taken, "specificity": ~own, "f1": own | taken}[kind]

    def _those(self, images: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The numbers of the patients of some images."""
        return np.unique(self._owner[images])
