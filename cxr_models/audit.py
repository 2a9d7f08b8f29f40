"""What is wrong with a data set before anything is trained on it: findings, each with its evidence and remedy.

Only leakage stops a run: an image or a patient on two sides of a given split, one image under two labels, or a model
of an earlier run that has learned from the test images, which only who knows that run can find. Splits that are cut
here cannot leak by themselves, since `Duplicates.groups` keeps together what belongs together.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from cxr_models.dataset import ImageRecord, Manifest
from cxr_models.duplicates import Duplicates
from cxr_models.fingerprints import read_thumbnails
from cxr_models.images import Flaw
from cxr_models.shortcuts import TOGETHER, Shortcut, Shortcuts, seen_text

PATIENT_ON_TWO_SIDES = "patient_on_two_sides"
DUPLICATE_ON_TWO_SIDES = "duplicate_on_two_sides"
ONE_IMAGE_TWO_LABELS = "one_image_two_labels"
EARLIER_MODEL_SAW_TEST = "earlier_model_saw_test"
LEAKS = (PATIENT_ON_TWO_SIDES, DUPLICATE_ON_TWO_SIDES, ONE_IMAGE_TWO_LABELS, EARLIER_MODEL_SAW_TEST)
"""The findings that stop a run; `allow` takes their names."""

COMMONEST = 10
LEAST_RANGE = 3  # of grey values in a thumbnail; an image with fewer is blank
CLASS_FOLLOWS = "class_follows_from_"
"""Before a key of `shortcuts.SEEN`, or `TOGETHER`, the name of a finding."""


class Severity(StrEnum):
    """What a finding does to a run."""

    LEAK = "leak"  # stops it, unless it is allowed
    WARNING = "warning"  # bears on what its figures mean, and stands beside them
    NOTE = "note"  # is worth knowing


def readable(text: str) -> str:
    """Text with file names in it as it can be printed: bytes that are no UTF-8 become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Example:
    """One place where a finding was made.

    Attributes:
        paths: of the images or files; none where it is about many.
        detail: what is to be said of them, such as the patient; "" for nothing.
    """

    paths: tuple[str, ...]
    detail: str = ""

    def text(self, most: int) -> str:
        """In a line, with `most` of the paths."""
        shown = [*self.paths[:most], *(["..."] if len(self.paths) > most else [])]
        return readable(": ".join(filter(None, (", ".join(shown), self.detail))))


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing.

    Attributes:
        name: stable, in snake_case.
        evidence: what was found, with figures, a sentence.
        remedy: what can be done, a sentence.
        examples: every place, not only some; where the class follows from something, its `COMMONEST` values.
        allowed: a leak that the user lets pass.
    """

    name: str
    severity: Severity
    evidence: str
    remedy: str
    examples: tuple[Example, ...] = ()
    allowed: bool = False

    @property
    def stops(self) -> bool:
        """Whether no run may start."""
        return self.severity is Severity.LEAK and not self.allowed


@dataclass(frozen=True)
class Audit:
    """What is to be said of a data set.

    Attributes:
        used: images that the sweep uses.
        found: those that the data set has, with the unreadable and all that were left out on purpose.
        left_out: reason -> how many, for the difference.
        shortcuts: the bar to beat; None where there are no classes to tell.
        findings: the gravest first.
    """

    used: int
    found: int
    left_out: dict[str, int]
    shortcuts: Shortcuts | None
    findings: tuple[Finding, ...]

    @property
    def leaks(self) -> tuple[Finding, ...]:
        """The findings for which no run may start."""
        return tuple(finding for finding in self.findings if finding.stops)

    def with_findings(self, more: Sequence[Finding]) -> "Audit":
        """The same with findings that were made elsewhere."""
        return replace(self, findings=_gravest_first((*self.findings, *more)))

    def to_json(self) -> dict[str, Any]:
        """All of it, for `audit.json`."""
        return asdict(self)


def _gravest_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    order = list(Severity)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


def audit_data(
    manifest: Manifest,
    splits: Sequence[str],
    duplicates: Duplicates,
    shortcuts: Shortcuts | None = None,
    *,
    allow: Sequence[str] = (),
) -> Audit:
    """Judge a data set and its split.

    Args:
        manifest: the images.
        splits: part of each, as `splits.assign_splits` gives them; a given one may leak.
        duplicates: of the same manifest.
        shortcuts: likewise; None if classes do not matter, as for a segmentation.
        allow: names in `LEAKS` that may pass.
    """
    found = [
        *_two_sides(manifest, splits, duplicates, allow),
        *(_two_labels(manifest, duplicates, allow) if shortcuts else ()),
        *(_class_follows(shortcuts, manifest) if shortcuts else ()),
        *_left_out_files(manifest),
        *_blank(manifest),
        *_copies(manifest, duplicates),
        *(_two_classes(manifest) if shortcuts else ()),
    ]
    left_out = {
        "unreadable": sum(file.flaw is not Flaw.MASK for file in manifest.unreadable),
        "left out by the class map": manifest.excluded,
        "without a mask": manifest.unmasked,
        "also in an earlier data set": manifest.repeated,
        "not in the subset": manifest.spared,
    }
    used = len(manifest.records)
    return Audit(
        used=used,
        found=used + sum(left_out.values()),
        left_out={reason: count for reason, count in left_out.items() if count},
        shortcuts=shortcuts,
        findings=_gravest_first(found),
    )


def _two_sides(
    manifest: Manifest, splits: Sequence[str], duplicates: Duplicates, allow: Sequence[str]
) -> Iterator[Finding]:
    records = manifest.records
    places: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        places[record.patient].append(place)
    astray = {patient: own for patient, own in places.items() if len({splits[place] for place in own}) > 1}
    if astray:
        yield Finding(
            PATIENT_ON_TWO_SIDES,
            Severity.LEAK,
            f"{_counted(len(astray), 'patient')} of {len(places):,} {'has' if len(astray) == 1 else 'have'} images in "
            f"more than one part of the given split, {sum(map(len, astray.values())):,} in all: the model is tested on "
            "people it has seen.",
            "Give a split by patient, or none, so that one is cut; data.patient says how names tell the patient.",
            tuple(
                Example(tuple(records[place].path for place in own), f"patient {patient}: {_parts(splits, own)}")
                for patient, own in sorted(astray.items())
            ),
            PATIENT_ON_TWO_SIDES in allow,
        )
    clusters = duplicates.clusters(len(records))
    if across := [own for own in clusters if len({splits[place] for place in own}) > 1]:
        yield Finding(
            DUPLICATE_ON_TWO_SIDES,
            Severity.LEAK,
            f"{_counted(len(across), 'picture')} {'lies' if len(across) == 1 else 'lie'} in more than one part of the "
            f"given split, in {sum(map(len, across)):,} images: the model is tested on what it was trained on.",
            "Take the copies out of one part, or give no split, so that one is cut with copies on one side.",
            tuple(Example(tuple(records[place].path for place in own), _parts(splits, own)) for own in across),
            DUPLICATE_ON_TWO_SIDES in allow,
        )


def _two_labels(manifest: Manifest, duplicates: Duplicates, allow: Sequence[str]) -> Iterator[Finding]:
    records = manifest.records
    contrary = [own for own in duplicates.clusters(len(records)) if len({records[place].label for place in own}) > 1]
    if contrary or manifest.contrary:
        count = len(contrary) + len(manifest.contrary)
        yield Finding(
            ONE_IMAGE_TWO_LABELS,
            Severity.LEAK,
            f"{_counted(count, 'picture')} {'has' if count == 1 else 'have'} more than one label: at most one is "
            "right, and no model can have all of them right.",
            "Look at each and keep the copy whose label is right.",
            (
                *(
                    Example(
                        tuple(records[place].path for place in own), ", ".join(records[place].label for place in own)
                    )
                    for own in contrary
                ),
                *(Example(pair, "equal bytes; only the first is used") for pair in manifest.contrary),
            ),
            ONE_IMAGE_TWO_LABELS in allow,
        )


def _parts(splits: Sequence[str], places: Sequence[int]) -> str:
    return ", ".join(f"{count} in {part}" for part, count in Counter(splits[place] for place in places).items())


def _class_follows(shortcuts: Shortcuts, manifest: Manifest) -> Iterator[Finding]:
    """What tells the class by itself; all together only where nothing does alone."""
    alone = [shortcut for shortcut in shortcuts.found if shortcut.follows and shortcut.name != TOGETHER]
    for shortcut in alone or [shortcut for shortcut in shortcuts.found if shortcut.follows]:
        what = "source, size, bit depth and format" if shortcut.name == TOGETHER else shortcut.name.replace("_", " ")
        yield Finding(
            f"{CLASS_FOLLOWS}{shortcut.name}",
            Severity.WARNING,
            f"The class follows from the {what} of the files: who sees only that has {_shares(shortcut)}, against "
            f"{100 * shortcuts.majority:.1f} % and {100 * shortcuts.chance:.1f} % by always naming the largest class. "
            "A model may have learned that in place of the disease.",
            "Take the classes from the same sources, saved in the same way; test on images of another source.",
            _telling(shortcut.name, manifest),
        )


def _telling(name: str, manifest: Manifest) -> tuple[Example, ...]:
    """The classes of the images that have each of the commonest values, such as `256 x 256: 500 A, 3 B`."""
    if name == TOGETHER:
        return ()
    classes_of: dict[str, Counter[str]] = defaultdict(Counter)
    for record in manifest.records:
        classes_of[seen_text(name, record)][record.label] += 1
    commonest = sorted(classes_of.items(), key=lambda item: (-item[1].total(), item[0]))[:COMMONEST]
    return tuple(
        Example((), f"{value or 'unknown'}: {', '.join(f'{count:,} {label}' for label, count in own.most_common())}")
        for value, own in commonest
    )


def _shares(shortcut: Shortcut) -> str:
    return f"{100 * shortcut.accuracy:.1f} % accuracy ({100 * shortcut.balanced_accuracy:.1f} % balanced)"


# Flaw of a file -> the name of the finding, how files are called, and what can be done.
_FLAWS = {
    Flaw.TRUNCATED: ("truncated_files", "cut short", "Copy the data set again; the download may have ended early."),
    Flaw.EMPTY: ("empty_files", "empty", "Copy the data set again; the download may have ended early."),
    Flaw.SIZE: ("absurdly_sized_files", "of an absurd size", "See whether they are X-rays at all, and take them away."),
    Flaw.MASK: ("missing_masks", "named as masks and missing", "Copy the masks, too; their images have none now."),
    Flaw.UNREADABLE: (
        "unreadable_files",
        "unreadable",
        "Open one in an image viewer; mend the files or take them away.",
    ),
}


def _left_out_files(manifest: Manifest) -> Iterator[Finding]:
    for flaw, (name, words, remedy) in _FLAWS.items():
        if own := [file for file in manifest.unreadable if file.flaw is flaw]:
            yield Finding(
                name,
                Severity.NOTE,
                f"{_counted(len(own), 'file')} of {len(manifest.records) + len(manifest.unreadable):,} "
                f"{'is' if len(own) == 1 else 'are'} {words} and left out.",
                remedy,
                tuple(Example((file.path,), file.reason) for file in own),
            )


def _blank(manifest: Manifest) -> Iterator[Finding]:
    known = [record for record in manifest.records if record.thumbnail]
    pixels = read_thumbnails([record.thumbnail for record in known]).reshape(len(known), -1)
    if flat := np.flatnonzero(np.ptp(pixels, axis=1) < LEAST_RANGE).tolist():
        yield Finding(
            "blank_images",
            Severity.WARNING,
            f"{_counted(len(flat), 'image')} {'is' if len(flat) == 1 else 'are'} of one grey value and "
            f"{'shows' if len(flat) == 1 else 'show'} nothing.",
            "Take them away: whatever their class is, no model can tell it.",
            tuple(Example((known[place].path,)) for place in flat),
        )


def _copies(manifest: Manifest, duplicates: Duplicates) -> Iterator[Finding]:
    records = manifest.records
    counted = "Where no leak is told, nothing must be done: copies count as one person when a split is cut."
    if duplicates.exact:
        copies = sum(len(own) - 1 for own in duplicates.exact)
        yield Finding(
            "exact_duplicates",
            Severity.NOTE,
            f"{_counted(len(duplicates.exact), 'picture')} {'is' if len(duplicates.exact) == 1 else 'are'} there more "
            f"than once, pixel for pixel: {copies:,} of {len(records):,} images add nothing.",
            counted,
            tuple(Example(tuple(records[place].path for place in own)) for own in duplicates.exact),
        )
    if duplicates.near:
        yield Finding(
            "near_duplicates",
            Severity.NOTE,
            f"{_counted(len(duplicates.near), 'pair')} of images {'is' if len(duplicates.near) == 1 else 'are'} one "
            "picture with other brightness, contrast, size or compression, or inverted.",
            f"Look at the pairs. {counted}",
            tuple(
                Example((records[pair.first].path, records[pair.second].path), f"correlation {pair.correlation:.2f}")
                for pair in sorted(duplicates.near, key=lambda pair: abs(pair.correlation))
            ),
        )


def _two_classes(manifest: Manifest) -> Iterator[Finding]:
    of_patient: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in manifest.records:
        of_patient[record.patient].append(record)
    labels = {patient: sorted({record.label for record in own}) for patient, own in of_patient.items()}
    if several := sorted(patient for patient, own in labels.items() if len(own) > 1):
        yield Finding(
            "patient_in_two_classes",
            Severity.NOTE,
            f"{_counted(len(several), 'patient')} of {len(labels):,} {'has' if len(several) == 1 else 'have'} images "
            "of more than one class.",
            "Nothing must be done: a disease comes and goes, and all images of a patient stay on one side.",
            tuple(
                Example(
                    tuple(record.path for record in of_patient[patient]),
                    f"patient {patient}: {', '.join(labels[patient])}",
                )
                for patient in several
            ),
        )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
