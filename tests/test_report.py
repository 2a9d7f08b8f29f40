"""The report says what the run folder holds, all of it, and nothing a browser could take for markup or fetch."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cxr_models.intervals import patient_intervals
from cxr_models.metrics import confusion_matrix
from cxr_models.trial import Diagnosis, EpochMetrics, Objective, Outcome, TrialConfig, TrialResult
from sweep.record import Record, RunFolder, append_line, write_json
from sweep.report import main, write_report
from sweep.samples import Samples, write_samples

OBJECTIVE = Objective("macro_f1", "max")
CLASSES = ("covid", "normal", "pneumonia")
SPEC = "name: depth\ndata: phantom\nobjective: macro_f1\nsearch: {trials: 4}\nspace: {backbone: vanilla_cnn}\n"
HOSTILE = "<script>alert('x')</script> & \"$\\frac$\""


class Page(HTMLParser):
    """A page taken apart: text without style sheets, ids, attributes, and each table with an id as rows of cells."""

    VOID = ("meta", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._table = ""
        self.feed(self.source)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    @property
    def ids(self) -> list[str]:
        return [value for name, value in self.attributes if name == "id"]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = dict(attrs)["id"] or ""
            self.tables[self._table] = []
        if tag == "tr":
            self.tables[self._table].append([])
        if tag in ("td", "th"):
            self.tables[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words.append(data)
        if "td" in self._open or "th" in self._open:
            cells = self.tables[self._table][-1]
            cells[-1] = f"{cells[-1]} {data.strip()}".strip()


def result(number: int, value: float = 0.5, **changes: Any) -> TrialResult:
    values: dict[str, Any] = {
        "trial_id": f"trial-{number}",
        "config": TrialConfig("vanilla_cnn", freeze="none", learning_rate=10.0**-number, epochs=4),
        "outcome": Outcome.COMPLETED,
        "epochs": 3,
        "best_epoch": 2,
        "val": {"loss": 1.0 - value, "accuracy": value, "macro_f1": value, "balanced_accuracy": value, "auroc": value},
        "trainable_parameters": 23_456,
        "frozen_parameters": 128,
        "train_seconds": 30.0,
    }
    return TrialResult(**{**values, **changes})


def record(folder: RunFolder, results: list[TrialResult]) -> None:
    book = Record(folder, OBJECTIVE)
    for number, each in enumerate(results):
        for epoch in range(1, each.epochs + 1):
            book.epoch(epoch_metrics(each.trial_id, epoch, 0.1 * epoch))
        book.ended(number, each)


def epoch_metrics(trial_id: str, epoch: int, value: float) -> EpochMetrics:
    measured = dict.fromkeys(("loss", "accuracy", "macro_f1", "balanced_accuracy", "auroc"), value)
    return EpochMetrics(trial_id, epoch, 0, 1e-3, measured, measured, seconds=1.0, images_per_second=60.0)


RESULTS = [
    result(1, 0.70),
    result(2, 0.80, config=TrialConfig("mobilenet_v2_0.35", freeze="stages:1", epochs=4)),
    result(3, 0.60, outcome=Outcome.STOPPED_EARLY, epochs=1, best_epoch=1),
    result(4, outcome=Outcome.FAILED, error="OOM in epoch 1", traceback="Traceback: it broke", val={}, best_epoch=0),
]


def part(value: float) -> dict[str, Any]:
    row = {"precision": value, "recall": value, "f1-score": value}
    report = {name: {**row, "support": 8.0} for name in CLASSES}
    averages = {name: {**row, "support": 24.0} for name in ("macro avg", "weighted avg")}
    return {"loss": value, "accuracy": value, "macro_f1": value, "report": {**report, "accuracy": value, **averages}}


STRATEGIES = [
    {
        "backbone": "mobilenet_v2_0.35",
        "freeze": "stages:1",
        "trial_id": "trial-2",
        "outcome": "completed",
        "best_epoch": 4,
        "config": {"pooling": "flatten", "hidden_units": [1024]},
        "trainable_parameters": 23456,
        "best_epoch_by_loss": 5,
        "best_epoch_by_accuracy": 19,
        "train": part(0.9),
        "val": part(0.8),
        "test": part(0.7),
    },
    {
        "backbone": "vanilla_cnn",
        "freeze": "none",
        "trial_id": "trial-1",
        "outcome": "stopped_early",
        "best_epoch": 1,
        "evaluation_problem": "out of memory",
    },
]
REFERENCE = {
    "source": "a report",
    "classes": ["COVID", "Normal", "Pneu_monia"],
    "images": {"test": 3175},
    "results": [
        {
            "backbone": "mobilenet_v2_0.35",
            "freeze": "stages:1",
            "label": "head only",
            "accuracy": {"test": 0.908},
            "trainable_parameters": 64753156,
            "seconds": 1502,
            "best_epoch_by_loss": 5,
            "per_class": {"COVID": [0.95, 0.92, 0.94]},
        },
        {
            "label": "by its matrix",
            "accuracy": {"test": 0.9},
            "confusion_matrix": [[2, 0, 0], [0, 0, 1], [0, 1, 0]],
        },
    ],
}


def write_split(folder: RunFolder, classes: tuple[str, ...]) -> None:
    rows = [
        (f"{name}/{i}.png", name, f"p{k}-{i // 2}", ("train", "train", "train", "val", "val", "test", "test")[i % 7])
        for k, name in enumerate(classes)
        for i in range(14)
    ]
    pd.DataFrame(rows, columns=["path", "label", "patient", "split"]).to_csv(folder.split, index=False)


def write_predictions(folder: RunFolder, classes: tuple[str, ...], never: int | None = None) -> dict[str, Any]:
    """Predictions of trial-2 with two images to a patient; returns what summary.json says of the test set."""
    generator = np.random.default_rng(0)
    labels = np.arange(24) % len(classes)
    scores = generator.dirichlet(np.ones(len(classes)), 24) + 0.4 * np.eye(len(classes))[labels]
    if never is not None:
        scores[:, never] = 0.0
    scores = scores / scores.sum(axis=1, keepdims=True)
    patients = [f"p{i // 2}" for i in range(24)]
    named = {"trial_id": "trial-2", "fitted_on": "train+val", "seed": 0}
    table = pd.DataFrame({**named, "image": [f"{i}.png" for i in range(24)], "patient": patients})
    table = table.assign(split="test", true=[classes[k] for k in labels])
    table["predicted"] = [classes[k] for k in scores.argmax(axis=1)]
    table = table.assign(**{f"score:{name}": scores[:, k] for k, name in enumerate(classes)})
    val = table.head(6).assign(split="val", fitted_on="train", true=classes[0])
    pd.concat([val, table]).to_parquet(folder.predictions)
    found = patient_intervals(labels, np.log(scores + 1e-9), classes, patients, resamples=20)
    intervals = {name: {"value": each.value, "low": each.low, "high": each.high} for name, each in found.items()}
    matrix = confusion_matrix(labels, scores).astype(int).tolist()
    return {**intervals, "confusion_matrix": matrix, "classes": list(classes), "images": 24, "patients": 12}


def summary(classes: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    values = {
        "name": "depth",
        "seed": 7,
        "objective": {"metric": "macro_f1", "mode": "max"},
        "data": {
            "source": "xrays/",
            "layout": "class folders",
            "classes": list(classes),
            "unreadable": 3,
            "ignored": 5,
        },
        "best": {"trial_id": "trial-2", "config": RESULTS[1].config.to_json(), "val": RESULTS[1].val, "epoch": 2},
        "seconds": {"total": 754.0, "train": 700.0},
        "epochs": {"run": 9, "full": 16, "from_features": 6},
        "versions": {"keras": "3.15.1"},
        "machine": {"cores": 2, "gpus": 0, "threads_per_trial": 1, "concurrency": 2},
        "interrupted": False,
        "notes": ["Trained on one core."],
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A sweep of four trials that ended, with its test set opened."""
    return ended_run(tmp_path)


