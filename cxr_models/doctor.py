"""What is wrong with a training, told from its curves: each diagnosis has a name, its evidence and a remedy.

    constant_predictor         grave   every validation image gets the same class
    empty_masks, full_masks    grave   the same of a segmentation: nothing is found, or everything is taken for lung
    class_never_predicted      grave   a class of which not one validation image is recognised; lesser where it has few
    exploding_validation_loss  grave   a validation loss far above that of knowing nothing, while training learns
    loss_at_chance             grave   losses that stay at that of knowing nothing
    loss_not_falling           grave   a segmentation whose training loss does not fall
    unstable_validation        lesser  right after the best epoch the validation accuracy falls far
    head_holds_parameters      lesser  the head holds more than nine tenths of all parameters
    still_improving            lesser  the best epoch is one of the last allowed, and the trend goes on
    best_epoch_first           lesser  no epoch was better than the first, nor had a lower validation loss
    later_phase_unused         lesser  the best epoch comes before the last phase of the freeze strategy

Pure functions of figures: those of our own trials, or a paper's (`curves`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from statistics import fmean, pvariance

import numpy as np
from numpy.typing import NDArray

from cxr_models.hopeless import EMPTY_MASKS, is_dead, recalls, same_answer
from cxr_models.trial import SEGMENT, Diagnosis, EpochMetrics, Objective, TrialConfig, best_epoch

HEAD_SHARE = 0.9  # of all parameters
CHANCE_BAND = 0.02  # a loss this close to that of knowing nothing, relatively, is at chance
EXPLODED = 10.0  # times the loss of knowing nothing
STUCK_EPOCHS = 3  # in a row: what one epoch may do by chance, three do not
LATE_SHARE = 0.1  # of the epochs allowed: the last ones
LEAST_FALL = 0.1  # of an accuracy, in one epoch
LEAST_GAIN = 0.05  # of a training accuracy over that of always naming the most frequent class
FEW_IMAGES = 5  # of a class: fewer are all missed now and then by a model that does know the class
NEARLY_PERFECT = {"max": 0.999, "min": 0.01}  # shares, and losses: beyond these nothing is left to gain
REMEDY_OF_FINAL = (
    "Do not use this final model. Its trial may have done well: train it with more seeds (final: {seeds: 3}), or "
    "search lower learning rates."
)
ROUNDING = 5e-5  # of a figure given to four decimals


def curves(
    *, train: Mapping[str, Sequence[float]] | None = None, val: Mapping[str, Sequence[float]] | None = None
) -> list[EpochMetrics]:
    """Epochs from a paper's curves, metric -> its value after each epoch; NaN where the paper gives none.

    Raises:
        ValueError: there is no curve, the curves differ in length, or a share is given in percent.
    """
    train, val = train or {}, val or {}
    for name, values in (*train.items(), *val.items()):
        if name != "loss" and any(value > 1 for value in values):
            raise ValueError(f"expected {name} as shares from 0 to 1, but got {max(values):g}; 90.8 % is written 0.908")
    lengths = {len(values) for values in (*train.values(), *val.values())}
    if len(lengths) != 1:
        raise ValueError(f"expected curves of one length, one value an epoch, but got lengths {sorted(lengths)}")
    return [
        EpochMetrics("", number + 1, 0, math.nan, _told(train, number), _told(val, number), math.nan, math.nan)
        for number in range(lengths.pop())
    ]


def _told(values: Mapping[str, Sequence[float]], number: int) -> dict[str, float]:
    return {name: curve[number] for name, curve in values.items() if not math.isnan(curve[number])}


def diagnose(
    epochs: Sequence[EpochMetrics],
    config: TrialConfig,
    objective: Objective,
    *,
    class_counts: Mapping[str, int] | None = None,
    parameters: int = 0,
    head_parameters: int = 0,
) -> tuple[Diagnosis, ...]:
    """Everything that is wrong with a training, grave diagnoses first.

    Metrics that an epoch does not have are not judged. A validation accuracy without recalls beside it shows a constant
    predictor only where it equals a class's share in three epochs in a row.

    Args:
        epochs: in order; may be empty where only the parameters are known.
        config: of the training; of a paper's, as far as it is known.
        objective: by which the best epoch is chosen.
        class_counts: class -> validation images; empty where unknown.
        parameters: of the whole network, 0 where unknown.
        head_parameters: of these, the head's.
    """
    case = _Case(epochs, config, objective, class_counts or {})
    checks = _mask_checks(case) if objective.task == SEGMENT else _class_checks(case)
    found = [*checks, *_course_checks(case), *_phase_check(case), *_head_check(config, parameters, head_parameters)]
    return tuple(sorted(found, key=lambda diagnosis: not diagnosis.grave))


@dataclass(frozen=True)
class _Case:
    """A training, and what follows from its figures."""

    epochs: Sequence[EpochMetrics]
    config: TrialConfig
    objective: Objective
    class_counts: Mapping[str, int]

    @cached_property
    def best(self) -> int | None:
        """Place of the best epoch."""
        known = [metrics for metrics in self.epochs if self.objective.metric in metrics.val]
        best = best_epoch(known, self.objective)
        return None if best is None else self.epochs.index(best)

    @property
    def shown(self) -> int:
        """Place of the epoch that a trial is ranked by; the last where no best one is known."""
        return len(self.epochs) - 1 if self.best is None else self.best

    def name(self, place: int) -> str:
        """An epoch in words."""
        kind = "the best" if place == self.best else "the last" if place == len(self.epochs) - 1 else ""
        return f"epoch {self.epochs[place].epoch}" + (f", {kind} one" if kind else "")

    @cached_property
    def answers(self) -> list[str]:
        """For each epoch what every validation image was taken for, "" where images differ."""
        return [
            answer or by_share
            for answer, by_share in zip(map(same_answer, self.epochs), self._answers_by_share(), strict=True)
        ]

    def _answers_by_share(self) -> list[str]:
        """The same for epochs without recalls, from an accuracy that equals a class's share for several epochs."""
        images = sum(self.class_counts.values())
        named = []
        for metrics in self.epochs:
            accuracy = math.nan if recalls(metrics.val) else metrics.val.get("accuracy", math.nan)
            # Half an image is the most by which the share of another number of images could be mistaken for it.
            within = max(0.5 / images, ROUNDING) if images else 0.0
            shares = {name: abs(accuracy - count / images) for name, count in self.class_counts.items()}
            named.append(next((name for name, distance in shares.items() if distance < within), ""))
        runs = [list(run) for _, run in groupby(named)]
        return [name if len(run) >= STUCK_EPOCHS else "" for run in runs for name in run]

    @property
    def classes(self) -> int:
        """How many there are, as far as is known; a mask's pixel has two."""
        return max(2, len(self.class_counts), *(len(recalls(metrics.val)) for metrics in self.epochs))

    @property
    def chances(self) -> list[float]:
        """The losses of knowing nothing, and of knowing the shares of the classes alone."""
        images = sum(self.class_counts.values())
        shares = [count / images for count in self.class_counts.values() if count]
        entropy = -sum(share * math.log(share) for share in shares)
        return [math.log(self.classes), *([entropy] if entropy else [])]

    @property
    def most_frequent(self) -> float:
        """The accuracy of always naming the most frequent class."""
        images = sum(self.class_counts.values())
        return max(self.class_counts.values()) / images if images else 1 / self.classes

    def training_learns(self, place: int) -> bool:
        """Whether the training figures of an epoch are better than knowing nothing, and no worse than at the start."""
        first, train = self.epochs[0].train, self.epochs[place].train
        if "loss" in train:
            return train["loss"] < min(self.chances) and train["loss"] <= first.get("loss", math.inf)
        return train.get("accuracy", 0.0) > self.most_frequent + LEAST_GAIN

    def training_text(self, place: int) -> str:
        """The training figures of an epoch."""
        train = self.epochs[place].train
        told = [f"a training {name} of {train[name]:.3f}" for name in ("loss", "accuracy") if name in train]
        return " and ".join(told)


