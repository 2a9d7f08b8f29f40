"""The audit of the data in a plan, in the exit status, in the run folder and in the report."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cxr_models.audit import LEAKS, Audit, Example, Finding, Severity
from cxr_models.dataset import read_manifest
from cxr_models.shortcuts import Shortcut, Shortcuts
from cxr_models.splits import assign_splits, write_split_csv
from sweep.audit_record import audit_tags, bar_json, finding_json, pair_pictures, read_audit, write_audit
from sweep.audit_view import AuditRefused, render_audit
from sweep.dataspec import Leak
from sweep.earlier import EarlierModel, Learned, earlier_findings
from sweep.record import RunFolder
from sweep.report import write_report
from sweep.run import DONE, UNFINISHED, WRONG_INPUT, main
from sweep.spec import read_spec
from sweep.verdict import cautions
from tests import layouts
from tests.test_report import Page
from tests.test_weights import saved_model

ROOT = Path(__file__).parent.parent
SPACE = """\
name: audited
data:
  source: {source}
{more}
objective: macro_f1
search: {{trials: 2}}
space: {{backbone: mobilenet_v2_0.35, weights: bundled, image_side: 96, freeze: all, epochs: 2}}
"""


def write_space(folder: Path, source: Path, more: str = "") -> Path:
    file = folder / "audited.yaml"
    file.write_text(SPACE.format(source=source, more=more))
    return file


@pytest.fixture
def leaking(tmp_path: Path) -> Path:
    """A given split with one patient on two sides, one copy on two sides and one under two labels."""
    rows = []
    for part in ("train", "val", "test"):
        for place, label in enumerate(("sick", "well")):
            for number in range(6):
                name = f"{part}-{label}-{number}.png"
                layouts.save(tmp_path / "data" / name, place)
                rows.append((name, label, f"P{part}{label}{number}", part))
    layouts.save(tmp_path / "data" / "again.png", 3)
    rows.append(("again.png", "sick", "Ptrainsick0", "test"))
    for number, (label, part) in enumerate((("sick", "val"), ("well", "train"))):
        with Image.open(tmp_path / "data" / f"train-sick-{number}.png") as picture:
            picture.save(tmp_path / "data" / f"copy-{number}.bmp")
        rows.append((f"copy-{number}.bmp", label, f"other{number}", part))
    with (tmp_path / "data" / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "patient", "split"), *rows])
    return tmp_path / "data" / "list.csv"


def test_leaks_end_a_sweep_before_it_begins(tmp_path, cache_dir, leaking, capsys):
    space = write_space(tmp_path, leaking)
    arguments = [str(space), "--cache-dir", str(cache_dir), "--out", str(tmp_path / "runs")]
    for mode in ([], ["--plan"]):
        assert main([*arguments, *mode]) == UNFINISHED
        shown = capsys.readouterr()
        assert "leak: patient_on_two_sides: 1 patient of 38 " in shown.out
        assert "again.png, train-sick-0.png: patient Ptrainsick0: 1 in test, 1 in train" in shown.out
        assert "--set data.allow='[patient_on_two_sides, duplicate_on_two_sides, one_image_two_labels]'" in shown.err
        assert not (tmp_path / "runs").exists(), "a refused sweep made a run folder"


def test_what_is_allowed_does_not_stop(tmp_path, cache_dir, leaking, capsys):
    some = write_space(tmp_path, leaking, "  allow: [patient_on_two_sides, duplicate_on_two_sides]")
    assert main([str(some), "--plan", "--cache-dir", str(cache_dir)]) == UNFINISHED
    shown = capsys.readouterr()
    assert "one_image_two_labels: 1 picture has more than one label" in shown.err
    assert "patient_on_two_sides: " not in shown.err
    assert "allowed leak: patient_on_two_sides" in shown.out
    everything = f"data.allow=[{', '.join(LEAKS)}]"
    made = "patient_on_two_sides, duplicate_on_two_sides, one_image_two_labels"
    assert f"--set data.allow='[{made}]'" in shown.err, "what the file allows is still allowed"
    assert main([str(some), "--plan", "--cache-dir", str(cache_dir), "--set", everything]) == DONE
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "allowed leak: one_image_two_labels" in shown.out


def test_an_earlier_model_that_knows_the_test_images_ends_a_sweep_too(tmp_path, cache_dir, capsys):
    data = layouts.class_folders(tmp_path / "data", images=20)
    model = saved_model(tmp_path / "runs" / "first" / "best" / "model.keras", "mobilenet_v2_0_35")
    manifest = read_manifest(data)
    write_split_csv(tmp_path / "runs" / "first" / "split.csv", manifest, assign_splits(manifest, seed=1))
    model.with_name("config.json").write_text('{"weights": "imagenet"}')
    (tmp_path / "runs" / "first" / "summary.json").write_text("{}")
    space = write_space(tmp_path, data)
    known = ["--plan", "--cache-dir", str(cache_dir), "--weights", str(tmp_path / "runs" / "first")]
    arguments = [str(space), *known]
    assert main([*arguments, "--seed", "1"]) == DONE
    shown = capsys.readouterr().out
    assert "warning: earlier_model_saw_validation: The model that mobilenet_v2_0.35 starts from" in shown
    assert "earlier_model_saw_test" not in shown
    assert main([*arguments, "--seed", "2"]) == UNFINISHED
    shown = capsys.readouterr()
    assert re.search(r"has learned from \d+ of the \d+ test images\. They are no test of what builds", shown.err)
    assert "remedy: Take the split of that sweep" in shown.err
    assert "--set data.allow='[earlier_model_saw_test]'" in shown.err
    assert main([*arguments, "--seed", "2", "--set", "data.allow=[earlier_model_saw_test]"]) == DONE
    assert "allowed leak: earlier_model_saw_test" in capsys.readouterr().out


def test_what_an_earlier_model_saw_is_told_beside_the_verdict(tmp_path):
    manifest = read_manifest(layouts.class_folders(tmp_path / "data", images=4))
    models = [EarlierModel("The model", Learned(frozenset(record.pixels for record in manifest.records)))]
    models += [EarlierModel("The other", Learned(whole=False))]
    allowed = earlier_findings(models, manifest, ["test"] * 12, chosen_by="val", allow=["earlier_model_saw_test"])
    verdict = {"comparisons": [], "strategies": {}}
    told = cautions({"verdict": verdict, "audit": [finding_json(each) for each in allowed], "strategies": []})
    assert told == [
        "The data's audit (an allowed leak): The model has learned from 12 of the 12 test images. They are no test of "
        "what builds on it.",
        "The data's audit: The other has learned from images that are not all known. Test images may be among them.",
    ]


def test_a_leak_that_does_not_exist_is_named_with_the_nearest(tmp_path, cache_dir, leaking, capsys):
    wrong = write_space(tmp_path, leaking, "  allow: [patients_on_two_sides, near_duplicates]")
    assert main([str(wrong), "--plan", "--cache-dir", str(cache_dir)]) == WRONG_INPUT
    said = capsys.readouterr().err
    assert "unknown 'patients_on_two_sides'; did you mean 'patient_on_two_sides'? known: " in said
    assert "unknown 'near_duplicates'" in said, "only what stops can be allowed"


def test_what_is_allowed_is_written_back(tmp_path, leaking):
    spec = read_spec(write_space(tmp_path, leaking, "  allow: [one_image_two_labels]"))
    (tmp_path / "back.yaml").write_text(spec.to_yaml())
    assert read_spec(tmp_path / "back.yaml") == spec
    assert spec.data.allow == ("one_image_two_labels",)
    assert get_args(Leak) == LEAKS
    assert read_spec(write_space(tmp_path, leaking)).data.allow == ()


def test_a_second_audit_loads_and_reads_nothing(tmp_path, capsys):
    """Not even scikit-learn, pandas or SciPy: what was found lies in the cache."""
    source = layouts.class_folders(tmp_path / "data")
    for path in source.rglob("*-1.png"):
        with Image.open(path) as picture:
            picture.resize((64, 64)).save(path.with_name(f"small-{path.name}"))
    command = [str(write_space(tmp_path, source)), "--plan", "--cache-dir", str(tmp_path / "cache")]
    heavy = {"tensorflow", "keras", "ray", "mlflow", "sklearn", "scipy", "pandas", "matplotlib"}
    assert main(command) == DONE
    first = capsys.readouterr().out
    assert "note: near_duplicates: 3 pairs of images are one picture" in first
    code = (
        "import sys; from cxr_models import dataset, duplicates; from sweep.run import main\n"
        "def refused(path): raise AssertionError(path)\n"
        "dataset.examine = duplicates.read_picture = refused\n"
        f"assert main({command!r}) == 0; print(*{heavy!r} & sys.modules.keys(), 'end')"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert again.splitlines() == [*first.splitlines(), "end"]


def test_progress_is_told_in_plain_lines_where_output_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sweep.progress.LINE_INTERVAL_S", 0.0)
    source = layouts.class_folders(tmp_path / "data")
    assert main([str(write_space(tmp_path, source)), "--plan", "--cache-dir", str(tmp_path / "cache")]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("reading images: ") for line in lines) == 24
    assert any(line.startswith("comparing images: 24 of 24, about 0 s left") for line in lines)


# What a person sees


def finding(name: str, severity: Severity, *examples: Example, allowed: bool = False) -> Finding:
    return Finding(name, severity, f"Something about {name}.", "Do something.", examples, allowed)


AUDIT = Audit(
    used=90,
    found=100,
    left_out={"unreadable": 4, "not in the subset": 6},
    shortcuts=Shortcuts(0.5, 0.25, (Shortcut("size", 7, 0.61, 0.42, True), Shortcut("together", 9, 0.634, 0.45, True))),
    findings=(
        finding("patient_on_two_sides", Severity.LEAK, Example(("a.png", "b.png"), "patient 7"), allowed=True),
        finding("class_follows_from_size", Severity.WARNING),
        finding(
            "truncated_files", Severity.WARNING, *(Example((f"cut-{number}.png",), "too short") for number in range(25))
        ),
        finding("near_duplicates", Severity.NOTE, *(Example((f"{n}.png", f"{n}.jpg"), "0.9") for n in range(9))),
    ),
)


def test_the_terminal_shows_the_bar_and_every_finding():
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render_audit(AUDIT))
    shown = " ".join(capture.get().split())
    assert "audit of the data: 90 of 100 images found are used (4 unreadable, 6 not in the subset)" in shown
    assert "has 63.4 % accuracy (45.0 % balanced)" in shown
    assert "nothing: always the largest class │ │ 50.0 % │ 25.0 %" in shown
    assert "allowed leak: patient_on_two_sides: Something about patient_on_two_sides. Do something." in shown
    assert "cut-19.png: too short and 5 more" in shown
    assert "4.png, 4.jpg: 0.9 and 4 more" in shown


def test_without_anything_to_see_there_is_no_bar():
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_audit(Audit(5, 5, {}, Shortcuts(0.5, 0.5, ()), ())))
    assert "no bar to beat: source, size, bit depth, format are the same in all images" in capture.get()


def test_a_refusal_names_only_what_stops():
    stopping = finding("one_image_two_labels", Severity.LEAK)
    text = str(AuditRefused(Audit(5, 5, {}, None, (stopping, *AUDIT.findings))))
    assert "one_image_two_labels: Something about one_image_two_labels.\n    remedy: Do something." in text
    assert "Something about patient_on_two_sides" not in text


def test_what_programs_are_told():
    assert finding_json(AUDIT.findings[0]) == {
        "name": "patient_on_two_sides",
        "severity": "leak",
        "allowed": True,
        "evidence": "Something about patient_on_two_sides.",
        "remedy": "Do something.",
        "examples": 1,
    }
    assert bar_json(AUDIT) == {
        "sees": "together",
        "accuracy": 0.634,
        "balanced_accuracy": 0.45,
        "majority": 0.5,
        "chance": 0.25,
    }
    assert bar_json(Audit(5, 5, {}, None, ())) is None
    assert audit_tags(AUDIT) == {"audit": "patient_on_two_sides;class_follows_from_size;truncated_files"}
    assert audit_tags(Audit(5, 5, {}, None, AUDIT.findings[3:])) == {}


# The run folder and the report


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder with the audit of a data set whose images are there."""
    for number in range(9):
        for name in (f"{number}.png", f"{number}.jpg"):
            layouts.save(tmp_path / "data" / "ab"[number % 2] / name, number)
    run = RunFolder.create(tmp_path, "audited", exactly=True)
    run.spec.write_text(
        "name: a\ndata: phantom\nobjective: macro_f1\nsearch: {trials: 1}\nspace: {backbone: vanilla_cnn}\n"
    )
    manifest = read_manifest(tmp_path / "data")
    near = finding(
        "near_duplicates",
        Severity.NOTE,
        *(Example((f"{'ab'[n % 2]}/{n}.png", f"{'ab'[n % 2]}/{n}.jpg"), f"pair {n} <&>") for n in range(9)),
    )
    write_audit(run, Audit(90, 100, AUDIT.left_out, AUDIT.shortcuts, (*AUDIT.findings[:3], near)), manifest)
    return run


