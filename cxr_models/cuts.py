"""Where a network is divided: a frozen prefix that is run once, and the rest that every trial runs.

A layer can be a cut if everything behind it depends on its output alone (in the graph of layers it dominates all that
follow). Behind the cut nothing of the prefix is needed, so its output can be stored and shared by every trial.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from cxr_models.backbones import Backbone
from cxr_models.freezing import Phase, frozen_layers
from cxr_models.layer_table import Layer, LayerTable

BYTES_PER_ELEMENT = 4  # float32: what is stored is exact

# In multiply-accumulates; with these the plan's gains came closest to those that benchmarks/cut_gains.py measured
# with MobileNetV2 on a CPU, where small networks are bound by memory: moving one element through it, ...
TRAFFIC = 20.0
# ... reading a stored one back, from the page cache or a disk, ...
READING = 4 * TRAFFIC
# ... and what every image costs in an epoch whatever is computed: gathering it, metrics, its part of a step.
IMAGE = 7e5
# Forward, gradient by weight and gradient by input.
TRAINING_STEP = 3.0
# A narrower cut further in front may cost this much more of what the trial computes anyway.
RECOMPUTED_SHARE = 0.1
# Below this gain the cache is not worth its place.
LEAST_GAIN = 1.1


@dataclass(frozen=True)
class Cut:
    """What is stored of an image.

    Attributes:
        layer: the backbone's layer whose output it is.
        pooling: `average` or `max` where the pooled vector is stored in place of the map, else empty.
        shape: of what is stored, per image.
        taps: layers whose pooled vectors are stored, joined; empty for that of `layer` alone.
    """

    layer: str
    pooling: str
    shape: tuple[int, ...]
    taps: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As plans, records and files call it."""
        joined = f"-{len(self.taps)}taps" if self.taps else ""
        return f"{self.layer}-{self.pooling}{joined}" if self.pooling else self.layer

    @property
    def bytes_per_image(self) -> int:
        return BYTES_PER_ELEMENT * prod(self.shape)


@dataclass(frozen=True)
class Work:
    """What one image costs in one epoch of training, in multiply-accumulates and their like.

    Attributes:
        whole: when the network is run from the pixels.
        rest: when it is run from the stored output of the cut, reading included; the same as `whole` without a cut.
    """

    whole: float
    rest: float

    @property
    def gain(self) -> float:
        """How many times faster an epoch gets."""
        return self.whole / self.rest


def forward_work(layer: Layer) -> float:
    """Multiply-accumulates of a layer for one image, and the elements it writes as their like."""
    elements = prod(layer.output)
    positions = elements // layer.output[-1]
    kernels = (shape for shape in layer.shapes if len(shape) > 1)  # biases and what normalizes have one axis
    return TRAFFIC * elements + positions * sum(prod(kernel) for kernel in kernels)


def cut_layers(table: LayerTable) -> list[int]:
    """Indices of the layers that can be cuts, the input layer among them."""
    index = {layer.name: number for number, layer in enumerate(table.layers)}
    earliest_read = len(table.layers)
    found = []
    for number in range(len(table.layers) - 1, -1, -1):
        if earliest_read >= number:
            found.append(number)
        earliest_read = min([earliest_read, *(index[name] for name in table.layers[number].inputs)])
    return found[::-1]


def tapped_layers(table: LayerTable, taps: int) -> tuple[Layer, ...]:
    """The layers whose pooled outputs feed the head, first to last: evenly spaced among those that can be cuts.

    Raises:
        ValueError: the backbone has fewer such layers.
    """
    possible = [table.layers[number] for number in cut_layers(table)[1:]]
    if taps > len(possible):
        raise ValueError(f"taps: {taps} does not fit {table.backbone}, which can be tapped at {len(possible)} depths")
    return tuple(possible[round(place * len(possible) / taps) - 1] for place in range(1, taps + 1))


