"""Every shipped search space runs, on a tiny folder laid out as its data set is."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cxr_models.freezing import parse_strategy
from cxr_models.layer_table import layer_tables
from cxr_models.network import count_parameters
from cxr_models.trial import TrialConfig
from sweep.spec import SweepSpec, read_spec
from tests import layouts

ROOT = Path(__file__).parent.parent
SPACES = ROOT / "search_spaces"


SIDE = 96  # at which every backbone has a packaged layer table
DATA: dict[str, Callable[[Path], Path]] = {
    "freeze": layouts.class_folders,
    "smoke": layouts.class_folders,
    "covid_radiography": layouts.covid_radiography,
    "r1_covid_radiography": layouts.covid_radiography,
    "r1_lung_segmentation": layouts.images_and_masks,
    "r2_mobilenet_half": partial(layouts.covid_radiography, images=24),
    "r3_two_gpus": layouts.covid_radiography,
    "r4_small_data": layouts.nested,
    "r5_pneumonia": layouts.kermany,
}


NAMES = [path.stem for path in sorted(SPACES.glob("*.yaml"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_space_runs(name, tmp_path):
    """Two trials of one epoch, or one a phase; what begins with ImageNet weights begins with random ones."""
    epochs = 2 if name == "r5_pneumonia" else 1
    arguments = [str(SPACES / f"{name}.yaml"), "--data", str(DATA[name](tmp_path / "data")), "--weights", "none"]
    arguments += ["--trials", "2", "--max-epochs", str(epochs), "--set", f"image_side={SIDE}"]
    arguments += ["--inline", "--out", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "sweep.run", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / name
    trials = pd.read_csv(folder / "trials.csv")
    assert len(trials) == 2
    assert not trials["error"].notna().any()
    summary = json.loads((folder / "summary.json").read_text())
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "best" / "model.keras").is_file()
    spec = read_spec(SPACES / f"{name}.yaml")
    assert ("test" in summary) == (not spec.data.split or spec.data.split.test > 0)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    wanted = {("mobilenet_v2_1.0", 224), ("mobilenet_v2_0.5", 224), ("vanilla_cnn", 224)}
    return layer_tables(wanted, tmp_path_factory.mktemp("none"))


def first_point(spec: SweepSpec, **wanted: str) -> TrialConfig:
    """The first fixed point with the values wanted; axes it leaves open have the first value they may have."""
    for point in spec.search.fixed:
        values: dict[str, Any] = {}
        for axis in spec.space.axes.values():
            domain = axis.domain_given(values)
            values[axis.name] = point.get(axis.name, next(iter(domain)) if domain.finite else domain.low)
        if wanted.items() <= values.items():
            return TrialConfig(**values)
    raise AssertionError(f"no fixed point of {spec.name} has {wanted}")


@pytest.mark.parametrize(
    ("file", "classes", "wanted", "expected"),
    [
        ("r1_covid_radiography", 4, {"freeze": "all"}, (64_753_156, 2_257_984)),
        ("r1_covid_radiography", 4, {"freeze": "convs:1"}, (65_165_316, 1_845_824)),
        ("r1_covid_radiography", 4, {"freeze": "convs:2"}, (65_473_156, 1_537_984)),
        ("r1_covid_radiography", 4, {"freeze": "none"}, (66_977_028, 34_112)),
        ("r2_mobilenet_half", 4, {"freeze": "all"}, (64_753_156, 706_224)),
        ("r4_small_data", 2, {"backbone": "vanilla_cnn"}, (1_045_441, 0)),
    ],
)
def test_the_studies_own_trials_have_their_parameters(file, classes, wanted, expected, tables):
    """To the last one, from the files as they are shipped."""
    config = first_point(read_spec(SPACES / f"{file}.yaml"), **wanted)
    (phase,) = parse_strategy(config.freeze).phases
    assert count_parameters(config, phase, tables[config.backbone, config.image_side], classes) == expected
