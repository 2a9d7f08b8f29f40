"""Freeze strategies as data: which layers train is decided by a pure function, printed in the plan, then applied.

A strategy counts over the backbone's layers as `keras.applications` lists them, never over the head:

    all           the head alone trains (linear probing)
    none          everything trains (full fine-tuning)
    first:N       the first N layers are frozen
    last:N        only the last N layers train (partial fine-tuning)
    fraction:F    the first floor(F x layers) layers are frozen
    convs:K       everything from the K-th last convolution to the output trains; not where the order of layers is not
                  linear, as in InceptionV3 and ConvNeXt
    stages:K      the last K stages train

`A>B` runs A, then B, at a lower rate as a rule: `all>stages:1` is LP-FT (Kumar et al., ICLR 2022), `all>stages:1>none`
gradual unfreezing (Howard and Ruder, ACL 2018).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import floor
from typing import TYPE_CHECKING

from cxr_models.backbones import Backbone
from cxr_models.layer_table import LayerTable

if TYPE_CHECKING:
    import keras

CONVOLUTIONS = ("Conv2D", "DepthwiseConv2D", "SeparableConv2D")
FORMS = "all, none, first:N, last:N, fraction:F, convs:K, stages:K, or several joined by '>'"


class Treatment(StrEnum):
    """What happens to one layer in one phase."""

    FROZEN = "frozen"  # no weight moves; batch norm and dropout in inference mode
    AFFINE = "affine"  # a batch norm whose gamma and beta train while its statistics stay fixed
    TRAINS = "trains"


@dataclass(frozen=True)
class Phase:
    """A part of the training in which the same layers train.

    Attributes:
        rule: `all`, `none`, or the word in front of the colon.
        amount: the number behind it, 0 where there is none.
    """

    rule: str
    amount: float

    @property
    def text(self) -> str:
        return self.rule if self.rule in ("all", "none") else f"{self.rule}:{self.amount:g}"

    @property
    def head_only(self) -> bool:
        """Whether the backbone is frozen whole, whichever it is."""
        return self.text in ("all", "fraction:1", "last:0")


@dataclass(frozen=True)
class FreezeStrategy:
    """The phases of a strategy, in order."""

    text: str
    phases: tuple[Phase, ...]

    def epochs(self, total: int, probe_share: float) -> tuple[int, ...]:
        """The epochs of each phase, at least one each; the last takes the remainder.

        Args:
            total: of the trial.
            probe_share: of them, for the first of several phases; the later ones share the rest evenly.

        Raises:
            ValueError: fewer epochs than phases.
        """
        if total < len(self.phases):
            raise ValueError(f"freeze {self.text!r} has {len(self.phases)} phases, but the trial only {total} epochs")
        epochs: list[int] = []
        for index in range(len(self.phases) - 1):
            phases_left = len(self.phases) - index - 1
            share = (1.0 - probe_share) / (len(self.phases) - 1) if index else probe_share
            epochs.append(min(max(1, round(share * total)), total - sum(epochs) - phases_left))
        return (*epochs, total - sum(epochs))


def parse_strategy(text: str) -> FreezeStrategy:
    """Read a strategy.

    Raises:
        ValueError: the text is none of the forms above.
    """
    return FreezeStrategy(text, tuple(Phase(*_parse_rule(part.strip(), text)) for part in text.split(">")))


def _parse_rule(part: str, text: str) -> tuple[str, float]:
    if part in ("all", "none"):
        return part, 0.0
    if counted := re.fullmatch(r"(first|last|convs|stages):(\d+)", part):
        rule, amount = counted[1], float(counted[2])
        if amount >= 1 or rule in ("first", "last"):
            return rule, amount
    if share := re.fullmatch(r"fraction:(0?\.\d+|[01](?:\.\d*)?)", part):
        amount = float(share[1])
        if 0.0 <= amount <= 1.0:
            return "fraction", amount
    raise ValueError(f"expected a freeze strategy ({FORMS}), but got {text!r}")


def strategy_problem(strategy: FreezeStrategy, backbone: Backbone) -> str:
    """Why the strategy asks for more than the backbone has, or an empty string."""
    available = {
        "first": ("layers", backbone.layers),
        "last": ("layers", backbone.layers),
        "convs": ("convolutions", backbone.convolutions),
        "stages": ("stages", len(backbone.stage_starts)),
    }
    for phase in strategy.phases:
        what, most = available.get(phase.rule, ("", 0))
        if phase.rule == "convs" and not backbone.convolutions:
            return (
                f"{phase.text!r} does not fit {backbone.name}, whose convolutions do not lie one behind the other; "
                f"use stages:1 to stages:{len(backbone.stage_starts)}"
            )
        if what and phase.amount > most:
            return (
                f"{phase.text!r} does not fit {backbone.name}, which has {most} {what}; use at most {phase.rule}:{most}"
            )
    return ""


def frozen_layers(phase: Phase, backbone: Backbone, table: LayerTable) -> int:
    """How many leading layers of the backbone are frozen in a phase that fits it."""
    layers, amount = len(table.layers), int(phase.amount)
    match phase.rule:
        case "all":
            return layers
        case "none":
            return 0
        case "fraction":
            return floor(phase.amount * layers)
        case "first":
            return amount
        case "last":
            return layers - amount
        case "convs":
            return main_convolutions(backbone, table)[-amount]
        case "stages":
            return [layer.name for layer in table.layers].index(backbone.stage_starts[-amount])
    raise ValueError(f"expected a rule of {FORMS}, but got {phase.rule!r}")


def stage_depths(backbone: Backbone, table: LayerTable) -> dict[str, int]:
    """How far each layer's stage is from the output: 1 for the last stage, whose next is the head."""
    names = [layer.name for layer in table.layers]
    starts = [names.index(start) for start in backbone.stage_starts[1:]]
    return {name: 1 + sum(start > index for start in starts) for index, name in enumerate(names)}


