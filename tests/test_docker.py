"""The files that make the image and the cluster of one host, as far as that needs no container."""

import configparser
import json
import os
import re
import stat
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.machinery import SourceFileLoader
from importlib.metadata import PackageNotFoundError, version
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import psutil
import pytest
import yaml

from sweep import versions
from sweep.versions import version_of

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
PROJECT = ROOT / "pyproject.toml"
NAME = re.compile(r"[A-Za-z0-9._-]+")


def program(name):
    """A program of the image, as a module."""
    loader = SourceFileLoader(name.replace("-", "_"), str(DOCKER / name))
    spec = spec_from_loader(loader.name, loader)
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def without_compiled_files():
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    yield
    sys.dont_write_bytecode = before


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def constraints():
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements(variant, machine="x86_64"):
    return program("requirements.py").requirements(PROJECT, variant, machine)


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_every_requirement_of_the_image_has_one_version_within_its_range(variant):
    from packaging.requirements import Requirement

    pinned = constraints()
    for line in requirements(variant):
        wanted = Requirement(line)
        assert wanted.name in pinned, f"{line}: not in docker/constraints.txt, whose head says how it is made"
        assert wanted.specifier.contains(pinned[wanted.name]), (
            f"{line}: docker/constraints.txt has {pinned[wanted.name]}"
        )


def test_the_image_without_gpus_gets_the_build_without_cuda():
    def tensorflow(lines):
        return [line for line in lines if line.startswith("tensorflow")]

    declared = tensorflow(tomllib.loads(PROJECT.read_text())["project"]["dependencies"])
    assert tensorflow(requirements("cpu")) == [declared[0].replace("tensorflow", "tensorflow-cpu")]
    assert tensorflow(requirements("cpu", "aarch64")) == declared, "which knows no CUDA there"
    assert any("and-cuda" in line for line in requirements("gpu"))
    with pytest.raises(SystemExit, match="expected VARIANT=cpu or VARIANT=gpu, but got 'tpu'"):
        requirements("tpu")


def test_a_build_without_cuda_counts_as_tensorflow(monkeypatch):
    def installed(package):
        if package == "tensorflow-cpu":
            return "2.21.0"
        raise PackageNotFoundError(package)

    monkeypatch.setattr(versions, "version", installed)
    assert version_of("tensorflow") == "2.21.0"
    with pytest.raises(PackageNotFoundError, match="keras"):
        version_of("keras")
    monkeypatch.undo()
    assert version_of("keras") == version("keras")


def test_the_build_sees_what_it_copies_and_nothing_else():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for line in copied for name in line.split()} == let_in
    for name in let_in:
        assert (ROOT / name).exists(), name


def test_the_image_has_the_versions_that_its_files_say(compose):
    own = tomllib.loads(PROJECT.read_text())["project"]["version"]
    dockerfile = (DOCKER / "Dockerfile").read_text()
    base = re.search(r"^ARG BASE_IMAGE=(\S+)", dockerfile, re.MULTILINE).group(1)
    assert f"ARG VERSION={own}\n" in dockerfile
    assert compose["x-image"]["image"].endswith(f"cxr-sweep:{own}}}")
    assert compose["x-image"]["build"]["args"]["BASE_IMAGE"] == f"${{BASE_IMAGE:-{base}}}"
    images = [base, *(service["image"] for service in compose["services"].values() if "build" not in service)]
    for image in images:
        assert re.search(r":\d+\.\d+[^/]*$", image), f"{image} is not pinned to a version"


def test_no_service_is_more_than_it_has_to_be(compose):
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        assert service["logging"]["options"]["max-size"], name
        if "build" in service:
            assert service["read_only"] is True, name
            assert "cap_add" not in service
        for port in service.get("ports", []):
            assert port.startswith("${SWEEP_PUBLISH:-127.0.0.1}:"), name
    published = {name for name, service in compose["services"].items() if "ports" in service}
    assert published == {"head", "mlflow"}


def test_the_database_is_out_of_reach_of_jobs(compose):
    assert compose["networks"]["database"] == {"internal": True}
    reaching = {name for name, service in compose["services"].items() if "database" in service["networks"]}
    assert reaching == {"mlflow", "postgres", "s3"}
    assert compose["services"]["postgres"]["networks"] == ["database"]


