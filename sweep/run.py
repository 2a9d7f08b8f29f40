"""`python -m sweep.run SPACE.yaml`: arguments, what is printed, exit status.

Exit status: 0 done; 1 the sweep could not finish, the disk is full, or the data leak; 2 the file, an argument or the
data is wrong; 130 interrupted.
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TextIO, TypeVar, cast

from platformdirs import user_cache_path
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cxr_models.dataset import DataError
from cxr_models.storage import NoSpace
from cxr_models.trial import SEGMENT, TEST, TrialData, TrialResult
from sweep.audit_view import AuditRefused
from sweep.folder_lock import FolderInUse
from sweep.interruption import INTERRUPTED, handled, leave
from sweep.machine import ClusterUnreachable, Machine, this_machine
from sweep.plan import Plan, make_plan
from sweep.plan_view import render_plan
from sweep.progress import StepProgress
from sweep.record import RecordDamaged, RunFolder, ranked
from sweep.reference import COMPARED, ReferenceSpec, compare
from sweep.remote import StorageError, is_url
from sweep.results_view import MARK, doctor_lines, ranking, seeds_text, strategy_table
from sweep.resume import ResumeRefused, Sessions, continued, recorded_name
from sweep.run_home import RunHome
from sweep.spec import SpecError, SweepSpec, checked_name, read_spec
from sweep.tasks import SHOWN_AXES_OF
from sweep.verdict_view import print_verdict
from sweep.webhook import take_webhook, tell
from sweep.weights import WeightsError
from sweep.wording import duration, figure, subset_note

Answer = TypeVar("Answer")

DONE, UNFINISHED, WRONG_INPUT = 0, 1, 2
PIPED_WIDTH = 140
RUN_FOLDER = "run folder: "  # begins a line, by which `sweep.submit` finds the folder
# What is wrong before a sweep begins.
REFUSED = (
    SpecError,
    DataError,
    WeightsError,
    ClusterUnreachable,
    FolderInUse,
    ResumeRefused,
    RecordDamaged,
    StorageError,
)


def parser() -> argparse.ArgumentParser:
    """The arguments of `python -m sweep.run`."""
    found = argparse.ArgumentParser(
        prog="python -m sweep.run",
        description="Run the sweep a YAML file describes: every trial is tracked in MLflow, the best model saved.",
    )
    add_options(found)
    found.add_argument("--address", default="", metavar="ADDR", help="of a running Ray cluster, or auto")
    return found


def add_options(found: argparse.ArgumentParser) -> None:
    """The file, and every option that holds wherever a sweep runs."""
    found.add_argument("space", type=Path, metavar="SPACE.yaml", help="search space, see search_spaces/")
    found.add_argument("--data", metavar="DIR|CSV|URL|phantom", help="images, in place of data.source")
    found.add_argument("--weights", metavar="imagenet|bundled|none|PATH", help="of every pretrained backbone")
    found.add_argument("--trials", type=int, metavar="N", help="how many trials, in place of search.trials")
    found.add_argument("--max-epochs", type=int, metavar="N", help="most epochs of a trial, in place of space.epochs")
    found.add_argument("--seed", type=int, metavar="N", help="of search, split and training")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a value of the YAML file")
    found.add_argument("--out", default="runs", metavar="DIR|URL", help="where run folders lie (runs)")
    found.add_argument("--name", metavar="NAME", help="of the run folder; refused if it exists, but for --resume")
    found.add_argument("--cache-dir", type=Path, metavar="DIR", help="for decoded images and other work to keep")
    caching = found.add_mutually_exclusive_group()
    caching.add_argument(
        "--cache-gb", type=_gigabytes, metavar="X", help="of stored features, at most (a quarter of the free disk)"
    )
    caching.add_argument("--no-cache", action="store_true", help="store no features: run frozen layers in every epoch")
    found.add_argument("--weights-dir", metavar="DIR|URL", help="where files of ImageNet weights lie")
    found.add_argument("--tracking-uri", metavar="URI", help="MLflow server (a SQLite store in the run folder)")
    found.add_argument("--cpus-per-trial", type=float, metavar="X", help="CPUs a trial gets")
    found.add_argument("--gpus-per-trial", type=float, metavar="X", help="GPUs a trial gets, such as 0.5")
    found.add_argument("--concurrency", type=int, metavar="N", help="trials at once")
    found.add_argument("--plan", action="store_true", help="show what would run, and stop")
    found.add_argument("--inline", action="store_true", help="run in this process, without Ray: for debugging")
    found.add_argument(
        "--resume", action="store_true", help="go on with the sweep of the run folder; more --trials let it grow"
    )


def _gigabytes(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(
            f"expected a finite number of GB above 0, but got {text!r}; --no-cache keeps nothing, and without either "
            "features may take a quarter of the free disk"
        )
    return found


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The arguments that stand for values of the file, as `--set` would give them; those of `--set` come last."""
    named = {
        "data.source": arguments.data,
        "space.weights": arguments.weights,
        "search.trials": arguments.trials,
        "space.epochs": arguments.max_epochs,
        "search.seed": arguments.seed,
        "tracking.uri": arguments.tracking_uri,
        "resources.cpus_per_trial": arguments.cpus_per_trial,
        "resources.gpus_per_trial": arguments.gpus_per_trial,
        "resources.concurrency": 1 if arguments.inline else arguments.concurrency,
    }
    return [*(f"{key}={value}" for key, value in named.items() if value is not None), *arguments.set]


