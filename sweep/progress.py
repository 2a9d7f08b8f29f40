"""What a person sees while a sweep runs: a live table on a terminal, plain lines anywhere else."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from cxr_models.dataset import Progress
from cxr_models.features import UnderWay, under_way
from cxr_models.trial import PIXELS, EpochMetrics, Objective, Outcome, Suggestion, TrialResult
from sweep.finals import FinalTraining
from sweep.record import Past
from sweep.wording import count, duration, noted, strategy_text
from sweep.worker import Fault, TrialEnd

SHOWN_TRIALS = 12
LINE_INTERVAL_S = 5.0


class StepProgress:
    """Progress bars of the work before the trials."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, description: str) -> Progress:
        """A function to tell (done, total); it shows nothing for work that is over at once."""
        shown = _Bar(self._console, description) if self._console.is_terminal else _Lines(self._console, description)
        return shown.update


class _Bar:
    def __init__(self, console: Console, description: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = RichProgress(*columns, console=console, transient=True)
        self._task = self._progress.add_task(description)

    def update(self, done: int, total: int) -> None:
        if done == 1 or not self._progress.live.is_started:
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total)
        if done == total:
            self._progress.stop()


class _Lines:
    """A line every few seconds."""

    def __init__(self, console: Console, description: str) -> None:
        self._console = console
        self._description = description
        self._started = self._shown = time.monotonic()

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._shown < LINE_INTERVAL_S:
            return
        self._shown = now
        left = (now - self._started) * (total - done) / max(1, done)
        self._console.print(f"{self._description}: {done} of {total}, about {duration(left)} left")


