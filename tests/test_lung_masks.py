"""Where lung masks come from is checked before anything starts, and told."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_models.dataset import DataError, Manifest, read_manifest
from sweep.lung_masks import LungMasks, find_lung_masks, input_tags
from sweep.segment_plan import with_masks
from sweep.space import Axis, Choice, Constant, Space


def manifest_of(root: Path, masks: int) -> Manifest:
    """Four images, the first of them with masks."""
    for number in range(4):
        for kind in ("images", "masks")[: 2 if number < masks else 1]:
            folder = root / "ab"[number % 2] / kind
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((18, 18), 40 * number, np.uint8)).save(folder / f"{number}.png")
    return read_manifest(root)


def space_of(*values: str) -> Space:
    return Space({"image_side": Axis("image_side", Choice((8, 16))), "lung_mask": Axis("lung_mask", Choice(values))})


@pytest.fixture
def earlier(tmp_path) -> Path:
    run = tmp_path / "runs" / "lungs"
    (run / "best").mkdir(parents=True)
    with zipfile.ZipFile(run / "best" / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Functional", "module": "keras", "config": {}}))
        archive.writestr("model.weights.h5", b"weights")
    (run / "best" / "config.json").write_text(json.dumps({"task": "segment", "image_side": 32, "channels": 1}))
    (run / "summary.json").write_text(json.dumps({"mlflow_run_id": "abc"}))
    return run


def test_the_masks_of_the_data_set(tmp_path):
    problems: list[str] = []
    manifest = manifest_of(tmp_path / "all", 4)
    assert find_lung_masks(space_of("none", "dataset"), manifest, problems, tmp_path) == (
        LungMasks("dataset", (8, 16), None),
    )
    assert problems == []
    gaps = manifest_of(tmp_path / "some", 3)
    assert find_lung_masks(space_of("none", "dataset"), gaps, problems, tmp_path) == ()
    (problem,) = problems
    assert "space.lung_mask: dataset needs a mask for every image, but 1 of 4 have none" in problem


@pytest.mark.parametrize("given", ["", "best/model.keras"])
def test_an_earlier_sweep_is_an_input(tmp_path, earlier, given):
    problems: list[str] = []
    value = str(earlier / given)
    (found,) = find_lung_masks(space_of("none", value), manifest_of(tmp_path / "set", 0), problems, tmp_path)
    assert problems == []
    assert (found.sides, found.model.image_side, found.model.mlflow_run_id) == ((8, 16), 32, "abc")
    assert value in found.note
    digest = hashlib.sha256((earlier / "best" / "model.keras").read_bytes()).hexdigest()
    assert found.to_json()["sha256"] == digest
    tags = input_tags([found])
    assert tags["input.lung_mask.mlflow_run_id"] == "abc"
    assert tags["input.lung_mask.model"].endswith("best/model.keras")


def test_what_is_no_segmentation_is_refused(tmp_path, earlier):
    problems: list[str] = []
    manifest = manifest_of(tmp_path / "set", 0)
    find_lung_masks(space_of(str(tmp_path / "nowhere")), manifest, problems, tmp_path)
    (earlier / "best" / "config.json").write_text("{}")
    find_lung_masks(space_of(str(earlier)), manifest, problems, tmp_path)
    assert "expected none, dataset, or the run folder (or best/model.keras) of a segmentation sweep" in problems[0]
    assert "there is no" in problems[0]
    assert "does not say task: segment" in problems[1]


def test_a_sweep_without_masks_asks_nothing(tmp_path):
    space = Space({name: Axis(name, Constant(value)) for name, value in (("image_side", 8), ("lung_mask", "none"))})
    assert find_lung_masks(space, manifest_of(tmp_path, 0), [], tmp_path) == ()


def test_images_without_a_mask_are_left_out_and_counted(tmp_path):
    manifest, notes = with_masks(manifest_of(tmp_path / "some", 3))
    assert (len(manifest.records), manifest.unmasked) == (3, 1)
    assert notes == ("images without a mask, which are left out: 1",)
    with pytest.raises(DataError, match="expected lung masks for task: segment\n  found: 4 images in"):
        with_masks(manifest_of(tmp_path / "none", 0))
