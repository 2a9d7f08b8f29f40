"""The U-Net (Ronneberger et al., 2015) that finds lungs: raw pixels -> probability of lung for every pixel.

Its sizes follow from a configuration without Keras; Keras builds it when asked to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cxr_models.network import dropout_by_variable
from cxr_models.trial import TrialConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    import keras

KERNEL = 3  # of the blocks' convolutions
STEP = 2  # by which a level is smaller than the one above it


class Block(NamedTuple):
    """Two convolutions at one resolution.

    Attributes:
        side: of its square output, in pixels.
        inputs: channels of its input; on the way up, those of the upsampled input and of the skip together.
        filters: channels of its output.
        below: channels that are upsampled for it; 0 on the way down.
    """

    side: int
    inputs: int
    filters: int
    below: int = 0

    @property
    def parameters(self) -> int:
        """Of the convolutions, and of the transposed one in front of them."""
        convolutions = (KERNEL**2 * self.inputs + 1 + KERNEL**2 * self.filters + 1) * self.filters
        return convolutions + (STEP**2 * self.below + 1) * self.filters * bool(self.below)

    @property
    def elements(self) -> int:
        """Numbers that its layers put out for one image: convolutions, and pooling or upsampling and concatenation."""
        resized = self.filters + self.inputs if self.below else self.filters / STEP**2
        return int(self.side**2 * (2 * self.filters + resized))

    @property
    def work(self) -> int:
        """Multiply-accumulates of one image."""
        return self.side**2 * self.parameters


def blocks(config: TrialConfig, channels: int) -> tuple[Block, ...]:
    """Every block from the input to the output."""
    side, filters, depth = config.image_side, config.unet_filters, config.unet_depth
    widths = [channels, *(filters * STEP**level for level in range(depth + 1))]
    down = [Block(side // STEP**level, widths[level], widths[level + 1]) for level in range(depth + 1)]
    up = [Block(above.side, 2 * above.filters, above.filters, STEP * above.filters) for above in reversed(down[:-1])]
    return (*down, *up)


def count_parameters(config: TrialConfig, channels: int) -> int:
    """The U-Net's parameters, all of which train, without building it."""
    return sum(block.parameters for block in blocks(config, channels)) + config.unet_filters + 1


def side_problem(side: int, depth: int) -> str:
    """Why a U-Net of this depth cannot take images of this side; empty if it can."""
    if side % STEP**depth == 0:
        return ""
    lower = side // STEP**depth * STEP**depth
    near = " or ".join(str(fitting) for fitting in (lower, lower + STEP**depth) if fitting)
    return f"a U-Net of unet_depth {depth} needs a side divisible by {STEP**depth}, such as {near}; got {side}"


@dataclass(frozen=True, eq=False)
class UNet:
    """A U-Net that serves many trials: their first weights are put in, see `reset`.

    Attributes:
        model: raw pixels 0 to 255, float32 (images, side, side, channels) -> probability of lung
            (images, side, side, 1).
        logits: the same layers without the final activation.
        dropout: the rate behind the bottleneck; a variable, so that another rate is no other program.
    """

    model: keras.Model
    logits: keras.Model
    dropout: keras.Variable

    def reset(self, seed: int, dropout: float) -> None:
        """Put a trial's first weights in: He's normal ones, which follow from the seed alone, and no biases."""
        import keras

        for place, variable in enumerate(self.logits.trainable_variables):
            (key,) = np.random.SeedSequence((seed, place)).generate_state(1)
            kernel = len(variable.shape) > 1
            first = keras.initializers.HeNormal(int(key)) if kernel else keras.initializers.Zeros()
            variable.assign(first(variable.shape, dtype=variable.dtype))
        self.dropout.assign(dropout)


def build_unet(config: TrialConfig, channels: int) -> UNet:
    """Build the U-Net of a trial with its first weights."""
    import keras

    rate = keras.Variable(config.dropout, dtype="float32", trainable=False, name="dropout")
    unet = UNet(*_models(config, channels, dropout_by_variable(rate)), rate)
    unet.reset(config.seed, config.dropout)
    return unet


def export_unet(unet: UNet, config: TrialConfig, channels: int) -> keras.Model:
    """The U-Net as a model of Keras' own layers only, which loads without this package."""
    import keras

    model, logits = _models(config, channels, lambda name: keras.layers.Dropout(config.dropout, name=name))
    for ours, theirs in zip(unet.logits.trainable_variables, logits.trainable_variables, strict=True):
        theirs.assign(ours)
    return model


def _models(
    config: TrialConfig, channels: int, dropout: Callable[[str], keras.Layer]
) -> tuple[keras.Model, keras.Model]:
    """(probabilities, logits) on the same layers."""
    import keras

    inputs = keras.Input((config.image_side, config.image_side, channels), dtype="float32", name="pixels")
    x = keras.layers.Rescaling(1 / 255, name="to_unit")(inputs)
    *levels, bottom = (config.unet_filters * STEP**level for level in range(config.unet_depth + 1))
    skips: list[keras.KerasTensor] = []
    for level, filters in enumerate(levels, start=1):
        x = _convolved(x, filters, f"down_{level}")
        skips.append(x)
        x = keras.layers.MaxPooling2D(STEP, name=f"down_{level}_pool")(x)
    x = dropout("bottleneck_dropout")(_convolved(x, bottom, "bottleneck"))
    for level, filters, skip in reversed(list(zip(range(1, len(levels) + 1), levels, skips, strict=True))):
        x = keras.layers.Conv2DTranspose(filters, STEP, strides=STEP, name=f"up_{level}")(x)
        x = keras.layers.Concatenate(name=f"up_{level}_skip")([x, skip])
        x = _convolved(x, filters, f"up_{level}")
    logits = keras.layers.Conv2D(1, 1, name="logits")(x)
    outputs = keras.layers.Activation("sigmoid", name="probabilities")(logits)
    return keras.Model(inputs, outputs, name="unet"), keras.Model(inputs, logits)


def _convolved(x: keras.KerasTensor, filters: int, name: str) -> keras.KerasTensor:
    import keras

    for index in (1, 2):
        layer = keras.layers.Conv2D(filters, KERNEL, padding="same", activation="relu", name=f"{name}_conv_{index}")
        x = layer(x)
    return x
