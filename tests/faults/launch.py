"""`python -m sweep.run` with trainings that train nothing: what is left are scheduling, the record and MLflow."""

import sys
from functools import partial
from typing import Any

from sweep import run, session


def nothing(*arguments: Any) -> None:
    """In place of the final evaluation, which wants real models."""


if __name__ == "__main__":
    session.Work = partial(session.Work, program="tests.faults.programs:steady", preload=())  # type: ignore
    session.evaluate_finalists = nothing
    session.judge = nothing  # type: ignore[assignment]
    sys.exit(run.main())
