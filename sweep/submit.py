"""`python -m sweep.submit SPACE.yaml --address URL [options of sweep.run]`: a sweep as a job on a Ray cluster.

Exit status: the sweep's own, see `run.py`; 3 where it goes on unwatched, or its end is not known.
"""

import argparse
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sweep.document import SpecError
from sweep.following import ended_words, exit_status, follow, patiently, run_folder, was_cut_off
from sweep.interruption import INTERRUPTED
from sweep.jobs import ClusterRefused, Job, JobServer, NoSuchJob, Unanswered
from sweep.pickup import FetchFailed, check_target, fetch
from sweep.run import DONE, PIPED_WIDTH, UNFINISHED, WRONG_INPUT, add_options, overrides
from sweep.space import Range
from sweep.spec import SweepSpec, checked_name, read_spec
from sweep.submitted import VARIABLE, Submission
from sweep.wording import count, duration, listed

UNKNOWN = 3
KIND = "cxr-sweep"  # marks our jobs among others
# A sweep that is stopped writes down what it has and closes its runs in MLflow, where a server may be waited for.
STOP_WAIT_S = 300
OWN = ("space", "address", "insecure_http", "fetch_to", "python", "detach")  # not for `sweep.run`


def submission_parser() -> argparse.ArgumentParser:
    """The arguments of a command that starts a sweep."""
    found = argparse.ArgumentParser(
        prog="python -m sweep.submit",
        description="Run a sweep on a Ray cluster, follow it, and fetch its report. Paths are those of the cluster.",
        epilog="without SPACE.yaml: --list, --attach ID, --stop ID, --fetch ID (`--list --help` tells more)",
    )
    add_options(found)
    _add_own_options(found)
    found.add_argument("--detach", action="store_true", help="start the sweep and do not follow it")
    return found


def watching_parser() -> argparse.ArgumentParser:
    """The arguments of a command about sweeps that were submitted before."""
    found = argparse.ArgumentParser(prog="python -m sweep.submit", description="Sweeps on a Ray cluster.")
    what = found.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="every sweep that the cluster knows of")
    what.add_argument("--attach", metavar="ID", help="follow a sweep, from its first line on")
    what.add_argument("--stop", metavar="ID", help="end a sweep in good order, so that --resume goes on with it")
    what.add_argument("--fetch", metavar="ID", help="fetch the report, the summary and the table of trials")
    _add_own_options(found)
    return found


def _add_own_options(found: argparse.ArgumentParser) -> None:
    found.add_argument("--address", required=True, metavar="URL", help="of the dashboard, as http://127.0.0.1:8265")
    found.add_argument("--insecure-http", action="store_true", help="let HTTP, and the token in it, leave this machine")
    found.add_argument("--fetch-to", type=Path, metavar="DIR", help="where the report goes (runs/NAME)")
    found.add_argument("--python", default="python", metavar="COMMAND", help="that starts Python on the head (python)")


def run_options(arguments: argparse.Namespace) -> list[str]:
    """The options of `sweep.run` among the arguments, written out."""
    parser = submission_parser()
    options = []
    for name, value in vars(arguments).items():
        if name in OWN or value == parser.get_default(name):
            continue
        option = "--" + name.replace("_", "-")
        if value is True:
            options.append(option)
        else:
            options += [f"{option}={each}" for each in (value if isinstance(value, list) else [value])]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    watches = any(re.match(r"--(list|attach|stop|fetch)(=|$)", word) for word in given)
    arguments = (watching_parser() if watches else submission_parser()).parse_args(given)
    try:
        server = JobServer(arguments.address, os.environ, insecure_http=arguments.insecure_http)
        if arguments.fetch_to:
            check_target(arguments.fetch_to)
        return _watch(server, arguments) if watches else _submit(server, arguments, given)
    except (ClusterRefused, NoSuchJob, SpecError, FetchFailed) as error:
        print(error, file=sys.stderr)
    except Unanswered as error:
        print(
            f"{error}; expected the dashboard of a Ray cluster there: is its head running, with what "
            "`pip install 'cxr-sweep[cluster]'` brings, and is its port forwarded?",
            file=sys.stderr,
        )
    except BrokenPipeError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNKNOWN
    except KeyboardInterrupt:
        print("interrupted; nothing was changed on the cluster", file=sys.stderr)
        return INTERRUPTED
    return WRONG_INPUT


