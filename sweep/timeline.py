"""Where the time of a sweep went: starting, computing features, training; and how many epochs features spared."""

import time
from collections.abc import Iterable, Mapping

import psutil

from cxr_models.trial import PIXELS, EpochMetrics, Suggestion, TrialResult


class Timeline:
    """Listens to a sweep and keeps its times, in seconds on the driver's clock, from the program's begin on.

    Args:
        past: epochs of earlier sessions; they count as epochs, but their times were those of another program.
    """

    def __init__(self, past: Iterable[EpochMetrics] = ()) -> None:
        self._begun = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._first_trial = self._last_epoch = self._features = 0.0
        self.epochs_from_features = sum(map(_is_from_features, past))  # which ran no frozen layer in front of their cut

    def started(self, suggestion: Suggestion) -> None:
        pass  # handed out, but its worker may still be starting: see `epoch`

    def epoch(self, metrics: EpochMetrics) -> None:
        now = time.monotonic()
        trial_began = now - metrics.trial_seconds
        self._first_trial = min(self._first_trial or trial_began, trial_began)
        self._last_epoch = now
        self._features += metrics.features_seconds
        self.epochs_from_features += _is_from_features(metrics)

    def ended(self, number: int, result: TrialResult) -> None:
        pass

    @property
    def seconds(self) -> Mapping[str, float]:
        """`startup`: from the program's begin to the first trial's in a worker; `trials`: from there to the last epoch;
        `features`: what workers spent computing features or waiting for them, summed; empty without an epoch."""
        if not self._last_epoch:
            return {}
        return {
            "startup": self._first_trial - self._begun,
            "features": self._features,
            "trials": self._last_epoch - self._first_trial,
        }


def _is_from_features(metrics: EpochMetrics) -> bool:
    return not metrics.source.startswith(PIXELS)
