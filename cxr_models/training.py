"""One trial: put in its first weights, train by phases, validate every epoch, keep the best weights."""

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray

from cxr_models import steps
from cxr_models.backbones import BACKBONES
from cxr_models.checkpoint import Arrays, TrainingState, identity
from cxr_models.cuts import Cut, choose_cut
from cxr_models.epochs import (
    Batches,
    Course,
    MovedWeights,
    Turns,
    check_finite,
    end_at_next,
    held_out,
    make_optimizer,
    mean_epoch,
    steps_of_epoch,
)
from cxr_models.features import NoRoomError
from cxr_models.freezing import Phase, parse_strategy, stage_depths
from cxr_models.hopeless import is_hopeless
from cxr_models.inputs import Asked, Gather, Inputs
from cxr_models.metrics import evaluate
from cxr_models.network import Network, build_network, export_model, head_parameters
from cxr_models.schedules import Patience, Schedule
from cxr_models.storage import written_whole
from cxr_models.trial import (
    BEST_WEIGHTS,
    PIXELS,
    EpochMetrics,
    Objective,
    TrialConfig,
    TrialData,
)

WARM_NETWORKS = 4  # of different shapes, in one process
WARM_STEPS = 12


def run_trial(
    trial_id: str,
    config: TrialConfig,
    data: TrialData,
    folder: Path,
    objective: Objective,
    *,
    decisions: Collection[int] = (),
    known: int = 0,
) -> Generator[EpochMetrics, bool, None]:
    """Train one configuration, yielding what each epoch measured.

    With folds, each epoch is one of every fold: the trainings take one network in turn, every metric is the mean over
    them, and schedules and patience go by that mean. The validation scores are those of every fold's own images; there
    are no weights to keep.

    The caller answers each epoch with whether to go on: `send(True)` or `send(False)`. The weights and the validation
    scores of the best epoch are in `folder` when the trial ends, and after each epoch of `decisions`. A hopeless trial
    ends by itself, see `hopeless.is_hopeless`.

    After every epoch, before it is yielded, a checkpoint is in `folder`, see `checkpoint.py`. A trial that finds its
    own goes on after the epoch it was written for; every later epoch is, bit for bit, what it would have been. One that
    finds none, or one that is torn, begins anew.

    Networks and compiled steps stay for the next trial of the same shape in this process; what a trial gives does not
    depend on what ran before it.

    Args:
        trial_id: name of the trial.
        config: what is trained.
        data: on which images; with a budget of features, frozen layers are run once for all trials.
        folder: for what the trial leaves.
        objective: which epoch is the best.
        decisions: epochs after which the caller may end the trial and still rank it.
        known: how many epochs the caller has been told of before. Only later ones are yielded, also where those up to
            it have to be trained again.

    Raises:
        DivergedError: a loss is not finite.
        OSError: the disk is full, for one.
    """
    begun = time.perf_counter()
    moved, epoch = MovedWeights(folder, scores_only=bool(data.folds)), 0
    course = Course(folder, identity(trial_id, config, data, objective.metric, objective.mode), moved)
    begun -= course.seconds
    with closing(_phases(trial_id, config, data, moved, course)) as phases:
        for phase in phases:
            patience = Patience(config.patience)
            for _ in range(phase.epochs):
                epoch += 1
                metrics = course.past(epoch)
                if metrics is None:
                    metrics, scores = phase.loop.run(epoch, begun)
                    course.add(metrics, phase.loop.states, scores, best=course.is_best(metrics, objective))
                ends = patience.is_over(metrics.val["loss"]) or is_hopeless(course.epochs[:epoch], config)
                if epoch in decisions or epoch == config.epochs or ends:
                    moved.write()
                if epoch > known and not (yield metrics):
                    moved.write()
                    if course.best > epoch:  # an earlier process had gone on, and has kept what nobody wants now
                        course.forget()
                        end_at_next(run_trial(trial_id, config, data, folder, objective, known=epoch - 1))
                    return
                if ends:
                    break  # ends the phase; the trial goes on if another follows
            moved.write()  # the last phase may end before the trial's last epoch


