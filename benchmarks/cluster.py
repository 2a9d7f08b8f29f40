"""What does it cost to run on several hosts? The same sweep on one host and on three, with the same cores.

The hosts are network namespaces, `tests/cluster/hosts.py`. On one host the sweep has as many slots as on the two
workers of the three together. Trials, every epoch's metrics and the test figures must be the same to the last bit;
time, use of the slots and bytes over the network stand beside each other.

Run:  python benchmarks/cluster.py    # as root, with iproute2 and ray[default]
Cost: five minutes of 2 CPU cores.
"""

import argparse
import csv
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from fault_checks import differences
from measuring import ROOT, ProgramFailed, environment, own_command, write_result
from rendering import render_one

from sweep.record import RunFolder

sys.path.append(str(ROOT))  # the hosts are the tests'

from tests.cluster.clusters import Cluster, start_sweep, training
from tests.cluster.hosts import Host, Network, Process, network

RESULTS = Path(__file__).parent / "results"
NAME = "cluster"
WORKERS = 2
SWEEP_TIMEOUT_S = 3600.0
SAMPLING_INTERVAL_S = 0.25


def main() -> None:
    """The command; its exit status is 1 where the two are not the same."""
    arguments = parser().parse_args()
    options = ["--data", arguments.data.resolve()] if arguments.data else []
    with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
        ways = {"one host": on_one, "three hosts": on_three}
        runs = {name: RunFolder(Path(scratch) / name) for name in ways}
        rows = []
        for name, run_on in ways.items():
            with network() as net:
                rows.append({"name": name, **run_on(net, options, runs[name].path)})
            print(f"{name}: {rows[-1]['wall_seconds']:.0f} s", file=sys.stderr, flush=True)
        complaints = differences(*runs.values())
        result = {
            "kind": "cluster",
            "environment": environment(own_command()),
            "trials": json.loads(runs["one host"].summary.read_text())["trials"]["total"],
            "rows": rows,
            "complaints": complaints,
        }
    write_result(result, arguments.out / "cluster.json")
    print(render_one(result))
    sys.exit(bool(complaints))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    found = argparse.ArgumentParser(description="The same sweep on one host and on three.")
    found.add_argument("--data", type=Path, metavar="DIR", help="images, in place of the phantoms")
    found.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="(benchmarks/results)")
    return found


def on_one(net: Network, options: Sequence[str | Path], kept: Path) -> dict[str, Any]:
    """The sweep on one host, as many trials at once as workers of a cluster would run."""
    host = net.add("one")
    slots = ["--concurrency", str(WORKERS)]
    return measured(lambda: start_sweep(host, NAME, *slots, *options), [host], host, kept)


def on_three(net: Network, options: Sequence[str | Path], kept: Path) -> dict[str, Any]:
    """The sweep on a cluster that runs already: a head without slots, and workers with one each."""
    cluster = Cluster(net, net.add("head"))
    workers = [net.add(f"worker-{number + 1}") for number in range(WORKERS)]
    for worker in workers:
        cluster.join(worker, 1)
    cluster.wait_for(workers)
    return measured(lambda: cluster.sweep(NAME, *options), workers, cluster.head, kept)


def measured(start: Any, trained_on: Sequence[Host], driver: Host, kept: Path) -> dict[str, Any]:
    """Run a sweep to its end; how long it took, and what it used.

    Args:
        start: starts it.
        trained_on: the hosts its trials run on.
        driver: the host of its run folder.
        kept: where to copy the run folder to.

    Raises:
        ProgramFailed: it did not end well.
    """
    before, begun = carried(driver), time.perf_counter()
    sweep: Process = start()
    with sampled(trained_on) as processor_seconds:
        status = sweep.wait(SWEEP_TIMEOUT_S)
    wall = time.perf_counter() - begun
    if status:
        raise ProgramFailed(f"the sweep ended with status {status}:\n{sweep.said[-3000:]}")
    sent, received = (after - earlier for after, earlier in zip(carried(driver), before, strict=True))
    shutil.copytree(driver.disk / "runs" / NAME, kept)
    summary = json.loads(RunFolder(kept).summary.read_text())
    with RunFolder(kept).trials.open(newline="", encoding="utf-8") as file:
        train = sum(float(row["train_seconds"]) for row in csv.DictReader(file))
    return {
        "slots": WORKERS,
        "wall_seconds": wall,
        "search_seconds": summary["seconds"]["search"],
        "trials_seconds": summary["seconds"]["trials"],
        "train_seconds": train,
        "processor_seconds": sum(processor_seconds.values()),
        "sent_bytes": sent,
        "received_bytes": received,
    }


@contextmanager
def sampled(hosts: Sequence[Host]) -> Iterator[dict[tuple[int, float], float]]:
    """Process -> processor seconds it had used when it was last seen, of all that trained in the block."""
    seconds: dict[tuple[int, float], float] = {}
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLING_INTERVAL_S):
            for process in (each for host in hosts for each in training(host)):
                try:
                    times = process.cpu_times()
                    seconds[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:
                    continue  # it has ended meanwhile

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seconds
    finally:
        over.set()
        thread.join()


def carried(host: Host) -> tuple[int, int]:
    """Bytes that a host's cable has carried from it and to it."""
    for line in Path(f"/proc/{host.pid}/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            fields = numbers.split()
            return int(fields[8]), int(fields[0])
    raise ProgramFailed(f"{host.name} has no eth0")


if __name__ == "__main__":
    main()
