"""The `data` section: where the images are, what their classes are called, and which part is used for what."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cxr_models.patients import EACH_ITS_OWN, PATIENT_PATTERNS, expression_problem
from cxr_models.splits import DEFAULT_SHARES, SHARES_TOLERANCE
from cxr_models.trial import SPLITS
from sweep.document import Document, Where, shown
from sweep.remote import is_url, url_problem
from sweep.section import Section, validated

MOST_FOLDS, MOST_REPEATS = 20, 20

ClassName = Annotated[str, Field(min_length=1)]
# Those of `audit.LEAKS`.
Leak = Literal["patient_on_two_sides", "duplicate_on_two_sides", "one_image_two_labels", "earlier_model_saw_test"]


def _checked_pattern(patient: str | None) -> str | None:
    known = (*PATIENT_PATTERNS, EACH_ITS_OWN)
    # A word alone is hardly meant as an expression: every name that has it would be one patient.
    near = difflib.get_close_matches(patient, known, n=1) if patient and patient.isalpha() else []
    if near and patient not in known:
        raise ValueError(f"unknown {patient!r}; did you mean {near[0]!r}? known: {', '.join(known)}, or a pattern")
    if patient and (problem := expression_problem(patient)):
        raise ValueError(f"expected a regular expression or a built-in name ({problem}), got {shown(patient)}")
    return patient


def _checked_place(source: str) -> str:
    if is_url(source) and (problem := url_problem(source)):
        raise ValueError(problem)
    return source


Place = Annotated[str, AfterValidator(_checked_place)]
"""A folder or a file, by its path or a URL."""


class SourceSpec(Section):
    """One of several data sets.

    Attributes:
        source: a folder or a CSV file, by its path or a URL such as `s3://bucket/xrays`, or `phantom`.
        classes: name found -> name in the sweep, null to leave the class out; others keep their names.
        patient: as in `DataSpec`, whose own is taken if this is not given.
    """

    source: Place = Field(min_length=1)
    classes: Mapping[str, ClassName | None] = {}
    patient: Annotated[str | None, AfterValidator(_checked_pattern)] = None


class SplitSpec(Section):
    """Shares of the parts that are cut; a given part of the data is kept. With folds, train and val are one.

    Attributes:
        test: 0 for no test part, unless one is given.
    """

    train: float = Field(gt=0, lt=1)
    val: float = Field(gt=0, lt=1)
    test: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _sum_is_one(self) -> Self:
        total = sum(self.shares)
        if abs(total - 1) > SHARES_TOLERANCE:
            shares = " + ".join(f"{share:g}" for share in self.shares)
            raise ValueError(f"expected shares with sum 1, such as {{train: 0.7, val: 0.3}}, got {shares} = {total:g}")
        return self

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of train, val and test."""
        return self.train, self.val, self.test


DEFAULT_SPLIT = SplitSpec(**dict(zip(SPLITS, DEFAULT_SHARES, strict=True)))


class DataSpec(Section):
    """Where the images are, and which part of them is used for what.

    Attributes:
        source: a folder or a CSV file, by its path or a URL such as `s3://bucket/xrays`, or `phantom`.
        sources: several of these, in place of `source`.
        classes: name found -> name in the sweep, null to leave the class out; others keep their names.
        split: shares of train, val and test.
        subset: the share of the images to use, chosen by patients.
        patient: how a file name tells the patient: a built-in name or a regular expression.
        folds: how many the images outside the test set are dealt into; every trial is trained once for each, and
            validated on it. None for one validation part.
        repeats: how often they are dealt anew; a trial is trained that many times `folds`.
        seed: of subset, split and folds; the search's if the file gives none.
        allow: findings of the audit that need not stop the sweep.
    """

    source: Place = Field(default="", min_length=1)
    sources: Annotated[tuple[SourceSpec, ...], Field(strict=False, min_length=1)] = ()
    classes: Mapping[str, ClassName | None] = {}
    split: SplitSpec = DEFAULT_SPLIT
    subset: float = Field(default=1.0, gt=0, le=1)
    patient: Annotated[str | None, AfterValidator(_checked_pattern)] = None
    folds: int | None = Field(default=None, ge=2, le=MOST_FOLDS)
    repeats: int = Field(default=1, ge=1, le=MOST_REPEATS)
    seed: int = Field(default=0, ge=0)
    allow: Annotated[tuple[Leak, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _repeats_need_folds(self) -> Self:
        if self.repeats > 1 and self.folds is None:
            raise ValueError(f"repeats {self.repeats} needs folds, such as folds: 5; without them nothing is repeated")
        return self

    @property
    def name(self) -> str:
        """What the data are called: the source, or all of them."""
        return self.source or " + ".join(source.source for source in self.sources)

    @property
    def all_sources(self) -> tuple[SourceSpec, ...]:
        """One or several, each with the patient pattern that holds for it."""
        if self.source:
            return (SourceSpec(source=self.source, patient=self.patient),)
        return tuple(
            source if source.patient else source.model_copy(update={"patient": self.patient}) for source in self.sources
        )

    def to_yaml(self) -> dict[str, Any]:
        """The section with every default written out; a null in a class map is kept."""
        return (
            {key: value for key, value in self.model_dump().items() if value not in (None, "", (), {})}
            | ({"sources": [_given(source) for source in self.sources]} if self.sources else {})
            | ({"allow": list(self.allow)} if self.allow else {})
        )


def _given(source: SourceSpec) -> dict[str, Any]:
    return {key: value for key, value in source.model_dump().items() if value not in (None, {})}


def read_data_section(document: Document, seed: int) -> DataSpec | None:
    """The `data` section with every problem noted in the document; None if it cannot be used.

    Args:
        document: the file.
        seed: of the search, for a section that gives none.
    """
    section = document.section("data")
    if section is None:
        return None
    where: Where = ("data",)
    if "source" not in section and "sources" not in section:
        document.add((*where, "source"), "missing")
    if "source" in section and "sources" in section:
        document.add((*where, "sources"), "give either source or sources, not both")
    split, sources = section.pop("split", None), section.pop("sources", [])
    data = validated(DataSpec, document, where, {"seed": seed, **section})
    if not isinstance(sources, list) or ("sources" in document.values["data"] and not sources):
        document.add((*where, "sources"), f"expected a list such as - {{source: DIR}}, got {shown(sources)}")
        return None
    several = [_source(document, index, item) for index, item in enumerate(sources)]
    cut = DEFAULT_SPLIT if split is None else validated(SplitSpec, document, (*where, "split"), split)
    if data is None or cut is None:
        return None
    return data.model_copy(update={"split": cut, "sources": tuple(source for source in several if source)})


def _source(document: Document, index: int, item: Any) -> SourceSpec | None:
    values = {"source": item} if isinstance(item, str) else item
    return validated(SourceSpec, document, ("data", "sources", index), values)


def data_schema() -> dict[str, Any]:
    """JSON Schema of the section."""
    schema = DataSpec.model_json_schema()
    del schema["$defs"]
    source = {"anyOf": [{"type": "string"}, SourceSpec.model_json_schema()]}
    sources = {"type": "array", "minItems": 1, "items": source}
    schema["properties"] |= {"sources": sources, "split": SplitSpec.model_json_schema()}
    return schema
