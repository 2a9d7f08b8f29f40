"""What was found by breaking inputs, each case for good: search spaces, images and tables that must be told of."""

import io
import os
import random
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # programs, not a package

from broken_images import _deflate_bomb, _dicom, _sheet, _text_bomb, _with_part, pictures, png_chunk
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from cxr_models.dataset import DataError, read_manifest
from cxr_models.dicom import _grey_picture, _shades
from cxr_models.images import Fault, Flaw, examine, read_picture
from cxr_models.pixels import decode, mask_array
from cxr_models.sizes import MAX_FILE_BYTES
from cxr_models.tables import read_sources
from sweep.document import SHOWN_PROBLEMS, SpecError
from sweep.spec import checked_name, read_spec

SMALL = (
    "name: small\ndata: phantom\nobjective: accuracy\nsearch: {trials: 2}\n"
    "space:\n  backbone: vanilla_cnn\n  image_side: 96\n"
)


@pytest.fixture
def problems(tmp_path):
    def read(text: str, *settings: str) -> str:
        file = tmp_path / "space.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        begun = time.perf_counter()
        with pytest.raises(SpecError) as refused:
            read_spec(file, settings)
        assert time.perf_counter() - begun < 5.0
        assert str(refused.value).startswith(str(file))
        assert all(letter.isprintable() for letter in str(refused.value).replace("\n", ""))
        return str(refused.value)

    return read


class TestSearchSpaces:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (SMALL + 'x: "\\UFFFFFFFF"\n', "line 8: no YAML: "),
            (SMALL + 'x: "\\U00110000"\n', "line 8: no YAML: chr() arg not in range"),
            ("%YAML 1." + "9" * 5000 + "\n---\n" + SMALL, "line 1: no YAML: Exceeds the limit"),
            (SMALL + "x: a\x00b\n", "line 8: the character U+0000 is not allowed"),
            (SMALL + "\x1b[2J: 1\n", "line 8: the character U+001B is not allowed"),
            (SMALL + '"\\e[2J": 1\n', r"line 8, \x1b[2J: unknown key"),
            (SMALL + '"\\ud800": 1\n', r"line 8, \ud800: unknown key"),
            (SMALL + f"{'k' * 900}: 1\n", f"line 8, {'k' * 77}...: unknown key"),
            (SMALL.replace("small", "n" * 101), "beginning with a letter or digit, 100 at most"),
            (SMALL.replace("small", '"small\\n"'), r"got 'small\n'"),
            (SMALL.replace("trials: 2", "trials: 1000000000"), "expected at most 100000"),
            (SMALL + "  dropout: {low: 0, high: 0.5, step: .inf}\n", "space.dropout: expected finite numbers"),
            (SMALL + "  epochs: {low: 1, high: 900000000}\n", "more than 100,000 combinations of backbone, "),
            (SMALL + "  epochs: {value: 1, when: [" + "1," * 1001 + "]}\n", "expected at most 1,000 cases, got 1,001"),
            (SMALL.replace("phantom", "{source: x, patient: 'a{99999999999999999999}'}"), "the repetition number"),
            (SMALL.replace("phantom", f"{{source: x, patient: {'(' * 480 + ')' * 480}}}"), "maximum recursion depth"),
            (SMALL.replace("phantom", f"{{source: x, patient: {'a' * 1001}}}"), "more than 1,000 characters"),
        ],
        ids=range(17),
    )  # fmt: skip
    def test_a_mistake_is_told_with_its_place(self, problems, text, message):
        assert message in problems(text)

    def test_of_thousands_of_problems_the_first_are_shown(self, problems):
        said = problems(SMALL + "".join(f"k{index}: 1\n" for index in range(3000)))
        assert len(said.splitlines()) == 2 + SHOWN_PROBLEMS
        assert said.splitlines()[0].endswith("has 3000 problems:")
        assert said.endswith("and 2,950 more")

    def test_a_terminal_obeys_no_argument(self, problems):
        assert r"--set batch_norm=\x1b[2J" in problems(SMALL, "batch_norm=\x1b[2J")

    def test_conditions_in_a_chain_do_not_double_the_work_at_every_link(self, tmp_path):
        """Twenty axes, each looking at two before it, and a fixed point that asks for the last one's domain."""
        names = ("dropout", "weight_decay", "label_smoothing", "probe_share", "layer_decay", "warmup", "patience",
                 "batch_size", "focal_gamma", "augmentation_strength", "augmented_views", "learning_rate")  # fmt: skip
        lines = [f"  {names[0]}: [0.1, 0.2]", f"  {names[1]}: [0.1, 0.2]"]
        text = SMALL.replace("trials: 2", "trials: 2, fixed: [{learning_rate: 0.1}]")
        whole = {"patience", "batch_size", "augmented_views"}
        values = {name: ("1", "2") if name in whole else ("0.1", "0.2") for name in names}
        for index in range(2, len(names)):
            one, two = names[index - 2], names[index - 1]
            first, second = values[names[index]]
            cases = f"{{if: {{{one}: {values[one][0]}, {two}: {values[two][0]}}}, value: {first}}}, " * 5
            lines.append(f"  {names[index]}: {{choices: [{first}, {second}], when: [{cases}]}}")
        (tmp_path / "space.yaml").write_text(text + "\n".join(lines) + "\n")
        begun = time.perf_counter()
        read_spec(tmp_path / "space.yaml")
        assert time.perf_counter() - begun < 5.0

    def test_a_pattern_of_a_future_python_says_nothing_on_the_terminal(self, tmp_path, recwarn):
        (tmp_path / "space.yaml").write_text(SMALL.replace("phantom", "{source: x, patient: '[[a]b]'}"))
        read_spec(tmp_path / "space.yaml")
        assert not recwarn.list

    @pytest.mark.parametrize(
        ("path", "message"), [("/", "is a folder"), (".", "is a folder"), ("a" * 300, "File name too long")]
    )
    def test_what_is_no_file(self, path, message):
        with pytest.raises(SpecError, match=message):
            read_spec(Path(path))

    @pytest.mark.parametrize("name", ["a\n", "a/b", "..", "-a", "", "a" * 101, "a\0"])
    def test_a_name_is_one_folder(self, name):
        with pytest.raises(SpecError, match="expected letters"):
            checked_name(name)


