"""The child process: trains as the parent would, and dies without harm."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cxr_models.backbones import BACKBONES
from cxr_models.trial import EpochMetrics, TrialConfig
from sweep import worker
from sweep.worker import Fault, TrialEnd, TrialJob, TrialProcess, failure, load_program
from tests.programs import ODD_ONE, job, value_of
from tests.trainings import images_of, in_workers, keeping
from tests.trainings import job as real_job

ROOT = Path(__file__).parent.parent


@pytest.fixture
def process(tmp_path) -> Iterator[TrialProcess]:
    found = TrialProcess(tmp_path / "logs" / "worker.log", preload=())
    yield found
    found.close()


def run(process: TrialProcess, job: TrialJob) -> tuple[list[EpochMetrics], TrialEnd]:
    process.start(job)
    events = process.next()
    while not isinstance(events[-1], TrialEnd):
        events += process.next()
    *epochs, end = events
    return epochs, end


def numbers(events: list[EpochMetrics | TrialEnd]) -> list[int | str]:
    return [event.epoch if isinstance(event, EpochMetrics) else event.error or "end" for event in events]


def begun(job: TrialJob) -> list[int]:
    """The epochs a `noting` program has begun."""
    notes = job.folder / "begun"
    return [int(line) for line in notes.read_text().split()] if notes.exists() else []


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one whose end nobody has asked for yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children() -> set[int]:
    """Living processes below this one that the test has started, without multiprocessing's own two servers."""
    return below() - servers() - _older


def below() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if alive(child)}


@pytest.fixture(autouse=True)
def _children_of_other_tests() -> None:
    """Files before this one may keep a driver of their own until the session ends."""
    _older.clear()
    _older.update(below())


_older: set[int] = set()


def servers() -> set[int]:
    from multiprocessing.forkserver import _forkserver
    from multiprocessing.resource_tracker import _resource_tracker

    return {_forkserver._forkserver_pid, _resource_tracker._pid}


