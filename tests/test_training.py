"""A trial trains what its strategy says, on every training image once an epoch, and the same way every time."""

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import pytest

from cxr_models import steps, training
from cxr_models.backbones import BACKBONES
from cxr_models.doctor import diagnose
from cxr_models.epochs import DivergedError, drawn_images, dropout_seeds
from cxr_models.freezing import parse_strategy
from cxr_models.network import Network
from cxr_models.steps import Steps
from cxr_models.training import (
    best_network,
    class_weights,
    log_probabilities,
    run_trial,
    save_model,
    train_again,
    warm_network,
)
from cxr_models.trial import (
    BEST_WEIGHTS,
    CHECKPOINT,
    METRICS,
    VALIDATION_SCORES,
    EpochMetrics,
    Objective,
    TrialConfig,
    TrialData,
)
from tests.trainings import LOSS, Weights, cuts_of, drain, images_of, keeping, weights_of

TRAIN, VAL = 20, 10
TINY = TrialConfig("vanilla_cnn", image_side=70, freeze="none", batch_size=8, epochs=2)
EVERYTHING = parse_strategy("none").phases[0]
MOBILE = replace(TINY, backbone="mobilenet_v2_0.35", image_side=32)


def tiny_data(folder: Path, side: int = 70, classes: tuple[str, ...] = ("a", "b")) -> TrialData:
    return images_of(folder, side, train=TRAIN, val=VAL, classes=classes)


@pytest.fixture
def data(tmp_path) -> TrialData:
    return tiny_data(tmp_path)


@dataclass
class Watched:
    """A trial that ran, with all weights of its network before the first epoch and after each."""

    folder: Path
    epochs: list[EpochMetrics]
    weights: list[Weights]
    network: Network

    def moved(self, before: int, after: int) -> set[str]:
        return {name for name in self.weights[0] if (self.weights[before][name] != self.weights[after][name]).any()}


@pytest.fixture
def watch(tmp_path, monkeypatch) -> Callable[..., Watched]:
    used: list[Network] = []
    started: list[Weights] = []
    monkeypatch.setattr(training, "_EpochLoop", _watching(training._EpochLoop, used, started))

    def run(config: TrialConfig, data: TrialData, objective: Objective = LOSS) -> Watched:
        folder = tmp_path / f"trial-{len(used)}"
        started.clear()
        epochs, weights = run_trial("t", config, data, folder, objective), []
        metrics = [next(epochs)]
        try:
            while True:
                weights.append(weights_of(used[-1].model))
                metrics.append(epochs.send(True))
        except StopIteration:
            return Watched(folder, metrics, [started[0], *weights], used[-1])

    return run


def _watching(loop: type, used: list[Network], started: list[Weights]) -> Callable[..., object]:
    def begin(trial_id: str, config: TrialConfig, data: TrialData, network: Network, *others: object) -> object:
        used.append(network)
        started.append(weights_of(network.model))
        return loop(trial_id, config, data, network, *others)

    return begin


def of_the_head(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(("head_", "logits"))}


class TestSameTwice:
    def test_metrics_and_weights_bit_for_bit(self, watch, data):
        config = replace(TINY, dropout=0.3, class_weights="balanced")
        first, second = (watch(config, data) for _ in range(2))
        for one, other in zip(first.epochs, second.epochs, strict=True):
            assert (one.train, one.val) == (other.train, other.val)
        for name, weight in first.weights[-1].items():
            np.testing.assert_array_equal(weight, second.weights[-1][name])
        other = watch(replace(config, seed=1), data)
        assert other.epochs[-1].val != first.epochs[-1].val

    def test_the_test_set_is_not_touched(self, watch, data):
        """Other pixels in the test images change nothing; their labels are not even there."""
        first = watch(TINY, data)
        pixels = np.load(data.pixels[70])
        pixels[TRAIN + VAL :] = 255 - pixels[TRAIN + VAL :]
        np.save(data.pixels[70], pixels)
        second = watch(TINY, data)
        assert [(one.train, one.val) for one in first.epochs] == [(one.train, one.val) for one in second.epochs]
        assert set(np.load(second.folder / VALIDATION_SCORES)["index"]) == set(data.val)


