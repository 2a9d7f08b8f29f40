"""A training that trains nothing: what is left of a sweep then is its own cost. Run by `many_trials.py`'s workers."""

from collections.abc import Generator

import numpy as np

from cxr_models.trial import METRICS, VALIDATION_SCORES, EpochMetrics
from sweep.worker import TrialJob

CLASSES = ("a", "b", "c")
IMAGES = 150  # in the validation set


def program(job: TrialJob) -> Generator[EpochMetrics, bool, None]:
    """All epochs at once, and the validation scores every real trial leaves."""
    rng = np.random.default_rng(job.config.seed)
    labels = np.arange(IMAGES, dtype=np.int32) % len(CLASSES)
    scores = np.log(rng.dirichlet(np.ones(len(CLASSES)), IMAGES)).astype(np.float32)
    job.folder.mkdir(parents=True)
    np.savez(job.folder / VALIDATION_SCORES, index=np.arange(IMAGES), labels=labels, scores=scores)
    for epoch in range(1, job.config.epochs + 1):
        value = 1.0 - job.config.dropout / epoch - abs(np.log10(job.config.learning_rate) + 3) / 10
        figures = {**dict.fromkeys(METRICS, float(value)), **{f"recall/{name}": float(value) for name in CLASSES}}
        if not (yield EpochMetrics(job.trial_id, epoch, 0, job.config.learning_rate, figures, figures, 0.01, 1e4)):
            return
