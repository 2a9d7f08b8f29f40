"""What a person sees: every start and end, epochs of long trials, and a time left that start-up does not distort."""

import fcntl
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cxr_models.storage import written_whole
from cxr_models.trial import METRICS, Diagnosis, EpochMetrics, Objective, Outcome, Suggestion, TrialConfig, TrialResult
from sweep import progress
from sweep.progress import LINE_INTERVAL_S, SweepProgress


class Sweep:
    """A sweep's progress on a console that is no terminal, with a clock of its own."""

    def __init__(self, trials: int, epochs: int, features: Path | None = None, *, terminal: bool = False) -> None:
        self.now = 0.0
        self.epochs = epochs
        self._file = io.StringIO()
        console = Console(file=self._file, width=200, force_terminal=terminal)
        objective = Objective("macro_f1", "max")
        self.told = SweepProgress(
            console, objective, trials=trials, max_epochs=epochs, gpus_per_trial=0, features=features
        )

    def trial(
        self,
        number: int,
        *,
        epoch_s: float,
        value: float = 0.5,
        outcome: Outcome = Outcome.COMPLETED,
        source: str = "pixels",
        doctor: tuple[Diagnosis, ...] = (),
    ) -> None:
        config = TrialConfig("vanilla_cnn", epochs=self.epochs, seed=number)
        self.told.started(Suggestion(number, f"t{number}", config))
        values = dict.fromkeys(METRICS, value)
        for epoch in range(1, self.epochs + 1):
            self.now += epoch_s
            self.told.epoch(EpochMetrics(f"t{number}", epoch, 0, 1e-3, values, values, epoch_s, 1.0, source=source))
        error = "it broke" if outcome is Outcome.FAILED else ""
        end = TrialResult(f"t{number}", config, outcome, epochs=self.epochs, best_epoch=1, val=values, error=error)
        self.told.ended(number, replace(end, doctor=doctor))

    @property
    def lines(self) -> list[str]:
        return self._file.getvalue().splitlines()


@pytest.fixture
def sweep(monkeypatch):
    def make(trials: int, epochs: int, features: Path | None = None, *, terminal: bool = False) -> Sweep:
        made = Sweep(trials, epochs, features, terminal=terminal)
        monkeypatch.setattr(progress.time, "monotonic", lambda: made.now)
        return made

    return make


def test_short_trials_have_a_line_at_their_start_and_two_at_their_end(sweep):
    shown = sweep(3, 20)
    for number in range(3):
        shown.trial(number, epoch_s=0.01)
    assert len(shown.lines) == 9
    assert not [line for line in shown.lines if re.search(r"epoch \d+:", line)]


def test_a_long_trial_tells_its_epochs_every_few_seconds(sweep):
    shown = sweep(1, 12)
    shown.trial(0, epoch_s=LINE_INTERVAL_S / 4)
    assert re.findall(r"epoch (\d+):", "\n".join(shown.lines)) == ["4", "8", "12"]


def test_every_epoch_of_slow_ones_is_told(sweep):
    shown = sweep(1, 3)
    shown.trial(0, epoch_s=60.0)
    assert re.findall(r"epoch (\d+):", "\n".join(shown.lines)) == ["1", "2", "3"]


def test_the_time_left_follows_the_pace_of_the_trials_not_of_the_start(sweep):
    shown = sweep(11, 10)
    shown.now = 100.0  # starting the workers
    for number in range(6):
        shown.trial(number, epoch_s=1.0)
    assert shown.lines[-1].startswith("6 of 11 trials ended (60 epochs), 6 completed")
    assert "about 50 s left" in shown.lines[-1]


def test_the_best_so_far_stands_with_what_the_doctor_found(sweep):
    shown = sweep(2, 1)
    shown.trial(0, epoch_s=1.0, doctor=(Diagnosis("loss_at_chance", True, "a", "b"),))
    assert shown.lines[-2].endswith("after 1 epoch: val macro_f1 0.500 (loss_at_chance)")
    assert "best val macro_f1 0.500 (loss_at_chance)" in shown.lines[-1]
    shown.trial(1, epoch_s=1.0, value=0.6)
    assert "best val macro_f1 0.600" in shown.lines[-1]
    assert "loss_at_chance" not in shown.lines[-1]