def train_again(
    trial_id: str,
    config: TrialConfig,
    data: TrialData,
    folder: Path,
    val_losses: Sequence[float],
    *,
    known: int = 0,
) -> Generator[EpochMetrics, bool, None]:
    """Train a configuration once more, on other images or with another seed, for as long as was best before.

    Nothing is validated: schedules and the ends of phases follow from what the earlier training found, so that the
    learning rates are the same. Yields epochs without validation metrics; `send(False)` ends it.

    Args:
        trial_id: of this training.
        config: of the earlier training; the seed may differ.
        data: `train` is what it is trained on.
        folder: gets the weights as they are after the last epoch.
        val_losses: of the earlier training, up to its best epoch.
        known: as in `run_trial`; so are checkpoints.

    Raises:
        DivergedError: a loss is not finite.
        OSError: the disk is full, for one.
    """
    begun = time.perf_counter()
    moved, epoch = MovedWeights(folder), 0
    course = Course(folder, identity(trial_id, config, data, *val_losses), moved)
    begun -= course.seconds
    with closing(_phases(trial_id, config, data, moved, course, val_losses)) as phases:
        for phase in phases:
            patience = Patience(config.patience)
            for _ in range(min(phase.epochs, len(val_losses) - epoch)):
                epoch += 1
                metrics = course.past(epoch)
                if metrics is None:
                    metrics, _ = phase.loop.run(epoch, begun, val_losses[epoch - 1])
                    course.add(metrics, phase.loop.states, None, best=epoch == len(val_losses))
                if epoch == len(val_losses):
                    moved.write()
                if (epoch > known and not (yield metrics)) or epoch == len(val_losses):
                    return
                if patience.is_over(val_losses[epoch - 1]):
                    break


def _phases(
    trial_id: str,
    config: TrialConfig,
    data: TrialData,
    moved: MovedWeights,
    course: Course,
    val_losses: Sequence[float] = (),
) -> Generator["_Phase", None, None]:
    """Each phase of a trial from its first weights on, or from those of its checkpoint; what moves is watched.

    Args:
        trial_id: of the training.
        config: of it.
        data: of it.
        moved: watches.
        course: of the training; what an earlier process has trained of a phase is followed.
        val_losses: that were given to the training, where they are not its own.
    """
    shape = _shape(config, data)
    network = warm_network(*shape)
    network.reset(config.seed, config.dropout)
    strategy = parse_strategy(config.freeze)
    shares = strategy.epochs(config.epochs, config.probe_share)
    turns = Turns(len(data.folds) or 1)
    for index, (phase, epochs) in enumerate(zip(strategy.phases, shares, strict=True)):
        network.enter(phase, config.batch_norm)
        for layer in (*network.backbone.layers, *network.head):
            if layer.trainable:
                moved.watch(layer.weights)
            elif shape[-1] is None and not index:  # no file holds the first weights
                moved.watch(layer.weights, moving=False)
        if index == course.phase:
            turns.resume(course.put_back())
        past = [val_losses[one.epoch - 1] if val_losses else one.val["loss"] for one in course.in_phase(index)]
        entered = strategy.phases[: index + 1]
        begin = partial(_EpochLoop, trial_id, config, data, network, entered, epochs, turns, moved.moving, past)
        with closing(_Phase(epochs, begin)) as begun:
            yield begun


class _Phase:
    """A phase of a trial, entered. Its loop is set up when it is first asked for: no epoch may be left to train.

    Attributes:
        epochs: the most it gets.
    """

    def __init__(self, epochs: int, begin: Callable[[], "_EpochLoop"]) -> None:
        self.epochs = epochs
        self._begin = begin

    @cached_property
    def loop(self) -> "_EpochLoop":
        return self._begin()

    def close(self) -> None:
        if "loop" in vars(self):
            self.loop.close()


def class_weights(config: TrialConfig, labels: NDArray[np.int32], classes: int) -> NDArray[np.float32]:
    """(classes,) weight of each class in the loss; the mean over the training images is 1."""
    if config.class_weights == "none":
        return np.ones(classes, np.float32)
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * counts)).astype(np.float32)


Shape = tuple[TrialConfig, int, int, Path | None]


def _shape(config: TrialConfig, data: TrialData) -> Shape:
    """What trials must have in common to be trained by the same network, one after the other."""
    shaping = TrialConfig(
        config.backbone,
        weights=config.weights,
        image_side=config.image_side,
        batch_norm="affine" if config.batch_norm == "affine" else "train",
        pooling=config.pooling,
        taps=config.taps,
        hidden_units=config.hidden_units,
        output=config.output,
    )
    weights = data.weights.get((config.backbone, config.weights, config.image_side))
    return shaping, len(data.classes), data.channels, weights


@lru_cache(maxsize=WARM_NETWORKS)
def warm_network(shaping: TrialConfig, classes: int, channels: int, weights: Path | None) -> Network:
    """The network of a shape, built once in a process."""
    return build_network(shaping, classes=classes, channels=channels, weights=weights)


