"""What MLflow is shown of a sweep: names, figures and files, made without MLflow."""

import html
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from cxr_models.metrics import FloatArray, classification_report, confusion_matrix
from cxr_models.trial import UNET, VALIDATION_SCORES, EpochMetrics, Suggestion, TrialConfig, TrialResult
from sweep.wording import is_number, strategy_text

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


def run_name(trial: Suggestion | TrialResult) -> str:
    """`mobilenet_v2_0.35 convs:1 lr 3e-03 · 1a2b3c4d`"""
    config = trial.config
    return f"{strategy_text(config)} lr {config.learning_rate:.0e} · {trial.trial_id}"


def flat_params(spec: Mapping[str, Any]) -> dict[str, str]:
    """A spec as parameters of a run: `search.trials`, `space.learning_rate`, ...; what lies deeper is JSON."""
    params: dict[str, str] = {}
    for section, values in spec.items():
        entries = values if isinstance(values, Mapping) else {"": values}
        for key, value in entries.items():
            params[f"{section}.{key}" if key else section] = _param_text(value)
    return params


def config_params(config: TrialConfig) -> dict[str, str]:
    """A configuration as MLflow has parameters."""
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
        """Recall by class of the validation images alone: every row costs the store time, and training's say little."""
        overall = {name: value for name, value in metrics.train.items() if "/" not in name}
        return {
            **self._named("train", overall),
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

    def of_evaluation(self, parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """`final_train_accuracy`, `final_test_loss`, ... of a trial's best weights."""
        return {
            name: value
            for part, figures in parts.items()
            for name, value in self._named(f"final_{part}", figures).items()
        }

    def of_summary(self, summary: Mapping[str, Any]) -> dict[str, float]:
        """The counts of trials, the best trial's and the test set's figures, as far as the summary has them."""
        metrics = {f"trials_{name}": float(count) for name, count in summary.get("trials", {}).items()}
        metrics |= self._named("best_val", (summary.get("best") or {}).get("val", {}))
        found = summary.get("test") or {}
        # Of each class the recall alone: with many classes, all of its figures are more than MLflow takes at once.
        test = {
            name: interval
            for name, interval in found.items()
            if isinstance(interval, Mapping) and ("/" not in name or name.startswith("recall/"))
        }
        for part, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            known = {name: interval[part] for name, interval in test.items() if is_number(interval[part])}
            named = self._named("test", known)
            metrics |= {f"{name}{suffix}": value for name, value in named.items()}
        return metrics

    def _named(self, prefix: str, values: Mapping[str, float | None]) -> dict[str, float]:
        """None, which JSON has for NaN, is left out."""
        return {f"{prefix}_{self._name(name)}": value for name, value in values.items() if value is not None}

    def _name(self, metric: str) -> str:
        kind, slash, class_name = metric.partition("/")
        return f"{kind}/{self._classes[class_name]}" if slash else kind


@cache
def own_tags() -> Mapping[str, str]:
    """What made a run, for every run."""
    try:
        own = version("cxr-sweep")
    except PackageNotFoundError:
        own = "not installed"  # run from a checkout
    return {"mlflow.source.name": "sweep.run", "mlflow.source.type": "LOCAL", "cxr_sweep.version": own}


def trial_tags(suggestion: Suggestion, sweep: str, parent_run_id: str) -> dict[str, str]:
    """What marks the run of a trial in MLflow."""
    return {
        "mlflow.parentRunId": parent_run_id,
        "sweep": sweep,
        "trial_id": suggestion.trial_id,
        "trial_number": str(suggestion.number),
        "backbone": suggestion.config.backbone,
        "strategy": suggestion.config.freeze,
    }


def one_line(error: Exception) -> str:
    """What went wrong, without MLflow's traceback of retries."""
    if re.search("Max retries exceeded|timed out|Connection (aborted|refused|reset)", str(error)):
        return "it cannot be reached"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def ui_command(uri: str) -> str:
    """What to type to see the runs, or where to look if they lie on a server."""
    if re.match(r"https?://", uri):
        return uri
    # This Python's MLflow: the environment need not be activated, nor the only one. MLFLOW_HOST could say otherwise.
    where = ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", "5000"]
    return shlex.join([sys.executable, "-m", "mlflow", "ui", *where])


def ui_address(uri: str, experiment_id: str) -> str:
    """The page of an experiment's runs; MLflow's own start page shows what it has for language models."""
    server = uri.rstrip("/") if re.match(r"https?://", uri) else "http://127.0.0.1:5000"
    if not experiment_id:
        return server  # it has not been reached so far
    return f"{server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def result_tags(result: TrialResult) -> dict[str, str]:
    """What MLflow is told of how a trial ended."""
    tags = {"outcome": str(result.outcome), "device": result.device, "error": result.error}
    tags["doctor"] = result.doctor_names
    return {name: text for name, text in tags.items() if text}


def _best_tags(best: Mapping[str, Any]) -> dict[str, str]:
    """What MLflow is told of a sweep's best trial, from `best` of its summary."""
    names = ";".join(diagnosis["name"] for diagnosis in best.get("doctor", ()))
    return {"best_trial_id": best["trial_id"], **({"best_doctor": names} if names else {})}


def trial_files(result: TrialResult, folder: Path, classes: Sequence[str]) -> dict[str, str]:
    """Name -> content of what an ended trial leaves to look at; its curves are drawn by MLflow from the metrics.

    Args:
        result: of the trial.
        folder: where the trial kept its validation scores.
        classes: class names; a label is an index into them.
    """
    files = {"error.txt": result.traceback or result.error} if result.error else {}
    scores_file = folder / VALIDATION_SCORES
    # A segmentation keeps counts of pixels there, of which there is no matrix of classes.
    if result.best_epoch and result.config.backbone != UNET and scores_file.is_file():
        with np.load(scores_file) as kept:
            labels, scores = kept["labels"], kept["scores"]
        report = classification_report(labels, scores, classes)
        title = f"Validation images, epoch {result.best_epoch} of {run_name(result)}"
        files["confusion_matrix.html"] = matrix_page(confusion_matrix(labels, scores), classes, title)
        files["classification_report.json"] = json.dumps(report, indent=2, ensure_ascii=False)
        files["classification_report.txt"] = report_text(report)
    return files


PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px system-ui, sans-serif; margin: 16px; }} table {{ border-collapse: collapse; }}
th, td {{ padding: 8px 14px; text-align: right; }} th {{ font-weight: 600; color: #595959; }}
td {{ border: 1px solid #fff; min-width: 64px; }} td span {{ display: block; font-size: 12px; }}
</style></head><body><p>{title}</p>
<table><tr><th>True class ↓ (images), predicted →</th>{head}</tr>
{rows}
</table></body></html>
"""


def matrix_page(matrix: FloatArray, classes: Sequence[str], title: str) -> str:
    """A confusion matrix with each row's shares in percent, as HTML: a figure would take longer than a short trial.

    Args:
        matrix: (classes, classes), true class by row; see `metrics.confusion_matrix`.
        classes: names of the classes.
        title: above the matrix.
    """
    names = [html.escape(name) for name in classes]
    rows = []
    for name, row in zip(names, matrix.tolist(), strict=True):
        total = sum(row)
        cells = "".join(_matrix_cell(count, count / total if total else None) for count in row)
        rows.append(f"<tr><th>{name} ({total:.0f})</th>{cells}</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    return PAGE.format(title=html.escape(title), head=head, rows="\n".join(rows))


def _matrix_cell(count: float, share: float | None) -> str:
    if share is None:
        return f"<td>{count:.0f}<span>–</span></td>"
    ink = "#fff" if share > 0.55 else "#000"
    style = f"background: rgba(8, 48, 107, {share:.3f}); color: {ink}"
    return f'<td style="{style}">{count:.0f}<span>{100 * share:.1f} %</span></td>'


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


def summary_tags(summary: Mapping[str, Any]) -> dict[str, str]:
    """What MLflow is told of how a sweep ended."""
    best, verdict = summary.get("best"), summary.get("verdict")
    return (_best_tags(best) if best else {}) | ({"verdict": verdict["sentence"]} if verdict else {})


def summary_files(summary: Mapping[str, Any]) -> dict[str, str]:
    """The test set's confusion matrix, once there is one."""
    test = summary.get("test") or {}
    if "confusion_matrix" not in test:
        return {}
    matrix = np.asarray(test["confusion_matrix"], dtype=float)
    return {"test_confusion_matrix.html": matrix_page(matrix, test["classes"], "Test images")}
