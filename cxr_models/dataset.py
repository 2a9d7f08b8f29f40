"""A folder or CSV file of X-rays becomes a manifest; a manifest becomes train, val and test without shared patients."""

import csv
import hashlib
import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_models.images import Fault, ImageFacts, examine
from cxr_models.layouts import ONLY_CLASS, list_images
from cxr_models.listing import DataError as DataError
from cxr_models.listing import Listing, data_error
from cxr_models.listing import Unreadable as Unreadable
from cxr_models.patients import PatientRule
from cxr_models.storage import written_whole
from cxr_models.trial import SPLITS, TEST, TRAIN, VAL

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # (done, total)

FACTS_VERSION = 3  # raise it when `ImageFacts` or their meaning changes: cached ones are then read anew

SPLIT_VERSION = 1  # raise it when `assign_splits` would cut the same manifest in another way

DEFAULT_SHARES = (0.70, 0.15, 0.15)  # of train, val and test
SHARES_TOLERANCE = 1e-6  # of their sum

MAX_FOLDS = 20  # a part is a whole number of folds, so shares are met to 1/20
MAX_FOLDS_OF_SMALL_SHARES = 100  # where a share is below 1/20
MAX_BUNDLES = 100  # of patients alike: scikit-learn takes 50 microseconds per group and fold
ATTEMPTS = 5  # shuffles tried per number of folds


@dataclass(frozen=True)
class ImageRecord:
    """One readable image.

    Attributes:
        path: POSIX, relative to the manifest's root where it lies below it, else absolute.
        patient: images with the same one never stand in different parts of a split.
        source: where the image comes from, "" if unknown.
        split: the given part, `train`, `val` or `test`; "" if none was given.
        mask: path of the lung mask, written as `path` is; "" for none.
        sha256: of the file.
        width, height: in pixels, upright.
        mode: Pillow's, of the file; of a DICOM file its own.
        grey: whether all colour channels are equal.
        format: of the file, such as `PNG` or `DICOM`.
        pixels: digest of the picture, the same in every file format; "" if unknown.
        thumbnail: a small picture as `fingerprints.thumbnail` writes it; "" if unknown.
        patient_by: what tells the patient, in words; "" where nothing does and the image is its own.
    """

    path: str
    label: str
    patient: str
    source: str
    split: str
    mask: str
    sha256: str
    width: int
    height: int
    mode: str
    grey: bool
    format: str = ""
    pixels: str = ""
    thumbnail: str = field(default="", repr=False)
    patient_by: str = ""


@dataclass(frozen=True)
class Manifest:
    """All images of a data set.

    Attributes:
        root: folder that relative paths start from.
        layout: how the images were found, in words.
        records: sorted by path.
        ignored: files that are no images, are hidden, or lie where the layout has no images.
        notes: what a person should know of how the data were read, a sentence each.
        spared: readable images that a subset left out.
        excluded: those that a class map left out.
        unmasked: those that were left out since they have no mask.
        repeated: those that an earlier data set of a cohort has too, byte for byte, and that are left out.
        contrary: (path that stays, path that is left out) of those among them that had another label.
    """

    root: Path
    layout: str
    records: tuple[ImageRecord, ...]
    unreadable: tuple[Unreadable, ...]
    ignored: int
    notes: tuple[str, ...] = ()
    spared: int = 0
    excluded: int = 0
    unmasked: int = 0
    repeated: int = 0
    contrary: tuple[tuple[str, str], ...] = ()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({record.label for record in self.records}))

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """(images,) index into `classes`."""
        return np.array([self.classes.index(record.label) for record in self.records], dtype=np.int32)

    @cached_property
    def patients(self) -> int:
        """How many different patients there are."""
        return len({record.patient for record in self.records})

    @cached_property
    def digest(self) -> str:
        """Changes with any image, label, patient or given split; not with where the folder lies."""
        rows = [(record.path, record.label, record.patient, record.split, record.sha256) for record in self.records]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @cached_property
    def grey(self) -> bool:
        return all(record.grey for record in self.records)


