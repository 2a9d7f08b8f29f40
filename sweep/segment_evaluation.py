"""The final evaluation of a segmentation: the final U-Net saved whole, figures and the most telling pictures."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from cxr_models.intervals import mean_intervals
from cxr_models.mask_metrics import COUNTS, INSIDE, count_masks, image_metrics, telling_examples
from cxr_models.storage import written_whole
from cxr_models.trial import SEGMENT, TEST, VAL, VALIDATION_SCORES, TrialConfig, TrialData, TrialResult
from sweep.evaluation import IMAGE_TIMEOUT_S, FinalEvaluation, register
from sweep.finals import FinalTraining, FinalTrainings
from sweep.interruption import deferred
from sweep.keras_child import CALL_TIMEOUT_S, keras_child
from sweep.plan import Plan
from sweep.record import RunFolder, ranked, write_json
from sweep.tracking import Tracker

EXAMPLES = 3  # of the worst, the median and the best images each
TILE_SIDE = 320  # of one picture in an overlay, in pixels
TRUE_COLOUR, PREDICTED_COLOUR = (0, 114, 178), (230, 159, 0)  # of Okabe and Ito
OPACITY = 0.45
SHOWN = ("dice", "iou", "pixel_accuracy")


@dataclass(frozen=True)
class BestUNet:
    """What the child needs to rebuild the best trial's U-Net and its final one, and read images and masks with them.

    Attributes:
        trial_folder: where the trial left its weights; its U-Net reads the validation images. None with folds, where
            there is no such U-Net, and no validation image is read.
        final_folder: where the final training left its own; the final U-Net reads the test images.
        indices: the validation and test images, in this order.
        tested: (images,) which of them are the test set's.
    """

    config: TrialConfig
    trial_folder: Path | None
    final_folder: Path
    channels: int
    pixels: Path
    masks: Path
    indices: NDArray[np.int64]
    tested: NDArray[np.bool_]
    model: Path
    threads: int


@dataclass(frozen=True)
class FoundMasks:
    """What the U-Nets made of the images.

    Attributes:
        counts: (images, 4), see `mask_metrics.COUNTS`; without a loss.
        examples: kind (`worst`, ...) -> position among the images -> its predicted mask (side, side).
    """

    counts: NDArray[np.float64]
    examples: dict[str, dict[int, NDArray[np.bool_]]]


def evaluate_segmentation(
    plan: Plan,
    results: tuple[TrialResult, ...],
    trainings: FinalTrainings,
    folder: RunFolder,
    data: TrialData,
    tracker: Tracker,
    found: FinalEvaluation,
) -> None:
    """Evaluate the best trial and its final model, save that one and register it.

    `found` has the test figures as soon as they are known.

    Raises:
        RuntimeError, TimeoutError: the best trial could not be evaluated, or not be trained again.
    """
    result = ranked(results, plan.spec.objective)[0]
    trained = trainings.of(result)
    if not trained:
        raise RuntimeError(trainings.problem(result))
    best = best_model(plan, trained[0], folder, data)
    with keras_child(folder.log("evaluation")) as call:
        if best.tested.any():
            found.openings.record([result], tracker, models=1)
        masks = call(save_and_predict, best, timeout_s=CALL_TIMEOUT_S + IMAGE_TIMEOUT_S * len(best.indices))
        with deferred():
            found.test = evaluate_test(plan, best, masks)
            record_predictions(plan, best, result, masks, folder)
        register(plan, result, folder, data, tracker, call)


def best_model(plan: Plan, training: FinalTraining, folder: RunFolder, data: TrialData) -> BestUNet:
    """The best trial's U-Net and the final one, with the validation and test images, in this order."""
    config = training.config
    val, test = plan.indices(VAL), plan.indices(TEST)  # with folds there is no validation part
    return BestUNet(
        config=config,
        trial_folder=None if data.folds else folder.trial(training.trial.trial_id),
        final_folder=folder.trial(training.training_id),
        channels=data.channels,
        pixels=data.pictures(config),
        masks=data.masks[config.image_side],
        indices=np.concatenate([val, test]),
        tested=np.arange(len(val) + len(test)) >= len(val),
        model=folder.model,
        threads=plan.allotment.threads,
    )


