"""The `space` section of a file: from YAML values to the axes of a `Space`, noting every problem."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from graphlib import CycleError, TopologicalSorter
from math import isfinite
from typing import Any, get_origin, get_type_hints

from cxr_models.backbones import BACKBONES
from cxr_models.freezing import parse_strategy
from cxr_models.trial import AXES, CHOICES, PHASED, UNET, TrialConfig
from sweep.document import Document, Where, shown, unknown
from sweep.space import Axis, Case, Choice, Constant, Domain, Range, Space, Value, value_text
from sweep.weights import source_problem

KINDS: Mapping[str, Any] = {name: kind for name, kind in get_type_hints(TrialConfig).items() if name in AXES}
NAMES: Mapping[str, tuple[str, ...]] = {"backbone": (*BACKBONES, UNET), **CHOICES}
NUMERIC = (int, float, float | str)  # a number, or numbers for each phase
RANGE_KEYS = ("low", "high", "log", "step")
DOMAIN_KEYS = ("value", "choices", *RANGE_KEYS)
MAX_STEPS = 1_000_000
MAX_CHOICES = 1_000
MAX_CASES = 1_000

_DEFAULTS = {field.name: field.default for field in fields(TrialConfig) if field.default is not MISSING}


def read_space(document: Document, defaults: Mapping[str, Value]) -> Space:
    """Read the section; axes with problems, and those that look at them, are left out of the space.

    Args:
        document: the file; its problems grow.
        defaults: of axes that the file does not name, where they are not `TrialConfig`'s.
    """
    section = document.section("space")
    if section is None:
        return Space({})
    document.check_keys(("space",), section, AXES)
    if "backbone" not in section:
        document.add(("space", "backbone"), "missing; name at least one backbone")
    axes: dict[str, Axis] = {}
    for name, default in {**dict.fromkeys(AXES), **_DEFAULTS, **defaults}.items():
        if name in section:
            axis = _read_axis(name, section[name], document)
        else:
            axis = None if default is None else Axis(name, Constant(default))
        if axis is not None:
            axes[name] = axis
    return Space(_in_order(_with_scratch_weights(_with_live_conditions(axes, document)), document))


def list_notes(document: Document) -> tuple[str, ...]:
    """How overrides were taken that can be read in two ways: a list, for an axis whose values are lists themselves."""
    space = document.values.get("space")
    notes = []
    for name in (name for name, kind in KINDS.items() if get_origin(kind) is tuple):
        raw = space.get(name) if isinstance(space, dict) else None
        if not (isinstance(raw, list) and document.overridden(("space", name))):
            continue
        if len(raw) > 1 and not any(isinstance(value, list) for value in raw):
            notes.append(
                f"--set {name}='{raw}' was taken as {len(raw)} choices, {' or '.join(map(str, raw))}; "
                f"one choice that is this list is --set {name}='[{raw}]'"
            )
    return tuple(notes)


def read_point(raw: Any, space: Space, where: Where, document: Document) -> dict[str, Value] | None:
    """Read a fixed point: values for some axes, each inside the axis' domain given the others.

    Returns:
        None where there is a problem, or where the point is outside the space because `--set` made that smaller.
    """
    if not isinstance(raw, dict):
        document.add(where, f"expected axes and their values, such as {{freeze: all}}, got {shown(raw)}")
        return None
    document.check_keys(where, raw, AXES)
    checked = {name: _checked(name, value, (*where, name), document) for name, value in raw.items() if name in AXES}
    point = {name: value for name, value in checked.items() if value is not None}
    misfits = {name: text for name in point if name in space.axes and (text := _misfit(name, point, space))}
    looked_at = {other for name in misfits for other in (name, *_named_in_conditions(name, document))}
    narrowed = any(document.overridden(("space", name)) for name in looked_at) and not document.overridden(where)
    for name, text in misfits.items():
        if not narrowed:
            document.add((*where, name), text)
    return None if misfits else point


def _named_in_conditions(name: str, document: Document) -> set[str]:
    """The axes that the file's conditions of an axis look at, those that an override made void too."""
    section = document.values.get("space")
    axis = section.get(name) if isinstance(section, dict) else None
    cases = axis.get("when") if isinstance(axis, dict) else None
    found = [case.get("if") for case in cases if isinstance(case, dict)] if isinstance(cases, list) else []
    return {other for conditions in found if isinstance(conditions, dict) for other in conditions}


def _misfit(name: str, point: Mapping[str, Value], space: Space) -> str:
    domains = space.possible_domains(name, point)
    inside = [point[name] in domain for domain in domains]
    if not any(inside):
        expected = " or ".join(dict.fromkeys(map(str, domains)))
        return f"expected a value of space.{name} ({expected}), got {value_text(point[name])}"
    if not all(inside):
        open_axes = ", ".join(other for other in space.axes[name].looks_at if other not in point)
        return (
            f"{value_text(point[name])} is in the domain of {name} only for some values of {open_axes}; "
            "name those in the point too"
        )
    return ""


def read_value(name: str, raw: Any) -> Value:
    """Check one value of an axis, alone.

    Raises:
        ValueError: wrong type, out of range, or a name that does not exist.
    """
    value = _typed(KINDS[name], raw)
    for part in str(value).split(">") if name in PHASED else (value,):
        if name in NAMES and part not in NAMES[name]:
            raise ValueError(unknown(part, NAMES[name]))
    if name == "weights" and (problem := source_problem(str(value))):
        raise ValueError(problem)
    if name == "freeze":
        parse_strategy(str(value))
    try:
        TrialConfig(**{"backbone": "", name: value})  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{name} ")) from error
    return value


def space_schema() -> dict[str, Any]:
    """JSON Schema of the section."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["backbone"],
        "properties": {name: _axis_schema(name) for name in AXES},
    }


def condition_schema() -> dict[str, Any]:
    """JSON Schema of what a case of `when` looks at; `space_schema` refers to it as `$defs/condition`."""
    others = {other: {"anyOf": [_value_schema(other), {"type": "array"}]} for other in AXES}
    return {"type": "object", "additionalProperties": False, "minProperties": 1, "properties": others}


def point_schema() -> dict[str, Any]:
    """JSON Schema of a fixed point."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _value_schema(name) for name in AXES},
    }


def _axis_schema(name: str) -> dict[str, Any]:
    value = _value_schema(name)
    choices = {"type": "array", "minItems": 1, "items": value}
    domain = {"value": value, "choices": choices}
    if KINDS[name] in NUMERIC:
        domain |= {"low": value, "high": value, "step": value, "log": {"type": "boolean"}}
    case = {
        "type": "object",
        "additionalProperties": False,
        "required": ["if"],
        "properties": {"if": {"$ref": "#/$defs/condition"}, **domain},
    }
    cases = {"type": "array", "items": case}
    long_form = {"type": "object", "additionalProperties": False, "properties": {**domain, "when": cases}}
    return {"anyOf": [value, choices, long_form]}


def _value_schema(name: str) -> dict[str, Any]:
    if name in PHASED:
        kinds = "|".join(NAMES[name])
        return {"type": "string", "pattern": f"^({kinds})(>({kinds}))*$"}
    if name in NAMES:
        return {"enum": list(NAMES[name])}
    units = {"type": "integer", "minimum": 1}
    schemas: dict[Any, dict[str, Any]] = {
        str: {"type": "string"},
        int: {"type": "integer"},
        float: {"type": "number"},
        float | str: {"type": ["number", "string"]},
    }
    return schemas.get(KINDS[name], {"anyOf": [units, {"type": "array", "items": units}]})


def _typed(kind: Any, raw: Any) -> Value:
    whole = isinstance(raw, int) and not isinstance(raw, bool)
    if whole and abs(raw) >= 2**63:
        raise ValueError(f"expected a number that fits into 64 bits, got {shown(raw)}")
    if kind in (str, float | str) and isinstance(raw, str):
        return raw
    if kind is int and whole:
        return int(raw)
    if kind in (float, float | str) and (whole or isinstance(raw, float)):
        return float(raw)
    if kind is str:
        raise ValueError(f"expected text, got {shown(raw)}; put it in quotes if it is a name")
    if kind in NUMERIC:
        raise ValueError(f"expected a {'whole ' if kind is int else ''}number, got {shown(raw)}")
    if not isinstance(raw, list):
        raw = [raw]
    return tuple(int(_typed(int, units)) for units in raw)  # type: ignore[arg-type]


def _checked(name: str, raw: Any, where: Where, document: Document) -> Value | None:
    try:
        return read_value(name, raw)
    except ValueError as error:
        document.add(where, str(error))
        return None


def _read_axis(name: str, raw: Any, document: Document) -> Axis | None:
    where = ("space", name)
    if not isinstance(raw, dict):
        domain = _read_domain(name, raw, where, document)
        return None if domain is None else Axis(name, domain)
    document.check_keys(where, raw, (*DOMAIN_KEYS, "when"))
    domain = _read_domain(name, {key: value for key, value in raw.items() if key != "when"}, where, document)
    cases = raw.get("when", [])
    if not isinstance(cases, list):
        document.add((*where, "when"), f"expected a list such as [{{if: ..., value: ...}}], got {shown(cases)}")
        return None
    if len(cases) > MAX_CASES:
        document.add((*where, "when"), f"expected at most {MAX_CASES:,} cases, got {len(cases):,}")
        return None
    read = [_read_case(name, case, (*where, "when", index), document) for index, case in enumerate(cases)]
    complete = tuple(case for case in read if case is not None)
    return Axis(name, domain, complete) if domain is not None and len(complete) == len(cases) else None


def _read_case(name: str, raw: Any, where: Where, document: Document) -> Case | None:
    if isinstance(raw, dict):
        document.check_keys(where, raw, ("if", *DOMAIN_KEYS))
    if not isinstance(raw, dict) or not isinstance(raw.get("if"), dict) or not raw["if"]:
        document.add(where, f"expected a case such as {{if: {{backbone: ...}}, value: ...}}, got {shown(raw)}")
        return None
    document.check_keys((*where, "if"), raw["if"], AXES)
    domain = _read_domain(name, {key: value for key, value in raw.items() if key != "if"}, where, document)
    when: dict[str, tuple[Value, ...]] = {}
    for other, allowed in raw["if"].items():
        if other in AXES:
            listed = allowed if isinstance(allowed, list) else [allowed]
            values = [_checked(other, value, (*where, "if", other), document) for value in listed]
            when[other] = tuple(value for value in values if value is not None)
            if not listed:
                document.add((*where, "if", other), "expected at least one value, got an empty list")
    return None if domain is None else Case(when, domain)


def _read_domain(name: str, raw: Any, where: Where, document: Document) -> Domain | None:
    if isinstance(raw, list):
        return _read_choice(name, raw, where, document)
    if not isinstance(raw, dict):
        value = _checked(name, raw, where, document)
        return None if value is None else Constant(value)
    given = {key for key in raw if key in DOMAIN_KEYS}
    if given == {"value"}:
        value = _checked(name, raw["value"], (*where, "value"), document)
        return None if value is None else Constant(value)
    if given == {"choices"}:
        if isinstance(raw["choices"], list):
            return _read_choice(name, raw["choices"], (*where, "choices"), document)
        document.add((*where, "choices"), f"expected a list, got {shown(raw['choices'])}")
    elif {"low", "high"} <= given <= set(RANGE_KEYS):
        return _read_range(name, raw, where, document)
    else:
        got = f"got {', '.join(sorted(given))}" if given else "got none of them"
        document.add(where, f"expected `value`, or `choices`, or `low` and `high` (with `log` or `step`), {got}")
    return None


def _read_choice(name: str, raw: Sequence[Any], where: Where, document: Document) -> Choice | None:
    if not raw:
        hint = "; no hidden layer is [[]]" if name == "hidden_units" else ""
        document.add(where, f"expected at least one choice, got an empty list{hint}")
        return None
    if len(raw) > MAX_CHOICES:
        document.add(where, f"expected at most {MAX_CHOICES:,} choices, got {len(raw):,}")
        return None
    values = [_checked(name, value, (*where, index), document) for index, value in enumerate(raw)]
    known = [value for value in values if value is not None]
    for index, value in enumerate(values):
        if value is not None and value in values[:index]:
            document.add((*where, index), f"{shown(raw[index])} is listed twice")
    return Choice(tuple(known)) if len(known) == len(values) else None


