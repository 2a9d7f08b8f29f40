"""How trials share a machine."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sweep import machine
from sweep.machine import Allotment, Machine, TrialMemory, allot, this_machine
from sweep.spec import ResourceSpec

GIB = 1024**3
LAPTOP = Machine(cores=8, gpus=0, memory_bytes=64 * GIB)
SERVER = Machine(cores=16, gpus=4, memory_bytes=256 * GIB)
SMALL, LARGE = TrialMemory(2 * GIB, 2 * GIB, 3 * GIB), TrialMemory(20 * GIB, 20 * GIB, 4 * GIB)


def given(cpus: float | None = None, gpus: float | None = None, at_once: int | None = None) -> ResourceSpec:
    return ResourceSpec(cpus_per_trial=cpus, gpus_per_trial=gpus, concurrency=at_once)


@pytest.mark.parametrize(
    ("wanted", "on", "trials", "expected"),
    [
        # Nothing asked for: the machine is full, no trial idles.
        (given(), LAPTOP, 100, Allotment(1.0, 0.0, 8, 1)),
        (given(), LAPTOP, 2, Allotment(4, 0.0, 2, 4)),
        (given(), LAPTOP, 3, Allotment(2, 0.0, 3, 2)),
        (given(), SERVER, 100, Allotment(4, 1.0, 4, 4)),
        # Part asked for, the rest chosen.
        (given(cpus=2), LAPTOP, 100, Allotment(2, 0.0, 4, 2)),
        (given(cpus=3), LAPTOP, 100, Allotment(3, 0.0, 2, 3)),
        (given(cpus=0.5), LAPTOP, 100, Allotment(0.5, 0.0, 16, 1)),
        (given(at_once=2), LAPTOP, 100, Allotment(4, 0.0, 2, 4)),
        (given(at_once=1), LAPTOP, 100, Allotment(8, 0.0, 1, 8)),
        (given(gpus=0), SERVER, 100, Allotment(1.0, 0.0, 16, 1)),
        (given(gpus=0.5), SERVER, 100, Allotment(2, 0.5, 8, 2)),
        (given(gpus=2), SERVER, 100, Allotment(8, 2.0, 2, 8)),
    ],
)
def test_what_is_not_given_is_chosen(wanted, on, trials, expected):
    assert allot(wanted, on, trials, SMALL) == expected


@pytest.mark.parametrize(
    ("share", "on_one"), [(1.0, 1), (0.6, 1), (0.5, 2), (0.4, 2), (0.3, 3), (0.25, 4), (0.2, 5), (0.1, 10)]
)
def test_a_share_of_a_gpu_lies_on_one_device(share, on_one):
    """Two trials of 0.6 do not share three devices' remainders; five of 0.2 fill one, whatever 1 // 0.2 is."""
    plenty = Machine(cores=1000, gpus=3, memory_bytes=10_000 * GIB)
    assert allot(given(cpus=1, gpus=share), plenty, 1000, SMALL).concurrency == 3 * on_one


def test_the_cpus_of_many_small_trials_add_up():
    assert allot(given(cpus=0.1), Machine(1, 0, 1000 * GIB), 100, SMALL).concurrency == 10


def test_memory_bounds_the_number_chosen():
    small = Machine(cores=64, gpus=0, memory_bytes=6 * GIB)
    assert allot(given(), small, 100, SMALL) == Allotment(21, 0.0, 3, 21)
    assert allot(given(), Machine(4, 0, GIB), 100, SMALL).concurrency == 1


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
    machine = Machine(cores, 4, 256 * GIB, gpu_gib * GIB)
    assert allot(given(), machine, trials, need).gpus_per_trial == pytest.approx(share)
    assert allot(given(gpus=1), machine, trials, need).gpus_per_trial == 1.0


def test_large_trials_get_more_threads_in_place_of_company():
    found = allot(given(), LAPTOP, 100, LARGE)
    assert (found.concurrency, found.threads) == (3, 2)


def test_what_a_trial_takes_of_a_gpu_is_not_taken_of_the_machine():
    machine = Machine(16, 8, 64 * GIB, 24 * GIB)
    assert allot(given(), machine, 100, LARGE).concurrency == 8
    assert allot(given(), replace(machine, gpus=0), 100, LARGE).concurrency == 3


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
