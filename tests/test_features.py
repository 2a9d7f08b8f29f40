"""Features: computed once whoever asks, exact whatever happens to the processes, within the room they are given."""

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from cxr_models import checksums, features, room
from cxr_models.cuts import Cut
from cxr_models.features import (
    Extraction,
    FeatureBudget,
    Floats,
    NoRoomError,
    Pixels,
    Rows,
    UnderWay,
    obtain,
    stored_bytes,
    under_way,
)
from cxr_models.storage import DAY_S
from tests.damages import DAMAGES, changed

EARLY, LATE, POOLED = Cut("early", "", (2, 2, 3)), Cut("late", "", (2, 2, 2)), Cut("late", "average", (5,))
IMAGES, AT_ONCE = 50, 4
SHARES = 13
PLENTY = 10**9
TITLE = "a backbone at 2 px"
KEY = {"pixels": ["a.npy", 1, 2], "weights": "w", "view": None, "numerics": {"threads": 1}}


def pixels_of(rows: Rows) -> Pixels:
    """Images that tell their own position."""
    return rows.astype("<u4").view(np.uint8).reshape(len(rows), 4)


def values(rows: Rows, cut: Cut) -> Floats:
    """What the fake prefix makes of images: other numbers for each image, element and cut."""
    size = int(np.prod(cut.shape))
    seed = sum(cut.name.encode())
    return (rows[:, None] * size + np.arange(size) + seed / 7).astype(np.float32).reshape(-1, *cut.shape)


def whole(cut: Cut, images: int = IMAGES) -> Floats:
    return values(np.arange(images), cut)


@dataclass
class Prefix:
    """A prefix that keeps which images it has run, and does something before each share."""

    before: Callable[[], None] = lambda: None
    cuts: list[tuple[Cut, ...]] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    def __call__(self, cuts: Sequence[Cut]) -> Callable[[Pixels], list[Floats]]:
        self.cuts.append(tuple(cuts))

        def run(pixels: Pixels) -> list[Floats]:
            self.before()
            rows = pixels.reshape(-1).view("<u4").astype(np.int64)
            self.images.extend(rows.tolist())
            return [values(rows, cut) for cut in cuts]

        return run


def extraction(prefix: Prefix, *, images: int = IMAGES, **changed: object) -> Extraction:
    return Extraction(TITLE, {**KEY, **changed}, images, pixels_of, prefix, AT_ONCE)


def budget(folder: Path, limit_bytes: int = PLENTY) -> FeatureBudget:
    return FeatureBudget(folder / "features", limit_bytes)


def size_of(cut: Cut, images: int = IMAGES) -> int:
    return images * cut.bytes_per_image


def stored(folder: Path) -> list[str]:
    """Names of everything in the store but its lock, and the checksums and marks of features that are there."""
    names = {path.name for path in (folder / "features").glob("*/*")}
    return sorted(names - {f"{name}{ending}" for name in names for ending in (".sums", ".verified")})


def take(folder: Path, log: Path, before_s: float, stop_after: int, cuts: tuple[Cut, ...]) -> None:
    """A worker process: logs the images it runs, and from some share on hangs in the middle of one."""
    prefix = Prefix()

    def before() -> None:
        log.write_text(" ".join(map(str, prefix.images)))
        time.sleep(60 if len(prefix.images) >= stop_after * AT_ONCE else before_s)

    prefix.before = before
    found = obtain(budget(folder), extraction(prefix), cuts[0], wanted=cuts)
    np.testing.assert_array_equal(found.array, whole(cuts[0]))
    log.write_text(" ".join(map(str, prefix.images)))


def hold(folder: Path, held: Path) -> None:
    """A worker process that trains from features until it is killed."""
    found = obtain(budget(folder), extraction(Prefix()), EARLY)
    held.write_text(str(found.array.shape))
    time.sleep(60)


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    child = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "not within 30 s"
        time.sleep(0.01)


