"""Which node the next trial goes to. No Ray is needed: slots are counted here."""

import pytest

from cxr_models.trial import TrialConfig
from sweep import nodes
from sweep.machine import Machine, Node, TrialMemory, allot
from sweep.nodes import SlotFigures, Slots
from sweep.retries import SweepFailed
from sweep.spec import ResourceSpec

GIB = 1024**3
FIRST, SECOND, THIRD = (
    Node(cores, 0, 64 * GIB, node_id=name, address=f"10.0.0.{number}")
    for number, (name, cores) in enumerate((("a", 2), ("b", 1), ("c", 3)), 1)
)
MOBILE, DENSE = TrialConfig("mobilenet_v2_0.35"), TrialConfig("densenet121")


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(nodes, "time", found)
    return found


class Cluster:
    """Its nodes can be changed; a node has as many slots as cores."""

    def __init__(self, *living: Node, most: int | None = None) -> None:
        self.living = list(living)
        self.told: list[str] = []
        self.slots = Slots(
            lambda: self.living,
            lambda node: node.cores,
            most=most,
            prefix=lambda config: config.backbone if config.freeze == "all" else None,
            told=self.told.append,
        )

    def take(self, trial_id: str, config: TrialConfig = MOBILE) -> str:
        assert self.slots.is_free()
        return self.slots.take(trial_id, config).node_id


def test_one_machine_has_its_slots_and_no_more(clock):
    slots = Slots.here(2)
    for trial in ("t1", "t2"):
        assert slots.is_free()
        assert slots.take(trial, MOBILE).node_id == "", "Ray is not told where"
    assert not slots.is_free()
    slots.release("t1")
    slots.release("t1")  # told twice
    assert slots.is_free()
    slots.take("t3", MOBILE)
    assert not slots.is_free()


def test_a_trial_goes_where_most_slots_are_free(clock):
    cluster = Cluster(FIRST, SECOND, THIRD)
    plain = TrialConfig("vanilla_cnn", freeze="none")
    assert [cluster.take(f"t{number}", plain) for number in range(6)] == ["c", "a", "c", "a", "b", "c"]
    assert not cluster.slots.is_free()
    assert cluster.slots.figures == SlotFigures(slots=6, busy=6, nodes=3)


def test_with_a_choice_a_trial_goes_where_its_frozen_layers_have_been_run(clock):
    cluster = Cluster(FIRST, THIRD)
    assert cluster.take("mobile") == "c"
    assert cluster.take("dense", DENSE) == "a", "as many are free on both, but nothing is known"
    assert cluster.take("mobile-2") == "c"
    assert cluster.take("dense-2", DENSE) == "a"
    assert cluster.take("dense-3", DENSE) == "c", "its own node is full"
    cluster.slots.release("dense")
    assert cluster.take("mobile-3") == "a", "there is no choice"


def test_the_user_s_concurrency_bounds_all_nodes_together(clock):
    cluster = Cluster(FIRST, THIRD, most=2)
    cluster.take("t1")
    cluster.take("t2")
    assert not cluster.slots.is_free()
    assert cluster.slots.figures.slots == 2


def test_a_node_that_joins_gets_work_and_one_that_leaves_is_left(clock):
    cluster = Cluster(FIRST)
    for trial in ("t1", "t2"):
        assert cluster.take(trial) == "a"
    assert not cluster.slots.is_free()
    cluster.living = [FIRST, SECOND]
    assert not cluster.slots.is_free(), "Ray was asked a moment ago"
    clock.now += 2
    assert cluster.take("t3") == "b"
    cluster.living = [SECOND]
    clock.now += 2
    assert not cluster.slots.is_free()
    assert cluster.slots.is_gone("a")
    assert not cluster.slots.is_gone("b")
    assert cluster.told == [
        "node 10.0.0.2 has joined: 1 more trial at once",
        "node 10.0.0.1 is lost: 2 trials fewer at once; its trials go on elsewhere",
    ]


def test_a_node_that_comes_back_under_another_name_has_all_its_slots(clock):
    cluster = Cluster(FIRST)
    cluster.take("t1")
    cluster.take("t2")
    cluster.living = [Node(2, 0, 64 * GIB, node_id="a-again", address="10.0.0.1")]
    clock.now += 2
    assert cluster.take("t3") == "a-again"
    cluster.slots.release("t1")
    assert cluster.take("t4") == "a-again"
    assert not cluster.slots.is_free()


def test_a_node_that_has_just_lost_a_trial_comes_last(clock):
    """Ray needs half a minute to know that a node is gone; until then it would take one trial after another."""
    cluster = Cluster(SECOND, THIRD)
    assert cluster.take("t1") == "c"
    cluster.slots.release("t1", lost=True)
    assert cluster.take("t1-again") == "b"
    assert cluster.take("t2") == "c", "there is no other"
    cluster.slots.release("t2")
    cluster.slots.release("t1-again")
    clock.now += 61
    assert cluster.take("t3") == "c", "forgotten: most are free there"


def test_heads_without_cpus_count_for_nothing(clock):
    cluster = Cluster(Node(0, 0, GIB, node_id="head", address="10.0.0.9"), SECOND)
    assert cluster.take("t1") == "b"
    assert not cluster.slots.is_free()
    assert cluster.slots.figures == SlotFigures(slots=1, busy=1, nodes=1)


def test_a_sweep_waits_for_nodes_but_not_for_ever(clock):
    cluster = Cluster(SECOND)
    cluster.take("t1")
    cluster.living = []
    clock.now += 2
    assert not cluster.slots.is_free()
    clock.now += 599
    assert not cluster.slots.is_free()
    cluster.living = [THIRD]
    clock.now += 2
    assert cluster.take("t2") == "c"
    cluster.living = []
    clock.now += 2
    assert not cluster.slots.is_free()
    clock.now += 601
    with pytest.raises(SweepFailed, match=r"no node of the cluster has had room for a trial for 10 min.*--resume"):
        cluster.slots.is_free()


def test_slots_are_those_of_the_allotment(clock):
    machine = Machine((FIRST, SECOND, THIRD))
    allotment = allot(ResourceSpec(cpus_per_trial=2), machine, 100, TrialMemory(GIB, GIB, GIB))
    slots = Slots.of_nodes(allotment, lambda: machine.nodes, lambda config: None, lambda line: None)
    assert slots.is_free()
    assert slots.figures == SlotFigures(slots=2, busy=0, nodes=2), "the second has too few cores"