def _class_checks(case: _Case) -> Iterator[Diagnosis]:
    if not case.epochs:
        return
    constant = _constant(case)
    if constant:
        yield constant
    else:
        yield from _never_predicted(case)
    yield from _exploding(case)
    yield from _at_chance(case)
    yield from _unstable(case)


def _constant(case: _Case) -> Diagnosis | None:
    answers, shown = case.answers, case.shown
    at_end = len(answers) >= STUCK_EPOCHS and all(answers[-STUCK_EPOCHS:])
    if not answers[shown] and not at_end:
        return None
    place = shown if answers[shown] else len(answers) - 1
    accuracy = case.epochs[place].val.get("accuracy", math.nan)
    evidence = (
        f"In {case.name(place)}, every validation image is taken for {answers[place]}; the accuracy, {accuracy:.4f}, "
        f"is the share of that class. All get the same class in {sum(map(bool, answers))} of {len(answers)} epochs."
    )
    if is_dead(case.epochs, case.config):
        remedy = "Lower the learning rate: the network is dead, every image also gets the same scores."
    elif case.training_learns(len(answers) - 1):
        remedy = "Training learns and validation does not: set batch_norm to frozen, and lower the learning rate."
    elif all(answers):
        remedy = (
            "Search the learning rate over a wider range, or allow more epochs: a network that starts from scratch may "
            "take a dozen to leave this state."
        )
    else:
        remedy = "Lower the learning rate: the training knew more before it ended like this."
    return Diagnosis("constant_predictor", True, evidence, remedy)