class TestPhases:
    def test_the_head_first_then_everything(self, watch, data):
        trial = watch(replace(TINY, freeze="all>none", epochs=4, learning_rate=0.01), data)
        everything = set(trial.weights[0])
        assert [metrics.epoch for metrics in trial.epochs] == [1, 2, 3, 4]
        assert [metrics.phase for metrics in trial.epochs] == [0, 1, 1, 1]
        assert [metrics.learning_rate for metrics in trial.epochs] == pytest.approx([0.01, 0.001, 0.001, 0.001])
        assert trial.moved(0, 1) == of_the_head(everything)
        assert trial.moved(1, 4) == everything

    def test_what_is_frozen_does_not_move_in_a_whole_trial(self, watch, tmp_path):
        """Batch norms' statistics included, where those of the trainable part move."""
        trial = watch(replace(MOBILE, freeze="stages:1", batch_norm="train"), tiny_data(tmp_path, side=32))
        names = [layer.name for layer in trial.network.backbone.layers]
        trainable = set(names[names.index("block_13_expand") :])
        moved = trial.moved(0, 2)
        assert {name.split("/")[-2] for name in moved - of_the_head(moved)} <= trainable
        assert moved == {name for name in trial.weights[0] if name.split("/")[-2] in trainable} | of_the_head(moved)
        assert of_the_head(moved) == of_the_head(set(trial.weights[0]))
        assert any(name.endswith("moving_variance") for name in moved)


class TestBestWeights:
    @pytest.mark.parametrize("mode", ["min", "max"])
    def test_those_of_the_best_epoch_lie_on_disk(self, mode, watch, data, tmp_path):
        """The highest loss comes early, the lowest late."""
        config = replace(TINY, epochs=3, learning_rate=0.003)
        trial = watch(config, data, Objective("loss", mode))
        best = (min if mode == "min" else max)(trial.epochs, key=lambda metrics: metrics.val["loss"])
        assert best.epoch == (3 if mode == "min" else 1)
        stored = np.load(trial.folder / VALIDATION_SCORES)
        np.testing.assert_array_equal(stored["index"], data.val)
        np.testing.assert_array_equal(stored["labels"], data.labels[data.val])
        assert -stored["scores"][np.arange(VAL), stored["labels"]].mean() == pytest.approx(best.val["loss"])

        path = tmp_path / "best" / "model.keras"
        network = best_network(config, data, trial.folder)
        model = save_model(network, config, 2, path)
        for name, weight in weights_of(model).items():
            np.testing.assert_array_equal(weight, trial.weights[best.epoch][name])
        scores = log_probabilities(network, np.load(data.pixels[70]), data.val)
        np.testing.assert_allclose(scores, stored["scores"], rtol=1e-4, atol=1e-5)
        for found in (model, keras.saving.load_model(path)):
            probabilities = found.predict_on_batch(np.load(data.pixels[70])[data.val].astype(np.float32))
            np.testing.assert_allclose(probabilities, np.exp(stored["scores"]), rtol=1e-4, atol=1e-6)

    def test_trials_of_one_shape_are_restored_in_turn(self, data, tmp_path):
        """What one leaves in the network that both take does not reach the other."""
        configs = [replace(TINY, seed=seed, learning_rate=0.003) for seed in (1, 2)]
        stored = []
        for number, config in enumerate(configs):
            drain(run_trial("t", config, data, tmp_path / str(number), LOSS))
            stored.append(np.load(tmp_path / str(number) / VALIDATION_SCORES)["scores"])
        for number in (0, 1, 0):
            network = best_network(configs[number], data, tmp_path / str(number))
            scores = log_probabilities(network, np.load(data.pixels[70]), data.val)
            np.testing.assert_allclose(scores, stored[number], rtol=1e-4, atol=1e-5)

    def test_also_where_phases_end_early(self, watch, data):
        """Nothing is learned in the first phase, so patience ends it; the second ends before the trial's last epoch."""
        config = replace(
            TINY, freeze="all>none", epochs=8, probe_share=0.5, patience=1, learning_rate=1e-30, phase_rate=1e27
        )
        trial = watch(config, data)
        assert len(trial.epochs) < config.epochs
        best = min(trial.epochs, key=lambda metrics: metrics.val["loss"])
        assert best.phase == 1
        stored = np.load(trial.folder / VALIDATION_SCORES)
        assert -stored["scores"][np.arange(VAL), stored["labels"]].mean() == pytest.approx(best.val["loss"])
        for name, weight in np.load(trial.folder / BEST_WEIGHTS).items():
            np.testing.assert_array_equal(weight, trial.weights[best.epoch][name])

    def test_nothing_else_is_left_in_the_folder(self, data, tmp_path):
        drain(run_trial("t", TINY, data, tmp_path / "trial", LOSS))
        left = {path.name for path in (tmp_path / "trial").iterdir()}
        assert left == {BEST_WEIGHTS, VALIDATION_SCORES, CHECKPOINT}


