"""The Slurm script with stand-ins for Slurm, Ray and the program: what is started where, with what, and how it ends.

Not run on a Slurm cluster. The last test runs it with a real Ray and a real sweep; only Slurm is a stand-in there.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import lacking

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker" / "slurm" / "sweep.sbatch"
JOB = 900_000 + os.getpid()  # no other job's folder in /tmp
INTERRUPTED = 130

# Each stand-in writes what it was called with as one line of JSON.
NOTE = r"""
import json, os, pathlib, signal, sys, time

def note(**more):
    token = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    line = {
        "words": sys.argv[1:],
        "mode": oct(os.stat(token).st_mode & 0o777) if token else "",
        "token": pathlib.Path(token).read_text().strip() if token else "",
        "environment": {key: value for key, value in os.environ.items() if "TOKEN" in key},
        **more,
    }
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps({"program": os.path.basename(sys.argv[0]), **line}) + "\n")
"""
STAND_INS = {
    "scontrol": """
note()
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(os.environ["HOSTS"].split()))
""",
    # Runs the command once for each node, in turn, with what Slurm would set for it.
    "srun": """
import subprocess
words = sys.argv[1:]
first = next(i for i, word in enumerate(words) if not word.startswith("--"))
options = dict(word.removeprefix("--").partition("=")[::2] for word in words[:first])
hosts = options.get("nodelist", ",".join(os.environ["HOSTS"].split())).split(",")
note(options=options, command=words[first:])
given = sys.stdin.read() if words[first] == "bash" else ""
begun = []
for host in hosts:
    environment = {**os.environ, "SLURMD_NODENAME": host}
    child = subprocess.Popen(words[first:], stdin=subprocess.PIPE, text=True, env=environment)
    child.stdin.write(given)
    child.stdin.close()
    begun.append(child)
signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in begun])
for child in begun:
    child.wait()
""",
    "ray": """
note()
signal.signal(signal.SIGTERM, lambda *_: (note(ended=True), sys.exit(0)))
while True:
    time.sleep(0.05)
""",
    "python": """
if "-c" in sys.argv[:2] and "ray.init" not in sys.argv[2]:
    os.execv(os.environ["REAL_PYTHON"], ["python", *sys.argv[1:]])
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append("USR1"))
note()
if "sweep.run" in sys.argv:
    pathlib.Path(os.environ["NOTES"]).with_name("runs").joinpath("begun").touch()
    until = time.monotonic() + float(os.environ.get("TAKES", "0"))
    while not told and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2 if told else 0)
    note(told=told)
    sys.exit(130 if told else int(os.environ.get("STATUS", "0")))
until = time.monotonic() + 10  # as the real one does, for the nodes that it was told of
starts = lambda: pathlib.Path(os.environ["NOTES"]).read_text().count('{"program": "ray"')
while starts() < int(sys.argv[4]) and time.monotonic() < until:
    time.sleep(0.05)