def _never_predicted(case: _Case) -> Iterator[Diagnosis]:
    blind = [name for name, recall in recalls(case.epochs[case.shown].val).items() if recall == 0.0]
    if not blind:
        return
    told = " and ".join(_none_of(case.class_counts.get(name), "validation", name) for name in blind)
    evidence = f"In {case.name(case.shown)}, {told} is recognised (recall 0.00)."
    if not _not_by_chance(case.class_counts, blind):
        yield Diagnosis(
            "class_never_predicted", False, evidence, _more_images("validation", "data.split or data.folds")
        )
        return
    balanced = case.config.sampling == "balanced" or case.config.class_weights == "balanced"
    remedy = (
        "Lower the learning rate, or give the class more images: it is balanced already."
        if balanced
        else "Set sampling or class_weights to balanced, and optimise macro_f1 or balanced_accuracy."
    )
    yield Diagnosis("class_never_predicted", True, evidence, remedy)


def _none_of(images: int | None, part: str, name: str) -> str:
    """`not one of 20 validation images of viral`; without the number where it is not known."""
    if images is None:
        return f"not one {part} image of {name}"
    return f"not one of {images:,} {part} image{'' if images == 1 else 's'} of {name}"


def _not_by_chance(class_counts: Mapping[str, int], missed: Sequence[str]) -> bool:
    """Whether one of the classes that were missed has more than a few images; those not counted count as many."""
    return any(class_counts.get(name, FEW_IMAGES) >= FEW_IMAGES for name in missed)


def _more_images(part: str, how: str) -> str:
    return (
        f"That may be chance: no figure of a class holds with fewer than {FEW_IMAGES} {part} images. Have more of them "
        f"by {how}, or collect some."
    )


def _exploding(case: _Case) -> Iterator[Diagnosis]:
    chance = math.log(case.classes)
    losses = [metrics.val.get("loss", 0.0) for metrics in case.epochs]
    places = [place for place, loss in enumerate(losses) if loss > EXPLODED * chance and case.training_learns(place)]
    if len(places) < 2 and not {len(losses) - 1, case.shown} & set(places):
        return  # a single leap that the training came back from
    worst = max(places, key=losses.__getitem__)
    evidence = (
        f"In {case.name(worst)}, the validation loss is {losses[worst]:,.1f} beside {case.training_text(worst)}; in "
        f"{len(places)} of {len(losses)} epochs it is more than {EXPLODED:.0f} times {chance:.2f}, that of knowing "
        "nothing."
    )
    remedy = (
        "Set batch_norm to frozen: the statistics that batch norms learn do not fit what they see in validation."
        if case.config.batch_norm == "train"
        else "Lower the learning rate, and let the pixels be scaled once, as the backbone expects them."
    )
    yield Diagnosis("exploding_validation_loss", True, evidence, remedy)


