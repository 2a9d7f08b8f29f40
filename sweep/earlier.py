"""What the models of earlier sweeps have learned from that a sweep builds on, beside the images it is judged by.

A model that starts from one knows the images that one has learned from. Where test images are among them, no test
figure holds. A U-Net that finds lungs has learned from masks, which says nothing of the labels: that is told, no more.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_models.audit import EARLIER_MODEL_SAW_TEST, Example, Finding, Severity
from cxr_models.dataset import ImageRecord, Manifest
from cxr_models.trial import TEST
from sweep.lung_masks import LungMasks
from sweep.record import RunFolder
from sweep.weights import NAMED, WeightsFile
from sweep.wording import listed

SAW_VALIDATION = "earlier_model_saw_validation"
MASKS_SAW_TEST = "earlier_masks_saw_test"
MAY_HAVE_SEEN_TEST = "earlier_model_may_have_seen_test"
UNKNOWN = "earlier_model_unknown"


@dataclass(frozen=True)
class Learned:
    """The images that a model has learned from.

    Attributes:
        pixels: digests of their pictures.
        paths: of all of them, as their sweep had them.
        bare: of those whose pictures are not known, as in run folders whose `split.csv` has no column `pixels`.
        whole: whether these are all; not where a run folder is missing, of the model or of one that it was made from.
    """

    pixels: frozenset[str] = frozenset()
    paths: frozenset[str] = frozenset()
    bare: frozenset[str] = frozenset()
    whole: bool = True

    def __or__(self, other: "Learned") -> "Learned":
        """What either has learned from."""
        return Learned(
            self.pixels | other.pixels, self.paths | other.paths, self.bare | other.bare, self.whole and other.whole
        )

    def has(self, record: ImageRecord) -> bool:
        """Whether an image is among them: by its picture, or by its path where theirs are not known."""
        return record.pixels in self.pixels or record.path in self.bare

    def may_have(self, record: ImageRecord) -> bool:
        """Whether one of another picture has the same path: the image saved anew, or one of another data set."""
        return record.path in self.paths and not self.has(record)


@dataclass(frozen=True)
class EarlierModel:
    """A model that a sweep builds on.

    Attributes:
        who: it, as the subject of a sentence.
        learned: from what.
        of_masks: it finds lungs, and has learned from masks without labels.
    """

    who: str
    learned: Learned
    of_masks: bool = False


def earlier_models(
    weights: Mapping[tuple[str, str, int], WeightsFile], lung_masks: Sequence[LungMasks]
) -> tuple[EarlierModel, ...]:
    """Those that weights are taken from or that find lungs.

    Args:
        weights: as `weights.find_weights` gives them.
        lung_masks: as `lung_masks.find_lung_masks` gives them.
    """
    starting: dict[str, set[str]] = {}
    models: dict[str, Path | None] = {}
    for (backbone, _, _), file in weights.items():
        if file.origin:
            starting.setdefault(file.origin.place, set()).add(backbone)
            models[file.origin.place] = file.origin.path
    found = [
        EarlierModel(
            f"The model that {listed(sorted(backbones))} start{'s' if len(backbones) == 1 else ''} from ({place})",
            learned_from(models[place]),
        )
        for place, backbones in sorted(starting.items())
    ]
    found += [
        EarlierModel(
            f"The U-Net that finds lungs ({source.model.path})", learned_from(source.model.path), of_masks=True
        )
        for source in lung_masks
        if source.model
    ]
    return tuple(dict.fromkeys(found))


def learned_from(model: Path | None, seen: frozenset[Path] = frozenset()) -> Learned:
    """What the run folder around a saved model says that it has learned from, and the models that it was made from.

    Training and validation images: the final model, which a sweep saves, is trained on both.

    Args:
        model: `best/model.keras` in a run folder; None where it lies elsewhere.
        seen: models on the way here, which are not looked at again.
    """
    if model is None or model.parent.name != "best":
        return Learned(whole=False)
    if model in seen:
        return Learned()
    folder = RunFolder(model.parent.parent)
    try:
        with folder.split.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] != TEST]
            paths = {row["path"]: row.get("pixels") or "" for row in rows}
        config, inputs = _read(folder.best_config), _read(folder.summary).get("inputs", [])
    except (OSError, ValueError, KeyError, csv.Error):
        return Learned(whole=False)
    learned = Learned(
        frozenset(filter(None, paths.values())),
        frozenset(paths),
        frozenset(path for path, pixels in paths.items() if not pixels),
    )
    for inner in _made_from(config, inputs):
        learned |= learned_from(inner, seen | {model})
    return learned


def _made_from(config: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> Iterator[Path | None]:
    """The models that a run's best one started from; None for one that is not known.

    Args:
        config: of the best model; another trial of its sweep may have started from elsewhere.
        inputs: of the sweep's summary.
    """
    weights = str(config.get("weights", ""))
    yield from (Path(entry["model"]) for entry in inputs if entry.get("weights") == weights and "model" in entry)
    of_model = weights and weights not in NAMED and not weights.partition("#")[0].endswith(".h5")
    if of_model and not any(entry.get("weights") == weights for entry in inputs):
        yield None


def _read(path: Path) -> dict[str, Any]:
    """Raises OSError or ValueError where there is no such JSON object."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def earlier_findings(
    models: Sequence[EarlierModel],
    manifest: Manifest,
    splits: Sequence[str],
    *,
    chosen_by: str,
    allow: Sequence[str] = (),
) -> tuple[Finding, ...]:
    """What the audit says of models of earlier sweeps.

    Args:
        models: that the sweep builds on.
        manifest: the images.
        splits: part of each.
        chosen_by: the part whose images trials are ranked by; with folds, that is `train`.
        allow: findings that may pass.
    """
    tested, chosen = (
        [record for record, own in zip(manifest.records, splits, strict=True) if own == part]
        for part in (TEST, chosen_by)
    )
    unets = [model for model in models if model.of_masks]
    models = [model for model in models if not model.of_masks]
    found = (
        _about(
            EARLIER_MODEL_SAW_TEST,
            Severity.LEAK,
            models,
            {model.who: [record for record in tested if model.learned.has(record)] for model in models},
            f"has learned from {{count:,}} of the {len(tested):,} test images",
            "They are no test of what builds on it.",
            "Take the split of that sweep (the same data, data.split and data.seed, or its split.csv beside the images "
            "as the data), so that its test images are those here; or build on another model.",
            allowed=EARLIER_MODEL_SAW_TEST in allow,
        ),
        _about(
            MAY_HAVE_SEEN_TEST,
            Severity.WARNING,
            models,
            {model.who: [record for record in tested if model.learned.may_have(record)] for model in models},
            f"has learned from images with the paths of {{count:,}} of the {len(tested):,} test images, but from other "
            "pictures",
            "They may be the same ones, saved anew.",
            "Look at a few in both data sets; if they are the same, take the split of that sweep.",
        ),
        _about(
            SAW_VALIDATION,
            Severity.WARNING,
            models,
            {model.who: [record for record in chosen if model.learned.has(record)] for model in models},
            f"has learned from {{count:,}} of the {len(chosen):,} images that trials are chosen by",
            "What builds on it looks better on them than it is, and is chosen too often.",
            "Compare what builds on it with what does not by the test images alone.",
        ),
        _about(
            MASKS_SAW_TEST,
            Severity.WARNING,
            unets,
            {model.who: [record for record in tested if model.learned.has(record)] for model in unets},
            f"has learned from the masks of {{count:,}} of the {len(tested):,} test images, though from no label",
            "It may find their lungs better than those of other people.",
            "Where that matters, segment images of other people, and take that run's U-Net.",
        ),
    )
    return (*filter(None, found), *_unknown(models))


def _about(
    name: str,
    severity: Severity,
    models: Sequence[EarlierModel],
    seen: Mapping[str, Sequence[ImageRecord]],
    done: str,
    meaning: str,
    remedy: str,
    *,
    allowed: bool = False,
) -> Finding | None:
    """A finding about those models that have seen images, `seen` by the model's `who`; None where none has.

    `done` says what each has done, with a place for the count, and `meaning` what follows from that.
    """
    guilty = [model.who for model in models if seen[model.who]]
    if not guilty:
        return None
    told = " ".join(f"{who} {done.format(count=len(seen[who]))}." for who in guilty)
    examples = tuple(Example((record.path,), who) for who in guilty for record in seen[who])
    return Finding(name, severity, f"{told} {meaning}", remedy, examples, allowed)


def _unknown(models: Sequence[EarlierModel]) -> Iterator[Finding]:
    if unknown := [model for model in models if not model.learned.whole]:
        told = " ".join(f"{model.who} has learned from images that are not all known." for model in unknown)
        yield Finding(
            UNKNOWN,
            Severity.WARNING,
            f"{told} Test images may be among them.",
            "Name the run folder itself, with its split.csv, and keep those that its own model was made from.",
            tuple(Example((), model.who) for model in unknown),
        )
