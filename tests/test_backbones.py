"""The contract every backbone keeps: its row, its input range, its layers and what freezing does to it.

What needs a built network runs for one backbone a family; those that take long to build run with the slow tests.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import keras
import numpy as np
import pytest

from cxr_models import network
from cxr_models.backbones import (
    BACKBONES,
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    Backbone,
    InputRange,
    build_backbone,
    load_backbone_weights,
)
from cxr_models.cuts import Cut, choose_cut, cut_layers
from cxr_models.epochs import dropout_seeds, make_optimizer
from cxr_models.extraction import extract_backbone
from cxr_models.freezing import (
    Treatment,
    count_parameters,
    decide,
    frozen_layers,
    main_convolutions,
    parse_strategy,
    strategy_problem,
)
from cxr_models.layer_table import LayerTable, read_table, weight_problems
from cxr_models.network import Network, build_network, export_model
from cxr_models.steps import Settings, Steps
from cxr_models.trial import TrialConfig
from tests.networks import save_as_keras_ships

FAMILIES = (
    "mobilenet_v2_0.35",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "efficientnet_v2_b0",
    "resnet50",
    "resnet50_v2",
    "densenet121",
    "inception_v3",
    "xception",
    "convnext_tiny",
    "vgg16",
    "vanilla_cnn",
)
QUICK = ("mobilenet_v2_0.35", "vanilla_cnn")
RULES = ("all", "none", "first:5", "last:5", "fraction:0.5", "stages:1", "stages:2", "convs:1", "convs:2", "convs:3")

each_row = pytest.mark.parametrize("row", BACKBONES.values(), ids=BACKBONES)


@cache
def table_of(row: Backbone) -> LayerTable:
    return read_table(row, build_backbone(row, row.smallest_side))


def config_of(name: str, **values: object) -> TrialConfig:
    return TrialConfig(
        **{
            "backbone": name,
            "image_side": BACKBONES[name].smallest_side,
            "batch_size": 8,
            "hidden_units": (16,),
            **values,
        }
    )


def grey_images(built: Network) -> np.ndarray:
    side = built.table.image_side
    return np.random.default_rng(0).integers(0, 256, (8, side, side, 1)).astype(np.uint8)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FAMILIES]
)
def built(request) -> Network:
    """A network that all tests of a family share; each puts in the weights it wants."""
    return build_network(config_of(request.param), classes=3, channels=1)


class TestRow:
    @each_row
    def test_counts_are_those_of_what_keras_builds(self, row):
        table = table_of(row)
        assert len(table.layers) == row.layers
        if row.convolutions:
            assert len(main_convolutions(row, table)) == row.convolutions

    @each_row
    def test_a_side_that_is_too_small_cannot_be_built(self, row):
        with pytest.raises(ValueError, match=r"(?i)at least|negative|size"):
            build_backbone(row, row.smallest_side - 1)

    @each_row
    def test_each_stage_has_a_resolution_of_its_own(self, row):
        """A stage's resolution is that of its last convolution, sum or concatenation on the main path."""
        layers = table_of(row).layers
        names = [layer.name for layer in layers]
        starts = [names.index(start) for start in row.stage_starts]
        assert starts[0] == 0
        assert starts == sorted(set(starts))
        main = {*main_convolutions(row, table_of(row))}
        main |= {place for place, layer in enumerate(layers) if layer.kind in ("Add", "Concatenate")}
        sides = [
            next(layers[place].output[0] for place in range(end - 1, start - 1, -1) if place in main)
            for start, end in pairwise([*starts, len(layers)])
        ]
        assert sides == sorted(set(sides), reverse=True)

    def test_names_are_the_same_whatever_was_built_before(self):
        """Keras numbers the layers that an application leaves unnamed."""
        for name in ("mobilenet_v3_small", "convnext_tiny"):
            row = BACKBONES[name]
            assert read_table(row, build_backbone(row, row.smallest_side)) == table_of(row)

    @each_row
    def test_a_table_is_small_and_survives_being_stored(self, row):
        text = table_of(row).to_json()
        assert LayerTable.from_json(text) == table_of(row)
        assert len(text) < 100_000

    @each_row
    def test_every_layer_is_read_by_a_later_one(self, row):
        """The graph is whole, past operations that are no layers, so that what a cut needs can be told."""
        layers = table_of(row).layers
        places = {layer.name: place for place, layer in enumerate(layers)}
        assert all(places[read] < place for place, layer in enumerate(layers) for read in layer.inputs)
        assert {read for layer in layers for read in layer.inputs} == places.keys() - {layers[-1].name}
        assert {layer.name for layer in layers if not layer.inputs} == {"input_layer"}
        assert len(cut_layers(table_of(row))) > len(row.stage_starts)


