"""MLflow: one run per sweep, one child run per trial, one thread that writes.

MLflow shows a sweep; the record in the run folder is the truth. Whatever goes wrong here, training goes on.
"""

import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from cxr_models.trial import EpochMetrics, Objective, Outcome, Suggestion, TrialConfig, TrialResult
from sweep.record import RunFolder
from sweep.tracked import DatasetInfo as DatasetInfo
from sweep.tracked import MetricNames, config_params, flat_params, run_name, summary_files, trial_files

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


class Tracker:
    """Writes a sweep to MLflow from a thread of its own: no method waits for MLflow or raises because of it.

    Only `parent_run_id` and `close` wait, and no longer than they say.

    Args:
        folder: of the sweep; the store lies in it unless a URI is given.
        spec_name: of the sweep.
        uri: MLflow's tracking URI, "" for a SQLite store in the run folder.
        experiment: name of the experiment, "" for the sweep's name.
        objective: what the sweep optimises.
        classes: class names; a label is an index into them.
        dataset: the images.
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
    ) -> None:
        _set_environment()
        self._uri = uri or f"sqlite:///{folder.tracking_database.absolute()}"
        artifacts = None if uri else folder.tracking_artifacts.absolute().as_uri()
        experiment = experiment or spec_name
        sweep = _Sweep(folder, spec_name, self._uri, experiment, artifacts, objective, tuple(classes), dataset)
        self._problem = ""
        self._parent_run_id = ""
        self._experiment_id = ""
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
        """What to type to see the runs, or where to look if they lie on a server. A password in the URI is masked."""
        shown = _without_password(self._uri)
        if re.match(r"https?://", shown):
            return shown
        # This Python's MLflow: the environment need not be activated, nor the only one.
        return f"{shlex.quote(sys.executable)} -m mlflow ui --backend-store-uri {shlex.quote(shown)} --port 5000"

    @property
    def ui_address(self) -> str:
        """The page of the sweep's runs; MLflow's own start page shows what it has for language models."""
        self._opened.wait(OPENING_TIMEOUT_S)
        shown = _without_password(self._uri)
        server = shown.rstrip("/") if re.match(r"https?://", shown) else "http://127.0.0.1:5000"
        return f"{server}/#/experiments/{self._experiment_id}/runs?workflowType=machine_learning"

    def opened(self) -> None:
        """Open the sweep's run; the run folder holds the spec and the split by now."""
        at = _now_ms()
        self._tasks.put(lambda runs: runs.open(at))

    def started(self, suggestion: Suggestion) -> None:
        at, number, trial_id, config = _now_ms(), suggestion.number, suggestion.trial_id, suggestion.config
        self._tasks.put(lambda runs: runs.start_trial(number, trial_id, config, at))

    def epoch(self, metrics: EpochMetrics) -> None:
        at = _now_ms()
        self._tasks.put(lambda runs: runs.log_epoch(metrics, at))

    def ended(self, number: int, result: TrialResult) -> None:
        at = _now_ms()
        self._tasks.put(lambda runs: runs.end_trial(number, result, at))

    def finished(self, summary: Mapping[str, Any], artifacts: Sequence[Path], status: RunStatus = "FINISHED") -> None:
        """End the sweep's run, and as killed those of trials still open.

        Args:
            summary: what `summary.json` holds; an interrupted sweep may have any part of it.
            artifacts: files to keep with the run.
            status: of the sweep's run.
        """
        at = _now_ms()
        self._tasks.put(lambda runs: runs.end(summary, artifacts, status, at))

    def close(self, timeout_s: float) -> None:
        """Wait until everything is written, but no longer than `timeout_s`; what is left then is lost."""
        self._tasks.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.note(f"it did not take everything within {timeout_s:g} s")

    def _write(self, sweep: _Sweep) -> None:
        runs: _Runs | None = None
        try:
            runs = _Runs(sweep)
        except Exception as error:
            self.note(_one_line(error))
        while (task := self._tasks.get()) is not None:
            if runs is None:
                self._opened.set()
                continue
            try:
                task(runs)
            except Exception as error:
                self.note(_one_line(error))
            self._parent_run_id = runs.parent
            self._experiment_id = runs.experiment_id
            self._opened.set()
            if not runs.parent:
                runs = None  # without the sweep's run there is nothing to hang a trial on

    def note(self, cause: str) -> None:
        """Remember what went wrong; the first cause is the one that is shown."""
        where = _without_password(f"MLflow at {self._uri}: {cause}")
        self._problem = self._problem or f"{where}; the sweep goes on, its own record is complete"


@dataclass
class _Trial:
    """An open child run, and the epochs logged to it."""

    run_id: str
    epochs: list[EpochMetrics] = field(default_factory=list)


