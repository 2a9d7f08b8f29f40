"""Which frozen prefixes a sweep keeps the output of, what that takes and what it saves. Pure, and needs no Keras."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cxr_models.augmentation import view_of_epoch
from cxr_models.backbones import BACKBONES
from cxr_models.cuts import Cut, choose_cut, tapped_layers, work
from cxr_models.features import FeatureBudget, stored_bytes
from cxr_models.freezing import parse_strategy
from cxr_models.layer_table import LayerTable
from cxr_models.network import head_parameters, output_units
from cxr_models.storage import size_text
from cxr_models.trial import TrialConfig

# The axes that decide what a trial keeps, beside those that shape its network.
KEEPING = ("augmentation", "augmented_views", "probe_share")
SHARE_OF_DISK = 0.25

Group = tuple[str, str, int]  # (backbone, weights, image side): what may share a prefix


@dataclass(frozen=True)
class PhaseCache:
    """One phase of a configuration.

    Attributes:
        cut: whose features are kept, None where the phase runs from the pixels.
        stored_bytes: of the features of all images it reads, and of all their views.
        gain: how many times less is computed in an epoch, estimated.
        epoch_work: of one image in one epoch, in multiply-accumulates and their like.
    """

    cut: Cut | None
    stored_bytes: int
    gain: float
    epoch_work: float


@dataclass(frozen=True)
class CachePlan:
    """What is kept of the frozen prefixes.

    Attributes:
        budget: what trials get; None where nothing is kept.
        notes: what is not kept for want of room, and what would help.
    """

    budget: FeatureBudget | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CacheRules:
    """The sizes that decide what can be kept.

    Attributes:
        folded: there are folds: the validation images are those that are trained on.
    """

    tables: Mapping[tuple[str, int], LayerTable]
    classes: int
    train_images: int
    val_images: int
    folded: bool = False

    def problem(self, config: TrialConfig) -> str:
        """Why the network of a configuration cannot be built for these classes, or an empty string."""
        try:
            output_units(config, self.classes)
            tapped_layers(self.tables[config.backbone, config.image_side], config.taps)
        except ValueError as error:
            return str(error)
        return ""

    def phases(self, config: TrialConfig, budget: FeatureBudget | None) -> tuple[PhaseCache, ...]:
        """What each phase of a configuration reads under a budget."""
        kept = budget.cuts.get(group_of(config), ()) if budget else ()
        return tuple(self._phase(config, index, cut if cut in kept else None) for index, cut in self._cuts(config))

    def wanted(self, config: TrialConfig) -> dict[Cut, tuple[int, float]]:
        """The cuts a configuration would use -> (bytes, gain); phases that share a cut share what they read of it."""
        views: dict[Cut, set[int]] = {}
        gains: dict[Cut, float] = {}
        for index, cut in self._cuts(config):
            if cut is not None:
                views.setdefault(cut, set()).update(_views(config, index))
                gains[cut] = max(gains.get(cut, 0.0), self._phase(config, index, cut).gain)
        return {cut: (self._stored_bytes(cut, views[cut]), gain) for cut, gain in gains.items()}

    def _cuts(self, config: TrialConfig) -> list[tuple[int, Cut | None]]:
        phases = parse_strategy(config.freeze).phases
        row, table = BACKBONES[config.backbone], self.tables[config.backbone, config.image_side]
        head = head_parameters(config, table, self.classes)
        return [
            (
                index,
                choose_cut(
                    phases[: index + 1], row, table, pooling=config.pooling, taps=config.taps, head_parameters=head
                ),
            )
            for index in range(len(phases))
        ]

    def _phase(self, config: TrialConfig, index: int, cut: Cut | None) -> PhaseCache:
        strategy = parse_strategy(config.freeze)
        row, table = BACKBONES[config.backbone], self.tables[config.backbone, config.image_side]
        head = head_parameters(config, table, self.classes)
        found = work(cut, strategy.phases[: index + 1], row, table, head_parameters=head)
        stored = self._stored_bytes(cut, _views(config, index)) if cut else 0
        return PhaseCache(cut, stored, found.gain, found.rest)

    def _stored_bytes(self, cut: Cut, views: set[int]) -> int:
        plain = 0 if self.folded and views == {0} else self.val_images
        return (plain + len(views) * self.train_images) * cut.bytes_per_image


def _views(config: TrialConfig, phase: int) -> set[int]:
    """The views of the training images that a phase reads; 0 is the images as they are."""
    if config.augmentation == "none":
        return {0}
    strategy = parse_strategy(config.freeze)
    epochs = strategy.epochs(max(config.epochs, len(strategy.phases)), config.probe_share)
    before = sum(epochs[:phase])
    return {view_of_epoch(before + epoch, config.augmented_views) for epoch in range(1, epochs[phase] + 1)}


def group_of(config: TrialConfig) -> Group:
    """What the configuration's prefix is shared by."""
    return config.backbone, config.weights, config.image_side


def default_limit_bytes(cache_dir: Path) -> int:
    """A quarter of the disk that is free, or taken by features already."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    stored = stored_bytes(features_folder(cache_dir))
    return int(SHARE_OF_DISK * (shutil.disk_usage(cache_dir).free + stored))


def room_for_features(folder: Path) -> int:
    """What features may take on a node whose disk nobody has planned for: those there, and half of what is free."""
    folder.mkdir(parents=True, exist_ok=True)
    return stored_bytes(folder) + shutil.disk_usage(folder).free // 2


def features_folder(cache_dir: Path) -> Path:
    """Where the features of every sweep lie."""
    return cache_dir / "features"


def plan_cache(rules: CacheRules, configs: Sequence[TrialConfig], cache_dir: Path, limit_bytes: int) -> CachePlan:
    """Choose the cuts to keep: for each backbone those that save most for their size, as far as the limit goes.

    Args:
        rules: the sizes.
        configs: every network of the space, with the most epochs a trial can have; those that do not fit the data keep
            nothing.
        cache_dir: where features will lie.
        limit_bytes: of all features; 0 keeps none.
    """
    if limit_bytes == 0:
        return CachePlan(None, ())
    wanted: dict[Group, dict[Cut, tuple[int, float]]] = {}
    for config in configs:
        if rules.problem(config):
            continue  # the plan says what is wrong with it
        cuts = wanted.setdefault(group_of(config), {})
        for cut, (size, gain) in rules.wanted(config).items():
            most, best = cuts.get(cut, (0, 0.0))
            cuts[cut] = max(most, size), max(best, gain)
    kept: dict[Group, tuple[Cut, ...]] = {}
    notes = []
    for group, cuts in wanted.items():
        left, chosen = limit_bytes, []
        for cut, (size, _) in sorted(cuts.items(), key=lambda item: (item[1][0] / item[1][1], item[0].name)):
            if size <= left:
                chosen.append(cut)
                left -= size
            else:
                notes.append(_refusal(group, cut, size, left, configs))
        kept[group] = tuple(chosen)
    return CachePlan(FeatureBudget(features_folder(cache_dir), limit_bytes, kept), tuple(notes))


def _refusal(group: Group, cut: Cut, size: int, left: int, configs: Sequence[TrialConfig]) -> str:
    backbone, _, side = group
    augmented = any(config.augmentation != "none" and group_of(config) == group for config in configs)
    remedy = "fewer views (augmented_views, which is not the same training) or more room" if augmented else "more room"
    return (
        f"the features of {backbone} at {cut.name}, {side} px, take {size_text(size)}, and the cache has room for "
        f"{size_text(left)}: these trials run from the pixels; {remedy} (--cache-gb) would spare that"
    )
