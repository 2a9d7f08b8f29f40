"""The final evaluation: each strategy's best trial on the images it was chosen by, its final models on the test set.

The sealed test set is opened once, for all of them. Validation images are no measure of a final model, which has
learned from them; the trial that it repeats has not.

Everything that needs Keras runs in a child process; the driver's own never imports it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_models.calibration import Calibration, calibrate
from cxr_models.doctor import examine
from cxr_models.intervals import patient_intervals
from cxr_models.metrics import classification_report, confusion_matrix, evaluate_further
from cxr_models.storage import written_whole
from cxr_models.trial import (
    METRICS,
    TEST,
    TRAIN,
    VAL,
    VALIDATION_SCORES,
    Diagnosis,
    TrialConfig,
    TrialData,
    TrialResult,
)
from sweep.cross_validation import HeldOut
from sweep.finals import FinalTraining, FinalTrainings
from sweep.interruption import deferred
from sweep.keras_child import CALL_TIMEOUT_S, Call, keras_child
from sweep.machine import this_machine
from sweep.openings import Openings
from sweep.plan import Plan
from sweep.progress import EvaluationProgress
from sweep.record import RunFolder, best_by_strategy, write_json
from sweep.tracking import Tracker

IMAGE_TIMEOUT_S = 1.0  # added for each image of a call; the largest backbones take less on one core

PartFigures = Mapping[str, Any]


@dataclass(frozen=True)
class FailedSeeds:
    """Of the final trainings of a strategy, those that failed.

    Attributes:
        failed, trained: how many did, and how many did not.
        problem: why one of them did.
    """

    failed: int
    trained: int
    problem: str


@dataclass(frozen=True)
class Finalist:
    """What the child needs to rebuild the network of a trial or a final training.

    Attributes:
        folder: where it left its weights.
        threads: of the child.
    """

    config: TrialConfig
    folder: Path
    data: TrialData
    threads: int


class FinalEvaluation:
    """What the final evaluation has found so far; one that is cut short keeps it.

    Attributes:
        figures: trial -> part -> its figures, see `part_figures`: on train and validation images those of the trial's
            own model, on test images those of its first final model. With folds there is no such model: validation
            figures are those of `HeldOut.figures`, and training figures there are none.
        by_seed: trial -> the test metrics of each of its final models.
        problems: trial -> why it has no figures.
        test: of the best strategy's first final model, `summary.json`'s `test`; None where the test set stayed sealed
            or there is none.
        test_scores: trial -> its final models' log-probabilities (images, classes) of `tested_by`, one array a seed.
        calibration: trial -> what one temperature, fitted on the validation images with the trial's own model, does to
            its first final model on the test images.
        verdict: `summary.json`'s `verdict`; None before all strategies were evaluated.
        doctor: trial -> what is wrong with its final models on the test images.
        failed_seeds: trial -> why some of its final trainings failed, where others are there to stand for it.
        openings: of the test set.
    """

    def __init__(self, plan: Plan, folder: RunFolder, cache_dir: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._predictions: list[pd.DataFrame] = []
        self.figures: dict[str, dict[str, PartFigures]] = {}
        self.by_seed: dict[str, list[dict[str, float]]] = {}
        self.problems: dict[str, str] = {}
        self.test: dict[str, Any] | None = None
        self.test_scores: dict[str, list[NDArray[np.float32]]] = {}
        self.calibration: dict[str, Calibration] = {}
        self.verdict: dict[str, Any] | None = None
        self.doctor: dict[str, tuple[Diagnosis, ...]] = {}
        self.failed_seeds: dict[str, FailedSeeds] = {}
        self.chosen_by = np.concatenate([plan.indices(VAL), plan.indices(TRAIN)])
        self.tested_by = plan.indices(TEST)
        tested = [plan.manifest.records[index].sha256 for index in self.tested_by]
        self.openings = Openings.of_images(tested, folder, cache_dir)

    def add_trial(self, result: TrialResult, scores: NDArray[np.float32]) -> None:
        """Take a trial's log-probabilities (images, classes) of `chosen_by`, and write its predictions down."""
        parts = np.array([self._plan.splits[index] for index in self.chosen_by])
        figures = self.figures.setdefault(result.trial_id, {})
        for part in (TRAIN, VAL):
            figures[part] = self._figures(self.chosen_by[parts == part], scores[parts == part])
        val_labels, _ = self._of(self.chosen_by[parts == VAL])
        self._calibrate(result, val_labels, scores[parts == VAL])
        self._record(result.trial_id, result.config.seed, "train", self.chosen_by, scores)

    def add_held_out(self, result: TrialResult, found: HeldOut) -> None:
        """Take the predictions of a trial's folds, and write them down."""
        _, patients = self._of(found.index)
        self.figures.setdefault(result.trial_id, {})[VAL] = found.figures(self._plan.manifest.classes, patients)
        self._calibrate(result, found.labels, found.scores)
        folds = self._plan.spec.data.folds or 1
        dealt = {"split": VAL, "repeat": found.fold // folds + 1, "fold": found.fold % folds + 1}
        self._record(result.trial_id, result.config.seed, "other folds", found.index, found.scores, **dealt)

    def _calibrate(self, result: TrialResult, labels: NDArray[np.int32], scores: NDArray[np.float32]) -> None:
        if tested := self.test_scores.get(result.trial_id):
            self.calibration[result.trial_id] = calibrate((labels, scores), (self.test_images[0], tested[0]))

    @property
    def test_images(self) -> tuple[NDArray[np.int32], list[str]]:
        """Labels and patients of the test images."""
        return self._of(self.tested_by)

    def add_final(self, training: FinalTraining, scores: NDArray[np.float32], *, fitted_on: str) -> None:
        """Take a final model's log-probabilities (images, classes) of `tested_by`, and write its predictions down."""
        trial_id, seed = training.trial.trial_id, training.config.seed
        figures = self._figures(self.tested_by, scores)
        if trial_id not in self.by_seed:
            self.figures.setdefault(trial_id, {})[TEST] = figures
        labels, _ = self.test_images
        known = {diagnosis.name: diagnosis for diagnosis in self.doctor.get(trial_id, ())}
        told = {each.name: each for each in examine(labels, scores, self._plan.manifest.classes)}
        self.doctor[trial_id] = tuple({**told, **known}.values())
        metrics = {name: figures[name] for name in METRICS}
        self.by_seed.setdefault(trial_id, []).append({"seed": seed, **metrics})
        self.test_scores.setdefault(trial_id, []).append(scores)
        self._record(trial_id, seed, fitted_on, self.tested_by, scores)

    def add_test(self, scores: NDArray[np.float32]) -> None:
        """Take the best final model's test figures with their 95 % intervals by patient."""
        labels, patients = self._of(self.tested_by)
        classes = self._plan.manifest.classes
        intervals = patient_intervals(labels, scores, classes, patients, seed=self._plan.spec.search.seed)
        self.test = {
            **{name: asdict(interval) for name, interval in intervals.items()},
            "confusion_matrix": confusion_matrix(labels, scores).astype(int).tolist(),
            "classes": list(classes),
            "images": len(labels),
            "patients": len(set(patients)),
        }

    def _figures(self, indices: NDArray[np.int64], scores: NDArray[np.float32]) -> PartFigures:
        labels, patients = self._of(indices)
        return part_figures(labels, scores, patients, self._plan.manifest.classes)

    def _of(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int32], list[str]]:
        """Labels and patients of images."""
        manifest = self._plan.manifest
        return manifest.labels[indices], [manifest.records[index].patient for index in indices]

    def _record(
        self,
        trial_id: str,
        seed: int,
        fitted_on: str,
        indices: NDArray[np.int64],
        scores: NDArray[np.float32],
        **dealt: Any,
    ) -> None:
        manifest = self._plan.manifest
        records = [manifest.records[index] for index in indices]
        probabilities = np.exp(scores)
        table = pd.DataFrame(
            {
                "trial_id": trial_id,
                "fitted_on": fitted_on,
                "seed": seed,
                "image": [record.path for record in records],
                "patient": [record.patient for record in records],
                "split": [self._plan.splits[index] for index in indices],
                "true": [record.label for record in records],
                "predicted": [manifest.classes[k] for k in scores.argmax(axis=1)],
                **{f"score:{name}": probabilities[:, k] for k, name in enumerate(manifest.classes)},
                **dealt,
            }
        )
        self._predictions.append(table)
        with written_whole(self._folder.predictions) as scratch:
            pd.concat(self._predictions).to_parquet(scratch, index=False)


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
    trainings: FinalTrainings,
    folder: RunFolder,
    data: TrialData,
    tracker: Tracker,
    progress: EvaluationProgress,
    found: FinalEvaluation,
) -> None:
    """Evaluate each strategy's best trial and its final models; save the best of all and register it.

    What is known is in `found` and on disk as soon as it is: a strategy that fails, or an interruption, leaves the
    others as they are.

    Raises:
        RuntimeError, TimeoutError: the best strategy could not be evaluated; the others have been.
    """
    finalists = best_by_strategy(results, plan.spec.objective)
    failure: Exception | None = None
    with keras_child(folder.log("evaluation")) as call, progress:
        if len(found.tested_by) and trainings.done:
            found.openings.record(finalists, tracker, models=len(trainings.done))
        for number, result in enumerate(finalists, start=1):
            best = result is finalists[0]
            images = len(found.tested_by) + (0 if data.folds else len(found.chosen_by))
            progress.begins(number, len(finalists), result, images)
            try:
                _evaluate(plan, result, trainings, folder, data, call, found, best=best)
            except (RuntimeError, TimeoutError) as error:
                found.problems[result.trial_id] = str(error)
                progress.failed(result, str(error))
                failure = failure or (error if best else None)
                continue
            tracker.evaluated(result.trial_id, _overall(found.figures[result.trial_id]))
            if best:
                progress.registers()
                register(plan, result, folder, data, tracker, call)
    if failure:
        raise failure


