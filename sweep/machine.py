"""What this machine has, and how trials share it."""

import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

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
class Machine:
    """The resources trials may use: those of this machine, or of a Ray cluster.

    Attributes:
        gpu_memory_bytes: of its smallest GPU; 0 if there is none or it is not known.
    """

    cores: int
    gpus: int
    memory_bytes: int
    gpu_memory_bytes: int = 0


@dataclass(frozen=True)
class Allotment:
    """What one trial gets, and how many run at once.

    Attributes:
        threads: of TensorFlow's operations in a trial; metrics are bit-equal only for the same number.
        notes: what was asked for and is not there.
    """

    cpus_per_trial: float
    gpus_per_trial: float
    concurrency: int
    threads: int
    notes: tuple[str, ...] = ()


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
    return Machine(_cores(), _gpus(), _memory_bytes(), _gpu_memory_bytes())


def allot(wanted: ResourceSpec, machine: Machine, trials: int, need: TrialMemory) -> Allotment:
    """Share the machine among trials; what is not given is chosen so that the machine is full.

    Small trials share a GPU. On CPUs there are as many trials at once as cores and memory allow; where memory allows
    fewer, each gets more threads.

    Args:
        wanted: what the user has given.
        machine: what there is.
        trials: of the sweep.
        need: memory of the largest trial.

    Raises:
        ValueError: a trial asks for more than the whole machine has.
    """
    notes = []
    gpus = wanted.gpus_per_trial if wanted.gpus_per_trial is not None else _share_of_gpu(machine, trials, need)
    if gpus and not machine.gpus:
        notes.append(f"resources.gpus_per_trial is {gpus:g}, but there is no GPU: trials run on CPUs")
        gpus = 0.0
    if gpus > machine.gpus:
        raise ValueError(f"a trial asks for {gpus:g} GPUs, but there are {machine.gpus}; lower gpus_per_trial")
    if (wanted.cpus_per_trial or 0) > machine.cores:
        raise ValueError(
            f"a trial asks for {wanted.cpus_per_trial:g} CPUs, but there are {machine.cores}; lower cpus_per_trial"
        )
    concurrency = wanted.concurrency or _most_at_once(wanted, machine, gpus, trials, need)
    cpus = wanted.cpus_per_trial or max(1.0, machine.cores // concurrency)
    fitting = _fitting(machine, cpus, gpus)
    if concurrency > fitting:
        notes.append(f"{concurrency} trials at once were asked for, {fitting} fit on this machine")
    return Allotment(cpus, gpus, min(concurrency, fitting), max(1, math.floor(cpus)), tuple(notes))


def _share_of_gpu(machine: Machine, trials: int, need: TrialMemory) -> float:
    """A whole GPU, or the share at which as many trials fit as its memory, the cores and their number allow."""
    if not machine.gpus:
        return 0.0
    by_memory = int((1 - GPU_RESERVE) * machine.gpu_memory_bytes // need.on_gpu_bytes)
    by_cores, by_trials = machine.cores // machine.gpus, math.ceil(trials / machine.gpus)
    return 1 / max(1, min(MOST_ON_A_GPU, by_memory, by_cores, by_trials))


def _most_at_once(wanted: ResourceSpec, machine: Machine, gpus: float, trials: int, need: TrialMemory) -> int:
    by_memory = max(1, machine.memory_bytes // (need.beside_gpu_bytes if gpus else need.process_bytes))
    return max(1, min(trials, by_memory, _fitting(machine, wanted.cpus_per_trial or 1.0, gpus)))


def _fitting(machine: Machine, cpus: float, gpus: float) -> int:
    """How many trials fit. A share of a GPU lies on one device; two devices' remainders do not add up."""
    by_cpu = _times(cpus, machine.cores)
    if not gpus:
        return by_cpu
    by_gpu = machine.gpus * _times(gpus, 1) if gpus <= 1 else _times(gpus, machine.gpus)
    return min(by_cpu, by_gpu)


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


def _gpu_memory_bytes() -> int:
    if not _present_gpus() or shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return min((int(mebibytes) for mebibytes in listed if mebibytes.isdigit()), default=0) * 1024**2
