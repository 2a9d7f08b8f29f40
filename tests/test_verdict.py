"""The sentence says what the comparisons show: better, or not to be told apart and how many images would."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from cxr_models.audit import CLASS_FOLLOWS
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
    expected = f"`convs:1` is better than `all` (+{value:.1f} points macro F1, 95 % interval {low:.1f} to {high:.1f})"
    assert found["sentence"] == f"{expected}, as far as one training of each can tell."


def test_the_reference_stays_the_best_by_validation_though_another_is_better_on_the_test_images():
    found = planted((0.0, 0.4), 1500)
    assert found["reference"] == "convs:1"
    assert found["comparisons"][0]["better"] == "all"
    assert found["sentence"].startswith("`all` is better than `convs:1`, the best by validation (+")


def by_seeds(*trainings: tuple[float, ...], patients: int = 1000) -> dict[str, Any]:
    """The verdict on strategies of which every training has an edge of its own."""
    generator = np.random.default_rng(0)
    labels, owners = images_of(generator, patients, most=1)
    scores = iter(scores_of(generator, labels, owners, sum(trainings, ())))
    contenders = [
        Contender(name, name, [next(scores) for _ in edges]) for name, edges in zip(FREEZES, trainings, strict=False)
    ]
    return compared(contenders, labels, CLASSES, owners, F1, resamples=100)


def test_the_mean_over_seeds_is_compared():
    """The first training of the reference is no better than the other's; its later ones are, all by as much."""
    assert by_seeds((0.0,), (0.0,))["comparisons"][0]["better"] is None
    found = by_seeds((0.0, 0.7, 0.6, 0.7, 0.6), (0.0, 0.05, 0.0, 0.05, 0.0))
    (row,) = found["comparisons"]
    assert (row["better"], row["seeds"], found["seeds"]) == ("convs:1", [5, 5], 5)
    assert found["sentence"].startswith("`convs:1` is better than `all` (+")
    assert "training" not in found["sentence"]
    assert not any("another seed" in note for note in notes_of(found))


def test_a_lucky_training_makes_no_strategy_better():
    """One training of the reference did much better: alone it is shown, among five of each it is not."""
    assert by_seeds((1.2,), (0.0,))["comparisons"][0]["better"] == "convs:1"
    found = by_seeds((1.2, 0.0, 0.1, -0.1, 0.0), (0.0, 0.0, -0.1, 0.1, 0.0))
    (row,) = found["comparisons"]
    assert row["better"] is None
    assert row["images_needed"] == math.inf
    assert found["sentence"].endswith("differ so much: more of them are needed.")


def test_what_one_training_tells_is_called_so():
    found = by_seeds((0.7,), (0.0, 0.05, 0.0))
    assert found["sentence"].endswith(", as far as one training of `convs:1` can tell.")
    assert any("Some strategies stand for one final training" in note for note in notes_of(found))
    (note,) = (note for note in notes_of(by_seeds((0.7,), (0.0,))) if "training" in note)
    assert note.startswith("Each strategy stands for one final training; another seed would move its figures too.")
    assert "`final: {seeds: 5}`" in note


def test_two_trainings_are_called_few():
    (note,) = (note for note in notes_of(by_seeds((0.7, 0.65), (0.0, 0.05))) if "training" in note)
    assert note.startswith("Two final trainings tell little of how far seeds differ")
    assert not any("training" in note for note in notes_of(by_seeds((0.7, 0.65, 0.7), (0.0, 0.05, 0.0))))


def notes_of(verdict: dict[str, Any]) -> list[str]:
    return verdict_notes({**verdict, "warnings": [], "optimism": None})


def test_a_lower_loss_is_better():
    found = planted((0.8, 0.0), 800, LOSS)
    difference = found["comparisons"][0]["differences"]["loss"]
    assert difference["value"] < 0
    assert found["comparisons"][0]["better"] == "convs:1"
    assert f"`convs:1` is better than `all` (−{-difference['value']:.3f} loss, 95 % interval −" in found["sentence"]
    assert "points" not in found["sentence"]


