"""MLflow: one run per sweep, one child run per trial, one thread that writes.

MLflow shows a sweep; the record in the run folder is the truth. Whatever goes wrong here, training goes on.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, Literal, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from cxr_models.trial import EpochMetrics, Objective, Outcome, Suggestion, TrialResult
from sweep.backlog import Backlog, TrackedTrial
from sweep.champion import champion_notes
from sweep.record import RunFolder
from sweep.tracked import DatasetInfo as DatasetInfo
from sweep.tracked import (
    MetricNames,
    config_params,
    flat_params,
    one_line,
    own_tags,
    result_tags,
    run_name,
    summary_files,
    summary_tags,
    trial_files,
    trial_tags,
    ui_address,
    ui_command,
    without_password,
)

# Read by MLflow when it is imported; what the user has set stays.
ENVIRONMENT: Mapping[str, str] = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
CHAMPION = "champion"
OPENING_TIMEOUT_S = 60.0
# While trials run, the writer rests this many times as long as it computed: a fifth of one core at most.
REST = 4.0

_T = TypeVar("_T")
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class _Sweep:
    """What the writer knows of a sweep from the start."""

    folder: RunFolder
    name: str
    uri: str
    experiment: str
    artifacts: str | None
    objective: Objective
    classes: tuple[str, ...]
    dataset: DatasetInfo
    inputs: Mapping[str, str]


class Tracker:
    """Writes a sweep to MLflow from a thread of its own: no method waits for MLflow or raises because of it.

    Only `parent_run_id`, `ui_address` and `close` wait, and no longer than they say. A running trial is up to date
    within seconds. Where many short ones end faster than a fifth of a core can write them down, MLflow falls behind
    and catches up once no trial runs, so that training has the cores.

    Args:
        folder: of the sweep; the store lies in it unless a URI is given.
        spec_name: of the sweep.
        uri: MLflow's tracking URI, "" for a SQLite store in the run folder.
        experiment: name of the experiment, "" for the sweep's name.
        objective: what the sweep optimises.
        classes: class names; a label is an index into them.
        dataset: the images.
        inputs: tags that name the earlier sweeps this one builds on.
    """

    def __init__(
        self,
        folder: RunFolder,
        spec_name: str,
        *,
        uri: str = "",
        experiment: str = "",
        objective: Objective,
        classes: Sequence[str],
        dataset: DatasetInfo,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        _set_environment()
        self._uri = uri or f"sqlite:///{folder.tracking_database.absolute()}"
        artifacts = None if uri else folder.tracking_artifacts.absolute().as_uri()
        experiment = experiment or spec_name
        sweep = _Sweep(
            folder, spec_name, self._uri, experiment, artifacts, objective, tuple(classes), dataset, inputs or {}
        )
        self._problem = ""
        self._parent_run_id = ""
        self._experiment_id = ""
        self._rested = 0.0  # when the writer may go on
        self._opened = Event()
        self._tasks: SimpleQueue[Callable[[_Runs], object] | None] = SimpleQueue()
        self._thread = Thread(target=self._write, args=(sweep,), name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """One line with the first thing that went wrong, "" while nothing did."""
        return self._problem

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def parent_run_id(self) -> str:
        """The sweep's run; waits up to a minute for it after `opened`. "" if there is none."""
        self._opened.wait(OPENING_TIMEOUT_S)
        return self._parent_run_id

    @property
    def ui_command(self) -> str:
        return ui_command(self._uri)

    @property
    def ui_address(self) -> str:
        self._opened.wait(OPENING_TIMEOUT_S)
        return ui_address(self._uri, self._experiment_id)

    def opened(self) -> None:
        """Open the sweep's run; the run folder holds the spec and the split by now."""
        at = _now_ms()
        self._tasks.put(lambda runs: runs.open(at))

    def started(self, suggestion: Suggestion) -> None:
        at, now = _now_ms(), time.monotonic()
        self._tasks.put(lambda runs: runs.backlog.started(suggestion, at, now))

    def epoch(self, metrics: EpochMetrics) -> None:
        at = _now_ms()
        self._tasks.put(lambda runs: runs.backlog.epoch(metrics, at))

    def ended(self, number: int, result: TrialResult) -> None:
        at = _now_ms()
        self._tasks.put(lambda runs: runs.backlog.ended(number, result, at))

    def evaluated(self, trial_id: str, parts: Mapping[str, Mapping[str, float]]) -> None:
        """Add the figures of the final evaluation to an ended trial.

        Args:
            trial_id: of the trial.
            parts: `train`, `val` and `test` -> metric -> value.
        """
        at = _now_ms()
        self._tasks.put(self._write_all)  # no trial runs any more
        self._tasks.put(lambda runs: runs.evaluated(trial_id, parts, at))

    def test_opened(self, number: int, opening: str) -> None:
        """Tell the sweep's run that the test set is opened.

        Args:
            number: 1 for the first time.
            opening: when, and by what.
        """
        self._tasks.put(lambda runs: runs.tag({f"test_opening_{number}": opening}))

    def finished(self, summary: Mapping[str, Any], artifacts: Sequence[Path], status: RunStatus = "FINISHED") -> None:
        """End the sweep's run, and as killed those of trials still open; note on the model what is said of it.

        Args:
            summary: what `summary.json` holds; an interrupted sweep may have any part of it.
            artifacts: files to keep with the run.
            status: of the sweep's run.
        """
        at = _now_ms()
        self._tasks.put(self._write_all)
        self._tasks.put(lambda runs: runs.end(summary, artifacts, status, at))

    def close(self, timeout_s: float) -> None:
        """Wait until everything is written, but no longer than `timeout_s`; what is left then is lost."""
        self._tasks.put(self._write_all)
        self._tasks.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.note(f"it did not take everything within {timeout_s:g} s")

    def _write(self, sweep: _Sweep) -> None:
        runs: _Runs | None = None
        try:
            runs = _Runs(sweep)
        except Exception as error:
            self.note(one_line(error))
        while (task := self._next_task(runs)) is not None:
            if runs is None:
                self._opened.set()
                continue
            self._attempt(task, runs)
            self._parent_run_id = runs.parent
            self._experiment_id = runs.experiment_id
            self._opened.set()
            if not runs.parent:
                runs = None  # without the sweep's run there is nothing to hang a trial on

    def _next_task(self, runs: "_Runs | None") -> "Callable[[_Runs], object] | None":
        """What was asked for next; while nothing is, the trials that are due are written."""
        while True:
            now = time.monotonic()
            found = runs.backlog.next(now) if runs else None
            try:
                return self._tasks.get(timeout=max(0.0, found[1] - now, self._rested - now) if found else None)
            except Empty:
                pass
            if runs and found:
                begun = time.thread_time()
                self._attempt(runs.write, found[0])
                rest = REST * (time.thread_time() - begun) if runs.backlog.running else 0.0
                self._rested = time.monotonic() + rest

    def _write_all(self, runs: "_Runs") -> None:
        for trial in runs.backlog.unwritten():
            self._attempt(runs.write, trial)

    def _attempt(self, function: Callable[[_T], object], argument: _T) -> None:
        try:
            function(argument)
        except Exception as error:
            self.note(one_line(error))

    def note(self, cause: str) -> None:
        """Remember what went wrong; the first cause is the one that is shown."""
        where = without_password(f"MLflow at {self._uri}: {cause}")
        self._problem = self._problem or f"{where}; the sweep goes on, its own record is complete"


