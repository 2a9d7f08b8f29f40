"""Which strategy is better, and whether these images can tell: one sentence, and what it rests on.

The strategy that was best on the validation images, chosen before the test set was opened, is compared with every other
one on the test images. No test figure ever changes which strategy that is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_models.comparison import ALPHA, BY_SCORE, POWER, Comparison, compare
from cxr_models.metrics import FloatArray, IntArray
from cxr_models.selection import Optimism, selection_optimism
from cxr_models.trial import TEST, VALIDATION_SCORES, Objective, TrialResult
from sweep.evaluation import FinalEvaluation
from sweep.plan import Plan
from sweep.record import RunFolder, best_by_strategy, ranked, strategy_of
from sweep.wording import count, figure, in_points, is_number, listed, metric_name, rounded_up, signed

ALWAYS = ("macro_f1", "auroc")  # beside the sweep's objective
FEW_PATIENTS = 30  # below, even Student's t gives intervals that are somewhat narrow
FEW_OF_CLASS = 10  # below, macro figures hang on single patients
MOST_IMAGES = 1_000_000  # nobody collects more to settle a difference
WITHOUT_TEST_PART = (
    "There is no test part, so no strategy is compared with another: on the validation images their trials were chosen."
)
NAMED = 3  # strategies that a sentence names; more are counted


@dataclass(frozen=True)
class Contender:
    """A strategy's final models.

    Attributes:
        name: of the strategy, as the sentence has it.
        trial_id: of its best trial.
        scores: (images, classes) log-probabilities of the test images, one array a seed.
    """

    name: str
    trial_id: str
    scores: Sequence[FloatArray]


def judge(
    plan: Plan, results: tuple[TrialResult, ...], folder: RunFolder, evaluation: FinalEvaluation
) -> dict[str, Any]:
    """`summary.json`'s `verdict`, from what the final evaluation found.

    Args:
        plan: of the sweep.
        results: every ended trial.
        folder: where the trials left their validation scores.
        evaluation: of each strategy's best trial; that of the best of all is among them.
    """
    objective, seed = plan.spec.objective, plan.spec.search.seed
    finalists = best_by_strategy(results, objective)
    tried = {strategy_of(result) for result in results}
    planned = {(row.backbone, row.freeze): None for row in plan.strategies}
    several = len({backbone for backbone, _ in (*planned, *tried)}) > 1
    names = {result.trial_id: " ".join(strategy_of(result)[0 if several else 1 :]) for result in results}
    found: dict[str, Any] = {
        "optimism": optimism_json(_optimism(plan, results, folder)),
        "untried": [" ".join(each[0 if several else 1 :]) for each in planned if each not in tried],
    }
    if not len(plan.indices(TEST)):
        return {"sentence": WITHOUT_TEST_PART, "metric": objective.metric, **found, "comparisons": []}
    contenders = [
        Contender(names[result.trial_id], result.trial_id, evaluation.test_scores[result.trial_id])
        for result in finalists
        if result.trial_id in evaluation.test_scores
    ]
    labels, patients = evaluation.test_images
    problems = _problems(results, finalists, names, evaluation)
    return compared(contenders, labels, plan.manifest.classes, patients, objective, problems, seed=seed) | found


def _problems(
    results: Sequence[TrialResult],
    finalists: Sequence[TrialResult],
    names: Mapping[str, str],
    evaluation: FinalEvaluation,
) -> dict[str, str]:
    """Strategy -> what kept it, or some of its final models, from being tested."""
    best = {strategy_of(result): result.trial_id for result in finalists}
    found = {}
    for result in results:
        own = best.get(strategy_of(result))
        if own is None:
            why = f"none of its trials gave a model; the last: {result.error or 'it had no epoch'}"
        else:
            why = evaluation.problems.get(own, "" if own in evaluation.test_scores else "it has no final model")
        if why:
            found[names[result.trial_id]] = why
    return found


def compared(
    contenders: Sequence[Contender],
    labels: IntArray,
    classes: Sequence[str],
    patients: Sequence[str],
    objective: Objective,
    problems: Mapping[str, str] | None = None,
    *,
    seed: int = 0,
    **resampling: int,
) -> dict[str, Any]:
    """The sentence and every comparison.

    Args:
        contenders: the best on the validation images first; it is the reference.
        labels: (images,) true class of the test images, an index into `classes`.
        classes: names of the classes.
        patients: (images,) patient of each image.
        objective: what the strategies are compared by.
        problems: strategy -> what went wrong in testing it; those that are no contenders could not be tested.
        seed: of the resampling.
        resampling: `resamples` of `comparison.compare`.
    """
    metric = objective.metric
    found = compare(
        labels,
        {each.name: each.scores for each in contenders},
        classes,
        patients,
        tuple(dict.fromkeys((metric, *ALWAYS))),
        seed=seed,
        **resampling,
    )
    seeds = {each.name: len(each.scores) for each in contenders}
    rows = [_row(comparison, objective, len(labels), len(found), seeds) for comparison in found]
    own = rows[: max(0, len(contenders) - 1)]  # pairs come in the order of the strategies
    untested = [name for name in problems or {} if name not in seeds]
    reference = next(iter(seeds), "")
    owners = np.asarray(patients)
    return {
        "sentence": sentence(reference, own, objective, len(labels), untested),
        "metric": metric,
        "reference": reference,
        "strategies": {each.name: each.trial_id for each in contenders},
        "problems": dict(problems or {}),
        "seeds": min(seeds.values(), default=0),
        "images": len(labels),
        "patients": len(set(patients)),
        "class_patients": {name: len(set(owners[labels == place])) for place, name in enumerate(classes)},
        "pairs": len(found),
        "alpha": ALPHA,
        "power": POWER,
        "smallest_difference": max(filter(is_number, (row["smallest_difference"] for row in own)), default=math.nan),
        "comparisons": rows,
    }


def _row(
    comparison: Comparison, objective: Objective, images: int, pairs: int, seeds: Mapping[str, int]
) -> dict[str, Any]:
    deciding = comparison.differences[objective.metric]
    first_leads = deciding.value > 0 if objective.mode == "max" else deciding.value < 0
    return {
        "first": comparison.first,
        "second": comparison.second,
        "seeds": [seeds[comparison.first], seeds[comparison.second]],
        "better": (comparison.first if first_leads else comparison.second) if deciding.shown else None,
        "differences": {name: asdict(difference) for name, difference in comparison.differences.items()},
        "mcnemar": asdict(comparison.discordance),
        "smallest_difference": deciding.smallest(pairs),
        "images_needed": deciding.images_needed(images, pairs),
    }


def sentence(
    reference: str,
    rows: Sequence[Mapping[str, Any]],
    objective: Objective,
    images: int,
    untested: Sequence[str] = (),
) -> str:
    """What the comparisons of the reference say, for a person.

    Args:
        reference: the strategy that was best on the validation images; "" where none could be tested.
        rows: of `compared`, those whose `first` is the reference.
        objective: that they were decided by.
        images: of the test set.
        untested: strategies that could not be tested.
    """
    left_out = f"{_quoted(untested)} could not be tested" if untested else ""
    if not reference:
        return f"{left_out}: no strategy is compared with another."
    if not rows:
        rest = f"{left_out}; there is" if untested else f"`{reference}` is the only strategy that was tried: there is"
        return f"{rest} nothing to compare {f'`{reference}`' if untested else 'it'} with."
    metric = objective.metric
    ahead = [row for row in rows if row["better"] == reference]
    behind = [row for row in rows if row["better"] == row["second"]]
    open_ = sorted((row for row in rows if row["better"] is None), key=lambda row: float(row["images_needed"]))
    parts = []
    if behind:
        verb = "is" if len(behind) == 1 else "are"
        best = f"`{reference}`, the best by validation{' of those tested' if untested else ''}"
        parts.append(f"{_names(behind)} {verb} better than {best}{_by(behind, metric, -1)}{_as_far(behind)}")
    if ahead:
        parts.append(f"`{reference}` is better than {_names(ahead)}{_by(ahead, metric, 1)}{_as_far(ahead)}")
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in open_:
        cases.setdefault(_without_number(row, metric), []).append(row)
    for case, alike in cases.items():
        which = "it" if ahead or case != next(iter(cases)) else f"`{reference}`"
        why = case or _needed(alike)
        parts.append(f"these {count(images, 'image')} cannot tell {which} from {_names(alike)}; {why}")
    text = ". ".join(part[:1].upper() + part[1:] for part in filter(None, [*parts, left_out]))
    return f"{text}."


def _names(rows: Sequence[Mapping[str, Any]]) -> str:
    return _quoted([row["second"] for row in rows])


def _quoted(strategies: Sequence[str]) -> str:
    names = [f"`{name}`" for name in strategies]
    left = len(names) - NAMED
    return listed(names if left <= 1 else [*names[:NAMED], f"{left} others"])


def _as_far(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a comparison is about where a strategy was trained once: these models, not every training of it."""
    if all(max(row["seeds"]) == 1 for row in rows):
        return ", as far as one training of each can tell"
    once = {
        row[side]: None
        for row in rows
        for side, seeds in zip(("first", "second"), row["seeds"], strict=True)
        if seeds == 1
    }
    return f", as far as one training of {_quoted(list(once))} can tell" if once else ""


