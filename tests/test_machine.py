"""How trials share a machine."""

from pathlib import Path

import psutil
import pytest

from sweep import machine
from sweep.machine import Allotment, Machine, Node, TrialMemory, allot, this_machine
from sweep.spec import ResourceSpec

GIB = 1024**3


def machine_of(cores: int, gpus: int, memory_bytes: int, gpu_memory_bytes: int = 0) -> Machine:
    return Machine((Node(cores, gpus, memory_bytes, gpu_memory_bytes),))


LAPTOP = machine_of(cores=8, gpus=0, memory_bytes=64 * GIB)
SERVER = machine_of(cores=16, gpus=4, memory_bytes=256 * GIB)
SMALL, LARGE = TrialMemory(2 * GIB, 2 * GIB, 3 * GIB), TrialMemory(20 * GIB, 20 * GIB, 4 * GIB)


def given(cpus: float | None = None, gpus: float | None = None, at_once: int | None = None) -> ResourceSpec:
    return ResourceSpec(cpus_per_trial=cpus, gpus_per_trial=gpus, concurrency=at_once)


@pytest.mark.parametrize(
    ("wanted", "on", "trials", "expected"),
    [
        # Nothing asked for: the machine is full, no trial idles.
        (given(), LAPTOP, 100, (1.0, 0.0, 8, 1)),
        (given(), LAPTOP, 2, (4, 0.0, 2, 4)),
        (given(), LAPTOP, 3, (2, 0.0, 3, 2)),
        (given(), SERVER, 100, (4, 1.0, 4, 4)),
        # Part asked for, the rest chosen.
        (given(cpus=2), LAPTOP, 100, (2, 0.0, 4, 2)),
        (given(cpus=3), LAPTOP, 100, (3, 0.0, 2, 3)),
        (given(cpus=0.5), LAPTOP, 100, (0.5, 0.0, 16, 1)),
        (given(at_once=2), LAPTOP, 100, (4, 0.0, 2, 4)),
        (given(at_once=1), LAPTOP, 100, (8, 0.0, 1, 8)),
        (given(gpus=0), SERVER, 100, (1.0, 0.0, 16, 1)),
        (given(gpus=0.5), SERVER, 100, (2, 0.5, 8, 2)),
        (given(gpus=2), SERVER, 100, (8, 2.0, 2, 8)),
    ],
)
def test_what_is_not_given_is_chosen(wanted, on, trials, expected):
    found = allot(wanted, on, trials, SMALL)
    assert (found.cpus_per_trial, found.gpus_per_trial, found.concurrency, found.threads) == expected


@pytest.mark.parametrize(
    ("share", "on_one"), [(1.0, 1), (0.6, 1), (0.5, 2), (0.4, 2), (0.3, 3), (0.25, 4), (0.2, 5), (0.1, 10)]
)
def test_a_share_of_a_gpu_lies_on_one_device(share, on_one):
    """Two trials of 0.6 do not share three devices' remainders; five of 0.2 fill one, whatever 1 // 0.2 is."""
    plenty = machine_of(cores=1000, gpus=3, memory_bytes=10_000 * GIB)
    assert allot(given(cpus=1, gpus=share), plenty, 1000, SMALL).concurrency == 3 * on_one


def test_the_cpus_of_many_small_trials_add_up():
    assert allot(given(cpus=0.1), machine_of(1, 0, 1000 * GIB), 100, SMALL).concurrency == 10


def test_memory_bounds_the_number_chosen():
    small = machine_of(cores=64, gpus=0, memory_bytes=6 * GIB)
    found = allot(given(), small, 100, SMALL)
    assert (found.cpus_per_trial, found.concurrency, found.threads) == (21, 3, 21)
    assert allot(given(), machine_of(4, 0, GIB), 100, SMALL).concurrency == 1


@pytest.mark.parametrize(
    ("gpu_gib", "cores", "trials", "need", "share"),
    [
        (80, 16, 100, SMALL, 0.25),  # never more than four
        (8, 16, 100, SMALL, 1 / 3),  # as its memory allows, a tenth left over
        (24, 16, 100, LARGE, 1.0),
        (80, 8, 100, SMALL, 0.5),  # each trial needs a core
        (80, 16, 8, SMALL, 0.5),  # eight trials on four GPUs
        (80, 16, 3, SMALL, 1.0),
        (0, 16, 100, SMALL, 1.0),  # its memory is not known
    ],
)
def test_small_trials_share_a_gpu(gpu_gib, cores, trials, need, share):
    machine = machine_of(cores, 4, 256 * GIB, gpu_gib * GIB)
    assert allot(given(), machine, trials, need).gpus_per_trial == pytest.approx(share)
    assert allot(given(gpus=1), machine, trials, need).gpus_per_trial == 1.0


