"""Small findings kept below a cache folder, as JSON with a checksum: what is damaged is found out anew."""

import json
import zlib
from pathlib import Path
from typing import Any

from cxr_models.storage import written_whole


def keep(path: Path, found: Any) -> None:
    """Keep what JSON can hold.

    Raises:
        NoSpace: the disk has no room for it.
    """
    text = json.dumps(found).encode()
    with written_whole(path) as scratch:
        scratch.write_bytes(b"%s\n%s\n" % (text, _checksum(text)))


def kept(path: Path) -> Any:
    """What `keep` was given; None if it is absent, damaged, or of a version that wrote no checksum."""
    try:
        text, checksum, rest = path.read_bytes().split(b"\n")
        return None if rest or checksum != _checksum(text) else json.loads(text)
    except (OSError, ValueError):
        return None


def _checksum(text: bytes) -> bytes:
    return f"crc32 {zlib.crc32(text):08x}".encode()
