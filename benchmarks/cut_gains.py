"""What storing the output of frozen layers saves of an epoch: what the plan expects, and what it is.

One process with one thread trains each strategy for some epochs, from stored features and from the pixels; medians of
all epochs but the first, which compiles.

    python benchmarks/cut_gains.py --data DIR --weights FILE --out benchmarks/results     # some 3 minutes
"""

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure_rates import parser, strategies, trial_config, trial_data
from measuring import environment, own_command, write_result

from cxr_models.layer_table import layer_tables
from cxr_models.trial import Objective, TrialConfig, TrialData
from sweep.caching import CacheRules

EPOCHS = 4
BATCH_SIZE = 32


def main() -> None:
    """The command."""
    arguments = parser(__doc__, out="folder for the results").parse_args()
    from cxr_models import steps

    steps.configure(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = trial_data(arguments, Path(scratch))
        for freeze in strategies():
            if freeze != "none":
                rows.append(_row(data, trial_config(arguments.side, freeze, BATCH_SIZE), Path(scratch)))
                print(json.dumps(rows[-1]), flush=True)
    result = {"kind": "cut_gains", "environment": environment(own_command()), "side": arguments.side, "rows": rows}
    write_result(result, arguments.out / "cut_gains.json")


def _row(data: TrialData, config: TrialConfig, folder: Path) -> dict[str, Any]:
    tables = layer_tables([(config.backbone, config.image_side)], folder)
    rules = CacheRules(tables, len(data.classes), len(data.train), len(data.val))
    (phase,) = rules.phases(config, data.features)
    stored = _epoch_seconds(data, config, folder / "stored")
    whole = _epoch_seconds(replace(data, features=None), config, folder / "whole")
    return {
        "freeze": config.freeze,
        "cut": phase.cut.name if phase.cut else None,
        "expected": phase.gain,
        "measured": whole / stored,
        "seconds_stored": stored,
        "seconds_whole": whole,
    }


def _epoch_seconds(data: TrialData, config: TrialConfig, folder: Path) -> float:
    from cxr_models.training import run_trial

    trial = run_trial("gain", replace(config, epochs=EPOCHS), data, folder, Objective("accuracy", "max"))
    epochs = [next(trial)]
    while len(epochs) < EPOCHS:
        epochs.append(trial.send(True))
    trial.close()
    return statistics.median(epoch.seconds for epoch in epochs[1:])


if __name__ == "__main__":
    main()