def save_and_predict(best: BestUNet) -> FoundMasks:
    """In the child: save the final U-Net whole, run it on the test images, and the trial's on the validation images."""
    from cxr_models import segmentation, steps

    steps.configure(best.threads)
    final = segmentation.best_unet(best.config, best.final_folder, channels=best.channels)
    trial = best.trial_folder and segmentation.best_unet(best.config, best.trial_folder, channels=best.channels)
    with written_whole(best.model) as scratch:
        final.save(scratch)
    pixels, masks = (np.load(path, mmap_mode="r") for path in (best.pixels, best.masks))

    def predicted(position: int | NDArray[np.int64], *, tested: bool) -> NDArray[np.bool_]:
        chosen = np.atleast_1d(best.indices[position])
        return segmentation.predict_masks(final if tested else trial, pixels[chosen]) >= INSIDE

    counts = np.empty((len(best.indices), len(COUNTS)))
    at_once = 16 * steps.inference_batch()
    for tested in (False, True):
        places = np.flatnonzero(best.tested == tested)
        for first in range(0, len(places), at_once):
            some = places[first : first + at_once]
            counts[some] = count_masks(masks[best.indices[some]], predicted(some, tested=tested))
    shown = np.flatnonzero(best.tested == best.tested.any())
    dice = image_metrics(counts, best.config.image_side**2)["dice"][shown]
    examples = {
        kind: {
            int(shown[place]): predicted(int(shown[place]), tested=bool(best.tested.any()))[0, ..., 0]
            for place in places
        }
        for kind, places in telling_examples(dice, EXAMPLES).items()
    }
    return FoundMasks(counts, examples)


def evaluate_test(plan: Plan, best: BestUNet, found: FoundMasks) -> dict[str, Any] | None:
    """The test metrics with 95 % intervals by patient; `summary.json`'s `test`. None where no image was kept."""
    if not best.tested.any():
        return None
    metrics = image_metrics(found.counts[best.tested], best.config.image_side**2)
    patients = [plan.manifest.records[index].patient for index in best.indices[best.tested]]
    intervals = mean_intervals({name: metrics[name] for name in SHOWN}, patients, seed=plan.spec.search.seed)
    return {
        **{name: asdict(interval) for name, interval in intervals.items()},
        "images": len(patients),
        "patients": len(set(patients)),
    }


def record_predictions(plan: Plan, best: BestUNet, result: TrialResult, found: FoundMasks, folder: RunFolder) -> None:
    """Write `masks.csv`, the overlays and `best/config.json`."""
    overlays = {
        position: f"{kind}-{number}.png"
        for kind, masks in found.examples.items()
        for number, position in enumerate(masks, start=1)
    }
    frame = _table(plan, result, best.indices, found.counts)
    frame["overlay"] = [overlays.get(position, "") for position in range(len(frame))]
    if best.trial_folder is None:
        frame = pd.concat([_held_out(plan, result, folder), frame])
    with written_whole(folder.masks) as scratch:
        frame.to_csv(scratch, index=False, errors="surrogateescape")
    pixels, masks = (np.load(path, mmap_mode="r") for path in (best.pixels, best.masks))
    for predicted in found.examples.values():
        for position, mask in predicted.items():
            index = best.indices[position]
            picture = overlay(pixels[index], masks[index, ..., 0] > 0, mask)
            with written_whole(folder.overlays / overlays[position]) as scratch:
                picture.save(scratch)
    # All that is needed to use the model: an image's side and channels.
    fitted_on = "all folds" if best.trial_folder is None else "train+val"
    fitted = {"fitted_on": fitted_on, "fitted_epochs": result.best_epoch}
    shape = {"task": SEGMENT, "channels": best.channels}
    config = {"trial_id": result.trial_id, **fitted, **shape, **best.config.to_json()}
    write_json(folder.best_config, config)


def _table(
    plan: Plan, result: TrialResult, indices: NDArray[np.int64], counts: NDArray[np.floating[Any]]
) -> pd.DataFrame:
    """A row an image of `masks.csv`."""
    records = [plan.manifest.records[index] for index in indices]
    metrics = image_metrics(counts, result.config.image_side**2)
    return pd.DataFrame(
        {
            "trial_id": result.trial_id,
            "image": [record.path for record in records],
            "patient": [record.patient for record in records],
            "split": [plan.splits[index] for index in indices],
            **{name: metrics[name] for name in SHOWN},
            "overlay": "",
        }
    )


def _held_out(plan: Plan, result: TrialResult, folder: RunFolder) -> pd.DataFrame:
    """The rows of the images of the folds, each segmented by a training that had not seen it."""
    with np.load(folder.trial(result.trial_id) / VALIDATION_SCORES) as kept:
        return _table(plan, result, kept["index"], kept["counts"]).assign(split=VAL)


def overlay(pixels: NDArray[np.uint8], truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> Image.Image:
    """The image, the image with its true mask, and the image with the predicted one, side by side.

    Args:
        pixels: (side, side, 1 or 3).
        truth: (side, side).
        predicted: (side, side).
    """
    plain = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.float64)
    tiles = [plain, _tinted(plain, truth, TRUE_COLOUR), _tinted(plain, predicted, PREDICTED_COLOUR)]
    wide = Image.fromarray(np.concatenate(tiles, axis=1).round().astype(np.uint8))
    return wide.resize((3 * TILE_SIDE, TILE_SIDE), Image.Resampling.BILINEAR)


def _tinted(plain: NDArray[np.float64], mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.float64]:
    share = OPACITY * mask[..., np.newaxis].astype(np.float64)
    tinted: NDArray[np.float64] = plain * (1 - share) + share * np.array(colour, np.float64)
    return tinted
