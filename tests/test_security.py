"""What docs/SECURITY.md claims of files, ports and versions is so in the files themselves."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from sweep.record import RunFolder

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "SECURITY.md").read_text()
COMPOSE = ROOT / "docker" / "compose.yaml"
RAY_FILES = [COMPOSE, *sorted((ROOT / "docker" / "kubernetes" / "base").glob("*.yaml"))]
# What a run folder's files are called, and what is no path of the repository.
OF_A_RUN = {"unreadable.csv", "best/overlays/"}
MADE = {"docker/secrets"}


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    _, _, rest = TEXT.partition(f"## {title}\n")
    assert rest, title
    return rest.partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head; an empty first cell stands for the one above it."""
    found: list[list[str]] = []
    for line in section(title).splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.append([cells[0] or found[-1][0], *cells[1:]])
    return found[2:]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_every_file_that_is_named_exists():
    files = {word for word in quoted(TEXT) if re.fullmatch(r"(docker|docs|tests|search_spaces)/[\w./-]+", word)}
    assert {"docker/make-secrets", "docker/kubernetes/make-secrets", "tests/cluster/test_scan.py"} <= files
    for name in files - MADE:
        assert (ROOT / name).exists(), name
    for name in (word for word in quoted(TEXT) if word.startswith("components/")):
        assert (ROOT / "docker" / "kubernetes" / name / "kustomization.yaml").is_file(), name
    for target in re.findall(r"\]\((\w+\.md)", TEXT):
        assert (ROOT / "docs" / target).exists(), target


def test_the_run_folders_files_are_called_so():
    folder = RunFolder(Path("/run"))
    known = {
        str(path.relative_to(folder.path))
        for name in dir(RunFolder)
        if isinstance(getattr(RunFolder, name), property) and isinstance(path := getattr(folder, name), Path)
    }
    named = {word for row in rows("Patients' data") for word in quoted(" ".join(row)) if "." in word or "/" in word}
    named -= {"--cache-dir", "sweep.submit"}
    assert len(named) > 8
    assert named - OF_A_RUN <= known
    assert "best/overlays" in known


def test_what_mlflow_gets_is_what_is_sent():
    """The files of a run folder that the code hands to MLflow, at the begin and at the end."""
    folder = RunFolder(Path("/run"))
    session, sender = ((ROOT / "sweep" / name).read_text() for name in ("session.py", "sender.py"))
    at_the_end = re.search(r"files = \(((?:folder\.\w+, )+)\*overlays\)", session)[1]
    at_the_begin = re.search(r"def _describe\(.*?(?=\n    def )", sender, re.DOTALL)[0]
    sent = {getattr(folder, name).name for name in re.findall(r"folder\.(\w+)", at_the_end + at_the_begin)}
    (row,) = [row for row in rows("Patients' data") if row[0] == "MLflow"]
    assert quoted(row[1]) == sent


@pytest.mark.parametrize("place", ["Compose", "Kubernetes"])
def test_ports_are_those_of_the_files(place):
    files = RAY_FILES[:1] if place == "Compose" else RAY_FILES[1:]
    files = [*files, *(ROOT / "docker" / "kubernetes" / "components").glob("*/*.yaml")] if place != "Compose" else files
    text = "\n".join(path.read_text() for path in files)
    named = {number for row in rows("What listens") if row[0] == place for number in re.findall(r"\b\d{4,5}\b", row[1])}
    assert {"8265", "5000", "5432"} <= named
    for number in named:
        assert re.search(rf"\b{number}\b", text), number


def test_compose_publishes_two_ports_on_loopback():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"head", "mlflow"}
    for name, port in {"head": "8265", "mlflow": "5000"}.items():
        (line,) = published[name]
        bare = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", line)
        assert bare == f"127.0.0.1:{port}:{port}"
    assert all(service.get("network_mode") != "host" for service in services.values())


def test_the_ports_of_slurm_jobs():
    script = (ROOT / "docker" / "slurm" / "sweep.sbatch").read_text()
    lowest, size, blocks = 10000, 500, 45
    assert f"% {blocks}" in script
    assert f"range({lowest} + {size} * number, {lowest + size} + {size} * number)" in script
    assert f"between {lowest} and {lowest + size * blocks - 1}" in section("What listens")
    assert "--include-dashboard=false" in script


def test_the_token_is_on_in_every_cluster_file():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for name in ("head", "worker", "worker-gpu"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" not in services[name]["environment"]
    clusters = list(yaml.safe_load_all((ROOT / "docker" / "kubernetes" / "base" / "ray.yaml").read_text()))
    assert clusters[0]["spec"]["authOptions"] == {"mode": "token"}
    assert "export RAY_AUTH_MODE=token" in (ROOT / "docker" / "slurm" / "sweep.sbatch").read_text()


def test_ray_is_newer_than_the_holes_that_were_mended():
    (ray,) = [
        each
        for each in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if each.startswith("ray[")
    ]
    lowest = tuple(int(part) for part in re.search(r">=(\d+)\.(\d+)", ray).groups())
    mended = [tuple(map(int, found)) for found in re.findall(r"fixed in Ray (\d+)\.(\d+)", TEXT)]
    assert len(mended) == 2
    assert all(lowest >= each for each in mended)
    assert f"Ray {lowest[0]}.{lowest[1]} or later" in TEXT


def test_a_local_ray_has_no_dashboard_and_stays_on_loopback():
    source = (ROOT / "sweep" / "ray_cluster.py").read_text()
    assert "include_dashboard=False" in source
    assert '_node_ip_address="127.0.0.1"' in source
    assert 'os.environ["RAY_USAGE_STATS_ENABLED"] = "0"' in source
