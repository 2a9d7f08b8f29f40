"""Checksums beside the files of a cache, so that damage is noticed before anybody works with it.

The CRC-32 of each block of a file lies in a second file beside it, `<name>.sums`, written by whoever writes the file,
from what it has in memory. The first to use a file after a start of the machine, or after a change of the file, reads
all of it; `<name>.verified` spares that to all who come later. A file without sums is not believed.
"""

import errno
import fcntl
import json
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from cxr_models.storage import boot_id, written_whole

READ_BYTES = 1024**2  # at once; the processor's cache holds it
TASK_BYTES = 32 * READ_BYTES  # of a thread's turn
MOST_THREADS = 8
SEALED_BYTES = 1024**2  # the blocks of a file that is written by somebody else
TICK_S = 0.02  # two changes of a file within it may bear the same time
MOST_BOOTS = 64  # of the machines that share a cache

_HEAD = 3  # numbers in front of the sums
_NUMBER = np.dtype("<u8")


@dataclass(frozen=True)
class Blocks:
    """How a file is divided for its sums.

    Attributes:
        size: of the file, in bytes.
        head: bytes at its beginning that are a block of their own.
        length: of every other block, in bytes; the last may be shorter.
    """

    size: int
    head: int
    length: int

    @property
    def count(self) -> int:
        """How many there are, with that of the head, which may be empty."""
        return 1 + -(-(self.size - self.head) // self.length)

    def span(self, block: int) -> tuple[int, int]:
        """Where a block begins and ends; the head is block 0."""
        if not block:
            return 0, self.head
        begin = self.head + (block - 1) * self.length
        return begin, min(begin + self.length, self.size)


def sums_file(path: Path) -> Path:
    """Where the sums of a file lie."""
    return path.with_name(f"{path.name}.sums")


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def write_sums(path: Path, blocks: Blocks, sums: Sequence[int]) -> None:
    """Write the sums of a file. The file itself may take its place after that: it is never there without them."""
    with written_whole(sums_file(path)) as scratch:
        scratch.write_bytes(_packed(blocks, sums))


def begin_sums(file: Path, blocks: Blocks) -> None:
    """Make a file for sums that processes put in with `put_sum`, one block each."""
    file.write_bytes(_packed(blocks, [0] * blocks.count))


def put_sum(file: int, block: int, found: int) -> None:
    """Put the sum of one block into a file that is open under a descriptor."""
    os.pwrite(file, np.array(found, _NUMBER).tobytes(), (_HEAD + block) * _NUMBER.itemsize)


def seal(path: Path) -> None:
    """Write the sums of a file that is there already."""
    with path.open("rb") as file:
        blocks = Blocks(os.fstat(file.fileno()).st_size, 0, SEALED_BYTES)
        write_sums(path, blocks, [_sum(file.fileno(), *blocks.span(block)) for block in range(blocks.count)])


def forget(path: Path) -> None:
    """Remove a file with its sums. Who has it open keeps what is in it."""
    for one in (path, _marker(path), sums_file(path)):
        one.unlink(missing_ok=True)


def is_sound(path: Path) -> bool:
    """Whether a file is there and is what was written."""
    try:
        with path.open("rb") as file:
            return is_sound_file(file, path)
    except FileNotFoundError:
        return False


def is_sound_file(file: BinaryIO, path: Path) -> bool:
    """The same of a file that is open. A disk that cannot read it counts as damage."""
    try:
        with sums_file(path).open("rb") as sums:
            stamps = [_stamp(file), _stamp(sums)]
            if boot_id() in _verified(path, stamps):
                return True
            with suppress(OSError):  # a file system without locks: some read what one could have read for all
                fcntl.flock(sums, fcntl.LOCK_EX)
            boots = _verified(path, stamps)
            if boot_id() in boots:
                return True
            known = _unpacked(sums.read())
            if known is None or known[0].size != os.fstat(file.fileno()).st_size or not _fits(file.fileno(), *known):
                return False
            _mark(path, stamps, boots)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):
            raise
        return False
    return True


def _stamp(file: BinaryIO) -> list[int]:
    status = os.fstat(file.fileno())
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _verified(path: Path, stamps: list[list[int]]) -> list[str]:
    """The machines that have read a file, each by the start since which it has; none where it has changed."""
    try:
        marked = json.loads(_marker(path).read_bytes())
        return [str(boot) for boot in marked["boots"]] if marked["stamps"] == stamps else []
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _mark(path: Path, stamps: list[list[int]], boots: list[str]) -> None:
    changed_ns = max(mtime_ns for _, mtime_ns, _ in stamps)
    time.sleep(min(max(0.0, TICK_S - (time.time_ns() - changed_ns) / 1e9), TICK_S))
    marked = {"stamps": stamps, "boots": [*boots, boot_id()][-MOST_BOOTS:]}
    with (
        suppress(OSError),
        written_whole(_marker(path), durable=False) as scratch,
    ):  # without a mark the next one reads it too
        scratch.write_text(json.dumps(marked))


def _fits(file: int, blocks: Blocks, sums: NDArray[np.uint64]) -> bool:
    """Whether every block has its sum; several threads read, for zlib lets others run meanwhile."""
    at_once = max(1, TASK_BYTES // blocks.length)
    turns = [range(first, min(first + at_once, blocks.count)) for first in range(0, blocks.count, at_once)]

    def fit(turn: range) -> bool:
        return all(_sum(file, *blocks.span(block)) == sums[block] for block in turn)

    pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS))
    try:
        return all(pool.map(fit, turns))
    finally:
        pool.shutdown(cancel_futures=True)


def _sum(file: int, begin: int, end: int) -> int:
    """CRC-32 of the bytes of an open file from `begin` to `end`."""
    found, room = 0, memoryview(bytearray(min(READ_BYTES, end - begin)))
    while begin < end:
        read = os.preadv(file, [room[: end - begin]], begin)
        if not read:
            return -1  # it ends before
        found, begin = zlib.crc32(room[:read], found), begin + read
    return found


def _packed(blocks: Blocks, sums: Sequence[int]) -> bytes:
    return np.array([*astuple(blocks), *sums], _NUMBER).tobytes()


def _unpacked(found: bytes) -> tuple[Blocks, NDArray[np.uint64]] | None:
    """What `_packed` made; None if it is damaged."""
    if len(found) < _HEAD * _NUMBER.itemsize or len(found) % _NUMBER.itemsize:
        return None
    numbers = np.frombuffer(found, _NUMBER)
    blocks = Blocks(*map(int, numbers[:_HEAD]))
    if not blocks.length or blocks.head > blocks.size or blocks.count != len(numbers) - _HEAD:
        return None
    return blocks, numbers[_HEAD:]
