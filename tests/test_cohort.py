"""Several data sets become one without a shared image or patient; classes are renamed; a part is stratified."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cxr_models.cohort import Source, read_cohort, subset_words, take_subset
from cxr_models.dataset import DataError, ImageRecord, Manifest
from cxr_models.splits import assign_splits, patients_on_two_sides
from tests import layouts


def manifest_of(rows: list[tuple[str, str, str]]) -> Manifest:
    """A manifest of (patient, label, given split) without files."""
    records = tuple(
        ImageRecord(f"{i:05}.png", label, patient, "", split, "", f"{i:064x}", 8, 8, "L", True)
        for i, (patient, label, split) in enumerate(rows)
    )
    return Manifest(Path(), "CSV", records, (), 0)


class TestClasses:
    def test_a_map_renames_merges_and_leaves_out(self, tmp_path):
        root = layouts.covid_radiography(tmp_path, images=3)
        cohort = read_cohort(
            [Source(root)], classes={"Viral Pneumonia": "pneumonia", "COVID": "pneumonia", "Lung_Opacity": None}
        )
        assert Counter(record.label for record in cohort.records) == {"Normal": 3, "pneumonia": 6}
        assert cohort.notes == ("left out as the class map says: 3 images of 'Lung_Opacity'",)

    def test_a_class_that_is_not_there_is_an_error_with_those_that_are(self, tmp_path):
        root = layouts.nested(tmp_path, images=1)
        with pytest.raises(DataError, match=r"a class 'COVDI'(.|\n)*'COVID', 'NORMAL'\n.*did you mean 'COVID'\?"):
            read_cohort([Source(root)], classes={"COVDI": "x"})

    def test_one_class_left_is_too_few_unless_labels_do_not_matter(self, tmp_path):
        root = layouts.nested(tmp_path, images=1)
        with pytest.raises(DataError, match="only one class, 'NORMAL'"):
            read_cohort([Source(root)], classes={"COVID": None})
        assert len(read_cohort([Source(root)], classes={"COVID": None}, least_classes=1).records) == 1

    def test_no_class_left_is_refused(self, tmp_path):
        root = layouts.nested(tmp_path, images=1)
        with pytest.raises(DataError, match="leaves none"):
            read_cohort([Source(root)], classes={"COVID": None, "NORMAL": None})


class TestSources:
    def test_two_data_sets_become_one(self, tmp_path):
        one = Source(layouts.nested(tmp_path / "one", images=2), classes={"COVID": "covid", "NORMAL": "healthy"})
        two = Source(layouts.csv_file(tmp_path / "two", images=2))
        cohort = read_cohort([one, two], classes={"flu": None})
        assert [(record.path, record.label, record.source) for record in cohort.records] == [
            ("one/COVID/COVID/COVID-0.png", "covid", "one"),
            ("one/COVID/COVID/COVID-1.png", "covid", "one"),
            ("one/NORMAL/NORMAL/NORMAL-0.png", "healthy", "one"),
            ("one/NORMAL/NORMAL/NORMAL-1.png", "healthy", "one"),
            ("two/files/healthy0.png", "healthy", "site 0"),
            ("two/files/healthy1.png", "healthy", "site 1"),
        ]
        assert cohort.root == tmp_path.resolve()
        assert all((cohort.root / record.path).is_file() for record in cohort.records)
        assert {record.patient for record in cohort.records[-2:]} == {"list/healthy0"}
        assert all(record.patient == record.path for record in cohort.records[:4])

    def test_each_may_have_one_class(self, tmp_path):
        for place, name in enumerate(("sick", "well")):
            layouts.save(tmp_path / name / name / "1.png", place)
        cohort = read_cohort([Source(tmp_path / "sick"), Source(tmp_path / "well")])
        assert cohort.classes == ("sick", "well")

    def test_patients_of_equal_names_are_different_people(self, tmp_path):
        for place, name in enumerate(("x", "y")):
            layouts.save(tmp_path / name / "a" / "00000001_000.png", place)
            layouts.save(tmp_path / name / "b" / "00000001_001.png", place + 2)
            shutil.move(tmp_path / name / "a" / "00000001_000.png", tmp_path / name / "a" / f"0000000{place}_000.png")
        cohort = read_cohort([Source(tmp_path / "x"), Source(tmp_path / "y")])
        assert {record.patient for record in cohort.records} == {"x/00000000", "x/00000001", "y/00000001"}

    def test_of_equal_bytes_the_first_stays(self, tmp_path):
        one, two = layouts.nested(tmp_path / "a", images=3), layouts.class_folders(tmp_path / "b", images=1)
        shutil.copy(one / "COVID/COVID/COVID-1.png", two / "Pneumonia/again.png")
        shutil.copy(one / "NORMAL/NORMAL/NORMAL-1.png", two / "Pneumonia/too.png")
        cohort = read_cohort([Source(one), Source(two, classes={"Pneumonia": "COVID"})])
        assert len({record.sha256 for record in cohort.records}) == len(cohort.records) == 9
        assert "a/COVID/COVID/COVID-1.png" in {record.path for record in cohort.records}
        (note,) = cohort.notes
        assert note.endswith("byte for byte, and that are left out: 2, 1 of them with another label")

    def test_data_sets_of_equal_names_are_told_apart(self, tmp_path):
        sources = [Source(layouts.nested(tmp_path / name / "xrays")) for name in ("one", "two")]
        for image in (tmp_path / "two").rglob("*.png"):
            image.write_bytes(image.read_bytes() + b"\0")  # other bytes, the same picture
        cohort = read_cohort([*sources, Source(layouts.class_folders(tmp_path / "xrays-2"))])
        assert {record.source for record in cohort.records} == {"xrays", "xrays-2", "xrays-2-2"}

    def test_the_same_data_set_twice_adds_nothing(self, tmp_path):
        root = layouts.nested(tmp_path, images=3)
        once, twice = read_cohort([Source(root)]), read_cohort([Source(root), Source(root)])
        assert [record.path for record in twice.records] == [record.path for record in once.records]

    def test_notes_and_unreadable_files_say_which_data_set(self, tmp_path):
        one, two = layouts.class_folders(tmp_path / "one"), layouts.covid_radiography(tmp_path / "two", images=2)
        (one / "Covid-19" / "bad.png").write_bytes(b"x")
        (two / "COVID-19_Radiography_Dataset/COVID/masks/COVID-1.png").unlink()
        cohort = read_cohort([Source(one), Source(two)])
        assert [bad.path for bad in cohort.unreadable] == ["one/Covid-19/bad.png"]
        assert cohort.notes == ("two: images without a mask: 1 of 8",)


def study(seed: int) -> Manifest:
    """300 patients with 1 to 5 images in a common and a rare class, a few in both, half of the rare ones in test."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(300):
        label, part = ("rare", ("test", "")[patient % 2]) if patient < 40 else ("common", "")
        rows += [(f"P{patient}", label, part)] * int(rng.integers(1, 6))
        rows += [(f"P{patient}", "common", part)] * int(patient % 10 == 0)
    return manifest_of(rows)


