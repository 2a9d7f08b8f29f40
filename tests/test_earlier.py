"""Images that the model of an earlier sweep has learned from are found among today's, and only those."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_models.audit import EARLIER_MODEL_SAW_TEST, LEAKS, Audit, Severity
from cxr_models.dataset import Manifest, read_manifest
from cxr_models.splits import assign_splits, write_split_csv
from cxr_models.trial import TEST, TRAIN, VAL
from sweep.earlier import (
    MASKS_SAW_TEST,
    MAY_HAVE_SEEN_TEST,
    SAW_VALIDATION,
    UNKNOWN,
    EarlierModel,
    earlier_findings,
    earlier_models,
    learned_from,
)
from sweep.lung_masks import EarlierModel as UNet
from sweep.lung_masks import LungMasks
from sweep.weights import Origin, WeightsFile
from tests import layouts


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    """Sixty images of three classes."""
    return read_manifest(layouts.class_folders(tmp_path_factory.mktemp("xrays"), images=20))


def run_folder(
    path: Path,
    manifest: Manifest,
    splits: Sequence[str],
    *,
    config: dict[str, Any] | None = None,
    inputs: Sequence[dict[str, str]] = (),
) -> Path:
    """What a finished run leaves; its model."""
    (path / "best").mkdir(parents=True)
    write_split_csv(path / "split.csv", manifest, splits)
    (path / "best" / "config.json").write_text(json.dumps(config or {"weights": "imagenet", "lung_mask": "none"}))
    (path / "summary.json").write_text(json.dumps({"inputs": list(inputs)}))
    model = path / "best" / "model.keras"
    model.write_bytes(b"model")
    return model


def found(
    model: Path | None, manifest: Manifest, splits: Sequence[str], *, chosen_by: str = VAL, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """The findings about one model, by name."""
    models = [EarlierModel("The model", learned_from(model))]
    found = earlier_findings(models, manifest, splits, chosen_by=chosen_by, allow=allow)
    return {finding.name: finding for finding in found}


def part(manifest: Manifest, splits: Sequence[str], name: str) -> set[str]:
    return {record.path for record, own in zip(manifest.records, splits, strict=True) if own == name}


def test_another_split_leaks_and_every_image_is_named(tmp_path, manifest):
    earlier, today = assign_splits(manifest, seed=1), assign_splits(manifest, seed=2)
    model = run_folder(tmp_path / "first", manifest, earlier)
    seen = part(manifest, today, TEST) - part(manifest, earlier, TEST)
    assert seen
    assert seen != part(manifest, today, TEST), "some are in both test sets"
    leak = found(model, manifest, today)[EARLIER_MODEL_SAW_TEST]
    assert (leak.severity, leak.stops) == (Severity.LEAK, True)
    assert {example.paths[0] for example in leak.examples} == seen
    tested = len(part(manifest, today, TEST))
    assert f"The model has learned from {len(seen)} of the {tested} test images." in leak.evidence
    allowed = found(model, manifest, today, allow=[EARLIER_MODEL_SAW_TEST])[EARLIER_MODEL_SAW_TEST]
    assert (allowed.allowed, allowed.stops) == (True, False)
    assert EARLIER_MODEL_SAW_TEST in LEAKS


def test_the_same_split_does_not_but_trials_are_chosen_by_what_the_model_knows(tmp_path, manifest):
    splits = assign_splits(manifest, seed=1)
    model = run_folder(tmp_path / "first", manifest, splits)
    findings = found(model, manifest, splits)
    assert list(findings) == [SAW_VALIDATION]
    assert findings[SAW_VALIDATION].severity is Severity.WARNING
    assert {example.paths[0] for example in findings[SAW_VALIDATION].examples} == part(manifest, splits, VAL)
    folded = found(model, manifest, splits, chosen_by=TRAIN)[SAW_VALIDATION]
    assert {example.paths[0] for example in folded.examples} == part(manifest, splits, TRAIN)


def test_a_model_of_other_images_is_no_finding(tmp_path, manifest):
    other = read_manifest(layouts.nested(tmp_path / "other"))
    model = run_folder(tmp_path / "first", other, assign_splits(other, seed=0))
    assert found(model, manifest, assign_splits(manifest, seed=1)) == {}


def test_pictures_are_known_again_by_other_names_and_formats(tmp_path, manifest):
    splits = assign_splits(manifest, seed=1)
    model = run_folder(tmp_path / "first", manifest, [TRAIN] * len(splits))
    for number, record in enumerate(manifest.records):
        target = tmp_path / "again" / record.label / f"{number}.bmp"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(manifest.root / record.path).save(target)
    again = read_manifest(tmp_path / "again")
    today = assign_splits(again, seed=3)
    leak = found(model, again, today)[EARLIER_MODEL_SAW_TEST]
    assert {example.paths[0] for example in leak.examples} == part(again, today, TEST)


def test_equal_paths_of_other_pictures_are_a_warning(tmp_path, manifest):
    """The same images at another size, or a data set that happens to have the same names."""
    model = run_folder(tmp_path / "first", manifest, [TRAIN] * len(manifest.records))
    for record in manifest.records:
        target = tmp_path / "small" / record.path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(manifest.root / record.path).resize((24, 24)).save(target)
    small = read_manifest(tmp_path / "small")
    splits = assign_splits(small, seed=1)
    findings = found(model, small, splits)
    assert list(findings) == [MAY_HAVE_SEEN_TEST]
    assert findings[MAY_HAVE_SEEN_TEST].severity is Severity.WARNING
    assert {example.paths[0] for example in findings[MAY_HAVE_SEEN_TEST].examples} == part(small, splits, TEST)


def test_a_run_without_digests_is_compared_by_path(tmp_path, manifest):
    splits = assign_splits(manifest, seed=1)
    model = run_folder(tmp_path / "first", manifest, [TRAIN] * len(splits))
    table = tmp_path / "first" / "split.csv"
    table.write_text("\n".join(line.rpartition(",")[0] for line in table.read_text().splitlines()))
    leak = found(model, manifest, splits)[EARLIER_MODEL_SAW_TEST]
    assert {example.paths[0] for example in leak.examples} == part(manifest, splits, TEST)


@pytest.mark.parametrize("lost", ["split.csv", "summary.json", "best/config.json"])
def test_what_is_not_known_is_a_warning(tmp_path, manifest, lost):
    splits = assign_splits(manifest, seed=1)
    model = run_folder(tmp_path / "first", manifest, splits)
    (tmp_path / "first" / lost).unlink()
    findings = found(model, manifest, splits)
    assert list(findings) == [UNKNOWN]
    assert findings[UNKNOWN].severity is Severity.WARNING
    assert "Test images may be among them." in findings[UNKNOWN].evidence


def test_a_model_away_from_its_run_or_from_an_address_is_not_known(tmp_path, manifest):
    splits = assign_splits(manifest, seed=1)
    moved = shutil.copy(run_folder(tmp_path / "first", manifest, splits), tmp_path / "model.keras")
    assert list(found(Path(moved), manifest, splits)) == [UNKNOWN]
    assert list(found(None, manifest, splits)) == [UNKNOWN]


class TestAncestors:
    """A model that was made from another one has learned from that one's images too."""

    def chain(self, tmp_path: Path, manifest: Manifest, config: dict[str, Any], key: str) -> tuple[Path, Path]:
        other = read_manifest(layouts.nested(tmp_path / "other"))
        first = run_folder(tmp_path / "first", manifest, [TRAIN] * len(manifest.records))
        inputs = [{key: "runs/first", "model": str(first)}]
        splits = assign_splits(other, seed=0)
        return first, run_folder(tmp_path / "second", other, splits, config=config, inputs=inputs)

    def test_it_leaks(self, tmp_path, manifest):
        splits = assign_splits(manifest, seed=1)
        first, second = self.chain(tmp_path, manifest, {"weights": "runs/first", "lung_mask": "none"}, "weights")
        leak = found(second, manifest, splits)[EARLIER_MODEL_SAW_TEST]
        assert {example.paths[0] for example in leak.examples} == part(manifest, splits, TEST)
        first.unlink()
        (tmp_path / "first" / "split.csv").unlink()
        assert list(found(second, manifest, splits)) == [UNKNOWN]

    def test_not_where_the_best_model_started_from_elsewhere(self, tmp_path, manifest):
        _, second = self.chain(tmp_path, manifest, {"weights": "imagenet", "lung_mask": "none"}, "weights")
        assert found(second, manifest, assign_splits(manifest, seed=1)) == {}

    def test_a_model_that_no_input_names_is_not_known(self, tmp_path, manifest):
        splits = assign_splits(manifest, seed=1)
        model = run_folder(tmp_path / "first", manifest, splits, config={"weights": "runs/gone", "lung_mask": "none"})
        assert UNKNOWN in found(model, manifest, splits)

    def test_runs_that_name_each_other_come_to_an_end(self, tmp_path, manifest):
        model = tmp_path / "first" / "best" / "model.keras"
        inputs = [{"weights": "runs/first", "model": str(model)}]
        splits = assign_splits(manifest, seed=1)
        run_folder(tmp_path / "first", manifest, splits, config={"weights": "runs/first"}, inputs=inputs)
        assert learned_from(model).whole


