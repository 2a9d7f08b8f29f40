"""What goes with the best model wherever it is taken: what is wrong with it and its data, and what the verdict says."""

import json
from collections.abc import Mapping
from typing import Any

from sweep.record import RunFolder, write_json


def champion_notes(summary: Mapping[str, Any]) -> dict[str, str]:
    """What is said of the best model; nothing that is empty.

    Args:
        summary: what `summary.json` holds, or any part of it.

    Returns:
        `doctor`: the names of what the doctor found in the best trial and in its final models; `audit`: of the leaks
        that were allowed and the warnings about the data; both joined by `;`. `verdict`: its sentence.
    """
    best = summary.get("best") or {}
    found = list(best.get("doctor", ()))
    for row in summary.get("strategies", ()):
        found += row.get("final_doctor", ()) if row["trial_id"] == best.get("trial_id") else ()
    notes = {
        "doctor": ";".join(dict.fromkeys(diagnosis["name"] for diagnosis in found)),
        "audit": ";".join(finding["name"] for finding in summary.get("audit", ()) if finding["severity"] != "note"),
        "verdict": (summary.get("verdict") or {}).get("sentence", ""),
    }
    return {name: text for name, text in notes.items() if text}


def note_champion(folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """Add the notes to `best/config.json`, where there is one."""
    if folder.best_config.is_file():
        config = json.loads(folder.best_config.read_text(encoding="utf-8"))
        write_json(folder.best_config, {**config, **champion_notes(summary)})
