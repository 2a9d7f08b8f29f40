"""What `sweep_speed.py` tells a baseline, and what it is told in return. Imports nothing heavy."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Trial:
    """One configuration of the list.

    Attributes:
        index: its place in the mix.
        freeze: `all`, `convs:1`, `convs:2`, `stages:1` or `none`.
    """

    index: int
    freeze: str
    learning_rate: float
    dropout: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Arguments:
    """The command line of every baseline."""

    data: Path
    trials: tuple[Trial, ...]
    weights: Path
    side: int
    epochs: int
    cores: int
    out: Path


@dataclass(frozen=True)
class Ran:
    """One trial as it was run.

    Attributes:
        began, ended: `time.time()`. It begins once its process has imported what it needs and ends with its last
            epoch, so a process of its own for each trial costs time between trials.
        epochs: that it ran.
        val_accuracy, val_loss: after its last epoch.
        trainable_parameters: to compare with the product's count.
    """

    index: int
    freeze: str
    began: float
    ended: float
    epochs: int
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
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of each trial (20)")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="to use (all)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where the times go")
    given = parser.parse_args()
    trials = tuple(Trial(**values) for values in json.loads(given.trials.read_text()))
    paths = (path.resolve() for path in (given.data, given.weights, given.out))
    data, weights, out = paths
    return Arguments(data, trials, weights, given.side, given.epochs, given.cores, out)


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
        "trials": [
            {**asdict(trial), "began": trial.began - begun, "ended": trial.ended - begun}
            for trial in sorted(ran, key=lambda trial: trial.index)
        ],
    }
    arguments.out.write_text(json.dumps(results, indent=1))
