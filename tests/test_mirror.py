"""A mirror from which another machine can go on, whenever this one dies and whatever the storage does."""

import json
import os
import random
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cxr_models.storage import append_whole, written_whole
from cxr_models.trial import BEST_WEIGHTS, CHECKPOINT
from sweep import lease, mirror
from sweep.commit import COMMIT, Commit, noted_mirror, read_commit
from sweep.lease import Lease
from sweep.mirror import Mirror
from sweep.record import RunFolder, read_lines
from sweep.remote import NothingThere, StorageError, Store
from sweep.run_home import pull
from tests.stores import failing, objects, wait_for


@pytest.fixture
def store() -> Store:
    return Store(f"faulty://bucket/{uuid.uuid4().hex}/sweep")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "sweep", exactly=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module, name, value in (
        (mirror, "ROUND_EVERY_S", 0.01),
        (mirror, "FIRST_PAUSE_S", 0.01),
        (mirror, "OUTAGE_TOLD_AFTER_S", 0.05),
        (mirror, "PATIENCE_S", 0.2),
        (lease, "SETTLED_AFTER_S", 0.0),
    ):
        monkeypatch.setattr(module, name, value)


class Sweep:
    """Writes files in the order that a sweep writes them, one step at a time: three trials at once, over and over.

    A checkpoint says its epoch and which was the best, the file of the best weights says of which epoch they are.
    """

    def __init__(self, folder: RunFolder, seed: int) -> None:
        self.folder = folder
        self._random = random.Random(seed)
        self._begun = 0
        self._trials = [self._trial() for _ in range(3)]
        self._leader: tuple[str, float] = ("", -1.0)

    def step(self) -> None:
        place = self._random.randrange(len(self._trials))
        if next(self._trials[place], None) is None:
            self._trials[place] = self._trial()

    def _trial(self) -> Iterator[int]:
        self._begun += 1
        name = f"trial{self._begun}"
        append_whole(self.folder.suggestion_record, json.dumps({"trial_id": name}) + "\n", durable=False)
        values: list[float] = []
        for epoch in range(1, self._random.randint(2, 6)):
            values.append(self._random.random())
            best = 1 + values.index(max(values))
            before = 1 + values.index(max(values[:-1])) if epoch > 1 else 0
            if best != epoch and before == epoch - 1:
                yield self._write(name, BEST_WEIGHTS, {"epoch": best})  # before the first that is not the best
            yield self._write(name, CHECKPOINT, {"epoch": epoch, "best": best})
            append_whole(self.folder.epoch_record, json.dumps({"trial_id": name, "epoch": epoch}) + "\n", durable=False)
            yield 0
        yield self._write(name, BEST_WEIGHTS, {"epoch": best})
        result = {"trial_id": name, "epochs": len(values), "best_epoch": best, "value": max(values)}
        append_whole(self.folder.trial_record, json.dumps(result) + "\n", durable=False)
        yield 0
        (self.folder.trial(name) / CHECKPOINT).unlink()
        if max(values) > self._leader[1]:
            (loser, _), self._leader = self._leader, (name, max(values))
        else:
            loser = name
        (self.folder.trial(loser) / BEST_WEIGHTS).unlink(missing_ok=True) if loser else None

    def _write(self, name: str, file: str, values: dict[str, int]) -> int:
        with written_whole(self.folder.trial(name) / file, durable=False) as scratch:
            scratch.write_text(json.dumps(values))
        return 0


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def check_can_go_on(folder: RunFolder) -> None:
    """What `--resume` relies on."""
    begun = {entry["trial_id"] for entry in read_lines(folder.suggestion_record)}
    ended = {entry["trial_id"]: entry for entry in read_lines(folder.trial_record)}
    epochs: dict[str, int] = {}
    for entry in read_lines(folder.epoch_record):
        epochs[entry["trial_id"]] = entry["epoch"]
    assert {*epochs, *ended} <= begun
    for name in epochs.keys() - ended.keys():
        checkpoint = read(folder.trial(name) / CHECKPOINT)
        assert checkpoint, f"{name} would begin anew"
        assert checkpoint["epoch"] >= epochs[name]
        if checkpoint["best"] < checkpoint["epoch"]:
            assert read(folder.trial(name) / BEST_WEIGHTS) == {"epoch": checkpoint["best"]}
    if ended:
        leader = max(ended.values(), key=lambda entry: entry["value"])
        assert read(folder.trial(leader["trial_id"]) / BEST_WEIGHTS) == {"epoch": leader["best_epoch"]}
        assert all(epochs[name] == entry["epochs"] for name, entry in ended.items())


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_whenever_it_is_cut_off_another_machine_can_go_on(seed, folder, store, tmp_path, monkeypatch):
    sweep, link = Sweep(folder, seed), os.link
    chance = random.Random(seed)
    calls, dies_at, going_on = 0, 0, True

    def busy(call: str, path: str) -> None:
        """The sweep goes on while the mirror works, until the storage is gone."""
        nonlocal calls
        calls += 1
        for _ in range(chance.randrange(4)):
            sweep.step()
        if calls == dies_at:
            raise ConnectionError("gone")

    def linked(source: Path, target: Path) -> None:
        for _ in range(chance.randrange(1, 9) if going_on and chance.random() < 0.15 else 0):
            sweep.step()
        link(source, target)

    monkeypatch.setattr(mirror.os, "link", linked)
    held = Lease(store)
    held.acquire()
    writer, seen = Mirror(folder, store, held, lambda line: None), 0
    for _ in range(30):
        sweep.step()
        dies_at = calls + chance.randrange(1, 40)
        with failing(busy), suppress(StorageError):
            writer._round(everything=False)
        commit = read_commit(store)
        if commit is None:
            continue
        pull(store, commit, tmp_path / "elsewhere")
        check_can_go_on(RunFolder(tmp_path / "elsewhere"))
        seen += 1
    assert seen > 3
    going_on = False
    writer.send_all()
    pull(store, read_commit(store), tmp_path / "elsewhere")
    held.release()

    def files(root: Path) -> dict[str, bytes]:
        found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in found.items() if name != COMMIT}

    assert files(tmp_path / "elsewhere") == files(folder.path)
    of_trials = [name for name in objects(store.url) if name.startswith("state/trials/")]
    assert len(of_trials) == len(read_commit(store).kept), "objects were left over"