class _Extraction:
    """How far workers have come with the features of frozen layers, and the time left by the pace since first seen."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._first: dict[str, tuple[float, int]] = {}  # when a pass was first seen, and how much was done then

    def lines(self) -> list[str]:
        """One for each pass that is being computed."""
        passes = under_way(self._folder)
        self._first = {digest: seen for digest, seen in self._first.items() if digest in passes}
        return [self._line(digest, found) for digest, found in passes.items() if found.done < found.parts]

    def _line(self, digest: str, found: UnderWay) -> str:
        now = time.monotonic()
        since, done_then = self._first.setdefault(digest, (now, found.done))
        shown = f"computing features of frozen layers ({found.title}): {100 * found.done // found.parts} %"
        if found.done <= done_then:
            return shown
        left = (now - since) * (found.parts - found.done) / (found.done - done_then)
        return f"{shown}, about {duration(left)} left"


class SweepProgress:
    """Listens to a sweep and shows trials by state, epochs, the best so far and the time left.

    Args:
        console: where.
        objective: what "best" means.
        trials: how many there will be.
        max_epochs: of a trial.
        gpus_per_trial: that trials are given.
        features: folder of the features of frozen layers; None where none are kept.
    """

    def __init__(
        self,
        console: Console,
        objective: Objective,
        *,
        trials: int,
        max_epochs: int,
        gpus_per_trial: float,
        features: Path | None,
    ) -> None:
        self._console = console
        self._objective = objective
        self._trials = trials
        self._max_epochs = max_epochs
        self._expects_gpu = gpus_per_trial > 0
        self._extraction = _Extraction(features) if features else None
        self._uncached: set[str] = set()
        self._running: dict[str, tuple[Suggestion, EpochMetrics | None]] = {}
        self._suggestions: dict[str, Suggestion] = {}  # of the trials that have not ended
        self._before = 0  # trials that ended in earlier sessions
        self._told: dict[str, float] = {}
        self._outcomes: Counter[Outcome] = Counter()
        self._best: TrialResult | None = None
        self._best_val = objective.worst
        self._epochs = 0
        self._first: tuple[float, float] | None = None
        self._live: Live | None = None
        self._final = ""
        self._final_began = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the table on the terminal for the length of the block; elsewhere tell of features being computed."""
        if not self._console.is_terminal:
            with self._lines_told(self._extraction) if self._extraction else nullcontext():
                yield
            return
        with Live(
            self._table(), console=self._console, refresh_per_second=2, get_renderable=self._table, transient=True
        ) as live:
            self._live = live
            yield
        self._live = None

    @contextmanager
    def _lines_told(self, extraction: _Extraction) -> Iterator[None]:
        ended = threading.Event()

        def tell() -> None:
            while not ended.wait(LINE_INTERVAL_S):
                for line in extraction.lines():
                    self._say(line)

        thread = threading.Thread(target=tell, name="extraction-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def taken_up(self, past: Past) -> None:
        """Earlier sessions have done a part."""
        epochs = [metrics for trial in past.epochs.values() for metrics in trial]
        self._epochs = len(epochs)
        for _, result in past.ended:
            self._count(result)
        self._before = self._outcomes.total()
        going_on = len(past.begun) - len(past.ended)
        self._console.print(
            f"going on after {len(past.ended)} of {self._trials} trials and {count(len(epochs), 'epoch')}"
            + (f"; {count(going_on, 'running trial')} to go on from the last epoch" if going_on else "")
        )
        for suggestion, _ in past.begun:
            self._suggestions[suggestion.trial_id] = suggestion
        for _, result in past.ended:
            self._suggestions.pop(result.trial_id, None)

    def retried(self, trial_id: str, end: TrialEnd, epochs: int) -> None:
        """A trial or a final training goes on after its worker was lost."""
        suggestion = self._suggestions.get(trial_id)
        name = f"trial {suggestion.number + 1}" if suggestion else f"final training {trial_id}"
        after = f" from epoch {epochs + 1}" if epochs else ""
        alone = ", alone on the device" if end.fault is Fault.NO_MEMORY else ""
        self._console.print(Text(f"note: {name} goes on{after}{alone}: {end.error}", style="yellow"), soft_wrap=True)

    def started(self, suggestion: Suggestion) -> None:
        """A trial begins."""
        self._suggestions[suggestion.trial_id] = suggestion
        self._running[suggestion.trial_id] = suggestion, None
        self._told[suggestion.trial_id] = time.monotonic()
        self._say(f"trial {suggestion.number + 1} of {self._trials} starts: {describe(suggestion)}")

    def epoch(self, metrics: EpochMetrics) -> None:
        """An epoch ended."""
        self._epochs += 1
        if self._expects_gpu and metrics.device == "CPU":
            self._expects_gpu = False  # said once
            self._console.print(
                "note: trials were given a GPU, but TensorFlow sees none; pip install '.[gpu]' brings CUDA"
            )
        if suggestion := self._suggestions.get(metrics.trial_id):
            self._running[metrics.trial_id] = suggestion, metrics
            self._tell_uncached(suggestion, metrics)
            self._tell_epoch(suggestion, metrics)
        if self._first is None:
            self._first = time.monotonic(), self._done()

    def _tell_uncached(self, suggestion: Suggestion, metrics: EpochMetrics) -> None:
        """Once for each reason."""
        _, _, reason = metrics.source.partition(f"{PIXELS}: ")
        if reason and reason not in self._uncached:
            self._uncached.add(reason)
            self._console.print(f"note: trial {suggestion.number + 1} runs from the pixels: {reason}", markup=False)

    def _tell_epoch(self, suggestion: Suggestion, metrics: EpochMetrics) -> None:
        """A line a trial every few seconds: more would take longer to write than a short epoch."""
        now, name = time.monotonic(), self._objective.metric
        if now - self._told.setdefault(metrics.trial_id, now) < LINE_INTERVAL_S:
            return
        self._told[metrics.trial_id] = now
        self._say(
            f"trial {suggestion.number + 1} epoch {metrics.epoch}: train loss {metrics.train['loss']:.3f}, "
            f"val loss {metrics.val['loss']:.3f}, val {name} {metrics.val[name]:.3f}, {metrics.seconds:.1f} s"
        )

    def ended(self, number: int, result: TrialResult) -> None:
        """A trial ended."""
        self._running.pop(result.trial_id, None)
        self._told.pop(result.trial_id, None)
        self._suggestions.pop(result.trial_id, None)
        self._count(result)
        value = result.val.get(self._objective.metric)
        found = result.error or (f"val {self._objective.metric} {value:.3f}" if value is not None else "no epoch")
        found += noted(result)
        self._say(
            f"trial {number + 1} {result.outcome.replace('_', ' ')} after {count(result.epochs, 'epoch')}: {found}"
        )
        self._say(self._status().plain)

    def _count(self, result: TrialResult) -> None:
        self._outcomes[result.outcome] += 1
        value = result.val.get(self._objective.metric)
        if value is not None and result.outcome is not Outcome.FAILED and self._objective.better(value, self._best_val):
            self._best, self._best_val = result, value

    def trained_again(self, training: FinalTraining, begun: int, done: int, total: int) -> None:
        """A final training begins."""
        self._final_began = self._final_began or time.monotonic()
        config = training.config
        line = (
            f"final training {begun + 1} of {total}: {strategy_text(config)}, seed {config.seed}, "
            f"{count(training.trial.best_epoch, 'epoch')} on training and validation images"
        )
        if done:
            line += f", about {duration((time.monotonic() - self._final_began) / done * (total - done))} left"
        self._final = line
        self._say(line)

    def _say(self, line: str) -> None:
        if self._live is None:
            self._console.print(line, highlight=False, markup=False)

    def _status(self) -> Text:
        states = self._outcomes
        parts = [f"{states.total()} of {self._trials} trials ended ({count(self._epochs, 'epoch')})"]
        parts += [f"{states[outcome]} {outcome.replace('_', ' ')}" for outcome in Outcome if states[outcome]]
        if self._best:
            parts.append(f"best val {self._objective.metric} {self._best_val:.3f}{noted(self._best)}")
        if left := self.seconds_left():
            parts.append(f"about {duration(left)} left")
        return Text(", ".join(parts))

    def _done(self) -> float:
        """Trials: those that ended, and the running ones by their epochs."""
        epochs = sum(metrics.epoch for _, metrics in list(self._running.values()) if metrics)
        return self._outcomes.total() + epochs / self._max_epochs

    def seconds_left(self) -> float:
        """By the pace since the first epoch: what came before it, such as starting the workers, comes only once.

        0 while that is not known.
        """
        if self._first is None or self._outcomes.total() == self._before:
            return 0.0
        begun, before = self._first
        done = self._done()
        return (time.monotonic() - begun) * (self._trials - done) / (done - before) if done > before else 0.0

    def _table(self) -> RenderableType:
        table = Table(title="Running", title_justify="left")
        for name in ("trial", "configuration", "epoch", "train loss", "val loss", f"val {self._objective.metric}"):
            table.add_column(name)
        for suggestion, metrics in list(self._running.values())[:SHOWN_TRIALS]:
            row = [str(suggestion.number + 1), describe(suggestion)]
            if metrics:
                row += [f"{metrics.epoch}/{suggestion.config.epochs}", f"{metrics.train['loss']:.3f}"]
                row += [f"{metrics.val['loss']:.3f}", f"{metrics.val[self._objective.metric]:.3f}"]
            table.add_row(*map(Text, row))
        lines = [Text(f"best so far: {describe_result(self._best, self._objective)}")] if self._best else []
        if self._extraction:
            lines.extend(map(Text, self._extraction.lines()))
        return Group(table, *lines, Text(self._final) if self._final else self._status())


class EvaluationProgress:
    """What a person sees of the final evaluation: a status line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("") if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def begins(self, number: int, total: int, result: TrialResult, images: int) -> None:
        """A strategy's best trial is about to be evaluated."""
        on = f" on {images:,} images" if images else ""  # there are none with folds and without a test part
        self._show(f"evaluating {number} of {total} strategies{on}: {strategy_text(result.config)}")

    def registers(self) -> None:
        """The best model is about to be registered."""
        self._show("registering the best model in MLflow (some 10 seconds)")

    def failed(self, result: TrialResult, problem: str) -> None:
        """A strategy could not be evaluated."""
        self._console.print(Text(f"note: {strategy_text(result.config)} was not evaluated: {problem}", style="yellow"))

    def _show(self, line: str) -> None:
        if self._status:
            self._status.update(Text(line))
        else:
            self._console.print(line, highlight=False, markup=False)


def describe(suggestion: Suggestion) -> str:
    """A trial in one phrase."""
    config = suggestion.config
    return (
        f"{strategy_text(config)}, lr {config.learning_rate:.1e}, "
        f"dropout {config.dropout:.2g}, batch {config.batch_size}"
    )


def describe_result(result: TrialResult, objective: Objective) -> str:
    """A trial that ended, in one phrase."""
    config = result.config
    return (
        f"{strategy_text(config)}, lr {config.learning_rate:.1e}, "
        f"val {objective.metric} {result.val[objective.metric]:.3f} at epoch {result.best_epoch}{noted(result)}"
    )
