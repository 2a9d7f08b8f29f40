"""What a sweep's task has to do with its space: which backbones, axes and metrics belong to it."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields

from cxr_models.backbones import BACKBONES
from cxr_models.trial import AXES, CLASSIFY, SEGMENT, TASK_METRICS, UNET, TrialConfig
from cxr_models.unet import side_problem
from sweep.document import Document, shown, unknown
from sweep.space import Axis, Constant, Space, Value

TASKS = tuple(TASK_METRICS)
BACKBONES_OF: Mapping[str, tuple[str, ...]] = {CLASSIFY: tuple(BACKBONES), SEGMENT: (UNET,)}

_UNET_AXES = ("unet_filters", "unet_depth", "mask_loss")
_COMMON_AXES = (
    "backbone",
    "weights",
    "image_side",
    "freeze",
    "dropout",
    "optimizer",
    "learning_rate",
    "schedule",
    "warmup",
    "weight_decay",
    "batch_size",
    "epochs",
    "patience",
    "augmentation",
    "augmentation_strength",
    "augmented_views",
    "horizontal_flip",
    "seed",
)
# What a trial of the task reads; any other axis would only make trials that are all alike.
AXES_OF: Mapping[str, tuple[str, ...]] = {
    CLASSIFY: tuple(name for name in AXES if name not in _UNET_AXES),
    SEGMENT: (*_COMMON_AXES, *_UNET_AXES),
}

# Of these what a person is told of a trial: a U-Net has one backbone, random weights, and trains as a whole.
SHOWN_AXES_OF: Mapping[str, tuple[str, ...]] = {
    CLASSIFY: AXES_OF[CLASSIFY],
    SEGMENT: tuple(name for name in AXES_OF[SEGMENT] if name not in ("backbone", "weights", "freeze")),
}

# What an axis is where the file does not name it, for tasks in which that is not `TrialConfig`'s default.
DEFAULTS_OF: Mapping[str, Mapping[str, Value]] = {CLASSIFY: {}, SEGMENT: {"freeze": "none"}}
_DEFAULTS = {field.name: field.default for field in fields(TrialConfig) if field.default is not MISSING}


def read_task(document: Document) -> str:
    """The task of a file; the default where it names none or an unknown one, which is noted."""
    task = document.values.get("task", CLASSIFY)
    if task not in TASKS:
        document.add(("task",), unknown(task, TASKS))
        return CLASSIFY
    return str(task)


def check_objective(document: Document, metric: str, task: str, space: Space) -> None:
    """Note an objective that trials of the task do not report, or that cannot compare them."""
    known = TASK_METRICS[task]
    if metric not in known:
        others = [other for other, metrics in TASK_METRICS.items() if metric in metrics]
        belongs = f"{metric} belongs to task: {others[0]}; " if others else ""
        document.add(("objective", "metric"), f"{belongs}{unknown(metric, known)} (for task: {task})")
    losses = space.axes.get("mask_loss")
    if metric == "loss" and losses and len({value for domain in losses.domains for value in domain}) > 1:
        text = "loss cannot compare trials that differ in mask_loss; use dice, or one mask_loss"
        document.add(("objective", "metric"), text)


def check_space(document: Document, task: str, space: Space) -> None:
    """Note what in a space does not belong to the task, and what a U-Net cannot do."""
    for axis in space.axes.values():
        if text := _axis_problem(axis, task):
            document.add(("space", axis.name), text)
    if task == SEGMENT and {"image_side", "unet_depth"} <= space.axes.keys():
        for text in dict.fromkeys(_side_problems(space)):
            document.add(("space", "image_side"), text)


def _axis_problem(axis: Axis, task: str) -> str:
    if axis.name == "backbone":
        known = BACKBONES_OF[task]
        strange = [value for domain in axis.domains for value in domain if value not in known]
        return f"{unknown(strange[0], known)} (for task: {task})" if strange else ""
    if axis.name not in AXES_OF[task]:
        settled = Constant(_DEFAULTS[axis.name])  # spec.yaml, as resolved, writes these out
        return "" if set(axis.domains) == {settled} else f"means nothing for task: {task}; leave it out"
    if task == SEGMENT and axis.name in ("freeze", "weights") and set(axis.domains) != {Constant("none")}:
        found = ", ".join(dict.fromkeys(map(str, axis.domains)))
        return f"a U-Net starts from random weights and trains as a whole: expected none, got {shown(found)}"
    return ""


def _side_problems(space: Space) -> Iterator[str]:
    try:
        pairs = sorted(space.combinations("image_side", "unet_depth"), key=str)
    except ValueError:
        return  # a range without step, of which the backbone's own check tells
    for side, depth in pairs:
        if isinstance(side, int) and isinstance(depth, int) and (text := side_problem(side, depth)):
            yield text
