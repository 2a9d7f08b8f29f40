"""Ray places trials on CPUs and GPUs, and the sweep is the same as without it. Trials only pretend to train."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError

from cxr_models.arrays import kept_array
from cxr_models.trial import EpochMetrics, Outcome, TrialResult
from sweep import trials
from sweep.machine import ClusterUnreachable, Node
from sweep.nodes import SlotFigures, Slots
from sweep.ray_cluster import check_address, cluster_nodes, ray_cluster
from sweep.retries import SweepFailed
from sweep.runner import Conductor, run_inline
from sweep.trials import Cluster, Placement, _Ends, _retry_what_the_memory_monitor_kills, run_on_ray
from sweep.worker import Fault
from tests.programs import ODD_ONE, value_of
from tests.sweeps import Heard, fake_sweep
from tests.watching import Seen

ROOT = Path(__file__).parent.parent
GPUS = 4


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A local Ray of eight cores and four GPUs, which need not exist: Ray only counts them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with ray_cluster("", cores=8, gpus=GPUS):
            yield


def run(conductor: Conductor, folder: Path, *, at_once: int, gpus: float = 0.0) -> None:
    run_on_ray(conductor, Placement(1.0, gpus, at_once), folder=folder)


@pytest.mark.parametrize(("share", "on_one"), [pytest.param(1.0, 1, marks=pytest.mark.slow), (0.5, 2)])
def test_trials_share_four_gpus(share, on_one, local_ray, tmp_path):
    """As many trials as fit run at once and wait for each other, so every device must be full; two more follow."""
    at_once = GPUS * on_one
    conductor, heard = fake_sweep(tmp_path, "meeting", trials=at_once + 2, epochs=1)
    conductor.work.folder.mkdir()
    (conductor.work.folder / "peers").write_text(str(at_once))
    run(conductor, tmp_path, at_once=at_once, gpus=share)
    assert [result.error for result in heard.results.values()] == [""] * (at_once + 2)
    spans = [json.loads(path.read_text()) for path in conductor.work.folder.glob("*/span.json")]
    assert len(spans) == at_once + 2
    most = Counter()
    for span in spans:
        running = [other for other in spans if other["begun"] <= span["begun"] < other["ended"]]
        most |= Counter(other["devices"] for other in running)
    assert most == dict.fromkeys("0123", on_one)
    assert {result.device for result in heard.results.values()} == {f"GPU {device}" for device in range(GPUS)}


def test_one_at_a_time_the_sweep_is_that_of_the_inline_runner(local_ray, tmp_path):
    """Suggestions that learn from results, early stops and a failing trial: all as inline."""

    def told(heard: Heard) -> tuple[list, dict]:
        def facts(result: TrialResult) -> tuple:
            value = result.val.get("macro_f1")
            return result.trial_id, result.config, result.outcome, result.epochs, result.best_epoch, value, result.error

        return heard.order, {number: facts(result) for number, result in heard.results.items()}

    sweeps = [
        fake_sweep(tmp_path / name, "raising", trials=14, epochs=4, rungs=(2, 3), algorithm="tpe")
        for name in ("inline", "ray")
    ]
    run_inline(sweeps[0][0])
    run(sweeps[1][0], tmp_path / "ray", at_once=1)
    inline, on_ray = (told(heard) for _, heard in sweeps)
    assert inline == on_ray
    assert {facts[2] for facts in inline[1].values()} == set(Outcome)
    assert any(facts[0].endswith("-2") for facts in inline[1].values())


def test_one_warm_worker_serves_many_trials_on_cpus_and_sees_no_gpu(local_ray, tmp_path):
    conductor, heard = fake_sweep(tmp_path, "quick", trials=6)
    run(conductor, tmp_path, at_once=1)
    assert len(heard.results) == 6
    assert len({(metrics.val["parent"], metrics.val["pid"]) for metrics in heard.epochs}) == 1
    assert {result.device for result in heard.results.values()} == {"GPU "}


def test_a_trial_that_dies_again_and_again_has_failed_and_does_not_stop_the_sweep(local_ray, tmp_path):
    conductor, heard = fake_sweep(tmp_path, "killed", trials=5)
    run(conductor, tmp_path, at_once=1)
    assert len(heard.results) == 5
    for seed, result in heard.by_seed.items():
        assert result.outcome is (Outcome.FAILED if seed == ODD_ONE else Outcome.COMPLETED)
    assert "was killed by SIGKILL" in heard.by_seed[ODD_ONE].error
    assert heard.by_seed[ODD_ONE].error.endswith("; so were 2 earlier attempts")
    assert heard.by_seed[ODD_ONE].epochs == 1


def test_a_trial_that_was_killed_goes_on_from_its_last_epoch(local_ray, tmp_path):
    conductor, heard = fake_sweep(tmp_path, "killed_once", trials=5)
    run(conductor, tmp_path, at_once=2)
    assert {result.outcome for result in heard.results.values()} == {Outcome.COMPLETED}
    for result in heard.results.values():
        own = [epoch for what, trial_id, epoch in heard.order if what == "epoch" and trial_id == result.trial_id]
        assert own == [1, 2, 3], "each epoch once"


@pytest.mark.slow
def test_what_does_not_fit_beside_others_has_its_device_to_itself(local_ray, tmp_path):
    """Ray gives a trial that is to be alone a whole GPU, where the others have a share each."""
    conductor, heard = fake_sweep(tmp_path, "greedy", trials=4, batch_sizes=(8, 32, 64, 8))
    run_on_ray(conductor, Placement(1.0, 0.5, 4), folder=tmp_path)
    of = {result.config.seed: result for result in heard.results.values()}
    assert [of[seed].outcome for seed in (0, 1, 3)] == [Outcome.COMPLETED] * 3
    assert of[2].error.startswith("does not fit into the device's memory, even alone on it: ResourceExhaustedError")


def test_short_epochs_come_in_batches_each_once_and_in_order(local_ray, tmp_path, monkeypatch):
    batches = []
    hear = _Ends.on_trial_result

    def count(self: _Ends, *, result: dict, **info: object) -> None:
        batches.append(len(result["events"]))
        hear(self, result=result, **info)

    monkeypatch.setattr(_Ends, "on_trial_result", count)
    conductor, heard = fake_sweep(tmp_path, "brisk", trials=4, epochs=60, rungs=(20,))
    run(conductor, tmp_path, at_once=2)
    assert len(heard.results) == 4
    for result in heard.results.values():
        told = [(what, epoch) for what, trial_id, epoch in heard.order if trial_id == result.trial_id]
        assert told == [
            ("started", 0),
            *(("epoch", epoch + 1) for epoch in range(result.epochs)),
            ("ended", result.epochs),
        ]
        assert result.epochs == (20 if result.outcome is Outcome.STOPPED_EARLY else 60)
    assert {result.outcome for result in heard.results.values()} == {Outcome.COMPLETED, Outcome.STOPPED_EARLY}
    assert len(batches) < len(heard.epochs) / 4


def nodes_of(folder: Path, slots: Slots, told: list[str]) -> Cluster:
    return Cluster(slots, folder / "cache", told.append, most=2)


def pixels_in(folder: Path) -> Path:
    """Of one image, as the cache of a driver has them."""
    path = folder / "cache" / "pixels" / "one.npy"
    return kept_array(path, (1, 8, 8, 1), lambda put: put(0, np.full((1, 8, 8, 1), 3, np.uint8)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leaves", "why"), [(True, "its node left before it began"), (False, "its node has no room, others use it")]
)
def test_a_trial_that_cannot_begin_on_its_node_is_given_to_another(leaves, why, local_ray, tmp_path, monkeypatch):
    """Ray itself would wait for that node for ever. Here it never was there: trials were only told so."""
    monkeypatch.setattr(trials, "PATIENCE_S", 2.0)
    begun, notes, told = time.monotonic(), [], []
    ghost = Node(1, 0, 2**30, node_id="f" * 56, address="10.9.9.9")

    def nodes() -> tuple[Node, ...]:
        (here,) = cluster_nodes()
        return (replace(here, cores=1), *(() if leaves and time.monotonic() > begun + 4 else (ghost,)))

    conductor, heard = fake_sweep(
        tmp_path,
        "quick" if leaves else "slow",
        trials=4,
        pixels=pixels_in(tmp_path),
        retried=lambda trial_id, end, epochs: notes.append((end.fault, end.error)),
    )
    slots = Slots(nodes, lambda node: node.cores, told=told.append)
    run_on_ray(conductor, Placement(1.0, 0.0, 2), folder=tmp_path, cluster=nodes_of(tmp_path, slots, told))
    assert {result.outcome for result in heard.results.values()} == {Outcome.COMPLETED}
    assert notes
    assert set(notes) == {(Fault.PREEMPTED, why)}
    assert told == ["node 10.9.9.9 is lost: 1 trial fewer at once; its trials go on elsewhere"] * leaves
    assert [suggestion.number for suggestion in heard.begun] == [0, 1, 2, 3], "what is suggested does not depend on it"


def test_trials_on_the_driver_s_own_node_use_its_files_and_stay_warm(local_ray, tmp_path):
    told: list[str] = []
    conductor, heard = fake_sweep(tmp_path, "tests.faults.programs:reading", trials=4, pixels=pixels_in(tmp_path))
    slots = Slots(cluster_nodes, lambda node: 1, told=told.append)
    run_on_ray(conductor, Placement(1.0, 0.0, 1), folder=tmp_path, cluster=nodes_of(tmp_path, slots, told))
    assert {result.device for result in heard.results.values()} == {str(tmp_path / "trials")}
    assert {metrics.val["pixels"] for metrics in heard.epochs} == {3 * 64}
    assert told == [], "nothing was carried"
    assert slots.figures == SlotFigures(slots=1, busy=0, nodes=1)
    assert not [*tmp_path.glob("home-*"), *(tmp_path / "cache").glob("home-*")]


class KillTheWorker(Heard):
    """Kills the process that Ray itself started, once, in the first trial."""

    def epoch(self, metrics: EpochMetrics) -> None:
        super().epoch(metrics)
        if len(self.epochs) == 1:
            psutil.Process(int(metrics.val["parent"])).parent().kill()


def test_trials_of_a_killed_ray_worker_go_on_with_another(local_ray, tmp_path, capfd):
    conductor, heard = fake_sweep(tmp_path, "slow", trials=3, epochs=8, heard=KillTheWorker())
    run(conductor, tmp_path, at_once=1)
    assert [heard.results[number].outcome for number in range(3)] == [Outcome.COMPLETED] * 3
    assert [entry for entry in heard.order if entry[0] == "epoch"] == [
        ("epoch", suggestion.trial_id, epoch) for suggestion in heard.begun for epoch in range(1, 9)
    ]
    assert len({metrics.val["parent"] for metrics in heard.epochs}) == 2, "two workers' servers"
    assert heard.by_seed[1].val["macro_f1"] == value_of(1, 8)
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_that_ray_s_memory_monitor_kills_is_one_that_was_lost(local_ray, tmp_path, monkeypatch):
    """As its own error reaches Ray's loop; the monitor itself is off here."""
    conductor, heard = fake_sweep(tmp_path, "slow", trials=2, epochs=3, heard=KillTheWorker())
    _retry_what_the_memory_monitor_kills()
    patched, raised = RayActorManager._actor_task_failed, []

    def as_the_monitor(self, tracked_actor_task, exception):
        raised.append(exception)
        patched(self, tracked_actor_task, OutOfMemoryError("Task was killed due to the node running low on memory."))

    as_the_monitor._knows_the_memory_monitor = True
    monkeypatch.setattr(RayActorManager, "_actor_task_failed", as_the_monitor)
    run(conductor, tmp_path, at_once=1)
    assert raised
    assert {result.outcome for result in heard.results.values()} == {Outcome.COMPLETED}