def logged(log: Path) -> list[int]:
    return [int(word) for word in log.read_text().split()] if log.exists() else []


def kill_in_the_middle(folder: Path, shares: int, cuts: tuple[Cut, ...] = (EARLY,)) -> None:
    """Leave what a process leaves that is killed in its share behind the first `shares`."""
    log = folder / "killed"
    with process(take, folder, log, 0.0, shares, cuts) as child:
        wait_for(lambda: len(logged(log)) == shares * AT_ONCE)
        os.kill(child.pid or 0, signal.SIGKILL)


class TestOnce:
    def test_what_is_stored_is_read_and_not_computed_again(self, tmp_path):
        prefix = Prefix()
        first = obtain(budget(tmp_path), extraction(prefix), EARLY)
        second = obtain(budget(tmp_path), extraction(prefix), EARLY)
        assert sorted(prefix.images) == list(range(IMAGES))
        for found in (first, second):
            assert found.array.dtype == np.float32
            np.testing.assert_array_equal(found.array, whole(EARLY))

    def test_no_share_is_larger_than_asked_for(self, tmp_path):
        prefix, longest = Prefix(), 0

        def run(cuts: Sequence[Cut]) -> Callable[[Pixels], list[Floats]]:
            inner = prefix(cuts)

            def counted(pixels: Pixels) -> list[Floats]:
                nonlocal longest
                longest = max(longest, len(pixels))
                return inner(pixels)

            return counted

        obtain(budget(tmp_path), Extraction(TITLE, KEY, IMAGES, pixels_of, run, AT_ONCE), EARLY)
        assert longest == AT_ONCE

    def test_cuts_that_are_wanted_too_come_from_the_same_pass(self, tmp_path):
        prefix = Prefix()
        obtain(budget(tmp_path), extraction(prefix), EARLY, wanted=(EARLY, LATE, POOLED))
        assert len(prefix.images) == IMAGES
        for cut in (LATE, POOLED):
            np.testing.assert_array_equal(obtain(budget(tmp_path), extraction(prefix), cut).array, whole(cut))
        assert len(prefix.images) == IMAGES

    def test_a_wanted_cut_that_is_there_is_not_computed_again(self, tmp_path):
        prefix = Prefix()
        obtain(budget(tmp_path), extraction(prefix), LATE)
        obtain(budget(tmp_path), extraction(prefix), EARLY, wanted=(LATE, POOLED))
        assert prefix.cuts == [(LATE,), (EARLY, POOLED)]

    @pytest.mark.parametrize(
        "changed",
        [
            {"pixels": ["a.npy", 1, 3]},
            {"weights": "v"},
            {"view": [1, "light", 0, 1]},
            {"numerics": {"threads": 2}},
            {"more": 1},
        ],
    )
    def test_anything_else_about_the_pass_is_another_file(self, tmp_path, changed):
        prefix = Prefix()
        obtain(budget(tmp_path), extraction(prefix), EARLY)
        obtain(budget(tmp_path), extraction(prefix, **changed), EARLY)
        assert len(prefix.images) == 2 * IMAGES

    def test_other_images_are_another_file_and_the_order_of_the_key_is_not(self, tmp_path):
        prefix = Prefix()
        turned = Extraction("another title", dict(reversed(KEY.items())), IMAGES, pixels_of, prefix, AT_ONCE)
        assert turned.digest == extraction(prefix).digest
        assert extraction(prefix, images=IMAGES - 1).digest != turned.digest

    def test_a_file_that_lost_its_end_is_made_again(self, tmp_path):
        prefix = Prefix()
        obtain(budget(tmp_path), extraction(prefix), EARLY).close()
        (file,) = (tmp_path / "features").glob("*/early.f32")
        os.truncate(file, size_of(EARLY) - 4)
        np.testing.assert_array_equal(obtain(budget(tmp_path), extraction(prefix), EARLY).array, whole(EARLY))
        assert len(prefix.images) == 2 * IMAGES

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_whatever_is_damaged_is_noticed_and_made_anew(self, tmp_path, damage):
        prefix = Prefix()
        obtain(budget(tmp_path), extraction(prefix), EARLY, wanted=(POOLED,)).close()
        (file,) = (tmp_path / "features").glob("*/early.f32")
        good = file.read_bytes()
        DAMAGES[damage](file)
        found = obtain(budget(tmp_path), extraction(prefix), EARLY, wanted=(POOLED,))
        np.testing.assert_array_equal(found.array, whole(EARLY))
        assert file.read_bytes() == good
        assert prefix.cuts == [(EARLY, POOLED), (EARLY,)], "the other is sound"
        obtain(budget(tmp_path), extraction(prefix), EARLY)
        assert len(prefix.images) == 2 * IMAGES

    def test_who_has_the_damaged_file_open_keeps_it(self, tmp_path):
        used = obtain(budget(tmp_path), extraction(Prefix()), EARLY)
        (file,) = (tmp_path / "features").glob("*/early.f32")
        DAMAGES["a bit in the middle"](file)
        seen = used.array.copy()
        found = obtain(budget(tmp_path), extraction(Prefix()), EARLY)
        np.testing.assert_array_equal(found.array, whole(EARLY))
        np.testing.assert_array_equal(used.array, seen)
        used.close()

    def test_a_disk_that_gives_back_something_else_each_time_is_left_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr(features, "is_sound_file", lambda file, path: False)
        prefix = Prefix()
        with pytest.raises(NoRoomError, match="read back as something else than was written"):
            obtain(budget(tmp_path), extraction(prefix), EARLY)
        assert len(prefix.images) == features.MOST_ATTEMPTS * IMAGES
        assert not stored(tmp_path)

    def test_a_second_reader_reads_no_checksums(self, tmp_path, monkeypatch):
        obtain(budget(tmp_path), extraction(Prefix()), EARLY).close()
        monkeypatch.setattr(checksums, "_fits", None)
        for _ in range(2):
            obtain(budget(tmp_path), extraction(Prefix()), EARLY).close()

    def test_a_store_that_is_cleared_meanwhile_is_filled_again(self, tmp_path):
        prefix = Prefix()

        def clear() -> None:
            if len(prefix.images) == 5 * AT_ONCE:
                for path in (tmp_path / "features").glob("*/*"):
                    path.unlink()

        prefix.before = clear
        np.testing.assert_array_equal(obtain(budget(tmp_path), extraction(prefix), EARLY).array, whole(EARLY))


