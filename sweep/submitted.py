"""`python -m sweep.submitted`: the head's side of `sweep.submit`, which sends a search space along with its command.

A job folder of Ray would do for that, but every worker would run in it, and Ray removes it while a job that was stopped
still writes. Ray also replaces `$NAME` in the variables of a job, hence the encoding.
"""

import base64
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sweep import run
from sweep.interruption import leave

VARIABLE = "SWEEP_SUBMISSION"
MOST_CHARACTERS = 100_000  # Linux takes 131,071 in a variable, and Ray packs this one into another


@dataclass(frozen=True)
class Submission:
    """What a job brings along.

    Attributes:
        name: of the file.
        text: of the file.
        again: the command that sent it.
    """

    name: str
    text: str
    again: tuple[str, ...]

    def encoded(self) -> str:
        """As the value of a variable of the job.

        Raises:
            ValueError: it is too long for one.
        """
        value = base64.b64encode(zlib.compress(json.dumps(asdict(self)).encode(), 9)).decode()
        if len(value) > MOST_CHARACTERS:
            raise ValueError(
                f"expected a file of {MOST_CHARACTERS:,} characters at most when packed, got {len(value):,}"
            )
        return value

    @classmethod
    def decoded(cls, value: str) -> "Submission":
        found = json.loads(zlib.decompress(base64.b64decode(value)))
        return cls(found["name"], found["text"], tuple(found["again"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep on the cluster that this job belongs to; its exit status."""
    options = list(sys.argv[1:] if argv is None else argv)
    value = os.environ.pop(VARIABLE, "")
    if not value:
        print(f"expected a search space in {VARIABLE}; this command is what `sweep.submit` starts", file=sys.stderr)
        return run.WRONG_INPUT
    submission = Submission.decoded(value)
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        space = Path(folder) / submission.name
        space.write_text(submission.text, encoding="utf-8")
        return run.main([str(space), "--address", "auto", *options], again=submission.again)


if __name__ == "__main__":
    leave(main())
