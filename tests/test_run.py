"""The command line: what a wrong command says and starts, what a plan shows, what an interruption keeps."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cxr_models.trial import METRICS, Diagnosis, Objective, Outcome, TrialConfig, TrialResult
from sweep.reference import ReferenceSpec
from sweep.run import INTERRUPTED, PIPED_WIDTH, WRONG_INPUT, main, print_results

ROOT = Path(__file__).parent.parent
GOOD = """\
name: good
data: {data}
objective: macro_f1
search: {{trials: 2}}
space:
  backbone: vanilla_cnn
  freeze: none
  image_side: 72
  epochs: 1
"""


@pytest.fixture
def space(tmp_path, radiography_folder) -> Path:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD.format(data=radiography_folder))
    return file


@pytest.fixture
def refuse(tmp_path, cache_dir, capsys, monkeypatch):
    """Run a command that must be refused; returns what it said."""

    def run(*arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        before = {name for name in ("ray", "mlflow", "tensorflow") if name in sys.modules}
        status = main([*map(str, arguments), "--cache-dir", str(cache_dir), "--out", str(tmp_path / "runs")])
        said = capsys.readouterr().err
        assert status == WRONG_INPUT
        assert "Traceback" not in said
        assert not list((tmp_path / "runs").glob("*/*")), "a refused command made a run folder"
        assert {name for name in ("mlflow", "tensorflow") if name in sys.modules} <= before
        return said

    return run


def class_folders(root: Path, **images: int) -> Path:
    generator = np.random.default_rng(0)
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 255, (20, 20)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def test_a_missing_file(refuse, tmp_path):
    assert f"does not exist: {tmp_path}/absent.yaml" in refuse("absent.yaml")


def test_a_yaml_syntax_error_shows_the_line(refuse, tmp_path):
    (tmp_path / "bad.yaml").write_text("name: bad\nspace: {backbone: [vanilla_cnn\nsearch: {trials: 1}\n")
    said = refuse("bad.yaml")
    assert "line 3" in said
    assert "search: {trials: 1}" in said


def test_several_problems_are_shown_at_once(refuse, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "name: bad\ndata: phantom\nobjective: macro_f2\nserach: {}\nsearch: {trials: 3}\n"
        "space:\n  backbone: densnet121\n  freeze: al\n  learning_rate: {low: 0.1, high: 0.01}\n"
    )
    said = refuse("bad.yaml")
    assert "has 5 problems" in said
    for expected in (
        "line 3, objective.metric: unknown 'macro_f2'; did you mean 'macro_f1'?",
        "line 4, serach: unknown key; did you mean 'search'?",
        "line 7, space.backbone: unknown 'densnet121'; did you mean 'densenet121'?",
        "line 8, space.freeze: expected a freeze strategy",
        "line 9, space.learning_rate: expected low <= high, got low=0.1, high=0.01",
    ):
        assert expected in said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("freeze=first:9999", "'first:9999' does not fit vanilla_cnn, which has 9 layers; use at most first:9"),
        ("image_side=60", "vanilla_cnn needs at least 70 pixels, got 60"),
        ("freeze=all>none", "has 2 phases, but 1 epochs"),
        ("output=sigmoid", "sigmoid needs exactly 2 classes, but the data has 4"),
        ("resources.cpus_per_trial=999", "a trial asks for 999 CPUs, but there are"),
        ("data.patient=(", "expected a regular expression"),
        ("droput=0.1", "did you mean 'dropout'"),
    ],
)
def test_what_the_space_cannot_be(refuse, space, setting, message):
    assert message in refuse(space, "--set", setting)


def test_an_output_that_cannot_be_is_told_once(refuse, space):
    assert "has 1 problem:" in refuse(space, "--set", "output=sigmoid")


def test_weights_that_do_not_fit(refuse, space, tmp_path):
    (tmp_path / "wrong.weights.h5").write_text("no weights")
    pretrained = (space, "--set", "backbone=mobilenet_v2_0.35", "--set", "freeze=all")
    assert "is not an HDF5 file" in refuse(*pretrained, "--weights", "wrong.weights.h5")
    assert "no such file" in refuse(*pretrained, "--weights", "absent.weights.h5")
    assert "there are no bundled weights for resnet50" in refuse(
        space, "--set", "backbone=resnet50", "--set", "freeze=all", "--weights", "bundled"
    )


def test_imagenet_weights_without_a_network(refuse, space, monkeypatch, tmp_path):
    def unreachable(*arguments: object, **settings: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    said = refuse(space, "--set", "backbone=mobilenet_v2_0.35", "--set", "freeze=all", "--weights", "imagenet")
    assert "put the file mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_224_no_top.h5 into" in said


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "no images"),
        ({"only": 5}, "'only'"),
        ({"large": 9, "small": 2}, "class 'small' has 2 patients; at least 3 are needed"),
    ],
)
def test_data_that_cannot_be_used(refuse, space, tmp_path, images, message):
    folder = class_folders(tmp_path / "data", **images) if images else tmp_path / "empty"
    folder.mkdir(exist_ok=True)
    said = refuse(space, "--data", folder)
    assert message in said
    assert "remedy" in said or "do:" in said


def test_a_table_beside_the_wrong_folder(refuse, space, tmp_path):
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"x/{k}.png,{'ab'[k % 2]}\n" for k in range(9)))
    said = refuse(space, "--data", tmp_path / "list.csv")
    assert "found: 9 of 9 are missing; the first is 'x/0.png'" in said
    assert "remedy: copy the missing files there" in said


def test_data_that_is_not_there(refuse, space, tmp_path):
    assert str(tmp_path / "nowhere") in refuse(space, "--data", tmp_path / "nowhere")


def test_a_name_that_cannot_be_one(refuse, space):
    assert "expected letters, digits" in refuse(space, "--name", "my run/1")


def test_set_narrows_the_shipped_space_and_says_what_it_dropped(cache_dir, capsys):
    shipped = str(ROOT / "search_spaces" / "freeze.yaml")
    assert main([shipped, "--plan", "--set", "freeze=all", "--cache-dir", str(cache_dir)]) == 0
    assert "fixed points lie outside the space that the command line left; not run" in capsys.readouterr().out


def test_an_output_folder_that_is_a_file(tmp_path, space, cache_dir, capsys):
    (tmp_path / "taken").write_text("")
    for arguments in (["--out", str(tmp_path / "taken")], ["--out", str(tmp_path), "--name", "taken"]):
        assert main([str(space), "--cache-dir", str(cache_dir), *arguments]) == WRONG_INPUT
        assert "taken" in capsys.readouterr().err


def test_a_taken_name_is_told_before_the_images_are_looked_at(tmp_path, space, cache_dir, capsys):
    (tmp_path / "taken").mkdir()
    assert main([str(space), "--cache-dir", str(cache_dir), "--out", str(tmp_path), "--name", "taken"]) == WRONG_INPUT
    said = capsys.readouterr()
    assert "taken is a folder with an earlier sweep; choose another --name or --out" in said.err
    assert said.out == ""


def test_a_ray_address_that_does_not_answer(refuse, space):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert f"no Ray cluster answers at '127.0.0.1:{port}'" in refuse(space, "--address", f"127.0.0.1:{port}")


def test_gpus_on_a_machine_without_are_said_to_be_missing(space, cache_dir, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([str(space), "--plan", "--gpus-per-trial", "0.5", "--cache-dir", str(cache_dir)]) == 0
    assert "there is no GPU: trials run on CPUs" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "much", ""])
def test_a_cache_size_that_cannot_be_one(space, cache_dir, capsys, size):
    with pytest.raises(SystemExit) as refused:
        main([str(space), "--plan", "--cache-dir", str(cache_dir), f"--cache-gb={size}"])
    assert refused.value.code == WRONG_INPUT
    said = capsys.readouterr().err
    assert f"argument --cache-gb: expected a finite number of GB above 0, but got {size!r}; --no-cache keeps" in said


def test_a_size_for_nothing_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        main([str(ROOT / "search_spaces" / "smoke.yaml"), "--cache-gb", "3", "--no-cache"])
    assert refused.value.code == 2
    assert "argument --no-cache: not allowed with argument --cache-gb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cache-gb", "1.5"], "Features may take 1.5 GB in"),
        (["--no-cache"], "no features are kept: every trial runs its frozen layers in every epoch"),
        (["--cache-gb", "1e-6"], "and the cache has room for 1.0 kB: these trials run from the pixels"),
        ([], "Features may take"),
        (["--set", "hidden_units=[32, 16]"], "note: --set hidden_units='[32, 16]' was taken as 2 choices, 32 or 16;"),
        (["--set", "augmented_views=2"], "note: augmented_views does nothing here: no trial augments its images"),
    ],
)
def test_a_plan_says_what_features_may_take(cache_dir, capsys, arguments, expected):
    command = [str(ROOT / "search_spaces" / "smoke.yaml"), "--plan", "--cache-dir", str(cache_dir), *arguments]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert expected in shown
    assert ("computed once: what is stored" in shown) == ("--no-cache" not in arguments)


@pytest.mark.parametrize("name", ["freeze", "smoke"])
def test_a_plan_loads_nothing_heavy_and_says_what_will_run(name, cache_dir):
    command = [str(ROOT / "search_spaces" / f"{name}.yaml"), "--plan", "--cache-dir", str(cache_dir)]
    heavy = {"tensorflow", "keras", "ray", "mlflow"}
    code = f"import sys; from sweep.run import main; main({command!r}); print(*{heavy!r} & sys.modules.keys(), 'end')"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown.splitlines()[-1] == "end"
    assert "5,124" in shown  # the head of MobileNetV2 0.35 over four classes
    assert "410,208" in shown
    assert "600 images" in shown
    assert "trials" in shown


def test_output_that_nobody_reads_any_more_does_not_end_a_sweep():
    """`| head` closes the pipe; rich's own console would end the process, or the thread that runs the trials."""
    code = (
        "from sweep.run import _console; c = _console(); [c.print('x' * 1000) for _ in range(500)]; print('y' * 9999)"
    )
    command = f"{sys.executable} -c \"{code}; open('alive', 'w')\" | head -c 10"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert Path(folder, "alive").exists()


