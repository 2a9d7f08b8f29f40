"""One trial: build, train by phases, validate every epoch, keep the best weights."""

import math
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray

from cxr_models import steps
from cxr_models.freezing import parse_strategy
from cxr_models.metrics import evaluate
from cxr_models.network import Network, build_network, export_model
from cxr_models.storage import written_whole
from cxr_models.trial import BEST_WEIGHTS, VALIDATION_SCORES, EpochMetrics, Objective, TrialConfig, TrialData


class DivergedError(RuntimeError):
    """The loss is no longer finite; going on cannot mend it."""


def run_trial(
    trial_id: str, config: TrialConfig, data: TrialData, folder: Path, objective: Objective
) -> Generator[EpochMetrics, bool, None]:
    """Train one configuration, yielding what each epoch measured.

    The caller answers each epoch with whether to go on: `send(True)` or `send(False)`. Whenever the objective
    improves, the weights and the validation scores are written to `folder`.

    Raises:
        DivergedError: a loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(config.seed)
    weights = data.weights.get((config.backbone, config.weights, config.image_side))
    network = build_network(config, classes=len(data.classes), channels=data.channels, weights=weights)
    loop = _EpochLoop(trial_id, config, data, network)
    strategy = parse_strategy(config.freeze)
    best, epoch = objective.worst, 0
    for index, (phase, epochs) in enumerate(zip(strategy.phases, strategy.epochs(config.epochs), strict=True)):
        network.enter(phase, config.batch_norm)
        rate = config.learning_rate * phase.learning_rate_scale
        compiled = steps.Steps(network, make_optimizer(config, rate))
        lowest_loss, waited = math.inf, 0
        for _ in range(epochs):
            epoch += 1
            metrics, scores = loop.run(compiled, epoch, index, rate)
            if objective.better(metrics.val[objective.metric], best):
                best = metrics.val[objective.metric]
                _keep_best(network, folder, data, scores)
            waited = 0 if metrics.val["loss"] < lowest_loss else waited + 1
            lowest_loss = min(lowest_loss, metrics.val["loss"])
            if not (yield metrics):
                return
            if config.patience and waited >= config.patience:
                break  # ends the phase; the trial goes on if another follows


def make_optimizer(config: TrialConfig, learning_rate: float) -> keras.Optimizer:
    """A fresh optimizer of the trial's kind; `learning_rate` is that of the phase."""
    kinds = {
        "adam": keras.optimizers.Adam,
        "adamw": keras.optimizers.AdamW,
        "rmsprop": keras.optimizers.RMSprop,
        "sgd": keras.optimizers.SGD,
    }
    momentum = {"momentum": 0.9} if config.optimizer == "sgd" else {}
    # Keras reads a weight decay of 0 as 0 in AdamW only; elsewhere None is none.
    decay = config.weight_decay if config.weight_decay or config.optimizer == "adamw" else None
    return kinds[config.optimizer](learning_rate=learning_rate, weight_decay=decay, **momentum)


def class_weights(config: TrialConfig, labels: NDArray[np.int32], classes: int) -> NDArray[np.float32]:
    """(classes,) weight of each class in the loss; the mean over the training images is 1."""
    if config.class_weights == "none":
        return np.ones(classes, np.float32)
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * counts)).astype(np.float32)


@dataclass
class _EpochLoop:
    """Runs the epochs of one trial over its pixels."""

    trial_id: str
    config: TrialConfig
    data: TrialData
    network: Network

    def __post_init__(self) -> None:
        self._pixels = np.load(self.data.pixels[self.config.image_side], mmap_mode="r")
        self._weights = class_weights(self.config, self.data.labels[self.data.train], len(self.data.classes))
        self._device = steps.device()

    def run(
        self, compiled: steps.Steps, epoch: int, phase: int, rate: float
    ) -> tuple[EpochMetrics, NDArray[np.float32]]:
        """One epoch; returns its metrics and the validation scores (validation images, classes)."""
        start = time.perf_counter()
        train = self._train(compiled, epoch)
        trained = time.perf_counter()
        scores = compiled.predict(self._pixels, self.data.val)
        val = evaluate(self.data.labels[self.data.val], scores, self.data.classes)
        if not (math.isfinite(train["loss"]) and math.isfinite(val["loss"])):
            raise DivergedError(
                f"diverged in epoch {epoch}: training loss {train['loss']}, validation loss {val['loss']}; "
                f"a lower learning rate than {rate:g} usually helps"
            )
        metrics = EpochMetrics(
            trial_id=self.trial_id,
            epoch=epoch,
            phase=phase,
            learning_rate=rate,
            train=train,
            val=val,
            seconds=time.perf_counter() - start,
            images_per_second=len(self.data.train) / (trained - start),
            device=self._device,
        )
        return metrics, scores

    def _train(self, compiled: steps.Steps, epoch: int) -> Mapping[str, float]:
        size = self.config.batch_size
        order = np.random.default_rng((self.config.seed, epoch)).permutation(self.data.train)
        labels = self.data.labels[order]
        scores = np.empty((len(order), len(self.data.classes)), np.float32)
        for step, start in enumerate(range(0, len(order), size)):
            # Batches have one shape, or each shape would be compiled. What fills up the last one, images of the same
            # epoch, weighs nothing in the loss; in the statistics of batch norms that train it counts as they do.
            chosen = np.arange(start, start + size) % len(order)
            fresh = np.arange(start, start + size) < len(order)
            weights = np.where(fresh, self._weights[labels[chosen]], 0.0).astype(np.float32)
            key = (self.config.seed, epoch, step)
            found = compiled.train(self._pixels[order[chosen]], labels[chosen], weights, key)
            scores[chosen[fresh]] = found[fresh]
        return evaluate(labels, scores, self.data.classes)


def _keep_best(network: Network, folder: Path, data: TrialData, scores: NDArray[np.float32]) -> None:
    with written_whole(folder / BEST_WEIGHTS) as scratch:
        network.model.save_weights(scratch)
    with written_whole(folder / VALIDATION_SCORES) as scratch, scratch.open("wb") as file:
        np.savez(file, index=data.val, labels=data.labels[data.val], scores=scores)


def restore_best(config: TrialConfig, folder: Path, *, classes: int, channels: int, model_path: Path) -> keras.Model:
    """Rebuild a trial's network with its best weights and save it whole, preprocessing inside, to `model_path`."""
    network = build_network(config, classes=classes, channels=channels)
    network.model.load_weights(folder / BEST_WEIGHTS)
    model = export_model(network, config, classes)
    with written_whole(model_path) as scratch:
        model.save(scratch)
    return model


def predict(model: keras.Model, pixels: NDArray[np.uint8], indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Class probabilities (len(indices), classes) of a saved model, from raw pixels."""
    batches = [
        model.predict_on_batch(pixels[indices[start : start + steps.INFERENCE_BATCH]].astype(np.float32))
        for start in range(0, len(indices), steps.INFERENCE_BATCH)
    ]
    found = np.concatenate(batches)
    return np.concatenate([1.0 - found, found], axis=1) if found.shape[1] == 1 else found
