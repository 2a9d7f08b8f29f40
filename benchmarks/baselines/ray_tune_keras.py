"""Baseline: plain Ray Tune with a Keras function trainable, one CPU a trial, as many trials at once as there are cores.

As https://docs.ray.io/en/latest/tune/getting-started.html and Ray's Keras example show it; each trial has one thread,
so that the machine is full and not oversubscribed.

Run:  python benchmarks/baselines/ray_tune_keras.py --data DIR --trials FILE.json --weights FILE --out FILE.json
Cost: minutes a trial; use few trials and epochs.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from protocol import Ran, Trial, read_arguments, write_results
from ray import tune


def train(config: dict[str, Any]) -> None:
    """Train one trial, in a process of its own."""
    os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    import keras
    from model import EpochTimes, build_model, image_datasets, trainable_parameters

    began = time.time()
    trial: Trial = config["trial"]
    side = config["side"]
    keras.utils.set_random_seed(trial.seed)
    train_images, val_images, classes = image_datasets(
        config["data"], side=side, batch_size=trial.batch_size, seed=trial.seed
    )
    model = build_model(
        freeze=trial.freeze,
        learning_rate=trial.learning_rate,
        dropout=trial.dropout,
        side=side,
        classes=classes,
        weights=config["weights"],
    )
    times = EpochTimes()
    facts = {"began": began, "trainable_parameters": trainable_parameters(model)}

    class Report(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            tune.report({**(logs or {}), **facts, "ended": time.time(), "epoch_seconds": times.seconds})

    callbacks = [times, Report()]  # in this order: a report holds the epoch it reports
    model.fit(train_images, validation_data=val_images, epochs=trial.epochs, verbose=0, callbacks=callbacks)


def main() -> None:
    """Run every trial."""
    arguments = read_arguments("Plain Ray Tune + Keras")
    ray.init(num_cpus=arguments.cores)
    shared = {
        "data": arguments.data,
        "weights": arguments.weights,
        "side": arguments.side,
    }
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(train, {"cpu": 1}),
            param_space={"trial": tune.grid_search(list(arguments.trials)), **shared},
            tune_config=tune.TuneConfig(metric="val_accuracy", mode="max"),
            run_config=tune.RunConfig(name="baseline", storage_path=str(Path(folder))),
        )
        results = tuner.fit()
    write_results(arguments, [_ran(result) for result in results], at_once=arguments.cores)


def _ran(result: Any) -> Ran:
    if result.error:
        raise result.error
    metrics = result.metrics
    return Ran(
        result.config["trial"],
        metrics["began"],
        metrics["ended"],
        metrics["epoch_seconds"],
        metrics["val_accuracy"],
        metrics["val_loss"],
        metrics["trainable_parameters"],
    )


if __name__ == "__main__":
    main()