def _by(rows: Sequence[Mapping[str, Any]], metric: str, sign: int) -> str:
    """By how much: of several, the smallest difference."""
    nearest = min((row["differences"][metric] for row in rows), key=lambda found: abs(float(found["value"])))
    low, high = sorted(sign * nearest[bound] for bound in ("low", "high"))
    least = "at least " if len(rows) > 1 else ""
    scale, unit, digits = (100.0, "points ", 1) if in_points(metric) else (1.0, "", 3)
    low_text, high_text = (signed(scale * bound, digits).removeprefix("+") for bound in (low, high))
    interval = f"95 % interval {low_text} to {high_text}" if is_number(low) else "whichever patients are drawn"
    value = signed(scale * sign * nearest["value"], digits)
    return f" ({least}{value} {unit}{metric_name(metric)}, {interval})"


def _without_number(row: Mapping[str, Any], metric: str) -> str:
    """Why no number of images can be given that would settle a comparison; "" where one can."""
    found, name = row["differences"][metric], metric_name(metric)
    if math.isfinite(row["images_needed"]):
        return ""
    if math.isnan(found["value"]):
        return f"{name} is undefined on them"
    if not found["patients"]:
        return "they do the same on them" if metric in BY_SCORE else "they give each of them the same class"
    if math.isnan(found["error"]):
        return "they are of too few patients"
    if found["seed_error"] and found["value"]:
        return "no number would, as long as the final trainings of a strategy differ so much: more of them are needed"
    return f"they differ on single images, but not in {name}: no number of images follows from that"


