"""A trial trains what its strategy says, on every training image once an epoch, and the same way every time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import pytest

from cxr_models import training
from cxr_models.network import Network, build_network
from cxr_models.steps import INFERENCE_BATCH, Steps
from cxr_models.training import DivergedError, class_weights, make_optimizer, predict, restore_best, run_trial
from cxr_models.trial import BEST_WEIGHTS, METRICS, VALIDATION_SCORES, EpochMetrics, Objective, TrialConfig, TrialData

LOSS = Objective("loss", "min")
TRAIN, VAL, IMAGES = 20, 10, 36
TINY = TrialConfig("vanilla_cnn", image_side=70, freeze="none", batch_size=8, epochs=2)
MOBILE = replace(TINY, backbone="mobilenet_v2_0.35", image_side=32)

Weights = dict[str, np.ndarray]


def tiny_data(folder: Path, side: int = 70, classes: tuple[str, ...] = ("a", "b")) -> TrialData:
    """Images whose brightness tells the class a little; the last six are the test set's."""
    generator = np.random.default_rng(0)
    labels = (np.arange(IMAGES) % len(classes)).astype(np.int32)
    pixels = generator.integers(0, 120, (IMAGES, side, side, 1)) + 100 * labels[:, None, None, None]
    np.save(folder / f"{side}.npy", pixels.astype(np.uint8))
    labels[TRAIN + VAL :] = -1
    train, val = np.arange(TRAIN), np.arange(TRAIN, TRAIN + VAL)
    return TrialData(classes, labels, train, val, 1, {side: folder / f"{side}.npy"})


@pytest.fixture
def data(tmp_path) -> TrialData:
    return tiny_data(tmp_path)


def drain(epochs: Iterator[EpochMetrics]) -> list[EpochMetrics]:
    """Let a trial run to its end."""
    found = [next(epochs)]
    try:
        while True:
            found.append(epochs.send(True))
    except StopIteration:
        return found


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
    built: list[Network] = []
    monkeypatch.setattr(training, "build_network", lambda *given, **named: _kept(built, given, named))
    started: list[Weights] = []
    monkeypatch.setattr(training, "_EpochLoop", _watching(training._EpochLoop, started))

    def run(config: TrialConfig, data: TrialData, objective: Objective = LOSS) -> Watched:
        folder = tmp_path / f"trial-{len(built)}"
        started.clear()
        epochs, weights = run_trial("t", config, data, folder, objective), []
        metrics = [next(epochs)]
        try:
            while True:
                weights.append(weights_of(built[-1].model))
                metrics.append(epochs.send(True))
        except StopIteration:
            return Watched(folder, metrics, [started[0], *weights], built[-1])

    return run


def _kept(built: list[Network], given: tuple, named: dict) -> Network:
    built.append(build_network(*given, **named))
    return built[-1]


def _watching(loop: type, started: list[Weights]) -> Callable[..., object]:
    def begin(trial_id: str, config: TrialConfig, data: TrialData, network: Network) -> object:
        started.append(weights_of(network.model))
        return loop(trial_id, config, data, network)

    return begin


def weights_of(model: keras.Model) -> Weights:
    return {weight.path: weight.value.numpy() for weight in model.weights if "seed_generator" not in weight.path}


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

    def test_each_phase_takes_steps_of_its_own_size(self, watch, data, monkeypatch):
        rates = []
        monkeypatch.setattr(training, "make_optimizer", lambda config, rate: _noted(rates, config, rate))
        watch(replace(TINY, freeze="all>none", learning_rate=0.01), data)
        assert [float(optimizer.learning_rate) for optimizer in rates] == pytest.approx([0.01, 0.001])

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


def _noted(optimizers: list[keras.Optimizer], config: TrialConfig, rate: float) -> keras.Optimizer:
    optimizers.append(make_optimizer(config, rate))
    return optimizers[-1]


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

        model = restore_best(config, trial.folder, classes=2, channels=1, model_path=tmp_path / "best" / "model.keras")
        for name, weight in weights_of(model).items():
            np.testing.assert_array_equal(weight, trial.weights[best.epoch][name])
        loaded = keras.saving.load_model(tmp_path / "best" / "model.keras")
        for found in (model, loaded):
            probabilities = predict(found, np.load(data.pixels[70]), data.val)
            np.testing.assert_allclose(probabilities, np.exp(stored["scores"]), rtol=1e-4, atol=1e-6)

    def test_nothing_else_is_left_in_the_folder(self, data, tmp_path):
        drain(run_trial("t", TINY, data, tmp_path / "trial", LOSS))
        assert {path.name for path in (tmp_path / "trial").iterdir()} == {BEST_WEIGHTS, VALIDATION_SCORES}


@dataclass
class Step:
    """What one training step was given and gave."""

    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    key: tuple[int, int, int]
    scores: np.ndarray


