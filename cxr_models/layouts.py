"""Where the images of a data set are, and what their names say: class, patient, given split, mask. Reads no image."""

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cxr_models.images import SUFFIXES
from cxr_models.trial import TEST, TRAIN, VAL

# How published data sets name their files; group 1 is the patient. Tight enough to be tried on any data set.
PATIENT_PATTERNS: Mapping[str, str] = {
    "nih": r"^(\d{8})_\d{3}\.\w+$",
    # Numbers start anew for bacteria and for virus, and IM-0282 and NORMAL2-IM-0282 are different series.
    "kermany": r"^(person\d+_(?:bacteria|virus)(?=_\d+\.\w+$)|(?:NORMAL2-)?IM-\d+(?=-\d+(?:-\d+)?\.\w+$))",
}
EACH_ITS_OWN = "none"  # in place of a pattern: no file name tells a patient
SPLIT_NAMES: Mapping[str, str] = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
CSV_COLUMNS = ("path", "label", "patient", "source", "split", "mask")
PATHS = ("path", "mask")
IMAGES, MASKS = "images", "masks"  # folders inside a class folder, never classes themselves
MAX_DEPTH = 8  # of folders below the root; a link may lead back up for ever
SHOWN_PROBLEMS = 5


class DataError(ValueError):
    """The user's data is wrong; the message says what was expected, what was found and what to do."""


@dataclass(frozen=True)
class Unreadable:
    """A file or folder that was left out, and why."""

    path: str
    reason: str


class ListedImage(NamedTuple):
    """One image by its name: the first fields of `dataset.ImageRecord`."""

    path: str
    label: str
    patient: str = ""
    source: str = ""
    split: str = ""
    mask: str = ""


@dataclass(frozen=True)
class Listing:
    """The images of a data set before any was opened; the fields are those of `dataset.Manifest`."""

    root: Path
    layout: str
    images: tuple[ListedImage, ...]
    unreadable: tuple[Unreadable, ...]
    ignored: int


def data_error(expected: str, found: str, remedy: str) -> DataError:
    """An error in the words that all of them have."""
    return DataError(f"expected {expected}\n  found: {found}\n  remedy: {remedy}")


def list_images(source: Path, patient: str) -> Listing:
    """Find the images of a folder or CSV file; arguments and errors as in `dataset.read_manifest`."""
    patterns = _patient_patterns(patient)
    if not source.exists():
        raise data_error("a folder of X-rays or a CSV file", f"nothing at {str(source)!r}", "check the path")
    listing = _list_folder(source) if source.is_dir() else _list_csv(source)
    images = sorted(image._replace(patient=_patient_of(image, patterns)) for image in listing.images)
    return Listing(listing.root, listing.layout, tuple(images), listing.unreadable, listing.ignored)


def _patient_patterns(text: str) -> tuple[re.Pattern[str], ...]:
    """The patterns to try in turn: the one that is named or written out, or without any the built-in ones."""
    if text == EACH_ITS_OWN:
        return ()
    wanted = (PATIENT_PATTERNS.get(text, text),) if text else tuple(PATIENT_PATTERNS.values())
    try:
        return tuple(map(re.compile, wanted))
    except re.error as error:
        raise data_error(
            f"as patient one of {', '.join((*PATIENT_PATTERNS, EACH_ITS_OWN))} or a regular expression",
            f"{text!r}: {error}",
            r"correct it; '^(\d+)_' for example takes the digits in front of the first underscore",
        ) from error


def _patient_of(image: ListedImage, patterns: Sequence[re.Pattern[str]]) -> str:
    name = image.path.rsplit("/", 1)[-1]
    match = next(filter(None, (pattern.match(name) for pattern in patterns)), None)
    if image.patient or match is None:
        return image.patient or image.path
    named = match.groupdict(default="")
    found = "_".join(filter(None, named.values())) if named else match[1 if match.re.groups else 0]
    return found or image.path


