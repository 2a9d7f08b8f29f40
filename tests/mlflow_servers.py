"""Real MLflow servers on loopback, to be killed, and a proxy that loses answers."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STARTING_TIMEOUT_S = 180.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class MlflowServer:
    """`mlflow server` with one worker, on a port that stays the same over restarts.

    Args:
        folder: for its log and its files.
        database: its address; a SQLite file in the folder if empty.
        password: of the user `admin`, whom alone it lets in; everybody if empty.
    """

    def __init__(self, folder: Path, database: str = "", password: str = "") -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = database or f"sqlite:///{folder / 'server.db'}"
        self._folder = folder
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start it without waiting for it."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.database]
        command += ["--artifacts-destination", (self._folder / "artifacts").as_uri()]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        if self._password:
            command += ["--app-name", "basic-auth"]
            environment |= self._authentication()
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self._folder, start_new_session=True
            )

    def _authentication(self) -> dict[str, str]:
        users = self._folder / "auth.ini"
        users.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{self._folder / 'auth.db'}\n"
            "admin_username = admin\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        return {
            "MLFLOW_AUTH_CONFIG_PATH": str(users),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self._password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests",
        }

    def wait(self) -> None:
        deadline = time.monotonic() + STARTING_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self._folder / "server.log").read_text()[-2000:])

    def start(self) -> None:
        self.begin()
        self.wait()

    def kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Proxy:
    """Passes requests on to a server; `fault(method, path)` says what becomes of each.

    Faults: "" none; "lost" the answer is dropped after the server has done what was asked; "refused" the request is
    not passed on, and answered with 503; "cut" it is not passed on, and the connection ends.
    """

    def __init__(self, server: MlflowServer, fault: Callable[[str, str], str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                happens = fault(self.command, self.path)
                if happens == "cut":
                    self.close_connection = True
                    return
                status, answer, kind = 503, b"{}", "application/json"
                if happens != "refused":
                    request = urllib.request.Request(server.uri + self.path, body or None, method=self.command)
                    for name in ("Content-Type", "Accept"):
                        if name in self.headers:
                            request.add_header(name, self.headers[name])
                    try:
                        with urllib.request.urlopen(request, timeout=60) as found:
                            status, answer = found.status, found.read()
                            kind = found.headers.get("Content-Type", kind)
                    except urllib.error.HTTPError as error:
                        status, answer = error.code, error.read()
                if happens == "lost":
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815 - names of the library

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Faults:
    """The first two answers to each kind of writing request are lost; then, by a seed, some fail in some way."""

    def __init__(self, seed: int, share: float) -> None:
        self._random = random.Random(seed)
        self._share = share
        self.happened: list[tuple[str, str]] = []

    def __call__(self, method: str, path: str) -> str:
        asked = path.partition("?")[0].rpartition("mlflow/")[2]
        writes = method != "GET" and asked != "runs/search"
        if writes and self.happened.count(("lost", asked)) < 2:
            kind = "lost"
        elif self._random.random() < self._share:
            kind = self._random.choice(("lost", "refused", "cut"))
        else:
            return ""
        self.happened.append((kind, asked))
        return kind
