"""Compiled steps: what a training step and a prediction depend on, and what they do not."""

from collections.abc import Callable

import keras
import numpy as np
import pytest

from cxr_models.epochs import dropout_seeds, make_optimizer
from cxr_models.freezing import parse_strategy
from cxr_models.network import Network, build_network
from cxr_models.steps import Settings, Steps, inference_batch
from cxr_models.trial import TrialConfig

TINY = TrialConfig("vanilla_cnn", image_side=70, freeze="none", optimizer="sgd", batch_size=8)
ROWS = np.arange(8)


@pytest.fixture(scope="module")
def network() -> Network:
    return build_network(TINY, classes=2, channels=1)


@pytest.fixture
def build(network) -> Callable[..., Steps]:
    """Steps of a network with its first weights."""

    def fresh(*, dropout: float = 0.0, optimizer: str = "sgd", freeze: str = "none", **kinds: bool):
        network.reset(0, dropout)
        network.enter(parse_strategy(freeze).phases[0], "frozen")
        steps = Steps(network, None, make_optimizer(optimizer), **kinds)
        steps.begin(Settings(rate_scales=[1.0] * len(steps.trained)))
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
    rate: float = 1e-30,
) -> np.ndarray:
    """A step on the same batch for each key; returns what they scored."""
    images, labels = batch
    count, size = len(keys), len(images)
    return steps.train(
        np.broadcast_to(images, (count, *images.shape)),
        np.broadcast_to(labels, (count, size)),
        np.broadcast_to(np.asarray(weights, np.float32), (count, size)),
        np.stack([dropout_seeds(key, steps.dropout_layers) for key in keys]),
        np.full(count, rate, np.float32),
    )


def test_dropout_follows_from_the_key_alone(build, batch):
    steps = build(dropout=0.5)
    keys = (0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2)
    first, *others = train(steps, batch, *keys)
    assert all((other != first).any() for other in others)
    np.testing.assert_array_equal(train(steps, batch, keys[0])[0], first)
    np.testing.assert_array_equal(train(build(dropout=0.5), batch, keys[0])[0], first)


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
    steps = build()
    kept = [train(steps, batch, (0, 1, key))[0] for key in range(2)]
    np.testing.assert_array_equal(*kept)


def test_an_image_without_weight_has_no_effect(build, batch):
    """The last batch of an epoch is filled up with such images."""
    images, labels = batch
    after = []
    for size in (6, 8):
        steps = build()
        train(steps, (images[:size], labels[:size]), (0, 1, 0), weights=np.arange(size) < 6, rate=0.1)
        after.append(steps.predict(images.__getitem__, ROWS))
    np.testing.assert_allclose(after[0], after[1], rtol=1e-5)
    assert (after[0] != build().predict(images.__getitem__, ROWS)).any()


def test_several_steps_at_once_are_the_same_as_one_after_the_other(build, batch):
    keys = [(0, 1, step) for step in range(3)]
    together = train(build(dropout=0.3), batch, *keys, rate=0.1)
    steps = build(dropout=0.3)
    np.testing.assert_array_equal([train(steps, batch, key, rate=0.1)[0] for key in keys], together)
    assert (together[0] != together[2]).any()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "sgd"])
def test_a_trial_begins_with_a_fresh_optimizer(optimizer, network, build, batch):
    """Momentum of the trial before, even of one that diverged, is not there."""
    keys = [(0, 1, step) for step in range(2)]
    expected = train(build(optimizer=optimizer), batch, *keys, rate=0.01)
    steps = build(optimizer=optimizer)
    assert not np.isfinite(train(steps, batch, *keys, (0, 1, 2), (0, 1, 3), rate=1e30)).all()
    network.reset(0, 0.0)
    steps.begin(Settings())
    np.testing.assert_array_equal(train(steps, batch, *keys, rate=0.01), expected)


