"""Asynchronous successive halving (ASHA): which trials are worth more epochs, decided without waiting for others.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (arXiv:1810.05934). There, trials pause
at a rung and the best are promoted later. This is the stopping variant, which Ray Tune and Syne Tune use too: a trial
that reaches a rung goes on if it is among the best 1/reduction_factor that have reached it so far, and ends for good
if not. No checkpoint has to be brought back; in return, the first trials at a rung are judged against few rivals.
"""

import math
from collections.abc import Iterable


def rungs(grace_epochs: int, reduction_factor: int, max_epochs: int) -> tuple[int, ...]:
    """The epochs at whose end trials are judged: grace_epochs x reduction_factor^k, below `max_epochs`.

    Raises:
        ValueError: fewer than 1 grace epoch, or a reduction factor below 2.
    """
    if grace_epochs < 1:
        raise ValueError(f"grace_epochs must be at least 1, but got {grace_epochs}")
    if reduction_factor < 2:
        raise ValueError(f"reduction_factor must be at least 2, but got {reduction_factor}")
    epochs = []
    rung = grace_epochs
    while rung < max_epochs:
        epochs.append(rung)
        rung *= reduction_factor
    return tuple(epochs)


class Halving:
    """The values trials had at each rung, and the decisions that follow from them.

    Args:
        rungs: epochs at whose end trials are judged.
        reduction_factor: one in this many goes on.
        mode: `max` or `min`: which values are good.
    """

    def __init__(self, rungs: Iterable[int], reduction_factor: int, mode: str) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be max or min, but got {mode!r}")
        self._reduction_factor = reduction_factor
        self._mode = mode
        self._recorded: dict[int, dict[str, float]] = {rung: {} for rung in rungs}

    def keep(self, trial_id: str, epoch: int, value: float) -> bool:
        """Whether the trial goes on after `epoch`.

        The best so far and its equals always do; a value that is not finite never does, and does not count for
        others. A trial that comes to a rung again, after a crash or a restart, is judged by what it had the first
        time, against those that were there then: the answer does not change.
        """
        if epoch not in self._recorded:
            return True
        if not math.isfinite(value):
            return False
        recorded = self._recorded[epoch]
        recorded.setdefault(trial_id, value)
        arrived = list(recorded).index(trial_id) + 1
        rivals = list(recorded.values())[:arrived]
        own = rivals[-1]
        ahead = sum(rival > own if self._mode == "max" else rival < own for rival in rivals)
        return ahead < max(1, arrived // self._reduction_factor)
