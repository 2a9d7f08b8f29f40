"""Samples are training images, of every class, the same ones each time, and views as training makes them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cxr_models.augmentation import augmented
from cxr_models.trial import TrialData
from sweep.samples import PER_CLASS, SIDE, VIEWS, read_samples, take_samples, write_samples
from sweep.space import Axis, Choice, Space

IMAGES, CLASSES = 60, ("a", "b", "c")


def space(*kinds: str) -> Space:
    axes = {"augmentation": Axis("augmentation", Choice(kinds), ())} if kinds else {}
    return Space(axes)


def data_of(folder: Path, side: int = 48, channels: int = 1) -> TrialData:
    """Images whose every pixel is their index."""
    pixels = np.broadcast_to(np.arange(IMAGES, dtype=np.uint8)[:, None, None, None], (IMAGES, side, side, channels))
    np.save(folder / "pixels.npy", pixels)
    labels = (np.arange(IMAGES) % 3).astype(np.int32)
    labels[50:] = -1
    ids = np.random.default_rng(0).permutation(IMAGES).astype(np.uint64)
    pixels_at = {side: folder / "pixels.npy"}
    return TrialData(CLASSES, labels, np.arange(40), np.arange(40, 50), channels, pixels_at, {}, ids)


PATIENTS = np.array([f"p{index // 6}" for index in range(IMAGES)])


def test_they_are_training_images_of_every_class_and_of_different_patients(tmp_path):
    found = take_samples(data_of(tmp_path), PATIENTS, space())
    assert found.classes == ("a",) * PER_CLASS + ("b",) * PER_CLASS + ("c",) * PER_CLASS
    for place, name in enumerate(CLASSES):
        indices = found.of_class(name)[:, 0, 0, 0]
        assert set(indices % 3) == {place}
        assert indices.max() < 40
        assert len(set(PATIENTS[indices])) == PER_CLASS
    assert found.kinds == ()
    assert len(found.views) == 0


def test_they_follow_from_the_images_not_from_their_order(tmp_path):
    data = data_of(tmp_path)
    backwards = replace(data, train=data.train[::-1].copy())
    np.testing.assert_array_equal(
        take_samples(data, PATIENTS, space()).images, take_samples(backwards, PATIENTS, space()).images
    )


def test_large_images_are_made_smaller_and_colour_stays(tmp_path):
    found = take_samples(data_of(tmp_path, side=150, channels=3), PATIENTS, space("light"))
    assert found.images.shape == (3 * PER_CLASS, SIDE, SIDE, 3)
    assert found.views.shape == (1, 3, VIEWS, SIDE, SIDE, 3)


def test_views_are_those_of_the_augmentations_in_the_space(tmp_path):
    data = data_of(tmp_path)
    found = take_samples(data, PATIENTS, space("none", "strong", "light"))
    assert found.kinds == ("light", "strong")
    indices = found.originals[:, 0, 0, 0].astype(np.int64)
    expected = augmented(found.originals, data.image_ids[indices], kind="strong", seed=0, view=2)
    np.testing.assert_array_equal(found.views[1, :, 1], expected)


def test_they_are_read_back_as_they_were_kept(tmp_path):
    found = take_samples(data_of(tmp_path), PATIENTS, space("none", "light"))
    write_samples(tmp_path / "samples.npz", found)
    again = read_samples(tmp_path / "samples.npz")
    assert (again.classes, again.kinds) == (found.classes, found.kinds)
    for name in ("images", "originals", "views"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "samples.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"expected sample images in .*samples\.npz, but it cannot be read"):
        read_samples(tmp_path / "samples.npz")
