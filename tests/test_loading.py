"""Files from elsewhere are read and never run: arrays, weights, saved models."""

import ast
import io
import json
import pickle
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from cxr_models.backbones import BACKBONES, load_backbone_weights
from cxr_models.extraction import MOST_BYTES, check_saved_model, extract_backbone
from cxr_models.layer_table import layer_tables, weight_problems
from sweep.lung_masks import find_lung_masks
from sweep.space import Axis, Constant, Space

ROOT = Path(__file__).parent.parent
SOURCES = [path for package in ("cxr_models", "sweep") for path in sorted((ROOT / package).glob("*.py"))]
MOBILENET = BACKBONES["mobilenet_v2_0.35"]
# They run what is in a file, or are for nothing else here.
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "jsonpickle"}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def unsafe_calls(source: str) -> list[str]:
    """What would run code out of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in UNSAFE]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE:
            found.append(str(node.module))
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "safe_mode", "unsafe", "weights_only"):
            right = {"allow_pickle": False, "safe_mode": True}
            if not (isinstance(node.value, ast.Constant) and node.value.value is right.get(node.arg)):
                found.append(node.arg)
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in ("enable_unsafe_deserialization", "unsafe_load", "read_pickle", "eval", "exec"):
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_is_unpickled_or_loaded_unsafely(path):
    assert unsafe_calls(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from torch import nn", "np.load(p, allow_pickle=True)", "load_model(p, safe_mode=False)",
     "np.load(p, allow_pickle=flag)", "keras.config.enable_unsafe_deserialization()", "pd.read_pickle(p)"],
)  # fmt: skip
def test_it_would_be_seen(source):
    assert unsafe_calls(source)


def archive(path: Path, config: object, weights: bytes = b"weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", json.dumps(config))
        file.writestr("model.weights.h5", weights)
    return path


@pytest.fixture(scope="module")
def with_lambda(tmp_path_factory) -> Path:
    """A model with a Lambda layer, as Keras saves it."""
    import keras

    folder = tmp_path_factory.mktemp("lambda") / "best"
    folder.mkdir()
    inputs = keras.Input((8, 8, 1))
    outputs = keras.layers.Lambda(lambda x: x * 2.0)(inputs)
    keras.Model(inputs, outputs, name="mobilenet_v2_0_35").save(folder / "model.keras")
    (folder / "config.json").write_text(json.dumps({"task": "segment", "image_side": 8, "channels": 1}))
    return folder / "model.keras"


def test_a_lambda_layer_is_refused_as_weights(with_lambda, tmp_path):
    table = layer_tables({(MOBILENET.name, 96)}, tmp_path)[MOBILENET.name, 96]
    with pytest.raises(ValueError, match=r"has 'Lambda', '__lambda__' in it, which can run any code"):
        extract_backbone(with_lambda, MOBILENET, table, tmp_path / "x.weights.h5")


def lung_masks(value: str, manifest: object = None) -> list[str]:
    problems: list[str] = []
    space = Space({"image_side": Axis("image_side", Constant(8)), "lung_mask": Axis("lung_mask", Constant(value))})
    find_lung_masks(space, manifest, problems, Path("nowhere"))
    return problems


def test_a_lambda_layer_is_refused_as_lung_masks(with_lambda):
    (problem,) = lung_masks(str(with_lambda))
    assert "space.lung_mask: " in problem
    assert "which can run any code when it is loaded" in problem


def test_an_older_file_is_no_u_net(with_lambda):
    """Keras loads `.h5` in a way that knows less of safety."""
    older = with_lambda.with_name("model.h5")
    older.write_bytes(b"x")
    (problem,) = lung_masks(str(older))
    assert "expected a file that ends in .keras" in problem


@pytest.mark.parametrize("value", ["~nobody-such/x", "a\0b", "x" * 300])
def test_a_place_that_is_none_is_told(value):
    (problem,) = lung_masks(value)
    assert problem.startswith("space.lung_mask: ")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_name": "Functional", "module": "keras", "config": {"layers": [{"class_name": "Lambda"}]}}, "'Lambda'"),
        ({"class_name": "X", "module": "os", "config": {}}, "'X' of os"),
        ({"config": {"a": {"class_name": "F", "module": "evil.x"}}}, "'F' of evil.x"),
        ([], "has no config"),
        ({"config": 3}, "has no config"),
    ],
)
def test_code_in_a_model_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        check_saved_model(archive(tmp_path / "model.keras", config))


def test_built_in_layers_pass(tmp_path):
    import keras

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2, activation="relu"), keras.layers.Rescaling(2.0)])
    model.save(tmp_path / "model.keras")
    check_saved_model(tmp_path / "model.keras")


def test_what_is_no_archive_is_told(tmp_path):
    for data in (b"", b"PK\3\4", b"x" * 999):
        (tmp_path / "model.keras").write_bytes(data)
        with pytest.raises(ValueError, match="is not a model that Keras saved"):
            check_saved_model(tmp_path / "model.keras")
    deep = '{"config": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as file:
        file.writestr("config.json", deep)
        file.writestr("model.weights.h5", b"")
    with pytest.raises(ValueError, match="is not a model that Keras saved"):
        check_saved_model(tmp_path / "model.keras")
    assert MOST_BYTES > 1e9


def test_pickled_contents_of_weights_do_not_run(tmp_path):
    import keras

    mark = tmp_path / "ran"
    pickled = pickle.dumps(Payload(mark))
    table = layer_tables({(MOBILENET.name, 96)}, tmp_path)[MOBILENET.name, 96]
    file = tmp_path / "x.weights.h5"
    with h5py.File(file, "w") as weights:
        weights["layers/conv2d/vars/0"] = np.void(pickled)
        weights.attrs["x"] = np.void(pickled)
    assert "does not fit" in weight_problems(table, file)
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(1, 3)])
    with pytest.raises(ValueError, match="Layer 'conv2d"):
        load_backbone_weights(MOBILENET, model, file)
    file.write_bytes(pickled)
    assert "is not an HDF5 file" in weight_problems(table, file)
    array = io.BytesIO()
    np.save(array, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    array.seek(0)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(array)
    assert not mark.exists()
    pickle.loads(pickled)  # it would have been seen
    assert mark.exists()


def test_damaged_weights_inside_a_model_are_told(tmp_path):
    table = layer_tables({(MOBILENET.name, 96)}, tmp_path)[MOBILENET.name, 96]
    empty = io.BytesIO()
    h5py.File(empty, "w").close()
    for weights in (b"", b"x" * 99, empty.getvalue()):
        model = archive(tmp_path / "m.keras", {"config": {"name": "mobilenet_v2_0_35"}}, weights)
        with pytest.raises(ValueError, match=r"the weights in .* cannot be read"):
            extract_backbone(model, MOBILENET, table, tmp_path / "x.weights.h5")
