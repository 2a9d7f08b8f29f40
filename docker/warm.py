"""Import what head, workers and tracking server do, so that Python's compiled files of just that lie in the image.

All of them would be three times as large; without any, each process would compile for seconds: the image is read-only.
"""

import importlib
import sysconfig
from pathlib import Path

PROGRAMS = (
    "tensorflow",
    "keras.applications",
    "keras.src.backend.tensorflow",
    "ray.tune.search.optuna",
    "ray.scripts.scripts",
    "ray.dashboard.dashboard",
    "ray.dashboard.agent",
    "ray._private.workers.default_worker",
    "ray.dashboard.modules.job.job_head",
    "ray.dashboard.modules.job.job_agent",
    "mlflow.cli",
    "mlflow.keras",
    "mlflow.server.auth",
    "mlflow.server.fastapi_app",
    "mlflow.store.artifact.s3_artifact_repo",
    "optuna.samplers",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "scipy.stats",
    "statsmodels.stats.contingency_tables",
    "pandas",
    "pyarrow.parquet",
    "matplotlib.pyplot",
    "openpyxl",
    "pydicom",
    "psycopg",
    "psycopg_binary",
    "boto3",
    "s3fs",
    "gcsfs",
    "rich.table",
    "jinja2",
    "filelock",
)

if __name__ == "__main__":
    for program in PROGRAMS:
        importlib.import_module(program)
    compiled = [path.stat().st_size for path in Path(sysconfig.get_path("purelib")).rglob("*.pyc")]
    print(f"{len(compiled)} compiled files, {sum(compiled) / 1e6:.0f} MB")
