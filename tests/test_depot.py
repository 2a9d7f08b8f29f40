"""Files go to nodes once and whole, what trials leave comes home whole, nothing else goes anywhere. Without Ray."""

import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_models import checksums
from cxr_models.arrays import kept_array
from cxr_models.cuts import Cut
from cxr_models.features import FeatureBudget
from cxr_models.trial import TrialConfig
from sweep import depot, node_files, ray_worker
from sweep.depot import Carried, Depot, DepotDamaged, DepotRefused, Home, carried_text, directly, files_of
from sweep.node_files import NODE_CACHE, NodeFiles, moved, moved_path
from sweep.ray_depot import AskingRay
from sweep.ray_worker import FilesOfNodes
from sweep.worker import Work
from tests import programs

CONFIG = TrialConfig("vanilla_cnn", image_side=8)


class Sweep:
    """Home with a cache and the state of a run folder, and what every trial reads."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.state = folder / "home" / "cache", folder / "home" / "runs" / "x" / "state"
        (self.state / "trials").mkdir(parents=True)

        def fill(put: Any) -> None:
            put(0, np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8, 1))

        pixels = kept_array(self.cache / "pixels" / "abc-8px-1ch.npy", (5, 8, 8, 1), fill)
        weights = self.cache / "weights" / "123" / "w.weights.h5"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(os.urandom(1000))
        plain = programs.work(self.state / "trials", "quick")
        budget = FeatureBudget(self.cache / "features", 10**9, {})
        data = replace(plain.data, pixels={8: pixels}, weights={("vanilla_cnn", "none", 8): weights}, features=budget)
        self.work: Work = replace(plain, data=data)
        self.home = Home(self.cache, self.state)
        self.home.mark()
        self.depot = Depot(self.home, files_of(data))
        self.asked: list[tuple[Any, ...]] = []

    def ask(self, method: str, *arguments: Any) -> Any:
        self.asked.append((method, *arguments[:2]))
        return directly(self.depot)(method, *arguments)

    def fetched(self) -> list[str]:
        return [name for method, name, *rest in self.asked if method == "read" and rest == [0]]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


@pytest.fixture
def elsewhere(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeFiles:
    """A node that sees neither folder of the driver's, and has a cache of its own."""
    return node(sweep, tmp_path / "node", monkeypatch)


def node(sweep: Sweep, folder: Path, monkeypatch: pytest.MonkeyPatch) -> NodeFiles:
    monkeypatch.setenv(NODE_CACHE, str(folder))
    hidden = Home(sweep.cache, sweep.state)  # a marker that is not there: the folders are others of the same names
    return NodeFiles(hidden, sweep.ask)


class TestPaths:
    PLACES = {Path("/cache"): Path("/node/cache"), Path("/runs/x/state"): Path("/node/cache/trials/t")}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("path", "here"),
        [
            ("/cache/pixels/a.npy", "/node/cache/pixels/a.npy"),
            ("/cache", "/node/cache"),
            ("/runs/x/state/trials/t1", "/node/cache/trials/t/trials/t1"),
            ("/cache2/pixels/a.npy", "/cache2/pixels/a.npy"),  # only begins like it
            ("/runs/x/report.html", "/runs/x/report.html"),
        ],
    )
    def test_a_path_of_the_driver_as_it_is_on_a_node(self, path, here):
        assert moved_path(Path(path), self.PLACES) == Path(here)

    def test_the_innermost_folder_counts(self):
        places = {Path("/data"): Path("/a"), Path("/data/runs/state"): Path("/b")}
        assert moved_path(Path("/data/runs/state/trials"), places) == Path("/b/trials")
        assert moved_path(Path("/data/cache"), places) == Path("/a/cache")

    def test_every_path_of_the_work_is_moved_and_nothing_else(self):
        cut = Cut("layer", "", (4,))
        budget = FeatureBudget(Path("/cache/features"), 7, {("b", "w", 8): (cut,)})
        plain = programs.work(Path("/runs/x/state/trials"), "quick")
        data = replace(
            plain.data,
            pixels={8: Path("/cache/pixels/a.npy")},
            masks={8: Path("/cache/masks/a.npy")},
            masked={("dataset", 8): Path("/cache/masked/a.npy")},
            weights={("b", "w", 8): Path("/cache/weights/1/w.h5")},
            features=budget,
        )
        work = replace(plain, data=data)
        here = moved(work, self.PLACES)
        assert here.folder == Path("/node/cache/trials/t/trials")
        assert here.data.pixels == {8: Path("/node/cache/pixels/a.npy")}
        assert here.data.masks == {8: Path("/node/cache/masks/a.npy")}
        assert here.data.masked == {("dataset", 8): Path("/node/cache/masked/a.npy")}
        assert here.data.weights == {("b", "w", 8): Path("/node/cache/weights/1/w.h5")}
        assert here.data.features == replace(budget, folder=Path("/node/cache/features"))
        assert here.data.labels is data.labels
        assert moved(work, {}).data.pixels == data.pixels


