"""Services of docker/compose.yaml as containers on hosts, with runc, the runtime below Docker, and no engine above it.

What a container is given is what the compose file says, as Docker's own program reads it: command, environment,
read-only root, capabilities, volumes, secrets, files in memory, cores, memory, number of processes. Each runs on a host
of its own (`tests.cluster.hosts`), which gives it an address; the names of the services are the hosts' names.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import Host, HostsFailed, Process

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
NEEDED = ("runc", "tini-static")
# Where Debian's and Docker's own packages put version 2, beside the path.
PLUGINS = ("/usr/libexec/docker/cli-plugins", "/usr/lib/docker/cli-plugins", "/usr/local/lib/docker/cli-plugins")
UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30}
USER = 1000
CGROUPS = "cxr-containers"


def compose_program() -> Path | None:
    """Docker Compose, which needs no engine to read a file; None if it is not installed."""
    plugins = [Path(folder, "docker-compose") for folder in PLUGINS]
    found = next((path for path in plugins if path.exists()), None)
    on_path = shutil.which("docker-compose")
    return found or (Path(on_path) if on_path else None)


def missing() -> list[str]:
    """What is not there that containers need."""
    found = [f"the program {name}" for name in NEEDED if shutil.which(name) is None]
    return found if compose_program() else [*found, "docker-compose"]


def composed(*options: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The compose file as Docker Compose reads it, which checks it against the schema of the specification.

    Args:
        options: before `config`, such as `--profile gpu`.
        variables: of the environment, for what the file takes from there.

    Raises:
        HostsFailed: the file is wrong.
    """
    program = compose_program()
    if program is None:
        raise HostsFailed("docker-compose is not installed")
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **(variables or {})}

    def asked(file: Path) -> "subprocess.CompletedProcess[str]":
        command = [str(program), "--file", str(file), *options, "config"]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    done = asked(COMPOSE)
    if "'name' does not match" in done.stderr:  # version 1, of Debian 12, does not know it, and nothing else of ours
        with tempfile.NamedTemporaryFile("w", dir=COMPOSE.parent, suffix=".yaml") as nameless:
            nameless.write(re.sub(r"^name:.*$", "", COMPOSE.read_text(), flags=re.MULTILINE))
            nameless.flush()
            done = asked(Path(nameless.name))
    if done.returncode:
        raise HostsFailed(done.stderr)
    return dict(yaml.safe_load(done.stdout))


def size_of(text: str | int) -> int:
    """Bytes, of `8g` or `8589934592`."""
    number, unit = re.fullmatch(r"([\d.]+)([bkmg]?)b?", str(text).lower()).groups()  # type: ignore[union-attr]
    return int(float(number) * UNITS[unit])


def seconds_of(text: str) -> float:
    """Seconds, of `1m30s`."""
    parts = re.findall(r"([\d.]+)(h|m|s)", text)
    return sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)


class Volumes:
    """Named volumes, which begin with the owner that their folder has in the image, as Docker's do.

    Args:
        folder: below which they lie; every host has to see it.
        image: the image's files.
    """

    def __init__(self, folder: Path, image: Path) -> None:
        self._folder, self._image = folder, image

    def path(self, name: str, target: str) -> Path:
        """Where a volume lies."""
        path = self._folder / name
        if not path.exists():
            path.mkdir(parents=True)
            template = self._image / target.lstrip("/")
            if template.exists():
                status = template.stat()
                os.chown(path, status.st_uid, status.st_gid)
                path.chmod(status.st_mode & 0o7777)
        return path


class Container:
    """A service of the compose file that runs on a host.

    Args:
        host: whose network it uses.
        service: as Docker Compose reads it.
        secrets: name -> file, of the compose file.
        image: what the image says of itself, as Docker keeps it.
        root: the image's files.
        volumes: the cluster's.
        folder: for its bundle; its host has to see it.
    """

    def __init__(
        self,
        host: Host,
        service: Mapping[str, Any],
        secrets: Mapping[str, Path],
        image: Mapping[str, Any],
        root: Path,
        volumes: Volumes,
        folder: Path,
    ) -> None:
        self.host, self.service, self.image = host, service, image
        bundle = folder / host.name
        bundle.mkdir(parents=True)
        self._runc: list[str | Path] = ["runc", "--root", bundle / "state"]
        declared = specification(service, secrets, image, root, volumes, host.name)
        self.environment = declared["process"]["env"]
        (bundle / "config.json").write_text(json.dumps(declared))
        self.process: Process = host.start([*self._runc, "run", "--bundle", bundle, "it"], name=host.name)

    def run(self, *command: str, timeout_s: float = 120.0) -> str:
        """Run a program in the container, as `docker compose exec` does; what it says.

        Raises:
            HostsFailed: it failed.
        """
        return self.host.run([*self._runc, "exec", "it", *command], timeout_s=timeout_s)

    def start(self, *command: str, name: str) -> Process:
        """Start a program in the container."""
        return self.host.start([*self._runc, "exec", "it", *command], name=name)

    def is_healthy(self) -> bool:
        """Whether its health check ends well: the service's, or the image's where that has none."""
        checked = self.service.get("healthcheck", {}).get("test") or self.image["config"]["Healthcheck"]["Test"]
        assert checked[0] == "CMD"
        try:
            self.run(*checked[1:])
        except HostsFailed:
            return False
        return True

    def wait_until_healthy(self) -> None:
        """Wait as long as its health check allows.

        Raises:
            HostsFailed: it is not healthy by then, or has ended.
        """
        check = self.service["healthcheck"]
        patience = seconds_of(check["start_period"]) + check["retries"] * seconds_of(check["interval"])
        deadline = time.monotonic() + patience
        while not self.is_healthy():
            if not self.process.running or time.monotonic() > deadline:
                raise HostsFailed(f"{self.host.name} is not healthy:\n{self.process.said[-4000:]}")
            time.sleep(1)

    def stop(self) -> float:
        """Stop it as Docker would; seconds that took.

        Raises:
            HostsFailed: it had to be killed.
        """
        begun = time.monotonic()
        number = self.service.get("stop_signal", "SIGTERM")
        self.host.run([*self._runc, "kill", "it", number])
        self.process.wait(seconds_of(self.service["stop_grace_period"]))
        return time.monotonic() - begun


