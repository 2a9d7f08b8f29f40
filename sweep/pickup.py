"""The report, summary and table of a sweep brought from a cluster: a second job writes them to its log."""

import json
import secrets
import shlex
from contextlib import suppress
from pathlib import Path, PurePosixPath

from sweep.following import await_end, patiently
from sweep.jobs import JobServer, NoSuchJob, Unanswered
from sweep.parcel import Parcel, ParcelDamaged, unpacked

FETCHED = "fetched.json"  # marks a folder as one of ours, to be fetched into again
RUNS = Path("runs")
KIND = "cxr-sweep files"
SHOWN_LINES = 5


class FetchFailed(Exception):  # noqa: N818 - reads as what happened
    """The files did not come; the message says why."""


def check_target(folder: Path) -> None:
    """Whether files may be written into a folder that a person has named: a new or empty one, or one of ours.

    Raises:
        FetchFailed: they may not.
    """
    if folder.exists() and not folder.is_dir():
        raise FetchFailed(f"expected a folder in --fetch-to, but {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FETCHED).is_file():
        raise FetchFailed(
            f"expected a new or empty folder in --fetch-to, or one that was fetched into before, but {folder} holds "
            "other files; choose another"
        )


def fetch(server: JobServer, job_id: str, run_folder: str, target: Path | None, python: str) -> Path:
    """Bring the files of a sweep's run folder, and say what came.

    Args:
        server: of the cluster.
        job_id: of the sweep.
        run_folder: on the cluster.
        target: where to write them; None for `runs/<name>` beside whatever else has that name.
        python: the command that starts Python on the head.

    Returns:
        The folder they are in.

    Raises:
        FetchFailed: nothing came, or it cannot be written here.
        Unanswered, ClusterRefused, NoSuchJob
    """
    if "://" in run_folder:
        raise FetchFailed(f"the run folder is {run_folder}, and the report can be read there")
    files_job = f"{job_id[:150]}-files-{secrets.token_hex(2)}"
    command = f"exec {python} -m sweep.parcel {shlex.quote(run_folder)}"
    patiently(lambda: server.submit(files_job, command, {}, {"kind": KIND, "of": job_id}))
    job, log = await_end(server, files_job)
    with suppress(NoSuchJob, Unanswered):  # it is off the list already, or stays on it
        server.forget(files_job)
    try:
        parcel = unpacked(log)
    except ParcelDamaged as error:
        said = "\n  ".join(log.splitlines()[-SHOWN_LINES:]) or job.message
        raise FetchFailed(f"{error}; the cluster says:\n  {said}") from error
    if not parcel.files:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in parcel.left_out.items())
        raise FetchFailed(f"{run_folder} on the cluster has none of these files yet: {reasons}")
    if target is None and _is_here(parcel, Path(run_folder)):
        print(f"the run folder is on this machine: {run_folder}", flush=True)
        return Path(run_folder)
    folder = target or _free(PurePosixPath(run_folder).name, job_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        origin = {"job": job_id, "address": server.address, "run_folder": run_folder}
        (folder / FETCHED).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        parcel.write(folder)
    except OSError as error:
        raise FetchFailed(f"cannot write to {folder}: {error.strerror}; choose another --fetch-to") from error
    for name, reason in parcel.left_out.items():
        print(f"note: {name} was not fetched: {reason}")
    sizes = ", ".join(f"{name} ({len(content):,} bytes)" for name, content in parcel.files.items())
    print(f"fetched to {folder}: {sizes}; everything else is in {run_folder} on the cluster", flush=True)
    return folder


def _is_here(parcel: Parcel, folder: Path) -> bool:
    """Whether a run folder is on this very machine, as on the head itself."""
    try:
        return all((folder / name).read_bytes() == content for name, content in parcel.files.items())
    except OSError:
        return False


def _free(name: str, job_id: str) -> Path:
    """The first of `runs/<name>`, `runs/<name>-2`, ... that is not there, or holds files of this very sweep."""
    number = 1
    while True:
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        if not folder.exists() or _origin(folder) == job_id:
            return folder
        number += 1


def _origin(folder: Path) -> str:
    try:
        return str(json.loads((folder / FETCHED).read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
