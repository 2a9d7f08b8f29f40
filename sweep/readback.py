"""A run folder read back, whether its sweep ended, was interrupted or still runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_models.metrics import confusion_matrix
from cxr_models.trial import CLASSIFY, TEST, VAL, EpochMetrics, Objective, TrialResult
from sweep.record import RunFolder, ranked, read_epochs, read_lines, varied_axes
from sweep.reference import ReferenceSpec
from sweep.samples import Samples, read_samples
from sweep.spec import read_spec

SCORE = "score:"


@dataclass(frozen=True)
class FinalPredictions:
    """The chosen model on the test images, or on the validation images of a sweep without a test part.

    Attributes:
        trial_id: of the trial the model comes from.
        part: `test` or `val`.
        classes: in the order of the scores.
        labels: (images,) true class as an index into `classes`.
        scores: (images, classes) probabilities.
        patients: how many different ones.
    """

    trial_id: str
    part: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    patients: int

    @cached_property
    def matrix(self) -> NDArray[np.int64]:
        """Images by true class (rows) and predicted class (columns)."""
        return confusion_matrix(self.labels, self.scores).astype(np.int64)

    @property
    def never_predicted(self) -> list[str]:
        return [name for name, count in zip(self.classes, self.matrix.sum(axis=0), strict=True) if count == 0]


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        summary: `summary.json`, empty if the sweep did not get that far.
        source: where the images came from.
        results: every ended trial, in the order of suggestion.
        epochs: trial -> its epochs in order; also of trials that did not end.
        split: columns path, label, patient and split; None if the sweep stopped before it was made.
        final: the chosen model's predictions; None if the sweep did not get that far.
        samples: a few training images; None in a folder without them.
    """

    folder: RunFolder
    summary: Mapping[str, Any]
    objective: Objective
    source: str
    results: tuple[TrialResult, ...]
    epochs: Mapping[str, tuple[EpochMetrics, ...]]
    split: pd.DataFrame | None
    final: FinalPredictions | None
    samples: Samples | None

    @property
    def test(self) -> FinalPredictions | None:
        """None if the test set was not opened."""
        return self.final if self.final and self.final.part == TEST else None

    @property
    def openings(self) -> int:
        """How often the test set has been opened."""
        return sum(1 for _ in read_lines(self.folder.test_openings))

    @property
    def has_test_part(self) -> bool:
        """Whether there are images to test on; True while the split is not known."""
        return self.split is None or bool((self.split["split"] == TEST).any())

    @property
    def most_seeds(self) -> int:
        """How many final models a strategy has."""
        return max((len(row.get("test_by_seed", ())) for row in self.summary.get("strategies", ())), default=0)

    @cached_property
    def reference(self) -> ReferenceSpec | None:
        """The published figures of the spec."""
        return ReferenceSpec.model_validate(self.summary["reference"]) if "reference" in self.summary else None

    @property
    def name(self) -> str:
        return str(self.summary.get("name", self.folder.path.resolve().name))

    @property
    def interrupted(self) -> bool:
        return bool(self.summary.get("interrupted", True))

    @cached_property
    def ranking(self) -> tuple[TrialResult, ...]:
        return ranked(self.results, self.objective)

    @property
    def unfinished(self) -> tuple[tuple[EpochMetrics, ...], ...]:
        """The epochs of each trial that never ended."""
        ended = {result.trial_id for result in self.results}
        return tuple(epochs for trial_id, epochs in self.epochs.items() if trial_id not in ended)

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """See `record.varied_axes`."""
        return varied_axes(self.results)


def read_run(folder: RunFolder) -> Run:
    """Read what there is of a sweep, ended or interrupted.

    Raises:
        ValueError: the folder is not one of a sweep, or a file in it cannot be understood.
    """
    if not (folder.state.is_dir() and (folder.summary.is_file() or folder.spec.is_file())):
        raise ValueError(
            "expected the folder of a sweep, with state/ and summary.json or spec.yaml in it, but found "
            f"{_found(folder.path)}; give the folder that `python -m sweep.run` wrote"
        )
    summary = json.loads(folder.summary.read_text(encoding="utf-8")) if folder.summary.is_file() else {}
    if summary:
        objective = Objective(**summary["objective"], task=summary.get("task", CLASSIFY))
        source = summary["data"]["source"]
    else:
        spec = read_spec(folder.spec, most_bytes=None)
        objective, source = spec.objective, spec.data.name
    entries = {entry.pop("number"): entry for entry in read_lines(folder.trial_record)}
    results = tuple(TrialResult.from_json(entries[number]) for number in sorted(entries))
    leaders = ranked(results, objective)
    best = summary["best"]["trial_id"] if "best" in summary else leaders[0].trial_id if leaders else ""
    return Run(
        folder=folder,
        summary=summary,
        objective=objective,
        source=source,
        results=results,
        epochs=read_epochs(folder.epoch_record),
        split=pd.read_csv(folder.split, dtype=str, keep_default_na=False) if folder.split.is_file() else None,
        final=_read_final(folder.predictions, best, "test" in summary) if folder.predictions.is_file() else None,
        samples=read_samples(folder.samples) if folder.samples.is_file() else None,
    )


def _found(path: Path) -> str:
    if not path.is_dir():
        return "a file" if path.exists() else "nothing there"
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])]) or "an empty folder"


def _read_final(path: Path, best: str, tested: bool) -> FinalPredictions | None:
    """The best trial's predictions; where they are absent although it was `tested`, those that are there."""
    table = pd.read_parquet(path)
    if best not in set(table["trial_id"]) and tested:
        best = str(table["trial_id"].iloc[0])
    parts = [table[(table["trial_id"] == best) & (table["split"] == part)] for part in (TEST, VAL)]
    table = next((rows for rows in parts if not rows.empty), parts[0])
    if table.empty:
        return None
    table = table[table["seed"] == table["seed"].iloc[0]]  # the final model that is kept; others have other seeds
    if "repeat" in table and table["repeat"].notna().all():
        table = table[table["repeat"] == 1]  # of the folds, so that each image counts once
    columns = [column for column in table.columns if column.startswith(SCORE)]
    classes = tuple(column.removeprefix(SCORE) for column in columns)
    if strangers := sorted(set(table["true"]) - set(classes)):
        raise ValueError(f"{path} has true classes without a score column: {', '.join(map(str, strangers))}")
    return FinalPredictions(
        trial_id=best,
        part=str(table["split"].iloc[0]),
        classes=classes,
        labels=np.array([classes.index(name) for name in table["true"]]),
        scores=table[columns].to_numpy(np.float64),
        patients=int(table["patient"].nunique()),
    )
