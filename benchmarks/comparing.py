"""From measured seconds to ratios. Pure: no clock, no file."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Report = Mapping[str, Any]  # what a baseline writes, see `baselines/protocol.py`


def full_seconds(report: Report, wall_seconds: float, counts: Mapping[str, int]) -> float:
    """The wall seconds of the whole mix, from a run of some or all of its trials.

    A run of all trials is taken as it is. Otherwise each strategy's mean seconds stand for its other trials, which
    have the same epochs. Between trials comes the mean pause of those measured, and no pause where fewer trials than
    fit at once were; the idle end of the last trials is left out. Both favour the baseline.

    Args:
        report: of the trials that ran.
        wall_seconds: of that run, from start to exit.
        counts: freeze strategy -> trials of the whole mix.
    """
    trials = report["trials"]
    if len(trials) == sum(counts.values()):
        return wall_seconds
    own = {freeze: [_seconds(trial) for trial in trials if trial["freeze"] == freeze] for freeze in counts}
    busy = sum(mean(own[freeze]) * count for freeze, count in counts.items())
    at_once = int(report["at_once"])
    pauses = mean_pause(trials, at_once) * max(0, sum(counts.values()) - at_once)
    span = float(max(trial["ended"] for trial in trials) - min(trial["began"] for trial in trials))
    return wall_seconds - span + (busy + pauses) / at_once


def mean_pause(trials: Sequence[Mapping[str, Any]], at_once: int) -> float:
    """Mean seconds from a trial's end to the start of the one that takes its place; 0 if none took one."""
    began = sorted(float(trial["began"]) for trial in trials)[at_once:]
    ended = sorted(float(trial["ended"]) for trial in trials)
    return mean(start - end for start, end in zip(began, ended, strict=False)) if began else 0.0


def ratios(report: Report, whole_seconds: float, product: Mapping[str, Any]) -> dict[str, float | None]:
    """The baseline's seconds over the product's, cold start included (`cold`) and not (`warm`).

    Args:
        report: of the baseline.
        whole_seconds: of the baseline for the whole mix.
        product: its `wall_seconds` and the `seconds` of its summary; without a `startup` there, `warm` is None.
    """
    startup = product["seconds"].get("startup")
    wall = product["wall_seconds"]
    warm = None if startup is None else (whole_seconds - report["startup_seconds"]) / (wall - startup)
    return {"cold": whole_seconds / wall, "warm": warm}


def mean_accuracy(trials: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> float:
    """Mean of the last epochs' validation accuracy of the trials at `indices` of the mix."""
    return float(mean(trial["val_accuracy"] for trial in trials if trial["index"] in indices))


def same_parameters(trials: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> bool:
    """Whether what trains has the same number of parameters in both lists, trial by trial."""
    counts = {trial["index"]: trial["trainable_parameters"] for trial in trials}
    return all(counts[other["index"]] == other["trainable_parameters"] for other in others)


def _seconds(trial: Mapping[str, Any]) -> float:
    return float(trial["ended"] - trial["began"])
