"""What the trials of every task share: an optimizer, the batches of an epoch, and the weights of the best one."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import keras
import numpy as np
from numpy.typing import NDArray

from cxr_models import steps
from cxr_models.checkpoint import Arrays, Checkpoint, CheckpointFile, TrainingState, write_arrays
from cxr_models.trial import BEST_WEIGHTS, VALIDATION_SCORES, EpochMetrics, Objective, TrialConfig, TrialData


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
        self._moving: dict[str, keras.Variable] = {}
        self._found: dict[str, Arrays] = {}

    @property
    def moving(self) -> Mapping[str, keras.Variable]:
        """Of what is watched, what has moved or will, by its path."""
        return self._moving

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that keep the best epoch."""
        return (VALIDATION_SCORES,) if self._scores_only else (BEST_WEIGHTS, VALIDATION_SCORES)

    def watch(self, weights: Iterable[keras.Variable], *, moving: bool = True) -> None:
        """Keep these too, by their paths."""
        named = {weight.path: weight for weight in weights}
        self._watched |= named
        if moving:
            self._moving |= named

    def put_back(self, weights: Arrays) -> None:
        """Give weights that are watched the values of another process; with folds no network has them for long."""
        for path, value in {} if self._scores_only else weights.items():
            self._watched[path].assign(value)

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
            write_arrays(self._folder / name, arrays, durable=True)
        self._found = {}


class Turns:
    """Lets several trainings, one for each fold, take one network and one optimizer in turn.

    A single training keeps them to itself, and nothing is copied.

    Args:
        trainings: how many.
    """

    def __init__(self, trainings: int) -> None:
        self._weights: list[dict[str, NDArray[np.generic]]] = [{} for _ in range(trainings)]
        self._optimizers: list[Sequence[NDArray[np.generic]]] = []  # of an earlier process, until a phase is entered
        self._states: list[list[NDArray[np.generic]]] = [[] for _ in range(trainings)]
        self._watched: Mapping[str, keras.Variable] = {}
        self._optimizer: Sequence[keras.Variable] = ()

    def resume(self, earlier: Sequence[TrainingState]) -> None:
        """Go on from where another process left each training; a single one has got its weights already."""
        if len(self._weights) > 1:
            self._weights = [dict(one.weights) for one in earlier]
        self._optimizers = [one.optimizer for one in earlier]

    def enter(
        self, watched: Mapping[str, keras.Variable], optimizer: Sequence[keras.Variable], *, resumed: bool = False
    ) -> None:
        """Begin a phase; weights that now begin to move, and the optimizer, are the same for every training.

        Args:
            watched: every weight that has moved or will move in the phase, by its path.
            optimizer: its state.
            resumed: another process had begun the phase: the optimizers are as it left them.
        """
        self._watched, self._optimizer = watched, optimizer
        earlier, self._optimizers = self._optimizers if resumed else [], []
        if len(self._weights) > 1:
            for weights, state in zip(self._weights, self._states, strict=True):
                weights |= {path: weight.numpy() for path, weight in watched.items() if path not in weights}
                state[:] = earlier.pop(0) if earlier else [variable.numpy() for variable in optimizer]
        elif earlier:
            for variable, value in zip(optimizer, earlier[0], strict=True):
                variable.assign(value)

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

    @property
    def states(self) -> tuple[TrainingState, ...]:
        """How each training is left between two epochs."""
        if len(self._weights) == 1:
            weights = {path: weight.numpy() for path, weight in self._watched.items()}
            return (TrainingState(weights, [variable.numpy() for variable in self._optimizer]),)
        return tuple(map(TrainingState, self._weights, self._states))


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
        features_found=sum(each.features_found for each in epochs),
        features_missed=sum(each.features_missed for each in epochs),
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


class Course:
    """The epochs of a training, and on disk what another process needs to go on after the last of them.

    The weights of the best epoch are on disk too: in the checkpoint where it is the last one, else beside it. For that
    they are written before the checkpoint of an epoch that is not the best, and never before their own.

    Args:
        folder: of the trial.
        identity: of the training, see `checkpoint.identity`.
        moved: keeps the best epoch.

    Attributes:
        epochs: all so far, those of earlier processes among them.
        best: number of the best, 0 where there is none yet.
        phase: in which an earlier process stopped, -1 where there was none.
    """

    def __init__(self, folder: Path, identity: str, moved: MovedWeights) -> None:
        self._moved = moved
        self._file = CheckpointFile(folder, identity, moved.files)
        self._earlier = self._file.read()
        self.epochs = list(self._earlier.course)
        self.best = self._earlier.best
        self.phase = self.epochs[-1].phase if self.epochs else -1

    @property
    def seconds(self) -> float:
        """That the training has taken so far."""
        return self.epochs[-1].trial_seconds if self.epochs else 0.0

    def past(self, epoch: int) -> EpochMetrics | None:
        """An epoch that has been trained, or None."""
        return self.epochs[epoch - 1] if epoch <= len(self.epochs) else None

    def in_phase(self, phase: int) -> list[EpochMetrics]:
        """The epochs of a phase."""
        return [metrics for metrics in self.epochs if metrics.phase == phase]

    def put_back(self) -> Sequence[TrainingState]:
        """Give the weights that are watched the values with which an earlier process stopped; its trainings."""
        earlier, self._earlier = self._earlier, Checkpoint()
        self._moved.put_back(earlier.trainings[0].weights)
        if earlier.best == len(earlier.course):
            self._moved.note(earlier.scores)
        return earlier.trainings

    def is_best(self, metrics: EpochMetrics, objective: Objective) -> bool:
        """Whether no epoch so far was as good."""
        best = self.epochs[self.best - 1].val[objective.metric] if self.best else objective.worst
        return objective.better(metrics.val[objective.metric], best)

    def add(
        self, metrics: EpochMetrics, trainings: tuple[TrainingState, ...], scores: Arrays | None, *, best: bool
    ) -> None:
        """Keep an epoch that has just been trained."""
        self.epochs.append(metrics)
        if best:
            self.best = metrics.epoch
            self._moved.note(scores)
        else:
            self._moved.write()
        self._file.write(Checkpoint(tuple(self.epochs), self.best, trainings, scores if best else None))

    def forget(self) -> None:
        """Leave nothing on disk."""
        self._file.forget()


def end_at_next(training: Generator[EpochMetrics, bool, None]) -> None:
    """End a training after the next epoch that it yields."""
    next(training)
    with suppress(StopIteration):
        training.send(False)
