"""A training that is interrupted and begun again is, bit for bit, the one that was not; its files are those as well."""

import errno
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO

import keras
import numpy as np
import pytest

from cxr_models import checkpoint, segmentation, training
from cxr_models.backbones import BACKBONES
from cxr_models.checkpoint import Checkpoint, CheckpointFile, TrainingState
from cxr_models.epochs import Turns
from cxr_models.mask_metrics import evaluate_masks
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
from sweep.worker import TrialEnd, TrialJob, TrialProcess
from tests.trainings import LOSS, epochs_of, images_of, in_workers, job, keeping

DICE = Objective("dice", "max", SEGMENT)
MACRO_F1 = Objective("macro_f1", "max")
TINY = TrialConfig("vanilla_cnn", image_side=70, freeze="none", batch_size=8, epochs=4, learning_rate=3e-3)
MOBILE = replace(TINY, backbone="mobilenet_v2_0.35", image_side=32, dropout=0.3)
UNET = TrialConfig("unet", image_side=16, unet_filters=4, unet_depth=1, freeze="none", batch_size=8, epochs=4)

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
            inside = np.load(data.pixels[side]) > 110
            np.save(folder / "masks.npy", np.where(inside, 255, 0).astype(np.uint8))
            data = replace(data, masks={side: folder / "masks.npy"})
        if self.config.weights == "bundled":
            row = BACKBONES[self.config.backbone]
            data = replace(data, weights={(row.name, "bundled", side): row.bundled_path})
        return keeping(data, [self.config], folder / "features") if self.kept else data

    def begin(
        self, data: TrialData, folder: Path, known: int = 0, decisions: Collection[int] = ()
    ) -> Generator[EpochMetrics, bool, None]:
        home = segmentation if self.objective.task == SEGMENT else training
        if self.again:
            return home.train_again("t", self.config, data.together(), folder, self.again, known=known)
        run: Training = home.run_segmentation if home is segmentation else home.run_trial
        return run("t", self.config, data, folder, self.objective, decisions=decisions, known=known)


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
    "everything trains": Case(replace(TINY, dropout=0.3, optimizer="sgd", output="sigmoid", schedule="cosine"), (1, 3)),
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
        replace(UNET, dropout=0.2, augmentation="strong", schedule="plateau", learning_rate=0.01, seed=1),
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


def begun(case: Case, data: TrialData, folder: Path, stop: int, *decisions: int) -> list[EpochMetrics]:
    """The epochs of a training that is left alone after one of them."""
    with closing(epochs_of(case.begin(data, folder, decisions=decisions))) as epochs:
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


class Killed(BaseException):
    """Ends a training where it stands; no `except Exception` holds it up."""


SHORT = replace(CASES["a segmentation"], config=replace(CASES["a segmentation"].config, epochs=6))


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    return SHORT.data(tmp_path_factory.mktemp("short") / "data")


@pytest.fixture(scope="module")
def undisturbed(discs: TrialData, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[EpochMetrics], Path]:
    """The epochs of `SHORT`, and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    whole = list(epochs_of(SHORT.begin(discs, folder)))
    best = np.maximum.accumulate([epoch.val["dice"] for epoch in whole])
    assert 2 < len({*best}) < len(whole)  # some epochs are the best so far, and some are not
    return whole, folder


def best_dice(folder: Path) -> float:
    """Of what a trial keeps of its best epoch."""
    with np.load(folder / VALIDATION_SCORES) as kept:
        return evaluate_masks(kept["counts"], SHORT.config.image_side**2)["dice"]


def reported(epochs: Generator[EpochMetrics, bool, None]) -> list[EpochMetrics]:
    """The epochs of a training until it is killed."""
    found = []
    with suppress(Killed):
        found.extend(epochs_of(epochs))
    return found


class TestKilled:
    def test_at_any_file(
        self,
        discs: TrialData,
        undisturbed: tuple[list[EpochMetrics], Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Each of its files is once the one that does not take its place any more: all that follows is the same."""
        whole, expected = undisturbed
        kills = 0
        while True:
            folder, written = tmp_path / str(kills), []
            with monkeypatch.context() as patched:
                patched.setattr(Path, "replace", dying(Path.replace, kills, written))
                first = reported(SHORT.begin(discs, folder, decisions=(2, 5)))
            if len(written) <= kills:
                break
            second = list(epochs_of(SHORT.begin(discs, folder, known=len(first))))
            assert told([*first, *second]) == told(whole), kills
            assert_same_files(folder, expected)
            kills += 1
        assert {CHECKPOINT, BEST_WEIGHTS, VALIDATION_SCORES} == {*written}
        assert written.count(CHECKPOINT) == len(whole)

    @pytest.mark.parametrize("stop", [2, 4])
    def test_the_best_epoch_is_there_where_the_caller_may_end_it(
        self, stop: int, discs: TrialData, undisturbed: tuple[list[EpochMetrics], Path], tmp_path: Path
    ) -> None:
        """Also where the end comes at an epoch that an earlier process had left behind."""
        whole, _ = undisturbed
        for end in range(1, 6):
            folder = tmp_path / str(end)
            begun(SHORT, discs, folder, stop, 1)
            epochs = SHORT.begin(discs, folder, decisions=(1, 2, 3, 4, 5))
            metrics = next(epochs)
            while True:
                best = max(epoch.val["dice"] for epoch in whole[: metrics.epoch])
                if metrics.epoch >= stop:
                    assert best_dice(folder) == best
                if metrics.epoch == end:
                    break
                metrics = epochs.send(True)
            with pytest.raises(StopIteration):
                epochs.send(False)
            assert best_dice(folder) == best

    def test_scratch_files_of_the_killed_are_removed(self, discs: TrialData, tmp_path: Path) -> None:
        code = """if True:
            import os, sys
            from pathlib import Path
            from cxr_models.storage import written_whole
            for name in sys.argv[2:]:
                written_whole(Path(sys.argv[1]) / name).__enter__().write_bytes(b"half of it")
            os._exit(9)
        """
        names = (CHECKPOINT, BEST_WEIGHTS, VALIDATION_SCORES)
        subprocess.run([sys.executable, "-c", code, str(tmp_path), *names], check=False)
        assert len(list(tmp_path.iterdir())) == 3
        next(SHORT.begin(discs, tmp_path))
        assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT}