def ended_run(out: Path, classes: tuple[str, ...] = CLASSES, never: int | None = None, **changes: Any) -> RunFolder:
    folder = RunFolder.create(out, "depth", exactly=False)
    folder.spec.write_text(SPEC, encoding="utf-8")
    record(folder, RESULTS)
    write_split(folder, classes)
    test = write_predictions(folder, classes, never)
    write_json(folder.summary, summary(classes, **{"test": test, **changes}))
    append_line(folder.test_openings, {"opened": "2026-01-01", "trials": ["trial-2"], "models": 1})
    return folder


def test_the_answer_names_the_leading_trial_and_its_test_figures_with_intervals(folder: RunFolder) -> None:
    stated = json.loads(folder.summary.read_text())["test"]
    page = Page(write_report(folder))
    assert "mobilenet_v2_0.35 with freeze strategy stages:1 has the highest validation macro F1, 0.800" in page.text
    for metric in ("accuracy", "macro_f1", "balanced_accuracy", "auroc", "loss"):
        value, low, high = (f"{stated[metric][key]:.3f}" for key in ("value", "low", "high"))
        assert f"{value} {low} to {high}" in page.text
    assert "opened once, after the search, when validation had chosen this configuration" in page.text
    assert "on training and validation images together: 24 images of 12 patients" in page.text
    assert "From the predictions of the final model of trial-2 on 24 test images" in page.text
    append_line(folder.test_openings, {"opened": "2026-01-02", "trials": ["trial-2"], "models": 1})
    assert "The test set was opened 2 times" in Page(write_report(folder)).text


