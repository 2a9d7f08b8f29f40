"""What the strategies here reach on the images of DarkCovidNet, in folds by image as published, and by patient.

Ozturk et al. 2020 (doi 10.1016/j.compbiomed.2020.103792) report the mean accuracy over five random folds: 87.02 % for
COVID-19, No_findings and Pneumonia, and 98.08 % for COVID-19 against No_findings. Their folds are by image, so that
images of one patient stand on both sides; here that is repeated, and done by patient too.

In each fold a configuration and its number of epochs are chosen by inner folds, cut as the outer ones, of what is not
held out; it is then trained again on all of that, once, and tested on the held-out images. Folds by patient keep copies
of one picture on one side too. The candidates are heads on a frozen MobileNetV2 0.35, on its last layer or on seven
depths (after Head2Toe: Evci et al., ICML 2022), whose features are computed once for all of them.

No held-out figure has been used to choose among them. But their list was drawn up after a look at the inner folds of
one outer fold of the three classes, and those images are held out in the four others: to that extent it has seen them.

    python benchmarks/darkcovidnet.py --data DIR --weights FILE       # under an hour on 2 cores
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import environment, own_command, write_result
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from cxr_models.dataset import Manifest, read_manifest
from cxr_models.duplicates import find_duplicates
from cxr_models.features import FeatureBudget
from cxr_models.intervals import mean_intervals
from cxr_models.layer_table import layer_tables
from cxr_models.pixels import pixel_array
from cxr_models.trial import EpochMetrics, Objective, TrialConfig, TrialData
from sweep.caching import CacheRules, plan_cache

RESULTS = Path(__file__).parent / "results"
BACKBONE, WEIGHTS = "mobilenet_v2_0.35", "imagenet"
# Task -> its classes, and the published mean accuracy over five random folds.
TASKS: Mapping[str, tuple[tuple[str, ...], float]] = {
    "three classes": (("Covid-19", "No_findings", "Pneumonia"), 0.8702),
    "COVID-19 against No_findings": (("Covid-19", "No_findings"), 0.9808),
}
GROUPINGS = ("image", "patient")
EPOCHS = 40
CACHE_BYTES = 4 * 10**9
OBJECTIVE = Objective("accuracy", "max")

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """One held-out fold.

    Attributes:
        images: that were held out.
        correct: (images,) whether each was recognised.
        config: that the inner folds chose.
        epochs: that they chose.
        inner_accuracy: its mean accuracy over the inner folds.
        seconds: that the fold took.
    """

    images: Rows
    correct: NDArray[np.float64]
    config: TrialConfig
    epochs: int
    inner_accuracy: float
    seconds: float


def main() -> None:
    """The command."""
    arguments = parser().parse_args()
    from cxr_models import steps

    steps.configure(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for task, (classes, published) in TASKS.items():
            manifest = _only(read_manifest(arguments.data, cache_dir=Path(scratch)), classes)
            for grouping in GROUPINGS:
                found = list(folds(manifest, grouping, arguments, Path(scratch)))
                rows.append({"task": task, "grouping": grouping, "published": published, **_summary(manifest, found)})
                print(json.dumps({key: value for key, value in rows[-1].items() if key != "folds"}), flush=True)
    result = {
        "kind": "darkcovidnet",
        "environment": environment(own_command()),
        "side": arguments.side,
        "candidates": len(candidates(arguments.side, arguments.epochs, arguments.seed)[: arguments.candidates]),
        "rows": rows,
    }
    write_result(result, arguments.out / "darkcovidnet.json")


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    found = argparse.ArgumentParser(description="Accuracy on the images of DarkCovidNet, in random and patient folds.")
    found.add_argument("--data", type=Path, required=True, metavar="DIR", help="the three class folders")
    found.add_argument("--weights", type=Path, required=True, metavar="FILE", help="MobileNetV2 0.35 without top")
    found.add_argument("--side", type=int, default=224, metavar="PX", help="image side (224)")
    found.add_argument("--folds", type=int, default=5, metavar="N", help="outer folds (5)")
    found.add_argument("--inner-folds", type=int, default=4, metavar="N", help="of what is not held out (4)")
    found.add_argument("--candidates", type=int, metavar="N", help="only the first so many, to try this program")
    found.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"the most of a training ({EPOCHS})")
    found.add_argument("--threads", type=int, default=2, metavar="N", help="of TensorFlow (2)")
    found.add_argument("--seed", type=int, default=0, metavar="N", help="of the folds and the trainings (0)")
    found.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="(benchmarks/results)")
    return found


def candidates(side: int, epochs: int, seed: int) -> list[TrialConfig]:
    """The configurations that inner folds choose from."""
    grid = itertools.product((7, 1), ((), (128,)), (1e-3, 3e-3), (1e-2, 1.0))
    plain = TrialConfig(BACKBONE, WEIGHTS, side, optimizer="adamw", schedule="cosine", epochs=epochs, seed=seed)
    return [
        replace(plain, taps=taps, hidden_units=units, learning_rate=rate, weight_decay=decay, dropout=0.5)
        for taps, units, rate, decay in grid
    ]


def folds(manifest: Manifest, grouping: str, arguments: argparse.Namespace, cache: Path) -> Iterator[Fold]:
    """Each outer fold in turn: chosen by inner folds, trained again, tested on what was held out."""
    configs = candidates(arguments.side, arguments.epochs, arguments.seed)[: arguments.candidates]
    everything = np.arange(len(manifest.records))
    alone = [str(number) for number in everything]
    together = find_duplicates(manifest, cache).groups(manifest) if grouping == "patient" else alone
    for number, (pool, held_out) in enumerate(cut(manifest, everything, together, arguments.folds, arguments.seed)):
        begun = time.perf_counter()
        data = trial_data(manifest, pool, held_out, configs, arguments, cache)
        dealt = cut(manifest, pool, together, arguments.inner_folds, arguments.seed + 1 + number)
        inner = [fold for _, fold in dealt]
        curves = {config: mean_curve(config, data, inner, cache) for config in configs}
        config, epoch = chosen(curves)
        correct = tested(config, curves[config][1][: epoch + 1], data, pool, held_out, manifest, cache)
        fold = Fold(held_out, correct, config, epoch + 1, float(curves[config][0][epoch]), time.perf_counter() - begun)
        print(
            f"{grouping} fold {number + 1} of {arguments.folds}: accuracy {correct.mean():.4f}, inner "
            f"{fold.inner_accuracy:.4f}, taps {config.taps}, {fold.seconds:.0f} s",
            flush=True,
        )
        yield fold


def cut(manifest: Manifest, pool: Rows, together: Sequence[str], count: int, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """Stratified folds of some images: (the rest, the fold); what is alike in `together` stays in one."""
    labels = manifest.labels[pool]
    owners = [together[index] for index in pool]
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    for rest, fold in splitter.split(labels, labels, owners):
        yield pool[rest], pool[fold]


def trial_data(
    manifest: Manifest,
    pool: Rows,
    held_out: Rows,
    configs: Sequence[TrialConfig],
    arguments: argparse.Namespace,
    cache: Path,
) -> TrialData:
    """What trainings of an outer fold may read; the labels of its held-out images are not among it."""
    labels = manifest.labels.copy()
    labels[held_out] = -1
    tables = layer_tables({(BACKBONE, arguments.side)}, cache)
    rules = CacheRules(tables, len(manifest.classes), len(pool), len(held_out))
    budget = plan_cache(rules, configs, cache, CACHE_BYTES).budget
    return TrialData(
        classes=manifest.classes,
        labels=labels,
        train=pool,
        val=np.empty(0, np.int64),
        channels=1 if manifest.grey else 3,
        pixels={arguments.side: pixel_array(manifest, arguments.side, cache)},
        weights={(BACKBONE, WEIGHTS, arguments.side): arguments.weights},
        image_ids=np.array([int(record.sha256[:16], 16) for record in manifest.records], np.uint64),
        features=budget or FeatureBudget(cache, 0),
    )


def mean_curve(
    config: TrialConfig, data: TrialData, inner: Sequence[Rows], cache: Path
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(epochs,) mean accuracy and mean loss over the inner folds, after each epoch."""
    from cxr_models import training

    folded = replace(data, val=data.train, folds=tuple(inner))
    curve = _drained(training.run_trial("inner", config, folded, cache / "inner", OBJECTIVE))
    accuracy, loss = (np.array([metrics.val[name] for metrics in curve]) for name in ("accuracy", "loss"))
    return accuracy, loss


