"""The summary says of each strategy what its best trial's epochs and the final evaluation say."""

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cxr_models.audit import Audit
from cxr_models.dataset import ImageRecord, Manifest
from cxr_models.trial import METRICS, Diagnosis, EpochMetrics, Objective, Outcome, TrialConfig, TrialResult
from sweep.halving_plan import HalvingPlan
from sweep.reference import ReferenceSpec
from sweep.summary import summarise

RECORDS = tuple(ImageRecord(f"{k}.png", "ab"[k % 2], f"p{k}", "", "", "", "", 8, 8, "L", True) for k in range(4))
LATE = Diagnosis("still_improving", False, "The best epoch is the last.", "Allow more epochs.")
REFERENCE = ReferenceSpec.model_validate(
    {"source": "a report", "classes": ["A", "B"], "results": [{"accuracy": {"test": 0.9}}]}
)


def plan() -> Any:
    objective = Objective("macro_f1", "max")
    search, data = SimpleNamespace(seed=0), SimpleNamespace(name="xrays", subset=0.25)
    return SimpleNamespace(
        spec=SimpleNamespace(
            name="small", task="classify", search=search, objective=objective, data=data, reference=REFERENCE
        ),
        lung_masks=(),
        weights={},
        halving=HalvingPlan(sentence="after epoch 4"),
        manifest=Manifest(Path("/nowhere"), "folders", RECORDS, (), 0, spared=12),
        audit=Audit(4, 4, {}, None, ()),
        trials=2,
        machine=SimpleNamespace(cores=2, gpus=0),
        allotment=SimpleNamespace(cpus_per_trial=1, gpus_per_trial=0, concurrency=2, threads=1),
        notes=(),
        patients=lambda part: 2,
        folds=(),
        class_counts=lambda: {"train": Counter(a=1, b=1), "val": Counter(a=1, b=1), "test": Counter()},
    )


def result(trial_id: str, freeze: str, value: float) -> TrialResult:
    config = TrialConfig("mobilenet_v2_0.35", freeze=freeze)
    return TrialResult(trial_id, config, Outcome.COMPLETED, 3, 2, dict.fromkeys(METRICS, value))


def epoch(number: int, loss: float, accuracy: float) -> EpochMetrics:
    val = {**dict.fromkeys(METRICS, 0.5), "loss": loss, "accuracy": accuracy}
    return EpochMetrics("t1", number, 0, 1e-3, val, val, 1.0, 1.0)


def summary(**found: Any) -> dict[str, Any]:
    evaluation = SimpleNamespace(
        **{"figures": {}, "by_seed": {}, "problems": {}, "test": None, "calibration": {}, "verdict": None}
        | {"doctor": {}, "failed_seeds": {}, "openings": SimpleNamespace(own=Path("/nowhere"))}
        | found
    )
    return summarise(
        plan(),
        [replace(result("t1", "all", 0.9), doctor=(LATE,)), result("t2", "none", 0.8)],
        seconds={"total": 1.0},
        epochs_run=6,
        epochs_from_features=0,
        interrupted=False,
        curves={"t1": (epoch(1, 0.5, 0.7), epoch(2, 0.4, 0.7), epoch(3, 0.6, 0.9))},
        evaluation=evaluation,
    )


def test_the_best_epochs_by_loss_and_by_accuracy_are_told_apart():
    first, second = summary()["strategies"]
    assert (first["best_epoch_by_loss"], first["best_epoch_by_accuracy"]) == (2, 3)
    assert "best_epoch_by_loss" not in second  # no epoch of it is known


def test_the_final_figures_stand_with_their_strategy():
    parts = {"train": {"accuracy": 0.95}, "val": {"accuracy": 0.9}}
    first, second = summary(figures={"t1": parts}, problems={"t2": "out of memory"})["strategies"]
    assert {part: first[part] for part in parts} == parts
    assert "test" not in first
    assert "evaluation_problem" not in first
    assert second["evaluation_problem"] == "out of memory"
    assert "val" not in second


def test_the_report_is_told_how_halving_judged():
    assert summary()["halving"] == "after epoch 4"


def test_the_best_and_each_strategy_s_best_stand_with_what_the_doctor_found():
    found = summary()
    assert found["best"]["doctor"] == found["strategies"][0]["doctor"] == [asdict(LATE)]
    assert found["strategies"][1]["doctor"] == []


def test_without_a_test_part_there_is_no_test():
    found = summary()
    assert "test" not in found
    assert found["data"]["splits"]["test"]["images"] == 0
    assert summary(test={"accuracy": {"value": 0.5}})["test"] == {"accuracy": {"value": 0.5}}


def test_a_subset_is_told_with_what_it_leaves_out():
    data = summary()["data"]
    assert (data["images"], data["spared"], data["subset"]) == (4, 12, 0.25)


def test_the_reference_of_the_spec_is_kept_for_the_report():
    assert ReferenceSpec.model_validate(summary()["reference"]) == REFERENCE
