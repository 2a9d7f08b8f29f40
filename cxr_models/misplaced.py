"""A data set looked at from the wrong folder: files that a table lists and that are not there, classes in classes."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from cxr_models.listing import DataError, Unreadable, data_error, files_below, is_picture

MOST_MISSING = 0.5  # of the files that a table lists; with more, the table and the images do not belong together
ANCESTORS = 3  # folders above a table in which its files are looked for
NO_CLASSES = ("images", "masks")
# A folder with one of these in its name is one of a class, not of a view, a person or a hospital.
CLASS_WORDS = ("normal", "healthy", "finding", "covid", "pneumonia", "tubercul", "opacity")
PART_WORDS = ("train", "test", "val")
MOST_CLASSES = 10  # folders inside a folder; with more, or with digits in their names, they are persons or dates

Pictures = Sequence[tuple[str, ...]]
"""The path of each picture file, in parts."""


def check_present(table: Path, missing: Sequence[str], listed: int) -> None:
    """Refuse a table of paths most of whose files are not there: the rest would be another data set.

    Args:
        table: a CSV file.
        missing: the paths that do not exist.
        listed: how many different ones there are in all.

    Raises:
        DataError: more than `MOST_MISSING` are missing.
    """
    if len(missing) <= MOST_MISSING * listed:
        return
    root = table.parent
    remedy = "copy the missing files there, or take their lines out of the CSV file"
    if near := _elsewhere(root, missing[0]):
        remedy = f"{near}; or {remedy}"
    raise data_error(
        f"the files that {str(table)!r} lists, each at its path from the folder of the CSV file or at an absolute one",
        f"{len(missing):,} of {listed:,} are missing; the first is {missing[0]!r}, not a file below {root}",
        remedy,
    )


def _elsewhere(root: Path, path: str) -> str:
    """Where the first missing file is after all, and what follows; "" if it is neither above nor below."""
    for above in [*root.parents][:ANCESTORS]:
        if (above / path).is_file():
            return f"{above / path} exists: move the CSV file to {above}"
    name = path.rsplit("/", 1)[-1]
    unreadable: list[Unreadable] = []
    found = next((parts for parts in files_below(root, unreadable) if parts[-1] == name and is_picture(parts)), None)
    if found is None:
        return ""
    place = root.joinpath(*found)
    ending = Path(path).parts
    if place.parts[-len(ending) :] == ending:
        return f"{place} exists: move the CSV file to {Path(*place.parts[: -len(ending)])}"
    return f"{place} exists: paths must lead there"


def whole_sets(pictures: Pictures) -> list[str]:
    """Folders that are no classes but data sets side by side: several have a class of the same name inside."""
    inside = _inside(pictures)
    sharing = {
        folder
        for folder, own in inside.items()
        for other, others in inside.items()
        if folder != other and any(_is_class(name) for name in own.keys() & others.keys())
    }
    return sorted(sharing)


def not_whole(root: Path, holders: Sequence[str]) -> DataError:
    """What to say where folders that are taken for classes hold classes."""
    parts = all(any(word in holder.lower() for word in PART_WORDS) for holder in holders)
    hint = (
        "rename them train, val and test to use them as the parts of a given split; or name one"
        if parts
        else f"did you mean {' or '.join(str(root / holder) for holder in holders)}? Name one"
    )
    return data_error(
        f"one folder per class in {str(root)!r}",
        f"whole data sets in {', '.join(map(repr, holders))}",
        f"{hint}, or several under data.sources; if these folders are the classes all the same, list the images in a "
        "CSV file: path,label",
    )


def nested_notes(pictures: Pictures) -> Iterator[str]:
    """Notes on folders that are taken for classes and may hold them: several have folders of the same names inside."""
    inside = _inside(pictures)
    folders = sorted(folder for folder in inside if not _is_class(folder.lower()))
    for place, folder in enumerate(folders):
        for other in folders[place + 1 :]:
            if len(same := sorted(inside[folder].keys() & inside[other].keys())) > 1:
                names = [f"{inside[folder][name]!r}" for name in same]
                yield (
                    f"the classes {folder!r} and {other!r} both hold folders {', '.join(names)}; if these are the "
                    f"classes, name {folder} or {other} as the data, or both under data.sources"
                )
                return


def unused_parts(pictures: Pictures, used: Sequence[str]) -> Iterator[str]:
    """Notes on folders beside the parts of a given split that look like parts and are not read.

    Args:
        pictures: all of the data set.
        used: names of parts, in lower case.
    """
    inside = _inside(pictures)
    for folder in sorted(inside):
        if folder.lower() not in used and any(word in folder.lower() for word in PART_WORDS):
            images = sum(parts[0] == folder for parts in pictures)
            yield (
                f"the folder {folder!r} with {images:,} images is not used; rename it train, val or test if it is that "
                "part of the split"
            )


def _inside(pictures: Pictures) -> dict[str, dict[str, str]]:
    """Folder -> the folders in it that may be classes, as written, by their names in lower case."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for parts in pictures:
        if len(parts) > 2:
            found[parts[0]][parts[1].lower()] = parts[1]
    few = {
        folder: inner
        for folder, inner in found.items()
        if 1 < len(inner) <= MOST_CLASSES and not inner.keys() & {*NO_CLASSES}
    }
    return {folder: {name: own for name, own in inner.items() if _may_be_class(name)} for folder, inner in few.items()}


def _may_be_class(name: str) -> bool:
    return _is_class(name) or not any(letter.isdigit() for letter in name)


def _is_class(name: str) -> bool:
    return any(word in name for word in CLASS_WORDS)
