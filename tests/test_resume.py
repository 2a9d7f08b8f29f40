"""A sweep that goes on is the one it was, wherever it was cut short."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image

from cxr_models.trial import EpochMetrics, Outcome, Suggestion, TrialResult
from sweep.machine import Machine, Node
from sweep.plan import Plan, make_plan
from sweep.record import Past, Record, RecordDamaged, RunFolder, read_lines
from sweep.resume import (
    ResumeRefused,
    Session,
    SessionEnd,
    Sessions,
    begin_session,
    continued,
    recorded_name,
)
from sweep.runner import Conductor, run_inline
from sweep.session import write_inputs
from sweep.spec import read_spec
from sweep.worker import Fault, TrialEnd, TrialEvents, TrialJob
from tests import layouts
from tests.programs import ODD_ONE, measured
from tests.sweeps import fake_sweep

SPACE = """\
name: space
data: {data}
objective: macro_f1
search: {{trials: 2}}
space:
  backbone: mobilenet_v2_0.35
  weights: bundled
  image_side: 96
  epochs: 2
"""
TRIALS, EPOCHS, RUNGS = 14, 4, (2, 3)


class Cut(BaseException):
    """The driver dies."""


class Recorded:
    """Writes down what it hears as a sweep does, and dies after so many entries."""

    def __init__(self, folder: RunFolder, conductor: Conductor, dies_after: int | None = None) -> None:
        self.record = Record(folder, conductor.work.objective)
        self.left = dies_after

    def _written(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Cut

    def started(self, suggestion: Suggestion) -> None:
        self._written()
        self.record.started(suggestion)

    def epoch(self, metrics: EpochMetrics) -> None:
        self._written()
        self.record.epoch(metrics)

    def ended(self, number: int, result: TrialResult) -> None:
        self._written()
        self.record.ended(number, result)


def run_two_at_once(conductor: Conductor) -> None:
    """Two trials take turns, as on two workers that are exactly as fast."""
    running: list[tuple[TrialJob, TrialEvents, EpochMetrics | TrialEnd]] = []
    while True:
        while len(running) < 2 and isinstance(job := conductor.next_job(), TrialJob):
            trial = TrialEvents(job)
            running.append((job, trial, trial.begin()))
        if not running:
            return
        job, trial, event = running.pop(0)
        if isinstance(event, TrialEnd):
            conductor.ended(job.trial_id, event)
        elif conductor.epoch(event):
            running.append((job, trial, trial.answer(True)))


Runs = Callable[[Conductor], None]


def session(
    tmp_path: Path, algorithm: str, runs: Runs, *, dies_after: int | None = None, stages: tuple[int, ...] = (TRIALS,)
) -> bool:
    """One session of the sweep in the folder; whether it came to its end."""
    folder = RunFolder(tmp_path)
    folder.state.mkdir(parents=True, exist_ok=True)
    resumed = folder.suggestion_record.exists() or folder.study.exists()
    conductor, _ = fake_sweep(
        tmp_path,
        "raising",
        trials=stages[-1],
        seeds=TRIALS,
        epochs=EPOCHS,
        rungs=RUNGS,
        algorithm=algorithm,
        journal=folder.study,
        resumed=resumed,
        stages=stages,
    )
    listener = Recorded(folder, conductor, dies_after)
    conductor._listeners = [listener]
    try:
        assert conductor.resume(listener.record.past), "the sampler goes on as if it had never stopped"
        runs(conductor)
    except Cut:
        return False
    conductor.close()
    return True


def told(tmp_path: Path) -> dict[str, object]:
    """All that a sweep has on record."""
    folder = RunFolder(tmp_path)

    def without_times(entry: dict) -> dict:
        unequal = ("train_seconds", "ended_ms", "traceback", "device")
        return {name: value for name, value in entry.items() if name not in unequal}

    def epoch(entry: dict) -> tuple:
        return entry["trial_id"], entry["epoch"], entry["val"]["macro_f1"]

    study = optuna.load_study(study_name="fake", storage=JournalStorage(JournalFileBackend(str(folder.study))))
    return {
        "suggestions": list(read_lines(folder.suggestion_record)),
        "epochs": sorted(map(epoch, read_lines(folder.epoch_record))),
        "trials": sorted(map(without_times, read_lines(folder.trial_record)), key=lambda entry: entry["number"]),
        "rungs": sorted(map(json.dumps, read_lines(folder.halving))),
        "study": [
            (trial.number, trial.state, trial.value, trial.params, trial.intermediate_values) for trial in study.trials
        ],
    }


@pytest.mark.parametrize("algorithm", ["tpe", "random", "grid"])
@pytest.mark.parametrize("runs", [run_inline, run_two_at_once])
def test_cut_after_any_entry_of_its_record_it_is_the_same_sweep(algorithm, runs, tmp_path):
    """Suggestions, epochs, ends, rungs and the study; each trial and each epoch on record once."""
    assert session(tmp_path / "whole", algorithm, runs)
    whole = told(tmp_path / "whole")
    assert {entry["outcome"] for entry in whole["trials"]} == {"completed", "stopped_early", "failed"}
    entries = len(whole["suggestions"]) + len(whole["epochs"]) + len(whole["trials"])
    for after in range(0, entries, 5 if runs is run_inline else 7):
        folder = tmp_path / f"{after}"
        assert not session(folder, algorithm, runs, dies_after=after)
        assert session(folder, algorithm, runs)
        found = told(folder)
        if runs is run_inline:  # at once, trials that go on change their turns, and rungs may see them in another order
            assert found == whole, f"cut after {after} entries"
        ids = [entry["trial_id"] for entry in found["trials"]]
        assert len(ids) == len(set(ids)) == TRIALS
        assert len({entry[:2] for entry in found["epochs"]}) == len(found["epochs"])


def test_cut_again_and_again_it_is_the_same_sweep(tmp_path):
    assert session(tmp_path / "whole", "tpe", run_inline)
    sessions = 0
    while not session(tmp_path / "cut", "tpe", run_inline, dies_after=3):
        sessions += 1
    assert sessions > 10
    assert told(tmp_path / "cut") == told(tmp_path / "whole")


@pytest.mark.parametrize("algorithm", ["tpe", "random", "grid"])
def test_a_sweep_that_grows_begins_as_it_was(algorithm, tmp_path):
    assert session(tmp_path, algorithm, run_inline, stages=(6,))
    small = told(tmp_path)
    assert not session(tmp_path, algorithm, run_inline, stages=(6, TRIALS), dies_after=7)
    assert session(tmp_path, algorithm, run_inline, stages=(6, TRIALS))
    grown = told(tmp_path)
    assert grown["suggestions"][:6] == small["suggestions"]
    assert grown["trials"][:6] == small["trials"]
    assert len(grown["trials"]) == TRIALS
    assert len({entry["trial_id"] for entry in grown["trials"]}) == TRIALS


def test_lines_that_were_cut_short_are_forgotten(tmp_path):
    assert session(tmp_path / "whole", "tpe", run_inline)
    folder = RunFolder(tmp_path / "cut")
    assert not session(folder.path, "tpe", run_inline, dies_after=30)
    for path in (folder.suggestion_record, folder.epoch_record, folder.trial_record, folder.halving, folder.study):
        with path.open("a") as file:
            file.write('{"trial_id": "half of a li')
    assert session(folder.path, "tpe", run_inline)
    assert told(folder.path) == told(tmp_path / "whole")


def test_a_record_damaged_in_its_middle_is_refused_by_file_and_line(tmp_path):
    folder = RunFolder(tmp_path / "cut")
    assert not session(folder.path, "tpe", run_inline, dies_after=30)
    whole = folder.epoch_record.read_bytes()
    for damage in (b"\xff" * 9, b"7", b"{"):
        first, rest = whole.split(b"\n", 1)
        folder.epoch_record.write_bytes(first + b"\n" + damage + b"\n" + rest)
        with pytest.raises(RecordDamaged, match=r"epochs\.jsonl, line 2: expected a JSON object, .* from a copy"):
            session(folder.path, "tpe", run_inline)


def test_a_damaged_study_is_written_anew_from_the_record(tmp_path):
    assert session(tmp_path / "whole", "tpe", run_inline)
    folder = RunFolder(tmp_path / "cut")
    assert not session(folder.path, "tpe", run_inline, dies_after=40)
    lines = folder.study.read_text().splitlines(keepends=True)
    folder.study.write_text("".join([*lines[:5], "\0\0\0\n", *lines[6:]]))
    assert session(folder.path, "tpe", run_inline)
    assert told(folder.path)["study"] == told(tmp_path / "whole")["study"]
    assert folder.study.with_name("study.journal.damaged").is_file()


def test_a_lock_of_a_killed_writer_holds_nobody_up(tmp_path):
    folder = RunFolder(tmp_path)
    assert not session(tmp_path, "tpe", run_inline, dies_after=9)
    folder.study.with_name("study.journal.lock").symlink_to(folder.study)
    assert session(tmp_path, "tpe", run_inline)


def test_other_versions_keep_the_trials_of_the_record(tmp_path):
    """A sampler that draws other numbers: what has run stays what it was."""
    conductor, _ = fake_sweep(tmp_path / "then", "quick", trials=6, algorithm="tpe")
    suggestions = []
    while isinstance(job := conductor.next_job(), TrialJob):
        suggestions.append(job)
        conductor.epoch(measured(job, 1, 0.5))
        conductor.ended(job.trial_id, TrialEnd())
        if len(suggestions) == 4:
            break
    begun = [(Suggestion(number, job.trial_id, job.config), number) for number, job in enumerate(suggestions)]
    ended = [
        (number, TrialResult(job.trial_id, job.config, Outcome.COMPLETED, 1, 1, {"macro_f1": 0.5}))
        for number, job in enumerate(suggestions)
    ]
    now, _ = fake_sweep(tmp_path / "now", "quick", trials=6, algorithm="tpe")
    draw = now._search._model.draw
    draws = []

    def otherwise(point=None):
        draws.append(point)
        return draw(point if point or len(draws) != 3 else {"seed": (suggestions[2].config.seed + 1) % 6})

    now._search._model.draw = otherwise
    assert not now.resume(Past(begun, ended))
    job = now.next_job()
    assert isinstance(job, TrialJob)
    assert [each.config for each in suggestions] == [result.config for _, result in ended]


def test_a_trial_whose_rung_was_not_answered_is_judged_before_it_goes_on(tmp_path):
    conductor, heard = fake_sweep(tmp_path, "quick", trials=3, epochs=4, rungs=(1,))
    jobs = [conductor.next_job() for _ in range(2)]
    first = [measured(jobs[0], 1, 0.9)]
    second = [measured(jobs[1], 1, 0.1)]
    begun = [(Suggestion(number, job.trial_id, job.config), 0) for number, job in enumerate(jobs)]
    now, heard = fake_sweep(tmp_path / "now", "quick", trials=3, epochs=4, rungs=(1,))
    now.resume(Past(begun, [], {jobs[0].trial_id: first, jobs[1].trial_id: second}))
    assert [(number, result.outcome) for number, result in heard.results.items()] == [(1, Outcome.STOPPED_EARLY)]
    again = now.next_job()
    assert (again.trial_id, again.known) == (jobs[0].trial_id, 1)


def test_epochs_that_are_trained_again_are_recorded_once(tmp_path):
    conductor, heard = fake_sweep(tmp_path, "quick", trials=1, epochs=4)
    job = conductor.next_job()
    assert all(conductor.epoch(measured(job, epoch, 0.5)) for epoch in (1, 2, 1, 2, 3))
    assert [metrics.epoch for metrics in heard.epochs] == [1, 2, 3]


class TestSessions:
    def test_none(self, tmp_path):
        sessions = Sessions.read(RunFolder(tmp_path))
        assert sessions.past == ()
        assert sessions.stages(5) == [5]
        assert not sessions.is_done(5)

    def test_a_killed_one_has_no_end_and_trials_only_grow(self, tmp_path):
        (tmp_path / "state").mkdir()
        folder = RunFolder(tmp_path)
        facts = {"trials": 5, "threads": 2, "versions": {"numpy": "1.0"}, "files": {"weights": ["abc/w.h5"]}}
        lines = [
            {"begun": "2026-01-01", "process": 1, **facts},
            {"begun": "2026-01-02", "process": 2, **facts},
            {"ended": "done", "at": "2026-01-02"},
        ]
        folder.sessions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sessions = Sessions.read(folder)
        assert sessions.past == (
            Session(end=None, **facts),
            Session(end=SessionEnd.DONE, **facts),
        )
        assert sessions.is_done(5)
        assert not sessions.is_done(6)
        assert sessions.stages(9) == [5, 9]
        assert all("numpy 1.0, now it is" in note for note in sessions.notes())
        assert sessions.notes()


class TestRetries:
    def test_a_lost_trial_goes_on_from_its_last_epoch_twice_then_fails(self, tmp_path):
        notes: list[tuple[str, int]] = []
        conductor, heard = fake_sweep(
            tmp_path, "quick", trials=1, retried=lambda trial_id, end, epochs: notes.append((end.error, epochs))
        )
        job = conductor.next_job()
        conductor.epoch(measured(job, 1, 0.5))
        for _ in range(2):
            conductor.ended(job.trial_id, TrialEnd("killed", fault=Fault.LOST))
            job = conductor.next_job()
            assert job.known == 1
        conductor.ended(job.trial_id, TrialEnd("killed", fault=Fault.LOST))
        assert heard.results[0].error == "killed; so were 2 earlier attempts"
        assert notes == [("killed", 1)] * 2
        assert conductor.next_job() is None

    def test_a_preempted_node_does_not_count(self, tmp_path):
        conductor, _ = fake_sweep(tmp_path, "quick", trials=1)
        for _ in range(10):
            conductor.ended(conductor.next_job().trial_id, TrialEnd("spot", fault=Fault.PREEMPTED))
        assert isinstance(conductor.next_job(), TrialJob)

    def test_a_lost_trial_of_an_interrupted_sweep_stays_open(self, tmp_path):
        conductor, heard = fake_sweep(tmp_path, "quick", trials=1)
        job = conductor.next_job()
        conductor.interrupt()
        conductor.ended(job.trial_id, TrialEnd("killed", fault=Fault.LOST))
        assert heard.results == {}

    def test_what_does_not_fit_is_tried_alone_then_avoided(self, tmp_path):
        """Trials of the same network with as large a batch are not even begun."""
        sizes = (64, 32, 64, 128, 8)
        conductor, heard = fake_sweep(tmp_path, "greedy", trials=5, batch_sizes=sizes)
        run_inline(conductor)
        assert [heard.results[number].outcome for number in range(5)] == [
            Outcome.FAILED,
            Outcome.COMPLETED,
            Outcome.FAILED,
            Outcome.FAILED,
            Outcome.COMPLETED,
        ]
        assert "even alone on it: ResourceExhaustedError: OOM when allocating" in heard.results[0].error
        assert heard.results[2].error == (
            "does not fit into the device's memory: the same network did not in batches of 64; not tried"
        )
        states = [trial.state.name for trial in conductor._search._model._ended]
        assert states == ["PRUNED", "COMPLETE", "PRUNED", "PRUNED", "COMPLETE"], "TPE keeps away from them"

    def test_a_sweep_whose_first_trials_fail_alike_stops(self, tmp_path):
        conductor, heard = fake_sweep(tmp_path, "broken", trials=20)
        with pytest.raises(
            RuntimeError, match=r"first 3 trials failed .* alike; the others would, too: ImportError: libcudnn"
        ):
            run_inline(conductor)
        assert len(heard.results) == 3

    def test_it_goes_on_where_one_of_those_that_run_has_an_epoch(self, tmp_path):
        conductor, _ = fake_sweep(tmp_path, "quick", trials=9)
        jobs = [conductor.next_job() for _ in range(4)]
        for job in jobs[:3]:
            conductor.ended(job.trial_id, TrialEnd("no luck"))
        assert not isinstance(conductor.next_job(), TrialJob), "it waits for the fourth"
        conductor.epoch(measured(jobs[3], 1, 0.5))
        assert isinstance(conductor.next_job(), TrialJob)

    def test_what_does_not_fit_is_no_hopeless_start(self, tmp_path):
        conductor, heard = fake_sweep(tmp_path, "greedy", trials=5, batch_sizes=(64, 64, 64, 64, 8))
        run_inline(conductor)
        assert [heard.results[number].outcome for number in range(5)] == [Outcome.FAILED] * 4 + [Outcome.COMPLETED]

    def test_failures_that_differ_do_not_stop_it(self, tmp_path):
        conductor, heard = fake_sweep(tmp_path, "quick", trials=5)
        for number in range(5):
            conductor.ended(conductor.next_job().trial_id, TrialEnd(f"no luck {number}"))
        assert len(heard.results) == 5

    def test_a_full_disk_stops_the_sweep_and_keeps_the_trial(self, tmp_path):
        conductor, heard = fake_sweep(tmp_path, "without_space", trials=5)
        with pytest.raises(RuntimeError, match="No space left on device"):
            run_inline(conductor)
        assert ODD_ONE not in heard.by_seed
        assert conductor.running


class TestContinued:
    """Whether it is still the same sweep."""

    @pytest.fixture
    def plan(self, tmp_path: Path, cache_dir: Path):
        images = layouts.class_folders(tmp_path / "images")

        def make(*overrides: str, data: Path = images) -> Plan:
            file = tmp_path / "space.yaml"
            file.write_text(SPACE.format(data=data))
            machine = Machine((Node(cores=2, gpus=0, memory_bytes=8 * 2**30),))
            return make_plan(read_spec(file, overrides), machine, source=str(file), cache_dir=cache_dir)

        return make

    @pytest.fixture
    def begun(self, tmp_path, plan) -> RunFolder:
        folder = RunFolder.create(tmp_path / "runs", "space", exactly=True)
        first = plan()
        write_inputs(first, folder)
        begin_session(folder, first, first.trial_data({96: Path("pixels/abc-96px.npy")}, {}))
        assert recorded_name(folder) == "space"
        return folder

    def continued(self, plan: Plan, folder: RunFolder) -> Plan:
        return continued(plan, folder, Sessions.read(folder))

    def test_the_same_one_goes_on_with_as_many_threads_as_it_had(self, plan, begun):
        first = plan()
        assert self.continued(first, begun) == first
        more = self.continued(plan("resources.cpus_per_trial=2"), begun)
        assert (more.allotment.cpus_per_trial, more.allotment.threads) == (2, first.allotment.threads)

    def test_it_may_grow_and_its_images_may_have_moved(self, plan, begun, tmp_path):
        assert self.continued(plan("search.trials=9"), begun).spec.search.trials == 9
        shutil.move(tmp_path / "images", tmp_path / "elsewhere")
        assert (
            self.continued(plan(data=tmp_path / "elsewhere"), begun).manifest.digest
            == plan(data=tmp_path / "elsewhere").manifest.digest
        )

    @pytest.mark.parametrize(
        ("override", "difference"),
        [
            ("learning_rate=0.5", r"space\.learning_rate: was 0\.001, now it is 0\.5"),
            ("search.seed=7", r"search\.seed: was 0, now it is 7"),
            ("search.trials=1", r"search\.trials: was 2, now it is 1; a sweep can only grow"),
            ("dropout=0.5", r"space\.dropout: was .*, now it is 0\.5"),
            ("tracking.uri=http://localhost:5000", r"tracking\.uri: was not there, now it is 'http://localhost:5000'"),
        ],
    )
    def test_another_setting_is_refused_with_the_difference(self, override, difference, plan, begun):
        with pytest.raises(ResumeRefused, match=f"expected the settings and data .*{begun.path}(.|\n)*{difference}"):
            self.continued(plan(override), begun)

    def test_other_images_are_refused_by_name(self, plan, begun, tmp_path):
        folder = next(path for path in (tmp_path / "images").iterdir() if path.is_dir())
        first, second, third = sorted(folder.rglob("*.png"))[:3]
        first.unlink()
        shutil.copy(second, folder / "new.png")
        with Image.open(third) as image:
            turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(third)
        with pytest.raises(ResumeRefused) as refused:
            self.continued(plan(), begun)
        text = str(refused.value)
        assert f"{first.name}' gone" in text
        assert "new.png' new" in text
        assert f"{third.name}' with another picture" in text
        assert text.endswith("or begin anew without --resume, under another --name")

    def test_a_deleted_image_is_told_without_what_follows_from_it(self, plan, begun, tmp_path):
        deleted = sorted((tmp_path / "images").rglob("*.png"))[0]
        deleted.unlink()
        with pytest.raises(ResumeRefused, match=f"{deleted.name}' gone") as refused:
            self.continued(plan(), begun)
        assert "with another split" not in str(refused.value)

    def test_other_masks_or_weights_are_refused(self, plan, begun):
        sessions, now = Sessions.read(begun), plan()
        sessions.check_files(now.trial_data({96: Path("elsewhere/pixels/abc-96px.npy")}, {}))
        with pytest.raises(ResumeRefused, match="expected the images, masks that the sweep was begun with"):
            sessions.check_files(now.trial_data({96: Path("pixels/d-96px.npy")}, {}, masks={96: Path("masks/e.npy")}))
        with pytest.raises(ResumeRefused, match="expected the weights that"):
            sessions.check_files(now.trial_data({96: Path("pixels/abc-96px.npy")}, {("b", "w", 96): Path("f/w.h5")}))

    def test_a_folder_whose_spec_is_gone(self, plan, begun):
        begun.spec.write_text("- no\n- sweep\n")
        with pytest.raises(ResumeRefused, match=r"expected a sweep's settings in .*spec\.yaml"):
            self.continued(plan(), begun)


class TestLatest:
    def test_the_last_of_a_name_unless_it_is_named(self, tmp_path):
        folders = [RunFolder.create(tmp_path, "small", exactly=False) for _ in range(3)]
        assert RunFolder.latest(tmp_path, "small", exactly=False) == folders[2]
        assert RunFolder.latest(tmp_path, "small", exactly=True) == folders[0]
        assert RunFolder.latest(tmp_path, "small-2", exactly=True) == folders[1]
        shutil.rmtree(folders[1].path)
        assert RunFolder.latest(tmp_path, "small", exactly=False) == folders[2]

    def test_nothing_to_go_on_with(self, tmp_path):
        with pytest.raises(ValueError, match=r"expected the run folder of a sweep at .*small, but found nothing there"):
            RunFolder.latest(tmp_path, "small", exactly=False)
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / "notes.txt").touch()
        with pytest.raises(ValueError, match="found a folder that no sweep has made"):
            RunFolder.latest(tmp_path, "small", exactly=True)
