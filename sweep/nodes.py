"""Where the next trial goes: slots on every node, counted as trials begin and end, nodes join and are lost."""

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from cxr_models.trial import TrialConfig
from sweep.machine import Allotment, Node
from sweep.retries import SweepFailed
from sweep.wording import count, duration

REFRESH_S = 1.0  # how often Ray is asked which nodes live
# A node that has lost a trial is given others last for so long: Ray needs half a minute to know that it is gone.
SUSPECT_S = 60.0
PATIENCE_S = 600.0  # how long a sweep waits for nodes when there is none left
HERE = Node(0, 0, 0)  # stands for whatever Ray has, where trials are not told a node


@dataclass(frozen=True)
class SlotFigures:
    """How full the nodes are.

    Attributes:
        slots: trials that can run at once.
        busy: trials that have a slot.
        nodes: that have slots.
    """

    slots: int
    busy: int
    nodes: int


class Slots:
    """Counts who runs where, and chooses nodes. Not thread-safe, except `figures`.

    Args:
        nodes: those that live.
        room: how many trials a node has slots for.
        most: trials at once on all nodes together; None for as many as there are slots.
        prefix: what the features of a configuration's frozen layers are shared by, None where none are kept.
        told: hears of nodes that join and are lost.
    """

    def __init__(
        self,
        nodes: Callable[[], Sequence[Node]],
        room: Callable[[Node], int],
        *,
        most: int | None = None,
        prefix: Callable[[TrialConfig], Hashable | None] = lambda config: None,
        told: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._read, self._room, self._most, self._prefix, self._told = nodes, room, most, prefix, told
        self._nodes: dict[str, Node] = {}
        self._known = False  # whether the nodes have been read once
        self._read_at = 0.0
        self._none_since: float | None = None  # when it was first seen that no node has room
        self._of_trial: dict[str, str] = {}  # trial -> node
        self._prefixes: dict[str, set[Hashable]] = {}  # node -> what it has computed, or computes now
        self._lost_at: dict[str, float] = {}  # node -> when it last lost a trial

    @classmethod
    def here(cls, concurrency: int) -> "Slots":
        """So many slots on whatever Ray has."""
        return cls(lambda: (HERE,), lambda node: concurrency)

    @classmethod
    def of_nodes(
        cls,
        allotment: Allotment,
        nodes: Callable[[], Sequence[Node]],
        prefix: Callable[[TrialConfig], Hashable | None],
        told: Callable[[str], None],
    ) -> "Slots":
        """The slots of a cluster, whose nodes come and go."""
        return cls(nodes, allotment.slots, most=allotment.most, prefix=prefix, told=told)

    @property
    def figures(self) -> SlotFigures:
        """As they were last counted."""
        rooms = [room for node in list(self._nodes.values()) if (room := self._room(node))]
        slots = sum(rooms) if self._most is None else min(sum(rooms), self._most)
        return SlotFigures(slots, len(self._of_trial), len(rooms))

    def is_free(self) -> bool:
        """Whether another trial can be placed now.

        Raises:
            SweepFailed: there has been no node for so long that none will come.
        """
        self.refresh()
        if self._most is not None and len(self._of_trial) >= self._most:
            return False
        return any(self._free(node) > 0 for node in self._nodes.values())

    def is_free_beside(self, node_id: str) -> bool:
        """Whether a node other than one has a free slot."""
        return any(self._free(node) > 0 for node in self._nodes.values() if node.node_id != node_id)

    def take(self, trial_id: str, config: TrialConfig) -> Node:
        """Give a trial a slot: where its frozen layers have been run already, else where most slots are free.

        Nodes that have just lost a trial come last.
        """
        prefix, now = self._prefix(config), time.monotonic()

        def order(node: Node) -> tuple[bool, bool, int]:
            is_suspect = now - self._lost_at.get(node.node_id, -SUSPECT_S) < SUSPECT_S
            has_prefix = prefix is not None and prefix in self._prefixes.get(node.node_id, ())
            return is_suspect, not has_prefix, -self._free(node)

        node = min((node for node in self._nodes.values() if self._free(node) > 0), key=order)
        self._of_trial[trial_id] = node.node_id
        if prefix is not None:
            self._prefixes.setdefault(node.node_id, set()).add(prefix)
        return node

    def release(self, trial_id: str, *, lost: bool = False) -> None:
        """A trial needs its slot no longer; `lost`: its worker is gone, and its node may be."""
        node_id = self._of_trial.pop(trial_id, None)
        if lost and node_id is not None:
            self._lost_at[node_id] = time.monotonic()
            self._read_at = 0.0  # ask at once

    def release_all(self) -> None:
        """Nothing runs any more."""
        self._of_trial.clear()

    def is_gone(self, node_id: str) -> bool:
        """Whether a node that a trial was given to has left."""
        return node_id not in self._nodes

    def refresh(self) -> None:
        """Take note of nodes that have joined or left, unless that was done a moment ago.

        Raises:
            SweepFailed: as `is_free`.
        """
        now = time.monotonic()
        if self._known and now - self._read_at < REFRESH_S:
            return
        before, self._nodes, self._read_at = self._nodes, {node.node_id: node for node in self._read()}, now
        if self._known:
            self._tell(before)
        self._known = True
        for node_id in before.keys() - self._nodes.keys():
            self._prefixes.pop(node_id, None)
        if any(map(self._room, self._nodes.values())):
            self._none_since = None
            return
        self._none_since = now if self._none_since is None else self._none_since
        if now - self._none_since > PATIENCE_S:
            raise SweepFailed(
                f"no node of the cluster has had room for a trial for {duration(PATIENCE_S)}; start nodes, and go on "
                "with --resume"
            )

    def _tell(self, before: dict[str, Node]) -> None:
        for node in self._with_room(self._nodes[node_id] for node_id in self._nodes.keys() - before.keys()):
            self._told(f"node {node.address} has joined: {count(self._room(node), 'more trial')} at once")
        for node in self._with_room(before[node_id] for node_id in before.keys() - self._nodes.keys()):
            trials = "; its trials go on elsewhere" if node.node_id in self._of_trial.values() else ""
            self._told(f"node {node.address} is lost: {count(self._room(node), 'trial')} fewer at once{trials}")

    def _with_room(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted((node for node in nodes if self._room(node)), key=lambda node: node.address)

    def _free(self, node: Node) -> int:
        return self._room(node) - sum(node_id == node.node_id for node_id in self._of_trial.values())