def test_epochs_that_were_spared_the_frozen_layers_are_told(folder: RunFolder) -> None:
    assert "9 of 16 epochs run · 6 of these from stored features of frozen layers" in Page(write_report(folder)).text


def test_a_subset_is_told_with_what_it_leaves_out_and_the_whole_is_not(tmp_path: Path, folder: RunFolder) -> None:
    data = {**summary(CLASSES)["data"], "images": 42, "spared": 126, "subset": 0.25}
    page = Page(write_report(ended_run(tmp_path, data=data)))
    assert "subset 0.25: 42 of 168 images, chosen by patients, stratified by class" in page.text
    assert "chosen by patients" not in Page(write_report(folder)).text


def test_how_halving_judged_is_told_where_it_did(tmp_path: Path) -> None:
    sentence = "after epochs 4 and 12 (4,000 and 12,000 images seen), the best third goes on"
    page = Page(write_report(ended_run(tmp_path / "halved", halving=sentence)))
    assert f"Halving: {sentence}." in page.text
    assert "halving" not in Page(write_report(ended_run(tmp_path / "whole", halving=""))).ids


def test_every_trial_is_on_the_page_in_the_order_of_the_objective(folder: RunFolder) -> None:
    tables = Page(write_report(folder)).tables
    assert [row[-1] for row in tables["ranking"][1:]] == ["trial-2", "trial-1", "trial-3"]
    assert [row[4] for row in tables["ranking"][1:]] == ["completed", "completed", "stopped early"]
    assert [row[-1] for row in tables["failed"][1:]] == ["trial-4"]
    assert "OOM in epoch 1" in tables["failed"][1][0]
    assert "Traceback: it broke" in tables["failed"][1][0]


def test_only_the_axes_that_vary_are_columns_and_the_others_stand_once(folder: RunFolder) -> None:
    page = Page(write_report(folder))
    assert page.tables["ranking"][0][7:10] == ["backbone", "freeze", "learning_rate"]
    assert "dropout" not in page.tables["ranking"][0]
    assert re.search(r"The same in every trial .*\bdropout 0\b", page.text)


def test_axes_that_strategies_do_not_tell_apart_are_shown_by_value(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "axes", exactly=True)
    plain = TrialConfig("vanilla_cnn", freeze="none", epochs=4)
    values = [(0.9, "none"), (0.7, "dataset"), (0.6, "none"), (0.5, "dataset")]
    configs = [replace(plain, lung_mask=mask, learning_rate=10.0**-place) for place, (_, mask) in enumerate(values)]
    results = [result(place, value, config=configs[place]) for place, (value, _) in enumerate(values)]
    folder.spec.write_text(SPEC, encoding="utf-8")
    record(folder, results)
    assert Page(write_report(folder)).tables["axes"][1:] == [
        ["lung_mask", "none", "2", "0.900", "0.750"],
        ["", "dataset", "2", "0.700", "0.600"],
    ]


def test_a_strategy_counts_all_its_trials_but_takes_the_median_of_those_that_rank(folder: RunFolder) -> None:
    rows = Page(write_report(folder)).tables["strategy-table"][1:]
    assert rows[0][:6] == ["mobilenet_v2_0.35", "stages:1", "1", "1", "0.800", "0.800"]
    assert rows[1] == ["vanilla_cnn", "none", "3", "2", "0.700", "0.650", "23,456", "128", "1 min 30 s", ""]


def test_a_strategy_whose_trials_all_failed_stays_in_the_table(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "failed", exactly=True)
    folder.spec.write_text(SPEC, encoding="utf-8")
    broken = TrialConfig("mobilenet_v2_0.35", freeze="all")
    record(folder, [result(1, outcome=Outcome.FAILED, error="OOM", config=broken, val={}, best_epoch=0), result(2)])
    rows = Page(write_report(folder)).tables["strategy-table"][1:]
    assert [row[:6] for row in rows] == [
        ["vanilla_cnn", "none", "1", "1", "0.500", "0.500"],
        ["mobilenet_v2_0.35", "all", "1", "0", "–", "–"],
    ]