sys.exit(int(os.environ.get("JOINED", "0")))
""",
}


class Slurm:
    """A Slurm that has one job: ours."""

    def __init__(self, folder: Path, stand_ins: Mapping[str, str] = STAND_INS) -> None:
        self.folder = folder
        self.notes = folder / "notes"
        self.begun: list[subprocess.Popen[str]] = []
        self.programs = folder / "bin"
        self.programs.mkdir()
        (folder / "runs").mkdir()
        for name, code in stand_ins.items():
            program = self.programs / name
            program.write_text(f"#!{sys.executable}\n{NOTE}\n{code}")
            program.chmod(0o755)

    def start(self, *words: str, hosts: str = "n1", **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "NOTES": str(self.notes),
            "REAL_PYTHON": sys.executable,
            "HOSTS": hosts,
            "SLURM_JOB_ID": str(JOB),
            "SLURM_JOB_NAME": "depth",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_CPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_SUBMIT_DIR": str(self.folder),
            **variables,
        }
        process = subprocess.Popen(
            ["bash", str(SCRIPT), *words],
            cwd=self.folder,
            env={key: value for key, value in environment.items() if value},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.begun.append(process)
        return process

    def end(self) -> None:
        """End the jobs that a failed test has left."""
        for process in self.begun:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def run(self, *words: str, hosts: str = "n1", timeout_s: float = 60, **variables: str) -> tuple[int, str]:
        process = self.start(*words, hosts=hosts, **variables)
        said, _ = process.communicate(timeout=timeout_s)
        return process.returncode, said

    def calls(self, program: str) -> list[dict]:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [each for each in map(json.loads, lines) if each["program"] == program]

    def sweeps(self) -> list[dict]:
        return [each for each in self.calls("python") if "sweep.run" in each["words"]]

    def wait_for_sweep(self) -> None:
        until = time.monotonic() + 30
        while not (self.folder / "runs" / "begun").exists():
            assert time.monotonic() < until, "no sweep has begun"
            time.sleep(0.05)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    left = list(Path("/tmp").glob(f"cxr-sweep-{JOB}.*"))
    for path in left:
        shutil.rmtree(path)
    assert not left


@pytest.fixture
def slurm(tmp_path) -> Iterator[Slurm]:
    made = Slurm(tmp_path)
    yield made
    made.end()


@pytest.fixture
def slurm_with_a_real_ray(tmp_path) -> Iterator[Slurm]:
    if not shutil.which("ray", path=str(Path(sys.executable).parent)):
        lacking(["ray beside this Python"])
    made = Slurm(tmp_path, REAL)
    yield made
    made.end()


def options(words: Sequence[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))


def test_one_node_runs_head_and_driver(slurm):
    status, said = slurm.run("space.yaml", "--trials", "4")
    assert status == 0, said
    (start,) = [each for each in slurm.calls("ray") if "ended" not in each]
    asked = options(start["words"])
    assert start["words"][0] == "start"
    assert {"head", "block"} <= set(asked)
    assert asked["include-dashboard"] == "false"
    assert (asked["num-cpus"], asked["num-gpus"]) == ("8", "0")
    (sweep, _) = slurm.sweeps()
    expected = ["-m", "sweep.run", "space.yaml", "--trials", "4", "--address"]
    expected += [f"{asked['node-ip-address']}:{asked['port']}", "--out", "runs", "--name", f"depth-{JOB}"]
    assert sweep["words"] == expected
    assert not slurm.calls("srun")
    assert [each for each in slurm.calls("ray") if "ended" in each]


def test_every_node_gets_the_token_of_the_job_and_nobody_else_can_read_it(slurm):
    status, said = slurm.run("space.yaml", hosts="n1 n2 n3", RAY_AUTH_TOKEN="of another cluster", RAY_ADDRESS="it:1")
    assert status == 0, said
    starts = [each for each in slurm.calls("ray") if "ended" not in each]
    assert len(starts) == 3
    every = [*starts, *slurm.sweeps()]
    assert len({each["token"] for each in every}) == 1
    token = starts[0]["token"]
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert {each["mode"] for each in every} == {"0o600"}
    for each in every:
        assert set(each["environment"]) == {"RAY_AUTH_TOKEN_PATH"}
    for program in ("srun", "ray", "python", "scontrol"):
        assert not any(token in word for each in slurm.calls(program) for word in each["words"])
    assert token not in said
    status, _ = slurm.run("space.yaml", SWEEP_NAME="other")
    assert slurm.sweeps()[-1]["token"] != token
    assert not [path for path in Path("/tmp").iterdir() if path.is_file() and _holds(path, token)]


def _holds(path: Path, text: str) -> bool:
    try:
        return path.stat().st_size < 4096 and text in path.read_text()
    except (OSError, UnicodeDecodeError):
        return False


def test_the_other_nodes_join_the_head(slurm):
    status, said = slurm.run("space.yaml", hosts="n1 n2 n3")
    assert status == 0, said
    head, *others = sorted(
        (each for each in slurm.calls("ray") if "ended" not in each), key=lambda each: "--head" not in each["words"]
    )
    asked = options(head["words"])
    assert [options(each["words"])["address"] for each in others] == [f"{asked['node-ip-address']}:{asked['port']}"] * 2
    assert not any({"head", "temp-dir", "port"} & set(options(each["words"])) for each in others)
    step = next(each for each in slurm.calls("srun") if each["command"][0] == "bash")["options"]
    assert (step["nodelist"], step["nodes"], step["ntasks"], step["cpus-per-task"]) == ("n2,n3", "2", "2", "8")
    wait = next(each for each in slurm.calls("python") if "ray.init" in "".join(each["words"]))
    assert wait["words"][2:4] == [f"{asked['node-ip-address']}:{asked['port']}", "3"]
    assert len([each for each in slurm.calls("ray") if "ended" in each]) == 3


def test_gpus_are_those_that_slurm_gave(slurm):
    slurm.run("space.yaml", CUDA_VISIBLE_DEVICES="2,3,7", SLURM_MEM_PER_NODE="65536")
    asked = options(slurm.calls("ray")[0]["words"])
    assert asked["num-gpus"] == "3"
    assert asked["memory"] == str((65536 - 1024) * 1024**2)


@pytest.mark.parametrize(
    ("variables", "megabytes"),
    [({"SLURM_MEM_PER_CPU": "4096"}, 8 * 4096), ({"SLURM_MEM_PER_NODE": "0"}, None), ({}, None)],
)
def test_memory_is_what_slurm_gave(slurm, variables, megabytes):
    slurm.run("space.yaml", **variables)
    asked = options(slurm.calls("ray")[0]["words"])
    assert asked.get("memory") == (str((megabytes - 1024) * 1024**2) if megabytes else None)


def test_nodes_and_jobs_share_no_port(slurm):
    """Three raylets of one machine, which the stand-in makes of three nodes, and a socket that is in the way."""
    first = 10000 + 500 * (JOB % 45)
    with socket.create_server(("0.0.0.0", first + 3)):
        slurm.run("space.yaml")
    asked = options(slurm.calls("ray")[0]["words"])
    numbers = {name: int(value) for name, value in asked.items() if name.endswith("port")}
    block = numbers["port"]
    assert block != first
    assert block % 500 == 0
    assert all(block <= number < block + 500 for number in numbers.values())
    single = [number for name, number in numbers.items() if name not in ("min-worker-port", "max-worker-port")]
    assert len(set(single)) == len(single) == 8
    assert max(single) < numbers["min-worker-port"] < numbers["max-worker-port"]
    assert numbers["max-worker-port"] < 32768  # where Linux begins to hand ports out by itself


def test_ray_start_knows_every_option(slurm):
    from ray.scripts.scripts import start

    known = {name.removeprefix("--") for option in start.params for name in [*option.opts, *option.secondary_opts]}
    slurm.run("space.yaml", hosts="n1 n2", SLURM_MEM_PER_NODE="65536")
    used = set().union(*(options(each["words"]) for each in slurm.calls("ray")))
    assert {"head", "address", "temp-dir", "memory"} <= used <= known


def test_a_sweep_goes_on_where_its_folder_exists(slurm):
    (slurm.folder / "elsewhere" / "long").mkdir(parents=True)
    slurm.run("space.yaml", SWEEP_OUT="elsewhere", SWEEP_NAME="long")
    assert slurm.sweeps()[0]["words"][-5:] == ["--out", "elsewhere", "--name", "long", "--resume"]


@pytest.mark.parametrize("status", [1, 2])
def test_the_sweeps_own_status_is_the_jobs(slurm, status):
    assert slurm.run("space.yaml", STATUS=str(status))[0] == status
    assert not [each for each in slurm.calls("scontrol") if "requeue" in each["words"]]


def test_before_the_time_is_over_the_sweep_ends_and_the_job_is_queued_again(slurm):
    process = slurm.start("space.yaml", hosts="n1 n2", TAKES="30")
    slurm.wait_for_sweep()
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert "goes back into the queue" in said
    assert slurm.sweeps()[-1]["told"] == ["USR1"]
    assert slurm.calls("scontrol")[-1]["words"] == ["requeue", str(JOB)]
    lines = [json.loads(line) for line in slurm.notes.read_text().splitlines()]
    requeued = next(number for number, each in enumerate(lines) if each["words"][:1] == ["requeue"])
    ended = [number for number, each in enumerate(lines) if each["program"] == "ray" and "ended" in each]
    assert len(ended) == 2
    assert max(ended) < requeued, "Slurm ends the script as soon as the job is queued"


def test_a_job_that_is_cancelled_is_not_queued_again(slurm):
    process = slurm.start("space.yaml", TAKES="30")
    slurm.wait_for_sweep()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert slurm.sweeps()[-1]["told"] == ["USR1"]
    assert not [each for each in slurm.calls("scontrol") if "requeue" in each["words"]]


def test_a_job_is_not_queued_for_ever(slurm):
    process = slurm.start("space.yaml", TAKES="30", SWEEP_RESTARTS="3", SLURM_RESTART_COUNT="3")
    slurm.wait_for_sweep()
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert "after 3 restarts" in said
    assert not [each for each in slurm.calls("scontrol") if "requeue" in each["words"]]


def test_nodes_that_never_join_end_the_job(slurm):
    status, said = slurm.run("space.yaml", hosts="n1 n2", JOINED="1")
    assert status == 2
    assert "the sweep was not begun" in said
    assert not slurm.sweeps()
    assert len([each for each in slurm.calls("ray") if "ended" in each]) == 2


def test_a_ray_that_ends_before_the_sweep_ends_the_job(slurm):
    (slurm.programs / "ray").write_text("#!/bin/sh\necho 'no room for sockets' >&2\nexit 1\n")
    status, said = slurm.run("space.yaml")
    assert status == 2
    assert "no room for sockets" in said
    assert "Ray has ended on" in said
    assert not slurm.sweeps()


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ((), {}, "expected a search space"),
        (
            ("space.yaml", "--name=other"),
            {},
            "the run folder in SWEEP_OUT and SWEEP_NAME, but got --name=other",
        ),
        (("space.yaml", "--out", "runs"), {}, "but got --out"),
        (("space.yaml", "--resume"), {}, "--resume is chosen by this script"),
        (("space.yaml", "--address", "auto"), {}, "--address is chosen by this script"),
        (("space.yaml",), {"SLURM_JOB_ID": ""}, "expected to run inside a Slurm job"),
    ],
)
def test_mistakes_are_told_before_anything_starts(slurm, words, variables, said):
    status, told = slurm.run(*words, **variables)
    assert status == 2
    assert said in told
    assert not slurm.notes.exists()


def test_a_missing_program_is_named(slurm):
    (slurm.programs / "ray").unlink()
    status, said = slurm.run("space.yaml", PATH=f"{slurm.programs}:/usr/bin:/bin")
    assert status == 2
    assert "expected ray of an environment with cxr-sweep on the PATH" in said


@pytest.mark.parametrize(
    "path", [SCRIPT, *(ROOT / "docker" / "kubernetes" / "base" / "scripts").glob("run-*")], ids=str
)
def test_shellcheck_finds_nothing(path):
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not program:
        lacking(["shellcheck"])
    checked = subprocess.run([program, str(path)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


# A Slurm that runs every step here; the second node looks for its ports elsewhere, as its number says.
REAL = {
    "scontrol": STAND_INS["scontrol"],
    "srun": STAND_INS["srun"].replace(
        'environment = {**os.environ, "SLURMD_NODENAME": host}',
        'environment = {**os.environ, "SLURM_JOB_ID": str(int(os.environ["SLURM_JOB_ID"]) + hosts.index(host) + 1)}',
    ),
}
SPACE = """
name: depth
data: phantom
objective: macro_f1
search: {algorithm: grid, trials: 6}
space:
  backbone: mobilenet_v2_0.35
  weights: bundled
  image_side: 32
  freeze: [all, "convs:1", none]
  learning_rate: [1e-3, 3e-3]
  epochs: 6
