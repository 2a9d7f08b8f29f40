"""A search space: one axis per field of `TrialConfig`, each with a domain that may depend on other axes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any

MOST_COMBINATIONS = 100_000  # of values that axes take together; to list them takes a second

Value = str | int | float | tuple[int, ...]


@dataclass(frozen=True)
class Constant:
    value: Value
    finite = True

    def __iter__(self) -> Iterator[Value]:
        return iter((self.value,))

    def __contains__(self, value: Value) -> bool:
        return value == self.value

    def __str__(self) -> str:
        return value_text(self.value)

    def to_yaml(self) -> Any:
        return {"value": list(self.value)} if isinstance(self.value, tuple) else self.value


@dataclass(frozen=True)
class Choice:
    """One of at least one distinct values."""

    values: tuple[Value, ...]
    finite = True

    def __iter__(self) -> Iterator[Value]:
        return iter(self.values)

    def __contains__(self, value: Value) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ", ".join(map(value_text, self.values))

    def to_yaml(self) -> Any:
        return [_plain(value) for value in self.values]


@dataclass(frozen=True)
class Range:
    """A number between `low` and `high`, both included. Whole numbers if `low` is one.

    Attributes:
        log: uniform in the logarithm; then `low` is above 0 and there is no step.
        step: only `low`, `low + step`, `low + 2 step`, ... occur; None for every number.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int)

    @property
    def finite(self) -> bool:
        return self.whole or self.step is not None

    @property
    def steps(self) -> int:
        """How many steps lead from `low` to the largest value.

        Raises:
            ValueError: the values cannot be listed.
        """
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) // self._step)

    def nearest(self, value: float) -> float:
        """The value of the range next to `value`, free of rounding noise: 0.3, not 0.30000000000000004."""
        inside = min(max(value, self.low), self.high)
        if self.step is None:
            return round(inside) if self.whole else inside
        return self._at(min(round((inside - self.low) / self.step), self.steps))

    def __iter__(self) -> Iterator[Value]:
        return (self._at(index) for index in range(self.steps + 1))

    def __contains__(self, value: Value) -> bool:
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return not self.finite or (Decimal(str(value)) - Decimal(str(self.low))) % self._step == 0

    def __str__(self) -> str:
        return (
            f"{value_text(self.low)} to {value_text(self.high)}"
            + (" (log)" if self.log else "")
            + (f" in steps of {value_text(self.step)}" if self.step is not None else "")
        )

    def to_yaml(self) -> Any:
        values: dict[str, Any] = {"low": self.low, "high": self.high}
        if self.log:
            values["log"] = True
        if self.step is not None:
            values["step"] = self.step
        return values

    @property
    def _step(self) -> Decimal:
        if not self.finite:
            raise ValueError(f"the values of a range without step cannot be listed: {self}")
        return Decimal(str(1 if self.step is None else self.step))

    def _at(self, index: int) -> float:
        value = Decimal(str(self.low)) + index * self._step
        return int(value) if self.whole else float(value)


Domain = Constant | Choice | Range


@dataclass(frozen=True)
class Case:
    """A domain that holds while every axis in `when` has one of the values listed for it."""

    when: Mapping[str, tuple[Value, ...]]
    domain: Domain

    def matches(self, values: Mapping[str, Value]) -> bool:
        return all(values[axis] in allowed for axis, allowed in self.when.items())

    @property
    def text(self) -> str:
        """`freeze=none|stages:1,epochs=8`"""
        return ",".join(f"{axis}={'|'.join(map(value_text, allowed))}" for axis, allowed in self.when.items())


@dataclass(frozen=True)
class Axis:
    """A field of `TrialConfig` and what it may be: the domain of the first case that matches, else `domain`."""

    name: str
    domain: Domain
    cases: tuple[Case, ...] = ()

    @property
    def looks_at(self) -> tuple[str, ...]:
        """The axes its cases depend on."""
        return tuple(dict.fromkeys(other for case in self.cases for other in case.when))

    @property
    def domains(self) -> tuple[Domain, ...]:
        return (*(case.domain for case in self.cases), self.domain)

    def case_given(self, values: Mapping[str, Value]) -> Case | None:
        """The first case that matches. `values` holds at least the axes this one looks at."""
        return next((case for case in self.cases if case.matches(values)), None)

    def domain_given(self, values: Mapping[str, Value]) -> Domain:
        """What the axis may be. `values` holds at least the axes this one looks at."""
        case = self.case_given(values)
        return self.domain if case is None else case.domain

    def to_yaml(self) -> Any:
        own = self.domain.to_yaml()
        if not self.cases:
            return own
        when = [
            {"if": {axis: [_plain(value) for value in allowed] for axis, allowed in case.when.items()}}
            | _keyed(case.domain.to_yaml())
            for case in self.cases
        ]
        return _keyed(own) | {"when": when}


