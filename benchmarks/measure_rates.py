"""How fast this machine extracts features and trains what lies behind a cut, at its best.

One warm process per core, one thread each, all of them at the same work and nothing else running; medians. The file
that is written goes into `sweep_speed.py --rates`.

    python benchmarks/measure_rates.py --data DIR --weights FILE --out rates.json     # some 7 minutes on 2 cores
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from mixes import BATCH_SIZES, MIXES, list_trials

from cxr_models.dataset import read_manifest
from cxr_models.layer_table import layer_tables
from cxr_models.pixels import pixel_array
from cxr_models.trial import TRAIN, VAL, Objective, TrialConfig, TrialData
from sweep.caching import CacheRules, group_of, plan_cache
from sweep.machine import this_machine
from sweep.splitting import stored_splits

EPOCHS = 6  # the first compiles and is left out
EXTRACTED = 256
CACHE_BYTES = 10**10
PASSES = 5


def main() -> None:
    """The command."""
    arguments = parser(__doc__, out="file for the rates").parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = trial_data(arguments, Path(scratch))
        cores = this_machine().cores
        with get_context("spawn").Pool(cores) as pool:
            found = pool.starmap(_rates, [(data, arguments.side, Path(scratch) / str(core)) for core in range(cores)])
    rates = {
        "side": arguments.side,
        "extraction_rate": round(sum(rate for rate, _ in found), 1),
        "suffix_epoch_seconds": {
            freeze: round(statistics.mean(epochs[freeze] for _, epochs in found), 4) for freeze in found[0][1]
        },
    }
    arguments.out.write_text(json.dumps(rates, indent=2) + "\n")
    print(json.dumps(rates, indent=2))


def parser(doc: str, *, out: str) -> argparse.ArgumentParser:
    """For the images and weights to measure with, and for what is written."""
    known = argparse.ArgumentParser(description=doc.partition("\n")[0])
    known.add_argument("--data", type=Path, required=True, metavar="DIR", help="X-rays")
    known.add_argument("--patient", default="nih", metavar="PATTERN", help="as data.patient of a search space (nih)")
    known.add_argument("--weights", type=Path, required=True, metavar="FILE", help="MobileNetV2 0.35 without top")
    known.add_argument("--side", type=int, default=224, metavar="PX", help="image side (224)")
    known.add_argument("--out", type=Path, required=True, metavar="PATH", help=out)
    return known


def trial_data(arguments: argparse.Namespace, scratch: Path) -> TrialData:
    """The images, split as a sweep would, with room for the features of every strategy."""
    manifest = read_manifest(arguments.data, patient=arguments.patient, cache_dir=scratch)
    splits = np.array(stored_splits(manifest, 0, scratch))
    configs = [trial_config(arguments.side, freeze, BATCH_SIZES[0]) for freeze in strategies()]
    tables = layer_tables([(configs[0].backbone, configs[0].image_side)], scratch)
    train, val = (np.flatnonzero(splits == part) for part in (TRAIN, VAL))
    rules = CacheRules(tables, len(manifest.classes), len(train), len(val))
    return TrialData(
        classes=manifest.classes,
        labels=manifest.labels,
        train=train,
        val=val,
        channels=1,
        pixels={arguments.side: pixel_array(manifest, arguments.side, scratch)},
        weights={group_of(configs[0]): arguments.weights.resolve()},
        features=plan_cache(rules, configs, scratch, CACHE_BYTES).budget,
    )


def strategies() -> tuple[str, ...]:
    """Every freeze strategy that some mix has."""
    return tuple(dict.fromkeys(freeze for mix in MIXES.values() for freeze in mix.counts))


def trial_config(side: int, freeze: str, batch_size: int) -> TrialConfig:
    """A trial of a strategy as the mixes have it."""
    first = list_trials(MIXES["head"], side=side, weights="imagenet")[0]
    return replace(first, freeze=freeze, batch_size=batch_size, epochs=EPOCHS, learning_rate=1e-3, dropout=0.2)


def _rates(data: TrialData, side: int, folder: Path) -> tuple[float, Mapping[str, float]]:
    """In a process of its own: images a second through the prefix, and seconds of an epoch behind each cut."""
    from cxr_models import steps, training
    from cxr_models.network import build_network

    steps.configure(1)
    seconds: dict[str, float] = {}
    for freeze in strategies():
        medians = []
        for batch_size in BATCH_SIZES:
            config = trial_config(side, freeze, batch_size)
            place = folder / f"{freeze}-{batch_size}".replace(":", "-")
            trial = training.run_trial("rate", config, data, place, Objective("accuracy", "max"))
            epochs = [next(trial)]
            while len(epochs) < EPOCHS:
                epochs.append(trial.send(True))
            trial.close()
            medians.append(statistics.median(epoch.seconds for epoch in epochs[1:]))
        seconds[freeze] = statistics.mean(medians)
    config = trial_config(side, "all", BATCH_SIZES[0])
    weights = data.weights[config.backbone, config.weights, config.image_side]
    network = build_network(config, classes=len(data.classes), channels=data.channels, weights=weights)
    cuts = data.features.cuts[config.backbone, config.weights, config.image_side] if data.features else ()
    prefix = steps.Prefix(network, [cut for cut in cuts if cut.pooling])
    pixels = np.load(data.pixels[side], mmap_mode="r")[:EXTRACTED]
    prefix(pixels)
    rates = []
    for _ in range(PASSES):
        begun = time.perf_counter()
        prefix(pixels)
        rates.append(EXTRACTED / (time.perf_counter() - begun))
    return statistics.median(rates), seconds


if __name__ == "__main__":
    main()
