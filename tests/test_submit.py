"""Sweeps sent to a cluster: what is sent, what is shown of it, what comes back, and what is refused."""

import json
import random
import shlex
import socket
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweep import following, parcel, run
from sweep.jobs import LEAST_RAY, ClusterRefused, JobServer, checked_address
from sweep.pickup import FETCHED
from sweep.submit import UNKNOWN, main, run_options, submission_parser
from sweep.submitted import VARIABLE, Submission
from sweep.submitted import main as submitted_main
from tests.fake_cluster import FakeCluster, FakeJob

ROOT = Path(__file__).parent.parent
SPACE = """\
name: tiny
data: phantom   # "$HOME" and ${HOME} stay as they are
objective: macro_f1
search: {trials: 2}
space:
  backbone: vanilla_cnn
  freeze: none
  image_side: 72
  epochs: 1
"""
REMOTE = "/runs/tiny"
LINES = [f"trial {number} has ended with macro F1 0.{number:03}\n" for number in range(30)]


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    for name in ("PAUSE_S", "RETRY_S"):
        monkeypatch.setattr(following, name, 0.005)
    monkeypatch.setattr(following, "PAUSES_PER_ANSWER", 0)


@pytest.fixture(autouse=True)
def empty_home(monkeypatch, tmp_path) -> Path:
    """A home and a working folder without tokens and runs."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture
def space(tmp_path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(SPACE)
    return file


@pytest.fixture
def cluster(tmp_path) -> Iterator[FakeCluster]:
    with FakeCluster(disk=tmp_path / "cluster").serving() as found:
        yield found


def sweep_of(cluster: FakeCluster, **facts) -> None:
    """Let each sweep that is started be this one; parcels are packed for real."""

    def started(sent):
        words = shlex.split(sent["entrypoint"])
        if "sweep.parcel" in words:
            lines = parcel.packed(cluster.disk / words[-1].lstrip("/"))
            return FakeJob(sent, ["Running entrypoint\n" + "".join(f"{line}\n" for line in lines)])
        return FakeJob(sent, **{**facts, "steps": list(facts.get("steps", ()))})

    cluster.started = started


def submit(cluster: FakeCluster, *arguments: object) -> int:
    return main([*map(str, arguments), "--address", cluster.address])


def run_folder(root: Path, report: bytes = b"<html>report</html>") -> Path:
    """`REMOTE` on the cluster, as it lies on this machine."""
    folder = root / "cluster" / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "report.html").write_bytes(report)
    (folder / "summary.json").write_text('{"name": "tiny"}')
    (folder / "trials.csv").write_bytes(b"trial_id\r\nabc\r\n")
    return folder


class TestWhatIsSent:
    def test_the_file_and_the_options_and_nothing_of_this_machine(self, cluster, space, monkeypatch):
        monkeypatch.setenv("PLANTED_SECRET", "hunter2-of-this-machine")
        options = ("--trials", "5", "--set", "dropout=0.3", "--set", "search.halving=none", "--name", "mine")
        assert submit(cluster, space, *options) == 0
        (sent,) = [job.sent for job in cluster.jobs.values()]
        words = shlex.split(sent["entrypoint"])
        assert words[:4] == ["exec", "python", "-m", "sweep.submitted"]
        assert sorted(words[4:]) == ["--name=mine", "--set=dropout=0.3", "--set=search.halving=none", "--trials=5"]
        variables = sent["runtime_env"]["env_vars"]
        assert sent["runtime_env"].keys() == {"env_vars"}
        assert variables.keys() == {VARIABLE, "RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"}
        assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
        assert "$" not in variables[VARIABLE], "Ray would replace it"
        submission = Submission.decoded(variables[VARIABLE])
        assert (submission.name, submission.text) == ("tiny.yaml", SPACE)
        assert sent["submission_id"].startswith("mine-2")
        assert "hunter2" not in repr(cluster.asked)
        assert "hunter2" not in repr(submission)

    def test_every_option_arrives_as_it_was_given(self, space):
        given = (
            f"{space} --data /d --weights none --trials 3 --max-epochs 2 --seed 0 --set a=b --set c=d --out /o".split()
        )
        given += [
            "--name",
            "n",
            "--cache-dir",
            "/c",
            "--cache-gb",
            "1.5",
            "--weights-dir",
            "/w",
            "--tracking-uri",
            "http://m",
            "--plan",
        ]
        given += ["--cpus-per-trial", "0.5", "--gpus-per-trial", "0.25", "--concurrency", "2", "--resume"]
        own = ["--address", "http://x", "--insecure-http", "--fetch-to", "f", "--python", "p", "--detach"]
        sent = run_options(submission_parser().parse_args([*given, *own]))
        assert run.parser().parse_args([str(space), *sent]) == run.parser().parse_args(given)
        known = {word for word in given if word.startswith("--")} | {"--no-cache", "--inline", "--help", "--address"}
        options = {
            word.strip("[],") for word in run.parser().format_usage().split() if word.strip("[").startswith("--")
        }
        assert options <= known, "an option of sweep.run that this test does not know"

    @pytest.mark.parametrize(
        ("text", "arguments", "said"),
        [
            (SPACE.replace("vanilla_cnn", "vanila_cnn"), [], "vanilla_cnn"),
            (SPACE, ["--set", "dropuot=0.3"], "dropout"),
            (SPACE, ["--name", "a/b"], "letters, digits"),
            (SPACE, ["--inline"], "--inline runs a sweep in one process"),
        ],
    )
    def test_a_mistake_is_refused_before_anything_is_sent(self, cluster, space, capsys, text, arguments, said):
        space.write_text(text)
        assert submit(cluster, space, *arguments) == 2
        assert said in capsys.readouterr().err
        assert cluster.asked == []

    def test_a_file_too_long_for_a_variable(self, cluster, space, capsys):
        """The largest file that a sweep takes, of text that can hardly be packed."""
        generator = random.Random(0)
        noise = "".join(chr(generator.randrange(0x4E00, 0x9FA0)) for _ in range(32_000))
        space.write_text(SPACE + "".join(f"# {noise[start : start + 80]}\n" for start in range(0, len(noise), 80)))
        assert submit(cluster, space) == 2
        assert "100,000 characters at most when packed" in capsys.readouterr().err
        assert cluster.asked == []

    def test_a_path_of_this_machine_is_told(self, cluster, space, tmp_path, capsys):
        (tmp_path / "xrays").mkdir()
        submit(cluster, space, "--data", tmp_path / "xrays", "--detach")
        assert f"data.source {tmp_path}/xrays is on this machine too" in capsys.readouterr().out
        submit(cluster, space, "--set", f"weights=[none, {tmp_path}/xrays]", "--detach")
        assert f"weights {tmp_path}/xrays is on this machine too" in capsys.readouterr().out
        submit(cluster, space, "--data", "/data/only/there", "--detach")
        assert "this machine" not in capsys.readouterr().out

    def test_an_answer_that_is_lost_starts_no_second_sweep(self, cluster, space):
        lost = iter(["lost", "half"])
        cluster.fault = lambda method, path, before: next(lost, "") if method == "POST" else ""
        assert submit(cluster, space) == 0
        assert len(cluster.jobs) == 1
        assert sum(method == "POST" for method, *_ in cluster.asked) == 3

    def test_interrupted_while_it_is_sent(self, cluster, space, capsys, monkeypatch):
        def interrupted(self, *_):
            raise KeyboardInterrupt

        monkeypatch.setattr(JobServer, "submit", interrupted)
        assert submit(cluster, space) == UNKNOWN
        said = capsys.readouterr().err
        assert said.startswith("interrupted: tiny-2")
        assert "may have been started" in said
        monkeypatch.setattr(JobServer, "check", interrupted)
        assert submit(cluster, space) == 130
        assert "nothing was changed" in capsys.readouterr().err

    def test_detached(self, cluster, space, capsys):
        sweep_of(cluster, ends=False)
        assert submit(cluster, space, "--detach") == 0
        (job_id,) = cluster.jobs
        assert f"--attach {job_id}" in capsys.readouterr().out


class TestFollowing:
    def test_each_line_once_however_often_the_connection_is_lost(self, cluster, space, capsys):
        """Lines arrive in pieces; one request in three fails in one of five ways."""
        text, generator = "".join(LINES), random.Random(1)
        cuts = sorted(generator.sample(range(len(text)), 40))
        pieces = [text[low:high] for low, high in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        sweep_of(cluster, steps=pieces)
        faults = ["cut", "half", "lost", "502", "503"]
        cluster.fault = lambda method, path, before: (
            generator.choice(faults) if before > 3 and generator.random() < 1 / 3 else ""
        )
        assert submit(cluster, space) == 0
        shown = capsys.readouterr()
        assert [line for line in shown.out.splitlines(keepends=True) if line.startswith("trial")] == LINES
        assert shown.err.count("trying again") > 3

    def test_a_dashboard_that_is_away_for_a_while(self, cluster, space, capsys):
        sweep_of(cluster, steps=list(LINES))
        cluster.fault = lambda method, path, before: "cut" if 10 < before < 16 else ""
        assert submit(cluster, space) == 0
        shown = capsys.readouterr()
        assert "".join(LINES) in shown.out
        assert shown.err.count("no answer") == 1, "told once, not at every attempt"
        assert "connected again" in shown.err

    @pytest.mark.parametrize(
        ("state", "exit_status", "status", "said"),
        [
            ("SUCCEEDED", 0, 0, "exit status 0"),
            ("FAILED", 1, 1, "exit status 1"),
            ("FAILED", 2, 2, "exit status 2"),
            ("FAILED", 130, 130, "exit status 130"),
            ("FAILED", -9, 1, "killed by signal 9"),
            ("FAILED", 127, 1, "has no command 'python'"),
            ("FAILED", None, 1, "the supervisor died"),
            ("STOPPED", None, 130, "it was stopped"),
        ],
    )
    def test_the_sweeps_own_exit_status(self, cluster, space, capsys, state, exit_status, status, said):
        sweep_of(cluster, steps=["a\n"], state=state, exit_status=exit_status, message="the supervisor died")
        assert submit(cluster, space) == status
        assert said in capsys.readouterr().out

    def test_a_sweep_that_was_killed_tells_how_to_go_on(self, cluster, space, tmp_path, capsys):
        run_folder(tmp_path)
        log = [f"run folder: {REMOTE}\n", "trial 1\n"]
        sweep_of(cluster, steps=log, state="FAILED", exit_status=-9)
        assert submit(cluster, space) == 1
        assert "--resume --name tiny" in capsys.readouterr().out

    def test_wrong_data_on_the_cluster(self, cluster, space, capsys):
        sweep_of(cluster, steps=["no such folder\n"], state="FAILED", exit_status=2)
        assert submit(cluster, space, "--data", "/nowhere") == 2
        assert "paths are those of the cluster" in capsys.readouterr().out

    def test_a_cluster_that_stays_away(self, cluster, space, capsys, monkeypatch):
        monkeypatch.setattr(following, "PATIENCE_S", 0.05)
        sweep_of(cluster, steps=list(LINES))
        cluster.fault = lambda method, path, before: "cut" if before > 10 else ""
        assert submit(cluster, space) == UNKNOWN
        (job_id,) = cluster.jobs
        assert f"--attach {job_id}" in capsys.readouterr().err

    def test_a_cluster_that_was_started_anew(self, cluster, space, capsys):
        sweep_of(cluster, steps=list(LINES))
        asked = cluster.answer

        def answer(method, path, headers, body):
            if len(cluster.asked) > 10:
                cluster.jobs.clear()
            return asked(method, path, headers, body)

        cluster.answer = answer
        assert submit(cluster, space) == 1
        assert "started anew" in capsys.readouterr().err

    def test_ctrl_c_leaves_the_sweep_alone(self, cluster, space, capsys, monkeypatch):
        sweep_of(cluster, steps=list(LINES), ends=False)
        waits = iter(range(100))

        def interrupted(seconds):
            if next(waits) == 5:
                raise KeyboardInterrupt

        monkeypatch.setattr(following.time, "sleep", interrupted)
        assert submit(cluster, space) == UNKNOWN
        (job_id,) = cluster.jobs
        said = capsys.readouterr().out
        assert f"--attach {job_id}" in said
        assert f"--stop {job_id}" in said
        assert {path for method, path, *_ in cluster.asked if method != "GET"} == {"/api/jobs/"}

    def test_attached_it_is_shown_from_its_first_line_on(self, cluster, space, capsys):
        sweep_of(cluster, steps=list(LINES), state="FAILED", exit_status=1)
        submit(cluster, space, "--detach")
        (job_id,) = cluster.jobs
        for _ in range(2):  # while it runs, and when it has ended
            capsys.readouterr()
            assert submit(cluster, "--attach", job_id) == 1
            assert "".join(LINES) in capsys.readouterr().out

    def test_stopped(self, cluster, space, capsys):
        sweep_of(cluster, steps=["one\n", "two\n", "interrupted\nto go on: python -m sweep.submit ...\n"], ends=False)
        submit(cluster, space, "--detach")
        (job_id,) = cluster.jobs
        assert submit(cluster, "--stop", job_id) == 0
        shown = capsys.readouterr().out
        assert "two\n" in shown
        assert shown.count("to go on:") == 1
        assert submit(cluster, "--stop", job_id) == 0
        assert "nothing to stop" in capsys.readouterr().out

    def test_listed(self, cluster, space, capsys):
        assert submit(cluster, "--list") == 0
        assert "no sweep" in capsys.readouterr().out
        sweep_of(cluster, state="FAILED", exit_status=2)
        submit(cluster, space, "--detach")
        (job_id,) = cluster.jobs
        cluster.jobs["other"] = FakeJob({"submission_id": "other"})
        capsys.readouterr()
        assert submit(cluster, "--list") == 0
        shown = capsys.readouterr().out
        (row,) = [line.split() for line in shown.splitlines() if line.startswith(job_id)]
        assert row[:3] == [job_id, "tiny", "FAILED"]
        assert row[-5:] == ["2", "min", "5", "s", "2"]
        assert "1 job of other kinds" in shown

    @pytest.mark.parametrize("option", ["--attach", "--stop", "--fetch"])
    def test_an_id_that_is_none(self, cluster, capsys, option):
        assert submit(cluster, option, "nobody") == 2
        assert "Job nobody does not exist" in capsys.readouterr().err


class TestFetching:
    def test_the_files_come_as_they_are(self, cluster, space, tmp_path, capsys):
        remote = run_folder(tmp_path, random.Random(0).randbytes(300_000))
        sweep_of(cluster, steps=[f"run folder: {REMOTE}\n", *LINES])
        assert submit(cluster, space) == 0
        for name in parcel.FILES:
            assert (Path("runs/tiny") / name).read_bytes() == (remote / name).read_bytes()
        (job_id,) = cluster.jobs  # the second job is forgotten
        assert json.loads(Path("runs/tiny", FETCHED).read_text())["job"] == job_id
        shown = capsys.readouterr().out
        assert f"in {REMOTE} on the cluster" in shown
        assert parcel.BEGIN not in shown

        (remote / "report.html").write_bytes(b"newer")
        assert submit(cluster, "--fetch", job_id) == 0
        assert Path("runs/tiny/report.html").read_bytes() == b"newer", "the same sweep's files are renewed"
        assert submit(cluster, "--fetch", job_id, "--fetch-to", "here") == 0
        assert Path("here/report.html").read_bytes() == b"newer"

    def test_another_sweeps_folder_stays_as_it_is(self, cluster, space, tmp_path):
        own = tmp_path / "runs" / "tiny"
        own.mkdir(parents=True)
        (own / "report.html").write_text("of this machine")
        run_folder(tmp_path)
        sweep_of(cluster, steps=[f"run folder: {REMOTE}\n"])
        assert submit(cluster, space) == 0
        assert submit(cluster, space) == 0
        assert (own / "report.html").read_text() == "of this machine"
        assert {path.name for path in (tmp_path / "runs").iterdir()} == {"tiny", "tiny-2", "tiny-3"}

    def test_on_the_head_itself_nothing_is_copied(self, cluster, space, tmp_path, capsys):
        cluster.disk = Path("/")
        remote = run_folder(tmp_path)
        sweep_of(cluster, steps=[f"run folder: {remote}\n"])
        assert submit(cluster, space) == 0
        assert f"the run folder is on this machine: {remote}" in capsys.readouterr().out
        assert not (tmp_path / "runs").exists()
        assert submit(cluster, space, "--fetch-to", "here") == 0
        assert Path("here/report.html").read_bytes() == (remote / "report.html").read_bytes()

    def test_a_run_folder_at_a_url(self, cluster, space, capsys):
        sweep_of(cluster, steps=["run folder: s3://bucket/runs/tiny\n"])
        assert submit(cluster, space) == 0
        assert "s3://bucket/runs/tiny, and the report can be read there" in capsys.readouterr().out

    def test_a_folder_with_other_files_is_refused_before_the_sweep(self, cluster, space, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("mine")
        assert submit(cluster, space, "--fetch-to", tmp_path) == 2
        assert "holds other files" in capsys.readouterr().err
        assert submit(cluster, space, "--fetch-to", tmp_path / "notes.txt") == 2
        assert cluster.asked == []

    def test_what_is_not_there_or_too_large_is_told(self, cluster, space, tmp_path, capsys, monkeypatch):
        remote = run_folder(tmp_path, bytes(2000))
        (remote / "trials.csv").unlink()
        monkeypatch.setattr(parcel, "MOST_BYTES", 1000)
        sweep_of(cluster, steps=[f"run folder: {REMOTE}\n"])
        assert submit(cluster, space) == 0
        shown = capsys.readouterr().out
        assert "report.html was not fetched: it has 2,000 bytes, 1,000 at most" in shown
        assert "trials.csv was not fetched: No such file" in shown
        assert {path.name for path in Path("runs/tiny").iterdir()} == {"summary.json", FETCHED}

    def test_a_failure_leaves_the_sweeps_status(self, cluster, space, tmp_path, capsys):
        sweep_of(cluster, steps=["run folder: /runs/gone\n"])
        assert submit(cluster, space) == 0
        assert "not fetched" in (shown := capsys.readouterr().out)
        (job_id,) = cluster.jobs
        assert f"--fetch {job_id}" in shown
        assert submit(cluster, "--fetch", job_id) == 1

    def test_a_sweep_without_a_run_folder(self, cluster, space, capsys):
        sweep_of(cluster, steps=["no such data\n"], state="FAILED", exit_status=2)
        submit(cluster, space, "--detach")
        (job_id,) = cluster.jobs
        assert submit(cluster, "--fetch", job_id) == 1
        assert "no run folder" in capsys.readouterr().err

    def test_a_damaged_or_foreign_parcel(self, tmp_path):
        text = "\n".join(["noise", *parcel.packed(run_folder(tmp_path)), "noise"])
        assert parcel.unpacked(text).files["summary.json"] == b'{"name": "tiny"}'
        for old, new, said in (
            ('"bytes": 16', '"bytes": 17', "summary.json arrived damaged"),
            ('"content": "', '"content": "!', "arrived damaged"),
            ('"name": "trials.csv"', '"name": "../.bashrc"', r"got '../.bashrc'"),
            ('{"name": "trials.csv"', "{", "expected a file as JSON"),
            (parcel.END, "", "none came"),
        ):
            assert old in text
            with pytest.raises(parcel.ParcelDamaged, match=said):
                parcel.unpacked(text.replace(old, new))

    def test_the_heads_command(self, tmp_path, capsys):
        remote = run_folder(tmp_path)
        assert parcel.main([str(remote)]) == 0
        assert parcel.unpacked(capsys.readouterr().out).files.keys() == set(parcel.FILES)
        assert parcel.main([str(tmp_path / "gone")]) == 2


class TestTokens:
    @pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "home"])
    def test_found_where_ray_looks(self, cluster, space, empty_home, tmp_path, monkeypatch, capsys, place):
        cluster.token = "right"
        files = {"home": empty_home / ".ray" / "auth_token", "RAY_AUTH_TOKEN_PATH": tmp_path / "token"}
        files["home"].parent.mkdir()
        # Later places have wrong ones: the first counts.
        for name, file in files.items():
            file.write_text("right\n" if name == place else "wrong")
        if place != "home":
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(files["RAY_AUTH_TOKEN_PATH"]))
        if place == "RAY_AUTH_TOKEN":
            monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        assert submit(cluster, space) == 0
        shown = capsys.readouterr()
        assert "right" not in shown.out + shown.err
        assert "no token" not in shown.out

    def test_none_here(self, cluster, space, capsys):
        cluster.token = "right"
        assert submit(cluster, space) == 2
        assert "asks for a token, and there is none here" in capsys.readouterr().err

    def test_a_wrong_one(self, cluster, space, capsys, monkeypatch):
        cluster.token = "right"
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert submit(cluster, space) == 2
        said = capsys.readouterr().err
        assert "does not take the token found here" in said
        assert "wrong" not in said

    def test_a_file_that_cannot_be_read(self, cluster, space, capsys, monkeypatch, tmp_path):
        cluster.token = "right"
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
        assert submit(cluster, space) == 2
        assert f"RAY_AUTH_TOKEN_PATH: cannot read {tmp_path}/absent" in capsys.readouterr().err

    @pytest.mark.parametrize("token", ["two words", "a\nb: c", "ümlaut"])
    def test_one_that_is_none(self, cluster, space, capsys, monkeypatch, token):
        cluster.token = "right"
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        assert submit(cluster, space) == 2
        assert "expected a token in RAY_AUTH_TOKEN" in capsys.readouterr().err

    def test_none_is_sent_unasked_and_an_open_cluster_is_told(self, cluster, space, monkeypatch, capsys):
        monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
        assert submit(cluster, space) == 0
        assert "mine" not in repr(cluster.asked)
        assert "asks for no token" in capsys.readouterr().out

    def test_one_that_changes_meanwhile(self, cluster, space, monkeypatch, capsys):
        cluster.token = "right"
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        sweep_of(cluster, steps=list(LINES))

        def changed(method, path, before):
            cluster.token = "new" if before > 10 else "right"
            return ""

        cluster.fault = changed
        assert submit(cluster, space) == UNKNOWN
        assert "does not take the token" in capsys.readouterr().err


class TestAddresses:
    @pytest.mark.parametrize("address", ["http://10.0.0.5:8265", "http://ray.example:8265", "10.0.0.5:8265"])
    def test_http_to_another_machine_is_refused(self, space, capsys, address):
        assert main([str(space), "--address", address]) == 2
        said = capsys.readouterr().err
        assert "ssh -N -L 8265:127.0.0.1:8265" in said
        assert "--insecure-http" in said

    def test_what_is_allowed(self):
        assert checked_address("127.0.0.1:8265") == "http://127.0.0.1:8265"
        assert checked_address("http://localhost:8265/") == "http://localhost:8265"
        assert checked_address("http://[::1]:8265") == "http://[::1]:8265"
        assert checked_address("https://ray.example/team/") == "https://ray.example/team"
        assert checked_address("http://10.0.0.5:8265", insecure_http=True) == "http://10.0.0.5:8265"

    @pytest.mark.parametrize(
        "address", ["auto", "ray://head:10001", "", "http://", "http://a:b", "ftp://a", "http://a?b=c"]
    )
    def test_what_is_none(self, address):
        with pytest.raises(ClusterRefused, match="expected the address of a cluster's dashboard"):
            checked_address(address, insecure_http=True)

    def test_a_password_in_it(self):
        with pytest.raises(ClusterRefused, match="without a user name or password") as refused:
            checked_address("https://anna:geheim@ray.example")
        assert "geheim" not in str(refused.value)

    def test_nobody_there(self, space, capsys):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        assert main([str(space), "--address", f"http://127.0.0.1:{port}"]) == 2
        assert "is its head running" in capsys.readouterr().err

    def test_another_kind_of_server(self, space, capsys):
        """Such as Ray's own GCS, which speaks no HTTP/1."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=lambda: _answer(server, b"\x00\x00\x18\x04\x00\x00\x00\x00\x00\n"))
            thread.start()
            assert main([str(space), "--address", f"http://127.0.0.1:{server.getsockname()[1]}"]) == 2
            thread.join()
        assert "expected the dashboard of a Ray cluster" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("status", "said"),
        [("404", "another server (HTTP status 404)"), ("302", "sends on to https://elsewhere.example/")],
    )
    def test_another_web_server(self, cluster, space, capsys, monkeypatch, status, said):
        monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
        cluster.fault = lambda method, path, before: status
        assert submit(cluster, space) == 2
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize("version", ["2.9.3", "2.59.1", "1.13"])
    def test_an_old_ray(self, cluster, space, capsys, version):
        cluster.version = version
        assert submit(cluster, space) == 2
        assert f"but Ray {version} runs there" in capsys.readouterr().err
        assert not cluster.jobs

    def test_the_least_ray_is_the_projects(self):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert f"ray[default]>={'.'.join(map(str, LEAST_RAY))},<2.61" in extras["cluster"]

    def test_neither_a_proxy_nor_rays_own_variable_comes_between(self, cluster, monkeypatch):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
        assert JobServer(cluster.address, {}).check() == "2.60.0"


class TestOnTheHead:
    def test_the_sweep_gets_the_file_and_the_options(self, monkeypatch):
        seen = {}

        def sweep_run(argv, again):
            seen.update(argv=argv, again=again, name=Path(argv[0]).name, text=Path(argv[0]).read_text())
            return 130

        monkeypatch.setattr(run, "main", sweep_run)
        monkeypatch.setenv(VARIABLE, Submission("tiny.yaml", SPACE, ("python", "-m", "sweep.submit")).encoded())
        assert submitted_main(["--trials=5"]) == 130
        assert (seen["name"], seen["text"]) == ("tiny.yaml", SPACE)
        assert seen["argv"][1:] == ["--address", "auto", "--trials=5"]
        assert seen["again"] == ("python", "-m", "sweep.submit")
        assert not Path(seen["argv"][0]).parent.exists()

    def test_without_a_submission(self, capsys, monkeypatch):
        monkeypatch.delenv(VARIABLE, raising=False)
        assert submitted_main([]) == 2
        assert "what `sweep.submit` starts" in capsys.readouterr().err


def _answer(server: socket.socket, content: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(content)