class TestSubset:
    @pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_stratified_and_takes_whole_patients(self, seed, share):
        manifest = study(seed)
        part = take_subset(manifest, share, seed)
        kept = {record.patient for record in part.records}
        assert part.records == tuple(record for record in manifest.records if record.patient in kept)
        assert part.spared == len(manifest.records) - len(part.records)
        whole, taken = (Counter((r.split, r.label) for r in found.records) for found in (manifest, part))
        for stratum, count in whole.items():
            assert abs(taken[stratum] - share * count) <= 5, "more than a patient off"

    def test_of_patients_with_one_image_each_it_is_exact_and_smaller_ones_lie_in_larger(self):
        counts = {"COVID": 3616, "Lung_Opacity": 6012, "Normal": 10192, "Viral Pneumonia": 1345}
        rows = [(f"{name}-{i}", name, "") for name, count in counts.items() for i in range(count)]
        manifest = manifest_of(rows)
        quarter, half = take_subset(manifest, 0.25, 0), take_subset(manifest, 0.5, 0)
        assert Counter(record.label for record in quarter.records) == {
            "COVID": 904,
            "Lung_Opacity": 1503,
            "Normal": 2548,
            "Viral Pneumonia": 336,
        }
        assert set(quarter.records) < set(half.records)
        words = subset_words(len(quarter.records), quarter.spared, 0.25)
        assert words == "subset 0.25: 5,291 of 21,165 images, chosen by patients, stratified by class"
        assert subset_words(len(manifest.records), manifest.spared, 1.0) == "21,165 images"

    def test_the_seed_decides(self):
        manifest = study(0)
        assert take_subset(manifest, 0.3, 1) == take_subset(study(0), 0.3, 1)
        assert take_subset(manifest, 0.3, 1) != take_subset(manifest, 0.3, 2)
        assert take_subset(manifest, 1.0, 1) is manifest

    def test_a_split_of_it_shares_no_patient(self):
        part = take_subset(study(0), 0.5, 0)
        assert patients_on_two_sides(part, assign_splits(part, seed=0)) == ()

    def test_a_share_must_be_one(self):
        for share in (0.0, 1.5, -1.0):
            with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
                take_subset(study(0), share, 0)