def _evaluate(
    plan: Plan,
    result: TrialResult,
    trainings: FinalTrainings,
    folder: RunFolder,
    data: TrialData,
    call: Call,
    found: FinalEvaluation,
    *,
    best: bool,
) -> None:
    """Evaluate one strategy. Where some of its final trainings failed, the others stand for it.

    Raises:
        RuntimeError, TimeoutError: a model of it could not be evaluated, or none was trained.
    """
    threads = min(plan.allotment.threads * plan.allotment.concurrency, this_machine().cores)

    def scores_of(
        config: TrialConfig, name: str, indices: NDArray[np.int64], model: Path | None = None
    ) -> NDArray[np.float32]:
        finalist = Finalist(config, folder.trial(name), data, threads)
        timeout_s = CALL_TIMEOUT_S + IMAGE_TIMEOUT_S * len(indices)
        scores: NDArray[np.float32] = call(best_scores, finalist, indices, model, timeout_s=timeout_s)
        return scores

    problem, trained = trainings.problem(result), trainings.of(result)
    for training in trained:
        model = folder.model if best and training is trained[0] else None
        scores = scores_of(training.config, training.training_id, found.tested_by, model)
        with deferred():
            if model:
                _write_best_config(plan, training, data, folder)
            if len(found.tested_by):
                if model:
                    found.add_test(scores)
                found.add_final(training, scores, fitted_on=_fitted_on(data))
    if data.folds:
        held_out = HeldOut.read(folder.trial(result.trial_id) / VALIDATION_SCORES)
        with deferred():
            found.add_held_out(result, held_out)
    else:
        scores = scores_of(result.config, result.trial_id, found.chosen_by)
        with deferred():
            found.add_trial(result, scores)
    if problem and not trained:
        raise RuntimeError(problem)
    if problem:
        found.failed_seeds[result.trial_id] = FailedSeeds(trainings.seeds - len(trained), len(trained), problem)


