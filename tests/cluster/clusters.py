"""A cluster on hosts: Ray with a token, and MLflow with a password, on PostgreSQL; all with fixed ports."""

import base64
import json
import os
import pwd
import secrets
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from fault_servers import ordinary_user, postgresql_program

from tests.cluster.hosts import Host, HostsFailed, Network, Process

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "benchmarks" / "cluster.yaml"
GCS, DASHBOARD, CLIENT, NODE_MANAGER, OBJECT_MANAGER, METRICS = 6379, 8265, 10001, 6380, 6381, 8080
AGENT, AGENT_GRPC, ENVIRONMENTS = 52365, 52366, 52367
WORKERS = range(11000, 12000)
MLFLOW, POSTGRESQL = 5000, 5432
ADMIN, DATABASE = "admin", "mlflow"
STARTING_TIMEOUT_S, MOST_STARTS = 900.0, 4
# As each program of the cluster finds it below its home or its disk.
TOKEN, CREDENTIALS = "secrets/ray_token", "home/.mlflow/credentials"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
# This package, and the programs it shares with the benchmarks.
IMPORTED = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]))


def missing() -> list[str]:
    """What a cluster needs beside hosts, and is not there."""
    found = [] if postgresql_program("postgres") else ["PostgreSQL"]
    for package, why in {"flask_wtf": "mlflow[auth]", "aiohttp_cors": "ray[default]", "psycopg": "psycopg"}.items():
        if not _importable(package):
            found.append(f"the package {why}")
    return found


def _postgresql(name: str) -> Path:
    """A program of the PostgreSQL that there is; Debian's wrappers on the path take one that need not be."""
    server = postgresql_program("postgres")
    if server is None:
        raise HostsFailed("PostgreSQL is not installed")
    return server.parent / name


