"""A sweep on one machine opens nothing to others: every port is tried from another host while it runs."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import kept
from tests.cluster.hosts import Host, network
from tests.cluster.sockets import Reachable, reachable_sockets

ROOT = Path(__file__).parents[2]
SCANNER = Path(__file__).parent / "scanner.py"
RUN_TIMEOUT_S = 1800.0

OPENED = """
import socket, time
kept = [socket.create_server(("0.0.0.0", 7001)), socket.create_server(("127.0.0.1", 7002))]
kept.append(socket.create_server(("::", 7003), family=socket.AF_INET6))
datagrams = socket.socket(type=socket.SOCK_DGRAM)
datagrams.bind(("0.0.0.0", 7004))
inside = socket.socket(type=socket.SOCK_DGRAM)
inside.bind(("127.0.0.1", 7005))
connected = socket.socket(type=socket.SOCK_DGRAM)
connected.connect(("10.77.0.254", 53))
print("open", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hosts(namespaces):
    """One host that has something to hide, and one that looks."""
    with network(kept("scan")) as net:
        yield net.add("sweeper"), net.add("stranger")


def outer_addresses(host: Host) -> list[str]:
    """As others at the switch would reach it: by IPv4 and by IPv6."""
    shown = json.loads(host.run(["ip", "-json", "address", "show", "dev", "eth0"]))
    found = [each["local"] for each in shown[0]["addr_info"]]
    assert len(found) == 2, "an IPv4 address and a link-local one of IPv6"
    return [f"{address}%eth0" if ":" in address else address for address in found]


def scan(stranger: Host, addresses: list[str]) -> dict[str, list[int]]:
    """Address -> ports that accept a connection. Every port must have answered: silence would prove nothing."""
    found = json.loads(stranger.run([sys.executable, SCANNER, *addresses], timeout_s=300))
    for address, answers in found.items():
        assert answers["silent"] == 0, f"{answers['silent']} ports of {address} did not answer at all"
        assert answers["refused"] + len(answers["open"]) == 65535
    return {address: answers["open"] for address, answers in found.items()}


def test_what_listens_is_found(hosts):
    sweeper, stranger = hosts
    opened = sweeper.start([sys.executable, "-c", OPENED])
    while "open" not in opened.said:
        assert opened.running, opened.said
        time.sleep(0.05)
    four, six = outer_addresses(sweeper)
    time.sleep(2.0)  # until the kernel has made sure that nobody else has the address of IPv6
    assert scan(stranger, [four, six]) == {four: [7001], six: [7003]}
    assert reachable_sockets(sweeper.pid) == {
        Reachable("tcp", "0.0.0.0", 7001),
        Reachable("tcp6", "::", 7003),
        Reachable("udp", "0.0.0.0", 7004),
    }


def has_raylet(host: Host) -> bool:
    for process in host.processes():
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if process.name() == "raylet":
                return True
    return False


def test_a_default_sweep_on_one_machine_listens_to_nobody_else(hosts):
    sweeper, stranger = hosts
    addresses = outer_addresses(sweeper)
    command = [sys.executable, "-m", "sweep.run", ROOT / "search_spaces" / "smoke.yaml"]
    run = sweeper.start([*command, "--out", sweeper.place / "runs"], {"PYTHONPATH": str(ROOT)}, name="sweep")
    sockets: set[Reachable] = set()
    scans, with_ray, begun = [], 0, time.monotonic()
    while run.running:
        assert time.monotonic() - begun < RUN_TIMEOUT_S, run.said
        scanner, ray_seen = stranger.start([sys.executable, SCANNER, *addresses]), False
        while scanner.running:
            sockets |= reachable_sockets(sweeper.pid)
            ray_seen = ray_seen or has_raylet(sweeper)
            time.sleep(0.1)
        scans.append(json.loads(scanner.said))
        with_ray += ray_seen
    assert run.status == 0, run.said
    assert with_ray, "Ray ran during a scan"
    assert sockets == set()
    for answers in (each[address] for each in scans for address in addresses):
        assert answers == {"open": [], "refused": 65535, "silent": 0}
