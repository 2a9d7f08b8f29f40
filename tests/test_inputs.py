"""What a phase is given of each image: pixels, or stored features of just these images, views and first weights."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from cxr_models.augmentation import augmented
from cxr_models.cuts import Cut
from cxr_models.features import NoRoomError, stored_bytes
from cxr_models.inputs import Inputs
from cxr_models.network import Network, build_network
from cxr_models.steps import Prefix
from cxr_models.trial import TrialConfig, TrialData
from tests.trainings import images_of, keeping

SIDE, TRAIN, VAL = 70, 20, 10
CONFIG = TrialConfig("vanilla_cnn", image_side=SIDE, freeze="all", seed=3)
LIGHT = replace(CONFIG, augmentation="light")
CUT, EARLIER = Cut("pool_4", "average", (128,)), Cut("pool_3", "", (4, 4, 128))
ROWS = np.array([25, 3, 17, 3, 29])


@pytest.fixture(scope="module")
def network() -> Network:
    return build_network(CONFIG, classes=2, channels=1)


@pytest.fixture(scope="module")
def prefix(network) -> Prefix:
    return Prefix(network, [CUT])


@pytest.fixture
def data(tmp_path) -> TrialData:
    return keeping(images_of(tmp_path, SIDE, train=TRAIN, val=VAL), [CONFIG], tmp_path / "features")


@pytest.fixture
def ran(monkeypatch) -> list[int]:
    """How many images each run of a prefix was given."""
    found: list[int] = []
    run = Prefix.__call__

    def noted(self: Prefix, pixels: np.ndarray) -> list[np.ndarray]:
        found.append(len(pixels))
        return run(self, pixels)

    monkeypatch.setattr(Prefix, "__call__", noted)
    return found


@pytest.fixture
def opened(network) -> Iterator[Callable[..., Inputs]]:
    made = []

    def open_(data: TrialData, config: TrialConfig = CONFIG, cut: Cut | None = CUT, **given: object) -> Inputs:
        made.append(Inputs(data, config, network, cut, **given))
        return made[-1]

    yield open_
    for one in made:
        one.close()


def pixels_of(data: TrialData) -> np.ndarray:
    return np.load(data.pixels[SIDE])


def view_of(data: TrialData, rows: np.ndarray, view: int, config: TrialConfig = LIGHT) -> np.ndarray:
    return augmented(pixels_of(data)[rows], data.image_ids[rows], kind=config.augmentation, seed=config.seed, view=view)


class TestPlain:
    def test_pixels_where_there_is_no_cut(self, data, opened, ran):
        plain = opened(data, cut=None)
        for gather in (plain.validation(), plain.training(1)):
            np.testing.assert_array_equal(gather(ROWS), pixels_of(data)[ROWS])
        assert ran == []

    def test_features_of_the_images_asked_for_in_any_order(self, data, opened, prefix):
        stored = opened(data)
        (expected,) = prefix(pixels_of(data))
        for gather in (stored.validation(), stored.training(2)):
            np.testing.assert_array_equal(gather(ROWS), expected[ROWS])

    def test_once_for_all_trials(self, data, opened, ran):
        other_values = replace(CONFIG, learning_rate=0.1, freeze="convs:1", batch_norm="train", hidden_units=(4,))
        first, second = (opened(data, config).asked for config in (CONFIG, other_values))
        assert ran == [TRAIN + VAL]
        assert ((first.found, first.missed), (second.found, second.missed)) == ((0, 1), (1, 0))

    def test_cuts_of_other_trials_are_stored_in_the_same_pass(self, data, opened, ran, network):
        groups = {("vanilla_cnn", "none", SIDE): (CUT, EARLIER)}
        data = replace(data, features=replace(data.features, cuts=groups))
        opened(data, untrained=lambda: network)
        found = opened(data, cut=EARLIER).validation()(ROWS)
        assert ran == [TRAIN + VAL]
        np.testing.assert_array_equal(found, Prefix(network, [EARLIER])(pixels_of(data))[0][ROWS])

    def test_a_later_phase_stores_its_own_cut_only(self, data, opened, ran):
        """What lies behind it may have moved."""
        groups = {("vanilla_cnn", "none", SIDE): (CUT, EARLIER)}
        data = replace(data, features=replace(data.features, cuts=groups))
        opened(data, cut=EARLIER)
        assert stored_bytes(data.features.folder) == (TRAIN + VAL) * EARLIER.bytes_per_image

    def test_no_room(self, data, opened):
        small = replace(data, features=replace(data.features, limit_bytes=1000))
        with pytest.raises(NoRoomError, match=r"its features take 15\.4 kB, the cache may take 1\.0 kB"):
            opened(small)
        with pytest.raises(NoRoomError, match="keeps no features"):
            opened(replace(data, features=None))


class TestViews:
    def test_pixels(self, data, opened):
        views = opened(data, LIGHT, cut=None)
        np.testing.assert_array_equal(views.validation()(ROWS), pixels_of(data)[ROWS])
        for epoch in (1, 2):
            np.testing.assert_array_equal(views.training(epoch)(ROWS), view_of(data, ROWS, epoch))

    @pytest.mark.parametrize("split", ["sorted", "in any order"])
    def test_features_of_each_epoch_and_none_of_the_validation_images(self, split, data, opened, prefix):
        if split != "sorted":
            generator = np.random.default_rng(1)
            data = replace(data, train=generator.permutation(data.train), val=generator.permutation(data.val))
        views = opened(data, LIGHT)
        rows = data.train[[5, 0, 5, 12]]
        for epoch in (1, 2):
            np.testing.assert_array_equal(views.training(epoch)(rows), prefix(view_of(data, rows, epoch))[0])
        np.testing.assert_array_equal(views.validation()(data.val), prefix(pixels_of(data)[data.val])[0])

    def test_one_pass_an_epoch_serves_every_trial(self, data, opened, ran):
        for _ in range(2):
            views = opened(data, LIGHT)
            for epoch in (1, 2, 3):
                views.training(epoch)
                views.training(epoch)
        assert ran == [VAL, TRAIN, TRAIN, TRAIN]

    def test_fewer_views_are_taken_in_turn(self, data, opened, ran):
        views = opened(data, replace(LIGHT, augmented_views=2))
        rows = data.train[:4]
        found = [views.training(epoch)(rows) for epoch in (1, 2, 3)]
        np.testing.assert_array_equal(found[0], found[2])
        assert (found[0] != found[1]).any()
        assert ran == [VAL, TRAIN, TRAIN]
        assert (views.asked.found, views.asked.missed) == (1, 3)

    def test_a_view_that_does_not_fit_is_computed_for_this_trial(self, data, opened, prefix):
        """Those of this phase's validation images are in use and stay."""
        both = (VAL + 1) * CUT.bytes_per_image
        views = opened(replace(data, features=replace(data.features, limit_bytes=both)), LIGHT)
        rows = data.train[:16]
        for epoch in (1, 2):
            np.testing.assert_array_equal(views.training(epoch)(rows), prefix(view_of(data, rows, epoch))[0])
            assert views.source == "pixels: its features take 10.2 kB, the cache may take 5.6 kB"
        assert stored_bytes(data.features.folder) == VAL * CUT.bytes_per_image

    def test_what_a_pass_is_called(self, data, opened):
        views = opened(data, replace(LIGHT, epochs=4, augmented_views=3))
        assert [views._title(view) for view in (0, 2)] == [
            "vanilla_cnn at 70 px",
            "vanilla_cnn at 70 px, light view 2 of 3",
        ]

    def test_the_next_one_is_stored_again_where_there_is_room_by_then(self, data, opened, prefix, network):
        room = (2 * VAL + TRAIN) * CUT.bytes_per_image
        data = replace(data, features=replace(data.features, limit_bytes=room))
        views, other = opened(data, LIGHT), Inputs(data, replace(LIGHT, seed=9), network, CUT)
        other.training(1)
        views.training(1)
        assert views.source.startswith("pixels: ")
        other.close()
        rows = data.train[:16]
        np.testing.assert_array_equal(views.training(2)(rows), prefix(view_of(data, rows, 2))[0])
        assert views.source == CUT.name


