"""Brings MLflow up to date with the record and the spool of a sweep, one step after the other.

Every step may be done twice, and a step that MLflow did not take is tried again: a lost answer changes nothing.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cxr_models.trial import EpochMetrics, Objective, Outcome
from sweep.addresses import without_password
from sweep.backlog import Backlog, TrackedTrial
from sweep.champion import champion_notes
from sweep.ledger import SWEEP, Ledger, Spool
from sweep.mlflow_runs import Faulty, MlflowRuns, Refused, RunGone, RunStatus, Unavailable
from sweep.record import RunFolder
from sweep.record_tail import RecordTail
from sweep.tracked import (
    DatasetInfo,
    MetricNames,
    config_params,
    flat_params,
    one_line,
    result_tags,
    run_name,
    summary_files,
    summary_tags,
    trial_files,
    trial_tags,
)

MOST_FAULTS = 4  # of one part, which MLflow answers, but with an error of its own


@dataclass(frozen=True)
class TrackedSweep:
    """What MLflow is told of a sweep from the start.

    Attributes:
        artifacts: where the files of a new experiment go, None for the server's own place.
        inputs: tags that name the earlier sweeps this one builds on.
    """

    name: str
    experiment: str
    artifacts: str | None
    objective: Objective
    classes: tuple[str, ...]
    dataset: DatasetInfo
    inputs: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Values that JSON has."""
        # `asdict` makes a mess of counters, and may be given some.
        counts = {part: dict(classes) for part, classes in self.dataset.classes.items()}
        return asdict(replace(self, dataset=replace(self.dataset, classes=counts), inputs=dict(self.inputs)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrackedSweep":
        """Read what `to_json` gave."""
        objective, dataset = Objective(**values["objective"]), DatasetInfo(**values["dataset"])
        known = {"objective": objective, "dataset": dataset, "classes": tuple(values["classes"])}
        return cls(**{**values, **known})


class Sender:
    """Sends what MLflow does not have yet. For one thread.

    Args:
        folder: of the sweep.
        uri: MLflow's tracking URI.
        ledger: what has been sent.
        spool: what is sent beside the record.
        refused: hears in a line of what MLflow will not take; it is left out, and the rest sent.

    Attributes:
        parts_sent: grows while a step gets on that is not through yet.
    """

    def __init__(
        self, folder: RunFolder, uri: str, ledger: Ledger, spool: Spool, refused: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._uri = uri
        self._ledger = ledger
        self._spool = spool
        self._refused = refused
        self._known = bool(spool.entries())  # an earlier process may have sent something
        self._doubtful: set[str] = set()  # may have a run that nobody was told of
        self._entries: list[dict[str, Any]] = []
        self._done: set[str] = set()  # parts of the entry of the spool that is being sent
        self._faults: Counter[str] = Counter()
        self.parts_sent = 0
        self._spool_size = -1
        self._begin_reading()
        self._runs: MlflowRuns | None = None
        self._sweep: TrackedSweep | None = None

    def _begin_reading(self) -> None:
        self.backlog = Backlog()
        self._tail = RecordTail(self._folder, self._ledger, self.backlog)

    @property
    def parent_run_id(self) -> str:
        """The sweep's run, "" while there is none."""
        run = self._ledger.runs.get(SWEEP)
        return run.run_id if run else ""

    @property
    def experiment_id(self) -> str:
        return self._runs.experiment_id if self._runs else ""

    @property
    def hurries(self) -> bool:
        """Whether the sweep's run waits for something: its figures at the end come when training needs no core."""
        return self._runs is None or self._next_entry() is not None

    def due(self, now_s: float, *, everything: bool) -> float | None:
        """When the next step is to be done; None while there is nothing to send.

        Args:
            now_s: on the clock of `time.monotonic`.
            everything: running trials are not to wait for their turn.
        """
        entry = self._next_entry()
        if not self._entries:
            return None  # it has not been opened
        if self._runs is None or entry:
            return now_s
        self._read(now_s)
        found = self.backlog.next(now_s)
        if found is None:
            return None
        return now_s if everything else found[1]

    def step(self, now_s: float) -> None:
        """Send one thing.

        Raises:
            Unavailable: MLflow cannot be had; the step is done by the next call.
        """
        if self._runs is None:
            self._runs = self._connect()
            return
        entry = self._next_entry()
        if entry is None:
            self._read(now_s)
            found = self.backlog.next(now_s)
            if found:
                self._write(self._runs, found[0])
            return
        # The figures at the end belong to trials that are there whole.
        if entry["kind"] in ("evaluated", "finished"):
            self._read(now_s)
            unwritten = self.backlog.unwritten()
            if unwritten:
                self._write(self._runs, unwritten[0])
                return
        self._send(self._runs, entry)
        self._ledger.spooled_to(self._ledger.spooled + 1)
        self._done.clear()

    def _next_entry(self) -> dict[str, Any] | None:
        size = self._spool.path.stat().st_size if self._spool.path.is_file() else 0
        if size != self._spool_size:
            self._spool_size = size
            self._entries = self._spool.entries()
        return self._entries[self._ledger.spooled] if self._ledger.spooled < len(self._entries) else None

    def _superseded(self) -> bool:
        """Whether the sweep went on after the end that comes next in the spool."""
        later = self._entries[self._ledger.spooled :]
        return any(entry["kind"] == "resumed" for entry in later)

    def _read(self, now_s: float) -> None:
        while True:
            try:
                self._tail.read(_now_ms, now_s)
                return
            except OSError as error:
                raise Unavailable(f"the record cannot be read: {error}") from error
            except (ValueError, TypeError, KeyError) as error:  # of one line, which is not read again
                self._refused(f"the record has a line that cannot be understood: {one_line(error)}")

    def _connect(self) -> MlflowRuns:
        """Find the server, and what it has of this sweep; make the sweep's run if it has none."""
        opened = self._entries[0] if self._entries else self._next_entry()
        if opened is None:
            raise Unavailable("the sweep has not been opened")
        sweep = self._sweep = TrackedSweep.from_json(opened["sweep"])
        self._names = MetricNames(sweep.classes)
        runs = MlflowRuns(self._uri, sweep.experiment, sweep.artifacts, self._ledger.sweep_id)
        if self._known or SWEEP in self._doubtful:
            self._recognise(runs)
        if not self.parent_run_id:
            tags = {"sweep": sweep.name, "objective": f"{sweep.objective.metric} ({sweep.objective.mode})"}
            tags |= {"task": sweep.objective.task, **sweep.inputs}
            self._create(runs, SWEEP, self._folder.path.name, opened["at"], tags)
        return runs

    def _recognise(self, runs: MlflowRuns) -> None:
        """Compare the ledger with the runs that the server has."""
        found: dict[str, str] = {}
        for run in runs.find():
            found.setdefault(run.trial_id, run.run_id)
        own = {trial_id: run.run_id for trial_id, run in self._ledger.runs.items()}
        if own and found.get(SWEEP) is None:  # another server, or one that lost everything
            self._ledger.forget_runs()
            own = {}
        for trial_id in found.keys() - own.keys():
            self._ledger.created(trial_id, found[trial_id])
        for trial_id in own.keys() - found.keys():
            if not self._ledger.runs[trial_id].ended:  # someone deleted it; one that has ended stays deleted
                self._ledger.forget(trial_id)
        self._doubtful |= found.keys()
        self._begin_reading()

    def _create(self, runs: MlflowRuns, trial_id: str, name: str, at_ms: int, tags: Mapping[str, str]) -> None:
        """Make a run, unless an attempt whose answer was lost has made it.

        Raises:
            Unavailable: it may be there or not.
        """
        if trial_id in self._doubtful:
            for found in runs.find(trial_id or None):
                if found.trial_id == trial_id:
                    self._ledger.created(trial_id, found.run_id)
                    return
        try:
            run_id = runs.create(name, at_ms, tags)
        except Unavailable:
            self._doubtful.add(trial_id)
            raise
        except Refused as error:
            if trial_id == SWEEP:  # without it there is nothing to hang a trial on
                raise Unavailable(str(error)) from error
            raise
        self._ledger.created(trial_id, run_id)

    def _write(self, runs: MlflowRuns, trial: TrackedTrial) -> None:
        """Bring a trial's run up to date, and end it if the trial has ended."""
        try:
            self._write_trial(runs, trial)
        except RunGone as error:
            self._refused(f"trial {trial.suggestion.trial_id}: {error}")
            self._ledger.status(trial.suggestion.trial_id, "DELETED")
        except Faulty as error:  # the ledger has nothing of it, so that `sweep.sync` tries again
            self._count_fault(trial.suggestion.trial_id, error)
            self._refused(f"trial {trial.suggestion.trial_id}: {error}")
        except (Unavailable, OSError):
            raise
        except Refused as error:
            self._refused(f"trial {trial.suggestion.trial_id}: {error}")
        except Exception as error:
            self._refused(f"trial {trial.suggestion.trial_id}: {one_line(error)}")
        trial.described = True
        trial.epochs.clear()
        self.backlog.take(trial, time.monotonic())

    def _write_trial(self, runs: MlflowRuns, trial: TrackedTrial) -> None:
        suggestion, result = trial.suggestion, trial.result
        trial_id = suggestion.trial_id
        ending = result_tags(result) if result else {}
        if trial_id not in self._ledger.runs:
            tags = {**trial_tags(suggestion, self._opened.name, self.parent_run_id), **ending}
            self._create(runs, trial_id, run_name(suggestion), self._begun_ms(trial), tags)
            if trial_id not in self._doubtful:
                ending = {}
        run = self._ledger.runs[trial_id]
        if run.status == "DELETED":
            return
        metrics = [entry for at, each in trial.epochs for entry in self._epoch_metrics(runs, each)]
        if result:
            metrics += runs.metrics(self._names.of_result(result), result.ended_ms or self._opened_ms)
        params = {} if run.described else config_params(suggestion.config)
        runs.log(run.run_id, metrics=metrics, params=params, tags=ending, refused=self._refused)
        if not result:
            self._ledger.sent(trial_id, max([run.epochs, *(each.epoch for _, each in trial.epochs)]))
        if result:
            folder, classes = self._folder.trial(trial_id), self._opened.classes
            part = f"files of trial {trial_id}"
            self._try(part, lambda: runs.log_texts(run.run_id, trial_files(result, folder, classes)))
            self._done.discard(part)
            status: RunStatus = "FAILED" if result.outcome is Outcome.FAILED else "FINISHED"
            runs.terminate(run.run_id, status, result.ended_ms or trial.ended_ms)
            self._ledger.status(trial_id, status)

    @property
    def _opened(self) -> TrackedSweep:
        if self._sweep is None:
            raise Unavailable("the sweep has not been opened")
        return self._sweep

    @property
    def _opened_ms(self) -> int:
        """Stands for times that a record of an earlier version lacks: the same whenever it is asked."""
        return int(self._entries[0]["at"])

    def _begun_ms(self, trial: TrackedTrial) -> int:
        """When it was read that it began, or earlier, as its first epoch tells."""
        for _, first in trial.epochs:
            if first.ended_ms:
                return min(trial.begun_ms, first.ended_ms - int(1000 * first.trial_seconds))
        return trial.begun_ms

    def _epoch_metrics(self, runs: MlflowRuns, metrics: EpochMetrics) -> list[Any]:
        return runs.metrics(self._names.of_epoch(metrics), metrics.ended_ms or self._opened_ms, metrics.epoch)

    def _send(self, runs: MlflowRuns, entry: Mapping[str, Any]) -> None:
        """Send an entry of the spool, but for what is refused of it."""
        kind = entry["kind"]
        if kind == "opened":
            self._describe(runs)
        elif kind == "resumed":
            self._go_on(runs)
        elif kind == "test_opened":
            self._tag(runs, {f"test_opening_{entry['number']}": entry["opening"]})
        elif kind == "evaluated":
            self._send_figures(runs, entry["trial"], self._names.of_evaluation(entry["parts"]), entry["at"])
        elif kind == "finished" and not self._superseded():
            self._end(runs, entry)

    def _describe(self, runs: MlflowRuns) -> None:
        parent = self.parent_run_id

        spec_file = self._folder.spec

        def text() -> str:
            return without_password(spec_file.read_text(encoding="utf-8"))  # earlier versions kept passwords in it

        def params() -> None:
            spec = yaml.safe_load(text())
            spec.pop("reference", None)  # published figures are no parameters, and longer than MLflow takes
            runs.log(parent, params=flat_params(spec), refused=self._refused)

        self._try("parameters", params)
        self._try("data set", lambda: runs.log_dataset(parent, self._opened.dataset))
        self._try(spec_file.name, lambda: runs.log_texts(parent, {spec_file.name: text()}))
        self._send_files(runs, [self._folder.split])

    def _go_on(self, runs: MlflowRuns) -> None:
        """A sweep was resumed: its run and those of its killed trials run again."""
        for trial_id, run in list(self._ledger.runs.items()):
            if trial_id == SWEEP or run.status == "KILLED":
                self._try(f"going on with {trial_id}", partial(runs.go_on, run.run_id))
                self._ledger.status(trial_id, "")

    def _end(self, runs: MlflowRuns, entry: Mapping[str, Any]) -> None:
        parent, summary, at_ms = self.parent_run_id, entry["summary"], entry["at"]
        self._send_figures(runs, SWEEP, self._names.of_summary(summary), at_ms)
        self._tag(runs, summary_tags(summary))
        self._try("notes on the model", lambda: runs.note_champion(parent, champion_notes(summary)))
        self._send_files(runs, [self._folder.path / name for name in entry["files"]])
        self._try("pages", lambda: runs.log_texts(parent, summary_files(summary)))
        for trial in self.backlog.running:
            trial_id = trial.suggestion.trial_id
            run = self._ledger.runs.get(trial_id)
            if run and not run.ended:
                self._try(f"end of {trial_id}", partial(runs.terminate, run.run_id, "KILLED", at_ms))
                self._ledger.status(trial_id, "KILLED")
        self._drop_strays(runs)
        self._try("end of the sweep", lambda: runs.terminate(parent, entry["status"], at_ms))
        self._ledger.status(SWEEP, entry["status"])

    def note_champion(self) -> None:
        """Note on the model that was registered what the sweep's last end says of it."""
        ends = [entry for entry in self._entries if entry["kind"] == "finished"]
        if self._runs and ends:
            self._runs.note_champion(self.parent_run_id, champion_notes(ends[-1]["summary"]))

    def _drop_strays(self, runs: MlflowRuns) -> None:
        """Delete second runs of a trial: a request that was given up may have made its run late."""
        if not self._doubtful:
            return
        own = {trial_id: run.run_id for trial_id, run in self._ledger.runs.items()}
        for found in runs.find():
            if found.trial_id in own and found.run_id != own[found.trial_id]:
                self._try(f"second run {found.run_id}", partial(runs.delete, found.run_id))
        self._doubtful.clear()

    def _send_figures(self, runs: MlflowRuns, trial_id: str, figures: Mapping[str, float], at_ms: int) -> None:
        """Those that the run does not have: an evaluation that was repeated says the same again."""
        run = self._ledger.runs.get(trial_id)
        if run is None:
            self._refused(f"trial {trial_id} has final figures, but no run")
            return
        new = {name: float(value) for name, value in figures.items() if run.figures.get(name) != value}
        metrics = runs.metrics(new, at_ms)
        self._try("final figures", lambda: runs.log(run.run_id, metrics=metrics, refused=self._refused))
        if new:
            self._ledger.figures(trial_id, new)

    def _tag(self, runs: MlflowRuns, tags: Mapping[str, str]) -> None:
        self._try("tags", lambda: runs.log(self.parent_run_id, tags=tags, refused=self._refused))

    def _send_files(self, runs: MlflowRuns, paths: Sequence[Path]) -> None:
        for path in paths:
            if path.is_file():
                self._try(path.name, partial(runs.log_file, self.parent_run_id, path))
            else:
                self._refused(f"{path} is not there any more")

    def _try(self, part: str, send: Callable[[], None]) -> None:
        """Send a part of an entry, once; leave out what is refused. An outage is raised."""
        if part in self._done:
            return
        try:
            send()
        except Faulty as error:
            self._count_fault(part, error)
            self._refused(f"{part}: {error}")
        except Unavailable:
            raise
        except Exception as error:
            self._refused(f"{part}: {error if isinstance(error, Refused) else one_line(error)}")
        self._done.add(part)
        self.parts_sent += 1

    def _count_fault(self, what: str, error: Faulty) -> None:
        """Raise it, unless the same has gone wrong so often that it is no accident, and must not block all others."""
        self._faults[what] += 1
        if self._faults[what] < MOST_FAULTS:
            raise error
        del self._faults[what]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
