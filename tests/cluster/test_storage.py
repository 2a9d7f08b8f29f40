"""A real S3 server on loopback (moto's): what fsspec's own backend makes of it, and a sweep that goes on elsewhere.

Needs the extras `cluster` and `cluster-test`.
"""

import logging
import os
import uuid
from collections.abc import Iterator

import pytest
from rich.console import Console

from cxr_models.dataset import read_manifest
from sweep import lease
from sweep.fetching import fetch_data
from sweep.folder_lock import FolderInUse
from sweep.remote import NothingThere, StorageError, Store, ThereAlready
from sweep.run_home import RunHome
from tests import layouts
from tests.stored_sweeps import killed_and_gone_on

pytest.importorskip("s3fs", reason="needs pip install -e '.[cluster]'")
moto = pytest.importorskip("moto.server", reason="needs pip install -e '.[cluster-test]'")

BUCKET = "xrays"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "planted-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Its address; the environment has it, and credentials."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    serving = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    serving.start()
    host, port = serving.get_host_and_port()
    before = dict(os.environ)
    os.environ.update({**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"})
    try:
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield os.environ["AWS_ENDPOINT_URL"]
    finally:
        os.environ.clear()
        os.environ.update(before)
        serving.stop()


@pytest.fixture
def url(server) -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def test_objects_come_and_go(url, tmp_path):
    store = Store(url)
    assert store.files() == {}
    assert store.folders() == set()
    with pytest.raises(NothingThere, match="nothing there"):
        store.file()
    store.write("a/b.txt", b"one", new=True)
    with pytest.raises(ThereAlready):
        store.write("a/b.txt", b"other", new=True)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(12_000_000))
    store.put("c.bin", large)
    store.get("c.bin", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert {name: entry.size for name, entry in store.files().items()} == {"a/b.txt": 3, "c.bin": 12_000_000}
    assert store.folders() == {"a"}
    store.remove("c.bin")
    store.remove("c.bin")
    assert set(store.files()) == {"a/b.txt"}


@pytest.mark.parametrize("call", [Store.file, Store.files, Store.folders, lambda store: store.write("x", b"1")])
def test_a_bucket_that_is_not_there(server, call):
    with pytest.raises(NothingThere, match="no such bucket"):
        call(Store("s3://absent-bucket/x"))


def test_no_credentials(url, monkeypatch):
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "nowhere")
    with pytest.raises(StorageError, match=r"no permission \(NoCredentialsError[^\0]*AWS_PROFILE"):
        Store(url).write("x", b"1")


def test_no_server(url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"cannot be reached[^\0]*AWS_ENDPOINT_URL"):
        Store(url).files()


def test_a_data_set_is_fetched_once(url, tmp_path):
    folder = layouts.covid_radiography(tmp_path / "xrays")
    store = Store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path)
    there = fetch_data(url, tmp_path / "cache")
    assert read_manifest(there).records == read_manifest(folder).records
    stamps = {path: path.stat().st_mtime_ns for path in there.rglob("*.png")}
    changed = next(iter(stamps))
    store.put(changed.relative_to(there).as_posix(), changed)  # the same contents: the same ETag
    fetch_data(url, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*.png")} == stamps


def test_two_machines_at_once(url, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.2)
    here, there = RunHome(url, tmp_path / "one"), RunHome(url, tmp_path / "two")
    with here.held(here.create("x", exactly=True), Console(quiet=True)):
        monkeypatch.setattr(lease, "_place", lambda: "another machine")
        with (
            pytest.raises(FolderInUse, match="works on this sweep"),
            there.held(there.latest("x", exactly=True), Console(quiet=True)),
        ):
            pass


def test_a_sweep_that_is_killed_goes_on_elsewhere_from_the_mirror_alone(url, tmp_path, cache_dir):
    said = killed_and_gone_on(url, tmp_path, cache_dir)
    planted = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
    assert planted not in said
    assert not [name for name, contents in _objects(url) if planted.encode() in contents]


def _objects(url: str) -> Iterator[tuple[str, bytes]]:
    store = Store(url)
    for name in store.files():
        yield name, store.read(name)
