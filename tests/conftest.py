"""Shared fixtures. TensorFlow and Keras are loaded by the tests that train, nowhere else."""

import gc
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests of an interruption need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """statsmodels collects garbage at every correction of p-values; what other tests left need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole run, so that phantoms are drawn and images decoded once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of some MB, in memory; a skip where this user may not mount one."""
    mounted: list[Path] = []

    def mount(megabytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs to mount a file system: run it as root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real X-rays and weights, or a skip with the reason."""
    folder = os.environ.get("CXR_REAL_DATA")
    if not folder:
        pytest.skip("needs real X-rays: set CXR_REAL_DATA to a folder with data/ and weights/")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def radiography_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny folder laid out as the COVID-19 Radiography Database; a bright square tells the class."""
    root = tmp_path_factory.mktemp("COVID-19_Radiography_Dataset")
    generator = np.random.default_rng(0)
    for place, name in enumerate(("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")):
        for kind in ("images", "masks"):
            (root / name / kind).mkdir(parents=True)
        (root / f"{name}.metadata.xlsx").write_bytes(b"not read")
        for index in range(1, 13):
            pixels = generator.integers(0, 80, (99, 99)).astype(np.uint8)
            top, left = divmod(place, 2)
            pixels[10 + 45 * top : 45 + 45 * top, 10 + 45 * left : 45 + 45 * left] += 120
            Image.fromarray(pixels).save(root / name / "images" / f"{name}-{index}.png")
            Image.fromarray(np.full((99, 99), 255, np.uint8)).save(root / name / "masks" / f"{name}-{index}.png")
    (root / "COVID" / "images" / "broken.png").write_bytes(b"\x89PNG")  # real downloads have such files
    return root