class TestProcesses:
    def test_they_share_a_pass_and_do_nothing_twice(self, tmp_path):
        logs = [tmp_path / "one", tmp_path / "two"]
        with (
            process(take, tmp_path, logs[0], 0.03, 10**6, (EARLY, POOLED)) as one,
            process(take, tmp_path, logs[1], 0.03, 10**6, (EARLY, POOLED)) as two,
        ):
            one.join(60)
            two.join(60)
            assert (one.exitcode, two.exitcode) == (0, 0)
        assert sorted([*logged(logs[0]), *logged(logs[1])]) == list(range(IMAGES))
        assert stored(tmp_path) == ["early.f32", "late-average.f32"]

    def test_they_find_the_same_damage(self, tmp_path):
        obtain(budget(tmp_path), extraction(Prefix()), EARLY).close()
        (file,) = (tmp_path / "features").glob("*/early.f32")
        DAMAGES["zeros at the end"](file)
        logs = [tmp_path / "one", tmp_path / "two"]
        with (
            process(take, tmp_path, logs[0], 0.03, 10**6, (EARLY,)) as one,
            process(take, tmp_path, logs[1], 0.03, 10**6, (EARLY,)) as two,
        ):
            one.join(60)
            two.join(60)
            assert (one.exitcode, two.exitcode) == (0, 0)
        assert sorted([*logged(logs[0]), *logged(logs[1])]) == list(range(IMAGES))

    def test_what_one_computes_the_other_only_has_to_finish(self, tmp_path):
        log, prefix = tmp_path / "log", Prefix(before=lambda: time.sleep(0.02))
        with process(take, tmp_path, log, 0.02, 10**6, (EARLY,)) as child:
            wait_for(lambda: len(logged(log)) >= AT_ONCE)
            found = obtain(budget(tmp_path), extraction(prefix), EARLY)
            child.join(60)
        assert prefix.images
        assert sorted([*logged(log), *prefix.images]) == list(range(IMAGES))
        np.testing.assert_array_equal(found.array, whole(EARLY))

    def test_the_next_goes_on_where_a_killed_one_was(self, tmp_path):
        kill_in_the_middle(tmp_path, 5)
        assert stored(tmp_path) == ["early.f32.partial", "pass.done", "pass.json"]
        prefix = Prefix()
        np.testing.assert_array_equal(obtain(budget(tmp_path), extraction(prefix), EARLY).array, whole(EARLY))
        assert sorted(prefix.images) == list(range(5 * AT_ONCE, IMAGES))
        assert stored(tmp_path) == ["early.f32"]

    def test_the_share_of_one_that_is_killed_falls_to_the_other(self, tmp_path):
        log, prefix = tmp_path / "log", Prefix()
        with process(take, tmp_path, log, 0.0, 3, (EARLY,)) as child:
            wait_for(lambda: len(logged(log)) == 3 * AT_ONCE)
            killer = threading.Timer(0.5, child.kill)
            killer.start()
            begun = time.monotonic()
            found = obtain(budget(tmp_path), extraction(prefix), EARLY)
            assert time.monotonic() - begun > 0.4, "the share of a living process is not taken from it"
            killer.join()
        np.testing.assert_array_equal(found.array, whole(EARLY))
        assert sorted(prefix.images) == list(range(3 * AT_ONCE, IMAGES))

    def test_after_a_crash_of_the_machine_nothing_marked_as_done_is_trusted(self, tmp_path):
        kill_in_the_middle(tmp_path, 5)
        (done,) = (tmp_path / "features").glob("*/pass.done")
        os.utime(done, (0, 0))  # before the machine started
        prefix = Prefix()
        obtain(budget(tmp_path), extraction(prefix), EARLY)
        assert len(prefix.images) == IMAGES

    def test_what_a_killed_one_has_damaged_is_noticed(self, tmp_path):
        kill_in_the_middle(tmp_path, 5)
        (file,) = (tmp_path / "features").glob("*/early.f32.partial")
        changed(file, 0, b"\xff")
        prefix = Prefix()
        np.testing.assert_array_equal(obtain(budget(tmp_path), extraction(prefix), EARLY).array, whole(EARLY))
        assert len(prefix.images) == 2 * IMAGES - 5 * AT_ONCE

    @pytest.mark.parametrize("lost", ["early.f32.partial", "early.f32.partial.sums", "pass.json", "pass.done"])
    def test_a_pass_that_lost_a_file_begins_anew(self, tmp_path, lost):
        kill_in_the_middle(tmp_path, 5)
        (file,) = (tmp_path / "features").glob(f"*/{lost}")
        file.unlink()
        prefix = Prefix()
        np.testing.assert_array_equal(obtain(budget(tmp_path), extraction(prefix), EARLY).array, whole(EARLY))
        assert len(prefix.images) == IMAGES

    @pytest.mark.parametrize("noted", [b"{", b"{}", b'{"title": "", "cuts": [1]}'])
    def test_a_pass_whose_notes_are_damaged_begins_anew(self, tmp_path, noted):
        kill_in_the_middle(tmp_path, 5)
        (file,) = (tmp_path / "features").glob("*/pass.json")
        file.write_bytes(noted)
        assert not under_way(tmp_path / "features")
        np.testing.assert_array_equal(obtain(budget(tmp_path), extraction(Prefix()), EARLY).array, whole(EARLY))
        assert stored(tmp_path) == ["early.f32"]

    def test_nobody_computes_a_cut_that_its_weights_no_longer_fit(self, tmp_path):
        """A later phase has trained layers behind its cut, and may not take part in a pass that stores them."""
        log, moved = tmp_path / "log", Prefix()
        with process(take, tmp_path, log, 0.05, 10**6, (EARLY, LATE)) as child:
            wait_for(lambda: len(logged(log)) >= AT_ONCE)
            found = obtain(budget(tmp_path), extraction(moved), EARLY)
            child.join(60)
        assert not moved.cuts
        np.testing.assert_array_equal(found.array, whole(EARLY))

    def test_nor_goes_on_with_such_a_pass_of_a_killed_process(self, tmp_path):
        kill_in_the_middle(tmp_path, 5, (EARLY, LATE))
        moved = Prefix()
        np.testing.assert_array_equal(obtain(budget(tmp_path), extraction(moved), EARLY).array, whole(EARLY))
        assert moved.cuts == [(EARLY,)]
        assert stored(tmp_path) == ["early.f32"]


