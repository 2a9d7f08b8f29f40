"""A reader sees the old file or the new one, never a part; a disk that takes no more is told in words."""

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

from cxr_models import storage
from cxr_models.storage import NoSpace, append_whole, remove_stale, written_whole


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "below" / "model.keras"
    with written_whole(path) as scratch:
        scratch.write_text("whole")
        assert not path.exists()
        assert scratch.parent == path.parent
        assert scratch.name.endswith(".keras")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_stays_until_then(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with written_whole(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def half_a_file(path: Path) -> None:
    with written_whole(path) as scratch:
        scratch.write_text("ne")
        raise RuntimeError("in the middle")


def test_a_failed_block_changes_nothing(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="in the middle"):
        half_a_file(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_wrote_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "nothing.json"):
        pass
    assert list(tmp_path.iterdir()) == []


class TestLitter:
    """What killed processes left goes when somebody next writes there; what others write stays."""

    @staticmethod
    def left(folder: Path, process: int, origin: str = "", age_s: float = 0.0) -> Path:
        scratch = folder / f".{process}-{origin or storage._origin()}-model.keras"
        scratch.write_text("half")
        changed = time.time() - age_s
        os.utime(scratch, (changed, changed))
        return scratch

    def test_a_dead_process_of_this_machine(self, tmp_path):
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        self.left(tmp_path, child.pid)
        with written_whole(path := tmp_path / "other.json") as scratch:
            scratch.write_text("x")
        assert list(tmp_path.iterdir()) == [path]

    def test_a_killed_writer_leaves_nothing_for_long(self, tmp_path):
        code = (
            "import os, pathlib, signal; from cxr_models.storage import written_whole\n"
            f"with written_whole(pathlib.Path({str(tmp_path / 'a.json')!r})) as scratch:\n"
            "    scratch.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
        )
        subprocess.run([sys.executable, "-c", code], check=False)
        assert len(list(tmp_path.iterdir())) == 1
        with written_whole(path := tmp_path / "a.json") as scratch:
            scratch.write_text("whole")
        assert list(tmp_path.iterdir()) == [path]

    def test_a_living_process(self, tmp_path):
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            scratch = self.left(tmp_path, child.pid)
            remove_stale(tmp_path)
            assert scratch.exists()
            child.communicate()

    def test_a_process_that_has_got_the_number_of_a_dead_one(self, tmp_path):
        scratch = self.left(
            tmp_path, os.getpid(), age_s=time.time() - psutil.Process().create_time() + storage.CLOCK_S + 60
        )
        remove_stale(tmp_path)
        assert not scratch.exists()

    @pytest.mark.parametrize(("age_s", "stays"), [(3600.0, True), (25 * 3600.0, False)])
    def test_another_machine_has_a_day(self, tmp_path, age_s, stays):
        scratch = self.left(tmp_path, 1, "0123456789abcdef", age_s)
        remove_stale(tmp_path)
        assert scratch.exists() == stays

    def test_another_start_of_this_machine(self, tmp_path):
        before = time.time() - psutil.boot_time() + storage.CLOCK_S + 60
        scratch = self.left(tmp_path, os.getpid(), storage._origin()[:8] + "01234567", before)
        remove_stale(tmp_path)
        assert not scratch.exists()

    @pytest.mark.parametrize("name", [".2024-11-12-notes.md", ".hidden", "1-model.keras"])
    def test_what_looks_otherwise_is_not_ours(self, tmp_path, name):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (0, 0))
        remove_stale(tmp_path)
        assert (tmp_path / name).exists()


def broken(code: int) -> Callable[..., None]:
    def refuse(*given: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


class TestDisksThatTakeNoMore:
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
    def test_the_error_says_what_where_and_what_to_do(self, tmp_path, code, monkeypatch):
        path = tmp_path / "model.keras"
        path.write_text("old")
        monkeypatch.setattr(storage.os, "fsync", broken(code))
        with pytest.raises(NoSpace) as caught, written_whole(path) as scratch:
            scratch.write_text("new")
        assert (caught.value.errno, caught.value.path) == (code, path)
        assert re.search(
            rf"expected .*{path}\n  found: {os.strerror(code)}.*\n  remedy: .*--cache-dir", str(caught.value)
        )
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_the_error_reaches_another_process_whole(self, tmp_path):
        error = storage.no_space(tmp_path / "a", errno.ENOSPC, 10**9)
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.path, again.errno) == (str(error), error.path, error.errno)
        assert "a (1.0 GB)" in str(again)

    def test_what_another_disk_or_a_programming_error_says_passes(self, tmp_path):
        other = OSError(errno.ENOSPC, "full", "/elsewhere/x")
        for error in (other, PermissionError(errno.EACCES, "no"), ValueError("No space left on device")):
            with pytest.raises(type(error)) as caught, written_whole(tmp_path / "a"):
                raise error
            assert caught.value is error

    def test_libraries_that_do_not_pass_the_number_on(self, tmp_path):
        with pytest.raises(NoSpace, match="No space left"), written_whole(tmp_path / "a"):
            raise RuntimeError("Problems closing file (errno = 28, error message = 'No space left on device')")


class TestSmallDisk:
    @pytest.fixture
    def disk(self, small_disk):
        return small_disk(4)

    def test_too_large_a_file_is_noticed_before_the_block_runs(self, disk):
        with (
            pytest.raises(NoSpace, match=r"a\.npy \(8\.0 MB\)\n  found: No space left on device; 4\.\d MB are free"),
            written_whole(disk / "a.npy", 8_000_000),
        ):
            raise AssertionError("it runs")
        assert list(disk.iterdir()) == []

    def test_numpy_keeps_the_reason_to_itself(self, disk):
        with pytest.raises(NoSpace), written_whole(disk / "a.npy") as scratch:
            np.save(scratch, np.zeros(8_000_000, np.uint8))
        assert list(disk.iterdir()) == []
        with written_whole(disk / "a.npy") as scratch:
            np.save(scratch, np.zeros(1000, np.uint8))
        assert np.load(disk / "a.npy").shape == (1000,)

    def test_hdf5(self, disk):
        with pytest.raises(NoSpace), written_whole(disk / "a.h5") as scratch, h5py.File(scratch, "w") as file:
            file["a"] = np.zeros(8_000_000, np.uint8)
        assert list(disk.iterdir()) == []

    def test_a_record_keeps_its_length_and_grows_again_when_there_is_room(self, disk):
        record, filler = disk / "trials.jsonl", disk / "filler"
        append_whole(record, '{"a": 1}\n')
        filler.write_bytes(bytes(shutil.disk_usage(disk).free))
        line = '{"b": "' + "é" * 100_000 + '"}\n'
        for _ in range(2):
            with pytest.raises(NoSpace, match=r"room on the disk for .*trials\.jsonl"):
                append_whole(record, line)
            assert record.read_text() == '{"a": 1}\n'
        filler.unlink()
        append_whole(record, line)
        assert record.read_text(encoding="utf-8") == '{"a": 1}\n' + line


class TestAppending:
    def test_what_fails_on_its_way_to_the_disk_is_taken_back(self, tmp_path, monkeypatch):
        append_whole(path := tmp_path / "a.jsonl", "1\n")
        for code, expected in ((errno.EIO, NoSpace), (errno.EINVAL, OSError)):
            monkeypatch.setattr(storage.os, "fdatasync", broken(code))
            with pytest.raises(expected):
                append_whole(path, "2\n")
            assert path.read_text() == "1\n"

    def test_writes_that_take_a_part_are_gone_on_with(self, tmp_path, monkeypatch):
        write = os.write
        monkeypatch.setattr(storage.os, "write", lambda file, data: write(file, data[:3]))
        append_whole(tmp_path / "a", "a long line\n")
        assert (tmp_path / "a").read_text() == "a long line\n"

    def test_lines_of_several_at_once_stay_whole(self, tmp_path):
        def many(letter: str) -> None:
            for _ in range(20):
                append_whole(tmp_path / "a", letter * 5000 + "\n")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(many, "abcd"))
        lines = (tmp_path / "a").read_text().splitlines()
        assert sorted(lines) == sorted(letter * 5000 for letter in "abcd" * 20)
