"""A DICOM file is shown as a viewer shows it, whatever its bits and its way round."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEGLSLossless

from cxr_models.dataset import DataError, read_manifest
from cxr_models.images import Flaw, examine, read_picture
from cxr_models.pixels import decode
from cxr_models.splits import assign_splits
from tests import layouts


def picture(path: Path) -> np.ndarray:
    return np.asarray(read_picture(path)).astype(int)


@pytest.fixture
def values() -> np.ndarray:
    """A picture that spans the whole range."""
    found = layouts.xray("chest", 1)
    return (found - found.min()) / (found.max() - found.min())


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_monochrome_1_is_monochrome_2_inverted(tmp_path, values, bits, window):
    for way in (1, 2):
        layouts.save_dicom(tmp_path / f"{way}.dcm", values, bits=bits, meaning=f"MONOCHROME{way}", window=window)
    one, two = picture(tmp_path / "1.dcm"), picture(tmp_path / "2.dcm")
    assert np.abs(one - two).max() <= 1
    bright, dark = values > 0.8, values < 0.2
    assert one[bright].min() > one[dark].max()


@pytest.mark.parametrize("window", [False, True])
def test_the_same_picture_in_8_12_and_16_bits_is_the_same(tmp_path, values, window):
    for bits in (8, 12, 16):
        layouts.save_dicom(tmp_path / f"{bits}.dcm", values, bits=bits, window=window)
    eight, twelve, sixteen = (picture(tmp_path / f"{bits}.dcm") for bits in (8, 12, 16))
    assert np.abs(twelve - sixteen).max() <= 1
    assert np.abs(eight - sixteen).max() <= 2  # half a step of the coarser one, doubled by the window


def test_a_window_cuts_what_lies_outside_and_spreads_the_rest(tmp_path, values):
    layouts.save_dicom(tmp_path / "x.dcm", values, window=True)
    expected = np.clip((values - 0.25) / 0.5, 0, 1) * 255
    assert np.abs(picture(tmp_path / "x.dcm") - expected).max() <= 1


def test_without_a_window_the_values_span_the_picture(tmp_path, values):
    layouts.save_dicom(tmp_path / "x.dcm", 0.2 + values * 0.1, bits=16)
    assert np.abs(picture(tmp_path / "x.dcm") - values * 255).max() <= 1


def test_a_lookup_table_and_a_rescaling_come_first(tmp_path, values):
    layouts.save_dicom(tmp_path / "x.dcm", values, bits=8)
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -100
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = 155, 510, "LINEAR_EXACT"
    dataset.save_as(tmp_path / "rescaled.dcm")
    assert np.abs(picture(tmp_path / "rescaled.dcm") - values * 255).max() <= 1
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [256, 0, 16])
    table.add_new("LUTData", "US", [(255 - value) * 257 for value in range(256)])
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.VOILUTSequence = 1, 0, [table]
    dataset.save_as(tmp_path / "table.dcm")
    assert np.abs(picture(tmp_path / "table.dcm") - (1 - values) * 255).max() <= 1


def test_facts_tell_mode_and_patient(tmp_path, values):
    layouts.save_dicom(tmp_path / "no suffix", values, meaning="MONOCHROME1", patient=" P7 ")
    facts = examine(tmp_path / "no suffix")
    assert (facts.mode, facts.patient, facts.width, facts.grey) == ("MONOCHROME1/12", "P7", layouts.SIDE, True)
    assert facts.format == "DICOM"
    assert decode(tmp_path / "no suffix", 16, 3).shape == (16, 16, 3)


def test_a_flat_picture_is_black(tmp_path):
    layouts.save_dicom(tmp_path / "x.dcm", np.full((8, 8), 0.5))
    assert (picture(tmp_path / "x.dcm") == 0).all()


def change(path: Path, **tags: object) -> Path:
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelData": None}, "a DICOM file without pixels"),
        ({"NumberOfFrames": 4}, "a DICOM file of 4 frames; expected one"),
        ({"Rows": 60_000, "Columns": 60_000}, "60000 x 60000 pixels, more than 100 megapixels"),
    ],
)
def test_what_is_no_single_picture_says_why(tmp_path, values, tags, reason):
    layouts.save_dicom(tmp_path / "x.dcm", values)
    assert reason in str(examine(change(tmp_path / "x.dcm", **tags)))


def test_a_transfer_syntax_without_a_decoder_says_which(tmp_path, values):
    layouts.save_dicom(tmp_path / "x.dcm", values)
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.save_as(tmp_path / "x.dcm")
    assert "cannot be decompressed (JPEG-LS Lossless Image Compression)" in str(examine(tmp_path / "x.dcm"))


def test_a_file_cut_short_is_unreadable(tmp_path, values):
    layouts.save_dicom(tmp_path / "x.dcm", values)
    whole = (tmp_path / "x.dcm").read_bytes()
    (tmp_path / "x.dcm").write_bytes(whole[: len(whole) // 2])
    assert examine(tmp_path / "x.dcm").flaw is Flaw.TRUNCATED
    (tmp_path / "x.dcm").write_bytes(b"no picture")
    assert "DICOM" in str(examine(tmp_path / "x.dcm"))


class TestPatients:
    def test_the_tag_is_the_patient_also_from_the_cache(self, tmp_path):
        layouts.dicom(tmp_path / "data")
        first = read_manifest(tmp_path / "data", cache_dir=tmp_path / "cache")
        assert {record.patient for record in first.records} == {f"P{index:03}" for index in range(6)}
        assert read_manifest(tmp_path / "data", cache_dir=tmp_path / "cache") == first

    def test_a_pattern_goes_before_the_tag_and_none_ignores_it(self, tmp_path, values):
        for label in ("a", "b"):
            layouts.save_dicom(tmp_path / label / f"{label}7_1.dcm", values, patient="anonymous")
        assert read_manifest(tmp_path).patients == 1
        with pytest.raises(DataError, match=r"all images have one patient: data\.patient: none ignores it"):
            assign_splits(read_manifest(tmp_path), seed=0)
        assert {record.patient for record in read_manifest(tmp_path, patient=r"(\w\d)_").records} == {"a7", "b7"}
        assert read_manifest(tmp_path, patient="none").patients == 2

    def test_a_table_goes_before_the_tag(self, tmp_path, values):
        for name in ("1", "2"):
            layouts.save_dicom(tmp_path / f"{name}.dcm", values, patient="tag")
        (tmp_path / "list.csv").write_text("path,label,patient\n1.dcm,a,given\n2.dcm,b,\n")
        assert [record.patient for record in read_manifest(tmp_path / "list.csv").records] == ["given", "tag"]