# What the first layer that has weights is given, of pixels 0 to 255.
def symmetric(pixels: np.ndarray) -> np.ndarray:
    return pixels / 127.5 - 1


def standardized(pixels: np.ndarray) -> np.ndarray:
    return (pixels / 255 - IMAGENET_MEAN) / IMAGENET_DEVIATION


INSIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mobilenet_v3_small": symmetric,
    "mobilenet_v3_large": symmetric,
    **dict.fromkeys(("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3"), lambda x: x / 255),
    "efficientnet_v2_b0": standardized,
    "efficientnet_v2_s": lambda pixels: pixels / 128 - 1,
    "convnext_tiny": standardized,
}


class TestInputRange:
    @each_row
    def test_pixels_are_prepared_as_the_application_does_it(self, row):
        """Compared with keras.applications' own preprocessing, from raw RGB pixels; 0, 127.5 and 255 among them."""
        pixels = np.random.default_rng(1).uniform(0, 255, (4, 8, 8, 3)).astype(np.float32)
        pixels[1:] = np.array([0.0, 127.5, 255.0]).reshape(3, 1, 1, 1)
        inputs = keras.Input((8, 8, 3))
        scaled = keras.Model(inputs, network._scaled(inputs, row.input_range))(pixels).numpy()
        if not row.application:
            expected = pixels / 255
        else:
            module = getattr(keras.applications, _module(row))
            expected = module.preprocess_input(pixels.copy())
        np.testing.assert_allclose(scaled, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))

    @each_row
    def test_only_a_backbone_that_is_given_raw_pixels_scales_inside(self, row):
        scaling = [layer.kind for layer in table_of(row).layers if layer.kind in ("Rescaling", "Normalization")]
        assert bool(scaling) == (row.input_range is InputRange.RAW)
        assert (row.name in INSIDE) == (row.input_range is InputRange.RAW)

    @pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_b0"])
    def test_what_is_scaled_inside_arrives_in_range(self, name):
        self._check_inside(name)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", sorted(INSIDE.keys()))
    def test_what_any_backbone_scales_inside_arrives_in_range(self, name):
        self._check_inside(name)

    def _check_inside(self, name: str) -> None:
        model = build_backbone(BACKBONES[name], 32)
        last = [layer for layer in model.layers if type(layer).__name__ in ("Rescaling", "Normalization")][-1]
        pixels = np.repeat(np.array([0.0, 127.5, 255.0], np.float32), 32 * 32 * 3).reshape(3, 32, 32, 3)
        arrived = keras.Model(model.inputs, last.output)(pixels).numpy()
        np.testing.assert_allclose(arrived, INSIDE[name](pixels), atol=1e-5)

    def test_every_input_range_is_in_use(self):
        assert {row.input_range for row in BACKBONES.values()} == set(InputRange)


def _module(row: Backbone) -> str:
    """The module of `keras.applications` a row's preprocessing lies in."""
    modules = {
        "MobileNetV2": "mobilenet_v2",
        "MobileNetV3": "mobilenet_v3",
        "EfficientNetB": "efficientnet",
        "EfficientNetV2": "efficientnet_v2",
        "ResNet50V2": "resnet_v2",
        "ResNet50": "resnet",
        "DenseNet": "densenet",
        "InceptionV3": "inception_v3",
        "Xception": "xception",
        "ConvNeXt": "convnext",
        "VGG16": "vgg16",
    }
    return next(module for begin, module in modules.items() if row.application.startswith(begin))


