"""Every kind of image file decodes to the picture people see, and each is decoded once."""

import errno
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cxr_models import pixels
from cxr_models.dataset import DataError, read_manifest
from cxr_models.pixels import decode, mask_array, pixel_array
from cxr_models.storage import NoSpace
from tests.damages import DAMAGES

# Smooth, of all grey values, and different in every orientation.
PICTURE = np.add.outer(np.linspace(0, 155, 40), np.linspace(0, 100, 60)).round().astype(np.uint8)
GREY = Image.fromarray(PICTURE)
ORIENTATION = 0x0112


def with_alpha(mode: str) -> Image.Image:
    image = GREY.convert(mode)
    image.putalpha(Image.fromarray(np.tile(np.arange(60, dtype=np.uint8), (40, 1))))
    return image


SAME_PICTURE = {
    "rgb.png": GREY.convert("RGB"),
    "rgba.png": with_alpha("RGBA"),
    "la.png": with_alpha("LA"),
    "palette.png": GREY.convert("P"),
    "cmyk.tif": GREY.convert("CMYK"),
    "sixteen.png": Image.fromarray(PICTURE.astype(np.uint16) * 257),
    "sixteen.tif": Image.fromarray(PICTURE.astype(np.uint16) * 257),
    "twelve.png": Image.fromarray((PICTURE * (4095 / 255)).round().astype(np.uint16)),
    "eight_in_sixteen.png": Image.fromarray(PICTURE.astype(np.uint16)),
    "thirty_two.tif": Image.fromarray(PICTURE.astype(np.int32) * 257),
}


@pytest.fixture
def grey(tmp_path: Path) -> NDArray[np.uint8]:
    GREY.save(tmp_path / "grey.png")
    return decode(tmp_path / "grey.png", 24, 1)


@pytest.mark.parametrize("name", SAME_PICTURE)
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_give_the_same_picture(tmp_path: Path, grey: NDArray[np.uint8], name: str, channels: int) -> None:
    SAME_PICTURE[name].save(tmp_path / name)
    pixels = decode(tmp_path / name, 24, channels)
    assert pixels.shape == (24, 24, channels)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(grey, pixels.shape), atol=1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_colours_are_kept_and_transparency_is_not_blended(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (9, 9), (210, 30, 60))
    if mode == "P":
        image.quantize(4).save(tmp_path / "x.png", transparency=bytes(4))
    elif mode == "RGBA":
        image.putalpha(0)
        image.save(tmp_path / "x.png")
    else:
        image.convert(mode).save(tmp_path / "x.tif")
    (path,) = tmp_path.iterdir()
    with Image.open(path) as saved:
        assert saved.mode == mode
    np.testing.assert_allclose(decode(path, 4, 3).astype(int), np.broadcast_to([210, 30, 60], (4, 4, 3)), atol=1)


def test_sixteen_bits_big_endian(tmp_path: Path, grey: NDArray[np.uint8]) -> None:
    # Pillow reads such a TIFF as mode I;16B.
    GREY.save(tmp_path / "x.tif")
    values = (PICTURE.astype(">u2") * 257).tobytes()
    Image.frombytes("I;16B", GREY.size, values).save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode == "I;16B"
    np.testing.assert_allclose(decode(tmp_path / "x.tif", 24, 1).astype(int), grey, atol=1)


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(PICTURE > 127).save(tmp_path / "x.png")
    assert set(np.unique(decode(tmp_path / "x.png", 40, 1))) >= {0, 255}


