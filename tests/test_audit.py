"""Every finding of the audit is made where it was planted, and nowhere else."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_models.audit import LEAKS, Audit, Severity, audit_data
from cxr_models.cohort import Source, read_cohort
from cxr_models.dataset import Manifest, read_manifest
from cxr_models.duplicates import find_duplicates
from cxr_models.shortcuts import find_shortcuts
from cxr_models.splits import assign_splits
from tests import layouts


def audited(manifest: Manifest, allow: tuple[str, ...] = ()) -> Audit:
    found = find_duplicates(manifest)
    groups = found.groups(manifest)
    splits = assign_splits(manifest, seed=0, groups=groups)
    return audit_data(manifest, splits, found, find_shortcuts(manifest, groups), allow=allow)


def names(audit: Audit) -> list[str]:
    return [finding.name for finding in audit.findings]


def clinic(folder: Path, rows: list[tuple[str, str, str, str]], *, side: int = 64) -> Path:
    """A CSV file beside images: (name, label, patient, split); images of equal names up to the dot are one picture."""
    for name, *_ in rows:
        pixels = np.rint(layouts.xray(name.partition(".")[0], len(name) % 4, side) * 255).astype(np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "patient", "split"), *rows])
    return folder / "list.csv"


def healthy_rows(per_part: int = 6) -> list[tuple[str, str, str, str]]:
    """Two classes in each part of a given split, a patient for each image."""
    return [
        (f"{part}-{label}-{number}.png", label, f"P-{part}-{label}-{number}", part)
        for part in ("train", "val", "test")
        for label in ("sick", "well")
        for number in range(per_part)
    ]


def test_a_sound_data_set_has_no_findings(tmp_path):
    audit = audited(read_manifest(clinic(tmp_path, healthy_rows())))
    assert audit.findings == ()
    assert audit.leaks == ()
    assert (audit.used, audit.found, audit.left_out) == (36, 36, {})
    assert audit.shortcuts.bar is None


# Leaks


def patient_on_two_sides(rows: list[tuple[str, str, str, str]]) -> None:
    rows.append(("again.png", "sick", "P-train-sick-0", "test"))


def duplicate_on_two_sides(rows: list[tuple[str, str, str, str]]) -> None:
    rows.append(("train-sick-0.bmp", "sick", "somebody", "test"))


def one_image_two_labels(rows: list[tuple[str, str, str, str]]) -> None:
    rows.append(("train-sick-0.bmp", "well", "somebody", "train"))


@pytest.mark.parametrize("plant", [patient_on_two_sides, duplicate_on_two_sides, one_image_two_labels])
def test_a_leak_stops_and_may_be_allowed(tmp_path, plant: Callable[[list[tuple[str, str, str, str]]], None]):
    rows = healthy_rows()
    plant(rows)
    manifest = read_manifest(clinic(tmp_path, rows))
    audit = audited(manifest)
    (leak,) = audit.leaks
    assert (leak.name, leak.severity, leak.stops) == (plant.__name__, Severity.LEAK, True)
    assert leak is audit.findings[0], "the gravest comes first"
    (example,) = leak.examples
    assert set(example.paths) == {rows[-1][0], "train-sick-0.png"}
    assert leak.evidence
    assert leak.remedy
    others = tuple(name for name in LEAKS if name != leak.name)
    assert audited(manifest, others).leaks == audit.leaks
    allowed = audited(manifest, (leak.name,))
    assert allowed.leaks == ()
    assert allowed.findings[0].allowed
    assert names(allowed) == names(audit)


def test_a_near_copy_leaks_as_an_exact_one_does(tmp_path):
    table = clinic(tmp_path, [*healthy_rows(), ("near.jpg", "well", "somebody", "val")])
    with Image.open(tmp_path / "train-sick-3.png") as picture:
        picture.resize((100, 100)).save(tmp_path / "near.jpg", quality=90)
    audit = audited(read_manifest(table))
    assert names(audit) == ["duplicate_on_two_sides", "one_image_two_labels", "near_duplicates"]
    assert {example.paths for finding in audit.findings for example in finding.examples} == {
        ("near.jpg", "train-sick-3.png")
    }
    assert audit.findings[0].examples[0].detail == "1 in val, 1 in train"
    assert audit.findings[1].examples[0].detail == "well, sick"


def test_labels_do_not_matter_to_a_segmentation(tmp_path):
    rows = [*healthy_rows(), ("train-sick-0.bmp", "well", "somebody", "train")]
    rows += [("later.png", "well", "P-train-sick-1", "train")]
    manifest = read_manifest(clinic(tmp_path, rows))
    found = find_duplicates(manifest)
    assert names(audit_data(manifest, [record.split for record in manifest.records], found)) == ["exact_duplicates"]


def test_copies_within_a_part_and_a_class_are_a_note(tmp_path):
    rows = [*healthy_rows(), ("train-sick-0.bmp", "sick", "somebody", "train")]
    audit = audited(read_manifest(clinic(tmp_path, rows)))
    assert names(audit) == ["exact_duplicates"]
    assert audit.findings[0].severity is Severity.NOTE
    assert audit.findings[0].evidence.startswith("1 picture is there more than once, pixel for pixel: 1 of 37 images")


def test_copies_are_no_leak_where_the_split_is_cut_here(tmp_path):
    rows = [(name, label, "", "") for name, label, _, _ in healthy_rows()]
    rows += [(name.replace(".png", ".bmp"), label, "", "") for name, label, _, _ in rows[:12]]
    audit = audited(read_manifest(clinic(tmp_path, rows)))
    assert names(audit) == ["exact_duplicates"]
    assert len(audit.findings[0].examples) == 12


def test_a_patient_in_two_classes_is_a_note_and_no_leak(tmp_path):
    rows = [*healthy_rows(), ("later.png", "well", "P-train-sick-0", "train")]
    audit = audited(read_manifest(clinic(tmp_path, rows)))
    assert names(audit) == ["patient_in_two_classes"]
    (example,) = audit.findings[0].examples
    assert example.paths == ("later.png", "train-sick-0.png")
    assert example.detail == "patient P-train-sick-0: sick, well"
    assert "1 patient of 36 has images of more than one class" in audit.findings[0].evidence


def test_one_file_in_two_data_sets_under_two_labels(tmp_path):
    one, two = layouts.nested(tmp_path / "a"), layouts.class_folders(tmp_path / "b")
    shutil.copy(one / "COVID/COVID/COVID-1.png", two / "Pneumonia/again.png")
    cohort = read_cohort([Source(one), Source(two)])
    assert names(audited(cohort)) == ["one_image_two_labels"]
    assert audited(cohort).leaks[0].examples[0].paths == ("a/COVID/COVID/COVID-1.png", "b/Pneumonia/again.png")
    merged = read_cohort([Source(one), Source(two)], classes={"COVID": "sick", "Pneumonia": "sick"})
    assert audited(merged).leaks == ()
    assert merged.repeated == 1


# Files that are left out


def test_files_that_cannot_be_used_are_named_by_what_is_wrong(tmp_path):
    layouts.class_folders(tmp_path, images=10)
    whole = (tmp_path / "Covid-19/Covid-19-0.png").read_bytes()
    (tmp_path / "Covid-19/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "Covid-19/empty.png").touch()
    (tmp_path / "Pneumonia/text.jpg").write_text("no picture")
    for name, size in {"dot": (1, 1), "icon": (15, 40), "banner": (400, 79), "huge": (10_001, 10_000)}.items():
        Image.new("1", size).save(tmp_path / "Pneumonia" / f"{name}.png")
    Image.new("L", (16, 80), 9).save(tmp_path / "Pneumonia/narrow.png")  # as odd as is still taken
    manifest = read_manifest(tmp_path)
    audit = audited(manifest)
    found = {finding.name: {example.paths[0] for example in finding.examples} for finding in audit.findings}
    assert found == {
        "truncated_files": {"Covid-19/cut.png"},
        "empty_files": {"Covid-19/empty.png"},
        "absurdly_sized_files": {f"Pneumonia/{name}.png" for name in ("dot", "icon", "banner", "huge")},
        "unreadable_files": {"Pneumonia/text.jpg"},
        "blank_images": {"Pneumonia/narrow.png"},
    }
    warned = [finding.name for finding in audit.findings if finding.severity is Severity.WARNING]
    assert warned == ["blank_images"], "what is left out bears on no figure"
    assert (audit.used, audit.found, audit.left_out) == (31, 38, {"unreadable": 7})
    reasons = {example.paths[0]: example.detail for finding in audit.findings for example in finding.examples}
    assert reasons["Pneumonia/dot.png"] == "1 x 1 pixels; expected at least 16 on each side"
    assert reasons["Pneumonia/banner.png"] == "400 x 79 pixels; expected at most 5 times as long as wide"
    assert reasons["Pneumonia/huge.png"] == "10001 x 10000 pixels, more than 100 megapixels"


def test_a_missing_mask_is_no_missing_image(tmp_path):
    table = clinic(tmp_path, healthy_rows())
    lines = table.read_text().splitlines()
    table.write_text("\n".join([f"{lines[0]},mask", *(f"{line},gone.png" for line in lines[1:3]), *lines[3:]]))
    audit = audited(read_manifest(table))
    assert names(audit) == ["missing_masks"]
    assert (audit.used, audit.found, audit.left_out) == (36, 36, {})


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "a.dcm"])
def test_a_file_cut_short_anywhere_is_called_so(tmp_path, name, share):
    values = layouts.xray("a", 1, side=200)
    if name.endswith(".dcm"):
        layouts.save_dicom(tmp_path / "a" / name, values)
    else:
        layouts.save(tmp_path / "a" / name, 1, side=200)
    layouts.save(tmp_path / "a" / "whole.png", 2)
    whole = (tmp_path / "a" / name).read_bytes()
    (tmp_path / "a" / name).write_bytes(whole[: int(len(whole) * share)])
    manifest = read_manifest(tmp_path, least_classes=1)
    assert [(bad.path, str(bad.flaw)) for bad in manifest.unreadable] == [(f"a/{name}", "truncated")]


def test_what_is_left_out_on_purpose_is_counted(tmp_path):
    one, two = layouts.class_folders(tmp_path / "a", images=10), layouts.nested(tmp_path / "b", images=10)
    shutil.copy(one / "Covid-19/Covid-19-1.png", two / "COVID/COVID/again.png")
    cohort = read_cohort(
        [Source(one), Source(two, classes={"COVID": "Covid-19", "NORMAL": "No_findings"})],
        classes={"Pneumonia": None},
        subset=0.5,
    )
    audit = audited(cohort)
    assert audit.left_out == {
        "left out by the class map": 10,
        "also in an earlier data set": 1,
        "not in the subset": 20,
    }
    assert (audit.used, audit.found) == (20, 51)


# What the class follows from


def test_a_class_that_follows_from_its_files_is_a_warning(tmp_path):
    for number in range(30):
        layouts.save(tmp_path / "sick" / f"s{number}.jpg", number, side=96)
        layouts.save(tmp_path / "well" / f"w{number}.png", number, side=96 if number % 2 else 64)
    audit = audited(read_manifest(tmp_path))
    assert names(audit) == ["class_follows_from_size", "class_follows_from_format"]
    assert {finding.severity for finding in audit.findings} == {Severity.WARNING}
    assert audit.leaks == ()
    size, kind = audit.findings
    assert "75.0 % accuracy (75.0 % balanced), against 50.0 % and 50.0 %" in size.evidence
    assert "100.0 % accuracy" in kind.evidence
    assert [example.detail for example in size.examples] == ["96 x 96: 30 sick, 15 well", "64 x 64: 15 well"]
    assert [example.detail for example in kind.examples] == ["JPEG: 30 sick", "PNG: 30 well"]
    assert audit.shortcuts.bar.accuracy == 1.0


def test_everything_goes_into_json(tmp_path):
    rows = healthy_rows()
    patient_on_two_sides(rows)
    audit = audited(read_manifest(clinic(tmp_path, rows)))
    known = json.loads(json.dumps(audit.to_json()))
    assert known["findings"][0]["name"] == "patient_on_two_sides"
    assert known["findings"][0]["severity"] == "leak"
    assert known["findings"][0]["examples"][0]["paths"] == ["again.png", "train-sick-0.png"]
    assert known["shortcuts"]["majority"] == pytest.approx(19 / 37)


@pytest.mark.real
def test_real_x_rays(real_data: Path, tmp_path: Path):
    manifest = read_manifest(real_data / "data" / "cxr3", patient=r"^(\d{8})_", cache_dir=tmp_path)
    assert (manifest.patients, len(manifest.records)) == (806, 1124)
    audit = audited(manifest)
    assert names(audit) == [
        "class_follows_from_size",
        "exact_duplicates",
        "near_duplicates",
        "patient_in_two_classes",
    ]
    assert audit.leaks == ()
    assert audit.findings[0].examples[0].detail.startswith("256 x 256: 500 No_findings, 500 Pneumonia")
    assert "21 patients of 806 have images of more than one class" in audit.findings[-1].evidence
    assert len(audit.findings[-1].examples) == 21