@lru_cache(maxsize=WARM_NETWORKS)
def _other_network(shaping: TrialConfig, classes: int, channels: int, weights: Path | None) -> Network:
    """A second network of the shape, which is never trained: it runs frozen layers while the first one trains."""
    return build_network(shaping, classes=classes, channels=channels, weights=weights)


@lru_cache(maxsize=WARM_STEPS)
def _warm_steps(
    network: Network,
    phase: Phase,
    batch_norm: str,
    cut: Cut | None,
    optimizer: str,
    *,
    reweighted: bool,
    layerwise: bool,
) -> steps.Steps:
    """The compiled steps of a network in a phase, which is entered; made once in a process."""
    return steps.Steps(network, cut, make_optimizer(optimizer), reweighted=reweighted, layerwise=layerwise)


@dataclass(frozen=True)
class _Training:
    """What is its own of each of the trainings that make up a trial.

    Attributes:
        data: which images it trains and validates on.
        weights: (classes,) of each class in the loss.
    """

    data: TrialData
    weights: NDArray[np.float32]
    schedule: Schedule


class _EpochLoop:
    """Runs the epochs of one phase of a trial.

    Args:
        trial_id: of the trial.
        config: of the trial.
        data: of the trial.
        network: with the phase entered.
        phases: this one and those before it.
        epochs: the most the phase gets.
        turns: of its trainings.
        moving: every weight that has moved or will move in the phase, by its path.
        past: the validation losses of the phase's epochs that another process has trained.
    """

    def __init__(
        self,
        trial_id: str,
        config: TrialConfig,
        data: TrialData,
        network: Network,
        phases: Sequence[Phase],
        epochs: int,
        turns: Turns,
        moving: Mapping[str, keras.Variable],
        past: Sequence[float],
    ) -> None:
        self._trial_id = trial_id
        self._config = config
        self._data = data
        self._turns = turns
        self._phase = len(phases) - 1
        self._network = network
        self._moved = len(phases) > 1 or bool(past)
        cut = _kept_cut(config, data, network, phases)
        start = time.perf_counter()
        try:
            self._inputs = Inputs(data, config, network, cut, untrained=self._untrained)
        except NoRoomError as error:
            cut = None
            self._inputs = Inputs(data, config, network, None)
            self._inputs.asked.seconds = time.perf_counter() - start  # in vain, but spent
            self._inputs.source = f"{PIXELS}: {error}"
        try:
            focal = config.loss == "focal"
            self._steps = _warm_steps(
                network,
                phases[-1],
                config.batch_norm,
                cut,
                config.in_phase("optimizer", self._phase),
                reweighted=focal or config.label_smoothing > 0.0,
                layerwise=config.layer_decay < 1.0,
            )
            scales = _rate_scales(network, self._steps.trained, config.layer_decay)
            gamma = config.focal_gamma if focal else 0.0
            self._steps.begin(steps.Settings(config.weight_decay, gamma, config.label_smoothing, scales))
            turns.enter(moving, self._steps.optimizer_state, resumed=bool(past))
        except BaseException:
            self._inputs.close()
            raise
        self._device = steps.device()
        self._trainings = [self._training(own, epochs) for own in data.in_turn]
        for training in self._trainings:
            training.schedule.follow(past)

    @property
    def states(self) -> tuple[TrainingState, ...]:
        """How each training is left between two epochs."""
        return self._turns.states

    def _training(self, data: TrialData, epochs: int) -> _Training:
        config = self._config
        schedule = Schedule(
            config.in_phase("schedule", self._phase),
            config.rate_in_phase(self._phase),
            steps=steps_of_epoch(config, data),
            epochs=epochs,
            warmup=config.warmup,
        )
        return _Training(data, class_weights(config, data.labels[data.train], len(data.classes)), schedule)

    def run(self, epoch: int, begun: float, val_loss: float | None = None) -> tuple[EpochMetrics, Arrays]:
        """One epoch of a trial that began at `begun`; its metrics and validation scores.

        The scores are arrays `index`, `labels` and `scores` (images, classes), and with folds `fold`. Where a
        validation loss is given, it is taken for the epoch's own; there are no metrics and no scores then.
        """
        gather = self._inputs.training(epoch)
        self._moved = True
        ran = [self._run(self._trainings[number], gather, epoch, begun, val_loss) for number in self._turns.each()]
        metrics = mean_epoch([each for each, _ in ran])
        for training in self._trainings:
            training.schedule.observe(metrics.val["loss"] if val_loss is None else val_loss)
        if val_loss is not None:
            return metrics, {}
        labels = [training.data.labels[training.data.val] for training in self._trainings]
        return metrics, held_out(self._data, {"labels": labels, "scores": [scores for _, scores in ran]})

    def _run(
        self, training: _Training, gather: Gather, epoch: int, begun: float, val_loss: float | None
    ) -> tuple[EpochMetrics, NDArray[np.float32]]:
        """One epoch of one training, and its validation scores (images, classes)."""
        data = training.data
        asked, self._inputs.asked = self._inputs.asked, Asked()
        start = time.perf_counter()
        rates = training.schedule.next_epoch()
        train = self._train(training, epoch, gather, rates)
        trained = time.perf_counter()
        val: dict[str, float] = {}
        scores = np.empty((0, len(data.classes)), np.float32)
        if val_loss is None:
            scores = self._steps.predict(self._inputs.validation(), data.val)
            val = evaluate(data.labels[data.val], scores, data.classes)
            val_loss = val["loss"]
        check_finite(epoch, train["loss"], val_loss, rates.max())
        metrics = EpochMetrics(
            trial_id=self._trial_id,
            epoch=epoch,
            phase=self._phase,
            learning_rate=float(rates[-1]),
            train=train,
            val=val,
            seconds=time.perf_counter() - start,
            images_per_second=len(data.train) / (trained - start),
            device=self._device,
            source=self._inputs.source,
            features_seconds=asked.seconds,
            trial_seconds=time.perf_counter() - begun,
            ended_ms=time.time_ns() // 1_000_000,
            features_found=asked.found,
            features_missed=asked.missed,
        )
        return metrics, scores

    def close(self) -> None:
        self._inputs.close()

    def _untrained(self) -> Network:
        """The trial's network as long as none of its weights has moved, then another."""
        if not self._moved:
            return self._network
        other = _other_network(*_shape(self._config, self._data))
        other.reset(self._config.seed, self._config.dropout)
        return other

    def _train(
        self, training: _Training, epoch: int, gather: Gather, rates: NDArray[np.float32]
    ) -> Mapping[str, float]:
        data = training.data
        batches = Batches.of_epoch(self._config, data, epoch, self._steps.dropout_layers)
        labels = data.labels[batches.rows]
        weights = training.weights[labels] * batches.weights
        scores = [
            self._steps.train(inputs, labels[some], weights[some], batches.seeds[some], rates[some])
            for some, inputs in batches.gathered(gather)
        ]
        return evaluate(data.labels[batches.images], batches.unfilled(scores), data.classes)


