"""What the image installs, one requirement a line: `python requirements.py cpu|gpu`, beside a pyproject.toml."""

import platform
import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("cluster", "postgres", "tracking")  # of head, workers and tracking server; they share one image
CPU_ONLY_MACHINES = (
    "x86_64",
)  # tensorflow-cpu, half the size, is built for; elsewhere `tensorflow` knows no GPU anyway


def requirements(project: Path, variant: str, machine: str) -> list[str]:
    """The project's dependencies, with TensorFlow's build that fits the variant.

    Args:
        project: its pyproject.toml.
        variant: `cpu` or `gpu`.
        machine: as `platform.machine()` says.

    Raises:
        SystemExit: there is no such variant.
    """
    if variant not in ("cpu", "gpu"):
        raise SystemExit(f"expected VARIANT=cpu or VARIANT=gpu, but got {variant!r}")
    declared = tomllib.loads(project.read_text())["project"]
    extras = declared["optional-dependencies"]
    wanted = [*declared["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    if variant == "gpu":
        return [*wanted, *extras["gpu"]]
    if machine in CPU_ONLY_MACHINES:
        return [re.sub(r"^tensorflow(?=[<>=])", "tensorflow-cpu", line) for line in wanted]
    return wanted


if __name__ == "__main__":
    print("\n".join(requirements(Path("pyproject.toml"), sys.argv[1], platform.machine())))
