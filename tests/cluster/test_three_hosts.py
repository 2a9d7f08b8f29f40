"""One sweep on three hosts that share no disk: one is cut off in the middle, another joins, and nothing is lost."""

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fault_checks import CHECKPOINT, course_of, differences, finished_epochs, trained_again

from sweep.record import RunFolder, read_lines
from tests.cluster import clusters
from tests.cluster.clusters import Cluster, Tracking, start_sweep, trains, wait_until
from tests.cluster.conftest import kept, lacking
from tests.cluster.hosts import Host, Process, network

NAME, TRIALS, EPOCHS = "cluster", 24, 8
ENDED_BEFORE_THE_CUT = 6
SWEEP_TIMEOUT_S = 3600.0
POLL_S = 0.2
# Of a node in an environment variable, in place of the driver's --cache-dir.
OWN_CACHE = "own-cache"
TRACKED = """
import json, sys
from pathlib import Path
from fault_checks import tracking_differences
from sweep.record import RunFolder
print(json.dumps(tracking_differences(RunFolder(Path(sys.argv[1])), sys.argv[2])))
"""


@dataclass
class Course:
    """What was seen of the sweep.

    Attributes:
        head: where its driver ran; what it said is in `sweep`.
        tracking: MLflow, on a host of its own.
        reference: run folder of the same sweep on one host.
        run: run folder of the sweep.
        lost: the host that was cut off.
        joined: the one that came for it.
        finished: (training, epoch) of each epoch that was finished when the host was cut off -> its end.
        ended: the same of those that its own disk told of by then.
        trained: names of the hosts on which processes trained.
        trained_later: those on which they did after the fourth had joined.
        returned: whether the host that was cut off came back before the end.
    """

    head: Host
    tracking: Tracking
    reference: RunFolder
    run: RunFolder
    sweep: Process
    lost: Host
    joined: Host
    finished: dict[tuple[str, int], int]
    ended: dict[tuple[str, int], int]
    trained: set[str] = field(default_factory=set)
    trained_later: set[str] = field(default_factory=set)
    returned: bool = False


def data() -> Path | None:
    """Real X-rays, where there are any."""
    folder = os.environ.get("CXR_REAL_DATA")
    return Path(folder).resolve() / "data" / "cxr3" if folder else None


def options() -> list[str | Path]:
    found = data()
    return ["--data", found] if found else []


@pytest.fixture(scope="module")
def course(namespaces, tmp_path_factory) -> Iterator[Course]:
    if missing := clusters.missing():
        lacking(missing)
    hidden = [found] if (found := data()) else []
    with network(kept("three-hosts")) as net:
        head, tracking = net.add("head"), Tracking(net.add("tracking"))
        tracking.let_in(head)
        reference = ran_on_one(net.add("alone"), tmp_path_factory.mktemp("reference"))
        cluster = Cluster(net, head)
        workers = [net.add(name, hidden=hidden) for name in ("worker-1", "worker-2")]
        cluster.join(workers[0], 1)
        cluster.join(workers[1], 1, {"SWEEP_NODE_CACHE": str(workers[1].place / OWN_CACHE)})
        cluster.wait_for(workers)

        sweep = cluster.sweep(NAME, *options(), "--tracking-uri", tracking.uri)
        run, trained = RunFolder(head.disk / "runs" / NAME), set[str]()

        def half_way() -> bool:
            trained.update(host.name for host in workers if trains(host))
            ended = sum(1 for _ in read_lines(run.trial_record)) if run.path.is_dir() else 0
            return len(trained) == 2 and ended >= ENDED_BEFORE_THE_CUT and bool(epochs_on(workers[1], time.time()))

        wait_until(half_way, "trials on both workers", SWEEP_TIMEOUT_S, sweep)
        net.cut_off(workers[1])
        ended, finished = epochs_on(workers[1], time.time()), finished_epochs(run)
        joined = net.add("worker-3", hidden=hidden)
        cluster.join(joined, 1)
        cluster.wait_for([joined])
        found = Course(head, tracking, reference, run, sweep, workers[1], joined, finished, ended, trained)
        deadline = time.monotonic() + SWEEP_TIMEOUT_S
        while sweep.running:
            assert time.monotonic() < deadline, sweep.said[-3000:]
            if not found.returned and told_of_loss(found):
                net.plug_in(found.lost)  # what it still says is of yesterday
                found.returned = True
            found.trained_later.update(host.name for host in (workers[0], joined) if trains(host))
            time.sleep(POLL_S)
        yield found


