"""Data sets at a URL: fetched once, whole, and no more than is needed."""

import threading
import uuid
from collections import Counter
from pathlib import Path

import pytest

from cxr_models.dataset import DataError, read_manifest
from cxr_models.storage import NoSpace
from sweep import fetching
from sweep.data_plan import PlannedData, plan_data
from sweep.fetching import fetch_data, fetch_file
from sweep.remote import StorageError, Store
from sweep.spec import read_spec
from tests import layouts
from tests.stores import FaultyFileSystem, failing, put_folder
from tests.sweeps import SPACE


@pytest.fixture
def url() -> str:
    """A place that no other test has."""
    return f"faulty://bucket/{uuid.uuid4().hex}/xrays"


@pytest.fixture
def got():
    """What has been fetched since, how often."""
    begun = len(FaultyFileSystem.calls)
    return lambda: Counter(path.rpartition("/")[2] for call, path in FaultyFileSystem.calls[begun:] if call == "get")


LAYOUTS = (
    layouts.class_folders,
    layouts.covid_radiography,
    layouts.kermany,
    layouts.nested,
    layouts.dicom,
    layouts.images_and_masks,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_from_a_folder(layout, url, tmp_path):
    folder = layout(tmp_path / "xrays")
    put_folder(folder, url)
    there = read_manifest(fetch_data(url, tmp_path / "cache"), least_classes=1)
    here = read_manifest(folder, least_classes=1)
    assert there.records == here.records
    assert (there.digest, there.layout, there.notes) == (here.digest, here.layout, here.notes)


def test_a_csv_file_brings_the_images_it_lists_and_no_others(url, tmp_path, got):
    file = layouts.csv_file(tmp_path / "xrays")
    (file.parent / "other").mkdir()
    (file.parent / "other" / "not-listed.png").write_bytes(b"x" * 1000)
    put_folder(file.parent, url)
    there = read_manifest(fetch_data(f"{url}/{file.name}", tmp_path / "cache"))
    assert there.records == read_manifest(file).records
    assert "not-listed.png" not in got()
    again = got()
    fetch_data(f"{url}/{file.name}", tmp_path / "cache")
    assert got() == again


def test_a_csv_file_that_lists_what_lies_elsewhere_is_refused(url, tmp_path):
    Store(url).write("labels.csv", b"path,label\n../secret.png,a\nx.png,b\n")
    with pytest.raises(DataError, match=r"expected paths below the folder of .*labels.csv\n  found: '/"):
        fetch_data(f"{url}/labels.csv", tmp_path / "cache")


def test_only_what_has_changed_is_fetched_again(url, tmp_path, got):
    put_folder(layouts.class_folders(tmp_path / "xrays"), url)
    Store(url).write("covid/notes.txt", b"nobody reads this")
    folder = fetch_data(url, tmp_path / "cache")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert set(got().values()) == {1}
    assert len(got()) == len({path.name for path in files}) or len(files) >= len(got())
    assert not list(folder.rglob("*.txt"))
    before = got()
    assert fetch_data(url, tmp_path / "cache") == folder
    assert got() == before
    changed, vanished, harmed = files[0], files[1], files[2]
    Store(url).write(changed.relative_to(folder).as_posix(), changed.read_bytes())
    Store(url).remove(vanished.relative_to(folder).as_posix())
    harmed.write_bytes(b"somebody else was here")
    fetch_data(url, tmp_path / "cache")
    assert (got() - before).total() == 2
    assert not vanished.exists()
    assert harmed.read_bytes() != b"somebody else was here"


def test_what_was_a_file_may_become_a_folder(url, tmp_path):
    store, filesystem = Store(url), FaultyFileSystem()
    store.write("a.png", b"x")
    fetch_data(url, tmp_path / "cache")
    store.remove("a.png")
    store.write("a.png/b.png", b"y")
    folder = fetch_data(url, tmp_path / "cache")
    assert (folder / "a.png" / "b.png").read_bytes() == b"y"
    filesystem.rm(url, recursive=True)
    store.write("a.png", b"z")
    assert (fetch_data(url, tmp_path / "cache") / "a.png").read_bytes() == b"z"


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "a//x.png"])
def test_a_name_that_would_leave_the_folder_is_refused(name, url, tmp_path):
    path = f"{FaultyFileSystem._strip_protocol(url)}/{name}"
    FaultyFileSystem().pipe_file(path, b"x")
    with pytest.raises(DataError, match=r"expected names below .* that can be those of files\n  found: '"):
        fetch_data(url, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.png"))


def test_a_fetch_that_was_cut_short_goes_on(url, tmp_path, got, monkeypatch):
    monkeypatch.setattr(fetching, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(fetching, "AT_ONCE", 1)
    put_folder(layouts.class_folders(tmp_path / "xrays"), url)
    count = 0

    def fails(call, path):
        nonlocal count
        count += call == "get"
        if count > 5 and call == "get":
            raise ConnectionError("reset by peer")

    with failing(fails), pytest.raises(StorageError, match=r"cannot be reached[^\0]*5 of \d+ files are here"):
        fetch_data(url, tmp_path / "cache")
    before = got()
    assert sum(1 for value in before.values() if value == 1) >= 5
    folder = fetch_data(url, tmp_path / "cache")
    here = read_manifest(folder)
    assert here.records == read_manifest(tmp_path / "xrays").records
    assert (got() - before).total() == len(here.records) - 5


def test_a_short_outage_costs_another_attempt(url, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "FIRST_PAUSE_S", 0.0)
    put_folder(layouts.class_folders(tmp_path / "xrays"), url)
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def fails(call, path):
        with lock:
            seen[path] += call == "get"
            first = call == "get" and seen[path] == 1
        if first:
            raise TimeoutError("no answer")

    with failing(fails):
        folder = fetch_data(url, tmp_path / "cache")
    assert read_manifest(folder).records == read_manifest(tmp_path / "xrays").records


def test_half_a_file_is_never_taken_for_whole(url, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "FIRST_PAUSE_S", 0.0)
    Store(url).write("a/x.png", b"whole file")

    def half(self, rpath, lpath, **options):
        Path(lpath).write_bytes(b"whole")

    with monkeypatch.context() as patched:
        patched.setattr(FaultyFileSystem, "get_file", half)
        with pytest.raises(StorageError, match=r"expected 10 bytes of .*\n  found: 5"):
            fetch_data(url, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.png"))
    assert (fetch_data(url, tmp_path / "cache") / "a" / "x.png").read_bytes() == b"whole file"


def test_the_disk_is_looked_at_before_anything_is_fetched(url, tmp_path, got, monkeypatch):
    put_folder(layouts.class_folders(tmp_path / "xrays"), url)
    monkeypatch.setattr(fetching, "SPARE_BYTES", 10**18)
    with pytest.raises(NoSpace, match="expected room on the disk for"):
        fetch_data(url, tmp_path / "cache")
    assert not got()


def test_progress_is_told_in_megabytes_to_the_end(url, tmp_path):
    store = Store(url)
    for number in range(4):
        store.write(f"a/{number}.png", bytes(1_000_000))
    told: list[tuple[int, int]] = []
    fetch_data(url, tmp_path / "cache", lambda description: lambda done, total: told.append((done, total)))
    assert told[-1] == (4, 4)
    assert all(done < 4 for done, _ in told[:-1])


def test_of_a_run_folder_only_what_an_earlier_model_is_read_from(url, tmp_path):
    store = Store(url)
    for name in ("best/model.keras", "best/config.json", "split.csv", "state/trials/a/checkpoint.npz.1"):
        store.write(name, b"x")
    folder = fetch_file(url, tmp_path / "cache")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"best/model.keras", "best/config.json", "split.csv"}
    assert fetch_file(f"{url}/best/model.keras", tmp_path / "cache").read_bytes() == b"x"


def plan_of(source: str, tmp_path: Path) -> PlannedData:
    path = tmp_path / "space.yaml"
    facts = {"algorithm": "random", "trials": 1, "seeds": 0, "epochs": 1, "freeze": "none", "batch_sizes": 8}
    path.write_text(SPACE.format(**facts))
    return plan_data(read_spec(path, [f"data.source={source}"]), tmp_path / "cache")


def test_a_plan_divides_as_from_a_folder(url, tmp_path):
    put_folder(layouts.class_folders(tmp_path / "xrays"), url)
    there, here = plan_of(url, tmp_path), plan_of(str(tmp_path / "xrays"), tmp_path)
    assert there.splits == here.splits
    assert there.manifest.records == here.manifest.records


def test_what_is_wrong_with_the_data_names_the_url(url, tmp_path):
    Store(url).write("only/x.png", b"no picture")
    with pytest.raises(DataError, match=f"{url!r}") as raised:
        plan_of(url, tmp_path)
    assert str(tmp_path) not in str(raised.value)
