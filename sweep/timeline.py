"""Where the time of a sweep went: starting, computing features, training; and how many epochs features spared."""

import time
from collections.abc import Iterable, Mapping

import psutil

from cxr_models.trial import PIXELS, EpochMetrics, Suggestion, TrialResult


class Timeline:
    """Listens to a sweep and keeps its times, in seconds on the driver's clock, from the program's begin on.

    Args:
        past: epochs of earlier sessions; they count as epochs, but when they were is not on this program's clock.
    """

    def __init__(self, past: Iterable[EpochMetrics] = ()) -> None:
        self._begun = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._first_trial = self._last_epoch = self._features = 0.0
        self.epochs_from_features = 0  # which ran no frozen layer in front of their cut
        for metrics in past:
            self._count(metrics)

    def started(self, suggestion: Suggestion) -> None:
        pass  # handed out, but its worker may still be starting: see `epoch`

    def epoch(self, metrics: EpochMetrics) -> None:
        now = time.monotonic()
        trial_began = max(self._begun, now - metrics.trial_seconds)  # it may have begun in an earlier session
        self._first_trial = min(self._first_trial or trial_began, trial_began)
        self._last_epoch = now
        self._count(metrics)

    def ended(self, number: int, result: TrialResult) -> None:
        pass

    @property
    def seconds(self) -> Mapping[str, float]:
        """`startup`: from the program's begin to the first trial's in a worker; `trials`: from there to the last epoch;
        `features`: what workers spent computing features or waiting for them, summed, in earlier sessions too. The
        first two are absent without an epoch."""
        features = {"features": self._features}
        if not self._last_epoch:
            return features
        startup, trials = self._first_trial - self._begun, self._last_epoch - self._first_trial
        return {"startup": startup, **features, "trials": trials}

    def _count(self, metrics: EpochMetrics) -> None:
        self._features += metrics.features_seconds
        self.epochs_from_features += not metrics.source.startswith(PIXELS)
