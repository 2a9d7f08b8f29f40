"""What a data set on disk is told as: its images by name, before any was opened; and the walk through its folders."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cxr_models.images import SUFFIXES, Flaw
from cxr_models.trial import TEST, TRAIN, VAL

SPLIT_NAMES: Mapping[str, str] = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
MAX_DEPTH = 8  # of folders below the root
NEAR = 0.75  # how alike two names must be, from 0 to 1, for one to be offered in place of the other


class DataError(ValueError):
    """The user's data is wrong; the message says what was expected, what was found and what to do."""


@dataclass(frozen=True)
class Unreadable:
    """A file or folder that was left out, and why."""

    path: str
    reason: str
    flaw: Flaw = Flaw.UNREADABLE


class ListedImage(NamedTuple):
    """One image by its name: the first fields of `dataset.ImageRecord`; `patient` is "" unless a table gives it."""

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
    notes: tuple[str, ...] = ()


def data_error(expected: str, found: str, remedy: str) -> DataError:
    """An error in the words that all of them have."""
    return DataError(f"expected {expected}\n  found: {found}\n  remedy: {remedy}")


def real_path(path: Path) -> Path:
    """Absolute, with `~` and links followed.

    Raises:
        DataError: it can be none: a zero byte in it, a circle of links, or the home of somebody who is not here.
    """
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise data_error("the path of a file or folder", f"{str(path)!r}: {error}", "check the path") from error


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` is most likely a misspelling of, or None; capitals do not count."""
    lower = {own.lower(): own for own in known}
    return next((lower[own] for own in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=NEAR)), None)


def files_below(root: Path, unreadable: list[Unreadable]) -> Iterator[tuple[str, ...]]:
    """The path of every file, in parts. Folders that cannot be opened are added to `unreadable`.

    Links to folders are followed, but not to a folder around them.
    """

    def note(error: OSError) -> None:
        path = Path(error.filename).relative_to(root).as_posix()
        unreadable.append(Unreadable(path, error.strerror or str(error)))

    around = {str(root): {os.path.realpath(root)}}  # folder -> itself and those it lies in, links resolved
    for folder, subfolders, names in os.walk(root, onerror=note, followlinks=True):
        parts = Path(folder).relative_to(root).parts
        own = around.pop(folder)
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(subfolders)}
        subfolders[:] = [name for name in real if real[name] not in own] if len(parts) < MAX_DEPTH else []
        around |= {os.path.join(folder, name): own | {real[name]} for name in subfolders}
        yield from ((*parts, name) for name in sorted(names))


def is_picture(parts: tuple[str, ...]) -> bool:
    """Whether a file, by its name, is an image; hidden ones and what macOS puts into archives are none."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(SUFFIXES)