def test_confusion_matrix_and_class_table_are_of_the_same_predictions_as_the_summary(folder: RunFolder) -> None:
    stated = json.loads(folder.summary.read_text())["test"]
    page = Page(write_report(folder))
    matrix = [[int(cell) for cell in row[1:]] for row in page.tables["confusion"][1:]]
    assert matrix == stated["confusion_matrix"]
    rows = {row[0]: row for row in page.tables["per-class"][1:]}
    assert list(rows) == [*CLASSES, "macro average", "weighted average"]
    for k, name in enumerate(CLASSES):
        assert rows[name][1] == f"{matrix[k][k] / sum(row[k] for row in matrix):.3f}"
        assert rows[name][2] == f"{stated[f'recall/{name}']['value']:.3f}"
        assert rows[name][5] == str(sum(matrix[k]))
    assert rows["macro average"][4] == f"{stated['macro_f1']['value']:.3f}"
    assert "Do not use" not in page.text


def test_a_summary_that_contradicts_the_predictions_is_called_out(tmp_path: Path) -> None:
    folder = ended_run(tmp_path)
    stated = json.loads(folder.summary.read_text())
    stated["test"]["confusion_matrix"][0][0] += 1
    stated["best"]["trial_id"] = "trial-1"
    write_json(folder.summary, stated)
    text = Page(write_report(folder)).text
    assert "The confusion matrix in summary.json is not the one of predictions.parquet." in text
    assert "summary.json names trial-1, the predictions are of trial-2." in text


def difference(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "p_holm": 0.0004 if value > 0.02 else 0.41}


def comparison(first: str, second: str, value: float, better: str | None) -> dict[str, Any]:
    return {
        "first": first,
        "second": second,
        "better": better,
        "differences": {"macro_f1": difference(value), "auroc": {**difference(0.001), "value": None}},
        "mcnemar": {"first": 12, "second": 3, "p_holm": 0.035},
        "smallest_difference": 0.03,
        "images_needed": 1385.2,
    }


VERDICT = {
    "sentence": "`stages:1` is better than `none` (+5.0 points macro F1, 95 % interval 3.0 to 7.0).",
    "metric": "macro_f1",
    "reference": "stages:1",
    "strategies": {"stages:1": "trial-2", "none": "trial-1", "all": "trial-3"},
    "seeds": 1,
    "images": 24,
    "patients": 12,
    "pairs": 3,
    "alpha": 0.05,
    "power": 0.8,
    "smallest_difference": 0.031,
    "comparisons": [
        comparison("stages:1", "none", 0.05, "stages:1"),
        comparison("stages:1", "all", -0.01, None),
        comparison("none", "all", -0.06, "all"),
    ],
    "optimism": {"trials": 16, "best": 0.8, "corrected": 0.779, "gain": 0.021},
    "warnings": ["The test set has 12 patients only: its intervals are rough."],
}


def test_the_verdict_stands_first_and_its_comparisons_below(tmp_path: Path) -> None:
    page = Page(write_report(ended_run(tmp_path, verdict=VERDICT)))
    assert page.text.index("is better than none") < page.text.index("has the highest validation macro F1")
    assert "stages:1 is better than none (+5.0 points macro F1, 95 % interval 3.0 to 7.0)." in page.text
    assert page.tables["verdict-table"] == [
        [
            *("Strategy", "Macro F1, points (95 %)", "AUROC, points (95 %)", "p (Holm)", "Right alone"),
            *("McNemar p (Holm)", "Images needed", "Verdict"),
        ],
        ["none", "+5.0 (3.0 to 7.0)", "–", "<0.001", "12 : 3", "0.035", "–", "stages:1 is better"],
        ["all", "−1.0 (−3.0 to 1.0)", "–", "0.410", "12 : 3", "0.035", "1,400", "cannot tell"],
    ]
    assert page.tables["verdict-pairs"][1][:2] == ["none", "all"]
    assert page.tables["verdict-pairs"][1][-1] == "all is better"
    assert "The test set has 12 patients only" in page.text
    assert "The choice flatters by about 2.1 points macro F1." in page.text
    assert "truly differs from stages:1 by 3.0 points macro F1, 80 % of test sets" in page.text
    assert "another seed would move its figures too" in page.text
    assert any(text.startswith("Differences in macro F1") for name, text in page.attributes if name == "alt")


