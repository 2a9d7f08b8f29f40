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

import numpy as np

if TYPE_CHECKING:
    import keras

# Means and deviations of the ImageNet training images, RGB, as keras.applications uses them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
CENTRED_BGR_MEAN = (103.939, 116.779, 123.68)

BUNDLED_FOLDER = Path(__file__).parent / "bundled"


class InputRange(StrEnum):
    """What a backbone expects in place of raw pixels; the network does the conversion itself."""

    RAW = "0 to 255"  # the backbone rescales inside (MobileNetV3, EfficientNet, ConvNeXt)
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
        convolutions: how many lie on the main path; `convs:K` counts these. 0 where they do not lie in one line, and
            `convs:K` means nothing.
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


def _mobilenet_v3(size: str, *, starts: tuple[str, ...], layers: int, convolutions: int) -> Backbone:
    return Backbone(
        name=f"mobilenet_v3_{size}",
        application=f"MobileNetV3{size.capitalize()}",
        input_range=InputRange.RAW,
        stage_starts=("input_layer", *starts),
        layers=layers,
        convolutions=convolutions,
        imagenet_file=f"weights_mobilenet_v3_{size}_224_1.0_float_no_top_v2.h5",
        side_convolutions=r"_squeeze_excite_conv(_1)?$",
    )


def _efficientnet(version: str, *, layers: int, convolutions: int) -> Backbone:
    """EfficientNet B0 to B3, or V2 as `v2_b0` and the like."""
    second = version.startswith("v2_")
    return Backbone(
        name=f"efficientnet_{version}",
        application=f"EfficientNet{version.replace('_', '').upper()}",
        input_range=InputRange.RAW,
        stage_starts=(
            "input_layer",
            "block2a_expand_conv",
            "block3a_expand_conv",
            "block4a_expand_conv",
            "block6a_expand_conv",
        ),
        layers=layers,
        convolutions=convolutions,
        imagenet_file=f"efficientnet{version.replace('_', '-')}_notop.h5",
        side_convolutions=r"_se_(reduce|expand)$",
        imagenet_deviations=not second,
    )


_ROWS = (
    *(_mobilenet_v2(alpha) for alpha in (0.35, 0.5, 0.75, 1.0, 1.3, 1.4)),
    _mobilenet_v3(
        "small",
        starts=(
            "expanded_conv_depthwise_pad",
            "expanded_conv_1_expand",
            "expanded_conv_3_expand",
            "expanded_conv_8_expand",
        ),
        layers=157,
        convolutions=34,
    ),
    _mobilenet_v3(
        "large",
        starts=(
            "expanded_conv_1_expand",
            "expanded_conv_3_expand",
            "expanded_conv_6_expand",
            "expanded_conv_12_expand",
        ),
        layers=187,
        convolutions=46,
    ),
    _efficientnet("b0", layers=237, convolutions=49),
    _efficientnet("b1", layers=339, convolutions=69),
    _efficientnet("b2", layers=339, convolutions=69),
    _efficientnet("b3", layers=384, convolutions=78),
    _efficientnet("v2_b0", layers=270, convolutions=59),
    _efficientnet("v2_s", layers=513, convolutions=110),
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
        name="resnet50_v2",
        application="ResNet50V2",
        input_range=InputRange.SYMMETRIC,
        # Unlike the first version, the last block of a group halves, not the first of the next.
        stage_starts=(
            "input_layer",
            "conv2_block1_preact_bn",
            "conv2_block3_preact_bn",
            "conv3_block4_preact_bn",
            "conv4_block6_preact_bn",
        ),
        layers=190,
        convolutions=49,
        imagenet_file="resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
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
        name="inception_v3",
        application="InceptionV3",
        input_range=InputRange.SYMMETRIC,
        # The first convolutions behind the two poolings, and of the blocks `mixed3` and `mixed8`.
        stage_starts=("input_layer", "conv2d_3", "conv2d_8", "conv2d_27", "conv2d_72"),
        layers=311,
        convolutions=0,
        imagenet_file="inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
        smallest_side=75,
    ),
    Backbone(
        name="xception",
        application="Xception",
        input_range=InputRange.SYMMETRIC,
        stage_starts=(
            "input_layer",
            "block2_sepconv1",
            "block3_sepconv1_act",
            "block4_sepconv1_act",
            "block13_sepconv1_act",
        ),
        layers=132,
        convolutions=36,
        imagenet_file="xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
        smallest_side=71,
        side_convolutions=r"^conv2d(_\d+)?$",
    ),
    Backbone(
        name="convnext_tiny",
        application="ConvNeXtTiny",
        input_range=InputRange.RAW,
        stage_starts=(
            "input_layer",
            "convnext_tiny_downsampling_block_0",
            "convnext_tiny_downsampling_block_1",
            "convnext_tiny_downsampling_block_2",
        ),
        layers=133,
        convolutions=0,
        imagenet_file="convnext_tiny_notop.h5",
    ),
    Backbone(
        name="vgg16",
        application="VGG16",
        input_range=InputRange.CENTRED_BGR,
        stage_starts=("input_layer", "block2_conv1", "block3_conv1", "block4_conv1", "block5_conv1"),
        layers=19,
        convolutions=13,
        imagenet_file="vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
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
    if backbone.imagenet_deviations:
        # Keras' file holds deviations where the layer expects variances. Keras mends that by dividing once more, in a
        # further layer, but only when it fetches the file itself; here the factor goes into the variance. By what it
        # holds, because the same file may come under another name.
        normalization = next(layer for layer in model.layers if type(layer).__name__ == "Normalization")
        variance = np.ravel(normalization.adapt_variance.numpy())
        if np.allclose(variance, IMAGENET_DEVIATION, rtol=1e-3):
            normalization.adapt_variance.assign(normalization.adapt_variance * list(IMAGENET_DEVIATION))
            normalization.finalize_state()
