"""One machine at a time works on a sweep at a URL."""

import json
import threading
import time
import uuid

import pytest

from sweep import lease
from sweep.folder_lock import FolderInUse
from sweep.lease import LEASE, Lease
from sweep.remote import Store, ThereAlready
from tests.stores import failing, wait_for


@pytest.fixture
def store() -> Store:
    return Store(f"faulty://bucket/{uuid.uuid4().hex}/sweep")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in (("RENEWED_EVERY_S", 0.02), ("EXPIRES_AFTER_S", 0.3), ("SETTLED_AFTER_S", 0.05)):
        monkeypatch.setattr(lease, name, value)


def of_elsewhere(store: Store, **facts: object) -> None:
    """Write a lease as another machine does."""
    there = {"id": "other", "host": "elsewhere", "process": 7, "place": "there", "beat": 1, "released": False}
    store.write(LEASE, json.dumps({**there, **facts}).encode())


def test_one_at_a_time_on_this_machine(store):
    first = Lease(store)
    first.acquire()
    with pytest.raises(FolderInUse, match=r"is in use: process \d+ on .* works on this sweep; wait for its end"):
        Lease(store).acquire()
    with pytest.raises(ThereAlready):
        Lease(store).acquire(new=True)
    first.release()
    second = Lease(store)
    second.acquire()
    second.release()


def test_one_that_is_renewed_elsewhere_is_refused(store):
    ended = threading.Event()

    def renewed() -> None:
        beat = 1
        while not ended.wait(0.02):
            beat += 1
            of_elsewhere(store, beat=beat)

    of_elsewhere(store)
    thread = threading.Thread(target=renewed)
    thread.start()
    told: list[str] = []
    try:
        with pytest.raises(FolderInUse, match="process 7 on elsewhere works on this sweep"):
            Lease(store, told.append).acquire()
    finally:
        ended.set()
        thread.join()
    assert "process 7 on elsewhere has not said that it is done" in told[0]


def test_one_that_is_renewed_no_more_is_taken_over(store):
    of_elsewhere(store, at=time.time() + 1e6)  # a clock that is wrong counts for nothing
    begun = time.monotonic()
    held = Lease(store)
    held.acquire()
    assert time.monotonic() - begun >= 0.3
    held.check()
    held.release()


@pytest.mark.parametrize("facts", [{"released": True}, {"place": lease._place(), "process": 2**22 + 1, "started": 1.0}])
def test_one_that_was_released_or_whose_process_is_gone_is_taken_at_once(store, facts):
    of_elsewhere(store, **facts)
    told: list[str] = []
    held = Lease(store, told.append)
    held.acquire()
    held.release()
    assert not told


def test_of_two_that_take_one_over_the_last_has_it(store, monkeypatch):
    of_elsewhere(store, released=True)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: of_elsewhere(store, id="third"))
    with pytest.raises(FolderInUse, match="process 7 on elsewhere"):
        Lease(store).acquire()


def test_it_outlives_an_outage(store):
    held = Lease(store)
    held.acquire()

    def fails(call, path):
        raise ConnectionError("refused")

    with failing(fails):
        time.sleep(0.1)
    before = store.read(LEASE)
    wait_for(lambda: store.read(LEASE) != before)
    held.check()
    held.release()
    assert json.loads(store.read(LEASE))["released"]