def test_an_interruption_keeps_the_finished_trials(tmp_path, space, cache_dir):
    """Ctrl-C as a terminal sends it: to the whole process group."""
    command = [sys.executable, "-u", "-m", "sweep.run", str(space), "--cache-dir", str(cache_dir)]
    command += [
        "--out",
        str(tmp_path / "runs"),
        "--trials",
        "40",
        "--set",
        "epochs=2",
        "--set",
        "search.algorithm=random",
    ]
    command += ["--set", "dropout={low: 0.0, high: 0.5}"]
    log = tmp_path / "log"
    with log.open("w") as output:
        sweep = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True)
        try:
            ended = b"2 of 40 trials ended"
            wait_for(lambda: ended in log.read_bytes() or sweep.poll() is not None, timeout_s=180)
            os.killpg(sweep.pid, signal.SIGINT)
            status = sweep.wait(timeout=90)
        finally:
            if sweep.poll() is None:
                os.killpg(sweep.pid, signal.SIGKILL)
    said = log.read_text()
    assert status == INTERRUPTED, said
    folder = tmp_path / "runs" / "good"
    with (folder / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) >= 2
    assert {trial["outcome"] for trial in trials} == {"completed"}
    assert f"{len(trials)} finished trials are kept in {folder}" in said.replace("\n", "")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"]
    assert "test" not in summary, "an interrupted sweep must not open the test set"
    assert (folder / "report.html").is_file()


