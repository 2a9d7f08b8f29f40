"""What a stranger in the network of a cluster can do without its token: nothing."""

import json
import sys
import textwrap
import time

import pytest

from tests.cluster import clusters
from tests.cluster.clusters import AGENT, AGENT_GRPC, CLIENT, DASHBOARD, ENVIRONMENTS, Cluster, asked
from tests.cluster.conftest import lacking
from tests.cluster.hosts import Host, HostsFailed, network
from tests.cluster.test_scan import scan

JOB = "/api/jobs/"
PAGES = (
    "/api/jobs/",
    "/nodes?view=summary",
    "/api/cluster_status",
    "/api/v0/nodes",
    "/logs",
    "/api/serve/applications/",
)
# docs/CLUSTER.md tells firewalls and network policies these.
FIXED = {
    clusters.GCS,
    DASHBOARD,
    CLIENT,
    clusters.NODE_MANAGER,
    clusters.OBJECT_MANAGER,
    clusters.METRICS,
    AGENT,
    AGENT_GRPC,
    ENVIRONMENTS,
    *clusters.WORKERS,
}
AS_CLIENT = """
    import sys, ray
    ray.init(sys.argv[1], logging_level="ERROR")
    print("in", ray.get(ray.remote(num_cpus=0)(lambda: 6 * 7).remote()))
"""
READ_HEAD = """
    import sys
    from ray._raylet import GcsClient
    print("in", GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=10))
"""


@pytest.fixture(scope="module")
def cluster(namespaces):
    """A head, a worker, and a stranger who has no token."""
    if missing := clusters.missing():
        lacking(missing)
    with network() as net:
        found = Cluster(net, net.add("head"))
        worker = net.add("worker")
        found.join(worker, 1)
        found.wait_for([worker])
        net.add("stranger")
        yield found


@pytest.fixture(scope="module")
def stranger(cluster) -> Host:
    return cluster.net.hosts["stranger"]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def answers(cluster: Cluster, stranger: Host, url: str, body: str = "") -> list[int]:
    """The statuses without a token and with a wrong one."""
    wrong = "0" * len(cluster.token)
    return [asked(stranger, url, {**bearer(each), "Content-Type": "application/json"}, body) for each in ("", wrong)]


@pytest.mark.parametrize("page", PAGES)
def test_the_dashboard_refuses(cluster, stranger, page):
    url = f"http://{cluster.head.address}:{DASHBOARD}{page}"
    assert answers(cluster, stranger, url) == [401, 403]


def test_jobs_are_taken_with_the_token_alone(cluster, stranger):
    url = f"http://{cluster.head.address}:{DASHBOARD}{JOB}"
    assert answers(cluster, stranger, url, job(cluster.head, "stolen")) == [401, 403]
    own = {**bearer(cluster.token), "Content-Type": "application/json"}
    assert asked(stranger, url, own, job(cluster.head, "rightful")) == 200
    deadline = time.monotonic() + 120
    while not (cluster.head.disk / "tmp" / "rightful").exists():
        assert time.monotonic() < deadline, "the job with the token has run"
        time.sleep(0.5)
    assert not (cluster.head.disk / "tmp" / "stolen").exists()


def job(host: Host, name: str) -> str:
    """A job that leaves a file behind."""
    return json.dumps({"entrypoint": f"touch {host.place}/tmp/{name}"})


def test_the_agents_of_a_node_refuse(cluster, stranger):
    worker = cluster.net.hosts["worker"]
    url = f"http://{worker.address}:{AGENT}/api/job_agent/jobs/"
    assert answers(cluster, stranger, url, job(worker, "stolen")) == [401, 403]
    url = f"http://{worker.address}:{ENVIRONMENTS}/get_or_create_runtime_env"
    assert answers(cluster, stranger, url, "{}") == [401, 403]
    assert not (worker.disk / "tmp" / "stolen").exists()


def attempt(cluster: Cluster, stranger: Host, program: str, address: str, token: str) -> bool:
    """Whether a Python program of a stranger gets in, with a token or, if that is empty, without."""
    own = {"PYTHONPATH": clusters.IMPORTED, "RAY_AUTH_MODE": "token" if token else "disabled"}
    if token:
        own["RAY_AUTH_TOKEN"] = token
    try:
        said = stranger.run([sys.executable, "-c", textwrap.dedent(program), address], own, timeout_s=120)
    except HostsFailed:
        return False
    return "in " in said


def test_the_client_port_takes_the_token_alone(cluster, stranger):
    address = f"ray://{cluster.head.address}:{CLIENT}"
    tokens = ("", "0" * len(cluster.token), cluster.token)
    assert [attempt(cluster, stranger, AS_CLIENT, address, token) for token in tokens] == [False, False, True]


def test_the_head_s_tables_are_read_with_the_token_alone(cluster, stranger):
    tokens = ("", "0" * len(cluster.token), cluster.token)
    found = [attempt(cluster, stranger, READ_HEAD, cluster.address, token) for token in tokens]
    assert found == [False, False, True]


def test_a_node_without_the_token_does_not_join(cluster, stranger):
    command = [*clusters.RAY, "start", "--block", "--address", cluster.address, "--num-cpus", "8"]
    command += ["--node-ip-address", stranger.address]
    ray = stranger.start(command, {"PYTHONPATH": clusters.IMPORTED, "RAY_AUTH_MODE": "disabled"})
    deadline = time.monotonic() + 30
    while ray.running and time.monotonic() < deadline:
        assert stranger.address not in cluster.nodes()
        time.sleep(2)
    ray.end()


def test_every_port_that_others_reach_is_one_of_the_guide(cluster, stranger):
    hosts = [cluster.head, cluster.net.hosts["worker"]]
    opened = scan(stranger, [host.address for host in hosts])
    assert {clusters.GCS, DASHBOARD, CLIENT} <= {*opened[cluster.head.address]}, "the scan sees what is there"
    assert {port for ports in opened.values() for port in ports} <= FIXED
