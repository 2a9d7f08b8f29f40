"""Ray's Jobs API over HTTP: jobs of a cluster are started, looked at, read and stopped.

Ray's own client waits for ever where an answer is lost, and takes RAY_ADDRESS for the address that it was given. This
one does neither, and needs no Ray on its machine.
"""

import http.client
import ipaddress
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

LEAST_RAY = (2, 60)  # what `pyproject.toml` asks for
DASHBOARD_PORT = 8265
TIMEOUT_S = 30.0  # between two parts of an answer
MOST_BYTES = 256 * 1024**2  # of an answer
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


class ClusterRefused(Exception):  # noqa: N818 - reads as what happened
    """The cluster cannot be asked: a wrong address or token, too old a Ray. Asking again would not help."""


class Unanswered(ConnectionError):  # noqa: N818 - reads as what happened
    """No answer, or a broken one; the next may be whole."""


class NoSuchJob(LookupError):  # noqa: N818 - reads as what happened
    """The cluster knows no job of this id; it forgets them when it is started anew."""


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it.

    Attributes:
        state: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        started: in seconds since 1970; None before.
        ended: the same; None before.
        exit_status: of its process, negative for the signal that ended it; None where it has none, as in STOPPED.
        message: the cluster's own words.
        metadata: what was sent with it.
    """

    id: str
    state: str
    started: float | None
    ended: float | None
    exit_status: int | None
    message: str
    metadata: Mapping[str, str]

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


class JobServer:
    """The jobs of one cluster.

    A token is sent only where the cluster asks for one, over HTTPS or to this machine itself unless `insecure_http`.

    Attributes:
        address: as a URL.
        needs_token: whether the cluster has asked for a token.
    """

    def __init__(self, address: str, environment: Mapping[str, str], *, insecure_http: bool = False) -> None:
        """Nothing is asked yet.

        Args:
            address: of the cluster's dashboard, such as `http://127.0.0.1:8265`.
            environment: where the token is looked for: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, HOME.
            insecure_http: whether HTTP may leave this machine.

        Raises:
            ClusterRefused: the address is none, or not safe.
        """
        self.address = checked_address(address, insecure_http=insecure_http)
        self._environment = environment
        self._token = ""
        # A proxy has nothing to do with this machine's own ports, and would be given the token.
        proxies = [urllib.request.ProxyHandler({})] if _is_loopback(urlsplit(self.address).hostname or "") else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    @property
    def needs_token(self) -> bool:
        return bool(self._token)

    def check(self) -> str:
        """Ask which Ray runs there.

        Raises:
            ClusterRefused: no dashboard of Ray, too old a Ray, or a token that does not fit.
            Unanswered: nothing answers.
        """
        status, body = self._send("GET", "/api/version")
        try:
            version = json.loads(body)["ray_version"]
            found = tuple(int(part) for part in version.split(".")[:2])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ClusterRefused(
                f"expected the dashboard of a Ray cluster at {self.address}, but what answers there is another server "
                f"(HTTP status {status}); the dashboard's port is {DASHBOARD_PORT} if not chosen otherwise"
            ) from None
        if found < LEAST_RAY:
            raise ClusterRefused(
                f"expected Ray {_dotted(LEAST_RAY)} at {self.address}, but Ray {version} runs there; "
                "start the cluster with this project's own installation or image"
            )
        return str(version)

    def submit(self, job_id: str, entrypoint: str, environment: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        """Start a command on the cluster's head; the same id again is the same job.

        Args:
            job_id: its name, never used before.
            entrypoint: the command, for a shell.
            environment: variables for it, beside those of the head.
            metadata: kept beside it.

        Raises:
            ClusterRefused, Unanswered: in the latter case it may have been started all the same.
        """
        job = {
            "submission_id": job_id,
            "entrypoint": entrypoint,
            "runtime_env": {"env_vars": dict(environment)},
            "metadata": dict(metadata),
        }
        status, body = self._send("POST", "/api/jobs/", job)
        if status != http.client.OK and "already exists" not in body.decode(errors="replace"):
            self._complain(status, body)

    def job(self, job_id: str) -> Job:
        """What has become of a job.

        Raises:
            ClusterRefused, Unanswered, NoSuchJob
        """
        return _job(self._ask("GET", _path(job_id)))

    def jobs(self) -> list[Job]:
        """All jobs that were started through this API, the oldest first.

        Raises:
            ClusterRefused, Unanswered
        """
        found = [_job(entry) for entry in self._ask("GET", "/api/jobs/") if entry.get("type") == "SUBMISSION"]
        return sorted(found, key=lambda job: job.started or 0)

    def log(self, job_id: str) -> str:
        """All that a job has written so far.

        Raises:
            ClusterRefused, Unanswered, NoSuchJob
        """
        return str(self._ask("GET", f"{_path(job_id)}/logs")["logs"] or "")

    def stop(self, job_id: str) -> None:
        """Ask a job to end; it is given the time that its environment says.

        Raises:
            ClusterRefused, Unanswered, NoSuchJob
        """
        self._ask("POST", f"{_path(job_id)}/stop")

    def forget(self, job_id: str) -> None:
        """Take a job that has ended off the cluster's list.

        Raises:
            ClusterRefused, Unanswered, NoSuchJob
        """
        self._ask("DELETE", _path(job_id))

    def _ask(self, method: str, path: str) -> Any:
        status, body = self._send(method, path)
        if status != http.client.OK:
            self._complain(status, body)
        try:
            return json.loads(body)
        except ValueError:
            raise Unanswered(f"the answer of {self.address} is no JSON") from None

    def _complain(self, status: int, body: bytes) -> None:
        """Raise what an answer other than 200 means."""
        text = body.decode(errors="replace").strip()
        reason = text.splitlines()[-1][:300] if text else "no reason given"
        if status == http.client.NOT_FOUND and "does not exist" in text:
            raise NoSuchJob(reason)
        if status == http.client.BAD_REQUEST:
            raise ClusterRefused(f"the cluster at {self.address} refuses this: {reason}")
        raise Unanswered(f"{self.address} answers with HTTP status {status}: {reason}")

    def _send(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """HTTP status and body of an answer, with a token if one is wanted."""
        status, body = self._exchange(method, path, content)
        if status == http.client.UNAUTHORIZED and not self._token:
            self._token = found_token(self._environment, self.address)
            status, body = self._exchange(method, path, content)
        if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            raise ClusterRefused(
                f"the cluster at {self.address} does not take the token found here; expected the one that its head was "
                "started with, in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token "
                "(the first of these that is there counts)"
            )
        return status, body

    def _exchange(self, method: str, path: str, content: Mapping[str, Any] | None) -> tuple[int, bytes]:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, data, method=method)
        if data is not None:
            request.add_header("Content-Type", "application/json")
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                return answer.status, self._read(answer)
        except urllib.error.HTTPError as error:
            with error:
                self._refuse_redirect(error)
                return error.code, self._read(error)
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise ClusterRefused(
                    f"the certificate of {self.address} is not trusted: {error.reason.verify_message}; "
                    "SSL_CERT_FILE names a file of further certificates to trust"
                ) from error
            raise Unanswered(f"no answer from {self.address}: {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered(f"no answer from {self.address}: {str(error) or type(error).__name__}") from error

    def _read(self, answer: http.client.HTTPResponse | urllib.error.HTTPError) -> bytes:
        try:
            body = answer.read(MOST_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered(f"the answer of {self.address} was cut short: {type(error).__name__}") from error
        if len(body) > MOST_BYTES:
            raise ClusterRefused(f"{self.address} answers with more than {MOST_BYTES:,} bytes, expected less")
        return body

    def _refuse_redirect(self, answer: urllib.error.HTTPError) -> None:
        if 300 <= answer.code < 400:
            raise ClusterRefused(
                f"{self.address} sends on to {answer.headers.get('Location', 'nowhere')}; "
                "give that address, if it is the cluster's"
            )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A job goes to the address that was given, or nowhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


def checked_address(address: str, *, insecure_http: bool = False) -> str:
    """The URL of a dashboard, without a slash at its end.

    HTTP to another machine is refused: the token would lie open on the way, and whoever has it can run any program on
    the cluster; so would the log and the report. A forwarded port is one command.

    Raises:
        ClusterRefused: it is no such URL, or not safe.
    """
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if parts.scheme not in ("http", "https") or not host or address == "auto" or parts.query or parts.fragment:
        raise ClusterRefused(
            f"expected the address of a cluster's dashboard, such as http://127.0.0.1:{DASHBOARD_PORT}, but got "
            f"{address!r}; `python -m sweep.run --address` takes addresses of other kinds, on the cluster itself"
        )
    if parts.username is not None or parts.password is not None:
        raise ClusterRefused(
            "expected an address without a user name or password, which would be seen in logs; the token is taken from "
            "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        )
    if parts.scheme == "http" and not _is_loopback(host) and not insecure_http:
        port = parts.port or DASHBOARD_PORT
        raise ClusterRefused(
            f"expected https://, or a port of this machine, but got {address!r}: over HTTP the token, the log and the "
            f"report would be readable on the way to {host}. Forward the port with "
            f"`ssh -N -L {port}:127.0.0.1:{port} {host}` and give http://127.0.0.1:{port}, or trust the network with "
            "--insecure-http"
        )
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def found_token(environment: Mapping[str, str], address: str) -> str:
    """The token of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, in Ray's own order.

    Raises:
        ClusterRefused: there is none, or it cannot be read.
    """
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return _checked_token(token, "RAY_AUTH_TOKEN")
    named = environment.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named) if named else Path(environment.get("HOME") or Path.home()) / ".ray" / "auth_token"
    if not named and not path.is_file():
        raise ClusterRefused(
            f"the cluster at {address} asks for a token, and there is none here; expected it in RAY_AUTH_TOKEN, in the "
            "file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
        )
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        source = "RAY_AUTH_TOKEN_PATH" if named else "the token"
        raise ClusterRefused(f"{source}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return _checked_token(token, str(path))


def _checked_token(token: str, source: str) -> str:
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ClusterRefused(f"expected a token in {source}: one word of plain letters and digits")
    return token


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _path(job_id: str) -> str:
    return f"/api/jobs/{quote(job_id, safe='')}"


def _job(entry: Mapping[str, Any]) -> Job:
    started, ended = (entry.get(name) for name in ("start_time", "end_time"))
    return Job(
        id=entry["submission_id"],
        state=entry["status"],
        started=started / 1000 if started else None,
        ended=ended / 1000 if ended else None,
        exit_status=entry.get("driver_exit_code"),
        message=entry.get("message") or "",
        metadata=entry.get("metadata") or {},
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
