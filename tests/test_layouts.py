"""Every published layout is found by itself; what looks like a mistake is answered with what was probably meant."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cxr_models import tables
from cxr_models.dataset import DataError, read_manifest
from cxr_models.patients import PATIENT_PATTERNS
from cxr_models.splits import assign_splits, patients_on_two_sides
from cxr_models.trial import TEST, TRAIN, VAL
from tests import layouts


@pytest.mark.parametrize(
    ("build", "layout", "classes"),
    [
        (layouts.class_folders, "class folders", ("Covid-19", "No_findings", "Pneumonia")),
        (
            layouts.covid_radiography,
            "class folders with images/ in COVID-19_Radiography_Dataset/",
            layouts.RADIOGRAPHY,
        ),
        (layouts.kermany, "train|val|test folders in chest_xray/", ("NORMAL", "PNEUMONIA")),
        (layouts.nested, "class folders with sub-folders", ("COVID", "NORMAL")),
        (layouts.csv_file, "CSV", ("flu", "healthy")),
        (layouts.dicom, "images labelled by labels.csv", ("0", "1")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_layout_is_found_whole_and_split_by_patient(
    tmp_path: Path, build: Callable[[Path], Path], layout: str, classes: tuple[str, ...]
) -> None:
    manifest = read_manifest(build(tmp_path))
    assert (manifest.layout, manifest.classes, manifest.unreadable) == (layout, classes, ())
    splits = assign_splits(manifest, seed=0)
    assert patients_on_two_sides(manifest, splits) == ()
    assert {(record.label, part) for record, part in zip(manifest.records, splits, strict=True)} == {
        (name, part) for name in classes for part in (TRAIN, VAL, TEST)
    }


class TestRadiography:
    def test_images_have_masks_and_the_address_they_came_from(self, tmp_path):
        manifest = read_manifest(layouts.covid_radiography(tmp_path, images=4))
        assert len(manifest.records) == 16
        assert all(record.mask == record.path.replace("/images/", "/masks/") for record in manifest.records)
        assert Counter(record.source for record in manifest.records) == {
            "https://hospital-0.org/": 8,
            "https://hospital-1.org/": 8,
        }
        assert (manifest.ignored, manifest.notes) == (1, ())  # the text file

    def test_spreadsheets_are_read_once_and_again_when_they_change(self, tmp_path, monkeypatch):
        root, cache = layouts.covid_radiography(tmp_path / "data", images=2), tmp_path / "cache"
        first = read_manifest(root, cache_dir=cache)
        monkeypatch.setattr(tables, "_read_spreadsheet", lambda file: {"covid-1": "new"})
        assert read_manifest(root, cache_dir=cache) == first
        (sheet,) = root.glob("*/COVID.metadata.xlsx")
        sheet.write_bytes(b"other")
        assert {
            record.source for record in read_manifest(root, cache_dir=cache).records if record.label == "COVID"
        } == {
            "new",
            "",
        }

    def test_a_spreadsheet_that_cannot_be_read_is_a_note(self, tmp_path):
        root = layouts.covid_radiography(tmp_path, images=2) / "COVID-19_Radiography_Dataset"
        (root / "COVID.metadata.xlsx").write_bytes(b"PK broken")
        (root / "Normal.metadata.xlsx").unlink()
        manifest = read_manifest(tmp_path)
        unread, unnamed = manifest.notes
        assert unread.startswith("COVID.metadata.xlsx cannot be read: BadZipFile")
        assert unnamed == "images that no metadata.xlsx names: 4; they have no source"
        assert {record.label for record in manifest.records if record.source} == {"Lung_Opacity", "Viral Pneumonia"}

    def test_masks_and_images_without_each_other_are_counted(self, tmp_path):
        root = layouts.covid_radiography(tmp_path, images=3) / "COVID-19_Radiography_Dataset"
        (root / "COVID/masks/COVID-1.png").unlink()
        (root / "Normal/images/Normal-2.png").unlink()
        assert read_manifest(root).notes == ("images without a mask: 1 of 11", "masks without an image: 1")


class TestKermany:
    def test_its_tiny_val_goes_into_train_and_another_is_cut_by_patient(self, tmp_path):
        manifest = read_manifest(layouts.kermany(tmp_path))
        assert Counter(record.split for record in manifest.records) == {TRAIN: 416, TEST: 40}
        (note,) = manifest.notes
        assert "the given val part of 16 images is too small to choose by (8 of 'NORMAL'): merged into train" in note
        splits = assign_splits(manifest, seed=0)
        assert patients_on_two_sides(manifest, splits) == ()
        assert splits.count(TEST) == 40
        assert splits.count(VAL) / 416 == pytest.approx(0.15 / 0.85, abs=0.02)

    def test_a_val_part_of_some_size_is_kept(self, tmp_path):
        root = layouts.kermany(tmp_path, images=100)  # 8 against 100
        manifest = read_manifest(root)
        assert (Counter(record.split for record in manifest.records)[VAL], manifest.notes) == (16, ())

    def test_a_second_copy_and_what_macos_adds_are_ignored(self, tmp_path):
        assert read_manifest(layouts.kermany(tmp_path)).ignored == 3

    def test_one_part_alone_says_that_there_are_more(self, tmp_path):
        root = layouts.kermany(tmp_path, images=30) / "chest_xray"
        manifest = read_manifest(root / "train")
        assert (manifest.layout, manifest.classes) == ("class folders", ("NORMAL", "PNEUMONIA"))
        assert manifest.notes == (f"train is one part of a given split; name {root} to use test, train, val",)

    @pytest.mark.parametrize(
        ("name", "patient"),
        [
            ("person109_bacteria_517.jpeg", "person109_bacteria"),
            ("person109_bacteria_528.jpeg", "person109_bacteria"),
            ("person1008_bacteria_2939.jpeg", "person1008_bacteria"),
            ("person1008_virus_1691.jpeg", "person1008_virus"),
            ("IM-0429-0001.jpeg", "IM-0429"),
            ("IM-0429-0001-0001.jpeg", "IM-0429"),
            ("IM-0282-0001.jpeg", "IM-0282"),
            ("NORMAL2-IM-0282-0001.jpeg", "NORMAL2-IM-0282"),
            ("NORMAL2-IM-0246-0001-0002.jpeg", "NORMAL2-IM-0246"),
        ],
    )
    def test_its_names_tell_number_and_subtype(self, tmp_path, name, patient):
        layouts.save(tmp_path / "a" / name, 0)
        layouts.save(tmp_path / "b" / "other.png", 1)
        assert "kermany" in PATIENT_PATTERNS
        for pattern in ("", "kermany"):
            assert read_manifest(tmp_path, patient=pattern).records[0].patient == patient


class TestImagesAndMasks:
    def test_every_image_has_its_mask_and_one_label(self, tmp_path):
        layouts.images_and_masks(tmp_path, images=3)
        layouts.save(tmp_path / "images" / "alone.png", 0)
        layouts.save_mask(tmp_path / "masks" / "nobody.png")
        layouts.save(tmp_path / "images" / "kept.png", 0)
        layouts.save_mask(tmp_path / "masks" / "kept_mask.png")
        manifest = read_manifest(tmp_path, least_classes=1)
        assert manifest.layout == "images/ and masks/"
        assert [(record.path, record.label, record.mask) for record in manifest.records] == [
            ("images/alone.png", "image", ""),
            *((f"images/chest-{index}.jpg", "image", f"masks/chest-{index}.png") for index in range(3)),
            ("images/kept.png", "image", "masks/kept_mask.png"),
        ]
        assert manifest.notes == ("images without a mask: 1 of 5", "masks without an image: 1")

    def test_they_are_no_classes(self, tmp_path):
        with pytest.raises(DataError, match=r"only one class, 'image', with 8 images\n.*a folder for each class"):
            read_manifest(layouts.images_and_masks(tmp_path))

    @pytest.mark.real
    def test_real_ones(self, real_data):
        folder = real_data / "data" / "lungseg"
        if not folder.is_dir():
            pytest.skip("no data/lungseg in CXR_REAL_DATA")
        manifest = read_manifest(folder, least_classes=1)
        assert len(manifest.records) == sum(bool(record.mask) for record in manifest.records) == 98


class TestTheWrongFolder:
    def test_one_above_several_data_sets(self, tmp_path):
        layouts.kermany(tmp_path, images=3)
        layouts.covid_radiography(tmp_path, images=1)
        with pytest.raises(
            DataError, match=r"whole data sets in 'COVID-19_Radiography_Dataset', 'chest_xray'\n.*did you mean .*xray\?"
        ):
            read_manifest(tmp_path)

    def test_one_class_among_its_siblings(self, tmp_path):
        layouts.class_folders(tmp_path, images=1)
        with pytest.raises(DataError, match=rf"did you mean {tmp_path}\? It has Covid-19, No_findings, Pneumonia"):
            read_manifest(tmp_path / "Pneumonia")

    def test_the_images_of_one_class(self, tmp_path):
        root = layouts.covid_radiography(tmp_path, images=1) / "COVID-19_Radiography_Dataset"
        with pytest.raises(DataError, match=rf"did you mean .*, or the folder that holds all class folders, {root}\?"):
            read_manifest(root / "COVID" / "images")

    def test_parts_of_a_split_under_other_names(self, tmp_path):
        for part in ("training", "testing"):
            for name in ("NORMAL", "PNEUMONIA"):
                layouts.save(tmp_path / part / name / f"{part}-{name}.png", 0)
        with pytest.raises(
            DataError, match=r"whole data sets in 'testing', 'training'\n.*rename them train, val and test"
        ):
            read_manifest(tmp_path)

    def test_a_part_beside_the_split_that_is_not_read_is_told(self, tmp_path):
        for part in ("train", "testing", "other"):
            for name in ("NORMAL", "PNEUMONIA"):
                layouts.save(tmp_path / part / name / f"{part}-{name}.png", 0)
        (note,) = read_manifest(tmp_path).notes
        assert note.startswith("the folder 'testing' with 2 images is not used; rename it train, val or test")

    def test_two_data_sets_side_by_side(self, tmp_path):
        for hospital, names in (("berlin", ("Covid-19", "No_findings")), ("porto", ("covid-19", "Lung_Opacity"))):
            for name in names:
                layouts.save(tmp_path / hospital / name / f"{hospital}-{name}.png", 0)
        with pytest.raises(
            DataError, match=rf"sets in 'berlin', 'porto'\n.*did you mean {tmp_path}/berlin or .*/porto\?"
        ):
            read_manifest(tmp_path)

    @pytest.mark.parametrize(
        ("outer", "inner", "noted"),
        [
            (("sick", "well"), ("lateral", "PA"), True),
            (("COVID", "NORMAL"), ("lateral", "PA"), False),  # these are classes
            (("sick", "well"), ("1", "2"), False),  # persons
            (("sick", "well"), ("patient7", "patient8"), False),
        ],
    )
    def test_folders_in_classes_may_be_classes_views_or_persons(self, tmp_path, outer, inner, noted):
        for name in outer:
            for own in inner:
                layouts.save(tmp_path / name / own / f"{name}-{own}.png", 0)
        manifest = read_manifest(tmp_path)
        assert manifest.classes == outer
        told = "the classes 'sick' and 'well' both hold folders 'lateral', 'PA'; if these are the classes, name sick or"
        assert [note.startswith(told) for note in manifest.notes] == [True] * noted

    def test_one_above_a_single_data_set_is_entered_at_any_depth(self, tmp_path):
        layouts.nested(tmp_path / "downloads" / "archive", images=2)
        (tmp_path / "downloads" / "notes.txt").write_text("x")
        manifest = read_manifest(tmp_path)
        assert manifest.layout == "class folders with sub-folders in archive/ in downloads/"
        assert (manifest.root, manifest.ignored) == ((tmp_path / "downloads" / "archive").resolve(), 1)


class TestTables:
    def write(self, folder: Path, text: str) -> Path:
        for index in range(4):
            layouts.save(folder / f"{index}.png", index)
        (folder / "list.csv").write_text(text)
        return folder / "list.csv"

    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    def test_the_separator_is_found(self, tmp_path, separator):
        rows = ("Path ", "Class", " PATIENT"), ("0.png", "a", "p"), ("1.png", "b, or c", "q")
        lines = [separator.join(f'"{cell}"' if "," in cell else cell for cell in row) for row in rows]
        manifest = read_manifest(self.write(tmp_path, "\n".join(lines)))
        assert [(record.label, record.patient) for record in manifest.records] == [("a", "p"), ("b, or c", "q")]

    @pytest.mark.parametrize(("column", "meant"), [("patients", "patient"), ("Splits", "split")])
    def test_a_misspelt_column_that_would_spoil_the_split_is_refused(self, tmp_path, column, meant):
        file = self.write(tmp_path, f"path,label,{column}\n0.png,a,1\n1.png,b,2\n")
        with pytest.raises(DataError, match=f"a column '{column}'; did you mean '{meant}'"):
            read_manifest(file)

    def test_another_misspelt_column_is_a_note_and_unknown_ones_are_nothing(self, tmp_path):
        file = self.write(tmp_path, "path,label,masks,age\n0.png,a,1,2\n1.png,b,2,3\n")
        assert read_manifest(file).notes == ("the column 'masks' of list.csv is ignored; did you mean 'mask'?",)

    def test_a_misspelt_needed_column_is_named(self, tmp_path):
        with pytest.raises(DataError, match="did you mean 'label' by 'lable'"):
            read_manifest(self.write(tmp_path, "path,lable\n0.png,a\n"))

    def test_an_id_names_a_file_anywhere_below(self, tmp_path):
        layouts.save(tmp_path / "deep" / "er" / "9.png", 0)
        file = self.write(tmp_path, "image_id,label\n9,a\n1.png,b\n77,b\n")
        manifest = read_manifest(file)
        assert [(record.path, record.label) for record in manifest.records] == [("1.png", "b"), ("deep/er/9.png", "a")]
        assert [bad.path for bad in manifest.unreadable] == ["77"]
        assert manifest.ignored == 3

    def test_an_id_must_name_one_file_with_one_label(self, tmp_path):
        layouts.save(tmp_path / "again" / "1.png", 0)
        file = self.write(tmp_path, "id,label\n0,a\n0,a\n0,b\n1,b\n")
        with pytest.raises(DataError, match=r"line 4: '0\.png' again(.|\n)*line 5: '1' is the name of") as caught:
            read_manifest(file)
        assert "line 3" not in str(caught.value)

    @pytest.mark.parametrize("lost", [9, 16])
    def test_a_table_most_of_whose_files_are_missing_is_refused(self, tmp_path, lost):
        file = layouts.csv_file(tmp_path)
        for path in sorted((tmp_path / "files").iterdir())[:lost]:
            path.unlink()
        expected = (
            rf"{lost} of 16 are missing; the first is 'files/flu0\.png', not a file below {tmp_path}\n.*remedy: copy"
        )
        with pytest.raises(DataError, match=expected):
            read_manifest(file)

    def test_half_of_a_table_is_read(self, tmp_path):
        file = layouts.csv_file(tmp_path)
        for path in sorted((tmp_path / "files").iterdir())[4:12]:
            path.unlink()
        manifest = read_manifest(file)
        assert (len(manifest.records), len(manifest.unreadable)) == (8, 8)

    @pytest.mark.parametrize(("here", "goes"), [("below/files", "below"), ("../files", "..")])
    def test_a_table_in_the_wrong_folder_is_told_where_it_belongs(self, tmp_path, here, goes):
        root = tmp_path / "data"
        file = layouts.csv_file(root)
        (root / here).parent.mkdir(exist_ok=True)
        (root / "files").rename(root / here)
        with pytest.raises(DataError, match=rf"16 of 16 .*\n.*exists: move the CSV file to {(root / goes).resolve()};"):
            read_manifest(file)

    def test_files_that_lie_elsewhere_below_are_pointed_at(self, tmp_path):
        file = layouts.csv_file(tmp_path)
        (tmp_path / "files").rename(tmp_path / "pictures")
        with pytest.raises(DataError, match=rf"{tmp_path}/pictures/flu0\.png exists: paths must lead there"):
            read_manifest(file)

    def test_of_a_table_of_ids_people_may_have_a_part_of_the_images(self, tmp_path):
        file = self.write(tmp_path, "image_id,label\n0,a\n1,b\n77,b\n77,b\n78,a\n79,a\n")
        manifest = read_manifest(file)
        assert len(manifest.records) == 2
        assert {bad.path for bad in manifest.unreadable} == {"77", "78", "79"}

    def test_several_tables_in_a_folder_are_one_too_many(self, tmp_path):
        layouts.dicom(tmp_path, images=4)
        shutil.copy(tmp_path / "labels.csv", tmp_path / "more.csv")
        with pytest.raises(DataError, match=r"labels\.csv, more\.csv\n.*name the one to use"):
            read_manifest(tmp_path)
        assert len(read_manifest(tmp_path / "more.csv").records) == 4
