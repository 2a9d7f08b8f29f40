import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.random import default_rng
from PIL import Image
from scipy.ndimage import binary_dilation, label
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cxr_models import phantom
from cxr_models.phantom import CLASSES, PATIENT_PATTERN, Drawing, Finding, draw, patient_drawings, phantom_dataset
from cxr_models.storage import NoSpace

BUNDLED_WEIGHTS = Path(phantom.__file__).parent / "bundled" / "mobilenet_v2_0.35_phantom_notop.weights.h5"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return phantom_dataset(tmp_path_factory.mktemp("phantom"))


@pytest.fixture(scope="module")
def images(dataset) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Images, class indices and patients of the default data set."""
    paths = [path for name in CLASSES for path in sorted((dataset / name / "images").iterdir())]
    labels = np.array([CLASSES.index(path.parts[-3]) for path in paths])
    patients = np.array([re.match(PATIENT_PATTERN, path.name).group(1) for path in paths])
    return [np.asarray(Image.open(path)) for path in paths], labels, patients


def drawings(count: int, name: str) -> list[Drawing]:
    return [patient_drawings(seed=7, patient=patient, name=name)[0] for patient in range(1, count + 1)]


def grouped_accuracy(model, features, labels, patients) -> float:
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    with threadpool_limits(1):  # on a busy machine BLAS threads wait for each other far longer than they compute
        return cross_val_score(model, features, labels, groups=patients, cv=folds).mean()


def test_a_drawing_determines_its_image():
    drawing = drawings(1, "COVID-like")[0]
    for first, second in zip(draw(drawing, 64), draw(drawing, 64), strict=True):
        np.testing.assert_array_equal(first, second)
    other_grain = replace(drawing, view=replace(drawing.view, seed=drawing.view.seed + 1))
    assert (draw(other_grain, 64)[0] != draw(drawing, 64)[0]).any()


def test_a_patient_does_not_depend_on_the_others():
    assert patient_drawings(seed=0, patient=5, name="Normal") == patient_drawings(seed=0, patient=5, name="Normal")
    assert patient_drawings(seed=0, patient=5, name="Normal") != patient_drawings(seed=1, patient=5, name="Normal")


def test_a_patient_keeps_anatomy_and_finding_while_the_view_changes():
    several = next(images for p in range(1, 20) if len(images := patient_drawings(0, p, "Focal opacity")) > 1)
    assert len({drawing.anatomy for drawing in several}) == 1
    assert len({drawing.view for drawing in several}) == len(several)
    assert len({(d.finding.patches[0].lung, d.finding.patches[0].down) for d in several}) == 1
    assert len({d.finding.patches[0].radius for d in several}) == len(several)


@pytest.mark.parametrize("name", CLASSES)
def test_the_mask_is_two_lungs_inside_the_thorax(name):
    for drawing in drawings(12, name):
        upright = replace(drawing, view=replace(drawing.view, rotation_deg=0.0, shift_u=0.0, shift_v=0.0, zoom=1.0))
        mask = draw(upright, 128)[1]
        regions, count = label(mask)
        sizes = np.sort(np.bincount(regions.ravel())[1:])
        assert count >= 2
        assert sizes[-2] > 0.06 * mask.size
        assert sizes[:-2].sum() < 0.01 * mask.size
        assert 0.12 < mask.mean() < 0.45
        columns = np.flatnonzero(mask.any(axis=0))
        u = (columns + 0.5) / 64 - 1
        assert np.abs(u).max() <= drawing.anatomy.chest + 0.01


def test_the_mask_does_not_change_with_the_finding_or_the_exposure():
    for normal, ill in zip(drawings(5, "Normal"), drawings(5, "COVID-like"), strict=True):
        same_patient = replace(normal, finding=ill.finding, view=replace(normal.view, noise=0.0, gamma=1.0))
        np.testing.assert_array_equal(draw(normal, 96)[1], draw(same_patient, 96)[1])


@pytest.mark.parametrize("name", CLASSES[1:])
def test_a_finding_changes_the_lungs_alone(name):
    for drawing in drawings(8, name):
        sharp = replace(drawing, view=replace(drawing.view, blur=0.0, noise=0.0, brightness=0.1))
        image, mask = draw(sharp, 128)
        healthy = draw(replace(sharp, finding=Finding((), 0.0, 0.05, 0)), 128)[0]
        change = np.abs(image.astype(int) - healthy.astype(int))
        edge = binary_dilation(mask, iterations=3)  # lungs fade into the chest wall over a few pixels
        assert change[edge].sum() > 0.98 * change.sum()
        assert change.max() > 5


def test_normal_has_no_finding_and_covid_like_has_patches_in_both_lungs():
    assert all(not d.finding.patches and not d.finding.reticulation for d in drawings(10, "Normal"))
    for drawing in drawings(10, "COVID-like"):
        assert {patch.lung for patch in drawing.finding.patches} == {-1, 1}
        assert min(patch.across for patch in drawing.finding.patches) > 0.7


def test_the_folder_is_laid_out_as_the_radiography_database(dataset, images):
    assert {path.name for path in dataset.iterdir()} == set(CLASSES)
    for name in CLASSES:
        pictures = {path.name for path in (dataset / name / "images").iterdir()}
        assert pictures == {path.name for path in (dataset / name / "masks").iterdir()}
    mask = np.asarray(Image.open(next((dataset / "Normal" / "masks").iterdir())))
    assert mask.shape == (128, 128)
    assert set(np.unique(mask)) == {0, 255}
    assert 550 <= len(images[0]) <= 650


def test_a_patient_has_one_to_four_images_and_one_class(images):
    _, labels, patients = images
    counts = np.unique(patients, return_counts=True)[1]
    assert set(counts) == {1, 2, 3, 4}
    assert len(set(zip(patients, labels, strict=True))) == len(counts)


def test_patient_numbers_do_not_tell_the_class(images):
    _, labels, patients = images
    numbers = np.array([[int(patient[1:])] for patient in patients])
    model = RandomForestClassifier(100, min_samples_leaf=10, random_state=0)
    assert grouped_accuracy(model, numbers, labels, patients) < chance(labels) + 0.05


def chance(labels: np.ndarray) -> float:
    return np.bincount(labels).max() / len(labels)


def test_pixels_alone_do_not_tell_the_class(images):
    pictures, labels, patients = images
    small = np.array([Image.fromarray(picture).resize((32, 32), Image.Resampling.BOX) for picture in pictures])
    features = small.reshape(len(small), -1) / 255.0
    accuracy = grouped_accuracy(LogisticRegression(max_iter=500), features, labels, patients)
    assert chance(labels) < accuracy < 0.65


def test_brightness_and_noise_do_not_tell_the_class(images):
    pictures, labels, patients = images
    features = [[p.mean(), p.std(), np.median(p), p.min(), p.max(), p[:12, :12].std()] for p in pictures]
    for model in (LogisticRegression(max_iter=500), RandomForestClassifier(100, min_samples_leaf=5, random_state=0)):
        scaled = make_pipeline(StandardScaler(), model)
        assert grouped_accuracy(scaled, features, labels, patients) < chance(labels) + 0.07


def test_file_sizes_do_not_tell_the_class(dataset, images):
    _, labels, patients = images
    sizes = [[p.stat().st_size] for name in CLASSES for p in sorted((dataset / name / "images").iterdir())]
    model = RandomForestClassifier(100, min_samples_leaf=10, random_state=0)
    assert grouped_accuracy(model, sizes, labels, patients) < chance(labels) + 0.07


@pytest.fixture
def few_patients(monkeypatch):
    monkeypatch.setattr(phantom, "PATIENTS", dict.fromkeys(CLASSES, 2))


def test_a_made_data_set_is_not_made_again(tmp_path, few_patients):
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    folder = phantom_dataset(tmp_path, side=32, progress=progress)
    total = len(list(folder.glob("*/images/*.png")))
    assert told == [(done, total) for done in range(1, total + 1)]
    assert phantom_dataset(tmp_path, side=32, progress=progress) == folder
    assert len(told) == total
    assert phantom_dataset(tmp_path, side=32, seed=1) != folder


def test_a_full_disk_is_told_and_has_its_room_back(small_disk, few_patients):
    disk = small_disk(1)
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 5 * 4096))
    with pytest.raises(NoSpace, match=r"expected room on the disk for .*phantom-v"):
        phantom_dataset(disk, side=32)
    assert not list(disk.rglob("*.png"))
    filler.unlink()
    assert list(phantom_dataset(disk, side=32).rglob("*.png"))


def test_an_interrupted_making_is_not_taken_for_whole(tmp_path, few_patients):
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phantom_dataset(tmp_path / "cache", side=32, progress=interrupt)
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]

    def files(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}

    resumed, fresh = (files(phantom_dataset(tmp_path / place, side=32)) for place in ("cache", "elsewhere"))
    assert resumed == fresh


def test_bundled_weights_are_small_and_load_at_any_side():
    keras = pytest.importorskip("keras")
    assert BUNDLED_WEIGHTS.stat().st_size <= 2_500_000
    for side in (64, 96):
        backbone = keras.applications.MobileNetV2(
            input_shape=(side, side, 3), alpha=0.35, include_top=False, weights=None
        )
        before = backbone.get_weights()
        backbone.load_weights(BUNDLED_WEIGHTS)
        assert any((old != new).any() for old, new in zip(before, backbone.get_weights(), strict=True))
        pixels = default_rng(0).uniform(-1, 1, size=(1, side, side, 3))
        assert np.isfinite(np.asarray(backbone(pixels))).all()
