"""`python -m sweep.report RUN_DIR`: one self-contained page that answers what the sweep asked.

Everything on the page is computed from the run folder, so that no figure is typed by hand, and the test figures, the
confusion matrix and the per-class table come from one set of predictions.
"""

import argparse
import base64
import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from cxr_models.metrics import classification_report
from cxr_models.storage import written_whole
from cxr_models.trial import (
    NO_MASK,
    SPLITS,
    VAL,
    Outcome,
    TrialConfig,
    TrialResult,
)
from sweep import plots
from sweep.readback import FinalPredictions, Run, read_run
from sweep.record import RunFolder, best_by_strategy, strategy_of
from sweep.segment_report import overlay_rows
from sweep.tasks import AXES_OF

METRIC_NAMES: Mapping[str, str] = {
    "loss": "cross-entropy loss",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "dice": "Dice",
    "iou": "IoU",
    "pixel_accuracy": "pixel accuracy",
}
RECALL = "recall/"


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
class ClassRow:
    """A class on the test images, or an average over classes."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


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


def reading_notes(run: Run) -> list[str]:
    """How far the validation scores carry: what a reader must know before calling one strategy better."""
    notes = ["Validation scores carry no interval in this report, and no test compares the strategies here."]
    images = 0 if run.split is None else int((run.split["split"] == VAL).sum())
    classified = "accuracy" in run.objective.metrics
    if images and classified:
        notes[0] += (
            f" The validation set has {images:,} images: one image is {100 / images:.2f} percentage points of accuracy."
        )
    leaders = best_by_strategy(run.results, run.objective)
    if images and classified and len(leaders) > 1:
        first, second = (round(result.val["accuracy"] * images) for result in leaders[:2])
        notes.append(
            f"The leading trials of the first two strategies have {first:,} and {second:,} of these {images:,} images "
            f"right: a difference of {_count(abs(first - second), 'image')}."
        )
    metric = run.objective.metric
    stated = (run.summary.get("test") or {}).get(metric, {})
    if _is_number(stated.get("low")) and _is_number(stated.get("high")):
        notes.append(
            f"As a yardstick, the 95 % interval of the test {_metric_name(metric)} is "
            f"{stated['high'] - stated['low']:.3f} wide, from {_count(run.summary['test']['images'], 'image')}. "
            "Differences between strategies' validation scores smaller than an interval of that kind should not be "
            "read as a ranking."
        )
    else:
        notes.append("Small differences between strategies' validation scores should not be read as a ranking.")
    if len(run.ranking) > 1:
        notes.append(
            f"The leading validation score is the best of {len(run.ranking):,} on the same images and therefore "
            "optimistic; test figures are free of that choice."
        )
    return notes


def trial_notes(run: Run) -> list[str]:
    """What the ranked trials themselves say against reading them at face value."""
    unripe = sum(map(_ends_at_its_best, run.ranking))
    blind = sum(map(_misses_a_class, run.ranking))
    notes = []
    if unripe:
        notes.append(f"▸ {_count(unripe, 'trial')} had the best epoch at the last one allowed: more might have helped.")
    if blind:
        notes.append(f"∅ {_count(blind, 'trial')} recognised not one validation image of some class.")
    return notes


def _ends_at_its_best(result: TrialResult) -> bool:
    return result.best_epoch == result.config.epochs


def _misses_a_class(result: TrialResult) -> bool:
    return any(name.startswith(RECALL) and value == 0.0 for name, value in result.val.items())


def _marks(result: TrialResult) -> str:
    return "▸" * _ends_at_its_best(result) + "∅" * _misses_a_class(result)


def overview(run: Run) -> list[str]:
    """The sweep in a few phrases."""
    counts = Counter(result.outcome for result in run.results)
    outcomes = ", ".join(f"{counts[outcome]:,} {outcome.replace('_', ' ')}" for outcome in Outcome if counts[outcome])
    planned = run.summary.get("trials", {}).get("planned", len(run.results))
    ended = f"{len(run.results):,} of " if planned > len(run.results) else ""
    phrases = [ended + _count(planned, "trial") + (f" ({outcomes})" if outcomes else "")]
    if run.split is not None:
        patients = run.split["patient"].nunique()
        phrases.append(f"{_count(len(run.split), 'image')} of {_count(patients, 'patient')}")
    if "epochs" in run.summary:
        phrases.append("{run:,} of {full:,} epochs run".format(**run.summary["epochs"]))
    if spared := run.summary.get("epochs", {}).get("from_features"):
        phrases.append(f"{spared:,} of these from stored features of frozen layers")
    if "seconds" in run.summary:
        phrases.append(_duration(run.summary["seconds"]["total"]))
    return phrases


def provenance(run: Run) -> list[tuple[str, str]]:
    """(what, value) of all that a repetition must share with this sweep."""
    pairs = {"seed": run.summary["seed"]} if "seed" in run.summary else {}
    pairs |= {**run.summary.get("machine", {}), **run.summary.get("versions", {})}
    return [(name.replace("_", " "), str(value)) for name, value in pairs.items()]


def class_rows(test: FinalPredictions) -> list[ClassRow]:
    """A row a class, then the macro and the weighted average."""
    found = classification_report(test.labels, test.scores, test.classes)
    names = {**{name: name for name in test.classes}, "macro avg": "macro average", "weighted avg": "weighted average"}
    return [
        ClassRow(name, row["precision"], row["recall"], row["f1-score"], int(row["support"]))
        for name, row in ((name, found[key]) for key, name in names.items())
    ]


def recall_intervals(run: Run) -> dict[str, str]:
    """Class -> its 95 % interval of the recall, for the classes that have one in the summary."""
    stated: Mapping[str, Any] = run.summary.get("test") or {}
    return {
        name.removeprefix(RECALL): f"{_figure(value['low'])} to {_figure(value['high'])}"
        for name, value in stated.items()
        if name.startswith(RECALL)
    }


def split_counts(split: pd.DataFrame) -> list[tuple[str, list[int]]]:
    """(row, images in train, val, test and together): a row a class, all images, all patients."""
    parts = [*(split[split["split"] == name] for name in SPLITS), split]
    classes = sorted(split["label"].unique())
    rows = [(name, [int((part["label"] == name).sum()) for part in parts]) for name in classes]
    rows.append(("Images", [len(part) for part in parts]))
    rows.append(("Patients", [part["patient"].nunique() for part in parts]))
    return rows


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` from the other files of the folder.

    Raises:
        ValueError: the folder is not one of a sweep, or a file in it cannot be understood.
    """
    page = render(read_run(folder))
    with written_whole(folder.report) as scratch:
        scratch.write_text(page, encoding="utf-8")
    return folder.report


