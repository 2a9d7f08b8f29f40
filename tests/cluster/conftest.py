"""What clusters on one machine need, said before anything is tried.

Run:  make cluster-test    # what is missing is a failure
      python -m pytest -m "" tests/cluster    # what is missing is a skip
With CXR_CLUSTER_KEPT=DIR the disks of the hosts are copied there at the end, with all that their programs said.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from tests.cluster import hosts
from tests.cluster.heads import Head, ray_head

# Set by `make cluster-test`.
REQUIRED = "CXR_CLUSTER_REQUIRED"
KEPT = "CXR_CLUSTER_KEPT"


def kept(name: str) -> Path | None:
    """Where the disks of one test's hosts are to be kept; None if nowhere."""
    folder = os.environ.get(KEPT)
    if not folder:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))


def lacking(things: Sequence[str]) -> NoReturn:
    """Skip a test that needs what is not there; fail it where everything has to be there."""
    reason = f"needs {', '.join(things)}"
    if os.environ.get(REQUIRED):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Hosts can be made here."""
    if missing := hosts.missing():
        lacking(missing)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A Ray head of this machine, with a token and its dashboard."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        lacking(["the dashboard of Ray: pip install 'ray[default]'"])
    with ray_head(tmp_path_factory.mktemp("head"), cores=2) as found:
        yield found
