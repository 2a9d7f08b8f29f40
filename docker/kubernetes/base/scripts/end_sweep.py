"""`end_sweep.py SECONDS`: tell every sweep that runs in this container to end in good order, and wait for that.

Kubernetes runs this before it stops the head (preStop): a sweep's driver is the grandchild of a Ray worker there, which
no signal to the container reaches in time.
"""

import itertools
import os
import signal
import sys

import psutil


def drivers() -> list[psutil.Process]:
    """The processes that were started as `python -m sweep.run`, but for those that these have forked."""
    found = {}
    for process in psutil.process_iter(["cmdline", "uids"]):
        words = process.info["cmdline"] or []
        own = process.info["uids"] and process.info["uids"].real == os.getuid()
        if own and ("-m", "sweep.run") in itertools.pairwise(words):
            found[process.pid] = process
    return [process for process in found.values() if process.ppid() not in found]


def main(seconds: float) -> int:
    """0 if every sweep has ended in time, otherwise 1."""
    told = drivers()
    for process in told:
        process.send_signal(signal.SIGUSR1)
    _, left = psutil.wait_procs(told, timeout=seconds)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
