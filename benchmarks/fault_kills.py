"""Drivers and workers of a sweep killed at random moments."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import psutil
from fault_checks import differences, finished_epochs, tracking_differences, trained_again
from fault_runs import (
    AGENTS_MAY_LIVE_S,
    ORPHANS_MAY_LIVE_S,
    Attempt,
    Place,
    Reference,
    Row,
    Setting,
    moments,
    phase_of,
    ray_workers,
    training_children,
)
from measuring import ProgramFailed

from sweep.record import RunFolder

# Of the sweeps whose driver is killed, one in four is killed a second time, and as many a third time.
SECOND_KILL = THIRD_KILL = 0.25
# Of the sweeps that lose a worker, one in three loses another.
ANOTHER_WORKER = 1 / 3
SHOWN_COMPLAINTS = 20
Finished = Mapping[tuple[str, int], int]
TARGETS: Mapping[str, Callable[[Attempt], list[psutil.Process]]] = {
    "a training process": training_children,
    "a Ray worker": ray_workers,
}


def kill_drivers(setting: Setting) -> Iterator[Row]:
    """Kill drivers at random moments of the time a sweep takes undisturbed, and resume them at once; a row a sweep."""
    generator, reference = random.Random(setting.seed), setting.reference()
    waiting = moments(setting.runs, reference.seconds, generator)
    done, tried = 0, 0
    while done < setting.runs:
        # Where the machine is quicker this time, a sweep ends before its moment; another takes its place.
        when = [waiting.pop() if waiting else generator.uniform(0, reference.seconds)]
        if generator.random() < SECOND_KILL + THIRD_KILL:
            when.append(generator.uniform(0, reference.seconds))
            if generator.random() < THIRD_KILL / (SECOND_KILL + THIRD_KILL):
                when.append(generator.uniform(0, reference.seconds))
        tried += 1
        row = killed_and_resumed(setting.place(f"kill-{tried}"), when, reference)
        if row["kills"]:
            done += 1
            yield row


def killed_and_resumed(place: Place, when: Sequence[float], reference: Reference) -> Row:
    """Run a sweep whose driver is killed, and resumed while what it had started is still dying.

    Args:
        place: of the sweep.
        when: seconds from the beginning of each process until it is killed; the one after the last runs to its end.
        reference: what it must end as.
    """
    finished: list[Finished] = []
    kills: list[Row] = []
    deaths: list[Future[Death]] = []
    seconds = 0.0
    with ThreadPoolExecutor(len(when) + 1) as watchers:
        attempt = Attempt.start(place, 0)
        for moment in when:
            if not attempt.wait_for(moment):
                break
            phase = phase_of(attempt)
            finished.append(finished_epochs(place.run))
            attempt.kill_driver()
            kills.append({"phase": phase, "second": attempt.seconds, "resumed": attempt.resumed})
            seconds += attempt.seconds
            deaths.append(watchers.submit(died, attempt))
            attempt = Attempt.start(place, len(kills))
        complaints = ended_well(attempt)
        seconds += attempt.seconds
        deaths.append(watchers.submit(died, attempt))
    lived = [death.result() for death in deaths]
    for number, death in enumerate(lived):
        complaints += [f"attempt {number}: {text}" for text in death.complaints]
    return {
        "kills": kills,
        "told": ", ".join(f"killed after {kill['second']:.0f} s ({kill['phase']})" for kill in kills),
        "seconds": seconds,
        "lost_seconds": seconds - reference.seconds,
        "orphans_seconds": max((death.others for death in lived[: len(kills)]), default=0.0),
        "agents_seconds": max((death.agents for death in lived[: len(kills)]), default=0.0),
        **compared(finished, place, reference, complaints),
    }


@dataclass(frozen=True)
class Death:
    """How long what a driver had started lived on, in seconds.

    Attributes:
        others: Ray's head, its workers and all that trained.
        agents: Ray's agents.
        complaints: about what did not end.
    """

    others: float
    agents: float
    complaints: tuple[str, ...]


def died(attempt: Attempt) -> Death:
    """After its driver's end: wait for all it had started, and kill what is left after as long as that may live."""
    others, agents = attempt.seconds_to_die(), attempt.seconds_to_die(agents=True)
    attempt.clear()
    complaints = []
    if others is None:
        complaints.append(f"processes outlived their driver by {ORPHANS_MAY_LIVE_S:.0f} s")
    if agents is None:
        complaints.append(f"Ray's agents outlived their driver by {AGENTS_MAY_LIVE_S:.0f} s")
    others = ORPHANS_MAY_LIVE_S if others is None else others
    return Death(others, others + (AGENTS_MAY_LIVE_S if agents is None else agents), tuple(complaints))