class _Known(NamedTuple):
    """What the cache holds of a file: the facts, and the size and modification time they were read at."""

    size: int
    mtime_ns: int
    facts: ImageFacts


def read_manifest(
    source: Path,
    *,
    patient: str = "",
    least_classes: int = 2,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Find, read and describe every image of a data set.

    Args:
        source: a folder or a CSV file. In a folder: `CLASS/x.png`, at any depth and also below `train`, `val` and
            `test`, with masks in `masks/` folders; `images/` beside `masks/`; DICOM files with one CSV file of labels.
            A CSV file has the columns path, or the id of a file, and label, and optionally patient, source, split,
            mask. A folder that holds nothing but such a folder is entered.
        patient: a name in `patients.PATIENT_PATTERNS`, or a regular expression matched at the start of each file
            name; "" tries DICOM's PatientID, then the built-in patterns; with `none` each image is its own patient. Of
            a match, group 1, or the named groups joined by `_`, or without groups the whole, is the patient. An image
            that nothing matches is its own patient. A `patient` given in a CSV file wins.
        least_classes: how many there must be; 1 where labels do not matter.
        cache_dir: what was read is kept below it; a file with the same size and modification time is not read again.
        progress: called after every file that had to be read.

    Raises:
        DataError: nothing there, no readable images, no classes, fewer than `least_classes`, or a mistake in the CSV
            file or the pattern. Single files that cannot be read are no error, they are `Manifest.unreadable`.
    """
    source = source.expanduser().resolve()
    rule = PatientRule(patient)
    listing = list_images(source, cache_dir)
    facts, unreadable = _read_facts(listing, _cache_file(cache_dir, source) if cache_dir else None, progress)
    records = tuple(
        ImageRecord(
            path=image.path,
            label=image.label,
            patient=(told := rule.patient(image, known.patient))[0],
            patient_by=told[1],
            source=image.source,
            split=image.split,
            mask=image.mask,
            sha256=known.sha256,
            width=known.width,
            height=known.height,
            mode=known.mode,
            grey=known.grey,
            format=known.format,
            pixels=known.pixels,
            thumbnail=known.thumbnail,
        )
        for image in listing.images
        if (known := facts.get(image.path))
    )
    left_out = tuple(sorted((*listing.unreadable, *unreadable), key=lambda file: file.path))
    manifest = Manifest(listing.root, listing.layout, records, left_out, listing.ignored, listing.notes)
    check_classes(manifest, str(source), least_classes)
    return manifest


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], progress: Progress | None) -> list[Result]:
    """Do `work` on every item, several at once; the results are in the order of the items."""
    results: list[Result] = []
    pool = ThreadPoolExecutor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is sizes.MAX_PIXELS
        try:
            for result in pool.map(work, items):
                results.append(result)
                if progress:
                    progress(len(results), len(items))
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for all that is still to do
    return results


def _read_facts(
    listing: Listing, cache: Path | None, progress: Progress | None
) -> tuple[dict[str, ImageFacts], list[Unreadable]]:
    known = _load_known(cache) if cache else {}
    stamps = {image.path: _stamp(listing.root / image.path) for image in listing.images}
    current = {path: known[path] for path, stamp in stamps.items() if path in known and known[path][:2] == stamp}
    unread = [path for path in stamps if path not in current]
    unreadable = []
    for path, facts in zip(
        unread, in_threads(lambda path: examine(listing.root / path), unread, progress), strict=True
    ):
        if isinstance(facts, Fault):  # not cached: the file may be mended without a change of its stamp
            unreadable.append(Unreadable(path, facts.reason, facts.flaw))
        else:
            current[path] = _Known(*stamps[path], facts)
    if cache and current != known:
        rows = {path: (size, mtime_ns, *facts) for path, (size, mtime_ns, facts) in current.items()}
        with written_whole(cache) as scratch:
            scratch.write_text(json.dumps(rows))
    return {path: row.facts for path, row in current.items()}, unreadable


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)  # reading it will fail and tell the reason
    return status.st_size, status.st_mtime_ns


def _cache_file(cache_dir: Path, source: Path) -> Path:
    return cache_dir / "manifests" / f"{hashlib.sha256(os.fsencode(source)).hexdigest()[:16]}-v{FACTS_VERSION}.json"


def _load_known(cache: Path) -> dict[str, _Known]:
    """What the cache file holds; nothing if it is absent or damaged, so that it is made anew."""
    try:
        rows = json.loads(cache.read_bytes())
        return {path: _Known(size, mtime_ns, ImageFacts(*facts)) for path, (size, mtime_ns, *facts) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def check_classes(manifest: Manifest, source: str, least: int) -> None:
    """Refuse a manifest without images or with fewer than `least` classes.

    Args:
        manifest: what was found.
        source: where, for the message.
        least: how many classes there must be.

    Raises:
        DataError: with up to three of the files that cannot be read.
    """
    lost = "".join(f"\n    {file.path!r}: {file.reason}" for file in manifest.unreadable[:3])
    if not manifest.records:
        raise data_error(
            f"readable images in {source!r}",
            f"{len(manifest.unreadable)} files, none of them readable:{lost}",
            "open one in an image viewer; copy the data set again",
        )
    if len(manifest.classes) < least:
        raise data_error(
            f"at least {'two' if least == 2 else least} classes in {source!r}",
            f"only one class, {manifest.classes[0]!r}, with {len(manifest.records)} images"
            + (f", and {len(manifest.unreadable)} unreadable files:{lost}" if lost else ""),
            "images/ beside masks/ has no classes; name the folder that holds all class folders, "
            f"which may be {manifest.root.parent}"
            if manifest.classes == (ONLY_CLASS,)
            else "add the images of another class, or name the folder that holds all class folders",
        )


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
        owners = [record.patient for record in manifest.records] if groups is None else groups
        parts[pool] = _cut(manifest, pool, cut_shares, seed, owners)
    for part in SPLITS if TEST in parts else (TRAIN, VAL):
        absent = set(manifest.classes) - {manifest.classes[label] for label in manifest.labels[parts == part]}
        if absent:
            raise data_error(
                "images of every class in each of train, val and test",
                f"the given {part} split has none of class {min(absent)!r}",
                "give a split with every class in each part, or none",
            )
    return tuple(parts.tolist())


def patients_on_two_sides(manifest: Manifest, splits: Sequence[str]) -> tuple[str, ...]:
    """The patients, sorted, with images in more than one part; a given split may have some."""
    parts_of = defaultdict(set)
    for record, part in zip(manifest.records, splits, strict=True):
        parts_of[record.patient].add(part)
    return tuple(sorted(patient for patient, parts in parts_of.items() if len(parts) > 1))


def write_split_csv(path: Path, manifest: Manifest, splits: Sequence[str]) -> None:
    """Write path, label, patient, split of every record; beside the images it is itself a data set to read."""
    rows = [(r.path, r.label, r.patient, part) for r, part in zip(manifest.records, splits, strict=True)]
    # A lone carriage return ends a row for readers, yet csv before Python 3.13 does not quote it of its own accord.
    must_quote = any("\r" in cell for row in rows for cell in row)
    with (
        written_whole(path) as scratch,
        scratch.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, quoting=csv.QUOTE_ALL if must_quote else csv.QUOTE_MINIMAL, lineterminator="\n")
        writer.writerows([("path", "label", "patient", "split"), *rows])


def _cut(
    manifest: Manifest, pool: NDArray[np.int64], shares: Mapping[str, float], seed: int, owners: Sequence[str]
) -> NDArray[np.object_]:
    """Cut the parts named in `shares` from the records in `pool`; what remains is train."""
    labels = manifest.labels[pool]
    _, patients = np.unique([owners[i] for i in pool], return_inverse=True)
    counts = np.zeros((patients.max(initial=-1) + 1, len(manifest.classes)), dtype=np.int64)
    np.add.at(counts, (patients, labels), 1)
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