def specification(
    service: Mapping[str, Any],
    secrets: Mapping[str, Path],
    image: Mapping[str, Any],
    root: Path,
    volumes: Volumes,
    hostname: str,
) -> dict[str, Any]:
    """What runc is told of a service; arguments as of `Container`."""
    config = image["config"]
    assert service["cap_drop"] == ["ALL"]
    assert config["User"] == f"{USER}:{USER}"
    command = list(service["command"])
    mounts = [*basic_mounts(size_of(service.get("shm_size", "64m")))]
    mounts += [tmpfs(text) for text in _listed(service.get("tmpfs", []))]
    mounts += [_volume(each, volumes) for each in service.get("volumes", [])]
    for each in service.get("secrets", []):
        source, target = (each, each) if isinstance(each, str) else (each["source"], each.get("target", each["source"]))
        mounts.append(bind(secrets[source], target if target.startswith("/") else f"/run/secrets/{target}", "ro"))
    mounts += [bind(Path("/etc") / name, f"/etc/{name}", "ro") for name in ("hosts", "resolv.conf")]
    if service.get("init"):
        mounts.append(bind(Path(shutil.which("tini-static") or ""), "/sbin/docker-init", "ro"))
        command = ["/sbin/docker-init", "--", *command]
    variables = dict(line.split("=", 1) for line in config["Env"]) | service["environment"]
    # No more than this process may have: to give more takes a right that root in a sandbox may lack.
    files = min(service.get("ulimits", {}).get("nofile", 1024), resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": {"path": str(root), "readonly": bool(service.get("read_only"))},
        "process": {
            "args": command,
            "cwd": config["WorkingDir"],
            "env": [f"{name}={value}" for name, value in variables.items()],
            "user": {"uid": USER, "gid": USER},
            "capabilities": {},
            "noNewPrivileges": "no-new-privileges:true" in service["security_opt"],
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": files, "hard": files}],
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [
                {"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup")
            ],  # the network is the host's
            "cgroupsPath": f"/{CGROUPS}/{hostname}",
            "resources": limits(service),
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def basic_mounts(shm_bytes: int) -> list[dict[str, Any]]:
    """What every container of Docker's has."""
    quiet = ["nosuid", "noexec", "nodev"]
    return [
        _mount("proc", "/proc", quiet),
        _mount("tmpfs", "/dev", ["nosuid", "mode=755", "size=65536k"]),
        _mount("devpts", "/dev/pts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
        _mount("tmpfs", "/dev/shm", [*quiet, "mode=1777", f"size={shm_bytes}"]),
        _mount("mqueue", "/dev/mqueue", quiet),
        _mount("sysfs", "/sys", [*quiet, "ro"]),
        _mount("cgroup", "/sys/fs/cgroup", [*quiet, "relatime", "ro"]),
    ]


def limits(service: Mapping[str, Any]) -> dict[str, Any]:
    """What a service may use of the machine."""
    found: dict[str, Any] = {"memory": {"limit": size_of(service["mem_limit"])}}
    found["pids"] = {"limit": int(service["pids_limit"])}
    if "cpus" in service:
        found["cpu"] = {"period": 100_000, "quota": round(float(service["cpus"]) * 100_000)}
    return found


def remove_control_groups() -> None:
    """Those of containers that have ended."""
    for folder in Path("/sys/fs/cgroup").glob(f"**/{CGROUPS}"):
        for each in sorted(folder.rglob("*/"), reverse=True):
            with contextlib.suppress(OSError):  # it is not empty
                each.rmdir()
        with contextlib.suppress(OSError):
            folder.rmdir()


def _mount(kind: str, target: str, options: Sequence[str]) -> dict[str, Any]:
    return {"type": kind, "source": kind, "destination": target, "options": list(options)}


def tmpfs(text: str) -> dict[str, Any]:
    """Of `/tmp:size=2g,mode=1777`; Docker adds that nothing in it is a program."""
    target, _, options = text.partition(":")
    return _mount("tmpfs", target, ["nosuid", "nodev", "noexec", *filter(None, options.split(","))])


def bind(source: Path, target: str, *options: str) -> dict[str, Any]:
    """A file or folder of the host's."""
    return {"type": "bind", "source": str(source), "destination": target, "options": ["rbind", *options]}


def _volume(each: str | Mapping[str, Any], volumes: Volumes) -> dict[str, Any]:
    """Version 1 of Docker Compose says `name:/target:ro`."""
    if isinstance(each, str):
        source, target, *mode = each.split(":")
        read_only = mode == ["ro"]
    else:
        source, target, read_only = each["source"], each["target"], each.get("read_only", False)
    path = Path(source) if source.startswith("/") else volumes.path(source, target)
    return bind(path, target, *(["ro"] if read_only else []))


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