def main(argv: Sequence[str] | None = None, again: Sequence[str] = ()) -> int:
    """The command; its exit status.

    Args:
        argv: its arguments.
        again: what a person types to run it again, if that is another command.
    """
    arguments = parser().parse_args(argv)
    given = list(again or [sys.executable, "-m", "sweep.run", *(sys.argv[1:] if argv is None else argv)])
    console, errors = _console(), _console(stderr=True)
    begun: list[RunFolder] = []

    def last_words() -> str:
        return f"ended at once: {_how_to_go_on(given, begun[0].path)}" if begun else "ended at once"

    try:
        with handled(last_words):
            arguments.webhook = take_webhook(os.environ)  # no argument of its own: the list of processes would show it
            return _run(arguments, given, console, begun)
    except REFUSED as error:
        errors.print(Text(str(error)))
        return WRONG_INPUT
    except (AuditRefused, NoSpace) as error:
        errors.print(Text(str(error)))
        return UNFINISHED
    except KeyboardInterrupt:
        errors.print("interrupted before a trial could run; nothing has changed")
        return INTERRUPTED


def _run(arguments: argparse.Namespace, given: Sequence[str], console: Console, begun: list[RunFolder]) -> int:
    spec = read_spec(arguments.space, overrides(arguments))
    if arguments.name:
        spec = replace(spec, name=checked_name(arguments.name))
    home = RunHome(arguments.out, _cache_dir(arguments))
    if not arguments.plan:
        home.check()
    if not arguments.resume:
        if arguments.name and not arguments.plan:
            _of_the_command(lambda: home.refuse_taken(spec.name))
        return _plan_and_run(arguments, given, spec, home, None, console, begun)
    folder = _of_the_command(lambda: home.latest(spec.name, exactly=bool(arguments.name)))
    if arguments.plan:
        home.bring(folder, StepProgress(console))
        return _plan_and_run(arguments, given, spec, home, folder, console, begun)
    with home.held(folder, console, StepProgress(console)):
        return _plan_and_run(arguments, given, spec, home, folder, console, begun)


def _plan_and_run(
    arguments: argparse.Namespace,
    given: Sequence[str],
    spec: SweepSpec,
    home: RunHome,
    folder: RunFolder | None,
    console: Console,
    begun: list[RunFolder],
) -> int:
    """Plan the sweep, and run it, or what is left of that in a folder."""
    if folder and folder.holds_inputs:
        spec = replace(spec, name=recorded_name(folder))
    cache_dir = _cache_dir(arguments)
    machine = _machine(arguments.address)
    plan = make_plan(
        spec,
        machine,
        source=str(arguments.space),
        cache_dir=cache_dir,
        weights_dir=_weights_dir(arguments.weights_dir),
        cache_bytes=0 if arguments.no_cache else arguments.cache_gb and int(arguments.cache_gb * 1e9),
        progress=StepProgress(console),
    )
    console.print(render_plan(plan))
    if plan.audit.leaks:
        raise AuditRefused(plan.audit)
    if arguments.plan:
        return DONE
    if folder is None:
        data = _prepared(plan, cache_dir, console)
        folder = _of_the_command(lambda: home.create(spec.name, exactly=bool(arguments.name)))
        with home.held(folder, console):
            return _work(plan, home, folder, data, arguments, given, console, begun, Sessions())
    sessions = Sessions.read(folder) if folder.holds_inputs else Sessions()
    if sessions.past:
        plan = continued(plan, folder, sessions)
    for note in sessions.notes():
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    if sessions.is_done(plan.spec.search.trials):
        return _tell_that_it_is_done(plan, home, folder, console)
    data = _prepared(plan, cache_dir, console)
    sessions.check_files(data)
    return _work(plan, home, folder, data, arguments, given, console, begun, sessions)


