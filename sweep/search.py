"""The Optuna study behind a sweep: what to try next, and what became of it."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from cxr_models.trial import Outcome, Suggestion, TrialConfig
from sweep.space import Choice, Constant, Domain, Space, Value
from sweep.spec import SearchSpec, SweepSpec

MAX_STARTUP_TRIALS = 10


class Search:
    """Suggests trials and learns from their ends. For one thread; any number of trials may be open.

    With one trial open at a time, the same spec and the same values lead to the same suggestions.

    Args:
        spec: what is searched, and how.
        journal: file that records the study as it goes, which Optuna's dashboard can read; in memory only if None.

    Raises:
        FileExistsError: the journal is there already; a study of another sweep must not flow into this one.

    Attributes:
        total: how many trials there will be: `search.trials`, or fewer where a grid has fewer points.
    """

    def __init__(self, spec: SweepSpec, journal: Path | None = None) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = spec.space
        points = _grid(spec) if spec.search.algorithm == "grid" else list(spec.search.fixed)
        self._points: Iterator[Mapping[str, Value]] = iter(points)
        self.total = len(points) if spec.search.algorithm == "grid" else spec.search.trials
        self._study = optuna.create_study(
            study_name=spec.name,
            storage=_storage(journal),
            sampler=_sampler(spec.search),
            direction="maximize" if spec.objective.mode == "max" else "minimize",
        )
        self._open: dict[int, optuna.Trial] = {}
        self._reported: dict[int, set[int]] = {}
        self._given_out = 0
        self._repeats: Counter[str] = Counter()

    def suggest(self) -> Suggestion | None:
        """The next trial: fixed points first, then what the algorithm finds; None once all were given out."""
        if self._given_out == self.total:
            return None
        self._given_out += 1
        if (point := next(self._points, None)) is not None:
            self._study.enqueue_trial(_parameters(self._space, point))
        trial = self._study.ask()
        self._open[trial.number] = trial
        self._reported[trial.number] = set()
        config = TrialConfig(**_values(self._space, trial))
        self._repeats[config.digest] += 1
        repeat = self._repeats[config.digest]
        return Suggestion(trial.number, config.digest if repeat == 1 else f"{config.digest}-{repeat}", config)

    def report(self, number: int, epoch: int, value: float) -> None:
        """Note the objective after an epoch. A trial that was retried may report an epoch again; the first counts.

        Raises:
            ValueError: no such trial is open.
        """
        trial = self._trial(number)
        if math.isfinite(value) and epoch not in self._reported[number]:
            self._reported[number].add(epoch)
            trial.report(value, step=epoch)

    def finish(self, number: int, outcome: Outcome, value: float | None) -> None:
        """Note how a trial ended.

        Args:
            number: of the suggestion.
            outcome: an early stop counts with what was reported, a failure only as a failure.
            value: of the objective, needed for a completed trial; what is not finite counts as a failure.

        Raises:
            ValueError: no such trial is open, or a completed trial comes without a value.
        """
        trial = self._trial(number)
        if outcome is Outcome.COMPLETED and value is None:
            raise ValueError(f"trial {number} completed, but got no value of the objective")
        if outcome is Outcome.FAILED or (value is not None and not math.isfinite(value)):
            self._study.tell(trial, state=TrialState.FAIL)
        elif outcome is Outcome.STOPPED_EARLY:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, value)
        del self._open[number], self._reported[number]

    def _trial(self, number: int) -> optuna.Trial:
        if number not in self._open:
            raise ValueError(f"trial {number} is not open; open are: {sorted(self._open)}")
        return self._open[number]


def _storage(journal: Path | None) -> BaseStorage | None:
    if journal is None:
        return None
    if journal.exists():
        raise FileExistsError(f"expected a journal that does not exist yet, got {journal}")
    journal.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(journal)))


def _sampler(search: SearchSpec) -> BaseSampler:
    if search.algorithm != "tpe":
        return RandomSampler(seed=search.seed)
    with warnings.catch_warnings():
        # `group` is experimental in name; without it, Optuna samples conditional parameters independently.
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(
            n_startup_trials=max(1, min(MAX_STARTUP_TRIALS, search.trials // 3)),
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=search.seed,
        )


def _grid(spec: SweepSpec) -> list[dict[str, Value]]:
    """The points of the grid in the order they run: those the fixed points name first, none twice."""
    first: list[dict[str, Value]] = []
    for fixed in spec.search.fixed:
        first.extend(islice((point for point in spec.space.points(fixed) if point not in first), 1))
    rest = (point for point in spec.space.points() if point not in first)
    return list(islice(chain(first, rest), spec.search.trials))


def _values(space: Space, trial: optuna.Trial) -> dict[str, Any]:
    values: dict[str, Value] = {}
    for axis in space.axes.values():
        case = axis.case_given(values)
        values[axis.name] = (
            _suggest(trial, axis.name, axis.domain)
            if case is None
            else _suggest(trial, _parameter(axis.name, case.text), case.domain)
        )
    return values


def _suggest(trial: optuna.Trial, name: str, domain: Domain) -> Value:
    if isinstance(domain, Constant):
        return domain.value
    if isinstance(domain, Choice):
        choices: dict[Any, Value] = {_encoded(value): value for value in domain.values}
        return choices[trial.suggest_categorical(name, list(choices))]
    high = domain.nearest(domain.high)  # the last step, which Optuna would otherwise warn about
    if domain.whole:
        step = 1 if domain.step is None else int(domain.step)
        return trial.suggest_int(name, int(domain.low), int(high), step=step, log=domain.log)
    return domain.nearest(trial.suggest_float(name, domain.low, high, step=domain.step, log=domain.log))


def _parameters(space: Space, point: Mapping[str, Value]) -> dict[str, str | int | float]:
    """A point as Optuna's parameters: each value under every name it may be asked for."""
    return {
        name: _encoded(point[axis.name])
        for axis in space.axes.values()
        if axis.name in point
        for name, domain in (
            (axis.name, axis.domain),
            *((_parameter(axis.name, case.text), case.domain) for case in axis.cases),
        )
        if point[axis.name] in domain
    }


def _parameter(axis: str, case: str) -> str:
    """A case's own parameter, so that a changed range never meets the values of another."""
    return f"{axis}[{case}]"


def _encoded(value: Value) -> str | int | float:
    """Optuna keeps no lists."""
    return json.dumps(value) if isinstance(value, tuple) else value