class TestDepot:
    @pytest.mark.parametrize(
        "name", ["../runs/x/state/trials", "/etc/passwd", "pixels/../../secret", "pixels/other.npy", "listing.json", ""]
    )
    def test_only_files_of_the_sweep_are_handed_out(self, sweep, name):
        (sweep.cache / "listing.json").write_text("patients")
        for call in (lambda: sweep.depot.listed(name), lambda: sweep.depot.read(name, 0)):
            with pytest.raises(DepotRefused, match="is no file of this sweep's cache"):
                call()

    @pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a\nb", "/abs"])
    def test_only_plain_names_in_folders_of_trials_are_written_and_read(self, sweep, name):
        sweep.depot.begin("t1", "me")
        data = b"x"
        with pytest.raises(DepotRefused, match="expected the plain name of a trial or of a file"):
            sweep.depot.put("t1", "me", name, 0, data, zlib.crc32(data))
        with pytest.raises(DepotRefused, match="expected the plain name"):
            sweep.depot.begin(name, "me")
        with pytest.raises(DepotRefused, match="expected the plain name"):
            sweep.depot.read_of_trial("t1", name, 0)

    def test_what_arrives_damaged_is_refused(self, sweep):
        sweep.depot.begin("t1", "me")
        with pytest.raises(DepotDamaged, match=r"a part of best\.npz of trial t1 arrived damaged"):
            sweep.depot.put("t1", "me", "best.npz", 0, b"x", 0)
        sweep.depot.put("t1", "me", "best.npz", 0, b"x", zlib.crc32(b"x"))
        with pytest.raises(DepotDamaged, match=r"best\.npz of trial t1 arrived in part"):
            sweep.depot.keep("t1", "me", {"best.npz": 2}, ["best.npz"])
        assert not (sweep.state / "trials" / "t1" / "best.npz").exists()

    def test_a_node_that_was_cut_off_and_comes_back_changes_nothing(self, sweep):
        sweep.depot.begin("t1", "old")
        sweep.depot.put("t1", "old", "checkpoint.npz", 0, b"old", zlib.crc32(b"old"))
        sweep.depot.begin("t1", "new")
        sweep.depot.put("t1", "new", "checkpoint.npz", 0, b"new", zlib.crc32(b"new"))
        for call in (
            lambda: sweep.depot.put("t1", "old", "checkpoint.npz", 0, b"old", zlib.crc32(b"old")),
            lambda: sweep.depot.keep("t1", "old", {}, []),
        ):
            with pytest.raises(DepotRefused, match="trial t1 has gone on elsewhere"):
                call()
        sweep.depot.keep("t1", "new", {"checkpoint.npz": 3}, ["checkpoint.npz"])
        assert (sweep.state / "trials" / "t1" / "checkpoint.npz").read_bytes() == b"new"


