"""A Ray to run trials on: one of this machine alone, which nobody else can reach, or a cluster that runs already."""

import gc
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

# Read by Ray when it is imported: nothing of its own on the terminal or beside the trials, no dashboard sockets.
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
# Ray's own state, every trial of it each time, is written at the end only: it is never read back.
os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(10**6)
# How many trials may wait for their workers to start: as many as are handed out, which is our own decision.
os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(10**6)
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import ray
from ray._private import ray_constants, services
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sweep.interruption import abandon
from sweep.machine import ClusterUnreachable, Machine, Node, gpu_memory_bytes

LOOP = "ray-tune"  # the thread that the loop of Ray Tune runs in
MOST_ASKED_FOR = 1000  # trials at once; an autoscaler has limits of its own
ANSWER_S = 30.0  # how long nodes may take to say what their GPUs are


@contextmanager
def ray_cluster(address: str, *, cores: int, gpus: int) -> Iterator[None]:
    """Connect to `address`, or start Ray on this machine if it is empty, for the length of the block.

    A local Ray listens on loopback only, with a token of its own.

    Raises:
        ClusterUnreachable: nothing answers at the address.
    """
    on_termination = signal.getsignal(signal.SIGTERM)
    if address:
        check_address(address)
    # While this is true, Ray takes 127.0.0.1 for the machine's outer address, and listens to everybody. It reads the
    # variable of this name when it is imported, before the address is known.
    ray_constants.ENABLE_RAY_CLUSTER = bool(address) and not _on_loopback_only(address)
    if address:
        _connect(address)
    else:
        _start_local(cores, gpus)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)  # Ray has put its own handler there, which exits at once
    try:
        yield
    finally:
        if any(thread.name == LOOP for thread in threading.enumerate()):
            # Its servers are gone, say. Shutting Ray down below its loop aborts the process, and so does its own end.
            abandon()
        else:
            # While Ray shuts down, an object of its own that any thread's garbage collection frees ends the process.
            gc.collect()
            gc.disable()
            try:
                ray.shutdown()
            finally:
                gc.enable()


def _connect(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise ClusterUnreachable(f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}") from error


def check_address(address: str, timeout_s: float = 5.0) -> None:
    """Fail at once where Ray itself would try for a minute.

    Raises:
        ClusterUnreachable: the host and port in the address accept no connection.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    # A Ray client's address, ray://, would run the search on the cluster, out of the conductor's reach.
    if not host or "/" in host or not port.isdigit():
        raise ClusterUnreachable(
            f"expected the address of a Ray cluster's head (auto or HOST:PORT), but got {address!r}"
        )
    try:
        _knock(host, port, timeout_s)
    except OSError as error:
        raise ClusterUnreachable(
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`, "
            "or leave --address out to use this machine"
        ) from error


def _knock(host: str, port: str, timeout_s: float = 5.0) -> None:
    socket.create_connection((host, int(port)), timeout=timeout_s).close()


def _on_loopback_only(address: str) -> bool:
    """Whether the cluster is one on this machine that does not listen at its outer address."""
    host, _, port = address.rpartition(":")
    if host not in ("localhost", "127.0.0.1", "::1"):
        return False
    try:
        _knock(services.node_ip_address_from_perspective(), port)
    except OSError:
        return True
    return False


def cluster_machine(address: str) -> Machine:
    """The nodes of a running Ray cluster.

    Raises:
        ClusterUnreachable: nothing answers at the address.
    """
    with ray_cluster(address, cores=0, gpus=0):
        nodes = cluster_nodes()
        memory = _gpu_memory_of([node for node in nodes if node.gpus])
        return Machine(tuple(replace(node, gpu_memory_bytes=memory.get(node.node_id, 0)) for node in nodes))


def cluster_nodes() -> tuple[Node, ...]:
    """The nodes of the connected Ray that live, by their addresses; the memory of their GPUs is not known here."""
    living = [found for found in ray.nodes() if found["Alive"]]
    nodes = [
        Node(
            cores=int(found["Resources"].get("CPU", 0)),
            gpus=int(found["Resources"].get("GPU", 0)),
            memory_bytes=int(found["Resources"].get("memory", 0)),
            node_id=found["NodeID"],
            address=found["NodeManagerAddress"],
        )
        for found in living
    ]
    return tuple(sorted(nodes, key=lambda node: (_as_numbers(node.address), node.node_id)))


@contextmanager
def asked_for(cpus: float, gpus: float, trials: int) -> Iterator[None]:
    """Have an autoscaler, where the cluster has one, bring nodes for so many trials at once while the block runs.

    Trials are given to nodes that are there, so Ray sees none waiting and would bring none by itself.
    """
    from ray.autoscaler.sdk import request_resources

    bundle = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    with suppress(Exception):  # the sweep runs on the nodes there are
        request_resources(bundles=[bundle] * min(trials, MOST_ASKED_FOR))
    try:
        yield
    finally:
        with suppress(Exception):  # the cluster may be gone
            request_resources(bundles=[])


def _as_numbers(address: str) -> tuple[int | str, ...]:
    """10.0.0.9 comes before 10.0.0.10."""
    parts = address.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else (0, address)


def _gpu_memory_of(nodes: Sequence[Node]) -> dict[str, int]:
    """Node -> memory of its smallest GPU, as its driver says; nodes that do not answer in time are absent."""
    ask = ray.remote(num_cpus=0, max_retries=0)(gpu_memory_bytes)
    asked = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(): node.node_id
        for node in nodes
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    found = {}
    for answer in answered:
        with suppress(RayError):  # it left meanwhile
            found[asked[answer]] = int(ray.get(answer))
    return found


def _start_local(cores: int, gpus: int) -> None:
    # Without a token in the environment Ray writes one into the home folder, which need not be writable.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's memory monitor ends the whole sweep where it means one worker; the child's memory is bounded instead.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    with _kept_from_children((signal.SIGHUP, signal.SIGUSR1)):
        ray.init(
            address="local",  # else Ray would join a cluster that runs on this machine
            num_cpus=cores,
            num_gpus=gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            object_store_memory=200 * 1024**2,
            _node_ip_address="127.0.0.1",
        )


@contextmanager
def _kept_from_children(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Let processes started meanwhile ignore signals that are for the driver: a terminal sends them to all of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
