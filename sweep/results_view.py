"""What a sweep ends with on the terminal: the ranking by the axes that vary, the strategies, what the doctor found."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from cxr_models.trial import SPLITS, Objective, Outcome, TrialResult
from sweep.record import best_by_strategy, varied_axes
from sweep.wording import duration, figure, is_number, metric_name, noted, setting, strategy_text

SHOWN_RANKS = 10
MARK = "! "  # beside the score of a trial in which the doctor found something
LEADING = ("backbone", "freeze", "learning_rate")  # shown first where they vary
UNBOUNDED = 10_000  # columns, to measure how wide a table would be


def ranking(
    order: Sequence[TrialResult], results: Sequence[TrialResult], objective: Objective, console: Console
) -> Iterator[RenderableType]:
    """The best trials with the axes that differ between trials, as many as the console is wide, and which do not fit.

    Args:
        order: the trials that may rank, best first.
        results: all that ended.
        objective: that they are ranked by.
        console: where it will be shown.
    """
    varied = varied_axes(results)
    axes: list[str] = []
    left_out: list[str] = []
    for axis in (*(axis for axis in LEADING if axis in varied), *(axis for axis in varied if axis not in LEADING)):
        wider = _ranking_table(order, (*axes, axis), objective)
        options = console.options.update(width=UNBOUNDED)
        fits = console.measure(wider, options=options).maximum <= console.width
        (axes if fits else left_out).append(axis)
    yield _ranking_table(order, axes, objective)
    if left_out:
        yield Text(f"these vary too, and are in trials.csv and the report: {', '.join(left_out)}")


def _ranking_table(order: Sequence[TrialResult], axes: Sequence[str], objective: Objective) -> Table:
    title = f"Best {min(SHOWN_RANKS, len(order))} of {len(order)} trials by validation {objective.metric}"
    table = Table(title=title, title_justify="left")
    headings = ("max epochs" if axis == "epochs" else axis.replace("_", " ") for axis in axes)
    for heading in ("trial", *headings, "epochs", "outcome"):
        table.add_column(heading.replace(" ", "\n"), overflow="fold")
    table.add_column(objective.metric.replace("_", "\n"), justify="right")
    for result in order[:SHOWN_RANKS]:
        settings = (setting(result.config, axis) for axis in axes)
        row = [result.trial_id, *settings, str(result.epochs), result.outcome.replace("_", " ")]
        table.add_row(*map(Text, row), f"{MARK if result.doctor else ''}{result.val[objective.metric]:.3f}")
    return table


def strategy_table(summary: Mapping[str, Any], objective: Objective) -> Table:
    """Validation scores, sizes and times; where the final evaluation came to, the accuracy of each best trial."""
    parts = [part for part in SPLITS if any(part in row for row in summary["strategies"])]
    accuracy = f", accuracy of the best on {', '.join(parts)}" if parts else ""
    table = Table(title=f"Strategies by validation {objective.metric}{accuracy}", title_justify="left")
    for name in ("backbone", "freeze"):
        table.add_column(name)
    for name in ("trials", "best", "median", "best\nepoch", *parts, "trainable", "frozen", "time"):
        table.add_column(name, justify="right")
    for row in summary["strategies"]:
        values = f"{MARK if row['doctor'] else ''}{row['best_val']:.3f}", f"{row['median_val']:.3f}"
        accuracies = (f"{row[part]['accuracy']:.3f}" if part in row else "–" for part in parts)
        counts = f"{row['trainable_parameters']:,}", f"{row['frozen_parameters']:,}"
        names = row["backbone"], row["freeze"], str(row["trials"])
        table.add_row(*names, *values, _best_epoch(row), *accuracies, *counts, duration(row["train_seconds"]))
    return table


def _best_epoch(row: Mapping[str, Any]) -> str:
    """Of a strategy's best trial, and whether halving ended that trial."""
    early = "\nstopped early" if row["outcome"] == Outcome.STOPPED_EARLY else ""
    return f"{row['best_epoch']}{early}"


def seeds_text(row: Mapping[str, Any], metric: str) -> str:
    """A test metric over the final models of a strategy of `summary.json`; "" where there is one, or none is known."""
    values = [figures[metric] for figures in row.get("test_by_seed", ()) if is_number(figures.get(metric))]
    if len(values) < 2:
        return ""
    spread = f"{figure(min(values))} to {figure(max(values))}"
    return f"over {len(values)} seeds {metric_name(metric)} is {figure(fmean(values))} ({spread})"


def doctor_lines(order: tuple[TrialResult, ...], objective: Objective) -> list[str]:
    """What the doctor found in the trials of the two tables above."""
    shown = {result.trial_id: result for result in (*order[:SHOWN_RANKS], *best_by_strategy(order, objective))}
    lines = [
        f"  {result.trial_id} {strategy_text(result.config)}{noted(result)}"
        for result in shown.values()
        if result.doctor
    ]
    return [f"{MARK}the doctor found (report.html has evidence and remedies):", *lines] if lines else []
