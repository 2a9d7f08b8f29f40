"""Folders a command is to write to, tried before hours are spent on what goes there."""

import tempfile
from pathlib import Path

from sweep.document import SpecError


def check_writable(folder: Path, option: str) -> None:
    """Make a folder unless it is there, and a file in it.

    Args:
        folder: absolute.
        option: that names it, such as `--cache-dir`.

    Raises:
        SpecError: one or the other cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(
            option, [f"expected a folder to write to, got {folder}: {reason}; give another {option}"]
        ) from error
