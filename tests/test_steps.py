"""Compiled steps: what a training step and a prediction depend on, and what they do not."""

from collections.abc import Callable

import keras
import numpy as np
import pytest

from cxr_models.freezing import parse_strategy
from cxr_models.network import Network, build_network
from cxr_models.steps import Steps, inference_batch
from cxr_models.training import dropout_seeds, make_optimizer
from cxr_models.trial import TrialConfig

TINY = TrialConfig("vanilla_cnn", image_side=70, freeze="none", optimizer="sgd", batch_size=8)
ROWS = np.arange(8)


@pytest.fixture(scope="module")
def network() -> Network:
    return build_network(TINY, classes=2, channels=1)


@pytest.fixture
def build(network) -> Callable[..., Steps]:
    """Steps of a network with its first weights."""

    def fresh(rate: float, *, dropout: float = 0.0, optimizer: str = "sgd", decay: float = 0.0, freeze: str = "none"):
        network.reset(0, dropout)
        network.enter(parse_strategy(freeze).phases[0], "frozen")
        steps = Steps(network, None, make_optimizer(optimizer))
        steps.begin(rate, decay)
        return steps

    return fresh


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (8, 70, 70, 1)).astype(np.uint8), (np.arange(8) % 2).astype(np.int32)


def train(
    steps: Steps,
    batch: tuple[np.ndarray, np.ndarray],
    *keys: tuple[int, int, int],
    weights: np.ndarray | float = 1.0,
) -> np.ndarray:
    """A step on the same batch for each key; returns what they scored."""
    images, labels = batch
    count, size = len(keys), len(images)
    return steps.train(
        np.broadcast_to(images, (count, *images.shape)),
        np.broadcast_to(labels, (count, size)),
        np.broadcast_to(np.asarray(weights, np.float32), (count, size)),
        np.stack([dropout_seeds(key, steps.dropout_seeds) for key in keys]),
    )


def test_dropout_follows_from_the_key_alone(build, batch):
    steps = build(1e-30, dropout=0.5)
    keys = (0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2)
    first, *others = train(steps, batch, *keys)
    assert all((other != first).any() for other in others)
    np.testing.assert_array_equal(train(steps, batch, keys[0])[0], first)
    np.testing.assert_array_equal(train(build(1e-30, dropout=0.5), batch, keys[0])[0], first)


def test_dropout_drops_its_rate_and_keeps_the_mean(network, build, batch):
    """The rate is a value, read when a step is run; a rate of 0 drops nothing."""
    layer = next(layer for layer in network.head if isinstance(layer, keras.layers.Dropout))
    ones = keras.ops.ones((1000, 100))
    for rate in (0.0, 0.3, 0.8):
        network.head_dropout.assign(rate)
        found = keras.ops.convert_to_numpy(layer(ones, training=True))
        assert (found == 0).mean() == pytest.approx(rate, abs=0.01)
        np.testing.assert_allclose(found[found != 0], 1 / (1 - rate), rtol=1e-6)
    np.testing.assert_array_equal(layer(ones, training=False), ones)
    steps = build(1e-30)
    kept = [train(steps, batch, (0, 1, key))[0] for key in range(2)]
    np.testing.assert_array_equal(*kept)


def test_an_image_without_weight_has_no_effect(build, batch):
    """The last batch of an epoch is filled up with such images."""
    images, labels = batch
    after = []
    for size in (6, 8):
        steps = build(0.1)
        train(steps, (images[:size], labels[:size]), (0, 1, 0), weights=np.arange(size) < 6)
        after.append(steps.predict(images.__getitem__, ROWS))
    np.testing.assert_allclose(after[0], after[1], rtol=1e-5)
    assert (after[0] != build(0.1).predict(images.__getitem__, ROWS)).any()


def test_several_steps_at_once_are_the_same_as_one_after_the_other(build, batch):
    keys = [(0, 1, step) for step in range(3)]
    together = train(build(0.1, dropout=0.3), batch, *keys)
    steps = build(0.1, dropout=0.3)
    np.testing.assert_array_equal([train(steps, batch, key)[0] for key in keys], together)
    assert (together[0] != together[2]).any()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "sgd"])
def test_a_trial_begins_with_a_fresh_optimizer(optimizer, network, build, batch):
    """Momentum of the trial before, even of one that diverged, is not there."""
    keys = [(0, 1, step) for step in range(2)]
    expected = train(build(0.01, optimizer=optimizer), batch, *keys)
    steps = build(1e30, optimizer=optimizer)
    assert not np.isfinite(train(steps, batch, *keys, (0, 1, 2), (0, 1, 3))).all()
    network.reset(0, 0.0)
    steps.begin(0.01, 0.0)
    np.testing.assert_array_equal(train(steps, batch, *keys), expected)


def test_a_prediction_does_not_depend_on_the_other_images(build):
    size = inference_batch()
    pixels = np.random.default_rng(0).integers(0, 256, (size + 1, 70, 70, 1)).astype(np.uint8)
    steps = build(0.1, dropout=0.5)
    together = steps.predict(pixels.__getitem__, np.arange(len(pixels)))
    assert together.shape == (size + 1, 2)
    for index in (0, size - 1, size):
        np.testing.assert_array_equal(steps.predict(pixels.__getitem__, np.array([index]))[0], together[index])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", keras.optimizers.Adam),
        ("adamw", keras.optimizers.AdamW),
        ("rmsprop", keras.optimizers.RMSprop),
        ("sgd", keras.optimizers.SGD),
    ],
)
def test_optimizers_decay_weights_apart_from_the_gradient(name, kind, network, build, batch):
    """AdamW's way: without a gradient, a weight shrinks by rate x decay x weight and by nothing else."""
    assert type(make_optimizer(name)) is kind
    steps = build(0.1, optimizer=name, freeze="all")
    kernel = network.head[-1].kernel
    first = kernel.numpy()
    for decay in (0.0, 0.5):  # without another compilation
        network.reset(0, 0.0)
        steps.begin(0.1, decay)
        train(steps, batch, (0, 1, 0), weights=1e-30)  # as good as no gradient
        np.testing.assert_allclose(kernel.numpy(), first * (1 - 0.1 * decay), rtol=1e-6)


def test_sgd_has_momentum():
    assert make_optimizer("sgd").momentum == 0.9
