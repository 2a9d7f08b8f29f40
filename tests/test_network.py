"""Networks: what goes into the backbone, what moves in training, what a saved model predicts."""

from dataclasses import replace
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras.src.applications import efficientnet
from keras.src.legacy.saving import legacy_h5_format

from cxr_models import layer_table, network
from cxr_models.backbones import (
    BACKBONES,
    CENTRED_BGR_MEAN,
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    InputRange,
    build_backbone,
    load_backbone_weights,
)
from cxr_models.cuts import Cut, choose_cut
from cxr_models.freezing import decide, parse_strategy
from cxr_models.layer_table import PACKAGED, LayerTable, layer_tables, read_table, weight_problems
from cxr_models.network import build_network, export_model
from cxr_models.steps import Settings, Steps
from cxr_models.training import dropout_seeds, make_optimizer
from cxr_models.trial import TrialConfig

FAMILIES = ("mobilenet_v2_0.35", "efficientnet_b0", "resnet50", "densenet121", "vanilla_cnn")


def config_of(name: str, **values: object) -> TrialConfig:
    side = max(32, BACKBONES[name].smallest_side)
    return TrialConfig(**{"backbone": name, "image_side": side, "batch_size": 8, **values})


def small_batch(config: TrialConfig, classes: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (8, config.image_side, config.image_side, 1)).astype(np.uint8)
    return images, (np.arange(8) % classes).astype(np.int32), np.ones(8, np.float32)


def test_the_vanilla_cnn_of_the_fourth_report():
    config = TrialConfig(
        backbone="vanilla_cnn", image_side=224, pooling="flatten", hidden_units=(128,), output="sigmoid"
    )
    built = build_network(config, classes=2, channels=3)
    assert built.model.count_params() == 1_045_441
    assert [layer.count_params() for layer in built.backbone.layers if layer.weights] == [2432, 18496, 73856, 147584]
    assert built.table.output == (7, 7, 128)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_backbone_gets_the_range_its_weights_expect(name):
    """Compared with keras.applications' own preprocessing, from raw RGB pixels."""
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (2, 8, 8, 3)).astype(np.float32)
    inputs = keras.Input((8, 8, 3))
    scaled = keras.Model(inputs, network._scaled(inputs, BACKBONES[name].input_range))
    modules = {
        "mobilenet_v2_0.35": keras.applications.mobilenet_v2,
        "efficientnet_b0": keras.applications.efficientnet,
        "resnet50": keras.applications.resnet,
        "densenet121": keras.applications.densenet,
    }
    expected = modules[name].preprocess_input(pixels.copy()) if name in modules else pixels / 255
    np.testing.assert_allclose(scaled.predict(pixels, verbose=0), expected, atol=1e-4)


def test_every_input_range_is_in_use_and_finite():
    assert {row.input_range for row in BACKBONES.values()} == set(InputRange)
    assert len(IMAGENET_MEAN) == len(IMAGENET_DEVIATION) == len(CENTRED_BGR_MEAN) == 3