def test_the_best_is_that_of_trials_that_may_rank(sweep):
    shown = sweep(4, 1)
    shown.trial(0, epoch_s=1.0, value=0.6)
    shown.trial(1, epoch_s=1.0, value=0.9, outcome=Outcome.FAILED)
    shown.trial(2, epoch_s=1.0, value=float("nan"))
    assert "2 completed, 1 failed, best val macro_f1 0.600" in shown.lines[-1]
    shown.trial(3, epoch_s=1.0, value=0.7)
    assert "best val macro_f1 0.700" in shown.lines[-1]


class Pass:
    """An extraction of 20 parts as it lies in the store; in the hands of a worker while `worked_at`."""

    def __init__(self, folder: Path, digest: str, title: str) -> None:
        self._folder = folder / digest
        self._folder.mkdir(parents=True)
        (self._folder / "pass.json").write_text(json.dumps({"title": title, "cuts": [["cut", "", [4], []]]}))
        self._file = (self._folder / "cut.f32.partial").open("wb")
        self.done(0)

    def worked_at(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def left(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def done(self, parts: int) -> None:
        with written_whole(self._folder / "pass.done") as scratch:
            scratch.write_bytes(bytes([1] * parts + [0] * (20 - parts)))

    def ended(self) -> None:
        for path in self._folder.iterdir():
            path.unlink()

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def extraction(tmp_path) -> Iterator[Pass]:
    made = Pass(tmp_path / "features", "one", "resnet50")
    yield made
    made.close()


def wait_for(sweep: Sweep, text: str) -> None:
    end = time.perf_counter() + 10
    while not any(text in line for line in sweep.lines):
        assert time.perf_counter() < end, sweep.lines
        time.sleep(0.01)


def test_features_being_computed_are_told_every_few_seconds(sweep, extraction, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.01)
    shown = sweep(1, 1, tmp_path / "features")
    extraction.worked_at()
    extraction.done(5)
    with shown.told.shown():
        wait_for(shown, "computing features of frozen layers (resnet50, up to cut): 25 %")
        shown.now += 100.0
        extraction.done(10)
        wait_for(shown, "(resnet50, up to cut): 50 %, about 3 min 20 s left")
    told = len(shown.lines)
    time.sleep(0.05)
    assert len(shown.lines) == told, "told after the trials"
    assert all(line.startswith("computing features of frozen layers (resnet50") for line in shown.lines)


def test_a_second_pass_has_a_pace_of_its_own(sweep, extraction, tmp_path):
    shown = sweep(1, 1, tmp_path / "features", terminal=True)
    extraction.worked_at()
    for parts in (0, 10):
        extraction.done(parts)
        drawn(shown)
        shown.now += 100.0
    second = Pass(tmp_path / "features", "two", "xception")
    second.worked_at()
    second.done(4)
    drawn(shown)
    shown.now += 10.0
    second.done(6)
    assert "(xception, up to cut): 30 %, about 1 min 10 s left" in drawn(shown)
    assert "(resnet50, up to cut): 50 %, about 3 min 30 s left" in drawn(shown)
    second.close()


def test_features_being_computed_are_shown_in_the_table(sweep, extraction, tmp_path):
    shown = sweep(1, 1, tmp_path / "features", terminal=True)
    extraction.done(9)
    assert "computing" not in drawn(shown), "left behind by a sweep that died"
    extraction.worked_at()
    assert "computing features of frozen layers (resnet50, up to cut): 45 %" in drawn(shown)
    extraction.left()
    extraction.ended()
    assert "computing" not in drawn(shown)


def drawn(sweep: Sweep) -> str:
    """The live table as a terminal has it at this moment."""
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(sweep.told._table())
    return console.export_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_without_features_no_thread_asks_for_them(sweep, terminal):
    shown = sweep(1, 1, terminal=terminal)
    with shown.told.shown():
        assert not [thread for thread in threading.enumerate() if thread.name == "extraction-progress"]
        assert "computing" not in drawn(shown)


def test_why_trials_run_from_the_pixels_is_told_once_for_each_reason(sweep):
    shown = sweep(5, 2)
    full, used = "the cache may take 1 MB", "2 MB of the cache are in use"
    for number, source in enumerate(
        ("pixels", f"pixels: {full}", "block_12_add", f"pixels: {full}", f"pixels: {used}")
    ):
        shown.trial(number, epoch_s=0.01, source=source)
    notes = [line for line in shown.lines if line.startswith("note: ")]
    assert notes == [f"note: trial 2 runs from the pixels: {full}", f"note: trial 5 runs from the pixels: {used}"]
