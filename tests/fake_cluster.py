"""A cluster's Jobs API as `sweep.submit` sees it, on loopback, whose jobs and faults a test decides."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

RAY = "2.60.0"


@dataclass
class FakeJob:
    """A job that goes one step further whenever its state is asked for.

    Attributes:
        sent: the request that started it.
        steps: what it writes by and by; it has ended when it has written the last.
        state: at its end.
        exit_status: the same.
        message: of the cluster.
        ends: whether it comes to its end by itself.
    """

    sent: dict[str, Any]
    steps: list[str] = field(default_factory=list)
    state: str = "SUCCEEDED"
    exit_status: int | None = 0
    message: str = ""
    ends: bool = True
    log: str = ""

    def step(self) -> None:
        if self.steps:
            self.log += self.steps.pop(0)

    def details(self) -> dict[str, Any]:
        ended = self.ends and not self.steps
        return {
            "type": "SUBMISSION",
            "submission_id": self.sent["submission_id"],
            "status": self.state if ended else "RUNNING",
            "start_time": 1_790_000_000_000,
            "end_time": 1_790_000_125_000 if ended else None,
            "driver_exit_code": self.exit_status if ended else None,
            "message": self.message,
            "metadata": self.sent.get("metadata"),
        }


@dataclass
class FakeCluster:
    """What is asked of it, and what it answers.

    Attributes:
        started: makes the job of a request.
        token: that it wants, "" for none.
        version: of Ray, as `/api/version` has it.
        disk: where its root folder lies on this machine.
        fault: (method, path, how many requests came before) -> "" for an answer; "cut" the connection ends without
            one; "half" the answer is cut short; "lost" it is dropped after the work was done; or an HTTP status.
        asked: (method, path, headers, body) of every request.
    """

    started: Callable[[dict[str, Any]], FakeJob] = FakeJob
    token: str = ""
    version: str = RAY
    disk: Path = Path("/")
    fault: Callable[[str, str, int], str] = lambda method, path, before: ""
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    jobs: dict[str, FakeJob] = field(default_factory=dict)
    address: str = ""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str]:
        if self.token and "Authorization" not in headers:
            return 401, "Unauthorized: Missing authentication token"
        if self.token and headers["Authorization"] != f"Bearer {self.token}":
            return 403, "Forbidden: Invalid authentication token"
        if path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": self.version})
        if (method, path) == ("POST", "/api/jobs/"):
            sent = json.loads(body)
            if sent["submission_id"] in self.jobs:
                return 500, f"Traceback:\nValueError: Job with submission_id {sent['submission_id']} already exists."
            self.jobs[sent["submission_id"]] = self.started(sent)
            return 200, json.dumps({"submission_id": sent["submission_id"]})
        if path == "/api/jobs/":
            driver = {"type": "DRIVER", "job_id": "01000000", "submission_id": None, "status": "RUNNING"}
            return 200, json.dumps([driver, *(job.details() for job in self.jobs.values())])
        job_id, _, action = unquote(path.removeprefix("/api/jobs/")).partition("/")
        if job_id not in self.jobs:
            return 404, f"Job {job_id} does not exist"
        job = self.jobs[job_id]
        if action == "logs":
            return 200, json.dumps({"logs": job.log})
        if action == "stop":
            job.state, job.exit_status, job.ends = "STOPPED", None, True
            return 200, json.dumps({"stopped": True})
        if method == "DELETE":
            del self.jobs[job_id]
            return 200, json.dumps({"deleted": True})
        job.step()
        return 200, json.dumps(job.details())

    @contextmanager
    def serving(self) -> Iterator["FakeCluster"]:
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                happens = cluster.fault(self.command, self.path, len(cluster.asked))
                cluster.asked.append((self.command, self.path, dict(self.headers), body))
                if happens == "cut":
                    return
                status, text = cluster.answer(self.command, self.path, dict(self.headers), body)
                if happens == "lost":
                    return
                if happens.isdigit():
                    status, text = int(happens), "upstream is away"
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "https://elsewhere.example/")
                content = text.encode()
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if happens == "half" else content)

            do_GET = do_POST = do_DELETE = _handle  # noqa: N815 - names of the standard library

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
