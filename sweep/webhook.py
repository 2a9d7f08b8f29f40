"""A message to a chat when a sweep ends, as Slack, Mattermost and others take them: JSON with a text.

The address is a secret, since whoever has it can write to the channel: it comes from the environment alone, and gets
into no message, file or process of a worker. The text names no image and no patient.
"""

import ipaddress
import json
import platform
import re
import threading
import time
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path, PurePath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from rich.console import Console
from rich.text import Text

from cxr_models.dataset import ImageRecord
from cxr_models.trial import Objective, Outcome, TrialConfig
from sweep.document import SpecError
from sweep.plan import Plan
from sweep.record import RunFolder
from sweep.wording import duration, figure, is_number, metric_name, strategy_text

URL_VARIABLE, FILE_VARIABLE = "SWEEP_WEBHOOK_URL", "SWEEP_WEBHOOK_URL_FILE"
TIMEOUT_S = 5.0  # of an attempt
PAUSES_S = (1.0, 3.0)  # before another one
PATIENCE_S = 20.0  # in all
PATIENCE_OF_INTERRUPTED_S = 5.0
MOST_BYTES = 10_000  # of the file with the address
LONGEST_CAUSE = 500  # characters
PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)


@dataclass(frozen=True)
class Webhook:
    """Where messages go."""

    url: str = field(repr=False)

    def send(self, text: str, *, patience_s: float = PATIENCE_S) -> str:
        """Send a message; never raises.

        Args:
            text: as a person is to read it.
            patience_s: how long this may take at most.

        Returns:
            Why it was not sent, in words without the address, or an empty string.
        """
        problems = [f"no answer within {patience_s:g} s"]
        # In a thread, because neither the search for a host's address nor a slow answer keeps to a timeout.
        thread = threading.Thread(target=self._try, args=(text, problems), name="webhook", daemon=True)
        try:
            thread.start()
            thread.join(patience_s)
        except (KeyboardInterrupt, RuntimeError) as error:
            return f"{type(error).__name__} while it was sent"
        return problems[-1]

    def _try(self, text: str, problems: list[str]) -> None:
        """Note what came of each attempt; an empty string where it was taken."""
        for pause_s in (0.0, *PAUSES_S):
            time.sleep(pause_s)
            try:
                self._post(text)
            except Exception as error:
                problems.append(_problem(error))
                if not _may_pass(error):
                    return
            else:
                problems.append("")
                return

    def _post(self, text: str) -> None:
        body = json.dumps({"text": _escaped(text)}).encode()
        request = Request(self.url, body, {"Content-Type": "application/json", "User-Agent": "cxr-sweep"})
        proxies = (ProxyHandler({}),) if _is_loopback(urlsplit(self.url).hostname or "") else ()
        with build_opener(_NoRedirects, *proxies).open(request, timeout=TIMEOUT_S):
            pass


