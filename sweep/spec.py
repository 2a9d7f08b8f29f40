"""A sweep as one YAML file says it: read with every problem at once, written back as resolved."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator

from cxr_models.backbones import BACKBONES
from cxr_models.freezing import parse_strategy, strategy_problem
from cxr_models.trial import AXES, CLASSIFY, PHASE_RATE, PHASED, TASK_METRICS, Objective
from sweep.addresses import password_problem
from sweep.axes import condition_schema, list_notes, point_schema, read_point, read_space, space_schema
from sweep.dataspec import DataSpec, data_schema, read_data_section
from sweep.document import MAX_BYTES, Document, SpecError, Where, parse_value, read_document, shown, unknown, write_yaml
from sweep.reference import ReferenceResult, ReferenceSpec
from sweep.remote import without_credentials
from sweep.section import Section as _Section
from sweep.section import validated as _validated
from sweep.space import Range, Space, Value
from sweep.tasks import DEFAULTS_OF, TASKS, check_objective, check_space, read_task

__all__ = [
    "DataSpec",
    "HalvingSpec",
    "ResourceSpec",
    "SearchSpec",
    "SpecError",
    "SweepSpec",
    "TrackingSpec",
    "checked_name",
    "json_schema",
    "read_spec",
]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
NAME_EXPECTED = "letters, digits, '-', '_' and '.', beginning with a letter or digit, 100 at most"
SHORT_FORMS = {"data": "source", "objective": "metric"}
ONE_OF = {("data", "source"): "sources", ("data", "sources"): "source"}  # setting one takes the other's place
# Text as it stands, which YAML might read as something else; for the axes a list or a section in brackets is one.
TEXT_KEYS = ("data.patient", "data.source", "tracking.uri")
TEXT_AXES = ("space.weights", "space.lung_mask")


class HalvingSpec(_Section):
    """Asynchronous successive halving within each backbone and freeze strategy, see `halving.py`.

    Attributes:
        grace_epochs: that every trial has before it is judged, of its fine-tuning where the head alone trains first.
        reduction_factor: one in this many goes on.
        least_survivors: trials of each backbone and freeze strategy that go on at least.
    """

    grace_epochs: int = Field(ge=1)
    reduction_factor: int = Field(default=3, ge=2)
    least_survivors: int = Field(default=1, ge=1)


class SearchSpec(_Section):
    """How the space is searched.

    Attributes:
        trials: how many at most; a grid may have fewer points.
        seed: of the suggestions.
        halving: None to run every trial to its end.
        fixed: points to run first, in this order; axes a point does not name are suggested.
    """

    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    trials: int = Field(ge=1, le=100_000)
    seed: int = Field(default=0, ge=0, lt=2**32)
    halving: HalvingSpec | None = None
    fixed: Annotated[tuple[Mapping[str, Value], ...], Field(strict=False)] = ()


class ResourceSpec(_Section):
    """What one trial gets, and how many run at once; None is chosen from the machine.

    Attributes:
        max_failures: how often a trial whose worker or node was lost goes on with another, from its last epoch.
    """

    cpus_per_trial: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    gpus_per_trial: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    concurrency: int | None = Field(default=None, ge=1)
    max_failures: int = Field(default=2, ge=0, le=100)

    @field_validator("gpus_per_trial")
    @classmethod
    def _is_share_or_whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and not gpus.is_integer():
            raise ValueError(f"expected a share of one GPU or a whole number of them, got {gpus}")
        return gpus


class FinalSpec(_Section):
    """The final trainings, see `finals.py`.

    Attributes:
        seeds: how often the best configuration of each strategy is trained again, each time with a seed of its own.
    """

    seeds: int = Field(default=1, ge=1, le=100)


class TrackingSpec(_Section):
    """The MLflow server and experiment; None for the run folder and the sweep's name."""

    uri: str | None = None
    experiment: str | None = None


class ObjectiveSection(_Section):
    """The section behind `Objective`; without a mode, the metric's own way is taken."""

    metric: str = Field(
        json_schema_extra={"enum": list(dict.fromkeys(name for names in TASK_METRICS.values() for name in names))}
    )
    mode: Literal["min", "max"] | None = None