def _at_chance(case: _Case) -> Iterator[Diagnosis]:
    tail = case.epochs[-STUCK_EPOCHS:]
    losses = [part["loss"] for metrics in tail for part in (metrics.train, metrics.val) if "loss" in part]
    lowest = min((metrics.val["loss"] for metrics in case.epochs if "loss" in metrics.val), default=math.inf)
    near = all(any(abs(loss / chance - 1) < CHANCE_BAND for chance in case.chances) for loss in losses)
    learned = lowest < (1 - CHANCE_BAND) * min(case.chances)
    # Above chance to the end, on the images it learns from too, and no more right than by always saying the same.
    accuracy = case.epochs[case.shown].val.get("accuracy", 1.0)
    worse = (
        len(losses) == 2 * len(tail)
        and min(losses) > (1 + CHANCE_BAND) * max(case.chances)
        and accuracy < case.most_frequent + LEAST_GAIN
    )
    if len(tail) < STUCK_EPOCHS or not losses or not (near or worse) or learned:
        return
    known = [f"ln {case.classes} = {case.chances[0]:.4f} is that of knowing nothing"]
    known += [f"{entropy:.4f} that of knowing the classes' shares alone" for entropy in case.chances[1:]]
    evidence = (
        f"The losses of the last {STUCK_EPOCHS} epochs lie between {min(losses):.4f} and {max(losses):.4f}: "
        f"{', '.join(known)}."
    )
    remedy = (
        "Search the learning rate over a wider range, in both directions, and see that labels belong to their images."
    )
    yield Diagnosis("loss_at_chance", True, evidence, remedy)


def _unstable(case: _Case) -> Iterator[Diagnosis]:
    if case.best is None or case.best + 1 >= len(case.epochs):
        return
    before, after = (case.epochs[place].val.get("accuracy", math.nan) for place in (case.best, case.best + 1))
    images = sum(case.class_counts.values())
    # Three standard errors of the difference of two accuracies on as many images, as if these were other ones.
    noise = 3 * math.sqrt(2 * before * (1 - before) / images) if images else 0.0
    if before - after > max(LEAST_FALL, noise):
        evidence = f"The validation accuracy is {before:.4f} in {case.name(case.best)}, and {after:.4f} in the next."
        remedy = "Lower the learning rate, or let it fall (schedule: cosine or plateau); the best epoch is partly luck."
        yield Diagnosis("unstable_validation", False, evidence, remedy)


def _mask_checks(case: _Case) -> Iterator[Diagnosis]:
    if not case.epochs:
        return
    answers = case.answers
    ending = answers[-STUCK_EPOCHS:]
    if name := answers[case.shown] or (ending[-1] if len(ending) == STUCK_EPOCHS and all(ending) else ""):
        dice = case.epochs[case.shown].val["dice"]
        found = "not one pixel of a mask is found" if name == EMPTY_MASKS else "every pixel is taken for lung"
        evidence = (
            f"In {sum(map(bool, answers))} of {len(answers)} epochs {found} in the validation images; "
            f"{case.name(case.shown)}, has a Dice of {dice:.3f}."
        )
        remedy = "Set mask_loss to dice or both, which count overlap and not pixels, and lower the learning rate."
        yield Diagnosis(name, True, evidence, remedy)
    losses = [metrics.train["loss"] for metrics in case.epochs if "loss" in metrics.train]
    if len(losses) >= STUCK_EPOCHS and min(losses[1:]) > (1 - CHANCE_BAND) * losses[0]:
        evidence = (
            f"The training loss is {losses[0]:.4f} in the first epoch and {min(losses[1:]):.4f} at its lowest after."
        )
        remedy = "Search the learning rate over a wider range, and see that masks belong to their images."
        yield Diagnosis("loss_not_falling", True, evidence, remedy)
    yield from _exploding(case)