def test_a_prediction_does_not_depend_on_the_other_images(build):
    size = inference_batch()
    pixels = np.random.default_rng(0).integers(0, 256, (size + 1, 70, 70, 1)).astype(np.uint8)
    steps = build(dropout=0.5)
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
    steps = build(optimizer=name, freeze="all")
    kernel = network.head[-1].kernel
    first = kernel.numpy()
    for decay in (0.0, 0.5):  # without another compilation
        network.reset(0, 0.0)
        steps.begin(Settings(weight_decay=decay))
        train(steps, batch, (0, 1, 0), weights=1e-30, rate=0.1)  # as good as no gradient
        np.testing.assert_allclose(kernel.numpy(), first * (1 - 0.1 * decay), rtol=1e-6)


def test_sgd_has_momentum():
    assert make_optimizer("sgd").momentum == 0.9


def test_each_step_has_its_own_rate(build, batch):
    """A rate of 0 moves nothing; the rates of a compiled program may change."""
    images, _ = batch
    steps = build()
    first = steps.predict(images.__getitem__, ROWS)
    train(steps, batch, (0, 1, 0), (0, 1, 1), rate=0.0)
    np.testing.assert_array_equal(steps.predict(images.__getitem__, ROWS), first)
    train(steps, batch, (0, 1, 0), (0, 1, 1), rate=0.1)
    assert (steps.predict(images.__getitem__, ROWS) != first).any()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_layers_scale_is_a_factor_on_its_rate(optimizer, network, build, batch):
    """Also under Adam, which a scaled gradient would not impress; 0 keeps a weight."""
    moved = {}
    for scale in (1.0, 0.25, 0.0):
        steps = build(optimizer=optimizer, layerwise=True)
        before = [weight.numpy() for weight in steps.trained]
        steps.begin(Settings(rate_scales=[scale, *[1.0] * (len(steps.trained) - 1)]))
        train(steps, batch, (0, 1, 0), rate=0.01)
        moved[scale] = [weight.numpy() - old for weight, old in zip(steps.trained, before, strict=True)]
    np.testing.assert_allclose(moved[0.25][0], 0.25 * moved[1.0][0], rtol=0.02, atol=1e-7)
    assert not moved[0.0][0].any()
    for other, same in zip(moved[0.0][1:], moved[1.0][1:], strict=True):
        np.testing.assert_array_equal(other, same)


def test_a_focal_loss_without_gamma_is_the_cross_entropy(build, batch):
    plain = train(build(), batch, *[(0, 1, step) for step in range(3)], rate=0.05)
    focal = train(build(reweighted=True), batch, *[(0, 1, step) for step in range(3)], rate=0.05)
    np.testing.assert_allclose(focal, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("gamma", "smoothing"), [(0.0, 0.2), (2.0, 0.0), (0.5, 0.1)])
def test_the_reweighted_loss_has_the_gradient_of_its_formula(gamma, smoothing, network, build, batch):
    """Lin et al. 2017 for the focal loss, Szegedy et al. 2016 for smoothed labels; by finite differences."""
    images, labels = batch
    steps = build(reweighted=True, freeze="all")
    bias = network.head[-1].bias

    def loss(shift: float) -> float:
        network.reset(0, 0.0)
        bias.assign([shift, 0.0])
        scores = steps.predict(images.__getitem__, ROWS).astype(np.float64)
        targets = (1 - smoothing) * np.eye(2)[labels] + smoothing / 2
        return float(-(targets * (1 - np.exp(scores)) ** gamma * scores).sum(axis=1).mean())

    slope = (loss(0.01) - loss(-0.01)) / 0.02
    network.reset(0, 0.0)
    steps.begin(Settings(focal_gamma=gamma, label_smoothing=smoothing))
    train(steps, batch, (0, 1, 0), rate=1.0)
    assert -bias.numpy()[0] == pytest.approx(slope, rel=0.02, abs=1e-4)