def test_float_and_wide_grey_are_refused(tmp_path: Path) -> None:
    Image.fromarray(PICTURE.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float pixels \(mode F\) have no known range"):
        decode(tmp_path / "float.tif", 24, 1)
    Image.fromarray(PICTURE.astype(np.int32) - 1000).save(tmp_path / "hounsfield.tif")
    with pytest.raises(ValueError, match="grey values from -1000 to -745; expected 0 to 65535"):
        decode(tmp_path / "hounsfield.tif", 24, 1)


@pytest.mark.parametrize("image", [GREY, SAME_PICTURE["sixteen.png"]], ids=["8 bits", "16 bits"])
def test_exif_orientation_is_honoured(tmp_path: Path, image: Image.Image) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned clockwise by 90 degrees
    image.save(tmp_path / "x.png", exif=exif)
    turned = Image.fromarray(np.rot90(PICTURE, -1)).resize((24, 24), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(decode(tmp_path / "x.png", 24, 1)[..., 0].astype(int), np.asarray(turned), atol=1)


def test_shrinking_averages_instead_of_picking(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    Image.fromarray(stripes).save(tmp_path / "x.png")
    inner = decode(tmp_path / "x.png", 8, 1)[1:-1, 1:-1]
    assert np.abs(inner.astype(int) - 127).max() <= 3


def save_study(root: Path, colour: bool = False) -> None:
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for number in range(4):
            shade = 40 * number + (label == "b")
            Image.new("RGB", (20, 16), (shade, shade, shade + colour)).save(root / label / f"{number}.png")


@pytest.mark.parametrize(("colour", "channels"), [(False, 1), (True, 3)])
def test_the_array_holds_every_image_in_order(tmp_path: Path, colour: bool, channels: int) -> None:
    save_study(tmp_path / "data", colour)
    manifest = read_manifest(tmp_path / "data")
    calls: list[tuple[int, int]] = []
    path = pixel_array(manifest, 16, tmp_path, progress=lambda done, total: calls.append((done, total)))
    array = np.load(path, mmap_mode="r")
    assert array.shape == (8, 16, 16, channels)
    assert array.dtype == np.uint8
    for pixels_, record in zip(array, manifest.records, strict=True):
        np.testing.assert_array_equal(pixels_, decode(manifest.root / record.path, 16, channels))
    assert calls[-1] == (8, 8)
    assert path.parent == tmp_path / "pixels"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files decoded."""
    names: list[str] = []

    def counted(path: Path, side: int, channels: int) -> NDArray[np.uint8]:
        names.append(path.name)
        return decode(path, side, channels)

    monkeypatch.setattr(pixels, "decode", counted)
    return names


def test_each_content_and_side_is_decoded_once(tmp_path: Path, decoded: list[str]) -> None:
    save_study(tmp_path / "data")
    first = pixel_array(read_manifest(tmp_path / "data"), 16, tmp_path)
    assert len(decoded) == 8
    assert pixel_array(read_manifest(tmp_path / "data", patient=r"(\d)"), 16, tmp_path) == first
    assert len(decoded) == 8
    assert pixel_array(read_manifest(tmp_path / "data"), 8, tmp_path) != first
    assert len(decoded) == 16
    Image.new("L", (20, 16), 7).save(tmp_path / "data/a/0.png")
    assert pixel_array(read_manifest(tmp_path / "data"), 16, tmp_path) != first


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"rubbish", None])
def test_a_damaged_array_is_made_anew(tmp_path: Path, decoded: list[str], damage: bytes | None) -> None:
    save_study(tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    path = pixel_array(manifest, 16, tmp_path)
    good = path.read_bytes()
    path.write_bytes(good[:-1] if damage is None else damage)
    assert pixel_array(manifest, 16, tmp_path) == path
    assert path.read_bytes() == good
    np.save(path, np.zeros((8, 8, 8, 1), np.uint8))
    pixel_array(manifest, 16, tmp_path)
    assert path.read_bytes() == good


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_is_noticed_and_made_anew(tmp_path: Path, decoded: list[str], damage: str) -> None:
    save_study(tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    path = pixel_array(manifest, 16, tmp_path)
    good = path.read_bytes()
    DAMAGES[damage](path)
    with path.open("rb") as used:
        found = path.read_bytes()
        assert pixel_array(manifest, 16, tmp_path) == path
        assert used.read() == found, "who has the old file open keeps it"
    assert path.read_bytes() == good
    assert len(decoded) == 16
    pixel_array(manifest, 16, tmp_path)
    assert len(decoded) == 16


def test_an_array_of_before_there_were_checksums_is_made_anew(tmp_path: Path, decoded: list[str]) -> None:
    save_study(tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    path = pixel_array(manifest, 16, tmp_path)
    good = path.read_bytes()
    for other in path.parent.glob("*.npy.*"):
        other.unlink()
    pixel_array(manifest, 16, tmp_path)
    assert path.read_bytes() == good
    assert len(decoded) == 16


def decode_slowly(data: Path, cache: Path, log: Path) -> None:
    """A sweep that decodes, and says what it has decoded."""

    def slow(path: Path, side: int, channels: int) -> NDArray[np.uint8]:
        time.sleep(0.05)
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return decode(path, side, channels)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pixels, "decode", slow)
        pixel_array(read_manifest(data), 16, cache)


def decoded_by(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_sweep_that_is_killed_while_it_decodes_leaves_nothing_behind(tmp_path: Path) -> None:
    save_study(tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    expected = pixel_array(manifest, 16, tmp_path / "other").read_bytes()
    log = tmp_path / "log"
    child = multiprocessing.get_context("spawn").Process(
        target=decode_slowly, args=(tmp_path / "data", tmp_path, log), daemon=True
    )
    child.start()
    while not decoded_by(log):
        time.sleep(0.01)
    child.kill()
    child.join()
    assert decoded_by(log) < 8
    assert len(list((tmp_path / "pixels").glob(".*"))) == 1
    path = pixel_array(manifest, 16, tmp_path)
    assert path.read_bytes() == expected
    ours = {path.name, path.with_suffix(".lock").name, f"{path.name}.sums", f"{path.name}.verified"}
    assert {file.name for file in path.parent.iterdir()} == ours


def test_two_processes_find_the_same_damage(tmp_path: Path) -> None:
    save_study(tmp_path / "data")
    path = pixel_array(read_manifest(tmp_path / "data"), 16, tmp_path)
    good = path.read_bytes()
    DAMAGES["a bit in the middle"](path)
    log = tmp_path / "log"
    both = [
        multiprocessing.get_context("spawn").Process(target=decode_slowly, args=(tmp_path / "data", tmp_path, log))
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert [one.exitcode for one in both] == [0, 0]
    assert path.read_bytes() == good
    assert decoded_by(log) == 8, "one decodes, the other waits"


class TestFullDisk:
    def test_it_is_noticed_before_anything_is_decoded_and_the_next_works(
        self, tmp_path: Path, small_disk: Callable[[int], Path], decoded: list[str]
    ) -> None:
        save_study(tmp_path / "data")
        manifest, disk = read_manifest(tmp_path / "data"), small_disk(1)
        with pytest.raises(NoSpace, match=r"512px-1ch\.npy \(2\.1 MB\)\n  found: No space .*; 1\.0 MB are free"):
            pixel_array(manifest, 512, disk)
        assert decoded == []
        assert not list(disk.rglob("*.npy*"))
        path = pixel_array(manifest, 128, disk)
        assert path.read_bytes() == pixel_array(manifest, 128, tmp_path).read_bytes()

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_in_the_middle_it_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        save_study(tmp_path / "data")
        manifest = read_manifest(tmp_path / "data")

        def refused(*given: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refused)
            with pytest.raises(NoSpace, match=os.strerror(code)):
                pixel_array(manifest, 16, tmp_path)
        assert {file.suffix for file in (tmp_path / "pixels").iterdir()} <= {".lock"}
        assert np.load(pixel_array(manifest, 16, tmp_path)).shape == (8, 16, 16, 1)


def test_of_two_sweeps_at_once_one_decodes(tmp_path: Path, decoded: list[str]) -> None:
    save_study(tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: pixel_array(manifest, 16, tmp_path), range(2)))
    assert paths[0] == paths[1]
    assert len(decoded) == 8


def test_an_image_lost_since_it_was_listed_is_named_and_leaves_no_array(tmp_path: Path) -> None:
    save_study(tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    (tmp_path / "data/b/3.png").unlink()
    with pytest.raises(DataError, match=r"b/3\.png' could be read when the data set was listed"):
        pixel_array(manifest, 16, tmp_path)
    assert list((tmp_path / "pixels").glob("*.npy")) == []


class TestMasks:
    @staticmethod
    def folder(root: Path, mask: Image.Image) -> Path:
        for label in ("a", "b"):
            for kind, picture in (("images", GREY), ("masks", mask)):
                (root / label / kind).mkdir(parents=True)
                picture.save(root / label / kind / "x.png")
        return root

    @pytest.mark.parametrize("brightest", [1, 255])
    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_half_of_the_brightest_is_inside(self, tmp_path: Path, brightest: int, mode: str) -> None:
        """Masks of 0 and 1 are as good as those of 0 and 255, whatever their size and mode."""
        given = np.zeros((80, 160), np.uint8)
        given[:, :75] = brightest
        source = self.folder(tmp_path / "set", Image.fromarray(given).convert(mode))
        found = np.load(mask_array(read_manifest(source), 8, tmp_path))
        assert found.shape == (2, 8, 8, 1)
        # The fourth column is covered by three quarters, and counts as inside.
        np.testing.assert_array_equal(found[0, :, :, 0], np.tile([255] * 4 + [0] * 4, (8, 1)))

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_masks_are_read_anew(self, tmp_path: Path, damage: str) -> None:
        manifest = read_manifest(self.folder(tmp_path / "set", GREY))
        path = mask_array(manifest, 8, tmp_path)
        good = path.read_bytes()
        DAMAGES[damage](path)
        assert mask_array(manifest, 8, tmp_path) == path
        assert path.read_bytes() == good

    def test_an_empty_mask_stays_empty(self, tmp_path: Path) -> None:
        source = self.folder(tmp_path / "set", Image.new("L", (20, 20)))
        assert not np.load(mask_array(read_manifest(source), 8, tmp_path)).any()

    def test_a_broken_mask_is_named(self, tmp_path: Path) -> None:
        source = self.folder(tmp_path / "set", GREY)
        manifest = read_manifest(source)
        (source / "b" / "masks" / "x.png").write_bytes(b"\x89PNG")
        with pytest.raises(DataError, match=r"expected a lung mask in '.*b/masks/x.png'"):
            mask_array(manifest, 8, tmp_path)

    def test_other_masks_of_the_same_images_are_another_array(self, tmp_path: Path) -> None:
        source = self.folder(tmp_path / "set", GREY)
        manifest = read_manifest(source)
        first = mask_array(manifest, 8, tmp_path)
        assert mask_array(manifest, 8, tmp_path) == first
        Image.new("L", (20, 20)).save(source / "b" / "masks" / "x.png")
        assert mask_array(manifest, 8, tmp_path) != first