def test_without_a_verdict_nothing_is_read_as_a_ranking(folder: RunFolder) -> None:
    text = Page(write_report(folder)).text
    assert "Small differences between validation scores should not be read as a ranking" in text
    assert "is the best of 3 on the same images and therefore optimistic" in text


def test_a_verdict_without_a_test_part_is_its_sentence(tmp_path: Path) -> None:
    verdict = {"sentence": "There is no test part.", "metric": "macro_f1", "optimism": None, "comparisons": []}
    page = Page(write_report(ended_run(tmp_path, test=None, verdict={**verdict, "warnings": []})))
    assert "There is no test part." in page.text
    assert "verdict-table" not in page.tables


def test_names_in_a_verdict_are_never_markup(tmp_path: Path) -> None:
    verdict = {**VERDICT, "sentence": f"`{HOSTILE}` is better.", "reference": HOSTILE, "warnings": [HOSTILE]}
    verdict["comparisons"] = [comparison(HOSTILE, HOSTILE, 0.05, HOSTILE)]
    page = Page(write_report(ended_run(tmp_path, verdict=verdict)))
    assert "script" not in page.tags
    assert page.tables["verdict-table"][1][0] == HOSTILE


def test_further_figures_and_calibration_are_shown(tmp_path: Path) -> None:
    before, after = {"ece": 0.08, "brier": 0.3, "loss": 0.5}, {"ece": 0.02, "brier": 0.28, "loss": 0.4}
    calibrated = {**STRATEGIES[0], "calibration": {"temperature": 1.62, "before": before, "after": after}}
    folder = ended_run(tmp_path, strategies=[calibrated, STRATEGIES[1]])
    stated = json.loads(folder.summary.read_text())["test"]
    page = Page(write_report(folder))
    assert page.tables["calibration"][2:] == [
        ["mobilenet_v2_0.35 stages:1", "1.620", "0.080", "0.020", "0.300", "0.280", "0.500", "0.400"]
    ]
    figures = {row[0]: row[1] for row in page.tables["further"][1:]}
    assert figures["Matthews correlation"] == f"{stated['mcc']['value']:.3f}"
    assert page.tables["per-class-further"][1][1] == f"{stated['specificity/covid']['value']:.3f}"


def test_the_data_table_counts_images_and_patients_of_the_split(folder: RunFolder) -> None:
    page = Page(write_report(folder))
    rows = {row[0]: row[1:] for row in page.tables["split"]}
    assert rows["covid"] == ["6 (4)", "4 (3)", "4 (3)", "14 (7)"]
    split = pd.read_csv(folder.split)
    patients = [split[split.split == part].patient.nunique() for part in ("train", "val", "test")]
    counts = zip((18, 12, 12), patients, strict=True)
    assert rows["together"][:3] == [f"{images} ({owners})" for images, owners in counts]
    assert "unreadable files 3" in page.text
    assert "ignored files 5" in page.text


def test_the_page_says_how_to_repeat_the_sweep(folder: RunFolder) -> None:
    text = Page(write_report(folder)).text
    assert f"python -m sweep.run {folder.spec}" in text
    for fact in (
        "seed 7",
        "cores 2",
        "threads per trial 1",
        "keras 3.15.1",
        "Trained on one core.",
        "search: {trials: 4}",
    ):
        assert fact in text


def test_text_of_users_is_never_markup(tmp_path: Path) -> None:
    classes = (HOSTILE, "normal")
    changes = {"name": HOSTILE, "notes": [HOSTILE], "data": {"source": HOSTILE, "layout": HOSTILE}}
    folder = ended_run(tmp_path, classes, **changes)
    record(folder, [*RESULTS[:3], result(4, outcome=Outcome.FAILED, error=HOSTILE, traceback=HOSTILE, val={})])
    page = Page(write_report(folder))
    assert "script" not in page.tags
    assert page.tables["per-class"][1][0] == page.tables["split"][1][0] == HOSTILE
    assert page.tables["failed"][1][0].count(HOSTILE) == 2
    assert page.text.count(HOSTILE) >= 7


def test_a_reference_and_its_names_are_never_markup(tmp_path: Path) -> None:
    changes = {"reference": {**REFERENCE, "source": HOSTILE, "note": HOSTILE}, "strategies": STRATEGIES}
    changes["reference"]["results"] = [{"label": HOSTILE, "accuracy": {"test": 0.5}}]
    page = Page(write_report(ended_run(tmp_path, **changes)))
    assert "script" not in page.tags
    assert page.tables["reference-table"][2][0] == HOSTILE