@dataclass(frozen=True)
class Space:
    """All axes of a sweep, each after those it looks at."""

    axes: Mapping[str, Axis]

    def points(self, fixed: Mapping[str, Value] | None = None) -> Iterator[dict[str, Value]]:
        """Every point of the space in which the axes in `fixed` have the given values, the last axis fastest.

        Raises:
            ValueError: an axis is a range whose values cannot be listed.
        """
        return self._points(list(self.axes.values()), {}, fixed or {})

    def combinations(self, *names: str) -> set[tuple[Value, ...]]:
        """All values the named axes can take together.

        Raises:
            ValueError: one of them, or an axis it depends on, is a range whose values cannot be listed, or there are
                more than `MOST_COMBINATIONS` of these.
        """
        needed = {axis for name in names for axis in self.dependencies(name)}
        axes = [axis for axis in self.axes.values() if axis.name in needed]
        points = list(islice(self._points(axes, {}, {}), MOST_COMBINATIONS + 1))
        if len(points) > MOST_COMBINATIONS:
            listed = ", ".join(axis.name for axis in axes)
            raise ValueError(
                f"more than {MOST_COMBINATIONS:,} combinations of {listed}; give fewer values or larger steps"
            )
        return {tuple(point[name] for name in names) for point in points}

    def reachable(self, axis: str) -> tuple[Value, ...]:
        """All values one axis can take, in the order of the file.

        Raises:
            ValueError: as `combinations`.
        """
        values = {value for (value,) in self.combinations(axis)}
        listed = (value for domain in reversed(self.axes[axis].domains) for value in domain)
        return tuple(dict.fromkeys(value for value in listed if value in values))

    def dependencies(self, axis: str) -> set[str]:
        """The axis itself, those it looks at, those they look at, and so on."""
        found: set[str] = set()
        waiting = [axis]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting.extend(self.axes[name].looks_at)
        return found

    def possible_domains(self, axis: str, point: Mapping[str, Value]) -> tuple[Domain, ...]:
        """The domains an axis may get once the axes that `point` leaves open have their values.

        Open axes are taken one by one, so that a domain may be listed which no combination of them leads to.
        """
        return self._possible_domains(axis, point, {})

    def _possible_domains(
        self, axis: str, point: Mapping[str, Value], known: dict[str, tuple[Domain, ...]]
    ) -> tuple[Domain, ...]:
        """Each axis is worked out once and then `known`: a chain of conditions would double the work at every link."""
        if axis not in known:
            domains: list[Domain] = []
            for case in self.axes[axis].cases:
                outcomes = [self._outcomes(other, allowed, point, known) for other, allowed in case.when.items()]
                if all(True in outcome for outcome in outcomes):
                    domains.append(case.domain)
                    if all(False not in outcome for outcome in outcomes):
                        break
            else:
                domains.append(self.axes[axis].domain)
            known[axis] = tuple(domains)
        return known[axis]

    def _outcomes(
        self, axis: str, allowed: Sequence[Value], point: Mapping[str, Value], known: dict[str, tuple[Domain, ...]]
    ) -> set[bool]:
        """Whether an axis can have one of the allowed values (True), and whether another (False)."""
        if axis in point:
            return {point[axis] in allowed}
        domains = self._possible_domains(axis, point, known)
        outcomes = {True} if any(value in domain for domain in domains for value in allowed) else set()
        if any(not domain.finite or any(value not in allowed for value in domain) for domain in domains):
            outcomes.add(False)
        return outcomes

    def _points(
        self, axes: Sequence[Axis], values: dict[str, Value], fixed: Mapping[str, Value]
    ) -> Iterator[dict[str, Value]]:
        if not axes:
            yield values
            return
        axis, *rest = axes
        domain = axis.domain_given(values)
        if axis.name in fixed:
            domain = Choice(tuple(value for value in (fixed[axis.name],) if value in domain))
        for value in domain:
            yield from self._points(rest, {**values, axis.name: value}, fixed)


def value_text(value: Value) -> str:
    """A value as messages and Optuna's parameter names show it; a list as `[1024, 512]`."""
    return str(_plain(value))


def _plain(value: Value) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _keyed(domain: Any) -> dict[str, Any]:
    """The long form of a domain, which a `when` can stand beside."""
    if isinstance(domain, dict):
        return domain
    return {"choices": domain} if isinstance(domain, list) else {"value": domain}