def chosen(
    curves: Mapping[TrialConfig, tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> tuple[TrialConfig, int]:
    """The configuration and the place of the epoch with the best mean accuracy; the lower loss where that is equal."""
    return min(
        ((config, epoch) for config, (accuracy, _) in curves.items() for epoch in range(len(accuracy))),
        key=lambda at: (-curves[at[0]][0][at[1]], curves[at[0]][1][at[1]]),
    )


def tested(
    config: TrialConfig,
    losses: NDArray[np.float64],
    data: TrialData,
    pool: Rows,
    held_out: Rows,
    manifest: Manifest,
    cache: Path,
) -> NDArray[np.float64]:
    """(held-out images,) 1 for each that the configuration, trained on the pool, recognises."""
    from cxr_models import training

    whole, folder = replace(data, train=np.sort(pool)), cache / "final"
    _drained(training.train_again("final", config, whole, folder, losses.tolist()))
    network = training.best_network(config, whole, folder)
    pixels = np.load(data.pictures(config), mmap_mode="r")
    scores = training.log_probabilities(network, pixels, held_out)
    return (scores.argmax(axis=1) == manifest.labels[held_out]).astype(np.float64)


def _drained(epochs: Generator[EpochMetrics, bool, None]) -> list[EpochMetrics]:
    """Let a training run to its end."""
    found = [next(epochs)]
    try:
        while True:
            found.append(epochs.send(True))
    except StopIteration:
        return found


def _only(manifest: Manifest, classes: Sequence[str]) -> Manifest:
    kept = tuple(record for record in manifest.records if record.label in classes)
    return replace(manifest, records=kept)


def _summary(manifest: Manifest, found: Sequence[Fold]) -> dict[str, Any]:
    """The mean accuracy over folds, and its 95 % interval by a bootstrap over patients of all held-out images."""
    images = np.concatenate([fold.images for fold in found])
    correct = np.concatenate([fold.correct for fold in found])
    patients = [manifest.records[index].patient for index in images]
    interval = mean_intervals({"accuracy": correct}, patients)["accuracy"]
    return {
        "accuracy": float(np.mean([fold.correct.mean() for fold in found])),
        "interval": asdict(interval),
        "by_fold": [float(fold.correct.mean()) for fold in found],
        "inner_accuracy": float(np.mean([fold.inner_accuracy for fold in found])),
        "images": len(images),
        "seconds": sum(fold.seconds for fold in found),
        "folds": [
            {
                "taps": fold.config.taps,
                "learning_rate": fold.config.learning_rate,
                "weight_decay": fold.config.weight_decay,
                "hidden_units": list(fold.config.hidden_units),
                "epochs": fold.epochs,
            }
            for fold in found
        ],
    }


if __name__ == "__main__":
    main()