def test_the_page_fetches_nothing(folder: RunFolder) -> None:
    page = Page(write_report(folder))
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(sources) == 3
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(", page.source)


def test_ids_are_unique_and_every_figure_has_a_text(folder: RunFolder) -> None:
    page = Page(write_report(folder))
    assert len(page.ids) == len(set(page.ids))
    assert len([value for name, value in page.attributes if name == "alt" and value]) == 3


def test_phantom_images_are_called_synthetic(tmp_path: Path) -> None:
    phantom = ended_run(tmp_path, data={"source": "phantom"})
    real = ended_run(tmp_path)
    assert "Synthetic demonstration, not medicine." in Page(write_report(phantom)).text
    assert "Synthetic" not in Page(write_report(real)).text


def test_without_a_test_set_no_test_figure_appears(tmp_path: Path) -> None:
    folder = ended_run(tmp_path, test=None, best=None)
    folder.predictions.unlink()
    page = Page(write_report(folder))
    assert "The test set was not opened" in page.text
    assert not {"confusion", "per-class"} & page.tables.keys()
    assert "Small differences between validation scores should not be read as a ranking" in page.text


def test_every_strategy_is_shown_on_every_part_with_both_best_epochs(tmp_path: Path) -> None:
    page = Page(write_report(ended_run(tmp_path, strategies=STRATEGIES)))
    rows = page.tables["evaluation"]
    assert rows[1] == ["loss", "accuracy", *(["train", "val", "test"] * 3)]
    assert rows[2] == ["mobilenet_v2_0.35", "stages:1", "4", "5", "19", *(["0.900", "0.800", "0.700"] * 3)]
    assert rows[3][2] == "1 stopped early"
    assert rows[3][:2] == ["vanilla_cnn", "none"]
    assert rows[3][-1] == "not evaluated: out of memory"
    rows = {row[0]: row for row in page.tables["per-class-1"]}
    assert rows["covid"] == ["covid", "0.700", "0.700", "0.700", "8"]
    assert rows["macro average"][1:] == rows["weighted average"][1:] == ["0.700", "0.700", "0.700", "24"]
    assert "a choice by the test columns would make these optimistic too" in page.text


def test_an_objective_that_is_no_column_otherwise_is_shown_on_every_part(tmp_path: Path) -> None:
    figures = {name: {**part(value), "balanced_accuracy": 0.5} for name, value in (("val", 0.8), ("test", 0.7))}
    strategies = [{**STRATEGIES[0], "train": part(0.9), **figures}, STRATEGIES[1]]
    objective = {"metric": "balanced_accuracy", "mode": "max"}
    page = Page(write_report(ended_run(tmp_path, strategies=strategies, objective=objective)))
    names, _, row, problem = page.tables["evaluation"]
    assert names[-4:] == ["Balanced accuracy", "Loss", "Accuracy", "Macro F1"]
    assert row[5:] == ["–", "0.500", "0.500", *(["0.900", "0.800", "0.700"] * 3)]
    assert problem[-1] == "not evaluated: out of memory"
    assert ("colspan", "12") in page.attributes


def test_the_figures_of_the_test_set_are_those_of_the_best_trial_wherever_its_rows_stand(tmp_path: Path) -> None:
    folder = ended_run(tmp_path)
    expected = Page(write_report(folder)).tables
    best = pd.read_parquet(folder.predictions)
    other = best.assign(trial_id="trial-1", **{"score:covid": 0.0})
    second_seed = best.assign(seed=1, **{"score:covid": 0.0})
    pd.concat([other, best, second_seed]).to_parquet(folder.predictions)
    page = Page(write_report(folder))
    assert page.tables["confusion"] == expected["confusion"]
    assert page.tables["per-class"] == expected["per-class"]
    assert "Do not use" not in page.text


def test_predictions_of_others_are_not_taken_for_those_of_a_best_trial_that_could_not_be_evaluated(
    tmp_path: Path,
) -> None:
    folder = ended_run(tmp_path, test=None)
    pd.read_parquet(folder.predictions).assign(trial_id="trial-1").to_parquet(folder.predictions)
    assert "per-class" not in Page(write_report(folder)).tables


def test_a_sweep_without_a_test_part_says_what_its_figures_are(tmp_path: Path) -> None:
    strategies = [{name: value for name, value in row.items() if name != "test"} for row in STRATEGIES]
    folder = ended_run(tmp_path, test=None, strategies=strategies)
    split = pd.read_csv(folder.split)
    split[split["split"] != "test"].to_csv(folder.split, index=False)
    predictions = pd.read_parquet(folder.predictions)
    predictions[predictions["split"] == "val"].to_parquet(folder.predictions)
    page = Page(write_report(folder))
    assert "no-test-part" in page.ids
    assert "no-test" not in page.ids
    assert "every figure here is a training or validation figure, and the choice was made on the latter" in page.text
    assert "Validation set, class by class" in page.text
    assert "on 6 validation images of 3 patients, on which it was chosen" in page.text
    assert page.tables["evaluation"][1] == ["loss", "accuracy", *(["train", "val"] * 3)]
    assert "these are the figures that the choice was made on" in page.text
    assert "without a test part, no figure here is free of that choice" in page.text
    assert page.tables["split"][1][3] == "0 (0)"


def test_published_figures_stand_beside_ours(tmp_path: Path) -> None:
    page = Page(write_report(ended_run(tmp_path, strategies=STRATEGIES, reference=REFERENCE)))
    rows = page.tables["reference-table"][2:]
    assert rows[0] == [
        "head only",
        "mobilenet_v2_0.35 stages:1, flatten [1024]",
        "train",
        "–",
        "0.900",
        "–",
        "–",
        "0.900",
        "–",
        "0.900",
    ]
    assert rows[2][2:6] == ["test", "0.908", "0.700", "−20.8"]
    assert rows[3][:4] == ["by its matrix", "not in this sweep", "test", "0.500"]
    assert "the source gives a test accuracy of 0.9, but its confusion matrix gives 0.5000" in page.text
    assert page.tables["reference-facts"][2] == [
        *("head only", "64,753,156", "23,456", "25 min 2 s", "30 s", "5", "5", "–", "19")
    ]
    assert page.tables["reference-classes-1"][2] == ["covid", "0.950", "0.700", "0.920", "0.700", "0.940", "0.700"]
    assert page.tables["reference-classes-2"][1] == ["COVID", "1.000", "1.000", "1.000"]
    assert "The splits differ" in page.text
    assert "3,175 images in test." in page.text


def test_a_reference_about_other_classes_is_not_put_beside_ours(tmp_path: Path) -> None:
    other = {**REFERENCE, "classes": ["covid", "tuberculosis"], "results": [{"accuracy": {"test": 0.9}}]}
    page = Page(write_report(ended_run(tmp_path, strategies=STRATEGIES, reference=other)))
    assert "The reference is about other classes (covid, tuberculosis)" in page.text
    assert "reference-table" not in page.tables


def test_samples_and_views_of_the_run_folder_are_shown(tmp_path: Path) -> None:
    folder = ended_run(tmp_path)
    grey = np.zeros((2, 8, 8, 1), np.uint8)
    views = np.zeros((1, 2, 3, 8, 8, 1), np.uint8)
    write_samples(folder.samples, Samples(("covid", HOSTILE), grey, ("light",), grey, views))
    page = Page(write_report(folder))
    assert {"samples", "augmented"} <= set(page.ids)
    texts = [value for name, value in page.attributes if name == "alt"]
    assert texts.count("covid, training image") == texts.count(f"{HOSTILE}, training image") == 1
    assert (texts.count("original"), texts.count("light view")) == (2, 6)


def test_an_interrupted_sweep_without_summary_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "cut", exactly=True)
    folder.spec.write_text(SPEC, encoding="utf-8")
    record(folder, RESULTS[:2])
    for value in (0.1, 0.25):  # a resumed trial repeats epochs; the later entry holds
        Record(folder, OBJECTIVE).epoch(epoch_metrics("trial-9", 1, value))
    with folder.epoch_record.open("a", encoding="utf-8") as file:
        file.write('{"trial_id": "trial-9", "epo')
    page = Page(write_report(folder))
    assert {"interrupted", "no-test", "phantom"} <= set(page.ids)
    assert [row[-1] for row in page.tables["ranking"][1:]] == ["trial-2", "trial-1"]
    assert page.tables["unranked"][1:] == [["trial-9", "1", "0.250", "had not ended when the sweep stopped"]]