def test_large_trials_get_more_threads_in_place_of_company():
    found = allot(given(), LAPTOP, 100, LARGE)
    assert (found.concurrency, found.threads) == (3, 2)


def test_what_a_trial_takes_of_a_gpu_is_not_taken_of_the_machine():
    machine = machine_of(16, 8, 64 * GIB, 24 * GIB)
    assert allot(given(), machine, 100, LARGE).concurrency == 8
    assert allot(given(), machine_of(16, 0, 64 * GIB), 100, LARGE).concurrency == 3


def test_more_than_the_machine_has():
    with pytest.raises(ValueError, match="a trial asks for 12 CPUs, but there are 8; lower cpus_per_trial"):
        allot(given(cpus=12), LAPTOP, 4, SMALL)
    with pytest.raises(ValueError, match="a trial asks for 5 GPUs, but there are 4; lower gpus_per_trial"):
        allot(given(gpus=5), SERVER, 4, SMALL)


def test_gpus_asked_for_where_there_are_none():
    found = allot(given(gpus=0.5), LAPTOP, 100, SMALL)
    assert (found.gpus_per_trial, found.concurrency) == (0.0, 8)
    assert found.notes == ("resources.gpus_per_trial is 0.5, but there is no GPU: trials run on CPUs",)


def test_more_at_once_than_fit():
    found = allot(given(cpus=2, at_once=9), LAPTOP, 100, SMALL)
    assert found.concurrency == 4
    assert found.notes == ("9 trials at once were asked for, 4 fit on this machine",)
    assert allot(given(at_once=4), LAPTOP, 100, SMALL).notes == ()


