"""One process at a time works on a run folder, and one that was killed blocks nobody."""

import os
import socket
import subprocess
import sys

import pytest

from sweep.folder_lock import FolderInUse, FolderLock

HOLDER = """
import sys, time
from pathlib import Path
from sweep.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_works_on_the_sweep(tmp_path):
    path = tmp_path / "run" / "state" / "lock"
    path.parent.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        who = f"process {process.pid} on {socket.gethostname()}"
        message = f"{tmp_path / 'run'} is in use: {who} works on this sweep"
        with pytest.raises(FolderInUse, match=message), FolderLock(path):
            pass
        process.kill()
    with FolderLock(path):
        assert path.read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    with FolderLock(path):
        pass
