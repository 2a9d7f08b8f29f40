"""What does a trial cost beside its training, and does that grow with the number of trials?

Trials that train nothing, three epochs each, go through everything a real sweep uses: Ray's workers and their child
processes, Optuna's TPE with its journal, the record and MLflow. Each size runs in a process of its own.

Run:  python benchmarks/many_trials.py --sizes 100 300 1000
Cost: about a tenth of a second to a second a trial.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from measuring import environment, own_command, write_result
from rendering import render_one
from trivial_program import CLASSES, IMAGES

from cxr_models.trial import TrialConfig, TrialData
from sweep.record import Record, RunFolder
from sweep.runner import Conductor
from sweep.search import Search
from sweep.spec import SweepSpec, read_spec
from sweep.tracking import DatasetInfo, Tracker
from sweep.worker import Work

RESULTS = Path(__file__).parent / "results"
EPOCHS = 3
TRACKING_TIMEOUT_S = 3600.0
SPACE = """\
name: many-trials
data: phantom
objective: macro_f1
search: {{algorithm: tpe, trials: {trials}}}
space:
  backbone: mobilenet_v2_0.35
  weights: bundled
  freeze: [all, "convs:1", "convs:2", "stages:1", none]
  learning_rate: {{low: 1e-5, high: 1e-2, log: true}}
  dropout: {{low: 0.0, high: 0.5}}
  batch_size: [16, 32]
  epochs: {epochs}
"""


def main() -> None:
    """The command."""
    arguments = parser().parse_args()
    rows = [in_own_process(trials, arguments.workers) for trials in sorted(arguments.sizes)]
    result = {
        "kind": "many_trials",
        "environment": environment(own_command()),
        "workers": arguments.workers,
        "epochs": EPOCHS,
        "rows": rows,
        "growth_exponent": growth_exponent(rows) if len(rows) > 1 else None,
    }
    write_result(result, arguments.out / "many_trials.json")
    print(render_one(result))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    found = argparse.ArgumentParser(description="Seconds per trial of trials that train nothing.")
    found.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000], metavar="N", help="(100 300 1000)")
    found.add_argument("--workers", type=int, default=2, metavar="N", help="trials at once (2)")
    found.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="(benchmarks/results)")
    return found


def in_own_process(trials: int, workers: int) -> dict[str, Any]:
    """Run one size in a fresh process, whose memory is then its own."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh) as pool, tempfile.TemporaryDirectory(prefix="many-trials-") as scratch:
        return pool.submit(run_trials, trials, workers, Path(scratch)).result()


def run_trials(trials: int, workers: int, scratch: Path) -> dict[str, Any]:
    """Run a sweep of trivial trials.

    Returns:
        `trials`; `seconds` from the first suggestion until MLflow has everything; `search_seconds`, the part until the
        last trial ended; `startup_seconds` of imports and Ray; `driver_bytes`, this process's peak resident memory.

    Raises:
        RuntimeError: a trial failed, or MLflow did not take everything.
    """
    begun = time.perf_counter()
    from sweep import trials as on_ray
    from sweep.ray_cluster import ray_cluster

    folder = RunFolder.create(scratch, "run", exactly=True)
    spec = _write_inputs(folder, scratch, trials)
    record = Record(folder, spec.objective)
    tracker = _open_tracker(folder, spec)
    work = Work(_no_images(), spec.objective, folder.state / "trials", 1, "trivial_program:program", preload=())
    conductor = Conductor(work, Search(spec, folder.study), None, _parameters, (record, tracker))
    with ray_cluster("", cores=workers, gpus=0):
        started = time.perf_counter()
        on_ray.run_on_ray(conductor, on_ray.Placement(1.0, 0.0, workers), folder=folder.state)
        searched = time.perf_counter()
        tracker.finished({}, [])
        tracker.close(TRACKING_TIMEOUT_S)
        ended = time.perf_counter()
    if tracker.problem:
        raise RuntimeError(tracker.problem)
    if failed := [result.error for result in record.results if result.error] or len(record.results) != trials:
        raise RuntimeError(f"{len(record.results)} of {trials} trials ended; failed: {failed}")
    return {
        "trials": trials,
        "seconds": ended - started,
        "search_seconds": searched - started,
        "startup_seconds": started - begun,
        "driver_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def growth_exponent(rows: list[dict[str, Any]]) -> float:
    """The power of the number of trials that total seconds grow with, by least squares in the logarithms."""
    sizes, seconds = ([row[name] for row in rows] for name in ("trials", "seconds"))
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _write_inputs(folder: RunFolder, scratch: Path, trials: int) -> SweepSpec:
    """The files of a run folder that MLflow keeps."""
    space = scratch / "many-trials.yaml"
    space.write_text(SPACE.format(trials=trials, epochs=EPOCHS))
    spec = read_spec(space)
    folder.spec.write_text(spec.to_yaml())
    folder.split.write_text("path,label,patient,split\n")
    return spec


def _open_tracker(folder: RunFolder, spec: SweepSpec) -> Tracker:
    data = DatasetInfo(
        name="none", digest="0" * 64, source="none", images=IMAGES, patients=IMAGES, classes={"val": {"a": IMAGES}}
    )
    tracker = Tracker(folder, spec.name, objective=spec.objective, classes=CLASSES, dataset=data)
    tracker.opened()
    return tracker


def _no_images() -> TrialData:
    nothing = np.zeros(0, np.int64)
    return TrialData(CLASSES, nothing.astype(np.int32), nothing, nothing, 1, {})


def _parameters(config: TrialConfig) -> tuple[int, int]:
    return 3_843, 410_208  # of a head on MobileNetV2 0.35


if __name__ == "__main__":
    main()
