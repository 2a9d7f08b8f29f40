"""Dice and IoU are those one computes by hand."""

import numpy as np
import pytest

from cxr_models.intervals import mean_intervals
from cxr_models.mask_metrics import count_masks, evaluate_masks, image_metrics, telling_examples


def masks(*pictures: str) -> np.ndarray:
    """One mask for each text, a row a word."""
    return np.array([[[[mark == "#"] for mark in row] for row in picture.split()] for picture in pictures])


def test_against_hand_computed_values():
    truth = masks("##. ##. ...", "... ... ...", "### ### ###", "#.. ... ...")
    found = masks("#.. ##. ..#", "... ... ...", "... ... ...", "#.. ... ...")
    metrics = image_metrics(count_masks(truth.astype(np.uint8) * 255, found), 9)
    np.testing.assert_allclose(metrics["dice"], [6 / 8, 1, 0, 1])
    np.testing.assert_allclose(metrics["iou"], [3 / 5, 1, 0, 1])
    np.testing.assert_allclose(metrics["pixel_accuracy"], [7 / 9, 1, 0, 1])


def test_an_average_is_over_images_not_over_pixels():
    counts = np.array([[1.0, 100, 100, 100], [3.0, 0, 1, 1]])
    found = evaluate_masks(counts, 400)
    assert found == pytest.approx({"loss": 2.0, "dice": 0.5, "iou": 0.5, "pixel_accuracy": 1 - 1 / 400})


def test_telling_examples_are_the_extremes_and_the_middle():
    dice = [0.9, 0.1, 0.5, 0.8, 0.3, 0.6, 0.7]
    assert telling_examples(dice, 1) == {"worst": (1,), "median": (5,), "best": (0,)}
    assert telling_examples(dice, 9)["worst"] == (1, 4)
    assert telling_examples([0.5], 3) == {"worst": (0,), "median": (), "best": ()}


def test_intervals_widen_where_images_belong_to_few_patients():
    values = {"dice": np.array([0.9] * 20 + [0.5] * 20)}
    own = mean_intervals(values, [str(number) for number in range(40)])["dice"]
    few = mean_intervals(values, ["a", "b"] * 10 + ["c", "d"] * 10)["dice"]
    assert own.value == few.value == pytest.approx(0.7)
    assert own.low < own.value < own.high
    assert few.high - few.low > own.high - own.low
