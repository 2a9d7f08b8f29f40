"""A backbone's layers as data: what the plan needs to know about a network without building it.

A table is made once by a child process (Keras takes seconds to import) and stored; those of the shipped search
spaces lie in the package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_models.backbones import BACKBONES, Backbone, build_backbone
from cxr_models.checksums import is_sound, seal
from cxr_models.storage import written_whole

if TYPE_CHECKING:
    import keras

PACKAGED = Path(__file__).parent / "layer_tables"
_FORMAT = 1


@dataclass(frozen=True)
class Layer:
    """One layer of a backbone.

    Attributes:
        kind: Keras class name.
        shapes: shape of each weight, in Keras' order.
        trainable: for each weight, whether training may move it (a batch norm's moving statistics: never).
        inputs: names of the layers it reads.
        output: shape of its output without the batch axis.
    """

    name: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    trainable: tuple[bool, ...]
    inputs: tuple[str, ...]
    output: tuple[int, ...]

    @property
    def is_batch_norm(self) -> bool:
        return self.kind == "BatchNormalization"

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def trainable_parameters(self) -> int:
        return sum(prod(shape) for shape, moves in zip(self.shapes, self.trainable, strict=True) if moves)


@dataclass(frozen=True)
class LayerTable:
    """The layers of one backbone at one image side, in the order `keras.applications` lists them."""

    backbone: str
    image_side: int
    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of the last feature map, (height, width, channels)."""
        return self.layers[-1].output

    def to_json(self) -> str:
        """As text, one layer a line."""
        rows = ",\n".join(
            json.dumps([layer.name, layer.kind, layer.shapes, layer.trainable, layer.inputs, layer.output])
            for layer in self.layers
        )
        head = f'{{"format": {_FORMAT}, "backbone": "{self.backbone}", "image_side": {self.image_side}'
        return f'{head}, "layers": [\n{rows}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> LayerTable:
        """Read what `to_json` wrote; ValueError where another format did."""
        values = json.loads(text)
        if values.get("format") != _FORMAT:
            raise ValueError(f"expected a layer table of format {_FORMAT}, got format {values.get('format')!r}")
        layers = tuple(
            Layer(name, kind, tuple(map(tuple, shapes)), tuple(trainable), tuple(inputs), tuple(output))
            for name, kind, shapes, trainable, inputs, output in values["layers"]
        )
        return cls(values["backbone"], values["image_side"], layers)


def read_table(backbone: Backbone, model: keras.Model) -> LayerTable:
    """Read the layers off a built backbone."""
    layers = {id(layer) for layer in model.layers}

    def row(layer: keras.Layer) -> Layer:
        trainable = {id(weight) for weight in layer.trainable_weights}
        return Layer(
            name=layer.name,
            kind=type(layer).__name__,
            shapes=tuple(tuple(weight.shape) for weight in layer.weights),
            trainable=tuple(id(weight) in trainable for weight in layer.weights),
            inputs=tuple(dict.fromkeys(_read_layers(layer._inbound_nodes[0], layers))),
            output=tuple(layer.output.shape[1:]),
        )

    return LayerTable(backbone.name, model.input_shape[1], tuple(map(row, model.layers)))


def _read_layers(node: Any, layers: Set[int]) -> Iterator[str]:
    """Names of the layers a node of Keras' graph reads, past operations that are no layers.

    ConvNeXt adds what goes around a block with an operation, MobileNetV3 scales so inside squeeze-excite.
    """
    for parent in node.parent_nodes:
        if id(parent.operation) in layers:
            yield parent.operation.name
        else:
            yield from _read_layers(parent, layers)


def layer_tables(wanted: Iterable[tuple[str, int]], cache_dir: Path) -> dict[tuple[str, int], LayerTable]:
    """The tables of (backbone name, image side): from the package, else from `cache_dir`, else made now.

    All that have to be made are made by one child process.

    Raises:
        ValueError: a backbone cannot be built at its side.
    """
    places: dict[tuple[str, int], Path] = {}
    missing: dict[tuple[str, int], Path] = {}
    for name, side in wanted:
        smallest = BACKBONES[name].smallest_side
        if side < smallest:
            raise ValueError(f"{name} needs an image side of at least {smallest}, but got {side}")
        packaged = PACKAGED / f"{name}-{side}.json"
        stored = cache_dir / "layer_tables" / packaged.name
        places[name, side] = packaged if packaged.is_file() else stored
        if not packaged.is_file() and not is_sound(stored):
            missing[name, side] = stored
    if missing:
        with ExitStack() as stack:
            _make_tables({key: stack.enter_context(written_whole(path)) for key, path in missing.items()})
        for path in missing.values():
            seal(path)
    return {key: LayerTable.from_json(path.read_text()) for key, path in places.items()}


def _make_tables(files: Mapping[tuple[str, int], Path]) -> None:
    arguments = [str(part) for (name, side), path in files.items() for part in (name, side, path)]
    child = subprocess.run([sys.executable, "-m", __name__, *arguments], capture_output=True, text=True, check=False)
    if child.returncode:
        raise ValueError(f"Keras could not build {', '.join(map(str, files))}:\n{child.stderr[-2000:]}")


def weight_problems(table: LayerTable, path: Path) -> str:
    """Why the weights in `path` do not fit the backbone, or an empty string.

    Reads Keras' `.weights.h5` layout, in which a layer is named by its class and a running number, and Keras' older
    `.h5` files of ImageNet weights, in which it is named as in the model.
    """
    import h5py

    if not path.is_file():
        return f"no such file: {path}"
    try:
        with h5py.File(path) as file:
            found = stored_shapes(file)
            older = any(name.startswith("layer_names") for name in file.attrs)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        return f"{path} is not an HDF5 file of Keras weights ({error})"
    if older == path.name.endswith(".weights.h5"):
        layout, ending = ("older", ".h5, but not in .weights.h5") if older else ("newer", ".weights.h5")
        return f"{path} has Keras' {layout} layout, which is told by its name: let it end in {ending}"
    expected = weight_shapes(table)
    if expected == found:
        return ""
    size = sum(prod(shape) for shapes in found for shape in shapes)
    return (
        f"{path} does not fit {table.backbone}: it holds {len(found)} layers with {size:,} parameters, "
        f"expected {len(expected)} layers with {table.parameters:,}"
    )


def weight_shapes(table: LayerTable) -> list[list[tuple[int, ...]]]:
    """The weight shapes of each layer that has weights, sorted within the layer, and by layer."""
    return sorted(sorted(layer.shapes) for layer in table.layers if layer.shapes)


def stored_shapes(file: object) -> list[list[tuple[int, ...]]]:
    """What `weight_shapes` gives, of an open HDF5 file of Keras weights or a group in one."""
    import h5py

    layers: dict[str, list[tuple[int, ...]]] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            parts = name.split("/")
            key = parts[parts.index("layers") + 1] if "layers" in parts else parts[0]
            layers.setdefault(key, []).append(tuple(item.shape))

    file.visititems(visit)  # type: ignore[attr-defined]
    return sorted(sorted(shapes) for shapes in layers.values())


def _main(arguments: list[str]) -> None:
    for name, side, path in zip(arguments[0::3], arguments[1::3], arguments[2::3], strict=True):
        backbone = BACKBONES[name]
        Path(path).write_text(read_table(backbone, build_backbone(backbone, int(side))).to_json())


if __name__ == "__main__":
    _main(sys.argv[1:])
