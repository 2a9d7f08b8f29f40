"""What the report says, as text and rows, computed from a run folder; `report.py` puts it on the page."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd

from cxr_models.metrics import FURTHER_METRICS, classification_report
from cxr_models.trial import SPLITS, VAL, Diagnosis, Outcome, TrialResult
from sweep.readback import FinalPredictions, Run
from sweep.record import strategy_of
from sweep.verdict_view import verdict_notes
from sweep.wording import count, duration, figure, subset_note

RECALL = "recall/"
EVALUATED = ("loss", "accuracy", "macro_f1")  # shown of each strategy on every part, whatever the objective


@dataclass(frozen=True)
class StrategyRow:
    """A (backbone, freeze).

    Attributes:
        best: None if no trial of it may rank.
        median: of the validation objective over the trials that may rank; NaN if there is none.
    """

    backbone: str
    freeze: str
    best: TrialResult | None
    trials: int
    ranked: int
    median: float
    train_seconds: float


@dataclass(frozen=True)
class AxisRow:
    """The ranked trials with one value of an axis.

    Attributes:
        value: as `TrialConfig` has it.
        best, median: of the validation objective.
    """

    axis: str
    value: Any
    trials: int
    best: float
    median: float


@dataclass(frozen=True)
class ClassRow:
    """A class on the test images, or an average over classes."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class DoctorRow:
    """What the doctor found in one or several trials.

    Attributes:
        trials: how many have it.
        example: the one that evidence and remedy are of.
    """

    name: str
    grave: bool
    trials: int
    example: str
    evidence: str
    remedy: str


def strategy_rows(run: Run) -> tuple[StrategyRow, ...]:
    """The strategies in the order of their best trials, then those of which no trial may rank."""
    order = dict.fromkeys(strategy_of(result) for result in (*run.ranking, *run.results))
    return tuple(_strategy_row(run, *strategy) for strategy in order)


def _strategy_row(run: Run, backbone: str, freeze: str) -> StrategyRow:
    trials = [result for result in run.results if strategy_of(result) == (backbone, freeze)]
    able = [result for result in run.ranking if strategy_of(result) == (backbone, freeze)]
    return StrategyRow(
        backbone=backbone,
        freeze=freeze,
        best=able[0] if able else None,
        trials=len(trials),
        ranked=len(able),
        median=median(result.val[run.objective.metric] for result in able) if able else math.nan,
        train_seconds=sum(result.train_seconds for result in trials),
    )


def contradictions(run: Run) -> list[str]:
    """Where the files of the run folder disagree about the test set; none in a sound folder."""
    stated = run.summary.get("test")
    if not (stated and run.test):
        return []
    found = []
    if stated["classes"] != list(run.test.classes) or stated["confusion_matrix"] != run.test.matrix.tolist():
        found.append("The confusion matrix in summary.json is not the one of predictions.parquet.")
    if run.summary["best"]["trial_id"] != run.test.trial_id:
        found.append(
            f"summary.json names {run.summary['best']['trial_id']}, the predictions are of {run.test.trial_id}."
        )
    return found


def axis_rows(run: Run) -> tuple[AxisRow, ...]:
    """The values of each axis that strategies do not tell apart, in which several ranked trials agree; the best first.

    An axis of which nearly every trial has a value of its own, such as a learning rate, has no rows.
    """
    metric, mode = run.objective.metric, run.objective.mode
    rows: list[AxisRow] = []
    for axis in run.varied:
        found: dict[Any, list[float]] = {}
        for result in run.ranking:  # the best comes first
            found.setdefault(getattr(result.config, axis), []).append(result.val[metric])
        if axis in ("backbone", "freeze", "seed") or not 1 < len(found) <= len(run.ranking) / 2:
            continue
        pick = max if mode == "max" else min
        rows += [AxisRow(axis, value, len(values), pick(values), median(values)) for value, values in found.items()]
    return tuple(rows)


def reading_notes(run: Run) -> list[str]:
    """How far the validation scores carry: what a reader must know before calling one strategy better."""
    if verdict := run.summary.get("verdict"):
        return verdict_notes(verdict)
    notes = ["Small differences between validation scores should not be read as a ranking: nothing was compared."]
    if len(run.ranking) > 1:
        notes.append(
            f"The leading validation score is the best of {len(run.ranking):,} on the same images and therefore "
            "optimistic; "
            + (
                "the test figures of its final model are free of that choice."
                if run.has_test_part
                else "without a test part, no figure here is free of that choice."
            )
        )
    return notes


def doctor_rows(run: Run) -> list[DoctorRow]:
    """A row for each diagnosis that any ended trial has, grave ones first; the best ranked trial is the example."""
    ranks = {result.trial_id: place for place, result in enumerate(run.ranking)}
    having: dict[str, list[tuple[TrialResult, Diagnosis]]] = {}
    for result in sorted(run.results, key=lambda each: ranks.get(each.trial_id, len(ranks))):
        for diagnosis in result.doctor:
            having.setdefault(diagnosis.name, []).append((result, diagnosis))
    rows = [
        DoctorRow(name, found[0][1].grave, len(found), found[0][0].trial_id, found[0][1].evidence, found[0][1].remedy)
        for name, found in having.items()
    ]
    return sorted(rows, key=lambda row: (not row.grave, -row.trials))