@dataclass(frozen=True)
class SweepSpec:
    """A whole sweep, checked.

    Attributes:
        task: what is trained, `classify` or `segment`.
        dropped_points: how many fixed points of the file lie outside the space that `--set` left.
        dropped_strategies: freeze strategies of the file with more phases than the epochs that `--set` left.
        notes: how values were taken that can be read in two ways.
    """

    name: str
    data: DataSpec
    objective: Objective
    search: SearchSpec
    space: Space
    resources: ResourceSpec
    tracking: TrackingSpec
    task: str = CLASSIFY
    reference: ReferenceSpec | None = None
    final: FinalSpec = field(default_factory=FinalSpec)
    dropped_points: int = field(default=0, compare=False)
    dropped_strategies: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def to_yaml(self) -> str:
        """The resolved file, with every default written out; `read_spec` reads it back equal."""
        search = self.search.model_dump()
        fixed = [
            {axis: list(value) if isinstance(value, tuple) else value for axis, value in point.items()}
            for point in self.search.fixed
        ]
        return write_yaml(
            {
                "name": self.name,
                "task": self.task,
                "data": self.data.to_yaml(),
                "objective": {"metric": self.objective.metric, "mode": self.objective.mode},
                "search": {**search, "halving": search["halving"] or "none", "fixed": fixed},
                "space": {axis.name: axis.to_yaml() for axis in self.space.axes.values()},
                "resources": self.resources.model_dump(exclude_none=True),
                "tracking": self.tracking.model_dump(exclude_none=True),
                "final": self.final.model_dump(),
                **({"reference": self.reference.to_yaml()} if self.reference else {}),
            }
        )


KEYS = ("name", "task", "data", "objective", "search", "space", "final", "resources", "tracking", "reference")


def read_spec(path: Path, overrides: Sequence[str] = (), *, most_bytes: int | None = MAX_BYTES) -> SweepSpec:
    """Read a sweep.

    Args:
        path: the YAML file.
        overrides: `KEY=VALUE`; the key is a path into the file such as `search.trials`, or the bare name of an axis.
            Conditions and fixed points of the file that an overridden axis no longer meets are left out.
        most_bytes: that the file may have; None for the `spec.yaml` of a sweep, which is longer than what it says, and
            where earlier versions kept passwords.

    Raises:
        SpecError: with all problems of the file and the overrides.
    """
    document = read_document(path, most_bytes)
    _expand_short_forms(document)
    for override in overrides:
        _override(document, override)
        _expand_short_forms(document)
    document.check_keys((), document.values, KEYS)
    if most_bytes is not None:
        _refuse_password(document)
    dropped = _drop_long_strategies(document)
    spec = _resolve(document)
    document.check()
    if spec is None:  # `_resolve` notes a problem whenever it has no answer, and then `check` has raised
        raise SpecError(document.source, ["could not be read"])
    return replace(spec, dropped_strategies=dropped, notes=list_notes(document))


def _refuse_password(document: Document) -> None:
    section = document.values.get("tracking")
    uri = section.get("uri") if isinstance(section, dict) else None
    if isinstance(uri, str) and (problem := password_problem(uri)):
        document.add(("tracking", "uri"), problem)


def _drop_long_strategies(document: Document) -> tuple[str, ...]:
    """Where an override leaves fewer epochs than a strategy has phases, leave that one out of the file's choices."""
    space = document.values.get("space")
    epochs = space.get("epochs") if isinstance(space, dict) else None
    if not (isinstance(epochs, int) and document.overridden(("space", "epochs"))):
        return ()
    dropped: dict[str, None] = {}

    def kept(raw: Any) -> Any:
        if isinstance(raw, dict):
            return {key: kept(value) if key in ("choices", "when") else value for key, value in raw.items()}
        if not isinstance(raw, list):
            return raw
        short = [kept(value) for value in raw if not isinstance(value, str) or value.count(">") < epochs]
        if short:  # with none left, the check of the whole space says what is wrong
            dropped.update(dict.fromkeys(value for value in raw if isinstance(value, str) and value not in short))
        return short or raw

    freeze = space.get("freeze") if isinstance(space, dict) else None
    left = kept(freeze)
    if dropped:
        document.set(("space", "freeze"), left, f"--set space.epochs={epochs}")
    return tuple(dropped)


