"""What Prometheus reads of a real sweep on a real Ray head is what the sweep's own record says."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from contextlib import suppress

import pytest

from sweep.metering import METRICS
from tests.cluster.heads import ROOT

SPACE = """\
name: metered
data: {data}
objective: macro_f1
search: {{algorithm: grid, trials: 4}}
space:
  backbone: mobilenet_v2_0.35
  weights: bundled
  image_side: 96
  freeze: [all, "convs:1"]
  learning_rate: [1e-3, 3e-3]
  epochs: 6
"""
LATEST_S = 30.0  # Ray passes on what it has been told every ten seconds


class Prometheus:
    """Reads an exporter every second.

    Attributes:
        history: metric and its own label -> each value that it had, in order.
        sweeps: the label `sweep` of all.
    """

    def __init__(self, port: int) -> None:
        self.history: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.sweeps: set[str] = set()
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._labels = {f"ray_{metric.name}": metric.label for metric in METRICS}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read_on, daemon=True)
        self._thread.start()

    def value(self, name: str, label: str = "") -> float:
        return next(iter(self.history.get((f"ray_{name}", label), [0.0])[-1:]))

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _read_on(self) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        while not self._ended.wait(1.0):
            with suppress(OSError), urllib.request.urlopen(self._url, timeout=5) as answer:
                for family in text_string_to_metric_families(answer.read().decode()):
                    for sample in family.samples:
                        if sample.name in self._labels:
                            label = sample.labels.get(self._labels[sample.name], "")
                            self.history[sample.name, label].append(sample.value)
                            self.sweeps.add(sample.labels["sweep"])


@pytest.mark.slow
def test_prometheus_reads_what_the_record_says(head, tmp_path, radiography_folder):
    space = tmp_path / "metered.yaml"
    space.write_text(SPACE.format(data=radiography_folder))
    command = [sys.executable, "-m", "sweep.run", str(space), "--address", head.address, "--out", str(tmp_path)]
    command += ["--cache-dir", str(tmp_path / "cache")]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    prometheus = Prometheus(head.metrics)
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Prometheus" not in done.stdout
        summary = json.loads((tmp_path / "metered" / "summary.json").read_text())
        deadline = time.monotonic() + LATEST_S
        while prometheus.value("cxr_sweep_trials_total", "completed") < 4 and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        prometheus.close()
    assert prometheus.sweeps == {"metered"}
    value, history = prometheus.value, prometheus.history
    assert value("cxr_sweep_trials_total", "completed") == summary["trials"]["completed"] == 4
    assert value("cxr_sweep_epochs_total", "features") == summary["epochs"]["from_features"]
    assert value("cxr_sweep_epochs_total", "pixels") == summary["epochs"]["run"] - summary["epochs"]["from_features"]
    hits, misses = (value("cxr_sweep_feature_requests_total", result) for result in ("hit", "miss"))
    assert hits + misses == 4, "each trial asks once"
    assert 1 <= misses <= summary["machine"]["concurrency"], "the first ones store what all need"
    assert 0 < value("cxr_sweep_epoch_seconds_total") < summary["seconds"]["train"]
    assert value("cxr_sweep_feature_seconds_total") == pytest.approx(summary["seconds"]["features"], abs=0.1)
    assert value("cxr_sweep_best_value", "macro_f1") == summary["best"]["val"]["macro_f1"]
    assert value("cxr_sweep_mlflow_lacking_epochs") <= summary["epochs"]["run"]
    slots = set(history["ray_cxr_sweep_slots", ""])
    assert slots <= {0.0, float(summary["machine"]["concurrency"])}
    assert max(slots) > 0
    assert max(history["ray_cxr_sweep_nodes", ""]) == 1
    running, busy = history["ray_cxr_sweep_running_trials", ""], history["ray_cxr_sweep_busy_slots", ""]
    assert 1 <= max(running) <= max(slots)
    assert 1 <= max(busy) <= max(slots)
    waiting = history["ray_cxr_sweep_waiting_trials", ""]
    assert waiting == sorted(waiting, reverse=True)
    assert {name for name, _ in history} >= {f"ray_{each.name}" for each in METRICS} - {"ray_cxr_sweep_left_seconds"}
