import math

import pytest

from cxr_models.metrics import FURTHER_METRICS
from cxr_models.trial import TASK_METRICS, TrialConfig
from sweep.wording import (
    METRIC_NAMES,
    amount,
    count,
    duration,
    figure,
    heading,
    listed,
    metric_name,
    percentage_points,
    rounded_up,
    signed,
    strategy_text,
)


@pytest.mark.parametrize(
    ("seconds", "words", "with_tenths"),
    [
        (0.0, "0 s", "0.0 s"),
        (3.24, "3 s", "3.2 s"),
        (9.96, "10 s", "10 s"),
        (59.6, "1 min 0 s", "1 min 0 s"),
        (185, "3 min 5 s", "3 min 5 s"),
        (7800, "2 h 10 min", "2 h 10 min"),
    ],
)
def test_a_duration_has_the_digits_that_matter(seconds, words, with_tenths):
    assert duration(seconds) == words
    assert duration(seconds, tenths=True) == with_tenths


def test_a_u_net_has_no_strategy_to_name():
    assert strategy_text(TrialConfig("unet", freeze="none")) == "U-Net"
    assert strategy_text(TrialConfig("densenet121", freeze="convs:1")) == "densenet121 convs:1"


def test_every_metric_has_a_name():
    of_epochs = {name for metrics in TASK_METRICS.values() for name in metrics}
    assert METRIC_NAMES.keys() == {*of_epochs, *FURTHER_METRICS}
    assert metric_name("recall/COVID") == "recall/COVID"


def test_a_heading_keeps_abbreviations():
    assert [heading(metric_name(name)) for name in ("auroc", "macro_f1", "iou")] == ["AUROC", "Macro F1", "IoU"]


def test_what_could_not_be_computed_is_a_dash():
    assert [figure(value) for value in (0.8766, math.nan, None)] == ["0.877", "–", "–"]
    assert [percentage_points(value) for value in (-1.26, 0.5, None)] == ["−1.3", "+0.5", "–"]


def test_one_is_not_plural():
    assert [count(number, "image") for number in (0, 1, 2117)] == ["0 images", "1 image", "2,117 images"]


@pytest.mark.parametrize(
    ("number", "rounded"), [(3.2, 4), (99.5, 100), (169.0, 170), (1385.2, 1400), (1401, 1500), (98_700, 99_000)]
)
def test_an_estimate_is_rounded_up_to_two_digits(number, rounded):
    assert rounded_up(number) == rounded


def test_a_difference_has_its_sign_and_nothing_has_none_below_zero():
    assert [signed(value, 1) for value in (2.14, -2.14, -0.04)] == ["+2.1", "−2.1", "+0.0"]


def test_names_in_a_row():
    assert [listed(list("abc"[:n])) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_how_much_of_a_metric():
    assert amount("macro_f1", 0.0214) == "2.1 points macro F1"
    assert amount("loss", 0.0214) == "0.021 loss"
