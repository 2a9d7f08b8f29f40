"""What a sweep will do, decided before anything starts: data and split, strategies and their parameters, resources.

Everything here is checked against the data and the machine, and imports neither Keras, Ray nor MLflow.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_models import network, unet
from cxr_models.audit import Audit
from cxr_models.backbones import BACKBONES
from cxr_models.dataset import Manifest, Progress
from cxr_models.freezing import parse_strategy
from cxr_models.layer_table import LayerTable, layer_tables
from cxr_models.trial import SEGMENT, SPLITS, TEST, TRAIN, UNET, VAL, TrialConfig, TrialData
from sweep.caching import (
    KEEPING,
    CachePlan,
    CacheRules,
    Group,
    PhaseCache,
    default_limit_bytes,
    group_of,
    plan_cache,
)
from sweep.data_plan import PHANTOM, plan_data
from sweep.earlier import earlier_findings, earlier_models
from sweep.halving import Stratum
from sweep.halving_plan import HalvingPlan, plan_halving
from sweep.lung_masks import LungMasks, find_lung_masks
from sweep.machine import Allotment, Machine, allot
from sweep.memory import trial_memory
from sweep.places import check_writable
from sweep.segment_plan import UNetRow, unet_memory, unet_order, unet_rows
from sweep.space import Range, Space
from sweep.spec import SpecError, SweepSpec
from sweep.splitting import each_fold
from sweep.weights import WeightsFile, bundled_note, find_weights, origin_notes

# The axes that shape a network; a value of each decides its parameters.
SHAPING = ("backbone", "freeze", "batch_norm", "image_side", "pooling", "taps", "hidden_units", "output", "weights")
SHAPING_UNET = ("backbone", "freeze", "image_side", "unet_filters", "unet_depth")


@dataclass(frozen=True)
class Strategy:
    """A backbone with a freeze strategy, and its parameters over all the space's heads and image sides.

    Attributes:
        trainable, frozen: (fewest, most) for each phase.
        caches: what is kept in each phase, for each of these heads and image sides.
    """

    backbone: str
    freeze: str
    batch_norm: str
    trainable: tuple[tuple[int, int], ...]
    frozen: tuple[tuple[int, int], ...]
    caches: tuple[tuple[PhaseCache, ...], ...]


@dataclass(frozen=True)
class Plan:
    """Everything a sweep needs to know before its first trial.

    Attributes:
        splits: part of every record of the manifest; with folds, what is not the test set is train.
        folds: (repeats, images) fold of every record, -1 for the test set; no rows without folds.
        audit: what is wrong with the data; with a leak among it, no run may start.
        trials: how many there will be.
        sides: image sides the trials use, in pixels.
        weights: files of pretrained weights, by (backbone, weights, image_side) of a configuration.
        unets: those of a segmentation, which has no layer tables and keeps no features.
        lung_masks: where the masks of the axis `lung_mask` come from, by its values other than `none`.
    """

    spec: SweepSpec
    manifest: Manifest
    splits: tuple[str, ...]
    folds: NDArray[np.int16]
    audit: Audit
    strategies: tuple[Strategy, ...]
    trials: int
    max_epochs: int
    halving: HalvingPlan
    sides: tuple[int, ...]
    weights: dict[tuple[str, str, int], WeightsFile]
    machine: Machine
    allotment: Allotment
    tables: dict[tuple[str, int], LayerTable]
    cache: CachePlan
    rules: CacheRules
    notes: tuple[str, ...]
    unets: tuple[UNetRow, ...] = ()
    lung_masks: tuple[LungMasks, ...] = ()

    def parameters(self, config: TrialConfig, phase: int) -> tuple[int, int]:
        """A configuration's (trainable, frozen) parameters in a phase, -1 for the last."""
        if config.backbone == UNET:
            return unet.count_parameters(config, self.channels), 0
        table = self.tables[config.backbone, config.image_side]
        trained = parse_strategy(config.freeze).phases[phase]
        return network.count_parameters(config, trained, table, len(self.manifest.classes))

    def head_parameters(self, config: TrialConfig) -> int:
        """Those of a configuration's head; 0 for a U-Net, which has none."""
        if config.backbone == UNET:
            return 0
        table = self.tables[config.backbone, config.image_side]
        return network.head_parameters(config, table, len(self.manifest.classes))

    def order(self, config: TrialConfig) -> tuple[Any, ...]:
        """Sort key by which trials that share a prefix, and then a program, follow each other, long ones first."""
        if config.backbone == UNET:
            return unet_order(config)
        phases = self.rules.phases(config, self.cache.budget)
        names = [layer.name for layer in self.tables[config.backbone, config.image_side].layers]
        cuts = tuple(phase.cut.name if phase.cut else "" for phase in phases)
        earliest = min(names.index(phase.cut.layer) if phase.cut else 0 for phase in phases)
        views = (*config.views, config.augmented_views)
        work = -max(phase.epoch_work for phase in phases)
        return (*group_of(config), config.lung_mask, earliest, cuts, *views, work, config.batch_size, -config.epochs)

    def prefix(self, config: TrialConfig) -> Hashable | None:
        """What the stored features of a configuration are shared by; None where it keeps none.

        Cuts are not among it: a pass over the images stores those of all trials.
        """
        if config.backbone == UNET or not any(phase.cut for phase in self.rules.phases(config, self.cache.budget)):
            return None
        first_weights = config.seed if config.weights == "none" else None
        return (*group_of(config), config.lung_mask, *config.views, config.augmented_views, first_weights)

    @property
    def channels(self) -> int:
        """Of the pixels."""
        return _channels(self.manifest)

    def indices(self, part: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Positions of a part's images in the manifest."""
        return np.flatnonzero(np.array(self.splits) == part).astype(np.int64)

    def trial_data(
        self,
        pixels: Mapping[int, Path],
        weights: Mapping[Group, Path],
        *,
        masks: Mapping[int, Path] | None = None,
        masked: Mapping[tuple[str, int], Path] | None = None,
    ) -> TrialData:
        """What trials may read; the labels of the test images are not among it.

        Args:
            pixels: image side -> decoded images.
            weights: where the weights of `Plan.weights` lie for the length of the sweep.
            masks: image side -> lung masks, for a segmentation.
            masked: (lung_mask, image side) -> pixels inside the lungs.
        """
        labels = self.manifest.labels.copy()
        labels[self.indices(TEST)] = -1
        return TrialData(
            classes=self.manifest.classes,
            labels=labels,
            train=self.indices(TRAIN),
            val=self.indices(TRAIN if len(self.folds) else VAL),
            folds=each_fold(self.folds),
            channels=self.channels,
            pixels=pixels,
            weights=weights,
            image_ids=np.array([int(record.sha256[:16], 16) for record in self.manifest.records], np.uint64),
            features=self.cache.budget,
            masks=masks or {},
            masked=masked or {},
        )

    def class_counts(self) -> dict[str, Counter[str]]:
        """Part -> class -> images."""
        counts: dict[str, Counter[str]] = {part: Counter() for part in SPLITS}
        for record, part in zip(self.manifest.records, self.splits, strict=True):
            counts[part][record.label] += 1
        return counts

    def patients(self, part: str) -> int:
        """How many patients a part has."""
        owners = zip(self.manifest.records, self.splits, strict=True)
        return len({record.patient for record, own_part in owners if own_part == part})


def make_plan(
    spec: SweepSpec,
    machine: Machine,
    *,
    source: str,
    cache_dir: Path,
    weights_dir: Path | str | None = None,
    cache_bytes: int | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Plan:
    """Read the data, split it, and check the space against data, weights and machine.

    Args:
        spec: the sweep.
        machine: what trials share.
        source: the file of the spec, for messages.
        cache_dir: for what need not be made twice.
        weights_dir: where files of ImageNet weights may lie, beside Keras' own folder; a URL as text.
        cache_bytes: that features of frozen layers may take; 0 keeps none, None takes a share of the free disk.
        progress: given a description, where to report it.

    Raises:
        SpecError: the space does not fit the data, the weights or the machine; all problems at once.
        DataError: the data cannot be used.
        StorageError: data at a URL cannot be had.
    """
    check_writable(cache_dir, "--cache-dir")
    data = plan_data(spec, cache_dir, progress)
    manifest, counts, folded = data.manifest, Counter(data.splits), bool(len(data.folds))
    problems: list[str] = []
    everything = _networks(spec, source)
    networks = [config for config in everything if config.backbone != UNET]
    tables = layer_tables({(config.backbone, config.image_side) for config in networks}, cache_dir)
    weights = find_weights(networks, tables, weights_dir, cache_dir, problems)
    lung_masks = find_lung_masks(spec.space, manifest, problems, cache_dir)
    earlier = earlier_findings(
        earlier_models(weights, lung_masks),
        manifest,
        data.splits,
        chosen_by=TRAIN if folded else VAL,
        allow=spec.data.allow,
    )
    rules = CacheRules(tables, len(manifest.classes), counts[TRAIN], counts[TRAIN if folded else VAL], folded)
    max_epochs = max(int(epochs) for epochs in _values(spec, "epochs"))
    limit = default_limit_bytes(cache_dir) if cache_bytes is None else cache_bytes
    longest = [replace(config, epochs=max_epochs) for config in networks]
    cache = plan_cache(rules, longest, cache_dir, limit if networks else 0)
    strategies = _strategies(longest, rules, cache, problems)
    trials, of_strata = _trials(spec)
    try:
        batch_size = max(int(size) for size in _values(spec, "batch_size"))
        fitting = [config for config in networks if not rules.problem(config)]  # the others are told of above
        unets = unet_rows([config for config in everything if config.backbone == UNET], _channels(manifest), batch_size)
        if fitting or unets:
            need = unet_memory(unets) if unets else trial_memory(fitting, tables, rules.classes, batch_size)
            allotment = allot(spec.resources, machine, trials, need)
    except ValueError as error:
        problems.append(f"resources: {error}")
    if problems:
        raise SpecError(source, list(dict.fromkeys(problems)))
    least_probe = min(_values(spec, "probe_share"))
    judged = [replace(config, epochs=max_epochs, probe_share=least_probe) for config in everything]
    epoch_images = sum(counts[TRAIN] - len(fold) for fold in each_fold(data.folds)) or counts[TRAIN]
    halving = plan_halving(spec.search.halving, judged, epoch_images, trials, of_strata)
    return Plan(
        spec=spec,
        manifest=manifest,
        splits=data.splits,
        folds=data.folds,
        audit=data.audit.with_findings(earlier),
        strategies=strategies,
        trials=trials,
        max_epochs=max_epochs,
        halving=halving,
        sides=tuple(sorted({config.image_side for config in everything})),
        weights=weights,
        machine=machine,
        allotment=allotment,
        tables=tables,
        cache=cache,
        rules=rules,
        notes=(
            *allotment.notes,
            *cache.notes,
            *origin_notes(weights),
            *bundled_note(weights, phantom=any(source.source == PHANTOM for source in spec.data.all_sources)),
            *(masks.note for masks in lung_masks),
            *data.notes,
            *_notes(spec, everything),
            *halving.notes,
        ),
        unets=unets,
        lung_masks=lung_masks,
    )


def _channels(manifest: Manifest) -> int:
    """1 where every image is grey, else 3."""
    return 1 if manifest.grey else 3


def _trials(spec: SweepSpec) -> tuple[int, Counter[Stratum] | None]:
    """How many there will be, and how many of each stratum where the search knows it beforehand."""
    if spec.search.algorithm != "grid":
        return spec.search.trials, None
    from sweep.search import points_of

    points = [point for part in points_of(spec) for point in part]
    return len(points), Counter((str(point["backbone"]), str(point["freeze"])) for point in points)


def _values(spec: SweepSpec, axis: str) -> Iterator[float]:
    """Every number an axis can take, or the ends of its ranges."""
    if axis not in spec.space.axes:
        yield getattr(TrialConfig(backbone=""), axis)
        return
    for domain in spec.space.axes[axis].domains:
        yield from (domain.low, domain.high) if isinstance(domain, Range) else map(float, domain)  # type: ignore[arg-type]


def _networks(spec: SweepSpec, source: str) -> list[TrialConfig]:
    """Every network the space can build.

    Raises:
        SpecError: values that cannot go together, such as several taps with a flattened feature map.
    """
    shaping = SHAPING_UNET if spec.task == SEGMENT else SHAPING
    axes = [axis for axis in shaping if axis in spec.space.axes]
    # A range that has no list is left at the default: it only bears on how much is kept.
    axes += [axis for axis in KEEPING if axis in spec.space.axes and _is_listed(spec.space, axis)]
    try:
        points = sorted(spec.space.combinations(*axes), key=str)
    except ValueError as error:
        raise SpecError(source, [f"space: {error}"]) from error
    networks, problems = [], []
    for values in points:
        point = dict(zip(axes, values, strict=True))
        try:
            networks.append(TrialConfig.from_json(point))
        except ValueError as error:
            problems.append(f"space: {point['backbone']}: {error}; a condition (`when`) can keep them apart")
    if problems:
        raise SpecError(source, list(dict.fromkeys(problems)))
    return networks


def _is_listed(space: Space, axis: str) -> bool:
    return all(domain.finite for name in space.dependencies(axis) for domain in space.axes[name].domains)


def _strategies(
    configs: Sequence[TrialConfig], rules: CacheRules, cache: CachePlan, problems: list[str]
) -> tuple[Strategy, ...]:
    counts: dict[tuple[str, str, str], list[list[tuple[int, int]]]] = {}
    caches: dict[tuple[str, str, str], list[tuple[PhaseCache, ...]]] = {}
    for config in configs:
        if problem := rules.problem(config):
            problems.append(f"space: {problem}")
            continue
        table = rules.tables[config.backbone, config.image_side]
        phases = parse_strategy(config.freeze).phases
        counted = [network.count_parameters(config, phase, table, rules.classes) for phase in phases]
        key = config.backbone, config.freeze, config.batch_norm
        counts.setdefault(key, []).append(counted)
        caches.setdefault(key, []).append(rules.phases(config, cache.budget))
    strategies = []
    for key, networks in counts.items():
        by_phase = [([t for t, _ in phase], [f for _, f in phase]) for phase in zip(*networks, strict=True)]
        trainable = tuple((min(found), max(found)) for found, _ in by_phase)
        frozen = tuple((min(found), max(found)) for _, found in by_phase)
        strategies.append(Strategy(*key, trainable, frozen, tuple(caches[key])))
    return tuple(sorted(strategies, key=lambda row: (row.backbone, row.trainable[-1], row.freeze)))


def _trains_from_scratch(config: TrialConfig) -> bool:
    """Whether every weight moves in the end."""
    if config.backbone == UNET:
        return True
    batch_norms = BACKBONES[config.backbone].application and config.batch_norm != "train"
    return parse_strategy(config.freeze).phases[-1].rule == "none" and not batch_norms


def _notes(spec: SweepSpec, networks: Sequence[TrialConfig]) -> Iterator[str]:
    yield from spec.notes
    if any(config.weights == "none" and not _trains_from_scratch(config) for config in networks):
        yield (
            "some trials start from random weights but keep part of them: with weights: none, what is frozen stays "
            "random (batch norms too, unless batch_norm is train)"
        )
    if any(config.augmented_views for config in networks) and all(config.augmentation == "none" for config in networks):
        yield "augmented_views does nothing here: no trial augments its images (augmentation: light, or strong)"
    if spec.dropped_strategies:
        yield f"too few epochs for the phases of {', '.join(spec.dropped_strategies)}, which are left out"
    if spec.dropped_points:
        yield f"{spec.dropped_points} of the fixed points lie outside the space that the command line left; not run"
