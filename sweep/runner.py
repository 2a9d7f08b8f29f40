"""The same plan inline or on Ray: who trains what next, and what becomes of each epoch."""

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from cxr_models.doctor import diagnose
from cxr_models.hopeless import is_hopeless
from cxr_models.trial import EpochMetrics, Outcome, Suggestion, TrialConfig, TrialResult, best_epoch
from sweep.halving import Halving
from sweep.record import Past
from sweep.retries import DOES_NOT_FIT, Misfits, Retries, SweepFailed
from sweep.search import Search
from sweep.worker import Fault, TrialEnd, TrialEvents, TrialJob, Work

# So many trials in a row that fail alike before any has an epoch: the others would fail the same way.
HOPELESS_START = 3
MAX_FAILURES = 2


class Wait(Enum):
    """`next_job` has none now, and may have one when something that runs has ended."""

    WAIT = "wait"


WAIT: Final = Wait.WAIT


_WORKER = re.compile(r"worker-\d+")  # what differs between the same failure of two trials


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
    def all_lost(self, cause: str) -> None: ...


@dataclass
class _Running:
    suggestion: Suggestion
    epochs: list[EpochMetrics] = field(default_factory=list)


Retried = Callable[[str, TrialEnd, int], None]  # (trial, what it was lost to, epochs that are kept)


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
        max_failures: how often a trial whose worker was lost goes on elsewhere.
        retried: hears of a trial that goes on after it was lost.

    Attributes:
        epochs_run: by all trials, in earlier sessions too.
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
        max_failures: int = MAX_FAILURES,
        retried: Retried = lambda trial_id, end, epochs: None,
    ) -> None:
        self.work = work
        self._parameters = parameters
        self._head_parameters = head_parameters
        self._class_counts = work.data.val_counts
        self._search = search
        self._halving = halving
        self._listeners = listeners
        self._running: dict[str, _Running] = {}
        self._waiting: deque[str] = deque()  # of these, the ones nobody trains at the moment
        self.retries = Retries(max_failures)
        self._retried = retried
        self._misfits = Misfits()
        self._first_failures: list[str] = []
        self.interrupted_at: float | None = None
        self.epochs_run = 0

    def resume(self, past: Past) -> bool:
        """Take up what an earlier session left, before the first `next_job`: nobody hears of it a second time.

        Returns:
            Whether the search is as it was then. Otherwise (other versions of its libraries) the trials are the same,
            but later suggestions may differ from those that an uninterrupted sweep would have made.
        """
        as_before, ended = True, deque(past.ended)
        for place, (suggestion, before) in enumerate(past.begun):
            while len(past.ended) - len(ended) < before:
                self._take_up_end(*ended.popleft())
            as_before = self._search.again(suggestion) and as_before
            running = _Running(suggestion, list(past.epochs.get(suggestion.trial_id, ())))
            self._running[suggestion.trial_id] = running
            self.epochs_run += len(running.epochs)
            if place != suggestion.number:
                raise ValueError(f"expected trial {place} next in the record, got {suggestion.number}")
        while ended:
            self._take_up_end(*ended.popleft())
        for trial_id in list(self._running):
            self._go_on(self._running[trial_id])
        return as_before

    def _take_up_end(self, number: int, result: TrialResult) -> None:
        running = self._running.pop(result.trial_id)
        self._report(running)
        self._tell_search(number, result)

    def _go_on(self, running: _Running) -> None:
        """A trial that an earlier session left open goes on from its last epoch, or ends where that was its last."""
        self._report(running)
        config, trial_id = running.suggestion.config, running.suggestion.trial_id
        if not running.epochs:
            self._waiting.append(trial_id)
            return
        last = running.epochs[-1]
        value = last.val[self.work.objective.metric]
        keep = self._halving is None or self._halving.keep(trial_id, config, last.epoch, value)
        if last.epoch == config.epochs:
            self.ended(trial_id, TrialEnd())
        elif keep:
            self._waiting.append(trial_id)
        else:
            self._finish(running, Outcome.STOPPED_EARLY, TrialEnd())

    def _report(self, running: _Running) -> None:
        for metrics in running.epochs:
            self._search.report(running.suggestion.number, metrics.epoch, metrics.val[self.work.objective.metric])

    def interrupt(self) -> None:
        """Give out no more trials and end each running one after its epoch, unfinished and without a result."""
        self.interrupted_at = time.monotonic()

    @property
    def interrupted(self) -> bool:
        return self.interrupted_at is not None

    @property
    def training(self) -> int:
        """How many trials are handed out; not those that wait to go on after they were lost."""
        return len(self._running) - len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether a trial that was given out has not ended."""
        return bool(self._running)

    def next_job(self) -> TrialJob | Wait | None:
        """The next trial; None when all have ended, and `WAIT` while one of those that run may have to be run again.

        Raises:
            SweepFailed: the first trials all failed alike.
        """
        if self.interrupted:
            return None
        if self._waiting:
            return self._job(self._running[self._waiting.popleft()])
        if self._is_hopeless_start():
            return self._wait_or_stop()
        while (suggestion := self._search.suggest()) is not None:
            running = self._running[suggestion.trial_id] = _Running(suggestion)
            for listener in self._listeners:
                listener.started(suggestion)
            if not (misfit := self._misfits.covering(suggestion.config)):
                return self._job(running)
            self._finish(running, Outcome.FAILED, TrialEnd(misfit))
        return WAIT if self._running else None

    def _job(self, running: _Running) -> TrialJob:
        trial_id, config = running.suggestion.trial_id, running.suggestion.config
        decisions = self._halving.decisions(config) if self._halving else frozenset[int]()
        known, alone = len(running.epochs), self.retries.is_alone(trial_id)
        return TrialJob(trial_id, config, self.work, decisions, known=known, alone=alone)

    def _is_hopeless_start(self) -> bool:
        last = self._first_failures[-HOPELESS_START:]
        return not self.epochs_run and len(last) == HOPELESS_START and len(set(last)) == 1

    def _wait_or_stop(self) -> Wait:
        """Those that run may yet show that something works."""
        if self._running:
            return WAIT
        raise SweepFailed(
            f"the first {len(self._first_failures)} trials failed before their first epoch, the last "
            f"{HOPELESS_START} of them alike; the others would, too: {self._first_failures[-1]}"
        )

    def epoch(self, metrics: EpochMetrics) -> bool:
        """Take note of an epoch; whether the trial goes on."""
        running = self._running.get(metrics.trial_id)
        if running is None:
            return False  # its end was decided before
        if metrics.epoch <= len(running.epochs):
            return not self.interrupted  # recorded, and trained again because its checkpoint was lost
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
        if end.fault and self.interrupted:
            return  # it goes on when the sweep does
        judged = self.retries.judged(trial_id, end)
        if judged is None:
            self._waiting.append(trial_id)
            self._retried(trial_id, end, len(running.epochs))
            return
        end = judged
        # The trial has given itself up where more epochs were wasted.
        config = running.suggestion.config
        gave_up = len(running.epochs) < config.epochs and is_hopeless(running.epochs, config)
        if (gave_up or end.error) and self._halving:
            self._halving.strike(trial_id)
        ended_well = Outcome.STOPPED_EARLY if gave_up else Outcome.COMPLETED
        self._finish(running, Outcome.FAILED if end.error else ended_well, end)

    def all_lost(self, cause: str) -> None:
        """Whatever ran the trials is gone, and with it each one that runs."""
        for trial_id in [trial_id for trial_id in self._running if trial_id not in self._waiting]:
            self.ended(trial_id, TrialEnd(cause, fault=Fault.LOST))

    def close(self) -> None:
        """Write what the study does not have on disk yet. Trials that came to no end stay open: they can go on."""
        self._search.close()

    def _finish(self, running: _Running, outcome: Outcome, end: TrialEnd) -> None:
        suggestion = running.suggestion
        del self._running[suggestion.trial_id]
        result = self._result(running, outcome, end)
        if outcome is Outcome.FAILED and not self.epochs_run and not result.error.startswith(DOES_NOT_FIT):
            self._first_failures.append(_WORKER.sub("worker", result.error))
        self._tell_search(suggestion.number, result)
        for listener in self._listeners:
            listener.ended(suggestion.number, result)

    def _tell_search(self, number: int, result: TrialResult) -> None:
        misfit = result.error.startswith(DOES_NOT_FIT)
        if misfit:
            self._misfits.add(result.config)
        value = result.val.get(self.work.objective.metric)
        self._search.finish(number, result.outcome, value, avoid=misfit)

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
            ended_ms=time.time_ns() // 1_000_000,
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
        if go_on and isinstance(event, TrialEnd):
            conductor.ended(job.trial_id, event)