class TestLitter:
    """Passes of killed processes that another sweep meets."""

    @staticmethod
    def next_sweep(folder: Path) -> list[str]:
        obtain(budget(folder), extraction(Prefix(), weights="other"), EARLY)
        return stored(folder)

    def test_one_that_may_be_gone_on_with_stays(self, tmp_path):
        kill_in_the_middle(tmp_path, 5)
        assert self.next_sweep(tmp_path) == ["early.f32", "early.f32.partial", "pass.done", "pass.json"]

    @pytest.mark.parametrize("lost", ["early.f32.partial.sums", "pass.json", "pass.done"])
    def test_one_that_cannot_be_gone_on_with_goes(self, tmp_path, lost):
        kill_in_the_middle(tmp_path, 5)
        (file,) = (tmp_path / "features").glob(f"*/{lost}")
        file.unlink()
        assert self.next_sweep(tmp_path) == ["early.f32"]
        assert len([path for path in (tmp_path / "features").iterdir() if path.is_dir()]) == 1

    def test_one_that_nobody_has_gone_on_with_for_a_day_goes(self, tmp_path, monkeypatch):
        kill_in_the_middle(tmp_path, 5)
        (done,) = (tmp_path / "features").glob("*/pass.done")
        day_ago = time.time() - DAY_S - 60
        monkeypatch.setattr(features.psutil, "boot_time", lambda: day_ago - 60)
        os.utime(done, (day_ago, day_ago))
        assert self.next_sweep(tmp_path) == ["early.f32"]

    def test_one_in_the_hands_of_a_worker_stays(self, tmp_path):
        log = tmp_path / "log"
        with process(take, tmp_path, log, 0.0, 5, (EARLY,)):
            wait_for(lambda: len(logged(log)) == 5 * AT_ONCE)
            (done,) = (tmp_path / "features").glob("*/pass.done")
            os.utime(done, (0, 0))
            assert "early.f32.partial" in self.next_sweep(tmp_path)


