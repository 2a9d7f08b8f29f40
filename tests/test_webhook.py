"""A webhook is told how a sweep ended; its address is told nobody."""

import json
import platform
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest

from cxr_models.trial import Objective, TrialConfig
from sweep import run, session, webhook
from sweep.session import Ended
from sweep.webhook import FILE_VARIABLE, URL_VARIABLE, Webhook, ending_text, take_webhook, without_patients
from tests.channels import SECRET, Channel, answered

OBJECTIVE = Objective("macro_f1", "max")
CONFIG = TrialConfig("vanilla_cnn", freeze="none", learning_rate=3e-3)
SUMMARY = {
    "seconds": {"total": 7805.0},
    "trials": {"planned": 40, "total": 38, "completed": 30, "stopped_early": 7, "failed": 1},
    "best": {"trial_id": "t0", "config": CONFIG.to_json(), "val": {"macro_f1": 0.9213}},
    "test": {"macro_f1": {"value": 0.9128, "low": 0.8899, "high": 0.9301}},
}


@pytest.fixture
def channel(monkeypatch) -> Iterator[Channel]:
    monkeypatch.setattr(webhook, "PAUSES_S", (0.01, 0.01))
    found = Channel()
    yield found
    found.close()


class TestSending:
    def test_a_text_is_one_key_of_json_as_slack_has_it(self, channel):
        assert Webhook(channel.url).send("a & b <c>\nd") == ""
        ((request, kind, body),) = channel.asked
        assert (request, kind) == (f"POST /services/{SECRET}", "application/json")
        assert json.loads(body) == {"text": "a &amp; b &lt;c&gt;\nd"}

    @pytest.mark.parametrize("status", [500, 503, 429])
    def test_it_is_tried_again_where_that_may_help(self, channel, status):
        channel.answers = [answered(status), answered(status)]
        assert Webhook(channel.url).send("x") == ""
        assert len(channel.asked) == 3
        channel.answers = [answered(status)] * 3
        assert Webhook(channel.url).send("x") == f"it was answered with HTTP {status}"
        assert len(channel.asked) == 6

    @pytest.mark.parametrize("status", [400, 403, 404, 410])
    def test_what_is_refused_is_not_tried_again(self, channel, status):
        channel.answers = [answered(status)]
        assert Webhook(channel.url).send("x") == f"it was answered with HTTP {status}"
        assert len(channel.asked) == 1

    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    def test_no_other_server_is_told_where_this_one_points_to_it(self, channel, status):
        other = Channel()

        def elsewhere(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Location", other.url)
            handler.end_headers()

        channel.answers = [elsewhere]
        assert Webhook(channel.url).send("x") == f"it was answered with HTTP {status}"
        other.close()
        assert other.asked == []

    def test_whatever_goes_wrong_is_told_in_time_and_without_the_address(self, channel, monkeypatch):
        monkeypatch.setattr(webhook, "TIMEOUT_S", 0.3)

        def garbage(handler: BaseHTTPRequestHandler) -> None:
            handler.wfile.write(f"/services/{SECRET}\r\n\r\n".encode())

        channel.answers = [garbage] * 3
        problems = [Webhook(channel.url).send("x")]
        problems.append(Webhook(channel.url.replace("http", "https")).send("x"))  # nobody speaks TLS there
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}/services/{SECRET}"
            problems.append(Webhook(f"http://{address}").send("x"))
        problems.append(Webhook(f"http://{address}").send("x"))  # nobody is there any more
        problems.append(Webhook(f"http://127.0.0.1:9/{SECRET} {SECRET}").send("x"))  # `take_webhook` would refuse it
        assert problems[0] == "BadStatusLine"
        assert "Connection refused" in problems
        assert all(problems)
        assert not [problem for problem in problems if "hunter2" in problem or "services" in problem]
        assert SECRET not in repr(Webhook(channel.url))

    def test_nobody_waits_longer_than_told(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            found = Webhook(f"http://127.0.0.1:{silent.getsockname()[1]}")
            begun = time.monotonic()
            assert found.send("x", patience_s=0.3) == "no answer within 0.3 s"
        assert time.monotonic() - begun < 2

    def test_ctrl_c_ends_the_wait(self, channel, monkeypatch):
        def interrupted(thread, timeout):
            raise KeyboardInterrupt

        monkeypatch.setattr(threading.Thread, "join", interrupted)
        assert Webhook(channel.url).send("x") == "KeyboardInterrupt while it was sent"


class TestEnvironment:
    def test_none_is_named(self):
        assert take_webhook({}) is None
        assert take_webhook({URL_VARIABLE: "", FILE_VARIABLE: ""}) is None

    @pytest.mark.parametrize(
        "url",
        [
            f"https://hooks.example.org/services/{SECRET}",
            f"https://hooks.example.org:8443/{SECRET}?x=y",
            f"http://127.0.0.1:8065/hooks/{SECRET}",
            f"http://[::1]/{SECRET}",
            f"http://localhost/{SECRET}",
        ],
    )
    def test_an_address_is_taken_out_of_the_environment_or_read_from_a_file(self, tmp_path, url):
        environment = {URL_VARIABLE: url, "HOME": "/home/me"}
        assert take_webhook(environment) == Webhook(url)
        assert environment == {"HOME": "/home/me"}, "workers would inherit it"
        file = tmp_path / "webhook"
        file.write_text(f"{url}\n")
        assert take_webhook({FILE_VARIABLE: str(file)}) == Webhook(url)

    @pytest.mark.parametrize(
        ("url", "problem"),
        [
            (f"http://hooks.example.org/{SECRET}", "expected https://, but it begins with http://"),
            (f"http://127.0.0.1.example.org/{SECRET}", "expected https://, but it begins with http://"),
            (f"http://192.168.0.1/{SECRET}", "expected https://, but it begins with http://"),
            (f"hooks.example.org/{SECRET}", "begins with https:// and a host"),
            (f"{SECRET}:x", "begins with https:// and a host"),
            (f"https:///{SECRET}", "begins with https:// and a host"),
            (f"ftp://hooks.example.org/{SECRET}", "begins with https:// and a host"),
            (f"https://me:{SECRET.rpartition('/')[2]}@hooks.example.org", "without a user"),
            (f"https://hooks.example.org:port/{SECRET}", "malformed"),
            (f"https://[::1/{SECRET}", "malformed"),
            (f"https://hooks.example.org/{SECRET} x", "but there is more"),
            (f"https://hooks.example.org/\n{SECRET}", "but there is more"),
        ],
    )
    def test_anything_else_is_refused_first_and_not_repeated(self, tmp_path, capsys, monkeypatch, url, problem):
        monkeypatch.setenv(URL_VARIABLE, url)
        assert run.main([str(tmp_path / "absent.yaml")]) == 2
        said = capsys.readouterr().err
        assert f"{URL_VARIABLE}: " in said
        assert problem in said
        assert "hunter2" not in said
        assert "absent.yaml" not in said

    def test_a_file_that_holds_none_is_refused(self, tmp_path, capsys, monkeypatch):
        file = tmp_path / "webhook"
        monkeypatch.setenv(FILE_VARIABLE, str(file))
        said = []
        for write in (lambda: None, lambda: file.write_bytes(b""), lambda: file.write_bytes(b"\xff\xfe")):
            write()
            assert run.main([str(tmp_path / "absent.yaml")]) == 2
            said.append(capsys.readouterr().err)
        assert "No such file or directory" in said[0]
        assert "but there is nothing" in said[1]
        assert "it is no text of an address" in said[2]
        assert all(FILE_VARIABLE in text for text in said)
        monkeypatch.setenv(URL_VARIABLE, f"https://hooks.example.org/{SECRET}")
        assert run.main([str(tmp_path / "absent.yaml")]) == 2
        assert f"{URL_VARIABLE} and {FILE_VARIABLE} are both set" in capsys.readouterr().err


class TestText:
    def test_a_sweep_that_finished(self, tmp_path):
        page = "https://mlflow.example.org/#/experiments/1/runs"
        text = ending_text(SUMMARY, name="depth", how="finished", folder=tmp_path, objective=OBJECTIVE, page=page)
        assert text.splitlines() == [
            f"cxr-sweep depth finished on {platform.node()} after 2 h 10 min",
            "best: vanilla_cnn none, learning rate 3.0e-03, test macro F1 0.913 (95 % interval 0.890 to 0.930), "
            "validation macro F1 0.921",
            "trials: 38 of 40 ended, 30 completed, 7 stopped early, 1 failed",
            f"run folder: {tmp_path}",
            f"MLflow: {page}",
        ]

    def test_without_a_test_part_the_best_has_its_validation_figure(self, tmp_path):
        summary = {**SUMMARY, "test": None}
        text = ending_text(summary, name="depth", how="finished", folder=tmp_path, objective=OBJECTIVE)
        assert "learning rate 3.0e-03, validation macro F1 0.921" in text
        assert "interval" not in text
        assert "MLflow" not in text

    def test_of_a_failure_the_last_line_is_told(self, tmp_path):
        cause = "Traceback (most recent call last):\n  File x\nValueError: " + "no good " * 100
        text = ending_text({}, name="depth", how="failed", folder=tmp_path, objective=OBJECTIVE, cause=cause)
        first, told, last = text.splitlines()
        assert first == f"cxr-sweep depth failed on {platform.node()}"
        assert told.startswith("cause: ValueError: no good no good")
        assert len(told) < 600
        assert last == f"run folder: {tmp_path}"


def image(path: str, patient: str, mask: str = "") -> SimpleNamespace:
    return SimpleNamespace(path=path, patient=patient, mask=mask)


class TestPatients:
    RECORDS = (
        image("COVID/Miller_Ann-3.png", "Miller_Ann", "COVID/masks/Miller_Ann-3_mask.png"),
        image("patient00007/study1/view1_frontal.jpg", "patient00007"),
        image("/elsewhere/x-7.dcm", "7"),
    )

    @pytest.mark.parametrize(
        "cause",
        [
            "OSError: cannot read /data/COVID/Miller_Ann-3.png",
            "DataError: the mask COVID/masks/Miller_Ann-3_mask.png is empty",
            "ValueError: patient Miller_Ann stands in train and test",
            "OSError: Miller_Ann-3 has no pixels",
            "OSError: /data/patient00007/study1/view1_frontal.jpg: broken",
            "KeyError: 'patient00007'",
            "ValueError: patient 7 is unknown",
            "OSError: /elsewhere/x-7.dcm",
        ],
    )
    def test_what_names_an_image_or_a_patient_is_left_out(self, cause):
        told = without_patients(cause, self.RECORDS)
        assert "[…]" in told
        assert not {name for name in ("Miller", "patient00007", "x-7", " 7 ") if name in told}

    def test_all_else_stays(self):
        cause = "SweepFailed: the first 37 trials failed alike: MemoryError, 7.5 GB"
        assert without_patients(cause, self.RECORDS[:2]) == cause
        assert without_patients("epoch 17 of 70", self.RECORDS) == "epoch 17 of 70"


class TestSweep:
    """What `sweep.run` sends, with the trials left out."""

    @pytest.fixture
    def ends(self, tmp_path, radiography_folder, cache_dir, monkeypatch, channel, capsys):
        space = tmp_path / "depth.yaml"
        space.write_text(
            f"name: depth\ndata: {radiography_folder}\nobjective: macro_f1\nsearch: {{trials: 1}}\n"
            "space: {backbone: vanilla_cnn, freeze: none, image_side: 96, epochs: 1}\n"
        )
        monkeypatch.setattr(run, "print_results", lambda *arguments: None)

        def command(ended: Ended | Exception, *arguments: str) -> tuple[int, str]:
            def run_sweep(*arguments, **options) -> Ended:
                if isinstance(ended, Exception):
                    raise ended
                return ended

            monkeypatch.setattr(session, "run_sweep", run_sweep)
            monkeypatch.setenv(URL_VARIABLE, channel.url)
            places = ["--out", str(tmp_path / "runs"), "--cache-dir", str(cache_dir)]
            return run.main([str(space), *places, *arguments]), capsys.readouterr().out

        return command

    @staticmethod
    def ended(summary=SUMMARY, *, interrupted=False, failure="", page="http://127.0.0.1:5000/#/1") -> Ended:
        return Ended(summary, (), interrupted, failure, "", "mlflow ui", page)

    def test_each_end_is_told_once(self, ends, channel, tmp_path):
        assert ends(self.ended())[0] == 0
        assert ends(self.ended(interrupted=True))[0] == 130
        assert ends(self.ended(failure="Traceback\nOSError: /x/COVID/images/COVID-3.png"))[0] == 1
        firsts = [text.splitlines()[0].split(" on ")[0] for text in channel.texts]
        assert firsts[:3] == ["cxr-sweep depth finished", "cxr-sweep depth was interrupted", "cxr-sweep depth failed"]
        assert "cause: OSError: /x/[…]" in channel.texts[2]
        assert "COVID-3" not in "".join(channel.texts)
        assert f"run folder: {tmp_path / 'runs' / 'depth'}" in channel.texts[0]
        assert "MLflow" not in "".join(channel.texts), "a page of this machine is of no use to others"

    def test_a_server_s_page_is_told(self, ends, channel):
        assert ends(self.ended(page="http://mlflow:5000/#/1"), "--tracking-uri", "http://mlflow:5000")[0] == 0
        assert channel.texts[0].splitlines()[-1] == "MLflow: http://mlflow:5000/#/1"

    def test_no_trial_with_an_epoch_is_a_failure(self, ends, channel):
        summary = {key: value for key, value in SUMMARY.items() if key not in ("best", "test")}
        assert ends(self.ended(summary))[0] == 1
        assert "cause: no trial finished an epoch" in channel.texts[0]

    def test_what_was_unforeseen_is_told_and_raised(self, ends, channel):
        with pytest.raises(ValueError, match="unforeseen"):
            ends(ValueError("unforeseen"))
        assert "cause: ValueError: unforeseen" in channel.texts[0]

    def test_what_cannot_be_sent_is_a_note_and_changes_nothing_else(self, ends, channel):
        channel.answers = [answered(404)]
        status, said = ends(self.ended())
        assert status == 0
        assert "note: the webhook was not told how the sweep ended: it was answered with HTTP 404" in said
        assert "hunter2" not in said


def test_without_a_webhook_nothing_is_said(tmp_path):
    class Silent:
        def __getattr__(self, name):
            raise AssertionError(name)

    webhook.tell(None, Silent(), Path(tmp_path), Silent(), {}, failure="x")
