"""A view follows from seed, view and image alone, stays near its image, and keeps left left."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from cxr_models.augmentation import AUGMENTATIONS, augmented, augmented_masks, view_of_epoch
from cxr_models.trial import CHOICES

SIDE = 48
KINDS = tuple(AUGMENTATIONS)


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    """Five grey images with all kinds of detail."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, SIDE // 4, SIDE // 4, 1), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture(scope="module")
def ids() -> NDArray[np.uint64]:
    return np.array([0, 1, 2**32, 2**63, 2**64 - 1], np.uint64)


def views_of(image: NDArray[np.uint8], kind: str, count: int = 200) -> NDArray[np.uint8]:
    """As many views of one image, of shape (side, side)."""
    batch = np.broadcast_to(image[None, ..., None], (count, *image.shape, 1))
    return augmented(batch, np.arange(count, dtype=np.uint64), kind=kind, seed=0, view=1)[..., 0]


def blob(x: float, y: float, side: int = SIDE) -> NDArray[np.uint8]:
    """A bright spot on black; its middle in pixels from the left and the top."""
    across, down = np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5)
    return (200 * np.exp(-((across - x) ** 2 + (down - y) ** 2) / 8)).astype(np.uint8)


def centre(view: NDArray[np.uint8]) -> tuple[float, float]:
    """Where the spot is, in pixels from the left and the top."""
    weights = (view > view.max() / 2) * 1.0
    places = np.arange(len(view)) + 0.5
    return float(weights.sum(0) @ places / weights.sum()), float(weights.sum(1) @ places / weights.sum())


class TestKeys:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_batch_and_the_order_change_nothing(self, pixels, ids, kind):
        whole = augmented(pixels, ids, kind=kind, seed=3, view=2)
        order = np.array([3, 0, 4, 1, 2])
        turned = augmented(pixels[order], ids[order], kind=kind, seed=3, view=2)
        np.testing.assert_array_equal(turned, whole[order])
        for index in range(len(pixels)):
            alone = augmented(pixels[index : index + 1], ids[index : index + 1], kind=kind, seed=3, view=2)
            np.testing.assert_array_equal(alone[0], whole[index])

    def test_neither_do_the_other_images(self, pixels, ids):
        others = pixels.copy()
        others[1:] = 255 - others[1:]
        first, again = (augmented(batch, ids, kind="strong", seed=0, view=1)[0] for batch in (pixels, others))
        np.testing.assert_array_equal(first, again)

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_part_of_the_key_counts(self, pixels, kind):
        """Large and small numbers too: no two keys share a stream because their digits do."""
        numbers = (0, 1, 2, 2**32, 2**32 + 1)
        seen = set()
        for seed, view, image_id in itertools.product(numbers, numbers, numbers):
            ids = np.array([image_id], np.uint64)
            seen.add(augmented(pixels[:1], ids, kind=kind, seed=seed, view=view).tobytes())
        assert len(seen) == len(numbers) ** 3

    def test_the_kinds_differ(self, pixels, ids):
        views = {augmented(pixels, ids, kind=kind, seed=0, view=1).tobytes() for kind in KINDS}
        assert len(views) == len(KINDS)

    def test_the_input_is_left_as_it_was(self, pixels, ids):
        before = pixels.copy()
        before.setflags(write=False)
        augmented(before, ids, kind="strong", seed=0, view=1)
        np.testing.assert_array_equal(before, pixels)

    def test_the_geometry_does_not_depend_on_the_side(self):
        small, large = (views_of(blob(0.3 * side, 0.6 * side, side), "light", count=20) for side in (SIDE, 2 * SIDE))
        moves = [np.subtract(centre(one), np.divide(centre(two), 2)) for one, two in zip(small, large, strict=True)]
        assert np.abs(moves).max() < 0.5


class TestForm:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("side", [1, 2, 17, 48])
    def test_shape_and_dtype(self, kind, channels, side):
        pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, channels), dtype=np.uint8)
        views = augmented(pixels, np.arange(3, dtype=np.uint64), kind=kind, seed=0, view=1)
        assert views.shape == pixels.shape
        assert views.dtype == np.uint8

    def test_no_images(self):
        views = augmented(np.empty((0, 8, 8, 1), np.uint8), np.empty(0, np.uint64), kind="light", seed=0, view=1)
        assert views.shape == (0, 8, 8, 1)

    @pytest.mark.parametrize("kind", KINDS)
    def test_grey_as_rgb_has_the_view_of_the_grey_image(self, pixels, ids, kind):
        grey = augmented(pixels, ids, kind=kind, seed=0, view=1)
        rgb = augmented(pixels.repeat(3, axis=-1), ids, kind=kind, seed=0, view=1)
        np.testing.assert_array_equal(rgb, grey.repeat(3, axis=-1))

    def test_colours_are_moved_together(self):
        rgb = np.zeros((1, SIDE, SIDE, 3), np.uint8)
        rgb[0, ..., 0] = rgb[0, ..., 2] = blob(20, 30)
        view = augmented(rgb, np.array([5], np.uint64), kind="light", seed=0, view=1)[0]
        np.testing.assert_array_equal(view[..., 0], view[..., 2])
        assert int(view[..., 1].max()) - int(view[..., 1].min()) == 0

    @pytest.mark.parametrize("level", [0, 255])
    def test_grey_levels_end_at_black_and_white(self, level):
        """Beyond the end they stop; they do not come round."""
        views = views_of(np.full((SIDE, SIDE), level, np.uint8), "strong").astype(int)
        bounds = AUGMENTATIONS["strong"]
        assert np.abs(views - level).max() <= 255 * bounds.brightness + 3 * bounds.noise_deviation + 1


