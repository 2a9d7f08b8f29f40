"""Spoilt search spaces, images and tables, some hundred of each: every one is accepted or refused in words."""

import random
import signal
import socket
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # programs, not a package

import fuzz_inputs
from broken_images import broken_picture, pictures
from fuzz_inputs import ACCEPTED, REFUSED, Bench, message_problem, summed, watched
from mutations import mutated_space

from cxr_models.images import Fault, examine
from sweep.document import SpecError


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), seed=1)


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    monkeypatch.setattr(socket, "create_connection", fuzz_inputs._no_network)
    monkeypatch.setattr(fuzz_inputs, "peak_bytes", lambda: 0.0)  # other tests of the process have had their own
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


@pytest.mark.parametrize(
    ("kind", "count"), [("space", 200), ("picture", 100), ("folder_of_pictures", 1), ("table", 30)]
)
def test_no_mistake_ends_in_anything_but_words(bench, kind, count):
    cases = [getattr(bench, kind)(number) for number in range(count)]
    faults = [case for case in cases if case.outcome not in (ACCEPTED, REFUSED)]
    assert not faults
    assert {case.outcome for case in cases} >= ({ACCEPTED} if kind == "folder_of_pictures" else {ACCEPTED, REFUSED})


def test_what_they_start_from_is_sound(bench, tmp_path):
    """Else the refusals would say nothing of the mistakes."""
    for name, data in bench.whole.items():
        (tmp_path / name).write_bytes(data)
        assert not isinstance(examine(tmp_path / name), Fault), name
    read = 0
    for text in bench.spaces:
        (tmp_path / "space.yaml").write_text(text)
        read += bench._planned(tmp_path / "space.yaml", [], "read") == (ACCEPTED, "")
    assert read == len(bench.spaces)


def test_a_seed_says_what_is_done(bench):
    assert [mutated_space(random.Random(7), bench.spaces) for _ in range(3)] == [
        mutated_space(random.Random(7), bench.spaces) for _ in range(3)
    ]
    one, same, other = (broken_picture(random.Random(seed), pictures()) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [(KeyError("x"), "traceback"), (RecursionError(), "traceback"), (SpecError("elsewhere", ["line 1: x"]), "unnamed")],
)
def test_a_fault_is_seen(bench, raised, outcome):
    def fail() -> tuple[str, str]:
        raise raised

    assert bench._timed(0, "", "read", fail).outcome == outcome


@pytest.mark.parametrize(
    ("problems", "lacking"),
    [
        (["line 3, space.epochs: x"], ""),
        (["--set a=1: x"], ""),
        (["space: x"], ""),
        (["something is wrong"], "names no place"),
        (["line 1: " + "x" * 1500] * 40, "characters"),
    ],
)
def test_a_message_that_lacks_something_is_seen(problems, lacking):
    assert lacking in message_problem(SpecError("/f/s.yaml", problems), Path("/f"))
    assert bool(message_problem(SpecError("/f/s.yaml", problems), Path("/f"))) == bool(lacking)


@pytest.mark.slow
def test_a_child_that_dies_is_a_case_and_the_others_go_on(tmp_path, monkeypatch):
    program = Path(fuzz_inputs.__file__).read_text()
    dying = program.replace("bench = Bench(folder, seed)", "bench = Bench(folder, seed); first == 0 and os.abort()")
    (tmp_path / "fuzz_inputs.py").write_text(dying.replace("Path(__file__)", f"Path({fuzz_inputs.__file__!r})"))
    monkeypatch.setenv("PYTHONPATH", str(Path(fuzz_inputs.__file__).parent))
    monkeypatch.setattr(fuzz_inputs, "__file__", str(tmp_path / "fuzz_inputs.py"))
    cases = list(watched("tables", 0, 3))
    assert [case["outcome"] == "crash" for case in cases] == [True, False, False]
    assert summed("tables", cases)["faults"][0]["number"] == 0