def test_a_sweep_cut_before_its_first_epoch_has_a_page(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "cut", exactly=True)
    folder.spec.write_text(SPEC, encoding="utf-8")
    page = Page(write_report(folder))
    assert "No trial finished an epoch" in page.text
    assert not page.tables


def test_a_sweep_ended_before_its_last_trial_says_how_many_are_missing(tmp_path: Path) -> None:
    folder = ended_run(tmp_path, trials={"planned": 10}, interrupted=True)
    text = Page(write_report(folder)).text
    assert "4 of 10 trials (2 completed, 1 stopped early, 1 failed)" in text
    assert "Unfinished sweep." in text


def test_a_class_that_is_never_predicted_is_called_out(tmp_path: Path) -> None:
    page = Page(write_report(ended_run(tmp_path, never=1)))
    assert "Never predicted: normal." in page.text


def test_the_best_trial_never_stands_without_the_notes_of_the_doctor(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "noted", exactly=True)
    folder.spec.write_text(SPEC, encoding="utf-8")
    blind = Diagnosis("class_never_predicted", True, "Of the 4 of covid none is recognised.", f"Balance {HOSTILE}.")
    late = Diagnosis("still_improving", False, "The best epoch is 4 of 4.", "Allow more epochs.")
    deep = TrialConfig("vanilla_cnn", freeze="none", learning_rate=0.1, epochs=9)
    first, second = result(1, 0.9, doctor=(blind, late)), result(2, 0.7, doctor=(late,), config=deep)
    broken = result(4, outcome=Outcome.FAILED, error="OOM", val={}, best_epoch=0, doctor=(late,))
    record(folder, [second, first, result(3), broken])
    page = Page(write_report(folder))
    answer = page.text[: page.text.index("Strategies")]
    assert "class_never_predicted. Of the 4 of covid none is recognised. Balance <script>" in answer
    assert "still_improving. The best epoch is 4 of 4. Allow more epochs." in answer
    (heading, *rows) = page.tables["ranking"]
    names = [row[heading.index("Doctor")] for row in rows]
    assert names == ["class_never_predicted still_improving", "still_improving", ""]
    assert page.tables["strategy-table"][1][-1] == names[0]
    assert page.tables["doctor"][1:] == [
        ["class_never_predicted", "1", "Of the 4 of covid none is recognised. (trial-1)", f"Balance {HOSTILE}."],
        ["still_improving", "3", "The best epoch is 4 of 4. (trial-1)", "Allow more epochs."],
    ]
    assert "script" not in page.tags


