"""The checks find what is planted: a lost trial, one that is there twice, a last bit that differs."""

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_checks import CHECKPOINT, differences, finished_epochs, trained_again
from fault_disks import CLEAR
from fault_runs import PHASES, Attempt, Place, moments, phase_of
from rendering import render_one

from sweep.record import RunFolder, append_line, read_lines

HALF_EPOCH = {"phase": 0, "learning_rate": 0.1, "folds": []}


def run_folder(path: Path) -> RunFolder:
    """Two trials of two epochs, with a summary."""
    run = RunFolder(path)
    run.state.mkdir(parents=True)
    for trial_id in ("a", "b"):
        for epoch in (1, 2):
            figures = {"train": {"loss": 0.1 + 0.2}, "val": {"loss": float("nan"), "macro_f1": 0.7}}
            entry = {"trial_id": trial_id, "epoch": epoch, "seconds": 1.0, "ended_ms": 1000 * epoch}
            append_line(run.epoch_record, {**entry, **HALF_EPOCH, **figures})
        append_line(run.trial_record, {"trial_id": trial_id, "outcome": "completed"})
        append_line(run.halving, {"trial_id": trial_id, "images": 10, "goes_on": True})
    write_table(run, [{"trial_id": name, "val_macro_f1": "0.7", "train_seconds": path.name} for name in ("a", "b")])
    row = {"backbone": "unet", "freeze": "all", "trial_id": "a", "test": {"loss": 0.3}}
    summary = {"trials": {"total": 2}, "best": {"trial_id": "a"}, "test": {"loss": {"value": 0.3}}, "strategies": [row]}
    run.summary.write_text(json.dumps({**summary, "seconds": {"total": len(path.name)}}))
    return run


def write_table(run: RunFolder, rows: list[dict[str, str]]) -> None:
    with run.trials.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def table(run: RunFolder) -> list[dict[str, str]]:
    with run.trials.open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite(path: Path, entries: list[dict]) -> None:
    path.unlink()
    for entry in entries:
        append_line(path, entry)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[RunFolder, RunFolder]:
    """Two run folders that differ in nothing but times."""
    return run_folder(tmp_path / "reference"), run_folder(tmp_path / "disturbed")


def test_runs_that_differ_in_times_alone_are_the_same(pair):
    assert differences(*pair) == []


def test_a_lost_trial_is_found_in_the_table_and_in_the_record(pair):
    _, run = pair
    write_table(run, table(run)[:1])
    rewrite(run.trial_record, [*read_lines(run.trial_record)][:1])
    found = "b stands there 0 times, not 1 time"
    assert differences(*pair) == [f"trials.csv: {found}", f"state/trials.jsonl: {found}"]


def test_a_trial_that_is_there_twice_is_found(pair):
    _, run = pair
    write_table(run, [*table(run), table(run)[0]])
    assert differences(*pair) == ["trials.csv: a stands there 2 times, not 1 time"]


def test_another_figure_of_a_trial_is_found(pair):
    _, run = pair
    write_table(run, [{**row, "val_macro_f1": "0.70000001"} for row in table(run)])
    assert differences(*pair)[0] == "trials.csv: val_macro_f1 of a is 0.70000001, not 0.7"


@pytest.mark.parametrize("part", ["train", "val"])
def test_the_last_bit_of_an_epoch_is_found(pair, part):
    _, run = pair
    entries = [*read_lines(run.epoch_record)]
    name = "loss" if part == "train" else "macro_f1"
    entries[3][part][name] = np.nextafter(entries[3][part][name], 1.0)
    rewrite(run.epoch_record, entries)
    assert differences(*pair) == [f"state/epochs.jsonl: {part} of epoch 2 of b differs"]


def test_an_epoch_that_is_lost_or_there_twice_is_found(pair):
    _, run = pair
    first, _, *rest = read_lines(run.epoch_record)
    rewrite(run.epoch_record, [first, first, *rest])
    assert differences(*pair) == [
        "state/epochs.jsonl: epoch 1 of a stands there 2 times, not 1 time",
        "state/epochs.jsonl: epoch 2 of a stands there 0 times, not 1 time",
    ]


def test_another_decision_at_a_rung_is_found(pair):
    _, run = pair
    rewrite(run.halving, [{**entry, "goes_on": False} for entry in read_lines(run.halving)])
    assert len(differences(*pair)) == 4


def test_other_test_figures_are_found(pair):
    _, run = pair
    summary = json.loads(run.summary.read_text())
    summary["test"]["loss"]["value"] = summary["strategies"][0]["test"]["loss"] = 0.30000000000000004
    run.summary.write_text(json.dumps(summary))
    assert differences(*pair) == ["summary.json: test differs", "summary.json: the strategy unet all differs"]


def test_a_run_folder_without_a_summary_is_no_match(pair):
    pair[1].summary.unlink()
    assert "summary.json: test differs" in differences(*pair)


