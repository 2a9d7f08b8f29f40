"""Remove from the environment that runs this what only compilers, Java and testers need, and say how much that was.

What is named here and not there is an error: a package has changed, and the list with it.
"""

import shutil
import sysconfig
from pathlib import Path

# Of their own tests only the large ones: small packages import some of theirs.
FOLDERS = ("tensorflow/include", "pyarrow/include", "ray/jars")
TESTED = ("pandas", "pyarrow", "scipy", "sklearn", "statsmodels")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def slim(packages: Path) -> int:
    """Remove from a `site-packages` folder what no program of ours runs.

    Returns:
        How many bytes that was.

    Raises:
        SystemExit: something that should go is not there.
    """
    tests = {package: list((packages / package).rglob("tests")) for package in TESTED}
    unneeded = [*(packages / folder for folder in FOLDERS), *(folder for found in tests.values() for folder in found)]
    absent = [folder for folder in FOLDERS if not (packages / folder).is_dir()]
    absent += [f"{package}/**/tests" for package, found in tests.items() if not found]
    if absent:
        raise SystemExit(f"expected in {packages}, to be removed: {', '.join(absent)}; mend docker/slim.py")
    removed = 0
    for folder in unneeded:
        if folder.is_dir():  # not yet gone with another
            size = size_of(folder)
            shutil.rmtree(folder)
            removed += size
            if size > 2_000_000:
                print(f"removed {folder.relative_to(packages)}: {size / 1e6:.0f} MB")
    return removed


if __name__ == "__main__":
    found = Path(sysconfig.get_path("purelib"))
    print(f"removed {slim(found) / 1e6:.0f} MB, kept {size_of(found) / 1e6:.0f} MB")