class TestUnderWay:
    def test_parts_while_they_are_computed(self, tmp_path):
        seen: list[UnderWay] = []
        prefix = Prefix(before=lambda: seen.extend(under_way(tmp_path / "features").values()))
        obtain(budget(tmp_path), extraction(prefix), EARLY, wanted=(POOLED,))
        title = "a backbone at 2 px, up to early and late-average"
        assert seen == [UnderWay(title, share, SHARES) for share in range(SHARES)]

    def test_nothing_before_and_after(self, tmp_path):
        assert not under_way(tmp_path / "features")
        obtain(budget(tmp_path), extraction(Prefix()), EARLY)
        assert not under_way(tmp_path / "features")

    def test_what_a_killed_process_left_is_not_under_way(self, tmp_path):
        kill_in_the_middle(tmp_path, 5)
        assert not under_way(tmp_path / "features")


class TestRoom:
    def test_the_checksums_of_what_goes_go_too(self, tmp_path):
        given = budget(tmp_path, size_of(EARLY))
        for name in "ab":
            obtain(given, extraction(Prefix(), weights=name), EARLY).close()
        names = sorted(path.name for path in given.folder.glob("*/*"))
        assert names == ["early.f32", "early.f32.sums", "early.f32.verified"]

    def test_what_was_not_used_for_longest_goes(self, tmp_path):
        given = budget(tmp_path, 3 * size_of(EARLY))
        for age, name in enumerate("abc"):
            obtain(given, extraction(Prefix(), weights=name), EARLY).close()
            age_of(tmp_path, extraction(Prefix(), weights=name), 100 - age)
        obtain(given, extraction(Prefix(), weights="a"), EARLY).close()  # read again: `b` is the oldest now
        obtain(given, extraction(Prefix(), weights="d"), EARLY).close()
        prefix = Prefix()
        for name in "acd":
            obtain(given, extraction(prefix, weights=name), EARLY).close()
        assert not prefix.images
        obtain(given, extraction(prefix, weights="b"), EARLY).close()
        assert len(prefix.images) == IMAGES
        assert stored_bytes(given.folder) <= given.limit_bytes

    def test_what_is_in_use_stays_though_it_is_the_oldest(self, tmp_path):
        given, prefix = budget(tmp_path, 2 * size_of(EARLY)), Prefix()
        used = obtain(given, extraction(prefix, weights="used"), EARLY)
        age_of(tmp_path, extraction(prefix, weights="used"), 1000)
        obtain(given, extraction(prefix, weights="idle"), EARLY).close()
        obtain(given, extraction(prefix, weights="new"), EARLY).close()
        np.testing.assert_array_equal(used.array, whole(EARLY))
        prefix.images.clear()
        obtain(given, extraction(prefix, weights="used"), EARLY)
        assert not prefix.images

    def test_what_another_process_uses_stays(self, tmp_path):
        held = tmp_path / "held"
        with process(hold, tmp_path, held):
            wait_for(held.exists)
            with pytest.raises(NoRoomError, match="in use"):
                obtain(budget(tmp_path, size_of(EARLY)), extraction(Prefix(), weights="other"), EARLY)
        obtain(budget(tmp_path, size_of(EARLY)), extraction(Prefix(), weights="other"), EARLY)
        assert stored(tmp_path) == ["early.f32"]

    def test_closing_ends_the_use_though_somebody_has_the_array(self, tmp_path):
        given = budget(tmp_path, size_of(EARLY))
        array = (found := obtain(given, extraction(Prefix()), EARLY)).array
        found.close()
        obtain(given, extraction(Prefix(), weights="other"), EARLY)
        np.testing.assert_array_equal(array, whole(EARLY))

    def test_more_than_the_cache_may_take(self, tmp_path):
        prefix = Prefix()
        with pytest.raises(NoRoomError, match=r"its features take 19\.2 kB, the cache may take 10\.0 kB"):
            obtain(budget(tmp_path, 10_000), extraction(prefix, images=400), EARLY)
        assert not prefix.images
        assert not stored(tmp_path)

    def test_nothing_goes_in_vain(self, tmp_path):
        given = budget(tmp_path, 2 * size_of(EARLY))
        used = obtain(given, extraction(Prefix(), weights="used"), EARLY)
        obtain(given, extraction(Prefix(), weights="idle"), EARLY).close()
        with pytest.raises(NoRoomError, match="of the cache are in use"):
            obtain(given, extraction(Prefix(), images=IMAGES + 1), EARLY)
        prefix = Prefix()
        obtain(given, extraction(prefix, weights="idle"), EARLY)
        assert not prefix.images
        used.close()

    def test_what_cannot_be_removed_stays_and_nobody_waits_for_it(self, tmp_path, monkeypatch):
        """Another user's, in a cache that several share."""
        given = budget(tmp_path, size_of(EARLY))
        obtain(given, extraction(Prefix(), weights="theirs"), EARLY).close()
        monkeypatch.setattr(room, "_removed", lambda path: False)
        with pytest.raises(NoRoomError, match="of the cache are in use"):
            obtain(given, extraction(Prefix()), EARLY)
        assert stored(tmp_path) == ["early.f32"]

    def test_all_of_the_cache_in_use(self, tmp_path):
        given = budget(tmp_path, size_of(EARLY) + 1)
        used = obtain(given, extraction(Prefix()), EARLY)
        with pytest.raises(NoRoomError, match="of the cache are in use"):
            obtain(given, extraction(Prefix(), weights="other"), EARLY)
        np.testing.assert_array_equal(used.array, whole(EARLY))

    def test_wanted_cuts_are_left_out_where_they_do_not_fit(self, tmp_path):
        given, prefix = budget(tmp_path, size_of(EARLY) + size_of(POOLED)), Prefix()
        obtain(given, extraction(prefix), EARLY, wanted=(LATE, POOLED))
        assert prefix.cuts == [(EARLY, POOLED)]

    def test_nothing_is_evicted_for_a_cut_that_is_only_wanted(self, tmp_path):
        given, prefix = budget(tmp_path, size_of(LATE) + size_of(EARLY)), Prefix()
        obtain(given, extraction(prefix, weights="other"), LATE).close()
        obtain(given, extraction(prefix), EARLY, wanted=(LATE,))
        assert prefix.cuts == [(LATE,), (EARLY,)]

    def test_what_a_killed_pass_left_gives_way(self, tmp_path):
        kill_in_the_middle(tmp_path, 5)
        obtain(budget(tmp_path, size_of(EARLY)), extraction(Prefix(), weights="other"), EARLY)
        assert "early.f32.partial" not in stored(tmp_path)


