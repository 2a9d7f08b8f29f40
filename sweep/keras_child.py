"""A child process for what needs Keras: the driver's own never imports it."""

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

from sweep.worker import redirect_output

CALL_TIMEOUT_S = 600.0


class Call(Protocol):
    """Runs a function in a child process and returns what it returns."""

    def __call__(self, function: Any, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any: ...


@contextmanager
def keras_child(log: Path) -> Iterator[Call]:
    """Yield `call(function, *arguments)`, which runs in one child process with its output in `log`.

    The child is killed at the end of the block, however it ends. A call that takes longer than its `timeout_s` raises
    `TimeoutError`, one that ends the child `RuntimeError`; the next call then has a new child. What the function
    raises is raised here as `RuntimeError`.
    """
    child = _Child(log)
    try:
        yield child.call
    finally:
        child.end()


class _Child:
    def __init__(self, log: Path) -> None:
        self._log = log
        self._running: tuple[SpawnProcess, Connection] | None = None

    def call(self, function: Any, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        _, connection = self._running = self._running or self._start()
        try:
            connection.send((function, arguments))
            if not connection.poll(timeout_s):
                self.end()
                raise TimeoutError(f"{function.__name__} took longer than {timeout_s:g} s; its output: {self._log}")
            answer, error = connection.recv()
        except (EOFError, ConnectionError):
            self.end()
            raise RuntimeError(f"{function.__name__} ended its process; its output: {self._log}") from None
        if error is not None:
            raise error
        return answer

    def end(self) -> None:
        if self._running:
            process, connection = self._running
            process.kill()
            process.join()
            connection.close()
            self._running = None

    def _start(self) -> tuple[SpawnProcess, Connection]:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_answer_calls, args=(theirs, self._log), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _answer_calls(connection: Connection, log: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    redirect_output(log)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((function(*arguments), None))
        except Exception as error:
            traceback.print_exc()
            connection.send((None, RuntimeError(f"{type(error).__name__}: {error}")))
