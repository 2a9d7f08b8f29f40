"""MLflow's runs, written so that doing it twice does it once; what MLflow refuses is told apart from an outage."""

import errno
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from sweep.tracked import DatasetInfo, one_line, own_tags
from sweep.versions import version_of

# Read by MLflow when it is imported or asked; what the user has set stays.
ENVIRONMENT: Mapping[str, str] = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
# MLflow would send a request again whose answer was lost, and so make a second run. The writer tries again itself.
NO_RETRIES: Mapping[str, str] = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
TRIAL_TAG = "trial_id"  # of a registered version
CHAMPION = "champion"
RUNS_AT_ONCE = 200  # of a search, so that each answer comes within a timeout
SCHEMA_TIMEOUT_S = 120.0
# Of a wrong or missing password, a timeout, too many requests, ...: right as soon as someone has seen to it.
PASSING = frozenset({401, 403, 407, 408, 429, 499})

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class Unavailable(Exception):  # noqa: N818 - what is so, not an error of a caller
    """MLflow cannot be had now; the same may be tried again."""


class Faulty(Unavailable):
    """MLflow answers with an error of its own, which may pass or not."""


class Refused(Exception):  # noqa: N818 - as above
    """MLflow will not take this, however often it is tried."""


class RunGone(Refused):
    """The server does not know the run, which someone deleted."""


def set_environment() -> None:
    """MLflow's settings in this process and its children."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.update(NO_RETRIES)


@contextmanager
def sorted_out() -> Iterator[None]:
    """Raise whatever goes wrong as `Unavailable`, `Refused` or one of their kinds, in one line."""
    try:
        yield
    except (Unavailable, Refused):
        raise
    except Exception as error:
        raise _kind(error)(one_line(error)) from error


def _kind(error: Exception) -> type[Exception]:
    code = getattr(error, "error_code", "")
    if code == "RESOURCE_DOES_NOT_EXIST":
        return RunGone
    if hasattr(error, "get_http_status_code"):
        status = error.get_http_status_code()
        if status == 500 and not re.search("API request to .* failed with (timeout )?exception", str(error)):
            return Faulty
        passing = status >= 500 or status in PASSING or code in ("ENDPOINT_NOT_FOUND", "ABORTED")
        return Unavailable if passing else Refused
    response = getattr(error, "response", None)
    if response is not None:
        return Unavailable if response.status_code >= 500 or response.status_code in PASSING else Refused
    # A connection that fails is an OSError as a missing file is; libraries bring their own.
    library = type(error).__module__.partition(".")[0]
    outage = library in ("requests", "urllib3", "sqlalchemy") or isinstance(error, ConnectionError | TimeoutError)
    outage |= isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Unavailable if outage else Refused


class FoundRun:
    """A run that the server has of a sweep.

    Attributes:
        trial_id: "" for the sweep's own.
        begun: milliseconds since 1970.
    """

    def __init__(self, run: Any) -> None:
        self.run_id = str(run.info.run_id)
        self.artifact_uri = str(run.info.artifact_uri)
        self.trial_id = str(run.data.tags.get("trial_id", ""))
        self.begun = int(run.info.start_time or 0)


class MlflowRuns:
    """The runs of one sweep on one server. For one thread; every method raises `Unavailable` or `Refused`.

    Args:
        uri: MLflow's tracking URI.
        experiment: its name; it is made if it is not there.
        artifacts: where the files of a new experiment go, None for the server's own place.
        sweep_id: the tag that all runs of this sweep have.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str | None, sweep_id: str) -> None:
        set_environment()
        import mlflow

        # An outage is told once, by `Tracker.problem`.
        for name in ("urllib3", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._mlflow = mlflow
        self._uri = uri
        self._sweep_id = sweep_id
        self._artifact_uris: dict[str, str] = {}
        try:
            with sorted_out(), _schema_lock(uri):
                self._client = mlflow.MlflowClient(uri, registry_uri=uri)
                self.experiment_id = self._find_experiment(experiment, artifacts)
        except Refused as error:  # as long as there is no experiment, there is nothing that could be left out
            raise Unavailable(str(error)) from error

    def create(self, name: str, at_ms: int, tags: Mapping[str, str]) -> str:
        """A new run's id. If this raises, the run may be there all the same: see `find`."""
        tags = {**own_tags(), **tags, "sweep_id": self._sweep_id}
        with sorted_out():
            info = self._client.create_run(self.experiment_id, at_ms, tags, name).info
        self._artifact_uris[info.run_id] = str(info.artifact_uri)
        return str(info.run_id)

    def find(self, trial_id: str | None = None) -> list[FoundRun]:
        """What the server has of this sweep, or of one trial of it, the oldest first."""
        query, token, found = f"tags.sweep_id = '{self._sweep_id}'", None, []
        if trial_id:
            query += f" and tags.trial_id = '{trial_id}'"
        while True:
            with sorted_out():
                page = self._client.search_runs([self.experiment_id], query, max_results=RUNS_AT_ONCE, page_token=token)
            found += [FoundRun(run) for run in page]
            token = page.token
            if not token:
                break
        self._artifact_uris |= {run.run_id: run.artifact_uri for run in found}
        return sorted(found, key=lambda run: (run.begun, run.run_id))

    def delete(self, run_id: str) -> None:
        with sorted_out():
            self._client.delete_run(run_id)

    def metrics(self, values: Mapping[str, float], at_ms: int, step: int = 0) -> list[Any]:
        """Metrics for `log`. MLflow takes one of the same name, value, time and step for the one it has."""
        metric = self._mlflow.entities.Metric
        return [metric(name, float(value), at_ms, step) for name, value in values.items()]

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Any] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        refused: Callable[[str], None],
    ) -> None:
        """Log to a run; what MLflow does not take is told to `refused`, and all the rest logged."""
        entities = self._mlflow.entities
        self._log_batch(
            run_id,
            [
                *metrics,
                *(entities.Param(name, value) for name, value in (params or {}).items()),
                *(entities.RunTag(name, value) for name, value in (tags or {}).items()),
            ],
            refused,
        )

    def _log_batch(self, run_id: str, batch: Sequence[Any], refused: Callable[[str], None]) -> None:
        entities = self._mlflow.entities
        kinds = (entities.Metric, entities.Param, entities.RunTag)
        metrics, params, tags = ([each for each in batch if isinstance(each, kind)] for kind in kinds)
        try:
            with sorted_out():
                self._client.log_batch(run_id, metrics=metrics, params=params, tags=tags)
        except RunGone:
            raise
        except Refused as error:
            if len(batch) == 1:
                refused(f"{batch[0].key}: {error}")
                return
            half = len(batch) // 2
            self._log_batch(run_id, batch[:half], refused)
            self._log_batch(run_id, batch[half:], refused)

    def log_dataset(self, run_id: str, data: DatasetInfo) -> None:
        entities = self._mlflow.entities
        digest = data.digest[:36]  # MLflow takes no more
        source = json.dumps({"uri": data.source})
        dataset = entities.Dataset(data.name, digest, "local", source, profile=data.profile)
        context = entities.InputTag("mlflow.data.context", "training")
        with sorted_out():
            self._client.log_inputs(run_id, [entities.DatasetInput(dataset, [context])])

    def log_file(self, run_id: str, path: Path) -> None:
        with sorted_out():
            self._client.log_artifact(run_id, str(path))

    def log_texts(self, run_id: str, files: Mapping[str, str]) -> None:
        """Files by name, made of texts."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if not files:
            return
        with sorted_out(), tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_text(content, encoding="utf-8")
            if run_id not in self._artifact_uris:
                self._artifact_uris[run_id] = str(self._client.get_run(run_id).info.artifact_uri)
            # The client would load the whole run first, to find out the address.
            get_artifact_repository(self._artifact_uris[run_id], self._uri).log_artifacts(folder)

    def terminate(self, run_id: str, status: RunStatus, at_ms: int) -> None:
        with sorted_out():
            self._client.set_terminated(run_id, status, at_ms)

    def go_on(self, run_id: str) -> None:
        """A run that had ended runs again."""
        with sorted_out():
            self._client.update_run(run_id, "RUNNING")

    def note_champion(self, run_id: str, notes: Mapping[str, str]) -> None:
        """Tag the model that a sweep's run has registered, if it has."""
        with sorted_out():
            for registered in self._client.search_model_versions(f"run_id = '{run_id}'"):
                for name, text in notes.items():
                    self._client.set_model_version_tag(registered.name, registered.version, name, text)

    def _find_experiment(self, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifacts))
            except self._mlflow.MlflowException:  # another sweep may have made it meanwhile
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


