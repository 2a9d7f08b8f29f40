"""Real trainings on a few small images, in this process or in worker processes. Only what trains imports Keras."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cxr_models.backbones import BACKBONES
from cxr_models.cuts import Cut, choose_cut
from cxr_models.features import FeatureBudget
from cxr_models.freezing import parse_strategy
from cxr_models.network import head_parameters
from cxr_models.trial import CLASSIFY, EpochMetrics, Objective, TrialConfig, TrialData
from sweep.worker import TrialEnd, TrialJob, TrialProcess, Work, segment, train

ROOT = Path(__file__).parent.parent
LOSS = Objective("loss", "min")
GIGABYTE = 1024**3
MEETING_TIMEOUT_S = 60

Weights = dict[str, np.ndarray]


def drain(epochs: Iterator[EpochMetrics]) -> list[EpochMetrics]:
    """Let a trial run to its end."""
    found = [next(epochs)]
    try:
        while True:
            found.append(epochs.send(True))
    except StopIteration:
        return found


def weights_of(model: Any) -> Weights:
    return {weight.path: weight.numpy() for weight in model.weights if "seed_generator" not in weight.path}


def images_of(
    folder: Path, side: int, *, train: int, val: int, classes: tuple[str, ...] = ("a", "b"), rest: int = 6
) -> TrialData:
    """Images whose brightness tells the class a little; the last `rest` of them are the test set's."""
    images = train + val + rest
    generator = np.random.default_rng(0)
    labels = (np.arange(images) % len(classes)).astype(np.int32)
    pixels = (
        generator.integers(0, 120, (images, side, side, 1)) + 100 // (len(classes) - 1) * labels[:, None, None, None]
    )
    np.save(folder / f"{side}.npy", pixels.astype(np.uint8))
    labels[train + val :] = -1
    ids = generator.integers(0, 2**63, images).astype(np.uint64)
    split = np.arange(train), np.arange(train, train + val)
    return TrialData(classes, labels, *split, 1, {side: folder / f"{side}.npy"}, image_ids=ids)


def cuts_of(config: TrialConfig, classes: int) -> tuple[Cut | None, ...]:
    """The cut of each phase."""
    phases = parse_strategy(config.freeze).phases
    row = BACKBONES[config.backbone]
    table = _table(config.backbone, config.image_side)
    head = head_parameters(config, table, classes)
    return tuple(
        choose_cut(phases[: index + 1], row, table, pooling=config.pooling, taps=config.taps, head_parameters=head)
        for index in range(len(phases))
    )


@lru_cache
def _table(backbone: str, side: int) -> Any:
    from cxr_models.backbones import build_backbone
    from cxr_models.layer_table import read_table

    return read_table(BACKBONES[backbone], build_backbone(BACKBONES[backbone], side))


def keeping(data: TrialData, configs: Iterable[TrialConfig], folder: Path, limit_bytes: int = GIGABYTE) -> TrialData:
    """The same images; what these configurations' frozen layers make of them is stored in `folder`."""
    kept: dict[tuple[str, str, int], dict[Cut, None]] = {}
    for config in configs:
        cuts = kept.setdefault((config.backbone, config.weights, config.image_side), {})
        cuts |= {cut: None for cut in cuts_of(config, len(data.classes)) if cut is not None}
    return replace(
        data, features=FeatureBudget(folder, limit_bytes, {group: tuple(cuts) for group, cuts in kept.items()})
    )


# What follows trains in worker processes, as a sweep does.

counted: Counter[str] = Counter()  # what this process has done since `_count`


@lru_cache
def _count() -> None:
    """Count the images that frozen prefixes are run on, and how often each kind of step is traced."""
    from cxr_models.steps import Prefix, Steps

    _before(Prefix, "__call__", lambda prefix, pixels: counted.update(prefix_images=len(pixels)))
    _before(Steps, "_train_steps", lambda *_: counted.update(train_traces=1))
    _before(Steps, "_scores", lambda *_, training: counted.update(inference_traces=not training))


def _before(owner: type, name: str, note: Callable[..., object]) -> None:
    """Have `note` told of every call."""
    method = getattr(owner, name)

    def noted(*given: Any, **named: Any) -> Any:
        note(*given, **named)
        return method(*given, **named)

    setattr(owner, name, noted)


