"""How fast do pixels come? The memory-mapped array of decoded images against decoding the files.

Run:  python benchmarks/pixel_reader.py --data DIR
Cost: some 20 passes over the images: a minute for a thousand images at 224 px on 2 cores.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import numpy as np
from measuring import environment, own_command, write_result
from rendering import render_one

from cxr_models.dataset import Manifest, in_threads, read_manifest
from cxr_models.pixels import decode, pixel_array

RESULTS = Path(__file__).parent / "results"
BATCH = 64


def main() -> None:
    """The command."""
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="pixel-reader-") as cache:
        manifest = read_manifest(arguments.data)
        readers = list_readers(manifest, arguments.side, pixel_array(manifest, arguments.side, Path(cache)))
        images = len(manifest.records)
        rows = [
            {"name": name, "images_per_second": images / median_seconds(read, arguments.repeats)}
            for name, read in readers.items()
        ]
    result = {
        "kind": "pixel_reader",
        "environment": environment(own_command()),
        "side": arguments.side,
        "images": images,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    write_result(result, arguments.out / f"pixel_reader-{arguments.side}px.json")
    print(render_one(result))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    found = argparse.ArgumentParser(description="Images per second of the pixel reader and of decoding.")
    found.add_argument("--data", type=Path, required=True, metavar="DIR", help="X-rays, as sweep.run takes them")
    found.add_argument("--side", type=int, default=224, metavar="PX", help="image side (224)")
    found.add_argument("--repeats", type=int, default=5, metavar="N", help="passes of each reader (5)")
    found.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="(benchmarks/results)")
    return found


def list_readers(manifest: Manifest, side: int, pixels: Path) -> Mapping[str, Callable[[], None]]:
    """Name -> one pass over all images in random order."""
    paths = [manifest.root / record.path for record in manifest.records]
    channels = 1 if manifest.grey else 3
    order = np.random.default_rng(0).permutation(len(paths))

    def gather() -> None:
        mapped = np.load(pixels, mmap_mode="r")
        for start in range(0, len(order), BATCH):
            np.array(mapped[order[start : start + BATCH]])  # gathered out of the map, then copied once more

    def decode_alone() -> None:
        for index in order:
            decode(paths[index], side, channels)

    def decode_in_threads() -> None:
        in_threads(lambda index: decode(paths[index], side, channels), order.tolist(), None)

    return {
        f"memory-mapped array, batches of {BATCH}, copied": gather,
        "Pillow, one thread (cxr_models.pixels.decode)": decode_alone,
        "Pillow, all cores": decode_in_threads,
        "tf.data as image_dataset_from_directory, all cores": _tensorflow_reader([str(paths[i]) for i in order], side),
    }


def _tensorflow_reader(paths: list[str], side: int) -> Callable[[], None]:
    """The operations of `keras.utils.image_dataset_from_directory`, on files as they lie."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    def load(path: object) -> object:
        picture = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return tf.image.resize(picture, (side, side))

    images = tf.data.Dataset.from_tensor_slices(paths).map(load, num_parallel_calls=tf.data.AUTOTUNE)
    batches = images.batch(BATCH).prefetch(tf.data.AUTOTUNE)

    def read() -> None:
        for _ in batches:
            pass

    return read


def median_seconds(read: Callable[[], None], repeats: int) -> float:
    """Median over the passes; a first one that warms caches and threads is not counted."""
    read()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - begun)
    return median(seconds)


if __name__ == "__main__":
    main()
