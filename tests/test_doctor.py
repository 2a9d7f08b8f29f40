"""Every diagnosis is made where it is planted and nowhere else: in curves, in published figures, in real trainings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cxr_models.doctor import curves, diagnose, examine
from cxr_models.mask_metrics import count_masks, evaluate_masks
from cxr_models.metrics import evaluate
from cxr_models.trial import SEGMENT, Diagnosis, EpochMetrics, Objective, TrialConfig
from tests.trainings import LOSS, drain, images_of

ACCURACY, MACRO_F1, DICE = Objective("accuracy", "max"), Objective("macro_f1", "max"), Objective("dice", "max", SEGMENT)
CLASSES = ("covid", "normal", "viral")
COUNTS = {"covid": 30, "normal": 50, "viral": 20}
LABELS = np.repeat([0, 1, 2], list(COUNTS.values()))
PRIOR_LOSS = -sum(0.01 * count * math.log(0.01 * count) for count in COUNTS.values())
CONFIG = TrialConfig("mobilenet_v2_0.35", epochs=8)

# Of a training that goes well: a rising accuracy that settles before the end.
TRAIN_LOSS = (1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.22, 0.2)
RIGHT = (0.6, 0.75, 0.85, 0.9, 0.92, 0.93, 0.92, 0.93)
VAL_LOSS = (0.9, 0.7, 0.5, 0.4, 0.35, 0.3, 0.31, 0.3)


def measured(right: float, loss: float) -> dict[str, float]:
    """What `evaluate` gives where this share of each class is right, and the others are taken for the next class."""
    found = np.concatenate(
        [np.where(np.arange(n) < round(right * n), k, (k + 1) % 3) for k, n in enumerate(COUNTS.values())]
    )
    return {**scored(found), "loss": loss}


def scored(predicted: np.ndarray) -> dict[str, float]:
    return evaluate(LABELS, np.log(np.eye(3)[predicted] * 0.9 + 0.1 / 3), CLASSES)


def training(
    val: Sequence[Mapping[str, float]] | None = None, train_loss: Sequence[float] = TRAIN_LOSS
) -> list[EpochMetrics]:
    val = val or [measured(*figures) for figures in zip(RIGHT, VAL_LOSS, strict=True)]
    train = [{"loss": loss, "accuracy": 0.99 - 0.4 * loss} for loss in train_loss]
    return [
        EpochMetrics("t", number + 1, 0, 1e-3, both[0], both[1], 1.0, 1.0)
        for number, both in enumerate(zip(train, val, strict=False))
    ]


def names(found: Sequence[Diagnosis]) -> list[str]:
    return [diagnosis.name for diagnosis in found]


def examined(epochs: Sequence[EpochMetrics], config: TrialConfig = CONFIG, **given: Any) -> list[str]:
    return names(diagnose(epochs, config, MACRO_F1, **{"class_counts": COUNTS, **given}))


def changed(places: Mapping[int, Mapping[str, float]]) -> list[EpochMetrics]:
    """The training that goes well, with other validation figures in some epochs."""
    return training([{**metrics.val, **places.get(metrics.epoch, {})} for metrics in training()])


def all_taken_for(place: int, loss: float = 1.1) -> dict[str, float]:
    return {**scored(np.full(100, place)), "loss": loss, "auroc": 0.6}


def test_a_training_that_goes_well_has_no_diagnosis():
    assert examined(training()) == []
    assert examined(training(), parameters=1000, head_parameters=900) == []


class TestConstantPredictor:
    def test_at_the_best_epoch(self):
        (found,) = diagnose(training([all_taken_for(1)] * 2), CONFIG, MACRO_F1, class_counts=COUNTS)
        assert (found.name, found.grave) == ("constant_predictor", True)
        assert "In epoch 1, the best one, every validation image is taken for normal" in found.evidence
        assert "accuracy, 0.5000" in found.evidence
        assert "in 2 of 2 epochs" in found.evidence
        assert "set batch_norm to frozen" in found.remedy, "for training learns"

    def test_of_a_dead_network(self):
        """Every image also gets the same scores."""
        val = [{**all_taken_for(1), "auroc": 0.5}] * 3
        (found, *_) = diagnose(training(val), CONFIG, MACRO_F1, class_counts=COUNTS)
        assert found.remedy == "Lower the learning rate: the network is dead, every image also gets the same scores."

    def test_at_the_end_of_a_training_that_knew_more(self):
        epochs = changed({epoch: all_taken_for(epoch % 2, 1.5) for epoch in (6, 7, 8)})
        assert examined(epochs) == ["constant_predictor", "unstable_validation"]
        (found, _) = diagnose(training([m.val for m in epochs], [2.0] * 8), CONFIG, MACRO_F1, class_counts=COUNTS)
        assert "In epoch 8, the last one, every validation image is taken for covid" in found.evidence
        assert found.remedy == "Lower the learning rate: the training knew more before it ended like this."

    def test_not_for_its_first_epochs(self):
        assert examined(changed({1: all_taken_for(1), 2: all_taken_for(0), 3: all_taken_for(1)})) == []

    def test_not_where_the_other_classes_are_taken_for_each_other(self):
        swapped = scored(np.array([2, 1, 0])[LABELS])
        assert (swapped["recall/normal"], swapped["accuracy"]) == (1.0, 0.5)
        assert examined(training([{**swapped, "loss": 1.2}] * 2)) == ["class_never_predicted"]

    def test_not_where_every_image_is_of_one_class_and_right(self):
        epochs = training([{"recall/covid": 1.0, "recall/normal": math.nan, "macro_f1": 1.0, "loss": 0.1}] * 2)
        assert examined(epochs) == []

    def test_an_accuracy_alone_must_stay_at_the_share(self):
        """It may equal the share of a class by chance."""
        for course, expected in (([0.5] * 3 + [0.49] * 2, ["constant_predictor"]), ([0.2, 0.5, 0.49, 0.5], [])):
            epochs = curves(val={"accuracy": course})
            assert names(diagnose(epochs, CONFIG, ACCURACY, class_counts=COUNTS)) == expected


class TestNeverPredicted:
    def test_at_the_best_epoch(self):
        predicted = np.where(LABELS == 2, 1, LABELS)
        epochs = changed({6: {**scored(predicted), "macro_f1": 0.95, "loss": 0.3}})
        (found,) = diagnose(epochs, CONFIG, MACRO_F1, class_counts=COUNTS)
        assert (found.name, found.grave) == ("class_never_predicted", True)
        assert found.evidence == (
            "In epoch 6, the best one, not one of 20 validation images of viral is recognised (recall 0.00)."
        )
        assert "Set sampling or class_weights to balanced" in found.remedy
        (found,) = diagnose(epochs, replace(CONFIG, sampling="balanced"), MACRO_F1)
        assert "balanced already" in found.remedy

    def test_also_where_the_class_is_named_but_never_rightly(self):
        """A recall of 0 tells that no image is recognised, not that no other one is taken for the class."""
        predicted = np.where(LABELS == 2, 1, LABELS)
        predicted[np.flatnonzero(LABELS == 0)[:3]] = 2
        epochs = changed({6: {**scored(predicted), "macro_f1": 0.95, "loss": 0.3}})
        (found,) = diagnose(epochs, CONFIG, MACRO_F1, class_counts=COUNTS)
        assert "not one of 20 validation images of viral is recognised" in found.evidence
        assert "predicted" not in found.evidence

    @pytest.mark.parametrize(
        ("counts", "grave"),
        [
            ({"recall/a": (0.9, 40), "recall/b": (0.0, 4)}, False),
            ({"recall/a": (0.9, 40), "recall/b": (0.0, 1)}, False),
            ({"recall/a": (0.9, 40), "recall/b": (0.0, 5)}, True),
            ({"recall/a": (0.9, 40), "recall/b": (0.0, 4), "recall/c": (0.0, 30)}, True),
            ({"recall/a": (0.9, 40), "recall/b": (0.0, None)}, True),
        ],
    )
    def test_a_few_images_may_be_missed_by_chance(self, counts, grave):
        val = {name: recall for name, (recall, _) in counts.items()}
        images = {name.removeprefix("recall/"): own for name, (_, own) in counts.items() if own}
        epochs = training([{**val, "macro_f1": 0.6, "loss": 0.5}] * 2)
        found = next(
            each
            for each in diagnose(epochs, CONFIG, MACRO_F1, class_counts=images)
            if each.name == "class_never_predicted"
        )
        assert found.grave is grave
        number = counts["recall/b"][1]
        told = f"not one of {number} validation image{'' if number == 1 else 's'} of b"
        assert (told if number else "not one validation image of b") in found.evidence
        assert ("That may be chance: no figure of a class holds with fewer than 5" in found.remedy) is not grave

    @pytest.mark.parametrize(("images", "grave"), [(4, False), (5, True)])
    def test_a_final_model_neither(self, images, grave):
        labels = np.repeat([0, 1, 2], [20, 20, images]).astype(np.int32)
        scores = np.log(np.eye(3, dtype=np.float32)[np.minimum(labels, 1)] * 0.9 + 0.03)
        (found,) = examine(labels, scores, ("a", "b", "c"))
        assert (found.name, found.grave) == ("class_never_predicted", grave)
        assert found.evidence == f"Not one of {len(labels)} test images is taken for c."
        assert ("Do not use this final model" in found.remedy) is grave

    def test_not_at_another_epoch_nor_for_one_image(self):
        predicted = np.where(LABELS == 2, 1, LABELS)
        assert examined(changed({2: {**scored(predicted), "loss": 0.3}})) == []
        predicted[-1] = 2
        assert examined(changed({6: {**scored(predicted), "macro_f1": 0.95, "loss": 0.3}})) == []


class TestExplodingValidationLoss:
    def test_beside_a_training_that_learns(self):
        (found,) = diagnose(changed({4: {"loss": 12.0}, 5: {"loss": 96.0}}), CONFIG, MACRO_F1, class_counts=COUNTS)
        assert (found.name, found.grave) == ("exploding_validation_loss", True)
        assert "In epoch 5, the validation loss is 96.0 beside a training loss of 0.300" in found.evidence
        assert "in 2 of 8 epochs it is more than 10 times 1.10" in found.evidence
        assert "Lower the learning rate" in found.remedy
        config = replace(CONFIG, batch_norm="train")
        (found,) = diagnose(changed({8: {"loss": 96.0}}), config, MACRO_F1, class_counts=COUNTS)
        assert "Set batch_norm to frozen" in found.remedy

    def test_not_where_it_comes_back_at_once_or_only_overfits(self):
        assert examined(changed({4: {"loss": 96.0}})) == []
        assert examined(changed({epoch: {"loss": 5.0} for epoch in (5, 6, 7, 8)})) == []

    def test_not_where_training_explodes_too(self):
        epochs = training([{**m.val, "loss": 50.0} for m in training()], train_loss=[40.0] * 8)
        assert "exploding_validation_loss" not in examined(epochs)


class TestLossAtChance:
    @pytest.mark.parametrize("level", [math.log(3), PRIOR_LOSS])
    def test_of_knowing_nothing_or_the_shares_alone(self, level):
        val = [measured(0.4, level + 0.01 * (-1) ** epoch) for epoch in range(8)]
        (found,) = (
            each
            for each in diagnose(training(val, [level] * 8), CONFIG, MACRO_F1, class_counts=COUNTS)
            if each.name != "best_epoch_first"
        )
        assert (found.name, found.grave) == ("loss_at_chance", True)
        assert f"between {level - 0.01:.4f} and {level + 0.01:.4f}: ln 3 = 1.0986" in found.evidence
        assert f"{PRIOR_LOSS:.4f} that of knowing the classes' shares alone" in found.evidence

    def test_of_less_than_nothing(self):
        """A rate far too low: the losses stay where random weights put them."""
        val = [measured(0.12, 2.3 - 0.001 * epoch) for epoch in range(8)]
        found = diagnose(training(val, [2.4] * 8), CONFIG, MACRO_F1, class_counts=COUNTS)
        (chance,) = (each for each in found if each.name == "loss_at_chance")
        assert chance.grave
        assert "lie between 2.2930 and 2.4000: ln 3 = 1.0986 is that of knowing nothing" in chance.evidence
        right = [measured(0.8, 2.3) for _ in range(8)]  # overconfident, and yet it knows
        assert "loss_at_chance" not in examined(training(right, [2.4] * 8))

    def test_not_for_a_validation_loss_that_has_come_back_there(self):
        """An overfitted training may have any validation loss."""
        epochs = changed({epoch: {"loss": math.log(3)} for epoch in (6, 7, 8)})
        assert examined(epochs) == []
        assert examined(training([m.val for m in epochs], [1.2, 1.0, *[math.log(3)] * 6])) == []

    def test_not_where_it_falls(self):
        falling = [1.09 - 0.03 * epoch for epoch in range(8)]
        val = [measured(*figures) for figures in zip(RIGHT, falling, strict=True)]
        assert examined(training(val, falling)) == []


class TestUnstableValidation:
    def test_where_the_epoch_after_the_best_falls_far(self):
        (found,) = diagnose(changed({6: measured(0.93, 0.3), 7: measured(0.7, 0.9)}), CONFIG, MACRO_F1)
        assert (found.name, found.grave) == ("unstable_validation", False)
        assert "is 0.9300 in epoch 6, the best one, and 0.7000 in the next" in found.evidence

    def test_not_where_so_few_images_tell_nothing(self):
        epochs = changed({6: measured(0.93, 0.3), 7: measured(0.82, 0.5)})
        assert examined(epochs, class_counts={"a": 1000, "b": 1000, "c": 1000}) == ["unstable_validation"]
        assert examined(epochs, class_counts={"a": 10, "b": 10, "c": 10}) == []

    def test_not_before_the_best(self):
        assert examined(changed({3: measured(0.5, 0.9)})) == []


class TestStillImproving:
    RISING = tuple(0.5 + 0.05 * epoch for epoch in range(8))

    def test_at_the_last_epoch_allowed(self):
        val = [measured(*figures) for figures in zip(self.RISING, VAL_LOSS, strict=True)]
        (found,) = diagnose(training(val), CONFIG, MACRO_F1, class_counts=COUNTS)
        assert (found.name, found.grave) == ("still_improving", False)
        assert "comes in epoch 8 of 8 allowed" in found.evidence
        assert found.remedy == "Allow more epochs."
        assert examined(training(val), replace(CONFIG, epochs=16)) == [], "halving ended it"

    @pytest.mark.parametrize(
        "course",
        [(0.6, 0.8, 0.9, 0.93, 0.88, 0.92, 0.85, 0.94), (0.86, 0.81, 0.83, 0.88, 0.86, 0.74, 0.77, 0.92)],
        ids=["level", "back from a dip"],
    )
    def test_not_for_a_best_that_is_the_last_by_chance(self, course):
        assert examined(training([measured(right, 0.3) for right in course])) == []

    def test_not_where_nothing_is_left_to_gain(self):
        epochs = training([measured(0.9, 0.6**epoch) for epoch in range(8)])
        assert names(diagnose(epochs, CONFIG, LOSS)) == ["still_improving"]
        epochs = training([measured(0.9, 0.5**epoch) for epoch in range(8)])
        assert names(diagnose(epochs, CONFIG, LOSS)) == []


class TestLaterPhaseUnused:
    TWO = replace(CONFIG, freeze="all>stages:1", epochs=8)

    def phased(self, best: int) -> list[EpochMetrics]:
        epochs = changed({best: measured(0.99, 0.01)})
        return [replace(metrics, phase=int(metrics.epoch > 4)) for metrics in epochs]

    def test_of_a_best_epoch_in_the_probe(self):
        found = diagnose(self.phased(3), self.TWO, MACRO_F1, class_counts=COUNTS)
        (found,) = (each for each in found if each.name == "later_phase_unused")
        assert not found.grave
        assert (
            "The best epoch, 3 of 8 allowed, lies in phase 1 of 2, all: stages:1 has trained nothing" in found.evidence
        )
        assert found.remedy.startswith("Read it as a trial of all;")

    def test_not_in_the_last_phase_nor_where_there_is_one_only(self):
        assert "later_phase_unused" not in names(diagnose(self.phased(7), self.TWO, MACRO_F1, class_counts=COUNTS))
        assert "later_phase_unused" not in names(diagnose(training(), CONFIG, MACRO_F1, class_counts=COUNTS))


class TestBestEpochFirst:
    def test_of_three_epochs_or_more(self):
        epochs = changed({1: measured(0.94, 0.29), 2: measured(0.9, 0.3)})
        (found,) = diagnose(epochs, CONFIG, MACRO_F1, class_counts=COUNTS)
        assert (found.name, found.grave) == ("best_epoch_first", False)
        assert "No epoch of 8 has a better validation macro_f1 than the first" in found.evidence
        assert "or a lower validation loss than its 0.2900" in found.evidence
        assert examined(epochs[:2]) == []

    def test_not_where_the_loss_shows_that_it_still_learns(self):
        assert examined(changed({1: measured(0.94, 0.9), 2: measured(0.9, 0.3)})) == []

    def test_not_where_the_first_is_perfect(self):
        assert examined(changed({1: measured(1.0, 0.01), 2: measured(0.95, 0.3)})) == []


class TestHead:
    @pytest.mark.parametrize(("held", "expected"), [(901, ["head_holds_parameters"]), (900, [])])
    def test_more_than_nine_tenths(self, held, expected):
        assert examined(training(), parameters=1000, head_parameters=held) == expected

    def test_the_remedy_follows_from_the_head(self):
        for config, remedy in ((replace(CONFIG, pooling="flatten"), "pooling to average"), (CONFIG, "hidden_units")):
            (found,) = diagnose([], config, MACRO_F1, parameters=1000, head_parameters=990)
            assert "990 of 1,000 parameters (99.0%)" in found.evidence
            assert remedy in found.remedy


def test_grave_diagnoses_come_first():
    epochs = changed({1: {**scored(np.where(LABELS == 2, 1, LABELS)), "macro_f1": 0.99, "loss": 0.2}})
    found = diagnose(epochs, CONFIG, MACRO_F1, parameters=100, head_parameters=99)
    assert names(found) == ["class_never_predicted", "best_epoch_first", "head_holds_parameters"]


class TestCurves:
    def test_what_a_paper_does_not_give_is_left_out(self):
        first, second = curves(train={"accuracy": [0.9, math.nan]}, val={"loss": [math.nan, 0.5]})
        assert (first.epoch, first.train, first.val) == (1, {"accuracy": 0.9}, {})
        assert (second.epoch, second.train, second.val) == (2, {}, {"loss": 0.5})
        assert diagnose([first, second], CONFIG, ACCURACY) == ()

    @pytest.mark.parametrize("given", [{}, {"train": {"loss": [1.0]}, "val": {"loss": [1.0, 0.9]}}])
    def test_of_one_length(self, given):
        with pytest.raises(ValueError, match=r"expected curves of one length, one value an epoch, but got lengths \["):
            curves(**given)

    def test_shares_not_percent(self):
        with pytest.raises(
            ValueError, match=r"expected accuracy as shares from 0 to 1, but got 92.5; 90.8 % is written"
        ):
            curves(val={"accuracy": [0.1, 92.5], "loss": [3.0, 2.0]})


FULL_BATCHES = {"NORMAL": 234, "PNEUMONIA": 374}  # 19 of 32 images


class TestPublished:
    """Studies of COVID-19 and pneumonia with MobileNetV2 and EfficientNetB0, as their reports tell them."""

    FLATTEN = TrialConfig("mobilenet_v2_1.0", pooling="flatten", hidden_units=(1024, 512), epochs=20)
    PNEUMONIA = TrialConfig("efficientnet_b0", freeze="last:100", batch_norm="train", epochs=10)

    def course(self, best: int) -> list[EpochMetrics]:
        """A validation accuracy that rises to its best epoch; which one is told, the course is ours."""
        rising = [0.909 - 0.2 * 0.8**epoch for epoch in range(best)]
        return curves(val={"accuracy": [*rising, *[0.905] * (20 - best)]})

    def test_a_head_of_64_7_million_parameters_and_a_best_epoch_of_19_of_20(self):
        found = diagnose(self.course(19), self.FLATTEN, ACCURACY, parameters=67_011_140, head_parameters=64_753_156)
        assert names(found) == ["still_improving", "head_holds_parameters"]
        assert "comes in epoch 19 of 20 allowed" in found[0].evidence
        assert "64,753,156 of 67,011,140 parameters (96.6%)" in found[1].evidence
        assert names(diagnose(self.course(16), self.FLATTEN, ACCURACY)) == []

    def test_a_class_with_recall_0_and_one_with_0_20(self):
        blind = {"recall/COVID": 0.55, "recall/Lung_Opacity": 0.6, "recall/Normal": 0.78, "recall/Viral": 0.0}
        for recall, expected in ((0.0, ["class_never_predicted"]), (0.2, [])):
            (table,) = curves(val={name: [value] for name, value in {**blind, "recall/Viral": recall}.items()})
            found = diagnose([table], self.FLATTEN, ACCURACY, parameters=65_459_380, head_parameters=64_753_156)
            assert names(found) == [*expected, "head_holds_parameters"]

    @pytest.mark.parametrize("level", [0.6151, 0.3849])
    def test_a_validation_accuracy_that_is_the_share_of_a_class_for_epochs(self, level):
        epochs = curves(train={"accuracy": [0.97] * 4}, val={"accuracy": [level] * 4})
        (found, *rest) = diagnose(epochs, self.PNEUMONIA, ACCURACY, class_counts=FULL_BATCHES)
        assert found.name == "constant_predictor"
        assert ("PNEUMONIA" if level > 0.5 else "NORMAL") in found.evidence
        assert not rest
        other = curves(val={"accuracy": [level + 0.01] * 4})
        assert "constant_predictor" not in names(diagnose(other, self.PNEUMONIA, ACCURACY, class_counts=FULL_BATCHES))

    def test_a_validation_loss_of_96_and_2202_beside_a_training_accuracy_of_0_97(self):
        epochs = curves(train={"accuracy": [0.90, 0.95, 0.97, 0.97]}, val={"loss": [0.7, 1.5, 96.0, 2202.0]})
        (found, _) = diagnose(epochs, self.PNEUMONIA, LOSS, class_counts=FULL_BATCHES)
        assert found.name == "exploding_validation_loss"
        assert "the validation loss is 2,202.0 beside a training accuracy of 0.970" in found.evidence

    def test_a_best_epoch_of_15_and_0_53_in_the_next(self):
        rising = [0.70 + 0.0118 * epoch for epoch in range(14)]
        epochs = curves(val={"accuracy": [*rising, 0.8651, 0.53]})
        found = diagnose(epochs, replace(self.PNEUMONIA, epochs=20), ACCURACY, class_counts=FULL_BATCHES)
        assert names(found) == ["unstable_validation"]
        assert "is 0.8651 in epoch 15, the best one, and 0.5300 in the next" in found[0].evidence

    def test_a_loss_of_ln_2(self):
        epochs = curves(train={"loss": [0.70, 0.6931, 0.6931, 0.6931]}, val={"loss": [0.6931] * 4})
        found = diagnose(epochs, self.PNEUMONIA, ACCURACY)
        assert names(found) == ["loss_at_chance"]
        assert "ln 2 = 0.6931" in found[0].evidence


SIDE = 16
DISTANCE = np.hypot(*(np.mgrid[:SIDE, :SIDE] - 8))
TRUTH = np.stack([radius > DISTANCE for radius in (3, 4, 5, 6)])[..., np.newaxis]


class TestMasks:
    CONFIG = TrialConfig("unet", freeze="none", epochs=8)

    def epochs(self, predicted: Sequence[np.ndarray], losses: Sequence[float]) -> list[EpochMetrics]:
        found = [evaluate_masks(count_masks(TRUTH.astype(np.uint8), each), SIDE**2) for each in predicted]
        val = [{**each, "loss": loss} for each, loss in zip(found, losses, strict=True)]
        train = [{**each, "loss": loss} for each, loss in zip(found, losses, strict=True)]
        return [
            EpochMetrics("t", number + 1, 0, 1e-3, train[number], each, 1.0, 1.0) for number, each in enumerate(val)
        ]

    def found(self, predicted: Sequence[np.ndarray], losses: Sequence[float]) -> tuple[Diagnosis, ...]:
        return diagnose(self.epochs(predicted, losses), self.CONFIG, DICE, class_counts={"image": 4})

    def shifted(self, by: int) -> np.ndarray:
        return np.roll(TRUTH, by, axis=1)

    def test_none_where_it_learns(self):
        predicted = [self.shifted(by) for by in (5, 4, 3, 2, 1, 1, 1, 1)]
        assert self.found(predicted, TRAIN_LOSS) == ()

    @pytest.mark.parametrize(("full", "name"), [(False, "empty_masks"), (True, "full_masks")])
    def test_the_same_mask_for_every_image(self, full, name):
        (found, *others) = self.found([np.full(TRUTH.shape, full)] * 8, TRAIN_LOSS)
        assert (found.name, found.grave, others) == (name, True, [])
        assert "In 8 of 8 epochs" in found.evidence

    def test_not_for_the_first_epochs_or_a_perfect_one(self):
        empty, full = (np.full(TRUTH.shape, value) for value in (False, True))
        predicted = [empty, full, empty, self.shifted(2), self.shifted(1), TRUTH, TRUTH, TRUTH]
        assert self.found(predicted, TRAIN_LOSS) == ()

    def test_a_loss_that_does_not_fall(self):
        predicted = [self.shifted(by) for by in (5, 4, 5, 4, 5, 4, 5, 5)]
        (found,) = self.found(predicted, [0.6, 0.61, 0.6, 0.59, 0.6, 0.61, 0.6, 0.6])
        assert (found.name, found.grave) == ("loss_not_falling", True)
        assert "is 0.6000 in the first epoch and 0.5900 at its lowest after" in found.evidence

    def test_the_course_is_judged_by_dice(self):
        rising = [self.shifted(by) for by in (5, 5, 4, 4, 3, 3, 2, 1)]
        assert names(self.found(rising, TRAIN_LOSS)) == ["still_improving"]
        falling = self.found(rising[::-1], TRAIN_LOSS[::-1])
        assert names(falling) == ["loss_not_falling", "best_epoch_first"]


class TestRealTrainings:
    """Small ones, of real networks."""

    CONFIG = TrialConfig("vanilla_cnn", image_side=70, freeze="none", batch_size=8, epochs=6, learning_rate=1e-3)

    @pytest.fixture
    def examine(self, tmp_path):
        from cxr_models.training import run_trial

        def run(config: TrialConfig, data: Any) -> list[str]:
            epochs = drain(run_trial("t", config, data, tmp_path / "trial", MACRO_F1))
            return names(diagnose(epochs, config, MACRO_F1, class_counts=data.val_counts))

        return run

    def test_a_healthy_one(self, examine, tmp_path):
        assert examine(self.CONFIG, images_of(tmp_path, 70, train=60, val=30)) == []

    def test_a_class_that_no_pixel_tells(self, examine, tmp_path):
        data = images_of(tmp_path, 70, train=60, val=30)
        labels = data.labels.copy()
        labels[np.flatnonzero(labels == 1)[::5]] = 2
        assert "class_never_predicted" in examine(self.CONFIG, replace(data, labels=labels, classes=("a", "b", "c")))

    def test_a_rate_that_is_far_too_small(self, examine, tmp_path):
        found = examine(replace(self.CONFIG, learning_rate=1e-8), images_of(tmp_path, 70, train=60, val=30))
        assert {"loss_at_chance", "constant_predictor"} <= set(found)

    def test_a_rate_that_is_far_too_high(self, examine, tmp_path):
        found = examine(replace(self.CONFIG, learning_rate=0.1), images_of(tmp_path, 70, train=60, val=30))
        assert "constant_predictor" in found

    @pytest.mark.slow
    def test_batch_norms_that_train_at_a_high_rate(self, examine, tmp_path):
        """Validation sees the statistics they have gathered, training those of the batch."""
        config = replace(
            self.CONFIG, backbone="mobilenet_v2_0.35", image_side=32, batch_norm="train", epochs=8, learning_rate=0.03
        )
        assert "exploding_validation_loss" in examine(config, images_of(tmp_path, 32, train=40, val=20))
