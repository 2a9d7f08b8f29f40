"""What a segmentation may say of itself: its figure on unseen patients, how well that is known, and what choosing did.

Its trials are U-Nets that all train as a whole, and one of them is tested. So there are no strategies to compare, and
no other trial's test figures.
"""

import math
from collections.abc import Mapping
from typing import Any

from cxr_models.intervals import Interval, known_within, patients_needed
from cxr_models.mask_metrics import image_metrics
from cxr_models.selection import Optimism, mean_optimism
from cxr_models.trial import Objective, TrialResult
from sweep.evaluation import FinalEvaluation
from sweep.plan import Plan
from sweep.record import RunFolder, ranked
from sweep.verdict import number_needed, optimism_json, validated_alike
from sweep.wording import amount, count, figure, metric_name

GOAL = 0.01  # a figure that is known to within one point settles most questions
DEFAULT_METRIC = "dice"  # the test figure that is told where the objective has none, as the loss has not


def judge_segmentation(
    plan: Plan, results: tuple[TrialResult, ...], folder: RunFolder, evaluation: FinalEvaluation
) -> dict[str, Any]:
    """`summary.json`'s `verdict` of a segmentation, of the shape that `verdict.judge` gives.

    Args:
        plan: of the sweep.
        results: every ended trial.
        folder: where the trials left the counts of their validation images.
        evaluation: of the final U-Net.
    """
    objective, ranking = plan.spec.objective, ranked(results, plan.spec.objective)
    optimism = optimism_json(_optimism(plan, ranking, folder))
    known = known_figure(evaluation.test, objective.metric) if evaluation.test else None
    first = known_text(known) if known else validated_text(ranking[0], objective)
    return {
        "sentence": " ".join(filter(None, [first, choice_text(optimism, len(ranking), objective)])),
        "metric": objective.metric,
        "optimism": optimism,
        "comparisons": [],
        **(known or {}),
    }


def known_figure(test: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """How well the test images tell the figure of the final U-Net: `known`, `images` and `patients` of a verdict.

    Args:
        test: `summary.json`'s `test`.
        metric: that is told, if the test figures have it.
    """
    name = metric if metric in test else DEFAULT_METRIC
    images, patients, interval = test["images"], test["patients"], Interval(**test[name])
    needed = images / patients * patients_needed(interval, patients, GOAL)
    known = {"within": known_within(interval, patients), "goal": GOAL, "images_needed": needed}
    return {"images": images, "patients": patients, "known": {"metric": name, **test[name], **known}}


def known_text(verdict: Mapping[str, Any]) -> str:
    """What the test images say of the final U-Net, for a person, from what `known_figure` gives."""
    found, images = verdict["known"], verdict["images"]
    shown = f"{count(images, 'test image')} of {count(verdict['patients'], 'patient')}"
    text = f"The final U-Net reaches {metric_name(found['metric'])} {figure(found['value'])} on {shown}"
    within = found["within"]
    if not within > 0:
        return f"{text}; no interval follows from these."
    points = math.ceil(round(1000 * within, 6)) / 10  # as a bound, never rounded down
    interval = f"95 % interval {figure(found['low'])} to {figure(found['high'])}"
    text = f"{text} ({interval}). That is known to within {points} points"
    if within <= GOAL:
        return f"{text}."
    return (
        f"{text}; {number_needed(found['images_needed'])} such images would tell it to within {100 * GOAL:.0f} point."
    )


def validated_text(best: TrialResult, objective: Objective) -> str:
    """What can be said of a sweep without a test part, for a person."""
    value = figure(best.val[objective.metric])
    return (
        f"There is no test part: validation {metric_name(objective.metric)} {value} is of the images that the U-Net "
        "was chosen on, and no figure is of unseen patients."
    )


def choice_text(optimism: Mapping[str, Any] | None, trials: int, objective: Objective) -> str:
    """What choosing among so many trials did, for a person; "" where nothing was chosen."""
    if not optimism:
        return ""
    return (
        f"The choice among {count(trials, 'trial')} flatters the validation figure by about "
        f"{amount(objective.metric, optimism['gain'])}."
    )


def _optimism(plan: Plan, ranking: tuple[TrialResult, ...], folder: RunFolder) -> Optimism | None:
    objective, kept = plan.spec.objective, validated_alike(ranking, folder)
    if len(kept) < 2:
        return None
    values = [image_metrics(arrays["counts"], result.config.image_side**2)[objective.metric] for result, arrays in kept]
    patients = [plan.manifest.records[index].patient for index in kept[0][1]["index"]]
    folds = kept[0][1].get("fold")
    return mean_optimism(values, patients, objective.mode, folds=folds, seed=plan.spec.search.seed)
