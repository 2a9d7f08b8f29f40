"""The final evaluation reads each strategy's best weights once, opens the test set once, and outlives what fails."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from cxr_models.dataset import ImageRecord, Manifest
from cxr_models.trial import METRICS, Objective, Outcome, TrialConfig, TrialData, TrialResult
from sweep import evaluation
from sweep.evaluation import FailedSeeds, FinalEvaluation, Finalist, evaluate_finalists
from sweep.finals import FinalTraining
from sweep.keras_child import keras_child
from sweep.progress import EvaluationProgress
from sweep.record import RunFolder

CLASSES = ("a", "b")
SPLITS = ("train",) * 8 + ("val",) * 4 + ("test",) * 4
RESULTS = tuple(
    TrialResult(
        f"trial-{place}",
        TrialConfig("mobilenet_v2_0.35", freeze=freeze),
        Outcome.COMPLETED,
        epochs=2,
        best_epoch=1,
        val=dict.fromkeys(METRICS, value),
    )
    for place, (freeze, value) in enumerate([("all", 0.7), ("none", 0.9), ("none", 0.5), ("stages:1", 0.8)])
)
BEST_FIRST = ["trial-1", "trial-3", "trial-0"]


def plan_of(splits: tuple[str, ...] = SPLITS) -> Any:
    """What the evaluation asks of a plan."""
    records = tuple(
        ImageRecord(f"{k}.png", CLASSES[k % 2], f"p{k // 2}", "", "", "", f"{k:064x}", 8, 8, "L", True)
        for k in range(len(splits))
    )
    return SimpleNamespace(
        manifest=Manifest(Path("/nowhere"), "folders", records, (), 0),
        splits=splits,
        indices=lambda part: np.flatnonzero(np.array(splits) == part),
        spec=SimpleNamespace(
            name="small", objective=Objective("accuracy", "max"), search=SimpleNamespace(seed=0), reference=None
        ),
        allotment=SimpleNamespace(threads=1, concurrency=1),
    )


class FakeTracker:
    uri = "sqlite:///x"
    parent_run_id = "run"

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}
        self.notes: list[str] = []
        self.models: dict[str, str] = {}
        self.openings: list[tuple[int, str]] = []

    def evaluated(self, trial_id: str, parts: Any) -> None:
        self.told[trial_id] = parts

    def test_opened(self, number: int, opening: str) -> None:
        self.openings.append((number, opening))

    def champion(self, trial_id: str, example: np.ndarray) -> bool:
        return True

    def registered(self, trial_id: str, address: str) -> None:
        self.models[trial_id] = address

    def note(self, cause: str) -> None:
        self.notes.append(cause)


class Evaluated:
    """One final evaluation whose child is `answer(folder's name, indices)`."""

    def __init__(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: tuple[str, ...] = SPLITS, seeds: int = 1
    ) -> None:
        self.seeds = seeds
        self.problems: dict[str, str] = {}
        self.plan = plan_of(splits)
        self.folder = RunFolder.create(tmp_path, "run", exactly=False)
        np.save(tmp_path / "pixels.npy", np.zeros((len(splits), 96, 96, 1), np.uint8))
        labels = np.where(np.array(splits) == "test", -1, self.plan.manifest.labels).astype(np.int32)
        train, val = (self.plan.indices(part) for part in ("train", "val"))
        self.data = TrialData(CLASSES, labels, train, val, 1, {96: tmp_path / "pixels.npy"})
        self.tracker, self.output = FakeTracker(), StringIO()
        self.found = FinalEvaluation(self.plan, self.folder, tmp_path / "cache")
        self.calls: list[str] = []
        self._monkeypatch = monkeypatch

    def run(self, answer: Callable[[str, np.ndarray], np.ndarray]) -> None:
        def call(function: Any, *arguments: Any, timeout_s: float = 0.0) -> Any:
            if function is evaluation.register_champion:
                self.calls.append("register")
                return "models:/small/1"
            finalist, indices, model = arguments
            assert isinstance(finalist, Finalist)
            assert timeout_s > len(indices)
            self.calls.append(f"{finalist.folder.name}{' saved' if model else ''}")
            return answer(finalist.folder.name, indices)

        @contextmanager
        def child(log: Path) -> Iterator[Any]:
            yield call

        self._monkeypatch.setattr(evaluation, "keras_child", child)
        progress = EvaluationProgress(Console(file=self.output, width=200))
        evaluate_finalists(
            self.plan, RESULTS, self.trainings, self.folder, self.data, self.tracker, progress, self.found
        )

    @property
    def trainings(self) -> Any:
        """Those that did not fail."""
        strategies = RESULTS[1:2] if "test" not in self.plan.splits else (RESULTS[1], RESULTS[3], RESULTS[0])
        all_done = [FinalTraining(result, number) for number in range(self.seeds) for result in strategies]
        done = [training for training in all_done if training.training_id not in self.problems]
        return SimpleNamespace(
            seeds=self.seeds,
            done=done,
            of=lambda result: [training for training in done if training.trial is result],
            problem=lambda result: next(
                (text for name, text in self.problems.items() if name.startswith(result.trial_id)), ""
            ),
        )

    @property
    def openings(self) -> list[Any]:
        file = self.folder.test_openings
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def right(self, indices: np.ndarray, share: float) -> np.ndarray:
        """Log-probabilities with the first `share` of the images right."""
        labels = self.plan.manifest.labels[indices]
        predicted = np.where(np.arange(len(indices)) < share * len(indices), labels, 1 - labels)
        return np.log(np.where(np.eye(2)[predicted] > 0, 0.9, 0.1)).astype(np.float32)


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Evaluated:
    return Evaluated(tmp_path, monkeypatch)


def test_the_final_model_is_tested_and_the_trial_judged_by_the_images_it_was_chosen_by(sweep):
    sweep.run(lambda name, indices: sweep.right(indices, 1.0 if name == "trial-1-final-1" else 0.0))
    assert sweep.calls == [
        *("trial-1-final-1 saved", "trial-1", "register"),
        *("trial-3-final-1", "trial-3", "trial-0-final-1", "trial-0"),
    ]
    assert list(sweep.found.figures) == BEST_FIRST
    for trial, figures in sweep.found.figures.items():
        assert {part: figures[part]["images"] for part in figures} == {"train": 8, "val": 4, "test": 4}
        assert {part: figures[part]["accuracy"] for part in figures} == {
            "train": 0.0,
            "val": 0.0,
            "test": 1.0 if trial == "trial-1" else 0.0,
        }
        assert figures["test"]["report"]["macro avg"]["support"] == 4
        assert figures["train"]["patients"] == 4
        assert sweep.tracker.told[trial]["val"]["loss"] == pytest.approx(-np.log(0.1))
        assert sweep.tracker.told[trial]["test"]["loss"] == pytest.approx(-np.log(0.9 if trial == "trial-1" else 0.1))
    # Two patients: that all of their images are right is seen in 2.5 % of test sets where 15.8 % of images are.
    assert sweep.found.test["accuracy"] == pytest.approx({"value": 1.0, "low": 0.025**0.5, "high": 1.0})
    assert sweep.found.test["confusion_matrix"] == [[2, 0], [0, 2]]
    assert "evaluating 2 of 3 strategies on 16 images: mobilenet_v2_0.35 stages:1" in sweep.output.getvalue()


def test_the_test_scores_of_all_finalists_are_kept_and_calibrated_on_the_validation_images(sweep):
    sweep.run(lambda trial, indices: sweep.right(indices, 0.75))
    labels, patients = sweep.found.test_images
    assert (labels.tolist(), patients) == ([0, 1, 0, 1], ["p6", "p6", "p7", "p7"])
    assert list(sweep.found.test_scores) == list(sweep.found.calibration) == BEST_FIRST
    for trial, calibration in sweep.found.calibration.items():
        assert [scores.shape for scores in sweep.found.test_scores[trial]] == [(4, 2)]
        figures = sweep.found.figures[trial]["test"]
        assert calibration.before == {name: figures[name] for name in ("ece", "brier", "loss")}


def test_predictions_of_all_finalists_are_kept_the_best_first(sweep):
    sweep.run(lambda name, indices: sweep.right(indices, 0.5))
    table = pd.read_parquet(sweep.folder.predictions)
    assert list(dict.fromkeys(table["trial_id"])) == BEST_FIRST
    assert table.groupby(["trial_id", "split"]).size().unstack().to_dict("list") == {
        "train": [8] * 3,
        "val": [4] * 3,
        "test": [4] * 3,
    }
    assert table.groupby("split")["fitted_on"].unique().map(list).to_dict() == {
        "train": ["train"],
        "val": ["train"],
        "test": ["train+val"],
    }
    assert (table["score:a"] + table["score:b"]).to_numpy() == pytest.approx(1.0)
    names = table["image"].str.removesuffix(".png").astype(int)
    assert [SPLITS[k] for k in names] == table["split"].tolist()
    assert [CLASSES[k % 2] for k in names] == table["true"].tolist()


def test_every_seed_is_tested_and_the_first_one_kept(tmp_path, monkeypatch):
    sweep = Evaluated(tmp_path, monkeypatch, seeds=3)
    sweep.run(lambda name, indices: sweep.right(indices, 0.5 if name == "trial-1-final-2" else 1.0))
    assert sweep.calls[:4] == ["trial-1-final-1 saved", "trial-1-final-2", "trial-1-final-3", "trial-1"]
    assert [(row["seed"], row["accuracy"]) for row in sweep.found.by_seed["trial-1"]] == [(0, 1.0), (1, 0.5), (2, 1.0)]
    assert sweep.found.figures["trial-1"]["test"]["accuracy"] == 1.0
    table = pd.read_parquet(sweep.folder.predictions)
    assert table[table["split"] == "test"].groupby(["trial_id", "seed"]).size().tolist() == [4] * 9
    (opening,) = sweep.openings
    assert opening["models"] == 9


def test_the_test_set_is_opened_once_before_anything_reads_it(sweep):
    opened = []

    def answer(name: str, indices: np.ndarray) -> np.ndarray:
        opened.append(len(sweep.openings))
        return sweep.right(indices, 1.0)

    sweep.run(answer)
    assert opened == [1] * 6
    (opening,) = sweep.openings
    assert opening["trials"] == BEST_FIRST
    assert opening["models"] == 3
    assert sweep.tracker.openings == [(1, f"{opening['opened']}: 3 final models of 3 strategies")]


def test_a_sweep_without_a_test_part_opens_nothing(tmp_path, monkeypatch):
    sweep = Evaluated(tmp_path, monkeypatch, ("train",) * 8 + ("val",) * 4)
    sweep.run(lambda name, indices: sweep.right(indices, 1.0))
    assert sweep.openings == []
    assert sweep.found.test is None
    assert not sweep.found.test_scores
    assert not sweep.found.calibration
    assert {part for figures in sweep.found.figures.values() for part in figures} == {"train", "val"}
    assert sweep.calls == ["trial-1-final-1 saved", "trial-1", "register", "trial-3", "trial-0"]
    assert json.loads(sweep.folder.best_config.read_text())["classes"] == ["a", "b"]
    assert json.loads(sweep.folder.best_config.read_text())["fitted_on"] == "train+val"


def test_a_strategy_that_cannot_be_evaluated_leaves_the_others(sweep):
    def answer(name: str, indices: np.ndarray) -> np.ndarray:
        if name == "trial-3-final-1":
            raise RuntimeError("ResourceExhaustedError: out of memory")
        return sweep.right(indices, 1.0)

    sweep.run(answer)
    assert list(sweep.found.figures) == ["trial-1", "trial-0"]
    assert sweep.found.problems == {"trial-3": "ResourceExhaustedError: out of memory"}
    assert "mobilenet_v2_0.35 stages:1 was not evaluated: ResourceExhausted" in sweep.output.getvalue()


def test_a_strategy_that_was_not_trained_again_keeps_the_figures_of_its_trial(sweep):
    sweep.problems = {"trial-3-final-1": "final training: ValueError: no luck"}
    sweep.run(lambda name, indices: sweep.right(indices, 1.0))
    assert sweep.found.problems == {"trial-3": "final training: ValueError: no luck"}
    assert set(sweep.found.figures["trial-3"]) == {"train", "val"}
    assert set(sweep.found.figures["trial-0"]) == {"train", "val", "test"}


def test_without_a_final_model_of_the_best_strategy_the_sweep_fails(sweep):
    sweep.problems = {"trial-1-final-1": "final training: ValueError: no luck"}
    with pytest.raises(RuntimeError, match="final training: ValueError: no luck"):
        sweep.run(lambda name, indices: sweep.right(indices, 1.0))
    assert set(sweep.found.figures["trial-3"]) == {"train", "val", "test"}
    assert sweep.found.test is None
    assert "register" not in sweep.calls


def test_where_some_seeds_failed_the_others_stand_for_their_strategy(tmp_path, monkeypatch):
    sweep = Evaluated(tmp_path, monkeypatch, seeds=3)
    sweep.problems = {
        "trial-1-final-1": "final training: DivergedError: loss nan",
        "trial-3-final-2": "final training: ValueError: no luck",
    }
    sweep.run(lambda name, indices: sweep.right(indices, 0.5 if name == "trial-1-final-2" else 1.0))
    assert sweep.calls[:4] == ["trial-1-final-2 saved", "trial-1-final-3", "trial-1", "register"]
    assert sweep.found.test["accuracy"]["value"] == 0.5  # of the model that is kept
    assert json.loads(sweep.folder.best_config.read_text())["seed"] == 1
    assert sweep.found.figures["trial-1"]["test"]["accuracy"] == 0.5
    assert not sweep.found.problems
    assert sweep.found.failed_seeds == {
        "trial-1": FailedSeeds(1, 2, "final training: DivergedError: loss nan"),
        "trial-3": FailedSeeds(1, 2, "final training: ValueError: no luck"),
    }
    assert [len(scores) for scores in sweep.found.test_scores.values()] == [2, 2, 3]


def test_a_final_model_that_went_wrong_is_told(sweep):
    def answer(name: str, indices: np.ndarray) -> np.ndarray:
        scores = sweep.right(indices, 1.0)
        return np.zeros_like(scores) - np.array([0.1, 2.0], np.float32) if name == "trial-3-final-1" else scores

    sweep.run(answer)
    (found,) = sweep.found.doctor["trial-3"]
    assert (found.name, found.grave) == ("constant_predictor", True)
    assert found.evidence == "Every one of 4 test images is taken for a."
    assert sweep.found.doctor["trial-1"] == sweep.found.doctor["trial-0"] == ()


def test_a_test_set_that_nothing_reads_is_not_opened(sweep):
    sweep.problems = {f"trial-{number}-final-1": "final training: ValueError: no luck" for number in (0, 1, 3)}
    with pytest.raises(RuntimeError, match="no luck"):
        sweep.run(lambda name, indices: sweep.right(indices, 1.0))
    assert sweep.openings == []


def test_sweeps_before_this_one_on_the_same_test_images_are_counted(tmp_path, monkeypatch):
    def earlier(splits: tuple[str, ...] = SPLITS) -> int:
        sweep = Evaluated(tmp_path, monkeypatch, splits)
        sweep.run(lambda name, indices: sweep.right(indices, 1.0))
        (opening,) = sweep.openings
        return opening["earlier_sweeps"]

    assert [earlier() for _ in range(3)] == [0, 1, 2]
    assert earlier(("test", "train") * 4 + ("val",) * 4) == 0
    assert earlier() == 3


def test_without_the_best_trial_the_sweep_fails_and_the_others_are_still_evaluated(sweep):
    def answer(name: str, indices: np.ndarray) -> np.ndarray:
        if name == "trial-1-final-1":
            raise TimeoutError("best_scores took longer than 616 s")
        return sweep.right(indices, 1.0)

    with pytest.raises(TimeoutError, match="took longer than 616 s"):
        sweep.run(answer)
    assert list(sweep.found.figures) == ["trial-3", "trial-0"]
    assert sweep.found.test is None
    assert "register" not in sweep.calls


def test_an_interruption_keeps_what_was_found(sweep):
    def answer(name: str, indices: np.ndarray) -> np.ndarray:
        if name == "trial-3-final-1":
            raise KeyboardInterrupt
        return sweep.right(indices, 1.0)

    with pytest.raises(KeyboardInterrupt):
        sweep.run(answer)
    assert list(sweep.found.figures) == ["trial-1"]
    assert sweep.found.test["accuracy"]["value"] == 1.0
    assert set(pd.read_parquet(sweep.folder.predictions)["trial_id"]) == {"trial-1"}


def process_id() -> int:
    return os.getpid()


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(60)


def mistake() -> None:
    raise KeyError("no such weight")


def test_a_child_that_dies_or_hangs_is_followed_by_another(tmp_path):
    with keras_child(tmp_path / "log.txt") as call:
        first = call(process_id)
        assert first == call(process_id) != os.getpid()
        with pytest.raises(RuntimeError, match="KeyError: 'no such weight'"):
            call(mistake)
        assert call(process_id) == first
        with pytest.raises(RuntimeError, match=r"crash ended its process; its output: .*log\.txt"):
            call(crash)
        second = call(process_id)
        assert second != first
        with pytest.raises(TimeoutError, match=r"sleep took longer than 0\.2 s"):
            call(sleep, timeout_s=0.2)
        assert call(process_id) != second


def test_a_loss_is_of_log_probabilities_not_of_rounded_probabilities(tmp_path, monkeypatch):
    """A probability of exp(-200) is 0 in single precision; its logarithm would be infinite."""
    sweep = Evaluated(tmp_path, monkeypatch)
    sweep.run(lambda trial, indices: np.array([[-200.0, 0.0]] * len(indices), np.float32))
    assert sweep.found.figures["trial-1"]["test"]["loss"] == pytest.approx(100.0)
