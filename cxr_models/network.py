"""Raw pixels -> input range -> backbone -> head, as one Keras model that is saved and loaded whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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
from cxr_models.cuts import Cut, tapped_layers
from cxr_models.freezing import Phase
from cxr_models.layer_table import LayerTable, read_table
from cxr_models.trial import TrialConfig

if TYPE_CHECKING:
    from typing import TypeAlias

    import keras

    FirstWeight: TypeAlias = NDArray[np.generic] | keras.initializers.Initializer


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
    tapped = tapped_layers(table, config.taps)
    features = prod(table.output) if config.pooling == "flatten" else sum(layer.output[-1] for layer in tapped)
    widths = (features, *config.hidden_units, output_units(config, classes))
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))


def count_parameters(config: TrialConfig, phase: Phase, table: LayerTable, classes: int) -> tuple[int, int]:
    """The network's (trainable, frozen) parameters in one phase, without building it."""
    decision = freezing.decide(phase, BACKBONES[config.backbone], table, config.batch_norm)
    trainable, frozen = freezing.count_parameters(decision, table)
    return trainable + head_parameters(config, table, classes), frozen


@dataclass(frozen=True, eq=False)
class Network:
    """A model and its parts. One network serves many trials: their weights are put in, see `reset`.

    Attributes:
        model: raw pixels 0 to 255, float32 (images, side, side, channels) -> class probabilities
            (images, classes), or (images, 1) with a sigmoid output.
        logits: the same layers without the final activation; training goes through it, because a saturated
            probability has no gradient.
        scaled: raw pixels -> the backbone's input range.
        backbone: the part whose layers a freeze strategy decides.
        taps: the layers of it that feed the head, the last one last.
        head: the layers behind it, what pools the taps first, the logits last.
        table: the backbone's layers.
        dropout_rates: of the dropout layers inside the backbone, as it was built.
        head_dropout: the rate of the head's dropout layers; a variable, so that another rate is no other program.
        first_weights: every weight with its first value, or with the initializer that draws it.
    """

    model: keras.Model
    logits: keras.Model
    scaled: keras.Model
    backbone: keras.Model
    taps: tuple[str, ...]
    head: tuple[keras.Layer, ...]
    table: LayerTable
    dropout_rates: Mapping[str, float]
    head_dropout: keras.Variable
    first_weights: tuple[tuple[keras.Variable, FirstWeight], ...]

    def reset(self, seed: int, dropout: float) -> None:
        """Put a trial's first weights in: those of the file, and random ones that follow from the seed alone."""
        for place, (variable, first) in enumerate(self.first_weights):
            if isinstance(first, np.ndarray):
                variable.assign(first)
                continue
            (key,) = np.random.SeedSequence((seed, place)).generate_state(1)
            initializer = type(first).from_config({**first.get_config(), "seed": int(key)})
            variable.assign(initializer(variable.shape, dtype=variable.dtype))
        _settle(self.backbone)
        self.head_dropout.assign(dropout)

    def put_in(self, weights: Mapping[str, NDArray[np.generic]]) -> None:
        """Replace some weights, named by their paths."""
        own = {variable.path: variable for variable, _ in self.first_weights}
        for path, value in weights.items():
            own[path].assign(value)
        _settle(self.backbone)

    def enter(self, phase: Phase, batch_norm: str) -> None:
        """Freeze and unfreeze for a phase. A step compiled before does not notice: compile after."""
        decision = freezing.decide(phase, BACKBONES[self.table.backbone], self.table, batch_norm)
        freezing.apply(decision, self.backbone, self.dropout_rates)

    def prefix(self, cuts: Sequence[Cut]) -> keras.Model:
        """Raw pixels -> a list of what is stored at each cut, in one pass."""
        import keras

        wanted = {cut: cut.taps or (cut.layer,) for cut in cuts}
        names = list(dict.fromkeys(name for layers in wanted.values() for name in layers))
        stages = keras.Model(self.backbone.inputs, [self.backbone.get_layer(name).output for name in names])
        inputs = keras.Input(self.scaled.input_shape[1:])
        found = dict(zip(names, stages(self.scaled(inputs)), strict=True))
        outputs = []
        for place, (cut, layers) in enumerate(wanted.items(), start=1):
            maps = [found[name] for name in layers]
            # A model of its own for each cut: in one model the layers' names, alike for all cuts, would be taken.
            outputs.append(_joined_pooling(cut.pooling, maps, f"cut_{place}")(maps) if cut.pooling else maps[0])
        return keras.Model(inputs, outputs)

    def suffix(self, cut: Cut | None) -> keras.Model:
        """What is stored at the cut -> logits, with the layers of this network; from the pixels without a cut."""
        import keras

        if cut is None:
            return self.logits
        inputs = x = keras.Input(cut.shape)
        head = self.head[1:] if cut.pooling else self.head
        if not cut.pooling and self.taps != (cut.layer,):
            x = keras.Model(self.backbone.get_layer(cut.layer).output, _outputs(self.backbone, self.taps))(x)
        for layer in head:
            x = layer(x)
        return keras.Model(inputs, x)


