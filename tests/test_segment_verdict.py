"""A segmentation says what it knows: its figure on unseen patients, how well, and how far the choice flatters."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cxr_models.dataset import ImageRecord, Manifest
from cxr_models.intervals import mean_intervals
from cxr_models.mask_metrics import image_metrics
from cxr_models.trial import SEGMENT, VALIDATION_SCORES, Objective, Outcome, TrialConfig, TrialResult
from sweep.record import RunFolder, write_json
from sweep.segment_verdict import choice_text, judge_segmentation, known_figure, known_text
from sweep.tracked import summary_tags, trial_files
from sweep.verdict import cautions
from sweep.verdict_view import print_verdict, verdict_notes

DICE = Objective("dice", "max", SEGMENT)
IMAGES = 60  # two of each patient
PATIENTS = [f"p{k // 2}" for k in range(IMAGES)]
SPREAD = 0.1  # of Dice between images
INSIDE = 200  # pixels of every mask


def counts_of(dice: np.ndarray) -> np.ndarray:
    """Counts (images, 4) of masks that give about this Dice."""
    overlap = np.rint(INSIDE * np.clip(dice, 0, 1))
    return np.stack([1 - overlap / INSIDE, overlap, *np.full((2, len(dice)), INSIDE)], axis=1).astype(np.float32)


def drawn(generator: np.random.Generator, mean: float, images: int = IMAGES) -> np.ndarray:
    return generator.normal(mean, SPREAD, images).clip(0, 1)


def figures_of(dice: np.ndarray, patients: list[str]) -> dict[str, Any]:
    """`summary.json`'s `test` of these images."""
    interval = mean_intervals({"dice": dice, "iou": dice / (2 - dice)}, patients)
    figures = {name: {"value": each.value, "low": each.low, "high": each.high} for name, each in interval.items()}
    return {**figures, "images": len(dice), "patients": len(set(patients))}


class Segmented:
    """A segmentation whose trials have these true means of Dice on the validation images."""

    def __init__(
        self, out: Path, means: list[float], *, objective: Objective = DICE, tests: bool = True, seed: int = 0
    ) -> None:
        self.folder = RunFolder.create(out, "run", exactly=False)
        records = tuple(
            ImageRecord(f"{k}.png", "lung", p, "", "", "", "", 8, 8, "L", True) for k, p in enumerate(PATIENTS)
        )
        manifest = Manifest(Path("/nowhere"), "folders", records, (), 0)
        spec = SimpleNamespace(objective=objective, search=SimpleNamespace(seed=0))
        self.plan: Any = SimpleNamespace(manifest=manifest, spec=spec)
        generator, results = np.random.default_rng(seed), []
        for number, mean in enumerate(means):
            trial, config = f"trial-{number}", TrialConfig("unet", image_side=32, freeze="none")
            counts = counts_of(drawn(generator, mean))
            self.folder.trial(trial).mkdir(parents=True)
            np.savez(self.folder.trial(trial) / VALIDATION_SCORES, index=np.arange(IMAGES), counts=counts)
            val = {name: float(values.mean()) for name, values in image_metrics(counts, 32**2).items()}
            results.append(TrialResult(trial, config, Outcome.COMPLETED, 3, 2, val))
        self.results = tuple(results)
        test = figures_of(drawn(generator, max(means)), PATIENTS) if tests else None
        self.evaluation: Any = SimpleNamespace(test=test)

    def verdict(self) -> dict[str, Any]:
        return judge_segmentation(self.plan, self.results, self.folder, self.evaluation)


def test_of_equal_trials_the_best_is_flattered_by_about_its_lead(tmp_path):
    """What the best of 20 equal trials has more than the rest is chance; it is found, on average over sweeps."""
    gains, leads = [], []
    for seed in range(10):
        sweep = Segmented(tmp_path, [0.8] * 20, seed=seed)
        gains.append(sweep.verdict()["optimism"]["gain"])
        leads.append(max(result.val["dice"] for result in sweep.results) - 0.8)
    assert np.mean(leads) > 0.01
    assert np.mean(gains) == pytest.approx(np.mean(leads), rel=0.5)


def test_a_trial_that_is_better_by_far_owes_nothing_to_the_choice(tmp_path):
    sweep = Segmented(tmp_path, [0.9, 0.5, 0.5, 0.5])
    found = sweep.verdict()
    assert found["optimism"]["best"] == pytest.approx(sweep.results[0].val["dice"])
    assert found["optimism"]["gain"] < 0.005