def render(run: Run) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("sweep"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(setting=_setting, marks=_marks, duration=_duration, figure=_figure, metric=_metric_name)
    return environment.get_template("report.html").render(
        run=run,
        metric=run.objective.metric,
        metrics=_tested_metrics(run),
        overview=overview(run),
        best=run.ranking[0] if run.ranking else None,
        strategies=strategy_rows(run),
        axes=AXES_OF[run.objective.task],
        varied=run.varied,
        constants=[axis for axis in AXES_OF[run.objective.task] if axis not in run.varied],
        failed=[result for result in run.results if result.outcome is Outcome.FAILED],
        unranked=[result for result in run.results if result.outcome is not Outcome.FAILED and not result.best_epoch],
        contradictions=contradictions(run),
        reading_notes=reading_notes(run),
        trial_notes=trial_notes(run),
        per_class=class_rows(run.test) if run.test else [],
        recall_intervals=recall_intervals(run),
        splits=SPLITS,
        split_rows=split_counts(run.split) if run.split is not None else [],
        figures=_figures(run),
        overlays=overlay_rows(run.folder),
        masked=bool(run.ranking) and run.ranking[0].config.lung_mask != NO_MASK,
        command=f"python -m sweep.run {shlex.quote(str(run.folder.spec))}",
        provenance=provenance(run),
        spec=run.folder.spec.read_text(encoding="utf-8") if run.folder.spec.is_file() else "",
    )


def _tested_metrics(run: Run) -> list[str]:
    """The objective first, then the others; the loss, which has no natural scale, last."""
    order = dict.fromkeys((run.objective.metric, *(name for name in run.objective.metrics if name != "loss"), "loss"))
    return [name for name in order if name in (run.summary.get("test") or {})]


def _figures(run: Run) -> dict[str, str]:
    """Figure -> its data URI: a picture of its own, whose element ids cannot clash with another's in the page."""
    figures: dict[str, Figure] = {}
    if run.ranking:
        epochs = [metrics for trial in run.epochs.values() for metrics in trial]
        figures["strategies"] = plots.strategy_comparison(run.results, run.objective)
        figures["curves"] = plots.sweep_curves(epochs, run.results, run.objective)
    if run.test:
        figures["confusion"] = plots.confusion_matrix(run.test.matrix.astype(np.float64), run.test.classes)
    return {name: _data_uri(plots.svg(figure)) for name, figure in figures.items()}


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _setting(config: TrialConfig, axis: str) -> str:
    value = getattr(config, axis)
    if axis == "weights":
        return PurePath(value).name  # of a file; its folder is in spec.yaml
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _figure(value: Any) -> str:
    """A metric to three decimals; a dash for what could not be computed."""
    return f"{value:.3f}" if _is_number(value) else "–"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _metric_name(name: str) -> str:
    return METRIC_NAMES.get(name, name)


def _duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sweep.report", description="Write report.html of a run folder.")
    parser.add_argument("run_dir", type=Path, help="the folder a sweep wrote, ended or interrupted")
    folder = parser.parse_args(arguments).run_dir
    try:
        print(write_report(RunFolder(folder)))
    except ValueError as error:
        print(f"cannot report on {folder}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
