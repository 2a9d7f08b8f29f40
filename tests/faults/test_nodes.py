"""A node that is lost, and a worker that Ray's own memory monitor kills: trials go on elsewhere.

Real Ray with several nodes on one machine, so that it needs a fresh Ray: run in a process of its own.
"""

import json
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
