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
from cxr_models.trial import AXES, CLASSIFY, TEST, EpochMetrics, Objective, Outcome, TrialConfig, TrialResult
from sweep.record import RunFolder, ranked, read_lines
from sweep.spec import read_spec

SCORE = "score:"


@dataclass(frozen=True)
class FinalPredictions:
    """The chosen model on the test images.

    Attributes:
        trial_id: of the trial the model comes from.
        classes: in the order of the scores.
        labels: (images,) true class as an index into `classes`.
        scores: (images, classes) probabilities.
        patients: how many different ones.
    """

    trial_id: str
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
        test: None if the test set was not opened.
    """

    folder: RunFolder
    summary: Mapping[str, Any]
    objective: Objective
    source: str
    results: tuple[TrialResult, ...]
    epochs: Mapping[str, tuple[EpochMetrics, ...]]
    split: pd.DataFrame | None
    test: FinalPredictions | None

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
        """The axes that differ between trials, what the sweep compares first."""
        seen = {axis: {getattr(result.config, axis) for result in self.results} for axis in AXES}
        return tuple(axis for axis in AXES if len(seen[axis]) > 1)


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
        spec = read_spec(folder.spec)
        objective, source = spec.objective, spec.data.source
    entries = {entry.pop("number"): entry for entry in read_lines(folder.trial_record)}
    return Run(
        folder=folder,
        summary=summary,
        objective=objective,
        source=source,
        results=tuple(_result(entries[number]) for number in sorted(entries)),
        epochs=_read_epochs(folder.epoch_record),
        split=pd.read_csv(folder.split, dtype=str, keep_default_na=False) if folder.split.is_file() else None,
        test=_read_test(folder.predictions) if folder.predictions.is_file() else None,
    )


def _found(path: Path) -> str:
    if not path.is_dir():
        return "a file" if path.exists() else "nothing there"
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])]) or "an empty folder"


def _result(entry: Mapping[str, Any]) -> TrialResult:
    known = {"config": TrialConfig.from_json(entry["config"]), "outcome": Outcome(entry["outcome"])}
    return TrialResult(**{**entry, **known})


def _read_epochs(path: Path) -> Mapping[str, tuple[EpochMetrics, ...]]:
    # A resumed trial repeats the epochs after its checkpoint; the later entry is the one it went on from.
    trials: dict[str, dict[int, EpochMetrics]] = {}
    for entry in read_lines(path):
        metrics = EpochMetrics(**entry)
        trials.setdefault(metrics.trial_id, {})[metrics.epoch] = metrics
    return {trial_id: tuple(epochs[number] for number in sorted(epochs)) for trial_id, epochs in trials.items()}


def _read_test(path: Path) -> FinalPredictions | None:
    table = pd.read_parquet(path)
    table = table[table["split"] == TEST]
    if table.empty:
        return None
    columns = [column for column in table.columns if column.startswith(SCORE)]
    classes = tuple(column.removeprefix(SCORE) for column in columns)
    if strangers := sorted(set(table["true"]) - set(classes)):
        raise ValueError(f"{path} has true classes without a score column: {', '.join(map(str, strangers))}")
    return FinalPredictions(
        trial_id=str(table["trial_id"].iloc[0]),
        classes=classes,
        labels=np.array([classes.index(name) for name in table["true"]]),
        scores=table[columns].to_numpy(np.float64),
        patients=int(table["patient"].nunique()),
    )
