"""Masks -> metrics. Every figure is of one image first; a metric is the mean over images.

Averaging over images keeps one that is large, or has a lot of lung, from standing for the others.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32] | NDArray[np.float64]

# What is counted of an image: its loss, then pixels in both masks, in the predicted one, and in the true one.
COUNTS = ("loss", "overlap", "predicted", "true")
INSIDE = 0.5  # a pixel with at least this probability is predicted to lie inside


def count_masks(truth: NDArray[np.uint8], predicted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Counts of each image, (images, 4) in the order of `COUNTS`, without a loss (NaN).

    Args:
        truth: (images, side, side, 1), inside where it is not 0.
        predicted: of the same shape.
    """
    inside = truth > 0
    counted = [(part).sum(axis=(1, 2, 3)) for part in (inside & predicted, predicted, inside)]
    return np.stack([np.full(len(truth), np.nan), *counted], axis=1)


def image_metrics(counts: FloatArray, pixels: int) -> dict[str, NDArray[np.float64]]:
    """The metrics of `trial.MASK_METRICS` for each image, (images,).

    Dice is twice the overlap over the sum of both masks, IoU the overlap over their union. Two empty masks agree: 1.

    Args:
        counts: (images, 4) in the order of `COUNTS`.
        pixels: of an image.
    """
    loss, overlap, predicted, true = counts.astype(np.float64).T
    both, union = predicted + true, predicted + true - overlap
    agree = np.ones(len(counts))
    return {
        "loss": loss,
        "dice": np.divide(2 * overlap, both, out=agree.copy(), where=both > 0),
        "iou": np.divide(overlap, union, out=agree.copy(), where=union > 0),
        "pixel_accuracy": 1 - (union - overlap) / pixels,
    }


def evaluate_masks(counts: FloatArray, pixels: int) -> dict[str, float]:
    """The metrics of `trial.MASK_METRICS`, averaged over images; arguments as `image_metrics`."""
    return {name: float(values.mean()) for name, values in image_metrics(counts, pixels).items()}


def telling_examples(dice: Sequence[float] | FloatArray, each: int) -> dict[str, tuple[int, ...]]:
    """Which images show how good a segmentation is: positions of the `worst`, `median` and `best`, none twice."""
    order = np.argsort(dice, kind="stable").tolist()
    each = max(1, min(each, len(order) // 3))
    middle = (len(order) - each) // 2
    places = {"worst": order[:each], "median": order[middle : middle + each], "best": order[::-1][:each]}
    taken: set[int] = set()
    found: dict[str, tuple[int, ...]] = {}
    for name, positions in places.items():
        found[name] = tuple(position for position in positions if position not in taken)
        taken.update(found[name])
    return found
