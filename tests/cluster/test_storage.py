"""A real S3 server on loopback (moto's): what fsspec's own backend makes of it, and a sweep that goes on elsewhere.

Needs the extras `cluster` and `cluster-test`.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cxr_models.dataset import read_manifest
from sweep import lease
from sweep.commit import read_commit
from sweep.fetching import fetch_data
from sweep.folder_lock import FolderInUse
from sweep.mirror import ROUND_EVERY_S
from sweep.record import RunFolder, read_lines
from sweep.remote import NothingThere, StorageError, Store, ThereAlready
from sweep.run_home import RunHome
from tests import layouts
from tests.faults.programs import EPOCH_S

pytest.importorskip("s3fs", reason="needs pip install -e '.[cluster]'")
moto = pytest.importorskip("moto.server", reason="needs pip install -e '.[cluster-test]'")

ROOT = Path(__file__).parent.parent.parent
BUCKET = "xrays"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "planted-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
EPOCHS = 8
SPACE = f"""\
name: stored
data: {{source: phantom, subset: 0.25}}
objective: macro_f1
search: {{algorithm: grid, trials: 3}}
resources: {{concurrency: 1, cpus_per_trial: 1}}
space:
  backbone: mobilenet_v2_0.35
  weights: bundled
  image_side: 96
  seed: [0, 1, 2]
  epochs: {EPOCHS}
"""


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


def sweep(out: str, cache_dir: Path, space: Path, *more: str) -> "subprocess.Popen[str]":
    """The command in a process of its own, with trainings that train nothing."""
    command = [sys.executable, "-m", "tests.faults.launch", str(space), "--inline", "--out", out, "--name", "stored"]
    return subprocess.Popen(
        [*command, "--cache-dir", str(cache_dir), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_sweep_that_is_killed_goes_on_elsewhere_from_the_mirror_alone(url, tmp_path, cache_dir):
    space, store = tmp_path / "space.yaml", Store(f"{url}/stored")
    space.write_text(SPACE)
    first = sweep(url, cache_dir, space)
    try:
        until = time.monotonic() + 240
        while not _epochs(store) > EPOCHS + 3:  # in the second trial
            assert first.poll() is None, first.stdout.read()
            assert time.monotonic() < until, "nothing came to the mirror"
            time.sleep(0.05)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    killed_at_ms = time.time() * 1000
    (working,) = (cache_dir / "runs").glob("*/stored")
    there = _epochs(store)
    lost = sum(1 for _ in read_lines(RunFolder(working).epoch_record)) - there
    assert lost <= 1 or lost * EPOCH_S <= 4 * ROUND_EVERY_S
    shutil.rmtree(cache_dir / "runs")  # another machine has an empty cache
    second = sweep(url, cache_dir, space, "--resume")
    said, _ = second.communicate(timeout=300)
    assert "fetching the run folder" in said or "going on after 1 of 3 trials" in said, said
    assert f"report: {url}/stored/report.html" in said
    assert "lacks" not in said
    (working,) = (cache_dir / "runs").glob("*/stored")
    record = list(read_lines(RunFolder(working).epoch_record))
    epochs = [(entry["trial_id"], entry["epoch"]) for entry in record]
    assert len(epochs) == len(set(epochs)) == 3 * EPOCHS
    assert [entry["outcome"] for entry in read_lines(RunFolder(working).trial_record)] == ["completed"] * 3
    # A fake checkpoint tells when each epoch was trained: those that the mirror had are not trained again.
    checkpoints = [json.loads(path.read_text()) for path in working.glob("state/trials/*/checkpoint.json")]
    assert sum(at < killed_at_ms for ended in checkpoints for at in ended) >= there
    print(f"\n{lost} of {there + lost} epochs had not come to the mirror")
    commit = read_commit(store)
    assert commit.record["state/epochs.jsonl"] == RunFolder(working).epoch_record.stat().st_size
    assert "summary.json" in store.files()
    for command in (["sweep.report", f"{url}/stored"], ["sweep.sync", f"{url}/stored"]):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert read_commit(store).number > commit.number
    planted = CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [path for path in working.rglob("*") if path.is_file() and planted in path.read_bytes()]
    assert planted.decode() not in said


def _epochs(store: Store) -> int:
    """How many the mirror has."""
    commit = read_commit(store)
    if commit is None or "state/epochs.jsonl" not in commit.record:
        return 0
    return store.read("state/epochs.jsonl")[: commit.record["state/epochs.jsonl"]].count(b"\n")
