"""`python -m sweep.sync RUN_DIR`: send MLflow what it did not take while the sweep ran.

Exit status: 0 MLflow has everything; 1 it does not answer, and what is left is kept; 2 the folder is not one of a
sweep, its sweep runs, or the tracking URI has a password in it; 130 interrupted, and sent again from there.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path
from rich.console import Console

from sweep.addresses import password_problem
from sweep.folder_lock import FolderInUse, FolderLock
from sweep.ledger import Ledger, Spool, ends_open
from sweep.mlflow_runs import Unavailable
from sweep.progress import StepProgress
from sweep.record import RecordDamaged, RunFolder, read_lines
from sweep.remote import StorageError, is_url
from sweep.run_home import run_folder_at, send_rest
from sweep.sender import Sender
from sweep.spec import SpecError, read_spec
from sweep.tracking import champion_example, own_store, sync_command
from sweep.wording import count, duration

DONE, LEFT_OVER, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
PATIENCE_S = 15.0  # with a server that does not answer
PAUSE_S = 1.0
SHOWN_EVERY_S = 2.0


@dataclass(frozen=True)
class Left:
    """What MLflow lacks of a sweep.

    Attributes:
        ends: trials whose end it has not been told.
        others: openings of the test set, final figures and the like.
        models: best models to be registered.
    """

    epochs: int
    ends: int
    others: int
    models: int

    @property
    def steps(self) -> int:
        return self.epochs + self.ends + self.others + self.models

    def __str__(self) -> str:
        named = ((self.epochs, "epoch"), (self.ends, "trial end"), (self.others, "note"), (self.models, "model"))
        return ", ".join(count(number, noun) for number, noun in named if number) or "nothing"


class Unsent:
    """Counts what is left to send of a sweep that does not run."""

    def __init__(self, folder: RunFolder, ledger: Ledger, spool: Spool) -> None:
        self._ledger = ledger
        self._entries = spool.entries()
        self._epochs: dict[str, int] = {}
        for entry in read_lines(folder.epoch_record):
            self._epochs[entry["trial_id"]] = max(self._epochs.get(entry["trial_id"], 0), entry["epoch"])
        self._ended = {entry["trial_id"] for entry in read_lines(folder.trial_record)}

    @property
    def models(self) -> list[dict[str, Any]]:
        """The entry in the spool of the best model, if it is not registered; one of before has given way to it."""
        wanted = [entry for entry in self._entries if entry["kind"] == "champion"][-1:]
        return [entry for entry in wanted if entry["trial"] not in self._ledger.registered]

    @property
    def left(self) -> Left:
        runs = self._ledger.runs
        ends = [trial_id for trial_id in self._ended if not (trial_id in runs and runs[trial_id].ended)]
        others = len(self._entries) - self._ledger.spooled
        return Left(self._ledger.lacking(self._epochs), len(ends), others, len(self.models))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sweep.sync", description="Send MLflow what it did not take while a sweep ran."
    )
    parser.add_argument("run_dir", metavar="RUN_DIR|URL", help="the folder a sweep wrote, by its path or its URL")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow server, in place of the sweep's own")
    arguments = parser.parse_args(argv)
    try:
        if is_url(arguments.run_dir):
            return _sync_at_url(arguments.run_dir, arguments.tracking_uri)
        folder = _checked(RunFolder(Path(arguments.run_dir).resolve()), arguments.run_dir)
        with FolderLock(folder.lock):
            status = _sync(folder, arguments.tracking_uri)
            if url := send_rest(folder):
                print(f"{url} has everything")
        return status
    except (FolderInUse, SpecError, RecordDamaged) as error:
        print(error, file=sys.stderr)
        return WRONG_INPUT
    except StorageError as error:
        print(error, file=sys.stderr)
        return LEFT_OVER if error.transient else WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted: what MLflow did not take is kept; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _sync_at_url(url: str, given_uri: str | None) -> int:
    """The same of a run folder at a URL, in a copy that is brought into the cache first and mirrored."""
    console = Console(soft_wrap=True)
    home, folder = run_folder_at(url, user_cache_path("cxr-sweep"))
    with home.held(folder, console, StepProgress(console)):
        status = _sync(_checked(folder, url), given_uri)
        if lacking := home.settle(interrupted=False):
            print(lacking, file=sys.stderr)
            return LEFT_OVER
    return status


def _checked(folder: RunFolder, given: str) -> RunFolder:
    if not (folder.state.is_dir() and folder.spec.is_file()):
        raise SpecError(
            "the command",
            [
                f"expected the folder of a sweep, with state/ and spec.yaml in it, but {given} is none; give the "
                "folder that `python -m sweep.run` wrote"
            ],
        )
    return folder


def _own_uri(folder: RunFolder) -> str:
    return read_spec(folder.spec, most_bytes=None).tracking.uri or own_store(folder)


def _sync(folder: RunFolder, given_uri: str | None) -> int:
    uri = given_uri or _own_uri(folder)
    if problem := password_problem(uri):
        print(f"the tracking URI of {'the command' if given_uri else folder.spec}: {problem}", file=sys.stderr)
        if not given_uri:
            print("then give the same URI, without the password, as --tracking-uri", file=sys.stderr)
        return WRONG_INPUT
    spool = Spool(folder)
    entries = spool.entries()
    if not entries:
        print("nothing is left to send: this sweep kept nothing for MLflow")
        return DONE
    if ends_open(entries):  # its process was killed; MLflow would show it as running for ever
        spool.add("finished", at=time.time_ns() // 1_000_000, summary={}, files=[], status="KILLED")
    ledger = Ledger(folder)
    unsent = Unsent(folder, ledger, spool)
    if not unsent.left.steps and not given_uri:  # another server may have nothing of it
        print(f"nothing is left to send to {uri}")
        return DONE
    print(f"to send to {uri}: {unsent.left}", flush=True)
    refused: list[str] = []
    sender = Sender(folder, uri, ledger, spool, refused.append)
    try:
        _send(sender, unsent)
        _register(folder, uri, sender, unsent, ledger)
    except Unavailable as error:
        print(
            f"MLflow at {uri}: {error}; {unsent.left} left, and kept: `{sync_command(folder)}` goes on from here",
            file=sys.stderr,
        )
        return LEFT_OVER
    for cause in dict.fromkeys(refused):
        print(f"note: MLflow did not take {cause}")
    print(f"MLflow at {uri} has everything")
    return DONE


def _send(sender: Sender, unsent: Unsent) -> None:
    """Send everything but models.

    Raises:
        Unavailable: MLflow has not answered for `PATIENCE_S`.
    """
    begun = shown = answered = time.monotonic()
    total, told = unsent.left.steps, -1
    waits = False
    while (now := time.monotonic()) and sender.due(now, everything=True) is not None:
        before = sender.parts_sent
        try:
            sender.step(now)
            answered, waits = time.monotonic(), False
        except Unavailable:
            answered = time.monotonic() if sender.parts_sent > before else answered
            if time.monotonic() - answered >= PATIENCE_S:
                raise
            if not waits:
                print(f"no answer yet; trying for {PATIENCE_S:g} s", flush=True)
            waits = True
            time.sleep(PAUSE_S)
        if time.monotonic() - shown >= SHOWN_EVERY_S:
            shown = time.monotonic()
            done = total - unsent.left.steps
            if done == told:
                continue
            told = done
            wait = f", about {duration((shown - begun) * (total - done) / done)} left" if done > 0 else ""
            print(f"sent {max(done, 0):,} of {total:,}{wait}", flush=True)


def _register(folder: RunFolder, uri: str, sender: Sender, unsent: Unsent, ledger: Ledger) -> None:
    """Register the best models that MLflow lacks, and note on them what is said of them.

    Raises:
        Unavailable: a model could not be registered.
    """
    if not unsent.models:
        return
    from sweep.evaluation import register_champion  # brings pandas and more
    from sweep.keras_child import keras_child

    print("registering the best model", flush=True)
    with keras_child(folder.log("sync")) as call:
        for entry in unsent.models:
            try:
                example = np.load(champion_example(folder))
                named = entry["name"], entry["trial"]
                address = call(register_champion, folder.model, example, uri, sender.parent_run_id, *named)
            except (RuntimeError, TimeoutError, OSError) as error:
                raise Unavailable(f"the best model was not registered: {error}") from error
            ledger.model(entry["trial"], address)
    sender.note_champion()


if __name__ == "__main__":
    sys.exit(main())