class TestStrength:
    def test_a_constant_image_stays_constant(self):
        """Whatever the geometry: there is no border."""
        views = views_of(np.full((SIDE, SIDE), 120, np.uint8), "light")
        assert (views.reshape(200, -1) == views[:, :1, 0]).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_rotation_zoom_and_shift_keep_to_their_bounds_and_use_them(self, kind):
        """Two spots tell all three: the line between them turns and grows, its middle moves."""
        bounds = AUGMENTATIONS[kind]
        side = 2 * SIDE
        views = views_of(blob(0.25 * side, 0.5 * side, side) + blob(0.75 * side, 0.5 * side, side), kind)
        in_left = np.arange(side) < SIDE
        left, right = (np.array([centre(view * half) for view in views]) for half in (in_left, ~in_left))
        line, middle = right - left, (right + left) / 2
        found = {
            "rotation": (np.degrees(np.arctan2(line[:, 1], line[:, 0])), bounds.rotation_degrees),
            "zoom": (np.hypot(*line.T) / SIDE - 1, bounds.zoom),
            "right": (middle[:, 0] / side - 0.5, bounds.shift),
            "down": (middle[:, 1] / side - 0.5, bounds.shift),
        }
        for name, (values, bound) in found.items():
            slack = 1.0 if name == "rotation" else 0.02  # noise moves the middle of a spot a little
            assert -1.1 * bound - slack < values.min() < -0.8 * bound + slack, name
            assert 0.8 * bound - slack < values.max() < 1.1 * bound + slack, name

    @pytest.mark.parametrize("kind", KINDS)
    def test_left_stays_left(self, kind):
        assert max(centre(view)[0] for view in views_of(blob(0.3 * SIDE, 0.5 * SIDE), kind)) < SIDE / 2

    @pytest.mark.parametrize("kind", KINDS)
    def test_brightness_and_contrast_keep_to_their_bounds_and_use_them(self, kind):
        bounds = AUGMENTATIONS[kind]
        halves = np.repeat(np.array([100, 160], np.uint8), SIDE // 2)[None].repeat(SIDE, axis=0)
        views = views_of(halves, kind).astype(float)
        left, right = views[:, 10:-10, :10].mean((1, 2)), views[:, 10:-10, -10:].mean((1, 2))
        contrast = np.abs((right - left) / 60 - 1)
        assert 0.8 * bounds.contrast <= contrast.max() <= bounds.contrast + 0.05
        brightness = np.abs((left + right) / 2 - 130)
        assert 0.8 * 255 * bounds.brightness <= brightness.max() <= 255 * bounds.brightness + 2

    def test_a_strength_is_a_factor_on_every_bound(self):
        """Half of strong is as far as light goes, where the bounds are twice as wide."""
        image = blob(0.3 * SIDE, 0.5 * SIDE)
        ids = np.arange(50, dtype=np.uint64)
        batch = np.broadcast_to(image[None, ..., None], (50, SIDE, SIDE, 1))
        half = augmented(batch, ids, kind="geometry", seed=0, view=1, strength=0.5)
        places = [centre(view[..., 0]) for view in half]
        whole = [centre(view[..., 0]) for view in augmented(batch, ids, kind="geometry", seed=0, view=1)]
        moved, moved_whole = (np.subtract(found, centre(image)) for found in (places, whole))
        np.testing.assert_allclose(moved, moved_whole / 2, atol=0.6)
        assert np.abs(moved_whole).max() > 3

    def test_no_strength_zooms_an_image_away(self, pixels, ids):
        assert augmented(pixels, ids, kind="geometry", seed=0, view=1, strength=100.0).shape == pixels.shape

    def test_mirrored_views_are_half_of_them_and_only_where_asked_for(self):
        image = blob(0.25 * SIDE, 0.5 * SIDE)
        batch = np.broadcast_to(image[None, ..., None], (200, SIDE, SIDE, 1))
        ids = np.arange(200, dtype=np.uint64)
        mirrored = augmented(batch, ids, kind="light", seed=0, view=1, flip=True)
        plain = augmented(batch, ids, kind="light", seed=0, view=1)
        turned = np.array([centre(view[..., 0])[0] > SIDE / 2 for view in mirrored])
        assert 70 < turned.sum() < 130
        np.testing.assert_array_equal(mirrored[turned], plain[turned][:, :, ::-1])
        np.testing.assert_array_equal(mirrored[~turned], plain[~turned])

    def test_noise_has_the_deviation_stated_and_differs_between_pixels_and_images(self):
        views = views_of(np.full((SIDE, SIDE), 120, np.uint8), "strong", count=20).astype(float)
        noise = views - views.mean((1, 2), keepdims=True)
        assert noise.std() == pytest.approx(AUGMENTATIONS["strong"].noise_deviation, rel=0.05)
        flat = noise.reshape(20, -1)
        assert np.abs(np.corrcoef(flat) - np.eye(20)).max() < 0.15
        assert abs(np.corrcoef(flat[:, :-1].ravel(), flat[:, 1:].ravel())[0, 1]) < 0.05


class TestRefused:
    @pytest.mark.parametrize("kind", ["none", "flip"])
    def test_kinds(self, pixels, ids, kind):
        with pytest.raises(ValueError, match=f"kind must be one of {', '.join(KINDS)}, but got '{kind}'; without"):
            augmented(pixels, ids, kind=kind, seed=0, view=1)

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((5, 8, 9, 1), np.uint8), ((5, 8, 8, 4), np.uint8), ((5, 8, 8), np.uint8), ((5, 8, 8, 1), np.float32)],
        ids=str,
    )
    def test_pixels(self, ids, shape, dtype):
        with pytest.raises(ValueError, match=r"pixels must be uint8 \(images, side, side, 1 or 3\), but got"):
            augmented(np.zeros(shape, dtype), ids, kind="light", seed=0, view=1)

    @pytest.mark.parametrize("ids", [np.arange(4, dtype=np.uint64), np.arange(5)], ids=["too few", "signed"])
    def test_ids(self, pixels, ids):
        with pytest.raises(ValueError, match=r"image_ids must be uint64 \(5,\), one an image, but got"):
            augmented(pixels, ids, kind="light", seed=0, view=1)