class TestStrategies:
    @each_row
    @pytest.mark.parametrize("batch_norm", ["frozen", "affine", "train"])
    def test_every_layer_is_decided(self, row, batch_norm):
        table = table_of(row)
        fitting = [rule for rule in RULES if not strategy_problem(parse_strategy(rule), row)]
        assert len(fitting) == len(RULES) - (0 if row.convolutions else 3)
        for rule in fitting:
            phase = parse_strategy(rule).phases[0]
            decision = decide(phase, row, table, batch_norm)
            assert list(decision) == [layer.name for layer in table.layers]
            boundary = frozen_layers(phase, row, table)
            for index, layer in enumerate(table.layers):
                expected = Treatment.TRAINS
                if index < boundary or (layer.is_batch_norm and batch_norm == "frozen"):
                    expected = Treatment.FROZEN
                elif layer.is_batch_norm and batch_norm == "affine":
                    expected = Treatment.AFFINE
                assert decision[layer.name] is expected
            assert sum(count_parameters(decision, table)) == table.parameters

    @pytest.mark.parametrize(("name", "stages"), [("inception_v3", 5), ("convnext_tiny", 4)])
    def test_convolutions_are_not_counted_where_they_do_not_lie_in_one_line(self, name, stages):
        problem = strategy_problem(parse_strategy("all>convs:1"), BACKBONES[name])
        assert f"'convs:1' does not fit {name}, whose convolutions do not lie one behind the other" in problem
        assert problem.endswith(f"use stages:1 to stages:{stages}")
        assert not strategy_problem(parse_strategy(f"all>stages:{stages}"), BACKBONES[name])

    @pytest.mark.parametrize(
        ("name", "rule", "first_trained"),
        [
            ("mobilenet_v2_0.35", "convs:1", "Conv_1"),
            ("mobilenet_v2_0.35", "convs:2", "block_16_project"),
            ("mobilenet_v2_0.35", "convs:3", "block_16_depthwise"),
            ("mobilenet_v2_0.35", "stages:1", "block_13_expand"),
            ("mobilenet_v2_0.35", "stages:2", "block_6_expand"),
            ("mobilenet_v3_small", "convs:2", "expanded_conv_10_project"),
            ("mobilenet_v3_small", "convs:3", "expanded_conv_10_depthwise"),  # squeeze-excite does not count
            ("mobilenet_v3_large", "stages:1", "expanded_conv_12_expand"),
            ("efficientnet_b0", "convs:2", "block7a_project_conv"),
            ("efficientnet_b0", "convs:3", "block7a_dwconv"),  # squeeze-excite does not count
            ("efficientnet_b0", "stages:1", "block6a_expand_conv"),
            ("efficientnet_b3", "stages:1", "block6a_expand_conv"),
            ("efficientnet_v2_s", "stages:1", "block6a_expand_conv"),
            ("resnet50", "convs:3", "conv5_block3_1_conv"),
            ("resnet50", "convs:9", "conv5_block1_1_conv"),  # the shortcut of block 1 does not count
            ("resnet50", "stages:1", "conv5_block1_1_conv"),
            ("resnet50_v2", "convs:9", "conv5_block1_1_conv"),
            ("resnet50_v2", "stages:1", "conv4_block6_preact_bn"),
            ("densenet121", "convs:1", "conv5_block16_2_conv"),
            ("densenet121", "stages:1", "conv5_block1_0_bn"),
            ("inception_v3", "stages:1", "conv2d_72"),
            ("xception", "convs:4", "block13_sepconv1"),  # the shortcut does not count
            ("xception", "stages:1", "block13_sepconv1_act"),
            ("convnext_tiny", "stages:1", "convnext_tiny_downsampling_block_2"),
            ("vgg16", "convs:3", "block5_conv1"),
            ("vgg16", "stages:1", "block5_conv1"),
            ("vanilla_cnn", "stages:1", "conv_4"),
        ],
    )
    def test_where_the_trainable_part_begins(self, name, rule, first_trained):
        row = BACKBONES[name]
        boundary = frozen_layers(parse_strategy(rule).phases[0], row, table_of(row))
        assert table_of(row).layers[boundary].name == first_trained


