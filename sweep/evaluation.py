"""The final evaluation: the best trial of every strategy on all images, the sealed test set opened once for them all.

Everything that needs Keras runs in a child process; the driver's own never imports it.
"""

import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_models.calibration import Calibration, calibrate
from cxr_models.intervals import patient_intervals
from cxr_models.metrics import classification_report, confusion_matrix, evaluate_further
from cxr_models.storage import written_whole
from cxr_models.trial import METRICS, SPLITS, TEST, TRAIN, VAL, TrialConfig, TrialData, TrialResult
from sweep.machine import this_machine
from sweep.plan import Plan
from sweep.progress import EvaluationProgress
from sweep.record import RunFolder, append_line, best_by_strategy, write_json
from sweep.tracking import Tracker
from sweep.worker import redirect_output

CALL_TIMEOUT_S = 600.0
IMAGE_TIMEOUT_S = 1.0  # added for each image of a call; the largest backbones take less on one core

PartFigures = Mapping[str, Any]


class Call(Protocol):
    """Runs a function in a child process and returns what it returns."""

    def __call__(self, function: Any, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any: ...


@dataclass(frozen=True)
class Finalist:
    """What the child needs to rebuild the network of a strategy's best trial.

    Attributes:
        folder: where the trial left its best weights.
        threads: of the child.
    """

    config: TrialConfig
    folder: Path
    data: TrialData
    threads: int


class FinalEvaluation:
    """What the final evaluation has found so far; one that is cut short keeps it.

    Attributes:
        figures: trial -> part -> its figures, see `part_figures`.
        problems: trial -> why it has no figures.
        test: of the best trial, `summary.json`'s `test`; None where the test set stayed sealed or there is none.
        test_scores: trial -> its log-probabilities (images, classes) of `test_images`.
        calibration: trial -> what one temperature, fitted on the validation images, does to the test images.
        verdict: `summary.json`'s `verdict`; None before all strategies were evaluated.
    """

    def __init__(self, plan: Plan, folder: RunFolder) -> None:
        self._plan = plan
        self._folder = folder
        self._indices = np.concatenate([plan.indices(part) for part in (VAL, TEST, TRAIN)])
        self._parts = np.array([plan.splits[index] for index in self._indices])
        self._predictions: list[pd.DataFrame] = []
        self.figures: dict[str, dict[str, PartFigures]] = {}
        self.problems: dict[str, str] = {}
        self.test: dict[str, Any] | None = None
        self.test_scores: dict[str, NDArray[np.float32]] = {}
        self.calibration: dict[str, Calibration] = {}
        self.verdict: dict[str, Any] | None = None

    @property
    def indices(self) -> NDArray[np.int64]:
        """The images that are evaluated, in the order of the scores."""
        return self._indices

    @property
    def test_images(self) -> tuple[NDArray[np.int32], list[str]]:
        """Labels and patients of the test images."""
        labels, _, patients = self._of(TEST, np.zeros((len(self._indices), 0), np.float32))
        return labels, patients

    def add(self, result: TrialResult, scores: NDArray[np.float32]) -> None:
        """Take the log-probabilities (images, classes) of a trial, and write its predictions down."""
        self.figures[result.trial_id] = {
            part: self._figures(part, scores) for part in SPLITS if (self._parts == part).any()
        }
        if (self._parts == TEST).any():
            (val, test) = (self._of(part, scores)[:2] for part in (VAL, TEST))
            self.test_scores[result.trial_id] = test[1]
            self.calibration[result.trial_id] = calibrate(val, test)
        self._predictions.append(self._table(result, scores))
        with written_whole(self._folder.predictions) as scratch:
            pd.concat(self._predictions).to_parquet(scratch, index=False)

    def add_test(self, scores: NDArray[np.float32]) -> None:
        """Take the best trial's test figures with their 95 % intervals by patient, if there are test images."""
        labels, own, patients = self._of(TEST, scores)
        if not len(labels):
            return
        classes = self._plan.manifest.classes
        intervals = patient_intervals(labels, own, classes, patients, seed=self._plan.spec.search.seed)
        self.test = {
            **{name: asdict(interval) for name, interval in intervals.items()},
            "confusion_matrix": confusion_matrix(labels, own).astype(int).tolist(),
            "classes": list(classes),
            "images": len(labels),
            "patients": len(set(patients)),
        }

    def _figures(self, part: str, scores: NDArray[np.float32]) -> PartFigures:
        return part_figures(*self._of(part, scores), self._plan.manifest.classes)

    def _of(self, part: str, scores: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32], list[str]]:
        """Labels, scores and patients of a part's images."""
        mine = self._parts == part
        manifest, indices = self._plan.manifest, self._indices[mine]
        return manifest.labels[indices], scores[mine], [manifest.records[index].patient for index in indices]

    def _table(self, result: TrialResult, scores: NDArray[np.float32]) -> pd.DataFrame:
        manifest = self._plan.manifest
        records = [manifest.records[index] for index in self._indices]
        probabilities = np.exp(scores)
        return pd.DataFrame(
            {
                "trial_id": result.trial_id,
                "image": [record.path for record in records],
                "patient": [record.patient for record in records],
                "split": self._parts,
                "true": [record.label for record in records],
                "predicted": [manifest.classes[k] for k in scores.argmax(axis=1)],
                **{f"score:{name}": probabilities[:, k] for k, name in enumerate(manifest.classes)},
            }
        )