def test_the_axis_offers_every_augmentation_and_none():
    assert CHOICES["augmentation"] == ("none", *AUGMENTATIONS)


@pytest.mark.parametrize(
    ("views", "seen"),
    [(0, [1, 2, 3, 4, 5, 6, 7]), (1, [1] * 7), (3, [1, 2, 3, 1, 2, 3, 1]), (9, [1, 2, 3, 4, 5, 6, 7])],
)
def test_views_are_taken_in_turn(views, seen):
    assert [view_of_epoch(epoch, views) for epoch in range(1, 8)] == seen


class TestMasks:
    """A mask moves as its image does, and stays a mask."""

    IDS = np.arange(12, dtype=np.uint64)

    @pytest.mark.parametrize("kind", ["light", "strong"])
    def test_a_mask_follows_its_image(self, kind):
        """Of an image that is its own mask the view, thresholded, is the view of the mask."""
        down, across = np.mgrid[:48, :48]
        inside = (down - 20) ** 2 / 150 + (across - 26) ** 2 / 60 < 1
        pixels = np.repeat(np.where(inside, 200, 40).astype(np.uint8)[np.newaxis, ..., np.newaxis], 12, axis=0)
        masks = np.repeat(np.where(inside, 255, 0).astype(np.uint8)[np.newaxis, ..., np.newaxis], 12, axis=0)
        views = augmented(pixels, self.IDS, kind=kind, seed=1, view=2)
        moved = augmented_masks(masks, self.IDS, kind=kind, seed=1, view=2)
        assert set(np.unique(moved)) == {0, 255}
        assert (moved != masks).any(axis=(1, 2, 3)).all()
        for view, mask in zip(views.astype(float), moved, strict=True):
            middle = (view.min() + view.max()) / 2
            assert ((view > middle) == (mask > 0)).mean() > 0.98

    def test_it_follows_from_seed_view_and_image_alone(self):
        masks = np.where(np.random.default_rng(0).random((12, 16, 16, 1)) < 0.5, 255, 0).astype(np.uint8)
        whole = augmented_masks(masks, self.IDS, kind="strong", seed=1, view=2)
        alone = augmented_masks(masks[5:6], self.IDS[5:6], kind="strong", seed=1, view=2)
        np.testing.assert_array_equal(whole[5:6], alone)
        assert (augmented_masks(masks, self.IDS, kind="strong", seed=1, view=3) != whole).any()