@pytest.mark.slow
def test_where_ray_s_loop_fails_another_takes_the_trials_up(local_ray, tmp_path, monkeypatch):
    conductor, heard = fake_sweep(tmp_path, "slow", trials=3, epochs=6)
    hear = _Ends.on_trial_result

    def breaks_once(self, **info):
        hear(self, **info)
        if len(heard.epochs) >= 3 and not broken:
            broken.append(True)
            raise OSError("of Ray itself")

    broken: list[bool] = []
    monkeypatch.setattr(_Ends, "on_trial_result", breaks_once)
    run(conductor, tmp_path, at_once=1)
    assert broken
    assert {result.outcome for result in heard.results.values()} == {Outcome.COMPLETED}
    assert [entry for entry in heard.order if entry[0] == "epoch"] == [
        ("epoch", suggestion.trial_id, epoch) for suggestion in heard.begun for epoch in range(1, 7)
    ]


def test_a_full_disk_ends_the_sweep_in_words_and_leaves_the_trial_open(local_ray, tmp_path):
    conductor, heard = fake_sweep(tmp_path, "without_space", trials=4)
    with pytest.raises(SweepFailed, match="No space left on device"):
        run(conductor, tmp_path, at_once=1)
    assert sorted(heard.results) == [0, 1]
    assert conductor.running