@dataclass
class Step:
    """What one training step was given and gave."""

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    seeds: np.ndarray
    rate: np.ndarray
    scores: np.ndarray


@pytest.fixture
def taken(monkeypatch) -> list[Step]:
    """Every training step from here on."""
    found: list[Step] = []
    train = Steps.train

    def noted(self: Steps, *given: np.ndarray) -> np.ndarray:
        scores = train(self, *given)
        found.extend(Step(*one) for one in zip(*given, scores, strict=True))
        return scores

    monkeypatch.setattr(Steps, "train", noted)
    return found


class TestEpochs:
    @pytest.mark.parametrize("batch_size", [8, 10, 64])
    def test_every_training_image_counts_once(self, batch_size, data, taken, tmp_path):
        config = replace(TINY, batch_size=batch_size, epochs=2, dropout=0.3)
        epochs = drain(run_trial("t", config, data, tmp_path / "trial", LOSS))
        pixels = np.load(data.pixels[70])
        orders = []
        for metrics in epochs:
            count = -(-TRAIN // batch_size)
            mine = taken[(metrics.epoch - 1) * count : metrics.epoch * count]
            assert {len(step.inputs) for step in mine} == {batch_size}
            for number, step in enumerate(mine):
                np.testing.assert_array_equal(step.seeds, dropout_seeds((0, metrics.epoch, number), 1))
            images, labels, scores = (
                np.concatenate([getattr(step, what)[step.weights > 0] for step in mine])
                for what in ("inputs", "labels", "scores")
            )
            order = [int(np.flatnonzero((pixels == image).all(axis=(1, 2, 3)))[0]) for image in images]
            assert sorted(order) == data.train.tolist()
            np.testing.assert_array_equal(labels, data.labels[order])
            assert metrics.train["loss"] == pytest.approx(-scores[np.arange(TRAIN), labels].mean())
            assert metrics.train["accuracy"] == (scores.argmax(axis=1) == labels).mean()
            orders.append(order)
        assert orders[0] != orders[1]
        assert len(taken) == 2 * count

    def test_an_epoch_in_chunks_is_the_same_epoch(self, data, taken, tmp_path, monkeypatch):
        """Inputs are gathered a bounded number of bytes at a time."""
        config = replace(TINY, dropout=0.3)
        whole = drain(run_trial("t", config, data, tmp_path / "whole", LOSS))
        steps_of_whole = taken.copy()
        taken.clear()
        monkeypatch.setattr(steps, "CHUNK_BYTES", 2 * 8 * 70 * 70)
        chunked = drain(run_trial("t", config, data, tmp_path / "chunked", LOSS))
        assert [(one.train, one.val) for one in chunked] == [(one.train, one.val) for one in whole]
        for found, expected in zip(taken, steps_of_whole, strict=True):
            np.testing.assert_array_equal(found.inputs, expected.inputs)
            np.testing.assert_array_equal(found.seeds, expected.seeds)

    def test_what_is_reported(self, data, tmp_path):
        begun = time.time()
        (first, second) = drain(run_trial("t", TINY, data, tmp_path / "trial", LOSS))
        assert int(1000 * begun) <= first.ended_ms <= second.ended_ms <= 1000 * time.time()
        assert first.train.keys() == first.val.keys() == {*METRICS, "recall/a", "recall/b"}
        assert first.images_per_second == pytest.approx(TRAIN / first.seconds, rel=0.9)
        assert first.device == "CPU" or first.device.startswith("GPU")

    def test_one_sigmoid_unit_learns_two_classes(self, data, tmp_path):
        config = replace(TINY, output="sigmoid", epochs=8, learning_rate=0.01, batch_size=4)
        epochs = drain(run_trial("t", config, data, tmp_path / "trial", LOSS))
        scores = np.load(tmp_path / "trial" / VALIDATION_SCORES)["scores"]
        assert scores.shape == (VAL, 2)
        np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1.0, rtol=1e-5)
        assert epochs[-1].val["loss"] < epochs[0].val["loss"] < 1.0
        assert epochs[-1].val["accuracy"] >= 0.9
        assert not [found for found in diagnose(epochs, config, LOSS, class_counts=data.val_counts) if found.grave]
        network = best_network(config, data, tmp_path / "trial")
        found = log_probabilities(network, np.load(data.pixels[70]), data.val)
        np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-5)


