"""What a plan holds of halving: where trials are judged, the same in a sentence, and what of a space it cannot end."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cxr_models.trial import UNET, TrialConfig
from sweep.halving import Rungs, Stratum, head_epochs, stratum_of
from sweep.spec import HalvingSpec
from sweep.wording import U_NET, count

SHOWN_STRATA = 8
SHARES = {2: "half", 3: "third", 4: "quarter", 5: "fifth", 10: "tenth"}


@dataclass(frozen=True)
class HalvingPlan:
    """How trials of a sweep are judged.

    Attributes:
        rungs: None where every trial runs to its end.
        sentence: the same for a person; empty where every trial runs to its end.
        notes: what of the space is not judged although halving was asked for.
    """

    rungs: Rungs | None = None
    sentence: str = ""
    notes: tuple[str, ...] = ()


def plan_halving(
    spec: HalvingSpec | None,
    longest: Sequence[TrialConfig],
    epoch_images: int,
    trials: int,
    known: Counter[Stratum] | None,
) -> HalvingPlan:
    """Decide where trials are judged.

    Args:
        spec: None to run every trial to its end.
        longest: of each network of the space, the trial with the most epochs of fine-tuning.
        epoch_images: that a trial sees in an epoch.
        trials: how many there will be.
        known: trials of each stratum, where they are known before the search begins.
    """
    if spec is None:
        return HalvingPlan()
    most = max((config.epochs for config in longest), default=0)
    rungs = Rungs.spaced(spec.grace_epochs, spec.reduction_factor, most, epoch_images)
    if not rungs.images:
        return HalvingPlan(notes=(f"halving has no rung: grace_epochs {spec.grace_epochs}, most epochs {most}",))
    return HalvingPlan(rungs, _sentence(spec, rungs, longest), tuple(_notes(spec, rungs, longest, trials, known)))


def _sentence(spec: HalvingSpec, rungs: Rungs, longest: Sequence[TrialConfig]) -> str:
    epochs, images = (_listed([f"{images // unit:,}" for images in rungs.images]) for unit in (rungs.epoch_images, 1))
    share = SHARES.get(spec.reduction_factor, f"1 in {spec.reduction_factor}")
    plural = "s" if len(rungs.images) > 1 else ""
    whose = "" if all(config.backbone == UNET for config in longest) else " of each backbone and freeze strategy"
    sentence = (
        f"after epoch{plural} {epochs} ({images} images seen), the best {share} so far{whose} goes on, at least "
        f"{spec.least_survivors}, and the others end"
    )
    if any(map(head_epochs, longest)):
        sentence += "; where the head alone trains first, epochs count from the end of that"
    return sentence


def _notes(
    spec: HalvingSpec, rungs: Rungs, longest: Sequence[TrialConfig], trials: int, known: Counter[Stratum] | None
) -> Iterator[str]:
    strata = dict.fromkeys(map(stratum_of, longest))
    judged = {
        stratum_of(config) for config in longest if any(epoch < config.epochs for epoch in rungs.of_trial(config))
    }
    if unjudged := [stratum for stratum in strata if stratum not in judged]:
        grace = count(spec.grace_epochs, "epoch")
        yield f"halving never judges {_named(unjudged)}: its fine-tuning is over after {grace} or fewer (grace_epochs)"
    needed = f"it ends none before more than {count(spec.least_survivors, 'trial')} of one came to a rung"
    if known is not None:
        if few := [stratum for stratum in strata if 0 < known[stratum] <= spec.least_survivors]:
            yield f"halving cannot end any trial of {_named(few)}: {needed}"
    elif trials < len(strata) * (spec.least_survivors + 1):
        pairs = f"{len(strata):,} pairs of backbone and freeze strategy"
        yield f"halving will end few trials, {trials:,} for {pairs}: {needed}"


def _listed(words: Sequence[str]) -> str:
    """`4`, `4 and 12`, `4, 12 and 36`"""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _named(strata: Sequence[Stratum]) -> str:
    """By the backbone too where there are several."""
    several = len({backbone for backbone, _ in strata}) > 1
    plain = (f"{backbone} {freeze}" if several else freeze for backbone, freeze in strata)
    names = [U_NET if backbone == UNET else name for (backbone, _), name in zip(strata, plain, strict=True)]
    more = [f"{len(names) - SHOWN_STRATA} more"] if len(names) > SHOWN_STRATA else []
    return _listed([*names[:SHOWN_STRATA], *more])