def choose_cut(
    phases: Sequence[Phase], backbone: Backbone, table: LayerTable, *, pooling: str, taps: int, head_parameters: int
) -> Cut | None:
    """The cut of the last of `phases`, or None where running from the pixels is better.

    It lies at or before the first layer that has trained in any of the phases: what a former phase moved is no longer
    what was stored. Among the layers there it is the narrowest that costs little to start from; where the boundary
    lies inside a block, the block's input, and the rest of the block is recomputed.

    Args:
        phases: of a strategy, up to the one that is about to run.
        backbone: the row the table belongs to.
        table: the backbone's layers.
        pooling: of the network's head.
        taps: depths that feed the head; from the first of them on, the rest needs more than one tensor.
        head_parameters: of that head, a measure of its work.
    """
    boundary = _boundary(phases, backbone, table)
    layers = table.layers
    tapped = tapped_layers(table, taps)
    if boundary == len(layers) and pooling != "flatten":
        width = sum(layer.output[-1] for layer in tapped)
        names = tuple(layer.name for layer in tapped) if taps > 1 else ()
        return Cut(layers[-1].name, pooling, (width,), names)
    end = boundary if taps == 1 else min(boundary, layers.index(tapped[0]))
    candidates = [number for number in cut_layers(table) if 0 < number < end]
    if not candidates:
        return None
    behind = _work_behind(table)
    recomputed = {number: behind[number + 1] - behind[boundary] for number in candidates}
    frozen = frozen_layers(phases[-1], backbone, table)
    anyway = behind[boundary] - behind[frozen] + TRAINING_STEP * (behind[frozen] + head_parameters)
    latest = candidates[-1]
    bound = recomputed[latest] + RECOMPUTED_SHARE * (recomputed[latest] + anyway)
    affordable = [number for number in candidates if recomputed[number] <= bound]
    chosen = min(affordable, key=lambda number: (prod(layers[number].output), -number))
    cut = Cut(layers[chosen].name, "", layers[chosen].output)
    worth = work(cut, phases, backbone, table, head_parameters=head_parameters)
    return cut if worth.gain >= LEAST_GAIN else None


def work(
    cut: Cut | None, phases: Sequence[Phase], backbone: Backbone, table: LayerTable, *, head_parameters: int
) -> Work:
    """What the last of `phases` costs with and without a cut; an estimate to choose and to plan by."""
    boundary, behind = _boundary(phases, backbone, table), _work_behind(table)
    # Gradients stop where this phase's own frozen part begins, which may lie behind a former phase's.
    frozen = frozen_layers(phases[-1], backbone, table)
    trained = IMAGE + TRAINING_STEP * (behind[frozen] + head_parameters)
    whole = behind[0] - behind[frozen] + trained
    if cut is None:
        return Work(whole, whole)
    place = [layer.name for layer in table.layers].index(cut.layer)
    if place >= boundary:
        raise ValueError(f"the cut {cut.name} lies behind the first trained layer, {table.layers[boundary].name}")
    rest = READING * prod(cut.shape) + behind[place + 1] - behind[frozen] + trained
    return Work(whole, rest)


def activation_bytes(phase: Phase, backbone: Backbone, table: LayerTable, batch_size: int) -> int:
    """Memory of the layer outputs that one training step keeps for its gradients, each with its gradient."""
    frozen = frozen_layers(phase, backbone, table)
    kept = sum(prod(layer.output) for layer in table.layers[frozen:])
    passing = 2 * max(prod(layer.output) for layer in table.layers)  # of the frozen part, one after the other
    return BYTES_PER_ELEMENT * batch_size * (2 * kept + passing)


def _boundary(phases: Sequence[Phase], backbone: Backbone, table: LayerTable) -> int:
    """How many leading layers still are as they were before the first phase."""
    return min(frozen_layers(phase, backbone, table) for phase in phases)


def _work_behind(table: LayerTable) -> list[float]:
    """The forward work of the last layers, by the index of the first of them; 0 behind the last."""
    return list(accumulate(map(forward_work, reversed(table.layers)), initial=0.0))[::-1]
