"""How long does the audit of a data set take, and what does it find, against two ways without it?

Files are drawn (phantoms of different patients, 299 px PNG as in the COVID-19 Radiography Database), and copies of some
are planted: saved anew, resized, with other brightness or contrast. Then these look for the copies:

- the product's audit: every file read once, then hashes, thumbnails and pixels; and once more from its cache;
- all pairs: every file as 64 x 64 pixels, a correlation for each pair in a loop;
- ImageHash: its `phash` of every file, and a loop over all pairs of hashes.

The two loops run on fewer files; their seconds for all are scaled, reading with the files and comparing with the pairs.

Run:  python benchmarks/audit_speed.py --images 20000 --looped 1000
Cost: on one core a minute for 3,000 images to draw, ten seconds to audit them, and a minute for the loops.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from measuring import environment, own_command, write_result
from PIL import Image, ImageEnhance
from rendering import render_one

from cxr_models.audit import audit_data
from cxr_models.dataset import Manifest, read_manifest
from cxr_models.duplicates import find_duplicates
from cxr_models.phantom import CLASSES, draw, patient_drawings
from cxr_models.shortcuts import find_shortcuts
from cxr_models.splits import assign_splits

RESULTS = Path(__file__).parent / "results"
SIDE = 299
DRAWN_SIDE = 128  # drawn so large and enlarged: four times as fast
COPY_EVERY = 100  # of so many images one has a copy
LIKE = 0.95  # correlation from which the loop over pairs takes two images for one
DISTANCES = (2, 8)  # bits that two hashes of ImageHash may differ in

Pairs = set[frozenset[str]]
CHANGES: Sequence[Callable[[Image.Image], Image.Image]] = (
    lambda image: _as_jpeg(image, 60),
    lambda image: image.resize((200, 200)),
    lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    lambda image: ImageEnhance.Contrast(image).enhance(1.3),
    lambda image: _as_jpeg(ImageEnhance.Brightness(image.resize((256, 256))).enhance(1.15), 75),
)


def main() -> None:
    """The command."""
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="audit-speed-") as scratch:
        folder = Path(scratch) / "images"
        write_images(folder, arguments.images)
        result = {
            "kind": "audit_speed",
            "environment": environment(own_command()),
            "images": arguments.images,
            "looped": arguments.looped,
            "imagehash": version("imagehash"),
            **measure(folder, Path(scratch) / "cache", arguments.images, arguments.looped),
        }
    write_result(result, arguments.out / "audit_speed.json")
    print(render_one(result))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    found = argparse.ArgumentParser(description="Seconds and finds of the audit, and of two loops over all pairs.")
    found.add_argument("--images", type=int, default=20_000, metavar="N", help="to draw (20000)")
    found.add_argument("--looped", type=int, default=1000, metavar="N", help="of them for the loops (1000)")
    found.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="(benchmarks/results)")
    return found


def write_images(folder: Path, images: int) -> None:
    """`<class>/00000.png`, one patient each, the first of every `COPY_EVERY` with a copy beside it."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_image, [folder] * images, range(images), chunksize=50))


def write_image(folder: Path, number: int) -> None:
    """One of them, and its copy if it has one."""
    drawing = patient_drawings(1, number, CLASSES[number % 4])[0]
    image = Image.fromarray(draw(drawing, DRAWN_SIDE)[0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image.save(folder / CLASSES[number % 4] / f"{number:05}.png")
    if number % COPY_EVERY == 0:
        changed = CHANGES[number // COPY_EVERY % len(CHANGES)](image)
        changed.save(folder / CLASSES[number % 4] / f"{number:05}-copy.png")


def _as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def measure(folder: Path, cache: Path, images: int, looped: int) -> dict[str, Any]:
    """Seconds and finds of all of them."""
    watch = Watch()
    audit(folder, cache, watch, "cold")
    pairs = audit(folder, cache, watch, "cached")
    files = sorted(path for path in folder.rglob("*.png") if int(path.name[:5]) < looped)
    every = len(list(folder.rglob("*.png")))
    planted = {frozenset((f"{number:05}.png", f"{number:05}-copy.png")) for number in range(0, images, COPY_EVERY)}
    some = {pair for pair in planted if int(min(pair)[:5]) < looped}
    loops = all_pairs(files, watch) | hashed_pairs(files, watch)
    return {
        "files": every,
        "looped_files": len(files),
        "seconds": watch.seconds,
        "planted": len(planted),
        "audit": finds(pairs, planted),
        "planted_looped": len(some),
        "loops": {name: finds(found, some) for name, found in loops.items()},
    }


class Watch:
    """Wall and processor seconds of named steps; the latter of all threads, so that other programs matter less."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self._since = time.perf_counter(), time.process_time()

    def start(self) -> None:
        """Begin a step."""
        self._since = time.perf_counter(), time.process_time()

    def stop(self, name: str) -> None:
        """End it, and begin the next."""
        wall, processor = time.perf_counter() - self._since[0], time.process_time() - self._since[1]
        self.seconds[name] = {"wall": wall, "processor": processor}
        self.start()


def audit(folder: Path, cache: Path, watch: Watch, run: str) -> Pairs:
    """The product's audit, as a plan does it; the pairs of images that it calls one."""
    watch.start()
    manifest = read_manifest(folder, patient="none", cache_dir=cache)
    watch.stop(f"{run}: read")
    duplicates = find_duplicates(manifest, cache)
    watch.stop(f"{run}: compare")
    groups = duplicates.groups(manifest)
    shortcuts = find_shortcuts(manifest, groups, cache)
    splits = ["train"] * len(groups) if run == "cached" else assign_splits(manifest, seed=0, groups=groups)
    audit_data(manifest, splits, duplicates, shortcuts)
    watch.stop(f"{run}: judge")
    return names(manifest, duplicates.links)


def names(manifest: Manifest, links: Sequence[tuple[int, int]]) -> Pairs:
    """Pairs of places as pairs of file names."""
    return {frozenset(manifest.records[place].path.rpartition("/")[2] for place in link) for link in links}


def all_pairs(files: Sequence[Path], watch: Watch) -> Mapping[str, Pairs]:
    """Every pair of files compared by its pixels."""
    watch.start()
    pixels = {path.name: np.asarray(Image.open(path).convert("L").resize((64, 64))).ravel() for path in files}
    watch.stop("pixels: read")
    found = {
        frozenset((first, second))
        for first, second in combinations(pixels, 2)
        if np.corrcoef(pixels[first], pixels[second])[0, 1] >= LIKE
    }
    watch.stop("pixels: compare")
    return {f"all pairs, correlation of 64 x 64 pixels at least {LIKE}": found}


def hashed_pairs(files: Sequence[Path], watch: Watch) -> Mapping[str, Pairs]:
    """ImageHash as its documentation has it: hashes whose difference is small."""
    import imagehash

    watch.start()
    hashes = {path.name: imagehash.phash(Image.open(path)) for path in files}
    watch.stop("hashes: read")
    distances = {
        frozenset((first, second)): hashes[first] - hashes[second] for first, second in combinations(hashes, 2)
    }
    watch.stop("hashes: compare")
    return {
        f"ImageHash's phash, at most {most} bits": {pair for pair, distance in distances.items() if distance <= most}
        for most in DISTANCES
    }


def finds(pairs: Pairs, planted: Pairs) -> dict[str, int]:
    """How many planted copies were found, and how many pairs of different patients were taken for one image."""
    return {"found": len(pairs & planted), "false": len(pairs - planted)}


if __name__ == "__main__":
    main()