def test_without_findings_there_is_no_word_of_the_doctor(folder: RunFolder) -> None:
    page = Page(write_report(folder))
    assert "doctor" not in page.tables
    assert not any("doctor" in value for name, value in page.attributes if name == "class")


def test_command_line_writes_the_report_and_prints_its_path(folder: RunFolder, capsys: pytest.CaptureFixture) -> None:
    assert main([str(folder.path)]) == 0
    assert capsys.readouterr().out.strip() == str(folder.report)
    assert folder.report.is_file()


@pytest.mark.parametrize("what", ["missing", "empty", "other", "file"])
def test_a_folder_that_is_no_run_folder_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / what
    if what == "file":
        path.write_text("x")
    elif what != "missing":
        path.mkdir()
    if what == "other":
        (path / "photo.png").write_text("x")
    found = {"missing": "nothing there", "empty": "an empty folder", "other": "photo.png", "file": "a file"}[what]
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert f"cannot report on {path}: expected the folder of a sweep" in error
    assert f"but found {found}; give the folder that `python -m sweep.run` wrote" in error


def test_a_true_class_without_scores_is_refused(folder: RunFolder, capsys: pytest.CaptureFixture) -> None:
    pd.read_parquet(folder.predictions).drop(columns="score:covid").to_parquet(folder.predictions)
    assert main([str(folder.path)]) == 2
    assert "has true classes without a score column: covid" in capsys.readouterr().err


def test_each_seed_of_the_final_models_is_shown_and_their_mean_beside_the_answer(tmp_path: Path) -> None:
    seeds = [{"seed": seed, "macro_f1": value} for seed, value in enumerate((0.7, 0.6, 0.8))]
    row = {"trial_id": "trial-2", "backbone": "vanilla_cnn", "freeze": "none", "test_by_seed": seeds}
    page = Page(write_report(ended_run(tmp_path, strategies=[row])))
    assert "the first of its final models, which is the one that is kept; over 3 seeds macro F1 is 0.700" in page.text
    assert page.tables["seeds"] == [
        ["Backbone", "Freeze", "Mean", "Each"],
        ["vanilla_cnn", "none", "0.700", "0.700, 0.600, 0.800"],
    ]
    once = Page(write_report(ended_run(tmp_path, strategies=[{**row, "test_by_seed": seeds[:1]}])))
    assert "seeds" not in once.tables
    assert "over 3 seeds" not in once.text