def test_layer_names_are_the_same_on_a_second_build():
    for name in FAMILIES:
        row = BACKBONES[name]
        first, second = (read_table(row, build_backbone(row, 96)) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("stored", sorted(PACKAGED.glob("*.json")), ids=lambda path: path.stem)
def test_packaged_tables_are_what_keras_builds(stored):
    table = LayerTable.from_json(stored.read_text())
    row = BACKBONES[table.backbone]
    assert table == read_table(row, build_backbone(row, table.image_side))


def test_tables_that_are_not_packaged_are_made_by_one_child_and_kept(tmp_path, monkeypatch):
    wanted = [("vanilla_cnn", 80), ("vanilla_cnn", 88), ("vanilla_cnn", 96)]
    made = layer_tables(wanted, tmp_path)
    assert [table.image_side for table in made.values()] == [80, 88, 96]
    monkeypatch.setattr(layer_table.subprocess, "run", None)  # nothing is made a second time
    assert layer_tables(wanted, tmp_path) == made
    with pytest.raises(ValueError, match="needs an image side of at least 70, but got 60"):
        layer_tables([("vanilla_cnn", 60)], tmp_path)


# Three strategies for every family; those that take long to compile run with the slow tests.
QUICK = {(name, "convs:1") for name in FAMILIES} | {("mobilenet_v2_0.35", "all"), ("mobilenet_v2_0.35", "none")}
MOVING = [
    pytest.param(name, freeze, "frozen", marks=() if (name, freeze) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for freeze in ("all", "convs:1", "none")
]
MOVING += [("mobilenet_v2_0.35", "convs:2", "train"), ("mobilenet_v2_0.35", "stages:1", "affine")]


@pytest.mark.parametrize(("name", "freeze", "batch_norm"), MOVING)
def test_exactly_the_weights_that_should_move_have_moved(name, freeze, batch_norm):
    """One step of gradient descent without momentum; a weight whose gradient is zero by chance would be a failure."""
    config = config_of(name, freeze=freeze, batch_norm=batch_norm)
    built = build_network(config, classes=3, channels=1)
    phase = parse_strategy(freeze).phases[0]
    built.enter(phase, batch_norm)
    _spread_weights(built.backbone)
    before = {weight.path: weight.numpy().copy() for weight in built.model.weights}
    steps = Steps(built, None, make_optimizer("adam"))
    steps.begin(Settings())
    seeds = np.stack([dropout_seeds((0, 1, step), steps.dropout_seeds) for step in range(3)])
    steps.train(*(np.stack([given] * 3) for given in small_batch(config)), seeds, np.full(3, 0.05, np.float32))
    moved = {weight.path for weight in built.model.weights if not np.array_equal(weight.numpy(), before[weight.path])}
    assert moved == _expected_to_move(built, decide(phase, BACKBONES[name], built.table, batch_norm))


def _spread_weights(backbone: keras.Model) -> None:
    """Random weights of a size at which every relu passes some gradient."""
    generator = np.random.default_rng(2)
    for layer in backbone.layers:
        if type(layer).__name__.endswith(("BatchNormalization", "FixedStatistics")):
            size = layer.gamma.shape
            layer.gamma.assign(generator.uniform(0.8, 1.2, size))
            layer.beta.assign(generator.uniform(-0.2, 0.2, size))


def _expected_to_move(built: network.Network, decision: dict[str, str]) -> set[str]:
    expected = {weight.path for layer in built.head for weight in layer.weights}
    for row, layer in zip(built.table.layers, built.backbone.layers, strict=True):
        treatment = decision[row.name]
        for weight, trainable in zip(layer.weights, row.trainable, strict=True):
            statistics = row.is_batch_norm and not trainable
            if (treatment != "frozen" and trainable) or (treatment == "trains" and statistics):
                expected.add(weight.path)
    return expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_backbone_is_the_same_function_in_training(name):
    """EfficientNet's stochastic depth stays on in training unless it is switched off; the frozen part must not."""
    config = config_of(name)
    built = build_network(config, classes=3, channels=1)
    built.enter(parse_strategy("all").phases[0], "frozen")
    images = small_batch(config)[0].repeat(3, axis=-1).astype(np.float32)
    inference = keras.ops.convert_to_numpy(built.backbone(images, training=False))
    training = keras.ops.convert_to_numpy(built.backbone(images, training=True))
    np.testing.assert_array_equal(inference, training)


@pytest.mark.parametrize("name", ["mobilenet_v2_0.35", "efficientnet_b0"])
def test_prefix_and_suffix_are_the_network(name):
    """The prefix is the same function whenever it is run, in training mode too."""
    built = build_network(config_of(name, seed=2), classes=3, channels=1)
    images = small_batch(config_of(name))[0].astype(np.float32)
    phases = parse_strategy("stages:1").phases
    built.enter(phases[0], "frozen")
    last = built.table.layers[-1]
    cuts = [
        choose_cut(phases, BACKBONES[name], built.table, pooling="average", taps=1, head_parameters=0),
        Cut(last.name, "", last.output),
        Cut(last.name, "average", last.output[-1:]),
    ]
    assert "" not in {cut.layer for cut in cuts}
    prefix = built.prefix(cuts)
    stored = prefix(images, training=False)
    for cut, found in zip(cuts, stored, strict=True):
        assert found.shape == (8, *cut.shape)
        logits = built.suffix(cut)(found, training=False)
        np.testing.assert_allclose(logits, built.logits(images, training=False), rtol=1e-4, atol=1e-6)
    for _ in range(2):
        np.testing.assert_array_equal(prefix(images, training=True)[0], stored[0])
    assert built.suffix(None) is built.logits


LONG_TO_BUILD = ("efficientnet_b0", "resnet50", "densenet121")


class TestReset:
    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG_TO_BUILD)) for name in FAMILIES]
    )
    def test_first_weights_follow_from_the_seed_and_are_drawn_as_keras_draws_them(self, name):
        built = build_network(config_of(name, hidden_units=(16,)), classes=3, channels=1)
        first, *others = (_reset(built, seed) for seed in (0, 1, 0))
        theirs = build_backbone(BACKBONES[name], built.table.image_side)
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

    def test_weights_of_a_file_come_back_whatever_happened(self, tmp_path):
        row = BACKBONES["mobilenet_v2_0.35"]
        config = config_of("mobilenet_v2_0.35", seed=4)
        built = build_network(config, classes=3, channels=1, weights=row.bundled_path)
        first = {weight.path: weight.numpy() for weight in built.model.weights}
        for weight in built.model.weights:
            weight.assign(np.full(weight.shape, np.nan))
        after = _reset(built, 4)
        for path, expected in first.items():
            np.testing.assert_array_equal(after[path], expected)
        other = _reset(built, 5)
        changed = {path.split("/")[-2] for path in first if (other[path] != first[path]).any()}
        assert changed == {"logits"}
        loaded = build_backbone(row, config.image_side)
        load_backbone_weights(row, loaded, row.bundled_path)
        for expected, found in zip(loaded.weights, built.backbone.weights, strict=True):
            np.testing.assert_array_equal(found.numpy(), expected.numpy())

    def test_a_head_starts_the_same_on_every_strategy(self):
        """Pooling, output and hidden layers differ between shapes; dropout and freezing do not change first weights."""
        built = build_network(config_of("vanilla_cnn", seed=1), classes=3, channels=1)
        first = _reset(built, 1)
        built.enter(parse_strategy("convs:1").phases[0], "train")
        built.reset(1, 0.5)
        assert all((built_weight.numpy() == first[built_weight.path]).all() for built_weight in built.model.weights)
        assert float(built.head_dropout.numpy()) == 0.5


