"""What `sweep_speed.py` tells a baseline, and what it is told in return. Imports nothing heavy."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Trial:
    """One configuration of the list.

    Attributes:
        mix: name of the mix of trials it is taken from.
        index: its place there.
        freeze: `all`, `convs:1`, `convs:2`, `stages:1` or `none`.
        epochs: to run, at most those it has in the mix.
    """

    mix: str
    index: int
    freeze: str
    learning_rate: float
    dropout: float
    batch_size: int
    seed: int
    epochs: int


@dataclass(frozen=True)
class Arguments:
    """The command line of every baseline."""

    data: Path
    trials: tuple[Trial, ...]
    weights: Path
    side: int
    cores: int
    out: Path


@dataclass(frozen=True)
class Ran:
    """One trial as it was run.

    Attributes:
        began, ended: `time.time()`. It begins once its process has imported what it needs and ends with its last
            epoch, so a process of its own for each trial costs time between trials.
        epoch_seconds: of each epoch with its validation; the first one compiles.
        val_accuracy, val_loss: after its last epoch.
        trainable_parameters: to compare with the product's count.
    """

    trial: Trial
    began: float
    ended: float
    epoch_seconds: Sequence[float]
    val_accuracy: float
    val_loss: float
    trainable_parameters: int


def read_arguments(description: str) -> Arguments:
    """Parse the command line, which is the same for all baselines."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with train/ and val/")
    parser.add_argument("--trials", type=Path, required=True, metavar="FILE.json", help="list of configurations")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="MobileNetV2 0.35 without top")
    parser.add_argument("--side", type=int, default=224, metavar="PX", help="image side (224)")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="to use (all)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where the times go")
    given = parser.parse_args()
    trials = tuple(Trial(**values) for values in json.loads(given.trials.read_text()))
    paths = (path.resolve() for path in (given.data, given.weights, given.out))
    data, weights, out = paths
    return Arguments(data, trials, weights, given.side, given.cores, out)


def write_results(arguments: Arguments, ran: Sequence[Ran], *, at_once: int) -> None:
    """Write every trial's seconds, and the program's, from the start of its process until now.

    Args:
        arguments: of this program.
        ran: every trial.
        at_once: how many trials ran at the same time.
    """
    begun = psutil.Process().create_time()
    results = {
        "startup_seconds": min(trial.began for trial in ran) - begun,
        "total_seconds": time.time() - begun,
        "at_once": at_once,
        "trials": [_written(one, begun) for one in sorted(ran, key=lambda one: (one.trial.mix, one.trial.index))],
    }
    arguments.out.write_text(json.dumps(results, indent=1))


def _written(ran: Ran, begun: float) -> dict[str, Any]:
    values = {name: value for name, value in asdict(ran).items() if name != "trial"}
    return {
        **{name: getattr(ran.trial, name) for name in ("mix", "index", "freeze", "batch_size")},
        **values,
        "began": ran.began - begun,
        "ended": ran.ended - begun,
        "other_seconds": ran.ended - ran.began - sum(ran.epoch_seconds),
    }
