"""`summary.json`: a sweep in one file, for programs; the report is for people."""

import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cxr_models.trial import EpochMetrics, Objective, Outcome, TrialResult, best_epoch
from sweep.audit_record import bar_json, finding_json
from sweep.evaluation import FinalEvaluation
from sweep.plan import Plan
from sweep.record import best_by_strategy, ranked, read_lines, strategy_of
from sweep.verdict import cautions
from sweep.versions import version_of
from sweep.weights import weights_inputs

PACKAGES = ("cxr-sweep", "ray", "tensorflow", "keras", "optuna", "mlflow", "scikit-learn", "numpy")


def summarise(
    plan: Plan,
    results: Sequence[TrialResult],
    *,
    seconds: Mapping[str, float],
    epochs_run: int,
    epochs_from_features: int,
    interrupted: bool,
    curves: Mapping[str, Sequence[EpochMetrics]],
    evaluation: FinalEvaluation,
) -> dict[str, Any]:
    """The summary of a finished or interrupted sweep.

    Args:
        plan: what was to run.
        results: every ended trial.
        seconds: what took how long; `total` and `train` among them.
        epochs_run: by all trials, unfinished ones included.
        epochs_from_features: how many of these were trained on stored features of frozen layers.
        interrupted: the sweep was ended before its last trial.
        curves: trial -> its epochs.
        evaluation: what the final evaluation found, empty where the sweep did not get that far.
    """
    objective = plan.spec.objective
    outcomes = Counter(result.outcome for result in results)
    order = ranked(tuple(results), objective)
    summary: dict[str, Any] = {
        "name": plan.spec.name,
        "seed": plan.spec.search.seed,
        "task": plan.spec.task,
        "inputs": [*(source.to_json() for source in plan.lung_masks), *weights_inputs(plan.weights)],
        "objective": {"metric": objective.metric, "mode": objective.mode},
        "data": _data(plan),
        "audit": [finding_json(finding) for finding in plan.audit.findings],
        "trials": {
            "planned": plan.trials,
            "total": len(results),
            **{str(outcome): outcomes[outcome] for outcome in Outcome},
        },
        "halving": plan.halving.sentence,
        "strategies": _strategies(plan, results, curves, evaluation),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "epochs": {
            "run": epochs_run,
            "full": sum(result.config.epochs for result in results),
            "from_features": epochs_from_features,
        },
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": plan.machine.cores,
            "gpus": plan.machine.gpus,
            "cpus_per_trial": plan.allotment.cpus_per_trial,
            "gpus_per_trial": plan.allotment.gpus_per_trial,
            "concurrency": plan.allotment.concurrency,
            "threads_per_trial": plan.allotment.threads,
        },
        "test_openings": list(read_lines(evaluation.openings.own)),
        "interrupted": interrupted,
        "notes": list(plan.notes),
    }
    if order:
        best = order[0]
        summary["best"] = {
            "trial_id": best.trial_id,
            "config": best.config.to_json(),
            "val": dict(best.val),
            "epoch": best.best_epoch,
            "doctor": [asdict(diagnosis) for diagnosis in best.doctor],
        }
    if plan.spec.reference:
        summary["reference"] = plan.spec.reference.to_yaml()
    if evaluation.test is not None:
        summary["test"] = evaluation.test
    if evaluation.verdict is not None:
        summary["verdict"] = dict(evaluation.verdict)
        summary["verdict"]["warnings"] = cautions(summary)
    return summary


def _data(plan: Plan) -> dict[str, Any]:
    manifest = plan.manifest
    return {
        "source": plan.spec.data.name,
        "layout": manifest.layout,
        "images": len(manifest.records),
        "subset": plan.spec.data.subset,
        "spared": manifest.spared,
        "found": plan.audit.found,
        "bar": bar_json(plan.audit),
        "patients": manifest.patients,
        "classes": list(manifest.classes),
        "digest": manifest.digest,
        **({"folds": plan.spec.data.folds, "repeats": plan.spec.data.repeats} if len(plan.folds) else {}),
        "unreadable": len(manifest.unreadable),
        "ignored": manifest.ignored,
        "splits": {
            part: {"images": counts.total(), "patients": plan.patients(part), "classes": dict(counts)}
            for part, counts in plan.class_counts().items()
        },
    }


def _strategies(
    plan: Plan,
    results: Sequence[TrialResult],
    curves: Mapping[str, Sequence[EpochMetrics]],
    evaluation: FinalEvaluation,
) -> list[dict[str, Any]]:
    metric = plan.spec.objective.metric
    rows = []
    for best in best_by_strategy(tuple(results), plan.spec.objective):
        backbone, freeze = strategy_of(best)
        own = [result for result in results if strategy_of(result) == (backbone, freeze)]
        values = [result.val[metric] for result in own if result.val and result.outcome is not Outcome.FAILED]
        rows.append(
            {
                "backbone": backbone,
                "freeze": freeze,
                "trials": len(own),
                "best_val": best.val[metric],
                **({"by_fold": list(best.by_fold)} if best.by_fold else {}),
                "median_val": statistics.median(values),
                "trial_id": best.trial_id,
                "outcome": str(best.outcome),
                "best_epoch": best.best_epoch,
                "config": best.config.to_json(),
                "trainable_parameters": best.trainable_parameters,
                "frozen_parameters": best.frozen_parameters,
                "train_seconds": round(sum(result.train_seconds for result in own), 2),
                "doctor": [asdict(diagnosis) for diagnosis in best.doctor],
                **_best_epochs(plan.spec.objective, curves.get(best.trial_id, ())),
                **evaluation.figures.get(best.trial_id, {}),
                "test_by_seed": evaluation.by_seed.get(best.trial_id, []),
            }
        )
        if found := evaluation.doctor.get(best.trial_id):
            rows[-1]["final_doctor"] = [asdict(diagnosis) for diagnosis in found]
        if failed := evaluation.failed_seeds.get(best.trial_id):
            rows[-1]["failed_seeds"] = asdict(failed)
        if calibration := evaluation.calibration.get(best.trial_id):
            rows[-1]["calibration"] = asdict(calibration)
        if problem := evaluation.problems.get(best.trial_id):
            rows[-1]["evaluation_problem"] = problem
    return rows


def _best_epochs(objective: Objective, epochs: Sequence[EpochMetrics]) -> dict[str, int]:
    """By validation loss and by validation accuracy, which seldom agree."""
    modes = {metric: mode for metric, mode in objective.metrics.items() if metric in ("loss", "accuracy")}
    found = {metric: best_epoch(epochs, Objective(metric, mode)) for metric, mode in modes.items()}
    return {f"best_epoch_by_{metric}": best.epoch for metric, best in found.items() if best}