def test_the_run_folder_has_every_example_and_pictures_of_pairs(folder):
    known = json.loads(folder.audit.read_text())
    assert [len(each["examples"]) for each in known["findings"]] == [1, 0, 25, 9]
    assert known["left_out"] == {"unreadable": 4, "not in the subset": 6}
    assert known["shortcuts"]["found"][1]["accuracy"] == 0.634
    pictures = list(pair_pictures(folder, read_audit(folder)))
    assert [picture.paths for picture in pictures[:2]] == [("a/0.png", "a/0.jpg"), ("b/1.png", "b/1.jpg")]
    with Image.open(folder.audit_pictures / "02.png") as picture:
        assert picture.size == (384, 192)
        left, right = np.hsplit(np.asarray(picture).astype(int), 2)
    assert left.std() > 10
    assert right.std() > 10


def test_a_picture_of_an_image_that_is_gone_does_not_end_a_sweep(folder, tmp_path):
    manifest = read_manifest(tmp_path / "data")
    for path in (tmp_path / "data").rglob("*.jpg"):
        path.unlink()
    write_audit(
        folder,
        Audit(2, 2, {}, None, (finding("near_duplicates", Severity.NOTE, Example(("a/0.png", "a/0.jpg"))),)),
        manifest,
    )
    with Image.open(folder.audit_pictures / "01.png") as picture:
        assert picture.crop((192, 0, 384, 192)).getextrema() == (0, 0)


