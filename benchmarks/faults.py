"""Is nothing lost? A small real sweep is disturbed in many ways, and must end as if nothing had happened.

`drivers` kills the sweep's own process at random moments and resumes it; `workers` kills processes that train, and
Ray's workers; `mlflow` stops and restarts the tracking server; `disk` lets the disk run full. Trials, every epoch's
metrics and the test figures are compared, to the last bit, with those of a sweep that nothing disturbed, and MLflow
with the record.

Run:  python benchmarks/faults.py drivers
      python benchmarks/faults.py workers
      python benchmarks/faults.py mlflow   # PostgreSQL too, where pg_ctl and psycopg2 are found
      python benchmarks/faults.py disk     # as root, for a tmpfs of 200 MB
Cost: one to two minutes of 2 CPU cores for each sweep that is disturbed: some 45, 20, 10 and 6 minutes.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_disks import fill_disks
from fault_kills import kill_drivers, kill_workers
from fault_runs import TRIALS, Row, Setting, TimeLeft
from fault_servers import restart_servers
from measuring import environment, own_command, write_result
from rendering import render_one

RESULTS = Path(__file__).parent / "results"
# What to do -> how, and how many sweeps it disturbs where nothing else is said.
COMMANDS: Mapping[str, tuple[Callable[[Setting], Iterator[Row]], int]] = {
    "drivers": (kill_drivers, 30),
    "workers": (kill_workers, 20),
    "mlflow": (restart_servers, 2),
    "disk": (fill_disks, 3),
}


def main() -> None:
    """The command; its exit status is 1 where something was lost."""
    arguments = parser().parse_args()
    disturb, runs = COMMANDS[arguments.what]
    with scratch_folder(arguments.scratch) as scratch:
        setting = Setting(scratch, arguments.trials, arguments.runs or runs, arguments.seed)
        left = TimeLeft(setting.runs)
        result: dict[str, Any] = {
            "kind": f"faults_{arguments.what}",
            "environment": environment(own_command()),
            "trials": arguments.trials,
            "rows": [],
        }
        for row in disturb(setting):
            left.told(f"{row['told']}; {'; '.join(row['complaints']) or 'nothing lost'}")
            result["rows"].append(row)
            write_result({**result, **setting.facts}, arguments.out / f"{result['kind']}.json")
    print(render_one({**result, **setting.facts}))
    sys.exit(any(row["complaints"] for row in result["rows"]))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    found = argparse.ArgumentParser(description="Disturb a small sweep, and compare it with one left alone.")
    found.add_argument("what", choices=COMMANDS)
    found.add_argument("--runs", type=int, metavar="N", help="sweeps to disturb (30 drivers, 20 workers)")
    found.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (0)")
    found.add_argument("--trials", type=int, default=TRIALS, metavar="N", help=f"of each sweep ({TRIALS})")
    found.add_argument("--scratch", type=Path, metavar="DIR", help="keep every run folder and its output here")
    found.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="(benchmarks/results)")
    return found


@contextmanager
def scratch_folder(given: Path | None) -> Iterator[Path]:
    """Where the sweeps run: a new folder in the one given, which is kept, or a temporary one."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix="faults-", dir=given)).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        yield Path(folder).resolve()


if __name__ == "__main__":
    main()
