"""The audit of the data as a person reads it in the terminal, and the words with which a run is refused."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cxr_models.audit import Audit, Finding, Severity
from cxr_models.shortcuts import SEEN, Shortcuts

SHOWN = 5  # examples of a finding; audit.json has all
SHOWN_FILES = 20  # of a finding about files that are left out: none of those should go unnoticed
SHOWN_PATHS = 4  # of an example
STYLES = {Severity.LEAK: "bold red", Severity.WARNING: "yellow", Severity.NOTE: ""}
EVERYTHING = ", ".join(SEEN).replace("_", " ")


class AuditRefused(Exception):  # noqa: N818 - reads as what happened
    """The data leak; the message names the findings and what can be done."""

    def __init__(self, audit: Audit) -> None:
        # Those that may pass already, too: what --set gives takes the place of what the file says.
        names = ", ".join(finding.name for finding in audit.findings if finding.severity is Severity.LEAK)
        lines = (f"  {finding.name}: {finding.evidence}\n    remedy: {finding.remedy}" for finding in audit.leaks)
        super().__init__(
            "the data leak, so that no figure of a sweep would hold:\n"
            + "\n".join(lines)
            + f"\nto run all the same, name what may pass: --set data.allow='[{names}]'"
        )


def render_audit(audit: Audit) -> RenderableType:
    """The findings, the gravest first, and the bar to beat."""
    lost = ", ".join(f"{count:,} {reason}" for reason, count in audit.left_out.items())
    used = f"{audit.used:,} of {audit.found:,} images found are used" + (f" ({lost})" if lost else "")
    parts: list[RenderableType] = [Text(f"audit of the data: {used}", style="bold")]
    if audit.shortcuts:
        parts.append(_bar(audit.shortcuts))
    return Group(*parts, *(line for finding in audit.findings for line in _lines(finding)))


def _bar(shortcuts: Shortcuts) -> RenderableType:
    if shortcuts.bar is None:
        return Text(f"no bar to beat: {EVERYTHING} are the same in all images, or a class has a single patient")
    bar = shortcuts.bar
    table = Table(
        title="The bar to beat: who sees no picture, only what the file says of itself, has "
        f"{_percent(bar.accuracy)} accuracy ({_percent(bar.balanced_accuracy)} balanced)",
        title_justify="left",
    )
    table.add_column("sees")
    for name in ("values", "accuracy", "balanced accuracy"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_row("nothing: always the largest class", "", _percent(shortcuts.majority), _percent(shortcuts.chance), "")
    for row in shortcuts.found:
        figures = f"{row.values:,}", _percent(row.accuracy), _percent(row.balanced_accuracy)
        table.add_row(
            row.name.replace("_", " "), *figures, "the class follows" if row.follows else "no more than chance"
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _lines(finding: Finding) -> Iterator[Text]:
    severity = "allowed leak" if finding.allowed else str(finding.severity)
    style = STYLES[Severity.WARNING if finding.allowed else finding.severity]
    yield Text(f"{severity}: {finding.name}: {finding.evidence} {finding.remedy}", style=style)
    most = SHOWN_FILES if finding.name.endswith("_files") else SHOWN
    for example in finding.examples[:most]:
        yield Text(f"  {example.text(SHOWN_PATHS)}", style=style)
    if len(finding.examples) > most:
        yield Text(f"  and {len(finding.examples) - most:,} more", style=style)