def build_network(config: TrialConfig, *, classes: int, channels: int, weights: Path | None = None) -> Network:
    """Build the network of a trial with its first weights; everything trains until a phase is entered.

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
    head_dropout = keras.Variable(config.dropout, dtype="float32", trainable=False, name="head_dropout")
    taps = tuple(layer.name for layer in tapped_layers(table, config.taps))
    head = _head(config, _outputs(backbone, taps), classes, dropout_by_variable(head_dropout))
    network = Network(
        **_models(config, backbone, taps, head, channels),
        backbone=backbone,
        taps=taps,
        head=head,
        table=table,
        dropout_rates={layer.name: layer.rate for layer in backbone.layers if isinstance(layer, keras.layers.Dropout)},
        head_dropout=head_dropout,
        first_weights=_first_weights(backbone, head, loaded=weights is not None),
    )
    network.reset(config.seed, config.dropout)
    return network


def export_model(network: Network, config: TrialConfig, classes: int) -> keras.Model:
    """The network as a model of Keras' own layers only, which loads without this package."""
    import keras

    backbone = build_backbone(BACKBONES[config.backbone], config.image_side)
    copy_weights(network.backbone, backbone)
    outputs = _outputs(backbone, network.taps)
    head = _head(config, outputs, classes, lambda name: keras.layers.Dropout(config.dropout, name=name))
    model = _models(config, backbone, network.taps, head, network.model.input_shape[-1])["model"]
    for ours, theirs in zip(network.head, head, strict=True):
        theirs.set_weights(ours.get_weights())
    return model


def _models(
    config: TrialConfig, backbone: keras.Model, taps: Sequence[str], head: Sequence[keras.Layer], channels: int
) -> dict[str, keras.Model]:
    """The models of a network, on the same layers."""
    import keras

    inputs = keras.Input((config.image_side, config.image_side, channels), dtype="float32", name="pixels")
    x = keras.layers.Concatenate(name="grey_to_rgb")([inputs] * 3) if channels == 1 else inputs
    scaled = _scaled(x, BACKBONES[config.backbone].input_range)
    tapped = backbone if len(taps) == 1 else keras.Model(backbone.inputs, _outputs(backbone, taps), name="tapped")
    logits = tapped(scaled)
    for layer in head:
        logits = layer(logits)
    outputs = keras.layers.Activation(config.output, name="probabilities")(logits)
    return {
        "model": keras.Model(inputs, outputs, name=config.backbone.replace(".", "_")),
        "logits": keras.Model(inputs, logits),
        "scaled": keras.Model(inputs, scaled),
    }


def _first_weights(
    backbone: keras.Model, head: Sequence[keras.Layer], *, loaded: bool
) -> tuple[tuple[keras.Variable, FirstWeight], ...]:
    """Every weight with its first value, or with the initializer that draws it.

    Raises:
        RuntimeError: a layer has a kernel whose initializer is not found; it could not be drawn anew.
    """
    import keras

    found: list[tuple[keras.Variable, FirstWeight]] = []
    for layer in (*backbone._flatten_layers(include_self=False), *head):  # ConvNeXt has layers inside layers
        if isinstance(layer, keras.Model):
            continue
        for variable in layer.weights:
            initializer = _initializer(layer, variable.name)
            if initializer is None and variable.name.endswith("kernel"):
                raise RuntimeError(f"expected {layer.name} to have an initializer of {variable.name}, found none")
            drawn = initializer is not None and "seed" in initializer.get_config()
            kept = np.asarray(variable.numpy())  # Keras gives a scalar as none of numpy's arrays
            found.append((variable, initializer if drawn and (layer in head or not loaded) else kept))
    return tuple(found)


