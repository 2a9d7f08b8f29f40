"""A folder or CSV file of X-rays becomes a manifest: each image with its label, its patient and what is in its file."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_models.images import Fault, ImageFacts, examine, quiet_codecs
from cxr_models.kept import keep, kept
from cxr_models.layouts import ONLY_CLASS, list_images
from cxr_models.listing import DataError as DataError
from cxr_models.listing import Listing, data_error, real_path
from cxr_models.listing import Unreadable as Unreadable
from cxr_models.patients import PatientRule

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # (done, total)

FACTS_VERSION = 3  # raise it when `ImageFacts` or their meaning changes: cached ones are then read anew


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
            name, and of its path if there is a slash in the expression, see `patients.PatientRule`; "" tries DICOM's
            PatientID, then the built-in patterns; with `none` each image is its own patient. Of a match, group 1, or
            the named groups joined by `_`, or without groups the whole, is the patient. An image that nothing matches
            is its own patient. A `patient` given in a CSV file wins.
        least_classes: how many there must be; 1 where labels do not matter.
        cache_dir: what was read is kept below it; a file with the same size and modification time is not read again.
        progress: called after every file that had to be read.

    Raises:
        DataError: nothing there, no readable images, no classes, fewer than `least_classes`, or a mistake in the CSV
            file or the pattern. Single files that cannot be read are no error, they are `Manifest.unreadable`.
    """
    source = real_path(source)
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
    with warnings.catch_warnings(), quiet_codecs():
        for package in ("PIL", "pydicom"):  # a broken file is counted and named; what they say besides names none
            warnings.filterwarnings("ignore", module=rf"{package}\.")
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
        keep(cache, rows)
    return {path: row.facts for path, row in current.items()}, unreadable


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return (-1, -1)  # reading it will fail and tell the reason
    return status.st_size, status.st_mtime_ns


def _cache_file(cache_dir: Path, source: Path) -> Path:
    return cache_dir / "manifests" / f"{hashlib.sha256(os.fsencode(source)).hexdigest()[:16]}-v{FACTS_VERSION}.json"


def _load_known(cache: Path) -> dict[str, _Known]:
    """What the cache file holds; nothing if it is absent or damaged, so that it is made anew."""
    try:
        rows = kept(cache)
        return {path: _Known(size, mtime_ns, ImageFacts(*facts)) for path, (size, mtime_ns, *facts) in rows.items()}
    except (ValueError, TypeError, AttributeError):
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
            "images/ beside masks/ has no classes; name a folder that holds a folder for each class"
            if manifest.classes == (ONLY_CLASS,)
            else "add the images of another class, or name the folder that holds all class folders",
        )
