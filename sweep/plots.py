"""Figures for the report: learning curves, confusion matrices, strategies side by side.

Figures are made without pyplot, which keeps global state. Colours are Okabe and Ito's, which colour-blind readers can
tell apart.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cxr_models.metrics import FloatArray
from cxr_models.trial import SEGMENT, UNET, EpochMetrics, Objective, Outcome, TrialResult
from sweep.record import best_by_strategy, ranked, strategy_of
from sweep.wording import U_NET, heading, in_points, is_number, metric_name

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")  # the next one for every round through the colours
PHASE = "D"  # the marker of a phase that begins
GREY, PALE = "#595959", "#D9D9D9"
Style = tuple[str, str]  # (colour, line)


def svg(figure: Figure) -> str:
    """An `<svg>` element to stand in a page, without the XML declaration."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def sweep_curves(epochs: Iterable[EpochMetrics], results: Sequence[TrialResult], objective: Objective) -> Figure:
    """Validation objective by epoch of every trial that may rank; the best of each strategy is drawn strong.

    Where a freeze strategy has phases, a diamond stands on the first epoch of each later one.

    Args:
        epochs: of all trials, each trial's in order.
        results: of all trials.
        objective: what is drawn.
    """
    curves: dict[str, list[EpochMetrics]] = {}
    for metrics in epochs:
        curves.setdefault(metrics.trial_id, []).append(metrics)
    able = ranked(tuple(results), objective)
    best = {result.trial_id for result in best_by_strategy(tuple(results), objective)}
    styles, names = _styles(results, objective), _strategy_names(results)
    figure = _figure(9.5, 4.8)
    panel = figure.subplots()
    phased = False
    for result in reversed(able):  # the best on top
        strong = result.trial_id in best
        curve = curves.get(result.trial_id, [])
        steps, values = [m.epoch for m in curve], [m.val[objective.metric] for m in curve]
        colour, line = styles[strategy_of(result)]
        width, opacity = (2.2, 1.0) if strong else (0.9, 0.45)
        panel.plot(steps, values, color=colour, linestyle=line, linewidth=width, alpha=opacity)
        end = "x" if result.outcome is Outcome.STOPPED_EARLY else "o"
        panel.plot(steps[-1:], values[-1:], color=colour, marker=end, markersize=5, alpha=opacity)
        begins = phase_begins(curve)
        phased = phased or bool(begins)
        at, heights = [steps[k] for k in begins], [values[k] for k in begins]
        panel.plot(at, heights, PHASE, color=colour, markerfacecolor="white", markersize=6, alpha=opacity, zorder=3)
    _style(panel, "Epoch", f"{heading(metric_name(objective.metric))}, validation")
    handles = [
        Line2D([], [], color=colour, linestyle=line, linewidth=2.2, label=names[strategy])
        for strategy, (colour, line) in styles.items()
    ]
    ends = [_end_handle("o", "ran its epochs"), _end_handle("x", "stopped early")]
    if phased:
        ends.append(_end_handle(PHASE, "next phase begins", face="white"))
    figure.legend(handles=[*handles, *ends], loc="outside right upper", frameon=False, fontsize=9)
    return figure


def phase_begins(epochs: Sequence[EpochMetrics]) -> list[int]:
    """The places of the epochs with which a later phase begins, 0 for the first epoch of all."""
    return [place for place in range(1, len(epochs)) if epochs[place].phase != epochs[place - 1].phase]


def _end_handle(marker: str, label: str, face: str = GREY) -> Line2D:
    return Line2D(
        [], [], color=GREY, marker=marker, markerfacecolor=face, linestyle="none", markeredgewidth=1.3, label=label
    )


