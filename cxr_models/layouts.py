"""How data sets are laid out on disk: class, given split, mask and source of every image. Opens no image."""

import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cxr_models.images import DICOM_SUFFIXES, SUFFIXES
from cxr_models.listing import SPLIT_NAMES, ListedImage, Listing, Unreadable, data_error, files_below, is_picture
from cxr_models.misplaced import nested_notes, not_whole, unused_parts, whole_sets
from cxr_models.tables import image_stem, is_label_table, list_table, read_sources
from cxr_models.trial import TRAIN, VAL

IMAGES, MASKS = "images", "masks"  # folders beside or inside class folders, never classes themselves
METADATA = ".metadata.xlsx"  # behind the name of a class: the spreadsheets of the COVID-19 Radiography Database
ONLY_CLASS = "image"  # the label where images lie beside masks, without classes
# A given val part tells nothing if a class has fewer images in it than this, and so many times more in train; in
# Chest X-Ray Images (Pneumonia) there are 8 against 1,341.
FEWEST_VAL = 20
FEWEST_VAL_TIMES = 20


class _Place(NamedTuple):
    """One picture file in the layout.

    Attributes:
        kind: `IMAGES`, `MASKS`, or "" where the layout has neither.
        key: the same for an image and its mask.
    """

    parts: tuple[str, ...]
    split: str
    label: str
    kind: str
    key: tuple[str, ...]


def list_images(source: Path, cache_dir: Path | None = None) -> Listing:
    """Find the images of a folder or CSV file, sorted by path; what spreadsheets say is kept below `cache_dir`.

    Raises:
        DataError: as `dataset.read_manifest`.
    """
    expected = "a folder of X-rays or a CSV file"
    try:
        mode = source.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise data_error(expected, f"nothing at {str(source)!r}", "check the path") from None
    except OSError as error:
        remedy = "check the path, and that you may read it"
        raise data_error(expected, f"{str(source)!r}: {error.strerror}", remedy) from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise data_error(expected, f"a pipe or a device at {str(source)!r}", "check the path")
    listing = _list_folder(source, cache_dir) if stat.S_ISDIR(mode) else list_table(source)
    return replace(listing, images=tuple(sorted(listing.images)))


def _list_folder(root: Path, cache_dir: Path | None) -> Listing:
    unreadable: list[Unreadable] = []
    files = list(files_below(root, unreadable))
    pictures = [parts for parts in files if is_picture(parts)]
    if not pictures:
        raise data_error(
            f"images ({' '.join(SUFFIXES)}) below {str(root)!r}",
            f"no images, {len(files)} other files"
            + "".join(f"\n    {str(root / folder.path)!r}: {folder.reason}" for folder in unreadable[:3]),
            "get leave to read these folders" if unreadable else "check the path; convert other formats to PNG",
        )
    in_splits = _in_splits(pictures)
    places = [_place(parts, in_splits) for parts in pictures]
    has_classes = any(place.label and place.kind == IMAGES for place in places)
    has_pairs = {IMAGES, MASKS} <= {place.kind for place in places}
    tables = [root / parts[0] for parts in files if len(parts) == 1 and is_label_table(root / parts[0])]
    all_dicom = all(parts[-1].lower().endswith(DICOM_SUFFIXES) for parts in pictures)
    if tables and (all_dicom or not (has_classes or has_pairs)):
        return _list_labelled(root, tables, len(files))
    if below := _only_folder(pictures):
        inner = _list_folder(root / below, cache_dir)
        outside = sum(parts[0] != below for parts in files)
        return replace(inner, layout=f"{inner.layout} in {below}/", ignored=inner.ignored + outside)
    if not in_splits and (holders := _holders(pictures) or whole_sets(pictures)):
        raise not_whole(root, holders)
    if not has_classes:
        if not has_pairs:
            raise _no_classes(root, pictures)
        places = [place._replace(label=ONLY_CLASS) for place in places if place.kind]
    found, notes = _images(places, in_splits)
    notes += unused_parts(pictures, [*SPLIT_NAMES]) if in_splits else nested_notes(pictures)
    names = [parts[0] for parts in files if len(parts) == 1 and parts[0].lower().endswith(METADATA)]
    images, read = _with_sources([root / name for name in names], found, notes, cache_dir)
    if not in_splits and root.name.lower() in SPLIT_NAMES and (others := _split_folders(root.parent)) - {root.name}:
        notes.append(f"{root.name} is one part of a given split; name {root.parent} to use {', '.join(sorted(others))}")
    used = len(images) + len({place.key for place in places if place.kind == MASKS}) + read
    return Listing(root, _words(places, in_splits), tuple(images), tuple(unreadable), len(files) - used, tuple(notes))