def _reset(built: network.Network, seed: int) -> dict[str, np.ndarray]:
    built.reset(seed, 0.0)
    return {weight.path: weight.numpy() for weight in built.model.weights}


def test_dropout_inside_the_backbone_comes_back_when_its_layers_train():
    config = config_of("efficientnet_b0")
    built = build_network(config, classes=3, channels=1)
    published = dict(built.dropout_rates)
    assert len(published) == 9
    assert min(published.values()) > 0
    for freeze, expected in (("all", dict.fromkeys(published, 0.0)), ("none", published)):
        built.enter(parse_strategy(freeze).phases[0], "frozen")
        assert {name: built.backbone.get_layer(name).rate for name in published} == expected


def test_fixed_statistics_are_the_same_function_in_inference(tmp_path):
    """EfficientNet's input normalization computes with figures derived from its weights; they must be copied too."""
    row = BACKBONES["efficientnet_b0"]
    source = build_backbone(row, 32)
    normalization = next(layer for layer in source.layers if type(layer).__name__ == "Normalization")
    normalization.adapt_mean.assign(list(IMAGENET_MEAN))
    normalization.adapt_variance.assign(list(IMAGENET_DEVIATION))
    source.save_weights(tmp_path / "some.weights.h5")
    images = small_batch(config_of("efficientnet_b0"))[0].astype(np.float32)
    models = []
    for batch_norm in ("frozen", "affine"):
        config = config_of("efficientnet_b0", batch_norm=batch_norm)
        built = build_network(config, classes=3, channels=1, weights=tmp_path / "some.weights.h5")
        models += [built.model, export_model(built, config, classes=3)]
    expected, *others = (model.predict(images, verbose=0) for model in models)
    for found in others:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_and_network_count_the_same_parameters(name):
    config = config_of(name, hidden_units=(16,), pooling="flatten")
    built = build_network(config, classes=3, channels=1)
    for freeze in ("all", "convs:2", "none"):
        for batch_norm in ("frozen", "train"):
            phase = parse_strategy(freeze).phases[0]
            built.enter(phase, batch_norm)
            trainable = sum(int(np.prod(weight.shape)) for weight in built.model.trainable_weights)
            counted = network.count_parameters(replace(config, batch_norm=batch_norm), phase, built.table, 3)
            assert counted == (trainable, built.model.count_params() - trainable)


