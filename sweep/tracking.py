"""MLflow: one run per sweep, one child run per trial, one thread that writes.

MLflow shows a sweep; the record in the run folder is the truth. Whatever goes wrong here, training goes on, and what
MLflow did not take is kept: `python -m sweep.sync RUN_DIR` sends it.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_models.storage import written_whole
from cxr_models.trial import EpochMetrics, Objective, Suggestion, TrialResult
from sweep.ledger import Ledger, Spool
from sweep.mlflow_runs import RunStatus as RunStatus
from sweep.mlflow_runs import Unavailable, set_environment
from sweep.mlflow_runs import log_champion as log_champion
from sweep.mlflow_runs import registered_champion as registered_champion
from sweep.record import RunFolder
from sweep.sender import Sender, TrackedSweep
from sweep.tracked import DatasetInfo as DatasetInfo
from sweep.tracked import one_line, ui_address, ui_command

OPENING_TIMEOUT_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # between attempts while MLflow cannot be had
OUTAGE_TOLD_AFTER_S = 10.0  # a server that restarts is not worth a line
PATIENCE_S = 5.0  # with a server that is down, at the end of a sweep
# While trials run, the writer rests this many times as long as it computed: a fifth of one core at most.
REST = 4.0


class Tracker:
    """Writes a sweep to MLflow from a thread of its own: no method waits for MLflow or raises because of it.

    What is told of trials must be in the record by then: it is read from there, and what MLflow has of it is kept in a
    ledger. So an outage of any length costs no memory, and a sweep that is resumed goes on with the same runs.

    Only `parent_run_id`, `ui_address` and `close` wait, and no longer than they say. A running trial is up to date
    within seconds. Where many short ones end faster than a fifth of a core can write them down, MLflow falls behind
    and catches up once no trial runs, so that training has the cores.

    Args:
        folder: of the sweep; the store lies in it unless a URI is given.
        spec_name: of the sweep.
        uri: MLflow's tracking URI without a password, "" for a SQLite store in the run folder.
        experiment: name of the experiment, "" for the sweep's name.
        objective: what the sweep optimises.
        classes: class names; a label is an index into them.
        dataset: the images.
        inputs: tags that name the earlier sweeps this one builds on.
        told: gets a line when MLflow cannot be had for a while, and one when it is back; from the writing thread.
    """

    def __init__(
        self,
        folder: RunFolder,
        spec_name: str,
        *,
        uri: str = "",
        experiment: str = "",
        objective: Objective,
        classes: Sequence[str],
        dataset: DatasetInfo,
        inputs: Mapping[str, str] | None = None,
        told: Callable[[str], None] = lambda line: None,
    ) -> None:
        set_environment()
        self._folder = folder
        self._told = told
        self._uri = uri or own_store(folder)
        artifacts = None if uri else folder.tracking_artifacts.absolute().as_uri()
        self._sweep = TrackedSweep(
            spec_name, experiment or spec_name, artifacts, objective, tuple(classes), dataset, inputs or {}
        )
        self._refused = self._outage = self._unregistered = ""
        self._parent_run_id = ""
        self._experiment_id = ""
        self._tried = Event()  # to open the sweep's run
        self._news, self._closing, self._stopped = Event(), Event(), Event()
        self._spool, self._ledger = Spool(folder), Ledger(folder)
        self._sender = Sender(folder, self._uri, self._ledger, self._spool, self._note_refused)
        self._thread = Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """One line with what went wrong and was not made good since, "" if nothing did."""
        cause = self._refused or self._outage or self._unregistered
        if not cause:
            return ""
        kept = f"; what it lacks is kept, and `{sync_command(self._folder)}` sends it"
        kept = kept if self._outage or self._unregistered else ""
        return f"MLflow at {self._uri}: {cause}; the sweep goes on, its own record is complete{kept}"

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def parent_run_id(self) -> str:
        """The sweep's run; waits for the first attempt to open it, up to a minute. "" if there is none yet."""
        self._tried.wait(OPENING_TIMEOUT_S)
        return self._parent_run_id

    @property
    def ui_command(self) -> str:
        return ui_command(self._uri)

    @property
    def ui_address(self) -> str:
        self._tried.wait(OPENING_TIMEOUT_S)
        return ui_address(self._uri, self._experiment_id)

    def lacking(self, epochs: Mapping[str, int]) -> int:
        """How many epochs MLflow does not have, of trials that have so many each."""
        return self._ledger.lacking(epochs)

    def opened(self) -> None:
        """Open the sweep's run, or go on with it; the run folder holds the spec and the split by now."""
        if self._spool.entries():
            self._keep("resumed")
        else:
            self._keep("opened", sweep=self._sweep.to_json())

    def started(self, suggestion: Suggestion) -> None:
        self._news.set()

    def epoch(self, metrics: EpochMetrics) -> None:
        self._news.set()

    def ended(self, number: int, result: TrialResult) -> None:
        self._news.set()

    def evaluated(self, trial_id: str, parts: Mapping[str, Mapping[str, float]]) -> None:
        """Add the figures of the final evaluation to an ended trial.

        Args:
            trial_id: of the trial.
            parts: `train`, `val` and `test` -> metric -> value.
        """
        self._keep("evaluated", trial=trial_id, parts={part: dict(figures) for part, figures in parts.items()})

    def test_opened(self, number: int, opening: str) -> None:
        """Tell the sweep's run that the test set is opened.

        Args:
            number: 1 for the first time.
            opening: when, and by what.
        """
        self._keep("test_opened", number=number, opening=opening)

    def champion(self, trial_id: str, example: NDArray[np.float32]) -> bool:
        """Take note that the best model is to be registered; whether it can be now, and has not been.

        Args:
            trial_id: whose final model it is.
            example: an input of it, (1, side, side, channels).
        """
        if trial_id in self._ledger.registered:
            return False
        self._unregistered = "the best model is not registered"
        with written_whole(champion_example(self._folder)) as scratch:
            np.save(scratch, example)
        self._keep("champion", trial=trial_id, name=self._sweep.name)
        return bool(self.parent_run_id)

    def registered(self, trial_id: str, address: str) -> None:
        """The best model has been registered, and is at `address`."""
        self._unregistered = ""
        try:
            self._ledger.model(trial_id, address)
        except OSError as error:
            self._note_refused(one_line(error))

    def finished(self, summary: Mapping[str, Any], artifacts: Sequence[Path], status: RunStatus = "FINISHED") -> None:
        """End the sweep's run, and as killed those of trials still open; note on the model what is said of it.

        Args:
            summary: what `summary.json` holds; an interrupted sweep may have any part of it.
            artifacts: files to keep with the run.
            status: of the sweep's run.
        """
        root = self._folder.path
        files = [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in artifacts]
        self._keep("finished", summary=dict(summary), files=files, status=status)

    def close(self, timeout_s: float) -> None:
        """Wait until MLflow has everything, but no longer than `timeout_s`, and a few seconds where it is down.

        What is left then stays on disk, see `problem`.
        """
        self._closing.set()
        self._news.set()
        self._thread.join(timeout_s)
        self._stopped.set()
        if self._thread.is_alive():
            self._outage = f"it did not take everything within {timeout_s:g} s"

    def note(self, cause: str) -> None:
        """Remember what kept the best model from being registered; that can be made good."""
        self._unregistered = cause

    def _keep(self, kind: str, **values: Any) -> None:
        try:
            self._spool.add(kind, at=_now_ms(), **values)
        except (OSError, TypeError, ValueError) as error:
            self._note_refused(one_line(error))
        self._news.set()

    def _note_refused(self, cause: str) -> None:
        self._refused = self._refused or cause

    def _write(self) -> None:
        """The thread: one step after the other, and pauses that grow while MLflow cannot be had."""
        pause_s, rested, failing_since = FIRST_PAUSE_S, 0.0, math.inf
        down = _Outage(self._told, f"MLflow at {self._uri}")
        while not self._stopped.is_set():
            self._news.clear()
            closing, before = self._closing.is_set(), self._sender.parts_sent
            try:
                now = time.monotonic()
                due = self._sender.due(now, everything=closing)
                if due is None and closing:
                    return
                if due is None or (max(due, rested) > now and not closing and not self._sender.hurries):
                    self._news.wait(None if due is None else max(due, rested) - now)
                    continue
                begun = time.thread_time()
                self._sender.step(now)
                rest = REST * (time.thread_time() - begun) if self._sender.backlog.running else 0.0
                rested, pause_s, failing_since = time.monotonic() + rest, FIRST_PAUSE_S, math.inf
                self._outage = ""
                down.ended()
            except Exception as error:  # also what is no outage: nothing that happens here may end the thread unsaid
                self._outage = str(error) if isinstance(error, Unavailable) else one_line(error)
                self._tell()
                if closing:
                    got_on = self._sender.parts_sent > before
                    failing_since = time.monotonic() if got_on else min(failing_since, time.monotonic())
                    if time.monotonic() - failing_since >= PATIENCE_S:
                        return
                    self._stopped.wait(FIRST_PAUSE_S)
                else:
                    down.goes_on(self._outage)
                    self._closing.wait(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self._tell()

    def _tell(self) -> None:
        """Let those know who wait for the sweep's run."""
        self._parent_run_id = self._sender.parent_run_id
        self._experiment_id = self._sender.experiment_id
        self._tried.set()


class _Outage:
    """Tells once of each time that MLflow cannot be had, and of its end."""

    def __init__(self, told: Callable[[str], None], where: str) -> None:
        self._told, self._where = told, where
        self._since: float | None = None
        self._said = False

    def goes_on(self, cause: str) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if not self._said and now - self._since >= OUTAGE_TOLD_AFTER_S:
            self._said = True
            self._told(f"{self._where}: {cause}; training goes on, and what MLflow lacks is kept until it answers")

    def ended(self) -> None:
        if self._said:
            self._told(f"{self._where} answers again")
        self._since, self._said = None, False


def own_store(folder: RunFolder) -> str:
    """The tracking URI of the store in a run folder."""
    return f"sqlite:///{folder.tracking_database.absolute()}"


def champion_example(folder: RunFolder) -> Path:
    """Where an input of the best model is kept until it is registered."""
    return folder.state / "champion_example.npy"


def sync_command(folder: RunFolder) -> str:
    """What sends what MLflow did not take."""
    return shlex.join([sys.executable, "-m", "sweep.sync", str(folder.path)])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
