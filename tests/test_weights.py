"""Where weights come from, and that those a sweep has begun with are those it ends with."""

import hashlib
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import pytest

from cxr_models.backbones import BACKBONES
from cxr_models.checksums import is_sound
from cxr_models.layer_table import LayerTable, layer_tables, weight_problems
from cxr_models.storage import NoSpace
from cxr_models.trial import TrialConfig
from sweep import weights
from sweep.remote import Store
from sweep.weights import WeightsFile, find_weights, kept_weights, origin_notes, source_problem
from tests.damages import DAMAGES

MOBILENET = BACKBONES["mobilenet_v2_0.35"]
BUNDLED = MOBILENET.bundled_path


def test_a_file_that_is_replaced_changes_nothing(tmp_path):
    given = tmp_path / "own.weights.h5"
    given.write_bytes(b"one")
    kept = kept_weights(given, tmp_path / "cache")
    given.write_bytes(b"two")
    assert kept.read_bytes() == b"one"
    assert kept.name == given.name, "its ending tells how it is read"
    other = kept_weights(given, tmp_path / "cache")
    assert (other.read_bytes(), other != kept) == (b"two", True)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if "sum" not in name])
def test_a_damaged_copy_is_made_anew(tmp_path, damage):
    given = tmp_path / "own.weights.h5"
    given.write_bytes(b"what was learned")
    kept = kept_weights(given, tmp_path / "cache")
    DAMAGES[damage](kept)
    with kept.open("rb") as used:
        found = kept.read_bytes()
        assert kept_weights(given, tmp_path / "cache") == kept
        assert used.read() == found, "who has the old file open keeps it"
    assert kept.read_bytes() == b"what was learned"


def test_the_same_contents_are_kept_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.weights.h5").write_bytes(b"one")
    kept = [kept_weights(tmp_path / name / "own.weights.h5", tmp_path / "cache") for name in ("a", "b")]
    assert kept[0] == kept[1]
    assert len(list((tmp_path / "cache").rglob("*.h5"))) == 1


class TestWhatASpaceMaySay:
    @pytest.mark.parametrize(
        "text",
        [
            "imagenet",
            "bundled",
            "none",
            "own.weights.h5",
            "shipped_notop.h5",
            "model.keras",
            "runs/radiography",
            f"https://host/own.weights.h5#sha256={'a' * 64}",
            f"file:///data/model.keras#sha256={'A1' * 32}",
        ],
    )
    def test_sources_that_are_read(self, text):
        assert source_problem(text) == ""

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("imagnet", "unknown 'imagnet'; did you mean 'imagenet'? known: imagenet, bundled, none, or the path of a"),
            ("https://host/own.weights.h5", "expected a URL with the checksum of its file behind it, such as https"),
            ("https://host/own.weights.h5#sha256=abc", "own.weights.h5#sha256=<64 hexadecimal digits>, got"),
            (f"ftp://host/own.weights.h5#sha256={'a' * 64}", "that begins with https, http, file, s3, gs, got 'ftp'"),
            (f"https://host/own.zip#sha256={'a' * 64}", "a file that ends in .weights.h5, .h5, .keras, got"),
        ],
    )
    def test_sources_that_are_refused(self, text, problem):
        assert problem in source_problem(text)


@pytest.fixture
def table() -> LayerTable:
    return layer_tables([(MOBILENET.name, 96)], Path("unused"))[MOBILENET.name, 96]


def by_layer(path: Path) -> None:
    """The bundled weights in the older layout, as Keras publishes them."""
    with h5py.File(path, "w") as file, h5py.File(BUNDLED) as bundled:
        file.attrs["layer_names"] = []
        for layer in bundled["layers"]:
            bundled.copy(f"layers/{layer}", file)


