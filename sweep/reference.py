"""Published figures that a sweep's own are shown beside: the `reference` section of the YAML file."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from cxr_models.backbones import BACKBONES
from cxr_models.freezing import parse_strategy
from cxr_models.metrics import matrix_report
from cxr_models.trial import SPLITS, TEST
from sweep.document import shown, unknown
from sweep.section import Section

COMPARED = ("accuracy", "macro_f1", "loss")
CLASS_COLUMNS = ("precision", "recall", "f1-score")
ROUNDING = 0.0051  # a figure given to two decimals may lie this far from the exact one

Figures = Mapping[str, float]
# YAML has lists; everything else is read strictly.
Numbers = Annotated[tuple[float, ...], Field(strict=False)]
Counts = Annotated[tuple[int, ...], Field(strict=False)]


class ReferenceResult(Section):
    """What was published of one model; whatever the source does not say is left out.

    Attributes:
        backbone, freeze: as in the search space, to be matched with a strategy; "" for a model that a sweep has not.
        label: what the source calls the model.
        accuracy, loss, macro_f1: `train`, `val` or `test` -> value.
        seconds: of training.
        best_epoch_by_loss, best_epoch_by_accuracy: on validation images.
        per_class: class -> precision, recall and f1 on the test images.
        confusion_matrix: true class by row in the order of the reference's classes; the figures of `matrix_part` are
            then computed from it.
        matrix_part: the images of the confusion matrix.
    """

    backbone: str = ""
    freeze: str = ""
    label: str = ""
    accuracy: Figures = Field(default_factory=dict)
    loss: Figures = Field(default_factory=dict)
    macro_f1: Figures = Field(default_factory=dict)
    trainable_parameters: int | None = Field(default=None, ge=0)
    seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    best_epoch_by_loss: int | None = Field(default=None, ge=1)
    best_epoch_by_accuracy: int | None = Field(default=None, ge=1)
    per_class: Mapping[str, Numbers] = Field(default_factory=dict)
    confusion_matrix: Annotated[tuple[Counts, ...], Field(strict=False)] = ()
    matrix_part: Literal["train", "val", "test"] = "test"

    @field_validator("backbone")
    @classmethod
    def _is_backbone(cls, backbone: str) -> str:
        if backbone and backbone not in BACKBONES:
            raise ValueError(f"{unknown(backbone, BACKBONES)}; leave it out for a model that a sweep has not")
        return backbone

    @field_validator("freeze")
    @classmethod
    def _is_strategy(cls, freeze: str) -> str:
        if freeze:
            parse_strategy(freeze)
        return freeze

    @field_validator("accuracy", "macro_f1")
    @classmethod
    def _are_shares(cls, figures: Figures) -> Figures:
        _check_parts(figures)
        for part, value in figures.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"expected a share from 0 to 1 for {part}, got {value:g}; 90.8 % is written 0.908")
        return figures

    @field_validator("loss")
    @classmethod
    def _are_losses(cls, figures: Figures) -> Figures:
        _check_parts(figures)
        for part, value in figures.items():
            if not 0.0 <= value < math.inf:
                raise ValueError(f"expected a loss of at least 0 for {part}, got {value:g}")
        return figures

    @field_validator("per_class")
    @classmethod
    def _are_class_shares(cls, rows: Mapping[str, Sequence[float]]) -> Mapping[str, Sequence[float]]:
        for name, row in rows.items():
            if len(row) != 3 or not all(0.0 <= value <= 1.0 for value in row):
                raise ValueError(f"expected precision, recall and f1 from 0 to 1 for {name}, got {shown(list(row))}")
        return rows


class ReferenceSpec(Section):
    """Published results on the same classes.

    Attributes:
        source: where the figures come from.
        classes: names as the source has them; they match the data's whatever the case, spaces, `-` and `_`.
        images: `train`, `val` or `test` -> how many the source used.
        note: what to know when comparing.
    """

    source: str = Field(min_length=1)
    classes: Annotated[tuple[str, ...], Field(strict=False, min_length=2)]
    images: Mapping[str, int] = Field(default_factory=dict)
    note: str = ""
    results: Annotated[tuple[ReferenceResult, ...], Field(strict=False)] = ()

    @field_validator("classes")
    @classmethod
    def _are_different(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(map(plain_name, classes))) < len(classes):
            raise ValueError(
                f"expected class names that differ in more than case, spaces, '-' and '_', got {list(classes)}"
            )
        return classes

    @field_validator("images")
    @classmethod
    def _are_counts(cls, images: Mapping[str, int]) -> Mapping[str, int]:
        _check_parts(images)
        return images

    def to_yaml(self) -> dict[str, Any]:
        """Plain values, without what the file did not say."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def problems(self) -> Iterator[tuple[int, str]]:
        """(index of a result, what does not fit the classes)."""
        for index, result in enumerate(self.results):
            for name in result.per_class:
                if name not in self.classes:
                    yield index, f"per_class: {unknown(name, self.classes)}"
            widths = {len(result.confusion_matrix), *map(len, result.confusion_matrix)}
            if result.confusion_matrix and widths != {len(self.classes)}:
                size = len(self.classes)
                yield index, f"confusion_matrix: expected {size} rows of {size}, one a class, got {sorted(widths)}"
            elif any(count < 0 for row in result.confusion_matrix for count in row):
                yield index, "confusion_matrix: expected counts of at least 0"
            elif result.confusion_matrix and not sum(map(sum, result.confusion_matrix)):
                yield index, "confusion_matrix: expected images, but every count is 0"

    def matches(self, classes: Sequence[str]) -> bool:
        """Whether the reference is about these classes."""
        return set(map(plain_name, classes)) == set(map(plain_name, self.classes))


