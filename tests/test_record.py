"""The run folder and its record: nothing is overwritten, what happened is on disk, the best weights stay."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cxr_models.trial import (
    AXES,
    BEST_WEIGHTS,
    METRICS,
    VALIDATION_SCORES,
    Diagnosis,
    EpochMetrics,
    Objective,
    Outcome,
    Suggestion,
    TrialConfig,
    TrialResult,
)
from sweep.record import Record, RunFolder, best_by_strategy, ranked, read_lines, write_json

OBJECTIVE = Objective("macro_f1", "max")


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path, "run", exactly=False)


def result(trial_id: str, value: float | None, *, freeze: str = "all", failed: bool = False) -> TrialResult:
    val = {} if value is None else {**dict.fromkeys(METRICS, value), "recall/COVID": value}
    return TrialResult(
        trial_id,
        TrialConfig("vanilla_cnn", freeze=freeze, hidden_units=(8, 4)),
        Outcome.FAILED if failed else Outcome.COMPLETED,
        epochs=len(val) and 3,
        best_epoch=len(val) and 2,
        val=val,
        error='ValueError: a, "b"' if failed else "",
        train_seconds=1.23456,
    )


def leave_files(folder: RunFolder, trial_id: str) -> Path:
    """What training leaves of a trial."""
    weights = folder.trial(trial_id) / BEST_WEIGHTS
    weights.parent.mkdir(parents=True)
    weights.touch()
    (weights.parent / VALIDATION_SCORES).touch()
    return weights


def rows(folder: RunFolder) -> list[dict[str, str]]:
    with folder.trials.open(newline="") as file:
        return list(csv.DictReader(file))


def trial_ids(folder: RunFolder) -> list[str]:
    return [row["trial_id"] for row in rows(folder)]


def counted(method: Callable[..., Any], touched: list[Path]) -> Callable[..., Any]:
    def call(path: Path, *arguments: Any, **options: Any) -> Any:
        touched.append(path)
        return method(path, *arguments, **options)

    return call


class TestCreate:
    def test_the_next_free_name(self, tmp_path):
        names = [RunFolder.create(tmp_path / "runs", "sweep", exactly=False).path.name for _ in range(3)]
        assert names == ["sweep", "sweep-2", "sweep-3"]

    def test_paths_do_not_depend_on_the_working_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        found = RunFolder.create(Path("runs"), "sweep", exactly=True)
        assert found.path == tmp_path / "runs" / "sweep"
        assert found.state.is_dir()

    def test_a_name_that_was_asked_for_is_not_changed(self, tmp_path):
        earlier = RunFolder.create(tmp_path, "sweep", exactly=True)
        earlier.summary.write_text("kept")
        with pytest.raises(ValueError, match="sweep is a folder with an earlier sweep; choose another --name or --out"):
            RunFolder.create(tmp_path, "sweep", exactly=True)
        assert earlier.summary.read_text() == "kept"
        assert [path.name for path in tmp_path.iterdir()] == ["sweep"]

    @pytest.mark.parametrize("exactly", [True, False])
    def test_a_file_in_the_way(self, exactly, tmp_path):
        (tmp_path / "sweep").touch()
        with pytest.raises(ValueError, match="sweep is a file; choose another"):
            RunFolder.create(tmp_path, "sweep", exactly=exactly)
        with pytest.raises(ValueError, match=r"cannot make the run folder .*Not a directory; choose another --out"):
            RunFolder.create(tmp_path / "sweep", "name", exactly=exactly)


class TestRecord:
    def test_what_happened_is_on_disk_at_once(self, folder):
        record = Record(folder, OBJECTIVE)
        config = TrialConfig("vanilla_cnn", hidden_units=(8,))
        record.started(Suggestion(0, "aa", config))
        (line,) = read_lines(folder.suggestion_record)
        assert (line["number"], TrialConfig.from_json(line["config"])) == (0, config)
        values = dict.fromkeys(METRICS, 0.5)
        metrics = EpochMetrics("aa", 1, 0, 1e-3, values, values, 0.1, 10.0)
        record.epoch(metrics)
        assert [EpochMetrics.from_json(line) for line in read_lines(folder.epoch_record)] == [metrics]
        record.ended(0, result("aa", 0.5))
        (line,) = read_lines(folder.trial_record)
        assert line == {"number": 0, **json.loads(json.dumps(result("aa", 0.5).to_json()))}

    def test_results_in_the_order_of_suggestion(self, folder):
        record = Record(folder, OBJECTIVE)
        for number in (2, 0, 1):
            record.ended(number, result(f"t{number}", 0.5))
        assert [found.trial_id for found in record.results] == ["t0", "t1", "t2"]
        assert [line["number"] for line in read_lines(folder.trial_record)] == [2, 0, 1]

    def test_only_the_best_of_each_strategy_keeps_its_weights(self, folder):
        record = Record(folder, OBJECTIVE)
        ends = [
            result("probe", 0.7),
            result("deep", 0.6, freeze="none"),
            result("worse", 0.6),
            result("broken", 0.9, failed=True),
            result("better", 0.8),
            result("early", None, freeze="stages:1", failed=True),
        ]
        weights = {end.trial_id: leave_files(folder, end.trial_id) for end in ends}
        running = leave_files(folder, "running")
        for number, end in enumerate(ends):
            record.ended(number, end)
        assert {name for name, path in weights.items() if path.exists()} == {"better", "deep"}
        assert running.exists()
        assert all((path.parent / VALIDATION_SCORES).exists() for path in weights.values())

    def test_of_equals_the_one_suggested_first_keeps_its_weights(self, folder):
        record = Record(folder, OBJECTIVE)
        weights = {name: leave_files(folder, name) for name in ("first", "second", "third")}
        for number, name in ((1, "second"), (0, "first"), (2, "third")):
            record.ended(number, result(name, 0.5))
        assert {name for name, path in weights.items() if path.exists()} == {"first"}

    def test_weights_written_after_a_trials_end_are_dropped_at_the_close(self, folder):
        record = Record(folder, OBJECTIVE)
        for number, value in enumerate((0.7, 0.6)):
            record.ended(number, result(f"t{number}", value))
        best, late = leave_files(folder, "t0"), leave_files(folder, "t1")
        record.close()
        assert best.exists()
        assert not late.exists()

    def test_an_end_touches_no_more_files_after_many_trials_than_after_few(self, folder, monkeypatch):
        record = Record(folder, OBJECTIVE)
        touched: list[Path] = []
        for name in ("open", "unlink", "replace"):
            monkeypatch.setattr(Path, name, counted(getattr(Path, name), touched))
        per_end = []
        for number in range(40):
            touched.clear()
            record.ended(number, result(f"t{number}", 0.5 + number / 100, freeze=("all", "none")[number % 2]))
            per_end.append(len(touched))
        assert len(set(per_end[2:])) == 1

    def test_the_table_of_trials(self, folder):
        record = Record(folder, OBJECTIVE)
        record.ended(1, result("bb", None, failed=True))
        record.ended(0, result("aa", 0.75))
        with folder.trials.open(newline="") as file:
            first, second = csv.DictReader(file)
        assert list(first) == [
            *("trial_id", "outcome", "error"),
            *("max_epochs" if axis == "epochs" else axis for axis in AXES),
            *("epochs", "best_epoch"),
            *("val_loss", "val_accuracy", "val_macro_f1", "val_balanced_accuracy", "val_auroc", "val_recall/COVID"),
            *("trainable_parameters", "frozen_parameters", "train_seconds", "doctor"),
        ]
        assert (first["trial_id"], first["outcome"], first["error"]) == ("aa", "completed", "")
        assert (first["hidden_units"], first["val_macro_f1"]) == ("[8, 4]", "0.75")
        assert (first["max_epochs"], first["epochs"], first["best_epoch"]) == ("10", "3", "2")
        assert first["train_seconds"] == "1.23"
        assert (second["outcome"], second["error"], second["val_loss"]) == ("failed", 'ValueError: a, "b"', "")

    def test_the_table_is_there_after_every_trial(self, folder):
        record = Record(folder, OBJECTIVE)
        for number in range(3):
            record.ended(number, result(f"t{number}", 0.5))
            assert len(folder.trials.read_text().splitlines()) == number + 2

    def test_the_table_is_complete_without_a_close_and_in_order_after_it(self, folder):
        record = Record(folder, OBJECTIVE)
        for number in (2, 0, 3, 1):
            record.ended(number, result(f"t{number}", None if number == 2 else 0.5, failed=number == 2))
        assert sorted(trial_ids(folder)) == ["t0", "t1", "t2", "t3"]
        interrupted = rows(folder)
        record.close()
        assert trial_ids(folder) == ["t0", "t1", "t2", "t3"]
        assert sorted(rows(folder), key=str) == sorted(interrupted, key=str)


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "epochs.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert list(read_lines(path)) == [{"epoch": 1}, {"epoch": 2}]
    assert list(read_lines(tmp_path / "absent.jsonl")) == []


def test_what_the_doctor_found_is_in_the_table_and_read_back_from_the_record(folder):
    found = (
        Diagnosis("constant_predictor", True, "One class.", "Less."),
        Diagnosis("still_improving", False, "a", "b"),
    )
    noted = replace(result("aa", 0.5), doctor=found)
    record = Record(folder, OBJECTIVE)
    record.ended(0, noted)
    record.ended(1, result("bb", 0.4))
    assert [row["doctor"] for row in rows(folder)] == ["constant_predictor;still_improving", ""]
    (line, other) = read_lines(folder.trial_record)
    assert TrialResult.from_json({name: value for name, value in line.items() if name != "number"}) == noted
    del other["number"], other["doctor"]  # as it was written before there was a doctor
    assert TrialResult.from_json(other) == result("bb", 0.4)


class TestRanking:
    def test_failed_trials_and_those_without_an_epoch_never_rank(self):
        results = (result("a", 0.5), result("b", 0.9, failed=True), result("c", None), result("d", 0.7))
        assert [found.trial_id for found in ranked(results, OBJECTIVE)] == ["d", "a"]
        assert [found.trial_id for found in ranked(results, Objective("loss", "min"))] == ["a", "d"]

    def test_equals_stay_in_the_order_of_suggestion(self):
        results = tuple(result(name, 0.5) for name in "cab")
        assert [found.trial_id for found in ranked(results, OBJECTIVE)] == ["c", "a", "b"]

    def test_one_of_each_strategy(self):
        results = (result("a", 0.5), result("b", 0.9), result("c", 0.7, freeze="none"))
        assert [found.trial_id for found in best_by_strategy(results, OBJECTIVE)] == ["b", "c"]


def test_json_of_any_text(tmp_path):
    write_json(tmp_path / "summary.json", {"class": "Säuglinge"})
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == {"class": "Säuglinge"}