def _prepared(plan: Plan, cache_dir: Path, console: Console) -> TrialData:
    from sweep.session import prepare  # brings pandas and matplotlib, which a plan can do without

    return prepare(plan, cache_dir, StepProgress(console))


def _tell_that_it_is_done(plan: Plan, home: RunHome, folder: RunFolder, console: Console) -> int:
    from sweep.readback import read_run

    run = read_run(folder)
    print_results(plan, run.results, run.summary, console)
    console.print(f"{RUN_FOLDER}{home.shown(folder.path)}", soft_wrap=True)
    console.print(
        f"\nnothing is left to do: the sweep in {home.shown(folder.path)} has come to its end; "
        "more --trials would let it grow",
        soft_wrap=True,
    )
    return DONE if "best" in run.summary else UNFINISHED


def _cache_dir(arguments: argparse.Namespace) -> Path:
    """Absolute, because Ray's workers run in folders of their own."""
    found: Path = (arguments.cache_dir or user_cache_path("cxr-sweep")).expanduser().resolve()
    return found


def _weights_dir(given: str | None) -> Path | str | None:
    return given if given is None or is_url(given) else Path(given)


def _of_the_command(call: Callable[[], Answer]) -> Answer:
    """What a call answers; that it cannot is the command's problem."""
    try:
        return call()
    except StorageError:
        raise
    except ValueError as error:
        raise SpecError("the command", [str(error)]) from None


def _work(
    plan: Plan,
    home: RunHome,
    folder: RunFolder,
    data: TrialData,
    arguments: argparse.Namespace,
    given: Sequence[str],
    console: Console,
    begun: list[RunFolder],
    sessions: Sessions,
) -> int:
    """Run the sweep in its folder, or what is left of it, and print what came of it."""
    from sweep.session import run_sweep

    where = home.shown(folder.path)
    console.print(f"{RUN_FOLDER}{where}", soft_wrap=True)
    begun.append(folder)
    tell_end = partial(tell, arguments.webhook, plan, folder, console)
    try:
        ended = run_sweep(
            plan,
            folder,
            data,
            _cache_dir(arguments),
            inline=arguments.inline,
            address=arguments.address,
            console=console,
            sessions=sessions,
        )
    except Exception as error:
        tell_end({}, failure=f"{type(error).__name__}: {error}")
        raise
    if ended.summary:
        print_results(plan, ended.results, ended.summary, console)
    if ended.tracking_problem:
        console.print(Text(f"note: {ended.tracking_problem}", style="yellow"))
    if lacking := home.settle(interrupted=ended.interrupted):
        console.print(Text(f"note: {lacking}", style="yellow"), soft_wrap=True)
    console.print(f"\nreport: {home.shown(folder.report)}\nsee every trial: {ended.ui_command}", soft_wrap=True)
    console.print(f"  and open {ended.ui_address}", soft_wrap=True)
    tell_end(ended.summary, failure=ended.failure, interrupted=ended.interrupted, page=ended.ui_address)
    if not (ended.interrupted or ended.failure):
        return DONE if "best" in ended.summary else UNFINISHED
    what = f"the sweep failed: {ended.failure}\n" if ended.failure else "interrupted: "
    console.print(Text(what + _how_to_go_on(given, where, len(ended.results))), soft_wrap=True)
    return INTERRUPTED if ended.interrupted else UNFINISHED


def _how_to_go_on(given: Sequence[str], folder: Path | str, finished: int | None = None) -> str:
    """What is kept of a sweep that was cut short, and the command that goes on with it."""
    command = list(given)
    if "--resume" not in given:
        command.append("--resume")
    if not any(each == "--name" or each.startswith("--name=") for each in given):
        command += ["--name", str(folder).rpartition("/")[2]]
    finished_trials = "all finished trials" if finished is None else f"{finished} finished trials"
    return (
        f"{finished_trials} are kept in {folder}, and running ones up to their last epoch\n"
        f"to go on: {shlex.join(command)}"
    )


def _machine(address: str) -> Machine:
    if not address:
        return this_machine()
    from sweep.ray_cluster import cluster_machine

    return cluster_machine(address)


