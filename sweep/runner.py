"""The same plan inline or on Ray: who trains what next, and what becomes of each epoch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from cxr_models.doctor import diagnose
from cxr_models.hopeless import is_hopeless
from cxr_models.trial import EpochMetrics, Outcome, Suggestion, TrialConfig, TrialResult, best_epoch
from sweep.halving import Halving
from sweep.search import Search
from sweep.worker import TrialEnd, TrialEvents, TrialJob, Work


class SweepFailed(RuntimeError):  # noqa: N818 - what happened, not an error of a caller
    """The sweep ended before its last trial; finished trials are recorded."""


class Wait(Enum):
    """`next_job` has none now, and may have one when something that runs has ended."""

    WAIT = "wait"


WAIT: Final = Wait.WAIT


class Listener(Protocol):
    """Hears what happens in a sweep. Called from one thread; must return at once and not raise."""

    def started(self, suggestion: Suggestion) -> None: ...
    def epoch(self, metrics: EpochMetrics) -> None: ...
    def ended(self, number: int, result: TrialResult) -> None: ...


class Conducting(Protocol):
    """What a runner asks: what to train next, whether it goes on, and what became of it."""

    @property
    def work(self) -> Work: ...
    @property
    def interrupted_at(self) -> float | None: ...
    def interrupt(self) -> None: ...
    def next_job(self) -> TrialJob | Wait | None: ...
    def epoch(self, metrics: EpochMetrics) -> bool: ...
    def ended(self, trial_id: str, end: TrialEnd) -> None: ...


@dataclass
class _Running:
    suggestion: Suggestion
    epochs: list[EpochMetrics] = field(default_factory=list)


class Conductor:
    """Hands out trials and decides after each epoch; both runners only carry its words.

    Not thread-safe, except `interrupt`.

    Args:
        work: what all trials have in common.
        search: suggests them.
        halving: ends weak ones early, if given.
        parameters: a configuration's (trainable, frozen) parameters in a phase, -1 for the last.
        listeners: hear of everything.
        head_parameters: those of a configuration's head, 0 where unknown.
    """

    def __init__(
        self,
        work: Work,
        search: Search,
        halving: Halving | None,
        parameters: Callable[[TrialConfig, int], tuple[int, int]],
        listeners: Sequence[Listener],
        *,
        head_parameters: Callable[[TrialConfig], int] = lambda config: 0,
    ) -> None:
        self.work = work
        self._parameters = parameters
        self._head_parameters = head_parameters
        self._class_counts = work.data.val_counts
        self._search = search
        self._halving = halving
        self._listeners = listeners
        self._running: dict[str, _Running] = {}
        self.interrupted_at: float | None = None
        self.epochs_run = 0

    def interrupt(self) -> None:
        """Give out no more trials and end each running one after its epoch, unfinished and without a result."""
        self.interrupted_at = time.monotonic()

    @property
    def interrupted(self) -> bool:
        return self.interrupted_at is not None

    @property
    def running(self) -> bool:
        """Whether a trial that was given out has not ended."""
        return bool(self._running)

    def next_job(self) -> TrialJob | None:
        """The next trial, or None when all have been given out."""
        suggestion = None if self.interrupted else self._search.suggest()
        if suggestion is None:
            return None
        self._running[suggestion.trial_id] = _Running(suggestion)
        for listener in self._listeners:
            listener.started(suggestion)
        decisions = self._halving.decisions(suggestion.config) if self._halving else frozenset[int]()
        return TrialJob(suggestion.trial_id, suggestion.config, self.work, decisions)

    def epoch(self, metrics: EpochMetrics) -> bool:
        """Take note of an epoch; whether the trial goes on."""
        running = self._running.get(metrics.trial_id)
        if running is None:
            return False  # its end was decided before
        running.epochs.append(metrics)
        self.epochs_run += 1
        value = metrics.val[self.work.objective.metric]
        for listener in self._listeners:
            listener.epoch(metrics)
        self._search.report(running.suggestion.number, metrics.epoch, value)
        config = running.suggestion.config
        keep = self._halving is None or self._halving.keep(metrics.trial_id, config, metrics.epoch, value)
        if metrics.epoch == config.epochs:
            return True  # its own last; it counts at a rung for the others, but there is nothing left to end
        if self.interrupted:
            return False
        if keep:
            return True
        self._finish(running, Outcome.STOPPED_EARLY, TrialEnd())
        return False

    def ended(self, trial_id: str, end: TrialEnd) -> None:
        """A trial came to its own end, well or badly; not for one that was told to end."""
        running = self._running.get(trial_id)
        if running is None:
            return  # its end was decided before
        if not end.error and best_epoch(running.epochs, self.work.objective) is None:
            what = f"a validation {self.work.objective.metric}" if running.epochs else "an epoch"
            end = TrialEnd(f"the trial ended without {what}")
        # The trial has given itself up where more epochs were wasted.
        config = running.suggestion.config
        gave_up = len(running.epochs) < config.epochs and is_hopeless(running.epochs, config)
        if (gave_up or end.error) and self._halving:
            self._halving.strike(trial_id)
        ended_well = Outcome.STOPPED_EARLY if gave_up else Outcome.COMPLETED
        self._finish(running, Outcome.FAILED if end.error else ended_well, end)

    def close(self) -> None:
        """Tell the study of the trials that came to no end; call it once the runner is through."""
        for running in self._running.values():
            self._search.finish(running.suggestion.number, Outcome.FAILED, None)
        self._running.clear()

    def _finish(self, running: _Running, outcome: Outcome, end: TrialEnd) -> None:
        suggestion = running.suggestion
        del self._running[suggestion.trial_id]
        result = self._result(running, outcome, end)
        value = result.val.get(self.work.objective.metric)
        self._search.finish(suggestion.number, outcome, value)
        for listener in self._listeners:
            listener.ended(suggestion.number, result)

    def _result(self, running: _Running, outcome: Outcome, end: TrialEnd) -> TrialResult:
        config = running.suggestion.config
        best = best_epoch(running.epochs, self.work.objective)
        trainable, frozen = self._parameters(config, best.phase if best else -1)
        return TrialResult(
            trial_id=running.suggestion.trial_id,
            config=config,
            outcome=outcome,
            epochs=len(running.epochs),
            best_epoch=best.epoch if best else 0,
            val=best.val if best else {},
            by_fold=tuple(fold[self.work.objective.metric] for fold in best.folds) if best else (),
            trainable_parameters=trainable,
            frozen_parameters=frozen,
            train_seconds=running.epochs[-1].trial_seconds if running.epochs else 0.0,
            device=running.epochs[-1].device if running.epochs else "",
            error=end.error,
            traceback=end.traceback,
            doctor=diagnose(
                running.epochs,
                config,
                self.work.objective,
                class_counts=self._class_counts,
                parameters=trainable + frozen,
                head_parameters=self._head_parameters(config),
            ),
        )


def run_inline(conductor: Conducting) -> None:
    """Run every trial in this process, one after the other: breakpoints work, and nothing else is needed."""
    while isinstance(job := conductor.next_job(), TrialJob):
        trial = TrialEvents(job)
        event, go_on = trial.begin(), True
        while isinstance(event, EpochMetrics):
            go_on = conductor.epoch(event)
            event = trial.answer(go_on)
        if go_on:
            conductor.ended(job.trial_id, event)
