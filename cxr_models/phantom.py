"""Synthetic frontal chest radiographs with exact lung masks: a demonstration, not medicine.

A radiograph is drawn from a `Drawing`: the patient's anatomy, one view of it (pose, exposure, noise) and a finding.
`phantom_dataset` makes a folder of them, laid out as the COVID-19 Radiography Database is. The four classes differ
only in the finding; anatomy and view come from the same distributions for every class, so that no class follows from
brightness, size or noise. Nothing measured on these images says anything about patients.

Coordinates: u runs from -1 (left edge of the image) to 1, v from -1 (top) to 1, before the pose moves the body.
Densities are relative: 0 is air, about 1 the densest bone.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from PIL import Image

from cxr_models.storage import NoSpace, told_of_space

Field = NDArray[np.floating[Any]]  # (side, side), one value a pixel

CLASSES = ("Normal", "COVID-like", "Focal opacity", "Diffuse pattern")
PATIENT_PATTERN = r"^(P\d+)_"
PATIENTS: Mapping[str, int] = dict(zip(CLASSES, (92, 56, 52, 40), strict=True))
MAX_IMAGES_PER_PATIENT = 4
DRAWING_VERSION = 1  # raise it with any change of what is drawn: cached folders carry it in their name

# Parameters are uniform over these ranges, for every class alike.
ANATOMY_RANGES: Mapping[str, tuple[float, float]] = {
    "chest": (0.66, 0.84),
    "apex": (-0.80, -0.64),
    "base": (0.30, 0.56),
    "mediastinum": (0.10, 0.17),
    "heart": (0.22, 0.36),
    "rib_tilt": (0.10, 0.42),
    "rib_spacing": (0.135, 0.18),
    "rib_density": (0.05, 0.13),
    "soft_tissue": (0.0, 1.0),
    "breast": (0.0, 1.0),
    "vessels": (0.3, 1.0),
}
VIEW_RANGES: Mapping[str, tuple[float, float]] = {
    "rotation_deg": (-7.0, 7.0),
    "shift_u": (-0.09, 0.09),
    "shift_v": (-0.09, 0.09),
    "zoom": (0.90, 1.12),
    "turn": (-0.05, 0.05),
    "inspiration": (-0.08, 0.06),
    "brightness": (-0.05, 0.15),
    "contrast": (0.70, 1.10),
    "gamma": (0.70, 1.40),
    "fall_off_u": (-0.10, 0.10),
    "fall_off_v": (-0.10, 0.10),
    "noise": (0.008, 0.030),
    "blur": (0.002, 0.010),
}


@dataclass(frozen=True)
class Anatomy:
    """What stays with a patient."""

    chest: float  # half width of the thoracic cavity at the diaphragm, in u
    apex: float  # v of the lungs' top
    base: float  # v of the diaphragm's domes
    mediastinum: float  # half width, in u
    heart: float  # half width, in u
    rib_tilt: float  # fall of a rib towards the side
    rib_spacing: float  # v between two ribs
    rib_density: float
    soft_tissue: float  # 0 slender to 1 stout
    breast: float  # 0 none to 1 dense
    vessels: float  # density of hila and vessels, 0 to 1
    seed: int  # of the vessel tree


@dataclass(frozen=True)
class View:
    """What changes from one image of a patient to the next."""

    rotation_deg: float
    shift_u: float
    shift_v: float
    zoom: float
    turn: float  # sideways shift of heart and mediastinum, as when a patient stands askew, in u
    inspiration: float  # shift of the diaphragm in v; positive is a deeper breath
    brightness: float
    contrast: float
    gamma: float
    fall_off_u: float  # change of exposure from the centre to the edge
    fall_off_v: float
    noise: float  # standard deviation of the grain, in grey levels of 0 to 1
    blur: float  # standard deviation of the focus blur, in u
    seed: int  # of the grain


@dataclass(frozen=True)
class Patch:
    """An opacity inside one lung."""

    lung: int  # -1 for the lung on the left of the image, 1 for the other
    across: float  # from the mediastinum (0) to the chest wall (1)
    down: float  # from the apex (0) to the diaphragm (1)
    radius: float  # in u
    density: float  # added at the centre


@dataclass(frozen=True)
class Finding:
    """What the image shows beside anatomy."""

    patches: tuple[Patch, ...]
    reticulation: float  # density of a net of fine lines over both lungs, 0 for none
    mesh: float  # width of the net's meshes, in u
    seed: int  # of the net and of the patches' outlines


@dataclass(frozen=True)
class Drawing:
    """All that determines one image."""

    anatomy: Anatomy
    view: View
    finding: Finding


@dataclass(frozen=True)
class Lung:
    """One lung in the pixel grid: x is lateral distance from the midline; `depth` is positive inside the lung only."""

    x: Field
    across: Field
    down: Field
    depth: Field


def draw(drawing: Drawing, side: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one radiograph.

    Returns:
        The image (side, side), dense tissue bright, and the mask (side, side) of both lungs.
    """
    from scipy.ndimage import gaussian_filter

    anatomy, view, finding = drawing.anatomy, drawing.view, drawing.finding
    u, v = _body_coordinates(view, side)
    heart = _heart_depth(anatomy, view, u, v)
    lungs = {lung: _lung(anatomy, view, lung, u, v, heart) for lung in (-1, 1)}
    depth = np.maximum(lungs[-1].depth, lungs[1].depth)
    aerated = _step(depth, 0.02)

    density = _chest_wall(anatomy, u, v) + _mediastinum(anatomy, view, u, v, heart)
    density *= 1.0 - aerated * (0.72 - 0.22 * anatomy.soft_tissue)
    density += _bones(anatomy, u, v) + _breasts(anatomy, u, v)
    density += aerated * (_vessels(anatomy, lungs) + _finding(finding, u, v, lungs))

    image = gaussian_filter(_exposed(density, view, side), view.blur * side / 2)
    grain = default_rng(view.seed).normal(scale=view.noise, size=(side, side)).astype(np.float32)
    grey = np.clip(image + grain, 0.0, 1.0)
    return np.rint(grey * 255).astype(np.uint8), depth > 0