def json_schema() -> dict[str, Any]:
    """JSON Schema of the file, for editors: keys, types and names. `read_spec` checks more than a schema can."""
    halving = {"anyOf": [HalvingSpec.model_json_schema(), {"enum": ["none", None]}]}
    search = SearchSpec.model_json_schema()
    del search["$defs"]
    search["properties"] |= {"halving": halving, "fixed": {"type": "array", "items": point_schema()}}
    text = {"type": "string"}
    reference = ReferenceSpec.model_json_schema()
    del reference["$defs"]
    reference["properties"]["results"] = {"type": "array", "minItems": 1, "items": ReferenceResult.model_json_schema()}
    reference["required"].append("results")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Search space",
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "data", "objective", "search", "space"],
        "properties": {
            "name": {"type": "string", "pattern": NAME_PATTERN},
            "task": {"enum": list(TASKS)},
            "data": {"anyOf": [text, data_schema()]},
            "objective": {"anyOf": [text, ObjectiveSection.model_json_schema()]},
            "search": search,
            "space": space_schema(),
            "resources": ResourceSpec.model_json_schema(),
            "tracking": TrackingSpec.model_json_schema(),
            "final": FinalSpec.model_json_schema(),
            "reference": reference,
        },
        "$defs": {"condition": condition_schema()},
    }


def checked_name(name: str) -> str:
    """The name given on the command line in place of the file's.

    Raises:
        SpecError: it cannot name a folder and a model.
    """
    if not _is_name(name):
        raise SpecError("--name", [f"expected {NAME_EXPECTED}, got {shown(name)}"])
    return name


def _is_name(name: str) -> bool:
    return bool(re.match(NAME_PATTERN, name)) and not name.endswith("\n")  # `$` lets one pass


def _expand_short_forms(document: Document) -> None:
    for section, key in SHORT_FORMS.items():
        if section in document.values and not isinstance(document.values[section], dict | None):
            document.move((section,), key)


def _override(document: Document, override: str) -> None:
    origin = f"--set {without_credentials(override)}"
    key, equals, text = override.partition("=")
    if not equals or not key:
        document.add((), "expected KEY=VALUE, such as search.trials=8 or freeze=all", origin)
        return
    where: Where = tuple(key.split("."))
    if where[0] in AXES:
        where = ("space", *where)
    if where[0] not in KEYS:
        document.add((), f"{unknown(key, (*KEYS, *AXES))}", origin)
        return
    section = document.values.get("data")
    if where in ONE_OF and isinstance(section, dict):
        section.pop(ONE_OF[where], None)
    path = ".".join(map(str, where))
    is_text = path in TEXT_KEYS or (path in TEXT_AXES and not text.startswith(("[", "{")))
    document.set(where, text if is_text else parse_value(text), origin)


def _resolve(document: Document) -> SweepSpec | None:
    name = _name(document)
    task = read_task(document)
    search = _search(document)
    seed = search.seed if search else 0
    data = read_data_section(document, seed)
    objective = _section(ObjectiveSection, document, "objective")
    resources = _section(ResourceSpec, document, "resources")
    tracking = _section(TrackingSpec, document, "tracking")
    final = _section(FinalSpec, document, "final")
    reference = _reference(document)
    space = read_space(document, {**DEFAULTS_OF[task], "seed": seed})
    fixed = _fixed(document, space)
    if search and search.algorithm == "grid":
        _check_grid(document, space)
    check_space(document, task, space)
    if objective:
        check_objective(document, objective.metric, task, space)
    _check_networks(document, space)
    if not (name and search and data and objective and resources and tracking and final):
        return None
    return SweepSpec(
        name,
        data,
        Objective(objective.metric, objective.mode or TASK_METRICS[task].get(objective.metric, ""), task),
        search.model_copy(update={"fixed": fixed}),
        space,
        resources,
        tracking,
        task,
        reference,
        final,
        dropped_points=_count_points(document) - len(fixed),
    )


def _name(document: Document) -> str | None:
    name = document.values.get("name")
    if isinstance(name, str) and _is_name(name):
        return name
    document.add(("name",), "missing" if name is None else f"expected {NAME_EXPECTED}, got {shown(name)}")
    return None


def _search(document: Document) -> SearchSpec | None:
    section = document.section("search")
    if section is None:
        return None
    halving: HalvingSpec | None = None
    if section.get("halving") not in (None, "none"):
        halving = _validated(HalvingSpec, document, ("search", "halving"), section["halving"])
    own = {key: value for key, value in section.items() if key not in ("halving", "fixed")}
    search = _validated(SearchSpec, document, ("search",), own)
    return search and search.model_copy(update={"halving": halving})