class TestKeys:
    """Whatever the bits of a feature depend on is in its name; the rest is not."""

    @pytest.fixture
    def key(self, network, data) -> Callable[..., dict[str, object]]:
        def made(config: TrialConfig = CONFIG, data: TrialData = data, view: int = 0, rows: np.ndarray = ROWS):
            return Inputs(data, config, network, None)._key(rows, view)

        return made

    def test_other_images_views_seeds_and_weights(self, key, data, tmp_path):
        file = tmp_path / "w.weights.h5"
        file.write_bytes(b"one")
        loaded = replace(data, weights={("vanilla_cnn", "none", SIDE): file})
        keys = [
            key(),
            key(rows=ROWS[:3]),
            key(replace(CONFIG, seed=4)),  # which first weights are drawn by
            key(LIGHT, view=1),
            key(LIGHT, view=2),
            key(replace(LIGHT, augmentation="strong"), view=1),
            key(data=loaded),
            key(LIGHT, data=loaded, view=1),
            key(replace(LIGHT, seed=4), data=loaded, view=1),
        ]
        file.write_bytes(b"two!")
        keys.append(key(data=loaded))
        np.save(data.pixels[SIDE], pixels_of(data)[:-1])
        keys.append(key())
        assert len({str(one) for one in keys}) == len(keys)

    def test_the_same(self, key, data, tmp_path):
        file = tmp_path / "w.weights.h5"
        file.write_bytes(b"one")
        loaded = replace(data, weights={("vanilla_cnn", "none", SIDE): file})
        assert key(data=loaded) == key(replace(CONFIG, seed=4), data=loaded)
        others = {"dropout": 0.5, "learning_rate": 1.0, "freeze": "convs:1", "batch_size": 3, "hidden_units": (3,)}
        assert key() == key(replace(CONFIG, **others))
        assert key() == key(LIGHT)  # validation images are not augmented

    def test_the_numerics(self, key, monkeypatch):
        first = key()
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
        assert key() != first
        assert {"keras", "tensorflow", "threads", "device", "batch"} <= first["numerics"].keys()


def test_a_closed_phase_lets_its_features_go(data, opened, network):
    """While it is open they stay, however little room there is."""
    room = (TRAIN + VAL) * CUT.bytes_per_image
    data = replace(data, features=replace(data.features, limit_bytes=room))
    first = Inputs(data, CONFIG, network, CUT)
    other = replace(CONFIG, seed=9)
    with pytest.raises(NoRoomError, match="are in use"):
        opened(data, other)
    first.close()
    opened(data, other)
    assert stored_bytes(data.features.folder) == room