def strategy_comparison(results: Sequence[TrialResult], objective: Objective) -> Figure:
    """Best validation objective of every trial that may rank, one row per strategy, the best strategy on top."""
    able = ranked(tuple(results), objective)
    styles, names = _styles(results, objective), _strategy_names(results)
    figure = _figure(9.0, 1.6 + 0.5 * max(len(styles), 1))
    panel = figure.subplots()
    for row, (strategy, (colour, _)) in enumerate(styles.items()):
        own = [result for result in able if strategy_of(result) == strategy]
        values = [result.val[objective.metric] for result in own]
        heights = row + 0.28 * _spread(len(own))
        faces = ["white" if result.outcome is Outcome.STOPPED_EARLY else colour for result in own]
        panel.scatter(values, heights, s=34, facecolors=faces, edgecolors=colour, linewidths=1.3, zorder=3)
        panel.plot([values[0]] * 2, [row - 0.36, row + 0.36], color=colour, linewidth=2.5, zorder=2)
        trials = "1 trial" if len(own) == 1 else f"{len(own)} trials"
        _note(panel, f"{values[0]:.3f}   {trials}", (1.01, row), ("axes fraction", "data"), va="center")
    panel.set_yticks(range(len(styles)), [names[strategy] for strategy in styles])
    panel.set_ylim(max(len(styles), 1) - 0.5, -0.5)
    _style(panel, f"{heading(metric_name(objective.metric))}, validation, best epoch of each trial", "")
    panel.xaxis.set_major_locator(MaxNLocator(8))
    panel.grid(axis="y", visible=False)
    best = _end_handle("|", "best" if objective.task == SEGMENT else "best of the strategy")
    ends = [_end_handle("o", "ran its epochs"), _end_handle("o", "stopped early", face="white"), best]
    figure.legend(handles=ends, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def differences(verdict: Mapping[str, Any], objective: Objective) -> Figure:
    """The reference against every other strategy: right of the line it does better; with 95 % intervals.

    Args:
        verdict: of `summary.json`, with comparisons.
        objective: that decides.
    """
    metric, reference = objective.metric, verdict["reference"]
    points = in_points(metric)
    scale = (100.0 if points else 1.0) * (1.0 if objective.mode == "max" else -1.0)
    rows = [row for row in verdict["comparisons"] if row["first"] == reference]
    figure = _figure(9.0, 1.9 + 0.42 * len(rows))
    panel = figure.subplots()
    panel.axvline(0.0, color=GREY, linewidth=1.0)
    for place, row in enumerate(rows):
        found = row["differences"][metric]
        colour = {reference: COLOURS[0], row["second"]: COLOURS[1]}.get(row["better"], GREY)
        bounds = [scale * found[bound] for bound in ("low", "high") if is_number(found[bound])]
        panel.plot(bounds, [place] * len(bounds), color=colour, linewidth=2.4, solid_capstyle="butt")
        if is_number(found["value"]):
            face = colour if row["better"] else "white"
            panel.plot([scale * found["value"]], [place], "o", color=colour, markerfacecolor=face, markersize=8)
        says = f"better: {row['better']}" if row["better"] else "cannot tell"
        _note(panel, says, (1.01, place), ("axes fraction", "data"), va="center", parse_math=False)
    panel.set_yticks(range(len(rows)), [row["second"] for row in rows], parse_math=False)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    reach = 1.08 * max(map(abs, panel.get_xlim()))
    panel.set_xlim(-reach, reach)
    unit = "percentage points of " if points else ""
    _style(panel, f"Difference in {unit}{metric_name(metric)}, with its 95 % interval", "")
    panel.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 2.5, 5, 10]))
    panel.grid(axis="y", visible=False)
    for text, x, side in (("← the other does better", 0.49, "right"), (f"{reference} does better →", 0.51, "left")):
        _note(panel, text, (x, 1.03), ("axes fraction", "axes fraction"), ha=side, va="bottom", parse_math=False)
    return figure


def confusion_matrix(matrix: FloatArray, classes: Sequence[str], title: str = "") -> Figure:
    """Images by true and predicted class, with each row's shares in percent.

    Args:
        matrix: (classes, classes), true class by row; see `metrics.confusion_matrix`.
        classes: names of the classes.
        title: above the figure.
    """
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    side = 2.8 + 0.85 * len(classes)
    figure = _figure(side + 0.8, side)
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    for row, column in np.ndindex(matrix.shape):
        share = f"{100 * shares[row, column]:.1f} %" if totals[row, 0] else "–"
        ink = "white" if shares[row, column] > 0.55 else "black"
        panel.text(column, row, f"{matrix[row, column]:.0f}\n{share}", ha="center", va="center", color=ink, fontsize=10)
    rows = [f"{name}\n({images:.0f})" for name, images in zip(classes, totals[:, 0], strict=True)]
    # A class name is a name, even with dollar signs in it.
    panel.set_xticks(range(len(classes)), classes, rotation=30, ha="right", rotation_mode="anchor", parse_math=False)
    panel.set_yticks(range(len(classes)), rows, parse_math=False)
    panel.set_xlabel("Predicted class")
    panel.set_ylabel("True class (images)")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.colorbar(image, ax=panel, label="Share of the true class", shrink=0.8)
    figure.suptitle(title, fontsize=11)
    return figure


def _figure(width_in: float, height_in: float) -> Figure:
    return Figure(figsize=(width_in, height_in), dpi=110, layout="constrained")


def _note(panel: Axes, text: str, xy: tuple[float, float], within: tuple[str, str], **placing: Any) -> None:
    panel.annotate(text, xy, xycoords=within, fontsize=8.5, color=GREY, **placing)


def _style(panel: Axes, x: str, y: str) -> None:
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.grid(color=PALE, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _styles(results: Sequence[TrialResult], objective: Objective) -> dict[tuple[str, str], Style]:
    """The colour and line of each strategy, best first; the same in every figure of a sweep."""
    strategies = [strategy_of(result) for result in best_by_strategy(tuple(results), objective)]
    return {
        strategy: (COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)])
        for index, strategy in enumerate(strategies)
    }


def _strategy_names(results: Sequence[TrialResult]) -> dict[tuple[str, str], str]:
    """How the strategies are written: with the backbone only where there are several; `U-Net` for one."""
    strategies = {strategy_of(result) for result in results}
    several = len({backbone for backbone, _ in strategies}) > 1
    plain = {(backbone, freeze): f"{backbone}  {freeze}" if several else freeze for backbone, freeze in strategies}
    return {strategy: U_NET if strategy[0] == UNET else name for strategy, name in plain.items()}


def _spread(count: int) -> FloatArray:
    """(count,) offsets in [-1, 1] that keep neighbours in a ranking apart; 0 for one alone."""
    golden = (np.arange(count) * 0.6180339887498949) % 1.0
    return 2 * golden - 1 if count > 1 else np.zeros(count)
