"""Going on with a sweep: what its earlier sessions were told, and whether it is still the same sweep."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from cxr_models.splits import write_split_csv
from cxr_models.trial import TrialData
from sweep.document import read_plain, shown
from sweep.plan import Plan
from sweep.record import RunFolder, append_line, drop_cut_line, read_lines
from sweep.versions import version_of

SHOWN_DIFFERENCES = 12
# What may change between sessions: more trials, where they run, and where the same images lie.
FREE_KEYS = ("search.trials", "data.source", "resources.")
# Of these a suggestion or a figure may depend on the version.
PACKAGES = ("ray", "tensorflow", "keras", "optuna", "scikit-learn", "numpy")


class ResumeRefused(ValueError):  # noqa: N818 - what happened
    """It would not be the same sweep."""


class SessionEnd(StrEnum):
    """How a session ended, unless it was killed."""

    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Session:
    """One time that a sweep ran.

    Attributes:
        trials: `search.trials`.
        threads: of each trial; figures are bit-equal only for the same number.
        versions: of the packages that figures depend on.
        files: what trials were given, by kind: names that follow from the contents.
        end: None where it was killed.
    """

    trials: int
    threads: int
    versions: Mapping[str, str]
    files: Mapping[str, list[str]]
    end: SessionEnd | None = None


@dataclass(frozen=True)
class Sessions:
    """The sessions of a sweep so far, in order."""

    past: tuple[Session, ...] = ()

    @classmethod
    def read(cls, folder: RunFolder) -> "Sessions":
        """Those a run folder tells of."""
        drop_cut_line(folder.sessions)
        found: list[Session] = []
        for entry in read_lines(folder.sessions):
            if "ended" in entry:
                found[-1] = replace(found[-1], end=SessionEnd(entry["ended"]))
            else:
                found.append(Session(entry["trials"], entry["threads"], entry["versions"], entry["files"]))
        return cls(tuple(found))

    def stages(self, trials: int) -> list[int]:
        """`search.trials` of each session that had more of them than those before it, and of the one that begins."""
        return sorted({*(session.trials for session in self.past), trials})

    def is_done(self, trials: int) -> bool:
        """Whether the last session came to its end, with all trials that are wanted now."""
        return bool(self.past) and self.past[-1].end is SessionEnd.DONE and self.past[-1].trials >= trials

    def check_files(self, data: TrialData) -> None:
        """Compare what trials get with what they got: pictures decoded by other rules, masks and weights count, too.

        Raises:
            ResumeRefused: something is another.
        """
        now = _files(data)
        for session in self.past[:1]:
            if other := [kind for kind in now if now[kind] != session.files.get(kind)]:
                raise ResumeRefused(
                    f"expected the {', '.join(other)} that the sweep was begun with, but their contents are others\n"
                    "give the same ones, or begin anew without --resume, under another --name"
                )

    def notes(self) -> list[str]:
        """What a person should know before going on."""
        changed = {
            name: (then, now)
            for session in self.past
            for name, now in _versions().items()
            if (then := session.versions.get(name, now)) != now
        }
        return [
            f"an earlier session had {name} {then}, now it is {now}: figures and suggestions may differ from those of "
            "a sweep that was never interrupted"
            for name, (then, now) in changed.items()
        ]


def begin_session(folder: RunFolder, plan: Plan, data: TrialData) -> None:
    """Note that the sweep is begun, or gone on with."""
    begun = {"begun": datetime.now(UTC).isoformat(timespec="seconds"), "process": os.getpid()}
    facts = {"trials": plan.spec.search.trials, "threads": plan.allotment.threads, "versions": _versions()}
    append_line(folder.sessions, {**begun, **facts, "files": _files(data)})


def end_session(folder: RunFolder, end: SessionEnd) -> None:
    """Note how it ended, once everything is written."""
    append_line(folder.sessions, {"ended": end, "at": datetime.now(UTC).isoformat(timespec="seconds")})


def recorded_name(folder: RunFolder) -> str:
    """The sweep's name, which need not be its folder's.

    Raises:
        ResumeRefused: the folder's spec cannot be read.
    """
    return str(_recorded_spec(folder)["name"])


def continued(plan: Plan, folder: RunFolder, sessions: Sessions) -> Plan:
    """The plan as the sweep goes on with it: its trials get as many threads as they had.

    Raises:
        ResumeRefused: the YAML or the data are no longer those the sweep was begun with; with the differences.
    """
    then, now = _flat(_recorded_spec(folder)), _flat(read_plain(plan.spec.to_yaml()))
    problems = [
        f"{key}: was {_said(then, key)}, now it is {_said(now, key)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(FREE_KEYS)
    ]
    most = max((session.trials for session in sessions.past), default=0)
    if plan.spec.search.trials < most:
        problems.append(f"search.trials: was {most}, now it is {plan.spec.search.trials}; a sweep can only grow")
    problems += _data_differences(plan, folder)
    if problems:
        more = [f"and {len(problems) - SHOWN_DIFFERENCES} more"] if len(problems) > SHOWN_DIFFERENCES else []
        told = [f"  - {problem}" for problem in (*problems[:SHOWN_DIFFERENCES], *more)]
        raise ResumeRefused(
            "\n".join(
                [
                    f"expected the settings and data that {folder.path} was begun with, but found:",
                    *told,
                    "give the same ones (its spec.yaml and split.csv tell which), or begin anew without --resume, "
                    "under another --name",
                ]
            )
        )
    threads = next((session.threads for session in sessions.past), plan.allotment.threads)
    return replace(plan, allotment=replace(plan.allotment, threads=threads))


def _recorded_spec(folder: RunFolder) -> Mapping[str, Any]:
    try:
        found = read_plain(folder.spec.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResumeRefused(f"expected a sweep's settings in {folder.spec}, but {error}; begin a new sweep") from None
    if "name" not in found:
        raise ResumeRefused(f"expected a sweep's settings in {folder.spec}, but found none; begin a new sweep")
    return found


def _data_differences(plan: Plan, folder: RunFolder) -> list[str]:
    """How the images, labels, patients and parts differ from those that the sweep was begun with."""
    fresh = folder.state / "split-now.csv"
    write_split_csv(fresh, plan.manifest, plan.splits, plan.folds)
    try:
        now = _split_rows(fresh)
    finally:
        fresh.unlink()
    then = _split_rows(folder.split)
    sides = (("gone", then.keys() - now.keys()), ("new", now.keys() - then.keys()))
    found = [f"data: {_listed(paths)} {what}" for what, paths in sides if paths]
    both = then.keys() & now.keys()
    columns = ["label", "patient", "pixels"]
    if not found:  # with other images come other parts
        columns += ["split", *(name for name in next(iter(then.values()), {}) if name.startswith("fold"))]
    for column in columns:
        if other := {path for path in both if then[path].get(column) != now[path].get(column)}:
            found.append(f"data: {_listed(other)} with another {'picture' if column == 'pixels' else column}")
    return found


def _split_rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def _listed(paths: Sequence[str] | set[str]) -> str:
    first = min(paths)
    return f"{len(paths):,} images ({first!r}, ...)" if len(paths) > 1 else f"the image {first!r}"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """`section.key` -> value; an axis is compared as a whole."""
    found: dict[str, Any] = {}
    for section, value in values.items():
        if isinstance(value, dict):
            found |= {f"{section}.{key}": inner for key, inner in value.items()}
        else:
            found[section] = value
    return found


def _said(values: Mapping[str, Any], key: str) -> str:
    return shown(values[key]) if key in values else "not there"


def _files(data: TrialData) -> dict[str, list[str]]:
    kinds: dict[str, Mapping[Any, Path]] = {
        "images": data.pixels,
        "masks": data.masks,
        "masked images": data.masked,
        "weights": data.weights,
    }
    return {kind: sorted(f"{path.parent.name}/{path.name}" for path in files.values()) for kind, files in kinds.items()}


def _versions() -> dict[str, str]:
    return {name: version_of(name) for name in PACKAGES}