def _course_checks(case: _Case) -> Iterator[Diagnosis]:
    """Where the best epoch lies. That of a constant predictor is the first of equals and says nothing."""
    if case.best is None or case.answers[case.best]:
        return
    metric, allowed = case.objective.metric, case.config.epochs
    values = [metrics.val.get(metric, math.nan) for metrics in case.epochs]
    best = case.epochs[case.best].epoch
    if case.objective.better(values[case.best], NEARLY_PERFECT[case.objective.mode]):
        return
    if best > allowed - max(1, int(LATE_SHARE * allowed)) and (trend := _trend(values, case.objective)):
        earlier, later = trend
        evidence = (
            f"The best validation {metric}, {values[case.best]:.4f}, comes in epoch {best} of {allowed} allowed; "
            f"its mean over the last {_quarter(values)} is {later:.4f}, over as many before at best {earlier:.4f}."
        )
        yield Diagnosis("still_improving", False, evidence, "Allow more epochs.")
    losses = [metrics.val["loss"] for metrics in case.epochs if "loss" in metrics.val]
    # A metric of few images may be best at first by chance, while the loss shows that the model still learns.
    if best == 1 and len(values) >= STUCK_EPOCHS and (not losses or losses[0] <= min(losses)):
        told = f"validation {metric} than the first, {values[0]:.4f}"
        told += f", or a lower validation loss than its {losses[0]:.4f}" if losses and metric != "loss" else ""
        evidence = f"No epoch of {len(values)} has a better {told}."
        remedy = "Lower the learning rate, or train fewer layers: large steps undo what the first epoch learned."
        yield Diagnosis("best_epoch_first", False, evidence, remedy)


def _phase_check(case: _Case) -> Iterator[Diagnosis]:
    """Whether the model that is kept is another strategy's: the one of an earlier phase."""
    phases = case.config.freeze.split(">")
    if case.best is None or case.epochs[case.best].phase == len(phases) - 1:
        return
    best, allowed = case.epochs[case.best], case.config.epochs
    evidence = (
        f"The best epoch, {best.epoch} of {allowed} allowed, lies in phase {best.phase + 1} of {len(phases)}, "
        f"{phases[best.phase]}: {phases[-1]} has trained nothing of the model that is kept."
    )
    kept = ">".join(phases[: best.phase + 1])
    remedy = f"Read it as a trial of {kept}; a lower phase_rate or more epochs may make {phases[-1]} useful."
    yield Diagnosis("later_phase_unused", False, evidence, remedy)


def _quarter(values: Sequence[float]) -> int:
    return max(1, len(values) // 4)


def _trend(values: Sequence[float], objective: Objective) -> tuple[float, float] | None:
    """The best mean over a quarter of the epochs before the last quarter, and the mean over that one.

    None where the latter is not better by more than the standard error of the difference.
    """
    size = _quarter(values)
    before = [values[end - size : end] for end in range(size, len(values) - size + 1)]
    if not before:
        return None
    best = (max if objective.mode == "max" else min)(before, key=fmean)
    earlier, later = fmean(best), fmean(values[-size:])
    noise = math.sqrt((pvariance(best) + pvariance(values[-size:])) / size)
    return (earlier, later) if objective.better(later, earlier) and abs(later - earlier) > noise else None


def _head_check(config: TrialConfig, parameters: int, head_parameters: int) -> Iterator[Diagnosis]:
    if parameters and head_parameters / parameters > HEAD_SHARE:
        evidence = (
            f"The head holds {head_parameters:,} of {parameters:,} parameters ({head_parameters / parameters:.1%})."
        )
        remedy = (
            "Set pooling to average: flatten gives every place of the image weights of its own."
            if config.pooling == "flatten"
            else "Set fewer hidden_units."
        )
        yield Diagnosis("head_holds_parameters", False, evidence, remedy)


def examine(labels: NDArray[np.int32], scores: NDArray[np.float32], classes: Sequence[str]) -> tuple[Diagnosis, ...]:
    """What is wrong with a model, told from its predictions alone.

    Args:
        labels: (images,) true class as an index into `classes`.
        scores: (images, classes) log-probabilities.
        classes: names of the classes.
    """
    predicted, present = set(scores.argmax(axis=1).tolist()), set(labels.tolist())
    if len(present) > 1 and len(predicted) == 1:
        (only,) = predicted
        evidence = f"Every one of {len(labels)} test images is taken for {classes[only]}."
        return (Diagnosis("constant_predictor", True, evidence, REMEDY_OF_FINAL),)
    absent = [classes[label] for label in sorted(present - predicted)]
    if not absent:
        return ()
    evidence = f"Not one of {len(labels)} test images is taken for {' or '.join(absent)}."
    counts = {name: int((labels == label).sum()) for label, name in enumerate(classes)}
    grave = _not_by_chance(counts, absent)
    remedy = REMEDY_OF_FINAL if grave else _more_images("test", "data.split")
    return (Diagnosis("class_never_predicted", grave, evidence, remedy),)
