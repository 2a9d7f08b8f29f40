"""A training that is interrupted and begun again is, bit for bit, the one that was not; its files are those as well."""

from collections.abc import Callable, Collection, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import keras
import numpy as np
import pytest

from cxr_models import segmentation, training
from cxr_models.backbones import BACKBONES
from cxr_models.epochs import Turns
from cxr_models.trial import (
    BEST_WEIGHTS,
    CHECKPOINT,
    SEGMENT,
    VALIDATION_SCORES,
    EpochMetrics,
    Objective,
    TrialConfig,
    TrialData,
)
from tests.trainings import LOSS, epochs_of, images_of, in_workers, job, keeping

DICE = Objective("dice", "max", SEGMENT)
MACRO_F1 = Objective("macro_f1", "max")
TINY = TrialConfig("vanilla_cnn", image_side=70, freeze="none", batch_size=8, epochs=4, learning_rate=3e-3)
MOBILE = replace(TINY, backbone="mobilenet_v2_0.35", image_side=32, dropout=0.3)
UNET = TrialConfig("unet", image_side=16, unet_filters=2, unet_depth=1, freeze="none", batch_size=8, epochs=4)

Training = Callable[..., Generator[EpochMetrics, bool, None]]


@dataclass(frozen=True)
class Case:
    """A training, and the epochs after which it is interrupted.

    Attributes:
        kept: its frozen layers' features are stored.
        folds: 0 for one validation part.
        again: its validation losses are given.
        whole: how many epochs it has, where it is not those of its configuration.
    """

    config: TrialConfig
    stops: tuple[int, ...] = (1, 2, 3)
    kept: bool = False
    folds: int = 0
    again: tuple[float, ...] = ()
    objective: Objective = LOSS
    whole: int = 0

    def data(self, folder: Path) -> TrialData:
        folder.mkdir()
        side = self.config.image_side
        data = images_of(folder, side, train=20, val=10)
        if self.folds:
            pool = np.arange(30)
            folds = tuple(pool[(pool // 2) % self.folds == fold] for fold in range(self.folds))
            data = replace(data, train=pool, val=pool, folds=folds)
        if self.objective.task == SEGMENT:
            inside = np.load(data.pixels[side]) > 100
            np.save(folder / "masks.npy", np.where(inside, 255, 0).astype(np.uint8))
            data = replace(data, masks={side: folder / "masks.npy"})
        if self.config.weights == "bundled":
            row = BACKBONES[self.config.backbone]
            data = replace(data, weights={(row.name, "bundled", side): row.bundled_path})
        return keeping(data, [self.config], folder / "features") if self.kept else data

    def begin(self, data: TrialData, folder: Path, known: int = 0) -> Generator[EpochMetrics, bool, None]:
        home = segmentation if self.objective.task == SEGMENT else training
        if self.again:
            return home.train_again("t", self.config, data.together(), folder, self.again, known=known)
        run: Training = home.run_segmentation if home is segmentation else home.run_trial
        return run("t", self.config, data, folder, self.objective, known=known)


PHASES = replace(
    MOBILE,
    freeze="all>convs:1",
    probe_share=0.5,
    optimizer="adam>rmsprop",
    schedule="cosine>exponential",
    epochs=6,
    warmup=0.2,
)
CASES = {
    "everything trains": Case(replace(TINY, dropout=0.3, optimizer="sgd", output="sigmoid"), (1, 3)),
    "a cached head": Case(replace(MOBILE, freeze="all", weights="bundled", learning_rate=0.05), (1, 2, 3), kept=True),
    "a hopeless head": Case(replace(MOBILE, freeze="all", learning_rate=0.05), (1, 2, 3), kept=True, whole=3),
    "partly unfrozen": Case(
        replace(
            MOBILE,
            freeze="convs:1",
            weights="bundled",
            augmentation="light",
            schedule="plateau",
            learning_rate=0.3,
            layer_decay=0.5,
            weight_decay=0.01,
            class_weights="balanced",
            loss="focal",
            epochs=9,
        ),
        (2, 5, 8),
        kept=True,
        objective=MACRO_F1,
    ),
    "two phases": Case(PHASES, (1, 3, 4, 5), kept=True),
    "two phases of which patience ends the first": Case(
        replace(PHASES, weights="bundled", patience=1, learning_rate=1e-30, phase_rate=1e27, epochs=8),
        (1, 2, 3),
        kept=True,
        whole=6,
    ),
    "folds": Case(replace(PHASES, epochs=4), (1, 2, 3), kept=True, folds=3),
    "batch norms that train": Case(replace(MOBILE, freeze="stages:1", batch_norm="train", taps=2), (1, 3)),
    "balanced sampling from pixels": Case(
        replace(TINY, sampling="balanced", augmentation="strong", optimizer="adamw", label_smoothing=0.1), (2,)
    ),
    "a segmentation": Case(
        replace(UNET, dropout=0.2, augmentation="strong", schedule="plateau", learning_rate=0.03),
        (1, 3),
        objective=DICE,
    ),
    "a segmentation with folds": Case(UNET, (1, 2), objective=DICE, folds=2),
    "a final training": Case(replace(PHASES, schedule="plateau>cosine"), (1, 3, 4), again=(1.0, 1.1, 1.2, 0.8, 0.7)),
    "a final segmentation": Case(replace(UNET, schedule="plateau"), (2,), again=(1.0, 1.1, 1.2), objective=DICE),
    "patience": Case(replace(TINY, optimizer="sgd", learning_rate=1e-30, patience=2, epochs=9), (1, 2, 3), whole=3),
}
QUICK = ("everything trains", "a segmentation")  # the others take seconds each to compile
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


def told(epochs: list[EpochMetrics]) -> list[tuple[object, ...]]:
    """All of each epoch that must be the same; none is compared by what it took."""
    return [(one.epoch, one.phase, one.learning_rate, one.train, one.val, one.folds) for one in epochs]


def left(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """What a trial leaves of its best epoch."""
    names = {path.name for path in folder.iterdir()} - {CHECKPOINT, "record.json"}
    assert names <= {BEST_WEIGHTS, VALIDATION_SCORES}
    return {name: dict(np.load(folder / name)) for name in sorted(names)}


def assert_same_files(folder: Path, expected: Path) -> None:
    found, wanted = left(folder), left(expected)
    assert found.keys() == wanted.keys()
    for name, arrays in wanted.items():
        assert found[name].keys() == arrays.keys()
        for path, value in arrays.items():
            np.testing.assert_array_equal(found[name][path], value, err_msg=f"{name} {path}")


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forget what a process that has ended would have forgotten: weights and optimizers stay warm in this one."""
    used: list[keras.Variable] = []
    enter = Turns.enter

    def noted(self: Turns, watched: dict[str, keras.Variable], optimizer: list[keras.Variable], **given: bool) -> None:
        used.extend((*watched.values(), *optimizer))
        enter(self, watched, optimizer, **given)

    monkeypatch.setattr(Turns, "enter", noted)
    return lambda: [variable.assign(keras.ops.zeros_like(variable) + 77) for variable in used] and None


def begun(case: Case, data: TrialData, folder: Path, stop: int) -> list[EpochMetrics]:
    """The epochs of a training that is left alone after one of them."""
    with closing(epochs_of(case.begin(data, folder))) as epochs:
        return list(islice(epochs, stop))


@pytest.mark.parametrize("name", EACH)
def test_it_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path, spoil: Callable[[], None]) -> None:
    case = CASES[name]
    data = case.data(tmp_path / "data")
    whole = list(epochs_of(case.begin(data, tmp_path / "whole")))
    assert len(whole) == (len(case.again) or case.whole or case.config.epochs)
    for stop in case.stops:
        for known in {stop, max(0, stop - 2)}:
            folder = tmp_path / f"{stop}-{known}"
            first = begun(case, data, folder, stop)
            spoil()
            second = list(epochs_of(case.begin(data, folder, known)))
            assert told([*first[:known], *second]) == told(whole), (stop, known)
            assert second[: stop - known] == first[known:]  # what was measured, seconds and hour too
            assert [one.trial_seconds for one in second] == sorted(one.trial_seconds for one in second)
            assert_same_files(folder, tmp_path / "whole")


class TestInANewProcess:
    """Nothing of it is warm."""

    def test_it_goes_on_as_if_nothing_had_happened(self, tmp_path: Path) -> None:
        self.check(("everything trains",), tmp_path)

    @pytest.mark.slow
    def test_so_does_every_other(self, tmp_path: Path) -> None:
        self.check(CASES, tmp_path)

    def check(self, names: Collection[str], folder: Path) -> None:
        """Each in three processes: one trains it whole, one a part of it, and one what is left."""
        jobs = []
        for number, name in enumerate(names):
            case = CASES[name]
            data, given = case.data(folder / f"data-{number}"), {"program": "tests.trainings:stopping"}
            one = job(str(number), case.config, data, folder / f"whole-{number}", objective=case.objective, **given)
            jobs.append(replace(one, again=case.again))
        halves = [replace(one, work=replace(one.work, folder=folder / f"halves-{one.trial_id}")) for one in jobs]
        for one, name in zip(halves, names, strict=True):
            for home, stop in ((folder / f"whole-{one.trial_id}", 99), (one.work.folder, CASES[name].stops[-1])):
                home.mkdir()
                (home / "stop").write_text(str(stop))
        whole, first = in_workers(folder, [jobs, halves])
        (second,) = in_workers(folder, [[replace(one, known=len(first[one.trial_id])) for one in halves]])
        for one, name in zip(jobs, names, strict=True):
            number = one.trial_id
            found = [[EpochMetrics.from_json(each) for each in told] for told in (first[number], second[number])]
            assert [each.epoch for each in found[0]][-1:] == [CASES[name].stops[-1]]
            expected = [EpochMetrics.from_json(each) for each in whole[number]]
            assert told([*found[0], *found[1]]) == told(expected), name
            assert_same_files(folder / f"halves-{number}" / number, folder / f"whole-{number}" / number)
