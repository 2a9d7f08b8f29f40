"""Asynchronous successive halving (ASHA), each strategy among its own: which trials are worth more epochs.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (arXiv:1810.05934). There, trials pause
at a rung and the best are promoted later. This is the stopping variant, which Ray Tune and Syne Tune use too: a trial
that reaches a rung goes on if it is among the best 1/reduction_factor that have reached it so far, and ends for good
if not. No checkpoint has to be brought back; in return, the first trials at a rung are judged against few rivals.

Ours differs in whom a trial meets. A head on frozen layers learns in a few epochs what a network that trains as a
whole at a low rate needs many for, so that rungs for all would end the slow starters whatever they come to. Here a
trial meets only those of its own backbone and freeze strategy, its stratum, and each stratum keeps survivors.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from cxr_models.freezing import parse_strategy
from cxr_models.trial import TrialConfig
from sweep.record import append_line, drop_cut_line, read_lines

Stratum = tuple[str, str]


def stratum_of(config: TrialConfig) -> Stratum:
    """(backbone, freeze): the trials that are judged together."""
    return config.backbone, config.freeze


def head_epochs(config: TrialConfig) -> int:
    """The epochs of the head alone in front of a trial's fine-tuning; 0 where there is no such phase, or no other.

    They say nothing yet about the strategy, so that rungs count from their end. A phase that ends earlier, by its
    patience, leaves rungs where they are: the trial has then fine-tuned for longer.
    """
    strategy = parse_strategy(config.freeze)
    epochs = zip(strategy.phases[:-1], strategy.epochs(config.epochs, config.probe_share), strict=False)
    return sum(own for _, own in takewhile(lambda phase: phase[0].head_only, epochs))


@dataclass(frozen=True)
class Rungs:
    """Where trials are judged: when they have seen so many training images since their fine-tuning began.

    Within a sweep every trial sees the same number of images an epoch, whatever its batch size, sampling or
    augmentation, so that images and epochs are one scale, on which trials of other lengths can be compared too. Their
    schedules are not: a cosine over 10 epochs is further down after 4 of them than one over 30.

    Attributes:
        images: of each rung, rising.
        epoch_images: that a trial sees in an epoch.
    """

    images: tuple[int, ...]
    epoch_images: int

    @classmethod
    def spaced(cls, grace_epochs: int, reduction_factor: int, max_epochs: int, epoch_images: int) -> "Rungs":
        """A rung at every grace_epochs x reduction_factor^k epochs below `max_epochs`.

        Raises:
            ValueError: fewer than 1 grace epoch, or a reduction factor below 2.
        """
        if grace_epochs < 1:
            raise ValueError(f"grace_epochs must be at least 1, but got {grace_epochs}")
        if reduction_factor < 2:
            raise ValueError(f"reduction_factor must be at least 2, but got {reduction_factor}")
        images = []
        epochs = grace_epochs
        while epochs < max_epochs:
            images.append(epochs * epoch_images)
            epochs *= reduction_factor
        return cls(tuple(images), epoch_images)

    def of_trial(self, config: TrialConfig) -> Mapping[int, int]:
        """Epoch of a trial -> the rung in images that it reaches at its end, up to the trial's last epoch."""
        first = head_epochs(config)
        reached = {first + math.ceil(images / self.epoch_images): images for images in self.images}
        return {epoch: images for epoch, images in reached.items() if epoch <= config.epochs}


@dataclass(frozen=True)
class _Arrival:
    """A trial at a rung, and what was decided."""

    backbone: str
    freeze: str
    images: int
    trial_id: str
    value: float
    goes_on: bool