def told_of_loss(course: Course) -> bool:
    return f"node {course.lost.address} is lost" in course.sweep.said


def epochs_on(host: Host, second: float) -> dict[tuple[str, int], int]:
    """(training, epoch) -> its end, of the epochs that a host's checkpoints tell of and that had ended by a second."""
    entries = []
    for checkpoint in host.disk.rglob(CHECKPOINT):
        with suppress(FileNotFoundError):  # of a training that has just ended
            entries += course_of(checkpoint)
    return {
        (entry["trial_id"], entry["epoch"]): entry["ended_ms"]
        for entry in entries
        if entry["ended_ms"] <= 1000 * second
    }


def ran_on_one(host: Host, kept: Path) -> RunFolder:
    """The same sweep on one host, which is turned off after it; its run folder."""
    sweep = start_sweep(host, NAME, *options())
    assert sweep.wait(SWEEP_TIMEOUT_S) == 0, sweep.said[-3000:]
    shutil.copytree(host.disk / "runs" / NAME, kept, dirs_exist_ok=True)
    host.turn_off()
    return RunFolder(kept)


def test_the_sweep_ends_well(course):
    assert course.sweep.status == 0, course.sweep.said[-5000:]


def test_both_workers_trained_and_the_one_that_joined_did_too(course):
    assert course.trained == {"worker-1", "worker-2"}
    assert course.trained_later == {"worker-1", "worker-3"}
    assert told_of_loss(course)
    assert f"node {course.joined.address} has joined" in course.sweep.said
    assert course.returned, "it was plugged in again while the sweep ran"


def test_nothing_is_lost_twice_or_different_beside_the_sweep_on_one_host(course):
    assert sum(1 for _ in read_lines(course.run.trial_record)) == TRIALS
    assert differences(course.reference, course.run) == []


def test_no_epoch_that_had_been_finished_at_home_is_trained_again(course):
    assert course.finished
    assert trained_again(course.finished, course.run) == []


def test_the_host_that_was_cut_off_costs_an_epoch_of_a_trial_at_most(course):
    assert course.ended, "its own disk tells of the trial that it ran"
    at_home = finished_epochs(course.run)
    again = Counter(trial_id for (trial_id, epoch), ended in course.ended.items() if at_home[trial_id, epoch] != ended)
    assert max(again.values(), default=0) <= 1, again


def test_a_worker_has_the_pixels_in_its_own_cache_and_no_images(course):
    shared = {file.name for file in (course.head.disk / "cache").rglob("*.npy")}
    assert shared
    own = {file.name for file in (course.lost.disk / OWN_CACHE).rglob("*.npy")}
    assert shared & own
    others = {path.name for path in (course.lost.disk / "cache").iterdir()} - {"matplotlib"}  # a library's own
    assert not others, "everything lies where the node's variable says"


def test_mlflow_has_each_epoch_once(course):
    command = [sys.executable, "-c", TRACKED, course.head.place / "runs" / NAME, course.tracking.uri]
    said = course.head.run(command, {"PYTHONPATH": clusters.IMPORTED}, timeout_s=600)
    assert json.loads(said.splitlines()[-1]) == []


def test_mlflow_shows_nothing_without_the_password(course):
    path, ask = "/api/2.0/mlflow/experiments/search?max_results=1", course.tracking.status_of
    statuses = [ask(path, host=course.joined, password=given) for given in ("", "guessed", course.tracking.password)]
    assert statuses == [401, 401, 200]