class _Runs:
    """The runs of one sweep. For the writing thread alone; every method raises what MLflow raises."""

    def __init__(self, sweep: _Sweep) -> None:
        import mlflow

        logging.getLogger("urllib3").setLevel(logging.ERROR)  # an outage is told once, by `Tracker.problem`
        self._mlflow = mlflow
        self._sweep = sweep
        self._client = mlflow.MlflowClient(sweep.uri, registry_uri=sweep.uri)
        self._names = MetricNames(sweep.classes)
        self.backlog = Backlog()
        self._run_ids: dict[str, str] = {}
        self.experiment_id = ""
        self.parent = self._parent_artifacts = ""

    def open(self, at_ms: int) -> None:
        sweep = self._sweep
        self.experiment_id = self._find_experiment()
        tags = {"sweep": sweep.name, "objective": f"{sweep.objective.metric} ({sweep.objective.mode})"}
        tags |= {"task": sweep.objective.task, **sweep.inputs}
        self.parent, self._parent_artifacts = self._create_run(sweep.folder.path.name, at_ms, tags)
        spec = yaml.safe_load(sweep.folder.spec.read_text(encoding="utf-8"))
        spec.pop("reference", None)  # published figures are no parameters, and longer than MLflow takes
        self._log(self.parent, params=flat_params(spec))
        self._log_dataset()
        for path in (sweep.folder.spec, sweep.folder.split):
            self._client.log_artifact(self.parent, str(path))

    def write(self, trial: TrackedTrial) -> None:
        """Bring a trial's run up to date, and end it if the trial has ended."""
        self.backlog.take(trial, time.monotonic())
        result = trial.result
        ending = result_tags(result) if result else {}
        if not trial.run_id:
            tags = {**trial_tags(trial.suggestion, self._sweep.name, self.parent), **ending}
            trial.run_id, trial.artifact_uri = self._create_run(run_name(trial.suggestion), trial.begun_ms, tags)
            self._run_ids[trial.suggestion.trial_id] = trial.run_id
            ending = {}
        try:
            params = {} if trial.described else config_params(trial.suggestion.config)
            self._log(trial.run_id, metrics=self._news(trial), params=params, tags=ending)
            trial.described = True
            trial.epochs.clear()
            if result:
                folder = self._sweep.folder.trial(result.trial_id)
                self._log_files(trial.artifact_uri, trial_files(result, folder, self._sweep.classes))
        finally:
            if result:
                status = "FAILED" if result.outcome is Outcome.FAILED else "FINISHED"
                self._client.set_terminated(trial.run_id, status, trial.ended_ms)

    def evaluated(self, trial_id: str, parts: Mapping[str, Mapping[str, float]], at_ms: int) -> None:
        """Log the final figures of a trial to its run, which has ended."""
        self._log(self._run_ids[trial_id], metrics=self._metrics(self._names.of_evaluation(parts), at_ms))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Tag the sweep's run."""
        self._log(self.parent, tags=tags)

    def _news(self, trial: TrackedTrial) -> list[Any]:
        names = self._names
        news = [entry for at, each in trial.epochs for entry in self._metrics(names.of_epoch(each), at, each.epoch)]
        return news + (self._metrics(names.of_result(trial.result), trial.ended_ms) if trial.result else [])

    def end(self, summary: Mapping[str, Any], artifacts: Iterable[Path], status: RunStatus, at_ms: int) -> None:
        try:
            metrics = self._metrics(self._names.of_summary(summary), at_ms)
            self._log(self.parent, metrics=metrics, tags=summary_tags(summary))
            self._note_champion(champion_notes(summary))
            for path in artifacts:
                self._client.log_artifact(self.parent, str(path))
            self._log_files(self._parent_artifacts, summary_files(summary))
        finally:
            for trial in self.backlog.running:
                if trial.run_id:
                    self._client.set_terminated(trial.run_id, "KILLED", at_ms)
            self._client.set_terminated(self.parent, status, at_ms)

    def _note_champion(self, notes: Mapping[str, str]) -> None:
        """Tag the model that this sweep has registered, if it has: the verdict is known only after that."""
        for registered in self._client.search_model_versions(f"run_id = '{self.parent}'"):
            for name, text in notes.items():
                self._client.set_model_version_tag(registered.name, registered.version, name, text)

    def _find_experiment(self) -> str:
        name = self._sweep.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, self._sweep.artifacts))
            except self._mlflow.MlflowException:  # another sweep may have made it meanwhile
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _create_run(self, name: str, at_ms: int, tags: Mapping[str, str]) -> tuple[str, str]:
        """A new run's id and the address of its files."""
        info = self._client.create_run(self.experiment_id, at_ms, {**own_tags(), **tags}, name).info
        return str(info.run_id), str(info.artifact_uri)

    def _metrics(self, values: Mapping[str, float], at_ms: int, step: int = 0) -> list[Any]:
        metric = self._mlflow.entities.Metric
        return [metric(name, float(value), at_ms, step) for name, value in values.items()]

    def _log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Any] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        entities = self._mlflow.entities
        self._client.log_batch(
            run_id,
            metrics=metrics,
            params=[entities.Param(name, value) for name, value in (params or {}).items()],
            tags=[entities.RunTag(name, value) for name, value in (tags or {}).items()],
        )

    def _log_dataset(self) -> None:
        entities, data = self._mlflow.entities, self._sweep.dataset
        digest = data.digest[:36]  # MLflow takes no more
        source = json.dumps({"uri": data.source})
        dataset = entities.Dataset(data.name, digest, "local", source, profile=data.profile)
        context = entities.InputTag("mlflow.data.context", "training")
        self._client.log_inputs(self.parent, [entities.DatasetInput(dataset, [context])])

    def _log_files(self, artifact_uri: str, files: Mapping[str, str]) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if not files:
            return
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_text(content, encoding="utf-8")
            # The client would load the whole run first, to find out the address.
            get_artifact_repository(artifact_uri, self._sweep.uri).log_artifacts(folder)


