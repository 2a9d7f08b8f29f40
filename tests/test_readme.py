"""The README's own commands, run on a tiny folder laid out as the data set it speaks of."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cxr_models import doctor
from sweep.spec import json_schema, read_spec
from tests import layouts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\.venv/bin/python (-m sweep\..*)$", README, flags=re.MULTILINE)

# What would take hours or a network: replaced, and only this.
CHEAPER = {
    "--trials 60": "--trials 2",
    "--trials 80": "--trials 3",
    "--weights imagenet": "--weights bundled",
    "image_side=224": "image_side=72",
    "--name lungs": "--name lungs --trials 1 --set image_side=32",
    "--set lung_mask=": "--trials 2 --set lung_mask=",
}
OF_SEGMENTATIONS = {"masks.csv", "best/overlays"}  # in place of the predictions
OF_COPIES = {"audit"}  # where pictures of pairs are to be shown
QUICK = ["--max-epochs", "2", "--set", "search.halving=none"]


def test_the_quick_start_is_two_lines_each_complete():
    lines = re.findall(r"^python3 -m venv \.venv && .*$", README, flags=re.MULTILINE)
    assert len(lines) == 2
    assert lines[0].endswith(".venv/bin/python -m sweep.run search_spaces/freeze.yaml")
    assert lines[1].endswith(".venv/bin/python -m pytest")


def run_command(command: str, places: dict[str, Path], folder: Path, cache_dir: Path) -> None:
    """One of the README's commands, made cheap, in a folder of its own."""
    for dear, cheap in (CHEAPER | places).items():
        command = command.replace(dear, str(cheap))
    arguments = [str(ROOT / part) if part.startswith("search_spaces/") else part for part in shlex.split(command)]
    if arguments[1] == "sweep.run":
        arguments += ["--cache-dir", str(cache_dir), *QUICK]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def listed_files() -> list[str]:
    """What the README says a run folder holds."""
    table = README.partition("leaves one folder")[2].partition("In MLflow")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    return [name.strip("/") for row in rows for name in re.findall(r"`([^`]*)`", row)]


def test_the_worked_example(tmp_path, radiography_folder, cache_dir):
    """In the order they stand: the plan, the sweep, the report of that sweep."""
    assert [command.split()[1] for command in COMMANDS] == [
        *["sweep.run"] * 2,
        "sweep.report",
        *["sweep.run"] * 3,
        "sweep.sync",
    ]
    for command in COMMANDS[:3]:
        run_command(command, {"~/COVID-19_Radiography_Dataset": radiography_folder}, tmp_path, cache_dir)
    run = tmp_path / "runs" / "radiography"
    names = [name for name in listed_files() if name not in OF_SEGMENTATIONS | OF_COPIES]
    assert len(names) == 12
    assert not [name for name in names if not (run / name).exists()]


@pytest.mark.slow
def test_a_sweep_that_came_to_its_end_grows_and_mlflow_has_all_of_it(tmp_path, radiography_folder, cache_dir):
    places = {"~/COVID-19_Radiography_Dataset": radiography_folder}
    for command in (COMMANDS[1], *COMMANDS[5:]):
        run_command(command, places, tmp_path, cache_dir)
    run = tmp_path / "runs" / "radiography"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["trials"]["total"], len(summary["test_openings"])) == (3, 2)
    (earlier,) = run.glob("after-*-trials")
    total = json.loads((earlier / "summary.json").read_text())["trials"]["total"]
    assert earlier.name == f"after-{total}-trials"
    assert len(pd.read_csv(earlier / "trials.csv")) == total < 3
    assert (earlier / "best" / "model.keras").stat().st_size > 0


@pytest.mark.slow
def test_lung_masks_and_a_sweep_that_uses_them(tmp_path, cache_dir):
    places = {
        "~/lungs": layouts.images_and_masks(tmp_path / "lungs"),
        "~/xrays": layouts.class_folders(tmp_path / "xrays"),
    }
    for command in COMMANDS[3:5]:
        run_command(command, places, tmp_path, cache_dir)
    names = OF_SEGMENTATIONS & {*listed_files()}
    assert len(names) == 2
    assert not [name for name in names if not (tmp_path / "runs" / "lungs" / name).exists()]
    (source,) = json.loads((tmp_path / "runs" / "freeze" / "summary.json").read_text())["inputs"]
    assert source["lung_mask"] == "runs/lungs"


def test_the_example_space_is_read(tmp_path):
    data, example, reference = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "example.yaml").write_text(example)
    spec = read_spec(tmp_path / "example.yaml")
    assert spec.name == yaml.safe_load(example)["name"]
    assert spec.search.trials == 40
    (tmp_path / "data.yaml").write_text(re.sub(r"^data: .*\n", data, example, flags=re.MULTILINE))
    assert len(read_spec(tmp_path / "data.yaml").data.all_sources) == 2
    (tmp_path / "reference.yaml").write_text(example + reference)
    assert read_spec(tmp_path / "reference.yaml").reference.results[0].accuracy["test"] == 0.908


def test_every_diagnosis_is_told_and_the_doctor_reads_typed_in_curves(capsys):
    section = README.partition("### The doctor")[2].partition("\n## ")[0]
    told = {
        name for row in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE) for name in re.findall("`(.*?)`", row)
    }
    rows = re.findall(r"^    (\w+(?:, \w+)?) +(?:grave|lesser) ", doctor.__doc__, re.MULTILINE)
    assert told == {name for row in rows for name in row.split(", ")}
    assert len(told) == 12
    (example,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    exec(example, {})
    assert "exploding_validation_loss In epoch 3" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_space_is_read_and_says_how_it_is_run(file):
    spec = read_spec(file)
    assert spec.name == file.stem
    assert f"python -m sweep.run search_spaces/{file.name}" in file.read_text()


def test_the_shipped_schema_is_that_of_the_reader_and_fits_the_shipped_spaces():
    schema = json.loads((ROOT / "search_spaces" / "schema.json").read_text())
    assert schema == json.loads(json.dumps(json_schema())), "write it anew with sweep.spec.json_schema"
    for file in (ROOT / "search_spaces").glob("*.yaml"):
        assert file.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
