"""Several data sets become one: classes renamed, merged or left out, duplicates dropped, a stratified part taken."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path

import numpy as np

from cxr_models.dataset import ImageRecord, Manifest, Progress, check_classes, read_manifest
from cxr_models.listing import data_error, nearest

ClassMap = Mapping[str, str | None]
"""Name found in the data -> name to use, or None to leave the class out; a class that is not in it keeps its name."""


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        path: as `dataset.read_manifest` takes it.
        patient: likewise.
        classes: what its classes are called in the cohort.
    """

    path: Path
    patient: str = ""
    classes: ClassMap = field(default_factory=dict)


def read_cohort(
    sources: Sequence[Source],
    *,
    classes: ClassMap | None = None,
    subset: float = 1.0,
    seed: int = 0,
    least_classes: int = 2,
    cache_dir: Path | None = None,
    progress: Callable[[Path], Progress] | None = None,
) -> Manifest:
    """Read one or several data sets as one manifest.

    Of several, an image's `source` is the name of its data set unless the data set gives one, patients of different
    data sets are different, and of images with equal bytes the first data set's stays: else one could stand on two
    sides of a split.

    Args:
        sources: at least one.
        classes: applied to all, after each source's own.
        subset: share of the images to keep, above 0 and at most 1; see `take_subset`.
        seed: of the subset.
        least_classes: how many classes must be left in the end.
        cache_dir: as in `dataset.read_manifest`.
        progress: given a source's path, where to report its reading.

    Raises:
        DataError: as `dataset.read_manifest`, or a class map names a class that is not there or leaves none.
    """
    manifests = []
    for source in sources:
        reading = progress(source.path) if progress else None
        manifest = read_manifest(
            source.path, patient=source.patient, least_classes=1, cache_dir=cache_dir, progress=reading
        )
        manifests.append(rename_classes(manifest, source.classes, str(source.path)))
    paths = ", ".join(str(source.path) for source in sources)
    cohort = manifests[0] if len(manifests) == 1 else _joined(manifests, _names(sources), classes or {})
    cohort = rename_classes(cohort, classes or {}, paths)
    check_classes(cohort, paths, least_classes)
    return take_subset(cohort, subset, seed)


def rename_classes(manifest: Manifest, classes: ClassMap, source: str) -> Manifest:
    """The manifest with classes renamed, merged (two names become one) or left out (None).

    Raises:
        DataError: a class of the map is not in the data, or none is left.
    """
    if not classes:
        return manifest
    for name in classes:
        if name not in manifest.classes:
            near = nearest(name, manifest.classes)
            raise data_error(
                f"a class {name!r} in {source!r}, as the class map says",
                f"the classes {', '.join(map(repr, manifest.classes))}",
                f"did you mean {near!r}?" if near else "correct the name in the map, or take it out",
            )
    if all(classes.get(name, name) is None for name in manifest.classes):
        raise data_error(
            f"a class map that keeps a class of {source!r}",
            f"it leaves none of {', '.join(map(repr, manifest.classes))}",
            "null leaves a class out; give a name to those to keep, or take them out of the map",
        )
    left_out = Counter(record.label for record in manifest.records if classes.get(record.label, "") is None)
    told = [f"{count:,} images of {name!r}" for name, count in sorted(left_out.items())]
    return replace(
        manifest,
        records=tuple(
            replace(record, label=new)
            for record in manifest.records
            if (new := classes.get(record.label, record.label)) is not None
        ),
        notes=(*manifest.notes, *([f"left out as the class map says: {', '.join(told)}"] if told else ())),
        excluded=manifest.excluded + left_out.total(),
    )


