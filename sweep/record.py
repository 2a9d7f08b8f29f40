"""The run folder: where everything lies, and the record of every epoch and trial.

The record is the truth of a sweep. It is written as things happen, so what the terminal showed as done is on disk;
Ray's and MLflow's own files are never read back.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxr_models.storage import append_whole, sync, written_whole
from cxr_models.trial import (
    AXES,
    BEST_WEIGHTS,
    CHECKPOINT,
    EpochMetrics,
    Objective,
    Outcome,
    Suggestion,
    TrialConfig,
    TrialResult,
)
from sweep.document import shown


class RecordDamaged(ValueError):  # noqa: N818 - what happened
    """A file of the record holds something else than what was written to it."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one sweep's results."""

    path: Path

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def trials(self) -> Path:
        return self.path / "trials.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def spec(self) -> Path:
        return self.path / "spec.yaml"

    @property
    def split(self) -> Path:
        return self.path / "split.csv"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.parquet"

    @property
    def samples(self) -> Path:
        """A few training images for the report."""
        return self.path / "samples.npz"

    @property
    def model(self) -> Path:
        return self.path / "best" / "model.keras"

    @property
    def masks(self) -> Path:
        """How well each validation and test image was segmented, one row an image; of a segmentation."""
        return self.path / "masks.csv"

    @property
    def overlays(self) -> Path:
        """Pictures of images, true masks and predicted ones; of a segmentation."""
        return self.path / "best" / "overlays"

    @property
    def best_config(self) -> Path:
        return self.path / "best" / "config.json"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def study(self) -> Path:
        """Optuna's journal; optuna-dashboard reads it while the sweep runs."""
        return self.state / "study.journal"

    @property
    def suggestion_record(self) -> Path:
        """One line a trial that was begun: number, trial_id, how many had `ended` before, and configuration."""
        return self.state / "suggestions.jsonl"

    @property
    def epoch_record(self) -> Path:
        """One line an epoch: `EpochMetrics` as JSON."""
        return self.state / "epochs.jsonl"

    @property
    def trial_record(self) -> Path:
        """One line an ended trial: `TrialResult` as JSON, and `number`, its place in the order of suggestions."""
        return self.state / "trials.jsonl"

    @property
    def halving(self) -> Path:
        """One line a trial at a rung, with what was decided; and one for each that failed or gave itself up."""
        return self.state / "halving.jsonl"

    @property
    def final_record(self) -> Path:
        """One line a final training that ended: `training_id`, and `problem` if it failed."""
        return self.state / "finals.jsonl"

    @property
    def sessions(self) -> Path:
        """One line each time the sweep was begun or gone on with, and one each time it came to its end."""
        return self.state / "sessions.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the process that works on the sweep, see `folder_lock.py`."""
        return self.state / "lock"

    @property
    def test_openings(self) -> Path:
        """One line for each time the test set was read."""
        return self.state / "test_openings.jsonl"

    @property
    def unreadable(self) -> Path:
        """The images that were left out, and why; absent if there are none."""
        return self.path / "unreadable.csv"

    @property
    def audit(self) -> Path:
        """What is wrong with the data."""
        return self.path / "audit.json"

    @property
    def audit_pictures(self) -> Path:
        """Images that may be one picture, side by side; absent if there are none."""
        return self.path / "audit"

    @property
    def tracking_database(self) -> Path:
        return self.path / "mlflow.db"

    @property
    def tracking_artifacts(self) -> Path:
        return self.path / "mlartifacts"

    def earlier(self, trials: int) -> Path:
        """Where the results of so many trials are kept when the sweep grows."""
        return self.path / f"after-{trials}-trials"

    @property
    def holds_inputs(self) -> bool:
        """Whether a sweep was begun here; before that, it has no trial to lose."""
        return self.spec.is_file() and self.split.is_file()

    def trial(self, trial_id: str) -> Path:
        """Where a trial keeps its last checkpoint, its best weights and validation scores."""
        return self.state / "trials" / trial_id

    def log(self, name: str) -> Path:
        """Output of a worker's libraries."""
        return self.state / "logs" / f"{name}.log"

    @classmethod
    def refuse_taken(cls, out: Path, name: str) -> None:
        """Tell before any work is done what `create` with `exactly` would find.

        Raises:
            ValueError: the name is taken.
        """
        if (out / name).exists():
            raise ValueError(_taken(out / name))

    @classmethod
    def create(cls, out: Path, name: str, *, exactly: bool) -> "RunFolder":
        """Make the folder of a new sweep.

        Args:
            out: where run folders lie.
            name: of the folder.
            exactly: refuse a name that is taken; otherwise the next free `<name>-2`, `<name>-3`, ... is used.

        Raises:
            ValueError: the name is taken, or `out` cannot hold a folder.
        """
        number = 1
        while True:
            path = out / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                # Two sweeps may race for one name; whoever makes the folder has it.
                if path.is_dir() and not exactly:
                    number += 1
                    continue
                raise ValueError(_taken(path)) from None
            except OSError as error:
                raise ValueError(f"cannot make the run folder {path}: {error.strerror}; choose another --out") from None
            folder = cls(path.resolve())
            folder.state.mkdir()
            return folder

    @classmethod
    def latest(cls, out: Path, name: str, *, exactly: bool) -> "RunFolder":
        """The folder of a sweep that is gone on with.

        Args:
            out: where run folders lie.
            name: of the folder.
            exactly: take this one; otherwise the last of `<name>`, `<name>-2`, `<name>-3`, ...

        Raises:
            ValueError: there is none.
        """
        path = out / name
        numbered = re.compile(re.escape(name) + r"-([1-9][0-9]*)")
        if not exactly and out.is_dir():
            found = ((numbered.fullmatch(each.name), each) for each in out.iterdir() if each.is_dir())
            later = {int(match[1]): each for match, each in found if match}
            path = later[max(later)] if later else path
        folder = cls(path.resolve())
        if path.is_dir() and not any(path.iterdir()):
            folder.state.mkdir()  # whoever made it was killed in this moment
        if not folder.state.is_dir():
            what = "a folder that no sweep has made" if path.is_dir() else "nothing there"
            raise ValueError(
                f"expected the run folder of a sweep at {path}, but found {what}; --resume goes on with a sweep that "
                "was begun: name its folder with --out and --name, or leave --resume out to begin"
            )
        return folder