class TestEpochsTrainedAgain:
    def checkpoint(self, run: RunFolder, training: str, ended_ms: list[int]) -> None:
        """As a training leaves it: a header, then a line an epoch."""
        told = [{"trial_id": training, "epoch": epoch, "ended_ms": at} for epoch, at in enumerate(ended_ms, start=1)]
        lines = "\n".join(["{}", *map(json.dumps, told)])
        folder = run.trial(training)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / CHECKPOINT, course=np.frombuffer(lines.encode(), np.uint8))

    def test_what_was_finished_and_ended_later_was_trained_again(self, pair):
        _, run = pair
        finished = finished_epochs(run)
        assert trained_again(finished, run) == []
        rewrite(run.epoch_record, [{**entry, "ended_ms": 5000} for entry in read_lines(run.epoch_record)][:1])
        assert trained_again(finished, run) == ["epoch 1 of a"]

    def test_final_trainings_and_epochs_ahead_of_the_record_are_known_by_their_checkpoints(self, pair):
        _, run = pair
        self.checkpoint(run, "a-final-1", [7000, 8000])
        finished = finished_epochs(run)
        self.checkpoint(run, "a-final-1", [7000, 8000, 9000])
        assert trained_again(finished, run) == []
        self.checkpoint(run, "a-final-1", [7000, 8500])
        assert trained_again(finished, run) == ["epoch 2 of a-final-1"]


def test_moments_leave_no_part_of_the_time_out():
    found = moments(30, 60.0, random.Random(0))
    assert sorted(int(moment // 2.0) for moment in found) == list(range(30))
    assert found != sorted(found)
    assert found == moments(30, 60.0, random.Random(0))


def test_a_sweep_stands_where_its_folder_says(tmp_path):
    attempt = Attempt(Place(tmp_path, "run", trials=1), False, "", tmp_path / "log", 0.0, None)
    run, phases = attempt.place.run, [phase_of(attempt)]
    run.state.mkdir(parents=True)
    phases.append(phase_of(attempt))
    for record in (run.suggestion_record, run.trial_record, run.test_openings):
        append_line(record, {"number": 0})
        phases.append(phase_of(attempt))
    run.summary.write_text("{}")
    assert (*phases, phase_of(attempt)) == PHASES
    assert phase_of(replace(attempt, begun=run.summary.stat().st_mtime + 1)) == "evaluation"  # an earlier attempt's


@pytest.mark.parametrize(
    "text",
    [
        "no room on the disk",
        "the disk is full",
        "expected room on the disk for x",
        "No space left on device",
        "no space for",
    ],
)
def test_what_says_that_a_disk_is_full(text):
    assert CLEAR.search(text)


class TestPages:
    FACTS = {  # noqa: RUF012
        "environment": {
            "cpu": "a processor",
            "cores": 2,
            "memory_bytes": 2**33,
            "python": "3.11",
            "versions": {},
            "commit": "0123abc",
            "date": "2026-01-01",
            "command": "python benchmarks/faults.py drivers",
        },
        "trials": 12,
        "undisturbed_seconds": 40.0,
    }

    def test_of_drivers(self):
        kill = {"phase": "search", "second": 12.0, "resumed": False}
        row = {
            "lost_seconds": 20.0,
            "epochs_again": 0,
            "orphans_seconds": 1.5,
            "agents_seconds": 70.0,
            "complaints": [],
        }
        rows = [{**row, "kills": [kill]}, {**row, "kills": [kill, {**kill, "phase": "report", "resumed": True}]}]
        page = render_one({**self.FACTS, "kind": "faults_drivers", "rows": rows})
        assert "| search | 2 | 0 | 12.0 (12.0 to 12.0, median 12.0) |" in page
        assert "| report | 1 | 1 | 12.0" in page
        assert "| 2 | 0 | 0 | 20.0 (20.0 to 20.0, median 20.0) | 1.5 | 70 |" in page
        assert "1 of them once, 1 of them twice" in page
        assert "What went wrong" not in page

    def test_of_workers_and_what_was_lost_is_told_in_full(self):
        kill = {"phase": "search", "second": 12.0, "what": "a Ray worker"}
        rows = [{"kills": [kill], "lost_seconds": 20.0, "epochs_again": 1, "complaints": ["a trial is lost"]}]
        page = render_one({**self.FACTS, "kind": "faults_workers", "rows": rows})
        assert "| a Ray worker | 1 | 1 in search | 12.0" in page
        assert "| 1 | 1 | 1 | 20.0" in page
        assert "- sweep 1: a trial is lost" in page

    def test_of_servers_and_disks(self):
        row = {"store": "SQLite", "stops": [{}] * 5, "away_seconds": 61.2, "seconds": 140.0, "complaints": []}
        page = render_one({**self.FACTS, "kind": "faults_mlflow", "rows": [row]})
        assert "| SQLite | 5 | 61 | 140 | nothing |" in page
        row = {"case": "at a checkpoint", "resumed": True, "message": "no room", "complaints": []}
        page = render_one({**self.FACTS, "kind": "faults_disk", "rows": [row]})
        assert "| at a checkpoint | `--resume` | nothing | “no room” |" in page