class _Runs:
    """The runs of one sweep. For the writing thread alone; every method raises what MLflow raises."""

    def __init__(self, sweep: _Sweep) -> None:
        import mlflow

        logging.getLogger("urllib3").setLevel(logging.ERROR)  # an outage is told once, by `Tracker.problem`
        self._mlflow = mlflow
        self._sweep = sweep
        self._client = mlflow.MlflowClient(sweep.uri, registry_uri=sweep.uri)
        self._names = MetricNames(sweep.classes)
        self.experiment_id = ""
        self._trials: dict[str, _Trial] = {}
        self.parent = ""

    def open(self, at_ms: int) -> None:
        sweep = self._sweep
        self.experiment_id = self._find_experiment()
        tags = {"sweep": sweep.name, "objective": f"{sweep.objective.metric} ({sweep.objective.mode})"}
        self.parent = self._create_run(sweep.folder.path.name, at_ms, tags)
        self._log(self.parent, params=flat_params(yaml.safe_load(sweep.folder.spec.read_text(encoding="utf-8"))))
        self._log_dataset()
        for path in (sweep.folder.spec, sweep.folder.split):
            self._client.log_artifact(self.parent, str(path))

    def start_trial(self, number: int, trial_id: str, config: TrialConfig, at_ms: int) -> _Trial:
        tags = {
            "mlflow.parentRunId": self.parent,
            "sweep": self._sweep.name,
            "trial_id": trial_id,
            "trial_number": str(number),
            "backbone": config.backbone,
            "strategy": config.freeze,
        }
        trial = _Trial(self._create_run(run_name(trial_id, config), at_ms, tags))
        self._trials[trial_id] = trial
        self._log(trial.run_id, params=config_params(config))
        return trial

    def log_epoch(self, metrics: EpochMetrics, at_ms: int) -> None:
        trial = self._trials.get(metrics.trial_id)
        if trial is None:
            raise LookupError(f"an epoch of trial {metrics.trial_id} came in, but no run is open for it")
        trial.epochs.append(metrics)
        self._log(trial.run_id, metrics=self._names.of_epoch(metrics), at_ms=at_ms, step=metrics.epoch)

    def end_trial(self, number: int, result: TrialResult, at_ms: int) -> None:
        # A trial whose start MLflow missed is still shown, without its epochs.
        trial = self._trials.get(result.trial_id) or self.start_trial(number, result.trial_id, result.config, at_ms)
        sweep, folder = self._sweep, self._sweep.folder.trial(result.trial_id)
        try:
            self._log_result(trial.run_id, result, at_ms)
            self._log_files(trial.run_id, trial_files(trial.epochs, result, folder, sweep.classes, sweep.objective))
        finally:
            status = "FAILED" if result.outcome is Outcome.FAILED else "FINISHED"
            self._client.set_terminated(trial.run_id, status, at_ms)
            del self._trials[result.trial_id]

    def end(self, summary: Mapping[str, Any], artifacts: Iterable[Path], status: RunStatus, at_ms: int) -> None:
        try:
            self._log(self.parent, metrics=self._names.of_summary(summary), at_ms=at_ms)
            if best := summary.get("best"):
                self._log(self.parent, tags={"best_trial_id": best["trial_id"]})
            for path in artifacts:
                self._client.log_artifact(self.parent, str(path))
            self._log_files(self.parent, summary_files(summary))
        finally:
            for trial in self._trials.values():
                self._client.set_terminated(trial.run_id, "KILLED", at_ms)
            self._client.set_terminated(self.parent, status, at_ms)

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

    def _create_run(self, name: str, at_ms: int, tags: Mapping[str, str]) -> str:
        common = {"mlflow.source.name": "sweep.run", "mlflow.source.type": "LOCAL", "cxr_sweep.version": _version()}
        run = self._client.create_run(self.experiment_id, at_ms, {**common, **tags}, name)
        return str(run.info.run_id)

    def _log(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        at_ms: int = 0,
        step: int = 0,
    ) -> None:
        entities = self._mlflow.entities
        self._client.log_batch(
            run_id,
            metrics=[entities.Metric(name, float(value), at_ms, step) for name, value in (metrics or {}).items()],
            params=[entities.Param(name, value) for name, value in (params or {}).items()],
            tags=[entities.RunTag(name, value) for name, value in (tags or {}).items()],
        )

    def _log_dataset(self) -> None:
        entities, data = self._mlflow.entities, self._sweep.dataset
        dataset = entities.Dataset(
            name=data.name,
            digest=data.digest[:36],  # MLflow takes no more
            source_type="local",
            source=json.dumps({"uri": data.source}),
            profile=data.profile,
        )
        context = entities.InputTag("mlflow.data.context", "training")
        self._client.log_inputs(self.parent, [entities.DatasetInput(dataset, [context])])

    def _log_result(self, run_id: str, result: TrialResult, at_ms: int) -> None:
        tags = {"outcome": str(result.outcome), "device": result.device, "error": result.error}
        given = {name: text for name, text in tags.items() if text}
        self._log(run_id, metrics=self._names.of_result(result), tags=given, at_ms=at_ms)

    def _log_files(self, run_id: str, files: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            self._client.log_artifacts(run_id, folder)


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


def _one_line(error: Exception) -> str:
    if re.search("Max retries exceeded|timed out|Connection aborted", str(error)):
        return "it cannot be reached"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _without_password(text: str) -> str:
    return re.sub(r"//([^:/@\s]*):[^/@\s]*@", r"//\1:***@", text)


def _version() -> str:
    try:
        return version("cxr-sweep")
    except PackageNotFoundError:
        return "not installed"  # run from a checkout


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
