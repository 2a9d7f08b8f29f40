"""Copies of a picture are found whatever was done to them; chests that merely look alike are not."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cxr_models import duplicates
from cxr_models.cohort import Source, read_cohort
from cxr_models.dataset import DataError, Manifest, read_manifest
from cxr_models.duplicates import Duplicates, NearPair, find_duplicates
from cxr_models.phantom import draw, patient_drawings
from cxr_models.splits import assign_splits, patients_on_two_sides
from tests import layouts

SIDE = 128
CHESTS = 300


@pytest.fixture(scope="module")
def chests() -> list[Image.Image]:
    """Many patients, one view each: ribs, hearts and lungs of the same make."""
    classes = ("Normal", "COVID-like", "Focal opacity", "Diffuse pattern")
    drawings = [patient_drawings(5, patient, classes[patient % 4])[0] for patient in range(CHESTS)]
    return [Image.fromarray(draw(drawing, SIDE)[0]) for drawing in drawings]


@pytest.fixture
def folder(tmp_path: Path, chests: list[Image.Image]) -> Path:
    """Twenty of them in two classes, `a/00.png`, `b/01.png` and so on."""
    for number, chest in enumerate(chests[:20]):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        chest.save(path)
    return tmp_path / "data"


def saved_anew(chest: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    chest.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 60": lambda chest: saved_anew(chest, 60),
    "half the size": lambda chest: chest.resize((64, 64)),
    "larger, another shape": lambda chest: chest.resize((300, 260)),
    "darker": lambda chest: ImageEnhance.Brightness(chest).enhance(0.7),
    "brighter, clipped": lambda chest: ImageEnhance.Brightness(chest).enhance(1.2),
    "more contrast, clipped": lambda chest: ImageEnhance.Contrast(chest).enhance(1.4),
    "less contrast": lambda chest: ImageEnhance.Contrast(chest).enhance(0.6),
    "inverted, as MONOCHROME1 is stored": ImageOps.invert,
    "gamma": lambda chest: chest.point([round(255 * (value / 255) ** 0.7) for value in range(256)]),
    "blurred": lambda chest: chest.filter(ImageFilter.GaussianBlur(1)),
    "smaller, darker, JPEG": lambda chest: saved_anew(
        ImageEnhance.Brightness(chest.resize((100, 100))).enhance(0.8), 50
    ),
}


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES.keys())
def test_a_changed_copy_is_found_and_nothing_else(folder: Path, chests: list[Image.Image], change) -> None:
    planted = {3: "a/copy-of-03.png", 8: "b/copy-of-08.png", 15: "b/copy-of-15.png"}
    for number, name in planted.items():
        change(chests[number]).save(folder / name)
    manifest = read_manifest(folder)
    found = find_duplicates(manifest)
    pairs = {frozenset((manifest.records[pair.first].path, manifest.records[pair.second].path)) for pair in found.near}
    assert pairs == {frozenset((f"{'ab'[number % 2]}/{number:02}.png", name)) for number, name in planted.items()}
    assert found.exact == ()
    assert all(pair.first < pair.second and 0.84 <= abs(pair.correlation) <= 1.0 for pair in found.near)


def test_hundreds_of_chests_that_look_alike_are_no_copies(tmp_path: Path, chests: list[Image.Image]) -> None:
    for number, chest in enumerate(chests):
        path = tmp_path / "ab"[number % 2] / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        chest.save(path)
    manifest = read_manifest(tmp_path)
    assert len(manifest.records) == CHESTS
    assert find_duplicates(manifest) == Duplicates((), ())


def test_the_same_pixels_are_exact_whatever_the_file(folder: Path, chests: list[Image.Image]) -> None:
    shutil.copy(folder / "a/00.png", folder / "b/again.png")
    chests[0].save(folder / "b/again.bmp")
    chests[0].convert("RGB").save(folder / "a/colour.tif")
    Image.fromarray(np.asarray(chests[0]).astype(np.uint16) * 257).save(folder / "a/deep.png")  # 16 bits
    chests[2].save(folder / "a/other.tiff")
    manifest = read_manifest(folder)
    found = find_duplicates(manifest)
    groups = {frozenset(manifest.records[place].path for place in group) for group in found.exact}
    assert groups == {
        frozenset(("a/00.png", "a/colour.tif", "a/deep.png", "b/again.bmp", "b/again.png")),
        frozenset(("a/02.png", "a/other.tiff")),
    }
    assert found.near == ()


def test_a_copy_of_a_copy_belongs_to_the_same_picture(folder: Path, chests: list[Image.Image]) -> None:
    chests[0].save(folder / "a/exact.bmp")
    chests[0].resize((90, 90)).save(folder / "b/small.png")
    manifest = read_manifest(folder)
    (cluster,) = find_duplicates(manifest).clusters(len(manifest.records))
    assert {manifest.records[place].path for place in cluster} == {"a/00.png", "a/exact.bmp", "b/small.png"}


def test_of_very_many_copies_not_every_pair_is_named(folder: Path, chests, monkeypatch) -> None:
    """The frames of a film: their pairs grow with the square, and a few of each still put them into one cluster."""
    for side in range(80, 92):
        chests[4].resize((side, side)).save(folder / f"b/copy-{side}.png")
    manifest = read_manifest(folder)
    every = find_duplicates(manifest)
    assert len(every.near) == 13 * 12 / 2
    monkeypatch.setattr(duplicates, "MOST_PARTNERS", 2)
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", 5)
    some = find_duplicates(manifest)
    assert len(some.near) == 11 * 2 + 1
    assert some.clusters(len(manifest.records)) == every.clusters(len(manifest.records))
    assert set(some.near) < set(every.near)


def test_blank_pictures_are_near_nothing(tmp_path: Path) -> None:
    for number, shade in enumerate((0, 7, 255, 128)):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (40, 40 + number), shade).save(path)
    assert find_duplicates(read_manifest(tmp_path)) == Duplicates((), ())


def test_hundreds_are_compared_block_by_block_as_at_once(folder: Path, chests, monkeypatch) -> None:
    for number in (1, 5, 18):
        chests[number].resize((70, 70)).save(folder / f"a/copy-{number}.png")
    manifest = read_manifest(folder)
    at_once = find_duplicates(manifest)
    assert len(at_once.near) == 3
    monkeypatch.setattr(duplicates, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", 1)
    calls: list[tuple[int, int]] = []
    assert find_duplicates(manifest, progress=lambda done, total: calls.append((done, total))) == at_once
    assert calls == [(4, 23), (8, 23), (12, 23), (16, 23), (20, 23), (23, 23)]


# The cache


def test_a_second_search_compares_nothing(folder: Path, chests, tmp_path: Path, monkeypatch) -> None:
    chests[1].resize((70, 70)).save(folder / "a/copy.png")
    manifest = read_manifest(folder)
    first = find_duplicates(manifest, tmp_path)
    monkeypatch.setattr(duplicates, "perceptual_hashes", None)
    assert find_duplicates(manifest, tmp_path) == first
    assert len(first.near) == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"[[0, 99, 0.9]]", b"[[0]]", b'{"a": 1}'])
def test_a_damaged_cache_is_made_anew(folder: Path, chests, tmp_path: Path, damage: bytes) -> None:
    chests[1].resize((70, 70)).save(folder / "a/copy.png")
    manifest = read_manifest(folder)
    first = find_duplicates(manifest, tmp_path)
    (stored,) = (tmp_path / "audits").iterdir()
    stored.write_bytes(damage)
    assert find_duplicates(manifest, tmp_path) == first


def test_an_image_lost_since_it_was_listed_is_named(folder: Path, chests) -> None:
    chests[1].resize((70, 70)).save(folder / "a/copy.png")
    manifest = read_manifest(folder)
    (folder / "a/copy.png").unlink()
    with pytest.raises(DataError, match=r"a/copy\.png' could be read when the data set was listed"):
        find_duplicates(manifest)


# Splits


def test_groups_join_patients_over_shared_pictures(folder: Path) -> None:
    manifest = read_manifest(folder, patient=r"(\d)\d")  # ten images of patient 0, ten of patient 1
    joined = Duplicates(exact=((0, 1),), near=())  # both of patient 0
    assert set(joined.groups(manifest)) == {"0", "1"}
    across = Duplicates(exact=(), near=(NearPair(0, 19, 0.9),))
    assert set(across.groups(manifest)) == {"0"}
    own = read_manifest(folder)
    chain = Duplicates(exact=((2, 5, 9),), near=(NearPair(9, 12, 0.9),))
    groups = chain.groups(own)
    assert {groups[place] for place in (2, 5, 9, 12)} == {own.records[2].patient}
    assert len(set(groups)) == 17


def test_without_duplicates_the_groups_are_the_patients(folder: Path) -> None:
    manifest = read_manifest(folder)
    groups = Duplicates((), ()).groups(manifest)
    assert groups == tuple(record.patient for record in manifest.records)
    assert assign_splits(manifest, seed=3, groups=groups) == assign_splits(manifest, seed=3)


@pytest.mark.parametrize("seed", range(5))
def test_copies_stay_on_one_side_and_the_patient_stays_the_real_one(folder: Path, chests, seed: int) -> None:
    for number in range(8):
        chests[number].resize((80, 80)).save(folder / "ab"[number % 2] / f"copy-{number}.png")
    manifest = read_manifest(folder)
    assert manifest.patients == 28, "no name tells a patient, so copies look like other people"
    found = find_duplicates(manifest)
    splits = assign_splits(manifest, seed=seed, groups=found.groups(manifest))
    assert all(splits[first] == splits[second] for first, second in found.links)
    assert len(found.links) == 8
    assert patients_on_two_sides(manifest, splits) == ()
    assert manifest.patients == 28


# Real X-rays


@pytest.mark.real
def test_on_real_x_rays(real_data: Path, tmp_path: Path) -> None:
    """The data set has one picture twice and one in two exposures; most of the second set's are in it, too."""
    chests, lungs = real_data / "data" / "cxr3", real_data / "data" / "lungseg"
    alone = read_manifest(chests, patient=r"^(\d{8})_", cache_dir=tmp_path)
    found = find_duplicates(alone)
    assert paths(alone, found) == {
        frozenset(("No_findings/00002658_001.jpg", "No_findings/00002658_002.jpg")),
        frozenset(f"Covid-19/{name}.jpg" for name in EXPOSURES),
    }
    both = read_cohort([Source(chests), Source(lungs, classes={"image": "Covid-19"})], cache_dir=tmp_path)
    pairs = paths(both, find_duplicates(both))
    same_name = {pair for pair in pairs if len({Path(path).stem for path in pair}) == 1}
    assert len(same_name) >= 35
    assert pairs - same_name == {
        frozenset(("cxr3/No_findings/00002658_001.jpg", "cxr3/No_findings/00002658_002.jpg")),
        *(
            frozenset((f"{one}/{first}", f"{two}/{second}"))
            for one, first in (("cxr3/Covid-19", f"{EXPOSURES[0]}.jpg"), ("lungseg/images", f"{EXPOSURES[0]}.png"))
            for two, second in (("cxr3/Covid-19", f"{EXPOSURES[1]}.jpg"), ("lungseg/images", f"{EXPOSURES[1]}.png"))
        ),
    }


EXPOSURES = ("E63574A7-4188-4C8D-8D17-9D67A18A1AFA", "F4341CE7-73C9-45C6-99C8-8567A5484B63")


def paths(manifest: Manifest, found: Duplicates) -> set[frozenset[str]]:
    """The pairs of `links` as paths."""
    return {frozenset(manifest.records[place].path for place in link) for link in found.links}


def test_every_layout_of_different_pictures_has_none(tmp_path: Path) -> None:
    for layout in (layouts.kermany, layouts.covid_radiography, layouts.dicom):
        manifest = read_manifest(layout(tmp_path / layout.__name__))
        assert find_duplicates(manifest) == Duplicates((), ())
