"""Tables beside images: a CSV file that lists or labels them, and the spreadsheets of the COVID-19 Radiography set."""

import csv
import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cxr_models.images import Flaw
from cxr_models.kept import keep, kept
from cxr_models.listing import (
    SPLIT_NAMES,
    DataError,
    ListedImage,
    Listing,
    Unreadable,
    data_error,
    files_below,
    is_picture,
    nearest,
)
from cxr_models.misplaced import check_present

# What a column may be called; the first name is the one that messages use.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "path": ("path",),
    "label": ("label", "class", "target"),
    "patient": ("patient", "patient_id", "patientid"),
    "source": ("source",),
    "split": ("split",),
    "mask": ("mask",),
}
# In place of `path`: the stem or the whole name of a file anywhere below the table's folder.
ID_COLUMNS = ("image_id", "imageid", "sopinstanceuid", "patientid", "patient_id", "id")
NEEDED_FOR_SPLITS = ("patient", "split")  # ignoring one of these in silence would make every figure wrong
PATHS = ("path", "mask")
TABLE_SUFFIXES = (".csv", ".tsv")
SEPARATORS = (",", ";", "\t")
SHOWN_PROBLEMS = 5
LONGEST_HEADER = 20_000  # characters; what is longer is no list of columns
MOST_SHEET_BYTES = 100_000_000  # of a spreadsheet unpacked, and far more than the largest that is published
MOST_SHEET_ROWS, MOST_SHEET_COLUMNS = 100_000, 50


def is_label_table(file: Path) -> bool:
    """Whether a file is a CSV file with a column of labels and one of paths or ids."""
    if file.suffix.lower() not in TABLE_SUFFIXES or file.name.startswith("."):
        return False
    try:
        if not file.is_file():  # a pipe has no end
            return False
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            columns = _columns(_header(text.readline(LONGEST_HEADER))[0])
    except (OSError, csv.Error):
        return False
    return "label" in columns and bool(columns.keys() & {"path", "id"})


def list_table(file: Path) -> Listing:
    """Find the images that a CSV file lists by `path`, or by an id that is a file's name below the same folder.

    Raises:
        DataError: a needed column is absent or probably misspelt, or a line is wrong; up to `SHOWN_PROBLEMS` of them.
    """
    notes: list[str] = []
    rows = list(_rows(file, notes))
    by_id = bool(rows) and "id" in rows[0][1]
    unreadable: list[Unreadable] = []
    pictures = [parts for parts in files_below(file.parent, unreadable) if is_picture(parts)] if by_id else []
    named = _by_name(pictures)
    images: dict[str, ListedImage] = {}
    problems: list[str] = []
    for line, row in rows:
        found = named.get(row["id"], []) if by_id else [_normal_path(file.parent, row["path"])]
        path = found[0] if found else ""
        split = SPLIT_NAMES.get(row["split"].lower(), "")
        mask = _normal_path(file.parent, row["mask"])
        image = ListedImage(path, row["label"], row["patient"], row["source"], split, mask)
        if row["split"] and not split:
            problems.append(f"line {line}: split {row['split']!r}; it must be train, val, test or empty")
        elif by_id and row["id"] and not found:
            unreadable.append(Unreadable(row["id"], f"no image of this name below {file.parent}"))
        elif len(found) > 1:
            problems.append(f"line {line}: {row['id']!r} is the name of {found[0]!r} and of {found[1]!r}")
        elif not path or not row["label"]:
            problems.append(f"line {line}: path {path!r} with label {row['label']!r}; both must be given")
        elif path in images and not (by_id and images[path] == image):  # a line for each box of an image is usual
            problems.append(f"line {line}: {path!r} again; each image must be listed once")
        else:
            images[path] = image
    if problems or not images:
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        absent = [f"none of its {len(unreadable)} ids is the name of an image below {file.parent}"] if by_id else []
        raise data_error(
            f"one image a line in {str(file)!r}",
            "\n    ".join(problems[:SHOWN_PROBLEMS] + more or absent) or "no lines below the header",
            "correct the file",
        )
    if not by_id:  # labels by id are published for whole collections, of which many people have a part
        check_present(file, [path for path in images if not os.path.isfile(file.parent / path)], len(images))
    lost = {image.mask for image in images.values() if image.mask and not os.path.isfile(file.parent / image.mask)}
    listed = tuple(image._replace(mask="") if image.mask in lost else image for image in images.values())
    unreadable += [Unreadable(mask, "the mask is missing", Flaw.MASK) for mask in sorted(lost)]
    ignored = len({"/".join(parts) for parts in pictures} - images.keys())
    layout = "CSV of file names" if by_id else "CSV"
    return Listing(file.parent, layout, listed, tuple(dict.fromkeys(unreadable)), ignored, tuple(notes))


