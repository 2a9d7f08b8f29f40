"""The Optuna study behind a sweep: what to try next, and what became of it."""

import heapq
import json
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from cxr_models.trial import AXES, Outcome, Suggestion, TrialConfig
from sweep.space import Choice, Constant, Domain, Space, Value
from sweep.spec import SearchSpec, SweepSpec
from sweep.study_journal import StudyJournal

Order = Callable[[TrialConfig], tuple[Any, ...]]

MAX_STARTUP_TRIALS = 10

# The sampler looks at no more ended trials than this, so that a suggestion costs the same after 10,000 trials as after
# some hundred. Beyond it, the best and the most recent go on into a new study. TPE takes at most its 25 best for good
# (Optuna's default gamma); were more of the best kept, they would stand for what is bad and push it away from them.
HISTORY = 300
BEST_KEPT = 25
RECENT_KEPT = 225


class Search:
    """Suggests trials and learns from their ends. For one thread; any number of trials may be open.

    With one trial open at a time, the same spec and the same values lead to the same suggestions.

    Args:
        spec: what is searched, and how.
        journal: file that records the study as it goes, which Optuna's dashboard can read; in memory only if None.
        order: sort key of a configuration. Trials that do not depend on the results of others (a grid's, random ones,
            TPE's first) are given out in this order, fixed points still before the rest. The same trials run with
            every order.
        stages: `search.trials` of each session of a sweep that goes on, where it grew; the last is the spec's. What
            an earlier session drew ahead is then drawn as it was.
        resumed: the journal is one of an earlier session, which is gone on with.

    Raises:
        FileExistsError: the journal is there already; a study of another sweep must not flow into this one.

    Attributes:
        total: how many trials there will be: `search.trials`, or fewer where a grid has fewer points.
    """

    def __init__(
        self,
        spec: SweepSpec,
        journal: Path | None = None,
        *,
        order: Order | None = None,
        stages: Sequence[int] = (),
        resumed: bool = False,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._order = order
        sizes = stages or (spec.search.trials,)
        self._stages = deque(_stages(spec, sizes))
        grid = spec.search.algorithm == "grid"
        self.total = sum(stage.points for stage in self._stages) if grid else spec.search.trials
        self._model = _Model(spec, trials=sizes[0])
        self._journal = StudyJournal(journal, spec.name, _direction(spec), resumed=resumed) if journal else None
        self._ahead: deque[_Drawn] = deque()
        self._open: dict[int, _Drawn] = {}
        self._given_out = 0
        self._repeats: Counter[str] = Counter()

    def suggest(self) -> Suggestion | None:
        """The next trial: fixed points first, then what the algorithm finds; None once all were given out."""
        if self._given_out == self.total:
            return None
        return self._give_out(self._next_ahead() or self._model.draw())

    def again(self, suggestion: Suggestion) -> bool:
        """Give out a trial that an earlier session was given, as its next one.

        Returns:
            Whether this search would have suggested it, too: its sampler is then as it was.

        Raises:
            ValueError: trials are given out in another order than they were.
        """
        config, as_before = suggestion.config, True
        drawn = self._next_ahead(config)
        if drawn is None:
            drawn = self._model.draw()
            as_before = drawn.config == config
        if not as_before:
            self._model.forget(drawn)
            drawn = self._model.draw({axis: getattr(config, axis) for axis in AXES})
            drawn.config = config
        given = self._give_out(drawn)
        if given != suggestion:
            raise ValueError(f"expected trial {given.number} ({given.trial_id}) next, got {suggestion}")
        return as_before

    def _give_out(self, drawn: "_Drawn") -> Suggestion:
        number = self._given_out
        self._given_out += 1
        self._open[number] = drawn
        if self._journal:
            self._journal.begin(number, drawn.frozen(TrialState.RUNNING))
        digest = drawn.config.digest
        self._repeats[digest] += 1
        repeat = self._repeats[digest]
        return Suggestion(number, digest if repeat == 1 else f"{digest}-{repeat}", drawn.config)

    def _next_ahead(self, config: TrialConfig | None = None) -> "_Drawn | None":
        """Of the trials that no result can change the next one, or the one with this configuration."""
        if not self._ahead and self._stages and self._given_out >= self._stages[0].begin:
            for points in self._stages.popleft().groups:
                self._ahead.extend(self._sorted([self._model.draw(point) for point in points]))
        for drawn in self._ahead:
            if config is None or drawn.config == config:
                self._ahead.remove(drawn)
                return drawn
        return None

    def report(self, number: int, epoch: int, value: float) -> None:
        """Note the objective after an epoch. A trial that was retried may report an epoch again; the first counts.

        Raises:
            ValueError: no such trial is open.
        """
        trial = self._trial(number)
        if math.isfinite(value) and epoch not in trial.reported:
            trial.reported[epoch] = value
            if self._journal:
                self._journal.report(number, epoch, value)

    def finish(self, number: int, outcome: Outcome, value: float | None, *, avoid: bool = False) -> None:
        """Note how a trial ended.

        Args:
            number: of the suggestion.
            outcome: an early stop counts with what was reported, a failure only as a failure.
            value: of the objective, needed for a completed trial; what is not finite counts as a failure.
            avoid: a failed trial tells against its surroundings: they are taken for worse than all others.

        Raises:
            ValueError: no such trial is open, or a completed trial comes without a value.
        """
        trial = self._trial(number)
        if outcome is Outcome.COMPLETED and value is None:
            raise ValueError(f"trial {number} completed, but got no value of the objective")
        if avoid:
            trial.reported.clear()
            state, told = TrialState.PRUNED, None  # without a value, the last of all in TPE's order
        elif outcome is Outcome.FAILED or (value is not None and not math.isfinite(value)):
            state, told = TrialState.FAIL, None
        elif outcome is Outcome.STOPPED_EARLY:
            state, told = TrialState.PRUNED, trial.last_reported
        else:
            state, told = TrialState.COMPLETE, value
        self._model.finish(trial, state, told)
        if self._journal:
            self._journal.finish(number, state, told)
        del self._open[number]

    def close(self) -> None:
        """Bring all of the study to the disk; what is open stays so."""
        if self._journal:
            self._journal.close()

    def _trial(self, number: int) -> "_Drawn":
        if number not in self._open:
            raise ValueError(f"trial {number} is not open; open are: {sorted(self._open)}")
        return self._open[number]

    def _sorted(self, trials: "list[_Drawn]") -> "list[_Drawn]":
        order = self._order
        return trials if order is None else sorted(trials, key=lambda drawn: order(drawn.config))


@dataclass(eq=False)
class _Drawn:
    """A trial the sampler has drawn, and what came of it so far.

    Attributes:
        params: what it drew, by Optuna's names.
        asked: the trial's number in the model's present study.
        reported: epoch -> objective.
    """

    config: TrialConfig
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    asked: int
    reported: dict[int, float] = field(default_factory=dict)

    @property
    def last_reported(self) -> float | None:
        return self.reported[max(self.reported)] if self.reported else None

    def frozen(self, state: TrialState, value: float | None = None) -> FrozenTrial:
        """The trial in Optuna's words."""
        return optuna.trial.create_trial(
            state=state,
            value=value,
            params=self.params,
            distributions=self.distributions,
            intermediate_values=self.reported,
        )


class _Model:
    """What the sampler knows: a study in memory, of bounded size."""

    def __init__(self, spec: SweepSpec, *, trials: int) -> None:
        self._spec = spec
        self._trials = trials  # that it was made for; the sweep may grow
        self._generation = 0
        self._study = self._new_study()
        self._open: list[_Drawn] = []
        self._ended: list[FrozenTrial] = []

    def draw(self, point: Mapping[str, Value] | None = None) -> _Drawn:
        """A new trial; it has the values `point` names."""
        if len(self._ended) > HISTORY:
            self._renew()
        if point:
            self._study.enqueue_trial(_parameters(self._spec.space, point))
        trial = self._study.ask()
        config = TrialConfig(**_values(self._spec.space, trial))
        self._open.append(_Drawn(config, trial.params, trial.distributions, trial.number))
        return self._open[-1]

    def forget(self, drawn: _Drawn) -> None:
        """Take back what was drawn."""
        self._open.remove(drawn)
        self._study.tell(drawn.asked, state=TrialState.FAIL)

    def finish(self, drawn: _Drawn, state: TrialState, value: float | None) -> None:
        """Learn from a trial's end; nothing is learned from a failure."""
        self.forget(drawn)
        if state is not TrialState.FAIL:
            self._ended.append(drawn.frozen(state, value))
            self._study.add_trial(self._ended[-1])

    def _renew(self) -> None:
        """Go on with the best and the most recent trials; the others are forgotten."""
        older, recent = self._ended[:-RECENT_KEPT], self._ended[-RECENT_KEPT:]
        best = heapq.nsmallest(BEST_KEPT, range(len(older)), key=lambda index: self._rank(older[index]))
        self._ended = [*(older[index] for index in sorted(best)), *recent]
        self._generation += 1
        self._study = self._new_study()
        self._study.add_trials(self._ended)
        for drawn in self._open:
            drawn.asked = len(self._study.get_trials(deepcopy=False))
            self._study.add_trial(drawn.frozen(TrialState.RUNNING))

    def _rank(self, trial: FrozenTrial) -> tuple[float, ...]:
        """Lower is better, as TPE ranks: completed before pruned, and among pruned ones the later before the better."""
        sign = -1.0 if self._spec.objective.mode == "max" else 1.0
        value = math.inf if trial.value is None else sign * trial.value
        return (0, value) if trial.state is TrialState.COMPLETE else (1, -(trial.last_step or 0), value)

    def _new_study(self) -> optuna.Study:
        return optuna.create_study(
            sampler=_sampler(self._spec.search, self._trials, self._generation), direction=_direction(self._spec)
        )


def _direction(spec: SweepSpec) -> StudyDirection:
    return StudyDirection.MAXIMIZE if spec.objective.mode == "max" else StudyDirection.MINIMIZE


def _startup_trials(trials: int) -> int:
    """How many of a sweep's trials TPE draws at random before it learns."""
    return max(1, min(MAX_STARTUP_TRIALS, trials // 3))


@dataclass(frozen=True)
class _Stage:
    """What of a sweep, or of what it later grew by, no result can change.

    Attributes:
        begin: how many trials were given out before it.
        groups: points in the order of drawing; None is drawn by the sampler.
    """

    begin: int
    groups: tuple[list[Mapping[str, Value] | None], ...]

    @property
    def points(self) -> int:
        return sum(map(len, self.groups))


def _stages(spec: SweepSpec, sizes: Sequence[int]) -> Iterator[_Stage]:
    """The stages of a sweep of so many trials after each."""
    fixed, rest = points_of(spec)
    begin = 0
    for size in sizes:
        own = list[Mapping[str, Value] | None](fixed[begin:size])
        if spec.search.algorithm == "grid":
            others = list[Mapping[str, Value] | None](rest[max(0, begin - len(fixed)) : max(0, size - len(fixed))])
        elif spec.search.algorithm == "random":
            others = [None] * (size - begin - len(own))
        else:
            others = [None] * (0 if begin else _startup_trials(size) - len(own))
        yield _Stage(begin, (own, others))
        begin = size


def _sampler(search: SearchSpec, trials: int, generation: int) -> BaseSampler:
    """The sampler of the model's n-th study. The first study's random numbers are those of the seed itself."""
    seed = (
        search.seed if generation == 0 else int(np.random.SeedSequence((search.seed, generation)).generate_state(1)[0])
    )
    if search.algorithm != "tpe":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # `group` is experimental in name; without it, Optuna samples conditional parameters independently.
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(
            n_startup_trials=_startup_trials(trials),
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=seed,
        )


def points_of(spec: SweepSpec) -> tuple[list[Mapping[str, Value]], list[Mapping[str, Value]]]:
    """What runs first, as the fixed points say, and what of a grid follows; no point of a grid twice."""
    trials = spec.search.trials
    if spec.search.algorithm != "grid":
        return list(spec.search.fixed[:trials]), []
    first: list[Mapping[str, Value]] = []
    for fixed in spec.search.fixed:
        first.extend(islice((point for point in spec.space.points(fixed) if point not in first), 1))
    rest = (point for point in spec.space.points() if point not in first)
    return first[:trials], list(islice(rest, max(0, trials - len(first))))


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
