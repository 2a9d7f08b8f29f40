"""Whether the same images tell two strategies apart: paired differences with intervals, tests over all pairs, power.

A strategy has one array of scores a training seed; its metric is the mean over them. Patients are resampled, the same
ones for every strategy, because strategies that are shown the same images err on the same ones.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cxr_models.intervals import RESAMPLES, joined, resampled
from cxr_models.metrics import FloatArray, IntArray, measure

ALPHA, POWER = 0.05, 0.8
BY_SCORE = ("auroc", "loss")  # metrics that every score can change; the others see the predicted classes alone

Pair = tuple[Sequence[FloatArray], Sequence[FloatArray]]


@dataclass(frozen=True)
class Difference:
    """A metric of one strategy minus that of another; NaN where the metric is undefined.

    Attributes:
        low, high: 95 % interval of this pair alone.
        error: standard error.
        p: two-sided, of this pair alone.
        p_holm: corrected for all pairs (Holm, 1979).
        patients: on whom the two differ, as far as the metric sees.
    """

    value: float
    low: float
    high: float
    error: float
    p: float
    p_holm: float
    patients: int

    @property
    def shown(self) -> bool:
        """Whether these images show a difference; of any pair without one they do so in at most 5 % of test sets."""
        return self.p_holm <= ALPHA

    def smallest(self, pairs: int) -> float:
        """The true difference that 80 % of such test sets would show, where as many pairs are compared."""
        return _standard_errors(pairs) * self.error

    def images_needed(self, images: int, pairs: int) -> float:
        """How many images of the same kind 80 % of test sets would need to show a true difference of `value`.

        The standard error falls with the root of the number of images. Infinite where there is no difference.

        Args:
            images: that the figures are of.
            pairs: that are compared.
        """
        if not self.value or math.isnan(self.error):
            return math.inf
        by_error = images * (self.smallest(pairs) / self.value) ** 2
        by_patients = images * (1 + math.log2(pairs / ALPHA)) / self.patients  # see `_least_p`
        return max(by_error, by_patients)


def _standard_errors(pairs: int) -> float:
    return float(stats.norm.isf(ALPHA / (2 * pairs)) + stats.norm.isf(1 - POWER))


@dataclass(frozen=True)
class Discordance:
    """The images of which one strategy alone has the class right, by the first seeds.

    Attributes:
        p: of McNemar's exact test, which treats images as independent.
        p_holm: corrected for all pairs.
    """

    first: int
    second: int
    p: float
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """Two strategies on the same images.

    Attributes:
        differences: metric -> `first` minus `second`.
        discordance: what the accuracy differs by, image by image.
    """

    first: str
    second: str
    differences: Mapping[str, Difference]
    discordance: Discordance


def compare(
    labels: IntArray,
    strategies: Mapping[str, Sequence[FloatArray]],
    classes: Sequence[str],
    patients: Sequence[str],
    metrics: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Comparison, ...]:
    """Compare all pairs of strategies, in their order.

    The standard error of a difference is that of a bootstrap over patients; interval and p follow from it with
    Student's t of as many degrees of freedom as there are patients, less one. Percentiles of the same draws are too
    narrow where patients are few (tests/test_comparison.py measures what these intervals cover).

    Args:
        labels: (images,) true class as an index into `classes`.
        strategies: name -> (images, classes) log-probabilities of each seed.
        classes: names of the classes.
        patients: (images,) patient of each image.
        metrics: names in `trial.METRICS`.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    names = list(combinations(strategies, 2))
    pairs = [(strategies[one], strategies[other]) for one, other in names]
    owners = np.unique(np.asarray(patients), return_inverse=True)[1]
    values = _means(labels, strategies, classes, metrics, iter([np.ones((len(labels), 1))]))
    draws = _means(labels, strategies, classes, metrics, resampled(patients, resamples, seed))
    found = [
        {
            metric: _difference(
                float((values[one][metric] - values[other][metric])[0]),
                draws[one][metric] - draws[other][metric],
                int(owners.max()) + 1,
                len(np.unique(owners[_differs(pair, by_score=metric in BY_SCORE)])),
            )
            for metric in metrics
        }
        for (one, other), pair in zip(names, pairs, strict=True)
    ]
    for metric in metrics:
        for own, p in zip(found, _holm([own[metric].p for own in found]), strict=True):
            own[metric] = replace(own[metric], p_holm=p)
    tested = zip(names, found, _discordances(labels, pairs), strict=True)
    return tuple(Comparison(*pair, differences, discordance) for pair, differences, discordance in tested)


def _means(
    labels: IntArray,
    strategies: Mapping[str, Sequence[FloatArray]],
    classes: Sequence[str],
    metrics: Sequence[str],
    weightings: Iterator[FloatArray],
) -> dict[str, dict[str, FloatArray]]:
    """Strategy -> metric -> (draws,), the mean over its seeds."""
    kept: dict[str, list[dict[str, FloatArray]]] = {name: [] for name in strategies}
    for weights in weightings:
        for name, seeds in strategies.items():
            each = [measure(labels, scores, classes, weights, areas="auroc" in metrics) for scores in seeds]
            kept[name].append({metric: np.mean([own[metric] for own in each], axis=0) for metric in metrics})
    return {name: joined(iter(parts)) for name, parts in kept.items()}


def _differs(pair: Pair, *, by_score: bool) -> NDArray[np.bool_]:
    """(images,) whether the two strategies give an image other scores, or another class."""
    one, other = (
        np.mean([scores if by_score else np.eye(scores.shape[1])[scores.argmax(axis=1)] for scores in seeds], axis=0)
        for seeds in pair
    )
    found: NDArray[np.bool_] = np.any(one != other, axis=1)
    return found


def _difference(value: float, draws: FloatArray, patients: int, differing: int) -> Difference:
    finite = draws[np.isfinite(draws)]
    if math.isnan(value) or len(finite) < 2 or patients < 2:
        return Difference(value, math.nan, math.nan, math.nan, 1.0, 1.0, differing)
    error = float(finite.std(ddof=1)) * math.sqrt(patients / (patients - 1))  # a bootstrap's is that much too small
    half = error * float(stats.t.isf(ALPHA / 2, patients - 1))
    p = 2 * float(stats.t.sf(abs(value) / error, patients - 1)) if error else float(value == 0)
    return Difference(value, value - half, value + half, error, max(p, _least_p(differing)), 1.0, differing)


def _least_p(differing: int) -> float:
    """The least p that a sign test of so many patients can give: fewer than six settle nothing, whatever the metric."""
    return min(1.0, 2.0 ** (1 - differing))


def _discordances(labels: IntArray, pairs: Sequence[Pair]) -> list[Discordance]:
    from statsmodels.stats.contingency_tables import mcnemar

    counts = []
    for pair in pairs:
        one, other = (seeds[0].argmax(axis=1) == labels for seeds in pair)
        counts.append((int((one & ~other).sum()), int((other & ~one).sum())))
    p = [float(mcnemar([[0, first], [second, 0]], exact=True).pvalue) for first, second in counts]
    return [Discordance(*count, *both) for count, both in zip(counts, zip(p, _holm(p), strict=True), strict=True)]


def _holm(p: Sequence[float]) -> list[float]:
    from statsmodels.stats.multitest import multipletests

    return [float(each) for each in multipletests(p, method="holm")[1]] if p else []