def _overall(parts: Mapping[str, PartFigures]) -> dict[str, dict[str, float]]:
    return {part: {name: figures[name] for name in METRICS} for part, figures in parts.items()}


def _fitted_on(data: TrialData) -> str:
    """What final models have learned from, as it is recorded."""
    return "all folds" if data.folds else "train+val"


def _write_best_config(plan: Plan, training: FinalTraining, data: TrialData, folder: RunFolder) -> None:
    """All that is needed to use the model: an image's side and channels, and which class a probability belongs to."""
    shape = {"classes": list(plan.manifest.classes), "channels": data.channels}
    trial, config = training.trial, training.config.to_json()
    fitted = {"fitted_on": _fitted_on(data), "fitted_epochs": trial.best_epoch}
    write_json(folder.best_config, {"trial_id": trial.trial_id, **fitted, **shape, **config})


def register(plan: Plan, result: TrialResult, folder: RunFolder, data: TrialData, tracker: Tracker, call: Call) -> None:
    """Log the saved best model to MLflow and register it; a failure is noted, not raised, and `sweep.sync` tries again.

    What a sweep that was interrupted has registered is not registered again when it is resumed.
    """
    # An image that trials saw.
    pixels = np.load(data.pictures(result.config), mmap_mode="r")
    example = pixels[data.val[:1]].astype(np.float32)
    try:
        if tracker.champion(result.trial_id, example):
            run_id = tracker.parent_run_id
            named = plan.spec.name, result.trial_id
            address = call(register_champion, folder.model, example, tracker.uri, run_id, *named)
            tracker.registered(result.trial_id, address)
    except Exception as error:  # the model is in the run folder; MLflow's copy is a convenience
        tracker.note(f"the best model was not registered: {error}")


def best_scores(finalist: Finalist, indices: NDArray[np.int64], model: Path | None) -> NDArray[np.float32]:
    """In the child: a model's log-probabilities (len(indices), classes); it is saved to `model`, if given."""
    from cxr_models import steps, training

    steps.configure(finalist.threads)
    config, data = finalist.config, finalist.data
    network = training.best_network(config, data, finalist.folder)
    if model is not None:
        training.save_model(network, config, len(data.classes), model)
    if not len(indices):  # there is no test part
        return np.empty((0, len(data.classes)), np.float32)
    return training.log_probabilities(network, np.load(data.pictures(config), mmap_mode="r"), indices)


def register_champion(
    model: Path, example: NDArray[np.float32], uri: str, run_id: str, name: str, trial_id: str
) -> str:
    """In the child: log the saved model to MLflow and register it, unless its run has one; returns its URI."""
    import keras

    from sweep.tracking import log_champion, registered_champion

    where = {"uri": uri, "run_id": run_id, "name": name, "trial_id": trial_id}
    return registered_champion(**where) or log_champion(keras.saving.load_model(model), example, **where)
