"""The vocabulary every part shares: what a trial is told, what it reports, how it ends."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cxr_models.features import FeatureBudget

TRAIN, VAL, TEST = SPLITS = ("train", "val", "test")

# What a trial leaves in its folder: the weights of its best epoch that had moved, by their paths in the network, and
# its validation scores there (arrays `index`, `labels` and `scores`, which are log-probabilities; of a segmentation
# `index` and `counts`, see `mask_metrics.COUNTS`).
BEST_WEIGHTS = "best.npz"
VALIDATION_SCORES = "validation.npz"
CHECKPOINT = "checkpoint.npz"  # and what it needs to go on after its last epoch, see `checkpoint.py`
PIXELS = "pixels"  # what `EpochMetrics.source` begins with where an epoch ran the whole network

# Metric -> which way is better. Every epoch reports each of them for the training and the validation images.
METRICS: Mapping[str, str] = {
    "loss": "min",
    "accuracy": "max",
    "macro_f1": "max",
    "balanced_accuracy": "max",
    "auroc": "max",
}

# The same for a segmentation, averaged over images; see `mask_metrics.py`.
MASK_METRICS: Mapping[str, str] = {"loss": "min", "dice": "max", "iou": "max", "pixel_accuracy": "max"}

CLASSIFY, SEGMENT = "classify", "segment"
TASK_METRICS: Mapping[str, Mapping[str, str]] = {CLASSIFY: METRICS, SEGMENT: MASK_METRICS}

UNET = "unet"  # the one backbone of `segment`, see `unet.py`

# `TrialConfig.lung_mask` beside these is the path of a segmentation sweep's run folder, or of its model.
NO_MASK, DATASET_MASK = "none", "dataset"

# Chosen by name in a search space; `TrialConfig` accepts nothing else.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "batch_norm": ("frozen", "affine", "train"),
    "pooling": ("average", "max", "flatten"),
    "output": ("softmax", "sigmoid"),
    "optimizer": ("adam", "adamw", "rmsprop", "sgd"),
    "schedule": ("constant", "cosine", "plateau", "exponential"),
    "loss": ("cross_entropy", "focal"),
    "class_weights": ("none", "balanced"),
    "sampling": ("natural", "balanced"),
    "augmentation": ("none", "light", "strong", "wide", "geometry", "exposure"),
    "horizontal_flip": ("never", "random"),
    "mask_loss": ("cross_entropy", "dice", "both"),
}
# Of these a trial may name one for each phase of its freeze strategy, joined by `>` as the phases are; of `phase_rate`
# one for each phase but the first.
PHASED = ("optimizer", "schedule")
PHASE_RATE = "phase_rate"


class Outcome(StrEnum):
    """How a trial ended."""

    COMPLETED = "completed"  # ran its epochs, or stopped by its own patience
    STOPPED_EARLY = "stopped_early"  # ended by the scheduler, or as hopeless; keeps its metrics and may rank
    FAILED = "failed"  # carries the error, never ranks


_LEAST = {"image_side": 1, "taps": 1, "batch_size": 1, "epochs": 1, "patience": 0, "augmented_views": 0, "seed": 0}
_LEAST |= {"unet_filters": 1, "unet_depth": 1}


@dataclass(frozen=True)
class TrialConfig:
    """One point of a search space. Every field is an axis.

    Attributes:
        backbone: a name in `backbones.BACKBONES`, or `unet` for a segmentation.
        weights: `imagenet`, `bundled`, `none`, a file, a URL with its checksum, or the folder of an earlier run.
        image_side: height and width of the square network input, in pixels.
        freeze: a freeze strategy, see `freezing.py`; phases are joined by `>`.
        batch_norm: what batch norms in the trainable part do; in the frozen part they are in inference mode always.
        pooling: how the backbone's last feature map becomes a vector.
        taps: how many depths of the backbone feed the head: 1 is the last layer alone; more are pooled, scaled and
            joined (Head2Toe: Evci et al., ICML 2022, without its selection of features).
        hidden_units: units of the head's hidden relu layers, first to last.
        dropout: rate after each hidden layer, or after the pooling where there is none, in [0, 1).
        output: `softmax` over the classes, or one `sigmoid` unit for two classes.
        optimizer: Keras name of the optimizer; `sgd` has momentum 0.9. `adam>rmsprop` names one for each phase.
        learning_rate: of the first phase.
        phase_rate: each later phase's learning rate over that of the phase before; `0.1>0.5` names one for each phase
            after the first.
        probe_share: of the epochs that the first of several phases gets; the later ones share the rest evenly.
        schedule: how the learning rate goes on within a phase, see `schedules.py`. `constant>plateau` names one for
            each phase.
        warmup: share of a phase's steps in which its learning rate rises from 0, in [0, 1).
        layer_decay: factor on the learning rate from one stage of the backbone to the one before it, the head being
            behind the last; 1 gives every layer the same rate.
        weight_decay: decoupled (AdamW's) for every optimizer, 0 for none.
        batch_size: images per step.
        epochs: the most epochs over all phases.
        patience: epochs without a lower validation loss before a phase ends by itself; 0 never. The next phase goes on
            from the last weights; those of the trial's best epoch are kept at its end.
        loss: `focal` weighs an image by (1 - probability of its class) ** focal_gamma (Lin et al., ICCV 2017).
        focal_gamma: at least 0; means nothing for another loss.
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1).
        class_weights: `balanced` weighs each class inversely to its share of the training images.
        sampling: `balanced` draws as many images of each class in every epoch, those of small classes repeatedly.
        augmentation: how far the training images are changed at random, see `augmentation.AUGMENTATIONS`.
        augmentation_strength: factor on every bound of the augmentation, above 0.
        horizontal_flip: `random` mirrors every other view; a mirrored chest has its heart on the wrong side, so only
            where a study did it. Without augmentation it means nothing.
        augmented_views: of each image. 0 gives every epoch a view of its own; N reuses N views in turn, which is
            cheaper to keep and not the same training. Without augmentation it means nothing.
        lung_mask: whose mask a classifier's pixels are left inside, 0 outside: `none`, `dataset` for the masks that
            come with the images, or the run folder (or `best/model.keras`) of an earlier segmentation sweep.
        unet_filters: of the U-Net's first block; each block further down has twice as many.
        unet_depth: how often the U-Net halves its image.
        mask_loss: a segmentation's loss: `cross_entropy` of the pixels, soft `dice`, or the sum of `both`.
        seed: of initial weights, image order, dropout and augmentation.
    """

    backbone: str
    weights: str = "none"
    image_side: int = 96
    freeze: str = "all"
    batch_norm: str = "frozen"
    pooling: str = "average"
    taps: int = 1
    hidden_units: tuple[int, ...] = ()
    dropout: float = 0.0
    output: str = "softmax"
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    phase_rate: float | str = 0.1
    probe_share: float = 0.3
    schedule: str = "constant"
    warmup: float = 0.0
    layer_decay: float = 1.0
    weight_decay: float = 0.0
    batch_size: int = 32
    epochs: int = 10
    patience: int = 0
    loss: str = "cross_entropy"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    class_weights: str = "none"
    sampling: str = "natural"
    augmentation: str = "none"
    augmentation_strength: float = 1.0
    augmented_views: int = 0
    horizontal_flip: str = "never"
    lung_mask: str = NO_MASK
    unet_filters: int = 12
    unet_depth: int = 4
    mask_loss: str = "cross_entropy"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            given = getattr(self, name)
            if any(part not in allowed for part in (given.split(">") if name in PHASED else (given,))):
                each = ", or one for each phase joined by '>'" if name in PHASED else ""
                raise ValueError(f"{name} must be one of {', '.join(allowed)}{each}, but got {given!r}")
        for name, low in _LEAST.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, but got {getattr(self, name)}")
        for name in ("dropout", "warmup", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), but got {getattr(self, name)}")
        if not all(0.0 < ratio < math.inf for ratio in self._phase_ratios()):
            each = "or one for each phase after the first joined by '>'"
            raise ValueError(f"phase_rate must be above 0 and finite, {each}, but got {self.phase_rate!r}")
        for name in ("learning_rate", "augmentation_strength"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, but got {getattr(self, name)}")
        for name in ("weight_decay", "focal_gamma"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, but got {getattr(self, name)}")
        if not 0.0 < self.probe_share < 1.0:
            raise ValueError(f"probe_share must lie between 0 and 1, but got {self.probe_share}")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay must lie above 0 and be at most 1, but got {self.layer_decay}")
        if self.taps > 1 and self.pooling == "flatten":
            raise ValueError(f"taps above 1 need pooling average or max, but got taps {self.taps} with flatten")
        if not self.lung_mask:
            raise ValueError("lung_mask must be none, dataset or the run folder of a segmentation sweep, but got ''")
        if any(units < 1 for units in self.hidden_units):
            raise ValueError(f"hidden_units must each be at least 1, but got {list(self.hidden_units)}")

    def to_json(self) -> dict[str, Any]:
        """Values that JSON has."""
        return {**asdict(self), "hidden_units": list(self.hidden_units)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(**{**values, "hidden_units": tuple(values.get("hidden_units", ()))})

    def in_phase(self, name: str, phase: int) -> str:
        """What a field of `PHASED` says of a phase, 0 for the first."""
        parts = str(getattr(self, name)).split(">")
        return parts[0] if len(parts) == 1 else parts[phase]

    def rate_in_phase(self, phase: int) -> float:
        """The learning rate a phase begins with, 0 for the first."""
        ratios = self._phase_ratios()
        return self.learning_rate * (ratios[0] ** phase if len(ratios) == 1 else math.prod(ratios[:phase]))

    def _phase_ratios(self) -> list[float]:
        """One for all later phases or one for each; NaN for what is no number."""
        try:
            return [float(part) for part in str(self.phase_rate).split(">")]
        except ValueError:
            return [math.nan]

    @property
    def views(self) -> tuple[str, float, str, int]:
        """What the views of its training images follow from; trials that agree in it see the same ones."""
        if self.augmentation == "none":
            return "none", 1.0, "never", 0
        return self.augmentation, self.augmentation_strength, self.horizontal_flip, self.seed

    def augmentation_arguments(self, view: int) -> dict[str, Any]:
        """What `augmentation.augmented` is told besides the images; `view` is 1 for the first."""
        return {
            "kind": self.augmentation,
            "seed": self.seed,
            "view": view,
            "strength": self.augmentation_strength,
            "flip": self.horizontal_flip == "random",
        }

    @property
    def digest(self) -> str:
        """Eight hex digits that name this configuration and no other; an axis that is added later changes none."""
        given = {name: value for name, value in self.to_json().items() if value != _DEFAULTS.get(name)}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]


AXES: tuple[str, ...] = tuple(field.name for field in fields(TrialConfig))
_DEFAULTS = {field.name: field.default for field in fields(TrialConfig) if field.default not in (MISSING, ())}


@dataclass(frozen=True)
class Suggestion:
    """A trial to run.

    Attributes:
        number: 0 for the first of a sweep.
        trial_id: the configuration's digest, with `-2`, `-3`, ... where it is suggested again.
    """

    number: int
    trial_id: str
    config: TrialConfig


@dataclass(frozen=True)
class Objective:
    """The validation metric a sweep optimises, and which way.

    Attributes:
        metric: a name in `metrics`.
        mode: `max` or `min`.
        task: a name in `TASK_METRICS`.
    """

    metric: str
    mode: str
    task: str = CLASSIFY

    @property
    def metrics(self) -> Mapping[str, str]:
        """What every epoch of the task reports, and which way is better."""
        return TASK_METRICS[self.task]

    def better(self, value: float, than: float) -> bool:
        """Whether `value` beats `than`; NaN beats nothing and everything beats NaN."""
        if math.isnan(value) or math.isnan(than):
            return not math.isnan(value)
        return value > than if self.mode == "max" else value < than

    @property
    def worst(self) -> float:
        return -math.inf if self.mode == "max" else math.inf


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch of one trial measured.

    Attributes:
        epoch: 1 for the first, counted over all phases.
        phase: index of the phase the epoch belongs to.
        train: metric -> value over the batches as they were trained on (dropout active).
        val: metric -> value over the validation images at the end of the epoch. The names are those of `METRICS`
            and `recall/<class>`; of a segmentation, those of `MASK_METRICS`.
        seconds: of training and validation in this epoch, without checkpoints; a phase's first epoch compiles too.
        images_per_second: training images per second of the epoch's training.
        device: what the trial's process sees: `CPU` or `GPU <ids>`.
        source: what the epoch was given of each image: the name of the cut whose features were stored, or `PIXELS`,
            followed by a colon and the reason where features could not be kept.
        features_seconds: that were spent computing features for this epoch, or waiting for them.
        features_found, features_missed: how often this epoch asked for stored features that were there, and for some
            that had to be computed, by this trial or by another that it waited for.
        trial_seconds: from the trial's start in its process to the end of this epoch; where a process goes on from a
            checkpoint, those up to the checkpoint are counted in.
        folds: `val` of each fold, of which `val` itself is the mean, as `train` is; empty without folds.
        ended_ms: when the epoch ended, in milliseconds since 1970; 0 where it was not written down.
    """

    trial_id: str
    epoch: int
    phase: int
    learning_rate: float
    train: Mapping[str, float]
    val: Mapping[str, float]
    seconds: float
    images_per_second: float
    device: str = "CPU"
    source: str = PIXELS
    features_seconds: float = 0.0
    trial_seconds: float = 0.0
    folds: tuple[Mapping[str, float], ...] = ()
    ended_ms: int = 0
    features_found: int = 0
    features_missed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Values that JSON has."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(**{**values, "folds": tuple(values.get("folds", ()))})