"""


@pytest.mark.slow
def test_a_real_sweep_on_a_real_ray_is_interrupted_queued_again_and_comes_to_its_end(slurm_with_a_real_ray):
    slurm = slurm_with_a_real_ray
    tmp_path = slurm.folder
    environment = {
        "PATH": f"{slurm.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "TMPDIR": "",
    }
    (tmp_path / "space.yaml").write_text(SPACE)
    words = ["space.yaml", "--cache-dir", str(tmp_path / "cache")]
    process = slurm.start(*words, hosts="n1 n2", **environment)
    folder = tmp_path / "runs" / f"depth-{JOB}"
    epochs = folder / "state" / "epochs.jsonl"
    until = time.monotonic() + 600
    while not (epochs.is_file() and epochs.stat().st_size):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "no epoch was trained"
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED, said
    assert "2 of 2 nodes have joined" in said
    assert slurm.calls("scontrol")[-1]["words"] == ["requeue", str(JOB)]
    status, said = slurm.run(*words, hosts="n1 n2", timeout_s=1500, **environment, SLURM_RESTART_COUNT="1")
    assert status == 0, said
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trials"]["total"] == 6
    assert summary["trials"]["failed"] == 0
    sessions = [json.loads(line) for line in (folder / "state" / "sessions.jsonl").read_text().splitlines()]
    assert [each["ended"] for each in sessions if "ended" in each] == ["interrupted", "done"]
    left = [each for each in psutil.process_iter(["cmdline"]) if str(JOB) in " ".join(each.info["cmdline"] or ())]
    assert not left