def part_figures(
    labels: NDArray[np.int32], scores: NDArray[np.float32], patients: Sequence[str], classes: Sequence[str]
) -> PartFigures:
    """The metrics of a part, its size, and `report`, as `metrics.classification_report` gives it."""
    return {
        **evaluate_further(labels, scores, classes),
        "images": len(labels),
        "patients": len(set(patients)),
        "report": classification_report(labels, scores, classes),
    }


def evaluate_finalists(
    plan: Plan,
    results: tuple[TrialResult, ...],
    folder: RunFolder,
    data: TrialData,
    tracker: Tracker,
    progress: EvaluationProgress,
    found: FinalEvaluation,
) -> None:
    """Evaluate the best trial of each strategy; save the best of all and register it.

    What is known is in `found` and on disk as soon as it is: a strategy that fails, or an interruption, leaves the
    others as they are.

    Raises:
        RuntimeError, TimeoutError: the best trial could not be evaluated; the others have been.
    """
    finalists = best_by_strategy(results, plan.spec.objective)
    threads = min(plan.allotment.threads * plan.allotment.concurrency, this_machine().cores)
    timeout_s = CALL_TIMEOUT_S + IMAGE_TIMEOUT_S * len(found.indices)
    failure: Exception | None = None
    with keras_child(folder.log("evaluation")) as call, progress:
        if len(plan.indices(TEST)):
            record_opening(folder, finalists)
        for number, result in enumerate(finalists, start=1):
            progress.begins(number, len(finalists), result, len(found.indices))
            best = result is finalists[0]
            finalist = Finalist(result.config, folder.trial(result.trial_id), data, threads)
            try:
                scores = call(best_scores, finalist, found.indices, folder.model if best else None, timeout_s=timeout_s)
            except (RuntimeError, TimeoutError) as error:
                found.problems[result.trial_id] = str(error)
                progress.failed(result, str(error))
                failure = failure or (error if best else None)
                continue
            with uninterrupted():
                if best:
                    found.add_test(scores)
                    _write_best_config(plan, result, data, folder)
                found.add(result, scores)
                tracker.evaluated(result.trial_id, _overall(found.figures[result.trial_id]))
            if best:
                progress.registers()
                register(plan, result, folder, data, tracker, call)
    if failure:
        raise failure


def _overall(parts: Mapping[str, PartFigures]) -> dict[str, dict[str, float]]:
    return {part: {name: figures[name] for name in METRICS} for part, figures in parts.items()}


