"""Places that may not be read or written, as a user finds them who is not root: root may everything."""

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.layouts import class_folders

ROOT = Path(__file__).parent.parent
NOBODY = 65534
INSTALLED = Path(pytest.__file__).parent


def open_to_all(folder: Path) -> bool:
    """Whether everybody may read what lies in a folder."""
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in (folder, *folder.parents))


pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user who is not"),
    pytest.mark.skipif(
        not (open_to_all(ROOT) and open_to_all(INSTALLED)), reason="the code lies where no other user may read it"
    ),
]

# Every command in one process: what it imports takes seconds. Python itself may lie where nobody else may read, so
# that commands are run once as root first, and all modules are there.
PROGRAM = """
import contextlib, io, json, os, sys
first, commands = json.loads(sys.argv[1])
import sweep.run
with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
    print([sweep.run.main(command) for command in first])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.environ["HOME"] = "/nonexistent"
from sweep.record import RunFolder
from pathlib import Path
said = []
for command in commands:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        if command[0] == "out":
            try:
                RunFolder.create(Path(command[1]), "x", exactly=False); status = 0
            except ValueError as error:
                status = 2; errors.write(str(error))
        else:
            status = sweep.run.main(command)
    said.append([status, errors.getvalue()])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> Iterator[dict[str, tuple[int, str]]]:
    """What each command said, by the name of what was forbidden."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        yield run_all(Path(place))


def run_all(home: Path) -> dict[str, tuple[int, str]]:
    home.chmod(0o755)
    data = class_folders(home / "data")
    (home / "cache").mkdir()
    (home / "cache").chmod(0o777)
    (home / "closed").mkdir(mode=0o500)
    (home / "taken").write_text("")
    space = home / "space.yaml"
    space.write_text(
        f"name: s\ndata: {data}\nobjective: accuracy\nsearch: {{trials: 1}}\n"
        "space: {backbone: vanilla_cnn, image_side: 96, freeze: none}\n"
    )
    secret = home / "secret.yaml"
    secret.write_text(space.read_text())
    secret.chmod(0)
    sealed = class_folders(home / "sealed")
    sealed.chmod(0)
    within = class_folders(home / "within")
    (within / "Pneumonia").chmod(0)
    inner = class_folders(home / "inner")
    (inner / "Pneumonia" / "Pneumonia-1.png").chmod(0)
    listed = home / "list.csv"
    listed.write_text("path,label\n")
    listed.chmod(0)
    plan, cache = [str(space), "--plan"], ["--cache-dir", str(home / "cache")]
    commands = {
        "space": [str(secret), "--plan", *cache],
        "cache": [*plan, "--cache-dir", str(home / "closed" / "x")],
        "cache is a file": [*plan, "--cache-dir", str(home / "taken")],
        "data": [*plan, *cache, "--data", str(sealed)],
        "below data": [*plan, *cache, "--data", str(sealed / "Pneumonia")],
        "class": [*plan, *cache, "--data", str(within)],
        "image": [*plan, *cache, "--data", str(inner)],
        "table": [*plan, *cache, "--data", str(listed)],
        "weights": [*plan, *cache, "--set", "backbone=resnet50", "--set", "freeze=all", "--weights", f"{sealed}/a.h5"],
        "sound": [*plan, *cache],
        "out": ["out", str(home / "closed")],
        "out is a file": ["out", str(home / "taken")],
    }
    warm = ["--cache-dir", str(home / "warm")]
    first = [[*plan, *warm], [*plan, *warm, "--data", str(home / "none")], [str(home / "none.yaml"), *warm]]
    first.append([*plan, *warm, "--set", "backbone=resnet50", "--set", "freeze=all", "--weights", "x.h5"])
    for folder, _, files in os.walk(data):
        os.chmod(folder, stat.S_IRWXU | 0o055)
        for file in files:
            os.chmod(Path(folder) / file, 0o644)
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([first, list(commands.values())])],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    return {name: (status, text) for name, (status, text) in zip(commands, found, strict=True)}


def test_what_is_allowed_works(said):
    assert said["sound"] == (0, "")
    assert said["image"] == (0, "")  # a counted skip


@pytest.mark.parametrize(
    ("forbidden", "messages"),
    [
        ("space", ["secret.yaml has 1 problem", "expected a YAML file, got Permission denied"]),
        ("cache", ["--cache-dir has 1 problem", "closed/x: Permission denied; give another --cache-dir"]),
        ("cache is a file", ["taken: File exists; give another --cache-dir"]),
        ("data", ["no images, 0 other files", "sealed", "Permission denied", "get leave to read these folders"]),
        ("below data", ["sealed/Pneumonia': Permission denied", "that you may read it"]),
        ("table", ["list.csv", "Permission denied", "check that you may read it"]),
        ("weights", ["space.weights", "Permission denied"]),
        ("out", ["cannot make the run folder", "Permission denied; choose another --out"]),
        ("out is a file", ["cannot make the run folder", "choose another --out"]),
    ],
)
def test_what_is_forbidden_is_told_in_one_message(said, forbidden, messages):
    status, text = said[forbidden]
    assert status == 2
    assert "Traceback" not in text
    for message in messages:
        assert message in text


def test_a_class_that_may_not_be_read_is_counted(said):
    status, text = said["class"]
    assert (status, text) == (0, "")
