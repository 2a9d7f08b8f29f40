"""How much faster is a sweep than the same trials in other tools? One mix of trials in every program, on CPUs.

Each program starts cold (fresh process, empty cache) and runs the same list of trials on the same images for the same
epochs. Long baselines may run fewer trials of each strategy; their seconds are then scaled, and the table says so.

Run:  python benchmarks/sweep_speed.py --data DIR --weights FILE --mix blocks --baseline-trials 4
Page: python benchmarks/sweep_speed.py --render benchmarks/results > benchmarks/RESULTS.md
Cost: on 2 cores and a thousand images at 224 px some 2 minutes for each baseline trial of 20 epochs, and hours for all
      of them. Scale from an even number of trials of each strategy (two batch sizes), and in all from more than there
      are cores (the pause between trials is measured too).
"""

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from comparing import full_seconds, ratios, same_parameters
from measuring import environment, own_command, run_watched
from mixes import BACKBONE, MIXES, Mix, first_of_each, list_trials, listed_values, to_space
from rendering import LABELS, render, render_one
from speed_of_light import Rates, read_rates, speed_of_light

from cxr_models.backbones import BACKBONES
from cxr_models.dataset import Manifest
from cxr_models.trial import TRAIN, VAL, Outcome, TrialConfig
from sweep.machine import this_machine
from sweep.plan import read_data, stored_splits
from sweep.record import RunFolder, read_lines
from sweep.spec import read_spec

BASELINES: Mapping[str, str] = {
    "ray": "ray_tune_keras.py",
    "keras-tuner": "keras_tuner_loop.py",
    "optuna": "optuna_loop.py",
    "strong": "strong.py",
}
HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Time the same trials in this product and in other tools, on CPUs.")
    found.add_argument("--data", type=Path, metavar="DIR", help="X-rays, as sweep.run takes them")
    found.add_argument("--patient", default="nih", metavar="PATTERN", help="as data.patient of a search space (nih)")
    found.add_argument("--weights", type=Path, metavar="FILE", help="MobileNetV2 0.35 without top (the bundled ones)")
    found.add_argument("--side", type=int, default=224, metavar="PX", help="image side (224)")
    found.add_argument("--mix", choices=[*MIXES, "all"], default="all", help="which trials (all mixes in turn)")
    found.add_argument("--epochs", type=int, metavar="N", help="of each trial (the mix's own: 20, or 3)")
    found.add_argument("--trials", type=int, metavar="N", help="at most so many of each strategy: to try this program")
    found.add_argument("--baselines", default=",".join(BASELINES), metavar="A,B", help="which (%(default)s)")
    found.add_argument("--baseline-trials", type=int, metavar="N", help="of each strategy, at most (all)")
    found.add_argument("--rates", type=Path, metavar="FILE", help="for the speed of light, see speed_of_light.py")
    found.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR", help="(benchmarks/results)")
    found.add_argument("--render", type=Path, metavar="DIR", help="print the page of the results in DIR, and stop")
    return found


def main() -> int:
    arguments = checked(parser())
    if arguments.render:
        sys.stdout.write(render(json.loads(path.read_text()) for path in sorted(arguments.render.glob("*.json"))))
        return 0
    rates = read_rates(arguments.rates) if arguments.rates else None
    for mix in MIXES.values() if arguments.mix == "all" else [MIXES[arguments.mix]]:
        with tempfile.TemporaryDirectory(prefix="sweep-speed-") as scratch:
            result = measure(_cut(mix, arguments), arguments, rates, Path(scratch))
        arguments.out.mkdir(parents=True, exist_ok=True)
        stem = arguments.out / f"{mix.name}-{arguments.side}px"
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        stem.with_suffix(".md").write_text(render_one(result) + "\n")
        print(render_one(result), flush=True)
    return 0


