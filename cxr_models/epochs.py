"""What the trials of every task share: an optimizer, the batches of an epoch, and the weights of the best one."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import keras
import numpy as np
from numpy.typing import NDArray

from cxr_models import steps
from cxr_models.storage import written_whole
from cxr_models.trial import BEST_WEIGHTS, VALIDATION_SCORES, EpochMetrics, Objective, TrialConfig, TrialData

Arrays = Mapping[str, NDArray[np.generic]]


class DivergedError(RuntimeError):
    """The loss is no longer finite; going on cannot mend it."""


def check_finite(epoch: int, train_loss: float, val_loss: float, rate: float) -> None:
    """Raise `DivergedError` where a loss is not finite; `rate` is the highest of the epoch."""
    if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
        raise DivergedError(
            f"diverged in epoch {epoch}: training loss {train_loss}, validation loss {val_loss}; "
            f"a lower learning rate than {rate:g} usually helps"
        )


def make_optimizer(kind: str) -> keras.Optimizer:
    """An optimizer as `TrialConfig` names it; learning rate and weight decay are set when a phase begins."""
    match kind:
        case "adam":
            return keras.optimizers.Adam()
        case "adamw":
            return keras.optimizers.AdamW()
        case "rmsprop":
            return keras.optimizers.RMSprop()
        case "sgd":
            return keras.optimizers.SGD(momentum=0.9)
    raise ValueError(f"expected an optimizer of trial.CHOICES, but got {kind!r}")


def drawn_images(config: TrialConfig, data: TrialData, epoch: int) -> NDArray[np.int64]:
    """The training images in the order of an epoch, which follows from (seed, epoch) alone.

    With balanced sampling as many of each class as of all images on average: each image of a large class at most once,
    those of a small one in rounds.
    """
    generator = np.random.default_rng((config.seed, epoch))
    if config.sampling == "natural":
        return generator.permutation(data.train)
    labels, total = data.labels[data.train], len(data.train)
    classes = np.unique(labels)
    drawn = []
    for place, label in enumerate(classes):
        own, wanted = data.train[labels == label], (total + place) // len(classes)
        rounds = [generator.permutation(own) for _ in range(-(-wanted // len(own)))]
        drawn.append(np.concatenate(rounds)[:wanted])
    return generator.permutation(np.concatenate(drawn))


def steps_of_epoch(config: TrialConfig, data: TrialData) -> int:
    """How many steps see every training image once."""
    return -(-len(data.train) // config.batch_size)


def dropout_seeds(key: tuple[int, int, int], pairs: int) -> NDArray[np.uint32]:
    """(pairs, 2) numbers that follow from (seed, epoch, step) alone, never from what ran before."""
    return np.random.SeedSequence(key).generate_state(2 * pairs).astype(np.uint32).reshape(-1, 2)


@dataclass(frozen=True)
class Batches:
    """The training images of an epoch in batches of one shape; each other shape would be compiled.

    What fills up the last batch, images of the same epoch, weighs nothing in the loss; in the statistics of batch norms
    that train it counts as they do.

    Attributes:
        images: (images,) places in the data set, in the order of the epoch.
        rows: (steps, batch) the same, filled up.
        weights: (steps, batch) 1, or 0 for what fills up.
        seeds: (steps, dropout layers, 2), see `steps.Steps.train`.
    """

    images: NDArray[np.int64]
    rows: NDArray[np.int64]
    weights: NDArray[np.float32]
    seeds: NDArray[np.uint32]

    @classmethod
    def of_epoch(cls, config: TrialConfig, data: TrialData, epoch: int, dropout_layers: int) -> "Batches":
        """The batches of an epoch, 1 for the first."""
        images, batch, count = drawn_images(config, data, epoch), config.batch_size, steps_of_epoch(config, data)
        rows = images[np.arange(count * batch) % len(images)].reshape(count, batch)
        weights = np.ones(rows.shape, np.float32)
        weights.flat[len(images) :] = 0.0
        seeds = np.stack([dropout_seeds((config.seed, epoch, step), dropout_layers) for step in range(count)])
        return cls(images, rows, weights, seeds)

    def gathered(self, gather: Callable[[NDArray[np.int64]], steps.Array]) -> Iterator[tuple[slice, steps.Array]]:
        """As many steps at once as memory is set aside for: which ones, and (steps, batch, ...) of what they see."""
        count, batch = self.rows.shape
        at_once = max(1, steps.CHUNK_BYTES // (batch * gather(self.images[:1]).nbytes))
        for first in range(0, count, at_once):
            some = slice(first, first + at_once)
            inputs = gather(self.rows[some].ravel())
            yield some, inputs.reshape(-1, batch, *inputs.shape[1:])

    def unfilled(self, found: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
        """(images, ...) from what the steps gave, (steps, batch, ...), without what filled up."""
        joined = np.concatenate(list(found))
        return joined.reshape(-1, *joined.shape[2:])[: len(self.images)]


class MovedWeights:
    """Keeps weights as they were when they were last noted; `write` puts them on disk.

    Args:
        folder: for them; it is made.
        scores_only: nothing but validation scores is kept: with folds, a trial has no weights of its own.
    """

    def __init__(self, folder: Path, *, scores_only: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._scores_only = scores_only
        self._watched: dict[str, keras.Variable] = {}
        self._found: dict[str, Arrays] = {}

    @property
    def watched(self) -> Mapping[str, keras.Variable]:
        """By their paths."""
        return self._watched

    def watch(self, weights: Iterable[keras.Variable]) -> None:
        """Keep these too, by their paths."""
        self._watched |= {weight.path: weight for weight in weights}

    def note(self, scores: Arrays | None = None) -> None:
        """Note the weights as they are now, and the validation scores they gave."""
        self._found = {}
        if not self._scores_only:
            self._found[BEST_WEIGHTS] = {path: weight.numpy() for path, weight in self._watched.items()}
        if scores is not None:
            self._found[VALIDATION_SCORES] = scores

    def write(self) -> None:
        """Put on disk what is not there yet."""
        for name, arrays in self._found.items():
            with written_whole(self._folder / name) as scratch, scratch.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        self._found = {}


class Turns:
    """Lets several trainings, one for each fold, take one network and one optimizer in turn.

    A single training keeps them to itself, and nothing is copied.

    Args:
        trainings: how many.
    """

    def __init__(self, trainings: int) -> None:
        self._weights: list[dict[str, NDArray[np.generic]]] = [{} for _ in range(trainings)]
        self._states: list[list[NDArray[np.generic]]] = [[] for _ in range(trainings)]
        self._watched: Mapping[str, keras.Variable] = {}
        self._optimizer: Sequence[keras.Variable] = ()

    def enter(self, watched: Mapping[str, keras.Variable], optimizer: Sequence[keras.Variable]) -> None:
        """Begin a phase; weights that now begin to move, and the optimizer, are the same for every training.

        Args:
            watched: every weight that has moved or will move in the phase, by its path.
            optimizer: its state.
        """
        if len(self._weights) == 1:
            return
        self._watched, self._optimizer = watched, optimizer
        for weights, state in zip(self._weights, self._states, strict=True):
            weights |= {path: weight.numpy() for path, weight in watched.items() if path not in weights}
            state[:] = [variable.numpy() for variable in optimizer]

    def each(self) -> Iterator[int]:
        """The number of each training, whose turn lasts until the next number is asked for."""
        if len(self._weights) == 1:
            yield 0
            return
        for number, (weights, state) in enumerate(zip(self._weights, self._states, strict=True)):
            for path, weight in self._watched.items():
                weight.assign(weights[path])
            for variable, value in zip(self._optimizer, state, strict=True):
                variable.assign(value)
            yield number
            weights |= {path: weight.numpy() for path, weight in self._watched.items()}
            state[:] = [variable.numpy() for variable in self._optimizer]


def mean_epoch(epochs: Sequence[EpochMetrics]) -> EpochMetrics:
    """One epoch of every fold as an epoch of the trial; a single one is itself."""
    first = epochs[0]
    if len(epochs) == 1:
        return first
    seconds = [each.seconds for each in epochs]
    return replace(
        first,
        train=_means([each.train for each in epochs]),
        val=_means([each.val for each in epochs]),
        seconds=sum(seconds),
        images_per_second=len(epochs) / sum(1 / each.images_per_second for each in epochs),
        features_seconds=sum(each.features_seconds for each in epochs),
        trial_seconds=epochs[-1].trial_seconds,
        ended_ms=epochs[-1].ended_ms,
        folds=tuple(each.val for each in epochs),
    )


def held_out(data: TrialData, found: Mapping[str, Sequence[NDArray[np.generic]]]) -> Arrays:
    """What an epoch found of the validation images, as a trial keeps it.

    Args:
        data: of the trial.
        found: name -> one array (images, ...) for each fold, or one in all.

    Returns:
        Each name's arrays joined, `index`, the images' places in the data set, and with folds `fold`, the number of
        each image's fold.
    """
    parts = data.folds or (data.val,)
    joined = {name: np.concatenate(arrays) for name, arrays in found.items()}
    folds = {"fold": np.repeat(np.arange(len(parts)), [len(part) for part in parts])} if data.folds else {}
    return {"index": np.concatenate(parts), **joined, **folds}


def _means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(each[name] for each in figures) for name in figures[0]}


class BestEpoch:
    """Notes the weights of the best epoch."""

    def __init__(self, weights: MovedWeights, objective: Objective) -> None:
        self._weights = weights
        self._objective = objective
        self._value = objective.worst

    def offer(self, metrics: EpochMetrics, scores: Arrays | None = None) -> None:
        """Note the weights, and the validation scores, as they are now if no epoch was better."""
        value = metrics.val[self._objective.metric]
        if self._objective.better(value, self._value):
            self._value = value
            self._weights.note(scores)
