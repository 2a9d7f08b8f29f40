"""The split of a manifest and its folds, made once: scikit-learn alone takes longer to import than a plan to make."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_models.dataset import Manifest
from cxr_models.kept import keep, kept
from cxr_models.splits import DEFAULT_SHARES, SPLIT_VERSION, assign_folds, assign_splits
from cxr_models.trial import SPLITS, TEST, TRAIN
from sweep.dataspec import DataSpec


def split(
    data: DataSpec, manifest: Manifest, groups: Sequence[str], cache_dir: Path
) -> tuple[tuple[str, ...], NDArray[np.int16]]:
    """The part of every record, and (repeats, images) its folds; without folds there are no rows.

    With folds, what is not the test set is train. The test set is the same with folds and without.

    Raises:
        DataError: as `splits.assign_splits` and `splits.assign_folds`.
    """
    parts = stored_splits(manifest, data.seed, cache_dir, data.split.shares, groups)
    if data.folds is None:
        return parts, np.empty((0, len(parts)), np.int16)
    parts = tuple(TEST if part == TEST else TRAIN for part in parts)
    folds = stored_folds(manifest, parts, data.seed, cache_dir, folds=data.folds, repeats=data.repeats, groups=groups)
    return parts, folds


def each_fold(folds: NDArray[np.int16]) -> tuple[NDArray[np.int64], ...]:
    """The images of every fold of every repeat, by their places in the manifest."""
    return tuple(
        np.flatnonzero(own == fold).astype(np.int64) for own in folds for fold in range(int(own.max(initial=-1)) + 1)
    )


def stored_splits(
    manifest: Manifest,
    seed: int,
    cache_dir: Path,
    shares: tuple[float, float, float] = DEFAULT_SHARES,
    groups: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """`splits.assign_splits`, kept below `cache_dir`."""
    cut = "-".join(f"{share:.6g}" for share in shares)
    stored = _file(manifest, groups, cache_dir, f"seed{seed}-{cut}")
    splits = _read(stored)
    if len(splits) != len(manifest.records) or not set(splits) <= set(SPLITS):
        splits = list(assign_splits(manifest, seed=seed, shares=shares, groups=groups))
        keep(stored, splits)
    return tuple(splits)


def stored_folds(
    manifest: Manifest,
    splits: Sequence[str],
    seed: int,
    cache_dir: Path,
    *,
    folds: int,
    repeats: int,
    groups: Sequence[str] | None = None,
) -> NDArray[np.int16]:
    """`splits.assign_folds`, kept below `cache_dir`."""
    parts = hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]
    stored = _file(manifest, groups, cache_dir, f"seed{seed}-{parts}-{folds}x{repeats}")
    found = np.array(_read(stored), np.int16)
    if found.shape != (repeats, len(manifest.records)):
        found = assign_folds(manifest, splits, folds=folds, repeats=repeats, seed=seed, groups=groups)
        keep(stored, found.tolist())
    return found


def _file(manifest: Manifest, groups: Sequence[str] | None, cache_dir: Path, how: str) -> Path:
    owners = [record.patient for record in manifest.records] if groups is None else groups
    content = hashlib.sha256(json.dumps([manifest.digest, *owners]).encode()).hexdigest()[:16]
    return cache_dir / "splits" / f"{content}-{how}-v{SPLIT_VERSION}-sklearn{version('scikit-learn')}.json"


def _read(stored: Path) -> list[Any]:
    """What is stored; nothing if it is absent or damaged, so that it is made anew."""
    found = kept(stored)
    return found if isinstance(found, list) else []
