"""What MLflow has been given of a sweep, and what there is to give beside the record.

Both are files of lines in `state/`. The ledger says how far each run has been sent; one that lacks its last lines
costs calls, never a run or a figure: MLflow drops what it has already, and runs are found by their tags.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweep.record import RunFolder, append_line, drop_cut_line, read_lines

SWEEP = ""  # stands for the sweep's own run where others have a trial's id


@dataclass
class SentRun:
    """How far a run has been sent.

    Attributes:
        run_id: MLflow's.
        described: whether it has its parameters.
        epochs: the last one that it has, 0 for none.
        status: how it ended, "" while it runs.
        figures: of the final evaluation, as it has them.
    """

    run_id: str
    described: bool = False
    epochs: int = 0
    status: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing but final figures can come: a trial that was killed may go on."""
        return self.status not in ("", "KILLED")


class Ledger:
    """How far a sweep has been sent. It holds no address of a server: another one may come next.

    Attributes:
        sweep_id: marks the runs of this sweep, wherever they are sent.
        runs: trial -> its run, `SWEEP` -> the sweep's own.
        spooled: how many entries of the spool have been sent.
        registered: trial -> the address of the model that was registered of it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.state / "tracking.jsonl"
        self.sweep_id = ""
        self.runs: dict[str, SentRun] = {}
        self.spooled = 0
        self.registered: dict[str, str] = {}
        drop_cut_line(self._path)
        for entry in read_lines(self._path):
            self._take(entry)
        if not self.sweep_id:
            self._add({"sweep_id": uuid.uuid4().hex})

    def created(self, trial_id: str, run_id: str) -> None:
        self._add({"trial": trial_id, "run": run_id})

    def sent(self, trial_id: str, epochs: int) -> None:
        """A run has its parameters and its epochs up to `epochs`."""
        self._add({"trial": trial_id, "epochs": epochs})

    def status(self, trial_id: str, status: str) -> None:
        """A run has ended, or goes on: `status` is "" then."""
        self._add({"trial": trial_id, "status": status})

    def figures(self, trial_id: str, figures: Mapping[str, float]) -> None:
        self._add({"trial": trial_id, "figures": dict(figures)})

    def spooled_to(self, entries: int) -> None:
        self._add({"spooled": entries})

    def model(self, trial_id: str, address: str) -> None:
        self._add({"model": address, "of": trial_id})

    def forget_runs(self) -> None:
        """The server knows none of them: everything is sent again, to new runs."""
        self._add({"forgotten": True})

    def forget(self, trial_id: str) -> None:
        """The server does not know this run."""
        self._add({"forgotten": trial_id})

    def lacking(self, epochs: Mapping[str, int]) -> int:
        """How many epochs have not been sent.

        Args:
            epochs: trial -> how many it has.
        """
        runs = dict(self.runs)  # whoever asks may be in another thread
        sent = {trial_id: epochs.get(trial_id, 0) if run.ended else run.epochs for trial_id, run in runs.items()}
        return sum(max(0, number - sent.get(trial_id, 0)) for trial_id, number in epochs.items())

    def _add(self, entry: Mapping[str, Any]) -> None:
        append_line(self._path, entry)
        self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        if "sweep_id" in entry:
            self.sweep_id = entry["sweep_id"]
        elif "spooled" in entry:
            self.spooled = entry["spooled"]
        elif "model" in entry:
            self.registered[entry["of"]] = entry["model"]
        elif entry.get("forgotten") is True:
            self.runs, self.spooled, self.registered = {}, 0, {}
        elif "forgotten" in entry:
            self.runs.pop(entry["forgotten"], None)
        elif "run" in entry:
            self.runs[entry["trial"]] = SentRun(entry["run"])
        else:
            self._take_progress(self.runs[entry["trial"]], entry)

    @staticmethod
    def _take_progress(run: SentRun, entry: Mapping[str, Any]) -> None:
        if "epochs" in entry:
            run.described, run.epochs = True, entry["epochs"]
        if "status" in entry:
            run.status = entry["status"]
        if "figures" in entry:
            run.figures |= entry["figures"]


class Spool:
    """What is sent beside the record, in the order it happened; each entry names its `kind`.

    `opened` and `resumed` begin a session, `finished` ends it; `test_opened`, `evaluated` and `champion` lie between.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.state / "tracking_spool.jsonl"
        drop_cut_line(self._path)

    @property
    def path(self) -> Path:
        return self._path

    def add(self, kind: str, **values: Any) -> None:
        append_line(self._path, {"kind": kind, **values})

    def entries(self) -> list[dict[str, Any]]:
        """All of them: a handful a strategy."""
        return list(read_lines(self._path))


def ends_open(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the last session of a sweep came to no end of its own: its process was killed."""
    last = [entry["kind"] for entry in entries if entry["kind"] in ("opened", "resumed", "finished")][-1:]
    return last != ["finished"]
