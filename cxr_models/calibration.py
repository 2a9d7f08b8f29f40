"""How far predicted probabilities can be believed, before and after one temperature."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cxr_models.metrics import FloatArray, IntArray, evaluate_further

TEMPERATURES = (0.05, 20.0)  # a validation set without an error would have it at 0
COMPARED = ("ece", "brier", "loss")


@dataclass(frozen=True)
class Calibration:
    """Figures of images that the temperature was not fitted on.

    Attributes:
        temperature: what log-probabilities are divided by; above 1 the network was too sure of itself.
        before, after: `ece`, `brier` and `loss` as they are, and with the temperature.
    """

    temperature: float
    before: dict[str, float]
    after: dict[str, float]


def fit_temperature(labels: IntArray, scores: FloatArray) -> float:
    """The temperature with the lowest log loss, within `TEMPERATURES` (Guo et al., ICML 2017).

    Args:
        labels: (images,) true class.
        scores: (images, classes) log-probabilities.
    """
    own = np.arange(len(labels)), labels

    def loss(logarithm: float) -> float:
        return float(-tempered(scores, np.exp(logarithm))[own].mean())

    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def tempered(scores: FloatArray, temperature: float) -> FloatArray:
    """Log-probabilities (images, classes) at a temperature; no image's classes change their order."""
    divided: FloatArray = log_softmax(scores.astype(np.float64) / temperature, axis=1)
    return divided


def calibrate(fitted_on: tuple[IntArray, FloatArray], shown_on: tuple[IntArray, FloatArray]) -> Calibration:
    """Fit a temperature on the (labels, scores) of one part, show what it does to another.

    Args:
        fitted_on: of the validation images.
        shown_on: of the test images.
    """
    temperature = fit_temperature(*fitted_on)
    labels, scores = shown_on
    return Calibration(temperature, _figures(labels, scores), _figures(labels, tempered(scores, temperature)))


def _figures(labels: IntArray, scores: FloatArray) -> dict[str, float]:
    names: list[Any] = list(range(scores.shape[1]))
    found = evaluate_further(labels, scores, [str(name) for name in names])
    return {name: found[name] for name in COMPARED}