def _needed(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` come in the order of how many images they need."""
    needed = float(rows[0]["images_needed"])
    shown = number_needed(needed)
    more = any(number_needed(float(row["images_needed"])) != shown for row in rows)
    rest = f" for `{rows[0]['second']}`, and more for the rest" if more else " for each" if len(rows) > 1 else ""
    return f"{shown} would be needed{rest}"


def number_needed(images: float) -> str:
    """How many images would be needed, as a sentence has it."""
    return f"more than {MOST_IMAGES:,}" if images > MOST_IMAGES else f"about {rounded_up(images):,}"


def _optimism(plan: Plan, results: tuple[TrialResult, ...], folder: RunFolder) -> Optimism | None:
    objective = plan.spec.objective
    kept = [arrays for _, arrays in validated_alike(ranked(results, objective), folder)]
    if len(kept) < 2:
        return None
    return selection_optimism(
        kept[0]["labels"],
        [each["scores"] for each in kept],
        plan.manifest.classes,
        [plan.manifest.records[index].patient for index in kept[0]["index"]],
        objective.metric,
        objective.mode,
        folds=kept[0].get("fold"),
        seed=plan.spec.search.seed,
    )


def validated_alike(
    ranking: Sequence[TrialResult], folder: RunFolder
) -> list[tuple[TrialResult, dict[str, NDArray[Any]]]]:
    """The trials that kept what they made of the same validation images as the best of them, and what they kept.

    Args:
        ranking: the best trial first.
        folder: where the trials left it.
    """
    kept: list[tuple[TrialResult, dict[str, NDArray[Any]]]] = []
    for result in ranking:
        path = folder.trial(result.trial_id) / VALIDATION_SCORES
        if path.is_file():
            with np.load(path) as arrays:
                kept.append((result, dict(arrays)))
    return [each for each in kept if np.array_equal(each[1]["index"], kept[0][1]["index"])]


def optimism_json(found: Optimism | None) -> dict[str, Any] | None:
    """`optimism` of a verdict: how much better the chosen trial looks on the validation images than it is.

    None where nothing was chosen, and where too few patients were there to resample.
    """
    return asdict(found) if found and math.isfinite(found.gain) else None


def cautions(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the sentence: of the audit, of the doctor, and of the size of the test set."""
    verdict, best = summary["verdict"], summary.get("best", {})
    lines = [
        f"The data's audit{' (an allowed leak)' if finding['severity'] == 'leak' else ''}: {finding['evidence']}"
        for finding in summary.get("audit", [])
        if finding["severity"] != "note"
    ]
    lines += _below_the_bar(summary)
    lines += [f"The best trial ({each['name']}): {each['evidence']}" for each in best.get("doctor", [])]
    # A strategy may lose because its training went wrong, which says little about the strategy.
    names = {trial_id: name for name, trial_id in verdict.get("strategies", {}).items()}
    lines += [
        f"`{names[row['trial_id']]}` stands for a trial that went wrong ({each['name']}): {each['evidence']}"
        for row in summary.get("strategies", [])
        for each in row.get("doctor", [])
        if each["grave"] and names.get(row["trial_id"], verdict.get("reference")) != verdict.get("reference")
    ]
    lines += _of_final_models(summary, names)
    lines += _of_effort(summary, verdict, names)
    for name, why in verdict.get("problems", {}).items():
        what = "was not tested in full" if name in verdict["strategies"] else "could not be tested"
        lines.append(f"`{name}` {what}: {why}")
    if few := {name: own for name, own in verdict.get("class_patients", {}).items() if own < FEW_OF_CLASS}:
        classes = listed([f"{name} ({own})" for name, own in few.items()])
        lines.append(
            f"Of some classes fewer than {FEW_OF_CLASS} patients are tested, each of whom weighs much: {classes}."
        )
    if (verdict["comparisons"] or "known" in verdict) and verdict["patients"] < FEW_PATIENTS:
        lines.append(f"The test set has {count(verdict['patients'], 'patient')} only: its intervals are rough.")
    return lines


def _below_the_bar(summary: Mapping[str, Any]) -> Iterator[str]:
    """Whether the final model does no better than who sees what the files say of themselves alone."""
    bar = summary.get("data", {}).get("bar")
    accuracy = summary.get("test", {}).get("accuracy", {}).get("value")
    if bar and accuracy is not None and accuracy <= max(bar["accuracy"], bar["majority"]):
        yield (
            f"The final model's test accuracy, {figure(accuracy)}, is not above the bar to beat: who sees no picture, "
            f"only what the files say of themselves, has {figure(max(bar['accuracy'], bar['majority']))}."
        )


def _of_effort(summary: Mapping[str, Any], verdict: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    """Which strategies were hardly searched, or not at all."""
    if untried := verdict.get("untried"):
        yield f"No trial tried {_quoted(untried)}: nothing is said of {'it' if len(untried) == 1 else 'them'}."
    rows = [row for row in summary.get("strategies", []) if row["trial_id"] in names]
    tried = {names[row["trial_id"]]: row.get("trials", 0) for row in rows}
    once = [name for name, trials in tried.items() if trials == 1]
    if once and max(tried.values()) > 1:
        yield (
            f"{_quoted(once)} had one trial {'each, others' if len(once) > 1 else 'alone, others'} up to "
            f"{max(tried.values())}: what is compared is also how well each was searched."
        )


def _of_final_models(summary: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the models that were tested, and how often others were tested on the same images.

    Args:
        summary: of the sweep.
        names: trial -> the strategy that it stands for.
    """
    for row in summary.get("strategies", []):
        name = f"`{names.get(row['trial_id'], row['trial_id'])}`"
        for each in row.get("final_doctor", []):
            went = " went wrong" if each["grave"] else ""  # else chance may explain it
            yield f"The final model of {name}{went} ({each['name']}): {each['evidence']}"
        if failed := row.get("failed_seeds"):
            total = failed["failed"] + failed["trained"]
            yield (
                f"{name} stands for {failed['trained']} of {count(total, 'final training')}, since the others failed "
                f"({failed['problem']}): it looks better than it is if those were its worst."
            )
    opened = {tuple(opening.get("trials", ())) for opening in summary.get("test_openings", [])}
    if len(opened) > 1:
        yield (
            "The sweep went on after its test images had been opened: whoever saw those figures before deciding to go "
            "on has chosen by them."
        )
    earlier = max((opening.get("earlier_sweeps", 0) for opening in summary.get("test_openings", [])), default=0)
    if earlier:
        yield (
            f"{count(earlier, 'sweep')} before this one opened the same test images: what was chosen after a look at "
            "their figures is flattered by these here."
        )