def _write_best_config(plan: Plan, result: TrialResult, data: TrialData, folder: RunFolder) -> None:
    """All that is needed to use the model: an image's side and channels, and which class a probability belongs to."""
    shape = {"classes": list(plan.manifest.classes), "channels": data.channels}
    write_json(folder.best_config, {"trial_id": result.trial_id, **shape, **result.config.to_json()})


def register(plan: Plan, result: TrialResult, folder: RunFolder, data: TrialData, tracker: Tracker, call: Call) -> None:
    """Log the saved best model to MLflow and register it; a failure is noted, not raised."""
    if not tracker.parent_run_id:
        return
    # An image that trials saw.
    pixels = np.load(data.pictures(result.config), mmap_mode="r")
    example = pixels[data.val[:1]].astype(np.float32)
    try:
        call(register_champion, folder.model, example, tracker.uri, tracker.parent_run_id, plan.spec.name)
    except Exception as error:  # the model is in the run folder; MLflow's copy is a convenience
        tracker.note(f"the best model was not registered: {error}")


def record_opening(folder: RunFolder, finalists: Sequence[TrialResult]) -> None:
    """Note that the test set is about to be read, before it is, and by which trials; the best one comes first."""
    trials = [result.trial_id for result in finalists]
    append_line(folder.test_openings, {"opened": datetime.now(UTC).isoformat(), "trials": trials})


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let what has ended be written down; a second Ctrl-C would leave half of it."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def keras_child(log: Path) -> Iterator[Call]:
    """Yield `call(function, *arguments)`, which runs in one child process with its output in `log`.

    The child is killed at the end of the block, however it ends. A call that takes longer than its `timeout_s` raises
    `TimeoutError`, one that ends the child `RuntimeError`; the next call then has a new child. What the function
    raises is raised here as `RuntimeError`.
    """
    child = _Child(log)
    try:
        yield child.call
    finally:
        child.end()


class _Child:
    def __init__(self, log: Path) -> None:
        self._log = log
        self._running: tuple[SpawnProcess, Connection] | None = None

    def call(self, function: Any, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        _, connection = self._running = self._running or self._start()
        try:
            connection.send((function, arguments))
            if not connection.poll(timeout_s):
                self.end()
                raise TimeoutError(f"{function.__name__} took longer than {timeout_s:g} s; its output: {self._log}")
            answer, error = connection.recv()
        except (EOFError, ConnectionError):
            self.end()
            raise RuntimeError(f"{function.__name__} ended its process; its output: {self._log}") from None
        if error is not None:
            raise error
        return answer

    def end(self) -> None:
        if self._running:
            process, connection = self._running
            process.kill()
            process.join()
            connection.close()
            self._running = None

    def _start(self) -> tuple[SpawnProcess, Connection]:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_answer_calls, args=(theirs, self._log), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _answer_calls(connection: Connection, log: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    redirect_output(log)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((function(*arguments), None))
        except Exception as error:
            traceback.print_exc()
            connection.send((None, RuntimeError(f"{type(error).__name__}: {error}")))


def best_scores(finalist: Finalist, indices: NDArray[np.int64], model: Path | None) -> NDArray[np.float32]:
    """In the child: a trial's log-probabilities (len(indices), classes); its model is saved to `model`, if any."""
    from cxr_models import steps, training

    steps.configure(finalist.threads)
    config, data = finalist.config, finalist.data
    network = training.best_network(config, data, finalist.folder)
    if model is not None:
        training.save_model(network, config, len(data.classes), model)
    return training.log_probabilities(network, np.load(data.pictures(config), mmap_mode="r"), indices)


def register_champion(model: Path, example: NDArray[np.float32], uri: str, run_id: str, name: str) -> str:
    """In the child: log the saved model to MLflow and register it; returns its URI."""
    import keras

    from sweep.tracking import log_champion

    return log_champion(keras.saving.load_model(model), example, uri=uri, run_id=run_id, name=name)
