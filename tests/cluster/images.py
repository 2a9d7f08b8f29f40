"""The image, really built from docker/Dockerfile: by buildah, which needs no daemon, on a stand-in for its base image.

The stand-in is a Debian with its own Python, made by debootstrap; it takes the place of python:3.12-slim-bookworm, the
same Debian with Python beside it. What pip uses here (another index, wheels on disk), pip uses in the build.
"""

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
NEEDED = ("buildah", "debootstrap")
# Where the stand-in and the image are kept from one run to the next; a folder of this run's own without it.
KEPT = "CXR_IMAGES_DIR"
STAND_IN, IMAGE = "localhost/stand-in:bookworm", "localhost/cxr-sweep:0.1.0"
MIRROR = "http://deb.debian.org/debian"
BUILDING_TIMEOUT_S = 3600.0


class ImageFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """A build did not do what it should."""


def missing() -> list[str]:
    """What is not there that a build needs."""
    found = [f"the program {name}" for name in NEEDED if shutil.which(name) is None]
    return [*found, "root"] if os.geteuid() else found


@contextmanager
def kept_folder() -> Iterator[Path]:
    """Where images lie: the folder that CXR_IMAGES_DIR names, or one that is removed at the end."""
    if given := os.environ.get(KEPT):
        folder = Path(given).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="cxr-images-", dir="/var/tmp") as place:
        yield Path(place)


class Images:
    """The images in a folder.

    Args:
        folder: for all of buildah's; large.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "build.log"
        with Path("/proc/filesystems").open() as file:
            driver = "overlay" if "overlay" in file.read() else "vfs"  # which copies every layer
        self._command = ["buildah", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self._command += ["--storage-driver", driver]

    def buildah(self, *arguments: str | Path, timeout_s: float = 600.0) -> str:
        """Run buildah on the images of the folder; what it says.

        Raises:
            ImageFailed: it failed.
        """
        command = [*self._command, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT)
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(command)}\n{done.stdout}{done.stderr}\n")
        if done.returncode:
            raise ImageFailed(f"{shlex.join(command)}: {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def has(self, name: str) -> bool:
        """Whether there is an image of this name."""
        return name in self.buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()

    def make_stand_in(self) -> None:
        """Make the base image, unless it is there."""
        if self.has(STAND_IN):
            return
        container = self.buildah("from", "scratch").strip()
        place = self.buildah("mount", container).strip()
        packages = "python3,python3-venv,ca-certificates"
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", place, MIRROR]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ImageFailed(f"{shlex.join(command)}: {(done.stdout + done.stderr)[-3000:]}")
        for leftover in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(Path(place, leftover))
        self.buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", container)
        self.buildah("commit", "--quiet", "--rm", container, STAND_IN)

    def build(self, name: str, *arguments: str, variables: Sequence[str] = ()) -> float:
        """Build docker/Dockerfile; seconds that took.

        Args:
            name: of the image.
            arguments: of `buildah bud`.
            variables: build arguments, `NAME=VALUE`.
        """
        begun = time.monotonic()
        with pip_settings(self.folder) as (settings, places):
            volumes = [part for place in places for part in ("--volume", f"{place}:{place}:ro")]
            given = [part for value in (f"BASE_IMAGE={STAND_IN}", *variables) for part in ("--build-arg", value)]
            # Docker's own format: OCI's knows no health check.
            how = ["--isolation", "chroot", "--format", "docker", "--file", "docker/Dockerfile", "--tag", name]
            how += ["--secret", f"id=pip,src={settings}"]
            self.buildah("bud", *how, *volumes, *given, *arguments, ROOT, timeout_s=BUILDING_TIMEOUT_S)
            self.buildah("rmi", "--prune")  # the stages before the last one
        return time.monotonic() - begun

    def facts(self, name: str) -> dict[str, Any]:
        """Everything that an image says of itself, its history included."""
        return dict(json.loads(self.buildah("inspect", "--type", "image", name)))

    @contextmanager
    def mounted(self, name: str) -> Iterator[Path]:
        """The files of an image, for the length of the block."""
        container = self.buildah("from", "--pull-never", name).strip()
        try:
            yield Path(self.buildah("mount", container).strip())
        finally:
            self.buildah("umount", container)
            self.buildah("rm", container)

    def compressed(self, name: str) -> int:
        """Bytes of the image as a registry has it, gzipped."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            self.buildah("push", "--quiet", name, f"dir:{place}", timeout_s=1800.0)
            return sum(path.stat().st_size for path in Path(place).iterdir())


@contextmanager
def pip_settings(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """What pip uses on this machine, as a file for the build; and the folders on disk that it names."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings, places = dict[str, str](), set()
    for line in told.stdout.splitlines():
        key, _, value = line.partition("=")
        text = str(ast.literal_eval(value))
        settings.setdefault(key.rpartition(".")[2], text)  # the environment comes first, and wins
        for word in text.split():
            path = Path(urlsplit(word).path)
            if path.is_absolute() and path.exists() and urlsplit(word).scheme in ("", "file"):
                places.add(path if path.is_dir() else path.parent)
    file = folder / "pip.conf"
    file.write_text("\n".join(["[global]", *(f"{key} = {text}" for key, text in settings.items())]) + "\n")
    try:
        yield file, _with_targets(places)
    finally:
        file.unlink()


def _with_targets(places: set[Path]) -> list[Path]:
    """These folders, and those beside an index that its pages link to."""
    found = set(places)
    for place in places:
        if place.name == "simple":
            found.add(place.parent)
    return sorted(path for path in found if not any(other in path.parents for other in found))