def python(code: str, **environment: str) -> dict:
    """Run a program of its own, with a fork server of its own; returns the JSON it prints last."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


class TestTrials:
    def test_one_child_runs_one_trial_after_another(self, process, tmp_path):
        pids = set()
        for seed in range(4):
            epochs, end = run(process, job(tmp_path, "quick", seed))
            assert end == TrialEnd()
            assert [metrics.epoch for metrics in epochs] == [1, 2, 3]
            assert [metrics.val["macro_f1"] for metrics in epochs] == [value_of(seed, epoch) for epoch in (1, 2, 3)]
            pids |= {int(metrics.val["pid"]) for metrics in epochs}
        assert len(pids) == 1
        assert os.getpid() not in pids

    def test_an_exception_ends_the_trial_only(self, process, tmp_path):
        epochs, end = run(process, job(tmp_path, "raising", ODD_ONE))
        assert len(epochs) == 1
        assert end.error == "ValueError: no such luck"
        assert "and more of it" in end.traceback
        assert "programs.py" in end.traceback
        again, end = run(process, job(tmp_path, "raising", 0))
        assert end == TrialEnd()
        assert again[0].val["pid"] == epochs[0].val["pid"]

    def test_a_program_that_does_not_exist(self, process, tmp_path):
        _, end = run(process, job(tmp_path, "nowhere"))
        assert end.error.startswith("AttributeError: module 'tests.programs' has no attribute 'nowhere'")

    @pytest.mark.parametrize(
        ("program", "error"), [("truncated_file", "EOFError"), ("lost_server", "ConnectionResetError")]
    )
    def test_an_error_of_the_program_is_not_taken_for_one_of_the_pipe(self, program, error, process, tmp_path):
        _, end = run(process, job(tmp_path, program))
        assert end.error == f"{error}: of the program"
        assert "programs.py" in end.traceback

    def test_a_killed_child_is_an_error_and_the_next_trial_works(self, process, tmp_path):
        epochs, end = run(process, job(tmp_path, "killed", ODD_ONE))
        assert len(epochs) == 1
        assert "was killed by SIGKILL; the system may have run out of memory" in end.error
        assert "worker.log" in end.error
        assert run(process, job(tmp_path, "killed", 0))[1] == TrialEnd()

    def test_a_child_that_leaves(self, process, tmp_path):
        _, end = run(process, job(tmp_path, "exiting"))
        assert "the trial's process exited with 3" in end.error
        assert run(process, job(tmp_path, "quick"))[1] == TrialEnd()

    def test_what_libraries_print_goes_to_the_log(self, process, tmp_path, capfd):
        run(process, job(tmp_path, "talking"))
        assert (tmp_path / "logs" / "worker.log").read_text().split() == ["python", "descriptor"]
        assert capfd.readouterr() == ("", "")


class TestEpochs:
    """The child waits only where something is decided."""

    def test_it_trains_on_while_nobody_asks(self, process, tmp_path):
        noting = job(tmp_path, "noting", epochs=30)
        process.start(noting)
        deadline = time.monotonic() + 30
        while len(begun(noting)) < 30 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert begun(noting) == list(range(1, 31))
        assert numbers(process.next()) == [*range(1, 31), "end"]

    def test_it_waits_for_a_decision(self, process, tmp_path):
        noting = job(tmp_path, "noting", epochs=6, decisions=(2, 4))
        process.start(noting)
        assert numbers(process.next()) == [1, 2]
        time.sleep(0.1)
        assert begun(noting) == [1, 2]
        assert numbers(process.next()) == [3, 4]
        assert numbers(process.next()) == [5, 6, "end"]

    def test_after_its_own_last_epoch_nothing_is_decided(self, process, tmp_path):
        process.start(job(tmp_path, "quick", epochs=3, decisions=(3,)))
        assert numbers(process.next()) == [1, 2, 3, "end"]

    def test_an_epoch_is_not_held_back_for_the_next(self, process, tmp_path):
        """The second epoch never comes; the first must be told all the same."""
        process.start(job(tmp_path, "hanging"))
        start = time.monotonic()
        assert numbers(process.next()) == [1]
        assert time.monotonic() - start < 30

    def test_epochs_before_a_crash_are_told(self, process, tmp_path):
        process.start(job(tmp_path, "exiting"))
        first, end = process.next()
        assert first.epoch == 1
        assert "exited with 3" in end.error
        assert process.next() == [TrialEnd("the trial was not started", fault=Fault.LOST)]


def test_a_trial_that_had_too_little_memory_leaves_the_next_a_fresh_process(process, tmp_path):
    starved = job(tmp_path, "greedy")
    _, end = run(process, replace(starved, config=replace(starved.config, batch_size=64)))
    assert end.fault is Fault.NO_MEMORY
    assert process._process is None, "killed, with what it held of the device"
    epochs, end = run(process, replace(starved, config=replace(starved.config, batch_size=8)))
    assert (len(epochs), end) == (3, TrialEnd())


class TestStop:
    def test_at_a_decision(self, process, tmp_path):
        noting = job(tmp_path, "noting", 0, decisions=(1,))
        process.start(noting)
        (first,) = process.next()
        process.stop()
        epochs, end = run(process, job(tmp_path, "quick", 1))
        assert end == TrialEnd()
        assert [metrics.trial_id for metrics in epochs] == ["t1"] * 3
        assert epochs[0].val["pid"] == first.val["pid"]
        assert begun(noting) == [1]

    def test_a_new_trial_stops_the_running_one(self, process, tmp_path):
        process.start(job(tmp_path, "quick", 0, decisions=(1,)))
        process.next()
        epochs, _ = run(process, job(tmp_path, "quick", 1))
        assert [(metrics.trial_id, metrics.epoch) for metrics in epochs] == [("t1", 1), ("t1", 2), ("t1", 3)]

    def test_before_the_first_epoch(self, process, tmp_path):
        """The stopped trial's first epoch must not be taken for the next trial's."""
        process.start(job(tmp_path, "quick", 0))
        epochs, _ = run(process, job(tmp_path, "quick", 1))
        assert [(metrics.trial_id, metrics.epoch) for metrics in epochs] == [("t1", 1), ("t1", 2), ("t1", 3)]

    def test_between_epochs_the_child_hears_of_it(self, process, tmp_path, monkeypatch):
        monkeypatch.setattr(worker, "STOP_GRACE_S", 30)
        process.start(job(tmp_path, "brisk", 0, epochs=100_000))
        first = process.next()[0]
        process.stop()
        epochs, _ = run(process, job(tmp_path, "quick", 1))
        assert [(metrics.trial_id, metrics.epoch) for metrics in epochs] == [("t1", 1), ("t1", 2), ("t1", 3)]
        assert epochs[0].val["pid"] == first.val["pid"]

    def test_an_order_that_comes_after_the_end_is_not_for_the_next_trial(self, process, tmp_path):
        process.start(job(tmp_path, "noting", 0))
        while len(begun(job(tmp_path, "noting", 0))) < 3:
            time.sleep(0.01)
        time.sleep(0.1)
        process.stop()
        for seed in (1, 2):
            assert numbers(run(process, job(tmp_path, "quick", seed))[0]) == [1, 2, 3]

    def test_a_child_in_the_middle_of_an_epoch_is_killed(self, process, tmp_path):
        process.start(job(tmp_path, "hanging"))
        process.next()
        process.stop()
        assert not children()
        assert run(process, job(tmp_path, "quick"))[1] == TrialEnd()

    def test_a_child_that_does_not_listen_is_killed(self, process, tmp_path, monkeypatch):
        monkeypatch.setattr(worker, "STOP_TIMEOUT_S", 0.2)
        process.start(job(tmp_path, "hanging", decisions=(1,)))
        process.next()
        process.stop()
        assert not children()
        assert run(process, job(tmp_path, "quick"))[1] == TrialEnd()

    def test_a_child_that_died_meanwhile(self, process, tmp_path):
        process.start(job(tmp_path, "quick", decisions=(1,)))
        (first,) = process.next()
        psutil.Process(int(first.val["pid"])).kill()
        process.stop()
        assert run(process, job(tmp_path, "quick"))[1] == TrialEnd()

    def test_without_a_trial(self, process):
        process.stop()
        assert process.next() == [TrialEnd("the trial was not started", fault=Fault.LOST)]


class TestChild:
    def test_nothing_is_left_after_closing(self, process, tmp_path):
        process.start(job(tmp_path, "quick"))
        first = process.next()[0]
        assert children() == {int(first.val["pid"])}
        process.close()
        assert not children()
        process.close()

    def test_a_child_that_grew_is_replaced_before_its_next_trial(self, process, tmp_path):
        pids = []
        for bound in (1024**3, 1024**3, 1024**2):
            trial = job(tmp_path, "quick")
            trial = replace(trial, work=replace(trial.work, memory_bound_bytes=bound))
            pids.append(run(process, trial)[0][0].val["pid"])
        assert pids[0] == pids[1] != pids[2]
        assert children() == {int(pids[2])}

    def test_it_dies_with_its_parent(self, tmp_path):
        """The parent is killed while its child sleeps, and cannot clean up."""
        code = f"""
            import json, os
            from pathlib import Path
            from sweep.worker import TrialProcess
            from tests.programs import job
            process = TrialProcess(Path({str(tmp_path / "log")!r}), preload=())
            process.start(job(Path({str(tmp_path)!r}), "hanging"))
            print(json.dumps({{"pid": process.next()[0].val["pid"]}}), flush=True)
            process.next()
        """
        parent = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        child = psutil.Process(json.loads(parent.stdout.readline())["pid"])
        assert alive(child)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        while alive(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(child)

    @pytest.mark.parametrize("visible", ["", "2,3"])
    def test_it_sees_the_devices_its_parent_was_given(self, visible, tmp_path):
        code = f"""
            import json
            from pathlib import Path
            from sweep.worker import TrialProcess
            from tests.programs import job
            process = TrialProcess(Path({str(tmp_path / "log")!r}), preload=())
            process.start(job(Path({str(tmp_path)!r}), "quick"))
            print(json.dumps({{"device": process.next()[0].device}}))
            process.close()
        """
        assert python(code, CUDA_VISIBLE_DEVICES=visible) == {"device": f"GPU {visible}"}


def test_a_real_training_in_the_child_gives_the_same_bits(tmp_path):
    """Metrics and scores of a tiny network, once in the child and once in the parent itself."""
    code = f"""
        import json
        from dataclasses import replace
        from pathlib import Path
        import numpy as np
        from cxr_models.trial import EpochMetrics, Objective, TrialConfig, TrialData, VALIDATION_SCORES
        from sweep.worker import TrialJob, TrialProcess, Work, train

        folder = Path({str(tmp_path)!r})
        pixels = np.random.default_rng(0).integers(0, 256, (24, 70, 70, 1)).astype(np.uint8)
        np.save(folder / "pixels.npy", pixels)
        labels = (np.arange(24) % 2).astype(np.int32)
        data = TrialData(("a", "b"), labels, np.arange(16), np.arange(16, 24), 1, {{70: folder / "pixels.npy"}})
        config = TrialConfig(
            "vanilla_cnn", image_side=70, freeze="none", dropout=0.3, hidden_units=(8,), batch_size=6, epochs=2
        )
        def told(metrics):
            return {{"train": dict(metrics.train), "val": dict(metrics.val)}}
        def job(name):
            return TrialJob("t", config, Work(data, Objective("loss", "min"), folder / name, threads=1))
        def scores(name):
            return np.load(folder / name / "t" / VALIDATION_SCORES)["scores"].tolist()

        process = TrialProcess(folder / "log", preload=())
        process.start(job("child"))
        events = process.next()
        while isinstance(events[-1], EpochMetrics):
            events += process.next()
        child = [told(event) for event in events[:-1]]
        process.close()
        epochs = train(job("inline"))
        inline = [told(next(epochs)), told(epochs.send(True))]
        print(json.dumps({{"child": child, "inline": inline, "end": events[-1].error,
                          "scores": [scores("child"), scores("inline")]}}))
    """
    found = python(code, CUDA_VISIBLE_DEVICES="")
    assert found["end"] == ""
    assert len(found["child"]) == 2
    assert found["child"] == found["inline"]
    assert found["scores"][0] == found["scores"][1]


@pytest.fixture(scope="module")
def fifty(tmp_path_factory) -> list[dict]:
    """Records of fifty real trials of one worker, and of a last one for which the child has grown too large."""
    folder = tmp_path_factory.mktemp("fifty")
    base = TrialConfig("mobilenet_v2_0.35", weights="bundled", image_side=32, freeze="all", batch_size=8, epochs=2)
    configs = [
        replace(
            base, learning_rate=0.001 * (1 + number), dropout=0.01 * number, weight_decay=0.01 * number, seed=number
        )
        for number in range(50)
    ]
    configs = [replace(config, freeze="convs:1") if config.seed % 5 == 4 else config for config in configs]
    weights = {(base.backbone, "bundled", 32): BACKBONES[base.backbone].bundled_path}
    data = replace(images_of(folder, 32, train=24, val=16), weights=weights)
    data = keeping(data, configs, folder / "features")
    jobs = [real_job(str(number), config, data, folder) for number, config in enumerate(configs)]
    jobs.append(real_job("50", configs[-1], data, folder, memory_bound_bytes=100 * 1024**2))
    (records,) = in_workers(folder, [jobs])
    return list(records.values())


@pytest.mark.slow
class TestFiftyTrials:
    """Measured: 459 MB after the tenth, 464 MB after the last; a child that builds a network a trial grows by 50 MB."""

    def test_the_child_does_not_grow(self, fifty):
        resident = [record["resident_bytes"] for record in fifty[:50]]
        assert max(resident[10:]) - resident[9] < 50 * 1024**2
        assert len({record["pid"] for record in fifty[:50]}) == 1

    def test_each_kind_is_compiled_once(self, fifty):
        compiled = [number for number, record in enumerate(fifty[:50]) if record["counted"]["train_traces"]]
        assert compiled == [0, 4]

    def test_a_child_above_the_bound_is_replaced_and_gives_the_same(self, fifty):
        *_, before, last = fifty
        assert last["pid"] != before["pid"]
        assert (last["epochs"], last["weights"]) == (before["epochs"], before["weights"])


class TestFailure:
    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (ValueError("one\ntwo"), "ValueError: one"),
            (ValueError("\n  one"), "ValueError: one"),
            (KeyError("axis"), "KeyError: 'axis'"),
            (MemoryError(), "MemoryError"),
        ],
    )
    def test_one_line(self, error, line):
        assert failure(error).error == line


def test_a_program_by_name():
    assert load_program("sweep.worker:train") is worker.train