def test_a_name_that_is_no_utf_8_can_be_printed_and_written(folder, tmp_path):
    name = os.fsdecode(b"a/caf\xe9.png")
    shutil.copy(tmp_path / "data/a/0.png", tmp_path / "data" / name)
    found = finding("exact_duplicates", Severity.NOTE, Example(("a/0.png", name), f"patient {name}"))
    audit = Audit(2, 2, {}, None, (found,))
    write_audit(folder, audit, read_manifest(tmp_path / "data"))
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_audit(audit))
    for text in (capture.get(), Page(write_report(folder)).text):
        assert r"a/0.png, a/caf\udce9.png: patient a/caf\udce9.png" in text
    with Image.open(folder.audit_pictures / "01.png") as picture:
        left, right = np.hsplit(np.asarray(picture), 2)
    assert (left == right).all(), "the picture is that of the file"


def test_the_report_shows_bar_findings_and_pairs(folder):
    page = Page(write_report(folder))
    assert "90 of 100 images found are used; 4 unreadable, 6 not in the subset." in page.text
    assert page.tables["bar"][1:] == [
        ["nothing: always the largest class", "–", "0.500", "0.250", ""],
        ["size", "7", "0.610", "0.420", "yes"],
        ["together", "9", "0.634", "0.450", "yes"],
    ]
    assert [row[:2] for row in page.tables["findings"][1:]] == [
        ["patient_on_two_sides", "leak, allowed"],
        ["class_follows_from_size", "warning"],
        ["truncated_files", "warning"],
        ["near_duplicates", "note"],
    ]
    assert "cut-24.png: too short" in page.tables["findings"][3][2]
    assert "near_duplicates: a/0.png, a/0.jpg: pair 0 <&>" in page.text
    assert sum(value.startswith("data:image/png;base64,") for name, value in page.attributes if name == "src") == 9


def test_a_folder_of_before_has_no_such_section(folder):
    folder.audit.unlink()
    page = Page(write_report(folder))
    assert "bar" not in page.tables
    assert "audit" not in page.ids
