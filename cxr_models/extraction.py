"""The backbone's weights out of a model that was saved whole, without Keras.

A `.keras` file is a zip archive with the model's `config.json` and `model.weights.h5`. In the latter every nested model
is a group, laid out as the `.weights.h5` file of that model alone would be.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from cxr_models.backbones import BACKBONES, Backbone
from cxr_models.layer_table import LayerTable, stored_shapes, weight_shapes
from cxr_models.storage import written_whole


def extract_backbone(model: Path, backbone: Backbone, table: LayerTable, target: Path) -> None:
    """Write the weights of the backbone inside a model of an earlier sweep, as a `.weights.h5` file.

    Args:
        model: a `.keras` file as a sweep writes it.
        backbone: that must be inside.
        table: the backbone's layers, at any image side.
        target: the file to write.

    Raises:
        ValueError: the file is no such model, or it holds another backbone.
    """
    import h5py

    try:
        with zipfile.ZipFile(model) as archive:
            name = json.loads(archive.read("config.json"))["config"]["name"]
            weights = archive.read("model.weights.h5")
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{model} is not a model that Keras saved as a .keras file ({error})") from error
    held = {row.name.replace(".", "_"): row.name for row in BACKBONES.values()}.get(name)
    if held != backbone.name:
        what = held or f"{name!r}, which is no backbone known here"
        raise ValueError(f"expected a model with {backbone.name} inside, but {model} holds {what}")
    with h5py.File(io.BytesIO(weights)) as file:
        nested = [group for group in file["layers"].values() if "layers" in group]
        fitting = [group for group in nested if stored_shapes(group) == weight_shapes(table)]
        if len(fitting) != 1:
            raise ValueError(
                f"{model} names {backbone.name}, but {len(fitting)} of its parts have the {table.parameters:,} "
                f"parameters of that backbone, expected exactly one; use the model of a sweep of this version"
            )
        with written_whole(target) as scratch, h5py.File(scratch, "w") as written:
            for part in fitting[0]:
                fitting[0].copy(part, written)
