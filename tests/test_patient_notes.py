"""A plan says by what the patients of these very data are told, and by how many files by nothing."""

from pathlib import Path

import pytest

from cxr_models.cohort import Source, read_cohort
from cxr_models.dataset import read_manifest
from sweep.patient_notes import patient_notes
from tests import layouts


def noted(source: Path, pattern: str = "") -> list[str]:
    return list(patient_notes(read_manifest(source, patient=pattern), [pattern] if pattern else []))


def test_the_column_of_a_table(tmp_path):
    assert noted(layouts.csv_file(tmp_path)) == ["patients: 16 images of 8 patients by the CSV file"]


def test_the_tag_of_dicom_files_unless_it_is_ignored(tmp_path):
    (note,) = noted(layouts.dicom(tmp_path))
    told = "patients: 12 images of 6 patients by DICOM's PatientID"
    assert note == f"{told}; data.patient: none ignores PatientID and names"
    assert noted(tmp_path, "none") == ["each image counts as its own patient, as data.patient: none says"]


def test_a_built_in_pattern_and_names_that_it_does_not_match(tmp_path):
    for number in range(6):
        layouts.save(tmp_path / "a" / f"0000000{number // 3}_00{number}.png", 0)
        layouts.save(tmp_path / "b" / f"covid-{number}.png", 1)
    layouts.save(tmp_path / "b" / "person1_virus_3.jpeg", 1)
    (note,) = noted(tmp_path)
    assert note == (
        "patients: 6 images of 2 patients by the built-in pattern nih, 1 image of 1 patient by the built-in pattern "
        "kermany, 6 images by nothing (each counts as its own patient); data.patient: none ignores PatientID and names"
    )


def test_a_given_pattern(tmp_path):
    layouts.class_folders(tmp_path)
    assert noted(tmp_path, r"\w+-(\d)") == [r"patients: 24 images of 8 patients by the given pattern '\\w+-(\\d)'"]
    few = noted(tmp_path, r"(Covid-19)")
    assert few[0].endswith("by the given pattern '(Covid-19)', 16 images by nothing (each counts as its own patient)")
    own = noted(tmp_path, r"(.*)")[1]
    assert own == "data.patient '(.*)' gives every image a patient of its own; does it match the names?"


@pytest.mark.parametrize(
    ("pattern", "note"),
    [
        ("", "no file name tells a patient: each image counts as its own (data.patient says how names tell them)"),
        ("nih", "data.patient 'nih' matches no file name: each image counts as its own patient"),
    ],
)
def test_where_nothing_tells_a_patient(tmp_path, pattern, note):
    assert noted(layouts.class_folders(tmp_path), pattern) == [note]


def test_each_of_several_sources_has_its_rule(tmp_path):
    table, scans = layouts.csv_file(tmp_path / "one"), layouts.dicom(tmp_path / "two")
    (note,) = patient_notes(read_cohort([Source(table), Source(scans)]), [])
    assert "16 images of 8 patients by the CSV file, 12 images of 6 patients by DICOM's PatientID; data.patient" in note
