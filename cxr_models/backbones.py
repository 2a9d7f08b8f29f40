"""The backbones: one row each, with the input range its pretrained weights expect and its stages.

A row holds what the published architecture fixes. Layers are counted and named as `keras.applications` lists them.
This module builds models with Keras only when asked to; reading the rows needs nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

# Means and deviations of the ImageNet training images, RGB, as keras.applications uses them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
CENTRED_BGR_MEAN = (103.939, 116.779, 123.68)

BUNDLED_FOLDER = Path(__file__).parent / "bundled"


class InputRange(StrEnum):
    """What a backbone expects in place of raw pixels; the network does the conversion itself."""

    RAW = "0 to 255"  # the backbone rescales inside (EfficientNet)
    SYMMETRIC = "-1 to 1"  # mode `tf` of keras.applications
    STANDARDIZED = "ImageNet mean 0, deviation 1, RGB"  # mode `torch`
    CENTRED_BGR = "ImageNet mean 0, BGR"  # mode `caffe`
    UNIT = "0 to 1"


@dataclass(frozen=True)
class Backbone:
    """One backbone.

    Attributes:
        application: its name in `keras.applications`, empty for a network of our own.
        input_range: what its first layer must be given.
        stage_starts: the first layer of each stage; the layers in front of the second are the first stage. One stage
            per resolution of the main path.
        layers: how many there are, the input layer included.
        convolutions: how many lie on the main path; `convs:K` counts these.
        imagenet_file: name Keras gives the file of ImageNet weights, `{side}` being the side they were trained at;
            empty where there are none.
        smallest_side: the smallest image side the architecture accepts, in pixels.
        alpha: width multiplier of MobileNetV2.
        side_convolutions: regular expression of convolutions off the main path (squeeze-excite, shortcuts), which
            `convs:K` does not count.
        bundled_file: weights of our own that lie in the package, pretrained on phantoms (`pretraining.py`).
        imagenet_deviations: the ImageNet file's input normalization holds deviations in the place of variances.
    """

    name: str
    application: str
    input_range: InputRange
    stage_starts: tuple[str, ...]
    layers: int
    convolutions: int
    imagenet_file: str = ""
    smallest_side: int = 32
    alpha: float | None = None
    side_convolutions: str = ""
    bundled_file: str = ""
    imagenet_deviations: bool = False

    @property
    def pretrained(self) -> bool:
        """Whether weights other than random ones exist for it."""
        return bool(self.imagenet_file or self.bundled_file)

    @property
    def bundled_path(self) -> Path | None:
        return BUNDLED_FOLDER / self.bundled_file if self.bundled_file else None

    def imagenet_name(self, side: int) -> str:
        """File name of the ImageNet weights Keras uses at `side` pixels.

        MobileNetV2 has weights for five sides; at any other side Keras takes those of 224.
        """
        return self.imagenet_file.format(side=side if side in (96, 128, 160, 192, 224) else 224)


def _mobilenet_v2(alpha: float) -> Backbone:
    return Backbone(
        name=f"mobilenet_v2_{alpha}",
        application="MobileNetV2",
        input_range=InputRange.SYMMETRIC,
        stage_starts=("input_layer", "block_1_expand", "block_3_expand", "block_6_expand", "block_13_expand"),
        layers=154,
        convolutions=52,
        imagenet_file=f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{alpha}_{{side}}_no_top.h5",
        alpha=alpha,
        bundled_file="mobilenet_v2_0.35_phantom_notop.weights.h5" if alpha == 0.35 else "",
    )


_ROWS = (
    *(_mobilenet_v2(alpha) for alpha in (0.35, 0.5, 0.75, 1.0, 1.3, 1.4)),
    Backbone(
        name="efficientnet_b0",
        application="EfficientNetB0",
        input_range=InputRange.RAW,
        stage_starts=(
            "input_layer",
            "block2a_expand_conv",
            "block3a_expand_conv",
            "block4a_expand_conv",
            "block6a_expand_conv",
        ),
        layers=237,
        convolutions=49,
        imagenet_file="efficientnetb0_notop.h5",
        side_convolutions=r"_se_(reduce|expand)$",
        imagenet_deviations=True,
    ),
    Backbone(
        name="resnet50",
        application="ResNet50",
        input_range=InputRange.CENTRED_BGR,
        stage_starts=(
            "input_layer",
            "conv2_block1_1_conv",
            "conv3_block1_1_conv",
            "conv4_block1_1_conv",
            "conv5_block1_1_conv",
        ),
        layers=175,
        convolutions=49,
        imagenet_file="resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        side_convolutions=r"_0_conv$",
    ),
    Backbone(
        name="densenet121",
        application="DenseNet121",
        input_range=InputRange.STANDARDIZED,
        stage_starts=(
            "input_layer",
            "conv2_block1_0_bn",
            "conv3_block1_0_bn",
            "conv4_block1_0_bn",
            "conv5_block1_0_bn",
        ),
        layers=427,
        convolutions=120,
        imagenet_file="densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    Backbone(
        name="vanilla_cnn",
        application="",
        input_range=InputRange.UNIT,
        stage_starts=("input_layer", "conv_2", "conv_3", "conv_4"),
        layers=9,
        convolutions=4,
        smallest_side=70,
    ),
)
BACKBONES: Mapping[str, Backbone] = {row.name: row for row in _ROWS}


def build_backbone(backbone: Backbone, side: int) -> keras.Model:
    """Build the backbone with random weights, for input (side, side, 3) in its own `input_range`.

    Layer names do not depend on what was built before in the process: Keras numbers the layers an application leaves
    unnamed, and the numbering starts anew.
    """
    import keras

    keras.backend.clear_session()
    if not backbone.application:
        return _vanilla_cnn(side)
    arguments = {} if backbone.alpha is None else {"alpha": backbone.alpha}
    application = getattr(keras.applications, backbone.application)
    # Keras ties the shape to the weights it would download; we load weights ourselves, so any side is fine.
    return application(input_shape=(side, side, 3), include_top=False, weights=None, **arguments)


def _vanilla_cnn(side: int) -> keras.Model:
    """The four convolutions of a small chest X-ray study (324 images), trained from scratch."""
    import keras

    inputs = keras.Input((side, side, 3), name="input_layer")
    x = inputs
    for index, (filters, kernel, pool) in enumerate(((32, 5, 3), (64, 3, 2), (128, 3, 2), (128, 3, 2)), start=1):
        x = keras.layers.Conv2D(filters, kernel, activation="relu", name=f"conv_{index}")(x)
        x = keras.layers.MaxPooling2D(pool, name=f"pool_{index}")(x)
    return keras.Model(inputs, x, name="vanilla_cnn")


def load_backbone_weights(backbone: Backbone, model: keras.Model, path: Path) -> None:
    """Load a `.weights.h5` file or one of Keras' own `.h5` files of ImageNet weights into `model`."""
    model.load_weights(path)
    if backbone.imagenet_deviations and path.name == backbone.imagenet_name(model.input_shape[1]):
        # The file holds deviations where the layer expects variances. Keras mends that by dividing once more, in a
        # further layer, but only when it fetches the file itself; here the factor goes into the variance.
        normalization = next(layer for layer in model.layers if type(layer).__name__ == "Normalization")
        normalization.adapt_variance.assign(normalization.adapt_variance * list(IMAGENET_DEVIATION))
        normalization.finalize_state()
