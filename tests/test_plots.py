import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from cxr_models.trial import METRICS, EpochMetrics, Objective, Outcome, TrialConfig, TrialResult
from sweep.plots import PHASE, confusion_matrix, differences, strategy_comparison, svg, sweep_curves

F1 = Objective("macro_f1", "max")
BACKBONE = "mobilenet_v2_0.35"


def curve(trial_id: str, values: list[float]) -> list[EpochMetrics]:
    return [
        EpochMetrics(trial_id, epoch, 0, 1e-3, dict.fromkeys(METRICS, value), dict.fromkeys(METRICS, value), 1.0, 1.0)
        for epoch, value in enumerate(values, start=1)
    ]


def result(trial_id: str, freeze: str, best: float, backbone: str = BACKBONE, **changes) -> TrialResult:
    config = TrialConfig(backbone, freeze=freeze)
    given = {"outcome": Outcome.COMPLETED, "epochs": 2, "best_epoch": 1, "val": dict.fromkeys(METRICS, best)}
    return TrialResult(trial_id, config, **{**given, **changes})


def failed(trial_id: str, freeze: str) -> TrialResult:
    return result(trial_id, freeze, 0.0, outcome=Outcome.FAILED, best_epoch=0, val={}, error="out of memory")


RESULTS = [
    result("a", "all", 0.6),
    result("b", "stages:1", 0.9),
    result("c", "stages:1", 0.7, outcome=Outcome.STOPPED_EARLY),
    failed("d", "none"),
]


def row_names(results: list[TrialResult]) -> list[str]:
    (axes,) = strategy_comparison(results, F1).axes
    return [label.get_text() for label in axes.get_yticklabels()]


def test_every_strategy_that_may_rank_is_a_row_best_first():
    assert row_names(RESULTS) == ["stages:1", "all"]


def test_the_backbone_is_named_where_there_are_several():
    several = [*RESULTS, result("e", "all", 0.8, backbone="densenet121")]
    assert row_names(several) == ["mobilenet_v2_0.35  stages:1", "densenet121  all", "mobilenet_v2_0.35  all"]


def test_a_segmentation_s_row_is_what_it_is():
    assert row_names([result("a", "none", 0.8, backbone="unet")]) == ["U-Net"]


def test_every_trial_of_a_strategy_is_a_point():
    (axes,) = strategy_comparison(RESULTS, F1).axes
    points = [collection.get_offsets()[:, 0].tolist() for collection in axes.collections]
    assert points == [[0.9, 0.7], [0.6]]


def test_a_strategy_has_one_colour_in_all_figures():
    epochs = [metrics for trial in "abcd" for metrics in curve(trial, [0.1, 0.2])]
    curves = sweep_curves(epochs, RESULTS, F1)
    legend = {line.get_label(): line.get_color() for line in curves.legends[0].legend_handles}
    (axes,) = strategy_comparison(RESULTS, F1).axes
    bars = [line.get_color() for line in axes.lines]
    assert [legend["stages:1"], legend["all"]] == bars
    drawn = {line.get_color() for line in curves.axes[0].lines}
    assert drawn == set(bars)


def test_the_beginning_of_a_later_phase_is_marked_on_its_curve():
    results = [result("a", "none>convs:1", 0.6), result("b", "all", 0.5)]
    phased = [replace(m, phase=phase) for m, phase in zip(curve("a", [0.1, 0.3, 0.2, 0.6]), (0, 0, 1, 1), strict=True)]
    figure = sweep_curves([*phased, *curve("b", [0.1, 0.2, 0.3])], results, F1)
    marks = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == PHASE]
    assert [mark for mark in marks if mark] == [[[3.0, 0.2]]]
    assert "next phase begins" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_without_phases_nothing_is_marked():
    figure = sweep_curves(curve("a", [0.1, 0.2, 0.3]), RESULTS, F1)
    assert not [line for line in figure.axes[0].lines if line.get_marker() == PHASE and len(line.get_xdata())]
    assert "next phase begins" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_many_strategies_stay_distinguishable():
    results = [result(str(index), f"last:{index}", index / 40) for index in range(20)]
    epochs = [metrics for trial in results for metrics in curve(trial.trial_id, [0.1, 0.2])]
    handles = sweep_curves(epochs, results, F1).legends[0].legend_handles[:20]
    assert len({(line.get_color(), line.get_linestyle()) for line in handles}) == 20


def test_a_confusion_matrix_has_counts_and_shares_of_the_true_class():
    figure = confusion_matrix(np.array([[3.0, 1.0], [0.0, 0.0]]), ["COVID-like", "Normal"])
    panel = figure.axes[0]
    assert [text.get_text() for text in panel.texts] == ["3\n75.0 %", "1\n25.0 %", "0\n–", "0\n–"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["COVID-like\n(4)", "Normal\n(0)"]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("Predicted class", "True class (images)")


@pytest.mark.parametrize("results", [[], [failed("d", "none")]])
def test_a_sweep_without_a_result_still_has_figures(results):
    for figure in (strategy_comparison(results, F1), sweep_curves([], results, F1)):
        assert svg(figure).startswith("<svg")


def test_an_svg_stands_alone_and_carries_no_date():
    text = svg(strategy_comparison(RESULTS, F1))
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.search(r"dc:date", text)


def verdict_of(*rows: tuple[str, float, str | None], metric: str = "macro_f1") -> dict:
    """A reference `a` and each (other, `a` minus it, the better one)."""
    comparisons = [
        {
            "first": "a",
            "second": other,
            "better": better,
            "differences": {metric: {"value": value, "low": value - 0.01, "high": value + 0.01}},
        }
        for other, value, better in rows
    ]
    between_others = {**comparisons[0], "first": "b"}
    return {"reference": "a", "comparisons": [*comparisons, between_others]}


def points_of(figure) -> list[float]:
    return [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]


def test_differences_from_the_reference_are_drawn_to_the_side_of_the_better_one():
    figure = differences(verdict_of(("b", 0.05, "a"), ("c", -0.002, None), ("d", -0.03, "d")), F1)
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["b", "c", "d"]
    assert points_of(figure) == pytest.approx([5.0, -0.2, -3.0])
    low, high = panel.get_xlim()
    assert low == -high  # no difference stands in the middle
    texts = [text.get_text() for text in panel.texts]
    assert texts == ["better: a", "cannot tell", "better: d", "← the other does better", "a does better →"]


def test_a_lower_loss_is_drawn_on_the_side_of_the_better_one():
    figure = differences(verdict_of(("b", -0.05, "a"), metric="loss"), Objective("loss", "min"))
    assert points_of(figure) == pytest.approx([0.05])


def test_a_difference_that_is_undefined_is_a_row_without_a_point():
    verdict = verdict_of(("b", 0.05, "a"), ("c", 0.0, None))
    verdict["comparisons"][1]["differences"]["macro_f1"] = {"value": None, "low": None, "high": None}
    assert svg(differences(verdict, F1)).startswith("<svg")
    assert len(points_of(differences(verdict, F1))) == 1