def _body_coordinates(view: View, side: int) -> tuple[Field, Field]:
    centres = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1).astype(np.float32)
    u, v = centres[None, :] - view.shift_u, centres[:, None] - view.shift_v
    cos, sin = (f(math.radians(view.rotation_deg)) / view.zoom for f in (math.cos, math.sin))
    return (u * cos + v * sin).astype(np.float32), (v * cos - u * sin).astype(np.float32)


def _step(distance: Field, softness: float) -> Field:
    """0 well below zero distance, 1 well above it, over about four times the softness."""
    return np.asarray(0.5 + 0.5 * np.tanh(distance / (2 * softness)))


def _bump(distance: Field, width: float) -> Field:
    return np.asarray(np.exp(-0.5 * np.square(distance / width)))


def _heart_depth(anatomy: Anatomy, view: View, u: Field, v: Field) -> Field:
    """Positive inside the heart, in u."""
    centre_u, centre_v = 0.36 * anatomy.heart + view.turn, anatomy.base + view.inspiration - 0.55 * anatomy.heart
    across, down = u - centre_u, v - centre_v
    # An ellipse that leans to the patient's left, on the right of the image, with the apex of the heart low.
    radius = np.hypot(across * 0.94, (down - 0.55 * across) / 1.05)
    aortic_knob = 0.075 - np.hypot(u - anatomy.mediastinum - view.turn + 0.02, v - anatomy.apex - 0.36)
    return np.asarray(np.maximum(anatomy.heart - radius, aortic_knob))


