"""The images of a sweep, decided before anything starts: read, compared, divided, and audited."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxr_models.audit import Audit, audit_data
from cxr_models.cohort import Source, read_cohort
from cxr_models.dataset import DataError, Manifest, Progress
from cxr_models.duplicates import find_duplicates
from cxr_models.phantom import PATIENT_PATTERN, phantom_dataset
from cxr_models.shortcuts import find_shortcuts
from cxr_models.trial import SEGMENT, TEST
from sweep.dataspec import SourceSpec
from sweep.fetching import fetch_data
from sweep.patient_notes import patient_notes
from sweep.remote import is_url
from sweep.segment_plan import with_masks
from sweep.spec import SweepSpec
from sweep.splitting import split

PHANTOM = "phantom"


@dataclass(frozen=True)
class PlannedData:
    """What a plan knows of its images.

    Attributes:
        splits: part of every record of the manifest; with folds, what is not the test set is train.
        folds: (repeats, images) fold of every record, -1 for the test set; no rows without folds.
        audit: what is wrong with them by themselves.
        notes: what a person should know, a sentence each.
    """

    manifest: Manifest
    splits: tuple[str, ...]
    folds: NDArray[np.int16]
    audit: Audit
    notes: tuple[str, ...]


def plan_data(spec: SweepSpec, cache_dir: Path, progress: Callable[[str], Progress] | None = None) -> PlannedData:
    """Read the images of a spec, divide them so that nobody stands on two sides, and audit both.

    Args:
        spec: the sweep.
        cache_dir: for what need not be made twice.
        progress: given a description, where to report it.

    Raises:
        DataError: the data cannot be used.
    """
    segmented = spec.task == SEGMENT
    manifest = read_data(spec, cache_dir, progress, least_classes=1 if segmented else 2)
    mask_notes: tuple[str, ...] = ()
    if segmented:
        manifest, mask_notes = with_masks(manifest)
    duplicates = find_duplicates(manifest, cache_dir, progress and progress("comparing images"))
    groups = duplicates.groups(manifest)
    splits, folds = split(spec.data, manifest, groups, cache_dir)
    shortcuts = None if segmented else find_shortcuts(manifest, groups, cache_dir)
    audit = audit_data(manifest, splits, duplicates, shortcuts, allow=spec.data.allow)
    return PlannedData(manifest, splits, folds, audit, (*mask_notes, *_notes(spec, manifest, splits)))


def read_data(
    spec: SweepSpec, cache_dir: Path, progress: Callable[[str], Progress] | None, least_classes: int = 2
) -> Manifest:
    """The images of a spec: of all its sources, under the names of its class map, and of these the subset.

    Raises:
        DataError: as `cohort.read_cohort`.
        StorageError: a source at a URL cannot be had.
    """
    sources = [_source(source, cache_dir, progress) for source in spec.data.all_sources]
    try:
        return read_cohort(
            sources,
            classes=spec.data.classes,
            subset=spec.data.subset,
            seed=spec.data.seed,
            least_classes=least_classes,
            cache_dir=cache_dir,
            progress=progress and (lambda path: progress("reading images")),
        )
    except DataError as error:
        said = str(error)
        for own, source in zip(spec.data.all_sources, sources, strict=True):
            said = said.replace(str(source.path), own.source) if is_url(own.source) else said
        raise DataError(said) from error


def _source(spec: SourceSpec, cache_dir: Path, progress: Callable[[str], Progress] | None) -> Source:
    if spec.source == PHANTOM:
        drawing = progress("drawing phantoms") if progress else None
        path = phantom_dataset(cache_dir, seed=0, progress=drawing)
        return Source(path, spec.patient or PATIENT_PATTERN, spec.classes)
    if is_url(spec.source):
        return Source(fetch_data(spec.source, cache_dir, progress), spec.patient or "", spec.classes)
    return Source(Path(spec.source), spec.patient or "", spec.classes)


def _notes(spec: SweepSpec, manifest: Manifest, splits: Sequence[str]) -> Iterator[str]:
    sources = spec.data.all_sources
    phantom = any(source.source == PHANTOM for source in sources)
    if phantom:
        yield "phantom data: synthetic drawings to try the sweep on, a demonstration and not medicine"
    yield from manifest.notes
    if TEST not in splits:
        yield "no test part (data.split): figures are validation figures that choices were made on"
    if not all(source.source == PHANTOM for source in sources):
        yield from patient_notes(manifest, [source.patient for source in sources if source.patient])
