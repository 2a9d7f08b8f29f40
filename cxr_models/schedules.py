"""How the learning rate goes on within a phase: a factor for every step, decided from the steps taken alone.

    constant      1
    cosine        falls from 1 to 0 along half a cosine (Loshchilov and Hutter, ICLR 2017, without restarts)
    exponential   falls from 1 to `EXPONENTIAL_END` by the same share in every step
    plateau       halves whenever the validation loss has had no new minimum for `PLATEAU_PATIENCE` epochs

In front of each may lie a warm-up, in which the factor rises in even steps to 1. The phase's most epochs count, also
where the trial is stopped before.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

EXPONENTIAL_END = 0.01
PLATEAU_FACTOR = 0.5
PLATEAU_PATIENCE = 2


class Patience:
    """Counts the epochs without a new minimum of the validation loss.

    Args:
        epochs: after which it is over; 0 never.
    """

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._lowest = math.inf
        self._waited = 0

    def is_over(self, loss: float) -> bool:
        """Whether it is over with an epoch of this loss; the count then begins anew, the minimum stays."""
        self._waited = 0 if loss < self._lowest else self._waited + 1
        self._lowest = min(self._lowest, loss)
        if not self._epochs or self._waited < self._epochs:
            return False
        self._waited = 0
        return True


class Schedule:
    """The learning rates of one phase, in the order they are needed.

    Args:
        kind: a name above.
        rate: the phase's learning rate.
        steps: of one epoch.
        epochs: the most that the phase has.
        warmup: share of all steps in which the rate rises, in [0, 1).
    """

    def __init__(self, kind: str, rate: float, *, steps: int, epochs: int, warmup: float) -> None:
        self._kind = kind
        self._rate = rate
        self._steps = steps
        self._total = steps * epochs
        self._rising = round(warmup * self._total)
        self._taken = 0
        self._halvings = 0
        self._patience = Patience(PLATEAU_PATIENCE)

    def follow(self, losses: Sequence[float]) -> None:
        """Go on behind epochs that were trained before, given the validation loss at the end of each."""
        self._taken += self._steps * len(losses)
        for loss in losses:
            self.observe(loss)

    def next_epoch(self) -> NDArray[np.float32]:
        """(steps,) learning rate of each step of the next epoch."""
        factors = [self._factor(step) for step in range(self._taken, self._taken + self._steps)]
        self._taken += self._steps
        return np.array([self._rate * factor for factor in factors], np.float32)

    def observe(self, loss: float) -> None:
        """Take notice of the validation loss at the end of an epoch."""
        self._halvings += self._patience.is_over(loss)

    def _factor(self, step: int) -> float:
        if step < self._rising:
            return (step + 1) / (self._rising + 1)
        passed = (step - self._rising) / (self._total - self._rising)
        match self._kind:
            case "constant":
                return 1.0
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * passed))
            case "exponential":
                return math.exp(math.log(EXPONENTIAL_END) * passed)
            case "plateau":
                return float(PLATEAU_FACTOR**self._halvings)
        raise ValueError(f"expected a schedule of trial.CHOICES, but got {self._kind!r}")
