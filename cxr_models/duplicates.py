"""Images that are one picture: the same bytes or pixels in several files, or a copy that was changed a little.

Copies with other brightness or contrast, inverted, saved anew with loss, or resized are found; one that was cropped by
more than about a hundredth, turned or mirrored is not.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cxr_models.dataset import DataError, ImageRecord, Manifest, Progress, in_threads
from cxr_models.fingerprints import detail_vectors, perceptual_hashes, read_thumbnails, shrunk, whole_vectors
from cxr_models.images import read_picture
from cxr_models.kept import keep, kept

Node = TypeVar("Node", int, str)

SEARCH_VERSION = 1  # raise it with any change of what is found: stored results are then not used again

# Chest X-rays all look alike, so a hash only proposes and the pixels decide. The bounds were chosen on 1,222 real ones
# (746,031 pairs), whose 40 pairs of one picture have at least 0.93 in details of thumbnails and 0.88 when confirmed.
# Copies of 100 of them with 0.6 or 1.6 times the contrast, brightness 0.7 or 1.3 (clipped), gamma 0.6 or 1.6, at 64 or
# 100 pixels, blurred, sharpened or as JPEG of quality 20 have at least 0.86 and 0.84. Of all other pairs one has 0.74
# when confirmed, a film and its crop, and no other more than 0.56; phantoms of different patients have up to 0.75.
MAX_DISTANCE = 12  # bits
HASH_BITS = 63  # that can differ; in an inverted copy nearly all of them do
LEAST_WHOLE = 0.92  # correlation of the thumbnails
LEAST_DETAIL = 0.75  # of their details, see `fingerprints.detail_vectors`
CONFIRMING_SIDE = 64  # in pixels: both files are read again at this size
LEAST_CONFIRMED = 0.84  # of their details then

# The frames of a film are all alike, and all their pairs would fill the memory: each is paired with so many later ones,
# which is enough to put all of them into one cluster.
MOST_PARTNERS = 100

ROWS_AT_ONCE = 256  # of the table of all distances
PAIRS_AT_ONCE = 4096
PICTURES_AT_ONCE = 1024
DENSE = 0.02  # share of a table of products from which all of it is computed faster than the part


@dataclass(frozen=True)
class NearPair:
    """Two images that are one picture although their pixels differ.

    Attributes:
        first, second: places in the manifest, the smaller one first.
        correlation: of their details when confirmed: 1 for equal up to brightness and contrast, below 0 if one of the
            two is inverted.
    """

    first: int
    second: int
    correlation: float


@dataclass(frozen=True)
class Duplicates:
    """What is the same in a manifest.

    Attributes:
        exact: places of images with equal pixels, in groups of two or more.
        near: in the order of the manifest; of a group of `exact`, its first image stands for all.
    """

    exact: tuple[tuple[int, ...], ...]
    near: tuple[NearPair, ...]

    @property
    def links(self) -> list[tuple[int, int]]:
        """Pairs of places that are one picture; enough of them to join all that are."""
        exact = [(group[0], other) for group in self.exact for other in group[1:]]
        return exact + [(pair.first, pair.second) for pair in self.near]

    def clusters(self, images: int) -> tuple[tuple[int, ...], ...]:
        """Places of images that are one picture, exact and near ones together, in groups of two or more."""
        members: dict[int, list[int]] = defaultdict(list)
        for place, root in _roots(range(images), self.links).items():
            members[root].append(place)
        return tuple(tuple(found) for found in members.values() if len(found) > 1)

    def groups(self, manifest: Manifest) -> tuple[str, ...]:
        """Of every record, what may not stand on two sides of a split: patients joined by the pictures they share.

        A group is called after its first patient by name, so that without duplicates it is the patient.
        """
        patients = [record.patient for record in manifest.records]
        roots = _roots(patients, [(patients[first], patients[second]) for first, second in self.links])
        return tuple(roots[patient] for patient in patients)


def find_duplicates(manifest: Manifest, cache_dir: Path | None = None, progress: Progress | None = None) -> Duplicates:
    """Find the images that are one picture.

    Equal digests of the pixels are exact duplicates. Near ones have perceptual hashes at most `MAX_DISTANCE` bits
    apart, or from opposite; thumbnails that correlate, as a whole and in their details; and details that correlate
    still when both files are read again at a higher resolution.

    Args:
        manifest: as `read_manifest` gives it; images without a thumbnail have no near duplicate.
        cache_dir: what was found is kept below it.
        progress: called with (images compared with all others, images).

    Raises:
        DataError: an image can no longer be read.
    """
    first_of: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(manifest.records):
        first_of[record.pixels or record.sha256 or record.path].append(place)
    exact = tuple(tuple(group) for group in first_of.values() if len(group) > 1)
    stored = _stored_at(manifest, cache_dir) if cache_dir else None
    near = _load_near(stored, len(manifest.records)) if stored else None
    if near is None:
        alone = sorted(group[0] for group in first_of.values() if manifest.records[group[0]].thumbnail)
        near = _near(manifest, alone, progress)
        if stored:
            keep(stored, [(pair.first, pair.second, pair.correlation) for pair in near])
    return Duplicates(exact, near)


def _stored_at(manifest: Manifest, cache_dir: Path) -> Path:
    contents = json.dumps([SEARCH_VERSION, *(record.sha256 for record in manifest.records)])
    return cache_dir / "audits" / f"{hashlib.sha256(contents.encode()).hexdigest()[:24]}-near.json"


def _load_near(stored: Path, images: int) -> tuple[NearPair, ...] | None:
    """What the file holds; None if it is absent or damaged."""
    try:
        pairs = tuple(NearPair(int(row[0]), int(row[1]), float(row[2])) for row in kept(stored))
    except (ValueError, TypeError, IndexError, KeyError):
        return None
    return pairs if all(0 <= pair.first < pair.second < images for pair in pairs) else None


def _near(manifest: Manifest, places: Sequence[int], progress: Progress | None) -> tuple[NearPair, ...]:
    """Near duplicates among some images of a manifest."""
    if len(places) < 2:
        return ()
    thumbnails = read_thumbnails([manifest.records[place].thumbnail for place in places])
    whole, detail = _in_blocks(whole_vectors, thumbnails), _in_blocks(detail_vectors, thumbnails)
    likely = []
    for pairs in _candidates(perceptual_hashes(thumbnails), progress):
        some = pairs[abs(_correlations(whole, pairs)) >= LEAST_WHOLE]
        some = some[abs(_correlations(detail, some)) >= LEAST_DETAIL]
        first = some[:, 0]  # in order
        likely.append(some[np.arange(len(first)) - np.searchsorted(first, first) < MOST_PARTNERS])
    found = np.concatenate(likely) if likely else np.empty((0, 2), np.int64)
    return _confirmed([manifest.records[place] for place in places], manifest.root, np.asarray(places), found)


def _candidates(hashes: NDArray[np.uint64], progress: Progress | None) -> Iterator[NDArray[np.int64]]:
    """(pairs, 2) places, the smaller first, of hashes nearly equal or nearly opposite; a part of them at a time."""
    for start in range(0, len(hashes), ROWS_AT_ONCE):
        rows = hashes[start : start + ROWS_AT_ONCE]
        distances = np.bitwise_count(rows[:, None] ^ hashes[None, start:])
        near = (distances <= MAX_DISTANCE) | (distances >= HASH_BITS - MAX_DISTANCE)
        first, second = np.nonzero(np.triu(near, k=1))
        yield np.stack([first, second], axis=1) + start
        if progress:
            progress(min(start + ROWS_AT_ONCE, len(hashes)), len(hashes))


def _in_blocks(
    vectors_of: Callable[[NDArray[np.uint8]], NDArray[np.float32]], pictures: NDArray[np.uint8]
) -> NDArray[np.float16]:
    """(images, length) vectors, a part at a time and in half precision: many images need not fill the memory."""
    blocks = range(0, len(pictures), PICTURES_AT_ONCE)
    return np.concatenate([vectors_of(pictures[at : at + PICTURES_AT_ONCE]).astype(np.float16) for at in blocks])


def _correlations(vectors: NDArray[np.float16], pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    """(pairs,) scalar products, by a whole table of them where most of it is asked for: the frames of a film."""
    if not len(pairs):
        return np.empty(0, np.float32)
    low, high = int(pairs[:, 0].min()), int(pairs[:, 0].max()) + 1
    if high - low <= ROWS_AT_ONCE and len(pairs) > DENSE * (high - low) * (len(vectors) - low):
        table = vectors[low:high].astype(np.float32) @ vectors[low:].astype(np.float32).T
        return np.asarray(table[pairs[:, 0] - low, pairs[:, 1] - low])
    parts = (pairs[at : at + PAIRS_AT_ONCE] for at in range(0, len(pairs), PAIRS_AT_ONCE))
    sides = ((vectors[side].astype(np.float32) for side in part.T) for part in parts)
    return np.concatenate([np.einsum("pv,pv->p", first, second) for first, second in sides])


def _confirmed(
    records: Sequence[ImageRecord], root: Path, places: NDArray[np.int64], pairs: NDArray[np.int64]
) -> tuple[NearPair, ...]:
    """The pairs that agree at `CONFIRMING_SIDE` too."""
    needed = np.unique(pairs)
    pictures = in_threads(lambda index: _read_again(root / records[index].path), needed.tolist(), None)
    if not pictures:
        return ()
    rows = np.searchsorted(needed, pairs)
    values = _correlations(_in_blocks(detail_vectors, np.stack(pictures)), rows)
    kept = [
        NearPair(int(places[first]), int(places[second]), round(float(value), 4))
        for (first, second), value in zip(pairs, values, strict=True)
        if abs(value) >= LEAST_CONFIRMED
    ]
    return tuple(sorted(kept, key=lambda pair: (pair.first, pair.second)))


def _read_again(path: Path) -> NDArray[np.uint8]:
    try:
        return shrunk(read_picture(path), CONFIRMING_SIDE)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(path)!r} could be read when the data set was listed, and now it cannot: {error}\n"
            "  remedy: leave the images alone while a sweep starts, and start it again"
        ) from error


def _roots(nodes: Iterable[Node], links: Sequence[tuple[Node, Node]]) -> dict[Node, Node]:
    """Node -> the smallest node it is connected with. Not SciPy's, whose import would double the time of a plan."""
    above = {node: node for node in nodes}

    def root(node: Node) -> Node:
        while above[node] != node:
            above[node] = above[above[node]]
            node = above[node]
        return node

    for link in links:
        first, second = sorted(map(root, link))
        above[second] = first
    return {node: root(node) for node in above}