def _submit(server: JobServer, arguments: argparse.Namespace, given: Sequence[str]) -> int:
    spec = read_spec(arguments.space, overrides(arguments))
    if arguments.name:
        spec = replace(spec, name=checked_name(arguments.name))
    if arguments.inline:
        raise SpecError("the command", ["--inline runs a sweep in one process, without the cluster; leave it out here"])
    submission = Submission(
        arguments.space.name,
        arguments.space.read_text(encoding="utf-8-sig"),
        ("python", "-m", "sweep.submit", *given),
    )
    try:
        packed = submission.encoded()
    except ValueError as error:
        raise SpecError(str(arguments.space), [str(error)]) from None
    version = server.check()
    for note in _notes(server, spec, arguments):
        print(f"note: {note}")
    job_id = f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    environment = {VARIABLE: packed, "RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    # The shell gives way to the sweep, so that nothing stands between it and a signal.
    entrypoint = f"exec {arguments.python} -m sweep.submitted {shlex.join(run_options(arguments))}".rstrip()
    try:
        metadata = {"kind": KIND, "name": spec.name}
        patiently(lambda: server.submit(job_id, entrypoint, environment, metadata))
    except (KeyboardInterrupt, Unanswered) as error:
        print(f"{str(error) or 'interrupted'}: {job_id} may have been started;", file=sys.stderr)
        print(f"  to see: {_command(arguments, '--list')}", file=sys.stderr)
        return UNKNOWN
    print(f"submitted to {server.address} (Ray {version}) as {job_id}", flush=True)
    if arguments.detach:
        print(_where_to_look(arguments, job_id), flush=True)
        return DONE
    print("Ctrl-C stops watching it; the sweep goes on", flush=True)
    return _followed(server, arguments, job_id, spec)


def _notes(server: JobServer, spec: SweepSpec, arguments: argparse.Namespace) -> Iterator[str]:
    """What should be known before a sweep is sent off."""
    if not server.needs_token:
        yield (
            f"this cluster asks for no token: whoever reaches {server.address} can run any program on it; "
            "start its nodes with RAY_AUTH_MODE=token"
        )
    if here := list(_paths_here(spec, arguments)):
        yield (
            f"paths are those of the cluster: {listed(here)} {'is' if len(here) == 1 else 'are'} on this machine too, "
            "and nothing of it is sent"
        )


def _paths_here(spec: SweepSpec, arguments: argparse.Namespace) -> Iterator[str]:
    """Options and values whose path leads somewhere on this machine, where a person may have thought of that."""
    named = [("data.source", source.source) for source in spec.data.all_sources]
    for axis in ("weights", "lung_mask"):
        domains = spec.space.axes[axis].domains if axis in spec.space.axes else ()
        named += [(axis, str(value)) for domain in domains if not isinstance(domain, Range) for value in domain]
    if arguments.weights_dir:
        named.append(("--weights-dir", str(arguments.weights_dir)))
    yield from (f"{name} {value}" for name, value in named if os.sep in value and Path(value).expanduser().exists())


def _watch(server: JobServer, arguments: argparse.Namespace) -> int:
    server.check()
    if arguments.list:
        return _list(server)
    job_id = arguments.attach or arguments.stop or arguments.fetch
    job = server.job(job_id)
    if arguments.attach:
        return _followed(server, arguments, job_id)
    if arguments.fetch:
        folder = run_folder(server.log(job_id))
        if not folder:
            print(f"{job_id} has no run folder{'' if job.has_ended else ' yet'}", file=sys.stderr)
            return UNFINISHED
        try:
            fetch(server, job_id, folder, arguments.fetch_to, arguments.python)
        except FetchFailed as error:
            print(error, file=sys.stderr)
            return UNFINISHED
        return DONE
    return _stop(server, arguments, job)


def _list(server: JobServer) -> int:
    jobs = server.jobs()
    table = Table(box=None, pad_edge=False)
    for name in ("id", "name", "state", "started", "took", "exit status"):
        table.add_column(name, no_wrap=True)
    ours = [job for job in jobs if job.metadata.get("kind") == KIND]
    for job in ours:
        status = str(exit_status(job)) if job.has_ended else "–"
        table.add_row(*map(Text, (job.id, job.metadata.get("name", ""), job.state, _started(job), _took(job), status)))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=2 * PIPED_WIDTH)
    if ours:
        console.print(table)
    else:
        print("no sweep")
    if others := len(jobs) - len(ours):
        print(f"and {count(others, 'job')} of other kinds")
    return DONE