class Halving:
    """The values trials had at each rung of their stratum, and the decisions that follow from them.

    A trial goes on if at least one of these holds:

    - it is among the best 1/reduction_factor, or among the best `least_survivors`, that have come to the rung so far.
      The first to come pass without being judged, so a minimum that they alone made up would select nothing; as it is,
      the best `least_survivors` of all that ever come to a rung have gone on from there. An equal that went on counts
      as better: trials that answer one class alone tie exactly, and a strategy of such trials is halved as any other.
    - fewer than `least_survivors` of those that went on from the rung are still alive: neither ended at a later rung
      nor struck. Whenever a trial is ended, so many others of its stratum are therefore ahead of it, and these come to
      their own end, their last epoch or that of their patience, unless they are struck after the stratum's last such
      decision, which nothing can take back.

    A trial that fails, by diverging or for another reason, or that gives itself up (`hopeless.is_hopeless`) is struck
    from every rung: one that learned fast at a rate that then tore it apart or killed it does not end others which
    would have come through, nor does it count for them. What it had ended before stays ended. A value that is not
    finite ends a trial, and does not count either.

    Args:
        rungs: where trials are judged.
        reduction_factor: one in this many goes on.
        mode: `max` or `min`: which values are good.
        least_survivors: of each stratum at each rung.
        journal: keeps every decision before anybody is told; what stands in it is known again, so that a sweep which
            goes on decides as if it had never stopped. In memory only if None.
    """

    def __init__(
        self,
        rungs: Rungs,
        reduction_factor: int,
        mode: str,
        *,
        least_survivors: int = 1,
        journal: Path | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be max or min, but got {mode!r}")
        if least_survivors < 1:
            raise ValueError(f"least_survivors must be at least 1, but got {least_survivors}")
        self._rungs = rungs
        self._reduction_factor = reduction_factor
        self._sign = 1.0 if mode == "max" else -1.0
        self._least_survivors = least_survivors
        self._journal = journal
        self._arrivals: dict[tuple[Stratum, int], dict[str, _Arrival]] = defaultdict(dict)
        self._ended: set[str] = set()
        self._struck: set[str] = set()
        if journal:
            self._read(journal)

    def decisions(self, config: TrialConfig) -> frozenset[int]:
        """The epochs after which a trial waits to hear whether it goes on."""
        return frozenset(epoch for epoch in self._rungs.of_trial(config) if epoch < config.epochs)

    def keep(self, trial_id: str, config: TrialConfig, epoch: int, value: float) -> bool:
        """Whether the trial goes on after `epoch`.

        A new best of its stratum always does. At its own last epoch a trial counts for the others, and there is nothing
        left to end. One that comes to a rung again, after a crash or a restart, gets the answer it got, and counts
        once, with the value it had.
        """
        images = self._rungs.of_trial(config).get(epoch)
        if images is None:
            return True
        arrived = self._arrivals[stratum_of(config), images]
        if trial_id not in arrived:
            goes_on = epoch == config.epochs or self._goes_on(arrived, value)
            arrival = _Arrival(*stratum_of(config), images, trial_id, value, goes_on)
            if self._journal:
                append_line(self._journal, asdict(arrival), durable=False)
            self._note(arrival)
        return arrived[trial_id].goes_on

    def strike(self, trial_id: str) -> None:
        """Strike a trial that failed or gave itself up."""
        if trial_id in self._struck:
            return  # before a restart
        if self._journal:
            append_line(self._journal, {"struck": trial_id}, durable=False)
        self._struck.add(trial_id)

    def _read(self, journal: Path) -> None:
        drop_cut_line(journal)
        for entry in read_lines(journal):
            if "struck" in entry:
                self._struck.add(entry["struck"])
            else:
                self._note(_Arrival(**entry))

    def _note(self, arrival: _Arrival) -> None:
        stratum = arrival.backbone, arrival.freeze
        self._arrivals[stratum, arrival.images][arrival.trial_id] = arrival
        if not arrival.goes_on:
            self._ended.add(arrival.trial_id)

    def _goes_on(self, arrived: Mapping[str, _Arrival], value: float) -> bool:
        if not math.isfinite(value):
            return False
        rivals = {
            trial_id: arrival
            for trial_id, arrival in arrived.items()
            if trial_id not in self._struck and math.isfinite(arrival.value)
        }
        better = sum(self._sign * rival.value > self._sign * value for rival in rivals.values())
        equal = sum(rival.value == value and rival.goes_on for rival in rivals.values())
        if better + equal < max(self._least_survivors, (len(rivals) + 1) // self._reduction_factor):
            return True
        alive = sum(rival.goes_on and trial_id not in self._ended for trial_id, rival in rivals.items())
        return alive < self._least_survivors
