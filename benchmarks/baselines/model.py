"""The network and the images of every baseline, as Keras' transfer learning guide and image loading pages show them.

https://keras.io/guides/transfer_learning/ and https://keras.io/api/data_loading/image/
"""

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from protocol import Ran, Trial

# The first layer that trains. `cxr_models.freezing` has the same boundaries; `sweep_speed.py` compares the parameters.
FIRST_TRAINED = {"convs:1": "Conv_1", "convs:2": "block_16_project", "stages:1": "block_13_expand"}


def build_model(
    *, freeze: str, learning_rate: float, dropout: float, side: int, classes: int, weights: Path
) -> keras.Model:
    """Compile a classifier of raw pixels 0 to 255, (images, side, side, 3).

    Batch norms train in the part that trains, which is what `fit` does unless told otherwise.
    """
    base = keras.applications.MobileNetV2(
        input_shape=(side, side, 3), alpha=0.35, include_top=False, weights=None, name="base"
    )
    base.load_weights(weights)
    if freeze in FIRST_TRAINED:
        names = [layer.name for layer in base.layers]
        for layer in base.layers[: names.index(FIRST_TRAINED[freeze])]:
            layer.trainable = False
    else:
        base.trainable = {"all": False, "none": True}[freeze]
    inputs = keras.Input((side, side, 3))
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = base(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(dropout)(x)
    outputs = keras.layers.Dense(classes, activation="softmax")(x)
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate), loss="sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def image_datasets(data: Path, *, side: int, batch_size: int, seed: int) -> tuple[Any, Any, int]:
    """Training and validation images from class folders, and the number of classes."""
    train = keras.utils.image_dataset_from_directory(
        data / "train", image_size=(side, side), batch_size=batch_size, seed=seed
    )
    val = keras.utils.image_dataset_from_directory(
        data / "val", image_size=(side, side), batch_size=batch_size, shuffle=False
    )
    classes = len(train.class_names)
    return train.prefetch(tf.data.AUTOTUNE), val.prefetch(tf.data.AUTOTUNE), classes


class EpochTimes(keras.callbacks.Callback):  # type: ignore[misc]
    """Notes when each epoch, validation included, is over; does nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[float] = []

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._marks = [time.perf_counter()]

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._marks.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each epoch; the first one compiles."""
        return [after - before for before, after in pairwise(self._marks)]


def as_run(trial: Trial, began: float, times: EpochTimes, model: keras.Model, history: keras.callbacks.History) -> Ran:
    """A trial that `fit` has just ended."""
    accuracy, loss = history.history["val_accuracy"][-1], history.history["val_loss"][-1]
    return Ran(trial, began, time.time(), times.seconds, accuracy, loss, trainable_parameters(model))


def trainable_parameters(model: keras.Model) -> int:
    """How many weights train."""
    return sum(math.prod(weight.shape) for weight in model.trainable_weights)
