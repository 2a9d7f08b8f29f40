"""The depot as an actor on the driver's node, and how workers ask it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sweep.depot import Carried, Depot, Home, carried_text

CALLS_AT_ONCE = 8
ANSWER_S = 10.0  # how long the depot may take to say what it has carried


class AskingRay:
    """Asks a depot that is an actor; see `depot.Asking`. Goes to workers with the trials."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __call__(self, method: str, *arguments: Any) -> Callable[[], Any]:
        answer = getattr(self._actor, method).remote(*arguments)
        return lambda: _answered(answer)


def _answered(answer: Any, timeout_s: float | None = None) -> Any:
    try:
        return ray.get(answer, timeout=timeout_s)
    except RayTaskError as error:
        raise error.cause from None  # what the depot itself raised


@contextmanager
def depot_at_home(home: Home, files: frozenset[Path], told: Callable[[str], None]) -> Iterator[AskingRay]:
    """A depot on the driver's node, for the length of the block.

    Args:
        home: the folders it is given.
        files: of the cache that it may hand out.
        told: hears at the end what it has carried.

    Raises:
        NoSpace: a disk is full.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": CALLS_AT_ONCE, "max_restarts": -1, "scheduling_strategy": here}
    home.mark()
    try:
        actor = ray.remote(**options)(Depot).remote(home, files)
        try:
            yield AskingRay(actor)
        finally:
            _tell(actor, told)
            ray.kill(actor)
    finally:
        home.unmark()


def _tell(actor: Any, told: Callable[[str], None]) -> None:
    try:
        carried: dict[str, Carried] = _answered(actor.carried.remote(), ANSWER_S)
    except Exception:  # it is gone, or Ray is
        return
    if line := carried_text(carried):
        told(line)