@pytest.fixture
def taken(monkeypatch) -> list[Step]:
    """Every training step from here on."""
    found: list[Step] = []
    train = Steps.train

    def noted(self: Steps, images: np.ndarray, labels: np.ndarray, weights: np.ndarray, key: tuple) -> np.ndarray:
        scores = train(self, images, labels, weights, key)
        found.append(Step(images, labels, weights, key, scores))
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
            mine = [step for step in taken if step.key[1] == metrics.epoch]
            assert {len(step.images) for step in mine} == {batch_size}
            assert [step.key for step in mine] == [(0, metrics.epoch, number) for number in range(len(mine))]
            images, labels, scores = (
                np.concatenate([getattr(step, what)[step.weights > 0] for step in mine])
                for what in ("images", "labels", "scores")
            )
            order = [int(np.flatnonzero((pixels == image).all(axis=(1, 2, 3)))[0]) for image in images]
            assert sorted(order) == data.train.tolist()
            np.testing.assert_array_equal(labels, data.labels[order])
            assert metrics.train["loss"] == pytest.approx(-scores[np.arange(TRAIN), labels].mean())
            assert metrics.train["accuracy"] == (scores.argmax(axis=1) == labels).mean()
            orders.append(order)
        assert orders[0] != orders[1]

    def test_what_is_reported(self, data, tmp_path):
        (first, _) = drain(run_trial("t", TINY, data, tmp_path / "trial", LOSS))
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
        model = restore_best(config, tmp_path / "trial", classes=2, channels=1, model_path=tmp_path / "sigmoid.keras")
        found = predict(model, np.load(data.pixels[70]), data.val)
        np.testing.assert_allclose(found, np.exp(scores), rtol=1e-4, atol=1e-6)


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


class TestSteps:
    @pytest.fixture
    def build(self) -> Callable[..., Steps]:
        def fresh(rate: float, **values: object) -> Steps:
            keras.utils.set_random_seed(0)
            config = replace(TINY, optimizer="sgd", **values)
            network = build_network(config, classes=2, channels=1)
            return Steps(network, make_optimizer(config, rate))

        return fresh

    @pytest.fixture
    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(0)
        return generator.integers(0, 256, (8, 70, 70, 1)).astype(np.uint8), (np.arange(8) % 2).astype(np.int32)

    def test_dropout_follows_from_the_key_alone(self, build, batch):
        steps = build(1e-30, dropout=0.5)
        one = np.ones(8, np.float32)
        first = steps.train(*batch, one, (0, 1, 2))
        others = [steps.train(*batch, one, key) for key in ((0, 1, 3), (0, 2, 2), (1, 1, 2))]
        assert all((other != first).any() for other in others)
        np.testing.assert_array_equal(steps.train(*batch, one, (0, 1, 2)), first)
        np.testing.assert_array_equal(build(1e-30, dropout=0.5).train(*batch, one, (0, 1, 2)), first)

    def test_an_image_without_weight_has_no_effect(self, build, batch):
        """The last batch of an epoch is filled up with such images."""
        images, labels = batch
        after = []
        for size in (6, 8):
            steps = build(0.1)
            weights = (np.arange(size) < 6).astype(np.float32)
            steps.train(images[:size], labels[:size], weights, (0, 1, 0))
            after.append(steps.predict(images, np.arange(8)))
        np.testing.assert_allclose(after[0], after[1], rtol=1e-5)
        assert (after[0] != build(0.1).predict(images, np.arange(8))).any()

    def test_a_prediction_does_not_depend_on_the_other_images(self, build):
        pixels = np.random.default_rng(0).integers(0, 256, (INFERENCE_BATCH + 1, 70, 70, 1)).astype(np.uint8)
        steps = build(0.1, dropout=0.5)
        together = steps.predict(pixels, np.arange(len(pixels)))
        for index in (0, INFERENCE_BATCH - 1, INFERENCE_BATCH):
            np.testing.assert_array_equal(steps.predict(pixels, np.array([index]))[0], together[index])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", keras.optimizers.Adam),
        ("adamw", keras.optimizers.AdamW),
        ("rmsprop", keras.optimizers.RMSprop),
        ("sgd", keras.optimizers.SGD),
    ],
)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_optimizers_decay_weights_apart_from_the_gradient(name, kind, decay):
    """AdamW's way: without a gradient, a weight shrinks by rate x decay x weight and by nothing else."""
    optimizer = make_optimizer(replace(TINY, optimizer=name, weight_decay=decay), 0.1)
    assert type(optimizer) is kind
    weight = keras.Variable([2.0])
    optimizer.apply([keras.ops.zeros(1)], [weight])
    assert float(weight.numpy()[0]) == pytest.approx(2.0 - 0.1 * decay * 2.0)


def test_sgd_has_momentum():
    assert make_optimizer(replace(TINY, optimizer="sgd"), 0.1).momentum == 0.9
