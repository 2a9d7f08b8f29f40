"""Compiled training and inference steps. The only file that imports TensorFlow itself."""

from __future__ import annotations

import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from cxr_models.network import Network

INFERENCE_BATCH = 64


def configure(threads: int) -> None:
    """Pin the threads of this process and let TensorFlow take GPU memory as it needs it.

    Must be called before the first operation; results are bit-equal only for the same number of threads.

    Args:
        threads: threads within an operation; operations run one after the other.
    """
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    for device in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)


def device() -> str:
    """What this process trains on: `CPU`, or `GPU` and the ids it was given."""
    if not tf.config.list_physical_devices("GPU"):
        return "CPU"
    return f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"


class Steps:
    """The compiled steps of one network in one phase.

    Args:
        network: with the phase already entered; what trains is fixed here.
        optimizer: fresh, because its state belongs to the weights that train.
    """

    def __init__(self, network: Network, optimizer: keras.Optimizer) -> None:
        self._logits = network.logits
        self._optimizer = optimizer
        self._trained = network.logits.trainable_variables
        optimizer.build(self._trained)
        self._dropout_seeds = [layer.seed_generator.state for layer in _random_layers(network)]
        self._train = tf.function(self._train_step)
        self._infer = tf.function(lambda images: self._scores(images, training=False))

    def train(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int32],
        weights: NDArray[np.float32],
        key: tuple[int, int, int],
    ) -> NDArray[np.float32]:
        """Take one step and return the log-probabilities it was computed from, (images, classes).

        Args:
            images: (images, side, side, channels).
            labels: (images,).
            weights: (images,) weight of each image in the loss; the loss is their weighted sum over the number of
                images with a weight.
            key: (seed, epoch, step): dropout masks follow from it alone, never from what ran before.
        """
        seeds = np.random.SeedSequence(key).generate_state(2 * len(self._dropout_seeds)).reshape(-1, 2)
        scores: NDArray[np.float32] = self._train(images, labels, weights, seeds).numpy()
        return scores

    def predict(self, pixels: NDArray[np.uint8], indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-probabilities (len(indices), classes) of the images at `indices`, in inference mode.

        Batches have one shape, the last one padded: the results of some operations depend on the batch's size.
        """
        parts = []
        for start in range(0, len(indices), INFERENCE_BATCH):
            batch = indices[start : start + INFERENCE_BATCH]
            padded = np.resize(batch, INFERENCE_BATCH)
            parts.append(self._infer(pixels[padded]).numpy()[: len(batch)])
        return np.concatenate(parts)

    def _scores(self, images: Any, *, training: bool) -> Any:
        logits = self._logits(tf.cast(images, tf.float32), training=training)
        if logits.shape[-1] == 1:  # one sigmoid unit
            return tf.concat([tf.math.log_sigmoid(-logits), tf.math.log_sigmoid(logits)], axis=1)
        return tf.nn.log_softmax(logits)

    def _train_step(self, images: Any, labels: Any, weights: Any, seeds: Any) -> Any:
        for index, state in enumerate(self._dropout_seeds):
            state.assign(tf.cast(seeds[index], state.dtype))
        with tf.GradientTape() as tape:
            scores = self._scores(images, training=True)
            losses = -tf.gather(scores, labels, axis=1, batch_dims=1)
            loss = tf.reduce_sum(weights * losses) / tf.reduce_sum(tf.cast(weights > 0, tf.float32))
        self._optimizer.apply(tape.gradient(loss, self._trained), self._trained)
        return scores


def _random_layers(network: Network) -> list[keras.Layer]:
    layers = (*network.backbone.layers, *network.logits.layers)
    return [layer for layer in layers if getattr(layer, "seed_generator", None) is not None]