class _NoRedirects(HTTPRedirectHandler):
    """What is meant for one server is not sent to another."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def take_webhook(environment: MutableMapping[str, str]) -> Webhook | None:
    """The webhook that an environment names, None if it names none; its address is no longer there afterwards.

    Raises:
        SpecError: what is there is no such address; without repeating it.
    """
    url, file = environment.pop(URL_VARIABLE, ""), environment.get(FILE_VARIABLE, "")
    if url and file:
        raise SpecError("the environment", [f"{URL_VARIABLE} and {FILE_VARIABLE} are both set; leave one of them out"])
    if file:
        url = _read(Path(file))
    if not (url or file):
        return None
    if problem := _url_problem(url):
        where = f"{FILE_VARIABLE}={file}" if file else URL_VARIABLE
        raise SpecError("the environment", [f"{where}: {problem} (it is a secret, and therefore not shown)"])
    return Webhook(url)


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(MOST_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text of an address"
        problem = f"{FILE_VARIABLE}: expected a file with the address of a webhook, but {str(file)!r}: {why}"
        raise SpecError("the environment", [problem]) from None


def _url_problem(url: str) -> str:
    if not re.fullmatch(r"[!-~]+", url):
        return "expected one https:// address, but there is " + ("more" if url else "nothing")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return "expected an https:// address, but it is malformed"
    if parts.scheme not in ("https", "http") or not host:
        return "expected an address that begins with https:// and a host, but it does not"
    if "@" in parts.netloc:
        return "expected an https:// address without a user in front of the host"
    if parts.scheme == "http" and not _is_loopback(host):
        return (
            "expected https://, but it begins with http://, which is for this machine alone: it would travel in clear"
        )
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code >= HTTPStatus.INTERNAL_SERVER_ERROR or error.code in PASSING
    return isinstance(error, OSError)


def _problem(error: Exception) -> str:
    """What went wrong, in words that cannot hold the address: those of an exception may."""
    if isinstance(error, HTTPError):
        return f"it was answered with HTTP {error.code}"
    reason = error.reason if isinstance(error, URLError) else error
    told = reason.strerror if isinstance(reason, OSError) else None
    return told or type(reason).__name__


def _escaped(text: str) -> str:
    """As Slack has it: three characters mark its own syntax."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def tell(
    webhook: Webhook | None,
    plan: Plan,
    folder: RunFolder,
    console: Console,
    summary: Mapping[str, Any],
    *,
    failure: str,
    interrupted: bool = False,
    page: str = "",
) -> None:
    """Tell a webhook, if there is one, how a sweep ended. Where that fails it is a note on the terminal.

    Args:
        webhook: that is told.
        plan: of the sweep.
        folder: the run folder.
        console: for the note.
        summary: what `summary.json` holds, or any part of it.
        failure: why the sweep failed, if it did; its last line is told.
        interrupted: it was, so that nobody wants to wait.
        page: MLflow's.
    """
    if webhook is None:
        return
    cause = failure or ("" if "best" in summary or interrupted else "no trial finished an epoch")
    text = ending_text(
        summary,
        name=plan.spec.name,
        how="was interrupted" if interrupted else "failed" if cause else "finished",
        folder=folder.path,
        objective=plan.spec.objective,
        cause=without_patients(cause, plan.manifest.records),
        page=page if (plan.spec.tracking.uri or "").startswith("http") else "",  # elsewhere it is of this machine
    )
    if problem := webhook.send(text, patience_s=PATIENCE_OF_INTERRUPTED_S if interrupted else PATIENCE_S):
        console.print(Text(f"note: the webhook was not told how the sweep ended: {problem}", style="yellow"))


def ending_text(
    summary: Mapping[str, Any],
    *,
    name: str,
    how: str,
    folder: Path,
    objective: Objective,
    cause: str = "",
    page: str = "",
) -> str:
    """What is said of a sweep's end.

    Args:
        summary: what `summary.json` holds, or any part of it.
        name: of the sweep.
        how: it ended, such as `finished`.
        folder: the run folder.
        objective: that trials are ranked by.
        cause: why it failed; its last line is told.
        page: MLflow's, where others can open it.
    """
    seconds = summary.get("seconds", {}).get("total")
    took = f" after {duration(seconds)}" if seconds is not None else ""
    lines = [f"cxr-sweep {name} {how} on {platform.node()}{took}"]
    if cause:
        lines.append(f"cause: {cause.strip().splitlines()[-1][:LONGEST_CAUSE]}")
    if best := summary.get("best"):
        lines.append(f"best: {_best_text(best, summary.get('test') or {}, objective.metric)}")
    if trials := summary.get("trials"):
        outcomes = [f"{trials[outcome]} {outcome.replace('_', ' ')}" for outcome in Outcome if trials.get(outcome)]
        lines.append(", ".join([f"trials: {trials['total']} of {trials['planned']} ended", *outcomes]))
    lines.append(f"run folder: {folder}")
    if page:
        lines.append(f"MLflow: {page}")
    return "\n".join(lines)


def _best_text(best: Mapping[str, Any], test: Mapping[str, Any], metric: str) -> str:
    config, word = TrialConfig.from_json(best["config"]), metric_name(metric)
    parts = [f"{strategy_text(config)}, learning rate {config.learning_rate:.1e}"]
    found = test.get(metric)
    if found and is_number(found["value"]):
        interval = f" (95 % interval {figure(found['low'])} to {figure(found['high'])})"
        parts.append(f"test {word} {figure(found['value'])}{interval}")
    return ", ".join([*parts, f"validation {word} {figure(best['val'].get(metric))}"])


def without_patients(text: str, records: Iterable[ImageRecord]) -> str:
    """The text without anything that names an image or a patient: files are often named after people."""
    names = set()
    for record in records:
        path = PurePath(record.path)
        names |= {record.path, path.name, path.stem, *path.parts[:-1], record.patient, record.mask}
    found = sorted((name for name in names if name and name in text), key=len, reverse=True)
    if not found:
        return text
    return re.sub("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in found), "[…]", text)