def print_results(plan: Plan, results: Sequence[TrialResult], summary: Mapping[str, Any], console: Console) -> None:
    """The ranking, the strategies, the best configuration and its test metrics."""
    objective = plan.spec.objective
    order = ranked(tuple(results), objective)
    for result in results:
        if result.error:
            console.print(Text(f"trial {result.trial_id} failed: {result.error}", style="red"))
    if not order:
        console.print("no trial finished an epoch", style="red")
        return
    for part in ranking(order, results, objective, console):
        console.print(part)
    if objective.task != SEGMENT:
        console.print(strategy_table(summary, objective))
    for line in doctor_lines(order, objective):
        console.print(Text(line), soft_wrap=True)
    if objective.task != SEGMENT:
        console.print(_features_line(summary))
    own = SHOWN_AXES_OF[objective.task]
    best = {axis: value for axis, value in order[0].config.to_json().items() if axis in own}
    shown = (f"{axis} {value:.4g}" if isinstance(value, float) else f"{axis} {value}" for axis, value in best.items())
    console.print(Text(f"best configuration: {', '.join(shown)}"))
    for diagnosis in order[0].doctor:
        note = f"  {MARK}{diagnosis.name}. {diagnosis.evidence} {diagnosis.remedy}"
        console.print(Text(note, style="red" if diagnosis.grave else "yellow"), soft_wrap=True)
    if subset := subset_note(summary["data"]):
        console.print(subset)
    if test := summary.get("test"):
        console.print(f"test set{_opened(summary)}: {test['images']} images of {test['patients']} patients")
        for name in (name for name in objective.metrics if name in test):
            value, low, high = (figure(test[name][part]) for part in ("value", "low", "high"))
            console.print(f"  {name} {value} (95 % interval {low} to {high})")
        if spread := seeds_text(summary["strategies"][0], objective.metric):
            console.print(f"  that is the first of its final models, which is kept; {spread}")
    elif not len(plan.indices(TEST)):
        console.print("no test part: these are validation figures, and the choice was made on them")
    if verdict := summary.get("verdict"):
        print_verdict(verdict, objective, console)
    if plan.spec.reference:
        _print_reference(plan.spec.reference, summary, console)


def _opened(summary: Mapping[str, Any]) -> str:
    """How often, as far as is known."""
    openings = summary["test_openings"]
    earlier = max((opening["earlier_sweeps"] for opening in openings), default=0)
    own = "once" if len(openings) == 1 else f"{len(openings)} times"
    return f", opened {own} by this sweep and by {earlier} before it" if earlier else f", opened {own}"


def _print_reference(reference: ReferenceSpec, summary: Mapping[str, Any], console: Console) -> None:
    """Published figures beside ours, where they are about the same classes."""
    comparisons = compare(reference, summary)
    if not comparisons:
        console.print(
            Text(f"the reference ({reference.source}) is about other classes: {', '.join(reference.classes)}")
        )
        return
    table = Table(title=Text(f"Beside {reference.source}"), title_justify="left")
    for name in ("model", "part"):
        table.add_column(name)
    for name in ("accuracy", "ours", "macro_f1", "ours", "loss", "ours"):
        table.add_column(name, justify="right")
    for each in comparisons:
        name = each.name if each.ours else f"{each.name} (not in this sweep)"
        for index, line in enumerate(each.lines):
            figures = (side.get(metric) for metric in COMPARED for side in (line.theirs, line.ours))
            shown = ("–" if value is None else f"{value:.3f}" for value in figures)
            table.add_row(Text("" if index else name), line.part, *shown)
        for text in each.published.contradictions:
            console.print(Text(f"note: {each.name}: {text}"))
    console.print(table)
    console.print("splits differ between the two, and with them the images behind each figure")


def _features_line(summary: Mapping[str, Any]) -> str:
    epochs = summary["epochs"]
    if not epochs["from_features"]:
        return f"{epochs['run']:,} epochs, none of them from stored features of frozen layers"
    seconds = summary["seconds"]["features"]
    took = f"took workers {duration(seconds)} in all" if seconds >= 1 else "took less than a second"
    return (
        f"{epochs['from_features']:,} of {epochs['run']:,} epochs were trained from stored features of frozen layers; "
        f"computing these, or finding those of an earlier sweep, {took}"
    )


def _console(*, stderr: bool = False) -> Console:
    """The terminal; elsewhere (a file, a pipe) wide enough that no line has to break."""
    file = cast(IO[str], _LastingFile(sys.stderr if stderr else sys.stdout))
    console = Console(file=file, highlight=False, soft_wrap=stderr)
    return console if console.is_terminal else Console(file=file, highlight=False, soft_wrap=stderr, width=PIPED_WIDTH)


class _LastingFile:
    """Falls silent where nobody reads any more, a closed terminal or pipe: a sweep outlives that."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except OSError:
            self._fall_silent()
            return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError:
            self._fall_silent()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _fall_silent(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())


if __name__ == "__main__":
    leave(main())
