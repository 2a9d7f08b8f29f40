"""docker/Dockerfile builds, and head, workers and tracking server start from it as docker/compose.yaml says.

Real are: the build, the image, its containers (runc, without an engine above it), their network, limits and secrets,
and the sweep. Stand-ins are: a Debian of debootstrap for the base image, Debian's PostgreSQL for the image of that, and
for Docker this package, which reads the compose file through Docker Compose's own program.

With CXR_IMAGES_DIR=DIR the image is kept in a folder, and built again only where that is asked for by removing it.
"""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from fault_servers import postgresql_program

from tests.cluster import clusters, containers, hosts, images
from tests.cluster.clusters import asked, wait_until
from tests.cluster.conftest import lacking
from tests.cluster.containers import Container, Volumes, composed
from tests.cluster.images import IMAGE, Images, kept_folder

ROOT = Path(__file__).parents[2]
SPACE = "/opt/cxr-sweep/search_spaces/freeze.yaml"
# Four trials of the shipped search space, two epochs each.
SMALL = ["--trials", "4", "--max-epochs", "2", "--set", "search.halving=none", "--name", "small"]
SWEEP_TIMEOUT_S = 900.0
WORKERS = ("worker-1", "worker-2")


@pytest.fixture(scope="module")
def built(namespaces):
    """The images of this machine, and the facts of ours."""
    database = [] if postgresql_program("postgres") else ["PostgreSQL"]
    if missing := [*images.missing(), *containers.missing(), *database]:
        lacking(missing)
    with kept_folder() as folder:
        found = Images(folder)
        found.make_stand_in()
        if not found.has(IMAGE):
            took = found.build(IMAGE)
            print(f"\nbuilt in {took:.0f} s; {folder / 'build.log'}")
        yield found


@pytest.fixture(scope="module")
def facts(built):
    return built.facts(IMAGE)


@pytest.fixture(scope="module")
def files(built):
    with built.mounted(IMAGE) as place:
        yield place


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """Name -> file."""
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run([ROOT / "docker" / "make-secrets", folder], check=True, capture_output=True)
    return {path.name: path for path in folder.iterdir()}


def values(secrets):
    """Every password and token, by the file it is in."""
    return {path.name: set(re.findall("[0-9a-f]{64}", path.read_text())) for path in secrets.values()}


