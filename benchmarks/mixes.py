"""The lists of trials that are timed: the same for the product and for every baseline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from cxr_models.trial import TrialConfig

BACKBONE = "mobilenet_v2_0.35"
DROPOUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
BATCH_SIZES = (16, 32)
HEAD_RATES, DEEP_RATES = (1e-4, 1e-2), (1e-5, 1e-3)
LISTED = ("freeze", "learning_rate", "dropout", "batch_size", "seed")  # what differs between trials


@dataclass(frozen=True)
class Mix:
    """How many trials of each freeze strategy, and the epochs of each trial."""

    name: str
    counts: Mapping[str, int]
    epochs: int

    @property
    def trials(self) -> int:
        """How many trials."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Planned:
    """One trial of a mix.

    Attributes:
        mix: its name.
        index: the trial's place in it.
    """

    mix: str
    index: int
    config: TrialConfig


MIXES: Mapping[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("head", {"all": 60}, 20),
        Mix("blocks", {"all": 30, "convs:1": 15, "convs:2": 15}, 20),
        Mix("stages", {"all": 20, "convs:1": 10, "convs:2": 10, "stages:1": 20}, 20),
        Mix("everything", {"none": 12}, 3),
    )
}


def list_trials(mix: Mix, *, side: int, weights: str, seed: int = 0) -> tuple[TrialConfig, ...]:
    """The trials of a mix, strategy by strategy; the same arguments give the same list.

    Learning rates are spaced evenly in the logarithm within a strategy, in random order, and lower where a whole stage
    or everything trains. Batch sizes alternate: they decide how long an epoch takes, and a strategy's first few trials
    stand for all of them where a baseline is scaled.

    Args:
        mix: which strategies, how often.
        side: of the images, in pixels.
        weights: as `TrialConfig.weights`.
        seed: of dropouts and the order of learning rates.
    """
    trials: list[TrialConfig] = []
    for freeze, count in mix.counts.items():
        rng = np.random.default_rng((seed, len(trials)))
        low, high = DEEP_RATES if freeze in ("stages:1", "none") else HEAD_RATES
        for place, rate in enumerate(rng.permutation(np.geomspace(low, high, count))):
            trials.append(
                TrialConfig(
                    BACKBONE,
                    weights=weights,
                    image_side=side,
                    freeze=freeze,
                    batch_norm="train",
                    dropout=float(rng.choice(DROPOUTS)),
                    learning_rate=float(f"{rate:.3g}"),
                    batch_size=BATCH_SIZES[place % len(BATCH_SIZES)],
                    epochs=mix.epochs,
                    seed=len(trials),
                )
            )
    return tuple(trials)


def trials_for_baselines(lists: Mapping[str, tuple[TrialConfig, ...]], most: int | None) -> tuple[Planned, ...]:
    """The trials that a baseline runs, once for all mixes: of each freeze strategy, those of one mix.

    Args:
        lists: name of a mix -> its trials.
        most: trials of each strategy; all that the mix with the most of them has, if None.
    """
    found: dict[str, tuple[Planned, ...]] = {}
    for mix, trials in lists.items():
        for freeze in dict.fromkeys(trial.freeze for trial in trials):
            own = tuple(Planned(mix, index, trial) for index, trial in enumerate(trials) if trial.freeze == freeze)
            if len(own) > len(found.get(freeze, ())):
                found[freeze] = own
    return tuple(planned for own in found.values() for planned in own[:most])


def listed_values(trial: TrialConfig) -> dict[str, Any]:
    """What differs between the trials of a mix."""
    return {name: getattr(trial, name) for name in LISTED}


def to_space(mix: Mix, trials: tuple[TrialConfig, ...], *, data: str, patient: str) -> str:
    """The search space of the product, as YAML, in which every trial of the list is a fixed point."""
    one = trials[0]
    constants = ("backbone", "weights", "image_side", "batch_norm", "epochs")
    space = {
        "name": mix.name,
        "data": {"source": data, "patient": patient},
        "objective": "accuracy",
        "search": {
            "algorithm": "random",
            "trials": len(trials),
            "seed": 0,
            "fixed": [listed_values(trial) for trial in trials],
        },
        "space": {
            **{name: getattr(one, name) for name in constants},
            "freeze": list(mix.counts),
            "learning_rate": {"low": DEEP_RATES[0], "high": HEAD_RATES[1], "log": True},
            "dropout": list(DROPOUTS),
            "batch_size": list(BATCH_SIZES),
            "seed": {"low": 0, "high": len(trials)},
        },
    }
    text: str = yaml.safe_dump(space, sort_keys=False, width=120)
    return text