def recording(job: TrialJob) -> Generator[EpochMetrics, bool, None]:
    """The program of every real trial; writes down what it did, and the weights after its last epoch."""
    from cxr_models import training

    _count()
    earlier = counted.copy()
    epochs = train(job)
    metrics, told = next(epochs), []
    while True:
        network = training.warm_network(*training._shape(job.config, job.work.data))
        told.append({"train": dict(metrics.train), "val": dict(metrics.val), "source": metrics.source})
        record = {
            "epochs": told,
            "weights": {path: _digest(value) for path, value in weights_of(network.model).items()},
            "counted": {what: counted[what] - earlier[what] for what in sorted(counted)},
            "pid": os.getpid(),
            "seconds": metrics.trial_seconds,
            "resident_bytes": psutil.Process().memory_info().rss,
        }
        (job.folder / "record.json").write_text(json.dumps(record))
        try:
            metrics = epochs.send((yield metrics))
        except StopIteration:
            return


def stopping(job: TrialJob) -> Generator[EpochMetrics, bool, None]:
    """The program of every real trial; writes down its epochs. Begun first, it ends after the one the folder names."""
    stop = 0 if job.known else int((job.work.folder / "stop").read_text())
    told: list[dict[str, Any]] = []
    epochs = train(job) if job.work.objective.task == CLASSIFY else segment(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "record.json").write_text("[]")
    for metrics in epochs_of(epochs):
        told.append(metrics.to_json())
        (job.folder / "record.json").write_text(json.dumps(told))
        yield metrics
        if metrics.epoch == stop:
            return


def epochs_of(epochs: Generator[EpochMetrics, bool, None]) -> Generator[EpochMetrics, None, None]:
    """A training that is always told to go on, and left alone with this generator."""
    with closing(epochs):
        try:
            yield next(epochs)
            while True:
                yield epochs.send(True)
        except StopIteration:
            return


def _digest(value: np.ndarray) -> str:
    return hashlib.sha256(value.tobytes()).hexdigest()


def meeting(job: TrialJob) -> Generator[EpochMetrics, bool, None]:
    """As `recording`, but no share of a pass is computed before every trial of the sweep's folder computes one."""
    from cxr_models.steps import Prefix

    wanted = int((job.work.folder / "peers").read_text())

    def met(*_: object) -> None:
        (job.folder / "here").touch()
        until = time.monotonic() + MEETING_TIMEOUT_S
        while len(list(job.work.folder.glob("*/here"))) < wanted:
            assert time.monotonic() < until, "the other trial never came"
            time.sleep(0.01)

    _before(Prefix, "__call__", met)
    return recording(job)


def job(trial_id: str, config: TrialConfig, data: TrialData, folder: Path, **given: Any) -> TrialJob:
    work = Work(data, LOSS, folder, threads=1, program="tests.trainings:recording")
    return TrialJob(trial_id, config, replace(work, **given))


def in_workers(folder: Path, groups: Sequence[Sequence[TrialJob]], *, together: bool = False) -> list[dict[str, Any]]:
    """Run each group in a fresh worker of its own; for each, trial id -> its record.

    Args:
        folder: for files of this call.
        groups: the trials of each worker.
        together: the workers run at once.
    """
    order = folder / "order.pickle"
    order.write_bytes(pickle.dumps((groups, together)))
    driver = _driver()
    print(order, file=driver.stdin, flush=True)
    answer = json.loads(driver.stdout.readline())
    assert answer == "done", answer
    return [{one.trial_id: json.loads((one.folder / "record.json").read_text()) for one in group} for group in groups]


@lru_cache
def _driver() -> subprocess.Popen[str]:
    """A process whose fork server imports TensorFlow once for the workers of all tests; it ends when its input does."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", "from tests.trainings import work_off_orders; work_off_orders()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


def work_off_orders() -> None:
    for line in sys.stdin:
        order = Path(line.strip())
        groups, together = pickle.loads(order.read_bytes())
        try:
            with ThreadPoolExecutor(len(groups) if together else 1) as pool:
                list(pool.map(_work_off, range(len(groups)), groups, [order.parent] * len(groups)))
            answer = "done"
        except RuntimeError as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


def _work_off(number: int, jobs: Collection[TrialJob], folder: Path) -> None:
    process = TrialProcess(folder / f"worker-{number}.log", preload=("cxr_models.training", "tests.trainings"))
    try:
        for one in jobs:
            process.start(one)
            while not isinstance(end := process.next()[-1], TrialEnd):
                pass
            if end.error:
                raise RuntimeError(f"{one.trial_id}: {end.error}\n{end.traceback}")
    finally:
        process.close()