class Interrupter(Heard):
    """Presses Ctrl-C when the second trial has ended."""

    loop = 0  # the thread Ray's loop runs in

    def ended(self, number: int, result: TrialResult) -> None:
        super().ended(number, result)
        self.loop = threading.get_ident()
        if len(self.results) == 2:
            os.kill(os.getpid(), signal.SIGINT)


def in_ray(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    return any("/ray/" in each.filename for each in traceback.extract_stack(frame)) if frame else False


def test_an_interruption_keeps_the_finished_trials(local_ray, tmp_path):
    conductor, heard = fake_sweep(tmp_path, "slow", trials=20, heard=Interrupter())
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(conductor, tmp_path, at_once=2)
    assert time.monotonic() - begun < 30
    assert not in_ray(heard.loop), "Ray would be shut down below its running loop"
    assert conductor.interrupted
    assert 2 <= len(heard.results) <= 4
    assert len(heard.begun) <= len(heard.results) + 2
    assert {result.outcome for result in heard.results.values()} == {Outcome.COMPLETED}


class Watched(Heard):
    """Looks at this process and everything that Ray started while a trial runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()

    def epoch(self, metrics: EpochMetrics) -> None:
        super().epoch(metrics)
        self.seen.look(psutil.Process())


def test_nobody_else_can_reach_a_process_of_a_sweep_or_read_its_token(local_ray, tmp_path):
    conductor, heard = fake_sweep(tmp_path, "quick", trials=2, epochs=1, heard=Watched())
    run(conductor, tmp_path, at_once=2)
    assert len(heard.results) == 2
    assert heard.seen.addresses
    assert heard.seen.reachable == set()
    words = [word for command in heard.seen.commands for word in command]
    assert any("raylet" in word for word in words)
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    assert not [word for word in words if token in word]


def test_the_resources_of_a_running_cluster(local_ray):
    """Asked from another process, as a second machine would."""
    address = ray.get_runtime_context().gcs_address
    code = f"from sweep.ray_cluster import cluster_machine; print(cluster_machine({address!r}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    node = re.fullmatch(
        r"Machine\(nodes=\(Node\(cores=8, gpus=4, memory_bytes=(\d+), gpu_memory_bytes=\d+, "
        r"node_id='[0-9a-f]{56}', address='127.0.0.1'\),\)\)\n",
        found.stdout,
    )
    assert node, found.stdout
    assert int(node[1]) > 1024**3


class TestCheckAddress:
    @pytest.mark.parametrize("address", ["nonsense", "local", "host:", ":6379", "host:port", "ray://host:10001"])
    def test_not_an_address(self, address):
        with pytest.raises(ClusterUnreachable, match=rf"\(auto or HOST:PORT\), but got '{address}'"):
            check_address(address)

    def test_nobody_there(self):
        """Ray itself would try for a minute."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            check_address(f"127.0.0.1:{port}")
        begun = time.monotonic()
        with pytest.raises(
            ClusterUnreachable, match=f"no Ray cluster answers at '127.0.0.1:{port}' .*ray start --head"
        ):
            check_address(f"127.0.0.1:{port}")
        assert time.monotonic() - begun < 5

    def test_whatever_runs_here_is_left_to_ray(self, monkeypatch):
        knocked = []
        monkeypatch.setattr("sweep.ray_cluster._knock", lambda *place: knocked.append(place))
        check_address("auto")
        assert not knocked
