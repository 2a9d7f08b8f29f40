"""From measured seconds to those of a whole mix, and to ratios. Pure: no clock, no file."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from mixes import Mix

Trial = Mapping[str, Any]  # as a baseline writes it, see `baselines/protocol.py`
Report = Mapping[str, Any]  # what a baseline writes, with the `wall_seconds` of its run from start to exit


def compared(report: Report, mix: Mix, product: Mapping[str, Any]) -> dict[str, Any]:
    """A baseline's report with what it comes to for one mix, beside the product's run of that mix.

    Raises:
        ValueError: the report cannot be scaled to the mix, see `full_seconds`.
    """
    whole = full_seconds(report, mix)
    own = own_trials(report, mix)
    return {
        **report,
        "whole_seconds": whole,
        "scaled": not runs_whole(report, mix),
        "ratios": ratios(report, whole, product),
        "same_parameters": parameters_by_strategy(own).items() <= parameters_by_strategy(product["trials"]).items(),
    }


def own_trials(report: Report, mix: Mix) -> list[Trial]:
    """The trials of the report whose strategy the mix has, whichever mix they were taken from."""
    return [trial for trial in report["trials"] if trial["freeze"] in mix.counts]


def runs_whole(report: Report, mix: Mix) -> bool:
    """Whether the report is of every trial of the mix, with all its epochs, and of nothing else."""
    trials = report["trials"]
    whole = all(trial["mix"] == mix.name and len(trial["epoch_seconds"]) == mix.epochs for trial in trials)
    return whole and len(trials) == mix.trials


def full_seconds(report: Report, mix: Mix) -> float:
    """The wall seconds of the whole mix, from a run of some trials of each strategy for some of their epochs.

    A run of just this mix is taken as it is. Otherwise a strategy's trials, scaled to the mix's epochs, stand with
    their mean for all of that strategy. Between trials comes the mean pause of those measured, and no pause where
    fewer trials than fit at once were; the idle end of the last trials is left out. Both favour the baseline.

    Args:
        report: of a run, which may hold strategies that the mix does not have.
        mix: whose seconds are wanted.

    Raises:
        ValueError: no trial of a strategy ran, or too few epochs, see `trial_seconds`.
    """
    wall, trials = float(report["wall_seconds"]), report["trials"]
    if runs_whole(report, mix):
        return wall
    busy = sum(strategy_seconds(trials, freeze, mix.epochs) * count for freeze, count in mix.counts.items())
    at_once = int(report["at_once"])
    pauses = mean_pause(trials, at_once) * max(0, mix.trials - at_once)
    span = float(max(trial["ended"] for trial in trials) - min(trial["began"] for trial in trials))
    return wall - span + (busy + pauses) / at_once


def strategy_seconds(trials: Sequence[Trial], freeze: str, epochs: int) -> float:
    """Mean seconds of the trials of one strategy, each scaled to `epochs`.

    Raises:
        ValueError: there is none, or see `trial_seconds`.
    """
    own = [trial_seconds(trial, epochs) for trial in trials if trial["freeze"] == freeze]
    if not own:
        raise ValueError(f"expected a trial of the strategy {freeze}, but none ran")
    return mean(own)


def trial_seconds(trial: Trial, epochs: int) -> float:
    """The seconds of a trial, had it run `epochs`: each missing one takes the mean of those run but the first.

    The first epoch compiles, so it stands for no other.

    Raises:
        ValueError: it ran only one of several epochs.
    """
    own: Sequence[float] = trial["epoch_seconds"]
    seconds = float(trial["ended"] - trial["began"])
    if len(own) == epochs:
        return seconds
    if len(own) < 2:
        raise ValueError(f"a trial of {len(own)} epochs cannot be scaled to {epochs}; run at least 2")
    return seconds + (epochs - len(own)) * mean(own[1:])


def mean_pause(trials: Sequence[Trial], at_once: int) -> float:
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


def mean_accuracies(report: Report, mix: Mix, product: Mapping[str, Any]) -> tuple[float, float] | None:
    """Mean validation accuracy of the baseline and of the product, on the same trials after the same epochs.

    Only trials taken from this very mix count, since only those did the product run too; None if there are none.
    """
    same = [trial for trial in report["trials"] if trial["mix"] == mix.name]
    if not same:
        return None
    by_index = {trial["index"]: trial["val_accuracies"] for trial in product["trials"]}
    theirs = mean(trial["val_accuracy"] for trial in same)
    return theirs, mean(by_index[trial["index"]][len(trial["epoch_seconds"]) - 1] for trial in same)


def parameters_by_strategy(trials: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[int]]:
    """Freeze strategy -> the numbers of parameters its trials train."""
    strategies = {trial["freeze"] for trial in trials}
    return {
        freeze: frozenset(trial["trainable_parameters"] for trial in trials if trial["freeze"] == freeze)
        for freeze in strategies
    }
