"""A job of a cluster followed line by line, over connections that are lost and come back."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from sweep.interruption import INTERRUPTED
from sweep.jobs import Job, JobServer, Unanswered
from sweep.run import DONE, RUN_FOLDER, UNFINISHED, WRONG_INPUT
from sweep.wording import duration

PATIENCE_S = 600.0  # with a cluster that does not answer
RETRY_S, MOST_RETRY_S = 1.0, 15.0
PAUSE_S, MOST_PAUSE_S = 1.0, 30.0
PAUSES_PER_ANSWER = 10  # a long log over a slow line is asked for less often
PENDING_S = 15.0
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # a shell's exit status for a command that it cannot start

_T = TypeVar("_T")


def patiently(ask: Callable[[], _T]) -> _T:
    """Ask until there is an answer.

    Raises:
        Unanswered: there was none for `PATIENCE_S`.
    """
    lost_at, pause = None, RETRY_S
    while True:
        try:
            answer = ask()
        except Unanswered as error:
            now = time.monotonic()
            if lost_at is None:
                lost_at = now
                print(f"{error}; trying again for {duration(PATIENCE_S)}", file=sys.stderr, flush=True)
            if now - lost_at > PATIENCE_S:
                raise
            time.sleep(pause)
            pause = min(2 * pause, MOST_RETRY_S)
            continue
        if lost_at is not None:
            print(f"connected again after {duration(time.monotonic() - lost_at)}", file=sys.stderr, flush=True)
        return answer


def follow(server: JobServer, job_id: str, shown: int = 0) -> tuple[Job, str]:
    """Print what a job writes until it ends; the job then, and its whole log.

    Args:
        server: of the cluster.
        job_id: of the job.
        shown: characters of its log that need not be printed.

    Raises:
        Unanswered: the cluster has not answered for `PATIENCE_S`.
        ClusterRefused, NoSuchJob
    """
    begun, waits = time.monotonic(), False
    while True:
        asked = time.monotonic()
        # In this order: what a job that has ended has written is all of it.
        job, log = patiently(lambda: (server.job(job_id), server.log(job_id)))
        end = len(log) if job.has_ended else log.rfind("\n") + 1
        if end > shown:
            print(log[shown:end], end="" if log[end - 1] == "\n" else "\n", flush=True)
            shown = end
        if job.has_ended:
            return job, log
        if job.state == "PENDING" and not waits and time.monotonic() - begun > PENDING_S:
            waits = True
            print("waiting for the cluster to start it", flush=True)
        time.sleep(min(MOST_PAUSE_S, max(PAUSE_S, PAUSES_PER_ANSWER * (time.monotonic() - asked))))


def await_end(server: JobServer, job_id: str) -> tuple[Job, str]:
    """The same, without a word about what it writes."""
    while not (job := patiently(lambda: server.job(job_id))).has_ended:
        time.sleep(PAUSE_S)
    return job, patiently(lambda: server.log(job_id))


def exit_status(job: Job) -> int:
    """That of the sweep, for a job that has ended; a sweep that was killed could not finish."""
    if job.state == "STOPPED":
        return INTERRUPTED
    if job.state == "SUCCEEDED":
        return DONE
    return job.exit_status if job.exit_status in (WRONG_INPUT, INTERRUPTED) else UNFINISHED


def ended_words(job: Job, python: str) -> str:
    """How a job ended, for a person.

    Args:
        job: that has ended.
        python: the command that was to start Python.
    """
    words = f"{job.id} has ended with exit status {exit_status(job)}"
    if job.state == "STOPPED":
        return f"{words}: it was stopped"
    if job.state == "SUCCEEDED" or job.exit_status in (UNFINISHED, WRONG_INPUT, INTERRUPTED):
        return words
    if job.exit_status in (NOT_FOUND, NOT_EXECUTABLE):
        return f"{words}: the head of the cluster has no command {python!r}; --python names the one of its installation"
    if job.exit_status is None:
        return f"{words}: the cluster could not run it to its end: {job.message or 'it gives no reason'}"
    if job.exit_status < 0:
        return (
            f"{words}: its process was killed by signal {-job.exit_status}; 9 is what a machine short of memory sends"
        )
    return f"{words}: its process ended with {job.exit_status}"


def was_cut_off(job: Job, log: str) -> bool:
    """Whether a sweep ended without saying how to go on with it, as one does that is killed."""
    killed = job.state == "FAILED" and (job.exit_status is None or job.exit_status < 0)
    return killed or (job.state == "STOPPED" and "\nto go on: " not in log)


def run_folder(log: str) -> str:
    """The folder on the cluster that a sweep says it has; "" where it came to none."""
    lines = (line.removeprefix(RUN_FOLDER) for line in log.splitlines() if line.startswith(RUN_FOLDER))
    return next(lines, "")
