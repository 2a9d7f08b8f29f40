"""The verdict as a person reads it: rows, notes and the terminal's table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cxr_models.trial import Objective
from sweep.wording import amount, count, figure, in_points, is_number, metric_name, rounded_up, signed

Verdict = Mapping[str, Any]


@dataclass(frozen=True)
class DifferenceRow:
    """Two strategies on the test images, every cell as text.

    Attributes:
        metrics: name of each metric compared, the deciding one first -> `+2.1 (0.6 to 3.7)`, `first` minus `second`.
        p: of the deciding metric, corrected for all pairs.
        discordant: images that the first alone, and the second alone, has right.
        mcnemar: its p, corrected for all pairs.
        needed: images that would settle the deciding difference.
        verdict: which one is better; names stand between backticks, since some (`all`, `none`) are words.
    """

    first: str
    second: str
    metrics: Mapping[str, str]
    p: str
    discordant: str
    mcnemar: str
    needed: str
    verdict: str


def difference_rows(verdict: Verdict, *, of_reference: bool) -> list[DifferenceRow]:
    """The comparisons of the reference, or those of the other pairs."""
    found = [row for row in verdict["comparisons"] if (row["first"] == verdict["reference"]) == of_reference]
    return [_row(row, verdict["metric"]) for row in found]


def _row(row: Mapping[str, Any], metric: str) -> DifferenceRow:
    needed, better = row["images_needed"], row["better"]
    return DifferenceRow(
        first=row["first"],
        second=row["second"],
        metrics={name: spread(name, found) for name, found in row["differences"].items()},
        p=probability(row["differences"][metric]["p_holm"]),
        discordant=f"{row['mcnemar']['first']:,} : {row['mcnemar']['second']:,}",
        mcnemar=probability(row["mcnemar"]["p_holm"]),
        needed="–" if better or not is_number(needed) else f"{rounded_up(needed):,}",
        verdict=f"`{better}` is better" if better else "cannot tell",
    )


def spread(metric: str, found: Mapping[str, Any]) -> str:
    """A difference with its 95 % interval."""
    if not is_number(found["value"]):
        return "–"
    scale, digits = (100, 1) if in_points(metric) else (1, 3)
    value = signed(scale * found["value"], digits)
    if not is_number(found["low"]):
        return value
    low, high = (signed(scale * found[bound], digits).removeprefix("+") for bound in ("low", "high"))
    return f"{value} ({low} to {high})"


def probability(p: float) -> str:
    """A p-value to three decimals."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def verdict_notes(verdict: Verdict) -> list[str]:
    """How far the validation scores and the comparisons carry."""
    metric, notes = verdict["metric"], list(verdict["warnings"])
    if chosen := verdict["optimism"]:
        notes.append(
            f"The best validation {metric_name(metric)}, {figure(chosen['best'])}, was chosen on the images it is of: "
            f"choosing among {count(chosen['trials'], 'trial')} again in resampled patients, and looking at those left "
            f"out, gives {figure(chosen['corrected'])}. The choice flatters by about {amount(metric, chosen['gain'])}. "
            "What choosing the best epoch of each trial adds is not in it."
        )
    if "known" in verdict:
        notes.append(
            "One final U-Net was tested: what other trials would do on the test images is not known. Another seed "
            "would move its figures too; the interval is of the images alone."
        )
    own = [row["smallest_difference"] for row in verdict["comparisons"] if row["first"] == verdict["reference"]]
    if smallest := [each for each in own if is_number(each)]:
        most, least = amount(metric, max(smallest)), amount(metric, min(smallest))
        others = f" ({least} for the one most like it)" if least != most else ""
        notes.append(
            f"Where a strategy truly differs from `{verdict['reference']}` by {most}{others}, "
            f"{100 * verdict['power']:.0f} % of test sets like this one ({count(verdict['images'], 'image')} of "
            f"{count(verdict['patients'], 'patient')}) would show it; smaller differences mostly pass unseen."
        )
    if verdict["comparisons"] and verdict["seeds"] == 1:
        once = all(max(row.get("seeds", [1])) == 1 for row in verdict["comparisons"])
        notes.append(
            f"{'Each strategy stands' if once else 'Some strategies stand'} for one final training; another seed would "
            "move its figures too. With `final: {seeds: 5}` in the file the verdict counts by how much."
        )
    if verdict["comparisons"] and verdict["seeds"] == 2:
        notes.append(
            "Two final trainings tell little of how far seeds differ: some six verdicts in a hundred find a difference "
            "where there is none. Three or more keep to five."
        )
    return notes


def coded(text: str) -> Markup:
    """Text with what stands between backticks as code, for the page."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part) for place, part in enumerate(parts)
    )


def print_verdict(verdict: Verdict, objective: Objective, console: Console) -> None:
    """The sentence, then the reference beside every other strategy."""
    console.print(Text(verdict["sentence"], style="bold"))
    if verdict["comparisons"]:
        console.print(_table(difference_rows(verdict, of_reference=True), verdict, objective))
    for note in verdict_notes(verdict):
        console.print(Text(f"  {note}"))


def _table(rows: Sequence[DifferenceRow], verdict: Verdict, objective: Objective) -> Table:
    title = f"`{verdict['reference']}` minus the others on {count(verdict['images'], 'test image')}, 95 % intervals"
    lower = ", lower is better" if objective.mode == "min" else ""
    table = Table(title=Text(f"{title}{lower}"), title_justify="left")
    metrics = map(metric_name, rows[0].metrics)
    for name in ("strategy", *metrics, "p (Holm)", "right alone", "McNemar p (Holm)", "images needed", "verdict"):
        table.add_column(name)
    for row in rows:
        cells = (row.second, *row.metrics.values(), row.p, row.discordant, row.mcnemar, row.needed, row.verdict)
        table.add_row(*map(Text, cells))
    return table
