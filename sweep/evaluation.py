"""The sealed test set, opened once for the best trial, and what follows from its predictions.

Everything that needs Keras runs in a child process; the driver's own never imports it.
"""

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_models.metrics import confusion_matrix, patient_intervals
from cxr_models.storage import written_whole
from cxr_models.trial import TEST, VAL, TrialConfig, TrialData, TrialResult
from sweep.plan import Plan
from sweep.record import RunFolder, append_line, write_json
from sweep.worker import redirect_output

CALL_TIMEOUT_S = 600.0

# Below this a probability is a rounding result; the logarithm of 0 would make the whole loss infinite.
SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class BestModel:
    """What the child needs to rebuild the best trial's network and read the images with it."""

    config: TrialConfig
    trial_folder: Path
    classes: int
    channels: int
    pixels: Path
    weights: Path | None
    indices: NDArray[np.int64]
    model: Path
    threads: int


@contextmanager
def keras_child(log: Path) -> Iterator[Callable[..., Any]]:
    """Yield `call(function, *arguments)`, which runs in one child process with its output in `log`.

    The child is killed at the end of the block, however it ends; a call that takes longer than `CALL_TIMEOUT_S`
    raises `TimeoutError`, what the function raises is raised here.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_answer_calls, args=(theirs, log), daemon=True)
    child.start()
    theirs.close()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        ours.send((function, arguments))
        if not ours.poll(CALL_TIMEOUT_S):
            raise TimeoutError(f"{function.__name__} took longer than {CALL_TIMEOUT_S:g} s; its output: {log}")
        try:
            answer, error = ours.recv()
        except EOFError:
            raise RuntimeError(f"{function.__name__} ended its process; its output: {log}") from None
        if error is not None:
            raise error
        return answer

    try:
        yield call
    finally:
        child.kill()
        child.join()


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


def save_and_predict(best: BestModel) -> NDArray[np.float32]:
    """In the child: save the best trial's whole model and return its probabilities (images, classes)."""
    from cxr_models import steps, training

    steps.configure(best.threads)
    model = training.restore_best(
        best.config,
        best.trial_folder,
        classes=best.classes,
        channels=best.channels,
        weights=best.weights,
        model_path=best.model,
    )
    return training.predict(model, np.load(best.pixels, mmap_mode="r"), best.indices)


def register_champion(best: BestModel, uri: str, run_id: str, name: str) -> str:
    """In the child: log the saved model to MLflow and register it; returns its URI."""
    import keras

    from sweep.tracking import log_champion

    # An image that trials saw: the test images stay out of MLflow.
    example = np.load(best.pixels, mmap_mode="r")[best.indices[:1]].astype(np.float32)
    return log_champion(keras.saving.load_model(best.model), example, uri=uri, run_id=run_id, name=name)


def best_model(plan: Plan, result: TrialResult, folder: RunFolder, data: TrialData) -> BestModel:
    """The best trial's model with the validation and test images, in this order."""
    config = result.config
    return BestModel(
        config=config,
        trial_folder=folder.trial(result.trial_id),
        classes=len(data.classes),
        channels=data.channels,
        pixels=data.pictures(config),
        weights=data.weights.get((config.backbone, config.weights, config.image_side)),
        indices=np.concatenate([plan.indices(VAL), plan.indices(TEST)]),
        model=folder.model,
        threads=plan.allotment.threads,
    )


def record_opening(folder: RunFolder, result: TrialResult) -> None:
    """Note that the test set is about to be read, before it is."""
    append_line(folder.test_openings, {"opened": datetime.now(UTC).isoformat(), "trial_id": result.trial_id})


def record_predictions(
    plan: Plan, best: BestModel, result: TrialResult, probabilities: NDArray[np.float32], folder: RunFolder
) -> None:
    """Write `predictions.parquet` and `best/config.json`."""
    records = [plan.manifest.records[index] for index in best.indices]
    classes = plan.manifest.classes
    frame = pd.DataFrame(
        {
            "trial_id": result.trial_id,
            "image": [record.path for record in records],
            "patient": [record.patient for record in records],
            "split": [plan.splits[index] for index in best.indices],
            "true": [record.label for record in records],
            "predicted": [classes[k] for k in probabilities.argmax(axis=1)],
            **{f"score:{name}": probabilities[:, k] for k, name in enumerate(classes)},
        }
    )
    with written_whole(folder.predictions) as scratch:
        frame.to_parquet(scratch, index=False)
    # All that is needed to use the model: an image's side and channels, and which class a probability belongs to.
    shape = {"classes": list(classes), "channels": best.channels}
    write_json(folder.best_config, {"trial_id": result.trial_id, **shape, **result.config.to_json()})


def evaluate_test(plan: Plan, best: BestModel, probabilities: NDArray[np.float32]) -> dict[str, Any]:
    """The test metrics with 95 % intervals by patient, and the confusion matrix; `summary.json`'s `test`."""
    test = np.array([plan.splits[index] == TEST for index in best.indices])
    scores = np.log(np.maximum(probabilities[test], SMALLEST_PROBABILITY))
    labels = plan.manifest.labels[best.indices[test]]
    patients = [plan.manifest.records[index].patient for index in best.indices[test]]
    classes = plan.manifest.classes
    intervals = patient_intervals(labels, scores, classes, patients, seed=plan.spec.search.seed)
    return {
        **{name: asdict(interval) for name, interval in intervals.items()},
        "confusion_matrix": confusion_matrix(labels, scores).astype(int).tolist(),
        "classes": list(classes),
        "images": len(labels),
        "patients": len(set(patients)),
    }