def _check_parts(figures: Mapping[str, Any]) -> None:
    for part in figures:
        if part not in SPLITS:
            raise ValueError(unknown(part, SPLITS))


def plain_name(name: str) -> str:
    """A class name without case, spaces, `-` and `_`."""
    return name.casefold().replace(" ", "").replace("-", "").replace("_", "")


@dataclass(frozen=True)
class Published:
    """The figures of one published result, those of a confusion matrix computed from it.

    Attributes:
        figures: metric of `COMPARED` -> part -> value.
        per_class: plain class name -> precision, recall and f1.
        contradictions: where the text of the source differs from its own confusion matrix.
    """

    result: ReferenceResult
    figures: Mapping[str, Figures]
    per_class: Mapping[str, tuple[float, ...]]
    contradictions: tuple[str, ...]

    @property
    def class_part(self) -> str:
        """The images that `per_class` is about."""
        return self.result.matrix_part if self.result.confusion_matrix else TEST


def published(reference: ReferenceSpec, result: ReferenceResult) -> Published:
    """What a result says, by its confusion matrix where it has one."""
    figures = {metric: dict(getattr(result, metric)) for metric in COMPARED}
    per_class: dict[str, tuple[float, ...]] = {plain_name(name): row for name, row in result.per_class.items()}
    contradictions = []
    if result.confusion_matrix:
        part = result.matrix_part
        report = matrix_report(np.array(result.confusion_matrix, float), reference.classes)
        for metric, value in (("accuracy", report["accuracy"]), ("macro_f1", report["macro avg"]["f1-score"])):
            stated = figures[metric].get(part)
            if stated is not None and abs(stated - value) > ROUNDING:
                contradictions.append(
                    f"the source gives a {part} {metric} of {stated:g}, but its confusion matrix gives {value:.4f}"
                )
            figures[metric][part] = value
        per_class = {
            plain_name(name): tuple(report[name][column] for column in CLASS_COLUMNS) for name in reference.classes
        }
    return Published(result, figures, per_class, tuple(contradictions))


@dataclass(frozen=True)
class Line:
    """One part of the data in the comparison.

    Attributes:
        theirs, ours: metric of `COMPARED` -> value; what is not known is absent.
    """

    part: str
    theirs: Figures
    ours: Figures

    @property
    def accuracy_difference(self) -> float | None:
        """Ours minus theirs, in percentage points."""
        if "accuracy" not in self.theirs or "accuracy" not in self.ours:
            return None
        return 100.0 * (self.ours["accuracy"] - self.theirs["accuracy"])


@dataclass(frozen=True)
class Comparison:
    """One published result beside the strategy of the same backbone and freeze.

    Attributes:
        ours: the row of `summary.json`'s `strategies`; None where the sweep has no such strategy.
        lines: the parts that either has a figure of.
    """

    published: Published
    ours: Mapping[str, Any] | None
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        """What the source calls the model, or its backbone."""
        result = self.published.result
        return result.label or " ".join(filter(None, [result.backbone, result.freeze])) or "without a name"

    @property
    def head(self) -> str:
        """Our trial's head, which may be another than the source's."""
        config = (self.ours or {}).get("config", {})
        return f"{config.get('pooling', '')} {config.get('hidden_units', '')}".strip()

    def class_rows(self) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
        """(class as the data has it, theirs, ours): precision, recall and f1, of classes that both have."""
        report = (self.ours or {}).get(self.published.class_part, {}).get("report", {})
        return [
            (name, self.published.per_class[plain_name(name)], tuple(row[column] for column in CLASS_COLUMNS))
            for name, row in report.items()
            if plain_name(name) in self.published.per_class
        ]


def compare(reference: ReferenceSpec, summary: Mapping[str, Any]) -> tuple[Comparison, ...]:
    """Every published result beside ours; none if the reference is about other classes."""
    if not reference.matches(summary["data"]["classes"]):
        return ()
    rows = {(row["backbone"], row["freeze"]): row for row in summary["strategies"]}
    return tuple(
        _compared(published(reference, result), rows.get((result.backbone, result.freeze)))
        for result in reference.results
    )


def _compared(theirs: Published, ours: Mapping[str, Any] | None) -> Comparison:
    lines = []
    for part in SPLITS:
        stated = {metric: values[part] for metric, values in theirs.figures.items() if part in values}
        own = (ours or {}).get(part, {})
        found = {metric: own[metric] for metric in COMPARED if own.get(metric) is not None}
        if stated or found:
            lines.append(Line(part, stated, found))
    return Comparison(theirs, ours, tuple(lines))