def ended_well(attempt: Attempt) -> list[str]:
    """Wait for a sweep's end; a complaint if it did not end as it should."""
    try:
        status = attempt.wait()
    except ProgramFailed as error:
        return [str(error)]
    return [f"exit status {status}: {attempt.said[-1500:]}"] if status else []


def compared(finished: Sequence[Finished], place: Place, reference: Reference, complaints: Sequence[str]) -> Row:
    """`epochs_again`, how many finished epochs were trained a second time, and all `complaints`, the given ones first.

    Args:
        finished: at each kill, what `finished_epochs` found.
        place: of the sweep.
        reference: what it must have ended as.
        complaints: so far.

    A sweep that came to no summary is not compared: what it has lost cannot be told from what it did not come to.
    """
    again = [name for before in finished for name in trained_again(before, place.run)]
    found = [*complaints, *(f"{name} was trained again" for name in again)]
    if place.run.summary.is_file():
        found += differences(reference.run, place.run) + tracked(place.run)
    return {"epochs_again": len(again), "complaints": found[:SHOWN_COMPLAINTS]}


def tracked(run: RunFolder) -> list[str]:
    """Where MLflow does not have what the record has; a store that cannot be opened has nothing."""
    try:
        return tracking_differences(run)
    except Exception as error:
        return [f"MLflow's store cannot be read: {type(error).__name__}: {error}".partition("\n")[0]]


def kill_workers(setting: Setting) -> Iterator[Row]:
    """Kill processes that train, and Ray's workers, while trials or final trainings run; a row a sweep."""
    generator, reference = random.Random(setting.seed), setting.reference()
    begin, end = (reference.reached.get(phase, reference.seconds) for phase in ("search", "evaluation"))
    waiting = moments(setting.runs, end - begin, generator)
    done, tried = 0, 0
    while done < setting.runs:
        when = [begin + (waiting.pop() if waiting else generator.uniform(0, end - begin))]
        if generator.random() < ANOTHER_WORKER:
            when.append(generator.uniform(when[0], end))
        tried += 1
        row = with_lost_workers(setting.place(f"worker-{tried}"), when, reference, generator)
        if row["kills"]:
            done += 1
            yield row


def with_lost_workers(place: Place, when: Sequence[float], reference: Reference, generator: random.Random) -> Row:
    """Run a sweep that loses a worker at some moments; where none is there yet, the first one that is.

    Args:
        place: of the sweep.
        when: seconds from the beginning of its process, in order.
        reference: what it must end as.
        generator: chooses what is killed.
    """
    finished: list[Finished] = []
    kills: list[Row] = []
    attempt = Attempt.start(place, 0)
    for moment in when:
        what = generator.choice([*TARGETS])
        victim = _victim(attempt, moment, what)
        if victim is None:
            break
        before, kill = finished_epochs(place.run), {"phase": phase_of(attempt), "second": attempt.seconds, "what": what}
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile, which is no fault to survive
            victim.kill()
            finished.append(before)
            kills.append(kill)
    complaints = ended_well(attempt)
    seconds = attempt.seconds
    complaints += died(attempt).complaints
    return {
        "kills": kills,
        "told": ", ".join(f"{kill['what']} killed after {kill['second']:.0f} s ({kill['phase']})" for kill in kills),
        "seconds": seconds,
        "lost_seconds": seconds - reference.seconds,
        **compared(finished, place, reference, complaints),
    }


def _victim(attempt: Attempt, moment: float, what: str) -> psutil.Process | None:
    """The process to kill once the moment has come, None where the sweep no longer trains."""
    if not attempt.wait_for(moment):
        return None
    found: list[psutil.Process] = []
    attempt.wait_until(
        lambda: found.extend(TARGETS[what](attempt)) or found or phase_of(attempt) in ("evaluation", "report")
    )
    return found[0] if found else None
