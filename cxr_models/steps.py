"""Compiled training and inference steps. The only file that imports TensorFlow itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from cxr_models.cuts import Cut
from cxr_models.network import Network

# Inference runs in batches of one shape, the last one padded: the results of some operations depend on the shape, and
# below 8 images those of convolutions do. A CPU is fastest where a batch's activations stay near it, a GPU wants many.
# Nothing is compiled by XLA, which made head-only epochs more than twenty times slower on a CPU, and deeper ones up
# to five times. benchmarks/compiled_steps.py measures both.
CPU_BATCH, GPU_BATCH = 16, 256
CHUNK_BYTES = 64 * 1024**2  # of input that is gathered at once

Array = NDArray[np.uint8] | NDArray[np.float32]


def configure(threads: int) -> None:
    """Pin the threads of this process and let TensorFlow take GPU memory as it needs it.

    Must be called before the first operation; results are bit-equal only for the same number of threads.

    Args:
        threads: threads within an operation; operations run one after the other.
    """
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    # It rewrites arithmetic by what surrounds it, so that a layer's output differs in its last bits between the whole
    # network and a part of it (seen in EfficientNet). Without it, training from stored features gives the same bits.
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    for device in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)


def device() -> str:
    """What this process trains on: `CPU`, or `GPU` and the ids it was given."""
    if not tf.config.list_physical_devices("GPU"):
        return "CPU"
    return f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"


def numerics() -> dict[str, str | int]:
    """What the bits of a result depend on, beside the network and its input."""
    return {
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "device": _processor() if device() == "CPU" else _gpus(),
        "threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
        "batch": inference_batch(),
        "precision": keras.config.dtype_policy().name,
    }


def _gpus() -> str:
    """Kinds of GPU, and whether they multiply with shortened numbers."""
    devices = tf.config.list_physical_devices("GPU")
    kinds = {tf.config.experimental.get_device_details(one).get("device_name", "GPU") for one in devices}
    short = tf.config.experimental.tensor_float_32_execution_enabled()
    return f"{', '.join(sorted(kinds))}{', TF32' if short else ''}"


@cache
def _processor() -> str:
    """Kind of CPU: its instructions decide in which order the libraries add."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def inference_batch() -> int:
    """Images in one batch of inference."""
    return CPU_BATCH if device() == "CPU" else GPU_BATCH


