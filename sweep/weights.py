"""Where the pretrained weights of a space come from, checked before anything starts."""

import hashlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.error import URLError
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from cxr_models.backbones import BACKBONES, Backbone
from cxr_models.checksums import is_sound, seal
from cxr_models.extraction import extract_backbone
from cxr_models.layer_table import LayerTable, weight_problems
from cxr_models.listing import real_path
from cxr_models.storage import NoSpace, told_of_space, written_whole
from cxr_models.trial import TrialConfig
from sweep.addresses import has_password
from sweep.document import unknown
from sweep.fetching import fetch_file
from sweep.remote import BUCKETS, NothingThere, in_bucket, is_url, url_problem

NAMED = ("imagenet", "bundled", "none")
ENDINGS = (".weights.h5", ".h5", ".keras")
PLACES = (
    "the path of a .weights.h5, .h5 or .keras file, a URL of one with #sha256= behind it, "
    "or the folder of an earlier run, such as runs/NAME"
)
_SCHEMES = ("https", "http", "file")
_CHECKSUM = re.compile(r"sha256=([0-9a-fA-F]{64})")
_CHUNK = 1024**2
# Where Keras fetches its ImageNet weights.
_SERVER = ("storage.googleapis.com", 443)


class WeightsError(ValueError):
    """Pretrained weights that cannot be had."""


@dataclass(frozen=True)
class Origin:
    """The model of an earlier sweep that weights were taken from.

    Attributes:
        place: its path or address.
        sha256: of the file.
        path: where it lies; None for one that was fetched, whose sweep is not known.
    """

    place: str
    sha256: str
    path: Path | None

    def __str__(self) -> str:
        return f"{self.place} (sha256 {self.sha256})"


@dataclass(frozen=True)
class WeightsFile:
    """A file of backbone weights.

    Attributes:
        path: where it lies, or will lie once fetched.
        fetch: it is not there yet; Keras fetches it from its server.
        origin: the model of an earlier sweep it was taken from.
    """

    path: Path
    fetch: bool = False
    origin: Origin | None = None


class _MissingError(ValueError):
    """A file of ImageNet weights that is not here."""


def keras_folder() -> Path:
    """Where Keras keeps what it fetched."""
    return Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models"


def source_problem(text: str) -> str:
    """Why no weights can come from what a space says, judged by the text alone, or an empty string."""
    if text in NAMED:
        return ""
    if in_bucket(text):
        return url_problem(text)
    if is_url(text):
        address, _, fragment = text.partition("#")
        scheme = urlsplit(address).scheme
        if scheme not in _SCHEMES:
            return f"expected a URL that begins with {', '.join((*_SCHEMES, *BUCKETS[:2]))}, got {scheme!r}"
        if has_password(address):
            return "expected a URL without a user and password in it, which the run folder and MLflow would show"
        if not address.endswith(ENDINGS):
            return f"expected the URL of a file that ends in {', '.join(ENDINGS)}, got {address!r}"
        if not _CHECKSUM.fullmatch(fragment):
            return (
                f"expected a URL with the checksum of its file behind it, "
                f"such as {address}#sha256=<64 hexadecimal digits>, got {text!r}"
            )
        return ""
    return "" if text.endswith(ENDINGS) or "/" in text else f"{unknown(text, NAMED)}, or {PLACES}"


def find_weights(
    configs: Iterable[TrialConfig],
    tables: Mapping[tuple[str, int], LayerTable],
    weights_dir: Path | str | None,
    cache_dir: Path,
    problems: list[str],
) -> dict[tuple[str, str, int], WeightsFile]:
    """The file behind each (backbone, weights, image_side) of the space; what starts from scratch has none.

    Files behind URLs are fetched, and weights taken out of models of earlier sweeps. ImageNet weights that Keras will
    fetch are not here yet. What is wrong is added to `problems`. `weights_dir` is a folder, or the URL of one.
    """
    found: dict[tuple[str, str, int], WeightsFile] = {}
    tried: set[tuple[str, str, int]] = set()
    missing: dict[str, str] = {}
    reachable = cache(_server_answers)  # asked at most once, however many files are not here
    for config in configs:
        key = config.backbone, config.weights, config.image_side
        if config.weights == "none" or key in tried:
            continue
        tried.add(key)
        row, table = BACKBONES[config.backbone], tables[config.backbone, config.image_side]
        try:
            file = _find(row, config, table, weights_dir, cache_dir, reachable)
        except _MissingError as error:
            missing[str(error)] = row.name
            continue
        except NoSpace:
            raise
        except (ValueError, OSError) as error:
            problems.append(f"space.weights: {error}")
            continue
        if not file.fetch and (problem := weight_problems(table, file.path)):
            problems.append(f"space.weights: {problem}")
            continue
        found[key] = file
    if missing:
        owners = ", ".join(dict.fromkeys(missing.values()))
        problems.append(
            f"space.weights: imagenet weights of {owners} are in neither {weights_dir or '--weights-dir'} nor "
            f"{keras_folder()}, and {_SERVER[0]} cannot be reached to fetch them; put the "
            f"{'file' if len(missing) == 1 else 'files'} {', '.join(missing)} into one of the two folders"
        )
    return found


def origin_notes(found: Mapping[tuple[str, str, int], WeightsFile]) -> tuple[str, ...]:
    """What a plan says of weights that come from models of earlier sweeps."""
    taken = {(backbone, str(file.origin)) for (backbone, _, _), file in found.items() if file.origin}
    return tuple(
        f"{backbone} starts from the model of an earlier sweep, {origin}" for backbone, origin in sorted(taken)
    )


