"""The U-Net's sizes follow from its configuration, and Keras builds what they say."""

import numpy as np
import pytest

from cxr_models import unet
from cxr_models.trial import TrialConfig

R1 = TrialConfig("unet", image_side=32, unet_filters=12, unet_depth=4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("filters", "depth"), [(12, 4), (3, 2), (5, 1)])
def test_the_plan_counts_what_is_built(filters, depth, channels):
    config = TrialConfig("unet", image_side=32, unet_filters=filters, unet_depth=depth)
    built = unet.build_unet(config, channels).model
    assert unet.count_parameters(config, channels) == built.count_params()
    assert built.input_shape == (None, 32, 32, channels)
    assert built.output_shape == (None, 32, 32, 1)
    elements = sum(
        np.prod(layer.output.shape[1:])
        for layer in built.layers
        if not layer.name.startswith(("pixels", "to_unit", "logits", "probabilities", "bottleneck_dropout"))
    )
    counted = sum(block.elements for block in unet.blocks(config, channels))
    assert counted == pytest.approx(elements, rel=0.02), "what the memory of a step is estimated from"


def test_the_report_s_shape():
    """Four halvings, filters doubling from 12 to 192, and back."""
    blocks = unet.blocks(R1, 1)
    assert [block.filters for block in blocks] == [12, 24, 48, 96, 192, 96, 48, 24, 12]
    assert [block.side for block in blocks] == [32, 16, 8, 4, 2, 4, 8, 16, 32]
    assert [type(layer).__name__ for layer in unet.build_unet(R1, 1).logits.layers].count("Conv2DTranspose") == 4


def test_the_same_seed_gives_the_same_first_weights():
    net = unet.build_unet(R1, 1)
    first = net.logits.get_weights()
    net.reset(1, 0.0)
    other = net.logits.get_weights()
    net.reset(0, 0.0)
    assert all((a == b).all() for a, b in zip(first, net.logits.get_weights(), strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("side", "depth", "near"), [(100, 3, "96 or 104"), (7, 3, "such as 8")])
def test_a_side_that_cannot_be_halved_is_told_with_the_next_ones(side, depth, near):
    assert near in unet.side_problem(side, depth)
    assert not unet.side_problem(96, 4)
