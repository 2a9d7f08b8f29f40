"""The audit in a run folder: `audit.json`, pictures of images that may be one, and what the report says of both."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cxr_models.audit import Audit, Example, Finding, Severity, readable
from cxr_models.dataset import Manifest
from cxr_models.images import read_picture
from cxr_models.storage import written_whole
from sweep.record import RunFolder, write_json

PICTURED = ("one_image_two_labels", "duplicate_on_two_sides", "near_duplicates", "exact_duplicates")
MOST_PICTURES = 12
SIDE = 192  # of an image in a picture, in pixels


@dataclass(frozen=True)
class PairPicture:
    """Images that are one, side by side.

    Attributes:
        picture: as a data URI.
    """

    finding: str
    paths: tuple[str, ...]
    detail: str
    picture: str


def finding_json(finding: Finding) -> dict[str, Any]:
    """A finding without its examples, for `summary.json`."""
    return {
        "name": finding.name,
        "severity": finding.severity,
        "allowed": finding.allowed,
        "evidence": finding.evidence,
        "remedy": finding.remedy,
        "examples": len(finding.examples),
    }


def bar_json(audit: Audit) -> dict[str, Any] | None:
    """The bar to beat, for `summary.json`; None if there is none."""
    if audit.shortcuts is None or audit.shortcuts.bar is None:
        return None
    shortcuts, bar = audit.shortcuts, audit.shortcuts.bar
    return {
        "sees": bar.name,
        "accuracy": bar.accuracy,
        "balanced_accuracy": bar.balanced_accuracy,
        "majority": shortcuts.majority,
        "chance": shortcuts.chance,
    }


def audit_tags(audit: Audit) -> dict[str, str]:
    """Tag of MLflow that names what figures have to be read with; none if nothing was found but notes."""
    grave = [finding.name for finding in audit.findings if finding.severity is not Severity.NOTE]
    return {"audit": ";".join(grave)} if grave else {}


def write_audit(folder: RunFolder, audit: Audit, manifest: Manifest) -> None:
    """Write `audit.json`, and pictures of the pairs that a person should look at first."""
    pictures = []
    for number, (finding, example) in enumerate(_pictured(audit.findings), start=1):
        path = folder.audit_pictures / f"{number:02}.png"
        paths = example.paths[:2]
        with written_whole(path) as scratch:
            _side_by_side([manifest.root / name for name in paths]).save(scratch)
        pictures.append({"file": path.name, "finding": finding.name, "paths": paths, "detail": example.detail})
    write_json(folder.audit, _readable({**audit.to_json(), "pictures": pictures}))


def _readable(value: Any) -> Any:
    """JSON and the report are UTF-8; names of files need not be."""
    if isinstance(value, Mapping):
        return {key: _readable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(inner) for inner in value]
    return readable(value) if isinstance(value, str) else value


def _pictured(findings: Sequence[Finding]) -> list[tuple[Finding, Example]]:
    """A few examples of each kind that is pictured; the first of each is the one to look at first."""
    by_name = {finding.name: finding for finding in findings}
    wanted = [by_name[name] for name in PICTURED if name in by_name]
    each = max(1, MOST_PICTURES // len(wanted)) if wanted else 0
    return [(finding, example) for finding in wanted for example in finding.examples[:each] if len(example.paths) > 1]


def _side_by_side(paths: Sequence[Path]) -> Image.Image:
    """Images beside each other; one that can no longer be read stays black: the audit is no reason to fail."""
    canvas = Image.new("L", (SIDE * len(paths), SIDE))
    for place, path in enumerate(paths):
        try:
            canvas.paste(read_picture(path).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), (place * SIDE, 0))
        except (OSError, ValueError):
            continue
    return canvas


def read_audit(folder: RunFolder) -> Mapping[str, Any] | None:
    """What `write_audit` wrote; None in a folder without it."""
    return json.loads(folder.audit.read_text(encoding="utf-8")) if folder.audit.is_file() else None


def pair_pictures(folder: RunFolder, audit: Mapping[str, Any] | None) -> Iterator[PairPicture]:
    """The pictures of an audit that are still there."""
    for row in (audit or {}).get("pictures", []):
        path = folder.audit_pictures / row["file"]
        if path.is_file():
            uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            yield PairPicture(row["finding"], tuple(row["paths"]), row["detail"], uri)
