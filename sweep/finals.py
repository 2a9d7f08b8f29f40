"""The final trainings: the best trial of each strategy trained again, on training and validation images together.

The search chose by validation images, which are no longer needed for choosing: a final model learns from them too. It
is trained for as many epochs as were best for its trial, at the same learning rates, once for each seed.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cxr_models.trial import BEST_WEIGHTS, CHECKPOINT, EpochMetrics, Objective, TrialConfig, TrialResult
from sweep.record import append_line, best_by_strategy, read_lines
from sweep.runner import WAIT, Conductor, Retried, Wait
from sweep.worker import Fault, TrialEnd, TrialJob, Work

Told = Callable[["FinalTraining", int, int, int], None]  # (training, begun before it, of these done, of how many)


@dataclass(frozen=True)
class FinalTraining:
    """One final training.

    Attributes:
        trial: the best one of its strategy.
        number: of the seed, 0 for the trial's own.
    """

    trial: TrialResult
    number: int

    @property
    def training_id(self) -> str:
        """Names the folder of its weights, beside those of the trials."""
        return f"{self.trial.trial_id}-final-{self.number + 1}"

    @property
    def config(self) -> TrialConfig:
        """The trial's, with a seed of its own."""
        return replace(self.trial.config, seed=self.trial.config.seed + self.number)


class FinalTrainings:
    """Conducts the search and, once its last trial has ended, the final trainings: workers go on without a pause.

    Args:
        search: conducts the trials.
        objective: which trial of a strategy is the best.
        seeds: how often each strategy is trained; 0 for not at all.
        strategies: how many at most, the best first; None for all.
        results: every ended trial.
        epochs: trial -> its epochs.
        told: hears of each training as it begins.
        retried: hears of one that goes on after its worker was lost.
        journal: keeps what has ended; what stands in it as trained is not trained again. In memory only if None.

    Attributes:
        seeds: as given.
        done: those that can be evaluated, in the order of their ends.
        problems: training id -> why it cannot.
    """

    def __init__(
        self,
        search: Conductor,
        objective: Objective,
        *,
        seeds: int,
        strategies: int | None,
        results: Callable[[], tuple[TrialResult, ...]],
        epochs: Callable[[], Mapping[str, Sequence[EpochMetrics]]],
        told: Told,
        retried: Retried = lambda training_id, end, epochs: None,
        journal: Path | None = None,
    ) -> None:
        self._search = search
        self._objective = objective
        self.seeds = seeds
        self._strategies = strategies
        self._results = results
        self._epochs = epochs
        self._told = told
        self._retried = retried
        self._journal = journal
        self._waiting: deque[tuple[FinalTraining, tuple[float, ...]]] | None = None
        self._running: dict[str, tuple[FinalTraining, tuple[float, ...]]] = {}
        self._begun: set[str] = set()
        self._total = 0
        self.done: list[FinalTraining] = []
        self.problems: dict[str, str] = {}

    @property
    def work(self) -> Work:
        """As the search's."""
        return self._search.work

    @property
    def interrupted_at(self) -> float | None:
        """As the search's."""
        return self._search.interrupted_at

    def interrupt(self) -> None:
        """Hand out nothing more and end what runs after its epoch."""
        self._search.interrupt()

    def next_job(self) -> TrialJob | Wait | None:
        """The next trial; after the last one's end the next final training; None when all have been given out."""
        job = self._search.next_job()
        if job is not None or self._search.interrupted:
            return job  # not before the last trial has ended
        if self._waiting is None:
            self._waiting = deque(self._planned())
            self._total = len(self._waiting)
            self._take_up_ended(self._waiting)
        if not self._waiting:
            return WAIT if self._running else None  # one of those that run may have to be run again
        training, losses = self._waiting.popleft()
        name = training.training_id
        self._running[name] = training, losses
        if name not in self._begun:
            self._begun.add(name)
            done = len(self.done) + len(self.problems)
            self._told(training, done + len(self._running) - 1, done, self._total)
        alone = self._search.retries.is_alone(name)
        return TrialJob(name, training.config, self.work, again=losses, alone=alone)

    def epoch(self, metrics: EpochMetrics) -> bool:
        """Take note of an epoch; whether the training goes on."""
        if metrics.trial_id in self._running:
            return not self._search.interrupted
        return self._search.epoch(metrics)

    def ended(self, trial_id: str, end: TrialEnd) -> None:
        """A trial or a final training came to its end."""
        running = self._running.pop(trial_id, None)
        if running is None:
            self._search.ended(trial_id, end)
            return
        if self._search.interrupted:
            return  # what is not on record goes on when the sweep does
        judged = self._search.retries.judged(trial_id, end)
        if judged is None:
            if self._waiting is not None:
                self._waiting.appendleft(running)
            self._retried(trial_id, end, 0)
            return
        if self._journal:
            append_line(self._journal, {"training_id": trial_id, "problem": judged.error})
            (self.work.folder / trial_id / CHECKPOINT).unlink(missing_ok=True)  # nobody goes on from there
        self._note(running[0], judged.error)

    def all_lost(self, cause: str) -> None:
        """Whatever ran the trainings is gone, and with it each one that runs."""
        self._search.all_lost(cause)
        for name in list(self._running):
            self.ended(name, TrialEnd(cause, fault=Fault.LOST))

    def _note(self, training: FinalTraining, problem: str) -> None:
        if problem:
            self.problems[training.training_id] = problem
        else:
            self.done.append(training)

    def _take_up_ended(self, planned: "deque[tuple[FinalTraining, tuple[float, ...]]]") -> None:
        """Take those off that an earlier session has trained; one that failed, or whose weights are gone, is not."""
        entries = read_lines(self._journal) if self._journal else ()
        ended = {entry["training_id"]: entry["problem"] for entry in entries}
        for training, losses in list(planned):
            weights = self.work.folder / training.training_id / BEST_WEIGHTS
            if ended.get(training.training_id) == "" and weights.is_file():
                planned.remove((training, losses))
                self._note(training, "")

    def of(self, trial: TrialResult) -> list[FinalTraining]:
        """The trainings of a strategy's best trial that can be evaluated, its own seed first."""
        own = [training for training in self.done if training.trial.trial_id == trial.trial_id]
        return sorted(own, key=lambda training: training.number)

    def problem(self, trial: TrialResult) -> str:
        """Why a training of a strategy's best trial cannot be evaluated, or an empty string."""
        own = [FinalTraining(trial, number).training_id for number in range(self.seeds)]
        return next((f"final training: {self.problems[name]}" for name in own if name in self.problems), "")

    def _planned(self) -> list[tuple[FinalTraining, tuple[float, ...]]]:
        """Each training with the validation losses of its trial; the first seed of every strategy comes first."""
        best = best_by_strategy(self._results(), self._objective)[: self._strategies]
        epochs = self._epochs()
        losses = {
            trial.trial_id: tuple(metrics.val["loss"] for metrics in epochs[trial.trial_id][: trial.best_epoch])
            for trial in best
        }
        return [
            (FinalTraining(trial, number), losses[trial.trial_id]) for number in range(self.seeds) for trial in best
        ]
