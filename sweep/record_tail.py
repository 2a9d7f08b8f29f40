"""What is new in the record of a sweep, as it grows: the source of all that MLflow gets of trials."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cxr_models.trial import EpochMetrics, Suggestion, TrialConfig, TrialResult
from sweep.backlog import Backlog
from sweep.ledger import Ledger
from sweep.record import RunFolder

MOST_EPOCHS = 2000  # waiting at once, of a few kB each; the others stay on disk


class Lines:
    """The whole lines of a file that others write to, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0  # bytes
        self._seen = 0  # bytes

    def look(self) -> None:
        """See how far the file goes now; no more is taken until the next look."""
        self._seen = self._path.stat().st_size if self._path.is_file() else 0

    @property
    def at_end(self) -> bool:
        """Whether all that was seen has been taken, but for a line that is being written."""
        return not any(True for _ in self._unread())

    def take(self, most: int | None = None) -> Iterator[dict[str, Any]]:
        """What is new, `most` lines of it."""
        for line in islice(self._unread(), most):
            self._read += len(line)
            yield json.loads(line)

    def _unread(self) -> Iterator[bytes]:
        if self._seen <= self._read:
            return
        at = self._read
        with self._path.open("rb") as file:
            file.seek(at)
            for line in file:
                at += len(line)
                if at > self._seen or not line.endswith(b"\n"):
                    return
                yield line


class RecordTail:
    """Carries what is new in the record into the backlog, but for what the ledger knows as sent.

    A trial's end is carried after all of its epochs. An epoch that the record has twice, because it was trained again,
    is carried once.
    """

    def __init__(self, folder: RunFolder, ledger: Ledger, backlog: Backlog) -> None:
        self._ledger = ledger
        self._backlog = backlog
        self._suggestions = Lines(folder.suggestion_record)
        self._epochs = Lines(folder.epoch_record)
        self._results = Lines(folder.trial_record)
        self._begun: set[str] = set()
        self._last: dict[str, int] = {}  # running trial -> its last epoch that was carried
        self._ended: dict[str, tuple[int, TrialResult]] = {}  # read, but not all of its epochs

    def read(self, now_ms: Callable[[], int], now_s: float) -> None:
        """Read on, as far as there is room in the backlog."""
        # Against the order of writing, so that what is seen of a trial's end is seen of its epochs and its beginning.
        for lines in (self._results, self._epochs, self._suggestions):
            lines.look()
        for entry in self._results.take():
            number, result = entry.pop("number"), TrialResult.from_json(entry)
            if not self._done(result.trial_id):
                self._ended[result.trial_id] = number, result
        for entry in self._suggestions.take():
            suggestion = Suggestion(entry["number"], entry["trial_id"], TrialConfig.from_json(entry["config"]))
            if suggestion.trial_id not in self._begun and not self._done(suggestion.trial_id):
                self._begin(suggestion, now_ms(), now_s)
        room = MOST_EPOCHS - self._backlog.epochs
        if room > 0:
            for entry in self._epochs.take(room):
                self._carry(EpochMetrics.from_json(entry), now_ms())
        all_read = self._epochs.at_end
        for trial_id, (number, result) in list(self._ended.items()):
            if all_read or self._last.get(trial_id, 0) >= result.epochs:
                del self._ended[trial_id]
                self._last.pop(trial_id, None)
                self._backlog.ended(number, result, now_ms())

    def _done(self, trial_id: str) -> bool:
        run = self._ledger.runs.get(trial_id)
        return run is not None and run.ended

    def _begin(self, suggestion: Suggestion, at_ms: int, now_s: float) -> None:
        self._begun.add(suggestion.trial_id)
        sent = self._ledger.runs.get(suggestion.trial_id)
        self._last[suggestion.trial_id] = sent.epochs if sent else 0
        trial = self._backlog.started(suggestion, at_ms, now_s)
        trial.described = sent is not None and sent.described

    def _carry(self, metrics: EpochMetrics, at_ms: int) -> None:
        last = self._last.get(metrics.trial_id)
        if last is not None and metrics.epoch > last:
            self._last[metrics.trial_id] = metrics.epoch
            self._backlog.epoch(metrics, at_ms)