def find(
    source: str, tmp_path: Path, *names: str, weights_dir: Path | str | None = None
) -> tuple[list[WeightsFile], list[str]]:
    """The files found, and what is wrong."""
    configs = [TrialConfig(name, weights=source) for name in names or (MOBILENET.name,)]
    stored = layer_tables([(MOBILENET.name, 96)], tmp_path)[MOBILENET.name, 96]
    problems: list[str] = []
    tables = {(config.backbone, 96): stored for config in configs}
    found = find_weights(configs, tables, weights_dir, tmp_path / "cache", problems)
    return list(found.values()), problems


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of the bundled weights, and what it was asked for."""
    asked: list[str] = []
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(BUNDLED, folder / "own.weights.h5")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}", asked
        serving.shutdown()
        thread.join()


class TestUrls:
    digest = hashlib.sha256(BUNDLED.read_bytes()).hexdigest()

    def test_a_file_is_fetched_once_and_kept_by_its_contents(self, server, tmp_path):
        address, asked = server
        for _ in range(2):
            found, problems = find(f"{address}/own.weights.h5#sha256={self.digest.upper()}", tmp_path)
            assert problems == []
            assert found[0].path.read_bytes() == BUNDLED.read_bytes()
        assert asked == ["/own.weights.h5"]
        assert kept_weights(found[0].path, tmp_path / "cache") == found[0].path

    def test_a_damaged_file_is_fetched_again(self, server, tmp_path):
        address, asked = server
        for _ in range(2):
            (found,), problems = find(f"{address}/own.weights.h5#sha256={self.digest}", tmp_path)
            assert problems == []
            assert found.path.read_bytes() == BUNDLED.read_bytes()
            DAMAGES["a bit in the middle"](found.path)
        assert len(asked) == 2

    def test_a_full_disk_is_no_fault_of_the_network(self, small_disk):
        disk = small_disk(1)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - BUNDLED.stat().st_size // 2))
        with pytest.raises(NoSpace, match=r"expected room on the disk for .*notop\.weights\.h5"):
            find(f"{BUNDLED.as_uri()}#sha256={self.digest}", disk)
        assert not list(disk.rglob("*.h5"))

    def test_another_file_than_was_asked_for_is_refused_and_not_kept(self, server, tmp_path):
        found, problems = find(f"{server[0]}/own.weights.h5#sha256={'0' * 64}", tmp_path)
        assert found == []
        assert f"is not the file that was asked for: expected sha256 {'0' * 64}, got {self.digest}" in problems[0]
        assert not list((tmp_path / "cache").rglob("*.h5"))

    def test_what_cannot_be_fetched_is_told(self, server, tmp_path):
        _, problems = find(f"{server[0]}/absent.weights.h5#sha256={self.digest}", tmp_path)
        assert "absent.weights.h5 could not be fetched (HTTP Error 404: File not found); check" in problems[0]
        _, problems = find(f"http://127.0.0.1:1/own.weights.h5#sha256={self.digest}", tmp_path)
        assert len(problems) == 1
        assert "Connection refused" in problems[0]

    def test_a_file_address_works_too(self, tmp_path):
        found, problems = find(f"{BUNDLED.as_uri()}#sha256={self.digest}", tmp_path)
        assert problems == []
        assert found[0].path.read_bytes() == BUNDLED.read_bytes()


def saved_model(path: Path, name: str, weights: Path = BUNDLED) -> Path:
    """A file as a sweep leaves it, made of the bundled weights by hand; the network tests take real ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({"config": {"name": name}}))
        inner = path.with_suffix(".h5")
        with h5py.File(inner, "w") as file, h5py.File(weights) as backbone:
            file.create_group("layers/dense/vars")
            for part in backbone:
                backbone.copy(part, file.require_group("layers/functional"))
        archive.write(inner, "model.weights.h5")
        inner.unlink()
    return path


class TestModelsOfEarlierSweeps:
    def test_a_file_and_a_run_folder_give_the_backbone_inside(self, tmp_path, table):
        model = saved_model(tmp_path / "runs" / "first" / "best" / "model.keras", "mobilenet_v2_0_35")
        for source in (str(model), str(tmp_path / "runs" / "first")):
            found, problems = find(source, tmp_path)
            assert problems == []
            assert weight_problems(table, found[0].path) == ""
            assert kept_weights(found[0].path, tmp_path / "cache") == found[0].path
            digest = hashlib.sha256(model.read_bytes()).hexdigest()
            (note,) = origin_notes({("mobilenet_v2_0.35", source, 96): found[0]})
            assert f"starts from the model of an earlier sweep, {model} (sha256 {digest})" in note

    @pytest.mark.parametrize("damage", ["a bit in the middle", "truncated", "no sums"])
    def test_a_damaged_backbone_is_taken_out_again(self, tmp_path, table, damage):
        model = saved_model(tmp_path / "model.keras", "mobilenet_v2_0_35")
        (found,), _ = find(str(model), tmp_path)
        good = found.path.stat().st_size
        DAMAGES[damage](found.path)
        (again,), problems = find(str(model), tmp_path)
        assert problems == []
        assert again.path == found.path
        assert again.path.stat().st_size == good
        assert weight_problems(table, again.path) == ""
        assert is_sound(again.path)

    def test_a_url_of_a_model_is_its_origin(self, tmp_path):
        model = saved_model(tmp_path / "model.keras", "mobilenet_v2_0_35")
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        found, problems = find(f"{model.as_uri()}#sha256={digest}", tmp_path)
        assert problems == []
        assert str(found[0].origin) == f"{model.as_uri()} (sha256 {digest})"

    def test_another_backbone_is_named(self, tmp_path):
        model = saved_model(tmp_path / "model.keras", "efficientnet_b0")
        _, problems = find(str(model), tmp_path)
        assert f"expected a model with mobilenet_v2_0.35 inside, but {model} holds efficientnet_b0" in problems[0]
        model = saved_model(tmp_path / "other.keras", "u_net")
        assert "holds 'u_net', which is no backbone known here" in find(str(model), tmp_path)[1][0]

    def test_what_is_no_such_model_is_told(self, tmp_path):
        (tmp_path / "text.keras").write_text("no model")
        assert "is not a model that Keras saved" in find(str(tmp_path / "text.keras"), tmp_path)[1][0]
        (tmp_path / "runs" / "empty").mkdir(parents=True)
        assert "expected the folder of a finished run" in find(str(tmp_path / "runs" / "empty"), tmp_path)[1][0]
        assert "or a file that ends in .weights.h5" in find(str(tmp_path / "runs" / "absent"), tmp_path)[1][0]


