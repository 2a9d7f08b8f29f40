"""Where the lung masks of the axis `lung_mask` come from, checked before anything starts."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_models.dataset import Manifest
from cxr_models.extraction import check_saved_model
from cxr_models.listing import real_path
from cxr_models.trial import DATASET_MASK, NO_MASK, SEGMENT
from sweep.document import shown
from sweep.fetching import fetch_file
from sweep.remote import in_bucket
from sweep.space import Space

EXPECTED = f"expected {NO_MASK}, {DATASET_MASK}, or the run folder (or best/model.keras) of a segmentation sweep"


@dataclass(frozen=True)
class EarlierModel:
    """The U-Net of an earlier segmentation sweep.

    Attributes:
        path: of its `model.keras`.
        sha256: of that file.
        image_side: of its input, in pixels.
        channels: of its input.
        mlflow_run_id: of the earlier sweep; "" where that was not tracked.
    """

    path: Path
    sha256: str
    image_side: int
    channels: int
    mlflow_run_id: str


@dataclass(frozen=True)
class LungMasks:
    """One value of the axis.

    Attributes:
        value: as the file has it.
        sides: of the classifiers' images, in pixels.
        model: that finds the lungs; None where the data set has the masks.
    """

    value: str
    sides: tuple[int, ...]
    model: EarlierModel | None

    @property
    def note(self) -> str:
        """Where the masks come from, for the plan."""
        if self.model is None:
            return f"lung_mask {self.value}: the masks of the data set; pixels outside them are set to 0"
        run = f", MLflow run {self.model.mlflow_run_id}" if self.model.mlflow_run_id else ""
        found_by = "it" if in_bucket(self.value) else self.model.path
        return (
            f"lung_mask {self.value}: lungs as found by {found_by} (sha256 {self.model.sha256[:12]}{run}); "
            "pixels outside them are set to 0"
        )

    def to_json(self) -> dict[str, Any]:
        """Values that JSON has; an input of the sweep in `summary.json`."""
        if self.model is None:
            return {"lung_mask": self.value}
        return {
            "lung_mask": self.value,
            "model": str(self.model.path),
            "sha256": self.model.sha256,
            "mlflow_run_id": self.model.mlflow_run_id or None,
        }


def find_lung_masks(space: Space, manifest: Manifest, problems: list[str], cache_dir: Path) -> tuple[LungMasks, ...]:
    """The values of the axis other than `none`; what is wrong with them is added to `problems`.

    Run folders at a URL are fetched into `cache_dir`.
    """
    if not {"lung_mask", "image_side"} <= space.axes.keys():
        return ()
    sides: dict[str, set[int]] = {}
    for value, side in space.combinations("lung_mask", "image_side"):
        sides.setdefault(str(value), set()).add(int(side))  # type: ignore[arg-type]
    found = []
    for value in sorted(sides.keys() - {NO_MASK}):
        try:
            model = None if value == DATASET_MASK else _earlier_model(value, cache_dir)
            if model is None:
                _check_gaps(manifest)
        except (ValueError, OSError) as error:
            problems.append(f"space.lung_mask: {error}")
            continue
        found.append(LungMasks(value, tuple(sorted(sides[value])), model))
    return tuple(found)


def input_tags(sources: Sequence[LungMasks]) -> dict[str, str]:
    """What MLflow is told of the earlier sweeps a sweep builds on."""
    tags: dict[str, str] = {}
    for number, source in enumerate((source for source in sources if source.model), start=1):
        prefix = "input.lung_mask" if number == 1 else f"input.lung_mask_{number}"
        tags |= {f"{prefix}.{name}": str(value) for name, value in source.to_json().items() if value}
    return tags


def _check_gaps(manifest: Manifest) -> None:
    """Raise ValueError where an image has no mask."""
    missing = [record.path for record in manifest.records if not record.mask]
    if missing:
        raise ValueError(
            f"{DATASET_MASK} needs a mask for every image, but {len(missing)} of {len(manifest.records)} have none, "
            f"the first is {missing[0]!r}; add the masks, or have a segmentation sweep's U-Net find them"
        )


def _earlier_model(value: str, cache_dir: Path) -> EarlierModel:
    given = fetch_file(value, cache_dir) if in_bucket(value) else real_path(Path(value))
    path = given / "best" / "model.keras" if os.path.isdir(given) else given
    if not os.path.isfile(path):
        raise ValueError(f"{EXPECTED}, got {shown(value)}: there is no {path}")
    config = _read_json(path.with_name("config.json"))
    if config.get("task") != SEGMENT:
        raise ValueError(
            f"{EXPECTED}, got {shown(value)}: {path.with_name('config.json')} does not say task: {SEGMENT}; "
            "give the folder of a sweep with that task"
        )
    check_saved_model(path)
    side, channels = config.get("image_side"), config.get("channels")
    if not (isinstance(side, int) and side > 0 and channels in (1, 3)):
        raise ValueError(f"{path.with_name('config.json')} does not say image_side and channels; {EXPECTED}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    run_id = _read_json(path.parent.parent / "summary.json").get("mlflow_run_id") or ""
    return EarlierModel(path, digest, side, channels, str(run_id))


def _read_json(path: Path) -> Mapping[str, Any]:
    """What a file holds; nothing where it is absent or no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