def log_champion(model: Any, example: NDArray[np.float32], *, uri: str, run_id: str, name: str) -> str:
    """Log a Keras model to a run, register it, and make it the registered model's champion.

    Imports Keras and TensorFlow through MLflow: for a process that has them already.

    Args:
        model: raw pixels 0 to 255, float32 (images, side, side, channels) -> float32 (images, classes).
        example: at least one input.
        uri: MLflow's tracking URI.
        run_id: of the run the model belongs to.
        name: of the registered model, new or not.

    Returns:
        The model's URI, `models:/<name>/<version>`. `models:/<name>@champion` is the same one until the next sweep.
    """
    _set_environment()
    import mlflow
    import mlflow.tensorflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = mlflow.MlflowClient()
    mlflow.set_experiment(experiment_id=client.get_run(run_id).info.experiment_id)
    float32 = np.dtype(np.float32)
    pixels, scores = ((-1, *shape[1:]) for shape in (model.input_shape, model.output_shape))
    # `Model.log` takes a run that another process has open; `log_model` needs one of its own and ends it.
    logged = Model.log(
        None,  # its old name for `name`, still required
        name="model",
        flavor=mlflow.tensorflow,  # `mlflow.keras` 3.17 fails on an input example
        model=model,
        run_id=run_id,
        registered_model_name=name,
        # Without these two, MLflow loads the model to find out: 11 s.
        signature=ModelSignature(Schema([TensorSpec(float32, pixels)]), Schema([TensorSpec(float32, scores)])),
        pip_requirements=[f"{package}=={version(package)}" for package in ("tensorflow", "keras", "numpy", "mlflow")],
        input_example=example[:1],
    )
    client.set_registered_model_alias(name, CHAMPION, logged.registered_model_version)
    return f"models:/{name}/{logged.registered_model_version}"


def _set_environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