def main_convolutions(backbone: Backbone, table: LayerTable) -> list[int]:
    """Indices of the convolutions on the main path, in order."""
    aside = re.compile(backbone.side_convolutions) if backbone.side_convolutions else None
    return [
        index
        for index, layer in enumerate(table.layers)
        if layer.kind in CONVOLUTIONS and not (aside and aside.search(layer.name))
    ]


def decide(phase: Phase, backbone: Backbone, table: LayerTable, batch_norm: str) -> dict[str, Treatment]:
    """Decide for every layer of the backbone what happens to it in this phase.

    Args:
        phase: one phase of a strategy.
        backbone: the row the table belongs to.
        table: the backbone's layers.
        batch_norm: `frozen`, `affine` or `train`: what batch norms in the trainable part do.
    """
    boundary = frozen_layers(phase, backbone, table)
    in_training = {"frozen": Treatment.FROZEN, "affine": Treatment.AFFINE, "train": Treatment.TRAINS}[batch_norm]
    return {
        layer.name: Treatment.FROZEN if index < boundary else in_training if layer.is_batch_norm else Treatment.TRAINS
        for index, layer in enumerate(table.layers)
    }


def count_parameters(decision: Mapping[str, Treatment], table: LayerTable) -> tuple[int, int]:
    """The backbone's (trainable, frozen) parameters under a decision."""
    trainable = sum(
        layer.trainable_parameters for layer in table.layers if decision[layer.name] is not Treatment.FROZEN
    )
    return trainable, table.parameters - trainable


def apply(decision: Mapping[str, Treatment], model: keras.Model, dropout_rates: Mapping[str, float]) -> None:
    """Make the layers of `model` train or not. A step compiled before does not notice: compile after.

    A frozen layer is in inference mode in training too. Keras does that for batch norms that do not train; for the
    dropout layers inside EfficientNet it does not, so their rate is set to 0 here, and back where they train.

    Args:
        decision: for every layer of the model.
        model: a backbone.
        dropout_rates: of its dropout layers where they train.

    Raises:
        ValueError: a layer is not decided, or the decision names a layer the model does not have.
    """
    names = {layer.name for layer in model.layers}
    if names != decision.keys():
        raise ValueError(f"the decision and {model.name} differ in layers {sorted(names ^ decision.keys())}")
    for layer in model.layers:
        frozen = decision[layer.name] is Treatment.FROZEN
        layer.trainable = not frozen
        if layer.name in dropout_rates:
            layer.rate = 0.0 if frozen else dropout_rates[layer.name]
