"""Whether a training that gives every validation image the same answer will ever give another one."""

import math
from collections.abc import Mapping, Sequence

from cxr_models.freezing import parse_strategy
from cxr_models.trial import EpochMetrics, TrialConfig

EMPTY_MASKS, FULL_MASKS = "empty_masks", "full_masks"
RECALL = "recall/"
EQUAL = 1e-6  # two means of the same figures differ by less

DEAD_EPOCHS = 3
PLATEAU_SHARE, PLATEAU_EPOCHS = 0.5, 15
PROGRESS = 0.005


def is_hopeless(epochs: Sequence[EpochMetrics], config: TrialConfig) -> bool:
    """Whether the epochs that are left to a training would be wasted.

    All validation images have got the same answer, see `same_answer`, in the last phase (it may undo what an earlier
    one did) and after its warm-up:

    - for 3 epochs in which they also got the same scores, an AUROC of exactly one half. Such a network is dead: behind
      the layer that passes nothing on, only what all images share still moves. Not where batch norms train: until their
      statistics have settled, validation sees nothing of what training learns;
    - else for half the phase's epochs, at least 15, in the later half of which neither loss came 0.5 % below its
      minimum in the earlier half. A constant answer alone proves little: the six small CNNs of
      `search_spaces/freeze.yaml --set backbone=vanilla_cnn --set search.halving=none --trials 6 --max-epochs 40` named
      one class for 11 to 22 epochs, then learned. Had they been allowed 16, 20, 24, 32 or 40 epochs, this rule would
      have ended none of the 30; one of 5 epochs, or a quarter, 27, of which 19 were 5 points above the most frequent
      class by their last epoch.

    Args:
        epochs: so far, in order.
        config: of the training.
    """
    strategy = parse_strategy(config.freeze)
    last = len(strategy.phases) - 1
    allowed = strategy.epochs(config.epochs, config.probe_share)[last]
    steady = [metrics for metrics in epochs if metrics.phase == last][math.ceil(config.warmup * allowed) :]
    if is_dead(steady, config):
        return True
    wanted = max(PLATEAU_EPOCHS, math.ceil(PLATEAU_SHARE * allowed))
    plateau = steady[-wanted:]
    return len(plateau) == wanted and all(map(same_answer, plateau)) and not _progresses(plateau)


def is_dead(epochs: Sequence[EpochMetrics], config: TrialConfig) -> bool:
    """Whether all validation images got the same answer and scores in the last 3 epochs, see `is_hopeless`."""
    last = epochs[-DEAD_EPOCHS:]
    same = [bool(same_answer(each)) and abs(each.val.get("auroc", math.nan) - 0.5) < EQUAL for each in last]
    return config.batch_norm != "train" and len(last) == DEAD_EPOCHS and all(same)


def _progresses(epochs: Sequence[EpochMetrics]) -> bool:
    """Whether the training or the validation loss fell from the earlier to the later half."""
    half = len(epochs) // 2
    for losses in ([metrics.train["loss"] for metrics in epochs], [metrics.val["loss"] for metrics in epochs]):
        if min(losses[half:]) < (1.0 - PROGRESS) * min(losses[:half]):
            return True
    return False


def same_answer(metrics: EpochMetrics) -> str:
    """What every validation image was taken for in an epoch: a class, `EMPTY_MASKS` or `FULL_MASKS`.

    "" where images got different answers, or the metrics do not tell. With folds, each training has an answer of its
    own: they may differ, and are then joined by `or`.
    """
    answers = {_answer(val) for val in metrics.folds or (metrics.val,)}
    return "" if "" in answers else " or ".join(sorted(answers))


def _answer(val: Mapping[str, float]) -> str:
    """What every image was taken for in one validation."""
    if "dice" in val and "iou" in val:
        return _same_mask(val["dice"], val["iou"], val.get("pixel_accuracy", math.nan))
    found = recalls(val)
    if len(found) < 2 or sorted(found.values())[-2:] != [0.0, 1.0]:
        return ""
    if len(found) > 2 and "accuracy" in val and "macro_f1" in val:
        # One class is right and the others are all wrong, but they may have been taken for each other.
        expected = 2 * val["accuracy"] / (1 + val["accuracy"]) / len(found)
        if abs(val["macro_f1"] - expected) > EQUAL:
            return ""
    return max(found, key=found.__getitem__)


def _same_mask(dice: float, iou: float, pixel_accuracy: float) -> str:
    """The means over images tell, for each figure of an image is at most the other one it is compared with.

    IoU is below Dice unless the masks agree or have no pixel in common, and below the pixel accuracy unless they agree
    or cover the image together.
    """
    if abs(dice - iou) < EQUAL and dice < 1.0:
        return EMPTY_MASKS
    return FULL_MASKS if abs(iou - pixel_accuracy) < EQUAL and iou < 1.0 else ""


def recalls(val: Mapping[str, float]) -> dict[str, float]:
    """Class -> recall, of the classes that have images."""
    return {
        name.removeprefix(RECALL): value
        for name, value in val.items()
        if name.startswith(RECALL) and not math.isnan(value)
    }
