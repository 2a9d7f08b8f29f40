"""How much better the best of many trials looks on the images it was chosen on than it is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cxr_models.intervals import resampled
from cxr_models.metrics import FloatArray, IntArray, measure

LEADERS = 50  # weaker trials hardly ever win a resample
RESAMPLES = 200

# How often each image counts in each draw, (images, draws) -> a trial's metric in each draw, (draws,).
Figure = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Optimism:
    """What a choice among trials did to the best score.

    Attributes:
        trials: how many the choice was among; no more than `LEADERS` of them are chosen from again.
        best: the metric of the chosen trial on the images it was chosen on.
        corrected: what a trial that is chosen so scores on other images.
        gain: how much better `best` looks than `corrected`, never below 0.
    """

    trials: int
    best: float
    corrected: float
    gain: float


def selection_optimism(
    labels: IntArray,
    trials: Sequence[FloatArray],
    classes: Sequence[str],
    patients: Sequence[str],
    metric: str,
    mode: str,
    *,
    folds: IntArray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Optimism:
    """What a choice among classifiers did, by the method of `choice_optimism`.

    Args:
        labels: (images,) true class as an index into `classes`.
        trials: (images, classes) log-probabilities of each trial, the chosen one first.
        classes: names of the classes.
        patients: (images,) patient of each image.
        metric: that was chosen by, a name in `trial.METRICS`.
        mode: `max` or `min`, which way is better.
        folds: (images,) number of each image's fold; the metric is then the mean over them.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    parts = _parts(folds)

    def figure(scores: FloatArray, weights: FloatArray) -> FloatArray:
        areas = metric == "auroc"
        of_parts = [measure(labels[part], scores[part], classes, weights[part], areas=areas)[metric] for part in parts]
        mean: FloatArray = np.mean(of_parts, axis=0)
        return mean

    figures = [partial(figure, scores) for scores in trials]
    return choice_optimism(figures, patients, mode, resamples=resamples, seed=seed)


def mean_optimism(
    trials: Sequence[FloatArray],
    patients: Sequence[str],
    mode: str,
    *,
    folds: IntArray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Optimism:
    """What a choice by a mean over images did, by the method of `choice_optimism`.

    Args:
        trials: (images,) figure of each image, of each trial, the chosen one first.
        patients: (images,) patient of each image.
        mode: `max` or `min`, which way is better.
        folds: (images,) number of each image's fold; the mean is then that over the folds.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    parts = _parts(folds)

    def figure(values: FloatArray, weights: FloatArray) -> FloatArray:
        of_parts = [values[part] @ weights[part] / weights[part].sum(axis=0) for part in parts]
        mean: FloatArray = np.mean(of_parts, axis=0)
        return mean

    figures = [partial(figure, values) for values in trials]
    return choice_optimism(figures, patients, mode, resamples=resamples, seed=seed)


def _parts(folds: IntArray | None) -> list[Any]:
    """The images of each fold, or all."""
    return [slice(None)] if folds is None else [np.flatnonzero(folds == fold) for fold in np.unique(folds)]


def choice_optimism(
    trials: Sequence[Figure], patients: Sequence[str], mode: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> Optimism:
    """Choose again in each bootstrap sample of patients, and look at the patients it left out.

    After the bootstrap bias correction of Tsamardinos, Greasidou and Borboudakis (Machine Learning 107, 2018), for one
    validation set: no trial is trained again. What is chosen is compared with the trial that was chosen on all, on the
    same patients left out, since a macro figure is another one on so few. What choosing the best epoch within each
    trial adds is not in it.

    Args:
        trials: each trial's metric on these images, counted in any way; the chosen one first.
        patients: (images,) patient of each image.
        mode: `max` or `min`, which way is better.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    leaders = trials[:LEADERS]
    sign = 1.0 if mode == "max" else -1.0
    inside, outside = [], []
    for weights in resampled(patients, resamples, seed):
        both = np.concatenate([weights, weights == 0], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample of a few patients may leave none out
            figures = np.stack([leader(both) for leader in leaders])
        inside.append(figures[:, : weights.shape[1]])
        outside.append(figures[:, weights.shape[1] :])
    within, without = np.concatenate(inside, axis=1), np.concatenate(outside, axis=1)
    usable = np.isfinite(within).all(axis=0) & np.isfinite(without).all(axis=0)
    within, without = within[:, usable], without[:, usable]
    best = float(leaders[0](np.ones((len(patients), 1)))[0])
    if not usable.any():
        return Optimism(len(trials), best, math.nan, math.nan)
    chosen = (sign * within).argmax(axis=0)
    # The chosen trial itself is another one on fewer patients, as macro figures are; that is not what choosing does.
    gain = sign * float((without[0] - without[chosen, np.arange(len(chosen))]).mean())
    corrected = best - sign * max(0.0, gain)
    return Optimism(len(trials), best, corrected, sign * (best - corrected))
