"""Processes watched while they run: where they can be reached, and what the list of processes shows of them."""

import ipaddress
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

INTERVAL_S = 0.5


@dataclass
class Seen:
    """What a process and all below it showed so far.

    Attributes:
        addresses: that something can be sent to: of listening TCP sockets, and of UDP sockets that anybody may send to.
        commands: the command lines, word by word.
    """

    addresses: set[str] = field(default_factory=set)
    commands: set[tuple[str, ...]] = field(default_factory=set)

    def look(self, process: psutil.Process) -> None:
        """Take note of what can be seen at this moment."""
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for each in family:
            try:
                self.commands.add(tuple(each.cmdline()))
                sockets = each.net_connections("inet")
            except psutil.NoSuchProcess:
                continue
            self.addresses |= {
                socket.laddr.ip
                for socket in sockets
                if socket.laddr and (socket.status == psutil.CONN_LISTEN or _takes_datagrams(socket))
            }

    @property
    def reachable(self) -> set[str]:
        """The addresses that other machines can reach."""
        own = (address.removeprefix("::ffff:") for address in self.addresses)
        return {address for address in own if not ipaddress.ip_address(address.partition("%")[0]).is_loopback}


def _takes_datagrams(socket: Any) -> bool:
    return socket.status == psutil.CONN_NONE and not socket.raddr


def watch(command: Sequence[str], **kinds: Any) -> tuple[subprocess.CompletedProcess[str], Seen]:
    """Run a command to its end; what it said, and what was seen of it and of everything it started."""
    seen = Seen()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kinds) as process:
        ended = threading.Event()

        def looking() -> None:
            while not ended.wait(INTERVAL_S):
                seen.look(psutil.Process(process.pid))

        thread = threading.Thread(target=looking, daemon=True)
        thread.start()
        try:
            out, err = process.communicate()
        finally:
            ended.set()
            thread.join()
    return subprocess.CompletedProcess(command, process.returncode, out, err), seen


def files_with(secret: str, *folders: Path) -> list[Path]:
    """Every file below some folders that a text stands in."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()]