class TestNodes:
    """A cluster is a list of nodes: what two have left over does not add up to a slot."""

    def cluster(self, *nodes: tuple[int, int, int]) -> Machine:
        """Of (cores, gpus, GiB of memory) each."""
        return Machine(
            tuple(
                Node(cores, gpus, gib * GIB, 24 * GIB if gpus else 0, f"id{index}", f"10.0.0.{index + 1}")
                for index, (cores, gpus, gib) in enumerate(nodes)
            )
        )

    def slots(self, found: Allotment, machine: Machine) -> list[int]:
        return [found.slots(node) for node in machine.nodes]

    def test_three_halves_are_no_whole(self):
        """Three nodes of 3 cores have 9 in all, but only 3 trials of 2 find a place."""
        machine = self.cluster((3, 0, 64), (3, 0, 64), (3, 0, 64))
        found = allot(given(cpus=2), machine, 100, SMALL)
        assert self.slots(found, machine) == [1, 1, 1]
        assert found.concurrency == 3

    def test_unequal_nodes_each_get_what_fits(self):
        machine = self.cluster((16, 0, 64), (4, 0, 64), (32, 0, 10))
        found = allot(given(), machine, 100, SMALL)
        assert self.slots(found, machine) == [16, 4, 5], "the last has memory for 5"
        assert (found.concurrency, found.threads) == (25, 1)

    def test_few_trials_get_more_cores_each(self):
        machine = self.cluster((16, 0, 64), (4, 0, 64))
        found = allot(given(), machine, 3, SMALL)
        assert (found.cpus_per_trial, found.concurrency) == (5, 3), "three on the first, none on the second"
        assert self.slots(found, machine) == [3, 0]
        assert "10.0.0.2 gets no trials: one takes 5 CPUs, and it has fewer" in found.notes

    def test_gpu_trials_go_to_nodes_with_gpus_and_the_others_are_named(self):
        machine = self.cluster((8, 0, 64), (16, 4, 256))
        found = allot(given(gpus=0.5), machine, 100, SMALL)
        assert self.slots(found, machine) == [0, 8]
        assert found.notes == ("10.0.0.1 gets no trials: they run on GPUs, and it has none",)
        assert self.slots(allot(given(gpus=0), machine, 100, SMALL), machine) == [8, 16]

    def test_shares_of_a_gpu_lie_on_one_device_of_one_node(self):
        machine = self.cluster((8, 1, 64), (8, 1, 64))
        found = allot(given(gpus=0.6), machine, 100, SMALL)
        assert self.slots(found, machine) == [1, 1]

    def test_gpus_that_stay_unused_are_told(self):
        machine = self.cluster((2, 4, 64), (8, 1, 64))
        found = allot(given(cpus=1, gpus=1), machine, 100, SMALL)
        assert self.slots(found, machine) == [2, 1]
        assert found.notes == ("2 of 4 GPUs of 10.0.0.1 stay unused: 2 trials fill its CPUs or memory",)

    def test_a_head_without_cpus_gets_none_and_nothing_is_said_of_it(self):
        machine = self.cluster((0, 0, 8), (4, 0, 64))
        found = allot(given(), machine, 100, SMALL)
        assert self.slots(found, machine) == [0, 4]
        assert found.notes == ()

    def test_a_cluster_of_heads(self):
        with pytest.raises(ValueError, match="no node of the cluster has CPUs for trials; start one that has"):
            allot(given(), self.cluster((0, 0, 8)), 4, SMALL)

    def test_more_than_any_node_has(self):
        machine = self.cluster((4, 0, 64), (8, 2, 64))
        with pytest.raises(ValueError, match="a trial asks for 12 CPUs, but no node has more than 8; lower cpus_per"):
            allot(given(cpus=12), machine, 4, SMALL)
        with pytest.raises(ValueError, match="a trial asks for 3 GPUs, but no node has more than 2; lower gpus_per"):
            allot(given(gpus=3), machine, 4, SMALL)
        apart = self.cluster((16, 0, 64), (2, 2, 64))
        with pytest.raises(ValueError, match="a trial asks for 8 CPUs and 1 GPUs, but no node has both"):
            allot(given(cpus=8, gpus=1), apart, 4, SMALL)

    def test_the_user_s_concurrency_holds_however_many_nodes_join(self):
        machine = self.cluster((4, 0, 64), (4, 0, 64))
        assert allot(given(at_once=3), machine, 100, SMALL).most == 3
        assert allot(given(), machine, 100, SMALL).most is None
        assert allot(given(cpus=1, at_once=9), machine, 100, SMALL).notes == (
            "9 trials at once were asked for, 8 fit on these nodes",
        )

    def test_a_node_that_joins_gets_what_fits_there(self):
        found = allot(given(), self.cluster((4, 0, 64)), 100, SMALL)
        assert found.slots(Node(6, 0, 64 * GIB, node_id="new")) == 6


class TestThisMachine:
    def test_cores_and_memory(self):
        found = this_machine()
        assert 1 <= found.cores <= psutil.cpu_count()
        assert GIB // 4 < found.memory_bytes <= psutil.virtual_memory().total

    def test_a_container_has_its_share(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine, "CGROUP", tmp_path)
        whole = this_machine()
        (tmp_path / "cpu.max").write_text("100000 100000\n")
        (tmp_path / "memory.max").write_text(f"{GIB // 2}\n")
        assert (this_machine().cores, this_machine().memory_bytes) == (1, GIB // 2)
        (tmp_path / "cpu.max").write_text("50000 100000\n")
        assert this_machine().cores == 1
        (tmp_path / "cpu.max").write_text("max 100000\n")
        (tmp_path / "memory.max").write_text("max\n")
        assert this_machine() == whole

    @pytest.mark.parametrize(("visible", "gpus"), [("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("GPU-1f,GPU-2e", 2)])
    def test_gpus_this_process_may_see(self, visible, gpus, monkeypatch, tmp_path):
        for device in range(4):
            (tmp_path / f"0000:0{device}:00.0").mkdir()
        monkeypatch.setattr("sweep.machine.NVIDIA", tmp_path)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert this_machine().gpus == gpus

    def test_gpus_that_are_not_there_do_not_count(self, monkeypatch):
        monkeypatch.setattr("sweep.machine.NVIDIA", Path("/nowhere"))
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert this_machine().gpus == 0

    @pytest.mark.parametrize("gpus", [0, 2])
    def test_gpus_the_driver_lists(self, gpus, tmp_path, monkeypatch):
        lines = "".join(f"echo 'GPU {index}: NVIDIA H200 (UUID: GPU-{index})'\n" for index in range(gpus))
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        assert this_machine().gpus == gpus

    def test_no_driver_no_gpu(self, tmp_path, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert this_machine().gpus == 0