def _images(places: Sequence[_Place], in_splits: bool) -> tuple[list[ListedImage], list[str]]:
    """The images among the places, with their masks, and what to say of them."""
    masks = {place.key: "/".join(place.parts) for place in places if place.kind == MASKS}
    found = [place for place in places if place.kind == IMAGES and place.label]
    images = [
        ListedImage("/".join(place.parts), place.label, split=place.split, mask=masks.get(place.key, ""))
        for place in found
    ]
    notes: list[str] = []
    if in_splits:
        images, notes = _without_tiny_val(images)
    if masks and (unmasked := sum(not image.mask for image in images)):
        notes.append(f"images without a mask: {unmasked:,} of {len(images):,}")
    if alone := len(masks.keys() - {place.key for place in found}):
        notes.append(f"masks without an image: {alone:,}")
    return images, notes


def _in_splits(pictures: Sequence[tuple[str, ...]]) -> bool:
    return any(len(parts) > 2 and SPLIT_NAMES.get(parts[0].lower()) == TRAIN for parts in pictures)


def _place(parts: tuple[str, ...], in_splits: bool) -> _Place:
    """CLASS/.../x.png is an image, CLASS/.../masks/.../x.png a mask; below `train`, `val` and `test` too."""
    split = SPLIT_NAMES.get(parts[0].lower(), "") if in_splits else ""
    inner = parts[1:] if in_splits else parts
    folders = [folder.lower() for folder in inner[:-1]]
    if not folders or (in_splits and not split):
        return _Place(parts, split, "", "", ())
    own = [folder for folder in inner[:-1] if folder.lower() not in (IMAGES, MASKS)]
    stem = inner[-1].rsplit(".", 1)[0]
    if folders[0] in (IMAGES, MASKS):
        label, kind = "", folders[0]
    else:
        label, kind = inner[0], MASKS if MASKS in folders else IMAGES
    return _Place(parts, split, label, kind, (split, *own, stem.removesuffix("_mask") if kind == MASKS else stem))


def _words(places: Sequence[_Place], in_splits: bool) -> str:
    if in_splits:
        return "train|val|test folders"
    found = [place for place in places if place.kind == IMAGES and place.label]
    if found[0].label == ONLY_CLASS and found[0].parts[0].lower() == IMAGES:
        return "images/ and masks/"
    inside = {folder.lower() for place in found for folder in place.parts[1:-1]}
    return "class folders" + (" with images/" if inside == {IMAGES} else " with sub-folders" if inside else "")


def _only_folder(pictures: Sequence[tuple[str, ...]]) -> str:
    """The folder that all pictures lie in, if there are classes or parts of a split inside; else ""."""
    folders = {parts[0] for parts in pictures}
    inside = [parts[1:] for parts in pictures]
    if len(folders) > 1 or not all(inside):
        return ""
    classes = {place.label for place in (_place(parts, False) for parts in inside) if place.kind == IMAGES}
    only = folders.pop()
    # COVID/COVID/x.png is a class folder in itself, and so is CLASS/images/x.png.
    return only if _in_splits(inside) or len(classes - {""}) > 1 or _only_folder(inside) else ""


def _holders(pictures: Sequence[tuple[str, ...]]) -> list[str]:
    """Folders that are no classes but data sets: there are parts of a split in them, or classes with images/."""
    inside: dict[str, list[tuple[str, ...]]] = {}
    for parts in pictures:
        inside.setdefault(parts[0], []).append(parts[1:])
    classes = {
        folder: {parts[0] for parts in pictures if len(parts) > 2 and parts[1].lower() == IMAGES}
        for folder, pictures in inside.items()
    }
    return sorted(folder for folder in inside if _in_splits(inside[folder]) or len(classes[folder]) > 1)