def test_the_compose_file_is_valid_with_every_profile():
    if missing := containers.missing():
        lacking(missing)
    plain = composed()["services"]
    assert {"head", "worker", "mlflow", "postgres"} <= set(plain)
    everything = composed("--profile", "gpu", "--profile", "s3", variables={"SWEEP_DATA": "/xrays"})["services"]
    assert set(everything) == {"head", "worker", "worker-gpu", "mlflow", "postgres", "s3"}
    assert "/xrays" in json.dumps(everything["worker"]["volumes"])
    with_store = composed("--env-file", str(ROOT / "docker" / "s3.env"))["services"]
    assert with_store["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://mlflow"
    assert "s3" in with_store
    with pytest.raises(hosts.HostsFailed, match=r"(?i)not a valid|invalid|must be"):
        composed(variables={"WORKER_CPUS": "many"})


def test_the_image_is_an_ordinary_users(facts):
    config = facts["Docker"]["config"]
    assert config["User"] == "1000:1000"
    assert config["Healthcheck"]["Test"] == ["CMD", "healthy"]
    assert "RAY_AUTH_MODE=token" in config["Env"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert re.fullmatch(r"\d+\.\d+\.\d+", labels["org.opencontainers.image.version"])


def test_nothing_of_the_build_is_left_in_the_image(files, facts):
    unwanted = {"pip", "pip3", "gcc", "cc", "g++", "make", "ld", "git", "ensurepip", "pip.conf"}
    found = [path for path in files.rglob("*") if path.name in unwanted and not path.is_symlink()]
    assert not [path for path in found if "site-packages" not in path.parts or path.name == "pip"]
    assert not list(files.glob("opt/venv/lib/python3*/site-packages/pip*"))
    assert not list(files.glob("**/.cache/pip"))
    assert not list(files.glob("opt/venv/lib/python3*/site-packages/tensorflow/include"))
    for place in ("build", "pip", "root/.cache"):
        assert not (files / place).exists(), place
    told = json.dumps([facts["Docker"], facts["OCIv1"], facts.get("History")])
    for setting in ("PIP_INDEX_URL=", "PIP_EXTRA_INDEX_URL=", "find-links", "extra-index-url"):
        assert setting not in told


def test_what_users_may_change_is_theirs_and_the_rest_is_not(files):
    for name in ("cache", "data", "runs", "mlartifacts", "home/sweep"):
        assert (files / name).stat().st_uid == containers.USER, name
    for name in ("opt/venv", "opt/cxr-sweep/lib/sweep/run.py", "opt/cxr-sweep/bin/start-head"):
        status = (files / name).stat()
        assert status.st_uid == 0, name
        assert not status.st_mode & 0o022, name


class Composed:
    """The services on hosts of their own, started in the order in which they depend on each other."""

    def __init__(self, net, built, files, secrets, folder):
        self.net, self.secrets = net, secrets
        self._image, self._files = built.facts(IMAGE)["Docker"], files
        self._services = composed(variables={"WORKER_CPUS": "1"})["services"]
        self._volumes, self._folder = Volumes(folder / "volumes", files), folder / "bundles"
        self.containers = {}
        self._start_database(net.add("postgres"))
        for name in ("mlflow", "head", *WORKERS):
            self.start(name)

    def start(self, name):
        service = self._services[name.partition("-")[0]]
        host = self.net.add(name)
        self.containers[name] = Container(
            host, service, self.secrets, self._image, self._files, self._volumes, self._folder
        )
        if not name.startswith("worker"):  # others wait for it
            self.containers[name].wait_until_healthy()

    def _start_database(self, host):
        """Debian's PostgreSQL with what the compose file gives the image of it."""
        environment = self._services["postgres"]["environment"]
        user, inside = clusters.ordinary_user(), host.place / "postgresql"
        (host.disk / "postgresql").mkdir()
        password = host.disk / "tmp" / "password"
        password.touch(0o600)
        password.write_text(self.secrets[Path(environment["POSTGRES_PASSWORD_FILE"]).name].read_text())
        for path in (host.disk / "postgresql", password):
            shutil.chown(path, user)
        initdb = [clusters._postgresql("initdb"), "-D", inside / "data", "--username", environment["POSTGRES_USER"]]
        initdb += [*environment["POSTGRES_INITDB_ARGS"].split(), "--auth-local=trust"]
        host.run([*initdb, "--pwfile", host.place / "tmp" / "password"], user=user)
        with (host.disk / "postgresql" / "data" / "pg_hba.conf").open("a") as file:
            file.write("host all all all scram-sha-256\n")
        command = [clusters._postgresql("postgres"), "-D", inside / "data", "-k", inside, "-c", "listen_addresses=*"]
        self.database = host.start(command, user=user)
        check = [clusters._postgresql("pg_isready"), *self._services["postgres"]["healthcheck"]["test"][2:]]

        def ready():
            try:
                return host.run(check)
            except hosts.HostsFailed:
                return False

        wait_until(ready, "PostgreSQL is ready", 60.0, self.database)
        host.run([clusters._postgresql("createdb"), "-h", inside, "-U", environment["POSTGRES_USER"], "mlflow"])

    def __getitem__(self, name):
        return self.containers[name]


@pytest.fixture(scope="module")
def cluster(built, files, secrets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    containers.remove_control_groups()
    try:
        with hosts.network(kept=folder / "kept") as net:
            yield Composed(net, built, files, secrets, folder)
    finally:
        containers.remove_control_groups()


@pytest.fixture(scope="module")
def stranger(cluster):
    """A host that knows no secret."""
    return cluster.net.add("stranger")


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """Where the report of the sweep comes to."""
    return tmp_path_factory.mktemp("fetched")


@pytest.fixture(scope="module")
def swept(cluster, secrets, fetched):
    """What a sweep says that is submitted as docs/CLUSTER.md says, to the port that Docker publishes on loopback."""
    for name in WORKERS:
        cluster[name].wait_until_healthy()
    command = [sys.executable, "-m", "sweep.submit", ROOT / "search_spaces" / "freeze.yaml"]
    command += ["--address", "http://127.0.0.1:8265", "--tracking-uri", "http://mlflow:5000", *SMALL]
    variables = {"RAY_AUTH_TOKEN_PATH": str(secrets["ray_token"]), "PYTHONPATH": str(ROOT)}
    process = cluster["head"].host.start([*command, "--fetch-to", fetched], variables, name="submit")
    status = process.wait(SWEEP_TIMEOUT_S)
    assert status == 0, process.said
    return process.said


def test_services_get_healthy_in_their_order(cluster):
    for name in ("mlflow", "head", *WORKERS):
        cluster[name].wait_until_healthy()
        assert cluster[name].process.running


def test_containers_are_locked_in(cluster):
    for name in ("head", "worker-1", "mlflow"):
        said = cluster[name].run("python", "-c", "print(open('/proc/self/status').read())")
        for line in ("CapEff", "CapBnd", "CapPrm"):
            assert re.search(rf"^{line}:\s+0+$", said, re.MULTILINE), name
        assert re.search(r"^NoNewPrivs:\s+1$", said, re.MULTILINE)
        assert re.search(r"^Uid:\s+1000\s+1000", said, re.MULTILINE)
        with pytest.raises(hosts.HostsFailed, match="Read-only file system"):
            cluster[name].run("python", "-c", "open('/opt/cxr-sweep/lib/new', 'w')")
    with pytest.raises(hosts.HostsFailed, match="Read-only file system"):
        cluster["head"].run("python", "-c", "open('/data/new', 'w')")


def test_ray_has_the_cores_that_the_compose_file_gives(cluster):
    program = "import json, ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR');"
    program += "print(json.dumps([each['Resources'].get('CPU', 0) for each in ray.nodes() if each['Alive']]))"
    for name in WORKERS:
        cluster[name].wait_until_healthy()
    said = cluster["head"].run("python", "-c", program)
    assert sorted(json.loads(said.splitlines()[-1])) == [0, 1, 1]


def test_a_small_sweep_runs_on_the_workers_and_is_in_mlflow(cluster, swept, fetched):
    assert "4 of 4" in swept or "report" in swept
    kept = cluster["head"].run("cat", "/runs/small/summary.json")
    summary = json.loads(kept)
    assert json.loads((fetched / "summary.json").read_text()) == summary
    assert (fetched / "report.html").stat().st_size > 10_000
    assert summary["trials"]["completed"] == summary["trials"]["total"] == 4
    assert summary["versions"]["tensorflow"].startswith("2.21.")
    program = "import mlflow; c = mlflow.MlflowClient('http://mlflow:5000');"
    program += "e = c.get_experiment_by_name('freeze') or c.get_experiment_by_name('small');"
    program += "print('runs', len(c.search_runs([e.experiment_id], max_results=100)));"
    program += "print('models', len(c.search_registered_models()))"
    said = cluster["head"].run("python", "-c", program)
    assert "runs 5" in said, said
    assert "models 1" in said


def test_mlflow_refuses_without_the_password_and_under_another_name(cluster, stranger):
    listing = "http://mlflow:5000/api/2.0/mlflow/experiments/search?max_results=1"
    assert asked(stranger, "http://mlflow:5000/health") == 200
    assert asked(stranger, listing) == 401
    assert asked(stranger, "http://mlflow:5000/") == 401
    assert asked(stranger, listing, {"Authorization": "Basic YWRtaW46cGFzc3dvcmQ="}) == 401, "no default password"
    assert asked(stranger, listing, {"Host": "evil.example"}) == 403, "a page that a browser was lured to"


def test_rays_job_port_refuses_without_the_token(cluster, stranger, secrets):
    jobs = "http://head:8265/api/jobs/"
    job = json.dumps({"entrypoint": "touch /runs/intruder"})
    assert asked(stranger, jobs) == 401
    assert asked(stranger, jobs, {"Content-Type": "application/json"}, job) == 401
    assert asked(stranger, jobs, {"Authorization": "Bearer wrong"}) == 403
    token = secrets["ray_token"].read_text()
    assert asked(stranger, jobs, {"Authorization": f"Bearer {token}"}) == 200, "the port itself works"
    with pytest.raises(hosts.HostsFailed):
        cluster["head"].run("ls", "/runs/intruder")


def test_no_secret_is_in_the_image_its_log_or_an_environment(built, facts, cluster, swept, secrets):
    told = json.dumps(facts)
    logs = [path.read_text(errors="replace") for path in cluster.net.folder.glob("disks/*/logs/*")]
    assert any("sweep.run" in text or "report:" in text for text in logs), "these are the logs"
    for name, found in values(secrets).items():
        assert found, name
        for value in found:
            assert value not in told, name
            for text in logs:
                assert value not in text, name
            for container in cluster.containers.values():
                assert not any(value in line for line in container.environment), name


def test_no_secret_is_in_what_a_sweep_leaves(cluster, swept, secrets):
    program = "import pathlib, sys; found = [str(p) for p in pathlib.Path('/runs').rglob('*') if p.is_file()"
    program += " and any(v.encode() in p.read_bytes() for v in sys.argv[1:])]; print(found)"
    every = sorted({value for found in values(secrets).values() for value in found})
    assert cluster["head"].run("python", "-c", program, *every).strip() == "[]"


def test_told_to_stop_the_head_ends_a_running_sweep_in_good_order(cluster, swept):
    """Last of all: it takes the cluster down in the order that Docker Compose takes."""
    command = ["python", "-m", "sweep.run", SPACE, "--address", "auto", "--out", "/runs", "--name", "stopped"]
    sweep = cluster["head"].start(*command, "--set", "search.halving=none", "--trials", "12", name="sweep")
    record = partial(cluster["head"].run, "sh", "-c", "cat /runs/stopped/state/*.jsonl 2>/dev/null || true")
    wait_until(lambda: '"epoch"' in record(), "an epoch is recorded", 300.0, sweep)
    took = cluster["head"].stop()
    assert took < 115
    said = cluster["head"].process.said
    assert "waiting up to 90 s for 1 sweeps to end in good order" in said
    assert "has not ended" not in said
    assert "are kept in /runs/stopped" in sweep.said, sweep.said
    for name in (*WORKERS, "mlflow"):
        assert cluster[name].stop() < 30, name
