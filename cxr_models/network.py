"""Raw pixels -> input range -> backbone -> head, as one Keras model that is saved and loaded whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_models import freezing
from cxr_models.backbones import (
    BACKBONES,
    CENTRED_BGR_MEAN,
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    InputRange,
    build_backbone,
    load_backbone_weights,
)
from cxr_models.freezing import Phase
from cxr_models.layer_table import LayerTable, read_table
from cxr_models.trial import TrialConfig

if TYPE_CHECKING:
    import keras


def output_units(config: TrialConfig, classes: int) -> int:
    """Units of the output layer.

    Raises:
        ValueError: one sigmoid unit was asked for more than two classes.
    """
    if config.output == "softmax":
        return classes
    if classes != 2:
        raise ValueError(f"output: sigmoid needs exactly 2 classes, but the data has {classes}; use output: softmax")
    return 1


def head_parameters(config: TrialConfig, table: LayerTable, classes: int) -> int:
    """Parameters of the head on top of the backbone's last feature map; all of them train."""
    features = prod(table.output) if config.pooling == "flatten" else table.output[-1]
    widths = (features, *config.hidden_units, output_units(config, classes))
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))


def count_parameters(config: TrialConfig, phase: Phase, table: LayerTable, classes: int) -> tuple[int, int]:
    """The network's (trainable, frozen) parameters in one phase, without building it."""
    decision = freezing.decide(phase, BACKBONES[config.backbone], table, config.batch_norm)
    trainable, frozen = freezing.count_parameters(decision, table)
    return trainable + head_parameters(config, table, classes), frozen


@dataclass(frozen=True)
class Network:
    """A model and the backbone inside it.

    Attributes:
        model: raw pixels 0 to 255, float32 (images, side, side, channels) -> class probabilities
            (images, classes), or (images, 1) with a sigmoid output.
        logits: the same layers without the final activation; training goes through it, because a saturated
            probability has no gradient.
        backbone: the part whose layers a freeze strategy decides.
        table: the backbone's layers.
        dropout_rates: of the dropout layers inside the backbone, as it was built.
    """

    model: keras.Model
    logits: keras.Model
    backbone: keras.Model
    table: LayerTable
    dropout_rates: Mapping[str, float]

    def enter(self, phase: Phase, batch_norm: str) -> None:
        """Freeze and unfreeze for a phase. A step compiled before does not notice: compile after."""
        decision = freezing.decide(phase, BACKBONES[self.table.backbone], self.table, batch_norm)
        freezing.apply(decision, self.backbone, self.dropout_rates)


def build_network(config: TrialConfig, *, classes: int, channels: int, weights: Path | None = None) -> Network:
    """Build the network of a trial; everything trains until a phase is entered.

    Args:
        config: the trial.
        classes: number of classes in the data.
        channels: of the images, 1 or 3; one channel is repeated inside the model.
        weights: file of backbone weights, or None to start from random ones.
    """
    import keras

    row = BACKBONES[config.backbone]
    backbone = build_backbone(row, config.image_side)
    table = read_table(row, backbone)
    if weights is not None:
        load_backbone_weights(row, backbone, weights)
    if config.batch_norm == "affine":
        backbone = _with_fixed_statistics(backbone)
    inputs = keras.Input((config.image_side, config.image_side, channels), dtype="float32", name="pixels")
    x = keras.layers.Concatenate(name="grey_to_rgb")([inputs] * 3) if channels == 1 else inputs
    logits = _head(config, backbone(_scaled(x, row.input_range)), classes)
    outputs = keras.layers.Activation(config.output, name="probabilities")(logits)
    name = config.backbone.replace(".", "_")
    rates = {layer.name: layer.rate for layer in backbone.layers if isinstance(layer, keras.layers.Dropout)}
    return Network(keras.Model(inputs, outputs, name=name), keras.Model(inputs, logits), backbone, table, rates)


def export_model(network: Network, config: TrialConfig, classes: int) -> keras.Model:
    """The network as a model of Keras' own layers only, which loads without this package."""
    if config.batch_norm != "affine":
        return network.model
    channels = network.model.input_shape[-1]
    plain = build_network(replace(config, batch_norm="frozen"), classes=classes, channels=channels)
    copy_weights(network.model, plain.model)
    return plain.model


def _head(config: TrialConfig, x: keras.KerasTensor, classes: int) -> keras.KerasTensor:
    import keras

    x = _pooling(config.pooling)(x)
    for index, units in enumerate(config.hidden_units, start=1):
        x = keras.layers.Dense(units, activation="relu", name=f"head_{index}")(x)
        x = keras.layers.Dropout(config.dropout, name=f"head_dropout_{index}")(x)
    if not config.hidden_units:
        x = keras.layers.Dropout(config.dropout, name="head_dropout")(x)
    return keras.layers.Dense(output_units(config, classes), name="logits")(x)


def _scaled(x: keras.KerasTensor, wanted: InputRange) -> keras.KerasTensor:
    """Raw RGB pixels 0 to 255 in the backbone's input range."""
    import keras

    match wanted:
        case InputRange.RAW:
            return x
        case InputRange.UNIT:
            return keras.layers.Rescaling(1 / 255, name="to_unit")(x)
        case InputRange.SYMMETRIC:
            return keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="to_symmetric")(x)
        case InputRange.STANDARDIZED:
            scale = [1 / (255 * deviation) for deviation in IMAGENET_DEVIATION]
            offset = [-mean / deviation for mean, deviation in zip(IMAGENET_MEAN, IMAGENET_DEVIATION, strict=True)]
            return keras.layers.Rescaling(scale, offset=offset, name="to_standardized")(x)
        case InputRange.CENTRED_BGR:
            offset = [-mean for mean in CENTRED_BGR_MEAN]
            return keras.layers.Rescaling(1.0, offset=offset, name="to_centred")(keras.ops.flip(x, axis=-1))


def _pooling(name: str) -> keras.Layer:
    import keras

    kinds = {
        "average": keras.layers.GlobalAveragePooling2D,
        "max": keras.layers.GlobalMaxPooling2D,
        "flatten": keras.layers.Flatten,
    }
    return kinds[name](name="features")


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Give `target`, of the same layers, the weights of `source`."""
    target.set_weights(source.get_weights())
    for layer in target._flatten_layers():
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()  # Normalization computes with figures derived from its weights


def _with_fixed_statistics(backbone: keras.Model) -> keras.Model:
    """The same backbone whose batch norms ignore that they are in training.

    A Functional model hands its own `training` to every layer and overrides what the graph was built with, so
    `layer(x, training=False)` does not hold; a layer of its own class does.
    """
    import keras

    class FixedStatistics(keras.layers.BatchNormalization):  # type: ignore[misc, name-defined, unused-ignore]
        def call(self, inputs: object, training: bool | None = None, mask: object = None) -> object:
            return super().call(inputs, training=False, mask=mask)

    def replaced(layer: keras.Layer) -> keras.Layer:
        if isinstance(layer, keras.layers.BatchNormalization):
            return FixedStatistics.from_config(layer.get_config())
        return layer.__class__.from_config(layer.get_config())

    inputs = keras.Input(backbone.input_shape[1:], name=backbone.layers[0].name)
    clone = keras.models.clone_model(backbone, input_tensors=inputs, clone_function=replaced)
    copy_weights(backbone, clone)
    return clone