@pytest.fixture
def running(folder, store):
    """A mirror at work, and what it told."""
    told: list[str] = []
    held = Lease(store)
    held.acquire()
    found = Mirror(folder, store, held, told.append)
    found.start()
    yield found, told
    found.close(10.0)
    held.release()


def test_what_is_new_is_there_soon_and_what_is_not_of_it_never(folder, store, running):
    folder.lock.touch()
    (folder.state / "ray").mkdir()
    (folder.state / "ray" / "its own.pkl").touch()
    (folder.path / ".scratch").touch()
    folder.report.write_text("first")
    wait_for(lambda: objects(store.url).get("report.html") == b"first")
    folder.report.write_text("second")
    append_whole(folder.epoch_record, "{}\n")
    wait_for(lambda: objects(store.url).get("report.html") == b"second")
    wait_for(lambda: read_commit(store).record.get("state/epochs.jsonl") == 3)
    running[0].close(10.0)
    assert running[0].problem == ""
    assert set(objects(store.url)) == {"report.html", "state/epochs.jsonl", "state/lease.json", "state/mirror.json"}
    assert noted_mirror(folder.path).number == read_commit(store).number


def test_an_outage_is_told_once_and_made_good(folder, store, running):
    mirrored, told = running
    folder.report.write_text("first")
    wait_for(lambda: "report.html" in objects(store.url))

    def fails(call, path):
        raise ConnectionError("refused")

    with failing(fails):
        folder.report.write_text("second")
        wait_for(lambda: bool(told))
        wait_for(lambda: "cannot be reached" in mirrored.problem)
    wait_for(lambda: objects(store.url)["report.html"] == b"second")
    wait_for(lambda: len(told) == 2)
    assert "takes nothing (the storage cannot be reached" in told[0]
    assert "takes what it is sent again" in told[1]
    assert mirrored.problem == ""


def test_a_storage_that_stays_away_holds_the_end_up_no_longer_than_it_says(folder, store, running):
    mirrored, _ = running

    def fails(call, path):
        raise PermissionError("the token has expired")

    with failing(fails):
        folder.report.write_text("last")
        mirrored.close(10.0)
    assert "no permission" in mirrored.problem
    assert not running[0]._thread.is_alive()


def test_a_storage_that_hangs_holds_up_nothing_but_the_end(folder, store, running):
    mirrored, _ = running
    goes_on = threading.Event()

    def hangs(call, path):
        goes_on.wait(20.0)

    try:
        with failing(hangs):
            folder.report.write_text("last")
            mirrored.close(0.3)
            assert mirrored.problem
    finally:
        goes_on.set()


def test_who_loses_the_lease_sends_nothing_more(folder, store, running):
    _, told = running
    folder.report.write_text("mine")
    wait_for(lambda: "report.html" in objects(store.url))
    store.write("state/lease.json", json.dumps({"id": "other", "host": "elsewhere", "process": 7}).encode())
    before = read_commit(store)
    append_whole(folder.epoch_record, "{}\n")
    wait_for(lambda: bool(told))
    assert "process 7 on elsewhere works on this sweep" in told[0]
    assert read_commit(store) == before


def test_the_ledger_is_never_ahead_of_the_database(folder, store, monkeypatch):
    monkeypatch.setattr(mirror, "LAZY_EVERY_S", 1e9)
    with sqlite3.connect(folder.tracking_database) as database:
        database.execute("create table runs (name text)")
    held = Lease(store)
    held.acquire()
    writer = Mirror(folder, store, held, lambda line: None)
    writer._lazy_at = mirror.time.monotonic()
    append_whole(folder.state / "tracking.jsonl", "{}\n")
    append_whole(folder.epoch_record, "{}\n")
    writer._round(everything=False)
    assert "state/tracking.jsonl" not in read_commit(store).record
    assert "state/epochs.jsonl" in read_commit(store).record
    writer._round(everything=True)
    assert read_commit(store).record["state/tracking.jsonl"] == 3
    assert objects(store.url)["mlflow.db"].startswith(b"SQLite format 3")
    held.release()


def test_what_is_no_commit_is_refused(store):
    with pytest.raises(NothingThere):
        store.read("state/mirror.json")
    assert read_commit(store) is None
    store.write("state/mirror.json", b"{}")
    with pytest.raises(StorageError, match="begin anew under another --name"):
        read_commit(store)
    store.write("state/mirror.json", Commit(3, "me", {"a": 1}, {"b": ("b.3", 2)}).to_json())
    assert read_commit(store) == Commit(3, "me", {"a": 1}, {"b": ("b.3", 2)})