class TestEnds:
    STILL = replace(TINY, optimizer="sgd", learning_rate=1e-30, epochs=10)  # no weight moves, no loss falls

    def test_patience(self, data, tmp_path):
        assert len(drain(run_trial("t", replace(self.STILL, patience=2), data, tmp_path, LOSS))) == 3

    def test_patience_ends_the_phase_not_the_trial(self, data, tmp_path):
        config = replace(self.STILL, patience=1, freeze="all>none")
        epochs = drain(run_trial("t", config, data, tmp_path, LOSS))
        assert [(metrics.epoch, metrics.phase) for metrics in epochs] == [(1, 0), (2, 0), (3, 1), (4, 1)]

    def test_when_told_to(self, data, tmp_path):
        epochs = run_trial("t", TINY, data, tmp_path, LOSS)
        next(epochs)
        with pytest.raises(StopIteration):
            epochs.send(False)
        assert (tmp_path / BEST_WEIGHTS).is_file()

    def test_divergence(self, data, tmp_path):
        config = replace(TINY, optimizer="sgd", learning_rate=1e30)
        message = r"diverged in epoch 1: training loss \S+, validation loss \S+; a lower learning rate than 1e\+30"
        with pytest.raises(DivergedError, match=message):
            drain(run_trial("t", config, data, tmp_path, LOSS))
        assert not (tmp_path / BEST_WEIGHTS).exists()


class TestWarm:
    """Networks and compiled steps stay for the next trial; nothing of the former trial does."""

    def test_after_a_trial_that_diverged_or_was_given_up(self, watch, data, tmp_path):
        config = replace(TINY, dropout=0.3)
        first = watch(config, data)
        with pytest.raises(DivergedError):
            watch(replace(config, learning_rate=1e30), data)
        next(run_trial("t", replace(config, seed=5), data, tmp_path / "given-up", LOSS))
        second = watch(config, data)
        assert second.network is first.network
        for before, after in zip(first.weights, second.weights, strict=True):
            for name, weight in before.items():
                np.testing.assert_array_equal(after[name], weight)
        assert [one.val for one in first.epochs] == [one.val for one in second.epochs]

    @pytest.mark.slow
    def test_networks_of_many_shapes_are_not_all_kept(self, data):
        kept = []
        for units in range(1, training.WARM_STEPS + 3):
            shape = training._shape(replace(TINY, hidden_units=(units,)), data)
            network = warm_network(*shape)
            training._warm_steps(network, EVERYTHING, "frozen", None, "adam", reweighted=False, layerwise=False)
            kept.append(weakref.ref(network))
        del network
        gc.collect()
        assert [reference() is not None for reference in kept] == [False] * 2 + [True] * training.WARM_STEPS


