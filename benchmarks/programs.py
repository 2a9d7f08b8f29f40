"""The programs that are timed: the product, and the baselines. Each starts cold, in a process of its own."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import run_watched
from mixes import BACKBONE, Mix, Planned, listed_values

from cxr_models.backbones import BACKBONES
from cxr_models.dataset import Manifest
from cxr_models.trial import TRAIN, VAL, Outcome
from sweep.machine import this_machine
from sweep.record import RunFolder, read_lines

BASELINES: Mapping[str, str] = {
    "ray": "ray_tune_keras.py",
    "keras-tuner": "keras_tuner_loop.py",
    "optuna": "optuna_loop.py",
    "strong": "strong.py",
}
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Images:
    """What every baseline trains on.

    Attributes:
        folder: of `lay_out`.
        weights: the file of the backbone's weights.
        side: to resize to, in pixels.
    """

    folder: Path
    weights: Path
    side: int


def lay_out(manifest: Manifest, splits: Sequence[str], folder: Path) -> None:
    """Link the training and validation images into `folder/<part>/<class>/`, as Keras wants them."""
    for index, (record, part) in enumerate(zip(manifest.records, splits, strict=True)):
        if part in (TRAIN, VAL):
            link = folder / part / record.label / f"{index:06d}-{Path(record.path).name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(manifest.root / record.path)


def weights_file(given: Path | None) -> Path:
    """The file that baselines load; without one on the command line, what the product calls `bundled`."""
    found = given or BACKBONES[BACKBONE].bundled_path
    if found is None:
        raise ValueError(f"there are no bundled weights for {BACKBONE}; give --weights")
    return found.resolve()


def run_product(space: Path, mix: Mix, splits: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Run the sweep of a mix cold: a fresh process and an empty cache, which must not be used again.

    Args:
        space: the search space of the mix.
        mix: which must run in full.
        splits: of the data, which the baselines have; the product must have them too.
        scratch: an empty folder.

    Raises:
        ValueError: not every trial completed, or it had other epochs, or the data were split in another way.
    """
    tell(f"the product, mix {mix.name}: {mix.trials} trials of {mix.epochs} epochs")
    command = [sys.executable, "-m", "sweep.run", str(space), "--name", mix.name]
    command += ["--cache-dir", str(scratch / "cache"), "--out", str(scratch / "runs")]
    watched = run_watched(command, scratch / "product.log")
    folder = RunFolder(scratch / "runs" / mix.name)
    with folder.split.open(newline="", encoding="utf-8") as file:
        if tuple(row["split"] for row in csv.DictReader(file)) != tuple(splits):
            raise ValueError(
                "the product split the data in another way than this benchmark did; is data.seed the same?"
            )
    summary = json.loads(folder.summary.read_text())
    return {
        "wall_seconds": watched.wall_seconds,
        "seconds": summary["seconds"],
        "at_once": summary["machine"]["concurrency"],
        "memory": {kind: asdict(peak) for kind, peak in watched.memory.items()},
        "trials": _product_trials(folder, mix),
    }


def _product_trials(folder: RunFolder, mix: Mix) -> list[dict[str, Any]]:
    epochs: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(folder.epoch_record):
        epochs.setdefault(line["trial_id"], []).append(line)
    trials = []
    for line in read_lines(folder.trial_record):
        if line["outcome"] != Outcome.COMPLETED or line["epochs"] != mix.epochs:
            raise ValueError(
                f"trial {line['trial_id']}: {line['outcome']} after {line['epochs']} of {mix.epochs} epochs"
            )
        own = epochs[line["trial_id"]]
        trials.append(
            {
                "index": line["config"]["seed"],  # a trial's seed is its place in the list
                "freeze": line["config"]["freeze"],
                "val_accuracies": [epoch["val"]["accuracy"] for epoch in own],
                "trainable_parameters": line["trainable_parameters"],
                "seconds": own[-1]["trial_seconds"],  # without the start of its process
            }
        )
    if len(trials) != mix.trials:
        raise ValueError(f"the product recorded {len(trials)} of {mix.trials} trials")
    return sorted(trials, key=lambda trial: trial["index"])


def run_baseline(
    name: str, trials: Sequence[Planned], images: Images, most_epochs: int | None, scratch: Path
) -> dict[str, Any]:
    """Run trials in one baseline: what it writes, its wall seconds and its memory.

    Args:
        name: in `BASELINES`.
        trials: to run.
        images: to train on.
        most_epochs: of each trial; as many as each has, if None.
        scratch: a folder for its input, output and log.
    """
    epochs = [min(most_epochs or trial.config.epochs, trial.config.epochs) for trial in trials]
    tell(f"{name}: {len(trials)} trials, {sum(epochs)} epochs together")
    listed, out = scratch / f"{name}-trials.json", scratch / f"{name}.json"
    values = [
        {"mix": trial.mix, "index": trial.index, **listed_values(trial.config), "epochs": own}
        for trial, own in zip(trials, epochs, strict=True)
    ]
    listed.write_text(json.dumps(values))
    options = {
        "data": images.folder,
        "trials": listed,
        "weights": images.weights,
        "side": images.side,
        "cores": this_machine().cores,
        "out": out,
    }
    command = [sys.executable, str(HERE / "baselines" / BASELINES[name])]
    command += [text for option, value in options.items() for text in (f"--{option}", str(value))]
    watched = run_watched(command, scratch / f"{name}.log")
    memory = {kind: asdict(peak) for kind, peak in watched.memory.items()}
    return {**json.loads(out.read_text()), "wall_seconds": watched.wall_seconds, "memory": memory}


def tell(what: str) -> None:
    """Say how far the benchmark is."""
    print(f"running {what}", file=sys.stderr, flush=True)