@pytest.mark.parametrize("batch_norm", ["frozen", "affine"])
@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_a_saved_model_is_whole_and_loads_without_this_package(batch_norm, output, tmp_path):
    config = config_of("mobilenet_v2_0.35", batch_norm=batch_norm, output=output)
    built = build_network(config, classes=2, channels=1)
    images = small_batch(config)[0].astype(np.float32)
    export_model(built, config, classes=2).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert {type(layer).__module__.partition(".")[0] for layer in loaded._flatten_layers()} == {"keras"}
    np.testing.assert_allclose(
        loaded.predict(images, verbose=0), built.model.predict(images, verbose=0), rtol=1e-6, atol=1e-6
    )


def test_one_sigmoid_unit_is_for_two_classes():
    config = config_of("vanilla_cnn", output="sigmoid")
    with pytest.raises(ValueError, match="needs exactly 2 classes, but the data has 4"):
        build_network(config, classes=4, channels=1)


def save_as_keras_ships(model: keras.Model, path: Path) -> None:
    """Write weights in the older layout of the files of ImageNet weights."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)


def test_weights_that_fit_and_weights_that_do_not(tmp_path):
    row = BACKBONES["mobilenet_v2_0.35"]
    model = build_backbone(row, 96)
    model.save_weights(tmp_path / "new.weights.h5")
    save_as_keras_ships(model, tmp_path / "legacy.h5")
    table = read_table(row, model)
    assert weight_problems(table, tmp_path / "new.weights.h5") == ""
    assert weight_problems(table, tmp_path / "legacy.h5") == ""
    other = layer_tables([("vanilla_cnn", 96)], tmp_path)["vanilla_cnn", 96]
    assert "does not fit vanilla_cnn: it holds 104 layers with 410,208" in weight_problems(
        other, tmp_path / "legacy.h5"
    )
    (tmp_path / "text.weights.h5").write_text("no weights")
    assert "is not an HDF5 file" in weight_problems(table, tmp_path / "text.weights.h5")
    assert "no such file" in weight_problems(table, tmp_path / "absent.weights.h5")


def test_weights_are_loaded_at_any_side(tmp_path):
    row = BACKBONES["mobilenet_v2_0.35"]
    source = build_backbone(row, 96)
    source.save_weights(tmp_path / "some.weights.h5")
    loaded = build_backbone(row, 64)
    load_backbone_weights(row, loaded, tmp_path / "some.weights.h5")
    for expected, found in zip(source.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(expected, found)


def test_imagenet_efficientnet_is_the_function_keras_builds(tmp_path, monkeypatch):
    """Keras mends the file's deviations with a further layer when it fetches the file; we must compute the same."""
    row = BACKBONES["efficientnet_b0"]
    published = keras.applications.EfficientNetB0(input_shape=(64, 64, 3), include_top=False, weights=None)
    normalization = next(layer for layer in published.layers if type(layer).__name__ == "Normalization")
    normalization.adapt_mean.assign(list(IMAGENET_MEAN))
    normalization.adapt_variance.assign(list(IMAGENET_DEVIATION))
    file = tmp_path / row.imagenet_name(64)
    save_as_keras_ships(published, file)
    monkeypatch.setattr(efficientnet.file_utils, "get_file", lambda *args, **kwargs: str(file))
    theirs = keras.applications.EfficientNetB0(input_shape=(64, 64, 3), include_top=False, weights="imagenet")
    ours = build_backbone(row, 64)
    load_backbone_weights(row, ours, file)
    images = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
    np.testing.assert_allclose(ours.predict(images, verbose=0), theirs.predict(images, verbose=0), rtol=1e-3, atol=1e-4)
