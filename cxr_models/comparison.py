"""Whether the same images tell two strategies apart: paired differences with intervals, tests over all pairs, power.

A strategy has one array of scores a training seed; its metric is the mean over them. Patients are resampled, the same
ones for every strategy, because strategies that are shown the same images err on the same ones.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cxr_models.contributions import chance_of_signs, contributions, effective_number
from cxr_models.intervals import RESAMPLES, joined, resampled
from cxr_models.metrics import FloatArray, IntArray, measure

ALPHA, POWER = 0.05, 0.8
NOTHING = 1e-12  # a difference, or an error, that is rounding alone
MANY = 100  # patients of one weight: for more, Student's t and a randomisation test say the same
BY_SCORE = ("auroc", "loss")  # metrics that every score can change; the others see the predicted classes alone

Pair = tuple[Sequence[FloatArray], Sequence[FloatArray]]


@dataclass(frozen=True)
class Difference:
    """A metric of one strategy minus that of another; NaN where the metric is undefined.

    Attributes:
        low, high: 95 % interval of this pair alone; NaN where no spread is seen.
        error: standard error.
        seed_error: the part of it that more images would not lessen; 0 where a strategy was trained once.
        degrees: of freedom of the error.
        p: two-sided, of this pair alone.
        p_holm: corrected for all pairs (Holm, 1979).
        patients: on whom the two differ, as far as the metric sees.
        effective: as how many patients of one weight these count, at most `patients`.
        step: what one such patient changes the metric by.
    """

    value: float
    low: float
    high: float
    error: float
    seed_error: float
    degrees: float
    p: float
    p_holm: float
    patients: int
    effective: float
    step: float

    @property
    def shown(self) -> bool:
        """Whether these images show a difference; of any pair without one they do so in at most 5 % of test sets.

        A pair is two strategies where both have several seeds, else the models that were tested.
        """
        return self.p_holm <= ALPHA

    def smallest(self, pairs: int) -> float:
        """The true difference that 80 % of such test sets would show, where as many pairs are compared.

        NaN where nothing is known of the spread, as with two strategies that do the same.
        """
        if not self.effective or math.isnan(self.error):
            return math.nan
        return max(self._reach(pairs) * self.error, _least_patients(pairs) * self.step)

    def images_needed(self, images: int, pairs: int) -> float:
        """How many images of the same kind 80 % of test sets would need to show a true difference of `value`.

        The images' part of the standard error falls with the root of their number. Infinite where there is no
        difference, or one that the spread between seeds hides from any number of images.

        Args:
            images: that the figures are of.
            pairs: that are compared.
        """
        reach = self._reach(pairs)
        room = self.value**2 - (reach * self.seed_error) ** 2
        if not (room > 0 and self.effective):
            return math.inf
        by_error = images * reach**2 * (self.error**2 - self.seed_error**2) / room
        return max(by_error, images * _least_patients(pairs) / self.effective)

    def _reach(self, pairs: int) -> float:
        """How many standard errors a true difference must have for 80 % of test sets to show it."""
        return float(stats.t.isf(ALPHA / (2 * pairs), self.degrees) + stats.t.ppf(POWER, self.degrees))


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

    The variance of a difference is that of a bootstrap over patients and, where both strategies were trained with
    several seeds, that between the seeds: what their values on all images vary by, less what the images explain of it.
    Where one was trained once, a difference is that of these models alone. Interval and p follow with Student's t; its
    degrees of freedom count the patients of each class by its part in the variance, and the seeds (Satterthwaite,
    1946). Percentiles of the same draws are too narrow where patients are few.

    A p is never less than that of Fisher's randomisation test of what each patient adds, nor than that of a sign test
    of as many patients as these count. tests/test_comparison.py measures how often equal strategies are told apart.

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
    number = int(owners.max()) + 1
    whole = _by_seed(labels, strategies, classes, metrics, iter([np.ones((len(labels), 1))]))
    drawn = _by_seed(labels, strategies, classes, metrics, resampled(patients, resamples, seed))
    found = [
        {
            metric: _difference(
                [_Measured(whole[name][metric][0], drawn[name][metric]) for name in (one, other)],
                number,
                _rests_on(labels, pair, classes, owners, metric, seed),
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


def _by_seed(
    labels: IntArray,
    strategies: Mapping[str, Sequence[FloatArray]],
    classes: Sequence[str],
    metrics: Sequence[str],
    weightings: Iterator[FloatArray],
) -> dict[str, dict[str, FloatArray]]:
    """Strategy -> metric -> (draws, seeds)."""
    kept: dict[str, list[dict[str, FloatArray]]] = {name: [] for name in strategies}
    for weights in weightings:
        for name, seeds in strategies.items():
            each = [measure(labels, scores, classes, weights, areas="auroc" in metrics) for scores in seeds]
            kept[name].append({metric: np.stack([own[metric] for own in each], axis=1) for metric in metrics})
    return {name: joined(iter(parts)) for name, parts in kept.items()}


class _Measured(NamedTuple):
    """A strategy's metric: (seeds,) on all images, (draws, seeds) on resampled ones."""

    values: FloatArray
    draws: FloatArray


