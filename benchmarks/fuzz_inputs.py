"""Does any broken input end in a traceback, a hang or a crash? Thousands of spoilt search spaces, images and tables.

Each case follows from the seed and its number. A search space goes through what `--plan` does: it is read, of every
third one the plan is made, and every twentieth goes through the command itself. An image is examined as a data set
is and, where that accepted it, decoded as a sweep would; a table or spreadsheet is read beside its images. All run in
a child process without a network, which is watched: a crash in a decoder and a hang are seen, and the rest goes on.

Run:  python benchmarks/fuzz_inputs.py
Cost: some minutes on one core, and 2 GB of memory.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent.parent))  # for the data sets that tests draw

from broken_images import broken_picture, broken_sheet, broken_table, pictures
from mutations import RICH, SMALL, mutated_setting, mutated_space

from cxr_models.dataset import DataError, in_threads, read_manifest
from cxr_models.images import Fault, examine
from cxr_models.layer_table import PACKAGED
from cxr_models.pixels import decode
from cxr_models.trial import AXES
from sweep.audit_view import AuditRefused
from sweep.machine import this_machine
from sweep.plan import make_plan
from sweep.run import main as sweep_run
from sweep.spec import KEYS, SpecError, SweepSpec, read_spec
from sweep.weights import WeightsError
from tests.layouts import class_folders, covid_radiography

ROOT = Path(__file__).parent.parent
SLOW_S = 5.0  # of processor time for one input: what takes longer is a fault
IN_A_FOLDER = 20  # broken pictures
HANG_S = 60.0  # one that takes so long is ended
MOST_BYTES = 2e9  # that a child may come to
LONGEST_MESSAGE = 20_000  # characters
SIDE = 32  # accepted images are decoded to
REFUSALS = (SpecError, DataError, WeightsError, AuditRefused)
ACCEPTED, REFUSED = "accepted", "refused"
STAND_INS = ("COVID-19_Radiography_Dataset", "covid-normal", "chest_xray", "phantom")  # data of the shipped spaces
# A problem tells its place: the line, the argument, or the key where that is missing.
PLACE = re.compile(rf"(line \d+|--set |--name|({'|'.join(KEYS)})\b)")
WHOLE_FILE = ("the file is empty", "expected UTF-8 text", "expected keys such as", "expected at most", "and ")


class Case(NamedTuple):
    """What became of one broken input.

    Attributes:
        what: was done to which input.
        stage: how far it went.
        outcome: `ACCEPTED`, `REFUSED`, or what is wrong: traceback, unnamed, warning, slow, hang, crash, memory.
        detail: the message, or the end of the traceback.
    """

    number: int
    what: str
    stage: str
    outcome: str
    seconds: float
    detail: str


class Bench:
    """Everything that cases of one process share: a scratch folder with a tiny data set in it, and the seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.data = class_folders(folder / "tiny", images=12)
        shipped = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "search_spaces").glob("*.yaml"))]
        self.spaces = [self._with_data(text) for text in (*shipped, RICH, RICH, RICH, SMALL, SMALL)]
        self.whole = pictures()
        self.machine = this_machine()

    def _with_data(self, text: str) -> str:
        for name in STAND_INS:
            text = re.sub(rf"((?:source|data): ){re.escape(name)}\b", rf"\g<1>{self.data}", text)
        return text.replace("weights: imagenet", "weights: none")  # there is no network to fetch them

    def _chance(self, kind: str, number: int) -> random.Random:
        return random.Random(f"{kind} {self.seed} {number}")

    def space(self, number: int) -> Case:
        """A search space, with broken `--set` arguments in every fourth case."""
        chance = self._chance("space", number)
        text, what = mutated_space(chance, self.spaces)
        settings = []
        if number % 4 == 0:
            text, what = chance.choice(self.spaces).encode(), "set"
            settings = [mutated_setting(chance, AXES) for _ in range(chance.choice((1, 1, 2)))]
        file = self.folder / "space.yaml"
        file.write_bytes(text)
        if number % 20 in (7, 8):
            return self._timed(number, what, "command", lambda: self._command(file, settings))
        stage = "plan" if number % 3 == 0 else "read"
        return self._timed(number, what, stage, lambda: self._planned(file, settings, stage))

    def _planned(self, file: Path, settings: Sequence[str], stage: str) -> tuple[str, str]:
        spec = read_spec(file, settings)
        if stage == "plan" and _has_tables(spec):
            plan = make_plan(spec, self.machine, source=str(file), cache_dir=self.folder / "cache", cache_bytes=0)
            if plan.audit.leaks:
                raise AuditRefused(plan.audit)
        return ACCEPTED, ""

    def _command(self, file: Path, settings: Sequence[str]) -> tuple[str, str]:
        with contextlib.suppress(SpecError):
            if not _has_tables(read_spec(file, settings)):
                return ACCEPTED, "not planned: the layer table would have to be made first"
        said, wrong = io.StringIO(), io.StringIO()
        arguments = [str(file), "--plan", "--cache-dir", str(self.folder / "cache")]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
            status = sweep_run([*arguments, *(part for each in settings for part in ("--set", each))])
        if status not in (0, 1, 2) or "Traceback" in wrong.getvalue() or (status > 0) != bool(wrong.getvalue().strip()):
            return "traceback", f"status {status}: {wrong.getvalue()[-2000:]}"
        return (REFUSED if status else ACCEPTED), wrong.getvalue()

    def picture(self, number: int) -> Case:
        """A picture, examined and, if it was accepted, decoded."""
        suffix, data, what = broken_picture(self._chance("picture", number), self.whole)
        file = self.folder / f"picture-{number}{suffix}"
        file.write_bytes(data)
        try:
            return self._timed(number, what, "picture", lambda: self._examined(file))
        finally:
            file.unlink()

    def _examined(self, file: Path) -> tuple[str, str]:
        (facts,) = in_threads(examine, [file], None)
        if isinstance(facts, Fault):
            return (REFUSED, facts.reason) if facts.reason.strip() else ("unnamed", repr(facts))
        (pixels,) = in_threads(lambda path: decode(path, SIDE, 1 if facts.grey else 3), [file], None)
        if pixels.shape != (SIDE, SIDE, 1 if facts.grey else 3):
            return "traceback", f"decoded to {pixels.shape}"
        return ACCEPTED, f"{facts.format} {facts.mode} {facts.width} x {facts.height}"

    def folder_of_pictures(self, number: int) -> Case:
        """Twenty broken pictures and two sound ones as a data set: all are in the manifest or counted."""
        chance = self._chance("folder", number)
        home = self.folder / f"folder-{number}"
        names = set()
        for index in range(IN_A_FOLDER):
            suffix, data, _ = broken_picture(chance, self.whole)
            names.add(name := f"{'ab'[index % 2]}/{index}{suffix}")
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(data)
        for label in "ab":
            names.add(name := f"{label}/sound.png")
            (home / name).write_bytes(self.whole["png.png"])
        try:
            return self._timed(number, "twenty", "manifest", lambda: _all_counted(home, names))
        finally:
            shutil.rmtree(home)

    def table(self, number: int) -> Case:
        """A CSV file that lists images, or every third time spreadsheets beside class folders."""
        chance = self._chance("table", number)
        home = self.folder / f"table-{number}"
        if number % 3 == 0:
            data, what = broken_sheet(chance)
            source = covid_radiography(home, images=2)
            (source / "COVID-19_Radiography_Dataset" / "COVID.metadata.xlsx").write_bytes(data)
        else:
            data, what = broken_table(chance)
            for index in range(8):
                (home / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
                (home / "ab"[index % 2] / f"{index}.png").write_bytes(self.whole["png.png"])
            source = home / "list.csv"
            source.write_bytes(data)
        if chance.random() < 0.3 and source.is_file():
            source = home  # found in the folder, in place of being named
        try:
            return self._timed(number, what, "table", lambda: _read_table(source))
        finally:
            shutil.rmtree(home)

    def _timed(self, number: int, what: str, stage: str, work: Callable[[], tuple[str, str]]) -> Case:
        written, begun = _output_bytes(), time.process_time()  # whatever else the machine does
        try:
            outcome, detail = work()
        except REFUSALS as error:
            outcome, detail = REFUSED, str(error)
            if problem := message_problem(error, self.folder):
                outcome, detail = "unnamed", f"{problem}: {detail[:2000]!r}"
        except SystemExit as error:
            outcome, detail = (REFUSED if error.code == 2 else "traceback"), f"exit {error.code}"
        except Exception:
            outcome, detail = "traceback", traceback.format_exc()[-3000:]
        seconds = (time.process_time() - begun) / (IN_A_FOLDER if stage == "manifest" else 1)
        if outcome in (ACCEPTED, REFUSED):
            if _output_bytes() != written:
                outcome, detail = "warning", f"something was printed; {detail[:500]}"
            elif peak_bytes() > MOST_BYTES:
                outcome, detail = "memory", f"{peak_bytes() / 1e9:.1f} GB"
            elif seconds > SLOW_S:
                outcome = "slow"
        return Case(number, what, stage, outcome, round(seconds, 3), detail[:3000])


def message_problem(error: Exception, folder: Path) -> str:
    """What a message lacks: the file, the place, an end; or an empty string."""
    text = str(error)
    if len(text) > LONGEST_MESSAGE:
        return f"{len(text):,} characters"
    if any(not letter.isprintable() for letter in text if letter != "\n"):
        return "has characters that a terminal obeys"
    if isinstance(error, SpecError):
        if not text.startswith(str(folder)):
            return "names no file"
        strange = [one for one in error.problems if not (PLACE.match(one) or one.startswith(WHOLE_FILE))]
        return f"names no place: {strange[0]!r}" if strange else ""
    return ""


def _all_counted(home: Path, names: set[str]) -> tuple[str, str]:
    manifest = read_manifest(home)
    kept = {record.path for record in manifest.records}
    left_out = {file.path for file in manifest.unreadable if file.reason.strip()}
    if kept | left_out != names or kept & left_out:
        return "traceback", f"not in the manifest and not counted: {sorted(names - kept - left_out)}"
    return ACCEPTED, f"{len(kept)} kept, {len(left_out)} left out"


def _read_table(source: Path) -> tuple[str, str]:
    try:
        manifest = read_manifest(source)
    except DataError as error:
        if str(source) not in str(error):
            return "unnamed", str(error)[:2000]
        raise
    return ACCEPTED, f"{len(manifest.records)} images, {len(manifest.notes)} notes"


def _has_tables(spec: SweepSpec) -> bool:
    """Whether the layer tables lie in the package; to make one takes TensorFlow and its ten seconds."""
    networks = spec.space.combinations("backbone", "image_side")
    return all((PACKAGED / f"{backbone}-{side}.json").is_file() for backbone, side in networks)


def peak_bytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _output_bytes() -> int:
    """How much has been written to the standard error, where that is a file."""
    sys.stderr.flush()
    return os.fstat(2).st_size


TRIED: Mapping[str, Callable[[Bench, int], Case]] = {
    "search spaces": Bench.space,
    "pictures": Bench.picture,
    "folders of pictures": Bench.folder_of_pictures,
    "tables": Bench.table,
}


def child(kind: str, seed: int, first: int, count: int, folder: Path) -> None:
    """Try cases and write one line of JSON before and after each; whatever else is printed goes to the error output."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    socket.create_connection = _no_network  # type: ignore[assignment]
    warnings.simplefilter("default")
    bench = Bench(folder, seed)
    for number in range(first, first + count):
        lines.write(json.dumps({"begun": number}) + "\n")
        lines.write(json.dumps({**TRIED[kind](bench, number)._asdict(), "peak_bytes": peak_bytes()}) + "\n")


def _no_network(*arguments: object, **settings: object) -> socket.socket:
    raise OSError("no network here")


def watched(kind: str, seed: int, count: int, first: int = 0) -> Iterator[dict[str, Any]]:
    """The cases of one kind, in child processes; one that a child did not survive is a case too."""
    number = first
    while number < first + count:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch, (Path(scratch) / "err").open("wb") as errors:
            command = [sys.executable, __file__, "--child", kind, "--seed", str(seed), "--first", str(number)]
            command += ["--count", str(first + count - number), "--folder", scratch]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=scratch)
            for line in _lines(process):
                found = json.loads(line)
                number = found.get("begun", number)
                if "outcome" in found:
                    number += 1
                    yield found
            status = process.wait()
            if number < first + count:
                how = "hang" if status == -9 else "crash"
                tail = (Path(scratch) / "err").read_text(errors="replace")[-2000:]
                yield {**Case(number, "", "", how, HANG_S, f"status {status}: {tail}")._asdict(), "peak_bytes": 0}
                number += 1


def _lines(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What a child writes; it is ended where nothing comes for too long."""
    if process.stdout is None:
        raise ValueError("expected a process with its output piped")
    waiting = selectors.DefaultSelector()
    waiting.register(process.stdout, selectors.EVENT_READ)
    rest = b""
    while True:
        if not waiting.select(timeout=HANG_S):
            process.kill()
            return
        got = os.read(process.stdout.fileno(), 1 << 16)
        if not got:
            return
        *whole, rest = (rest + got).split(b"\n")
        yield from whole


def summed(kind: str, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts by outcome, the slowest case, the peak of memory, and every fault."""
    slowest = max(cases, key=lambda case: case["seconds"])
    return {
        "kind": kind,
        "cases": len(cases),
        "stages": dict(Counter(case["stage"] for case in cases)),
        "outcomes": dict(Counter(case["outcome"] for case in cases)),
        "slowest": {key: slowest[key] for key in ("number", "what", "stage", "seconds")},
        "seconds": round(sum(case["seconds"] for case in cases), 1),
        "peak_bytes": max(case["peak_bytes"] for case in cases),
        "faults": [case for case in cases if case["outcome"] not in (ACCEPTED, REFUSED)][:50],
    }


def main() -> int:
    """The command; 1 where a fault was found."""
    found = argparse.ArgumentParser(description="Spoilt search spaces, images and tables, thousands of each.")
    found.add_argument("--seed", type=int, default=0, metavar="N", help="other mistakes (0)")
    counts = {"search spaces": 5000, "pictures": 2000, "folders of pictures": 50, "tables": 600}
    for kind, count in counts.items():
        option = "--" + kind.replace(" ", "-")
        found.add_argument(option, type=int, default=count, metavar="N", help="how many (%(default)s)")
    found.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    found.add_argument("--child", choices=TRIED, help=argparse.SUPPRESS)
    found.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case (0)")
    found.add_argument("--count", type=int, help=argparse.SUPPRESS)
    found.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = found.parse_args()
    if arguments.child:
        child(arguments.child, arguments.seed, arguments.first, arguments.count, arguments.folder)
        return 0
    from measuring import environment, own_command, write_result
    from rendering import render_one

    wanted = {kind: getattr(arguments, kind.replace(" ", "_")) for kind in counts}
    parts = [
        summed(kind, list(watched(kind, arguments.seed, count, arguments.first)))
        for kind, count in wanted.items()
        if count
    ]
    result = {"kind": "fuzz_inputs", "environment": environment(own_command()), "seed": arguments.seed, "parts": parts}
    write_result(result, arguments.out / "fuzz_inputs.json")
    print(render_one(result))
    for part in parts:
        for fault in part["faults"]:
            print(
                f"\n{part['kind']} {fault['number']} ({fault['what']}): {fault['outcome']}\n{fault['detail'][-1500:]}"
            )
    return 1 if any(part["faults"] for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
