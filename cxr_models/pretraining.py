"""Train the weights that go with the phantoms: `python -m cxr_models.pretraining`. A demonstration, not medicine.

MobileNetV2 (alpha 0.35) learns to read the parameters of a drawing from its pixels: anatomy, pose, exposure, and how
much opacity and reticulation lies where. It sees no class label. Its images mix patches, large opacities and
reticulation in any amount; most fit none of the four classes, some fit one by chance. Its drawings come from random
streams the data set never uses, so the two share no patient. Still, the parameters include what tells the classes
apart: this task is close to the four-way label, so how well the weights transfer says nothing about real radiographs.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from cxr_models.phantom import (
    ANATOMY_RANGES,
    VIEW_RANGES,
    Drawing,
    Finding,
    draw,
    sample_anatomy,
    sample_finding,
    sample_patch,
    sample_view,
)
from cxr_models.storage import written_whole

BUNDLED = Path(__file__).parent / "bundled" / "mobilenet_v2_0.35_phantom_notop.weights.h5"
SIDE = 96
# Leads the key of every stream here; the data set's keys start with an image's number, at most 4.
STREAM = 1_000_003
CELLS = 6  # along a side; twice as many as the backbone's last feature map has


def sample_mixture(rng: Generator) -> Finding:
    """Any mixture of peripheral patches, large opacities and reticulation, and now and then none of them."""
    patches = [
        sample_patch(rng, lung, peripheral=peripheral)
        for lung in (-1, 1)
        for peripheral, most in ((True, 4), (False, 1))
        for _ in range(rng.integers(0, most + 1))
    ]
    kept = rng.random(len(patches)) < rng.choice((0.0, 0.5, 1.0))
    net = sample_finding(rng, str(rng.choice(("Normal", "Diffuse pattern"))))
    return replace(net, patches=tuple(patch for patch, keep in zip(patches, kept, strict=True) if keep))


def sample_drawing(seed: int, index: int) -> Drawing:
    """One drawing to train on; it follows from seed and index."""
    rng = default_rng([STREAM, index, seed])
    return Drawing(sample_anatomy(rng), sample_view(rng), sample_mixture(rng))


def appearance_targets(drawing: Drawing) -> list[float]:
    """Anatomy, pose and exposure, each scaled to -1 .. 1 by its range."""
    sources = ((drawing.anatomy, ANATOMY_RANGES), (drawing.view, VIEW_RANGES))
    return [
        2 * (getattr(source, name) - low) / (high - low) - 1
        for source, ranges in sources
        for name, (low, high) in ranges.items()
    ]


def extent_targets(finding: Finding) -> list[float]:
    """Opacity of each lung, number of patches, the largest radius and reticulation, each about 0 to 1."""
    opacity = {lung: sum(p.density * p.radius**2 for p in finding.patches if p.lung == lung) for lung in (-1, 1)}
    largest = max((patch.radius for patch in finding.patches), default=0.0)
    return [
        *(8 * np.sqrt(list(opacity.values()))),
        len(finding.patches) / 8,
        4 * largest,
        6 * finding.reticulation,
    ]


def finding_targets(drawing: Drawing) -> NDArray[np.float32]:
    """How much the patches, and how much the net, change the grey levels of each cell: (CELLS, CELLS, 2)."""
    finding = drawing.finding
    parts = (replace(finding, reticulation=0.0), replace(finding, patches=()))
    empty = replace(finding, patches=(), reticulation=0.0)
    grey = [draw(replace(drawing, finding=part), SIDE)[0].astype(np.float32) / 255 for part in (*parts, empty)]
    changes = np.stack([np.abs(part - grey[-1]) for part in grey[:-1]], axis=-1)
    cell = SIDE // CELLS
    return np.asarray(changes.reshape(CELLS, cell, CELLS, cell, len(parts)).mean(axis=(1, 3)))


def draw_examples(count: int, seed: int) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
    """Images (count, SIDE, SIDE) and their targets by output, an image a row."""
    drawings = [sample_drawing(seed, index) for index in range(count)]
    images = np.stack([draw(drawing, SIDE)[0] for drawing in drawings])
    finding = np.stack([finding_targets(drawing) for drawing in drawings])
    targets = {
        "appearance": np.array([appearance_targets(drawing) for drawing in drawings], dtype=np.float32),
        "extent": 2 * np.array([extent_targets(drawing.finding) for drawing in drawings], dtype=np.float32),
        "finding": finding / finding.std(axis=(0, 1, 2)),
    }
    return images, targets


def build(steps: int) -> tuple[keras.Model, keras.Model]:
    """The backbone alone, and the compiled model around it that takes uint8 images (SIDE, SIDE, 1)."""
    backbone = keras.applications.MobileNetV2(
        input_shape=(SIDE, SIDE, 3), alpha=0.35, include_top=False, weights=None, name="backbone"
    )
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.95  # 0.999, the default, needs more steps than this training has to settle
    pixels = keras.Input((SIDE, SIDE, 1))
    features = backbone(keras.layers.Concatenate()([keras.layers.Rescaling(1 / 127.5, offset=-1)(pixels)] * 3))
    pooled = keras.layers.GlobalAveragePooling2D()(features)
    outputs = {
        "appearance": keras.layers.Dense(len(ANATOMY_RANGES) + len(VIEW_RANGES))(pooled),
        "extent": keras.layers.Dense(5)(pooled),
        "finding": keras.layers.Conv2DTranspose(2, 2, strides=2)(features),
    }
    model = keras.Model(pixels, outputs)
    schedule = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=2e-3, warmup_steps=steps // 10)
    model.compile(optimizer=keras.optimizers.AdamW(schedule, weight_decay=1e-4), loss="mse")
    return backbone, model


def pretrain(out: Path, *, images: int, epochs: int, seed: int = 0, batch_size: int = 32) -> None:
    """Train on `images` drawings, report the error on a tenth more of them, and write the backbone's weights."""
    keras.utils.set_random_seed(seed)
    held_out = max(images // 10, 1)
    pixels, targets = draw_examples(images + held_out, seed)
    print(f"drew {len(pixels)} images of {SIDE} px", flush=True)
    backbone, model = build(steps=epochs * -(-images // batch_size))
    model.fit(
        pixels[:images, ..., None],
        {name: values[:images] for name, values in targets.items()},
        validation_data=(pixels[images:, ..., None], {name: values[images:] for name, values in targets.items()}),
        epochs=epochs,
        batch_size=batch_size,
        verbose=2,
    )
    with written_whole(out.with_suffix("").with_suffix(".weights.h5")) as scratch:
        backbone.save_weights(scratch)


def main() -> None:
    """Draw phantoms, train on them and write the weights."""
    parser = argparse.ArgumentParser(prog="python -m cxr_models.pretraining", description=__doc__)
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--images", type=int, default=9000)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    pretrain(arguments.out, images=arguments.images, epochs=arguments.epochs)


if __name__ == "__main__":
    main()