def _list_folder(root: Path) -> Listing:
    unreadable: list[Unreadable] = []
    files = list(_files_below(root, unreadable))
    pictures = [parts for parts in files if _is_picture(parts)]
    if not pictures:
        raise data_error(
            f"images ({' '.join(SUFFIXES)}) below {str(root)!r}",
            f"no images, {len(files)} other files",
            "check the path; convert other formats to PNG",
        )
    in_splits = any(SPLIT_NAMES.get(parts[0].lower()) == TRAIN and len(parts) > 2 for parts in pictures)
    images: list[tuple[ListedImage, tuple[str, ...]]] = []
    masks: dict[tuple[str, ...], str] = {}
    for parts in pictures:
        split = SPLIT_NAMES.get(parts[0].lower(), "") if in_splits else ""
        inner = parts[1:] if in_splits else parts
        kind = "" if in_splits and not split else _kind(inner)
        class_and_name = (*parts[: len(parts) - len(inner) + 1], parts[-1])
        if kind == MASKS:
            masks[class_and_name] = "/".join(parts)
        elif kind == IMAGES:
            images.append((ListedImage("/".join(parts), inner[0], split=split), class_and_name))
    if not images:
        raise data_error(
            f"one folder per class in {str(root)!r}: CLASS/x.png, CLASS/images/x.png or train/CLASS/x.png",
            f"{len(pictures)} images but no class folders; the first image is {'/'.join(pictures[0])!r}",
            "put the images of each class into a folder of its own, or list them in a CSV file: path,label",
        )
    nested = any(len(place) < image.path.count("/") + 1 for image, place in images)
    layout = "train|val|test folders" if in_splits else f"class folders{' with images/' if nested else ''}"
    found = tuple(image._replace(mask=masks.get(place, "")) for image, place in images)
    return Listing(root, layout, found, tuple(unreadable), len(files) - len(found) - len(masks))


def _files_below(root: Path, unreadable: list[Unreadable]) -> Iterator[tuple[str, ...]]:
    """The path of every file, in parts. Folders that cannot be opened are added to `unreadable`."""

    def note(error: OSError) -> None:
        path = Path(error.filename).relative_to(root).as_posix()
        unreadable.append(Unreadable(path, error.strerror or str(error)))

    for folder, subfolders, names in os.walk(root, onerror=note, followlinks=True):
        parts = Path(folder).relative_to(root).parts
        subfolders[:] = sorted(subfolders) if len(parts) < MAX_DEPTH else []
        yield from ((*parts, name) for name in sorted(names))


def _is_picture(parts: tuple[str, ...]) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(SUFFIXES)


def _kind(parts: tuple[str, ...]) -> str:
    """Whether CLASS/x.png, CLASS/images/x.png or CLASS/masks/x.png is of `IMAGES`, of `MASKS` or, "", of neither."""
    if not 2 <= len(parts) <= 3 or parts[0].lower() in (IMAGES, MASKS):
        return ""
    folder = parts[1].lower() if len(parts) == 3 else IMAGES
    return folder if folder in (IMAGES, MASKS) else ""


def _list_csv(file: Path) -> Listing:
    images: dict[str, ListedImage] = {}
    problems: list[str] = []
    for line, row in _csv_rows(file):
        path, mask = (_normal_path(file.parent, row[column]) for column in ("path", "mask"))
        split = SPLIT_NAMES.get(row["split"].lower(), "")
        if not path or not row["label"]:
            problems.append(f"line {line}: path {path!r} with label {row['label']!r}; both must be given")
        elif row["split"] and not split:
            problems.append(f"line {line}: split {row['split']!r}; it must be train, val, test or empty")
        elif path in images:
            problems.append(f"line {line}: {path!r} again; each image must be listed once")
        else:
            images[path] = ListedImage(path, row["label"], row["patient"], row["source"], split, mask)
    if problems or not images:
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise data_error(
            f"one image a line in {str(file)!r}",
            "\n    ".join(problems[:SHOWN_PROBLEMS] + more) or "no lines below the header",
            "correct the file",
        )
    absent = {image.mask for image in images.values() if image.mask and not (file.parent / image.mask).is_file()}
    found = tuple(image._replace(mask="") if image.mask in absent else image for image in images.values())
    unreadable = tuple(Unreadable(mask, "the mask is missing") for mask in sorted(absent))
    return Listing(file.parent, "CSV", found, unreadable, ignored=0)


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The last line number of each row and its `CSV_COLUMNS`, "" where absent."""
    remedy = f"the columns are {', '.join(CSV_COLUMNS)}; the first two are needed, others are ignored"
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            reader = csv.DictReader(text, restval="")
            columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
            if file.suffix.lower() != ".csv" or not {"path", "label"} <= columns.keys():
                raise data_error(
                    "a folder, or a .csv file with the header path,label[,patient,source,split,mask]",
                    f"{str(file)!r} beginning with {','.join(reader.fieldnames or ())[:80]!r}",
                    remedy,
                )
            for row in reader:
                cells = {name: row[columns[name]] if name in columns else "" for name in CSV_COLUMNS}
                yield reader.line_num, {name: cell if name in PATHS else cell.strip() for name, cell in cells.items()}
    except csv.Error as error:
        raise data_error(f"a CSV file in {str(file)!r}", f"line {reader.line_num}: {error}", remedy) from error


def _normal_path(root: Path, text: str) -> str:
    """POSIX, relative to `root` where it lies below it, else absolute; "" for ""."""
    path = Path(os.path.normpath(root / text))
    below = path.relative_to(root) if path.is_relative_to(root) else path
    return below.as_posix() if text else ""