def dying(replace: Callable[..., Path], lives: int, written: list[str]) -> Callable[..., Path]:
    """`Path.replace` until so many files have been written; a training dies of the next."""

    def noted(self: Path, target: Path) -> Path:
        written.append(target.name)
        if len(written) > lives:
            raise Killed
        return replace(self, target)

    return noted


HARMS = ("missing", "empty", "cut", "cut short", "other bits", "pickled")


def harm(path: Path, how: str) -> None:
    """What a full disk, a power failure or a person may do to a file."""
    whole = path.read_bytes()
    third = len(whole) // 3
    path.unlink()
    if how != "missing":
        harmed = {
            "empty": b"",
            "cut": whole[:third],
            "cut short": whole[:-1],
            "other bits": whole[:third] + bytes(255 - byte for byte in whole[third : third + 64]) + whole[third + 64 :],
            "pickled": pickle.dumps({"course": [print]}),
        }
        path.write_bytes(harmed[how])


class TestTorn:
    """What is told of a file by itself."""

    FILES = (CHECKPOINT, BEST_WEIGHTS, VALIDATION_SCORES)

    def written(self, folder: Path, best: int) -> CheckpointFile:
        """Of three epochs; the weights of the best lie beside it, if there is one."""
        generator = np.random.default_rng(0)
        weights = {"a/kernel": generator.random((30, 20)).astype(np.float32)}
        for name in (BEST_WEIGHTS, VALIDATION_SCORES) if best else ():
            np.savez(folder / name, **weights)
        state = TrainingState(weights, [np.int64(3), np.float32(0.1), *weights.values()])
        course = tuple(EpochMetrics("t", epoch, 0, 1e-3, {"loss": 0.1 + 0.2}, {}, 1.0, 1.0) for epoch in (1, 2, 3))
        file = CheckpointFile(folder, "mine", (BEST_WEIGHTS, VALIDATION_SCORES))
        file.write(Checkpoint(course, best, (state, state), {"index": np.arange(3)} if best == 3 else None))
        return file

    @pytest.mark.parametrize("best", [0, 2, 3])
    def test_what_was_written_is_read(self, best: int, tmp_path: Path) -> None:
        self.written(tmp_path, best)
        found = CheckpointFile(tmp_path, "mine", (BEST_WEIGHTS, VALIDATION_SCORES)).read()
        assert found.best == best
        assert [epoch.train for epoch in found.course] == [{"loss": 0.1 + 0.2}] * 3
        assert (found.scores is not None) == (best == 3)
        for state in found.trainings:
            assert [value.dtype for value in state.optimizer] == [np.int64, np.float32, np.float32]
            np.testing.assert_array_equal(state.optimizer[2], state.weights["a/kernel"])

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("how", HARMS)
    def test_nothing_is_read_and_nothing_stays(self, how: str, name: str, tmp_path: Path) -> None:
        file = self.written(tmp_path, best=2)
        assert file.read().best == 2
        harm(tmp_path / name, how)
        assert file.read() == Checkpoint()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", FILES[1:])
    def test_the_files_beside_it_do_not_matter_while_the_last_epoch_is_the_best(
        self, name: str, tmp_path: Path
    ) -> None:
        file = self.written(tmp_path, best=3)
        harm(tmp_path / name, "cut")
        assert file.read().best == 3

    def test_wherever_it_ends(self, tmp_path: Path) -> None:
        self.written(tmp_path, best=0)
        whole = (tmp_path / CHECKPOINT).read_bytes()
        for size in range(0, len(whole), 97):
            (tmp_path / CHECKPOINT).write_bytes(whole[:size])
            assert CheckpointFile(tmp_path, "mine", ()).read() == Checkpoint(), size

    @pytest.mark.parametrize("room", [0, 50, 2_500, 6_000])
    def test_a_file_that_the_system_cuts_off_is_an_error_and_the_one_before_stays(
        self, room: int, tmp_path: Path
    ) -> None:
        """A bound on the size of files stands in for a full disk: the writes themselves fail, in the middle."""
        file = self.written(tmp_path, best=0)
        state = TrainingState({"a": np.random.default_rng(0).random(1000)}, [np.zeros(10)])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                file.write(Checkpoint(file.read().course, 0, (state,)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
        assert len(file.read().trainings) == 2

    def test_it_never_holds_what_would_be_executed(self, tmp_path: Path) -> None:
        np.savez(tmp_path / CHECKPOINT, course=np.array([print], dtype=object))
        assert CheckpointFile(tmp_path, "mine", ()).read() == Checkpoint()


class TestOfNoUse:
    """A checkpoint that cannot be gone on from is begun anew from, and is no failure."""

    @pytest.fixture
    def folder(self, discs: TrialData, tmp_path: Path) -> Path:
        """Left after the fourth epoch; the third is the best."""
        begun(SHORT, discs, tmp_path / "trial", 4)
        assert {path.name for path in (tmp_path / "trial").iterdir()} == {CHECKPOINT, BEST_WEIGHTS, VALIDATION_SCORES}
        return tmp_path / "trial"

    def check(
        self, discs: TrialData, undisturbed: tuple[list[EpochMetrics], Path], folder: Path, known: int, *, anew: bool
    ) -> None:
        whole, expected = undisturbed
        hour = 1000 * time.time()
        epochs = list(epochs_of(SHORT.begin(discs, folder, known)))
        assert told(epochs) == told(whole[known:])
        assert (min(epoch.ended_ms for epoch in epochs) >= int(hour)) == (anew or known >= 4)
        assert_same_files(folder, expected)

    @pytest.mark.parametrize(("name", "how"), [(CHECKPOINT, "cut"), (BEST_WEIGHTS, "missing")])
    def test_torn(
        self,
        name: str,
        how: str,
        folder: Path,
        discs: TrialData,
        undisturbed: tuple[list[EpochMetrics], Path],
    ) -> None:
        harm(folder / name, how)
        self.check(discs, undisturbed, folder, 3, anew=True)

    @pytest.mark.parametrize(
        ("member", "other"),
        [("config", {"seed": 2}), ("config", {"epochs": 7}), ("objective", replace(DICE, metric="iou"))],
    )
    def test_of_another_training(
        self,
        member: str,
        other: object,
        folder: Path,
        discs: TrialData,
        undisturbed: tuple[list[EpochMetrics], Path],
        tmp_path: Path,
    ) -> None:
        changed = replace(SHORT.config, **other) if isinstance(other, dict) else other
        begun(replace(SHORT, **{member: changed}), discs, tmp_path / "other", 4)
        shutil.copy(tmp_path / "other" / CHECKPOINT, folder / CHECKPOINT)
        self.check(discs, undisturbed, folder, 3, anew=True)

    def test_of_another_format(
        self,
        folder: Path,
        discs: TrialData,
        undisturbed: tuple[list[EpochMetrics], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.check(discs, undisturbed, folder, 3, anew=False)
        monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        self.check(discs, undisturbed, folder, 3, anew=True)

    def test_of_other_images(self, folder: Path, discs: TrialData) -> None:
        other = replace(discs, train=discs.train[1:])
        assert len(list(epochs_of(SHORT.begin(other, folder)))) == SHORT.config.epochs
        before, after = (
            checkpoint.identity("t", SHORT.config, data, DICE.metric, DICE.mode) for data in (discs, other)
        )
        assert before != after

    def test_of_one_that_was_told_of_more_epochs(
        self, discs: TrialData, undisturbed: tuple[list[EpochMetrics], Path], tmp_path: Path
    ) -> None:
        """The folder may be older than what the caller has written down."""
        begun(SHORT, discs, tmp_path, 2)
        self.check(discs, undisturbed, tmp_path, 4, anew=True)
        assert list(SHORT.begin(discs, tmp_path, 6)) == []


class TestFullDisk:
    @pytest.mark.parametrize("full", [1, 4, 5])
    def test_it_is_said_and_nothing_is_lost(
        self,
        full: int,
        discs: TrialData,
        undisturbed: tuple[list[EpochMetrics], Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The file that does not fit is gone, the ones before it are whole."""
        whole, expected = undisturbed
        savez, calls, found = np.savez, [], []

        def running_out(file: IO[bytes], **arrays: np.ndarray) -> None:
            calls.append(file)
            savez(file, **arrays)
            if len(calls) >= full:
                file.truncate(100)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(np, "savez", running_out)
            with pytest.raises(OSError, match="No space left") as raised:
                found.extend(epochs_of(SHORT.begin(discs, tmp_path)))
        assert raised.value.errno == errno.ENOSPC
        assert {path.name for path in tmp_path.iterdir()} <= {CHECKPOINT, BEST_WEIGHTS, VALIDATION_SCORES}
        for path in tmp_path.iterdir():
            assert dict(np.load(path))
        found = list(epochs_of(SHORT.begin(discs, tmp_path)))
        assert told(found) == told(whole)
        assert_same_files(tmp_path, expected)


@pytest.mark.slow
def test_features_that_were_lost_are_those_of_a_network_that_was_not_trained(
    tmp_path: Path, spoil: Callable[[], None]
) -> None:
    """A pass also stores cuts behind layers that this trial trains; it is begun again when these have moved."""
    config, other = replace(CASES["partly unfrozen"].config, epochs=2), replace(MOBILE, freeze="all", weights="bundled")
    case = Case(config)
    data = keeping(case.data(tmp_path / "data"), [config, other], tmp_path / "features")
    begun(case, data, tmp_path / "trial", 1)
    stored = {path.relative_to(data.features.folder): path.read_bytes() for path in files_of(data)}
    assert len(stored) == 4  # of the images as they are, and of a view; in front of what trains, and behind it
    shutil.rmtree(tmp_path / "features")
    spoil()
    assert len(list(epochs_of(case.begin(data, tmp_path / "trial", known=1)))) == 1
    found = {path.relative_to(data.features.folder): path.read_bytes() for path in files_of(data)}
    assert {path: found[path] for path in found if path in stored} == {
        path: stored[path] for path in stored if path in found
    }
    assert any("average" in path.name for path in found if path in stored)


def files_of(data: TrialData) -> list[Path]:
    return sorted(data.features.folder.rglob("*.f32"))


class TestKilledAtRandom:
    """By the kernel, again and again, until the training is through."""

    KILLS = 10

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "epochs"),
        [("everything trains", 60), ("folds", 60), ("batch norms that train", 40), ("a segmentation", 400)],
    )
    def test_the_epochs_and_the_best_are_the_same(self, name: str, epochs: int, tmp_path: Path) -> None:
        case = replace(CASES[name], config=replace(CASES[name].config, epochs=epochs, learning_rate=1e-3))
        data = case.data(tmp_path / "data")
        program = "sweep.worker:segment" if case.objective.task == SEGMENT else "sweep.worker:train"
        given = {"program": program, "objective": case.objective}
        random, kills = np.random.default_rng(0), 0
        process = TrialProcess(tmp_path / "log", ("cxr_models.training", "cxr_models.segmentation"))
        try:
            whole, _ = lived(process, job("whole", case.config, data, tmp_path, **given))
            begun_s, span_s = whole[0].trial_seconds, whole[-1].trial_seconds - whole[0].trial_seconds
            found: list[EpochMetrics] = []
            while True:
                one = replace(job("t", case.config, data, tmp_path, **given), known=len(found))
                process.close()
                if kills == self.KILLS:
                    reported, end = lived(process, one)
                elif kills % 4 == 3:
                    reported, end = lived(process, one, random.uniform(0.0, begun_s))
                else:
                    reported, end = lived(process, one, random.uniform(0.0, 2 * span_s / self.KILLS), reporting=True)
                found += reported
                if not end.error:
                    break
                assert "SIGKILL" in end.error
                kills += 1
        finally:
            process.close()
        assert kills >= 3  # how many fit follows from the machine's pace
        assert told(found) == told(whole)
        assert_same_files(tmp_path / "t", tmp_path / "whole")


def lived(
    process: TrialProcess, one: TrialJob, life_s: float = 1e6, *, reporting: bool = False
) -> tuple[list[EpochMetrics], TrialEnd]:
    """What a trial reports until it ends or its process is killed, so long after its start or its first report."""
    process.start(one)
    pid = process._process.pid
    killer = threading.Timer(life_s, os.kill, (pid, signal.SIGKILL))
    found: list[EpochMetrics] = []
    try:
        if not reporting:
            killer.start()
        while True:
            for event in process.next():
                if isinstance(event, TrialEnd):
                    return found, event
                found.append(event)
            if not killer.ident:
                killer.start()
    finally:
        killer.cancel()
