"""What the disturbed sweeps of `faults.py` came to, for the page of results."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from fault_runs import PHASES
from tables import table

Result = Mapping[str, Any]

SAME = (
    "the same trials with the same outcomes, none lost and none twice; every epoch's training and validation metrics, "
    "rungs, best trial and test figures equal to the last bit to those of a sweep that nothing disturbed; in MLflow "
    "one run a sweep, one a trial, and every metric of every epoch once, with the record's value; nothing of a dead "
    "sweep alive after 30 s."
)


def _drivers(result: Result) -> list[str]:
    rows, kills = result["rows"], [kill for row in result["rows"] for kill in row["kills"]]
    by_phase = [
        [phase, str(len(own)), str(sum(kill["resumed"] for kill in own)), _span([kill["second"] for kill in own])]
        for phase in PHASES
        if (own := [kill for kill in kills if kill["phase"] == phase])
    ]
    times = Counter(len(row["kills"]) for row in rows)
    counted = ", ".join(f"{number} of them {_times(count)}" for count, number in sorted(times.items()))
    return [
        "## Drivers killed",
        f"{len(rows)} sweeps of {result['trials']} trials (`faults.yaml`), {counted}, by SIGKILL at random moments of "
        f"the {result['undisturbed_seconds']:.0f} s that such a sweep takes undisturbed, and resumed at once. What is "
        f"checked: {SAME}",
        table(["the sweep stood at", "kills", "of them of a resumed one", "seconds after its start"], by_phase),
        table(
            [
                "sweeps",
                "with anything lost",
                "finished epochs trained again",
                "seconds lost",
                "longest-lived orphan, s",
            ],
            [
                [
                    str(len(rows)),
                    _lossy(rows),
                    str(sum(row["epochs_again"] for row in rows)),
                    _span([row["lost_seconds"] for row in rows]),
                    f"{max(row['orphans_seconds'] for row in rows):.1f}",
                    f"{max(row['agents_seconds'] for row in rows):.0f}",
                ]
            ],
        ),
        "Seconds lost: of all processes of a sweep together, less those of the undisturbed one; what other programs "
        "took of the machine is in them. Starting again alone takes some ten. Orphans: how long what a killed driver "
        "had started lived on; two agents of Ray's own, which hold nothing, look for its dead head for a minute or so.",
        *_complaints(rows),
    ]


def _workers(result: Result) -> list[str]:
    rows, lines = result["rows"], []
    twice = sum(len(row["kills"]) > 1 for row in rows)
    for what in sorted({kill["what"] for row in rows for kill in row["kills"]}):
        own = [kill for row in rows for kill in row["kills"] if kill["what"] == what]
        phases = Counter(kill["phase"] for kill in own)
        where = ", ".join(f"{phases[phase]} in {phase}" for phase in PHASES if phases[phase])
        lines.append([what, str(len(own)), where, _span([kill["second"] for kill in own])])
    return [
        "## Workers killed",
        f"{len(rows)} sweeps of {result['trials']} trials (`faults.yaml`), {twice} of them twice, by "
        f"SIGKILL while trials or final trainings ran. What is checked: {SAME}",
        table(["killed", "times", "where", "seconds after the start"], lines),
        table(
            ["sweeps", "with anything lost", "finished epochs trained again", "seconds lost"],
            [
                [
                    str(len(rows)),
                    _lossy(rows),
                    str(sum(row["epochs_again"] for row in rows)),
                    _span([row["lost_seconds"] for row in rows]),
                ]
            ],
        ),
        "A kill costs the epoch that runs, and no finished one unless the table says so.",
        *_complaints(rows),
    ]


def _servers(result: Result) -> list[str]:
    rows = [
        [
            row["store"],
            str(len(row["stops"])),
            f"{row['away_seconds']:.0f}",
            f"{row['seconds']:.0f}",
            "yes" if row["complaints"] else "nothing",
        ]
        for row in result["rows"]
    ]
    return [
        "## The MLflow server restarted",
        f"A sweep of {result['trials']} trials that writes to a real `mlflow server`, which is stopped and started "
        "again at random moments, killed every second time; the last time it comes back only after the sweep's end, "
        "and `python -m sweep.sync` sends the rest. Then every run and every metric of every epoch must be there once.",
        table(["store", "restarts", "seconds away", "seconds of the sweep", "lost or twice"], rows),
        *_complaints(result["rows"]),
    ]


def _disks(result: Result) -> list[str]:
    rows = [
        [
            row["case"],
            "`--resume`" if row["resumed"] else "the same command",
            "yes" if row["complaints"] else "nothing",
            f"“{row['message']}”",
        ]
        for row in result["rows"]
    ]
    return [
        "## The disk full",
        f"Run folder and cache of a sweep of {result['trials']} trials lie on a tmpfs of 200 MB that runs full; it "
        "must end with status 1 and a message, no traceback. Once there is room it goes on, and ends as the "
        "undisturbed one.",
        table(["full", "then", "lost", "message"], rows),
        *_complaints(result["rows"]),
    ]


def _lossy(rows: Sequence[Result]) -> str:
    return str(sum(bool(row["complaints"]) for row in rows))


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _span(values: Sequence[float]) -> str:
    """Mean, median and extremes."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{mean(values):.1f} ({low:.1f} to {high:.1f}, median {median(values):.1f})"


def _complaints(rows: Sequence[Result]) -> list[str]:
    """All that went wrong, in full."""
    lines = [f"- sweep {number}: {text}" for number, row in enumerate(rows, start=1) for text in row["complaints"]]
    return ["What went wrong:\n\n" + "\n".join(lines)] if lines else []


# Kind of result -> its part of the page.
FAULTS: Mapping[str, Callable[[Result], list[str]]] = {
    "faults_drivers": _drivers,
    "faults_workers": _workers,
    "faults_mlflow": _servers,
    "faults_disk": _disks,
}
