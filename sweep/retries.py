"""What becomes of a trial that ended through no fault of its own: it goes on elsewhere, alone, or not at all."""

from collections import Counter
from dataclasses import replace

from cxr_models.trial import TrialConfig
from sweep.worker import Fault, TrialEnd

DOES_NOT_FIT = "does not fit"

# The axes that a training's memory follows from, beside the batch size, in which it only grows.
MEMORY_AXES = (
    "backbone",
    "image_side",
    "freeze",
    "batch_norm",
    "pooling",
    "taps",
    "hidden_units",
    "optimizer",
    "layer_decay",
    "unet_filters",
    "unet_depth",
)


class SweepFailed(RuntimeError):  # noqa: N818 - what happened, not an error of a caller
    """The sweep ended before its last trial; finished trials are recorded."""


class Retries:
    """Counts what trials were lost to, and says whether they go on.

    Args:
        most: how often a trial that was lost is begun again, from its last epoch.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lost: Counter[str] = Counter()
        self._alone: set[str] = set()

    def is_alone(self, trial_id: str) -> bool:
        """Whether the trial is to have its device to itself."""
        return trial_id in self._alone

    def judged(self, trial_id: str, end: TrialEnd) -> TrialEnd | None:
        """The end of a trial as it is to be recorded; None where it is to go on.

        Raises:
            SweepFailed: the disk is full, and every other trial would find it so.
        """
        match end.fault:
            case None:
                return end
            case Fault.NO_SPACE:
                raise SweepFailed(end.error)
            case Fault.PREEMPTED:
                return None
            case Fault.NO_MEMORY if trial_id not in self._alone:
                self._alone.add(trial_id)
                return None
            case Fault.NO_MEMORY:
                return replace(end, error=f"{DOES_NOT_FIT} into the device's memory, even alone on it: {end.error}")
        self._lost[trial_id] += 1
        if self._lost[trial_id] <= self._most:
            return None
        if self._most:
            return replace(end, error=f"{end.error}; so were {self._most} earlier attempts")
        return end


class Misfits:
    """Configurations that did not fit into a device's memory, and what cannot fit then."""

    def __init__(self) -> None:
        self._smallest: dict[tuple[object, ...], TrialConfig] = {}

    def add(self, config: TrialConfig) -> None:
        """Note one that did not fit."""
        known = self._smallest.get(_shape(config))
        if known is None or config.batch_size < known.batch_size:
            self._smallest[_shape(config)] = config

    def covering(self, config: TrialConfig) -> str:
        """Why a configuration cannot fit, or an empty string: the same network did not with so large a batch."""
        known = self._smallest.get(_shape(config))
        if known is None or config.batch_size < known.batch_size:
            return ""
        return (
            f"{DOES_NOT_FIT} into the device's memory: the same network did not in batches of {known.batch_size}; "
            "not tried"
        )


def _shape(config: TrialConfig) -> tuple[object, ...]:
    return tuple(getattr(config, axis) for axis in MEMORY_AXES)
