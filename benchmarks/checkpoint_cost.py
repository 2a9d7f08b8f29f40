"""What a checkpoint after every epoch costs.

One process with one thread, trainings with and without in turn; medians of the time from one epoch's report to the
next, without the first training of each, which compiles.

    python benchmarks/checkpoint_cost.py     # some 3 minutes
"""

import json
import statistics
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from measuring import environment, own_command

from cxr_models.backbones import BACKBONES
from cxr_models.cuts import choose_cut
from cxr_models.features import FeatureBudget
from cxr_models.freezing import parse_strategy
from cxr_models.layer_table import layer_tables
from cxr_models.network import head_parameters
from cxr_models.trial import CHECKPOINT, EpochMetrics, Objective, TrialConfig, TrialData

SIDE, TRAIN, VAL, CLASSES = 96, 300, 60, 2
EPOCHS = {"all": 100, "none": 4}
LAPS = 2
HEAD = TrialConfig("mobilenet_v2_0.35", weights="bundled", image_side=SIDE, freeze="all", dropout=0.2)


def main() -> None:
    """The command."""
    from cxr_models import steps

    steps.configure(1)
    with tempfile.TemporaryDirectory() as scratch:
        data = _data(Path(scratch))
        found = {freeze: _cost(data, freeze, Path(scratch)) for freeze in EPOCHS}
    print(json.dumps({"environment": environment(own_command()), "images": TRAIN, "seconds": found}, indent=2))


def _data(folder: Path) -> TrialData:
    """Random images; what the frozen backbone makes of them is kept."""
    generator = np.random.default_rng(0)
    np.save(folder / "pixels.npy", generator.integers(0, 256, (TRAIN + VAL, SIDE, SIDE, 1)).astype(np.uint8))
    group = HEAD.backbone, HEAD.weights, SIDE
    row = BACKBONES[HEAD.backbone]
    table = layer_tables([(HEAD.backbone, SIDE)], folder)[HEAD.backbone, SIDE]
    phases = parse_strategy("all").phases
    head = head_parameters(HEAD, table, CLASSES)
    cut = choose_cut(phases, row, table, pooling=HEAD.pooling, taps=HEAD.taps, head_parameters=head)
    weights = row.bundled_path
    if cut is None or weights is None:
        raise RuntimeError(f"expected {row.name} to have a cut and bundled weights, got {cut} and {weights}")
    return TrialData(
        tuple("ab"),
        generator.integers(0, CLASSES, TRAIN + VAL).astype(np.int32),
        np.arange(TRAIN),
        np.arange(TRAIN, TRAIN + VAL),
        1,
        {SIDE: folder / "pixels.npy"},
        {group: weights},
        features=FeatureBudget(folder / "features", 10**9, {group: (cut,)}),
    )


def _cost(data: TrialData, freeze: str, folder: Path) -> dict[str, float]:
    """Seconds of an epoch without and with a checkpoint, and the bytes of one."""
    from cxr_models import training

    config = replace(HEAD, freeze=freeze, epochs=EPOCHS[freeze])
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for lap in range(LAPS + 1):
        for keeping, laps in seconds.items():
            place = folder / f"{freeze}-{keeping}-{lap}"
            with _checkpoints(keeping):
                trial = training.run_trial("cost", config, data, place, Objective("loss", "min"))
                found = list(_laps(trial))
            laps += found if lap else []  # the first lap compiles
    size = (place / CHECKPOINT).stat().st_size
    plain, kept = statistics.median(seconds[False]), statistics.median(seconds[True])
    return {"plain": plain, "with checkpoints": kept, "ratio": kept / plain, "bytes": size}


def _laps(trial: Generator[EpochMetrics, bool, None]) -> Generator[float, None, None]:
    """From each report of an epoch to the next."""
    next(trial)
    while True:
        begun = time.perf_counter()
        try:
            trial.send(True)
        except StopIteration:
            return
        yield time.perf_counter() - begun


@contextmanager
def _checkpoints(kept: bool) -> Generator[None, None, None]:
    from cxr_models.epochs import Course

    def note(self: Course, metrics: EpochMetrics, trainings: object, scores: object, *, best: bool) -> None:
        self.epochs.append(metrics)
        if best:
            self.best = metrics.epoch
            self._moved.note(scores)

    with patch.object(Course, "add", Course.add if kept else note):
        yield


if __name__ == "__main__":
    main()