PRETRAINED = replace(MOBILE, weights="bundled", freeze="all", dropout=0.3, learning_rate=0.01, epochs=3)


@pytest.fixture
def images(tmp_path) -> TrialData:
    """For `PRETRAINED`."""
    data = tiny_data(tmp_path, side=32)
    return replace(data, weights={(PRETRAINED.backbone, "bundled", 32): BACKBONES[PRETRAINED.backbone].bundled_path})


class TestStoredFeatures:
    GIVEN = PRETRAINED

    @pytest.mark.parametrize(
        ("freeze", "batch_norm"),
        [
            ("all", "frozen"),
            ("convs:1", "train"),
            pytest.param("all>stages:1", "frozen", marks=pytest.mark.slow),
            pytest.param("convs:2>all", "affine", marks=pytest.mark.slow),
        ],
    )
    def test_the_saved_model_is_the_whole_network(self, freeze, batch_norm, watch, images, tmp_path):
        config = replace(self.GIVEN, freeze=freeze, batch_norm=batch_norm)
        trial = watch(config, keeping(images, [config], tmp_path / "features"))
        assert {metrics.source for metrics in trial.epochs} == {cut.name for cut in cuts_of(config, 2)}
        stored = np.load(trial.folder / VALIDATION_SCORES)["scores"]
        path = tmp_path / "model.keras"
        save_model(best_network(config, images, trial.folder), config, 2, path)
        shown = np.load(images.pixels[32])[images.val].astype(np.float32)
        found = keras.saving.load_model(path).predict_on_batch(shown)
        np.testing.assert_allclose(found, np.exp(stored), rtol=1e-4, atol=1e-6)

        best = min(trial.epochs, key=lambda metrics: metrics.val["loss"]).epoch
        left = np.load(trial.folder / BEST_WEIGHTS)
        for name in left:
            np.testing.assert_array_equal(left[name], trial.weights[best][name])
        statistics = {name for name in left if "/moving_" in name}  # of a batch norm whose other weights moved
        assert set(left) - statistics == trial.moved(0, best) - statistics
        assert (trial.moved(0, best) >= statistics) == (batch_norm != "affine")

    def test_without_a_file_of_first_weights_all_are_kept(self, watch, images, tmp_path):
        config = replace(self.GIVEN, weights="none", epochs=1)
        trial = watch(config, keeping(images, [config], tmp_path / "features"))
        assert set(np.load(trial.folder / BEST_WEIGHTS)) == set(trial.weights[0])
        assert trial.moved(0, 1) == of_the_head(set(trial.weights[0]))

    def test_where_they_do_not_fit_the_trial_runs_from_the_pixels_and_says_so(self, watch, images, tmp_path):
        expected = watch(self.GIVEN, images)
        found = watch(self.GIVEN, keeping(images, [self.GIVEN], tmp_path / "features", limit_bytes=1000))
        assert {metrics.source for metrics in expected.epochs} == {"pixels"}
        assert {metrics.source for metrics in found.epochs} == {
            "pixels: its features take 153.6 kB, the cache may take 1.0 kB"
        }
        assert [one.val for one in found.epochs] == [one.val for one in expected.epochs]
        assert found.epochs[0].features_seconds > 0

    def test_a_trial_whose_steps_cannot_be_built_lets_its_features_go(self, watch, images, tmp_path, monkeypatch):
        room = keeping(images, [self.GIVEN], tmp_path / "features")
        with monkeypatch.context() as patched:
            patched.setattr(training, "_warm_steps", out_of_memory)
            with pytest.raises(RuntimeError, match="out of memory"):
                watch(self.GIVEN, room)
        taken = sum(file.stat().st_size for file in (tmp_path / "features").glob("*/*.f32"))
        other = replace(room, val=room.val[1:], features=replace(room.features, limit_bytes=taken))
        assert {metrics.source for metrics in watch(self.GIVEN, other).epochs} == {"out_relu-average"}

    def test_what_trains_is_not_read_from_the_store(self, watch, images, tmp_path):
        """In the second phase everything has moved."""
        config = replace(self.GIVEN, freeze="all>none")
        trial = watch(config, keeping(images, [config], tmp_path / "features"))
        assert [metrics.source for metrics in trial.epochs] == ["out_relu-average", "pixels", "pixels"]
        assert [metrics.features_seconds > 0 for metrics in trial.epochs] == [True, False, False]
        assert [metrics.features_missed for metrics in trial.epochs] == [1, 0, 0]