def overview(run: Run) -> list[str]:
    """The sweep in a few phrases."""
    counts = Counter(result.outcome for result in run.results)
    outcomes = ", ".join(f"{counts[outcome]:,} {outcome.replace('_', ' ')}" for outcome in Outcome if counts[outcome])
    planned = run.summary.get("trials", {}).get("planned", len(run.results))
    ended = f"{len(run.results):,} of " if planned > len(run.results) else ""
    phrases = [ended + count(planned, "trial") + (f" ({outcomes})" if outcomes else "")]
    if run.split is not None:
        patients = run.split["patient"].nunique()
        phrases.append(f"{count(len(run.split), 'image')} of {count(patients, 'patient')}")
    if subset := subset_note(run.summary.get("data", {})):
        phrases.append(subset)
    if "epochs" in run.summary:
        phrases.append("{run:,} of {full:,} epochs run".format(**run.summary["epochs"]))
    if spared := run.summary.get("epochs", {}).get("from_features"):
        phrases.append(f"{spared:,} of these from stored features of frozen layers")
    if "seconds" in run.summary:
        phrases.append(duration(run.summary["seconds"]["total"], tenths=True))
    return phrases


def fold_rows(run: Run) -> list[tuple[str, str, list[float]]]:
    """(backbone, freeze, the objective of its best trial in each fold) of every strategy; nothing without folds."""
    rows = run.summary.get("strategies", [])
    return [(row["backbone"], row["freeze"], row["by_fold"]) for row in rows if "by_fold" in row]


def best_row(run: Run) -> Mapping[str, Any]:
    """What `summary.json` says of the strategy of the best trial; empty where it says nothing."""
    return next(iter(run.summary.get("strategies", [])), {})


def seed_rows(run: Run) -> list[tuple[str, str, list[float]]]:
    """(backbone, freeze, the test objective of each final model) of every strategy; nothing where each has one."""
    metric = run.objective.metric
    rows = [
        (row["backbone"], row["freeze"], [figures[metric] for figures in row["test_by_seed"] if metric in figures])
        for row in run.summary.get("strategies", [])
        if row.get("test_by_seed")
    ]
    return rows if any(len(values) > 1 for _, _, values in rows) else []


def provenance(run: Run) -> list[tuple[str, str]]:
    """(what, value) of all that a repetition must share with this sweep."""
    pairs = {"seed": run.summary["seed"]} if "seed" in run.summary else {}
    pairs |= {**run.summary.get("machine", {}), **run.summary.get("versions", {})}
    return [(name.replace("_", " "), str(value)) for name, value in pairs.items()]


def class_rows(final: FinalPredictions) -> list[ClassRow]:
    """A row a class, then the macro and the weighted average."""
    return report_rows(classification_report(final.labels, final.scores, final.classes))


def report_rows(report: Mapping[str, Any]) -> list[ClassRow]:
    """`metrics.classification_report` as rows."""
    names = {"macro avg": "macro average", "weighted avg": "weighted average"}
    return [
        ClassRow(names.get(key, key), row["precision"], row["recall"], row["f1-score"], int(row["support"]))
        for key, row in report.items()
        if isinstance(row, Mapping)
    ]


def evaluated_rows(run: Run) -> list[Mapping[str, Any]]:
    """The strategies of `summary.json` whose best trials the final evaluation reached, or could not evaluate."""
    rows = run.summary.get("strategies", [])
    return [row for row in rows if VAL in row or "evaluation_problem" in row]


def evaluated_parts(run: Run) -> list[str]:
    """The parts that there are figures of."""
    return [part for part in SPLITS if any(part in row for row in evaluated_rows(run))]


def evaluated_metrics(run: Run) -> list[str]:
    """What is shown of each part: the metrics of `EVALUATED`, and the objective in front of them if it is another."""
    metric = run.objective.metric
    names = EVALUATED if metric in EVALUATED else (metric, *EVALUATED)
    parts = [row[part] for row in evaluated_rows(run) for part in SPLITS if part in row]
    return [name for name in names if any(name in figures for figures in parts)]


def calibrated_rows(run: Run) -> list[Mapping[str, Any]]:
    """The strategies of `summary.json` that were calibrated."""
    return [row for row in run.summary.get("strategies", []) if "calibration" in row]


def further_figures(run: Run) -> list[str]:
    """The test figures that only the final evaluation has."""
    return [name for name in FURTHER_METRICS if name in (run.summary.get("test") or {})]


def recall_intervals(run: Run) -> dict[str, str]:
    """Class -> its 95 % interval of the recall, for the classes that have one in the summary."""
    stated: Mapping[str, Any] = run.summary.get("test") or {}
    return {
        name.removeprefix(RECALL): f"{figure(value['low'])} to {figure(value['high'])}"
        for name, value in stated.items()
        if name.startswith(RECALL)
    }


def split_counts(split: pd.DataFrame) -> list[tuple[str, list[tuple[int, int]]]]:
    """(row, (images, patients) in train, val, test and together): a row a class, then all."""
    parts = [*(split[split["split"] == name] for name in SPLITS), split]
    classes = sorted(split["label"].unique())
    rows = [(name, [_counted(part[part["label"] == name]) for part in parts]) for name in classes]
    return [*rows, ("together", [_counted(part) for part in parts])]


def _counted(rows: pd.DataFrame) -> tuple[int, int]:
    return len(rows), int(rows["patient"].nunique())
