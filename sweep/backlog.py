"""What MLflow has not been given of the trials yet, and which of them comes next.

A call costs MLflow milliseconds whatever it carries, so a short trial is written once, after its end, and a long one
every few seconds.
"""

from collections import deque
from dataclasses import dataclass, field

from cxr_models.trial import EpochMetrics, Suggestion, TrialResult

INTERVAL_S = 5.0


@dataclass
class TrackedTrial:
    """A trial on its way to MLflow.

    Attributes:
        begun_ms, ended_ms: when it began and ended, milliseconds since 1970.
        due_s: when a running trial's news are to be written, on the clock that the backlog is told.
        described: whether the run has the trial's parameters.
        epochs: not written yet, each with the time it was read at (ms).
        result: None while it runs.
    """

    suggestion: Suggestion
    begun_ms: int
    due_s: float
    described: bool = False
    epochs: list[tuple[int, EpochMetrics]] = field(default_factory=list)
    result: TrialResult | None = None
    ended_ms: int = 0

    @property
    def has_news(self) -> bool:
        return not self.described or bool(self.epochs)


class Backlog:
    """The trials with something to write. For one thread; times are seconds on any clock that does not go back."""

    def __init__(self) -> None:
        self._running: dict[str, TrackedTrial] = {}
        self._ended: deque[TrackedTrial] = deque()

    @property
    def running(self) -> tuple[TrackedTrial, ...]:
        return tuple(self._running.values())

    @property
    def epochs(self) -> int:
        """How many wait, of all trials."""
        return sum(len(trial.epochs) for trial in (*self._ended, *self.running))

    def started(self, suggestion: Suggestion, at_ms: int, now_s: float) -> TrackedTrial:
        trial = self._running[suggestion.trial_id] = TrackedTrial(suggestion, at_ms, now_s + INTERVAL_S)
        return trial

    def epoch(self, metrics: EpochMetrics, at_ms: int) -> None:
        trial = self._running.get(metrics.trial_id)
        if trial is None:
            raise LookupError(f"an epoch of trial {metrics.trial_id} came in, but that trial does not run")
        trial.epochs.append((at_ms, metrics))

    def ended(self, number: int, result: TrialResult, at_ms: int) -> None:
        """A trial whose start was missed is still shown, without its epochs."""
        missed = TrackedTrial(Suggestion(number, result.trial_id, result.config), at_ms, 0.0)
        trial = self._running.pop(result.trial_id, missed)
        trial.result, trial.ended_ms = result, at_ms
        self._ended.append(trial)

    def next(self, now_s: float) -> tuple[TrackedTrial, float] | None:
        """The trial to write next, and when; None while there is nothing to write.

        A running trial that is due goes before those that ended: someone may be watching its curves.
        """
        running = min((trial for trial in self.running if trial.has_news), key=lambda trial: trial.due_s, default=None)
        if self._ended and (running is None or running.due_s > now_s):
            return self._ended[0], now_s
        return (running, running.due_s) if running else None

    def take(self, trial: TrackedTrial, now_s: float) -> None:
        """A trial has been written: an ended one leaves, a running one has its next turn later."""
        if trial.result is None:
            trial.due_s = now_s + INTERVAL_S
        else:
            self._ended.remove(trial)

    def unwritten(self) -> tuple[TrackedTrial, ...]:
        """Everything there is to write, in the order of ends; what still runs comes last."""
        return (*self._ended, *(trial for trial in self.running if trial.has_news))