def row(
    second: str, better: str | None, value: float, needed: float = 1385.2, seeds: int = 3, **found: float
) -> dict[str, Any]:
    own = {"value": value, "low": value - 0.015, "high": value + 0.016, "error": 0.008, "seed_error": 0.0}
    return {
        "first": "a",
        "second": second,
        "better": better,
        "differences": {"macro_f1": {**own, "patients": 20, **found}},
        "images_needed": needed,
        "seeds": [seeds, seeds],
    }


INFINITE, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "`a` is the only strategy that was tried: there is nothing to compare it with."),
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
            [row("b", "b", -0.021), row("c", None, 0.0, INFINITE, patients=0)],
            "`b` is better than `a`, the best by validation (+2.1 points macro F1, 95 % interval 0.5 to 3.6). "
            "These 169 images cannot tell `a` from `c`; they give each of them the same class.",
        ),
        (
            [row(name, None, 0.001, 2e6) for name in "bcdefg"],
            "These 169 images cannot tell `a` from `b`, `c`, `d` and 3 others; more than 1,000,000 would be needed for "
            "each.",
        ),
        (
            [row("b", "a", 0.021, seeds=1)],
            "`a` is better than `b` (+2.1 points macro F1, 95 % interval 0.6 to 3.7), as far as one training of each "
            "can tell.",
        ),
        (
            [row("b", "a", 0.4, low=NAN, high=NAN)],
            "`a` is better than `b` (+40.0 points macro F1, whichever patients are drawn).",
        ),
        (
            [row("b", None, 0.0, INFINITE, patients=0), row("c", None, 0.0, INFINITE), row("d", None, 0.01)],
            "These 169 images cannot tell `a` from `d`; about 1,400 would be needed. These 169 images cannot tell it "
            "from `b`; they give each of them the same class. These 169 images cannot tell it from `c`; they differ on "
            "single images, but not in macro F1: no number of images follows from that.",
        ),
        (
            [row("b", None, NAN, INFINITE, error=NAN)],
            "These 169 images cannot tell `a` from `b`; macro F1 is undefined on them.",
        ),
        (
            [row("b", None, 0.1, INFINITE, error=NAN)],
            "These 169 images cannot tell `a` from `b`; they are of too few patients.",
        ),
        (
            [row("b", None, 0.1, INFINITE, seed_error=0.05)],
            "These 169 images cannot tell `a` from `b`; no number would, as long as the final trainings of a strategy "
            "differ so much: more of them are needed.",
        ),
    ],
)
def test_the_sentence(rows, expected):
    assert sentence("a", rows, F1, 169) == expected


def test_strategies_that_could_not_be_tested_are_named():
    behind = [row("b", "b", -0.021)]
    assert sentence("a", behind, F1, 169, ["c"]).startswith("`b` is better than `a`, the best by validation of those")
    assert sentence("a", behind, F1, 169, ["c", "d"]).endswith(" 0.5 to 3.6). `c` and `d` could not be tested.")
    alone = sentence("a", [], F1, 169, ["c"])
    assert alone == "`c` could not be tested; there is nothing to compare `a` with."
    assert sentence("", [], F1, 169, ["c"]) == "`c` could not be tested: no strategy is compared with another."


def verdict_on(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, patients: list[str], metric: str = "macro_f1"
):
    """The verdict on two strategies, given the classes that each predicts."""
    contenders = [
        Contender(name, name, [np.log(0.85 * np.eye(3)[own] + 0.05)])
        for name, own in (("convs:1", first), ("all", second))
    ]
    return compared(contenders, labels, CLASSES, patients, Objective(metric, "max"), resamples=100)