class TestFetching:
    def test_files_arrive_whole_and_once_for_all_workers_of_a_node(self, sweep, elsewhere, tmp_path, monkeypatch):
        monkeypatch.setattr(depot, "CHUNK_BYTES", 100)
        monkeypatch.setattr(node_files, "CHUNK_BYTES", 100)
        elsewhere.ready(sweep.work, "t1", CONFIG)
        here = elsewhere.work(sweep.work).data
        there = sweep.work.data
        (weights,) = here.weights.values()
        for own, of_home in ((here.pixels[8], there.pixels[8]), (weights, *there.weights.values())):
            assert own.is_relative_to(tmp_path / "node")
            assert own.read_bytes() == of_home.read_bytes()
            assert own.stat().st_mtime_ns == of_home.stat().st_mtime_ns, "features are named after it"
            assert checksums.is_sound(own)
        first = sweep.fetched()
        assert sorted(first) == ["pixels/abc-8px-1ch.npy", "pixels/abc-8px-1ch.npy.sums", "weights/123/w.weights.h5"]
        elsewhere.ready(sweep.work, "t2", CONFIG)
        node(sweep, tmp_path / "node", monkeypatch).ready(sweep.work, "t3", CONFIG)
        assert sweep.fetched() == first, "another worker of the node finds them"

    def test_a_file_that_was_damaged_on_the_node_is_fetched_again(self, sweep, elsewhere, tmp_path, monkeypatch):
        elsewhere.ready(sweep.work, "t1", CONFIG)
        own = elsewhere.work(sweep.work).data.pixels[8]
        data = bytearray(own.read_bytes())
        data[-1] ^= 1
        own.write_bytes(data)
        node(sweep, tmp_path / "node", monkeypatch).ready(sweep.work, "t2", CONFIG)
        assert own.read_bytes() == sweep.work.data.pixels[8].read_bytes()

    def test_what_is_damaged_on_the_way_is_not_kept(self, sweep, tmp_path, monkeypatch):
        def ask(method: str, *arguments: Any) -> Any:
            answer = sweep.ask(method, *arguments)
            return (lambda: (b"\0" * len(answer()[0]), answer()[1])) if method == "read" else answer

        monkeypatch.setenv(NODE_CACHE, str(tmp_path / "node"))
        with pytest.raises(DepotDamaged, match="arrived damaged"):
            NodeFiles(Home(sweep.cache, sweep.state), ask).ready(sweep.work, "t1", CONFIG)
        assert not list((tmp_path / "node").rglob("*.npy"))

    def test_the_same_path_on_another_machine_is_another_folder(self, sweep, tmp_path, monkeypatch):
        """By default a node's cache lies at the path of the driver's; only the marker tells whether it is the same."""
        monkeypatch.delenv(NODE_CACHE, raising=False)
        found = NodeFiles(Home(sweep.cache, sweep.state), sweep.ask)
        shutil.move(sweep.cache, tmp_path / "of-the-driver")  # as seen from the node: nothing there
        driver = Sweep.__new__(Sweep)
        moved_home = Home(tmp_path / "of-the-driver", sweep.state)
        driver.depot = Depot(moved_home, frozenset((tmp_path / "of-the-driver").rglob("*.*")))
        found._ask = directly(driver.depot)
        found.ready(sweep.work, "t1", CONFIG)
        own = found.work(sweep.work).data.pixels[8]
        assert own == sweep.work.data.pixels[8]
        assert checksums.is_sound(own)

    def test_where_the_driver_s_folders_are_seen_nothing_is_copied(self, sweep, monkeypatch):
        monkeypatch.delenv(NODE_CACHE, raising=False)
        at_home = NodeFiles(sweep.home, sweep.ask)
        at_home.ready(sweep.work, "t1", CONFIG)
        here = at_home.work(sweep.work)
        assert (here.folder, here.data.pixels, here.data.features) == (
            sweep.work.folder,
            sweep.work.data.pixels,
            sweep.work.data.features,
        )
        assert sweep.fetched() == []
        own = here.folder / "t1"
        (own / "best.npz").write_bytes(b"x")
        at_home.bring_home("t1")
        at_home.forget("t1")
        assert (own / "best.npz").read_bytes() == b"x"

    def test_markers_go_when_the_sweep_ends(self, sweep):
        assert sweep.home.is_seen(sweep.cache)
        assert sweep.home.is_seen(sweep.state)
        sweep.home.unmark()
        assert not sweep.home.is_seen(sweep.cache)
        assert [*sweep.state.iterdir()] == [sweep.state / "trials"]

    def test_features_take_no_more_than_the_node_has_room_for(self, sweep, elsewhere, monkeypatch):
        assert elsewhere.work(sweep.work).data.features.limit_bytes == 10**9
        monkeypatch.setattr(node_files, "room_for_features", lambda folder: 1234)
        features = elsewhere.work(sweep.work).data.features
        assert features.limit_bytes == 1234
        assert features.folder.is_relative_to(os.environ[NODE_CACHE])

    def test_a_node_where_no_cache_can_be_is_told_what_to_set(self, sweep, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        found = node(sweep, tmp_path / "file" / "cache", monkeypatch)
        with pytest.raises(OSError, match=r"expected a folder for this node's copies .*set SWEEP_NODE_CACHE"):
            found.work(sweep.work)


def test_a_node_with_other_versions_is_told_what_to_install(sweep, monkeypatch):
    files = FilesOfNodes(sweep.home, AskingRay(None))
    files.check_versions()
    monkeypatch.setattr(ray_worker, "version_of", lambda name: "9.9" if name == "keras" else files.versions[name])
    with pytest.raises(RuntimeError, match=r"this node has keras 9\.9 in place of .*: install there what"):
        files.check_versions()


class TestTrials:
    """A trial's folder: pulled before it begins, brought home with each batch of epochs."""

    @pytest.fixture
    def folders(self, sweep: Sweep, elsewhere: NodeFiles) -> tuple[Path, Path]:
        """Of a trial that has begun on the node: there, and at home."""
        elsewhere.ready(sweep.work, "t1", CONFIG)
        return elsewhere.work(sweep.work).folder / "t1", sweep.state / "trials" / "t1"

    def test_what_a_trial_leaves_comes_home_and_goes_with_it(self, sweep, elsewhere, folders, tmp_path, monkeypatch):
        monkeypatch.setattr(depot, "CHUNK_BYTES", 100)
        monkeypatch.setattr(node_files, "CHUNK_BYTES", 100)
        own, at_home = folders
        left = {"checkpoint.npz": os.urandom(350), "best.npz": os.urandom(100), "empty": b""}
        for name, data in left.items():
            (own / name).write_bytes(data)
        (own / ".123-half-written.npz").write_bytes(b"x")
        elsewhere.bring_home("t1")
        assert {path.name: path.read_bytes() for path in at_home.iterdir()} == left
        second = node(sweep, tmp_path / "second", monkeypatch)
        second.ready(sweep.work, "t1", CONFIG)
        its_own = second.work(sweep.work).folder / "t1"
        assert {path.name: path.read_bytes() for path in its_own.iterdir()} == left
        (own / "best.npz").write_bytes(b"late")
        with pytest.raises(DepotRefused, match="gone on elsewhere"):
            elsewhere.bring_home("t1")
        second.forget("t1")
        assert not its_own.exists()

    def test_only_what_has_changed_travels(self, sweep, elsewhere, folders):
        own, at_home = folders
        (own / "best.npz").write_bytes(b"best")
        (own / "checkpoint.npz").write_bytes(b"1")
        elsewhere.bring_home("t1")
        sweep.asked.clear()
        elsewhere.bring_home("t1")
        assert sweep.asked == [], "nothing has"
        (own / "scratch").write_bytes(b"22")
        (own / "scratch").replace(own / "checkpoint.npz")
        elsewhere.bring_home("t1")
        assert [method for method, *_ in sweep.asked] == ["put", "keep", "count"]
        assert (at_home / "checkpoint.npz").read_bytes() == b"22"
        (own / "checkpoint.npz").unlink()
        elsewhere.bring_home("t1")
        assert [path.name for path in at_home.iterdir()] == ["best.npz"], "what is gone there goes here"

    def test_a_node_that_dies_in_the_middle_leaves_all_as_it_was(self, sweep, elsewhere, folders, monkeypatch):
        own, at_home = folders
        for name in ("best.npz", "checkpoint.npz"):
            (own / name).write_bytes(b"old")
        elsewhere.bring_home("t1")
        for name in ("best.npz", "checkpoint.npz"):
            (own / name).write_bytes(b"newer")

        def dies(method: str, *arguments: Any) -> Any:
            if method == "keep":
                raise ConnectionError("of the node")
            return sweep.ask(method, *arguments)

        elsewhere._ask = dies
        with pytest.raises(ConnectionError):
            elsewhere.bring_home("t1")
        assert {path.name: path.read_bytes() for path in at_home.glob("[!.]*")} == {
            "best.npz": b"old",
            "checkpoint.npz": b"old",
        }
        sweep.depot.begin("t1", "another")
        assert sorted(path.name for path in at_home.iterdir()) == ["best.npz", "checkpoint.npz"]

    def test_files_are_those_of_one_moment(self, elsewhere, folders, monkeypatch):
        """Training goes on meanwhile: what is replaced while it is opened is opened again."""
        own, at_home = folders
        for name in ("best.npz", "checkpoint.npz"):
            (own / name).write_bytes(b"1")
        left_in, calls = node_files.left_in, []

        def replacing(folder: Path) -> list[Path]:
            calls.append(folder)
            if len(calls) == 2:  # after both have been opened
                for name in ("best.npz", "checkpoint.npz"):
                    (own / f".{name}").write_bytes(b"2")
                    (own / f".{name}").replace(own / name)
            return left_in(folder)

        monkeypatch.setattr(node_files, "left_in", replacing)
        elsewhere.bring_home("t1")
        assert {path.read_bytes() for path in at_home.iterdir()} == {b"2"}

    def test_what_was_carried_is_counted(self, sweep, elsewhere, folders):
        own, _ = folders
        (own / "best.npz").write_bytes(bytes(1500))
        elsewhere.bring_home("t1")
        carried = sweep.depot.carried()
        size = sum(path.stat().st_size for path in files_of(sweep.work.data))
        assert (carried["out"].files, carried["out"].size) == (2, size)
        assert (carried["home"].files, carried["home"].size) == (1, 1500)
        assert carried["home"].seconds > 0
        assert carried_text(carried).startswith("2 files (")
        assert "; 1 file (1.5 kB) of trials came back, which took" in carried_text(carried)
        assert carried_text({"out": Carried(), "home": Carried()}) == ""