def _rate_scales(network: Network, trained: Sequence[keras.Variable], decay: float) -> list[float]:
    """For each weight that trains its factor on the learning rate: by the stage its layer lies in."""
    depths = stage_depths(BACKBONES[network.table.backbone], network.table)
    depth_of = {weight.path: depths[layer.name] for layer in network.backbone.layers for weight in layer.weights}
    return [decay ** depth_of.get(weight.path, 0) for weight in trained]


def _kept_cut(config: TrialConfig, data: TrialData, network: Network, phases: Sequence[Phase]) -> Cut | None:
    """The cut of a phase, if its features may be kept."""
    if data.features is None:
        return None
    head = head_parameters(config, network.table, len(data.classes))
    row = BACKBONES[config.backbone]
    cut = choose_cut(phases, row, network.table, pooling=config.pooling, taps=config.taps, head_parameters=head)
    return cut if cut in data.features.cuts.get((config.backbone, config.weights, config.image_side), ()) else None


def best_network(config: TrialConfig, data: TrialData, folder: Path) -> Network:
    """The network of a trial with its best weights, in inference; trials of one shape take the same network in turn.

    Args:
        config: of the trial.
        data: that it was trained on.
        folder: where it left its weights.
    """
    network = warm_network(*_shape(config, data))
    network.reset(config.seed, config.dropout)
    with np.load(folder / BEST_WEIGHTS) as weights:
        network.put_in(weights)
    return network


def save_model(network: Network, config: TrialConfig, classes: int, path: Path) -> keras.Model:
    """Save a network whole, preprocessing inside, and return the model that was saved."""
    model = export_model(network, config, classes)
    with written_whole(path) as scratch:
        model.save(scratch)
    return model


def log_probabilities(network: Network, pixels: NDArray[np.uint8], indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Log-probabilities (len(indices), classes) from raw pixels, in inference mode."""
    size = steps.inference_batch()
    batches = [
        network.logits.predict_on_batch(pixels[indices[start : start + size]].astype(np.float32))
        for start in range(0, len(indices), size)
    ]
    logits = np.concatenate(batches)
    if logits.shape[1] == 1:  # one sigmoid unit, the probability of the second class
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    found: NDArray[np.float32] = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return found
