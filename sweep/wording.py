"""How figures and names are worded for people: in the report, its plots and the terminal."""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from cxr_models.cohort import subset_words
from cxr_models.trial import UNET, TrialConfig, TrialResult

U_NET = "U-Net"

# Metric -> as a person says it. A classification's loss is the cross-entropy, a segmentation's its `mask_loss`.
METRIC_NAMES: Mapping[str, str] = {
    "loss": "loss",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "macro_precision": "macro precision",
    "macro_specificity": "macro specificity",
    "auprc": "AUPRC",
    "kappa": "Cohen's kappa",
    "mcc": "Matthews correlation",
    "brier": "Brier score",
    "ece": "calibration error",
    "dice": "Dice",
    "iou": "IoU",
    "pixel_accuracy": "pixel accuracy",
}


def metric_name(name: str) -> str:
    """As a person says it; a name that is none of ours stays."""
    return METRIC_NAMES.get(name, name)


def heading(text: str) -> str:
    """With a capital first letter; the others stay, in `AUROC` too."""
    return text[:1].upper() + text[1:]


def figure(value: Any) -> str:
    """A metric to three decimals; a dash for what could not be computed."""
    return f"{value:.3f}" if is_number(value) else "–"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def percentage_points(value: float | None) -> str:
    """A signed difference to one decimal; a dash for none."""
    return signed(value, 1) if value is not None else "–"


def signed(value: float, digits: int) -> str:
    """With its sign and so many decimals."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # the sum has no negative zero


def in_points(metric: str) -> bool:
    """Whether a metric's differences are told in percentage points; a loss has no natural scale."""
    return metric != "loss"


def amount(metric: str, difference: float) -> str:
    """How much of a metric: `2.1 points macro F1`, `0.021 loss`."""
    value = f"{100 * difference:.1f} points" if in_points(metric) else f"{difference:.3f}"
    return f"{value} {metric_name(metric)}"


def rounded_up(number: float) -> int:
    """A number above 0 that was estimated: its two leading digits, the next higher ones."""
    unit = int(10 ** max(0, len(str(math.ceil(number))) - 2))
    return math.ceil(number / unit) * unit


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def strategy_text(config: TrialConfig) -> str:
    """`mobilenet_v2_0.35 convs:1`; a U-Net trains as a whole and has no strategy to name."""
    return U_NET if config.backbone == UNET else f"{config.backbone} {config.freeze}"


def subset_note(data: Mapping[str, Any]) -> str:
    """How many images of how many a sweep used, from `summary.json`'s `data`; "" where it used all."""
    return subset_words(data["images"], data["spared"], data["subset"]) if data.get("spared") else ""


def setting(config: TrialConfig, axis: str) -> str:
    """The value of an axis."""
    value = getattr(config, axis)
    if axis == "weights":
        return PurePath(value).name  # of a file; its folder is in spec.yaml
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def noted(result: TrialResult) -> str:
    """` (constant_predictor, loss_at_chance)`: the doctor's note beside a trial; "" where it found nothing."""
    return f" ({result.doctor_names.replace(';', ', ')})" if result.doctor else ""


def duration(seconds: float, *, tenths: bool = False) -> str:
    """`45 s`, `3 min 5 s`, `2 h 10 min`; with `tenths`, `3.2 s` below ten seconds."""
    if tenths and seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def count(number: int, noun: str) -> str:
    """`1 image`, `2,117 images`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