def _taken(path: Path) -> str:
    what = "is a folder with an earlier sweep" if path.is_dir() else "is a file"
    return f"{path} {what}; choose another --name or --out"


class Record:
    """Writes the record of a sweep, and keeps the weights of each strategy's best trial.

    Where the folder holds the record of an earlier session, it is gone on with, see `past`.

    What a trial's end costs does not grow with the number of trials before it. `trials.csv` has every ended trial at
    once, in the order of their ends until `close`.
    """

    def __init__(self, folder: RunFolder, objective: Objective) -> None:
        self._folder = folder
        self._objective = objective
        self._results: dict[int, TrialResult] = {}
        self._columns: tuple[str, ...] = ()
        self._leaders: dict[tuple[str, str], dict[int, TrialResult]] = {}
        self.past = read_past(folder)
        for number, result in self.past.ended:
            self._results[number] = result
            self._drop_what_lost(number, result)
        if self._results:
            self._columns = _table_metrics((name for result in self.results for name in result.val), objective)
            write_trials_csv(folder.trials, self.results, objective)

    @property
    def results(self) -> tuple[TrialResult, ...]:
        """Every ended trial, in the order of suggestion."""
        return _in_order(self._results)

    def started(self, suggestion: Suggestion) -> None:
        entry = {"number": suggestion.number, "trial_id": suggestion.trial_id, "ended": len(self._results)}
        append_line(self._folder.suggestion_record, {**entry, "config": suggestion.config.to_json()}, durable=False)

    def epoch(self, metrics: EpochMetrics) -> None:
        append_line(self._folder.epoch_record, metrics.to_json(), durable=False)

    def ended(self, number: int, result: TrialResult) -> None:
        # Epochs come many a second; what a power failure must not tear apart is on the disk when a trial has ended.
        sync(self._folder.suggestion_record)
        sync(self._folder.epoch_record)
        sync(self._folder.halving)
        append_line(self._folder.trial_record, {"number": number, **result.to_json()})
        self._results[number] = result
        self._add_to_table(result)
        self._drop_what_lost(number, result)

    def close(self) -> None:
        """Bring `trials.csv` into the order of suggestion, and drop weights that a trial left after its end."""
        write_trials_csv(self._folder.trials, self.results, self._objective)
        kept = {result.trial_id for result in best_by_strategy(self.results, self._objective)}
        for result in self.results:
            if result.trial_id not in kept:
                self._drop_weights(result)

    def _add_to_table(self, result: TrialResult) -> None:
        columns = _table_metrics((*self._columns, *result.val), self._objective)
        if columns != self._columns:  # the first trial, or the first that has metrics
            self._columns = columns
            write_trials_csv(self._folder.trials, self.results, self._objective)
        else:
            row = io.StringIO()
            csv.writer(row).writerow(_table_row(result, columns))
            append_whole(self._folder.trials, row.getvalue(), durable=False)

    def _drop_what_lost(self, number: int, result: TrialResult) -> None:
        """Of a trial that ended, the checkpoint, and of each strategy all weights but the best trial's."""
        (self._folder.trial(result.trial_id) / CHECKPOINT).unlink(missing_ok=True)
        contenders = {**self._leaders.get(strategy_of(result), {}), number: result}
        first = ranked(_in_order(contenders), self._objective)[:1]
        for other, contender in contenders.items():
            if contender in first:
                self._leaders[strategy_of(result)] = {other: contender}
            else:
                self._drop_weights(contender)

    def _drop_weights(self, result: TrialResult) -> None:
        (self._folder.trial(result.trial_id) / BEST_WEIGHTS).unlink(missing_ok=True)