def _list_labelled(root: Path, tables: Sequence[Path], files: int) -> Listing:
    """A folder of images that a CSV file in it labels."""
    if len(tables) > 1:
        raise data_error(
            f"one CSV file of labels in {str(root)!r}",
            ", ".join(file.name for file in tables),
            f"name the one to use, such as {tables[0]}",
        )
    listing = list_table(tables[0])
    ignored = files - len(listing.images) - len({image.mask for image in listing.images if image.mask}) - 1
    return replace(listing, layout=f"images labelled by {tables[0].name}", ignored=max(0, ignored))


def _without_tiny_val(images: list[ListedImage]) -> tuple[list[ListedImage], list[str]]:
    """The images with a given val part merged into train where it is too small to choose by, and what to say."""
    counts = Counter((image.split, image.label) for image in images)
    tiny = [
        label
        for label in sorted({image.label for image in images})
        if counts[VAL, label] < FEWEST_VAL and counts[TRAIN, label] >= FEWEST_VAL_TIMES * max(1, counts[VAL, label])
    ]
    if not tiny or VAL not in {image.split for image in images}:
        return images, []
    val, train = (sum(image.split == part for image in images) for part in (VAL, TRAIN))
    merged = [image._replace(split=TRAIN) if image.split == VAL else image for image in images]
    return merged, [
        f"the given val part of {val} images is too small to choose by ({counts[VAL, tiny[0]]} of {tiny[0]!r}): merged "
        f"into train's {train:,}, and a new one is cut from them by patient"
    ]


def _with_sources(
    spreadsheets: Sequence[Path], images: list[ListedImage], notes: list[str], cache_dir: Path | None
) -> tuple[list[ListedImage], int]:
    """The images with the URLs that their classes' spreadsheets give, and how many spreadsheets were read."""
    labels = {_folded(image.label): image.label for image in images}
    of_class = {file: labels.get(_folded(file.name[: -len(METADATA)])) for file in spreadsheets}
    sources: dict[tuple[str, str], str] = {}
    read = 0
    for file, label in of_class.items():
        if label is None:
            continue
        try:
            rows = read_sources(file, cache_dir)
        except (ValueError, OSError) as error:
            notes.append(f"{file.name} {error}; its images have no source")
            continue
        read += 1
        sources |= {(label, stem): url for stem, url in rows.items()}
    if not read:
        return images, 0
    named = [
        image._replace(source=sources.get((image.label, image_stem(Path(image.path).name)), "")) for image in images
    ]
    if unknown := sum(not image.source for image in named):
        notes.append(f"images that no metadata.xlsx names: {unknown:,}; they have no source")
    return named, read


def _folded(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def _no_classes(root: Path, pictures: Sequence[tuple[str, ...]]) -> Exception:
    """What to say of a folder without class folders, with the place where they may be."""
    hint = "put the images of each class into a folder of its own, or list them in a CSV file: path,label"
    above = root.parent
    siblings = [folder.name for folder in _folders(above) if any(is_picture((name,)) for name in _names(folder))]
    if root.name.lower() in (IMAGES, MASKS):
        hint = f"did you mean {above}, or the folder that holds all class folders, {above.parent}?"
    elif len(siblings) > 1:
        hint = f"did you mean {above}? It has {', '.join(siblings[:5])}; else {hint}"
    return data_error(
        f"one folder per class in {str(root)!r}: CLASS/x.png, CLASS/images/x.png or train/CLASS/x.png",
        f"{len(pictures)} images but no class folders; the first image is {'/'.join(pictures[0])!r}",
        hint,
    )


def _split_folders(root: Path) -> set[str]:
    return {folder.name for folder in _folders(root) if folder.name.lower() in SPLIT_NAMES}


def _folders(root: Path) -> Iterator[Path]:
    try:
        yield from (path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith("."))
    except OSError:  # a hint is no reason to fail
        return


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []
