"""The tables a sweep ends with: what differs between trials is seen, at any width, and nothing else."""

import os
from typing import Any

import pytest
from rich.console import Console

from cxr_models.trial import AXES, METRICS, Objective, Outcome, TrialConfig, TrialResult
from sweep.record import ranked
from sweep.results_view import ranking, seeds_text, strategy_table

F1 = Objective("macro_f1", "max")


def result(number: int, outcome: Outcome = Outcome.COMPLETED, **axes: Any) -> TrialResult:
    config = TrialConfig(**{"backbone": "mobilenet_v2_1.0", "freeze": "all", **axes})
    return TrialResult(f"{number:08x}", config, outcome, 3, 2, dict.fromkeys(METRICS, 0.9 - number / 100))


def console(width: int) -> Console:
    return Console(width=width, record=True, file=open(os.devnull, "w"))


def shown(results: list[TrialResult], width: int = 140) -> str:
    out = console(width)
    for part in ranking(ranked(tuple(results), F1), results, F1, out):
        out.print(part)
    return out.export_text()


def header(text: str) -> str:
    """The column names of a table, whose words stand in lines below each other."""
    lines = [line.strip("┃").split("┃") for line in text.splitlines() if line.startswith("┃")]
    return " | ".join(" ".join(cell.strip() for cell in cells).strip() for cells in zip(*lines, strict=True))


def test_axes_that_vary_are_columns_and_the_fixed_ones_are_not():
    text = shown([result(0, dropout=0.1, taps=3), result(1, dropout=0.25), result(2, dropout=0.1, loss="focal")])
    assert header(text) == "trial | taps | dropout | loss | epochs | outcome | macro f1"
    (row,) = (line for line in text.splitlines() if "00000001" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["00000001", "1", "0.25", "cross_entropy", "3", "completed", "0.890"]


def test_values_of_failed_trials_count_as_varied_and_epochs_are_told_apart():
    failed = TrialResult("f", TrialConfig("vgg16", freeze="none", epochs=4), Outcome.FAILED, error="out of memory")
    assert header(shown([result(0), failed])).startswith("trial | backbone | freeze | max epochs | epochs | outcome")


@pytest.mark.parametrize("width", [80, 100, 120, 140])
def test_every_row_fits_however_many_axes_vary(width):
    changes: dict[str, Any] = {"backbone": "efficientnet_v2_b0", "freeze": "all>stages:1>none", "learning_rate": 2e-5}
    changes |= {"hidden_units": (1024, 512), "batch_size": 8, "loss": "focal", "weight_decay": 0.01, "warmup": 0.1}
    changes |= {"augmentation_strength": 2.0, "schedule": "plateau>constant", "class_weights": "balanced"}
    changes |= {"sampling": "balanced", "optimizer": "adam>rmsprop", "pooling": "max", "dropout": 0.123456}
    text = shown([result(0), result(1, **changes)], width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == 2, "no cell is broken"
    columns = header(text).replace(" ", "_").split("_|_")
    if width >= 100:
        assert columns[1:4] == ["backbone", "freeze", "learning_rate"]
    note = " ".join(text[text.index("these vary too") :].split())
    told = note.partition(": ")[2].split(", ")
    assert {*told} | {*columns} >= changes.keys()
    assert not {*told} & {*columns}
    assert {*told} <= {*AXES}


def test_a_wide_enough_terminal_leaves_nothing_out():
    assert "these vary too" not in shown([result(0), result(1, dropout=0.5, batch_size=8)], 100)


def strategy(freeze: str, outcome: Outcome) -> dict[str, Any]:
    row = {"backbone": "vgg16", "freeze": freeze, "trials": 4, "best_val": 0.9, "median_val": 0.8, "best_epoch": 17}
    return {**row, "outcome": str(outcome), "trainable_parameters": 1, "frozen_parameters": 2} | {
        "train_seconds": 3.0,
        "doctor": [],
    }


def test_strategies_whose_best_trial_was_stopped_early_are_marked():
    out = console(140)
    rows = [strategy("none", Outcome.STOPPED_EARLY), strategy("all", Outcome.COMPLETED)]
    out.print(strategy_table({"strategies": rows}, F1))
    stopped, below, whole = [line for line in out.export_text().splitlines() if line.startswith("│")]
    assert " none " in stopped
    assert "│            17 │" in stopped
    assert "│ stopped early │" in below
    assert " all " in whole
    assert "│            17 │" in whole


def test_several_seeds_are_told_with_their_mean_and_spread():
    row = {"test_by_seed": [{"macro_f1": value} for value in (0.795, 0.743, 0.77)]}
    assert seeds_text(row, "macro_f1") == "over 3 seeds macro F1 is 0.769 (0.743 to 0.795)"
    assert seeds_text({"test_by_seed": row["test_by_seed"][:1]}, "macro_f1") == ""
    assert seeds_text({}, "macro_f1") == ""
