"""What a machine or the nodes of a cluster have, and how trials share it."""

import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from cxr_models.storage import size_text
from sweep.spec import ResourceSpec

# A container's share of the machine, cgroup version 2.
CGROUP = Path("/sys/fs/cgroup")
NVIDIA = Path("/proc/driver/nvidia/gpus")  # one folder a device

# A GPU is shared by no more trials than this: their kernels take turns, so more of them only wait for each other.
MOST_ON_A_GPU = 4
# Of a GPU's memory, left to its driver and to what grows.
GPU_RESERVE = 0.1


class ClusterUnreachable(ConnectionError):  # noqa: N818 - reads as what happened
    """No Ray cluster answers at the address that was given."""


@dataclass(frozen=True)
class Node:
    """One computer; a trial lies on one alone.

    Attributes:
        gpu_memory_bytes: of its smallest GPU; 0 if there is none or it is not known.
        node_id: Ray's name of it; empty for this machine where it belongs to no cluster.
        address: where it is, as a person knows it; empty then, too.
    """

    cores: int
    gpus: int
    memory_bytes: int
    gpu_memory_bytes: int = 0
    node_id: str = ""
    address: str = ""


@dataclass(frozen=True)
class Machine:
    """What trials may use: this machine, or the nodes of a Ray cluster. No trial spans two nodes."""

    nodes: tuple[Node, ...]

    @property
    def is_cluster(self) -> bool:
        return any(node.node_id for node in self.nodes)

    @property
    def cores(self) -> int:
        """Of all nodes; no trial can have them together."""
        return sum(node.cores for node in self.nodes)

    @property
    def gpus(self) -> int:
        """Of all nodes, as `cores`."""
        return sum(node.gpus for node in self.nodes)

    @property
    def memory_bytes(self) -> int:
        """Of all nodes, as `cores`."""
        return sum(node.memory_bytes for node in self.nodes)


@dataclass(frozen=True)
class Allotment:
    """What one trial gets, and how many run at once.

    Attributes:
        concurrency: how many trials run at once on the nodes that there are now.
        threads: of TensorFlow's operations in a trial; metrics are bit-equal only for the same number.
        notes: what was asked for and is not there, and what stays unused.
        memory_per_trial: bytes of its node that a trial needs; 0 where the user says how many run at once.
        most: how many the user lets run at once, however many nodes join; None for as many as there is room for.
    """

    cpus_per_trial: float
    gpus_per_trial: float
    concurrency: int
    threads: int
    notes: tuple[str, ...] = ()
    memory_per_trial: int = 0
    most: int | None = None

    def slots(self, node: Node) -> int:
        """How many trials a node has room for at once."""
        return _slots(node, self.cpus_per_trial, self.gpus_per_trial, self.memory_per_trial)


@dataclass(frozen=True)
class TrialMemory:
    """What a trial takes, estimated.

    Attributes:
        process_bytes: of the machine's memory, when it trains on CPUs.
        on_gpu_bytes: of a GPU's memory, when it trains there.
        beside_gpu_bytes: of the machine's memory then.
    """

    process_bytes: int
    on_gpu_bytes: int
    beside_gpu_bytes: int


def this_machine() -> Machine:
    """Cores this process may use, GPUs it may see, memory."""
    return Machine((Node(_cores(), _gpus(), _memory_bytes(), gpu_memory_bytes()),))


def allot(wanted: ResourceSpec, machine: Machine, trials: int, need: TrialMemory) -> Allotment:
    """Share the machine among trials; what is not given is chosen so that the machine is full.

    Small trials share a GPU. On CPUs there are as many trials at once as cores and memory allow; where memory allows
    fewer, each gets more threads. Trials are alike on all nodes: metrics are bit-equal for the same threads only.

    Args:
        wanted: what the user has given.
        machine: what there is.
        trials: of the sweep.
        need: memory of the largest trial.

    Raises:
        ValueError: a trial asks for more than any node has.
    """
    notes = []
    gpus = wanted.gpus_per_trial if wanted.gpus_per_trial is not None else _share_of_gpu(machine, trials, need)
    if gpus and not machine.gpus:
        notes.append(f"resources.gpus_per_trial is {gpus:g}, but there is no GPU: trials run on CPUs")
        gpus = 0.0
    _check_that_one_fits(machine, wanted.cpus_per_trial or 1.0, gpus)
    memory = 0
    if wanted.concurrency is None:
        # One trial runs in any case: what it takes is an estimate.
        most = max(node.memory_bytes for node in machine.nodes if _slots(node, wanted.cpus_per_trial or 1.0, gpus, 0))
        memory = min(need.beside_gpu_bytes if gpus else need.process_bytes, most)
    concurrency = wanted.concurrency or min(trials, _slots_of_all(machine, wanted.cpus_per_trial or 1.0, gpus, memory))
    cpus = wanted.cpus_per_trial or _most_cpus(machine, gpus, memory, concurrency)
    fitting = _slots_of_all(machine, cpus, gpus, memory)
    if concurrency > fitting:
        where = "on these nodes" if machine.is_cluster else "on this machine"
        notes.append(f"{concurrency} trials at once were asked for, {fitting} fit {where}")
    found = Allotment(cpus, gpus, min(concurrency, fitting), max(1, math.floor(cpus)), (), memory, wanted.concurrency)
    return replace(found, notes=(*notes, *_unused(machine, found)))


