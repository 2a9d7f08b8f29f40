"""The backbone's weights out of a model that was saved whole, without Keras.

A `.keras` file is a zip archive with the model's `config.json` and `model.weights.h5`. In the latter every nested model
is a group, laid out as the `.weights.h5` file of that model alone would be.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cxr_models.backbones import BACKBONES, Backbone
from cxr_models.layer_table import LayerTable, stored_shapes, weight_shapes
from cxr_models.storage import written_whole

MOST_BYTES = 4_000_000_000  # of a model unpacked; the largest known here takes a tenth
# What Keras makes functions of from text; its safe mode refuses them too, but only once it is loaded.
CODE_CLASSES = ("Lambda", "__lambda__", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "TFSMLayer")


def extract_backbone(model: Path, backbone: Backbone, table: LayerTable, target: Path) -> None:
    """Write the weights of the backbone inside a model of an earlier sweep, as a `.weights.h5` file.

    Args:
        model: a `.keras` file as a sweep writes it.
        backbone: that must be inside.
        table: the backbone's layers, at any image side.
        target: the file to write.

    Raises:
        ValueError: the file is no such model, brings code of its own, or holds another backbone.
    """
    config, weights = _parts(model, "config.json", "model.weights.h5")
    name = _checked_config(model, config)["config"].get("name")
    held = {row.name.replace(".", "_"): row.name for row in BACKBONES.values()}.get(str(name))
    if held != backbone.name:
        what = held or f"{name!r}, which is no backbone known here"
        raise ValueError(f"expected a model with {backbone.name} inside, but {model} holds {what}")
    try:
        _copy_backbone(model, weights, backbone, table, target)
    except (OSError, KeyError, RuntimeError) as error:  # as h5py tells of a damaged file
        raise ValueError(f"the weights in {model} cannot be read ({error})") from error


def check_saved_model(model: Path) -> None:
    """Refuse a file that Keras would load in its older, unsafe way, or that brings code of its own.

    Raises:
        ValueError: it is no `.keras` archive, or there is a layer in it that is no built-in one, such as Lambda.
    """
    if model.suffix != ".keras":
        raise ValueError(f"expected a file that ends in .keras, got {model}")
    config, _ = _parts(model, "config.json", "model.weights.h5")
    _checked_config(model, config)


def _parts(model: Path, *names: str) -> list[bytes]:
    """Files in the archive.

    Raises:
        ValueError: it is none, or they are absent, damaged or absurdly large.
    """
    try:
        with zipfile.ZipFile(model) as archive:
            if sum(archive.getinfo(name).file_size for name in names) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES:,} bytes unpacked")
            return [archive.read(name) for name in names]
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{model} is not a model that Keras saved as a .keras file ({error})") from error


def _checked_config(model: Path, text: bytes) -> dict[str, Any]:
    """The model's `config.json`, in which every layer is a built-in one of Keras."""
    try:
        found = json.loads(text)
        strange = sorted(_strange_classes(found))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{model} is not a model that Keras saved as a .keras file ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise ValueError(f"{model} is not a model that Keras saved as a .keras file (its config.json has no config)")
    if strange:
        raise ValueError(
            f"{model} has {', '.join(strange)} in it, which can run any code when it is loaded; "
            "expected a model of built-in layers, as a sweep saves it"
        )
    return found


def _strange_classes(value: Any) -> Iterator[str]:
    """What is no built-in class of Keras, or holds code: a Lambda layer, a function, a wrapped module."""
    if isinstance(value, list):
        for item in value:
            yield from _strange_classes(item)
    if not isinstance(value, dict):
        return
    name, module = value.get("class_name"), value.get("module")
    if isinstance(name, str):
        outside = isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins")
        if name in CODE_CLASSES or outside:
            yield f"{name!r}" + (f" of {module}" if outside else "")
    for item in value.values():
        yield from _strange_classes(item)


def _copy_backbone(model: Path, weights: bytes, backbone: Backbone, table: LayerTable, target: Path) -> None:
    import h5py

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