def _lung(anatomy: Anatomy, view: View, lung: int, u: Field, v: Field, heart: Field) -> Lung:
    x = lung * u
    # The dome of the diaphragm stands higher on the image's left, over the liver, and falls towards the chest wall.
    base = anatomy.base + view.inspiration + 0.02 * lung
    dome = base + 0.9 * np.square(np.maximum(x - 0.45 * anatomy.chest, 0)) + 0.25 * np.square(x - 0.45 * anatomy.chest)
    down = (v - anatomy.apex) / (base - anatomy.apex)
    from_apex = np.clip(down, 0.0, 1.0)
    outer = anatomy.chest * (0.30 + 0.70 * np.sqrt(1 - np.square(1 - from_apex) ** 1.15))
    inner = anatomy.mediastinum + lung * view.turn + 0.06 * np.square(1 - from_apex)
    depth = np.minimum.reduce([x - inner, outer - x, dome - v, v - anatomy.apex - 0.5 * np.square(x - 0.3), -heart])
    return Lung(x, (x - inner) / np.maximum(outer - inner, 0.05), down, depth)


def _chest_wall(anatomy: Anatomy, u: Field, v: Field) -> Field:
    x = np.abs(u)
    half_width = anatomy.chest + 0.12 + 0.06 * anatomy.soft_tissue + 0.35 * _step(-0.45 - v, 0.06)
    shoulder = anatomy.apex - 0.20 + 0.42 * np.square(x) - 1.5 * _step(0.22 - x, 0.04)
    body = _step(np.minimum(half_width - x, v - shoulder), 0.02)
    abdomen = _step(v - anatomy.base - 0.05, 0.1)
    return np.asarray(body * (0.52 + 0.10 * anatomy.soft_tissue + 0.10 * abdomen - 0.08 * np.square(x)))


def _mediastinum(anatomy: Anatomy, view: View, u: Field, v: Field, heart: Field) -> Field:
    x = u - view.turn
    band = 0.14 * _step(anatomy.mediastinum - np.abs(x), 0.03)
    vertebrae = (0.08 + 0.02 * np.cos(v * (2 * math.pi / 0.13))) * _bump(u, 0.06)
    trachea = 0.16 * _bump(x, 0.03) * _step(-0.30 - v, 0.05)
    return np.asarray(band + vertebrae - trachea + 0.14 * _step(heart, 0.02))


def _bones(anatomy: Anatomy, u: Field, v: Field) -> Field:
    x = np.abs(u)
    cage = _step(anatomy.chest + 0.03 - x, 0.02) * _step(v - anatomy.apex - 0.02, 0.03)
    turn = 2 * math.pi / anatomy.rib_spacing
    posterior = np.cos(turn * (v - anatomy.rib_tilt * x**1.5))
    anterior = np.cos(turn * (v + (0.25 + anatomy.rib_tilt) * (x - 1.2 * np.square(x)) + 0.4 * anatomy.rib_spacing))
    ribs = _step(posterior - 0.35, 0.12) + 0.6 * _step(anterior - 0.55, 0.12) * _step(x - 0.30, 0.05)
    clavicle = _bump(v - anatomy.apex - 0.13 + 0.22 * x + 0.08 * np.sin(6 * x), 0.028) * _step(x - 0.06, 0.02)
    fading = 1 - 0.7 * _step(v - anatomy.base, 0.1)
    return anatomy.rib_density * cage * fading * ribs + 0.11 * clavicle * _step(0.8 - x, 0.03)


def _breasts(anatomy: Anatomy, u: Field, v: Field) -> Field:
    radius = np.hypot(np.abs(u) - 0.58 * anatomy.chest, (v - anatomy.base + 0.12) * 0.9)
    return 0.13 * anatomy.breast * _step(0.30 - radius, 0.035)


