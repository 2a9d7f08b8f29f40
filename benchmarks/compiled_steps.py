"""Two choices in `cxr_models.steps`: steps without XLA, and the images in one batch of inference.

One process with one thread; medians, without what is run first, which compiles.

    python benchmarks/compiled_steps.py --data DIR --weights FILE --out benchmarks/results     # some 3 minutes
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from measure_rates import parser, strategies, trial_config, trial_data
from measuring import environment, own_command, write_result
from rendering import render_one

from cxr_models.trial import Objective, TrialData

EPOCHS = 4
BATCH_SIZE = 16
INFERENCE_BATCHES = (8, 16, 32, 64, 128)
EXTRACTED = 512
PASSES = 5


def main() -> None:
    """The command."""
    arguments = parser(__doc__, out="folder for the results").parse_args()
    from cxr_models import steps

    steps.configure(1)
    with tempfile.TemporaryDirectory() as scratch:
        data = trial_data(arguments, Path(scratch))
        depths = [freeze for freeze in strategies() if freeze != "none"]
        training = [_epochs(data, arguments.side, freeze, Path(scratch)) for freeze in depths]
        inference = _images_per_second(data, arguments.side)
    result = {
        "kind": "compiled_steps",
        "environment": environment(own_command()),
        "side": arguments.side,
        "batch_size": BATCH_SIZE,
        "training": training,
        "inference": inference,
    }
    write_result(result, arguments.out / "compiled_steps.json")
    print(render_one(json.loads(json.dumps(result))))  # as it reads from the file: keys are text there


def _epochs(data: TrialData, side: int, freeze: str, folder: Path) -> dict[str, Any]:
    """Seconds of an epoch's training from stored features, as it is and with XLA."""
    from cxr_models import training

    seconds = {}
    for name, compiled in (("plain", _as_they_are), ("xla", _steps_by_xla)):
        training._warm_steps.cache_clear()
        with compiled():
            config = replace(trial_config(side, freeze, BATCH_SIZE), epochs=EPOCHS)
            place = folder / f"{name}-{freeze}".replace(":", "-")
            trial = training.run_trial("compiled", config, data, place, Objective("accuracy", "max"))
            rates = [next(trial).images_per_second]
            while len(rates) < EPOCHS:
                rates.append(trial.send(True).images_per_second)
            trial.close()
        seconds[name] = len(data.train) / statistics.median(rates[1:])
    training._warm_steps.cache_clear()
    return {"freeze": freeze, **seconds}


@contextmanager
def _as_they_are() -> Any:
    yield


@contextmanager
def _steps_by_xla() -> Any:
    """XLA compiles one step, whose shapes are fixed; the loop around it has no fixed length."""
    import tensorflow as tf

    from cxr_models.steps import Steps

    plain = Steps._train_step
    compiled: dict[int, Callable[..., Any]] = {}

    def step(self: Steps, *given: Any) -> Any:
        program = compiled.setdefault(id(self), tf.function(lambda *some: plain(self, *some), jit_compile=True))
        return program(*given)

    with patch.object(Steps, "_train_step", step):
        yield


def _images_per_second(data: TrialData, side: int) -> Mapping[int, float]:
    """Extraction of pooled features by the images in a batch."""
    from cxr_models import steps
    from cxr_models.network import build_network

    config = trial_config(side, "all", BATCH_SIZE)
    group = config.backbone, config.weights, config.image_side
    network = build_network(config, classes=len(data.classes), channels=data.channels, weights=data.weights[group])
    pooled = [cut for cut in data.features.cuts[group] if cut.pooling] if data.features else []
    pixels = np.load(data.pixels[side], mmap_mode="r")[:EXTRACTED]
    found = {}
    for batch in INFERENCE_BATCHES:
        with patch.object(steps, "CPU_BATCH", batch):
            prefix = steps.Prefix(network, pooled)
            prefix(pixels)
            rates = []
            for _ in range(PASSES):
                begun = time.perf_counter()
                prefix(pixels)
                rates.append(len(pixels) / (time.perf_counter() - begun))
            found[batch] = statistics.median(rates)
    return found


if __name__ == "__main__":
    main()