def crowd(folder: Path, seed: int, limit_bytes: int) -> None:
    """A worker process that wants one of a few features after another; some do not fit just now."""
    generator, found = np.random.default_rng(seed), 0
    for _ in range(40):
        name = str(generator.integers(8))
        try:
            with closing(obtain(budget(folder, limit_bytes), extraction(Prefix(), weights=name), EARLY)) as stored:
                np.testing.assert_array_equal(stored.array, whole(EARLY))
                found += 1
        except NoRoomError:
            time.sleep(0.01)
    assert found > 10


@pytest.mark.parametrize("limit_bytes", [3 * size_of(EARLY), PLENTY], ids=["evicting", "the disk is full"])
def test_what_processes_read_is_right_while_others_fill_the_cache(tmp_path, small_disk, limit_bytes):
    disk = small_disk(1)
    filler = bytes(shutil.disk_usage(disk).free - 10 * 4096)  # eight features take 24 pages, with their checksums
    (disk / "filler").write_bytes(filler)
    with process(crowd, disk, 0, limit_bytes) as one, process(crowd, disk, 1, limit_bytes) as two:
        one.join(60)
        two.join(60)
        assert (one.exitcode, two.exitcode) == (0, 0)


class TestFullDisk:
    def test_a_real_one(self, tmp_path, small_disk):
        """Another sweep fills it while features are computed; then there is room again."""
        disk, images = small_disk(1), 4000
        filler = disk / "filler"

        def fill() -> None:
            if not filler.exists():
                filler.write_bytes(bytes(shutil.disk_usage(disk).free))

        prefix = Prefix(before=fill)
        found = obtain(budget(disk), extraction(prefix, images=images), EARLY)  # its place was reserved
        np.testing.assert_array_equal(found.array, whole(EARLY, images))
        found.close()
        for _ in range(2):
            with pytest.raises(NoRoomError, match="No space left on device"):
                obtain(budget(disk), extraction(prefix, images=images, weights="other"), EARLY)
            assert stored(disk) == ["early.f32"]
        filler.unlink()
        found = obtain(budget(disk), extraction(Prefix(), images=images, weights="other"), EARLY)
        np.testing.assert_array_equal(found.array, whole(EARLY, images))

    def test_it_is_noticed_before_anything_is_computed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(features.os, "posix_fallocate", full)
        prefix = Prefix()
        with pytest.raises(NoRoomError, match="could not be written: No space left on device"):
            obtain(budget(tmp_path), extraction(prefix), EARLY)
        assert not prefix.images
        assert not stored(tmp_path)

    def test_a_cut_that_is_only_wanted_is_left_out(self, tmp_path, monkeypatch):
        place = os.posix_fallocate
        small = size_of(POOLED)
        monkeypatch.setattr(
            features.os, "posix_fallocate", lambda *given: place(*given) if given[-1] <= small else full()
        )
        prefix = Prefix()
        obtain(budget(tmp_path), extraction(prefix), POOLED, wanted=(EARLY,))
        assert prefix.cuts == [(POOLED,)]
        assert stored(tmp_path) == ["late-average.f32"]

    def test_in_the_middle_it_leaves_nothing(self, tmp_path, monkeypatch):
        write, prefix = os.pwrite, Prefix()

        def filling(file: int, data: bytes, place: int) -> int:
            return full() if len(prefix.images) > 20 and len(data) > 1 else write(file, data, place)

        monkeypatch.setattr(features.os, "pwrite", filling)
        with pytest.raises(NoRoomError, match="could not be written: No space left on device"):
            obtain(budget(tmp_path), extraction(prefix), EARLY, wanted=(LATE,))
        assert not stored(tmp_path)
        monkeypatch.undo()
        np.testing.assert_array_equal(obtain(budget(tmp_path), extraction(prefix), EARLY).array, whole(EARLY))

    def test_what_a_pass_notes_of_itself_may_not_fit_either(self, tmp_path, monkeypatch):
        monkeypatch.setattr(features, "written_whole", full)
        with pytest.raises(NoRoomError, match=r"could not be kept: .*No space left on device"):
            obtain(budget(tmp_path), extraction(Prefix()), EARLY)
        assert not stored(tmp_path)

    def test_a_share_is_on_the_disk_before_it_is_marked_as_done(self, tmp_path, monkeypatch):
        """Else another machine could read zeros that it takes for features."""
        calls: list[str] = []
        write, sync = os.pwrite, os.fdatasync

        def written(file: int, data: bytes, place: int) -> int:
            calls.append({1: "done", 8: "sum"}.get(len(data), "features"))
            return write(file, data, place)

        def synced(file: int) -> None:
            calls.append("synced")
            sync(file)

        monkeypatch.setattr(features.os, "pwrite", written)
        monkeypatch.setattr(features.os, "fdatasync", synced)
        obtain(budget(tmp_path), extraction(Prefix()), EARLY)
        assert calls == ["sum", "features", "synced", "synced", "done"] * SHARES

    @pytest.mark.parametrize("kind", ["lockf", "flock"])
    def test_a_file_system_without_locks_keeps_nothing(self, kind, tmp_path, monkeypatch):
        def refused(*given: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(features.fcntl, kind, refused)
        with pytest.raises(NoRoomError, match=r"could not be kept: .*No locks available"):
            obtain(budget(tmp_path), extraction(Prefix()), EARLY)

    def test_writes_that_take_a_part_are_gone_on_with(self, tmp_path, monkeypatch):
        write = os.pwrite
        monkeypatch.setattr(features.os, "pwrite", lambda file, data, place: write(file, data[:37], place))
        np.testing.assert_array_equal(obtain(budget(tmp_path), extraction(Prefix()), EARLY).array, whole(EARLY))


def full(*given: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def age_of(folder: Path, described: Extraction, seconds: float) -> None:
    """Let features have been used some seconds ago."""
    (file,) = (folder / "features" / described.digest).glob("*.f32")
    used = time.time() - seconds
    os.utime(file, (used, used))
