"""The part of the report that only a segmentation has: how well each image was segmented, and pictures of it."""

import base64
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sweep.record import RunFolder


@dataclass(frozen=True)
class OverlayRow:
    """A picture for the report.

    Attributes:
        picture: as a data URI.
    """

    kind: str
    image: str
    split: str
    dice: float
    iou: float
    picture: str


def overlay_rows(folder: RunFolder) -> list[OverlayRow]:
    """The overlays of the best U-Net, the worst image first; none where the sweep has none."""
    if not folder.masks.is_file():
        return []
    table = pd.read_csv(folder.masks, keep_default_na=False, encoding_errors="surrogateescape")
    shown = table[table["overlay"] != ""].sort_values("dice", kind="stable")
    return [
        OverlayRow(
            kind=str(row["overlay"]).partition("-")[0],
            image=str(row["image"]),
            split=str(row["split"]),
            dice=float(row["dice"]),
            iou=float(row["iou"]),
            picture=_data_uri(folder.overlays / str(row["overlay"])),
        )
        for row in shown.to_dict("records")
        if (folder.overlays / str(row["overlay"])).is_file()
    ]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