class TestNetwork:
    def test_plan_and_network_count_the_same_parameters(self, built):
        for freeze in ("all", "stages:1", "none"):
            for batch_norm in ("frozen", "train"):
                phase = parse_strategy(freeze).phases[0]
                built.enter(phase, batch_norm)
                trainable = sum(int(np.prod(weight.shape)) for weight in built.model.trainable_weights)
                counted = network.count_parameters(
                    config_of(built.table.backbone, batch_norm=batch_norm), phase, built.table, 3
                )
                assert counted == (trainable, built.model.count_params() - trainable)

    def test_a_frozen_backbone_is_the_same_function_in_training(self, built):
        """EfficientNet's stochastic depth stays on in training unless it is switched off; the frozen part must not."""
        built.enter(parse_strategy("all").phases[0], "frozen")
        images = grey_images(built).repeat(3, axis=-1).astype(np.float32)
        inference = built.backbone(images, training=False).numpy()
        np.testing.assert_array_equal(inference, built.backbone(images, training=True).numpy())

    def test_prefix_and_suffix_are_the_network(self, built):
        """At the cut of `stages:1` and at the first that lies in the middle, whatever the mode."""
        row, layers = BACKBONES[built.table.backbone], built.table.layers
        images = grey_images(built).astype(np.float32)
        phases = parse_strategy("stages:1").phases
        built.enter(phases[0], "frozen")
        middle, last = layers[cut_layers(built.table)[len(cut_layers(built.table)) // 2]], layers[-1]
        chosen = choose_cut(phases, row, built.table, pooling="average", taps=1, head_parameters=0)
        cuts = [
            Cut(middle.name, "", middle.output),
            Cut(last.name, "", last.output),
            Cut(last.name, "average", last.output[-1:]),
            *([chosen] if chosen else []),
        ]
        whole = built.logits(images, training=False).numpy()
        prefix = built.prefix(cuts)
        for cut, found in zip(cuts, prefix(images, training=False), strict=True):
            assert found.shape == (8, *cut.shape)
            np.testing.assert_array_equal(built.suffix(cut)(found, training=False).numpy(), whole, err_msg=cut.name)
        if chosen:
            kept = prefix(images, training=False)[-1].numpy()
            np.testing.assert_array_equal(prefix(images, training=True)[-1].numpy(), kept)
        assert built.suffix(None) is built.logits

    def test_first_weights_follow_from_the_seed_and_are_drawn_as_keras_draws_them(self, built):
        first, *others = (_reset(built, seed) for seed in (0, 1, 0))
        theirs = build_backbone(BACKBONES[built.table.backbone], built.table.image_side)
        drawn = 0
        for mine, keras_own in zip(built.backbone.weights, theirs.weights, strict=True):
            assert mine.name == keras_own.name
            np.testing.assert_array_equal(first[mine.path], others[1][mine.path])
            if mine.name.endswith("kernel"):
                drawn += 1
                assert (first[mine.path] != others[0][mine.path]).mean() > 0.99
                if mine.value.shape.num_elements() >= 200:
                    assert first[mine.path].std() == pytest.approx(keras_own.numpy().std(), rel=0.25)
            else:
                np.testing.assert_array_equal(first[mine.path], keras_own.numpy())
        assert drawn >= 4
        kernels = [weight.numpy() for weight in built.backbone.weights if weight.name.endswith("kernel")]
        shapes = [kernel.shape for kernel in kernels]
        twins = [index for index, shape in enumerate(shapes) if shape in shapes[:index]]
        assert all((kernels[index] != kernels[shapes.index(shapes[index])]).any() for index in twins)

    def test_a_saved_model_predicts_the_same_and_gives_its_backbone_back(self, built, tmp_path):
        name = built.table.backbone
        row, images = BACKBONES[name], grey_images(built).astype(np.float32)
        built.reset(3, 0.0)
        export_model(built, config_of(name), 3).save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
        assert {type(layer).__module__.partition(".")[0] for layer in loaded._flatten_layers()} == {"keras"}
        np.testing.assert_allclose(
            loaded.predict(images, verbose=0), built.model.predict(images, verbose=0), rtol=1e-5, atol=1e-6
        )
        extract_backbone(tmp_path / "model.keras", row, built.table, tmp_path / "taken.weights.h5")
        self._load_and_compare(built, tmp_path / "taken.weights.h5")

    def test_files_as_keras_ships_them_are_loaded(self, built, tmp_path):
        built.reset(4, 0.0)
        save_as_keras_ships(built.backbone, tmp_path / "shipped_notop.h5")
        self._load_and_compare(built, tmp_path / "shipped_notop.h5")

    def _load_and_compare(self, built: Network, path: Path) -> None:
        row = BACKBONES[built.table.backbone]
        assert weight_problems(built.table, path) == ""
        other = build_backbone(row, built.table.image_side)
        load_backbone_weights(row, other, path)
        for expected, found in zip(built.backbone.weights, other.weights, strict=True):
            np.testing.assert_array_equal(found.numpy(), expected.numpy(), err_msg=expected.path)

    @pytest.mark.parametrize(
        ("freeze", "batch_norm"), [("all", "frozen"), ("stages:1", "frozen"), ("stages:1", "train"), ("none", "frozen")]
    )
    def test_exactly_the_weights_that_should_move_have_moved(self, built, freeze, batch_norm):
        check_what_moves(built, freeze, batch_norm)


def test_with_fixed_statistics_gamma_and_beta_move_and_nothing_else_of_a_batch_norm():
    config = config_of("mobilenet_v2_0.35", batch_norm="affine")
    check_what_moves(build_network(config, classes=3, channels=1), "stages:1", "affine")


def check_what_moves(built: Network, freeze: str, batch_norm: str) -> None:
    """Three steps at a rate at which every weight that has a gradient moves."""
    built.reset(0, 0.0)
    phase = parse_strategy(freeze).phases[0]
    built.enter(phase, batch_norm)
    spread_weights(built.backbone)
    before = {weight.path: weight.numpy().copy() for weight in built.model.weights}
    steps = Steps(built, None, make_optimizer("adam"))
    steps.begin(Settings())
    seeds = np.stack([dropout_seeds((0, 1, step), steps.dropout_layers) for step in range(3)])
    labels, weights = (np.arange(8) % 3).astype(np.int32), np.ones(8, np.float32)
    steps.train(
        *(np.stack([given] * 3) for given in (grey_images(built), labels, weights)), seeds, np.full(3, 0.05, np.float32)
    )
    moved = {weight.path for weight in built.model.weights if (weight.numpy() != before[weight.path]).any()}
    assert moved == expected_to_move(built, decide(phase, BACKBONES[built.table.backbone], built.table, batch_norm))


def spread_weights(backbone: keras.Model) -> None:
    """Random weights of a size at which every relu passes some gradient."""
    generator = np.random.default_rng(2)
    for layer in backbone.layers:
        if type(layer).__name__.endswith(("BatchNormalization", "FixedStatistics")):
            size = layer.beta.shape
            layer.beta.assign(generator.uniform(-0.2, 0.2, size))
            if layer.gamma is not None:
                layer.gamma.assign(generator.uniform(0.8, 1.2, size))


def expected_to_move(built: Network, decision: dict[str, str]) -> set[str]:
    expected = {weight.path for layer in built.head for weight in layer.weights}
    for row, layer in zip(built.table.layers, built.backbone.layers, strict=True):
        treatment = decision[row.name]
        for weight, trainable in zip(layer.weights, row.trainable, strict=True):
            statistics = row.is_batch_norm and not trainable
            if (treatment != "frozen" and trainable) or (treatment == "trains" and statistics):
                expected.add(weight.path)
    return expected


def _reset(built: Network, seed: int) -> dict[str, np.ndarray]:
    built.reset(seed, 0.0)
    return {weight.path: weight.numpy() for weight in built.model.weights}
