"""Where the pretrained weights of a space come from, checked before anything starts."""

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cxr_models.backbones import BACKBONES, Backbone
from cxr_models.layer_table import LayerTable, weight_problems
from cxr_models.storage import written_whole
from cxr_models.trial import TrialConfig

# Where Keras fetches its ImageNet weights.
_SERVER = ("storage.googleapis.com", 443)


class WeightsError(ValueError):
    """Pretrained weights that cannot be had."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of backbone weights.

    Attributes:
        path: where it lies, or will lie once fetched.
        fetch: it is not there yet; Keras fetches it from its server.
    """

    path: Path
    fetch: bool = False


def keras_folder() -> Path:
    """Where Keras keeps what it fetched."""
    return Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models"


def find_weights(
    configs: Iterable[TrialConfig],
    tables: Mapping[tuple[str, int], LayerTable],
    weights_dir: Path | None,
    problems: list[str],
) -> dict[tuple[str, str, int], WeightsFile]:
    """The file behind each (backbone, weights, image_side) of the space; what starts from scratch has none.

    What is wrong is added to `problems`.
    """
    found: dict[tuple[str, str, int], WeightsFile] = {}
    for config in configs:
        key = config.backbone, config.weights, config.image_side
        if config.weights == "none" or key in found:
            continue
        try:
            found[key] = _find(BACKBONES[config.backbone], config, weights_dir)
        except ValueError as error:
            problems.append(f"space.weights: {error}")
            continue
        if not found[key].fetch and (
            problem := weight_problems(tables[config.backbone, config.image_side], found[key].path)
        ):
            problems.append(f"space.weights: {problem}")
    return found


def _find(backbone: Backbone, config: TrialConfig, weights_dir: Path | None) -> WeightsFile:
    if config.weights == "imagenet":
        return _imagenet(backbone, config.image_side, weights_dir)
    if config.weights == "bundled":
        if backbone.bundled_path is None:
            bundled = [row.name for row in BACKBONES.values() if row.bundled_path]
            raise ValueError(
                f"there are no bundled weights for {backbone.name}, only for {', '.join(bundled)}; "
                "use imagenet, none or the path of a .weights.h5 file"
            )
        return WeightsFile(backbone.bundled_path)
    return WeightsFile(Path(config.weights).expanduser().resolve())


def _imagenet(backbone: Backbone, side: int, weights_dir: Path | None) -> WeightsFile:
    name = backbone.imagenet_name(side)
    if not name:
        raise ValueError(f"there are no ImageNet weights for {backbone.name}; use none")
    for folder in (weights_dir, keras_folder()):
        if folder is not None and (folder / name).is_file():
            return WeightsFile((folder / name).resolve())
    if not _server_answers():
        raise ValueError(
            f"imagenet weights of {backbone.name} are in neither {weights_dir or '--weights-dir'} nor "
            f"{keras_folder()}, and {_SERVER[0]} cannot be reached to fetch them; "
            f"put the file {name} into one of the two folders"
        )
    return WeightsFile(keras_folder() / name, fetch=True)


def kept_weights(path: Path, cache_dir: Path) -> Path:
    """A copy that is named after its contents: whoever replaces the file while a sweep runs changes no trial."""
    contents = path.read_bytes()
    kept = cache_dir / "weights" / hashlib.sha256(contents).hexdigest()[:24] / path.name
    if not kept.is_file():
        with written_whole(kept) as scratch:
            scratch.write_bytes(contents)
    return kept


def _server_answers(timeout_s: float = 3.0) -> bool:
    try:
        socket.create_connection(_SERVER, timeout=timeout_s).close()
    except OSError:
        return False
    return True


def fetch_weights(backbone: Backbone, side: int) -> None:
    """Have Keras fetch a backbone's ImageNet weights into its folder, in a child process.

    Raises:
        WeightsError: Keras could not.
    """
    alpha = "" if backbone.alpha is None else f", alpha={backbone.alpha}"
    code = (
        f"import keras; keras.applications.{backbone.application}"
        f"(input_shape=({side}, {side}, 3), include_top=False, weights='imagenet'{alpha})"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if child.returncode:
        raise WeightsError(f"Keras could not fetch the ImageNet weights of {backbone.name}:\n{child.stderr[-1000:]}")
