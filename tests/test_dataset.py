"""A data set is found in every layout, read once, and cut without shared patients."""

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_models import dataset
from cxr_models.dataset import DataError, Manifest, read_manifest
from cxr_models.patients import PATIENT_PATTERNS
from cxr_models.sizes import MAX_PIXELS
from cxr_models.splits import assign_splits, patients_on_two_sides, write_split_csv
from cxr_models.trial import TEST, TRAIN, VAL


def save_images(root: Path, *paths: str) -> None:
    """A different small grey image at each path."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shade = sum(os.fsencode(path)) % 256
        Image.fromarray(np.arange(shade, shade + 432).reshape(18, 24).astype(np.uint8)).save(root / path)


def paths_and_labels(manifest: Manifest) -> list[tuple[str, str]]:
    return [(record.path, record.label) for record in manifest.records]


# Layouts


def test_class_folders(tmp_path: Path) -> None:
    save_images(tmp_path, "b/1.png", "a/2.JPG", "a/1.jpeg", "a/3.bmp", "b/4.TIFF")
    manifest = read_manifest(tmp_path)
    assert manifest.layout == "class folders"
    assert manifest.root == tmp_path.resolve()
    assert paths_and_labels(manifest) == [
        ("a/1.jpeg", "a"),
        ("a/2.JPG", "a"),
        ("a/3.bmp", "a"),
        ("b/1.png", "b"),
        ("b/4.TIFF", "b"),
    ]
    assert manifest.classes == ("a", "b")
    assert manifest.labels.tolist() == [0, 0, 0, 1, 1]
    assert manifest.labels.dtype == np.int32
    assert {(r.width, r.height, r.mode, r.grey, r.mask, r.split) for r in manifest.records} == {
        (24, 18, "L", True, "", "")
    }


def test_masks_belong_to_the_image_of_the_same_name_and_are_no_images(tmp_path: Path) -> None:
    save_images(tmp_path, "a/images/1.png", "a/images/2.png", "a/masks/1.png", "a/masks/9.png", "b/images/1.png")
    save_images(tmp_path, "masks/1.png", "masks/images/1.png")
    manifest = read_manifest(tmp_path)
    assert manifest.layout == "class folders with images/"
    assert [(r.path, r.mask) for r in manifest.records] == [
        ("a/images/1.png", "a/masks/1.png"),
        ("a/images/2.png", ""),
        ("b/images/1.png", ""),
    ]
    assert manifest.classes == ("a", "b")


def test_split_folders_hold_either_kind_of_class_folder(tmp_path: Path) -> None:
    save_images(tmp_path, "train/a/1.png", "train/b/images/1.png", "train/b/masks/1.png", "Validation/a/2.png")
    save_images(tmp_path, "test/b/3.png", "chest_xray/train/a/1.png")
    manifest = read_manifest(tmp_path)
    assert manifest.layout == "train|val|test folders"
    assert [(r.path, r.label, r.split, r.mask) for r in manifest.records] == [
        ("Validation/a/2.png", "a", VAL, ""),
        ("test/b/3.png", "b", TEST, ""),
        ("train/a/1.png", "a", TRAIN, ""),
        ("train/b/images/1.png", "b", TRAIN, "train/b/masks/1.png"),
    ]
    assert manifest.ignored == 1


def test_hidden_and_other_files_are_ignored_and_counted(tmp_path: Path) -> None:
    save_images(tmp_path, "a/1.png", "b/1.png")
    save_images(tmp_path, "a/._1.png", ".cache/c/1.png", "__MACOSX/d/1.png", "e/f/g/1.png", "top.png")
    (tmp_path / "a" / "Thumbs.db").write_text("x")
    manifest = read_manifest(tmp_path)
    assert paths_and_labels(manifest) == [("a/1.png", "a"), ("b/1.png", "b"), ("e/f/g/1.png", "e")]
    assert manifest.ignored == 5


def test_a_link_back_up_ends(tmp_path: Path) -> None:
    save_images(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert len(read_manifest(tmp_path).records) == 2


def test_class_names_may_look_like_numbers(tmp_path: Path) -> None:
    save_images(tmp_path, "0/1.png", "1/1.png", "10/1.png")
    assert read_manifest(tmp_path).classes == ("0", "1", "10")


def test_csv(tmp_path: Path) -> None:
    home = tmp_path / "study"
    save_images(tmp_path, "study/x/1.png", "study/2.png", "study/m/1.png", "elsewhere/3.png")
    (home / "list.csv").write_text(
        "\ufeffLabel,path,comment,patient,source,split,mask\n"
        "a,x/1.png,hm,P1,Hospital,valid,m/1.png\n"
        "b,./2.png,,,,,m/none.png\n"
        "b,../elsewhere/3.png\n"
        "a,gone.png\n",
        encoding="utf-8",
    )
    manifest = read_manifest(home / "list.csv", patient=r"(\d)")
    outside = (tmp_path / "elsewhere/3.png").resolve().as_posix()
    assert manifest.layout == "CSV"
    assert [(r.path, r.label, r.patient, r.source, r.split, r.mask) for r in manifest.records] == [
        (outside, "b", "3", "", "", ""),
        ("2.png", "b", "2", "", "", ""),
        ("x/1.png", "a", "P1", "Hospital", VAL, "m/1.png"),
    ]
    assert [(file.path, file.reason) for file in manifest.unreadable] == [
        ("gone.png", "No such file or directory"),
        ("m/none.png", "the mask is missing"),
    ]


# Patients


@pytest.mark.parametrize(
    ("pattern", "name", "patient"),
    [
        ("nih", "00001582_021.png", "00001582"),
        ("nih", "covid-3.png", None),
        ("kermany", "person10_bacteria_43.jpeg", "person10_bacteria"),
        ("kermany", "person10_virus_35.jpeg", "person10_virus"),
        ("kermany", "IM-0429-0001-0001.jpeg", "IM-0429"),
        ("kermany", "NORMAL2-IM-0246-0001-0002.jpeg", "NORMAL2-IM-0246"),
        ("kermany", "NORMAL2-IM-0246-0001.jpeg", "NORMAL2-IM-0246"),
        ("kermany", "x-IM-0246-0001.jpeg", None),
        (r"(?P<site>\w+?)-(?P<n>\d+)", "berlin-17-2.png", "berlin_17"),
        (r"\d+", "123-4.png", "123"),
        (r"[a-z]*", "123-4.png", None),
        (r"(\d+)|x", "x.png", None),
        ("", "123-4.png", None),
        ("", "00001582_021.png", "00001582"),  # built-in patterns are tried by themselves
        ("", "person10_virus_35.jpeg", "person10_virus"),
        ("", "20200101_12.png", None),  # a date is no NIH patient
        ("none", "00001582_021.png", None),
        ("montgomery", "MCUCXR_0001_0.png", "MCUCXR_0001"),
        ("shenzhen", "CHNCXR_0327_1.png", "CHNCXR_0327"),
        ("montgomery", "CHNCXR_0327_1.png", None),
        ("shenzhen", "CHNCXR_0327_1_mask.png", None),
        ("", "MCUCXR_0399_1.png", "MCUCXR_0399"),
        ("", "CHNCXR_0001_0.png", "CHNCXR_0001"),
        ("", "XMCUCXR_0399_1.png", None),
        ("chexpert", "patient00007/study1/view1_frontal.jpg", "patient00007"),
        ("", "patient00007/study2/view2_lateral.jpg", "patient00007"),
        ("", "patient00007_study2_view2_lateral.jpg", "patient00007"),
        ("", "patient7/study2/view2_lateral.jpg", None),
        ("", "study2/view2_lateral.jpg", None),
        ("none", "patient00007/study1/view1_frontal.jpg", None),
    ],
)
def test_patient_of_a_file_name(tmp_path: Path, pattern: str, name: str, patient: str | None) -> None:
    save_images(tmp_path, f"a/{name}", f"b/other.{name}")
    record = read_manifest(tmp_path, patient=pattern).records[0]
    assert record.patient == (f"a/{name}" if patient is None else patient)


def test_a_patient_may_have_images_in_two_classes(tmp_path: Path) -> None:
    save_images(tmp_path, "a/00000001_000.png", "b/00000001_001.png", "b/covid.png", "a/covid.png")
    manifest = read_manifest(tmp_path, patient="nih")
    assert manifest.patients == 3
    assert len({record.patient for record in manifest.records if "0001_" in record.path}) == 1


# Files that cannot be read


def test_unreadable_files_are_named_with_a_reason_and_left_out(tmp_path: Path) -> None:
    save_images(tmp_path, "a/good.png", "b/good.png", "a/cut.png", "b/float.tif")
    whole = (tmp_path / "a/cut.png").read_bytes()
    (tmp_path / "a/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a/empty.png").touch()
    (tmp_path / "a/text.jpg").write_text("not an image")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "b/float.tif")
    Image.new("1", (MAX_PIXELS // 10_000 + 1, 10_000)).save(tmp_path / "b/bomb.png")
    manifest = read_manifest(tmp_path)
    assert [record.path for record in manifest.records] == ["a/good.png", "b/good.png"]
    reasons = {file.path: file.reason for file in manifest.unreadable}
    assert list(reasons) == ["a/cut.png", "a/empty.png", "a/text.jpg", "b/bomb.png", "b/float.tif"]
    assert reasons["a/cut.png"]
    assert "empty" in reasons["a/empty.png"]
    assert "no picture" in reasons["a/text.jpg"]
    assert "10001 x 10000 pixels, more than 100 megapixels" in reasons["b/bomb.png"]
    assert "mode F" in reasons["b/float.tif"]


# The cache


def test_a_second_call_reads_nothing_and_a_change_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    save_images(data, "a/1_x.png", "a/1_y.png", "b/2.png", "b/3.png")
    read: list[str] = []
    examine = dataset.examine
    monkeypatch.setattr(dataset, "examine", lambda path: (read.append(path.name), examine(path))[1])

    first = read_manifest(data, cache_dir=cache)
    assert sorted(read) == ["1_x.png", "1_y.png", "2.png", "3.png"]
    read.clear()
    assert read_manifest(data, cache_dir=cache) == first
    assert read_manifest(data, cache_dir=cache, patient=r"(\d)").patients == 3
    assert read == []

    save_images(data, "a/new.png")
    (data / "b/3.png").unlink()
    Image.new("RGB", (18, 18), "red").save(data / "b/2.png")
    changed = read_manifest(data, cache_dir=cache)
    assert sorted(read) == ["2.png", "new.png"]
    assert [record.path for record in changed.records] == ["a/1_x.png", "a/1_y.png", "a/new.png", "b/2.png"]
    assert not changed.grey
    assert changed.digest != first.digest


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"a/1.png": 3}', b'{"a/1.png": [1, 2, "x"]}'])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    save_images(tmp_path / "data", "a/1.png", "b/2.png")
    first = read_manifest(tmp_path / "data", cache_dir=tmp_path)
    (cache,) = (tmp_path / "manifests").iterdir()
    good = cache.read_bytes()
    cache.write_bytes(damage)
    assert read_manifest(tmp_path / "data", cache_dir=tmp_path) == first
    assert cache.read_bytes() == good


def test_a_mended_file_is_read_although_its_stamp_is_the_same(tmp_path: Path) -> None:
    save_images(tmp_path / "data", "a/1.png", "b/2.png", "b/3.png")
    mended = tmp_path / "data/b/3.png"
    good, stamp = mended.read_bytes(), mended.stat()
    mended.write_bytes(b"\0" * len(good))
    os.utime(mended, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert len(read_manifest(tmp_path / "data", cache_dir=tmp_path).unreadable) == 1
    mended.write_bytes(good)
    os.utime(mended, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert read_manifest(tmp_path / "data", cache_dir=tmp_path).unreadable == ()


def test_progress_counts_the_files_read(tmp_path: Path) -> None:
    save_images(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    calls: list[tuple[int, int]] = []
    read_manifest(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_digest_depends_on_what_the_data_say_and_not_on_where_they_lie(tmp_path: Path) -> None:
    for root in ("one", "two"):
        save_images(tmp_path / root, "a/1_x.png", "b/1_y.png")
    one, two = read_manifest(tmp_path / "one"), read_manifest(tmp_path / "two")
    assert one.digest == two.digest
    assert one.digest != read_manifest(tmp_path / "one", patient=r"(\d)").digest
    (tmp_path / "two/b").rename(tmp_path / "two/c")
    assert one.digest != read_manifest(tmp_path / "two").digest


# Mistakes


def test_mistakes_in_a_folder_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a folder of X-rays or a CSV file\n  found: nothing at '/.*nowhere'"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found: no images, 0 other files"):
        read_manifest(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="found: no images, 1 other files"):
        read_manifest(tmp_path)
    save_images(tmp_path, "images/1.png", "images/2.png", "0.png")
    with pytest.raises(DataError, match=r"3 images but no class folders; the first image is '0\.png'"):
        read_manifest(tmp_path)
    save_images(tmp_path, "flu/1.png")
    with pytest.raises(DataError, match=r"at least two classes .*\n.*only one class, 'flu', with 1 images"):
        read_manifest(tmp_path)
    (tmp_path / "healthy").mkdir()
    (tmp_path / "healthy" / "1.png").touch()
    with pytest.raises(DataError, match=r"1 unreadable files:\n    'healthy/1\.png': the file is empty"):
        read_manifest(tmp_path)
    (tmp_path / "flu" / "1.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"2 files, none of them readable:\n    'flu/1\.png': no picture"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\n1.png,a\n", r"header path,label.*\n.*beginning with 'file,class'"),
        ("", "header path,label"),
        ("path,label\n", "no lines below the header"),
        ("path,label,split\n1.png,a,train\n2.png,b,dev\n", "line 3: split 'dev'; it must be train, val, test"),
        ("path,label\n1.png,a\n2.png\n", "line 3: path '2.png' with label ''"),
        ("path,label\n1.png,a\n./1.png,b\n", "line 3: '1.png' again"),
        ("path,label\n" + "1.png,\n" * 8, "line 6: .*\n    and 3 more"),
    ],
)
def test_mistakes_in_a_csv_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path / "list.csv")


def test_a_file_that_is_no_csv_is_refused(tmp_path: Path) -> None:
    save_images(tmp_path, "1.png")
    with pytest.raises(DataError, match=r"a folder, or a \.csv file"):
        read_manifest(tmp_path / "1.png")


def test_a_bad_pattern_says_where(tmp_path: Path) -> None:
    save_images(tmp_path, "a/1.png", "b/1.png")
    names = ", ".join((*PATIENT_PATTERNS, "none"))
    with pytest.raises(DataError, match=rf"one of {names} or .*\n.*unterminated subpattern at position 3"):
        read_manifest(tmp_path, patient=r"^\d(x")


def test_odd_file_names_survive_the_split_file(tmp_path: Path) -> None:
    names = ["plain", "comma, space", 'quo"te', "new\nline", "re\rturn", " lead", "über", os.fsdecode(b"latin-\xfc")]
    save_images(tmp_path, *(f"{label}/{name}.png" for label in ("a,b", "c") for name in names))
    cache = tmp_path / ".cache"
    manifest = read_manifest(tmp_path)
    assert read_manifest(tmp_path, cache_dir=cache) == manifest
    assert read_manifest(tmp_path, cache_dir=cache).records == manifest.records
    splits = assign_splits(manifest, seed=0)
    write_split_csv(tmp_path / "split.csv", manifest, splits)
    with (tmp_path / "split.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "label", "patient", "split", "pixels"]
    assert [tuple(row) for row in rows[1:]] == [
        (record.path, record.label, record.patient, part, record.pixels)
        for record, part in zip(manifest.records, splits, strict=True)
    ]
    again = read_manifest(tmp_path / "split.csv")
    assert assign_splits(again, seed=99) == splits


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, cxr_models.pixels; print(*{'sklearn', 'scipy', 'pandas', 'keras', 'tensorflow'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.real
@pytest.mark.skipif("CXR_REAL_DATA" not in os.environ, reason="CXR_REAL_DATA is not set")
def test_real_x_rays() -> None:
    manifest = read_manifest(Path(os.environ["CXR_REAL_DATA"]) / "data" / "cxr3", patient="nih")
    assert (len(manifest.records), manifest.patients, manifest.unreadable) == (1124, 806, ())
    assert manifest.classes == ("Covid-19", "No_findings", "Pneumonia")
    classes_of: dict[str, set[str]] = {}
    for record in manifest.records:
        classes_of.setdefault(record.patient, set()).add(record.label)
    assert Counter(map(len, classes_of.values())) == {1: 785, 2: 21}
    splits = assign_splits(manifest, seed=0)
    assert patients_on_two_sides(manifest, splits) == ()
    assert Counter(splits)[TRAIN] / 1124 == pytest.approx(0.70, abs=0.02)
