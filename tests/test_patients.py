"""Whose image it is, where the file name does not say it alone."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_models.dataset import read_manifest
from cxr_models.listing import ListedImage
from cxr_models.patients import PatientRule
from cxr_models.splits import assign_splits, patients_on_two_sides
from cxr_models.trial import TEST, TRAIN, VAL


@pytest.mark.parametrize(
    ("pattern", "path", "patient"),
    [
        (r".*(patient\d+)/", "train/patient00001/study1/view1.jpg", "patient00001"),
        (r"(patient\d+)/", "train/patient00001/study1/view1.jpg", "patient00001"),
        (r"^(\d+)/", "x/12/1.png", "12"),
        (r"([^/]+)/[^/]+$", "a/b/1.png", "b"),
        (r"(?P<site>\w+)/(?P<n>\d+)/", "x/berlin/17/1.png", "berlin_17"),
        (r"(?:.*/)?(\d+)_", "1_a/2_b.png", "2"),  # the name goes first
        (r"(\d+)_", "1_a/b.png", None),  # without a slash a pattern is of names
        (r"([^/]+)_x", "1_x/b.png", None),  # nor does one in square brackets make it one of folders
        (r"([^]/]+)_x", "1_x/b.png", None),
        (r"(\d+)/", "a/b_1.png", None),
    ],
)
def test_a_pattern_with_a_slash_is_of_folders_too(pattern: str, path: str, patient: str | None) -> None:
    told = (path, "") if patient is None else (patient, f"the given pattern {pattern!r}")
    assert PatientRule(pattern).patient(ListedImage(path, "a"), "") == told


def chexpert(folder: Path) -> list[tuple[str, str]]:
    """The images of 40 patients as CheXpert has them, with their labels; file names repeat from folder to folder."""
    rows = []
    for number in range(1, 41):
        for study in range(1, 2 + number % 3):
            for view in ("view1_frontal.jpg", "view2_lateral.jpg"):
                name = f"CheXpert-v1.0-small/train/patient{number:05}/study{study}/{view}"
                rows.append((name, ("No Finding", "Edema")[(number + study) % 2]))
    for place, (name, _) in enumerate(rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(place).integers(0, 255, (24, 24), np.uint8)).save(folder / name)
    return rows


@pytest.mark.parametrize("layout", ["csv beside", "csv inside", "class folders", "flat"])
def test_images_of_a_chexpert_patient_are_never_on_two_sides(tmp_path: Path, layout: str) -> None:
    rows, source = chexpert(tmp_path), tmp_path / "list.csv"
    if layout == "csv inside":
        source = tmp_path / "CheXpert-v1.0-small" / "list.csv"
        rows = [(name.partition("/")[2], label) for name, label in rows]
    if layout.startswith("csv"):
        source.write_text("".join(f"{path},{label}\n" for path, label in [("path", "label"), *rows]))
    else:
        source = tmp_path / "by class"
        for name, label in rows:
            below = name.partition("train/")[2]
            target = source / label / (below.replace("/", "_") if layout == "flat" else below)
            target.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).rename(target)
    manifest = read_manifest(source)
    assert (len(manifest.records), manifest.patients) == (len(rows), 40)
    for seed in range(3):
        splits = assign_splits(manifest, seed=seed)
        assert set(splits) == {TRAIN, VAL, TEST}
        assert patients_on_two_sides(manifest, splits) == ()
        number = {record.path: re.search(r"patient(\d{5})", record.path)[1] for record in manifest.records}
        parts: dict[str, set[str]] = {}
        for record, part in zip(manifest.records, splits, strict=True):
            parts.setdefault(number[record.path], set()).add(part)
        assert {len(own) for own in parts.values()} == {1}
