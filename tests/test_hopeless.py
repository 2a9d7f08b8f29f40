"""A training is ended where nothing can come of it, and never before."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from cxr_models.hopeless import EMPTY_MASKS, FULL_MASKS, is_hopeless, same_answer
from cxr_models.mask_metrics import count_masks, evaluate_masks
from cxr_models.metrics import evaluate
from cxr_models.trial import BEST_WEIGHTS, SEGMENT, EpochMetrics, Objective, TrialConfig
from tests.trainings import LOSS, drain, images_of

CONFIG = TrialConfig("vanilla_cnn", freeze="none", epochs=40)
CLASSES = ("a", "b", "c")
LABELS = np.array([0] * 3 + [1] * 5 + [2] * 2)

# The training and validation losses of a small CNN on the phantoms, learning rate 1.2e-4: it named one class in these
# 22 epochs, and learned from then on.
LEFT_LATE = (
    (
        1.3684, 1.3557, 1.3533, 1.3523, 1.3465, 1.3582, 1.3545, 1.3512, 1.3462, 1.3349, 1.3450, 1.3446, 1.3416, 1.3441,
        1.3488, 1.3394, 1.3461, 1.3280, 1.3300, 1.3193, 1.3138, 1.2940,
    ),
    (
        1.3387, 1.3382, 1.3343, 1.3382, 1.3341, 1.3397, 1.3372, 1.3394, 1.3327, 1.3334, 1.3359, 1.3355, 1.3339, 1.3321,
        1.3323, 1.3288, 1.3287, 1.3270, 1.3286, 1.3238, 1.3175, 1.3070,
    ),
)  # fmt: skip


def epoch(number: int, train: float, val: float, *, one_class: bool = True, auroc: float = 0.55) -> EpochMetrics:
    figures = {"recall/a": 0.0, "recall/b": 1.0 if one_class else 0.9, "loss": val, "auroc": auroc}
    return EpochMetrics("t", number, 0, 1e-3, {"loss": train}, figures, 1.0, 1.0)


def level(epochs: int, **given: float) -> list[EpochMetrics]:
    """One class, and losses that go up and down."""
    return [epoch(n, 1.0 + 0.004 * (-1) ** n, 1.1 - 0.004 * (-1) ** n, **given) for n in range(1, epochs + 1)]


def ends_at(epochs: Sequence[EpochMetrics], config: TrialConfig = CONFIG) -> int:
    """The epoch after which it is given up; 0 if never."""
    return next((n for n in range(1, len(epochs) + 1) if is_hopeless(epochs[:n], config)), 0)


class TestDead:
    def test_after_three_epochs_of_the_same_scores(self):
        assert ends_at(level(9, auroc=0.5)) == 3
        learned = [epoch(n, 1.0 / n, 1.0, one_class=False, auroc=0.9) for n in range(1, 5)]
        assert ends_at([*learned, *level(9, auroc=0.5)]) == 7

    def test_not_for_fewer_nor_with_a_pause(self):
        pausing = [one if n % 3 else replace(one, val={**one.val, "auroc": 0.51}) for n, one in enumerate(level(14))]
        assert ends_at([replace(one, val={**one.val, "auroc": 0.5}) for one in level(2)]) == 0
        assert ends_at(pausing) == 0

    def test_not_while_the_statistics_of_batch_norms_settle(self):
        assert ends_at(level(9, auroc=0.5), replace(CONFIG, batch_norm="train")) == 0

    def test_not_before_the_last_phase(self):
        first = level(12, auroc=0.5)
        config = replace(CONFIG, freeze="all>none")
        assert ends_at(first, config) == 0
        assert ends_at([*first, *(replace(one, phase=1) for one in level(9, auroc=0.5))], config) == 15

    def test_not_in_the_warm_up(self):
        assert ends_at(level(9, auroc=0.5), replace(CONFIG, warmup=0.1)) == 7


class TestPlateau:
    @pytest.mark.parametrize(("allowed", "end"), [(100, 50), (40, 20), (30, 15), (20, 15), (15, 15), (14, 0)])
    def test_after_half_the_epochs_and_no_fewer_than_15(self, allowed, end):
        assert ends_at(level(allowed), replace(CONFIG, epochs=allowed)) == end

    @pytest.mark.parametrize("part", ["train", "val"])
    def test_not_where_a_loss_falls(self, part):
        falling = [replace(one, **{part: {**getattr(one, part), "loss": 1.0 - 0.002 * one.epoch}}) for one in level(40)]
        assert ends_at(falling) == 0

    def test_not_where_an_image_got_another_class_meanwhile(self):
        course = level(40)
        course[12] = replace(course[12], val={**course[12].val, "recall/a": 0.01})
        assert ends_at(course[:32]) == 0
        assert ends_at(course) == 33

    @pytest.mark.parametrize("allowed", [16, 20, 24, 32, 40])
    def test_not_where_a_real_one_learned_later(self, allowed):
        course = [epoch(n, *losses) for n, losses in enumerate(zip(*LEFT_LATE, strict=True), start=1)]
        assert ends_at(course[:allowed], replace(CONFIG, epochs=allowed)) == 0


class TestSameAnswer:
    def told(self, predicted: np.ndarray, labels: np.ndarray = LABELS) -> str:
        val = evaluate(labels, np.log(np.eye(3)[predicted] * 0.9 + 0.1 / 3), CLASSES)
        return same_answer(EpochMetrics("t", 1, 0, 1e-3, {}, val, 1.0, 1.0))

    def test_exactly_where_all_images_got_one_class(self):
        """Of every way to predict ten images: all of one class, one other, or at random."""
        generator = np.random.default_rng(0)
        for place, name in enumerate(CLASSES):
            same = np.full(10, place)
            assert self.told(same) == name
            for image in range(10):
                for other in {0, 1, 2} - {place}:
                    assert self.told(np.where(np.arange(10) == image, other, same)) == ""
        for _ in range(300):
            predicted = generator.integers(0, 3, 10)
            assert (self.told(predicted) != "") == (len(set(predicted.tolist())) == 1)

    def test_not_where_the_other_classes_are_taken_for_each_other(self):
        assert self.told(np.array([2, 1, 0])[LABELS]) == ""

    def test_a_class_without_images_does_not_matter(self):
        labels = np.array([0] * 4 + [1] * 6)
        assert self.told(np.full(10, 1), labels) == "b"
        assert self.told(labels, labels) == ""

    def test_masks(self):
        generator = np.random.default_rng(0)
        truth = (generator.random((4, 8, 8, 1)) < 0.3).astype(np.uint8)
        found = {}
        some = generator.random(truth.shape) < 0.5
        for name, predicted in {"empty": some & False, "full": some | True, "some": some, "right": truth > 0}.items():
            val = evaluate_masks(count_masks(truth, predicted), 64)
            found[name] = same_answer(EpochMetrics("t", 1, 0, 1e-3, {}, val, 1.0, 1.0))
        assert found == {"empty": EMPTY_MASKS, "full": FULL_MASKS, "some": "", "right": ""}


class TestRealTrainings:
    DEAD = TrialConfig(
        "vanilla_cnn", image_side=70, freeze="none", batch_size=8, epochs=12, learning_rate=0.1
    )  # the first steps are so large that no unit of a relu layer passes anything on

    def test_a_dead_network_ends_itself_with_its_best_weights(self, tmp_path):
        from cxr_models.training import run_trial

        data = images_of(tmp_path, 70, train=40, val=20)
        epochs = drain(run_trial("t", self.DEAD, data, tmp_path / "trial", LOSS))
        assert len(epochs) < 12
        assert len(epochs) == ends_at(epochs, self.DEAD)
        assert (tmp_path / "trial" / BEST_WEIGHTS).is_file()

    @pytest.mark.slow
    @pytest.mark.parametrize("rate", [0.03, 0.1, 1.0])
    def test_a_dead_network_stays_dead(self, rate, tmp_path, monkeypatch):
        """What the rule takes for certain: it names one class for ever after."""
        from cxr_models import training

        data = images_of(tmp_path, 70, train=40, val=20)
        config = replace(self.DEAD, learning_rate=rate, epochs=40)
        monkeypatch.setattr(training, "is_hopeless", lambda epochs, config: False)
        epochs = drain(training.run_trial("t", config, data, tmp_path / "trial", LOSS))
        end = ends_at(epochs, config)
        assert 0 < end < 12
        assert all(same_answer(metrics) for metrics in epochs[end:])
        assert {round(metrics.val["auroc"], 6) for metrics in epochs[end:]} == {0.5}

    def test_a_segmentation_that_finds_nothing_ends_itself(self, tmp_path):
        from cxr_models.segmentation import run_segmentation

        data = images_of(tmp_path, 16, train=8, val=4)
        masks = np.zeros((18, 16, 16, 1), np.uint8)
        masks[:, 6:10, 6:10] = 255
        np.save(tmp_path / "masks.npy", masks)
        data = replace(data, masks={16: tmp_path / "masks.npy"})
        config = TrialConfig("unet", image_side=16, unet_filters=2, unet_depth=1, freeze="none", epochs=18)
        config = replace(config, batch_size=8, learning_rate=1.0)
        dice = Objective("dice", "max", SEGMENT)
        epochs = drain(run_segmentation("t", config, data, tmp_path / "trial", dice))
        assert len(epochs) == ends_at(epochs, config) < 18
        assert {same_answer(metrics) for metrics in epochs[-15:]} == {EMPTY_MASKS}
        assert (tmp_path / "trial" / BEST_WEIGHTS).is_file()