class TestImagenet:
    @pytest.fixture(autouse=True)
    def offline(self, tmp_path, monkeypatch) -> None:
        self.asked = 0

        def answers() -> bool:
            self.asked += 1
            return False

        monkeypatch.setattr(weights, "_server_answers", answers)
        monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))

    def test_all_that_is_missing_is_one_error(self, tmp_path):
        found, problems = find("imagenet", tmp_path, "mobilenet_v3_small", "xception", "vgg16")
        assert found == []
        assert len(problems) == 1
        assert "imagenet weights of mobilenet_v3_small, xception, vgg16 are in neither" in problems[0]
        for name in ("mobilenet_v3_small", "xception", "vgg16"):
            assert BACKBONES[name].imagenet_name(96) in problems[0]
        assert self.asked == 1

    def test_files_in_either_folder_are_found_without_asking(self, tmp_path):
        for folder in (tmp_path / "given", tmp_path / "keras" / "models"):
            folder.mkdir(parents=True)
            kept = folder / MOBILENET.imagenet_name(96)
            by_layer(kept)
            found, problems = find("imagenet", tmp_path, weights_dir=tmp_path / "given")
            assert problems == []
            assert found[0].path == kept
            kept.unlink()
        assert self.asked == 0


class TestOfAnObjectStore:
    """`s3://` and the like; here fsspec's storage in memory, which is taken for one."""

    @pytest.fixture
    def url(self, tmp_path):
        url = f"memory://bucket/{tmp_path.name}-{os.getpid()}"
        Store(url).put("own.weights.h5", BUNDLED)
        return url

    def test_a_file_needs_no_checksum(self, url, tmp_path):
        assert source_problem(f"{url}/own.weights.h5") == ""
        found, problems = find(f"{url}/own.weights.h5", tmp_path)
        assert problems == []
        assert found[0].path.read_bytes() == BUNDLED.read_bytes()
        assert found[0].path.is_relative_to(tmp_path / "cache")

    def test_one_that_is_not_there_is_told(self, url, tmp_path):
        _, problems = find(f"{url}/absent.weights.h5", tmp_path)
        assert f"space.weights: expected to read {url}/absent.weights.h5" in problems[0]
        assert "found: nothing there" in problems[0]

    def test_a_secret_is_refused(self):
        assert "without credentials" in source_problem("s3://KEY:hidden@bucket/own.weights.h5")

    def test_a_folder_of_imagenet_weights(self, url, tmp_path, monkeypatch):
        monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
        monkeypatch.setattr(weights, "_server_answers", lambda: False)
        by_layer(tmp_path / "older.h5")
        Store(url).put(MOBILENET.imagenet_name(96), tmp_path / "older.h5")
        found, problems = find("imagenet", tmp_path, weights_dir=url)
        assert problems == []
        assert found[0].path.name == MOBILENET.imagenet_name(96)
        assert found[0].path.read_bytes() == (tmp_path / "older.h5").read_bytes()
        _, problems = find("imagenet", tmp_path, "xception", weights_dir=url)
        assert f"imagenet weights of xception are in neither {url} nor" in problems[0]
