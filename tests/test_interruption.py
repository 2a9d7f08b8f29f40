"""The first signal ends a sweep in good order, the second at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweep.interruption import INTERRUPTED, SIGNALS, deferred, handled
from sweep.run import _LastingFile

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_raises_and_the_handlers_are_those_of_before(number):
    kept = signal.signal(number, signal.default_int_handler)  # whoever runs the tests may ignore some
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt), handled(lambda: ""):
        os.kill(os.getpid(), number)
    found = [signal.getsignal(each) for each in SIGNALS]
    signal.signal(number, kept)
    assert found == before


def started(inside: str) -> subprocess.Popen[str]:
    code = f"""
import time
from sweep.interruption import deferred, handled
with handled(lambda: "last words"):
    try:
        print("ready", flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        print("first", flush=True)
        {inside}
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("inside", ["time.sleep(30)", "with deferred(): time.sleep(30)"])
def test_the_second_ends_the_process_at_once(inside):
    child = started(inside)
    child.terminate()
    assert child.stdout is not None
    assert child.stdout.readline() == "first\n"
    begun = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=20)
    assert child.returncode == INTERRUPTED
    assert said == "\ninterrupted: ending within seconds, all is kept; once more ends at once\n\nlast words\n"
    assert time.monotonic() - begun < 10


def test_what_is_ignored_stays_ignored():
    """`nohup` ignores the end of the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled(lambda: ""):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


class TestDeferred:
    def test_what_has_begun_is_finished_first(self):
        written = []

        def work() -> None:
            with deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                written.append("all")
            written.append("more")

        with pytest.raises(KeyboardInterrupt), handled(lambda: ""):
            work()
        assert written == ["all"]

    def test_a_second_signal_waits_for_nothing(self):
        written = []

        def work() -> None:
            with deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                written.append("some")
                os.kill(os.getpid(), signal.SIGINT)
                written.append("more")

        with pytest.raises(KeyboardInterrupt), handled(lambda: ""):
            work()
        assert written == ["some"]

    def test_without_a_signal_nothing_happens(self):
        before = [signal.getsignal(each) for each in SIGNALS]
        with deferred():
            pass
        assert [signal.getsignal(each) for each in SIGNALS] == before

    def test_an_error_inside_is_that_error(self):
        def work() -> None:
            with deferred():
                os.kill(os.getpid(), signal.SIGINT)
                raise KeyError("of the block")

        with pytest.raises(KeyError, match="of the block"), handled(lambda: ""):
            work()


@pytest.mark.parametrize("ends", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_a_sweep_outlives_whoever_reads_its_output(ends):
    reader, writer = ends()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        lasting = _LastingFile(file)
        for _ in range(3):
            lasting.write("a line that nobody reads\n" * 10_000)
            lasting.flush()
