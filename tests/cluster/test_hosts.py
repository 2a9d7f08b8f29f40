"""Hosts are apart: what one has, the others neither see nor reach but through the network; nothing outlives them."""

import fcntl
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import PREFIX, HostsFailed, Network, network, remove_leftovers

ROOT = Path(__file__).parents[2]
LISTEN = "import socket, time; s = socket.create_server(('{address}', 7777)); print('open', flush=True); time.sleep(60)"
KNOCK = "import socket; socket.create_connection(('{address}', 7777), timeout=2).close()"


@pytest.fixture(scope="module")
def net(namespaces):
    with network() as found:
        found.add("one")
        found.add("other")
        yield found


def listening(host, address):
    process = host.start([sys.executable, "-c", LISTEN.format(address=address)], name="listener")
    deadline = time.monotonic() + 20
    while "open" not in process.said:
        assert process.running, process.said
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def reaches(host, address):
    try:
        host.run([sys.executable, "-c", KNOCK.format(address=address)])
    except HostsFailed:
        return False
    return True


def test_each_has_its_name_address_and_loopback(net):
    one, other = net.hosts.values()
    assert (one.run(["hostname"]).strip(), other.run(["hostname"]).strip()) == ("one", "other")
    assert one.run(["getent", "hosts", "other"]).split()[0] == other.address
    open_to_all, on_loopback = listening(one, "0.0.0.0"), None
    try:
        assert reaches(other, one.address)
        assert reaches(one, "127.0.0.1")
        assert not reaches(other, "127.0.0.1")
        open_to_all.end()
        on_loopback = listening(one, "127.0.0.1")
        assert not reaches(other, one.address)
    finally:
        open_to_all.end()
        if on_loopback:
            on_loopback.end()


def test_files_are_its_own_at_the_same_path(net):
    one, other = net.hosts.values()
    one.run(["sh", "-c", f"echo mine > {one.place}/cache/file; echo mine > /tmp/ray/file; echo mine > /dev/shm/file"])
    assert (one.disk / "cache" / "file").read_text() == "mine\n", "seen from outside"
    for file in (f"{other.place}/cache/file", "/tmp/ray/file", "/dev/shm/file", one.disk / "cache" / "file"):
        with pytest.raises(HostsFailed, match="No such file"):
            other.run(["cat", file])
    assert not Path("/tmp/ray/file").exists()


def test_a_folder_of_the_machine_can_be_hidden(net):
    host = net.add("blind", hidden=[ROOT / "docs"])
    assert host.run(["ls", ROOT / "docs"]) == ""
    assert net.hosts["one"].run(["ls", ROOT / "docs"])


def test_processes_are_its_own_and_end_with_it(net):
    host = net.add("short-lived")
    sleeper = host.start(["sh", "-c", "sleep 600 & exec sleep 600"])
    while len(host.processes()) < 2:
        time.sleep(0.05)
    running = host.processes()
    assert "sleep" not in net.hosts["one"].run(["ps", "ax"])
    host.turn_off()
    _, alive = psutil.wait_procs(running, timeout=10)
    assert not alive
    assert sleeper.wait(5) == -signal.SIGKILL


def test_a_signal_and_the_status_come_through(net):
    host = net.hosts["one"]
    process = host.start(["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done"])
    time.sleep(0.5)
    process.send(signal.SIGTERM)
    assert process.wait(5) == 7


def test_a_host_that_is_cut_off_is_out_of_reach_until_it_is_plugged_in(net):
    one, other = net.hosts["one"], net.hosts["other"]
    listener = listening(one, "0.0.0.0")
    try:
        assert reaches(other, one.address)
        net.cut_off(one)
        assert not reaches(other, one.address)
        assert listener.running
        net.plug_in(one)
        assert reaches(other, one.address)
    finally:
        net.plug_in(one)
        listener.end()


KILLED = """
    import os, sys, time
    from tests.cluster.hosts import network

    with network() as net:
        host = net.add("doomed")
        host.start(["sleep", "600"])
        while not host.processes():
            time.sleep(0.05)
        print(net.folder, *(each.pid for each in host.processes()), host.pid, flush=True)
        time.sleep(600)
"""


def test_nothing_runs_on_after_a_kill_and_the_next_network_removes_the_files(namespaces):
    command = [sys.executable, "-c", textwrap.dedent(KILLED)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        folder, *pids = process.stdout.readline().split()
        running = [psutil.Process(int(pid)) for pid in pids]
        process.kill()
    _, alive = psutil.wait_procs(running, timeout=10)
    assert not alive
    assert Path(folder).is_dir()
    assert Path(folder) in remove_leftovers()
    assert not Path(folder).exists()


def test_the_files_of_a_running_network_are_left_alone(net: Network):
    assert net.folder not in remove_leftovers()
    with (net.folder / "lock").open("r+") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert net.folder.name.startswith(PREFIX)
