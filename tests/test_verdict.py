"""The sentence says what the comparisons show: better, or not to be told apart and how many images would."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from cxr_models.dataset import ImageRecord, Manifest
from cxr_models.trial import VALIDATION_SCORES, Objective, Outcome, TrialConfig, TrialResult
from sweep.record import RunFolder, write_json
from sweep.verdict import Contender, cautions, compared, judge, sentence
from sweep.verdict_view import coded, print_verdict, verdict_notes
from tests.test_comparison import CLASSES, images_of, scores_of

pytestmark = pytest.mark.usefixtures("quick_collection")
F1, LOSS = Objective("macro_f1", "max"), Objective("loss", "min")
FREEZES = ("convs:1", "all", "none", "stages:1")


def planted(edges: tuple[float, ...], patients: int, objective: Objective = F1, seed: int = 0) -> dict[str, Any]:
    """The verdict on strategies of which each lifts the true class by its edge."""
    generator = np.random.default_rng(seed)
    labels, owners = images_of(generator, patients, most=1)
    scores = scores_of(generator, labels, owners, edges)
    contenders = [Contender(name, name, [own]) for name, own in zip(FREEZES, scores, strict=False)]
    return compared(contenders, labels, CLASSES, owners, objective, resamples=200)


def test_two_equal_strategies_cannot_be_told_apart():
    found = planted((0.0, 0.0), 169)
    needed = found["comparisons"][0]["images_needed"]
    assert needed > 169
    assert found["sentence"].startswith("These 169 images cannot tell `convs:1` from `all`; about ")
    assert found["sentence"].endswith("would be needed.")
    assert found["comparisons"][0]["better"] is None


def test_a_strategy_better_by_some_points_is_named_with_its_interval():
    found = planted((0.4, 0.0), 1500)
    (row,) = found["comparisons"]
    difference = row["differences"]["macro_f1"]
    assert row["better"] == "convs:1"
    assert 0.03 < difference["value"] < 0.09
    value, low, high = (100 * difference[name] for name in ("value", "low", "high"))
    expected = f"`convs:1` is better than `all` (+{value:.1f} points macro F1, 95 % interval {low:.1f} to {high:.1f})."
    assert found["sentence"] == expected


def test_the_reference_stays_the_best_by_validation_though_another_is_better_on_the_test_images():
    found = planted((0.0, 0.4), 1500)
    assert found["reference"] == "convs:1"
    assert found["comparisons"][0]["better"] == "all"
    assert found["sentence"].startswith("`all` is better than `convs:1`, the best by validation (+")


def test_the_mean_over_seeds_is_compared():
    generator = np.random.default_rng(0)
    labels, owners = images_of(generator, 200)
    one, other, third = scores_of(generator, labels, owners, (0.0, 0.0, 0.0))
    contenders = [Contender("convs:1", "a", [one, other]), Contender("all", "b", [third])]
    found = compared(contenders, labels, CLASSES, owners, F1, resamples=100)
    assert found["strategies"] == {"convs:1": "a", "all": "b"}


def test_a_lower_loss_is_better():
    found = planted((0.8, 0.0), 800, LOSS)
    difference = found["comparisons"][0]["differences"]["loss"]
    assert difference["value"] < 0
    assert found["comparisons"][0]["better"] == "convs:1"
    assert f"`convs:1` is better than `all` (−{-difference['value']:.3f} loss, 95 % interval −" in found["sentence"]
    assert "points" not in found["sentence"]


def row(second: str, better: str | None, value: float, needed: float = 1385.2) -> dict[str, Any]:
    found = {"value": value, "low": value - 0.015, "high": value + 0.016}
    return {"second": second, "better": better, "differences": {"macro_f1": found}, "images_needed": needed}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "`a` is the only strategy: there is nothing to compare it with."),
        (
            [row("b", "a", 0.021)],
            "`a` is better than `b` (+2.1 points macro F1, 95 % interval 0.6 to 3.7).",
        ),
        (
            [row("b", None, 0.01)],
            "These 169 images cannot tell `a` from `b`; about 1,400 would be needed.",
        ),
        (
            [row("b", "a", 0.03), row("c", "a", 0.021), row("d", None, 0.01, 9000.0), row("e", None, 0.01)],
            "`a` is better than `b` and `c` (at least +2.1 points macro F1, 95 % interval 0.6 to 3.7). These 169 "
            "images cannot tell it from `e` and `d`; about 1,400 would be needed for `e`, and more for the rest.",
        ),
        (
            [row("b", "b", -0.021), row("c", None, 0.0, float("inf"))],
            "`b` is better than `a`, the best by validation (+2.1 points macro F1, 95 % interval 0.5 to 3.6). "
            "These 169 images cannot tell `a` from `c`; they do the same on them.",
        ),
        (
            [row(name, None, 0.001, 2e6) for name in "bcdefg"],
            "These 169 images cannot tell `a` from `b`, `c`, `d` and 3 others; more than 1,000,000 would be needed for "
            "`b`, and more for the rest.",
        ),
    ],
)
def test_the_sentence(rows, expected):
    assert sentence("a", rows, F1, 169) == expected


def test_over_two_hundred_sweeps_the_verdict_errs_no_more_often_than_it_says():
    """Two equal strategies and a worse one. Wrong is to call one of the equal two better, or to name the worse one."""
    counted: Counter[str] = Counter()
    for seed in range(200):
        found = planted((0.0, 0.0, -0.5), 200, seed=seed)
        equal, worse, also_worse = found["comparisons"]
        counted["wrong"] += equal["better"] is not None or "none" in (worse["better"], also_worse["better"])
        counted["right"] += worse["better"] == "convs:1"
        for metric, difference in equal["differences"].items():
            counted[metric] += not difference["low"] <= 0.0 <= difference["high"]
    most = int(stats.binom.ppf(0.99, 200, 0.05))
    assert counted["wrong"] <= most
    assert counted["right"] > 100
    assert 0 < counted["macro_f1"] <= most  # 95 % intervals of a difference that is 0
    assert 0 < counted["auroc"] <= most


RECORDS = tuple(
    ImageRecord(f"{k}.png", CLASSES[k % 3], f"p{k // 2}", "", "", "", "", 8, 8, "L", True) for k in range(120)
)
SPLIT = ("val",) * 60 + ("test",) * 60


class Judged:
    """A sweep whose trials have random scores, equally good ones."""

    def __init__(self, out: Path, split: tuple[str, ...] = SPLIT, freezes: tuple[str, ...] = FREEZES) -> None:
        self.folder = RunFolder.create(out, "run", exactly=False)
        objective = Objective("accuracy", "max")
        parts = {part: np.flatnonzero(np.array(split) == part) for part in ("val", "test")}
        manifest = Manifest(Path("/nowhere"), "folders", RECORDS, (), 0)
        spec = SimpleNamespace(objective=objective, search=SimpleNamespace(seed=0))
        self.plan: Any = SimpleNamespace(manifest=manifest, spec=spec, indices=parts.__getitem__)
        generator, results, scores = np.random.default_rng(0), [], {}
        for number, freeze in enumerate(freezes * 3):
            trial = f"trial-{number}"
            logits = generator.normal(size=(len(RECORDS), 3)) + 1.5 * np.eye(3)[manifest.labels]
            own = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            val = own[parts["val"]]
            labels = manifest.labels[parts["val"]]
            self.folder.trial(trial).mkdir(parents=True)
            np.savez(self.folder.trial(trial) / VALIDATION_SCORES, index=parts["val"], labels=labels, scores=val)
            accuracy = float((val.argmax(axis=1) == labels).mean())
            config = TrialConfig("vanilla_cnn", freeze=freeze)
            results.append(TrialResult(trial, config, Outcome.COMPLETED, 1, 1, {"accuracy": accuracy}))
            scores[trial] = [own[parts["test"]]]
        self.results = tuple(results)
        test = parts["test"]
        self.evaluation: Any = SimpleNamespace(
            test_scores=scores if len(test) else {},
            test_images=(manifest.labels[test], [RECORDS[index].patient for index in test]),
        )

    def verdict(self) -> dict[str, Any]:
        return judge(self.plan, self.results, self.folder, self.evaluation)


def test_the_finalists_of_a_sweep_are_compared(tmp_path):
    sweep = Judged(tmp_path)
    found = sweep.verdict()
    best = max(sweep.results, key=lambda result: result.val["accuracy"])
    assert found["reference"] == best.config.freeze
    assert found["strategies"][best.config.freeze] == best.trial_id
    assert (found["images"], found["patients"], found["pairs"], len(found["comparisons"])) == (60, 30, 6, 6)
    assert found["comparisons"][0]["differences"].keys() == {"accuracy", "macro_f1", "auroc"}
    assert found == sweep.verdict()
    write_json(sweep.folder.summary, {"verdict": found})
    assert json.loads(sweep.folder.summary.read_text())["verdict"]["sentence"] == found["sentence"]


def test_the_choice_among_equal_trials_is_called_optimistic(tmp_path):
    """Twelve trials of the same accuracy: what the best seems to have more than the rest is chance."""
    sweep = Judged(tmp_path)
    found = sweep.verdict()["optimism"]
    accuracies = [result.val["accuracy"] for result in sweep.results]
    assert found["trials"] == 12
    assert found["best"] == max(accuracies)
    assert 0 < found["gain"] < 2 * (max(accuracies) - np.mean(accuracies))
    assert found["gain"] == pytest.approx(found["best"] - found["corrected"])


def test_a_strategy_that_could_not_be_evaluated_is_left_out(tmp_path):
    sweep = Judged(tmp_path)
    reference, second, *_ = sweep.verdict()["strategies"].values()
    del sweep.evaluation.test_scores[second]
    found = sweep.verdict()
    assert len(found["strategies"]) == 3
    assert found["strategies"][found["reference"]] == reference


def test_backbones_are_named_where_there_are_several(tmp_path):
    sweep = Judged(tmp_path, freezes=("all", "none"))
    first = sweep.results[0]
    other = TrialConfig("mobilenet_v2_0.35", freeze="all")
    sweep.results = (TrialResult(first.trial_id, other, first.outcome, 1, 1, first.val), *sweep.results[1:])
    names = set(sweep.verdict()["strategies"])
    assert names == {"mobilenet_v2_0.35 all", "vanilla_cnn all", "vanilla_cnn none"}


def test_without_a_test_part_nothing_is_compared(tmp_path):
    found = Judged(tmp_path, ("val",) * 120).verdict()
    assert found["sentence"].startswith("There is no test part, so no strategy is compared with another")
    assert found["comparisons"] == []
    assert found["optimism"]["trials"] == 12


def test_one_trial_was_not_chosen_among_any(tmp_path):
    sweep = Judged(tmp_path)
    sweep.results = sweep.results[:1]
    found = sweep.verdict()
    assert found["optimism"] is None
    assert found["sentence"] == "`convs:1` is the only strategy: there is nothing to compare it with."
    assert not cautions({"verdict": found})


def test_findings_of_the_audit_and_the_doctor_stand_beside_the_sentence():
    found = planted((0.0, 0.0), 20)
    summary = {
        "verdict": found,
        "best": {"doctor": [{"name": "class_never_predicted", "evidence": "Normal has recall 0.", "remedy": "-"}]},
        "audit": [
            {"name": "class_from_source", "severity": "warning", "evidence": "The source alone gives 65 %."},
            {"name": "mixed_patients", "severity": "note", "evidence": "21 patients have two classes."},
        ],
    }
    grave, lesser = ({"name": name, "grave": name == "dead", "evidence": f"It is {name}."} for name in ("dead", "late"))
    summary["strategies"] = [
        {"trial_id": found["strategies"][found["reference"]], "doctor": [grave]},  # told as that of the best trial
        {"trial_id": found["strategies"]["all"], "doctor": [grave, lesser]},
        {"trial_id": "not compared", "doctor": [grave]},
    ]
    lines = cautions(summary)
    assert lines == [
        "The data's audit: The source alone gives 65 %.",
        "The best trial (class_never_predicted): Normal has recall 0.",
        "`all` stands for a trial that went wrong (dead): It is dead.",
        "The test set has 20 patients only: its intervals are rough.",
    ]
    assert verdict_notes({**found, "warnings": lines, "optimism": None})[:4] == lines


def test_what_became_of_the_final_models_stands_beside_the_sentence():
    found = planted((0.0, 0.0), 300)
    constant = {"name": "constant_predictor", "grave": True, "evidence": "All are taken for a."}
    summary = {
        "verdict": found,
        "strategies": [
            {"trial_id": found["strategies"]["convs:1"], "failed_seeds": {"failed": 1, "trained": 2, "problem": "NaN"}},
            {"trial_id": found["strategies"]["all"], "final_doctor": [constant]},
        ],
        "test_openings": [{"opened": "2026-01-01", "earlier_sweeps": 3}],
    }
    assert cautions(summary) == [
        "`convs:1` stands for 2 of 3 final trainings, since the others failed (NaN): it looks better than it is if "
        "those were its worst.",
        "The final model of `all` went wrong (constant_predictor): All are taken for a.",
        "3 sweeps before this one opened the same test images: what was chosen after a look at their figures is "
        "flattered by these here.",
    ]


def test_the_terminal_shows_the_sentence_and_the_reference_beside_the_others():
    found = {**planted((0.0, 0.0, -0.8), 300), "warnings": [], "optimism": None}
    console = Console(record=True, width=200)
    print_verdict(found, F1, console)
    text = console.export_text()
    assert found["sentence"] in " ".join(text.split())
    assert "`convs:1` minus the others on 300 test images, 95 % intervals" in text
    (line,) = (line for line in text.splitlines() if line.startswith("│ none"))
    assert "`convs:1` is better" in line


def test_names_in_backticks_become_code_and_never_markup():
    assert coded("`a>b` is <better>") == "<code>a&gt;b</code> is &lt;better&gt;"
