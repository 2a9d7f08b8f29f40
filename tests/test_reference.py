"""Published figures are checked when they are read, computed from their confusion matrix, and put beside ours."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sweep.reference import ReferenceSpec, compare, published
from sweep.spec import SpecError, json_schema, read_spec

TEXT = """\
name: small
data: phantom
objective: macro_f1
search: {trials: 4}
space: {backbone: vanilla_cnn}
reference:
  source: "A report: figures 1 and 2"
  classes: [COVID, Lung_Opacity, Normal, Viral Pneumonia]
  images: {test: 3175}
  note: another split
  results:
    - backbone: mobilenet_v2_1.0
      freeze: all
      label: head only
      accuracy: {train: 0.96, val: 0.909, test: 0.908}
      loss: {train: 0.101, test: 0.27}
      macro_f1: {test: 0.92}
      trainable_parameters: 64753156
      seconds: 1502
      best_epoch_by_loss: 5
      best_epoch_by_accuracy: 19
      per_class: {COVID: [0.95, 0.92, 0.94]}
    - label: other
      accuracy: {test: 0.8621}
      confusion_matrix: [[300, 17, 42, 3], [9, 481, 112, 0], [11, 53, 952, 3], [1, 0, 7, 126]]
"""
CLASSES = ["covid", "lung opacity", "NORMAL", "Viral-Pneumonia"]


def read(folder: Path, text: str = TEXT) -> Any:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return read_spec(path)


@pytest.fixture
def reference(tmp_path: Path) -> ReferenceSpec:
    return read(tmp_path).reference


def part(value: float) -> dict[str, Any]:
    row = {"precision": value, "recall": value, "f1-score": value, "support": 5.0}
    report = {**dict.fromkeys(CLASSES, row), "accuracy": value, "macro avg": row, "weighted avg": row}
    return {"accuracy": value, "macro_f1": value, "loss": None, "report": report}


def summary(classes: list[str]) -> dict[str, Any]:
    ours = {"backbone": "mobilenet_v2_1.0", "freeze": "all", "train": part(0.9), "val": part(0.8), "test": part(0.7)}
    return {"data": {"classes": classes}, "strategies": [ours]}


def test_a_file_with_a_reference_is_written_back_equal_and_fits_the_schema(tmp_path, reference):
    spec = read(tmp_path)
    assert reference.results[0].per_class == {"COVID": (0.95, 0.92, 0.94)}
    assert read(tmp_path, spec.to_yaml()) == spec
    schema = jsonschema.Draft202012Validator(json_schema())
    schema.check_schema(schema.schema)
    good = {"name": "s", "data": "phantom", "objective": "loss", "search": {"trials": 1}, "space": {"backbone": "x"}}
    good["space"] = {"backbone": "vanilla_cnn"}
    assert schema.is_valid({**good, "reference": reference.to_yaml()})
    assert not schema.is_valid({**good, "reference": {**reference.to_yaml(), "sorce": "x"}})
    assert ReferenceSpec.model_validate(reference.to_yaml()) == reference  # as summary.json gives it back


def test_a_file_without_one_has_none(tmp_path):
    spec = read(tmp_path, TEXT[: TEXT.index("reference:")])
    assert spec.reference is None
    assert "reference" not in spec.to_yaml()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "test: 0.908",
            "test: 90.8",
            "accuracy: expected a share from 0 to 1 for test, got 90.8; 90.8 % is written 0.908",
        ),
        ("loss: {train", "loss: {trian", "loss: unknown 'trian'; did you mean 'train'? known: train, val, test"),
        ("loss: {train: 0.101", "loss: {train: -1", "loss: expected a loss of at least 0 for train, got -1"),
        ("label: head", "lable: head", "lable: unknown key; did you mean 'label'?"),
        (
            "mobilenet_v2_1.0",
            "mobilnet_v2_1.0",
            "backbone: unknown 'mobilnet_v2_1.0'; did you mean 'mobilenet_v2_1.0'?",
        ),
        ("freeze: all", "freeze: al", "freeze: expected a freeze strategy"),
        ("{COVID: [", "{COVIT: [", "per_class: unknown 'COVIT'; did you mean 'COVID'?"),
        (
            "0.92, 0.94]",
            "0.92]",
            "per_class: expected precision, recall and f1 from 0 to 1 for COVID, got [0.95, 0.92]",
        ),
        ("7, 126]", "126]", "confusion_matrix: expected 4 rows of 4, one a class, got [3, 4]"),
        ("7, 126]", "7, -1]", "confusion_matrix: expected counts of at least 0"),
        ("Normal,", "covid,", "classes: expected class names that differ in more than case"),
        ("images: {test", "images: {tset", "images: unknown 'tset'; did you mean 'test'?"),
        ('source: "A', 'surce: "A', "surce: unknown key; did you mean 'source'?"),
        (TEXT[TEXT.index("  results:") :], "  results: []", "results: expected a list of results such as"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(tmp_path, old, new, message):
    assert old in TEXT
    with pytest.raises(SpecError) as caught:
        read(tmp_path, TEXT.replace(old, new, 1))
    assert any("reference" in problem and message in problem for problem in caught.value.problems)


def test_figures_are_computed_from_a_confusion_matrix_and_what_the_text_says_against_it_is_told(reference):
    found = published(reference, reference.results[1])
    hits = 300 + 481 + 952 + 126
    assert found.figures["accuracy"]["test"] == hits / 2117
    assert found.per_class["covid"] == pytest.approx((300 / 321, 300 / 362, 600 / (321 + 362)))
    assert found.contradictions == (
        "the source gives a test accuracy of 0.8621, but its confusion matrix gives 0.8781",
    )
    assert not published(reference, reference.results[0]).contradictions


def test_rounding_is_no_contradiction(reference):
    rounded = reference.results[1].model_copy(update={"accuracy": {"test": 0.88}, "macro_f1": {"test": 0.89}})
    assert not published(reference, rounded).contradictions


def test_results_are_matched_by_backbone_and_freeze_and_the_others_still_listed(reference):
    matched, other = compare(reference, summary(CLASSES))
    assert matched.name == "head only"
    assert [line.part for line in matched.lines] == ["train", "val", "test"]
    test = matched.lines[2]
    assert (test.theirs, test.ours) == (
        {"accuracy": 0.908, "macro_f1": 0.92, "loss": 0.27},
        {"accuracy": 0.7, "macro_f1": 0.7},
    )
    assert test.accuracy_difference == pytest.approx(-20.8)
    assert matched.class_rows() == [("covid", (0.95, 0.92, 0.94), (0.7, 0.7, 0.7))]
    assert (other.name, other.ours) == ("other", None)
    assert [(line.part, line.accuracy_difference) for line in other.lines] == [("test", None)]


def test_other_classes_are_not_compared(reference):
    assert compare(reference, summary([*CLASSES[:3], "Tuberculosis"])) == ()
    assert compare(reference, summary(CLASSES[:3])) == ()
