"""Sweeps as processes that can be killed: started, killed at a moment or in part, and what is left of them found."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from fault_checks import tracking_differences
from measuring import ROOT, ProgramFailed

from sweep.record import RunFolder, read_lines

# A variable that every process of a sweep inherits.
MARK = "CXR_SWEEP_FAULTS"
POLL_S = 0.05
ORPHANS_MAY_LIVE_S = 30.0
# Ray's own, which look for the dead head of their cluster for a minute and longer before they give up.
AGENTS, AGENTS_MAY_LIVE_S = ("ray::DashboardAgent", "ray::RuntimeEnvAgent"), 180.0
RUN_TIMEOUT_S = 900.0
SPACE, TRIALS = Path(__file__).parent / "faults.yaml", 12
# Where a sweep stands; see `phase_of`.
PHASES = ("reading data", "start", "search", "final trainings", "evaluation", "report")


Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """One sweep: what it runs, and where everything of it lies.

    Attributes:
        folder: of its own, for the output of its processes, the run folder and the cache.
        trials: how many; the first ones of the search space.
        options: of the command, beside those that say where.
        space: the search space.
        cache: in place of a cache folder of its own.
        program: module to run.
        disk: folder for run folder and cache in place of `folder`.
    """

    folder: Path
    name: str
    trials: int = TRIALS
    options: Sequence[str] = ()
    space: Path = SPACE
    cache: Path | None = None
    program: str = "sweep.run"
    disk: Path | None = None

    @property
    def run(self) -> RunFolder:
        return RunFolder(((self.disk or self.folder) / "runs" / self.name).resolve())

    @property
    def begun(self) -> bool:
        """Whether there is something to resume; before that the same command is simply given again."""
        return self.run.path.is_dir()

    def command(self, *, resume: bool) -> list[str]:
        """What to run; with `--resume` or without."""
        files = self.disk or self.folder
        where = ["--out", str(files / "runs"), "--name", self.name]
        where += ["--cache-dir", str(self.cache or files / "cache")]
        command = [sys.executable, "-u", "-m", self.program, str(self.space), *where]
        command += ["--trials", str(self.trials), *self.options]
        return [*command, "--resume"] if resume else command


@dataclass
class Attempt:
    """One process of a sweep, and all that it starts. It has a session of its own, as a scheduler gives.

    Attributes:
        place: the sweep.
        resumed: whether it was told to go on.
        mark: what its processes have in their environment.
        log: everything it prints.
        begun: when, in seconds since 1970.
        process: the driver.
        ended: when it was first seen to have ended, 0 before.
    """

    place: Place
    resumed: bool
    mark: str
    log: Path
    begun: float
    process: subprocess.Popen[bytes]
    ended: float = 0.0

    @classmethod
    def start(cls, place: Place, number: int) -> "Attempt":
        """Run the sweep's command: `--resume` if there is a run folder, else the same command as the first time.

        Args:
            place: the sweep.
            number: of the attempt, 0 for the first.
        """
        place.folder.mkdir(parents=True, exist_ok=True)
        mark, log, resumed = f"{place.folder.name}-{number}-{os.getpid()}", place.folder / f"log-{number}", place.begun
        own = {**os.environ, "CUDA_VISIBLE_DEVICES": "", MARK: mark, "PYTHONPATH": str(ROOT)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                place.command(resume=resumed),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=own,
                start_new_session=True,
            )
        return cls(place, resumed, mark, log, time.time(), process)

    @property
    def seconds(self) -> float:
        """Since its beginning; once it has been seen to have ended, until then."""
        return (time.time() if self.running else self.ended) - self.begun

    @property
    def running(self) -> bool:
        over = self.process.poll() is not None
        if over and not self.ended:
            self.ended = time.time()
        return not over

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> int:
        """Its exit status.

        Raises:
            ProgramFailed: it hangs.
        """
        try:
            status = self.process.wait(timeout_s)
            self.ended = self.ended or time.time()
            return status
        except subprocess.TimeoutExpired:
            self.clear()
            raise ProgramFailed(f"{self.log} does not end; its last words:\n{self.said[-2000:]}") from None

    def wait_until(self, condition: Callable[[], object]) -> bool:
        """Whether the condition came true before the process ended."""
        while self.running and self.seconds < RUN_TIMEOUT_S:
            if condition():
                return True
            time.sleep(POLL_S)
        return False

    def wait_for(self, second: float) -> bool:
        """Whether it still runs so many seconds after its beginning."""
        return self.wait_until(lambda: self.seconds >= second)

    def kill_driver(self) -> None:
        """SIGKILL to the driver alone; what it started is left to find out by itself."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.wait()

    def processes(self) -> list[psutil.Process]:
        """All living processes of this attempt: those in its session, and those with its mark in their environment.

        Ray's processes write their titles over their environment; a process may leave the session.
        """
        return [process for process in psutil.process_iter() if self._has(process)]

    def _has(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return os.getsid(process.pid) == self.process.pid or process.environ().get(MARK) == self.mark
        except (psutil.Error, OSError):
            return False  # it has ended meanwhile, or is another user's

    def seconds_to_die(self, *, agents: bool = False) -> float | None:
        """After the driver's end: how long its other processes still live; None if longer than they may.

        Args:
            agents: of Ray's agents, in place of all others.
        """
        begun, limit_s = time.monotonic(), AGENTS_MAY_LIVE_S if agents else ORPHANS_MAY_LIVE_S
        while any(_command_of(process).startswith(AGENTS) is agents for process in self.processes()):
            if time.monotonic() - begun > limit_s:
                return None
            time.sleep(POLL_S)
        return time.monotonic() - begun

    def clear(self) -> None:
        """End whatever is left of it."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait()


def ray_workers(attempt: Attempt) -> list[psutil.Process]:
    """The Ray actors that have a child to train in; what their titles say of them changes with what they do."""
    return [each for each in attempt.processes() if _command_of(each).startswith("ray::") and _children_of(each)]


def training_children(attempt: Attempt) -> list[psutil.Process]:
    """The processes that train: a worker's fork server has forked them."""
    servers = [each for worker in ray_workers(attempt) for each in _children_of(worker)]
    return [child for server in servers for child in _children_of(server)]


def _children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.Error:
        return []


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def phase_of(attempt: Attempt) -> str:
    """Where the sweep stands, by what is on disk: one of `PHASES`. A resumed one stands where it was at once."""
    run = attempt.place.run
    if not run.path.is_dir():
        return "reading data"
    if run.summary.is_file() and run.summary.stat().st_mtime >= attempt.begun:
        return "report"
    if any(read_lines(run.test_openings)):
        return "evaluation"
    begun = sum(1 for _ in read_lines(run.suggestion_record))
    if begun and sum(1 for _ in read_lines(run.trial_record)) >= attempt.place.trials:
        return "final trainings"
    return "search" if begun else "start"


def moments(count: int, span_s: float, generator: random.Random) -> list[float]:
    """Random moments in a span of seconds: one in each of `count` equal parts of it, in random order.

    Each is uniform over the whole span, and together they leave no part of it out.
    """
    parts = [span_s * (part + generator.random()) / count for part in range(count)]
    generator.shuffle(parts)
    return parts


class TimeLeft:
    """Says how long the rest of some runs of one kind will take."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._begun = time.monotonic()

    def told(self, text: str) -> None:
        """One run is through: print what became of it."""
        self._done += 1
        left = (time.monotonic() - self._begun) / self._done * (self._total - self._done)
        rest = f"; about {left / 60:.0f} min left" if self._done < self._total else ""
        print(f"{self._done} of {self._total}: {text}{rest}", flush=True)


@dataclass(frozen=True)
class Reference:
    """A sweep that nothing disturbed.

    Attributes:
        seconds: of the whole program.
        reached: phase -> seconds until it was reached; one that passed between two looks is missing.
    """

    run: RunFolder
    seconds: float
    reached: Mapping[str, float]


@dataclass
class Setting:
    """What is to be disturbed, and where.

    Attributes:
        scratch: folder for everything.
        trials: of each sweep.
        runs: how many sweeps.
        seed: of what is random.
        options: of the command of every sweep.
        facts: for the result; filled on the way.
    """

    scratch: Path
    trials: int
    runs: int
    seed: int
    options: Sequence[str] = ()
    facts: Row = field(default_factory=dict)

    def place(self, name: str) -> Place:
        """A sweep with a folder and a cache of its own."""
        return Place(self.scratch / name, name, self.trials, self.options)

    def reference(self) -> Reference:
        """Run the sweep once to its end, and note when it reached what.

        Raises:
            ProgramFailed: it did not end well, or MLflow did not take everything.
        """
        attempt = Attempt.start(self.place("reference"), 0)
        reached: dict[str, float] = {}
        while attempt.running:
            reached.setdefault(phase_of(attempt), attempt.seconds)
            time.sleep(POLL_S)
        if attempt.wait():
            raise ProgramFailed(f"the sweep that nothing disturbs failed:\n{attempt.said[-2000:]}")
        if complaints := tracking_differences(attempt.place.run):
            raise ProgramFailed(f"MLflow has not taken the sweep that nothing disturbs: {complaints}")
        self.facts |= {"undisturbed_seconds": attempt.seconds, "reached": reached}
        print(f"undisturbed: {attempt.seconds:.0f} s", flush=True)
        return Reference(attempt.place.run, attempt.seconds, reached)
