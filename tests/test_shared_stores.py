"""Several sweeps at once on one store: a SQLite file that all processes open anew, and PostgreSQL."""

import getpass
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweep.record import RunFolder
from tests.mlflow_servers import Faults, MlflowServer, Proxy, free_port
from tests.tracked_sweeps import TrackedSweep, check_exactly_once, run_folder

pytest.importorskip("mlflow")
pytestmark = pytest.mark.slow
DEADLINE_S = 180.0
PASSWORD = "correct-horse-of-nobody"
SWEEP = """
import pathlib, sys
from sweep.record import RunFolder
from tests.tracked_sweeps import TrackedSweep

if __name__ == "__main__":
    sweep = TrackedSweep(RunFolder(pathlib.Path(sys.argv[1])), sys.argv[2])
    print("ready", flush=True)
    for number in range(3):
        sweep.trial(number, 5)
    sweep.finish()
    sweep.tracker.close(180.0)
    print(sweep.tracker.problem)
"""


def at_once(folders: list[RunFolder], uri: str) -> list[str]:
    """Sweeps in processes of their own that open one store together; what each says of its problems."""
    commands = [[sys.executable, "-c", SWEEP, str(folder.path), uri] for folder in folders]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.path)
        for command, folder in zip(commands, folders, strict=True)
    ]
    said = [process.communicate(timeout=DEADLINE_S + 60) for process in running]
    assert [error for _, error in said if error.strip()] == []
    return [out.removeprefix("ready\n").strip() for out, _ in said]


def test_eight_sweeps_share_one_new_sqlite_store(tmp_path):
    folders = [run_folder(tmp_path / f"{number}") for number in range(8)]
    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    assert at_once(folders, uri) == [""] * 8
    for folder in folders:
        check_exactly_once(uri, folder)


def postgres_programs() -> Path | None:
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").is_file()), None)


@pytest.fixture
def postgres(monkeypatch) -> Iterator[str]:
    """The address of a new database, on loopback; the password for it stands in a file that PGPASSFILE names."""
    pytest.importorskip("psycopg", reason="needs the extra `postgres`")
    programs = postgres_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL's initdb and pg_ctl")
    folder, port = Path(tempfile.mkdtemp()), free_port()  # pytest's own folders are closed to other users
    as_user = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        if subprocess.run(["id", "postgres"], capture_output=True, check=False).returncode:
            pytest.skip("needs the user `postgres`, as PostgreSQL refuses to run as root")
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
    data, user = folder / "data", "postgres" if as_user else getpass.getuser()

    def program(name: str, *arguments: str) -> None:
        command = [*as_user, str(programs / name), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    password, passwords = folder / "password", folder / "pgpass"
    password.write_text(PASSWORD)
    passwords.write_text(f"127.0.0.1:{port}:*:{user}:{PASSWORD}\n")
    passwords.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passwords))
    program("initdb", "-D", str(data), "-A", "scram-sha-256", f"--pwfile={password}", "-U", user, "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    program("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-w", "-o", options, "start")
    yield f"postgresql://{user}@127.0.0.1:{port}/postgres"
    program("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    shutil.rmtree(folder)


def test_a_server_on_postgresql_has_everything_once_although_answers_are_lost(tmp_path, postgres):
    server = MlflowServer(tmp_path, postgres)
    server.start()
    proxy = Proxy(server, Faults(2, 0.1))
    try:
        folder = run_folder(tmp_path / "runs", proxy.uri)
        sweep = TrackedSweep(folder, proxy.uri)
        for number in range(3):
            sweep.trial(number, 6)
        sweep.finish()
        sweep.tracker.close(DEADLINE_S)
        assert sweep.tracker.problem == ""
    finally:
        proxy.close()
        server.kill()
    check_exactly_once(postgres, folder)


def test_sweeps_that_write_to_postgresql_themselves(tmp_path, postgres):
    """Without a server; and the password is on no disk."""
    folders = [run_folder(tmp_path / f"{number}") for number in range(2)]
    assert at_once(folders, postgres) == ["", ""]
    for folder in folders:
        check_exactly_once(postgres, folder)
        for path in folder.state.rglob("*"):
            assert path.is_dir() or PASSWORD.encode() not in path.read_bytes()


def test_a_row_that_is_sent_twice_is_kept_once(tmp_path, postgres):
    """What exactly once rests on, at this version of MLflow: the same figure of the same time is one row."""
    import mlflow

    for uri in (f"sqlite:///{tmp_path / 'own.db'}", postgres):
        client = mlflow.MlflowClient(uri)
        run = client.create_run(client.create_experiment("twice")).info.run_id
        metric = mlflow.entities.Metric
        rows = [metric("loss", 0.1 + 0.2, 1_700_000_000_123, 1), metric("loss", 0.5, 1_700_000_000_124, 2)]
        client.log_batch(run, metrics=rows[:1])
        client.log_batch(run, metrics=rows)
        client.log_batch(run, metrics=rows)
        found = client.get_metric_history(run, "loss")
        assert [(each.value, each.timestamp, each.step) for each in found] == [
            (each.value, each.timestamp, each.step) for each in rows
        ]
        assert client.get_run(run).data.metrics == {"loss": 0.5}