def best_epoch(epochs: Sequence[EpochMetrics], objective: Objective) -> EpochMetrics | None:
    """The first epoch with the best objective, as training keeps its weights; None if there is none."""
    best, best_value = None, objective.worst
    for metrics in epochs:
        value = metrics.val[objective.metric]
        if objective.better(value, best_value):
            best, best_value = metrics, value
    return best


@dataclass(frozen=True)
class Diagnosis:
    """Something that is wrong with a training, see `doctor.py`.

    Attributes:
        name: snake_case, the same in every version.
        grave: the model, or the figures it ranks with, cannot be trusted; else the trial could have gone better.
        evidence: a sentence with the figures.
        remedy: a sentence.
    """

    name: str
    grave: bool
    evidence: str
    remedy: str


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended, and its validation metrics at its best epoch.

    Attributes:
        best_epoch: epoch with the best objective value, 0 if no epoch finished.
        val: metrics of that epoch, empty if no epoch finished; with folds the means over them.
        by_fold: the objective of that epoch in each fold; empty without folds.
        trainable_parameters, frozen_parameters: in the phase of the best epoch, else in the last; batch norms' moving
            statistics are frozen always.
        train_seconds: from the trial's start in its process to its last epoch: building and compiling included, and the
            features that it computed or waited for, which later trials then find.
        error: for a failed trial, one line with the cause; the traceback is in `traceback`.
        doctor: what is wrong with its training, grave diagnoses first.
        ended_ms: when it ended, milliseconds since 1970.
    """

    trial_id: str
    config: TrialConfig
    outcome: Outcome
    epochs: int = 0
    best_epoch: int = 0
    val: Mapping[str, float] = field(default_factory=dict)
    trainable_parameters: int = 0
    frozen_parameters: int = 0
    train_seconds: float = 0.0
    device: str = ""
    error: str = ""
    traceback: str = ""
    doctor: tuple[Diagnosis, ...] = ()
    by_fold: tuple[float, ...] = ()
    ended_ms: int = 0

    def __post_init__(self) -> None:
        if (self.outcome is Outcome.FAILED) != bool(self.error):
            raise ValueError(
                f"{self.trial_id}: outcome {self.outcome} with error={self.error!r}; "
                "exactly the failed trials carry an error"
            )

    def to_json(self) -> dict[str, Any]:
        """Values that JSON has."""
        return {**asdict(self), "config": self.config.to_json(), "outcome": str(self.outcome)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        config, outcome = TrialConfig.from_json(values["config"]), Outcome(values["outcome"])
        doctor = tuple(Diagnosis(**each) for each in values.get("doctor", ()))
        by_fold = tuple(values.get("by_fold", ()))
        return cls(**{**values, "config": config, "outcome": outcome, "doctor": doctor, "by_fold": by_fold})

    @property
    def doctor_names(self) -> str:
        """The names of its diagnoses, `;`-separated."""
        return ";".join(diagnosis.name for diagnosis in self.doctor)


@dataclass(frozen=True)
class TrialData:
    """What a trial may read. Neither indices nor labels of the test images are in it; their pixels and masks lie in the
    same arrays as all others, which a trial reads at `train` and `val` alone.

    Attributes:
        classes: class names, sorted; a label is an index into them.
        labels: (images,) label of every image of the data set, -1 for images of the test set.
        train, val: indices into the pixel array and `labels`. With folds both are all images that are dealt into them.
        folds: indices of each fold; a trial is trained once for each, on all other images, and validated on it. Empty
            where there is one validation part.
        channels: 1 where every image of the data set is grey, else 3.
        pixels: image side -> `.npy` file, uint8 (images, side, side, channels).
        weights: (backbone, weights, image_side) of a `TrialConfig` -> file; what starts from scratch is absent.
        image_ids: (images,) follow from the contents of each image; augmentation is keyed by them.
        features: which outputs of frozen layers are stored, and where; None stores none.
        masks: image side -> `.npy` file of lung masks, uint8 (images, side, side, 1), 0 or 255; for segmentations.
        masked: (lung_mask, image side) of a `TrialConfig` -> pixels as in `pixels`, 0 outside the lungs.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int32]
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    channels: int
    pixels: Mapping[int, Path]
    weights: Mapping[tuple[str, str, int], Path] = field(default_factory=dict)
    image_ids: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    features: FeatureBudget | None = None
    masks: Mapping[int, Path] = field(default_factory=dict)
    masked: Mapping[tuple[str, int], Path] = field(default_factory=dict)
    folds: tuple[NDArray[np.int64], ...] = ()

    def together(self) -> Self:
        """The same images with those of validation among the training images."""
        return replace(self, train=np.union1d(self.train, self.val), val=np.empty(0, np.int64), folds=())

    @property
    def in_turn(self) -> tuple[Self, ...]:
        """The data of each training that makes up a trial: one for every fold, or one in all."""
        return tuple(
            replace(self, train=np.setdiff1d(self.train, fold), val=fold, folds=()) for fold in self.folds
        ) or (self,)

    @property
    def val_counts(self) -> dict[str, int]:
        """Class -> validation images, of the classes that have any."""
        counts = np.bincount(self.labels[self.val], minlength=len(self.classes))
        return {name: int(count) for name, count in zip(self.classes, counts, strict=True) if count}

    def pictures(self, config: TrialConfig) -> Path:
        """The pixel array that a configuration is trained on."""
        if config.lung_mask == NO_MASK:
            return self.pixels[config.image_side]
        return self.masked[config.lung_mask, config.image_side]
