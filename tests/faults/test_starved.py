"""A disk that runs full, and a tracking server that goes away and comes back: real sweeps, so none is quick."""

import os
import signal

import pytest
from fault_disks import CASES, Ballast, filled, tmpfs
from fault_runs import Setting
from fault_servers import MlflowServer, restarted, stores

pytestmark = pytest.mark.slow


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a tmpfs")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_sweep_goes_on_once_its_full_disk_has_room(tmp_path, case):
    setting = Setting(tmp_path, 3, 1, 0, ("--max-epochs", "4", "--set", "final.seeds=1"))
    row = filled(case, setting.place("full"), setting.reference())
    assert row["complaints"] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a tmpfs")
def test_ballast_leaves_what_it_is_told(tmp_path):
    with tmpfs(tmp_path / "disk", 2**20) as disk:
        ballast = Ballast(disk)
        ballast.fill(2**18)
        (disk / "fits").write_bytes(bytes(2**17))
        with pytest.raises(OSError, match="No space left"):
            (disk / "does not").write_bytes(bytes(2**18))


@pytest.mark.parametrize("name", ["SQLite", "PostgreSQL"])
def test_a_restarted_server_has_every_metric_once(tmp_path, name):
    store = stores().get(name)
    if store is None:
        pytest.skip(f"{name} is not installed here")
    with store(tmp_path) as uri:
        server = MlflowServer(uri, tmp_path)
        server.start()
        try:
            row = restarted(Setting(tmp_path, 6, 1, 0), server, "tracked")
        finally:
            server.stop(signal.SIGKILL)
    assert row["complaints"] == []