def weights_inputs(found: Mapping[tuple[str, str, int], WeightsFile]) -> list[dict[str, str]]:
    """The models of earlier sweeps that weights were taken from, as `summary.json` has its `inputs`."""
    taken = {weights: file.origin for (_, weights, _), file in found.items() if file.origin}
    return [
        {"weights": weights, "model": origin.place, "sha256": origin.sha256}
        for weights, origin in sorted(taken.items())
    ]


def bundled_note(found: Mapping[tuple[str, str, int], WeightsFile], *, phantom: bool) -> tuple[str, ...]:
    """What a plan says where real images are to be learned from what was learned from drawings."""
    backbones = sorted({backbone for backbone, weights, _ in found if weights == "bundled"})
    if phantom or not backbones:
        return ()
    return (
        f"weights: bundled were pretrained on phantoms, which are drawings: {', '.join(backbones)} may do far better "
        "on these images with --weights imagenet",
    )


def _find(
    row: Backbone,
    config: TrialConfig,
    table: LayerTable,
    weights_dir: Path | str | None,
    cache_dir: Path,
    reachable: Callable[[], bool],
) -> WeightsFile:
    if config.weights == "imagenet":
        return _imagenet(row, config.image_side, weights_dir, cache_dir, reachable)
    if config.weights == "bundled":
        if row.bundled_path is None:
            bundled = [other.name for other in BACKBONES.values() if other.bundled_path]
            raise ValueError(
                f"there are no bundled weights for {row.name}, only for {', '.join(bundled)}; "
                f"use imagenet, none, or {PLACES}"
            )
        return WeightsFile(row.bundled_path)
    place, sweep_is_known = config.weights.partition("#")[0], True
    if in_bucket(config.weights):
        path = fetch_file(config.weights, cache_dir)
    elif is_url(config.weights):
        path, sweep_is_known = _downloaded(config.weights, cache_dir), False
    else:
        path, place = real_path(Path(config.weights)), ""
    if path.is_dir():
        path = path / "best" / "model.keras"
        if not path.is_file():
            raise ValueError(f"expected the folder of a finished run, but there is no {path}")
    if not path.name.endswith(ENDINGS):
        raise ValueError(
            f"expected the folder of an earlier run, or a file that ends in {', '.join(ENDINGS)}, got {path}"
        )
    if path.suffix != ".keras" or not path.is_file():
        return WeightsFile(path)
    digest = _sha256(path)
    taken = cache_dir / "weights" / digest[:24] / f"{row.name}.weights.h5"
    if not is_sound(taken):
        with told_of_space(taken):
            taken.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(taken.with_suffix(".lock")):
                extract_backbone(path, row, table, taken)
                seal(taken)
    return WeightsFile(taken, origin=Origin(place or str(path), digest, path if sweep_is_known else None))


def _imagenet(
    row: Backbone, side: int, weights_dir: Path | str | None, cache_dir: Path, reachable: Callable[[], bool]
) -> WeightsFile:
    name = row.imagenet_name(side)
    if not name:
        raise ValueError(f"there are no ImageNet weights for {row.name}; use none")
    if isinstance(weights_dir, str):
        with suppress(NothingThere):
            return WeightsFile(fetch_file(f"{weights_dir.rstrip('/')}/{name}", cache_dir))
        weights_dir = None
    for folder in (weights_dir, keras_folder()):
        if folder is not None and (folder / name).is_file():
            return WeightsFile((folder / name).resolve())
    if not reachable():
        raise _MissingError(name)
    return WeightsFile(keras_folder() / name, fetch=True)


def _downloaded(url: str, cache_dir: Path) -> Path:
    """The file behind a URL whose checksum stands behind it, fetched once.

    Raises:
        ValueError: the server cannot be reached, or gives another file.
    """
    from http.client import HTTPException
    from urllib.request import urlopen

    address, _, fragment = url.partition("#")
    expected = fragment.removeprefix("sha256=").lower()
    kept = cache_dir / "weights" / expected[:24] / PurePosixPath(unquote(urlsplit(address).path)).name
    if kept.is_file() and _sha256(kept) == expected:
        return kept
    found = hashlib.sha256()
    with written_whole(kept) as scratch:
        try:
            with urlopen(address, timeout=30) as answer, scratch.open("wb") as file:
                while chunk := answer.read(_CHUNK):
                    found.update(chunk)
                    with told_of_space(kept):
                        file.write(chunk)
                        file.flush()  # what the disk says is not to be taken for the network's word
        except NoSpace:
            raise
        except (URLError, OSError, HTTPException) as error:
            raise ValueError(
                f"{address} could not be fetched ({error}); check the address and the network, "
                "or fetch the file by other means and give its path"
            ) from error
        if found.hexdigest() != expected:
            raise ValueError(
                f"{address} is not the file that was asked for: expected sha256 {expected}, got {found.hexdigest()}"
            )
    return kept


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_weights(path: Path, cache_dir: Path) -> Path:
    """A copy that is named after its contents: whoever replaces the file while a sweep runs changes no trial."""
    if path.is_relative_to(cache_dir / "weights"):  # fetched or taken from a model, and named so already
        return path
    contents = path.read_bytes()
    digest = hashlib.sha256(contents).hexdigest()
    kept = cache_dir / "weights" / digest[:24] / path.name
    if not kept.is_file() or _sha256(kept) != digest:
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