def _initializer(layer: keras.Layer, weight: str) -> keras.initializers.Initializer | None:
    """Keras calls the initializer of `depthwise_kernel`, and of a depthwise `kernel`, `depthwise_initializer`."""
    names = [f"{weight}_initializer", f"{weight.removesuffix('_kernel')}_initializer"]
    if weight == "kernel":
        names.append("depthwise_initializer")
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


def _outputs(backbone: keras.Model, taps: Sequence[str]) -> keras.KerasTensor | list[keras.KerasTensor]:
    """What the head is fed: the output of the last layer, or of each tapped one."""
    outputs = [backbone.get_layer(name).output for name in taps]
    return outputs if len(taps) > 1 else outputs[0]


def _head(
    config: TrialConfig,
    outputs: keras.KerasTensor | list[keras.KerasTensor],
    classes: int,
    dropout: Callable[[str], keras.Layer],
) -> tuple[keras.Layer, ...]:
    import keras

    layers = [_joined_pooling(config.pooling, outputs) if isinstance(outputs, list) else _pooling(config.pooling)]
    for index, units in enumerate(config.hidden_units, start=1):
        layers.append(keras.layers.Dense(units, activation="relu", name=f"head_{index}"))
        layers.append(dropout(f"head_dropout_{index}"))
    if not config.hidden_units:
        layers.append(dropout("head_dropout"))
    return (*layers, keras.layers.Dense(output_units(config, classes), name="logits"))


def dropout_by_variable(rate: keras.Variable) -> Callable[[str], keras.Layer]:
    """A maker of dropout layers that read their rate when they run; Keras' own compiles it in."""
    import keras

    class VariableDropout(keras.layers.Dropout):  # type: ignore[misc, name-defined, unused-ignore]
        def call(self, inputs: object, training: bool = False) -> object:
            if not training:
                return inputs
            drawn = keras.random.uniform(keras.ops.shape(inputs), seed=self.seed_generator)
            return keras.ops.where(drawn >= rate, inputs / (1.0 - rate), 0.0)

    return lambda name: VariableDropout(0.5, name=name)  # Keras makes no seed state for a rate of 0


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


def _pooling(name: str, layer: str = "features") -> keras.Layer:
    import keras

    kinds = {
        "average": keras.layers.GlobalAveragePooling2D,
        "max": keras.layers.GlobalMaxPooling2D,
        "flatten": keras.layers.Flatten,
    }
    return kinds[name](name=layer)


def _joined_pooling(name: str, maps: Sequence[keras.KerasTensor], own_name: str = "features") -> keras.Model:
    """Feature maps -> one vector; of several, each part has mean 0 and deviation 1, because depths differ in scale."""
    import keras

    inputs = [keras.Input(one.shape[1:]) for one in maps]
    return keras.Model(inputs, _pooled(name, inputs), name=own_name)


def _pooled(name: str, maps: Sequence[keras.KerasTensor]) -> keras.KerasTensor:
    """What the head's first layer makes of the tapped maps."""
    import keras

    if len(maps) == 1:
        return _pooling(name)(maps[0])
    pooled = [_pooling(name, f"pooled_{place}")(one) for place, one in enumerate(maps, start=1)]
    scaled = [
        keras.layers.LayerNormalization(center=False, scale=False, name=f"scaled_{place}")(one)
        for place, one in enumerate(pooled, start=1)
    ]
    return keras.layers.Concatenate(name="joined")(scaled)


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Give `target`, of the same layers, the weights of `source`."""
    target.set_weights(source.get_weights())
    _settle(target)


def _settle(model: keras.Model) -> None:
    """Let layers that compute with figures derived from their weights derive them anew."""
    for layer in model._flatten_layers():
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()


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
