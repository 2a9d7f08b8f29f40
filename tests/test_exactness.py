"""What a sweep spares changes no bit: stored features, warm workers and company give the same metrics and weights.

Every trial runs in a worker process, as in a sweep, with one thread. The reference runs the whole network in one graph
from the pixels.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cxr_models.backbones import BACKBONES
from cxr_models.trial import CHOICES, TrialConfig, TrialData
from tests.trainings import cuts_of, images_of, in_workers, job, keeping

TRAIN, VAL, EPOCHS = 20, 16, 3
SIDE = 64
CLASSES = ("a", "b", "c")

# Live batch norms and dropout behind the cut. The boundary of `convs:5` lies inside a residual block.
BASE = TrialConfig(
    "mobilenet_v2_0.35",
    weights="bundled",
    image_side=SIDE,
    batch_norm="train",
    dropout=0.3,
    batch_size=8,
    epochs=EPOCHS,
    seed=3,
)
TRIALS = {
    "all": {"freeze": "all"},
    "convs:2": {"freeze": "convs:2"},
    "convs:5": {"freeze": "convs:5"},
    "stages:1": {"freeze": "stages:1"},
    "all>stages:1": {"freeze": "all>stages:1"},
    "convs:2>all": {"freeze": "convs:2>all"},  # what the first phase moved must not be read from the store
    # First of those that share views: what it trains lies in front of the cuts that it stores for the others.
    "light-deep": {"freeze": "stages:1", "augmentation": "light", "learning_rate": 0.01},
    "light": {"freeze": "all", "augmentation": "light"},
    "light-again": {"freeze": "convs:2", "augmentation": "light", "learning_rate": 0.003, "weight_decay": 0.1},
    "two-views": {"freeze": "convs:2", "augmentation": "light", "augmented_views": 2},
    "affine": {"freeze": "stages:1", "batch_norm": "affine"},
    "taps": {"freeze": "all", "taps": 4},
    "taps-deep": {"freeze": "stages:1", "taps": 2},
    "rich": {
        "freeze": "all>stages:1",
        "optimizer": "adam>rmsprop",
        "schedule": "cosine>plateau",
        "warmup": 0.1,
        "layer_decay": 0.5,
        "loss": "focal",
        "label_smoothing": 0.1,
        "sampling": "balanced",
        "augmentation": "strong",
        "augmentation_strength": 0.5,
        "horizontal_flip": "random",
    },
}
QUICK = ("all", "convs:2", "stages:1", "all>stages:1", "light-deep", "light", "light-again", "taps")
# What takes long to compile runs with the slow tests.
MANY = ("all", "convs:2", "stages:1", "all>stages:1", "light-deep", "light", "affine")
SLOW = {
    "mobilenet_v2_0.35": ("convs:5", "convs:2>all", "two-views", "affine", "rich", "taps-deep"),
    "efficientnet_b0": MANY,
    "resnet50": MANY,
}
COMPARED = [(BASE.backbone, QUICK, name) for name in QUICK] + [
    pytest.param(backbone, names, name, marks=pytest.mark.slow) for backbone, names in SLOW.items() for name in names
]


class Runs(NamedTuple):
    """Records of the same trials, from the pixels and from stored features."""

    uncached: dict[str, Any]
    cached: dict[str, Any]


def config_of(backbone: str, name: str) -> TrialConfig:
    weights = BASE.weights if backbone == BASE.backbone else "none"
    return replace(BASE, backbone=backbone, weights=weights, **TRIALS[name])


def data_of(folder: Path, **sizes: int) -> TrialData:
    data = images_of(folder, SIDE, **{"train": TRAIN, "val": VAL, **sizes}, classes=CLASSES)
    return replace(data, weights={("mobilenet_v2_0.35", "bundled", SIDE): BACKBONES["mobilenet_v2_0.35"].bundled_path})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[[str, tuple[str, ...]], Runs]:
    @cache
    def run(backbone: str, names: tuple[str, ...]) -> Runs:
        folder = tmp_path_factory.mktemp(backbone)
        configs, data = {name: config_of(backbone, name) for name in names}, data_of(folder)
        kept = keeping(data, configs.values(), folder / "features")
        found = []
        for name, given in (("uncached", data), ("cached", kept)):
            (folder / name).mkdir()
            jobs = [job(trial, config, given, folder / name) for trial, config in configs.items()]
            found += in_workers(folder / name, [jobs])
        return Runs(*found)

    return run


@pytest.mark.parametrize(("backbone", "names", "name"), COMPARED)
def test_stored_features_give_the_same_bits(backbone, names, name, runs):
    uncached, cached = (records[name] for records in runs(backbone, names))
    assert [epoch["source"] for epoch in uncached["epochs"]] == ["pixels"] * EPOCHS
    cuts = cuts_of(config_of(backbone, name), len(CLASSES))
    assert {epoch["source"] for epoch in cached["epochs"]} == {cut.name for cut in cuts}
    for told, expected in zip(cached["epochs"], uncached["epochs"], strict=True):
        assert (told["train"], told["val"]) == (expected["train"], expected["val"])
    assert cached["weights"] == uncached["weights"]


def test_a_frozen_layer_is_run_once_for_all_trials(runs):
    """Once an image, and where they are augmented once a view; whichever trial comes first stores every cut."""
    _, cached = runs(BASE.backbone, QUICK)
    ran = {name: counted(record, "prefix_images") for name, record in cached.items()}
    assert ran == dict.fromkeys(QUICK, 0) | {"all": TRAIN + VAL, "light-deep": VAL + EPOCHS * TRAIN}


# A small network is trained whole; the compiled steps of a trial serve the later ones.
SMALL = TrialConfig(
    "vanilla_cnn", image_side=70, freeze="none", hidden_units=(8,), dropout=0.3, batch_size=8, epochs=2, seed=1
)


@pytest.fixture(scope="module")
def warm_and_fresh(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trials with each optimizer among others in one worker, and each alone in a worker of its own."""
    folder = tmp_path_factory.mktemp("warm")
    data = data_of(folder)
    data = replace(data, pixels={**data.pixels, 70: images_of(folder, 70, train=TRAIN, val=VAL).pixels[70]})
    targets = {kind: replace(SMALL, optimizer=kind, weight_decay=0.01) for kind in CHOICES["optimizer"]}
    targets["mobilenet"] = replace(BASE, freeze="convs:2")
    data = keeping(data, targets.values(), folder / "features")
    others = {
        "other-values": replace(SMALL, learning_rate=0.02, dropout=0.6, weight_decay=0.3, seed=5),
        "other-batch": replace(SMALL, batch_size=10),
        "other-phases": replace(SMALL, freeze="all>none", optimizer="sgd"),
        "other-shape": replace(BASE, freeze="convs:2", hidden_units=(4,)),
        "other-kind": replace(BASE, freeze="convs:2", batch_norm="frozen", learning_rate=0.01, optimizer="rmsprop"),
    }
    warm = [*others.items(), *targets.items(), *((f"{name}-again", config) for name, config in targets.items())]
    groups = [[job(name, config, data, folder) for name, config in warm]]
    (folder / "alone").mkdir()
    groups += [[job(name, config, data, folder / "alone")] for name, config in targets.items()]
    warm_records, *alone = in_workers(folder, groups)
    return warm_records, {name: record for records in alone for name, record in records.items()}


