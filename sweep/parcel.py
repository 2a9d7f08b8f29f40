"""A few files of a run folder as text, for the log of a job: `python -m sweep.parcel RUN_DIR` on a cluster's head.

The log is the only way back that needs no port but the dashboard's.
"""

import argparse
import base64
import binascii
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cxr_models.storage import written_whole

FILES = ("report.html", "summary.json", "trials.csv")
MOST_BYTES = 32 * 1024**2  # of a file, since the head keeps a log whole in memory to hand it out
BEGIN, END = "-----BEGIN FILES OF A SWEEP-----", "-----END FILES OF A SWEEP-----"


class ParcelDamaged(ValueError):  # noqa: N818 - reads as what happened
    """What came is not what was packed."""


@dataclass(frozen=True)
class Parcel:
    """Files of a run folder.

    Attributes:
        files: name -> content.
        left_out: name -> why it is not there.
    """

    files: dict[str, bytes]
    left_out: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write the files, each whole, over what has their names."""
        for name, content in self.files.items():
            with written_whole(folder / name) as scratch:
                scratch.write_bytes(content)


def packed(folder: Path) -> Iterator[str]:
    """Lines of a parcel: one of JSON for each file, between a first and a last one."""
    yield BEGIN
    for name in FILES:
        yield json.dumps({"name": name, **_facts(folder / name)})
    yield END


def _facts(path: Path) -> dict[str, str | int]:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            return {"left_out": f"it has {size:,} bytes, {MOST_BYTES:,} at most are sent"}
        content = path.read_bytes()
    except OSError as error:
        return {"left_out": error.strerror or str(error)}
    packed_up = base64.b64encode(zlib.compress(content)).decode()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "content": packed_up}


def unpacked(text: str) -> Parcel:
    """The parcel in a log, whatever else stands around it.

    Raises:
        ParcelDamaged: there is none, or it is not whole.
    """
    lines = text.splitlines()
    if BEGIN not in lines or END not in lines:
        raise ParcelDamaged("expected files of a run folder, but none came")
    files: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    for line in lines[lines.index(BEGIN) + 1 : lines.index(END)]:
        try:
            facts = json.loads(line)
            name = facts["name"]
            if name not in FILES:
                raise ParcelDamaged(f"expected one of {', '.join(FILES)}, but got {name!r}")
            if "left_out" in facts:
                left_out[name] = facts["left_out"]
            else:
                files[name] = _content(name, facts["content"], facts["bytes"], facts["sha256"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ParcelDamaged(f"expected a file as JSON, but got {line[:80]!r}") from error
    return Parcel(files, left_out)


def _content(name: str, text: str, size: int, checksum: str) -> bytes:
    try:
        # One byte more than the largest file: what unfolds to gigabytes is not unfolded.
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), MOST_BYTES + 1)
    except (binascii.Error, zlib.error) as error:
        raise ParcelDamaged(f"{name} arrived damaged: {error}") from error
    if len(content) != size or hashlib.sha256(content).hexdigest() != checksum:
        raise ParcelDamaged(f"{name} arrived damaged: expected {size:,} bytes of another checksum")
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sweep.parcel", description="Print files of a run folder as text.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder a sweep wrote")
    folder = parser.parse_args(argv).run_dir
    if not folder.is_dir():
        print(f"expected the folder of a sweep, but there is none at {folder.absolute()}", file=sys.stderr)
        return 2
    for line in packed(folder):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
