"""Outside the lungs everything is 0, inside nothing changes."""

import numpy as np
import pytest

from cxr_models.masking import in_channels, masked_array
from tests.damages import DAMAGES


@pytest.fixture
def arrays(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(1, 256, (70, 8, 8, 3)).astype(np.uint8)
    masks = np.where(generator.random((70, 8, 8, 1)) < 0.5, 255, 0).astype(np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    np.save(tmp_path / "masks.npy", masks)
    return pixels, masks


def test_inside_stays_and_outside_is_black(arrays, tmp_path):
    pixels, masks = arrays
    done = []
    path = masked_array(
        tmp_path / "pixels.npy", tmp_path / "masks.npy", tmp_path, lambda at, total: done.append((at, total))
    )
    np.testing.assert_array_equal(np.load(path), np.where(masks > 0, pixels, 0))
    assert done == [(64, 70), (70, 70)]
    assert path.name != "pixels.npy", "features are kept by the name of the pixels"
    before = path.stat().st_mtime_ns
    assert masked_array(tmp_path / "pixels.npy", tmp_path / "masks.npy", tmp_path).stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_made_anew(arrays, tmp_path, damage):
    path = masked_array(tmp_path / "pixels.npy", tmp_path / "masks.npy", tmp_path)
    good = path.read_bytes()
    DAMAGES[damage](path)
    assert masked_array(tmp_path / "pixels.npy", tmp_path / "masks.npy", tmp_path) == path
    assert path.read_bytes() == good


def test_a_smaller_mask_is_scaled_up(arrays, tmp_path):
    pixels, _ = arrays
    half = np.zeros((70, 4, 4, 1), np.uint8)
    half[:, :, :2] = 255
    np.save(tmp_path / "half.npy", half)
    found = np.load(masked_array(tmp_path / "pixels.npy", tmp_path / "half.npy", tmp_path))
    np.testing.assert_array_equal(found[:, :, :4], pixels[:, :, :4])
    assert not found[:, :, 4:].any()


def test_channels_as_pillow_has_them(arrays):
    from PIL import Image

    pixels, _ = arrays
    grey = in_channels(pixels[:3], 1)
    expected = [np.asarray(Image.fromarray(one).convert("L")) for one in pixels[:3]]
    np.testing.assert_array_equal(grey[..., 0], expected)
    np.testing.assert_array_equal(in_channels(grey, 3)[..., 2], grey[..., 0])
