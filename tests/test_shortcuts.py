"""A class that follows from source, size, depth or format is found, with an honest figure; chance is no finding."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cxr_models import shortcuts
from cxr_models.dataset import ImageRecord, Manifest, read_manifest
from cxr_models.duplicates import find_duplicates
from cxr_models.shortcuts import Shortcuts, find_shortcuts


def record(
    number: int, label: str, *, patient: str = "", source: str = "", side: int = 300, mode: str = "L", kind: str = "PNG"
) -> ImageRecord:
    name = f"{number:05}.{kind.lower()}"
    return ImageRecord(name, label, patient or name, source, "", "", f"{number:064x}", side, side, mode, True, kind)


def measured(records: Sequence[ImageRecord], cache_dir: Path | None = None) -> Shortcuts:
    manifest = Manifest(Path(), "made up", tuple(records), (), 0)
    return find_shortcuts(manifest, [own.patient for own in records], cache_dir)


def by_name(found: Shortcuts) -> dict[str, shortcuts.Shortcut]:
    return {shortcut.name: shortcut for shortcut in found.found}


def test_where_nothing_differs_there_is_no_bar():
    found = measured([record(number, "aab"[number % 3]) for number in range(90)])
    assert found == Shortcuts(2 / 3, 0.5, ())
    assert found.bar is None


@pytest.mark.parametrize(
    ("name", "coded"),
    [
        ("source", lambda sick: {"source": "clinic" if sick else "archive"}),
        ("size", lambda sick: {"side": 1024 if sick else 256}),
        ("bit_depth", lambda sick: {"mode": "I;16" if sick else "L"}),
        ("format", lambda sick: {"kind": "JPEG" if sick else "PNG"}),
    ],
)
def test_a_coded_class_is_told_and_only_by_what_codes_it(name, coded):
    rng = np.random.default_rng(0)
    records = [
        record(
            number,
            "sick" if number % 3 == 0 else "well",
            **({"source": f"s{rng.integers(3)}"} | coded(number % 3 == 0)),
        )
        for number in range(150)
    ]
    found = by_name(measured(records))
    assert (found[name].accuracy, found[name].balanced_accuracy, found[name].follows) == (1.0, 1.0, True)
    assert [other for other, shortcut in found.items() if shortcut.follows] in ([name], [name, "together"])
    if "together" in found:
        assert found["together"].accuracy == 1.0


def test_the_published_composition_gives_its_published_bar():
    """COVID-19 Radiography Database: the archives of its README; knowing the archive alone gives 65 %."""
    parts = [
        ("COVID", "bimcv.cipf.es", 2473),
        ("COVID", "github.com/ml-workgroup", 183),
        ("COVID", "sirm.org", 559),
        ("COVID", "github.com/armiro", 401),
        ("Normal", "kaggle.com/rsna", 8851),
        ("Normal", "kaggle.com/kermany", 1341),
        ("Lung_Opacity", "kaggle.com/rsna", 6012),
        ("Viral Pneumonia", "kaggle.com/kermany", 1345),
    ]
    rows = [(label, f"https://{host}") for label, host, images in parts for _ in range(images)]
    found = measured([record(number, label, source=source) for number, (label, source) in enumerate(rows)])
    assert found.majority == pytest.approx(10_192 / 21_165)
    assert found.bar.name == "source"
    assert found.bar.accuracy == pytest.approx(0.653, abs=0.005)
    assert found.bar.follows


def test_addresses_of_their_own_tell_by_their_host_and_only_by_it():
    """Every image has another address: a classifier that learned them by heart would be right, one that may not is."""
    rows = [("sick" if number % 2 else "well", number) for number in range(120)]
    coded = [record(n, label, source=f"https://{label}.org/case/{n}") for label, n in rows]
    assert by_name(measured(coded))["source"].accuracy == 1.0
    plain = [record(n, label, source=f"https://archive.org/case/{n}") for label, n in rows]
    assert not by_name(measured(plain))["source"].follows


def test_it_is_cross_validated_by_patient():
    """Each patient has a size of his own, which a classifier that has seen him would know him by."""
    rng = np.random.default_rng(1)
    sides, sick = rng.permutation(np.arange(200, 1000, 8)), rng.random(100) < 0.5
    records = [
        record(
            10 * patient + image, "sick" if sick[patient] else "well", patient=f"P{patient}", side=int(sides[patient])
        )
        for patient in range(100)
        for image in range(8)
    ]
    by_patient, by_image = (
        find_shortcuts(Manifest(Path(), "", tuple(records), (), 0), groups)
        for groups in ([own.patient for own in records], [own.path for own in records])
    )
    assert by_image.bar.accuracy > 0.9
    assert by_patient.bar.accuracy == pytest.approx(0.5, abs=0.15)
    assert not by_patient.bar.follows


@pytest.mark.parametrize("images", [30, 200])
def test_chance_is_no_finding(images):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        records = [
            record(
                number,
                str(rng.choice(["a", "b", "c"], p=[0.6, 0.25, 0.15])),
                patient=f"P{number // 2}",
                source=f"s{rng.integers(6)}",
                side=int(rng.integers(200, 400)),
                mode=str(rng.choice(["L", "RGB"])),
                kind=str(rng.choice(["PNG", "JPEG"])),
            )
            for number in range(images)
        ]
        assert not [shortcut for shortcut in measured(records).found if shortcut.follows]


def skewed(seed: int, patients: int, *, tells: bool) -> list[ImageRecord]:
    """Two classes of patients of whom few have most of the images; a patient's images are of one class and size.

    Where the size `tells`, it does so for nine patients in ten.
    """
    rng = np.random.default_rng(seed)
    sizes = np.minimum(150, 1 + np.round(3 * rng.pareto(1.1, patients))).astype(int)
    records = []
    for patient, images in enumerate(sizes):
        sick = rng.integers(2)
        telling = 512 if sick == (rng.random() < 0.9) else 256
        side = telling if tells else int(rng.choice([256, 300, 512]))
        records += [
            record(1000 * patient + image, "ab"[sick], patient=f"P{patient}", side=side) for image in range(images)
        ]
    return records


def test_chance_is_no_finding_where_a_few_patients_have_most_of_the_images():
    """By the count of patients alone, 13 of these 80 would be findings."""
    told = [seed for seed in range(80) if any(row.follows for row in measured(skewed(seed, 60, tells=False)).found)]
    assert len(told) <= 1, "three standard errors"


def test_a_shortcut_among_such_patients_is_found():
    found = [measured(skewed(seed, 60, tells=True)).bar for seed in range(40)]
    assert sum(bar.follows for bar in found) >= 36


@pytest.mark.parametrize(
    ("sizes", "effective"), [([4] * 10, 10.0), ([1], 1.0), ([97, 1, 1, 1], 10_000 / 9_412), ([3, 1], 1.6)]
)
def test_patients_count_by_their_shares_of_the_images(sizes, effective):
    groups = np.repeat([f"P{patient}" for patient in range(len(sizes))], sizes)
    assert shortcuts._effective(groups) == pytest.approx(effective)


def test_what_tells_only_together_is_told_by_the_last():
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2, (400, 2))
    records = [
        record(number, "ab"[one ^ two], mode="LI"[one], kind=("PNG", "JPEG")[two])
        for number, (one, two) in enumerate(bits)
    ]
    found = by_name(measured(records))
    assert found["together"].accuracy == 1.0
    assert [name for name, shortcut in found.items() if shortcut.follows] == ["together"]


def test_a_rare_class_counts_as_much_as_others():
    """All of a rare class are of a size that a quarter of the others have: accuracy says nothing of that."""
    records = [
        record(number, "rare" if number < 60 else "common", side=512 if number < 60 or number % 4 == 0 else 256)
        for number in range(1000)
    ]
    found = measured(records)
    assert found.bar.accuracy == found.majority
    assert found.bar.balanced_accuracy == pytest.approx((1 + 0.75) / 2, abs=0.01)
    assert found.bar.follows


def test_a_class_of_one_patient_cannot_be_measured():
    records = [record(number, "a", side=100 + number) for number in range(9)] + [record(9, "b", side=700)]
    assert measured(records).found == ()


def test_a_second_look_measures_nothing(tmp_path, monkeypatch):
    records = [record(number, "ab"[number % 2], side=300 + number % 2) for number in range(40)]
    first = measured(records, tmp_path)
    monkeypatch.setattr(shortcuts, "_predicted", None)
    assert measured(records, tmp_path) == first
    (stored,) = (tmp_path / "audits").iterdir()
    stored.write_text("{")
    monkeypatch.undo()
    assert measured(records, tmp_path) == first


@pytest.mark.real
def test_the_size_tells_the_class_of_real_x_rays(real_data: Path, tmp_path: Path):
    manifest = read_manifest(real_data / "data" / "cxr3", patient=r"^(\d{8})_", cache_dir=tmp_path)
    found = find_shortcuts(manifest, find_duplicates(manifest, tmp_path).groups(manifest))
    assert [shortcut.name for shortcut in found.found] == ["size"]
    assert found.majority == pytest.approx(500 / 1124)
    assert 0.50 < found.bar.accuracy < 0.56, "hardly a COVID-19 image is 256 x 256, and every NIH image is"
    assert found.bar.balanced_accuracy > 0.6
    assert found.bar.follows