def listed_files(file: Path) -> set[str] | None:
    """The images and masks that a CSV file names by path, as `ListedImage` has them; None where it names them by id.

    Raises:
        DataError: it is no such file.
    """
    rows = [row for _, row in _rows(file, [])]
    if rows and "id" in rows[0]:
        return None
    return {_normal_path(file.parent, row[key]) for row in rows for key in PATHS if row[key]}


def read_sources(file: Path, cache_dir: Path | None = None) -> dict[str, str]:
    """File name without suffix, in lower case -> URL, from a `<Class>.metadata.xlsx`.

    Args:
        file: the spreadsheet.
        cache_dir: what was read is kept below it, since ten thousand rows take a second; none keeps nothing.

    Raises:
        ValueError: it is no spreadsheet, or lacks a column; in a few words.
    """
    if cache_dir is None:
        return _read_spreadsheet(file)
    status = file.stat()
    stamp = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    stored = cache_dir / "manifests" / f"{hashlib.sha256(os.fsencode(stamp)).hexdigest()[:16]}-sources.json"
    known: dict[str, str] | None = kept(stored)
    if known is None:
        known = _read_spreadsheet(file)
        keep(stored, known)
    return known


def _read_spreadsheet(file: Path) -> dict[str, str]:
    import openpyxl

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # openpyxl tells of styles and extensions that do not matter here
            _check_unpacked(file)
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            # Bounds, because a sheet may say that it has a million rows of sixteen thousand cells.
            bounds = {"max_row": MOST_SHEET_ROWS, "max_col": MOST_SHEET_COLUMNS}
            rows = list(book.worksheets[0].iter_rows(values_only=True, **bounds))
            book.close()
    except Exception as error:  # broken archives and broken XML raise nearly anything
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from error
    header = [str(cell or "").strip().upper() for cell in rows[0]] if rows else []
    if not {"FILE NAME", "URL"} <= {*header}:
        raise ValueError(f"has the columns {', '.join(filter(None, header)) or 'none'}; expected FILE NAME and URL")
    name, url = header.index("FILE NAME"), header.index("URL")
    return {image_stem(str(row[name])): str(row[url]).strip() for row in rows[1:] if row[name] and row[url]}


def _check_unpacked(file: Path) -> None:
    """Raise ValueError where an archive would take far more memory than a spreadsheet does."""
    if not file.is_file():
        raise ValueError("no file")
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > MOST_SHEET_BYTES:
        raise ValueError(f"{unpacked:,} bytes unpacked; expected at most {MOST_SHEET_BYTES:,}")


def image_stem(name: str) -> str:
    """A file name as the spreadsheets and the images have it in common: lower case, without the suffix."""
    name = name.strip().lower()
    return name.rsplit(".", 1)[0] if is_picture((name,)) else name