def _read_range(name: str, raw: Mapping[str, Any], where: Where, document: Document) -> Range | None:
    if KINDS[name] not in NUMERIC:
        document.add(where, "a range needs numbers; list the values instead")
        return None
    low, high = (_checked(name, raw[end], (*where, end), document) for end in ("low", "high"))
    log, step = raw.get("log", False), raw.get("step")
    if not isinstance(log, bool):
        document.add((*where, "log"), f"expected true or false, got {shown(log)}")
        return None
    try:
        step = None if step is None else _typed(KINDS[name], step)
    except ValueError as error:
        document.add((*where, "step"), str(error))
        return None
    if not isinstance(low, int | float) or not isinstance(high, int | float) or isinstance(step, str | tuple):
        return None
    if problem := _range_problem(low, high, log, step):
        document.add(where, problem)
        return None
    return Range(low, high, log, step)


def _range_problem(low: float, high: float, log: bool, step: float | None) -> str:
    if not all(map(isfinite, (low, high, step or 0))):
        return f"expected finite numbers, got {low=}, {high=}" + (f", {step=}" if step is not None else "")
    if low > high:
        return f"expected low <= high, got {low=}, {high=}"
    if log and low <= 0:
        return f"expected low > 0 with log: true, got {low=}"
    if log and step is not None:
        return f"expected either log or step, got log=True, {step=}"
    if step is not None and not step > 0:
        return f"expected step > 0, got {step=}"
    if step is not None and (high - low) / step > MAX_STEPS:
        return f"expected at most {MAX_STEPS:,} steps between low and high, got {low=}, {high=}, {step=}"
    return ""


def _with_live_conditions(axes: Mapping[str, Axis], document: Document) -> dict[str, Axis]:
    """Note conditions on values that never occur; where `--set` is why they do not, leave them out instead."""
    live = {}
    for axis in axes.values():
        cases = []
        for index, case in enumerate(axis.cases):
            where = ("space", axis.name, "when", index, "if")
            when = {
                other: _live_values(axes[other], allowed, (*where, other), document) if other in axes else allowed
                for other, allowed in case.when.items()
            }
            if all(when.values()):
                cases.append(Case(when, case.domain))
        live[axis.name] = Axis(axis.name, axis.domain, tuple(cases))
    return live


def _live_values(axis: Axis, allowed: Sequence[Value], where: Where, document: Document) -> tuple[Value, ...]:
    if not all(domain.finite for domain in axis.domains):
        document.add(where, f"{axis.name} is a range, which a condition cannot name; list its values")
        return ()
    live = tuple(value for value in allowed if any(value in domain for domain in axis.domains))
    if not document.overridden(("space", axis.name)):
        takes = ", ".join(dict.fromkeys(map(str, reversed(axis.domains))))
        for value in allowed:
            if value not in live:
                document.add(where, f"{axis.name} never is {shown(value)} here; it can be: {takes}")
    return live


def _with_scratch_weights(axes: dict[str, Axis]) -> dict[str, Axis]:
    """Backbones for which no pretrained weights exist start from scratch, whatever the others do."""
    if "backbone" not in axes or "weights" not in axes:
        return axes
    backbone, weights = axes["backbone"], axes["weights"]
    scratch = tuple(
        name
        for name, row in BACKBONES.items()
        if not row.pretrained and any(name in domain for domain in backbone.domains)
    )
    case = Case({"backbone": scratch}, Constant("none"))
    if not scratch or weights == Axis("weights", Constant("none")) or weights.cases[:1] == (case,):
        return axes
    return {**axes, "weights": Axis("weights", weights.domain, (case, *weights.cases))}


def _in_order(axes: Mapping[str, Axis], document: Document) -> dict[str, Axis]:
    """The axes as `TrialConfig` lists them, except that each comes after those it looks at."""
    while any(not axes.keys() >= set(axis.looks_at) for axis in axes.values()):
        axes = {name: axis for name, axis in axes.items() if axes.keys() >= set(axis.looks_at)}
    looks_at = {name: axis.looks_at for name, axis in axes.items()}
    try:
        TopologicalSorter(looks_at).prepare()
    except CycleError as error:
        circle = list(reversed(error.args[1]))
        document.add(("space", circle[0]), f"expected `when` without a circle, got {' -> '.join(circle)}")
        return {name: axis for name, axis in axes.items() if not axis.cases}
    ordered: dict[str, Axis] = {}

    def place(name: str) -> None:
        if name not in ordered:
            for other in looks_at[name]:
                place(other)
            ordered[name] = axes[name]

    for name in axes:
        place(name)
    return ordered
