"""A manifest becomes train, val and test, or folds: no patient, and no copy of an image, on two sides of a cut."""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxr_models.dataset import Manifest
from cxr_models.listing import DataError, data_error
from cxr_models.storage import written_whole
from cxr_models.trial import SPLITS, TEST, TRAIN, VAL

SPLIT_VERSION = 1  # raise it when `assign_splits` would cut the same manifest in another way

DEFAULT_SHARES = (0.70, 0.15, 0.15)  # of train, val and test
SHARES_TOLERANCE = 1e-6  # of their sum

MAX_FOLDS = 20  # a part is a whole number of folds, so shares are met to 1/20
MAX_FOLDS_OF_SMALL_SHARES = 100  # where a share is below 1/20
MAX_BUNDLES = 100  # of patients alike: scikit-learn takes 50 microseconds per group and fold
ATTEMPTS = 5  # shuffles tried per number of folds


def assign_splits(
    manifest: Manifest,
    *,
    seed: int,
    shares: tuple[float, float, float] = DEFAULT_SHARES,
    groups: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Give every record its part: `train`, `val` or `test`.

    A given split is kept; records without a part count as train. Whichever of val and test was not given is cut from
    train: no group stands on two sides of the cut, each part gets its share of every class, and the same manifest
    and seed give the same parts. With a share of 0 for test, there is no test part unless one is given.

    Args:
        manifest: its patients must be right; what follows can be no better.
        groups: of every record, what must stay on one side: `Duplicates.groups`; None for the patients.
        seed: another one shuffles the patients anew.
        shares: of train, val and test, the first two above 0, with sum 1; where test was given, val gets
            val / (train + val) of what is cut. They are met to about 1/20, less closely where a class has fewer than
            20 patients.

    Raises:
        DataError: a class has too few patients, or a given part has no image of some class.
    """
    if min(shares[:2]) <= 0.0 or shares[2] < 0.0 or not math.isclose(sum(shares), 1.0, abs_tol=SHARES_TOLERANCE):
        raise ValueError(f"shares must be above 0 (test: or 0) with sum 1, but got {shares}")
    parts = np.array([record.split or TRAIN for record in manifest.records], dtype=object)
    cut = ((TEST, shares[2]), (VAL, shares[1]))
    wanted = {part: share for part, share in cut if part not in parts and share}
    if wanted:
        whole = shares[0] + sum(wanted.values())
        pool = np.flatnonzero(parts == TRAIN)
        cut_shares = {part: share / whole for part, share in wanted.items()}
        parts[pool] = _cut(manifest, pool, cut_shares, seed, groups)
    for part in SPLITS if TEST in parts else (TRAIN, VAL):
        absent = set(manifest.classes) - {manifest.classes[label] for label in manifest.labels[parts == part]}
        if absent:
            raise data_error(
                "images of every class in each of train, val and test",
                f"the given {part} split has none of class {min(absent)!r}",
                "give a split with every class in each part, or none",
            )
    return tuple(parts.tolist())


def assign_folds(
    manifest: Manifest,
    splits: Sequence[str],
    *,
    folds: int,
    repeats: int = 1,
    seed: int,
    groups: Sequence[str] | None = None,
) -> NDArray[np.int16]:
    """Deal the images that are not the test set into folds, several times over.

    No group lies in two folds of one deal, each class is spread evenly over the folds, every fold has every class, and
    the same manifest and seed give the same folds.

    Args:
        manifest: its patients must be right; what follows can be no better.
        splits: part of every record; the folds of the test part are -1.
        folds: of each deal, at least 2.
        repeats: deals; each is another shuffle of the patients.
        seed: another one shuffles the patients anew.
        groups: as in `assign_splits`.

    Returns:
        (repeats, images) fold of every record, from 0.

    Raises:
        DataError: a class has too few patients.
    """
    pool = np.flatnonzero(np.array(splits) != TEST)
    labels = manifest.labels[pool]
    patients, counts = _counts(manifest, pool, groups)
    for name, found in zip(manifest.classes, (counts > 0).sum(axis=0), strict=True):
        if found < folds:
            raise data_error(
                f"at least {folds} patients of every class outside the test set, one for each fold (data.folds)",
                f"{found} of class {name!r}",
                "set fewer folds, add images of more patients, or leave the class out or merge it (data.classes)",
            )
    dealt = np.full((repeats, len(manifest.records)), -1, np.int16)
    for repeat in range(repeats):
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng((seed, folds, repeat, attempt))
            fold_of = _folds(labels, _bundles(counts, rng)[patients], folds, rng)
            if all(len(np.unique(labels[fold_of == fold])) == len(manifest.classes) for fold in range(folds)):
                dealt[repeat, pool] = fold_of
                break
        else:
            raise data_error(
                f"patients that can be dealt into {folds} folds (data.folds) so that each has every class",
                "none of the deals tried does: too few patients, with several classes each",
                "set fewer folds, or add images of more patients",
            )
    return dealt


def patients_on_two_sides(manifest: Manifest, splits: Sequence[str]) -> tuple[str, ...]:
    """The patients, sorted, with images in more than one part; a given split may have some."""
    parts_of = defaultdict(set)
    for record, part in zip(manifest.records, splits, strict=True):
        parts_of[record.patient].add(part)
    return tuple(sorted(patient for patient, parts in parts_of.items() if len(parts) > 1))


def write_split_csv(
    path: Path, manifest: Manifest, splits: Sequence[str], folds: NDArray[np.int16] | None = None
) -> None:
    """Write path, label, patient, split and pixels of every record; beside the images it is a data set to read.

    `pixels` is the digest of the picture, by which a later run knows images that a model of this one has learned from.

    Args:
        path: of the file.
        manifest: the records.
        splits: their parts.
        folds: as `assign_folds` gives them. Each repeat is a column, `fold` or `fold_1`, `fold_2`, ...; the folds count
            from 1, and of an image outside the folds the cell is empty.
    """
    folds = np.empty((0, len(splits)), np.int16) if folds is None else folds
    columns = ["fold"] if len(folds) == 1 else [f"fold_{number}" for number in range(1, len(folds) + 1)]
    rows = [
        (r.path, r.label, r.patient, part, r.pixels, *(str(fold + 1) if fold >= 0 else "" for fold in own))
        for r, part, own in zip(manifest.records, splits, folds.T, strict=True)
    ]
    # A lone carriage return ends a row for readers, yet csv before Python 3.13 does not quote it of its own accord.
    must_quote = any("\r" in cell for row in rows for cell in row)
    with (
        written_whole(path) as scratch,
        scratch.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, quoting=csv.QUOTE_ALL if must_quote else csv.QUOTE_MINIMAL, lineterminator="\n")
        writer.writerows([("path", "label", "patient", "split", "pixels", *columns), *rows])


def _cut(
    manifest: Manifest, pool: NDArray[np.int64], shares: Mapping[str, float], seed: int, groups: Sequence[str] | None
) -> NDArray[np.object_]:
    """Cut the parts named in `shares` from the records in `pool`; what remains is train."""
    labels = manifest.labels[pool]
    patients, counts = _counts(manifest, pool, groups)
    patients_of_class = (counts > 0).sum(axis=0)
    parts = [part for part in SPLITS if part == TRAIN or part in shares]
    for name, found in zip(manifest.classes, patients_of_class, strict=True):
        if found < len(parts):
            raise DataError(
                f"class {name!r} has {found} patients; at least {len(parts)} are needed, "
                f"one for each of {', '.join(parts[:-1])} and {parts[-1]}\n"
                "  remedy: add images of more patients to it, or leave it out or merge it (data.classes)"
                + ("; all images have one patient: data.patient: none ignores it" if manifest.patients == 1 else "")
            )
    finest = min(max(MAX_FOLDS, round(1 / min(shares.values()))), MAX_FOLDS_OF_SMALL_SHARES)
    for part_of_fold in _deals(min(finest, int(patients_of_class.min())), shares):
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng((seed, len(part_of_fold), attempt))
            fold_of = _folds(labels, _bundles(counts, rng)[patients], len(part_of_fold), rng)
            dealt = part_of_fold[fold_of]
            if all(len(np.unique(labels[dealt == part])) == len(manifest.classes) for part in parts):
                return dealt
    raise data_error(
        f"patients that can be dealt so that each of {', '.join(parts)} has every class",
        "none of the deals tried does: too few patients, with several classes each",
        "add images of more patients, or give a split",
    )


def _counts(
    manifest: Manifest, pool: NDArray[np.int64], groups: Sequence[str] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of the records in `pool`: the (images,) number of each one's group, and (groups, classes) image counts."""
    owners = [record.patient for record in manifest.records] if groups is None else groups
    _, numbers = np.unique([owners[i] for i in pool], return_inverse=True)
    counts = np.zeros((numbers.max(initial=-1) + 1, len(manifest.classes)), dtype=np.int64)
    np.add.at(counts, (numbers, manifest.labels[pool]), 1)
    return numbers, counts


def _bundles(counts: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """(patients,) a bundle for each patient, from (patients, classes) image counts.

    A bundle holds patients with the same counts only, and there are at most `MAX_BUNDLES` for each such counts.
    """
    order = rng.permutation(len(counts))
    _, kind = np.unique(counts[order], axis=0, return_inverse=True)
    bundles = np.empty(len(counts), dtype=np.int64)
    for index in range(kind.max() + 1):
        alike = order[kind == index]
        bundles[alike] = index * MAX_BUNDLES + np.arange(len(alike)) % MAX_BUNDLES
    return bundles


def _folds(
    labels: NDArray[np.int32], groups: NDArray[np.int64], folds: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(images,) index of the fold each image is in; a group lies in one fold, each class is spread evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=int(rng.integers(2**31)))
    fold_of = np.empty(len(labels), dtype=np.int64)
    for fold, (_, images) in enumerate(splitter.split(labels, labels, groups)):
        fold_of[images] = fold
    return fold_of


def _deals(most_folds: int, shares: Mapping[str, float]) -> list[NDArray[np.object_]]:
    """For each number of folds, the part each fold belongs to; those that meet the shares best come first.

    Every part in `shares` has at least one fold, and so has train. More folds are not always better: with shares of
    0.15, 7 folds (0.14) do better than 10 (0.2).
    """

    def misfit(deal: NDArray[np.object_]) -> float:
        return sum(abs(float(np.mean(deal == part)) - share) for part, share in shares.items())

    deals = [_deal(folds, shares) for folds in range(most_folds, len(shares), -1)]
    return sorted(deals, key=lambda deal: round(misfit(deal), 9))


def _deal(folds: int, shares: Mapping[str, float]) -> NDArray[np.object_]:
    part_of_fold = np.full(folds, TRAIN, dtype=object)
    dealt = 0
    for still_waiting, (part, share) in zip(range(len(shares), 0, -1), shares.items(), strict=True):
        wanted = min(max(1, round(folds * share)), folds - dealt - still_waiting)
        part_of_fold[dealt : dealt + wanted] = part
        dealt += wanted
    return part_of_fold
