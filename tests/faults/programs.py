"""A fake training that goes on where it was killed, as real ones do."""

import json
import time
from dataclasses import replace

import numpy as np

from cxr_models.storage import written_whole
from sweep.worker import TrialJob
from tests.programs import Epochs, measured, value_of

EPOCH_S = 0.2


def reading(job: TrialJob) -> Epochs:
    """`steady`, and each epoch tells what its pixels add up to and, in place of its device, where its folder lies."""
    pixels = int(np.load(job.work.data.pictures(job.config)).sum())
    for metrics in steady(job):
        here = replace(metrics, val={**metrics.val, "pixels": pixels}, device=str(job.work.folder))
        if not (yield here):
            return


def steady(job: TrialJob) -> Epochs:
    """Epochs of one length. When each ended is kept on disk before it is told; what the driver knows is not told."""
    job.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = job.folder / "checkpoint.json"
    ended = json.loads(checkpoint.read_text()) if checkpoint.is_file() else []
    for epoch in range(1, job.config.epochs + 1):
        if epoch > len(ended):
            time.sleep(EPOCH_S)
            ended.append(time.time_ns() // 1_000_000)
            with written_whole(checkpoint) as scratch:
                scratch.write_text(json.dumps(ended))
        metrics = replace(measured(job, epoch, value_of(job.config.seed, epoch)), ended_ms=ended[epoch - 1])
        if epoch > job.known and not (yield metrics):
            return
