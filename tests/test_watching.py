"""Whoever watches processes sees what is planted there."""

import sys

import psutil

from tests.watching import INTERVAL_S, Seen, files_with, watch

PLANTED = """
import socket, subprocess, sys, time
if len(sys.argv) > 1:  # the sockets shall be a grandchild's
    sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
for kind, family, address in (
    (socket.SOCK_STREAM, socket.AF_INET, "0.0.0.0"),
    (socket.SOCK_DGRAM, socket.AF_INET6, "::"),
    (socket.SOCK_STREAM, socket.AF_INET6, "::1"),
    (socket.SOCK_DGRAM, socket.AF_INET, "127.0.0.1"),
):
    planted = socket.socket(family, kind)
    planted.bind((address, 0))
    if kind == socket.SOCK_STREAM:
        planted.listen()
    globals()[address] = planted
connected = socket.create_connection(globals()["0.0.0.0"].getsockname())  # one that nobody else can reach
"""


def test_planted_sockets_of_a_grandchild_are_seen():
    code = f"{PLANTED}\ntime.sleep({4 * INTERVAL_S})"
    done, seen = watch([sys.executable, "-c", code, code])
    assert done.returncode == 0, done.stderr
    assert seen.addresses == {"0.0.0.0", "::", "::1", "127.0.0.1"}
    assert seen.reachable == {"0.0.0.0", "::"}
    assert (sys.executable, "-c", code) in seen.commands


def test_a_process_that_is_gone_has_nothing_to_show():
    with psutil.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
        seen = Seen()
        seen.look(process)
    assert seen == Seen()


def test_a_planted_text_is_found_in_any_file(tmp_path):
    for name, content in {"a/b.db": b"\x00\xffsecret\x00", "c.txt": b"other", "d": b"SECRET"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert files_with("secret", tmp_path) == [tmp_path / "a" / "b.db"]
