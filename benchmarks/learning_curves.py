"""How trials of each freeze strategy learn: a parametric family of learning curves, fitted to measured ones.

A trial that learns goes from a start to an end by v(t) = end - (end - start) exp(-t / tau), t being its epochs so far:
one of the families that learning curves are extrapolated with (exp4 of Domhan et al., IJCAI 2015, with the exponent 1),
and one whose every parameter can be read. Where the head alone trains first, the trial follows a curve of `all` for as
long as that lasts; then the backbone moves under a head that no longer fits it, so that the fine-tuning has a start of
its own, far below where the head ended. Some trials never learn: their score stays at that of a constant answer. What
an epoch measures is the curve's value and noise.

A simulated trial has the parameters of a measured one of its strategy, which keeps their correlations, and small random
changes, so that no two are the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from cxr_models.trial import TrialConfig
from sweep.halving import head_epochs
from sweep.readback import read_run
from sweep.record import RunFolder

Floats = NDArray[np.float64]

HEAD = "all"
# A trial whose best macro F1 stays below this has not learned three classes of which one is rare.
LEARNS_ABOVE = 0.5
SHORTEST_TAU = 0.2
# Standard deviations of the random changes: of the end, and of the logarithm of tau.
END_CHANGE = 0.01
TAU_CHANGE = 0.2


def read_curves(run: Path) -> list[dict[str, Any]]:
    """The trials of a run folder: their strategy, `seconds` of an epoch of fine-tuning, `scores` of all epochs."""
    found = read_run(RunFolder(run))
    rows = []
    for result in found.results:
        config, epochs = result.config, found.epochs[result.trial_id]
        seconds = np.median([metrics.seconds for metrics in epochs[head_epochs(config) :]])
        rows.append(
            {
                "freeze": config.freeze,
                "epochs": config.epochs,
                "probe_share": config.probe_share,
                "learning_rate": config.learning_rate,
                "seconds": round(float(seconds), 3),
                "scores": [round(metrics.val[found.objective.metric], 4) for metrics in epochs],
            }
        )
    return rows


def read_measured(path: Path) -> dict[str, "Strategy"]:
    """Freeze -> strategy, of a file with what `read_curves` gave under `trials`.

    Raises:
        ValueError: no trial of a strategy learned.
    """
    rows = json.loads(path.read_text())["trials"]
    freezes = dict.fromkeys(row["freeze"] for row in rows)
    return {freeze: Strategy.fitted(freeze, [row for row in rows if row["freeze"] == freeze]) for freeze in freezes}


@dataclass(frozen=True)
class Strategy:
    """A freeze strategy's trials.

    Attributes:
        fits: (start, end, tau) of each measured trial that learns.
        never: share of trials that never learn.
        constant: their score.
        noise: standard deviation of an epoch's score around the curve.
        seconds: of an epoch, without those of the head alone in front.
    """

    freeze: str
    fits: tuple[tuple[float, float, float], ...]
    never: float
    constant: float
    noise: float
    seconds: float

    @classmethod
    def fitted(cls, freeze: str, rows: Sequence[Mapping[str, Any]]) -> Self:
        """What the measured trials of a strategy have in common.

        Raises:
            ValueError: none of them learned.
        """
        parts = [np.array(row["scores"][_head_epochs(row) :]) for row in rows]
        learned = [scores for scores in parts if scores.max() >= LEARNS_ABOVE]
        flat = [scores[-1] for scores in parts if scores.max() < LEARNS_ABOVE]
        if not learned:
            raise ValueError(f"expected a trial of {freeze} that learns, got none of {len(rows)} above {LEARNS_ABOVE}")
        fits = [_fit(scores) for scores in learned]
        off = [scores - curve(len(scores), *found) for scores, found in zip(learned, fits, strict=True)]
        return cls(
            freeze=freeze,
            fits=tuple(fits),
            never=len(flat) / len(rows),
            constant=float(np.median(flat)) if flat else 0.0,
            noise=float(np.concatenate(off).std()),
            seconds=float(np.median([row["seconds"] for row in rows])),
        )

    @property
    def end(self) -> float:
        """Where its trials that learn end, on average."""
        return float(np.mean([end for _, end, _ in self.fits]))

    def slower(self, factor: float) -> Self:
        """The same with every tau so many times longer."""
        return replace(self, fits=tuple((start, end, factor * tau) for start, end, tau in self.fits))

    def ending_at(self, end: float) -> Self:
        """The same with trials that end there on average."""
        return replace(self, fits=tuple((start, own + end - self.end, tau) for start, own, tau in self.fits))

    def draw(self, generator: np.random.Generator, epochs: int) -> Floats:
        """(epochs,) true scores of a new trial."""
        if generator.random() < self.never:
            return np.full(epochs, self.constant)
        start, end, tau = self.fits[generator.integers(len(self.fits))]
        end = min(1.0, end + generator.normal(0.0, END_CHANGE))
        return curve(epochs, start, end, tau * float(np.exp(generator.normal(0.0, TAU_CHANGE))))


def curve(epochs: int, start: float, end: float, tau: float) -> Floats:
    """(epochs,) values of the family after 1, 2, ... epochs."""
    return np.asarray(end - (end - start) * np.exp(-np.arange(1, epochs + 1) / tau))


def _fit(scores: Floats) -> tuple[float, float, float]:
    """Least squares; no tau is longer than what was measured, from which it could not be told."""
    bounds = ([0.0, 0.0, SHORTEST_TAU], [1.0, 1.0, float(len(scores))])
    guess = (scores[0], scores[-5:].mean(), 3.0)
    found, _ = curve_fit(
        lambda epochs, *own: curve(len(epochs), *own), np.arange(len(scores)), scores, guess, bounds=bounds
    )
    start, end, tau = map(float, found)
    return start, end, tau


def _head_epochs(row: Mapping[str, Any]) -> int:
    return head_epochs(TrialConfig("", freeze=row["freeze"], epochs=row["epochs"], probe_share=row["probe_share"]))