@contextmanager
def _schema_lock(uri: str) -> Iterator[None]:
    """One process at a time makes the tables of a SQLite store; MLflow's own way fails where several do."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    store = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    try:
        with FileLock(store.with_name(f".{store.name}.lock"), timeout=SCHEMA_TIMEOUT_S):
            yield
    except Timeout:
        raise Unavailable(f"another process has been opening {store} for {SCHEMA_TIMEOUT_S:g} s") from None


def log_champion(model: Any, example: NDArray[np.float32], *, uri: str, run_id: str, name: str, trial_id: str) -> str:
    """Log a Keras model to a run, register it, and make it the registered model's champion.

    Imports Keras and TensorFlow through MLflow: for a process that has them already.

    Args:
        model: raw pixels 0 to 255, float32 (images, side, side, channels) -> float32 (images, classes).
        example: at least one input.
        uri: MLflow's tracking URI.
        run_id: of the run the model belongs to.
        name: of the registered model, new or not.
        trial_id: whose final model it is, a tag of the version.

    Returns:
        The model's URI, `models:/<name>/<version>`. `models:/<name>@champion` is the same one until the next sweep.
    """
    set_environment()
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
        pip_requirements=[
            f"{package}=={version_of(package)}" for package in ("tensorflow", "keras", "numpy", "mlflow")
        ],
        input_example=example[:1],
    )
    client.set_model_version_tag(name, str(logged.registered_model_version), TRIAL_TAG, trial_id)
    client.set_registered_model_alias(name, CHAMPION, logged.registered_model_version)
    return f"models:/{name}/{logged.registered_model_version}"


def registered_champion(*, uri: str, run_id: str, name: str, trial_id: str) -> str:
    """The URI of a trial's final model that a run has registered, made the champion; "" if there is none.

    Whoever registers again asks this first: the answer to a registration may have been lost, and its tag never set.
    """
    set_environment()
    import mlflow

    client = mlflow.MlflowClient(uri, registry_uri=uri)
    found = client.search_model_versions(f"run_id = '{run_id}'")
    versions = [int(each.version) for each in found if each.tags.get(TRIAL_TAG, trial_id) == trial_id]
    if not versions:
        return ""
    client.set_model_version_tag(name, str(max(versions)), TRIAL_TAG, trial_id)
    client.set_registered_model_alias(name, CHAMPION, str(max(versions)))
    return f"models:/{name}/{max(versions)}"
