"""Sweeps whose run folders lie at a URL, in processes of their own; their trainings train nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from sweep.commit import read_commit
from sweep.mirror import ROUND_EVERY_S
from sweep.record import RunFolder, read_lines
from sweep.remote import Store
from tests.faults.programs import EPOCH_S

ROOT = Path(__file__).parent.parent
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


def killed_and_gone_on(url: str, folder: Path, cache_dir: Path) -> str:
    """Kill a sweep in its second trial, go on with an empty cache of run folders, and check what came of it.

    Args:
        url: where run folders lie.
        folder: for the search space and another cache.
        cache_dir: of the sweep.

    Returns:
        What the sweep said that went on.
    """
    space, store = folder / "space.yaml", Store(f"{url}/stored")
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
    assert "going on after " in said, said
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
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)}
        done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert read_commit(store).number > commit.number
    return said


def _epochs(store: Store) -> int:
    """How many the mirror has."""
    commit = read_commit(store)
    if commit is None or "state/epochs.jsonl" not in commit.record:
        return 0
    return store.read("state/epochs.jsonl")[: commit.record["state/epochs.jsonl"]].count(b"\n")
