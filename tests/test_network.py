"""Networks: their first weights, what a saved model predicts, and files of weights."""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras.src.applications import efficientnet

from cxr_models import layer_table, network
from cxr_models.backbones import (
    BACKBONES,
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    build_backbone,
    load_backbone_weights,
)
from cxr_models.cuts import choose_cut
from cxr_models.freezing import parse_strategy
from cxr_models.layer_table import PACKAGED, LayerTable, layer_tables, read_table, weight_problems
from cxr_models.network import build_network, export_model
from cxr_models.trial import TrialConfig
from tests.damages import DAMAGES
from tests.networks import save_as_keras_ships


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


QUICK = ("mobilenet_v2_0.35", "vanilla_cnn", "mobilenet_v2_1.0")
STORED = [
    pytest.param(path, id=path.stem, marks=() if path.stem.rpartition("-")[0] in QUICK else pytest.mark.slow)
    for path in sorted(PACKAGED.glob("*.json"))
]


@pytest.mark.parametrize("stored", STORED)
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
    made_again = []

    def make(files: dict[tuple[str, int], Path]) -> None:
        for key, path in files.items():
            made_again.append(key)
            path.write_text(made[key].to_json())

    monkeypatch.setattr(layer_table, "_make_tables", make)
    damages = [DAMAGES[name] for name in DAMAGES if "head" not in name]  # one block may be of any length
    for damage in damages:
        damage(tmp_path / "layer_tables" / "vanilla_cnn-88.json")
        assert layer_tables(wanted, tmp_path) == made
    assert made_again == [("vanilla_cnn", 88)] * len(damages), "nothing but what is damaged"


class TestReset:
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


@pytest.mark.slow
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
    (tmp_path / "legacy.h5").rename(tmp_path / "legacy.weights.h5")
    assert "older layout, which is told by its name: let it end in .h5" in weight_problems(
        table, tmp_path / "legacy.weights.h5"
    )
    (tmp_path / "new.weights.h5").rename(tmp_path / "new.h5")
    assert "newer layout, which is told by its name: let it end in .weights.h5" in weight_problems(
        table, tmp_path / "new.h5"
    )


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


def test_one_pass_stores_cuts_of_several_taps_and_poolings():
    """In one sweep they may all be wanted; each has to be what it is when it is computed alone."""
    config = TrialConfig("mobilenet_v2_0.35", image_side=32)
    network = build_network(config, classes=3, channels=1)
    row, table, phases = BACKBONES[config.backbone], network.table, parse_strategy("all").phases
    cuts = [
        choose_cut(phases, row, table, pooling=pooling, taps=taps, head_parameters=100)
        for pooling in ("average", "max")
        for taps in (1, 3, 5)
    ]
    assert len({cut.name for cut in cuts}) == 6
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 1)).astype(np.float32)
    together = network.prefix(cuts)(pixels, training=False)
    for cut, found in zip(cuts, together, strict=True):
        assert found.shape == (8, *cut.shape)
        (alone,) = keras.tree.flatten(network.prefix([cut])(pixels, training=False))
        np.testing.assert_array_equal(found.numpy(), alone.numpy(), err_msg=cut.name)