class Prefix:
    """The compiled frozen part of a network, up to one or several cuts."""

    def __init__(self, network: Network, cuts: Sequence[Cut]) -> None:
        model = network.prefix(cuts)
        self._run = _in_batches(
            lambda images: tf.nest.flatten(model(tf.cast(images, tf.float32), training=False)), len(cuts)
        )

    def __call__(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """The output of each cut, (images, *cut.shape), of pixels (images, side, side, channels)."""
        return self._run(pixels)


@dataclass(frozen=True)
class Settings:
    """What may change from one trial to the next without a new compilation.

    Attributes:
        weight_decay: decoupled, at least 0.
        focal_gamma: at least 0, where the steps are `reweighted`.
        label_smoothing: in [0, 1), where the steps are `reweighted`.
        rate_scales: for each weight that trains its factor on the learning rate, where the steps are `layerwise`.
    """

    weight_decay: float = 0.0
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    rate_scales: Sequence[float] = ()


class Steps:
    """The compiled steps of one network in one phase, from one cut on; any number of trials may take them in turn.

    Args:
        network: with the phase entered whenever a shape of batch is first seen: what trains is compiled in.
        cut: where the images have been run to; None for raw pixels.
        optimizer: of its own, because its state belongs to the weights that train.
        reweighted: the loss is focal or its labels are smoothed.
        layerwise: layers have learning rates of their own.

    Attributes:
        trained: the weights that train.
    """

    def __init__(
        self,
        network: Network,
        cut: Cut | None,
        optimizer: keras.Optimizer,
        *,
        reweighted: bool = False,
        layerwise: bool = False,
    ) -> None:
        self._suffix = network.suffix(cut)
        self._optimizer = optimizer
        self._reweighted = reweighted
        self._layerwise = layerwise
        self._weight_decay = _setting("weight_decay")
        self._focal_gamma = _setting("focal_gamma")
        self._label_smoothing = _setting("label_smoothing")
        optimizer.weight_decay = self._weight_decay
        self.trained = self._suffix.trainable_variables
        self._rate_scales = [_setting("rate_scale") for _ in self.trained]
        optimizer.build(self.trained)
        self._dropout_seeds = [layer.seed_generator.state for layer in _random_layers(network)]
        self._programs: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._infer = _in_batches(lambda images: [self._scores(images, training=False)], 1)

    @property
    def dropout_layers(self) -> int:
        """How many there are; each takes two numbers in a step."""
        return len(self._dropout_seeds)

    @property
    def optimizer_state(self) -> list[keras.Variable]:
        """What the optimizer remembers of the steps so far."""
        return list(self._optimizer.variables)

    def begin(self, settings: Settings) -> None:
        """Start a phase of a trial with a fresh optimizer."""
        for variable in self._optimizer.variables:
            variable.assign(tf.zeros_like(variable))
        self._weight_decay.assign(settings.weight_decay)
        self._focal_gamma.assign(settings.focal_gamma)
        self._label_smoothing.assign(settings.label_smoothing)
        if self._layerwise:
            for variable, scale in zip(self._rate_scales, settings.rate_scales, strict=True):
                variable.assign(scale)

    def train(
        self,
        inputs: Array,
        labels: NDArray[np.int32],
        weights: NDArray[np.float32],
        seeds: NDArray[np.uint32],
        rates: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Take steps one after the other, and return the log-probabilities each was computed from.

        Args:
            inputs: (steps, images, ...) pixels, or what is stored at the cut.
            labels: (steps, images).
            weights: (steps, images) weight of each image in the loss; the loss of a step is their weighted sum over
                the number of images with a weight.
            seeds: (steps, dropout_layers, 2): dropout masks follow from them alone, never from what ran before.
            rates: (steps,) learning rate of each step.

        Returns:
            (steps, images, classes).
        """
        batch = inputs.shape[1:]
        if batch not in self._programs:
            self._programs[batch] = tf.function(
                self._train_steps,
                input_signature=[
                    tf.TensorSpec((None, *batch), inputs.dtype),
                    tf.TensorSpec((None, batch[0]), tf.int32),
                    tf.TensorSpec((None, batch[0]), tf.float32),
                    tf.TensorSpec((None, self.dropout_layers, 2), tf.uint32),
                    tf.TensorSpec((None,), tf.float32),
                ],
            )
        scores: NDArray[np.float32] = self._programs[batch](inputs, labels, weights, seeds, rates).numpy()
        return scores

    def predict(self, gather: Callable[[NDArray[np.int64]], Array], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-probabilities (len(rows), classes) in inference mode.

        Args:
            gather: images by their place in the data set -> pixels, or what is stored at the cut.
            rows: the images.
        """
        at_once = max(1, CHUNK_BYTES // gather(rows[:1]).nbytes)
        parts = [self._infer(gather(rows[first : first + at_once]))[0] for first in range(0, len(rows), at_once)]
        return np.concatenate(parts)

    def _scores(self, images: Any, *, training: bool) -> Any:
        logits = self._suffix(tf.cast(images, tf.float32), training=training)
        if logits.shape[-1] == 1:  # one sigmoid unit
            return tf.concat([tf.math.log_sigmoid(-logits), tf.math.log_sigmoid(logits)], axis=1)
        return tf.nn.log_softmax(logits)

    def _train_steps(self, *given: Any) -> Any:
        (scores,) = _loop(
            tf.shape(given[0])[0], lambda step: [self._train_step(*(one[step] for one in given))], outputs=1
        )
        return scores

    def _train_step(self, images: Any, labels: Any, weights: Any, seeds: Any, rate: Any) -> Any:
        for index, state in enumerate(self._dropout_seeds):
            state.assign(tf.cast(seeds[index], state.dtype))
        with tf.GradientTape() as tape:
            scores = self._scores(images, training=True)
            losses = self._losses(scores, labels)
            loss = tf.reduce_sum(weights * losses) / tf.reduce_sum(tf.cast(weights > 0, tf.float32))
        self._optimizer.learning_rate.assign(rate)
        gradients = tape.gradient(loss, self.trained)
        before = [tf.identity(variable.value) for variable in self.trained] if self._layerwise else []
        self._optimizer.apply(gradients, self.trained)
        # Not the gradients are scaled: Adam and RMSprop would divide the factor out again.
        for variable, old, scale in zip(self.trained, before, self._rate_scales, strict=False):
            variable.assign(old + scale.value * (variable.value - old))
        return scores

    def _losses(self, scores: Any, labels: Any) -> Any:
        """(images,) loss of each image."""
        if not self._reweighted:
            return -tf.gather(scores, labels, axis=1, batch_dims=1)
        classes = scores.shape[-1]
        share = self._label_smoothing.value
        targets = (1.0 - share) * tf.one_hot(labels, classes) + share / classes
        # Below the bound the power's gradient has no finite value; such an image counts for nothing anyway.
        hard = tf.maximum(1.0 - tf.exp(scores), 1e-6) ** self._focal_gamma.value
        return -tf.reduce_sum(targets * hard * scores, axis=1)


def _setting(name: str) -> keras.Variable:
    return keras.Variable(0.0, dtype="float32", trainable=False, name=name)


class MaskSteps:
    """The compiled steps of one U-Net with one loss; any number of trials may take them in turn.

    Args:
        logits: pixels -> logits, (images, side, side, 1).
        loss: a name in `CHOICES["mask_loss"]`.
        optimizer: of its own. Learning rates and weight decay may change without a new compilation.
    """

    def __init__(self, logits: keras.Model, loss: str, optimizer: keras.Optimizer) -> None:
        self._logits = logits
        self._loss = loss
        self._optimizer = optimizer
        self._weight_decay = _setting("weight_decay")
        optimizer.weight_decay = self._weight_decay
        self._trained = logits.trainable_variables
        optimizer.build(self._trained)
        self._dropout_seeds = [layer.seed_generator.state for layer in _drawing(logits.layers)]
        self._programs: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._count = _in_batches(lambda both: [self._counts(*_parted(both), training=False)], 1)

    @property
    def dropout_layers(self) -> int:
        """How many there are; each takes two numbers in a step."""
        return len(self._dropout_seeds)

    @property
    def optimizer_state(self) -> list[keras.Variable]:
        """What the optimizer remembers of the steps so far."""
        return list(self._optimizer.variables)

    def begin(self, weight_decay: float) -> None:
        """Start a trial with a fresh optimizer."""
        for variable in self._optimizer.variables:
            variable.assign(tf.zeros_like(variable))
        self._weight_decay.assign(weight_decay)

    def train(
        self,
        both: Array,
        weights: NDArray[np.float32],
        seeds: NDArray[np.uint32],
        rates: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Take steps one after the other, and return the counts each was computed from.

        Args:
            both: (steps, images, side, side, channels + 1) pixels, with the mask (0 or 255) as the last channel.
            weights: (steps, images) 1, or 0 for an image that only fills up its batch.
            seeds: (steps, dropout_layers, 2), as in `Steps.train`.
            rates: (steps,) learning rate of each step.

        Returns:
            (steps, images, 4) in the order of `mask_metrics.COUNTS`.
        """
        batch = both.shape[1:]
        if batch not in self._programs:
            self._programs[batch] = tf.function(
                self._train_steps,
                input_signature=[
                    tf.TensorSpec((None, *batch), both.dtype),
                    tf.TensorSpec((None, batch[0]), tf.float32),
                    tf.TensorSpec((None, self.dropout_layers, 2), tf.uint32),
                    tf.TensorSpec((None,), tf.float32),
                ],
            )
        counts: NDArray[np.float32] = self._programs[batch](both, weights, seeds, rates).numpy()
        return counts

    def count(
        self, gather: Callable[[NDArray[np.int64]], NDArray[np.uint8]], rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Counts (len(rows), 4) in inference mode.

        Args:
            gather: images by their place in the data set -> pixels and mask, as in `train`.
            rows: the images.
        """
        at_once = max(1, CHUNK_BYTES // gather(rows[:1]).nbytes)
        parts = [self._count(gather(rows[first : first + at_once]))[0] for first in range(0, len(rows), at_once)]
        return np.concatenate(parts)

    def _counts(self, images: Any, truth: Any, *, training: bool) -> Any:
        logits = self._logits(images, training=training)
        inside = tf.cast(logits >= 0, tf.float32)  # a probability of one half
        parts = [inside * truth, inside, truth]
        counted = [tf.reduce_sum(part, axis=(1, 2, 3)) for part in parts]
        return tf.stack([self._losses(logits, truth), *counted], axis=1)

    def _losses(self, logits: Any, truth: Any) -> Any:
        """The loss of each image."""
        pixels = tf.nn.sigmoid_cross_entropy_with_logits(truth, logits)
        cross_entropy = tf.reduce_mean(pixels, axis=(1, 2, 3))
        if self._loss == "cross_entropy":
            return cross_entropy
        inside = tf.sigmoid(logits)
        overlap = tf.reduce_sum(inside * truth, axis=(1, 2, 3))
        both = tf.reduce_sum(inside + truth, axis=(1, 2, 3))
        dice = 1.0 - (2.0 * overlap + 1.0) / (both + 1.0)  # one pixel more, so that two empty masks agree
        return dice if self._loss == "dice" else cross_entropy + dice

    def _train_steps(self, *given: Any) -> Any:
        (counts,) = _loop(
            tf.shape(given[0])[0], lambda step: [self._train_step(*(one[step] for one in given))], outputs=1
        )
        return counts

    def _train_step(self, both: Any, weights: Any, seeds: Any, rate: Any) -> Any:
        for index, state in enumerate(self._dropout_seeds):
            state.assign(tf.cast(seeds[index], state.dtype))
        with tf.GradientTape() as tape:
            counts = self._counts(*_parted(both), training=True)
            loss = tf.reduce_sum(weights * counts[:, 0]) / tf.reduce_sum(weights)
        self._optimizer.learning_rate.assign(rate)
        self._optimizer.apply(tape.gradient(loss, self._trained), self._trained)
        return counts


def _parted(both: Any) -> tuple[Any, Any]:
    """Pixels, and the mask as 0 or 1, float32."""
    return tf.cast(both[..., :-1], tf.float32), tf.cast(both[..., -1:] > 0, tf.float32)


def _loop(steps: Any, take: Callable[[Any], list[Any]], outputs: int) -> list[Any]:
    """Run `take` for each step inside the graph; the outputs of all steps, stacked."""

    def body(step: Any, *found: Any) -> tuple[Any, ...]:
        return step + 1, *(array.write(step, one) for array, one in zip(found, take(step), strict=True))

    empty = [tf.TensorArray(tf.float32, size=steps) for _ in range(outputs)]
    _, *found = tf.while_loop(lambda step, *_: step < steps, body, (0, *empty), parallel_iterations=1)
    return [array.stack() for array in found]


def _in_batches(model: Callable[[Any], list[Any]], outputs: int) -> Callable[[Array], list[NDArray[np.float32]]]:
    """Compile `model`, which has a list of outputs, to run over any number of images inside the graph."""

    def run(batches: Any) -> list[Any]:
        return _loop(tf.shape(batches)[0], lambda step: model(batches[step]), outputs)

    programs: dict[tuple[int, ...], Callable[[Any], Any]] = {}

    def padded(inputs: Array) -> list[NDArray[np.float32]]:
        size, image = inference_batch(), inputs.shape[1:]
        if image not in programs:
            programs[image] = tf.function(run, input_signature=[tf.TensorSpec((None, size, *image), inputs.dtype)])
        batches = -(-len(inputs) // size)
        filled = inputs[np.arange(batches * size) % len(inputs)]
        found = programs[image](filled.reshape(batches, size, *image))
        return [one.numpy().reshape(batches * size, *one.shape[2:])[: len(inputs)] for one in found]

    return padded


def _random_layers(network: Network) -> list[keras.Layer]:
    return _drawing((*network.backbone.layers, *network.head))


def _drawing(layers: Sequence[keras.Layer]) -> list[keras.Layer]:
    """Those that draw random numbers."""
    return [layer for layer in layers if getattr(layer, "seed_generator", None) is not None]