def wait_for(condition: object, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.2)


def printed(
    parts: tuple[str, ...],
    reference: ReferenceSpec | None = None,
    doctor: tuple[Diagnosis, ...] = (),
    data: dict[str, Any] | None = None,
) -> list[str]:
    """What a sweep ends with on the terminal, whose test part has images if `parts` says so."""
    config = TrialConfig("efficientnet_v2_b0", freeze="all>stages:1>none")
    values = dict.fromkeys(METRICS, 0.9)
    result = TrialResult("1a2b3c4d", config, Outcome.COMPLETED, 3, 2, values, 12_345_678, 12_345_678, 4000.0)
    result = replace(result, doctor=doctor)
    row: dict[str, Any] = {"backbone": config.backbone, "freeze": config.freeze, "trials": 10, "best_val": 0.9}
    row |= {"best_epoch": 2, "outcome": "completed"}
    row |= {"median_val": 0.8, "trainable_parameters": 12_345_678, "frozen_parameters": 12_345_678}
    row |= {
        "train_seconds": 4000.0,
        "doctor": [asdict(each) for each in doctor],
        **{part: {"accuracy": 0.5, "loss": 0.7} for part in parts},
    }
    summary: dict[str, Any] = {"strategies": [row], "data": {"classes": ["COVID", "Normal"], **(data or {})}}
    summary |= {"epochs": {"run": 3, "full": 3, "from_features": 0}}
    if "test" in parts:
        figures = {key: {"value": 0.5, "low": 0.4, "high": 0.6} for key in METRICS}
        summary["test"] = {**figures, "images": 9, "patients": 5}
        summary["test_openings"] = [{"opened": "2026-01-01", "earlier_sweeps": 0}]
    objective = Objective("balanced_accuracy", "max")
    spec = SimpleNamespace(objective=objective, reference=reference)
    plan = SimpleNamespace(spec=spec, indices=lambda part: np.arange(9 if part in parts else 0))
    console = Console(width=PIPED_WIDTH, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_results(plan, [result], summary, console)
    return console.export_text().splitlines()


def test_the_strategies_are_printed_with_the_accuracy_on_every_part():
    lines = printed(("train", "val", "test"))
    title = "Strategies by validation balanced_accuracy, accuracy of the best on train, val, test"
    assert title in map(str.strip, lines)
    (row,) = (line for line in lines if line.count("0.500") == 3)
    assert "efficientnet_v2_b0 │ all>stages:1>none" in row  # nothing is cut or wrapped
    assert max(map(len, lines)) <= PIPED_WIDTH


def test_the_best_is_not_printed_without_what_the_doctor_found():
    blind = Diagnosis("class_never_predicted", True, "Of [the] 4 of covid none is recognised.", "Balance.")
    late = Diagnosis("still_improving", False, "The best epoch is 4 of 4.", "Allow more epochs.")
    lines = printed(("train", "val", "test"), doctor=(blind, late))
    in_tables = [line for line in lines if line.startswith(("│ 1a2b3c4d", "│ efficientnet_v2_b0 "))]
    assert len(in_tables) == 2, "ranking and strategies"
    assert all("│ ! 0.900 │" in " ".join(line.split()) for line in in_tables)
    assert "  1a2b3c4d efficientnet_v2_b0 all>stages:1>none (class_never_predicted, still_improving)" in lines
    place = next(place for place, line in enumerate(lines) if "best configuration:" in line)
    notes = [line.strip() for line in lines[place:] if line.startswith("  ! ")]
    assert notes == [
        "! class_never_predicted. Of [the] 4 of covid none is recognised. Balance.",
        "! still_improving. The best epoch is 4 of 4. Allow more epochs.",
    ]
    assert max(map(len, lines[: place - 1])) <= PIPED_WIDTH
    assert not [line for line in printed(("test",)) if "doctor" in line or "! " in line]


def test_a_sweep_without_a_test_part_says_so():
    text = "\n".join(printed(("train", "val")))
    assert "no test part: these are validation figures, and the choice was made on them" in text
    assert "accuracy of the best on train, val" in text


def test_a_subset_is_told_beside_the_figures_and_the_whole_is_not():
    told = "subset 0.25: 281 of 1,124 images, chosen by patients, stratified by class"
    assert told in printed(("train", "val", "test"), data={"images": 281, "spared": 843, "subset": 0.25})
    whole = printed(("train", "val", "test"), data={"images": 1124, "spared": 0, "subset": 1.0})
    assert not [line for line in whole if "subset" in line]


def test_strategies_that_were_not_evaluated_have_no_such_columns():
    assert any(line.startswith("Strategies by validation balanced_accuracy ") for line in printed(()))


def test_published_figures_are_printed_beside_ours():
    result = {"backbone": "efficientnet_b0", "freeze": "all", "label": "head only", "accuracy": {"test": 0.908}}
    reference = ReferenceSpec.model_validate(
        {"source": "a report", "classes": ["covid", "normal"], "results": [result]}
    )
    lines = printed(("train", "val", "test"), reference)
    assert any("head only (not in this sweep) │ test │    0.908 │    – " in line for line in lines)
    assert "splits differ" in lines[-1]
    other = reference.model_copy(update={"classes": ("tuberculosis", "normal")})
    assert "the reference (a report) is about other classes" in printed(("test",), other)[-1]
