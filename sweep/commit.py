"""What belongs together at the URL of a run folder, and what the folder notes of it; see `mirror.py`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cxr_models.storage import written_whole
from sweep.remote import NothingThere, StorageError, Store

COMMIT = "state/mirror.json"
FORMAT = 1

Stamp = tuple[int, int, int]
"""Inode, time of change in ns, and bytes of a file: what is replaced has another one."""


@dataclass(frozen=True)
class Commit:
    """What belongs together at the URL.

    Attributes:
        number: counts the commits of a sweep.
        writer: of the session that made it.
        record: file of the record -> how many bytes of it count.
        kept: file of a trial -> (the object that holds it, bytes).
    """

    number: int = 0
    writer: str = ""
    record: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> "Commit":
        """Raises `StorageError` where it is none."""
        try:
            found = json.loads(text)
            if found.pop("format") != FORMAT:
                raise ValueError("of another version of this program")
            kept = {name: (str(key), int(size)) for name, (key, size) in found.pop("kept").items()}
            return cls(kept=kept, **found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"expected what a sweep has written at {where}/{COMMIT}\n  found: {error}\n  remedy: this run folder "
                "cannot be gone on with; begin anew under another --name"
            ) from error


def read_commit(store: Store) -> Commit | None:
    """The last one at the URL of a run folder; None where there is none.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return Commit.from_json(store.read(COMMIT), store.url)
    except NothingThere:
        return None


@dataclass(frozen=True)
class Note:
    """What a run folder says of its mirror.

    Attributes:
        url: of the mirror, "" if there is none.
        number, writer: of the commit that the mirror has, or is about to have.
        stamps: of all files that are there as they are here, where nothing else was new.
    """

    url: str = ""
    number: int = 0
    writer: str = ""
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    def is_of(self, commit: Commit) -> bool:
        return (self.number, self.writer) == (commit.number, commit.writer)


def note_mirror(folder: Path, url: str, commit: Commit, stamps: Mapping[str, Stamp] | None = None) -> None:
    """Write down in a run folder where its mirror is, and how far it is; see `Note`."""
    with written_whole(folder / COMMIT) as scratch:
        scratch.write_text(json.dumps(asdict(Note(url, commit.number, commit.writer, stamps or {}))))


def noted_mirror(folder: Path) -> Note:
    """What `note_mirror` was given last; an empty one if there is none, or it is damaged."""
    try:
        found = json.loads((folder / COMMIT).read_text(encoding="utf-8"))
        stamps = {name: (int(inode), int(at), int(size)) for name, (inode, at, size) in found["stamps"].items()}
        return Note(str(found["url"]), int(found["number"]), str(found["writer"]), stamps)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Note()
