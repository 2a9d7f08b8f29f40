"""One trial of a segmentation: a U-Net trained on images and masks, validated every epoch, its best weights kept."""

import time
from collections.abc import Callable, Collection, Generator, Sequence
from functools import lru_cache
from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray

from cxr_models import steps
from cxr_models.augmentation import augmented, augmented_masks, view_of_epoch
from cxr_models.epochs import (
    Arrays,
    Batches,
    BestEpoch,
    MovedWeights,
    Turns,
    check_finite,
    held_out,
    make_optimizer,
    mean_epoch,
    steps_of_epoch,
)
from cxr_models.hopeless import is_hopeless
from cxr_models.mask_metrics import COUNTS, evaluate_masks
from cxr_models.schedules import Patience, Schedule
from cxr_models.training import WARM_NETWORKS, WARM_STEPS
from cxr_models.trial import BEST_WEIGHTS, UNET, EpochMetrics, Objective, TrialConfig, TrialData
from cxr_models.unet import UNet, build_unet, export_unet

Rows = NDArray[np.int64]


def run_segmentation(
    trial_id: str,
    config: TrialConfig,
    data: TrialData,
    folder: Path,
    objective: Objective,
    *,
    decisions: Collection[int] = (),
) -> Generator[EpochMetrics, bool, None]:
    """Train one U-Net, yielding what each epoch measured; arguments and answers as in `training.run_trial`.

    Args:
        trial_id: name of the trial.
        config: what is trained.
        data: on which images; it has masks of the configuration's side.
        folder: for the weights of the best epoch, and the counts of the validation images that they gave.
        objective: which epoch is the best.
        decisions: epochs after which the caller may end the trial and still rank it.

    Raises:
        DivergedError: a loss is not finite.
    """
    begun = time.perf_counter()
    moved = MovedWeights(folder, scores_only=bool(data.folds))
    best = BestEpoch(moved, objective)
    loop = _first_epoch(trial_id, config, data, moved)
    patience, course = Patience(config.patience), []
    for epoch in range(1, config.epochs + 1):
        metrics, counts = loop.run(epoch, begun)
        best.offer(metrics, counts)
        course.append(metrics)
        ends = patience.is_over(metrics.val["loss"]) or is_hopeless(course, config)
        if epoch in decisions or epoch == config.epochs or ends:
            moved.write()
        if not (yield metrics):
            moved.write()
            return
        if ends:
            return


def train_again(
    trial_id: str, config: TrialConfig, data: TrialData, folder: Path, val_losses: Sequence[float]
) -> Generator[EpochMetrics, bool, None]:
    """Train a U-Net once more; arguments, answers and errors are those of `training.train_again`."""
    begun = time.perf_counter()
    moved = MovedWeights(folder)
    loop = _first_epoch(trial_id, config, data, moved)
    for epoch, val_loss in enumerate(val_losses, start=1):
        metrics, _ = loop.run(epoch, begun, val_loss)
        if epoch == len(val_losses):
            moved.note()
            moved.write()
        if not (yield metrics):
            return


def _first_epoch(trial_id: str, config: TrialConfig, data: TrialData, moved: MovedWeights) -> "_EpochLoop":
    """A U-Net with its first weights, about to be trained; what moves is watched by `moved`."""
    unet = _warm_unet(*_shape(config, data))
    unet.reset(config.seed, config.dropout)
    moved.watch(unet.logits.trainable_variables)
    return _EpochLoop(trial_id, config, data, unet, moved)


def _shape(config: TrialConfig, data: TrialData) -> tuple[TrialConfig, int]:
    """What trials must have in common to be trained by the same U-Net, one after the other."""
    shaping = TrialConfig(
        UNET, image_side=config.image_side, unet_filters=config.unet_filters, unet_depth=config.unet_depth
    )
    return shaping, data.channels


@lru_cache(maxsize=WARM_NETWORKS)
def _warm_unet(shaping: TrialConfig, channels: int) -> UNet:
    """The U-Net of a shape, built once in a process."""
    return build_unet(shaping, channels)


@lru_cache(maxsize=WARM_STEPS)
def _warm_steps(unet: UNet, loss: str, optimizer: str) -> steps.MaskSteps:
    """The compiled steps of a U-Net with a loss, made once in a process."""
    return steps.MaskSteps(unet.logits, loss, make_optimizer(optimizer))


