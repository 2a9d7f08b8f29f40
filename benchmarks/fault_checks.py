"""What must be the same whether or not a sweep was disturbed. A check returns its complaints, none if all is well."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cxr_models.trial import CHECKPOINT, EpochMetrics
from sweep.record import RunFolder, read_lines
from sweep.tracked import MetricNames

# Read by MLflow when it is imported.
QUIET = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
# What depends on the clock. Everything else of a trial or an epoch must be the same to the last bit.
TIMED_COLUMNS = ("train_seconds",)

EXACT_IN_EPOCHS = ("phase", "learning_rate", "train", "val", "folds")


def differences(reference: RunFolder, run: RunFolder) -> list[str]:
    """What is lost, twice or different in a run folder, beside one of the same sweep that nothing disturbed."""
    return [
        *_trials_differ(reference, run),
        *_epochs_differ(reference, run),
        *_rungs_differ(reference, run),
        *_summaries_differ(reference, run),
    ]


def _trials_differ(reference: RunFolder, run: RunFolder) -> list[str]:
    expected, found = _table(reference), _table(run)
    names, records = (
        [row["trial_id"] for row in expected],
        [entry["trial_id"] for entry in read_lines(run.trial_record)],
    )
    complaints = [
        *_counted("trials.csv", names, [row["trial_id"] for row in found]),
        *_counted("state/trials.jsonl", names, records),
    ]
    own = {row["trial_id"]: row for row in found}
    for row in expected:
        other = own.get(row["trial_id"], row)
        columns = [name for name in row if name not in TIMED_COLUMNS and row[name] != other.get(name)]
        complaints += [
            f"trials.csv: {name} of {row['trial_id']} is {other.get(name)}, not {row[name]}" for name in columns
        ]
    return complaints


def _epochs_differ(reference: RunFolder, run: RunFolder) -> list[str]:
    expected, found = (list(read_lines(folder.epoch_record)) for folder in (reference, run))
    complaints = _counted("state/epochs.jsonl", map(_epoch_name, expected), map(_epoch_name, found))
    own = {_epoch_name(entry): entry for entry in found}
    for entry in expected:
        other = own.get(_epoch_name(entry), entry)
        # As text: Python writes the shortest digits that are read back as the same float64, and NaN equals NaN there.
        parts = [name for name in EXACT_IN_EPOCHS if json.dumps(entry.get(name)) != json.dumps(other.get(name))]
        complaints += [f"state/epochs.jsonl: {name} of {_epoch_name(entry)} differs" for name in parts]
    return complaints


def _rungs_differ(reference: RunFolder, run: RunFolder) -> list[str]:
    expected, found = ((json.dumps(entry) for entry in read_lines(folder.halving)) for folder in (reference, run))
    return _counted("state/halving.jsonl", expected, found)


def _summaries_differ(reference: RunFolder, run: RunFolder) -> list[str]:
    expected, found = (_figures(folder) for folder in (reference, run))
    return [f"summary.json: {name} differs" for name in expected if expected[name] != found.get(name)]


def _figures(folder: RunFolder) -> dict[str, str]:
    """What a summary says of the trials, the best one and the test set, as text."""
    summary = json.loads(folder.summary.read_text()) if folder.summary.is_file() else {}
    figures = {name: summary.get(name) for name in ("trials", "best", "test", "interrupted")}
    for row in summary.get("strategies", ()):
        parts = {name: row.get(name) for name in ("trial_id", "train", "val", "test", "test_by_seed")}
        figures[f"the strategy {row['backbone']} {row['freeze']}"] = parts
    return {name: json.dumps(value) for name, value in figures.items()}


def _table(folder: RunFolder) -> list[dict[str, str]]:
    if not folder.trials.is_file():
        return []
    with folder.trials.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _epoch_name(entry: Mapping[str, Any]) -> str:
    return f"epoch {entry['epoch']} of {entry['trial_id']}"


def _counted(where: str, expected: Iterable[str], found: Iterable[str]) -> list[str]:
    """What is not there as often as it should be."""
    wanted, there = Counter(expected), Counter(found)
    names = sorted(wanted | there)
    return [
        f"{where}: {name} stands there {_times(there[name])}, not {_times(wanted[name])}"
        for name in names
        if there[name] != wanted[name]
    ]


def _times(number: int) -> str:
    return f"{number} time{'' if number == 1 else 's'}"


def finished_epochs(run: RunFolder) -> dict[tuple[str, int], int]:
    """(training, epoch) of every epoch that is on disk -> when it ended, in milliseconds since 1970.

    The record has those of trials. The checkpoints, `cxr_models/checkpoint.py`, may be an epoch ahead of it, and have
    those of final trainings.
    """
    entries = [*read_lines(run.epoch_record)]
    for file in run.state.glob(f"trials/*/{CHECKPOINT}"):
        with suppress(FileNotFoundError):  # of a training that has just ended
            entries += course_of(file)
    return {(entry["trial_id"], entry["epoch"]): entry["ended_ms"] for entry in entries}


def course_of(checkpoint: Path) -> list[dict[str, Any]]:
    """The epochs a checkpoint has: there, each is JSON in a line behind its header."""
    with np.load(checkpoint) as file:
        _, *lines = file["course"].tobytes().decode().splitlines()
    return [json.loads(line) for line in lines]


def trained_again(finished: Mapping[tuple[str, int], int], run: RunFolder) -> list[str]:
    """Which of the epochs that had been finished before a kill were trained once more after it."""
    ended = finished_epochs(run)
    return [
        f"epoch {epoch} of {training}"
        for (training, epoch), at_ms in sorted(finished.items())
        if ended.get((training, epoch), at_ms) != at_ms
    ]


def tracking_differences(run: RunFolder, uri: str = "", *, models: int = 1) -> list[str]:
    """Where MLflow does not have what the record has: one run a sweep and a trial, and every figure of it once.

    Args:
        run: the run folder of a sweep that has ended.
        uri: of MLflow, the store in the run folder if empty.
        models: how many the sweep registers.
    """
    os.environ.update(QUIET)
    from mlflow import MlflowClient

    client = MlflowClient(uri or f"sqlite:///{run.tracking_database}")
    experiments = [found.experiment_id for found in client.search_experiments() if found.name == run.path.name]
    runs = [*client.search_runs(experiments, max_results=10_000)] if experiments else []
    parents = [each for each in runs if "mlflow.parentRunId" not in each.data.tags]
    results = {entry["trial_id"]: entry for entry in read_lines(run.trial_record)}
    of_trials = [each for each in runs if each not in parents]
    complaints = [
        *_counted("MLflow's runs of a sweep", [run.path.name], [each.info.run_name for each in parents]),
        *_counted("MLflow's runs of trials", [*results], [each.data.tags["trial_id"] for each in of_trials]),
    ]
    complaints += [
        f"MLflow: the sweep's run is {each.info.status}" for each in parents if each.info.status != "FINISHED"
    ]
    for parent in parents:
        found = client.search_model_versions(f"run_id = '{parent.info.run_id}'")
        complaints += _counted("MLflow's registry", ["the sweep's model"] * models, ["the sweep's model"] * len(found))
    for each in of_trials:
        trial_id = each.data.tags["trial_id"]
        wanted = "FAILED" if results.get(trial_id, {}).get("outcome") == "failed" else "FINISHED"
        if each.info.status != wanted:
            complaints.append(f"MLflow: the run of {trial_id} is {each.info.status}, not {wanted}")
        complaints += _history_differs(client, each.info.run_id, trial_id, run)
    return complaints


def _history_differs(client: Any, run_id: str, trial_id: str, run: RunFolder) -> list[str]:
    """Every figure of every epoch exactly once, with the record's value."""
    names = MetricNames(json.loads(run.summary.read_text())["data"]["classes"])
    own = [EpochMetrics.from_json(entry) for entry in read_lines(run.epoch_record) if entry["trial_id"] == trial_id]
    expected: dict[str, list[str]] = {}
    for metrics in own:
        for name, value in names.of_epoch(metrics).items():
            expected.setdefault(name, []).append(f"{name} {float(value)!r} at epoch {metrics.epoch}")
    complaints = []
    for name, wanted in expected.items():
        there = [f"{name} {entry.value!r} at epoch {entry.step}" for entry in client.get_metric_history(run_id, name)]
        complaints += _counted(f"MLflow's run of {trial_id}", wanted, there)
    return complaints