def out_of_memory(*given: object, **kinds: object) -> None:
    raise RuntimeError("out of memory")


class TestDrawnImages:
    LABELS = np.array([0] * 12 + [1] * 6 + [2] * 2, np.int32)

    @pytest.fixture
    def uneven(self, data):
        return replace(data, labels=self.LABELS, train=np.arange(20), val=np.arange(0), classes=("a", "b", "c"))

    def test_natural_takes_every_image_once_in_an_order_of_the_epoch(self, uneven):
        orders = [drawn_images(TINY, uneven, epoch).tolist() for epoch in (1, 2, 1)]
        assert [sorted(order) for order in orders] == [list(range(20))] * 3
        assert orders[0] == orders[2] != orders[1]

    def test_balanced_takes_as_many_of_each_class_and_none_of_a_large_one_twice(self, uneven):
        drawn = drawn_images(replace(TINY, sampling="balanced"), uneven, 1)
        assert len(drawn) == 20
        assert sorted(np.bincount(self.LABELS[drawn]).tolist()) == [6, 7, 7]
        times = np.bincount(drawn, minlength=20)
        assert times[:12].max() == 1
        assert times[12:18].min() == 1
        assert set(times[18:].tolist()) <= {3, 4}

    def test_over_the_epochs_all_images_of_a_large_class_are_seen(self, uneven):
        config = replace(TINY, sampling="balanced")
        assert {*np.concatenate([drawn_images(config, uneven, epoch) for epoch in range(1, 9)])} == {*range(20)}


class TestRates:
    def test_each_has_its_own_rate_schedule_and_share(self, watch, images):
        config = replace(
            PRETRAINED,
            freeze="all>stages:1",
            epochs=6,
            probe_share=0.5,
            learning_rate=0.01,
            phase_rate=0.2,
            schedule="constant>exponential",
            optimizer="adam>sgd",
        )
        epochs = watch(config, images).epochs
        assert [metrics.phase for metrics in epochs] == [0, 0, 0, 1, 1, 1]
        rates = np.array([metrics.learning_rate for metrics in epochs])
        np.testing.assert_allclose(rates[:3], 0.01, rtol=1e-6)
        assert (np.diff(rates[2:]) < 0).all()
        assert rates[3:].max() < 0.002

    @pytest.mark.slow
    def test_with_layer_decay_what_lies_deeper_moves_less(self, watch, images):
        """Plain gradient descent: the factor on the rate is the factor on the first step."""
        config = replace(PRETRAINED, freeze="none", epochs=1, batch_size=TRAIN, optimizer="sgd", learning_rate=1e-3)
        plain, decayed = (watch(replace(config, layer_decay=decay), images) for decay in (1.0, 0.5))
        first, whole, less = plain.weights[0], plain.weights[1], decayed.weights[1]
        for part, factor in (("Conv_1/kernel", 0.5), ("block_5_project/kernel", 0.125), ("logits/kernel", 1.0)):
            (name,) = (path for path in first if path.endswith(part))
            moved, moved_less = whole[name] - first[name], less[name] - first[name]
            assert np.abs(moved_less).sum() == pytest.approx(factor * np.abs(moved).sum(), rel=0.05), part