def test_ray_demands_the_token_and_only_who_needs_a_secret_has_it(compose):
    services = compose["services"]
    for name in ("head", "worker", "worker-gpu"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert services[name]["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert "RAY_AUTH_MODE=token" in (DOCKER / "Dockerfile").read_text()

    def holders(secret):
        given = {
            name: [each if isinstance(each, str) else each["source"] for each in service.get("secrets", [])]
            for name, service in services.items()
        }
        return {name for name, held in given.items() if secret in held}

    assert holders("ray_token") == {"head", "worker", "worker-gpu"}
    assert holders("mlflow_credentials") == {"head"}
    assert holders("mlflow_admin_password") == {"mlflow"}
    assert holders("postgres_password") == {"mlflow", "postgres"}
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "secrets"
    subprocess.run([DOCKER / "make-secrets", folder], check=True, capture_output=True)
    return folder


def test_every_secret_of_the_compose_file_is_made_at_random(compose, secrets, tmp_path):
    named = {Path(each["file"]).name for each in compose["secrets"].values()}
    assert {path.name for path in secrets.iterdir()} == named
    subprocess.run([DOCKER / "make-secrets", tmp_path], check=True, capture_output=True)
    for name in named:
        assert (secrets / name).read_text() != (tmp_path / name).read_text(), name
    for name in ("ray_token", "postgres_password", "mlflow_admin_password"):
        assert re.fullmatch("[0-9a-f]{64}", (secrets / name).read_text())


def test_secrets_are_closed_to_others_and_kept(secrets):
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    for path in secrets.iterdir():
        expected = 0o600 if os.geteuid() in (0, 1000) else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == expected, path.name
        if os.geteuid() == 0:
            assert path.stat().st_uid == 1000
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    again = subprocess.run([DOCKER / "make-secrets", secrets], check=True, capture_output=True, text=True)
    assert {path.name: path.read_text() for path in secrets.iterdir()} == before
    assert "written" not in again.stdout
    assert not any(line.strip() in again.stdout for text in before.values() for line in text.splitlines()), "it is told"


def test_both_sides_of_a_secret_agree(secrets):
    def read(name):
        found = configparser.ConfigParser()
        found.read(secrets / name)
        return found

    password = (secrets / "mlflow_admin_password").read_text()
    assert read("mlflow_credentials")["mlflow"]["mlflow_tracking_password"] == password
    key = read("s3_credentials")["default"]["aws_secret_access_key"]
    identity = json.loads((secrets / "s3_identities").read_text())["identities"][0]
    assert identity["credentials"][0]["secretKey"] == key


def test_git_does_not_see_the_secrets():
    asked = subprocess.run(["git", "check-ignore", "--quiet", "docker/secrets/ray_token"], cwd=ROOT, check=False)
    assert asked.returncode == 0


def test_the_tracking_server_gets_any_password_right(tmp_path, monkeypatch):
    tracking = program("bin/start-tracking")
    settings = tracking.auth_settings("postgresql://mlflow@h/mlflow", "admin", "50%:a\\b")
    file = tracking.write_private(tmp_path / "auth.ini", "")
    with file.open("w") as opened:
        settings.write(opened)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(file))
    read = configparser.ConfigParser()
    read.read(file)
    assert read["mlflow"]["admin_password"] == "50%:a\\b"
    assert tracking.database_passwords("50%:a\\b") == "*:*:*:*:50%\\:a\\\\b\n"


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("", "it is empty")])
def test_without_its_secret_the_tracking_server_does_not_start(tmp_path, monkeypatch, text, message):
    path = tmp_path / "password"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("POSTGRES_PASSWORD_FILE", str(path))
    with pytest.raises(SystemExit, match=message):
        program("bin/start-tracking").secret("POSTGRES_PASSWORD_FILE")


def test_a_password_in_the_address_of_the_database_is_refused(monkeypatch):
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://mlflow:secret@postgres/mlflow")
    with pytest.raises(SystemExit, match="without a password") as refused:
        program("bin/start-tracking").main([])
    assert "secret@" not in str(refused.value)


@pytest.fixture
def service():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/well" else 503)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_service_is_healthy_when_all_of_it_answers(service, monkeypatch, capsys):
    healthy = program("bin/healthy").main
    assert healthy([]) == 0, "nothing is asked"
    assert healthy([f"{service}/well"]) == 0
    assert healthy([f"{service}/well", f"{service}/ill"]) == 1
    assert healthy(["http://127.0.0.1:1/"]) == 1
    assert "503" in capsys.readouterr().out


def test_the_head_ends_sweeps_before_ray():
    """A sweep that takes its time is waited for; one that does not end is told of."""
    head = program("bin/start-head")
    waiting = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.5), sys.exit(130))); "
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    begun = "print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c"]
    ours = [
        subprocess.Popen([*command, text + begun, "-m", "sweep.run"], stdout=subprocess.PIPE)
        for text in (waiting, deaf)
    ]
    try:
        for each in ours:
            each.stdout.readline()
        drivers = [each for each in head.sweeps() if each.pid in {process.pid for process in ours}]
        assert len(drivers) == 2
        assert [each.pid for each in head.interrupt(drivers, 2.0)] == [ours[1].pid]
        assert not psutil.pid_exists(ours[0].pid), "it has ended by itself, within its half second"
    finally:
        for each in ours:
            each.kill()
            each.wait()
            each.stdout.close()