@pytest.mark.parametrize("again", ["", "-again"])
@pytest.mark.parametrize("name", [*CHOICES["optimizer"], "mobilenet"])
def test_a_warm_worker_gives_the_bits_of_a_fresh_one(name, again, warm_and_fresh):
    warm, fresh = warm_and_fresh
    assert warm[name + again]["epochs"] == fresh[name]["epochs"]
    assert warm[name + again]["weights"] == fresh[name]["weights"]
    assert len({record["pid"] for record in (*warm.values(), fresh[name])}) == 2


def test_each_optimizer_is_another_training(warm_and_fresh):
    """Or the test above would hold for a worker that ignores what it is told."""
    _, fresh = warm_and_fresh
    ends = [fresh[kind]["epochs"][-1]["val"]["loss"] for kind in CHOICES["optimizer"]]
    assert len(set(ends)) >= 3  # AdamW is Adam here: the decay of all of them is decoupled


@pytest.mark.slow
def test_two_trials_at_once_give_the_bits_of_one_after_the_other(tmp_path):
    """They compute the features together, each a part of them."""
    images = 200
    configs = {"slower": replace(BASE, freeze="convs:2", epochs=1), "faster": replace(BASE, freeze="all", epochs=1)}
    data = data_of(tmp_path, train=images - VAL)
    found = {}
    for place in ("apart", "together"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "peers").write_text(str(len(configs)))
        kept = keeping(data, configs.values(), tmp_path / place / "features")
        program = "tests.trainings:meeting" if place == "together" else "tests.trainings:recording"
        groups = [[job(name, config, kept, tmp_path / place, program=program)] for name, config in configs.items()]
        first, second = in_workers(tmp_path / place, groups, together=place == "together")
        found[place] = first | second
    shares = {place: [counted(record, "prefix_images") for record in found[place].values()] for place in found}
    assert shares["apart"] == [images, 0]
    assert sum(shares["together"]) == images
    assert min(shares["together"]) > 0
    stored = {place: stored_files(tmp_path / place / "features") for place in found}
    assert len(stored["apart"]) == 2
    assert stored["together"] == stored["apart"]
    for name in configs:
        assert found["together"][name]["epochs"] == found["apart"][name]["epochs"]
        assert found["together"][name]["weights"] == found["apart"][name]["weights"]


def stored_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*.f32")}


def test_only_another_shape_is_traced_anew(tmp_path):
    """Learning rate, dropout, weight decay and seed are values; the size of a batch is a shape."""
    data = data_of(tmp_path)
    data = replace(data, pixels=images_of(tmp_path, 70, train=TRAIN, val=VAL, classes=CLASSES).pixels)
    values = [
        {},
        {"learning_rate": 0.02},
        {"dropout": 0.6},
        {"dropout": 0.0},
        {"weight_decay": 0.3},
        {"seed": 5, "class_weights": "balanced"},
        {"batch_size": 10},
        {"batch_size": 8, "epochs": 3},
    ]
    jobs = [job(str(number), replace(SMALL, **given), data, tmp_path) for number, given in enumerate(values)]
    (records,) = in_workers(tmp_path, [jobs])
    traced = [(counted(record, "train_traces"), counted(record, "inference_traces")) for record in records.values()]
    assert traced == [(1, 1), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (1, 0), (0, 0)]


def counted(record: dict[str, Any], what: str) -> int:
    return record["counted"].get(what, 0)
