"""Whatever happened to a file is noticed by the next who uses it, and a file that did not change is read once."""

import errno
import multiprocessing
import os
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from cxr_models import checksums
from cxr_models.checksums import Blocks, forget, is_sound, seal, sums_file, write_sums
from cxr_models.kept import keep, kept
from tests.damages import DAMAGES, changed, flipped

CONTENTS = np.random.default_rng(0).bytes(100_003)
BLOCKS = Blocks(len(CONTENTS), 10, 999)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "array.npy"
    path.write_bytes(CONTENTS)
    write_sums(path, BLOCKS, [zlib.crc32(CONTENTS[slice(*BLOCKS.span(block))]) for block in range(BLOCKS.count)])
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for every time that a file is read."""
    times: list[int] = []
    fits = checksums._fits

    def counted(*given: object) -> bool:
        times.append(len(times))
        return fits(*given)

    monkeypatch.setattr(checksums, "_fits", counted)
    return times


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 21])
@pytest.mark.parametrize("head", [0, 1, 5])
def test_blocks_cover_a_file_once(size, head):
    blocks = Blocks(size, min(head, size), 10)
    spans = [blocks.span(block) for block in range(blocks.count)]
    assert [place for span in spans for place in range(*span)] == list(range(size))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("used", [False, True], ids=["not used yet", "used before"])
def test_damage_is_noticed(file, damage, used):
    if used:
        assert is_sound(file)
    DAMAGES[damage](file)
    assert not is_sound(file)
    assert not is_sound(file), "and not forgotten"


@pytest.mark.parametrize("size", [0, 1, checksums.SEALED_BYTES, 3 * checksums.SEALED_BYTES + 1])
def test_a_sealed_file(tmp_path, size):
    (tmp_path / "a").write_bytes(bytes(size))
    seal(tmp_path / "a")
    assert is_sound(tmp_path / "a")
    if size:
        flipped(tmp_path / "a", size - 1)
        assert not is_sound(tmp_path / "a")


def test_it_is_read_once_by_all_who_come_and_again_after_a_change(file, read):
    for _ in range(3):
        assert is_sound(file)
    threads = [threading.Thread(target=is_sound, args=(file,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 1
    changed(file, 0, CONTENTS[:1])
    assert is_sound(file)
    assert len(read) == 2


def test_another_machine_and_another_start_of_this_one_read_it_themselves(file, read, monkeypatch):
    for boot in ("one", "two", "one", "two"):
        monkeypatch.setattr(checksums, "boot_id", lambda boot=boot: boot)
        assert is_sound(file)
    assert len(read) == 2


@pytest.mark.parametrize("mark", [b"", b"{", b"[]", b"3", b'{"stamps": 1}', b"\xff"])
def test_a_damaged_mark_says_nothing(file, read, mark):
    assert is_sound(file)
    file.with_name("array.npy.verified").write_bytes(mark)
    assert is_sound(file)
    assert len(read) == 2


def test_when_it_was_used_last_may_be_noted(file, read):
    assert is_sound(file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns))
    assert is_sound(file)
    assert len(read) == 1


def test_a_disk_that_cannot_read_it_counts_as_damage(file, monkeypatch):
    def refused(*given: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checksums.os, "preadv", refused)
    assert not is_sound(file)


def test_too_many_open_files_are_no_damage(file, monkeypatch):
    def refused(*given: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(checksums.os, "preadv", refused)
    with pytest.raises(OSError, match="Too many open files"):
        is_sound(file)


def test_of_processes_at_once_each_is_told(file):
    flipped(file, 50_000)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(is_sound, [file] * 4) == [False] * 4


def test_nothing_is_left_of_a_file_that_is_forgotten(file, tmp_path):
    assert is_sound(file)
    forget(file)
    assert list(tmp_path.iterdir()) == []
    assert not is_sound(file)
    forget(file)


def test_sums_alone_are_no_file(file):
    file.unlink()
    assert sums_file(file).exists()
    assert not is_sound(file)


class TestKept:
    FOUND = ({"ä/1.png": [1, None, 0.25]}, [1, 2], [], {}, "x\ny")

    @pytest.mark.parametrize("found", FOUND)
    def test_what_was_found_comes_back(self, tmp_path, found):
        keep(tmp_path / "deep" / "a.json", found)
        assert kept(tmp_path / "deep" / "a.json") == found

    def test_any_changed_byte_is_noticed(self, tmp_path):
        keep(path := tmp_path / "a.json", {"a": [1, 2, 3]})
        good = path.read_bytes()
        for place in range(len(good)):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            assert kept(path) is None
            path.write_bytes(good[:place])
            assert kept(path) is None

    @pytest.mark.parametrize("contents", [b"", b"[1]", b"[1]\n", b"\n\n", b"\n\n\n", b"\xff\n\xff\n"])
    def test_what_has_no_checksum_is_not_believed(self, tmp_path, contents):
        (tmp_path / "a.json").write_bytes(contents)
        assert kept(tmp_path / "a.json") is None
        assert kept(tmp_path / "absent.json") is None
