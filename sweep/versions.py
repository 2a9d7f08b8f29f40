"""Versions of installed packages, by the name that others know a package by."""

from importlib.metadata import PackageNotFoundError, version

# The same modules, built from the same source for CPUs alone: what an image without CUDA has.
CPU_BUILDS = {"tensorflow": "tensorflow-cpu"}


def version_of(package: str) -> str:
    """The version of a package, or of its build for CPUs where that is installed in its place.

    Raises:
        importlib.metadata.PackageNotFoundError: neither is installed.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        if package not in CPU_BUILDS:
            raise
        return version(CPU_BUILDS[package])