def _rows(file: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The last line number of each row and its cells by the keys of `COLUMNS`, "" where absent; `id` if it has one."""
    remedy = f"the columns are {', '.join(COLUMNS)}; the first two are needed, others are ignored"
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            header, separator = _header(text.readline(LONGEST_HEADER))
            text.seek(0)
            reader = csv.reader(text, delimiter=separator)
            columns = _columns(header)
            if (
                file.suffix.lower() not in TABLE_SUFFIXES
                or not {"path", "id"} & columns.keys()
                or "label" not in columns
            ):
                raise data_error(
                    "a folder, or a .csv file with the header path,label[,patient,source,split,mask]",
                    f"{str(file)!r} beginning with {','.join(header)[:80]!r}{_hints(header, columns)}",
                    f"{remedy}; in place of path, a column {' or '.join(ID_COLUMNS[:3])} may name the files",
                )
            _check_misspelt(file, header, columns, notes)
            next(reader)
            for row in reader:
                if row:
                    cells = {key: row[place] if place < len(row) else "" for key, place in columns.items()}
                    absent = dict.fromkeys(COLUMNS, "")
                    kept = {key: cell if key in PATHS else cell.strip() for key, cell in cells.items()}
                    yield reader.line_num, {**absent, **kept}
    except csv.Error as error:
        raise data_error(f"a CSV file in {str(file)!r}", f"line {reader.line_num}: {error}", remedy) from error
    except OSError as error:
        raise data_error(
            f"a CSV file in {str(file)!r}", error.strerror or str(error), "check that you may read it"
        ) from error


def _header(line: str) -> tuple[list[str], str]:
    """The names in a header line, and what separates them."""
    separator = max(SEPARATORS, key=line.count)
    return next(csv.reader([line], delimiter=separator), []), separator


def _columns(header: Sequence[str]) -> dict[str, int]:
    """Key of `COLUMNS`, or `id` -> place of the column in the header."""
    names = [name.strip().lower() for name in header]
    places = {
        key: names.index(found)
        for key, aliases in COLUMNS.items()
        if (found := next((alias for alias in aliases if alias in names), None))
    }
    found = next((name for name in ID_COLUMNS if name in names), None)
    if "path" in places or found is None:
        return places
    place = names.index(found)  # a patient's id that names a file tells no more than the file, whose tags come first
    return {**{key: other for key, other in places.items() if other != place}, "id": place}


def _misspelt(header: Sequence[str], columns: Mapping[str, int]) -> dict[str, str]:
    """Column that is not used -> the absent column that it may be meant as."""
    absent = [key for key in COLUMNS if key not in columns]
    unused = [name.strip() for place, name in enumerate(header) if place not in columns.values()]
    return {name: key for name in unused if (key := nearest(name, absent))}


def _hints(header: Sequence[str], columns: Mapping[str, int]) -> str:
    return "".join(f"; did you mean {key!r} by {name!r}?" for name, key in _misspelt(header, columns).items())


def _check_misspelt(file: Path, header: Sequence[str], columns: Mapping[str, int], notes: list[str]) -> None:
    for name, key in _misspelt(header, columns).items():
        if key in NEEDED_FOR_SPLITS:
            raise DataError(
                f"{str(file)!r} has a column {name!r}; did you mean {key!r}?\n"
                f"  remedy: rename it to {key!r} if it is that, else to something less like it"
            )
        notes.append(f"the column {name!r} of {file.name} is ignored; did you mean {key!r}?")


def _by_name(pictures: Sequence[tuple[str, ...]]) -> dict[str, list[str]]:
    """File name, and file name without its suffix -> the paths that have it."""
    named: dict[str, list[str]] = {}
    for parts in pictures:
        for name in (parts[-1], parts[-1].rsplit(".", 1)[0]):
            named.setdefault(name, []).append("/".join(parts))
    return named


def _normal_path(root: Path, text: str) -> str:
    """POSIX, relative to `root` where it lies below it, else absolute; "" for ""."""
    path = Path(os.path.normpath(root / text))
    below = path.relative_to(root) if path.is_relative_to(root) else path
    return below.as_posix() if text else ""
