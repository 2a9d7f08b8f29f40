"""How far the class follows from what a file says of itself: its source, size, bit depth and format.

A model may learn these in place of the disease (DeGrave et al. 2021), so they set the bar that it has to beat. Known
for the COVID-19 Radiography Database: the archive an image came from alone tells the class of 65 % of the images.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from cxr_models.dataset import ImageRecord, Manifest
from cxr_models.kept import keep, kept

SHORTCUTS_VERSION = 2  # raise it with any change of what is found: stored results are then not used again
FOLDS = 5
MOST_VALUES = 100  # of a source that are told apart; the rarer ones count as one
LEAST_IN_LEAF = 5  # images; fewer would let a tree learn single images by their sizes
STANDARD_ERRORS = 3.0  # above chance, for a class to follow from something; none of 320 sets made by chance came so far
LEAST_GAIN = 0.02  # above chance too, since among many images any trifle is certain
TOGETHER = "together"


def _source(record: ImageRecord) -> tuple[str, ...]:
    """A source as it stands, and of an address the host, since each image may have an address of its own."""
    return record.source, urlsplit(record.source).netloc if "://" in record.source else record.source


def _size(record: ImageRecord) -> tuple[float, ...]:
    return record.width, record.height, record.width * record.height, record.width / record.height


# What a classifier may see of an image; text is taken as a name, numbers as they are.
SEEN: Mapping[str, Callable[[ImageRecord], tuple[Any, ...]]] = {
    "source": _source,
    "size": _size,
    "bit_depth": lambda record: (record.mode,),
    "format": lambda record: (record.format,),
}


def seen_text(name: str, record: ImageRecord) -> str:
    """What a classifier sees of an image, for a person; `name` is a key of `SEEN`."""
    return f"{record.width} x {record.height}" if name == "size" else str(SEEN[name](record)[0])


@dataclass(frozen=True)
class Shortcut:
    """A classifier that sees one thing alone, or all of them together.

    Attributes:
        name: a key of `SEEN`, or `TOGETHER`.
        values: how many different ones there are.
        accuracy: share of images it has right, cross-validated: each image by a classifier that has seen no other image
            of its patient.
        balanced_accuracy: mean over the classes of the share a classifier has right that counts every class alike, so
            that it names a rare class, too, where something speaks for it.
        follows: whether the class follows from it, by more than chance.
    """

    name: str
    values: int
    accuracy: float
    balanced_accuracy: float
    follows: bool


@dataclass(frozen=True)
class Shortcuts:
    """The bar to beat.

    Attributes:
        majority: share of the largest class: the accuracy of always naming it.
        chance: balanced accuracy of any answer that has nothing to do with the image.
        found: what differs between images, in the order of `SEEN`, then, of several, all `TOGETHER`; empty if nothing
            differs, or if some class has a single patient.
    """

    majority: float
    chance: float
    found: tuple[Shortcut, ...]

    @property
    def bar(self) -> Shortcut | None:
        """The classifier that sees everything; None if there is nothing to see."""
        return self.found[-1] if self.found else None


def find_shortcuts(manifest: Manifest, groups: Sequence[str], cache_dir: Path | None = None) -> Shortcuts:
    """Measure how well classes are told from what files say of themselves.

    The classifier is a decision tree of scikit-learn, cross-validated over `FOLDS` folds that share no group. The class
    follows from something if accuracy or balanced accuracy lies above the majority's or chance by `LEAST_GAIN`, and by
    `STANDARD_ERRORS` of what as many independent groups would give. These count as `_effective` says, since a few may
    have most of the images; or each as much as any other, in an accuracy that is a mean over groups.

    Args:
        manifest: of two classes or more.
        groups: of every record, what belongs together, such as its patient.
        cache_dir: what was found is kept below it.
    """
    stored = _stored_at(manifest, groups, cache_dir) if cache_dir else None
    if stored and (known := _load(stored)):
        return known
    shortcuts = _measured(manifest, groups)
    if stored:
        keep(stored, asdict(shortcuts))
    return shortcuts


def _stored_at(manifest: Manifest, groups: Sequence[str], cache_dir: Path) -> Path:
    seen = [(record.label, group, *_seen(record)) for record, group in zip(manifest.records, groups, strict=True)]
    contents = json.dumps([SHORTCUTS_VERSION, version("scikit-learn"), seen])
    return cache_dir / "audits" / f"{hashlib.sha256(contents.encode()).hexdigest()[:24]}-shortcuts.json"


def _load(stored: Path) -> Shortcuts | None:
    """What the file holds; None if it is absent or damaged."""
    try:
        known = kept(stored)
        return Shortcuts(known["majority"], known["chance"], tuple(Shortcut(**row) for row in known["found"]))
    except (ValueError, TypeError, KeyError):
        return None


def _seen(record: ImageRecord) -> list[tuple[Any, ...]]:
    return [look(record) for look in SEEN.values()]


def _measured(manifest: Manifest, groups: Sequence[str]) -> Shortcuts:
    labels = manifest.labels
    counts = np.bincount(labels, minlength=len(manifest.classes))
    majority, chance = float(counts.max() / len(labels)), 1.0 / len(manifest.classes)
    varied = {
        name: values
        for name, look in SEEN.items()
        if len({*(values := [look(record) for record in manifest.records])}) > 1
    }
    fold_of = _folds(labels, groups) if varied else None
    if fold_of is None:
        return Shortcuts(majority, chance, ())
    owners = np.array(groups)
    _, group, sizes = np.unique(owners, return_inverse=True, return_counts=True)
    shares = 1.0 / (len(sizes) * sizes[group])  # of an image, where every group counts alike
    largest = float(np.bincount(labels, weights=shares).max())
    group_noise = largest * (1.0 - largest) / len(sizes)
    noise = majority * (1.0 - majority) / _effective(owners)
    balanced_noise = sum(0.25 / _effective(owners[labels == own]) for own in range(len(counts))) / len(counts) ** 2
    if len(varied) > 1:
        varied[TOGETHER] = [sum(rows, ()) for rows in zip(*varied.values(), strict=True)]
    found = []
    for name, values in varied.items():
        natural = _predicted(values, labels, fold_of, "natural") == labels
        right = _predicted(values, labels, fold_of, "balanced") == labels
        accuracy = float(natural.mean())
        balanced = float(np.mean([right[labels == own].mean() for own in range(len(counts))]))
        gains = accuracy > majority + LEAST_GAIN or balanced > chance + LEAST_GAIN
        follows = (
            _above(accuracy, majority, noise)
            or _above(balanced, chance, balanced_noise)
            or (gains and _above(float(shares[natural].sum()), largest, group_noise))
        )
        found.append(Shortcut(name, len(set(values)), accuracy, balanced, follows))
    return Shortcuts(majority, chance, tuple(found))


def _effective(groups: NDArray[np.str_]) -> float:
    """How many groups of one size would give a share as uncertain as these do: Kish's effective sample size.

    All images of a group may be right or wrong together, so that where a few groups have most images, these decide.

    Args:
        groups: (images,) the group of each, of at least one image.
    """
    _, sizes = np.unique(groups, return_counts=True)
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


def _above(value: float, chance: float, variance: float) -> bool:
    """Whether a share is more than `chance`, of which independent groups would give one of this variance."""
    return value > chance + max(LEAST_GAIN, STANDARD_ERRORS * float(np.sqrt(variance)))


def _folds(labels: NDArray[np.int32], groups: Sequence[str]) -> NDArray[np.int64] | None:
    """(images,) fold of each image: groups are dealt by their commonest class; None if a class has but one group."""
    from sklearn.model_selection import StratifiedKFold

    of_group: dict[str, Counter[int]] = defaultdict(Counter)
    for label, group in zip(labels.tolist(), groups, strict=True):
        of_group[group][label] += 1
    names = list(of_group)
    kinds = np.array([of_group[name].most_common(1)[0][0] for name in names])
    fewest = min(Counter(kinds.tolist()).values())
    if fewest < 2:
        return None
    folds: dict[str, int] = {}
    splitter = StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=0)
    for fold, (_, held_out) in enumerate(splitter.split(kinds, kinds)):
        folds |= {names[place]: fold for place in held_out}
    return np.array([folds[group] for group in groups])


def _predicted(
    values: Sequence[tuple[Any, ...]],
    labels: NDArray[np.int32],
    fold_of: NDArray[np.int64],
    weights: Literal["natural", "balanced"],
) -> NDArray[np.int32]:
    """(images,) class that a tree names for each image, having seen the other folds."""
    from sklearn.compose import make_column_transformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder
    from sklearn.tree import DecisionTreeClassifier

    names = [place for place, value in enumerate(values[0]) if isinstance(value, str)]
    columns = np.array(values, dtype=object)
    encoder = OneHotEncoder(max_categories=MOST_VALUES, handle_unknown="infrequent_if_exist", sparse_output=False)
    tree = make_pipeline(
        make_column_transformer((encoder, names), remainder="passthrough"),
        DecisionTreeClassifier(
            min_samples_leaf=LEAST_IN_LEAF, class_weight=None if weights == "natural" else weights, random_state=0
        ),
    )
    predicted = np.empty_like(labels)
    for fold in np.unique(fold_of):
        held_out = fold_of == fold
        predicted[held_out] = tree.fit(columns[~held_out], labels[~held_out]).predict(columns[held_out])
    return predicted