@pytest.mark.parametrize(
    ("metric", "mode"), [("dice", "max"), ("iou", "max"), ("pixel_accuracy", "max"), ("loss", "min")]
)
def test_the_optimism_is_of_the_objective(tmp_path, metric, mode):
    sweep = Segmented(tmp_path, [0.8] * 6, objective=Objective(metric, mode, SEGMENT))
    found = sweep.verdict()
    pick = max if mode == "max" else min
    assert found["metric"] == metric
    assert found["optimism"]["best"] == pytest.approx(pick(result.val[metric] for result in sweep.results))
    assert found["optimism"]["gain"] > 0
    assert found["known"]["metric"] == ("iou" if metric == "iou" else "dice")  # what the test figures have


def test_the_sentence_has_the_test_figure_its_interval_and_the_choice(tmp_path):
    sweep = Segmented(tmp_path, [0.8] * 12)
    found = sweep.verdict()
    known, gain = sweep.evaluation.test["dice"], found["optimism"]["gain"]
    first, second, third = found["sentence"].removesuffix(".").split(". ")
    assert first == (
        f"The final U-Net reaches Dice {known['value']:.3f} on 60 test images of 30 patients "
        f"(95 % interval {known['low']:.3f} to {known['high']:.3f})"
    )
    assert second.startswith("That is known to within ")
    assert second.endswith(" such images would tell it to within 1 point")
    assert third == f"The choice among 12 trials flatters the validation figure by about {100 * gain:.1f} points Dice"
    assert found["comparisons"] == []
    assert "strateg" not in found["sentence"]


def test_as_many_images_as_are_called_for_tell_the_figure_to_within_a_point():
    generator = np.random.default_rng(3)
    few = known_figure(figures_of(drawn(generator, 0.8, 100), [str(k // 2) for k in range(100)]), "dice")
    needed = round(few["known"]["images_needed"])
    assert needed == pytest.approx(100 * (1.96 * SPREAD / 10 / 0.01) ** 2, rel=0.3)
    many = known_figure(figures_of(drawn(generator, 0.8, needed), [str(k // 2) for k in range(needed)]), "dice")
    assert many["known"]["within"] == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize(
    ("within", "needed", "expected"),
    [
        (0.0312, 582.3, " (95 % interval 0.900 to 0.960). That is known to within 3.2 points; about 590 such images "
        "would tell it to within 1 point."),
        (0.0081, 39.0, " (95 % interval 0.900 to 0.960). That is known to within 0.9 points."),
        (float("nan"), float("nan"), "; no interval follows from these."),
    ],
)  # fmt: skip
def test_what_the_test_images_say(within, needed, expected):
    known = {"metric": "dice", "value": 0.93, "low": 0.9, "high": 0.96, "within": within, "images_needed": needed}
    found = known_text({"images": 60, "patients": 1, "known": known})
    assert found == f"The final U-Net reaches Dice 0.930 on 60 test images of 1 patient{expected}"


def test_a_loss_is_flattered_in_its_own_unit():
    found = choice_text({"gain": 0.0214}, 3, Objective("loss", "min", SEGMENT))
    assert found == "The choice among 3 trials flatters the validation figure by about 0.021 loss."


def test_without_a_test_part_no_figure_is_of_unseen_patients(tmp_path):
    sweep = Segmented(tmp_path, [0.8] * 5, tests=False)
    found = sweep.verdict()
    best = max(result.val["dice"] for result in sweep.results)
    assert found["sentence"].startswith(f"There is no test part: validation Dice {best:.3f} is of the images that")
    assert "The choice among 5 trials flatters" in found["sentence"]
    assert "known" not in found
    assert not cautions({"verdict": found})


def test_one_trial_was_not_chosen_among_any(tmp_path):
    found = Segmented(tmp_path, [0.8]).verdict()
    assert found["optimism"] is None
    assert "choice" not in found["sentence"]


def test_readers_of_a_verdict_need_not_know_the_task(tmp_path):
    sweep = Segmented(tmp_path, [0.8] * 3)
    found = {**sweep.verdict(), "warnings": ["The masks are old."]}
    write_json(sweep.folder.summary, {"verdict": found})
    read = json.loads(sweep.folder.summary.read_text())["verdict"]
    assert summary_tags({"verdict": read}) == {"verdict": found["sentence"]}
    notes = verdict_notes(read)
    assert notes[0] == "The masks are old."
    assert any(note.startswith("The best validation Dice") for note in notes)
    assert any("One final U-Net was tested" in note for note in notes)
    console = Console(record=True, width=400)
    print_verdict(read, DICE, console)
    assert found["sentence"] in console.export_text()


def test_few_patients_are_told(tmp_path):
    found = {**Segmented(tmp_path, [0.8] * 2).verdict(), "patients": 12}
    assert cautions({"verdict": found}) == ["The test set has 12 patients only: its intervals are rough."]


def test_counts_of_pixels_are_no_matrix_of_classes(tmp_path):
    sweep = Segmented(tmp_path, [0.8])
    (result,) = sweep.results
    assert trial_files(result, sweep.folder.trial(result.trial_id), ("lung",)) == {}