class _Ground(NamedTuple):
    """What a difference rests on, see `Difference`.

    Attributes:
        degrees: of freedom of the error by patients.
        least_p: that these patients allow, whatever the error is.
    """

    patients: int
    effective: float
    step: float
    degrees: float
    least_p: float


def _rests_on(
    labels: IntArray, pair: Pair, classes: Sequence[str], owners: IntArray, metric: str, seed: int
) -> _Ground:
    """The first seed of the one is set against the first of the other, and so on; of fewer seeds they come again."""
    one, other = pair
    count = max(len(one), len(other))
    matched = [(one[place % len(one)], other[place % len(other)]) for place in range(count)]
    differing = np.any([_differs(*both, by_score=metric in BY_SCORE) for both in matched], axis=0)
    patients = len(np.unique(owners[differing]))
    shares = np.mean([contributions(labels, *both, classes, owners, metric) for both in matched], axis=0)
    by_patient = shares.sum(axis=1)
    effective = min(effective_number(by_patient), float(patients))
    step = math.sqrt((by_patient**2).sum() / effective) if effective else 0.0
    own = np.array([len(np.unique(owners[labels == place])) for place in range(len(classes))])
    by_signs = chance_of_signs(by_patient, seed) if effective <= MANY else 0.0
    least_p = max(_least_p(effective), by_signs)
    return _Ground(patients, effective, step, _degrees((shares**2).sum(axis=0), own), least_p)


def _degrees(variances: FloatArray, patients: IntArray) -> float:
    """Of a sum over classes, each with its variance and its patients (Satterthwaite, 1946): a rare one may rule it."""
    total = variances.sum() ** 2
    return float(total / (variances**2 / np.maximum(patients - 1, 1)).sum()) if total else 1.0


def _differs(one: FloatArray, other: FloatArray, *, by_score: bool) -> NDArray[np.bool_]:
    """(images,) whether the two give an image other scores, or another class."""
    found: NDArray[np.bool_] = np.any(one != other, axis=1) if by_score else one.argmax(axis=1) != other.argmax(axis=1)
    return found


def _difference(strategies: Sequence[_Measured], patients: int, ground: _Ground) -> Difference:
    one, other = strategies
    value = float(one.values.mean() - other.values.mean())
    if abs(value) < NOTHING:
        value = 0.0
    finite = np.isfinite(one.draws).all(axis=1) & np.isfinite(other.draws).all(axis=1)
    if math.isnan(value) or finite.sum() < 2 or patients < 2:
        return Difference(value, math.nan, math.nan, math.nan, 0.0, math.nan, 1.0, 1.0, *ground[:3])
    larger = patients / (patients - 1)  # than a bootstrap's is the variance
    means = one.draws[finite].mean(axis=1) - other.draws[finite].mean(axis=1)
    of_patients = larger * float(means.var(ddof=1))
    uncertain = of_patients**2 / ground.degrees
    of_seeds = 0.0
    if all(len(each.values) > 1 for each in strategies):
        # Values on the same images differ by the seeds' luck, and by images that only some of the seeds have right. The
        # bootstrap has the latter already, and tells how much of it to expect.
        for values, draws in strategies:
            between = float(values.var(ddof=1)) / len(values)
            among = draws[finite] - draws[finite].mean(axis=1, keepdims=True)
            of_seeds += between - larger * float(among.var(axis=0, ddof=1).mean()) / (len(values) - 1)
            uncertain += between**2 / (len(values) - 1)
    seed_error = math.sqrt(max(0.0, of_seeds))
    error = math.hypot(math.sqrt(of_patients), seed_error)
    if error < NOTHING:  # whoever differs says the same: their number is all that is known
        p = ground.least_p if value else 1.0
        return Difference(value, math.nan, math.nan, 0.0, 0.0, math.inf, p, 1.0, *ground[:3])
    degrees = max(1.0, error**4 / uncertain)
    half = error * float(stats.t.isf(ALPHA / 2, degrees))
    p = max(2 * float(stats.t.sf(abs(value) / error, degrees)), ground.least_p)
    return Difference(value, value - half, value + half, error, seed_error, degrees, p, 1.0, *ground[:3])


def _least_p(patients: float) -> float:
    """The least p that a sign test of so many patients can give: fewer than six settle nothing, whatever the metric."""
    return float(min(1.0, 2.0 ** (1.0 - patients)))


def _least_patients(pairs: int) -> float:
    """Of whom that test can give a p that is shown, where so many pairs are compared."""
    return 1 + math.log2(pairs / ALPHA)


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