class TestClassWeights:
    LABELS = np.array([0] * 12 + [1] * 6 + [2] * 2, np.int32)

    def test_their_mean_over_the_images_is_one(self):
        found = class_weights(replace(TINY, class_weights="balanced"), self.LABELS, 3)
        assert found[self.LABELS].mean() == pytest.approx(1.0)
        np.testing.assert_allclose(found * np.bincount(self.LABELS), 20 / 3, rtol=1e-6)
        assert class_weights(TINY, self.LABELS, 3).tolist() == [1.0, 1.0, 1.0]

    def test_the_rare_class_is_predicted_more(self, data, taken, tmp_path):
        labels = data.labels.copy()
        labels[:TRAIN] = np.arange(TRAIN) < 3  # nothing in the pixels tells it
        rare = replace(data, labels=labels)
        found = {}
        for kind in ("none", "balanced"):
            config = replace(TINY, epochs=6, learning_rate=0.1, class_weights=kind, freeze="all")
            drain(run_trial("t", config, rare, tmp_path / kind, LOSS))
            found[kind] = np.exp(np.load(tmp_path / kind / VALIDATION_SCORES)["scores"])[:, 1].mean()
        assert found["balanced"] > found["none"] + 0.15
        per_class = np.array([TRAIN / 2 / 17, TRAIN / 2 / 3])
        np.testing.assert_allclose(taken[-1].weights, (taken[-1].weights > 0) * per_class[taken[-1].labels], rtol=1e-6)


class TestAgain:
    CONFIG = replace(
        TINY,
        backbone="mobilenet_v2_0.35",
        image_side=32,
        freeze="all>stages:1",
        epochs=8,
        probe_share=0.5,
        patience=2,
        learning_rate=1e-5,
        phase_rate=20.0,
        schedule="plateau>cosine",
        optimizer="adam>rmsprop",
        dropout=0.3,
        augmentation="light",
    )

    def test_on_the_same_images_it_ends_with_the_weights_of_the_best_epoch(self, tmp_path):
        data = tiny_data(tmp_path, side=32)
        found = drain(run_trial("first", self.CONFIG, data, tmp_path / "first", LOSS))
        losses = [metrics.val["loss"] for metrics in found]
        best = 1 + int(np.argmin(losses))
        assert {metrics.phase for metrics in found[:best]} == {0, 1}  # or the second phase would go unseen
        alone = replace(data, val=np.empty(0, np.int64))
        again = drain(train_again("again", self.CONFIG, alone, tmp_path / "again", losses[:best]))
        assert [metrics.learning_rate for metrics in again] == [metrics.learning_rate for metrics in found[:best]]
        assert [metrics.train for metrics in again] == [metrics.train for metrics in found[:best]]
        assert all(not metrics.val for metrics in again)
        with np.load(tmp_path / "first" / BEST_WEIGHTS) as first, np.load(tmp_path / "again" / BEST_WEIGHTS) as second:
            assert {*first} == {*second}
            for path in first:
                np.testing.assert_array_equal(second[path], first[path], err_msg=path)

    def test_the_validation_images_are_trained_on_together_with_the_others(self, taken, tmp_path):
        data = tiny_data(tmp_path, side=32)
        again = drain(train_again("again", self.CONFIG, data.together(), tmp_path / "again", [1.0, 0.9]))
        assert len(again) == 2
        images = TRAIN + VAL
        weighed = sum(int((step.weights > 0).sum()) for step in taken)
        assert weighed == 2 * images
        assert {*data.together().train} == {*data.train, *data.val}

    def test_it_ends_when_told_to_and_leaves_no_weights(self, tmp_path):
        data = tiny_data(tmp_path, side=32).together()
        epochs = train_again("again", self.CONFIG, data, tmp_path / "again", [1.0, 0.9, 0.8])
        next(epochs)
        with pytest.raises(StopIteration):
            epochs.send(False)
        assert not (tmp_path / "again" / BEST_WEIGHTS).exists()
