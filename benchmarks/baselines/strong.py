"""Baseline: what a good engineer writes without this product.

Every image is decoded once into memory; one warm process per core, with one thread and TensorFlow imported once, takes
trial after trial and calls `fit` on the arrays. Frozen layers are still computed in every epoch of every trial.

Run:  python benchmarks/baselines/strong.py --data DIR --trials FILE.json --weights FILE --out FILE.json
Cost: half a minute to minutes a trial; use few trials and epochs.
"""

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from protocol import Arguments, Ran, Trial, read_arguments, write_results


@dataclass(frozen=True)
class Images:
    """One part of the data set: uint8 (images, side, side, 3) and (images,) class indices."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int32]


def decode(path: Path, side: int) -> NDArray[np.uint8]:
    """One image, uint8 (side, side, 3)."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))


def read_images(folder: Path, side: int, threads: int) -> Images:
    """All images of a folder, decoded into memory."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    listed = [(path, label) for label, class_folder in enumerate(classes) for path in sorted(class_folder.iterdir())]
    with ThreadPoolExecutor(threads) as pool:
        pixels = np.stack(list(pool.map(lambda entry: decode(entry[0], side), listed)))
    return Images(pixels, np.array([label for _, label in listed], np.int32))


class Worker:
    """One warm process. The images are the parent's memory, shared by fork; TensorFlow is imported after it."""

    arguments: Arguments
    train: Images
    val: Images

    @classmethod
    def start(cls, arguments: Arguments, train: Images, val: Images) -> None:
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
        import model  # noqa: F401 - TensorFlow comes with it, before the first trial

        cls.arguments, cls.train, cls.val = arguments, train, val

    @classmethod
    def run(cls, trial: Trial) -> Ran:
        import keras
        from model import EpochTimes, as_run, build_model

        began = time.time()
        keras.backend.clear_session()
        keras.utils.set_random_seed(trial.seed)
        model = build_model(
            freeze=trial.freeze,
            learning_rate=trial.learning_rate,
            dropout=trial.dropout,
            side=cls.arguments.side,
            classes=int(cls.train.labels.max()) + 1,
            weights=cls.arguments.weights,
        )
        times = EpochTimes()
        history = model.fit(
            cls.train.pixels,
            cls.train.labels,
            validation_data=(cls.val.pixels, cls.val.labels),
            batch_size=trial.batch_size,
            epochs=trial.epochs,
            verbose=0,
            callbacks=[times],
        )
        return as_run(trial, began, times, model, history)


def main() -> None:
    """Run every trial."""
    arguments = read_arguments("Decoded images in memory, warm processes")
    train, val = (read_images(arguments.data / part, arguments.side, arguments.cores) for part in ("train", "val"))
    fork = multiprocessing.get_context("fork")
    with fork.Pool(arguments.cores, Worker.start, (arguments, train, val)) as pool:
        ran = pool.map(Worker.run, arguments.trials, chunksize=1)
    write_results(arguments, ran, at_once=arguments.cores)


if __name__ == "__main__":
    main()
