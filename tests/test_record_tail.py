"""Each line of the record reaches the backlog once, the end of a trial after its epochs."""

from cxr_models.trial import METRICS, EpochMetrics, Outcome, TrialResult
from sweep import record_tail
from sweep.backlog import Backlog
from sweep.ledger import Ledger
from sweep.record import append_line
from sweep.record_tail import RecordTail
from tests.tracked_sweeps import run_folder, suggestion


def write_epoch(folder, number: int, epoch: int) -> None:
    values = dict.fromkeys(METRICS, 0.5)
    append_line(folder.epoch_record, EpochMetrics(f"t{number}", epoch, 0, 1e-3, values, values, 1.0, 1.0).to_json())


def write_start(folder, number: int) -> None:
    trial = suggestion(number)
    append_line(
        folder.suggestion_record,
        {"number": number, "trial_id": trial.trial_id, "config": trial.config.to_json()},
    )


def write_end(folder, number: int, epochs: int) -> None:
    result = TrialResult(f"t{number}", suggestion(number).config, Outcome.COMPLETED, epochs, 1)
    append_line(folder.trial_record, {"number": number, **result.to_json()})


def carried(backlog: Backlog) -> dict[str, list[int]]:
    return {trial.suggestion.trial_id: [metrics.epoch for _, metrics in trial.epochs] for trial in backlog.unwritten()}


def test_lines_come_as_they_are_written_and_whole(tmp_path):
    folder, backlog = run_folder(tmp_path), Backlog()
    tail = RecordTail(folder, Ledger(folder), backlog)
    tail.read(lambda: 1, 0.0)
    assert carried(backlog) == {}
    write_start(folder, 0)
    write_epoch(folder, 0, 1)
    text = folder.epoch_record.read_text()
    with folder.epoch_record.open("a") as record:
        record.write(text.replace('"epoch": 1', '"epoch": 2')[:50])
    tail.read(lambda: 1, 0.0)
    tail.read(lambda: 1, 0.0)
    assert carried(backlog) == {"t0": [1]}
    with folder.epoch_record.open("a") as record:
        record.write(text.replace('"epoch": 1', '"epoch": 2')[50:])
    tail.read(lambda: 1, 0.0)
    assert carried(backlog) == {"t0": [1, 2]}


def test_an_epoch_that_was_trained_again_and_a_trial_that_was_begun_again_come_once(tmp_path):
    folder, backlog = run_folder(tmp_path), Backlog()
    for _ in range(2):
        write_start(folder, 0)
        for epoch in (1, 2):
            write_epoch(folder, 0, epoch)
    write_epoch(folder, 0, 3)
    RecordTail(folder, Ledger(folder), backlog).read(lambda: 1, 0.0)
    assert carried(backlog) == {"t0": [1, 2, 3]}


def test_what_the_ledger_has_is_left_out(tmp_path):
    folder, backlog, ledger = run_folder(tmp_path), Backlog(), Ledger(run_folder(tmp_path / "ledger"))
    for number in range(3):
        write_start(folder, number)
        for epoch in (1, 2, 3):
            write_epoch(folder, number, epoch)
    write_end(folder, 0, 3)
    for trial_id in ("t0", "t1"):
        ledger.created(trial_id, f"run of {trial_id}")
    ledger.status("t0", "FINISHED")
    ledger.sent("t1", 2)
    RecordTail(folder, ledger, backlog).read(lambda: 1, 0.0)
    assert carried(backlog) == {"t1": [3], "t2": [1, 2, 3]}


def test_a_long_record_is_read_in_parts_and_no_trial_ends_before_its_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(record_tail, "MOST_EPOCHS", 4)
    folder, backlog = run_folder(tmp_path), Backlog()
    tail = RecordTail(folder, Ledger(folder), backlog)
    for number in range(3):
        write_start(folder, number)
        for epoch in range(1, 6):
            write_epoch(folder, number, epoch)
        write_end(folder, number, 5)
    ended, seen = [], {f"t{number}": [] for number in range(3)}
    for _ in range(10):
        tail.read(lambda: 1, 0.0)
        assert backlog.epochs <= 4
        for trial in backlog.unwritten():
            trial.described = True
            seen[trial.suggestion.trial_id] += [metrics.epoch for _, metrics in trial.epochs]
            trial.epochs.clear()
            if trial.result:
                ended.append((trial.suggestion.trial_id, list(seen[trial.suggestion.trial_id])))
            backlog.take(trial, 0.0)
    assert ended == [(f"t{number}", [1, 2, 3, 4, 5]) for number in range(3)]