def test_what_cannot_be_told_is_told_for_its_own_reason():
    labels = np.arange(36) % 3
    patients = [str(k) for k in range(36)]
    wrong = (labels + 1) % 3
    one, other = (np.where(np.isin(np.arange(36), places), wrong, labels) for places in ((0, 3, 6), (9, 12, 15)))
    same = verdict_on(labels, labels, labels, patients)
    to_the_score = verdict_on(labels, labels, labels, patients, "auroc")
    equal = verdict_on(one, other, labels, patients, "accuracy")
    undefined = verdict_on(labels, one, np.zeros(36, int), patients, "auroc")
    alone = verdict_on(labels, one, labels, ["p"] * 36)
    for found, reason in (
        (same, "they give each of them the same class."),
        (to_the_score, "they do the same on them."),
        (equal, "they differ on single images, but not in accuracy: no number of images follows from that."),
        (undefined, "AUROC is undefined on them."),
        (alone, "they are of too few patients."),
    ):
        assert found["sentence"] == f"These 36 images cannot tell `convs:1` from `all`; {reason}"
    for found in (same, undefined, alone):
        assert math.isnan(found["smallest_difference"])
        assert not any("truly differs" in note for note in notes_of(found))
    assert 0.1 < equal["smallest_difference"] < 0.3


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
        strategies = [SimpleNamespace(backbone="vanilla_cnn", freeze=freeze) for freeze in freezes]
        self.plan: Any = SimpleNamespace(manifest=manifest, spec=spec, indices=parts.__getitem__, strategies=strategies)
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
            problems={},
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
    before = sweep.verdict()["strategies"]
    (_, reference), (name, second), *_ = before.items()
    del sweep.evaluation.test_scores[second]
    sweep.evaluation.problems[second] = "out of memory"
    found = sweep.verdict()
    assert len(found["strategies"]) == 3
    assert found["strategies"][found["reference"]] == reference
    assert found["sentence"].endswith(f". `{name}` could not be tested.")
    assert f"`{name}` could not be tested: out of memory" in cautions({"verdict": found})


def test_a_strategy_whose_trials_all_failed_is_named(tmp_path):
    sweep = Judged(tmp_path, freezes=("all", "none"))
    config = TrialConfig("vanilla_cnn", freeze="stages:1")
    sweep.results += (TrialResult("trial-9", config, Outcome.FAILED, 0, 0, {}, error="DivergedError: NaN"),)
    found = sweep.verdict()
    assert set(found["strategies"]) == {"all", "none"}
    assert found["sentence"].endswith(". `stages:1` could not be tested.")
    why = "`stages:1` could not be tested: none of its trials gave a model; the last: DivergedError: NaN"
    assert why in cautions({"verdict": found})


def test_where_one_strategy_could_be_tested_it_is_not_called_the_only_one(tmp_path):
    sweep = Judged(tmp_path, freezes=("all", "none"))
    reference, second = sweep.verdict()["strategies"].values()
    del sweep.evaluation.test_scores[second]
    assert " could not be tested; there is nothing to compare `" in sweep.verdict()["sentence"]
    del sweep.evaluation.test_scores[reference]
    found = sweep.verdict()
    assert found["sentence"].endswith(" could not be tested: no strategy is compared with another.")
    assert found["comparisons"] == []


def test_a_strategy_of_which_a_seed_failed_stays_and_is_told(tmp_path):
    sweep = Judged(tmp_path)
    first, *_ = sweep.verdict()["strategies"].values()
    sweep.evaluation.problems[first] = "final training: DivergedError"
    found = sweep.verdict()
    assert len(found["strategies"]) == 4
    assert "could not be tested" not in found["sentence"]
    assert f"`{found['reference']}` was not tested in full: final training: DivergedError" in cautions(
        {"verdict": found}
    )


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
    assert found["sentence"] == "`convs:1` is the only strategy that was tried: there is nothing to compare it with."
    assert cautions({"verdict": found}) == ["No trial tried `all`, `none` and `stages:1`: nothing is said of them."]


