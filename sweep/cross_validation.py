"""What the trainings of a trial's folds predicted for the images that each of them had not seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_models.metrics import classification_report, evaluate_further


@dataclass(frozen=True)
class HeldOut:
    """The held-out predictions of a trial; with repeats, an image has several.

    Attributes:
        index: (predictions,) place of the image in the manifest.
        labels: (predictions,) its true class.
        scores: (predictions, classes) log-probabilities.
        fold: (predictions,) number of the training, counted through all repeats.
    """

    index: NDArray[np.int64]
    labels: NDArray[np.int32]
    scores: NDArray[np.float32]
    fold: NDArray[np.int64]

    @classmethod
    def read(cls, path: Path) -> "HeldOut":
        """Read what a trial with folds left as `trial.VALIDATION_SCORES`.

        Raises:
            RuntimeError: it did not leave it, or the file is damaged.
        """
        try:
            with np.load(path) as kept:
                return cls(kept["index"], kept["labels"], kept["scores"], kept["fold"])
        except (OSError, KeyError, ValueError) as error:
            raise RuntimeError(f"expected the held-out predictions of every fold in {path}, but: {error}") from error

    def figures(self, classes: Sequence[str], patients: Sequence[str]) -> Mapping[str, Any]:
        """As `evaluation.part_figures`: metrics are means over the folds, `report` is of all predictions together.

        Args:
            classes: names of the classes.
            patients: (predictions,) patient of each image.
        """
        of_folds = [
            evaluate_further(self.labels[self.fold == fold], self.scores[self.fold == fold], classes)
            for fold in np.unique(self.fold)
        ]
        return {
            **{name: float(np.mean([figures[name] for figures in of_folds])) for name in of_folds[0]},
            "images": len(np.unique(self.index)),
            "patients": len(set(patients)),
            "report": classification_report(self.labels, self.scores, classes),
        }