def test_every_model_that_a_sweep_builds_on_is_named(tmp_path, manifest):
    splits = assign_splits(manifest, seed=1)
    model = run_folder(tmp_path / "first", manifest, [TRAIN] * len(splits))
    origin = Origin(str(model), "0" * 64, model)
    weights = {(name, "runs/first", 96): WeightsFile(Path("w.h5"), origin=origin) for name in ("vgg16", "resnet50")}
    weights["densenet121", "imagenet", 96] = WeightsFile(Path("imagenet.h5"))
    masks = (LungMasks("dataset", (96,), None), LungMasks("runs/first", (96,), UNet(model, "0" * 64, 32, 1, "")))
    models = earlier_models(weights, masks)
    assert [each.who for each in models] == [
        f"The model that resnet50 and vgg16 start from ({model})",
        f"The U-Net that finds lungs ({model})",
    ]
    leak, _, masks_seen = earlier_findings(models, manifest, splits, chosen_by=VAL)
    tested = len(part(manifest, splits, TEST))
    assert f"start from ({model}) has learned from {tested} of the {tested} test images. They are" in leak.evidence
    assert len(leak.examples) == len(masks_seen.examples) == tested
    audit = Audit(60, 60, {}, None, ()).with_findings([leak, masks_seen])
    assert audit.leaks == (leak,)
    assert (masks_seen.name, masks_seen.severity) == (MASKS_SAW_TEST, Severity.WARNING)
    assert f"has learned from the masks of {tested} of the {tested} test images, though from no" in masks_seen.evidence


def test_blank_digests_are_not_equal(tmp_path, manifest):
    """Records without a digest, as of data read elsewhere, are nobody's copies."""
    bare = Manifest(
        manifest.root,
        "",
        tuple(type(r)(**{**r.__dict__, "pixels": "", "path": f"x{n}"}) for n, r in enumerate(manifest.records)),
        (),
        0,
    )
    splits = assign_splits(manifest, seed=1)
    model = run_folder(tmp_path / "first", bare, [TRAIN] * len(splits))
    assert found(model, manifest, splits) == {}
    model = run_folder(tmp_path / "second", manifest, [TRAIN] * len(splits))
    assert found(model, bare, splits) == {}
    assert np.unique([record.pixels for record in manifest.records]).size == len(manifest.records)
