"""How much faster is a sweep than the same trials in other tools? Mixes of trials in every program, on CPUs.

Each program starts cold (fresh process, empty cache) and trains on the same images. The product runs every mix in full.
A baseline runs once for all mixes, and may run fewer trials of each strategy, and those for fewer epochs; the seconds
of a mix are then scaled from them, and the page says so.

Run:  python benchmarks/sweep_speed.py --data DIR --weights FILE --baseline-trials 2 --baseline-epochs 3
Page: python benchmarks/sweep_speed.py --render benchmarks/results > benchmarks/RESULTS.md
Cost: on 2 cores and a thousand images at 224 px some 2 minutes for each baseline trial of 20 epochs, hence hours for
      all of them. Four trials in all, or more, measure the pause between trials too.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from comparing import compared
from measuring import environment, own_command, write_result
from mixes import MIXES, Mix, list_trials, to_space, trials_for_baselines
from programs import BASELINES, HERE, Images, lay_out, run_baseline, run_product, weights_file
from rendering import read_results, render, render_one
from speed_of_light import Rates, read_rates, speed_of_light

from cxr_models.trial import TRAIN, VAL, TrialConfig
from sweep.data_plan import read_data
from sweep.machine import this_machine
from sweep.spec import read_spec
from sweep.splitting import stored_splits


@dataclass(frozen=True)
class Setup:
    """What all programs of a run share.

    Attributes:
        trials: name of a mix -> its trials.
        spaces: name of a mix -> the product's search space.
        splits: the part of each image.
        images: what baselines train on.
    """

    mixes: tuple[Mix, ...]
    trials: Mapping[str, tuple[TrialConfig, ...]]
    spaces: Mapping[str, Path]
    splits: tuple[str, ...]
    images: Images

    @property
    def counts(self) -> dict[str, int]:
        """Images to train and to validate on."""
        return {part: self.splits.count(part) for part in (TRAIN, VAL)}


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    found = argparse.ArgumentParser(description="Time the same trials in this product and in other tools, on CPUs.")
    found.add_argument("--data", type=Path, metavar="DIR", help="X-rays, as sweep.run takes them")
    found.add_argument("--patient", default="nih", metavar="PATTERN", help="as data.patient of a search space (nih)")
    found.add_argument("--weights", type=Path, metavar="FILE", help="MobileNetV2 0.35 without top (the bundled ones)")
    found.add_argument("--side", type=int, default=224, metavar="PX", help="image side (224)")
    found.add_argument("--mix", choices=[*MIXES, "all"], default="all", help="which trials (all)")
    found.add_argument("--epochs", type=int, metavar="N", help="of each trial (the mix's own: 20, or 3)")
    found.add_argument("--trials", type=int, metavar="N", help="at most so many of each strategy: to try this program")
    found.add_argument("--baselines", default=",".join(BASELINES), metavar="A,B", help="which (%(default)s)")
    found.add_argument(
        "--baseline-trials", type=int, metavar="N", help="of each strategy, at most; even: two batch sizes (all)"
    )
    found.add_argument("--baseline-epochs", type=int, metavar="N", help="of each trial, at most (as --epochs)")
    found.add_argument("--rates", type=Path, metavar="FILE", help="for the speed of light, see measure_rates.py")
    found.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR", help="(benchmarks/results)")
    found.add_argument("--render", type=Path, metavar="DIR", help="print the page of the results in DIR, and stop")
    return found


def main() -> int:
    """The command; its exit status."""
    arguments = checked(parser())
    if arguments.render:
        sys.stdout.write(render(read_results(arguments.render)))
        return 0
    rates = read_rates(arguments.rates) if arguments.rates else None
    if rates and rates.side != arguments.side:
        raise ValueError(f"--rates were measured at {rates.side} px, but this run is at {arguments.side}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sweep-speed-") as scratch:
        results = measure(arguments, rates, Path(scratch))
    print("\n\n".join(render_one(result) for result in results))
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
    for name, least in {"epochs": 1, "trials": 1, "baseline_trials": 2, "baseline_epochs": 2}.items():
        if (value := getattr(arguments, name)) is not None and value < least:
            known.error(f"--{name.replace('_', '-')} must be at least {least}, but got {value}")
    if (arguments.baseline_trials or 0) % 2:
        known.error(f"--baseline-trials must be even, for both batch sizes, but got {arguments.baseline_trials}")
    return arguments


def measure(arguments: argparse.Namespace, rates: Rates | None, scratch: Path) -> Sequence[Mapping[str, Any]]:
    """Run every mix in the product, then each baseline once; one result a mix.

    Results are written after every program, so what was measured is kept should a later one fail.
    """
    setup = set_up(arguments, scratch)
    facts = environment(own_command())
    results = []
    for mix in setup.mixes:
        result = _result(mix, _timed_product(mix, setup, scratch), setup, rates)
        results.append({"kind": "sweep_speed", "environment": facts, **result, "baselines": {}})
        _write(results[-1], arguments.out)
    trials = trials_for_baselines(setup.trials, arguments.baseline_trials)
    for name in arguments.baselines:
        report = run_baseline(name, trials, setup.images, arguments.baseline_epochs, scratch)
        for mix, result in zip(setup.mixes, results, strict=True):
            result["baselines"][name] = compared(report, mix, result["product"])
            _write(result, arguments.out)
    return results


def set_up(arguments: argparse.Namespace, scratch: Path) -> Setup:
    """List the trials, write the search spaces and lay out the images."""
    weights = str(arguments.weights.resolve()) if arguments.weights else "bundled"
    mixes = tuple(_cut(mix, arguments) for mix in MIXES.values() if arguments.mix in (mix.name, "all"))
    trials = {mix.name: list_trials(mix, side=arguments.side, weights=weights) for mix in mixes}
    spaces = {mix.name: scratch / f"{mix.name}.yaml" for mix in mixes}
    for mix in mixes:
        text = to_space(mix, trials[mix.name], data=str(arguments.data.resolve()), patient=arguments.patient)
        spaces[mix.name].write_text(text)
    spec = read_spec(spaces[mixes[0].name])  # the data are the same in all of them
    manifest = read_data(spec, scratch / "own cache", None)
    splits = tuple(stored_splits(manifest, spec.data.seed, scratch / "own cache"))
    lay_out(manifest, splits, scratch / "images")
    images = Images(scratch / "images", weights_file(arguments.weights), arguments.side)
    return Setup(mixes, trials, spaces, splits, images)


def _cut(mix: Mix, arguments: argparse.Namespace) -> Mix:
    """The mix with the trials and epochs that the command line leaves of it."""
    counts = {freeze: min(count, arguments.trials or count) for freeze, count in mix.counts.items()}
    return replace(mix, counts=counts, epochs=arguments.epochs or mix.epochs)


def _timed_product(mix: Mix, setup: Setup, scratch: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as own:  # gone at once: it holds the mix's features
        return run_product(setup.spaces[mix.name], mix, setup.splits, Path(own))


def _result(mix: Mix, product: Mapping[str, Any], setup: Setup, rates: Rates | None) -> dict[str, Any]:
    light = _light(mix, rates, product, sum(setup.counts.values())) if rates else None
    return {
        "mix": {**asdict(mix), "trials": mix.trials},
        "side": setup.images.side,
        "weights": setup.images.weights.name,
        "images": setup.counts,
        "product": {**product, "speed_of_light": light},
    }


def _light(mix: Mix, rates: Rates, product: Mapping[str, Any], images: int) -> dict[str, Any]:
    """The least possible seconds, the share of the product's that they are, and the rates behind them."""
    cores = this_machine().cores
    least = speed_of_light(mix, rates.extraction_rate, rates.suffix_epoch_seconds, images, cores)
    taken = product["seconds"].get("trials")
    return {"seconds": least, "fraction": least / taken if taken else None, "rates": asdict(rates)}


def _write(result: Mapping[str, Any], folder: Path) -> None:
    write_result(result, folder / f"{result['mix']['name']}-{result['side']}px.json")


if __name__ == "__main__":
    sys.exit(main())