class _EpochLoop:
    """Runs the epochs of a trial, of each of its folds in turn."""

    def __init__(self, trial_id: str, config: TrialConfig, data: TrialData, unet: UNet, moved: MovedWeights) -> None:
        self._trial_id = trial_id
        self._config = config
        self._data = data
        self._pixels = np.load(data.pictures(config), mmap_mode="r")
        self._masks = np.load(data.masks[config.image_side], mmap_mode="r")
        self._steps = _warm_steps(unet, config.mask_loss, config.optimizer)
        self._steps.begin(config.weight_decay)
        self._trainings = [(own, self._schedule(own)) for own in data.in_turn]
        self._turns = Turns(len(self._trainings))
        self._turns.enter(moved.watched, self._steps.optimizer_state)

    def _schedule(self, data: TrialData) -> Schedule:
        config = self._config
        return Schedule(
            config.schedule,
            config.learning_rate,
            steps=steps_of_epoch(config, data),
            epochs=config.epochs,
            warmup=config.warmup,
        )

    def run(self, epoch: int, begun: float, val_loss: float | None = None) -> tuple[EpochMetrics, Arrays]:
        """One epoch of a trial that began at `begun`; its metrics and the counts of the validation images.

        The latter are arrays `index` and `counts` (images, 4), and with folds `fold`. Where a validation loss is given,
        it is taken for the epoch's own; there are no metrics and no counts then.
        """
        ran = [self._run(*self._trainings[number], epoch, begun, val_loss) for number in self._turns.each()]
        metrics = mean_epoch([each for each, _ in ran])
        for _, schedule in self._trainings:
            schedule.observe(metrics.val["loss"] if val_loss is None else val_loss)
        return metrics, {} if val_loss is not None else held_out(self._data, {"counts": [found for _, found in ran]})

    def _run(
        self, data: TrialData, schedule: Schedule, epoch: int, begun: float, val_loss: float | None
    ) -> tuple[EpochMetrics, NDArray[np.float32]]:
        """One epoch of one training, and the counts of its validation images, (images, 4)."""
        pixels = self._config.image_side**2
        start = time.perf_counter()
        rates = schedule.next_epoch()
        train = evaluate_masks(self._train(data, epoch, rates), pixels)
        trained = time.perf_counter()
        val: dict[str, float] = {}
        counts = np.empty((0, len(COUNTS)), np.float32)
        if val_loss is None:
            counts = self._steps.count(self._plain, data.val)
            val = evaluate_masks(counts, pixels)
            val_loss = val["loss"]
        check_finite(epoch, train["loss"], val_loss, rates.max())
        metrics = EpochMetrics(
            trial_id=self._trial_id,
            epoch=epoch,
            phase=0,
            learning_rate=float(rates[-1]),
            train=train,
            val=val,
            seconds=time.perf_counter() - start,
            images_per_second=len(data.train) / (trained - start),
            device=steps.device(),
            trial_seconds=time.perf_counter() - begun,
            ended_ms=int(time.time() * 1000),
        )
        return metrics, counts

    def _train(self, data: TrialData, epoch: int, rates: NDArray[np.float32]) -> NDArray[np.float32]:
        """Counts (training images, 4), in the order the images were seen."""
        batches = Batches.of_epoch(self._config, data, epoch, self._steps.dropout_layers)
        counts = [
            self._steps.train(both, batches.weights[some], batches.seeds[some], rates[some])
            for some, both in batches.gathered(self._views(epoch))
        ]
        return batches.unfilled(counts)

    def _plain(self, rows: Rows) -> NDArray[np.uint8]:
        """Images as they are, with their masks as the last channel."""
        return np.concatenate([self._pixels[rows], self._masks[rows]], axis=-1)

    def _views(self, epoch: int) -> Callable[[Rows], NDArray[np.uint8]]:
        """Images and masks as this epoch sees them."""
        config = self._config
        if config.augmentation == "none":
            return self._plain
        view = config.augmentation_arguments(view_of_epoch(epoch, config.augmented_views))

        def gather(rows: Rows) -> NDArray[np.uint8]:
            ids = self._data.image_ids[rows]
            views = augmented(self._pixels[rows], ids, **view), augmented_masks(self._masks[rows], ids, **view)
            return np.concatenate(views, axis=-1)

        return gather


def best_unet(config: TrialConfig, folder: Path, *, channels: int) -> keras.Model:
    """A trial's U-Net with the weights it left in `folder`, preprocessing inside."""
    unet = build_unet(config, channels)
    with np.load(folder / BEST_WEIGHTS) as kept:
        for variable in unet.logits.trainable_variables:
            variable.assign(kept[variable.path])
    return export_unet(unet, config, channels)


@lru_cache(maxsize=1)
def load_unet(path: Path, threads: int) -> keras.Model:
    """A saved U-Net, loaded once in a process that has not used TensorFlow before."""
    steps.configure(threads)
    return keras.saving.load_model(path, compile=False)


def predict_masks(model: keras.Model, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probability of lung (images, side, side, 1) by a saved U-Net, from raw pixels (images, side, side, channels)."""
    size = steps.inference_batch()
    batches = [
        model.predict_on_batch(pixels[start : start + size].astype(np.float32)) for start in range(0, len(pixels), size)
    ]
    return np.concatenate(batches)
