"""The Optuna study of a sweep as a file, beside the record that is the truth."""

import math
import time
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from cxr_models.storage import told_of_space
from sweep.record import drop_cut_line

# Ends of trials are written as they happen, what is between them at most this often.
JOURNAL_INTERVAL_S = 1.0


class StudyJournal:
    """The whole study as a file, which Optuna's dashboard can read while it grows.

    It is written for people: a sweep goes on from its own record, and what this file lacks is filled up then.

    Args:
        path: of the file.
        name: of the study.
        direction: of its objective.
        resumed: the file is one of an earlier session, which is gone on with.

    Raises:
        FileExistsError: it is there already, and not to be gone on with.
    """

    def __init__(self, path: Path, name: str, direction: StudyDirection, *, resumed: bool) -> None:
        if path.exists() and not resumed:
            raise FileExistsError(f"expected a journal that does not exist yet, got {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # of a writer that was killed
        drop_cut_line(path)
        self._ids: dict[int, int] = {}
        self._known: dict[int, FrozenTrial] = {}
        try:
            self._open(path, name, direction)
        except (ValueError, LookupError):
            # The record of the sweep is the truth: what this file lost is written anew from there.
            path.replace(path.with_name(f"{path.name}.damaged"))
            self._open(path, name, direction)
        self._file.write()

    def _open(self, path: Path, name: str, direction: StudyDirection) -> None:
        self._file = _BatchedFile(path)
        self._storage = JournalStorage(self._file)
        studies = self._storage.get_all_studies()
        if studies:
            self._study = studies[0]._study_id
        else:
            self._study = self._storage.create_new_study([direction], name)
        self._known = {trial.number: trial for trial in self._storage.get_all_trials(self._study)}

    def begin(self, number: int, trial: FrozenTrial) -> None:
        """Note a trial that begins; numbers come in order."""
        if number in self._known:
            self._ids[number] = self._known[number]._trial_id
        else:
            # On the disk with the next write: by then the record of the sweep has the trial, too.
            self._ids[number] = self._storage.create_new_trial(self._study, trial)

    def report(self, number: int, epoch: int, value: float) -> None:
        """Note the objective after an epoch."""
        if not self._has(number, epoch):
            self._storage.set_trial_intermediate_value(self._ids[number], epoch, value)
            self._file.write_if_due()

    def finish(self, number: int, state: TrialState, value: float | None) -> None:
        """Note how a trial ended, and wait until all is on the disk."""
        trial_id = self._ids.pop(number)
        if number not in self._known or not self._known[number].state.is_finished():
            self._storage.set_trial_state_values(trial_id, state, None if value is None else [value])
            self._file.write()

    def close(self) -> None:
        """Bring to the disk what is not there yet."""
        self._file.write()

    def _has(self, number: int, epoch: int) -> bool:
        """Whether an earlier session has written it."""
        known = self._known.get(number)
        return known is not None and (known.state.is_finished() or epoch in known.intermediate_values)


class _BatchedFile(BaseJournalBackend):
    """Optuna's journal file for one writer: entries are read from memory, and reach the disk together."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = JournalFileBackend(str(path))
        self._entries: list[dict[str, Any]] = list(self._file.read_logs(0))
        self._written = len(self._entries)
        self._written_at = -math.inf

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self._entries[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._entries.extend(logs)

    def write(self) -> None:
        """Write what is not on the disk yet, and wait until it is."""
        news, self._written = self._entries[self._written :], len(self._entries)
        if news:  # noted as written before: an interruption must not write them twice, and what is missing is filled up
            with told_of_space(self._path):
                self._file.append_logs(news)
        self._written_at = time.monotonic()

    def write_if_due(self) -> None:
        if time.monotonic() > self._written_at + JOURNAL_INTERVAL_S:
            self.write()