def _started(job: Job) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else "–"


def _took(job: Job) -> str:
    return duration(max(0.0, (job.ended or time.time()) - job.started)) if job.started else "–"


def _stop(server: JobServer, arguments: argparse.Namespace, job: Job) -> int:
    if job.has_ended:
        print(f"nothing to stop: {ended_words(job, arguments.python)}")
        return DONE
    shown = len(server.log(job.id))
    server.stop(job.id)
    print(f"stopping {job.id}: it writes down what it has, for {duration(STOP_WAIT_S)} at most", flush=True)
    try:
        job, log = follow(server, job.id, shown)
    except (KeyboardInterrupt, Unanswered, ClusterRefused) as error:
        print(f"{str(error) or 'not waiting any longer'}; it is being stopped\n{_where_to_look(arguments, job.id)}")
        return UNKNOWN
    _tell_the_end(arguments, job, log)
    return DONE


def _followed(server: JobServer, arguments: argparse.Namespace, job_id: str, spec: SweepSpec | None = None) -> int:
    """Follow a sweep to its end and fetch its files; its exit status."""
    try:
        job, log = follow(server, job_id)
    except KeyboardInterrupt:
        print(f"\nno longer watching; the sweep goes on\n{_where_to_look(arguments, job_id)}")
        return UNKNOWN
    except NoSuchJob:
        print(
            f"the cluster knows nothing of {job_id} any more: its head was started anew, and the sweep ended with it\n"
            f"{_how_to_go_on(arguments, 'NAME')}",
            file=sys.stderr,
        )
        return UNFINISHED
    except (Unanswered, ClusterRefused) as error:
        print(f"{error}\nthe sweep goes on if the cluster does\n{_where_to_look(arguments, job_id)}", file=sys.stderr)
        return UNKNOWN
    _tell_the_end(arguments, job, log)
    status = exit_status(job)
    if status == WRONG_INPUT and spec and any(source.source != "phantom" for source in spec.data.all_sources):
        print("paths are those of the cluster: what --data, --weights-dir and the like name has to be there")
    if folder := run_folder(log):
        try:
            fetch(server, job_id, folder, arguments.fetch_to, arguments.python)
        except (KeyboardInterrupt, FetchFailed, Unanswered, ClusterRefused, NoSuchJob) as error:
            print(
                f"not fetched: {str(error) or 'interrupted'}\n  to try again: {_command(arguments, '--fetch', job_id)}"
            )
    return status


def _tell_the_end(arguments: argparse.Namespace, job: Job, log: str) -> None:
    print(ended_words(job, arguments.python), flush=True)
    if was_cut_off(job, log) and (folder := run_folder(log)):
        print(f"what it had finished is kept in {folder} on the cluster")
        print(_how_to_go_on(arguments, Path(folder).name), flush=True)


def _how_to_go_on(arguments: argparse.Namespace, name: str) -> str:
    return f"  to go on, with its other options: {_command(arguments, 'SPACE.yaml', '--resume', '--name', name)}"


def _where_to_look(arguments: argparse.Namespace, job_id: str) -> str:
    watch, end = (_command(arguments, option, job_id) for option in ("--attach", "--stop"))
    return f"  to watch it: {watch}\n  to end it: {end}"


def _command(arguments: argparse.Namespace, *words: str) -> str:
    """A further command to the same cluster."""
    command = [sys.executable, "-m", "sweep.submit", *words, "--address", arguments.address]
    if arguments.insecure_http:
        command.append("--insecure-http")
    if arguments.python != "python":
        command += ["--python", arguments.python]
    return shlex.join(command)


if __name__ == "__main__":
    sys.exit(main())
