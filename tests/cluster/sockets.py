"""Sockets of a network namespace that others could reach, read from the kernel."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

LISTENING = "0A"  # `TCP_LISTEN`, include/net/tcp_states.h of Linux


@dataclass(frozen=True)
class Reachable:
    """A socket that waits for what comes from outside.

    Attributes:
        kind: `tcp`, `tcp6`, `udp` or `udp6`.
        address: it is bound to; `0.0.0.0` and `::` are all.
    """

    kind: str
    address: str
    port: int


def reachable_sockets(pid: int) -> set[Reachable]:
    """Sockets in the network namespace of a process which something out of it could send to.

    A TCP socket does if it listens, a UDP socket if it is not connected to one peer; both if they are not bound to
    loopback.
    """
    return {found for kind in ("tcp", "tcp6", "udp", "udp6") for found in _of_kind(pid, kind)}


def _of_kind(pid: int, kind: str) -> Iterator[Reachable]:
    for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
        _, local, remote, state, *_ = line.split()
        waits = state == LISTENING if kind.startswith("tcp") else remote.endswith(":0000")
        address, port = _endpoint(local)
        if waits and not _on_loopback(address):
            yield Reachable(kind, str(address), port)


def _endpoint(text: str) -> tuple[IPv4Address | IPv6Address, int]:
    """`0100007F:1F90`: words of 32 bits in this machine's order, and the port."""
    digits, _, port = text.partition(":")
    words = [socket.htonl(int(digits[start : start + 8], 16)) for start in range(0, len(digits), 8)]
    packed = b"".join(word.to_bytes(4, "big") for word in words)
    return (IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)), int(port, 16)


def _on_loopback(address: IPv4Address | IPv6Address) -> bool:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