@pytest.fixture
def sound(tmp_path) -> Path:
    """Two classes of two images."""
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"{name}.png").write_bytes(pictures()["png.png"] + name.encode())
    return tmp_path / "data"


class TestImages:
    @pytest.mark.parametrize("kind", ["a pipe", "a device", "a circle of links", "a folder", "too large"])
    def test_what_is_no_file_is_left_out_and_not_waited_for(self, sound, kind):
        file = sound / "a" / "odd.png"
        if kind == "a pipe":
            os.mkfifo(file)
        elif kind == "a device":
            file.symlink_to("/dev/zero")
        elif kind == "a circle of links":
            file.symlink_to(file)
        elif kind == "a folder":
            file.symlink_to(sound / "b" / "2.png" / "x")
        else:
            with file.open("wb") as sparse:
                sparse.truncate(MAX_FILE_BYTES + 1)
        manifest = read_manifest(sound)
        assert len(manifest.records) == 4
        ((path, reason, _),) = [(one.path, one.reason, one.flaw) for one in manifest.unreadable]
        assert path == "a/odd.png"
        assert reason

    def test_a_bomb_of_30_000_by_30_000_is_never_unpacked(self, tmp_path):
        header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 9_000_000)), (b"IEND", b""))
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts))
        found = examine(tmp_path / "bomb.png")
        assert found == Fault(Flaw.SIZE, "more than 100 megapixels")
        with pytest.raises(ValueError, match="more than 100 megapixels"):
            read_picture(tmp_path / "bomb.png")

    def test_a_deflated_file_of_gigabytes_is_never_inflated(self, tmp_path):
        (tmp_path / "bomb.dcm").write_bytes(_deflate_bomb(random.Random(0), b""))
        found = examine(tmp_path / "bomb.dcm")
        assert found == Fault(Flaw.SIZE, "a deflated DICOM file of more than 1,000,000,000 bytes")

    @pytest.mark.parametrize("stored", [np.uint8, np.int16, np.uint16, np.int32])
    @pytest.mark.parametrize(
        "tags",
        [
            {},
            {"WindowCenter": 80, "WindowWidth": 100},
            {"RescaleSlope": "0.7", "RescaleIntercept": "-300"},
            {"PixelPaddingValue": 3},
        ],
    )
    def test_shades_by_stored_value_are_those_of_every_pixel(self, stored, tags):
        """What a large picture is spared changes no pixel of any."""
        values = np.random.default_rng(0).integers(0, 99, (40, 30)).astype(stored)
        values = values - 40 if np.issubdtype(stored, np.signedinteger) else values
        dataset = Dataset()
        for name, value in tags.items():
            dataset[name] = DataElement(name, {"PixelPaddingValue": "US"}.get(name, "DS"), value)
        for inverted in (False, True):
            picture = np.asarray(_grey_picture(values, dataset, inverted=inverted))
            assert (picture == _shades(values, dataset, inverted=inverted)).all()

    def test_text_that_unpacks_to_megabytes_is_refused(self, tmp_path):
        found = {examine_text(tmp_path, seed) for seed in range(6)}
        assert "ValueError" in " ".join(found) or "Decompressed data too large" in " ".join(found)

    @pytest.mark.parametrize(
        "tags",
        [
            {"WindowCenter": 80, "WindowWidth": 0, "VOILUTFunction": "LINEAR_EXACT"},
            {"WindowCenter": 80, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
            {"RescaleSlope": "1e308", "RescaleIntercept": "0"},
        ],
    )
    def test_a_window_that_is_none_says_nothing_on_the_terminal(self, tmp_path, tags, recwarn):
        values = np.arange(48 * 48).reshape(48, 48) % 200
        (tmp_path / "x.dcm").write_bytes(_dicom(values, ExplicitVRLittleEndian, **tags))
        found = examine(tmp_path / "x.dcm")
        assert not [one for one in recwarn.list if "cxr_models" in one.filename]
        assert not isinstance(found, Fault) or "no numbers" in found.reason

    @pytest.mark.filterwarnings("ignore:::PIL", "ignore:::pydicom")
    @pytest.mark.parametrize("name", sorted(pictures()))
    def test_every_kind_cut_anywhere_raises_what_is_caught(self, tmp_path, name):
        """`read_picture` raises OSError or ValueError and nothing else: callers count on it."""
        data = pictures()[name]
        file = tmp_path / f"x{Path(name).suffix}"
        for share in (0.02, 0.1, 0.3, 0.6, 0.9):
            file.write_bytes(data[: int(share * len(data))])
            try:
                assert decode(file, 16, 1).shape == (16, 16, 1)
            except (OSError, ValueError) as error:
                assert str(error)  # noqa: PT017 - either is right

    def test_a_broken_mask_is_named(self, sound, tmp_path):
        whole = pictures()["png.png"]
        broken = whole[:8] + png_chunk(b"IHDR", b"\0" * 5) + whole[33:]
        for name in ("images", "masks"):
            (tmp_path / "set" / "a" / name).mkdir(parents=True)
            (tmp_path / "set" / "a" / name / "1.png").write_bytes(whole if name == "images" else broken)
        manifest = read_manifest(tmp_path / "set", least_classes=1)
        with pytest.raises(DataError, match=r"expected a lung mask in '.*masks/1\.png'"):
            mask_array(manifest, 16, tmp_path / "cache")

    def test_libtiff_prints_nothing(self, tmp_path):
        """In a process of its own: it prints from C."""
        whole = pictures()["g4.tif"]
        for label in "ab":
            (tmp_path / label).mkdir()
            for index in range(20):
                changed = bytearray(whole)
                changed[8 + 3 * index] ^= 0xFF
                (tmp_path / label / f"{index}.tif").write_bytes(bytes(changed))
        read = (
            f"from cxr_models.dataset import read_manifest as r; from pathlib import Path; r(Path({str(tmp_path)!r}))"
        )
        child = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
        assert child.stderr == child.stdout == ""

    def test_names_may_be_anything(self, sound):
        odd = ["with space", "new\nline", os.fsdecode(b"latin-\xfc"), "'; rm -rf", "é" * 60, "\x1b[2J"]
        for name in odd:
            (sound / "a" / f"{name}.png").write_bytes(pictures()["png.png"])
            (sound / "b" / f"{name}.png").write_bytes(b"broken")
        manifest = read_manifest(sound)
        assert {record.path for record in manifest.records} >= {f"a/{name}.png" for name in odd}
        assert {file.path for file in manifest.unreadable} == {f"b/{name}.png" for name in odd}

    @pytest.mark.parametrize("source", ["~nobody-such/x", "a\0b", "x" * 300, "loop", "pipe"])
    def test_a_source_that_is_no_place(self, tmp_path, source):
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(DataError, match="remedy: check the path"):
            read_manifest(Path(source) if source[0] == "~" else tmp_path / source)


def examine_text(folder: Path, seed: int) -> str:
    (folder / "text.png").write_bytes(_text_bomb(random.Random(seed), b""))
    found = examine(folder / "text.png")
    return found.reason if isinstance(found, Fault) else "accepted"


class TestTables:
    @pytest.mark.parametrize(
        "line", ["a\0b.png,a", "x" * 5000 + ",a", "a/1.png,b,,,,\0", "/dev/zero,a", "~/none.png,b"]
    )
    def test_a_line_that_names_no_file_is_left_out(self, sound, line):
        rows = "".join(f"{label}/{index}.png,{label}\n" for label in "ab" for index in (2,)) + "a/1.png,a\n"
        rows = rows if "a/1.png" not in line else rows.replace("a/1.png,a\n", "")
        (sound / "list.csv").write_text(f"path,label,patient,source,split,mask\n{rows}{line}\n")
        manifest = read_manifest(sound / "list.csv")
        assert len(manifest.unreadable) == 1
        assert len(manifest.records) == 3

    def test_a_header_without_end_is_refused(self, tmp_path):
        (tmp_path / "list.csv").write_text("path," * 2_000_000)
        with pytest.raises(DataError, match=r"list\.csv"):
            read_manifest(tmp_path / "list.csv")

    @pytest.mark.parametrize(
        ("part", "old", "new", "message"),
        [
            ("xl/worksheets/sheet1.xml", b"A1:D6", b"A1:XFD1048576", ""),
            ("xl/worksheets/sheet1.xml", b'<row r="6"', b'<row r="1048576"', ""),
            (
                "xl/worksheets/sheet1.xml",
                b"</worksheet>",
                b"</worksheet>" + b" " * 110_000_000,
                "bytes unpacked; expected",
            ),
            ("xl/workbook.xml", b"<workbook", b"<work", "cannot be read"),
        ],
    )
    def test_a_spreadsheet_takes_no_more_than_it_may(self, tmp_path, part, old, new, message):
        file = tmp_path / "a.metadata.xlsx"
        data = _with_part(_sheet(), part, lambda text: text.replace(old, new))
        if b"1048576" in new:
            assert new in zipped(data, part)
        file.write_bytes(data)
        begun = time.perf_counter()
        try:
            assert read_sources(file)
            assert not message
        except ValueError as error:
            assert message
            assert message in str(error)  # noqa: PT017
        assert time.perf_counter() - begun < 5.0


def zipped(data: bytes, part: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(part)


def test_a_whole_spreadsheet_is_read(tmp_path):
    (tmp_path / "a.metadata.xlsx").write_bytes(_sheet())
    assert len(read_sources(tmp_path / "a.metadata.xlsx")) == 5
    assert openpyxl.load_workbook(tmp_path / "a.metadata.xlsx")
    assert Image.open(io.BytesIO(pictures()["adam7.png"])).info.get("interlace") == 1
