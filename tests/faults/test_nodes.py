"""Nodes that are lost, join or share no disk, and a worker that Ray's own memory monitor kills: trials go on elsewhere.

Real Ray with several nodes on one machine, so that it needs a fresh Ray: run in a process of its own.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent.parent


def run_apart(code: str, tmp_path: Path, **environment: str) -> dict:
    """What a program in a process of its own prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        cwd=ROOT,
        env={**psutil.Process().environ(), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


LOST_NODE = """
    import json, sys, threading, time
    from pathlib import Path

    from sweep import trials  # sets what Ray reads when it is imported
    import ray
    from ray.cluster_utils import Cluster
    from tests.sweeps import Heard, fake_sweep

    class Told(Heard):
        def epoch(self, metrics):
            super().epoch(metrics)
            if len(self.epochs) == 4:
                threading.Thread(target=cluster.remove_node, args=(node,), kwargs={"allow_graceful": False}).start()

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    folder, notes = Path(sys.argv[1]), []
    conductor, heard = fake_sweep(
        folder, "slow", trials=4, epochs=10, heard=Told(),
        retried=lambda trial_id, end, epochs: notes.append([end.fault, epochs]),
    )
    trials.run_on_ray(conductor, trials.Placement(1.0, 0.0, 2), folder=folder)
    epochs = [[metrics.trial_id, metrics.epoch] for metrics in heard.epochs]
    outcomes = [str(result.outcome) for result in heard.results.values()]
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps({"epochs": epochs, "outcomes": outcomes, "notes": notes}), flush=True)
"""


@pytest.mark.slow
def test_trials_of_a_lost_node_go_on_with_another(tmp_path):
    found = run_apart(LOST_NODE, tmp_path)
    assert found["outcomes"] == ["completed"] * 4
    assert len(found["epochs"]) == 40
    assert len({tuple(each) for each in found["epochs"]}) == 40, "each epoch once"
    assert [fault for fault, _ in found["notes"]] == ["lost"]
    assert found["notes"][0][1] >= 1, "it goes on from its last epoch"


SHARES_NO_DISK = """
    import json, os, subprocess, sys, threading, time
    from contextlib import suppress
    from pathlib import Path

    from sweep import trials  # sets what Ray reads when it is imported
    import numpy as np
    import psutil
    import ray
    from ray.cluster_utils import Cluster
    from cxr_models.arrays import kept_array
    from sweep.machine import Machine, TrialMemory, allot
    from sweep.nodes import Slots
    from sweep.ray_cluster import cluster_nodes
    from sweep.spec import ResourceSpec
    from tests.sweeps import Heard, fake_sweep

    folder = Path(sys.argv[1])
    run, cache, third = folder / "run", folder / "cache", folder / "third"
    run.mkdir()

    def fill(put):
        put(0, np.full((1, 8, 8, 1), 3, np.uint8))

    pixels = kept_array(cache / "pixels" / "one.npy", (1, 8, 8, 1), fill)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)

    started = []

    def start(*before, **environment):
        command = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address} --num-cpus=1 --block"
        started.append(subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", " && ".join([*before, f"exec {command}"])],
            env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ))

    def kill(node):
        for process in [*psutil.Process(node.pid).children(recursive=True), node]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    # A node that has folders of its own in place of the driver's, at the same paths.
    start(*(f"mount -t tmpfs tmpfs {own}" for own in (run, cache)))

    class Told(Heard):
        elsewhere = 0

        def epoch(self, metrics):
            super().epoch(metrics)
            self.elsewhere += metrics.device.startswith(str(cache))
            if len(self.epochs) == 6:
                start(SWEEP_NODE_CACHE=str(third))
            if self.elsewhere == 40 and not self.killed:
                self.killed = True
                threading.Thread(target=kill, args=(started[0],)).start()

        killed = False

    notes, told = [], []
    try:
        until = time.time() + 180
        while len(nodes := cluster_nodes()) < 2 and time.time() < until:
            time.sleep(0.5)
        assert len(nodes) == 2, "the second node has not come"
        conductor, heard = fake_sweep(
            run, "tests.faults.programs:reading", trials=12, epochs=20, heard=Told(), pixels=pixels,
            retried=lambda trial_id, end, epochs: notes.append([trial_id, end.fault, epochs]),
        )
        allotment = allot(ResourceSpec(cpus_per_trial=1.0), Machine(nodes), 12, TrialMemory(1, 1, 1))
        slots = Slots.of_nodes(allotment, cluster_nodes, lambda config: None, told.append)
        trials.run_on_ray(
            conductor, trials.Placement(1.0, 0.0, 2), folder=run,
            cluster=trials.Cluster(slots, cache, told.append, most=12),
        )
    finally:
        for node in started:
            if node.poll() is None:
                kill(node)
    known = {path.parent.name: json.loads(path.read_text()) for path in run.glob("trials/*/checkpoint.json")}
    found = {
        "outcomes": [[str(result.outcome), result.error] for result in heard.results.values()],
        "epochs": [[metrics.trial_id, metrics.epoch, metrics.ended_ms] for metrics in heard.epochs],
        "pixels": sorted({metrics.val["pixels"] for metrics in heard.epochs}),
        "elsewhere": heard.elsewhere, "notes": notes, "told": told, "known": known,
        "third": (third / "pixels" / "one.npy").is_file(),
        "left": sorted(str(path.relative_to(folder)) for path in folder.glob("*/trials/*/trials/*")),
        "on_driver": (cache / "trials").exists(),
    }
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(found), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems of its own for a node: run it as root")
def test_nodes_that_share_no_disk_train_join_and_are_lost(tmp_path):
    """One node has other folders at the same paths, one that joins another cache; the first of these is killed."""
    found = run_apart(SHARES_NO_DISK, tmp_path)
    assert found["outcomes"] == [["completed", ""]] * 12
    assert len(found["epochs"]) == len({(trial_id, epoch) for trial_id, epoch, _ in found["epochs"]}) == 12 * 20
    assert found["elsewhere"] >= 40
    assert found["pixels"] == [3 * 64], "they have arrived there"
    assert found["third"], "and on the node that joined"
    assert not found["on_driver"], "the folders were hidden indeed"
    assert found["left"] == [], "nothing of the trials is left in caches"
    lost = [(trial_id, epochs) for trial_id, fault, epochs in found["notes"] if fault == "lost"]
    assert len(lost) == 1, "the one that ran there"
    assert lost[0][1] >= 1
    for trial_id, ended in found["known"].items():
        told = [ended_ms for own, _, ended_ms in found["epochs"] if own == trial_id]
        assert told == ended, "all is home, and no epoch that was told of has been trained again"
    assert len(found["known"]) == 12
    joined, *others = found["told"]
    assert joined.endswith("has joined: 1 more trial at once")
    assert any("is lost: 1 trial fewer at once" in line for line in others)
    assert "of trials came back" in others[-1]


HUNGRY = """
    import json, sys
    from pathlib import Path

    from sweep import ray_cluster, trials
    from tests.sweeps import fake_sweep

    folder, notes = Path(sys.argv[1]), []
    with ray_cluster.ray_cluster("", cores=2, gpus=0):
        conductor, heard = fake_sweep(
            folder, "hungry_once", trials=3, epochs=4,
            retried=lambda trial_id, end, epochs: notes.append([end.error, epochs]),
        )
        trials.run_on_ray(conductor, trials.Placement(1.0, 0.0, 1), folder=folder)
    outcomes = [str(result.outcome) for result in heard.results.values()]
    epochs = [[metrics.trial_id, metrics.epoch] for metrics in heard.epochs]
    print(json.dumps({"epochs": epochs, "outcomes": outcomes, "notes": notes}), flush=True)
"""


@pytest.mark.slow
def test_a_worker_that_the_memory_monitor_kills_costs_an_epoch_and_not_the_sweep(tmp_path):
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + 2 * 2**30) / memory.total
    if threshold > 0.8:
        pytest.skip("needs 2 GB of free memory and some more")
    found = run_apart(
        HUNGRY,
        tmp_path,
        RAY_memory_monitor_refresh_ms="100",
        RAY_memory_usage_threshold=f"{threshold:.3f}",
    )
    assert found["outcomes"] == ["completed"] * 3
    assert len({tuple(each) for each in found["epochs"]}) == len(found["epochs"]) == 12
    assert found["notes"], "the monitor struck"


BESIDE = """
    import json

    from sweep import ray_cluster
    from ray.cluster_utils import Cluster
    import ray

    other = Cluster(initialize_head=True, head_node_args={"num_cpus": 7, "include_dashboard": False})
    with ray_cluster.ray_cluster("", cores=2, gpus=0):
        found = ray.cluster_resources()["CPU"]
    other.shutdown()
    print(json.dumps({"cores": found}))
"""


@pytest.mark.slow
def test_a_sweep_starts_a_ray_of_its_own_where_another_runs_already(tmp_path):
    assert run_apart(BESIDE, tmp_path) == {"cores": 2}
