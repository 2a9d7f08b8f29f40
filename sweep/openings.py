"""How often a test set has been opened: by a sweep, and by those before it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cxr_models.trial import TrialResult
from sweep.record import RunFolder, append_line, read_lines
from sweep.tracking import Tracker


@dataclass(frozen=True)
class Openings:
    """The record of the openings of a test set.

    Attributes:
        own: of the sweep.
        shared: of every sweep with the same cache that tested on these images, whatever their names.
    """

    own: Path
    shared: Path

    @classmethod
    def of_images(cls, digests: Sequence[str], folder: RunFolder, cache_dir: Path) -> "Openings":
        """The openings of a test set.

        Args:
            digests: of the test images' files.
            folder: of the sweep.
            cache_dir: that sweeps have in common.
        """
        name = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()[:16]
        return cls(folder.test_openings, cache_dir / "test_openings" / f"{name}.jsonl")

    def record(self, finalists: Sequence[TrialResult], tracker: Tracker, *, models: int) -> None:
        """Note that the test set is about to be read, before it is.

        Args:
            finalists: the best trial of each strategy, the best one first.
            tracker: tells the sweep's run.
            models: how many final models will read it.
        """
        run = str(self.own.parent.parent)
        earlier = {entry["run"] for entry in read_lines(self.shared)} - {run}
        opening = {
            "opened": datetime.now(UTC).isoformat(timespec="seconds"),
            "trials": [result.trial_id for result in finalists],
            "models": models,
            "earlier_sweeps": len(earlier),
        }
        append_line(self.own, opening)
        self.shared.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.shared, {"opened": opening["opened"], "run": run, "models": models})
        text = f"{opening['opened']}: {models} final models of {len(finalists)} strategies"
        tracker.test_opened(sum(1 for _ in read_lines(self.own)), text)
