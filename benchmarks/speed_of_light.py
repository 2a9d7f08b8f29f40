"""The least time a sweep can take: each frozen layer computed once an image, each trained layer as fast as it goes.

The rates are measured apart from any sweep, each at its best: a warm process per core, one thread each, nothing else
running. They come as a JSON file, `{"side": 224, "extraction_rate": 350.0, "suffix_epoch_seconds": {"all": 0.02}}`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixes import Mix


@dataclass(frozen=True)
class Rates:
    """What the machine does at its best.

    Attributes:
        side: of the images the rates were measured with, in pixels.
        extraction_rate: images per second through the frozen prefix, all cores together.
        suffix_epoch_seconds: freeze strategy -> seconds one core needs for one epoch, training and validation, of what
            lies behind the cut.
    """

    side: int
    extraction_rate: float
    suffix_epoch_seconds: Mapping[str, float]


def read_rates(path: Path) -> Rates:
    """Read a file of rates.

    Raises:
        ValueError: a key is missing or unknown.
    """
    try:
        return Rates(**json.loads(path.read_text()))
    except TypeError as error:
        keys = ", ".join(Rates.__dataclass_fields__)
        raise ValueError(f"{path}: expected a JSON object with the keys {keys} ({error})") from error


def speed_of_light(
    mix: Mix, extraction_rate: float, suffix_epoch_seconds: Mapping[str, float], images: int, cores: int
) -> float:
    """The least seconds from the moment features are needed to the last epoch.

    Args:
        mix: the trials.
        extraction_rate: see `Rates`.
        suffix_epoch_seconds: see `Rates`; it must have every strategy of the mix.
        images: training and validation images together; each goes through the prefix once.
        cores: which share the trials evenly.

    Raises:
        KeyError: a strategy of the mix has no rate.
    """
    frozen = any(freeze != "none" for freeze in mix.counts)
    extraction = images / extraction_rate if frozen else 0.0
    epochs = {freeze: count * mix.epochs for freeze, count in mix.counts.items()}
    return extraction + sum(suffix_epoch_seconds[freeze] * number for freeze, number in epochs.items()) / cores