def _vessels(anatomy: Anatomy, lungs: Mapping[int, Lung]) -> Field:
    """The hila and branches that leave them, thinner and fainter outwards."""
    rng = default_rng(anatomy.seed)
    total = np.zeros_like(lungs[1].x)
    for lung in lungs.values():
        x, down = lung.x - anatomy.mediastinum - 0.04, 1.1 * (lung.down - rng.uniform(0.42, 0.50))
        total += 0.16 * _bump(x, 0.05) * _bump(down, 0.10)
        for angle in np.linspace(-1.25, 1.35, 8) + rng.uniform(-0.14, 0.14, size=8):
            bend, length = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.55)
            along = x * math.cos(angle) + down * math.sin(angle)
            aside = down * math.cos(angle) - x * math.sin(angle) - bend * np.square(along)
            width = 0.020 - 0.012 * np.clip(along / length, 0, 1)
            total += 0.13 * np.exp(-0.5 * np.square(aside / width)) * _step(along, 0.02) * _step(length - along, 0.08)
    return anatomy.vessels * total


def _waves(rng: Generator, u: Field, v: Field, wavelength: float, count: int = 16) -> Field:
    """A random field of one wavelength, mean 0 and variance 1: a sum of plane waves, the same at every resolution."""
    total = np.zeros_like(u)
    for angle, phase in rng.uniform(0, 2 * math.pi, size=(count, 2)).astype(np.float32):
        wave_number = np.float32(2 * math.pi / (wavelength * rng.uniform(0.85, 1.15)))
        total += np.cos(wave_number * (np.cos(angle) * u + np.sin(angle) * v) + phase)
    return np.asarray(total * math.sqrt(2 / count))


def _finding(finding: Finding, u: Field, v: Field, lungs: Mapping[int, Lung]) -> Field:
    rng = default_rng(finding.seed)
    total = np.zeros_like(u)
    if finding.patches:
        outline = _waves(rng, u, v, wavelength=0.25)
    for patch in finding.patches:
        lung = lungs[patch.lung]
        distance = _distance(lung, patch, v) * (1 + 0.22 * outline)
        total += patch.density * _step(patch.radius - distance, 0.30 * patch.radius) * (lung.depth > -0.05)
    if finding.reticulation:
        # Lines run where the field is near zero; 0.31 is their mean, taken off so that the net adds no brightness.
        net = _bump(_waves(rng, u, v, wavelength=2 * finding.mesh), 0.4)
        total += finding.reticulation * (net - 0.31)
    return total


def _distance(lung: Lung, patch: Patch, v: Field) -> Field:
    """From the patch's centre, in u; found on the grid since the lung's outline bends."""
    score = np.square(lung.across - patch.across) + np.square(lung.down - patch.down)
    row, column = np.unravel_index(np.argmin(score), score.shape)
    return np.asarray(np.hypot(lung.x - lung.x[row, column], v - v[row, column]))


def _exposed(density: Field, view: View, side: int) -> Field:
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    even = 1 + view.fall_off_u * ramp[None, :] + view.fall_off_v * ramp[:, None]
    grey = view.contrast * np.clip(density, 0, None) ** view.gamma * even + view.brightness
    return np.asarray(np.clip(grey, 0.0, 1.0))


def sample_anatomy(rng: Generator) -> Anatomy:
    """A random chest."""
    return Anatomy(**_uniform(rng, ANATOMY_RANGES), seed=_seed(rng))


def sample_view(rng: Generator) -> View:
    """A random exposure and position."""
    return View(**_uniform(rng, VIEW_RANGES), seed=_seed(rng))


def sample_patch(rng: Generator, lung: int, *, peripheral: bool) -> Patch:
    """A peripheral patch is small, faint and near the chest wall; the other kind is large, dense and anywhere."""
    if peripheral:
        across, down, radius, density = (0.74, 0.98), (0.25, 0.95), (0.08, 0.15), (0.12, 0.24)
    else:
        across, down, radius, density = (0.25, 0.75), (0.15, 0.85), (0.15, 0.26), (0.19, 0.36)
    return Patch(lung, *(float(rng.uniform(*limits)) for limits in (across, down, radius, density)))