def take_subset(manifest: Manifest, share: float, seed: int) -> Manifest:
    """A stratified part of the images, chosen by patients: all images of a patient or none.

    Of every class in every given part of a split the same share is kept, to within about one patient and never less
    than one image. With the same seed a smaller share of the same manifest is chosen from about the same patients.

    Args:
        manifest: whose images.
        share: above 0, at most 1.
        seed: another one chooses other patients.

    Raises:
        ValueError: `share` is out of its range.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be above 0 and at most 1, but got {share}")
    if share == 1.0:
        return manifest
    images = Counter((record.split, record.label) for record in manifest.records)
    wanted = {stratum: max(1, round(share * count)) for stratum, count in images.items()}
    of_patient: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in manifest.records:
        of_patient[record.patient].append(record)
    chosen: set[str] = set()
    have: Counter[tuple[str, str]] = Counter()
    patients = sorted(of_patient)
    for index in np.random.default_rng(seed).permutation(len(patients)):
        own = Counter((record.split, record.label) for record in of_patient[patients[index]])
        # How much nearer to what is wanted the patient brings each stratum, in shares, so that rare classes count.
        gain = sum(
            (abs(wanted[stratum] - have[stratum]) - abs(wanted[stratum] - have[stratum] - count)) / wanted[stratum]
            for stratum, count in own.items()
        )
        if gain > 0:
            chosen.add(patients[index])
            have += own
    kept = tuple(record for record in manifest.records if record.patient in chosen)
    return replace(manifest, records=kept, spared=manifest.spared + len(manifest.records) - len(kept))


def subset_words(images: int, spared: int, share: float) -> str:
    """How many images are used, such as `subset 0.25: 5,291 of 21,165 images, chosen by patients`.

    Args:
        images: in the subset.
        spared: that it leaves out.
        share: that was asked for.
    """
    if not spared:
        return f"{images:,} images"
    return f"subset {share:g}: {images:,} of {images + spared:,} images, chosen by patients, stratified by class"


def _names(sources: Sequence[Source]) -> list[str]:
    """A different name for each source: of its folder or file, numbered where two are the same."""
    names: list[str] = []
    for source in sources:
        path = source.path.expanduser().resolve()
        stem = path.stem if path.is_file() else path.name
        numbered = (f"{stem}-{number}" for number in count(2))
        names.append(next(name for name in chain([stem], numbered) if name not in names))
    return names


def _joined(manifests: Sequence[Manifest], names: Sequence[str], classes: ClassMap) -> Manifest:
    """The manifests as one; `classes` is yet to be applied, and only tells which labels will be the same."""
    root = Path(os.path.commonpath([manifest.root for manifest in manifests]))
    records: list[ImageRecord] = []
    first: dict[str, tuple[str, ImageRecord]] = {}  # contents -> the data set that has them first, and its record
    repeated, contrary = 0, []
    for manifest, name in zip(manifests, names, strict=True):
        for record in manifest.records:
            moved = _moved(record, manifest.root, root, name)
            owner, stays = first.setdefault(record.sha256, (name, moved))
            if owner == name:
                records.append(moved)
                continue
            repeated += 1
            if len({classes.get(label, label) for label in (stays.label, record.label)} - {None}) == 2:
                contrary.append((stays.path, moved.path))
    notes = [f"{name}: {note}" for manifest, name in zip(manifests, names, strict=True) for note in manifest.notes]
    if repeated:
        other = f", {len(contrary):,} of them with another label" if contrary else ""
        notes.append(
            f"images that an earlier data set has too, byte for byte, and that are left out: {repeated:,}{other}"
        )
    return Manifest(
        root,
        " + ".join(f"{name}: {manifest.layout}" for manifest, name in zip(manifests, names, strict=True)),
        tuple(sorted(records, key=lambda record: record.path)),
        tuple(
            replace(bad, path=_path(bad.path, manifest.root, root))
            for manifest in manifests
            for bad in manifest.unreadable
        ),
        sum(manifest.ignored for manifest in manifests),
        tuple(notes),
        excluded=sum(manifest.excluded for manifest in manifests),
        repeated=repeated,
        contrary=tuple(contrary),
    )


def _moved(record: ImageRecord, old_root: Path, root: Path, name: str) -> ImageRecord:
    path = _path(record.path, old_root, root)
    patient = path if record.patient == record.path else f"{name}/{record.patient}"
    mask = _path(record.mask, old_root, root) if record.mask else ""
    return replace(record, path=path, patient=patient, source=record.source or name, mask=mask)


def _path(path: str, old_root: Path, root: Path) -> str:
    whole = old_root / path
    return whole.relative_to(root).as_posix() if whole.is_relative_to(root) else whole.as_posix()