def test_findings_of_the_audit_and_the_doctor_stand_beside_the_sentence():
    found = planted((0.0, 0.0), 20)
    summary = {
        "verdict": found,
        "best": {"doctor": [{"name": "class_never_predicted", "evidence": "Normal has recall 0.", "remedy": "-"}]},
        "audit": [
            {"name": f"{CLASS_FOLLOWS}source", "severity": "warning", "evidence": "The source alone gives 65 %."},
            {"name": "patient_in_two_classes", "severity": "note", "evidence": "21 patients have two classes."},
        ],
    }
    grave = {"name": "constant_predictor", "grave": True, "evidence": "Every image is called Normal."}
    lesser = {"name": "still_improving", "grave": False, "evidence": "The best epoch is the last."}
    summary["strategies"] = [
        {"trial_id": found["strategies"][found["reference"]], "doctor": [grave]},  # told as that of the best trial
        {"trial_id": found["strategies"]["all"], "doctor": [grave, lesser]},
        {"trial_id": "not compared", "doctor": [grave]},
    ]
    lines = cautions(summary)
    assert lines == [
        "The data's audit: The source alone gives 65 %.",
        "The best trial (class_never_predicted): Normal has recall 0.",
        "`all` stands for a trial that went wrong (constant_predictor): Every image is called Normal.",
        "Of some classes fewer than 10 patients are tested, each of whom weighs much: COVID (6), Normal (8) and "
        "Pneumonia (6).",
        "The test set has 20 patients only: its intervals are rough.",
    ]
    assert verdict_notes({**found, "warnings": lines, "optimism": None})[:5] == lines


def test_what_became_of_the_final_models_stands_beside_the_sentence():
    found = planted((0.0, 0.0), 300)
    constant = {"name": "constant_predictor", "grave": True, "evidence": "All are taken for a."}
    by_chance = {"name": "class_never_predicted", "grave": False, "evidence": "Not one of 2 is taken for b."}
    summary = {
        "verdict": found,
        "strategies": [
            {"trial_id": found["strategies"]["convs:1"], "failed_seeds": {"failed": 1, "trained": 2, "problem": "NaN"}},
            {"trial_id": found["strategies"]["all"], "final_doctor": [constant, by_chance]},
        ],
        "test_openings": [{"opened": "2026-01-01", "earlier_sweeps": 3}],
    }
    assert cautions(summary) == [
        "`convs:1` stands for 2 of 3 final trainings, since the others failed (NaN): it looks better than it is if "
        "those were its worst.",
        "The final model of `all` went wrong (constant_predictor): All are taken for a.",
        "The final model of `all` (class_never_predicted): Not one of 2 is taken for b.",
        "3 sweeps before this one opened the same test images: what was chosen after a look at their figures is "
        "flattered by these here.",
    ]


def test_a_strategy_of_the_space_that_no_trial_tried_is_named(tmp_path):
    sweep = Judged(tmp_path)
    sweep.plan.strategies.append(SimpleNamespace(backbone="vanilla_cnn", freeze="convs:9"))
    found = sweep.verdict()
    assert found["untried"] == ["convs:9"]
    assert "No trial tried `convs:9`: nothing is said of it." in cautions({"verdict": found})


def test_strategies_that_were_hardly_searched_are_named():
    found = planted((0.0, 0.0, 0.0), 300)
    rows = [{"trial_id": trial_id, "trials": 1 + 4 * (name == "all")} for name, trial_id in found["strategies"].items()]
    (line,) = cautions({"verdict": found, "strategies": rows})
    assert line == (
        "`convs:1` and `none` had one trial each, others up to 5: what is compared is also how well each was searched."
    )
    assert not cautions({"verdict": found, "strategies": [{**row, "trials": 1} for row in rows]})


def test_a_model_that_does_no_better_than_the_files_say_is_called_out():
    found = planted((0.0, 0.0), 300)
    data = {"bar": {"accuracy": 0.968, "majority": 0.5}}
    summary = {"verdict": found, "data": data, "test": {"accuracy": {"value": 0.9}}}
    assert cautions(summary) == [
        "The final model's test accuracy, 0.900, is not above the bar to beat: who sees no picture, only what the "
        "files say of themselves, has 0.968."
    ]
    assert not cautions({**summary, "test": {"accuracy": {"value": 0.97}}})
    assert not cautions({**summary, "data": {"bar": None}})


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
