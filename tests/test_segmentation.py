"""A segmentation learns, gives the same twice, and is saved as what was trained."""

from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from cxr_models import steps
from cxr_models.doctor import diagnose
from cxr_models.epochs import DivergedError
from cxr_models.mask_metrics import count_masks, evaluate_masks
from cxr_models.segmentation import best_unet, predict_masks, run_segmentation, train_again
from cxr_models.trial import (
    BEST_WEIGHTS,
    MASK_METRICS,
    SEGMENT,
    VALIDATION_SCORES,
    EpochMetrics,
    Objective,
    TrialConfig,
    TrialData,
)
from tests.trainings import drain

DICE = Objective("dice", "max", SEGMENT)
SIDE, TRAIN, VAL = 16, 21, 6
TINY = TrialConfig(
    "unet", image_side=SIDE, unet_filters=4, unet_depth=2, freeze="none", batch_size=8, epochs=3, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TrialData:
    """A bright disc on noise is what has to be found."""
    folder = tmp_path_factory.mktemp("discs")
    generator = np.random.default_rng(0)
    images = TRAIN + VAL
    down, across = np.mgrid[:SIDE, :SIDE]
    middles, radii = generator.uniform(5, 11, (images, 2, 1, 1)), generator.uniform(3, 5, (images, 1, 1))
    inside = (down - middles[:, 0]) ** 2 + (across - middles[:, 1]) ** 2 < radii**2
    pixels = generator.integers(0, 90, inside.shape) + 120 * inside
    np.save(folder / "pixels.npy", pixels.astype(np.uint8)[..., np.newaxis])
    np.save(folder / "masks.npy", np.where(inside, 255, 0).astype(np.uint8)[..., np.newaxis])
    return TrialData(
        ("image",),
        np.zeros(images, np.int32),
        np.arange(TRAIN),
        np.arange(TRAIN, images),
        1,
        {SIDE: folder / "pixels.npy"},
        image_ids=generator.integers(0, 2**63, images).astype(np.uint64),
        masks={SIDE: folder / "masks.npy"},
    )


def run(config: TrialConfig, data: TrialData, folder: Path, objective: Objective = DICE) -> list[EpochMetrics]:
    return drain(run_segmentation("t", config, data, folder, objective))


def stored(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / BEST_WEIGHTS) as kept:
        return dict(kept)


@pytest.mark.parametrize(("loss", "most"), [("cross_entropy", 25), ("dice", 8), ("both", 15)])
def test_it_beats_a_mask_of_everything(data, tmp_path, loss, most):
    epochs = run(replace(TINY, mask_loss=loss, epochs=most), data, tmp_path)
    truth = np.load(data.masks[SIDE])[data.val]
    trivial = evaluate_masks(count_masks(truth, np.ones(truth.shape, bool)), SIDE**2)["dice"]
    assert max(epoch.val["dice"] for epoch in epochs) > trivial + 0.2
    assert epochs[0].train.keys() == epochs[0].val.keys() == MASK_METRICS.keys()
    assert epochs[-1].train["loss"] < epochs[0].train["loss"]
    assert not [found.name for found in diagnose(epochs, replace(TINY, epochs=most), DICE) if found.grave]


def test_the_same_seed_gives_the_same_weights_whatever_ran_before(data, tmp_path):
    config = replace(TINY, augmentation="strong", dropout=0.3, seed=3)
    first = run(config, data, tmp_path / "first")
    run(replace(config, seed=4, dropout=0.1, learning_rate=3e-3), data, tmp_path / "other")
    again = run(config, data, tmp_path / "again")
    assert [epoch.val for epoch in first] == [epoch.val for epoch in again]
    assert [epoch.train for epoch in first] == [epoch.train for epoch in again]
    one, two, other = (stored(tmp_path / name) for name in ("first", "again", "other"))
    assert all((one[path] == two[path]).all() for path in one)
    assert any((one[path] != other[path]).any() for path in one)


def test_the_saved_model_gives_the_best_epoch_s_figures_without_this_package(data, tmp_path):
    config = replace(TINY, dropout=0.2, epochs=4)
    epochs = run(config, data, tmp_path)
    best_unet(config, tmp_path, channels=1).save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert all(type(layer).__module__.startswith("keras.") for layer in model.layers)
    found = predict_masks(model, np.load(data.pixels[SIDE])[data.val])
    assert found.shape == (VAL, SIDE, SIDE, 1)
    best = max(epochs, key=lambda epoch: epoch.val["dice"])
    counts = count_masks(np.load(data.masks[SIDE])[data.val], found >= 0.5)
    assert evaluate_masks(counts, SIDE**2)["dice"] == pytest.approx(best.val["dice"], abs=1e-3)


def test_a_trial_keeps_what_its_best_epoch_counted(data, tmp_path):
    epochs = run(replace(TINY, epochs=6, learning_rate=3e-2), data, tmp_path)
    with np.load(tmp_path / VALIDATION_SCORES) as kept:
        assert (kept["index"] == data.val).all()
        found = evaluate_masks(kept["counts"], SIDE**2)
    assert found == max(epochs, key=lambda epoch: epoch.val["dice"]).val


def test_images_that_fill_up_the_last_batch_weigh_nothing(data, tmp_path):
    """21 images in batches of 8: the counts are of 21."""
    one = run(replace(TINY, epochs=1, learning_rate=1e-12), data, tmp_path / "8")
    whole = run(replace(TINY, epochs=1, learning_rate=1e-12, batch_size=21), data, tmp_path / "21")
    assert one[0].train["loss"] == pytest.approx(whole[0].train["loss"], rel=1e-5)


def test_an_order_to_end_is_obeyed_and_leaves_the_weights(data, tmp_path):
    epochs = run_segmentation("t", TINY, data, tmp_path, DICE)
    next(epochs)
    with pytest.raises(StopIteration):
        epochs.send(False)
    assert (tmp_path / BEST_WEIGHTS).is_file()


def test_patience_ends_a_trial(data, tmp_path):
    assert len(run(replace(TINY, epochs=9, patience=1, learning_rate=1e-12, optimizer="sgd"), data, tmp_path)) < 9


def test_divergence_is_named(data, tmp_path):
    with pytest.raises(DivergedError, match="lower learning rate than 1e\\+38"):
        run(replace(TINY, optimizer="sgd", learning_rate=1e38), data, tmp_path)


def test_trials_of_one_shape_share_their_program(data, tmp_path, monkeypatch):
    traced = []
    trace = steps.MaskSteps._train_steps
    monkeypatch.setattr(steps.MaskSteps, "_train_steps", lambda *given: traced.append(1) or trace(*given))
    config = replace(TINY, unet_filters=3, epochs=1)
    for seed, rate in ((0, 0.0), (1, 0.4)):
        run(replace(config, seed=seed, dropout=rate, learning_rate=1e-3 * (seed + 1)), data, tmp_path / str(seed))
    assert len(traced) == 1


def test_trained_again_on_the_same_images_it_ends_with_the_weights_of_the_best_epoch(data, tmp_path):
    config = replace(TINY, epochs=4, dropout=0.2, schedule="plateau", augmentation="light", learning_rate=3e-3)
    epochs = run(config, data, tmp_path / "first")
    best = max(epochs, key=lambda epoch: epoch.val["dice"]).epoch
    losses = [epoch.val["loss"] for epoch in epochs]
    again = drain(train_again("again", config, data, tmp_path / "again", losses[:best]))
    assert not (tmp_path / "again" / VALIDATION_SCORES).exists()
    assert [epoch.train for epoch in again] == [epoch.train for epoch in epochs[:best]]
    one, two = (stored(tmp_path / name) for name in ("first", "again"))
    assert {*one} == {*two}
    assert all((one[path] == two[path]).all() for path in one)