def sample_finding(rng: Generator, name: str) -> Finding:
    """A finding of the class `name`, one of `CLASSES`."""
    patches: tuple[Patch, ...] = ()
    if name == "COVID-like":
        patches = tuple(sample_patch(rng, lung, peripheral=True) for lung in (-1, 1) for _ in range(rng.integers(2, 5)))
    elif name == "Focal opacity":
        patches = (sample_patch(rng, int(rng.choice((-1, 1))), peripheral=False),)
    reticulation = float(rng.uniform(0.08, 0.15)) if name == "Diffuse pattern" else 0.0
    return Finding(patches, reticulation, mesh=float(rng.uniform(0.06, 0.09)), seed=_seed(rng))


def _uniform(rng: Generator, ranges: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {name: float(rng.uniform(low, high)) for name, (low, high) in ranges.items()}


def _seed(rng: Generator) -> int:
    return int(rng.integers(2**32))


def _progressed(finding: Finding, extent: float) -> Finding:
    """The same finding at another visit."""
    patches = (replace(p, radius=p.radius * extent, density=p.density * extent) for p in finding.patches)
    return replace(finding, patches=tuple(patches), reticulation=finding.reticulation * extent)


def patient_drawings(seed: int, patient: int, name: str) -> list[Drawing]:
    """The images of one patient of class `name`: one anatomy and finding, seen 1 to 4 times."""
    rng = _stream(seed, patient)
    anatomy, images = sample_anatomy(rng), int(rng.integers(1, MAX_IMAGES_PER_PATIENT + 1))
    finding = sample_finding(rng, name)
    drawings = []
    for k in range(1, images + 1):
        rng = _stream(seed, patient, k)
        drawings.append(Drawing(anatomy, sample_view(rng), _progressed(finding, float(rng.uniform(0.85, 1.15)))))
    return drawings


def _stream(seed: int, patient: int = 0, image: int = 0) -> Generator:
    """Patients and images count from 1. The seed comes last: a large one takes several words of the key."""
    return default_rng([image, patient, seed])


def _dataset_drawings(seed: int) -> Iterator[tuple[str, str, Drawing]]:
    """(class, file name, drawing) of every image. Patients are numbered in random order."""
    classes = _stream(seed).permutation([name for name, patients in PATIENTS.items() for _ in range(patients)])
    for patient, name in enumerate(classes.tolist(), start=1):
        for k, drawing in enumerate(patient_drawings(seed, patient, name), start=1):
            yield name, f"P{patient:04d}_{k}.png", drawing


def phantom_dataset(
    cache_dir: Path, *, seed: int = 0, side: int = 128, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Make the data set, unless `cache_dir` holds it already.

    Args:
        cache_dir: folder that holds every data set made so far; created where absent.
        seed: of patients, views and findings.
        side: height and width of the images and masks, in pixels.
        progress: told (images drawn, images in all).

    Returns:
        A folder with `<class>/images/P0001_1.png` and, of the same name, `<class>/masks/P0001_1.png` (0 or 255).
        It is whole: a making that was interrupted leaves nothing under this name.

    Raises:
        NoSpace: the disk has no room for it.
    """
    folder = cache_dir / f"phantom-v{DRAWING_VERSION}-seed{seed}-side{side}"
    scratch = cache_dir / f".{folder.name}.partial"
    with told_of_space(folder):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f".{folder.name}.lock"):
            if not folder.exists():
                shutil.rmtree(scratch, ignore_errors=True)
                try:
                    with told_of_space(folder):
                        _write_images(scratch, seed, side, progress)
                        os.replace(scratch, folder)
                except NoSpace:
                    shutil.rmtree(scratch, ignore_errors=True)
                    raise
    return folder


def _write_images(folder: Path, seed: int, side: int, progress: Callable[[int, int], None] | None) -> None:
    for name in CLASSES:
        for kind in ("images", "masks"):
            (folder / name / kind).mkdir(parents=True)
    drawings = list(_dataset_drawings(seed))
    for done, (name, file_name, drawing) in enumerate(drawings, start=1):
        image, mask = draw(drawing, side)
        Image.fromarray(image).save(folder / name / "images" / file_name)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / name / "masks" / file_name)
        if progress is not None:
            progress(done, len(drawings))
