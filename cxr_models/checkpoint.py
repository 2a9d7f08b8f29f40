"""A training as it is at the end of an epoch, kept in one file so that another process can go on from there."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cxr_models.storage import remove_stale, written_whole
from cxr_models.trial import CHECKPOINT, EpochMetrics, TrialConfig, TrialData

FORMAT = 1
AT_ONCE_BYTES = 16 * 1024**2

Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]

# Members of the file, or what the names of several begin with.
_COURSE, _SCORES, _WEIGHTS, _OPTIMIZER = "course", "scores", "weights", "optimizer"


@dataclass(frozen=True)
class TrainingState:
    """One training; a trial with folds has several.

    Attributes:
        weights: every weight that has moved, by its path.
        optimizer: what the optimizer remembers of the steps of the phase so far, in its own order.
    """

    weights: Arrays
    optimizer: Sequence[NDArray[np.generic]]


@dataclass(frozen=True)
class Checkpoint:
    """A training at the end of an epoch. What else it needs follows from these.

    Image order, dropout and augmentation follow from seed, epoch and step; learning rates and patience from the
    validation losses of the course, which are followed anew.

    Attributes:
        course: every epoch so far; the last is the one that has just ended. Empty where nothing was kept.
        best: number of the best of them, 0 where there is none yet.
        trainings: as the last epoch left them.
        scores: the validation scores of the last epoch, where it is the best.
    """

    course: tuple[EpochMetrics, ...] = ()
    best: int = 0
    trainings: tuple[TrainingState, ...] = ()
    scores: Arrays | None = None


def identity(trial_id: str, config: TrialConfig, data: TrialData, *aims: str | float) -> str:
    """What must be the same for a training to go on from a checkpoint, as a digest.

    Args:
        trial_id: of the training.
        config: what is trained.
        data: on which images.
        aims: what else decides how long it goes on and which weights it keeps.
    """
    digest = hashlib.sha256()
    # Another Keras may keep other variables in its optimizers.
    told = FORMAT, version("keras"), trial_id, config.digest, data.classes, data.channels, aims
    digest.update(json.dumps(told).encode())
    arrays: list[NDArray[np.integer]] = [data.labels, data.train, data.val, *data.folds]
    for array in arrays:
        digest.update(hashlib.sha256(array.tobytes()).digest())
    return digest.hexdigest()


class CheckpointFile:
    """The checkpoint of one training, in the folder of its trial.

    Args:
        folder: of the trial; what processes left there that were killed while they wrote is removed.
        identity: see `identity`.
        beside: names of the files that keep the best epoch.
    """

    def __init__(self, folder: Path, identity: str, beside: Sequence[str]) -> None:
        self._folder = folder
        self._identity = identity
        self._beside = beside
        self._lines: list[str] = []  # one for each epoch that has been put into words
        remove_stale(folder)

    def read(self) -> Checkpoint:
        """What was written last; where that is of no use, an empty one, and nothing stays in the folder.

        It is of no use where it is torn, where it belongs to another training, and where the files of an earlier best
        epoch are torn or missing: the training begins anew then.
        """
        try:
            return self._read()
        except Exception:  # what a torn file raises depends on where it is torn
            self.forget()
            return Checkpoint()

    def write(self, checkpoint: Checkpoint) -> None:
        """Let this one take the place of the last.

        Raises:
            OSError: the disk is full, for one; the last one stays then.
        """
        new = checkpoint.course[len(self._lines) :]
        self._lines += [json.dumps(metrics.to_json()) for metrics in new]
        header = {
            "identity": self._identity,
            "best": checkpoint.best,
            "optimizers": [len(training.optimizer) for training in checkpoint.trainings],
        }
        told = "\n".join([json.dumps(header), *self._lines])
        arrays: dict[str, NDArray[np.generic]] = {_COURSE: np.frombuffer(told.encode(), np.uint8)}
        for number, training in enumerate(checkpoint.trainings):
            arrays |= _named(f"{number}/{_WEIGHTS}", training.weights)
            arrays |= _named(f"{number}/{_OPTIMIZER}", {str(n): value for n, value in enumerate(training.optimizer)})
        arrays |= _named(_SCORES, checkpoint.scores or {})
        # A disk that has to be waited for would cost short epochs more than they take. What a power failure tears is
        # told by the checksums of the members; a process that is killed tears nothing.
        write_arrays(self._folder / CHECKPOINT, arrays, durable=False)

    def forget(self) -> None:
        """Leave nothing to go on from, and no best epoch."""
        self._lines = []
        for name in (CHECKPOINT, *self._beside):
            (self._folder / name).unlink(missing_ok=True)

    def _read(self) -> Checkpoint:
        arrays = _whole(self._folder / CHECKPOINT)
        first, *lines = arrays[_COURSE].tobytes().decode().splitlines()
        header = json.loads(first)
        if header["identity"] != self._identity:
            raise ValueError("it is of another training")
        trainings = tuple(
            TrainingState(
                _of(arrays, f"{number}/{_WEIGHTS}"),
                [arrays[f"{number}/{_OPTIMIZER}/{place}"] for place in range(variables)],
            )
            for number, variables in enumerate(header["optimizers"])
        )
        course = tuple(EpochMetrics.from_json(json.loads(line)) for line in lines)
        if 0 < header["best"] < len(course):
            for name in self._beside:
                _whole(self._folder / name)
        self._lines = lines
        return Checkpoint(course, header["best"], trainings, _of(arrays, _SCORES) or None)


def write_arrays(path: Path, arrays: Arrays, *, durable: bool) -> None:
    """Write an `.npz` file whole; `durable` as for `storage.written_whole`."""
    with written_whole(path, durable=durable) as scratch, scratch.open("wb") as file:
        if sum(array.nbytes for array in arrays.values()) > AT_ONCE_BYTES:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            return
        memory = BytesIO()  # the many small writes of an archive take twice as long in a file
        np.savez(memory, **arrays)  # type: ignore[arg-type]
        file.write(memory.getbuffer())


def _named(group: str, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
    return {f"{group}/{name}": value for name, value in arrays.items()}


def _of(arrays: Arrays, group: str) -> dict[str, NDArray[np.generic]]:
    return {name.removeprefix(f"{group}/"): value for name, value in arrays.items() if name.startswith(f"{group}/")}


def _whole(path: Path) -> dict[str, NDArray[np.generic]]:
    """All arrays of a file; every checksum is compared as they are read."""
    with path.open("rb") as opened, np.load(opened) as file:
        return dict(file)
