"""Run folders at a URL: names, working copies, and a sweep that is killed here and goes on elsewhere."""

import json
import time
import uuid
from pathlib import Path

import pytest
from rich.console import Console

from cxr_models.storage import append_whole
from sweep import lease, run_home
from sweep.commit import read_commit
from sweep.folder_lock import FolderInUse
from sweep.record import RunFolder, read_lines
from sweep.remote import Store
from sweep.run import WRONG_INPUT, main
from sweep.run_home import RunHome, send_rest
from tests.stored_sweeps import killed_and_gone_on
from tests.stores import FaultyFileSystem, failing, objects

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "search_spaces" / "smoke.yaml"


@pytest.fixture
def url() -> str:
    return f"faulty://bucket/{uuid.uuid4().hex}/runs"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "SETTLED_AFTER_S", 0.0)
    monkeypatch.setattr(run_home, "SOON_S", 0.2)


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def test_a_folder_is_as_ever(tmp_path, console):
    home = RunHome(str(tmp_path / "runs"), tmp_path / "cache")
    home.check()
    folder = home.create("x", exactly=False)
    assert home.create("x", exactly=False).path.name == "x-2"
    assert home.shown(folder.report) == str(tmp_path / "runs" / "x" / "report.html")
    with home.held(folder, console), pytest.raises(FolderInUse), home.held(folder, console):
        pass
    assert home.settle(interrupted=False) == ""
    assert home.latest("x", exactly=False).path.name == "x-2"


def test_names_are_those_at_the_url(url, tmp_path, console):
    here, there = (RunHome(url, tmp_path / name) for name in ("one", "two"))
    first = here.create("x", exactly=True)
    with here.held(first, console):
        first.spec.write_text("name: x")
    assert objects(f"{url}/x")["spec.yaml"] == b"name: x"
    assert here.shown(first.report) == f"{url}/x/report.html"
    with pytest.raises(ValueError, match=f"{url}/x has an earlier sweep in it; choose another --name or --out"):
        there.create("x", exactly=True)
    second = there.create("x", exactly=False)
    assert second.path.name == "x-2"
    with there.held(second, console):
        pass
    assert RunHome(url, tmp_path / "three").latest("x", exactly=False).path.name == "x-2"
    assert RunHome(url, tmp_path / "three").latest("x", exactly=True).path.name == "x"
    with pytest.raises(ValueError, match=f"expected the run folder of a sweep at {url}/y, but found nothing there"):
        RunHome(url, tmp_path / "three").latest("y", exactly=False)


def test_the_newer_of_copy_and_mirror_counts(url, tmp_path, console):
    def work(cache: str, word: str) -> RunFolder:
        home = RunHome(url, tmp_path / cache)
        folder = home.latest("x", exactly=True)
        with home.held(folder, console):
            append_whole(folder.epoch_record, json.dumps({"by": word}) + "\n")
        return folder

    home = RunHome(url, tmp_path / "one")
    with home.held(home.create("x", exactly=True), console):
        home.latest("x", exactly=True).report.write_text("a report")
    first = work("one", "first")
    inode, begun = first.epoch_record.stat().st_ino, len(FaultyFileSystem.calls)
    work("one", "again")
    put = {path.rpartition("/")[2] for call, path in FaultyFileSystem.calls[begun:] if call == "put"}
    assert put == {"epochs.jsonl"}, "what was there was sent again"
    assert first.epoch_record.stat().st_ino == inode, "a copy that is as new was fetched"
    second = work("two", "elsewhere")
    assert [entry["by"] for entry in read_lines(second.epoch_record)] == ["first", "again", "elsewhere"]
    append_whole(first.epoch_record, json.dumps({"by": "what nobody heard of"}) + "\n")
    last = work("one", "back")
    assert [entry["by"] for entry in read_lines(last.epoch_record)] == ["first", "again", "elsewhere", "back"]


def test_a_copy_that_got_further_than_its_mirror_stays(url, tmp_path, console, monkeypatch):
    monkeypatch.setattr(run_home, "PATIENCE_OF_INTERRUPTED_S", 0.2)
    home = RunHome(url, tmp_path / "cache")
    folder = home.create("x", exactly=True)
    with home.held(folder, console):
        append_whole(folder.epoch_record, "{}\n")

    def fails(call, path):
        if "lease" not in path:
            raise ConnectionError("refused")

    home = RunHome(url, tmp_path / "cache")
    with home.held(folder, console):
        time.sleep(0.1)
        with failing(fails):
            append_whole(folder.epoch_record, "{}\n")
            lacking = home.settle(interrupted=True)
    assert f"{url}/x lacks the last of this sweep" in lacking
    assert f"all of it is kept in {folder.path}, and `python -m sweep.sync {folder.path}` sends it" in lacking
    RunHome(url, tmp_path / "cache").bring(folder)
    assert len(list(read_lines(folder.epoch_record))) == 2
    assert send_rest(folder) == f"{url}/x"
    assert read_commit(Store(f"{url}/x")).record == {"state/epochs.jsonl": 6}


def test_what_has_gone_on_elsewhere_is_not_sent_over(url, tmp_path, console):
    homes = [RunHome(url, tmp_path / name) for name in ("one", "two")]
    first = homes[0].create("x", exactly=True)
    with homes[0].held(first, console):
        append_whole(first.epoch_record, "{}\n")
    second = homes[1].latest("x", exactly=True)
    with homes[1].held(second, console):
        append_whole(second.epoch_record, "{}\n")
    with pytest.raises(FolderInUse, match="the sweep has gone on elsewhere; nothing was sent"):
        send_rest(first)
    assert send_rest(second) == f"{url}/x"
    assert send_rest(RunFolder.create(tmp_path, "other", exactly=True)) == ""


def test_a_sweep_that_was_killed_before_anything_was_there_begins_anew(url, tmp_path, console):
    store = Store(f"{url}/x")
    held = lease.Lease(store)
    held.acquire()
    held.release()
    home = RunHome(url, tmp_path / "cache")
    folder = home.latest("x", exactly=True)
    with home.held(folder, console):
        assert folder.state.is_dir()
        assert not folder.holds_inputs


@pytest.mark.parametrize(
    ("error", "said"),
    [(PermissionError("Access Denied"), "no permission"), (ConnectionError("refused"), "cannot be reached")],
)
def test_a_storage_that_takes_nothing_is_told_before_anything_begins(error, said, url, tmp_path, capsys):
    def fails(call, path):
        raise error

    with failing(fails):
        status = main([str(SPACE), "--out", url, "--cache-dir", str(tmp_path / "cache")])
    told = capsys.readouterr().err
    assert status == WRONG_INPUT
    assert f"expected to write {url}/" in told
    assert said in told
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("option", ["--out", "--data"])
def test_a_secret_in_an_argument_is_refused(option, tmp_path, capsys):
    command = [str(SPACE), option, "s3://KEY:hidden@bucket/x", "--cache-dir", str(tmp_path / "cache")]
    assert main(command) == WRONG_INPUT
    told = capsys.readouterr().err
    assert "a key, a password or a signature in it" in told
    assert "hidden" not in told


def test_a_resume_of_nothing(url, tmp_path, capsys):
    command = [str(SPACE), "--out", url, "--name", "x", "--resume", "--cache-dir", str(tmp_path / "cache")]
    assert main(command) == WRONG_INPUT
    assert f"expected the run folder of a sweep at {url}/x, but found nothing there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_elsewhere_from_the_mirror_alone(tmp_path, cache_dir):
    killed_and_gone_on(f"file://{tmp_path}/storage", tmp_path, cache_dir)