def checked(known: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; a mistake that argparse does not see is told as one that it does."""
    arguments = known.parse_args()
    if arguments.render:
        return arguments
    if arguments.data is None:
        known.error("expected --data DIR, or --render DIR")
    arguments.baselines = [name for name in arguments.baselines.split(",") if name]
    if strange := set(arguments.baselines) - BASELINES.keys():
        known.error(f"expected --baselines of {', '.join(BASELINES)}, but got {', '.join(sorted(strange))}")
    for name in ("epochs", "trials", "baseline_trials"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            known.error(f"--{name.replace('_', '-')} must be at least 1, but got {value}")
    return arguments


def _cut(mix: Mix, arguments: argparse.Namespace) -> Mix:
    """The mix with the trials and epochs that the command line leaves of it."""
    counts = {freeze: min(count, arguments.trials or count) for freeze, count in mix.counts.items()}
    return replace(mix, counts=counts, epochs=arguments.epochs or mix.epochs)


def measure(mix: Mix, arguments: argparse.Namespace, rates: Rates | None, scratch: Path) -> dict[str, Any]:
    """Run a mix in the product and in the baselines; what comes back is one file of results."""
    weights = str(arguments.weights.resolve()) if arguments.weights else "bundled"
    trials = list_trials(mix, side=arguments.side, weights=weights)
    space = scratch / f"{mix.name}.yaml"
    space.write_text(to_space(mix, trials, data=str(arguments.data.resolve()), patient=arguments.patient))
    spec = read_spec(space)
    manifest = read_data(spec, scratch / "own cache", None)
    splits = stored_splits(manifest, spec.data.seed, scratch / "own cache")
    lay_out(manifest, splits, scratch / "images")
    images = {part: splits.count(part) for part in (TRAIN, VAL)}

    product = run_product(space, mix, scratch)
    if product.pop("splits") != splits:
        raise ValueError("the product cut the data in another way than this benchmark did; is data.seed the same?")
    product["speed_of_light"] = _light(mix, rates, product, arguments.side, sum(images.values()))
    chosen = first_of_each(trials, arguments.baseline_trials)
    baselines = {}
    for name in arguments.baselines:
        report = run_baseline(name, trials, chosen, arguments, mix.epochs, scratch)
        whole = full_seconds(report, report["wall_seconds"], mix.counts)
        baselines[name] = {
            **report,
            "whole_seconds": whole,
            "scaled": len(chosen) < len(trials),
            "ratios": ratios(report, whole, product),
            "same_parameters": same_parameters(product["trials"], report["trials"]),
        }
    return {
        "kind": "sweep_speed",
        "environment": environment(own_command()),
        "mix": {**asdict(mix), "trials": mix.trials},
        "side": arguments.side,
        "weights": Path(weights).name,
        "images": images,
        "product": product,
        "baselines": baselines,
    }


def lay_out(manifest: Manifest, splits: Sequence[str], folder: Path) -> None:
    """Link the training and validation images into `folder/<part>/<class>/`, as Keras wants them."""
    for index, (record, part) in enumerate(zip(manifest.records, splits, strict=True)):
        if part in (TRAIN, VAL):
            link = folder / part / record.label / f"{index:06d}-{Path(record.path).name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(manifest.root / record.path)


def run_product(space: Path, mix: Mix, scratch: Path) -> dict[str, Any]:
    """Run the sweep cold: a fresh process and an empty cache.

    Raises:
        ValueError: not every trial completed, or it had other epochs.
    """
    _tell(f"{mix.name}: the product, {mix.trials} trials")
    command = [sys.executable, "-m", "sweep.run", str(space), "--name", mix.name]
    command += ["--cache-dir", str(scratch / "product cache"), "--out", str(scratch / "runs")]
    watched = run_watched(command, scratch / "product.log")
    folder = RunFolder(scratch / "runs" / mix.name)
    last_epoch = {line["trial_id"]: line for line in read_lines(folder.epoch_record)}
    trials = []
    for line in read_lines(folder.trial_record):
        if line["outcome"] != Outcome.COMPLETED or line["epochs"] != mix.epochs:
            raise ValueError(
                f"trial {line['trial_id']}: {line['outcome']} after {line['epochs']} of {mix.epochs} epochs"
            )
        config = line["config"]
        trials.append(
            {
                "index": config["seed"],  # a trial's seed is its place in the list
                "freeze": config["freeze"],
                "val_accuracy": last_epoch[line["trial_id"]]["val"]["accuracy"],
                "trainable_parameters": line["trainable_parameters"],
                "seconds": line["train_seconds"],
            }
        )
    if len(trials) != mix.trials:
        raise ValueError(f"the product recorded {len(trials)} of {mix.trials} trials")
    with folder.split.open(newline="", encoding="utf-8") as file:
        splits = tuple(row["split"] for row in csv.DictReader(file))
    return {
        "wall_seconds": watched.wall_seconds,
        "seconds": json.loads(folder.summary.read_text())["seconds"],
        "memory": {kind: asdict(peak) for kind, peak in watched.memory.items()},
        "trials": sorted(trials, key=lambda trial: trial["index"]),
        "splits": splits,
    }


def run_baseline(
    name: str,
    trials: Sequence[TrialConfig],
    chosen: Sequence[int],
    arguments: argparse.Namespace,
    epochs: int,
    scratch: Path,
) -> dict[str, Any]:
    """Run the chosen trials in one baseline: what it writes, its wall seconds and its memory."""
    _tell(f"{LABELS[name]}, {len(chosen)} trials")
    listed, out = scratch / "trials.json", scratch / f"{name}.json"
    listed.write_text(json.dumps([{"index": index, **listed_values(trials[index])} for index in chosen]))
    options = {
        "data": scratch / "images",
        "trials": listed,
        "weights": weights_file(arguments.weights),
        "side": arguments.side,
        "epochs": epochs,
        "cores": this_machine().cores,
        "out": out,
    }
    command = [sys.executable, str(HERE / "baselines" / BASELINES[name])]
    command += [text for option, value in options.items() for text in (f"--{option}", str(value))]
    watched = run_watched(command, scratch / f"{name}.log")
    memory = {kind: asdict(peak) for kind, peak in watched.memory.items()}
    return {**json.loads(out.read_text()), "wall_seconds": watched.wall_seconds, "memory": memory}


def weights_file(given: Path | None) -> Path:
    """The file that baselines load; without one on the command line, what the product calls `bundled`."""
    found = given or BACKBONES[BACKBONE].bundled_path
    if found is None:
        raise ValueError(f"there are no bundled weights for {BACKBONE}; give --weights")
    return found.resolve()


def _light(
    mix: Mix, rates: Rates | None, product: Mapping[str, Any], side: int, images: int
) -> dict[str, float | None] | None:
    """The least possible seconds, and the share of the product's that they are."""
    if rates is None:
        return None
    if rates.side != side:
        raise ValueError(f"--rates were measured at {rates.side} px, but this run is at {side}")
    cores = this_machine().cores
    least = speed_of_light(mix, rates.extraction_rate, rates.suffix_epoch_seconds, images, cores)
    taken = product["seconds"].get("trials")
    return {"seconds": least, "fraction": least / taken if taken else None}


def _tell(what: str) -> None:
    print(f"running {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
