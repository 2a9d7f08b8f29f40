"""What Ctrl-C and the signals of schedulers do: the first ends a sweep in good order, the second at once.

SIGTERM comes from `docker stop`, Slurm and Kubernetes, SIGUSR1 from Slurm ahead of time (`--signal`), SIGHUP from a
terminal that closes. All that a sweep needs to go on is on disk at any moment.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
INTERRUPTED = 130


class _EndAtOnce:
    """The handler after the first signal."""

    def __init__(self, last_words: Callable[[], str]) -> None:
        self._last_words = last_words

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        _tell(self._last_words())
        os._exit(INTERRUPTED)


def _tell(words: str) -> None:
    with suppress(OSError):  # a terminal that was closed
        os.write(sys.stderr.fileno(), f"\n{words}\n".encode())


_abandoned = threading.Event()


def abandon() -> None:
    """Something of this process can no longer be ended in good order, and would hold its end up."""
    _abandoned.set()


def leave(status: int) -> NoReturn:
    """End the process with a status; past whatever was abandoned."""
    if _abandoned.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def handled(last_words: Callable[[], str]) -> Iterator[None]:
    """Within the block the first signal raises `KeyboardInterrupt`, and the second ends the process.

    A signal that was ignored, as `nohup` has it, stays ignored.

    Args:
        last_words: what is printed before the process ends.
    """
    at_once = _EndAtOnce(last_words)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    watched = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def first(signum: int, frame: FrameType | None) -> None:
        for number in watched:
            signal.signal(number, at_once)
        _tell("interrupted: ending within seconds, all is kept; once more ends at once")
        raise KeyboardInterrupt

    for number in watched:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Let what has begun be written down: a signal that comes meanwhile counts at the block's end, a second one now.

    After the first signal of a sweep nothing is deferred.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if threading.current_thread() is not threading.main_thread() or isinstance(before[signal.SIGINT], _EndAtOnce):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    watched = {number: handler for number, handler in before.items() if callable(handler)}

    def note(signum: int, frame: FrameType | None) -> None:
        came.append((signum, frame))
        if len(came) > 1:
            watched[signal.Signals(signum)](signum, frame)

    for number in watched:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in watched:
            signal.signal(number, before[number])
    if came:
        watched[signal.Signals(came[0][0])](*came[0])