def _in_order(results: Mapping[int, TrialResult]) -> tuple[TrialResult, ...]:
    return tuple(results[number] for number in sorted(results))


def ranked(results: tuple[TrialResult, ...], objective: Objective) -> tuple[TrialResult, ...]:
    """The trials that may rank, best validation objective first: none that failed, none without an epoch."""
    able = [result for result in results if result.outcome is not Outcome.FAILED and result.best_epoch]
    sign = -1.0 if objective.mode == "max" else 1.0
    return tuple(sorted(able, key=lambda result: sign * result.val[objective.metric]))


def strategy_of(result: TrialResult) -> tuple[str, str]:
    """(backbone, freeze): what the sweep compares."""
    return result.config.backbone, result.config.freeze


def best_by_strategy(results: tuple[TrialResult, ...], objective: Objective) -> tuple[TrialResult, ...]:
    """The best trial of each (backbone, freeze), best first."""
    best: dict[tuple[str, str], TrialResult] = {}
    for result in ranked(results, objective):
        best.setdefault(strategy_of(result), result)
    return tuple(best.values())


def varied_axes(results: Sequence[TrialResult]) -> tuple[str, ...]:
    """The axes that differ between trials, what a sweep compares first."""
    seen = {axis: {getattr(result.config, axis) for result in results} for axis in AXES}
    return tuple(axis for axis in AXES if len(seen[axis]) > 1)


