"""A trial with folds is the mean of the trainings it consists of, each as if it had run alone."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from cxr_models import training
from cxr_models.epochs import DivergedError, Turns, drawn_images, mean_epoch
from cxr_models.hopeless import same_answer
from cxr_models.training import run_trial, train_again
from cxr_models.trial import BEST_WEIGHTS, VALIDATION_SCORES, EpochMetrics, Objective, TrialConfig, TrialData
from tests.trainings import LOSS, drain, images_of, keeping

SIDE, IMAGES, FOLDS = 32, 30, 3
MOBILE = TrialConfig("mobilenet_v2_0.35", image_side=SIDE, freeze="none", batch_size=8, epochs=2, dropout=0.3)
MACRO_F1 = Objective("macro_f1", "max")


@pytest.fixture
def data(tmp_path: Path) -> TrialData:
    """30 images in 3 folds of both classes, and 6 of the test set."""
    pool = np.arange(IMAGES)
    folds = tuple(pool[(pool // 2) % FOLDS == fold] for fold in range(FOLDS))
    return replace(images_of(tmp_path, SIDE, train=IMAGES, val=0), train=pool, val=pool, folds=folds)


def kept(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / VALIDATION_SCORES) as arrays:
        return dict(arrays)


EVERYTHING = replace(MOBILE, batch_norm="train", schedule="cosine")
PHASES = replace(MOBILE, freeze="all>convs:1", optimizer="adam>sgd", warmup=0.2)
AUGMENTED = replace(MOBILE, freeze="all", augmentation="light", class_weights="balanced")


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        pytest.param(EVERYTHING, False, id="everything trains", marks=pytest.mark.slow),
        pytest.param(PHASES, False, id="phases", marks=pytest.mark.slow),
        pytest.param(PHASES, True, id="phases from features"),
        pytest.param(AUGMENTED, True, id="augmented from features", marks=pytest.mark.slow),
        pytest.param(AUGMENTED, False, id="augmented", marks=pytest.mark.slow),
    ],
)
def test_each_fold_is_trained_as_if_alone(config: TrialConfig, stored: bool, data: TrialData, tmp_path: Path) -> None:
    if stored:
        data = keeping(data, [config], tmp_path / "features")
    epochs = drain(run_trial("t", config, data, tmp_path / "together", LOSS))
    alone = [
        drain(run_trial("t", config, one, tmp_path / f"alone-{number}", LOSS))
        for number, one in enumerate(data.in_turn)
    ]
    assert len(epochs) == config.epochs
    for together, *single in zip(epochs, *alone, strict=True):
        assert list(together.folds) == [each.val for each in single]
        assert together.val == {name: fmean(each.val[name] for each in single) for name in single[0].val}
        assert together.train == {name: fmean(each.train[name] for each in single) for name in single[0].train}
        assert together.learning_rate == single[0].learning_rate


def test_every_image_is_predicted_once_and_by_a_training_that_had_not_seen_it(
    data: TrialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[set[int]] = []

    def noted(config: TrialConfig, own: TrialData, epoch: int) -> np.ndarray:
        found = drawn_images(config, own, epoch)
        trained.append({*found.tolist()})
        return found

    monkeypatch.setattr("cxr_models.epochs.drawn_images", noted)
    config = replace(MOBILE, freeze="all", epochs=1)
    (epoch,) = drain(run_trial("t", config, data, tmp_path / "t", MACRO_F1))
    found = kept(tmp_path / "t")
    assert sorted(found["index"]) == list(range(IMAGES))
    assert (found["labels"] == data.labels[found["index"]]).all()
    for fold, seen in enumerate(trained):
        own = {*found["index"][found["fold"] == fold].tolist()}
        assert own == {*data.folds[fold].tolist()}
        assert seen == {*range(IMAGES)} - own
    loss = [-found["scores"][k, label] for k, label in enumerate(found["labels"])]
    by_fold = [np.mean(np.array(loss)[found["fold"] == fold]) for fold in range(FOLDS)]
    assert epoch.val["loss"] == pytest.approx(np.mean(by_fold))


def test_scores_are_those_of_the_best_mean_and_no_weights_are_kept(data: TrialData, tmp_path: Path) -> None:
    config = replace(MOBILE, freeze="all", learning_rate=0.05, epochs=4)
    epochs = drain(run_trial("t", config, data, tmp_path / "t", LOSS))
    best = min(epochs, key=lambda epoch: epoch.val["loss"])
    found = kept(tmp_path / "t")
    for fold, told in enumerate(best.folds):
        own = found["fold"] == fold
        assert told["loss"] == pytest.approx(-found["scores"][own, found["labels"][own]].mean(), rel=1e-5)
    assert not (tmp_path / "t" / BEST_WEIGHTS).exists()


def test_a_training_on_all_folds_repeats_the_learning_rates(data: TrialData, tmp_path: Path) -> None:
    """Schedules and patience go by the mean, so that a final training can follow them without a validation part."""
    config = replace(MOBILE, freeze="all>convs:1", schedule="plateau", learning_rate=0.3, patience=5, epochs=24)
    data = keeping(data, [config], tmp_path / "features")
    epochs = drain(run_trial("t", config, data, tmp_path / "t", LOSS))
    losses = [epoch.val["loss"] for epoch in epochs]
    again = drain(train_again("again", config, data.together(), tmp_path / "again", losses))
    assert [epoch.learning_rate for epoch in again] == [epoch.learning_rate for epoch in epochs]
    assert [epoch.phase for epoch in again] == [epoch.phase for epoch in epochs]
    assert len({epoch.learning_rate for epoch in epochs}) > 2  # the plateau was met
    assert (tmp_path / "again" / BEST_WEIGHTS).is_file()
    assert not again[0].folds


def test_a_single_training_keeps_the_network_to_itself() -> None:
    class Never:
        def numpy(self) -> None:
            raise AssertionError("a weight was copied, though nobody else takes the network")

    turns = Turns(1)
    turns.enter({"weight": Never()}, [Never()])  # type: ignore[dict-item, list-item]
    assert list(turns.each()) == [0]


def test_repeats_are_more_trainings(data: TrialData, tmp_path: Path) -> None:
    other = tuple(np.roll(np.arange(IMAGES), 4)[fold * 10 : fold * 10 + 10] for fold in range(FOLDS))
    twice = replace(data, folds=(*data.folds, *other))
    config = replace(MOBILE, freeze="all", epochs=1)
    (epoch,) = drain(run_trial("t", config, twice, tmp_path / "t", LOSS))
    assert len(epoch.folds) == 2 * FOLDS
    found = kept(tmp_path / "t")
    assert (np.bincount(found["index"]) == 2).all()


def test_one_diverging_fold_fails_the_trial(data: TrialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def evaluate(*given: object) -> dict[str, float]:
        ran.append(given)
        return {"loss": float("nan") if len(ran) == 4 else 1.0}  # the validation of the second fold

    monkeypatch.setattr(training, "evaluate", evaluate)
    with pytest.raises(DivergedError, match=r"diverged in epoch 1: training loss 1\.0, validation loss nan"):
        drain(run_trial("t", replace(MOBILE, freeze="all"), data, tmp_path / "t", LOSS))


def test_an_epoch_ends_with_its_last_fold() -> None:
    folds = [EpochMetrics("t", 1, 0, 0.1, {}, {}, 1.0, 1.0, trial_seconds=number, ended_ms=number) for number in (5, 9)]
    assert mean_epoch(folds).ended_ms == 9


def folded(*recalls: tuple[float, float, float]) -> EpochMetrics:
    """An epoch with the recalls of three classes with 10, 20 and 10 images, in each fold."""
    found = []
    for a, b, c in recalls:
        accuracy = (10 * a + 20 * b + 10 * c) / 40
        macro_f1 = 2 * accuracy / (1 + accuracy) / 3
        found.append({"recall/a": a, "recall/b": b, "recall/c": c, "accuracy": accuracy, "macro_f1": macro_f1})
    mean = {name: fmean(each[name] for each in found) for name in found[0]}
    return EpochMetrics("t", 1, 0, 0.1, {}, mean, 1.0, 1.0, folds=tuple(found))


def test_constant_predictors_are_seen_through_the_mean() -> None:
    assert same_answer(folded((1, 0, 0), (1, 0, 0))) == "a"
    assert same_answer(folded((1, 0, 0), (0, 1, 0))) == "a or b"
    assert same_answer(folded((1, 0, 0), (0.9, 0.2, 0))) == ""
