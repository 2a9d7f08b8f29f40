"""A disk that runs full under a sweep: in the cache, at a checkpoint, in the record."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fault_kills import compared, ended_well
from fault_runs import Attempt, Place, Reference, Row, Setting
from measuring import ProgramFailed

from sweep.record import RunFolder, read_lines

MIB = 1024**2
DISK_BYTES = 200 * MIB
# What is left of the disk: too little to draw the images; for no checkpoint of a network that trains as a whole, but
# for records; for nothing.
LEFT_FOR_CACHE, LEFT_FOR_RECORDS, LEFT_FOR_NOTHING = 4 * MIB, MIB // 2, 0
EPOCHS_BEFORE = 3
# A message for a person says what is missing. A traceback is none.
CLEAR = re.compile(r"no space|no room|room on the disk|disk .*full|full disk", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """When the disk runs full.

    Attributes:
        full_when: hears of the sweep; the disk is filled once it is true, before the sweep's start if it is None.
        left_bytes: that stay free.
        elsewhere: trials keep their checkpoints on another disk, so that the record is what finds no room.
    """

    name: str
    full_when: Callable[[Attempt], bool] | None
    left_bytes: int
    elsewhere: bool = False


def _epochs_recorded(attempt: Attempt) -> bool:
    return sum(1 for _ in read_lines(attempt.place.run.epoch_record)) >= EPOCHS_BEFORE


CASES = (
    Case("while the cache is written", None, LEFT_FOR_CACHE),
    Case("while checkpoints are written", _epochs_recorded, LEFT_FOR_RECORDS),
    Case("while the record is written", _epochs_recorded, LEFT_FOR_NOTHING, elsewhere=True),
)


def fill_disks(setting: Setting) -> Iterator[Row]:
    """A sweep on a small disk that runs full, for each of the cases, and once more after room was made; a row a case.

    Raises:
        ProgramFailed: this is not root, who alone may mount a tmpfs.
    """
    if os.geteuid():
        raise ProgramFailed("only root may mount the tmpfs that is to run full; run this as root")
    reference = setting.reference()
    setting.runs = len(CASES)
    for number, case in enumerate(CASES, start=1):
        yield {"case": case.name, **filled(case, setting.place(f"disk-{number}"), reference)}


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """A disk in memory, for the length of the block."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Ballast:
    """A file that takes what is free of a disk."""

    def __init__(self, disk: Path) -> None:
        self._file = disk / "ballast"

    def fill(self, left_bytes: int) -> None:
        """Leave so much, at the most."""
        disk = os.statvfs(self._file.parent)
        size = disk.f_bavail * disk.f_frsize - left_bytes
        with self._file.open("wb") as file:
            if size > 0:
                os.posix_fallocate(file.fileno(), 0, size)

    def remove(self) -> None:
        self._file.unlink()


def filled(case: Case, place: Place, reference: Reference) -> Row:
    """Run the sweep on a small disk until that is full, make room, and run it to its end.

    Args:
        case: when the disk runs full.
        place: of the sweep; its output, and checkpoints where the case wants them elsewhere, are not on the disk.
        reference: what it must end as.
    """
    with tmpfs(place.folder / "disk", DISK_BYTES) as disk:
        place, ballast = replace(place, disk=disk), Ballast(disk)
        if case.full_when is None:
            ballast.fill(case.left_bytes)
        attempt = Attempt.start(place, 0)
        if case.elsewhere and attempt.wait_until(lambda: place.run.state.is_dir()):
            _move_trials(place.run, place.folder / "trials")
        if case.full_when is not None:
            attempt.wait_until(partial(case.full_when, attempt))
            ballast.fill(case.left_bytes)
        complaints = _ended_clearly(attempt)
        told, first = _last_words(attempt), attempt.seconds
        attempt.clear()
        ballast.remove()
        again = Attempt.start(place, 1)
        complaints += ended_well(again)
        return {
            "resumed": again.resumed,
            "message": told,
            "told": f"full {case.name}",
            "seconds": first + again.seconds,
            **compared([], place, reference, complaints),
        }


def _move_trials(run: RunFolder, elsewhere: Path) -> None:
    """Let the trials' folder lie on another disk, before the first trial makes it."""
    elsewhere.mkdir()
    (run.state / "trials").symlink_to(elsewhere)


def _ended_clearly(attempt: Attempt) -> list[str]:
    """A sweep on a full disk ends with status 1 and says why in words."""
    status = attempt.wait()
    said = attempt.said
    complaints = [] if status == 1 else [f"on a full disk the exit status is {status}, not 1: {said[-1500:]}"]
    if "Traceback" in said:
        complaints.append(f"a full disk is told by a traceback: {said[-1500:]}")
    elif not CLEAR.search(said):
        complaints.append(f"it does not say that the disk is full: {said[-1500:]}")
    return complaints


def _last_words(attempt: Attempt) -> str:
    """The line that names the full disk, or the last one."""
    lines = [line.strip() for line in attempt.said.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if CLEAR.search(line)), lines[-1] if lines else "")[:300]
