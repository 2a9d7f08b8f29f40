"""What may happen to a file of a cache and its checksums."""

from collections.abc import Callable
from pathlib import Path

from cxr_models.checksums import sums_file

Damage = Callable[[Path], None]


def changed(path: Path, begin: int, new: bytes) -> None:
    """Write over a part of a file; its size and its inode stay."""
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(new)


def flipped(path: Path, place: int) -> None:
    changed(path, place, bytes([path.read_bytes()[place] ^ 1]))


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Damage] = {
    "a bit at the beginning": lambda path: flipped(path, 0),
    "a bit in the middle": lambda path: flipped(path, path.stat().st_size // 2),
    "a bit at the end": lambda path: flipped(path, path.stat().st_size - 1),
    "zeros at the end": lambda path: changed(path, path.stat().st_size // 2, bytes(-(-path.stat().st_size // 2))),
    "all zeros": lambda path: changed(path, 0, bytes(path.stat().st_size)),
    "truncated": shorter,
    "empty": lambda path: path.write_bytes(b"") and None,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0") and None,
    "no sums": lambda path: sums_file(path).unlink(),
    "sums cut short": lambda path: shorter(sums_file(path)),
    "no sum in the sums": lambda path: sums_file(path).write_bytes(sums_file(path).read_bytes()[:-8]) and None,
    "a bit of the sums": lambda path: flipped(sums_file(path), sums_file(path).stat().st_size - 8),
    "a bit of the head of the sums": lambda path: flipped(sums_file(path), 16),
    "zeros for sums": lambda path: changed(sums_file(path), 0, bytes(sums_file(path).stat().st_size)),
    "rubbish for sums": lambda path: sums_file(path).write_bytes(b"\xff" * 64) and None,
}
