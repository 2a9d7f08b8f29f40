"""What a phase of a trial is given of each image: pixels, or what is stored at the cut."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from cxr_models import steps
from cxr_models.augmentation import AUGMENTATION_VERSION, augmented, view_of_epoch
from cxr_models.cuts import Cut
from cxr_models.features import Extraction, Features, NoRoomError, Rows, obtain
from cxr_models.network import Network
from cxr_models.trial import NO_MASK, PIXELS, TrialConfig, TrialData

# Images of the data set, by their place in it -> what the network is given of them.
Gather = Callable[[Rows], steps.Array]


@dataclass
class Asked:
    """What asking for features came to.

    Attributes:
        seconds: spent computing them or waiting for others who do.
        found: times that they were stored.
        missed: times that they were not.
    """

    seconds: float = 0.0
    found: int = 0
    missed: int = 0


class Inputs:
    """Reads the training and validation images for one phase.

    Args:
        data: which images, and the features that may be kept of them.
        config: of the trial.
        network: of the trial; as far as the cut it holds the trial's first weights.
        cut: where the images are run to beforehand; None for pixels.
        untrained: gives such a network with the trial's first weights throughout. With it, a pass stores the cuts of
            other trials too; layers that this trial trains may lie in front of those.

    Raises:
        NoRoomError: the features cannot be kept; with `cut=None` the phase can run all the same.

    Attributes:
        source: what `EpochMetrics.source` says of the epoch whose `training` was asked for last.
        asked: for features so far; whoever takes it leaves a new one.
    """

    def __init__(
        self,
        data: TrialData,
        config: TrialConfig,
        network: Network,
        cut: Cut | None,
        *,
        untrained: Callable[[], Network] | None = None,
    ) -> None:
        self._data = data
        self._config = config
        self._network = network
        self._cut = cut
        self._untrained = untrained
        self._pixels = np.load(data.pictures(config), mmap_mode="r")
        self.source = cut.name if cut else PIXELS
        self.asked = Asked()
        self._view: tuple[int, Features] | None = None
        self._plain: Features | None = None
        plain = np.sort(data.val) if config.augmentation != "none" else np.union1d(data.train, data.val)
        if cut is not None and len(plain):
            self._plain, self._rows = self._obtain(plain, 0), plain

    def validation(self) -> Gather:
        """The images as they are."""
        if self._plain is None:
            pixels: NDArray[np.uint8] = self._pixels
            return lambda wanted: pixels[wanted]
        array, rows = self._plain.array, self._rows
        return lambda wanted: array[np.searchsorted(rows, wanted)]

    def training(self, epoch: int) -> Gather:
        """The images as this epoch sees them."""
        if self._config.augmentation == "none":
            return self.validation()
        view = view_of_epoch(epoch, self._config.augmented_views)
        if self._cut is None:
            return lambda wanted: self._augmented(wanted, view)
        rows = np.sort(self._data.train)
        if self._view is None or self._view[0] != view:
            self._close_view()
            try:
                self._view = view, self._obtain(rows, view)
            except NoRoomError as error:
                self.source = f"{PIXELS}: {error}"
                run = _warm_prefix(self._network, (self._cut,))  # the same bits, for this epoch of this trial alone
                return lambda wanted: run(self._augmented(wanted, view))[0]
        self.source = self._cut.name
        array = self._view[1].array
        return lambda wanted: array[np.searchsorted(rows, wanted)]

    def close(self) -> None:
        """Let the features go: they may be evicted from now on."""
        self._close_view()
        if self._plain is not None:
            self._plain.close()
        self._plain = self._untrained = None  # what gives that network may hold these inputs

    def _close_view(self) -> None:
        if self._view is not None:
            self._view[1].close()
        self._view = None

    def _augmented(self, wanted: Rows, view: int) -> NDArray[np.uint8]:
        pixels, ids = self._pixels[wanted], self._data.image_ids[wanted]
        return augmented(pixels, ids, **self._config.augmentation_arguments(view))

    def _obtain(self, rows: Rows, view: int) -> Features:
        """Features of `rows`; of their augmented view, or of the images as they are where it is 0."""
        budget = self._data.features
        if budget is None or self._cut is None:
            raise NoRoomError("this trial keeps no features")
        extraction = Extraction(
            title=self._title(view),
            key=self._key(rows, view),
            images=len(rows),
            pixels=lambda chosen: self._augmented(rows[chosen], view) if view else self._pixels[rows[chosen]],
            prefix=lambda cuts: _warm_prefix(self._untrained() if self._untrained else self._network, tuple(cuts)),
            images_at_once=max(64, steps.inference_batch()),
        )
        kept = budget.cuts.get((self._config.backbone, self._config.weights, self._config.image_side), ())
        wanted = kept if self._untrained else ()
        begun = time.perf_counter()
        try:
            features = obtain(budget, extraction, self._cut, wanted=wanted)
        finally:
            self.asked.seconds += time.perf_counter() - begun
        if features.missed:
            self.asked.missed += 1
        else:
            self.asked.found += 1
        return features

    def _title(self, view: int) -> str:
        config = self._config
        title = f"{config.backbone} at {config.image_side} px{', masked' if config.lung_mask != NO_MASK else ''}"
        if not view:
            return title
        views = min(config.augmented_views or config.epochs, config.epochs)
        return f"{title}, {config.augmentation} view {view} of {max(view, views)}"

    def _key(self, rows: Rows, view: int) -> dict[str, object]:
        config = self._config
        weights = self._data.weights.get((config.backbone, config.weights, config.image_side))
        pixels = self._data.pictures(config)
        status = pixels.stat()
        return {
            "pixels": [pixels.name, status.st_size, status.st_mtime_ns],
            "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
            "view": [AUGMENTATION_VERSION, PIL.__version__, *config.views, view] if view else None,
            "backbone": config.backbone,
            "image_side": config.image_side,
            "channels": self._data.channels,
            "weights": _digest(weights, weights.stat().st_mtime_ns) if weights else f"random, seed {config.seed}",
            "numerics": steps.numerics(),
        }


@lru_cache(maxsize=4)
def _warm_prefix(network: Network, cuts: tuple[Cut, ...]) -> steps.Prefix:
    return steps.Prefix(network, cuts)


@lru_cache(maxsize=32)
def _digest(path: Path, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
