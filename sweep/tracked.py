"""What MLflow is shown of a sweep: names, figures and files, made without MLflow."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxr_models.metrics import classification_report, confusion_matrix
from cxr_models.trial import VALIDATION_SCORES, EpochMetrics, Objective, TrialConfig, TrialResult

MAX_CLASS_NAME_LENGTH = 200  # MLflow takes metric names of 250 characters


@dataclass(frozen=True)
class DatasetInfo:
    """The data set of a sweep.

    Attributes:
        digest: hexadecimal; MLflow keeps the first 36 digits.
        source: folder, file or address the images come from.
        classes: split -> class -> images.
    """

    name: str
    digest: str
    source: str
    images: int
    patients: int
    classes: Mapping[str, Mapping[str, int]]

    @property
    def profile(self) -> str:
        """The counts, as JSON."""
        totals = {split: sum(counts.values()) for split, counts in self.classes.items()}
        counts = {"images": self.images, "patients": self.patients, **totals, "classes": self.classes}
        return json.dumps(counts, ensure_ascii=False)


def run_name(trial_id: str, config: TrialConfig) -> str:
    """`mobilenet_v2_0.35 convs:1 lr 3e-03 · 1a2b3c4d`"""
    return f"{config.backbone} {config.freeze} lr {config.learning_rate:.0e} · {trial_id}"


def flat_params(spec: Mapping[str, Any]) -> dict[str, str]:
    """A spec as parameters of a run: `search.trials`, `space.learning_rate`, ...; what lies deeper is JSON."""
    params: dict[str, str] = {}
    for section, values in spec.items():
        entries = values if isinstance(values, Mapping) else {"": values}
        for key, value in entries.items():
            params[f"{section}.{key}" if key else section] = _param_text(value)
    return params


def config_params(config: TrialConfig) -> dict[str, str]:
    return {axis: _param_text(value) for axis, value in config.to_json().items()}


def _param_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class MetricNames:
    """Figures under the names MLflow gets, such as `val_macro_f1` and `val_recall/<class>`.

    MLflow allows letters, digits and `_-. :` in names; different classes get different names.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes: dict[str, str] = {}
        for index, class_name in enumerate(classes, start=1):
            allowed = re.sub(r"[^\w\- .:]|^\.{1,2}$", "_", class_name)[:MAX_CLASS_NAME_LENGTH]
            self._classes[class_name] = allowed if allowed not in self._classes.values() else f"{allowed}_{index}"

    def of_epoch(self, metrics: EpochMetrics) -> dict[str, float]:
        return {
            **self._named("train", metrics.train),
            **self._named("val", metrics.val),
            "learning_rate": metrics.learning_rate,
            "epoch_seconds": metrics.seconds,
            "images_per_second": metrics.images_per_second,
        }

    def of_result(self, result: TrialResult) -> dict[str, float]:
        """The best epoch's figures and the parameters; only the time for a trial without an epoch."""
        metrics = {"train_seconds": result.train_seconds}
        if result.best_epoch:
            metrics |= self._named("best_val", result.val)
            metrics["best_epoch"] = result.best_epoch
            metrics["trainable_parameters"] = result.trainable_parameters
            metrics["frozen_parameters"] = result.frozen_parameters
        return metrics

    def of_summary(self, summary: Mapping[str, Any]) -> dict[str, float]:
        """The counts of trials, the best trial's and the test set's figures, as far as the summary has them."""
        metrics = {f"trials_{name}": float(count) for name, count in summary.get("trials", {}).items()}
        metrics |= self._named("best_val", (summary.get("best") or {}).get("val", {}))
        found = summary.get("test") or {}
        test = {name: interval for name, interval in found.items() if isinstance(interval, Mapping)}
        for part, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            named = self._named("test", {name: interval[part] for name, interval in test.items()})
            metrics |= {f"{name}{suffix}": value for name, value in named.items()}
        return metrics

    def _named(self, prefix: str, values: Mapping[str, float | None]) -> dict[str, float]:
        """None, which JSON has for NaN, is left out."""
        return {f"{prefix}_{self._name(name)}": value for name, value in values.items() if value is not None}

    def _name(self, metric: str) -> str:
        kind, slash, class_name = metric.partition("/")
        return f"{kind}/{self._classes[class_name]}" if slash else kind


def trial_files(
    epochs: Sequence[EpochMetrics], result: TrialResult, folder: Path, classes: Sequence[str], objective: Objective
) -> dict[str, bytes]:
    """Name -> content of what an ended trial leaves to look at.

    Args:
        epochs: of the trial, in order.
        result: of the trial.
        folder: where the trial kept its validation scores.
        classes: class names; a label is an index into them.
        objective: which curve stands beside the loss.
    """
    from sweep import plots

    files: dict[str, bytes] = {}
    if epochs:
        title = run_name(result.trial_id, result.config)
        files["curves.png"] = plots.png(plots.trial_curves(epochs, objective, title))
    if result.error:
        files["error.txt"] = (result.traceback or result.error).encode()
    scores_file = folder / VALIDATION_SCORES
    if result.best_epoch and scores_file.is_file():
        files |= _validation_files(scores_file, classes, f"Validation images, epoch {result.best_epoch}")
    return files


def _validation_files(scores_file: Path, classes: Sequence[str], title: str) -> dict[str, bytes]:
    from sweep import plots

    with np.load(scores_file) as kept:
        labels, scores = kept["labels"], kept["scores"]
    report = classification_report(labels, scores, classes)
    return {
        "confusion_matrix.png": plots.png(plots.confusion_matrix(confusion_matrix(labels, scores), classes, title)),
        "classification_report.json": json.dumps(report, indent=2, ensure_ascii=False).encode(),
        "classification_report.txt": report_text(report).encode(),
    }


def report_text(report: Mapping[str, Any]) -> str:
    """scikit-learn's dictionary as a table: a row for each class and average."""
    width = max(map(len, report))
    columns = ("precision", "recall", "f1-score", "support")
    lines = [f"{'':{width}}" + "".join(f"{column:>11}" for column in columns)]
    for name, row in report.items():
        if isinstance(row, Mapping):
            shares = "".join(f"{row[column]:>11.3f}" for column in columns[:-1])
            lines.append(f"{name:{width}}{shares}{row['support']:>11.0f}")
        else:  # accuracy stands under f1-score, as scikit-learn prints it
            lines.append(f"{name:{width}}{row:>33.3f}")
    return "\n".join(lines) + "\n"


def summary_files(summary: Mapping[str, Any]) -> dict[str, bytes]:
    """The test set's confusion matrix, once there is one."""
    from sweep import plots

    test = summary.get("test") or {}
    if "confusion_matrix" not in test:
        return {}
    matrix = np.asarray(test["confusion_matrix"], dtype=float)
    figure = plots.confusion_matrix(matrix, test["classes"], "Test images")
    return {"test_confusion_matrix.png": plots.png(figure)}