def _importable(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def write_secret(host: Host, name: str, text: str) -> Path:
    """A file that only its owner may read; its path in the host."""
    file = host.disk / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(0o600)
    file.write_text(text)
    return host.place / name


def wait_until(condition: Callable[[], object], what: str, timeout_s: float, *needed: Process) -> None:
    """Wait for something that comes true.

    Raises:
        HostsFailed: it did not in time, or a process that it needs has ended.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        for process in needed:
            if not process.running:
                raise HostsFailed(f"{process.log.name} ended before {what}:\n{process.said[-3000:]}")
        if time.monotonic() > deadline:
            said = "\n".join(process.said[-3000:] for process in needed)
            raise HostsFailed(f"after {timeout_s:.0f} s still not: {what}\n{said}")
        time.sleep(0.2)


def _runs(host: Host, command: Sequence[str | Path]) -> bool:
    try:
        host.run(command)
    except HostsFailed:
        return False
    return True


class Tracking:
    """MLflow with its basic-auth app on a host's outer address, and its PostgreSQL on the host's loopback."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.uri = f"http://{host.address}:{MLFLOW}"
        self.password = secrets.token_urlsafe(24)
        database_password = secrets.token_urlsafe(24)
        passes = write_secret(host, "home/.pgpass", f"127.0.0.1:{POSTGRESQL}:*:{DATABASE}:{database_password}\n")
        own = {"PGPASSFILE": str(passes)}
        self.database = self._start_database(database_password)
        at = ["-h", "127.0.0.1", "-p", str(POSTGRESQL), "-U", DATABASE]
        wait_until(partial(_runs, host, [_postgresql("pg_isready"), *at]), "PostgreSQL is ready", 60.0, self.database)
        host.run([_postgresql("createdb"), *at, DATABASE], own)
        self.server = self._start_server(own)
        wait_until(lambda: self.status_of("/health") == 200, "MLflow answers", STARTING_TIMEOUT_S, self.server)

    def _start_database(self, password: str) -> Process:
        """PostgreSQL refuses to be root."""
        user = ordinary_user() or pwd.getpwuid(os.geteuid()).pw_name
        folder, secret = self.host.disk / "postgresql", self.host.disk / "tmp" / "pw"
        folder.mkdir()
        secret.touch(0o600)
        secret.write_text(password)
        for path in (folder, secret):
            shutil.chown(path, user)
        inside = self.host.place / "postgresql"
        initdb = [_postgresql("initdb"), "-D", inside / "data", "--username", DATABASE]
        initdb += ["--auth", "scram-sha-256", "--pwfile", self.host.place / "tmp" / "pw"]
        self.host.run(initdb, user=user)
        secret.unlink()
        listen = ["-c", "listen_addresses=127.0.0.1", "-c", f"port={POSTGRESQL}"]
        command = [_postgresql("postgres"), "-D", inside / "data", *listen, "-k", inside]
        return self.host.start(command, user=user)

    def _start_server(self, own: Mapping[str, str]) -> Process:
        accounts = self.host.place / "home" / "accounts.db"
        settings = ["[mlflow]", "default_permission = NO_PERMISSIONS", f"database_uri = sqlite:///{accounts}"]
        settings += [f"admin_username = {ADMIN}", f"admin_password = {self.password}"]
        settings += ["authorization_function = mlflow.server.auth:authenticate_request_basic_auth"]
        config = write_secret(self.host, "secrets/basic_auth.ini", "\n".join(settings) + "\n")
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
        command += ["--host", self.host.address, "--port", str(MLFLOW)]
        command += ["--allowed-hosts", f"{self.host.address}:{MLFLOW}"]
        command += ["--backend-store-uri", f"postgresql://{DATABASE}@127.0.0.1:{POSTGRESQL}/{DATABASE}"]
        command += ["--artifacts-destination", self.host.place / "artifacts"]
        variables = {
            **own,
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        return self.host.start(command, variables, name="mlflow")

    def let_in(self, host: Host) -> None:
        """Give a host's programs the password, in the file that MLflow's clients read."""
        text = f"[mlflow]\nmlflow_tracking_username = {ADMIN}\nmlflow_tracking_password = {self.password}\n"
        write_secret(host, CREDENTIALS, text)

    def status_of(self, path: str, *, host: Host | None = None, password: str = "") -> int:
        """The status of a request; 0 where nothing answers.

        Args:
            path: of the URL.
            host: that asks; MLflow's own if None.
            password: of the administrator, none if empty.
        """
        known = base64.b64encode(f"{ADMIN}:{password}".encode()).decode()
        headers = {"Authorization": f"Basic {known}"} if password else {}
        return asked(host or self.host, self.uri + path, headers)


ASK = """
    import json, sys, urllib.error, urllib.request

    url, headers, body = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3].encode() or None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as answer:
            print(answer.status)
    except urllib.error.HTTPError as error:
        print(error.code)
    except OSError:
        print(0)
"""


def asked(host: Host, url: str, headers: Mapping[str, str] | None = None, body: str = "") -> int:
    """The status with which a request by a host is answered; 0 where nothing answers."""
    command = [sys.executable, "-c", textwrap.dedent(ASK), url, json.dumps(dict(headers or {})), body]
    return int(host.run(command))


ALIVE = "alive: "
NODES = f"""
    import sys
    from ray._raylet import GcsClient

    for node in GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20).values():
        if node.state == 0:  # GcsNodeInfo.ALIVE
            print("{ALIVE}" + node.node_manager_address)
"""


class Cluster:
    """Ray on hosts: a head, which runs no trials, and workers that join it.

    Args:
        net: of its hosts.
        head: where the driver runs, too.
    """

    def __init__(self, net: Network, head: Host) -> None:
        self.net, self.head = net, head
        self.token = secrets.token_hex(32)
        self.address = f"{head.address}:{GCS}"
        self.rays: dict[str, Process] = {}
        self._starts: dict[str, Callable[[], Process]] = {}
        self.let_in(head)
        head_only = ["--head", "--port", GCS, "--ray-client-server-port", CLIENT]
        head_only += ["--include-dashboard", "true", "--dashboard-host", "0.0.0.0", "--dashboard-port", DASHBOARD]
        self._start(head, 0, head_only, {})
        self.wait_for([head])

    def let_in(self, host: Host) -> None:
        """Give a host's programs the token."""
        write_secret(host, TOKEN, self.token)

    def variables(self, host: Host) -> dict[str, str]:
        """Of the environment of every program of the cluster."""
        return {
            "PYTHONPATH": IMPORTED,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(host.place / TOKEN),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",  # the machine may be slow
            "RAY_memory_monitor_refresh_ms": "0",  # the hosts share this machine's memory with others
        }

    def join(self, host: Host, cpus: int, variables: Mapping[str, str] | None = None) -> None:
        """Start a worker node on a host; `wait_for` waits until it is there."""
        self.let_in(host)
        self._start(host, cpus, ["--address", self.address], variables or {})

    def _start(self, host: Host, cpus: int, how: Sequence[Any], variables: Mapping[str, str]) -> None:
        ports = {
            "--node-manager-port": NODE_MANAGER,
            "--object-manager-port": OBJECT_MANAGER,
            "--min-worker-port": WORKERS.start,
            "--max-worker-port": WORKERS.stop - 1,
            "--metrics-export-port": METRICS,
            "--dashboard-agent-listen-port": AGENT,
            "--dashboard-agent-grpc-port": AGENT_GRPC,
            "--runtime-env-agent-port": ENVIRONMENTS,
        }
        command = [*RAY, "start", "--block", "--node-ip-address", host.address, *how]
        command += ["--num-cpus", cpus, "--num-gpus", 0, "--object-store-memory", 200 * 1024**2]
        command += [each for option in ports.items() for each in option]
        own = {**self.variables(host), **variables}
        self._starts[host.name] = partial(host.start, [str(each) for each in command], own, name="ray")
        self.rays[host.name] = self._starts[host.name]()

    def wait_for(self, hosts: Sequence[Host]) -> None:
        """Wait until each of these nodes is in the cluster.

        Ray gives a node half a minute to start, which a busy machine may not do in: then it is started again.

        Raises:
            HostsFailed: one does not come.
        """
        for host in hosts:
            for _ in range(MOST_STARTS - 1):
                joined = partial(self._has_joined_or_ended, host)
                wait_until(joined, f"{host.name} is in the cluster", STARTING_TIMEOUT_S)
                if self.rays[host.name].running:
                    break
                for process in host.processes():  # what the failed start has left
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                self.rays[host.name] = self._starts[host.name]()
            there = partial(self._has_joined, host)
            wait_until(there, f"{host.name} is in the cluster", STARTING_TIMEOUT_S, self.rays[host.name])

    def _has_joined(self, host: Host) -> bool:
        return host.address in self.nodes()

    def _has_joined_or_ended(self, host: Host) -> bool:
        return not self.rays[host.name].running or self._has_joined(host)

    def nodes(self) -> set[str]:
        """Addresses of the nodes that the head takes for alive."""
        command = [sys.executable, "-c", textwrap.dedent(NODES), self.address]
        try:
            said = self.head.run(command, self.variables(self.head))
        except HostsFailed:
            return set()  # the head is not there yet
        return {line.removeprefix(ALIVE) for line in said.splitlines() if line.startswith(ALIVE)}

    def sweep(self, name: str, *options: str | Path, space: Path = SPACE) -> Process:
        """Start a sweep on the head, whose trials run on the workers."""
        return start_sweep(
            self.head, name, "--address", self.address, *options, space=space, own=self.variables(self.head)
        )


def start_sweep(
    host: Host, name: str, *options: str | Path, space: Path = SPACE, own: Mapping[str, str] | None = None
) -> Process:
    """Start a sweep on a host; its run folder is `runs/<name>` on the host's disk."""
    command = [sys.executable, "-u", "-m", "sweep.run", space, "--out", host.place / "runs", "--name", name]
    command += ["--cache-dir", host.place / "cache", *options]
    return host.start(command, {"PYTHONPATH": IMPORTED, **(own or {})}, name=f"sweep-{name}")


def trains(host: Host) -> bool:
    """Whether a process of the host trains."""
    return bool(training(host))


def training(host: Host) -> list[psutil.Process]:
    """The processes that train: a worker's fork server has forked them."""
    servers = [each for each in host.processes() if _is_forked(each)]
    pids = {server.pid for server in servers}
    return [each for each in servers if _parent_of(each) in pids]


def _parent_of(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0  # it has ended meanwhile


def _is_forked(process: psutil.Process) -> bool:
    """Whether it is a fork server, or what one has forked; both have the same command line."""
    try:
        return "multiprocessing.forkserver" in " ".join(process.cmdline())
    except psutil.Error:
        return False