def write_trials_csv(path: Path, results: tuple[TrialResult, ...], objective: Objective) -> None:
    """One row a trial, in the order given."""
    metrics = _table_metrics((name for result in results for name in result.val), objective)
    with written_whole(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        # `epochs` is how many the trial ran; the axis of that name is the most it may run, as in --max-epochs.
        axes = ("max_epochs" if axis == "epochs" else axis for axis in AXES)
        header = ["trial_id", "outcome", "error", *axes, "epochs", "best_epoch", *(f"val_{name}" for name in metrics)]
        writer.writerow([*header, "trainable_parameters", "frozen_parameters", "train_seconds", "doctor"])
        writer.writerows(_table_row(result, metrics) for result in results)


def _table_metrics(names: Iterable[str], objective: Objective) -> tuple[str, ...]:
    """The metrics of `trials.csv` in the order of its columns; those of the task are always among them."""
    return (*objective.metrics, *sorted({*names} - objective.metrics.keys()))


def _table_row(result: TrialResult, metrics: Sequence[str]) -> list[Any]:
    config = result.config.to_json()
    how = (result.trial_id, result.outcome, result.error, *(config[axis] for axis in AXES))
    found = (result.epochs, result.best_epoch, *(result.val.get(name, "") for name in metrics))
    size = (result.trainable_parameters, result.frozen_parameters, round(result.train_seconds, 2))
    return [*how, *found, *size, result.doctor_names]


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file. A figure that could not be computed (NaN) becomes null, which every program reads."""
    text = json.dumps(_without_nan(values), indent=2, ensure_ascii=False, allow_nan=False)
    with written_whole(path) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a record; a last line cut short by a crash is left out.

    Raises:
        RecordDamaged: a line is no entry.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line.decode("utf-8"))
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                found = shown(line.decode("utf-8", "replace").rstrip())
                raise RecordDamaged(
                    f"{path}, line {number}: expected a JSON object, got {found}; the sweep's record was damaged from "
                    "outside: restore this file from a copy, or begin anew under another --name"
                )
            yield entry


@dataclass(frozen=True)
class Past:
    """What earlier sessions of a sweep have recorded.

    Attributes:
        begun: each trial in the order of suggestion, with how many trials had ended before it.
        ended: number of the trial and its result, in the order of their ends.
        epochs: trial -> its epochs in order.
    """

    begun: Sequence[tuple[Suggestion, int]] = ()
    ended: Sequence[tuple[int, TrialResult]] = ()
    epochs: Mapping[str, Sequence[EpochMetrics]] = field(default_factory=dict)


def read_past(folder: RunFolder) -> Past:
    """The record of a sweep that is gone on with; lines that were cut short are taken off it."""
    for path in (folder.suggestion_record, folder.epoch_record, folder.trial_record, folder.final_record):
        drop_cut_line(path)
    drop_cut_line(folder.test_openings)
    begun = []
    for entry in read_lines(folder.suggestion_record):
        config = TrialConfig.from_json(entry["config"])
        begun.append((Suggestion(entry["number"], entry["trial_id"], config), entry["ended"]))
    ended = [(entry.pop("number"), TrialResult.from_json(entry)) for entry in read_lines(folder.trial_record)]
    return Past(begun, ended, read_epochs(folder.epoch_record))


def read_epochs(path: Path) -> Mapping[str, tuple[EpochMetrics, ...]]:
    """Trial -> its epochs in order, of the record of a sweep that may still run."""
    trials: dict[str, dict[int, EpochMetrics]] = {}
    for entry in read_lines(path):
        metrics = EpochMetrics.from_json(entry)
        trials.setdefault(metrics.trial_id, {})[metrics.epoch] = metrics
    return {trial_id: tuple(epochs[number] for number in sorted(epochs)) for trial_id, epochs in trials.items()}


def drop_cut_line(path: Path) -> None:
    """Take a last line that a crash cut short off a record, before more is added to it."""
    lines = path.read_bytes() if path.is_file() else b""
    if lines and not lines.endswith(b"\n"):
        with written_whole(path) as scratch:
            scratch.write_bytes(lines[: lines.rfind(b"\n") + 1])


def append_line(path: Path, values: Mapping[str, Any], *, durable: bool = True) -> None:
    """Add one entry to a record, see `storage.append_whole`.

    Raises:
        NoSpace: the disk takes no more; the record is as it was.
    """
    append_whole(path, json.dumps(values, ensure_ascii=False) + "\n", durable=durable)