def _reference(document: Document) -> ReferenceSpec | None:
    if "reference" not in document.values:
        return None
    section = document.section("reference")
    if section is None:
        return None
    where = ("reference", "results")
    entries = section.get("results")
    if not (isinstance(entries, list) and entries):
        document.add(where, f"expected a list of results such as - {{accuracy: {{test: 0.91}}}}, got {shown(entries)}")
        entries = []
    read = [_validated(ReferenceResult, document, (*where, index), entry) for index, entry in enumerate(entries)]
    reference = _validated(ReferenceSpec, document, ("reference",), {**section, "results": ()})
    results = tuple(result for result in read if result is not None)
    if reference is None or len(results) < len(read):
        return None
    whole = reference.model_copy(update={"results": results})
    for index, problem in whole.problems():
        document.add((*where, index), problem)
    return whole


def _fixed(document: Document, space: Space) -> tuple[dict[str, Value], ...]:
    search = document.values.get("search")
    points = search.get("fixed", []) if isinstance(search, dict) else []
    where = ("search", "fixed")
    if not isinstance(points, list):
        document.add(where, f"expected a list of points such as - {{freeze: all}}, got {shown(points)}")
        return ()
    read = (read_point(point, space, (*where, index), document) for index, point in enumerate(points))
    return tuple(point for point in read if point is not None)


def _count_points(document: Document) -> int:
    search = document.values.get("search")
    points = search.get("fixed") if isinstance(search, dict) else None
    return len(points) if isinstance(points, list) else 0


def _check_grid(document: Document, space: Space) -> None:
    for axis in space.axes.values():
        if any(isinstance(domain, Range) and domain.step is None for domain in axis.domains):
            document.add(("space", axis.name), "a grid cannot list a range without `step`; give one, or the values")


def _check_networks(document: Document, space: Space) -> None:
    """What a backbone cannot do at all, whatever the data: too small an image, more frozen layers than it has."""
    axes = ("backbone", "freeze", "image_side", "epochs")
    if any(axis not in space.axes for axis in axes):
        return  # a problem of the axis itself is noted already
    try:
        # By twos: all four together may be millions.
        strategies, sides, lengths = (
            sorted(space.combinations("backbone", *axes), key=str)
            for axes in (("freeze",), ("image_side",), ("freeze", "epochs"))
        )
    except ValueError as error:
        document.add(("space",), f"backbone, freeze, image_side and epochs must be lists or have a step: {error}")
        return
    known = [(BACKBONES[str(name)], freeze) for name, freeze in strategies if name in BACKBONES]
    for backbone, freeze in known:  # of a U-Net `check_space` has told
        if problem := strategy_problem(parse_strategy(str(freeze)), backbone):
            document.add(("space", "freeze"), problem)
    for name, side in sides:
        smallest = BACKBONES[str(name)].smallest_side if name in BACKBONES else 0
        if isinstance(side, int) and side < smallest:
            document.add(("space", "image_side"), f"{name} needs at least {smallest} pixels, got {side}")
    for name, freeze, epochs in lengths:
        phases = len(parse_strategy(str(freeze)).phases)
        if isinstance(epochs, int) and epochs < phases and name in BACKBONES:
            document.add(("space", "epochs"), f"freeze {freeze!r} has {phases} phases, but {epochs} epochs")
    for axis in (*PHASED, PHASE_RATE):
        for freeze, given in _with_strategies(space, axis) if axis in space.axes else ():
            phases, named = len(parse_strategy(str(freeze)).phases), str(given).count(">") + 1
            wanted = phases if axis in PHASED else phases - 1
            if named not in (1, wanted):
                which = "phases" if axis in PHASED else "phases after the first"
                each = f", or one for each of the {wanted} {which}" if wanted > 1 else ""
                document.add(("space", axis), f"expected one value{each} of freeze {freeze!r}, got {given!r}")


def _with_strategies(space: Space, axis: str) -> list[tuple[Value, Value]]:
    """The freeze strategies, each with the values that the axis can have beside it; ranges have none to list."""
    points = [{"backbone": backbone, "freeze": freeze} for backbone, freeze in space.combinations("backbone", "freeze")]
    beside = {
        (point["freeze"], value)
        for point in points
        for domain in space.possible_domains(axis, point)
        if not isinstance(domain, Range)
        for value in domain
    }
    return sorted(beside, key=str)


_S = TypeVar("_S", bound=_Section)


def _section(model: type[_S], document: Document, name: str, defaults: Mapping[str, Any] | None = None) -> _S | None:
    section = document.section(name, required=any(field.is_required() for field in model.model_fields.values()))
    return None if section is None else _validated(model, document, (name,), {**(defaults or {}), **section})
