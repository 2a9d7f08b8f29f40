"""The final trainings: the best trial of each strategy trained again, on training and validation images together.

The search chose by validation images, which are no longer needed for choosing: a final model learns from them too. It
is trained for as many epochs as were best for its trial, at the same learning rates, once for each seed.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cxr_models.trial import EpochMetrics, Objective, TrialConfig, TrialResult
from sweep.record import best_by_strategy
from sweep.runner import WAIT, Conductor, Wait
from sweep.worker import TrialEnd, TrialJob, Work

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
    ) -> None:
        self._search = search
        self._objective = objective
        self.seeds = seeds
        self._strategies = strategies
        self._results = results
        self._epochs = epochs
        self._told = told
        self._waiting: deque[tuple[FinalTraining, tuple[float, ...]]] | None = None
        self._running: dict[str, FinalTraining] = {}
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
            return job
        if self._waiting is None:
            if self._search.running:
                return WAIT
            self._waiting = deque(self._planned())
            self._total = len(self._waiting)
        if not self._waiting:
            return None
        training, losses = self._waiting.popleft()
        self._running[training.training_id] = training
        begun, done = self._total - len(self._waiting) - 1, len(self.done) + len(self.problems)
        self._told(training, begun, done, self._total)
        return TrialJob(training.training_id, training.config, self.work, again=losses)

    def epoch(self, metrics: EpochMetrics) -> bool:
        """Take note of an epoch; whether the training goes on."""
        if metrics.trial_id in self._running:
            return not self._search.interrupted
        return self._search.epoch(metrics)

    def ended(self, trial_id: str, end: TrialEnd) -> None:
        """A trial or a final training came to its end."""
        training = self._running.pop(trial_id, None)
        if training is None:
            self._search.ended(trial_id, end)
        elif end.error:
            self.problems[trial_id] = end.error
        elif not self._search.interrupted:
            self.done.append(training)

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