def _check_that_one_fits(machine: Machine, cpus: float, gpus: float) -> None:
    if any(_slots(node, cpus, gpus, 0) for node in machine.nodes):
        return
    if not machine.cores:
        raise ValueError(
            "no node of the cluster has CPUs for trials; start one that has, with `ray start --address=...`, "
            "or wait until one has joined"
        )
    for asked, name, option in ((gpus, "gpus", "GPUs"), (cpus, "cores", "CPUs")):
        most = max(getattr(node, name) for node in machine.nodes)
        if asked > most:
            there = f"no node has more than {most}" if len(machine.nodes) > 1 else f"there are {most}"
            raise ValueError(f"a trial asks for {asked:g} {option}, but {there}; lower {option.lower()}_per_trial")
    raise ValueError(
        f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, but no node has both; lower one of cpus_per_trial and "
        "gpus_per_trial"
    )


def _share_of_gpu(machine: Machine, trials: int, need: TrialMemory) -> float:
    """A whole GPU, or the share at which as many trials fit as its memory, the cores and their number allow."""
    having = [node for node in machine.nodes if node.gpus and node.cores]
    if not having:
        return 0.0
    gpus = sum(node.gpus for node in having)
    by_memory = int((1 - GPU_RESERVE) * min(node.gpu_memory_bytes for node in having) // need.on_gpu_bytes)
    by_cores, by_trials = sum(node.cores for node in having) // gpus, math.ceil(trials / gpus)
    return 1 / max(1, min(MOST_ON_A_GPU, by_memory, by_cores, by_trials))


def _most_cpus(machine: Machine, gpus: float, memory: int, concurrency: int) -> float:
    """As many whole CPUs for each trial as leave room for so many at once; at least 1."""
    most = max(node.cores for node in machine.nodes)
    having = (cpus for cpus in range(most, 1, -1) if _slots_of_all(machine, cpus, gpus, memory) >= concurrency)
    return float(next(having, 1))


def _slots_of_all(machine: Machine, cpus: float, gpus: float, memory: int) -> int:
    return sum(_slots(node, cpus, gpus, memory) for node in machine.nodes)


def _slots(node: Node, cpus: float, gpus: float, memory: int) -> int:
    """How many trials fit. A share of a GPU lies on one device; two devices' remainders do not add up."""
    fitting = [_times(cpus, node.cores)]
    if gpus:
        fitting.append(node.gpus * _times(gpus, 1) if gpus <= 1 else _times(gpus, node.gpus))
    if memory:
        fitting.append(node.memory_bytes // memory)
    return min(fitting)


def _unused(machine: Machine, allotment: Allotment) -> Iterator[str]:
    """What trials leave alone: nodes without what they need, and GPUs that too few of them fit beside."""
    cpus, gpus = allotment.cpus_per_trial, allotment.gpus_per_trial
    for node in machine.nodes:
        of_node = f" of {node.address}" if machine.is_cluster else ""
        slots = allotment.slots(node)
        used = math.ceil(slots * gpus) if gpus > 1 else math.ceil(slots / _times(gpus, 1)) if gpus else 0
        if slots and gpus and used < node.gpus:
            yield f"{node.gpus - used} of {node.gpus} GPUs{of_node} stay unused: {slots} trials fill its CPUs or memory"
        if slots or not node.cores:
            continue  # a head that is to run no trials says so by having no CPUs
        if gpus and not node.gpus:
            yield f"{node.address} gets no trials: they run on GPUs, and it has none"
        elif cpus > node.cores or gpus > node.gpus:
            taken = f"{cpus:g} CPUs and {gpus:g} GPUs" if gpus else f"{cpus:g} CPUs"
            yield f"{node.address} gets no trials: one takes {taken}, and it has fewer"
        else:
            needed = size_text(allotment.memory_per_trial)
            yield f"{node.address} gets no trials: one takes about {needed} of memory, and it has less"


def _times(part: float, whole: int) -> int:
    """How often a part goes into the whole; in floating point, 1 // 0.2 is 4."""
    return math.floor(whole / part + 1e-9)


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()  # "<quota> <period>" or "max <period>"
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _memory_bytes() -> int:
    memory = psutil.virtual_memory().total
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
    except OSError:
        return memory
    return memory if limit == "max" else min(memory, int(limit))


def _gpus() -> int:
    present = _present_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))


def _present_gpus() -> int:
    if NVIDIA.is_dir():
        return sum(1 for _ in NVIDIA.iterdir())
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def gpu_memory_bytes() -> int:
    """Memory of the smallest GPU of this machine; 0 if there is none or it is not known."""
    if not _present_gpus() or shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return min((int(mebibytes) for mebibytes in listed if mebibytes.isdigit()), default=0) * 1024**2
