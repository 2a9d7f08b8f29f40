"""Freeze strategies: what the reports counted, and how they are read; `test_backbones.py` applies them."""

import pytest

from cxr_models.backbones import BACKBONES, build_backbone
from cxr_models.freezing import (
    Phase,
    parse_strategy,
    stage_depths,
    strategy_problem,
)
from cxr_models.layer_table import LayerTable, read_table
from cxr_models.network import count_parameters as network_parameters
from cxr_models.trial import TrialConfig


@pytest.fixture(scope="module")
def mobilenet_224() -> dict[float, LayerTable]:
    rows = {alpha: BACKBONES[f"mobilenet_v2_{alpha}"] for alpha in (0.5, 1.0)}
    return {alpha: read_table(row, build_backbone(row, 224)) for alpha, row in rows.items()}


def phase(text: str) -> Phase:
    return parse_strategy(text).phases[0]


@pytest.mark.parametrize(
    ("freeze", "trainable", "frozen"),
    [
        ("all", 64_753_156, 2_257_984),
        ("convs:1", 65_165_316, 1_845_824),
        ("convs:2", 65_473_156, 1_537_984),
        ("none", 66_977_028, 34_112),
    ],
)
def test_counts_of_the_first_report(freeze, trainable, frozen, mobilenet_224):
    config = TrialConfig(
        backbone="mobilenet_v2_1.0",
        image_side=224,
        freeze=freeze,
        batch_norm="train",
        pooling="flatten",
        hidden_units=(1024, 512),
    )
    assert network_parameters(config, phase(freeze), mobilenet_224[1.0], 4) == (trainable, frozen)


def test_counts_of_the_second_report(mobilenet_224):
    config = TrialConfig(
        backbone="mobilenet_v2_0.5", image_side=224, pooling="flatten", hidden_units=(1024, 512), batch_norm="train"
    )
    trainable, frozen = network_parameters(config, phase("all"), mobilenet_224[0.5], 4)
    assert frozen == 706_224
    assert trainable == 64_226_304 + 524_800 + 2_052
    assert trainable + frozen == 65_459_380


@pytest.mark.parametrize(
    ("text", "phases"),
    [("all", 1), ("fraction:0.25", 1), ("all>stages:1", 2), ("all > stages:1 > none", 3), ("first:0", 1)],
)
def test_strategies_that_are_read(text, phases):
    strategy = parse_strategy(text)
    assert len(strategy.phases) == phases


@pytest.mark.parametrize(
    "text", ["", "al", "first", "first:-1", "convs:0", "stages:0", "fraction:1.5", "all>", "last:x"]
)
def test_strategies_that_are_refused(text):
    with pytest.raises(ValueError, match="expected a freeze strategy"):
        parse_strategy(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("first:9999", "which has 154 layers; use at most first:154"),
        ("convs:53", "which has 52 convolutions; use at most convs:52"),
        ("all>stages:6", "which has 5 stages; use at most stages:5"),
    ],
)
def test_more_than_the_backbone_has(text, problem):
    assert problem in strategy_problem(parse_strategy(text), BACKBONES["mobilenet_v2_0.35"])


@pytest.mark.parametrize("total", range(3, 30))
def test_every_phase_gets_epochs_and_none_is_lost(total):
    epochs = parse_strategy("all>stages:1>none").epochs(total, 0.3)
    assert sum(epochs) == total
    assert min(epochs) >= 1


@pytest.mark.parametrize(("probe_share", "epochs"), [(0.3, (6, 7, 7)), (0.5, (10, 5, 5)), (0.01, (1, 10, 9))])
def test_the_first_phase_gets_its_share_and_the_others_the_rest_evenly(probe_share, epochs):
    assert parse_strategy("all>stages:1>none").epochs(20, probe_share) == epochs


def test_depths_count_the_stages_from_the_output(mobilenet_224):
    depths = stage_depths(BACKBONES["mobilenet_v2_1.0"], mobilenet_224[1.0])
    assert depths["input_layer"] == 5
    assert (depths["block_13_depthwise"], depths["block_12_add"], depths["Conv_1"]) == (1, 2, 1)
    assert list(depths.values()) == sorted(depths.values(), reverse=True)


def test_fewer_epochs_than_phases_are_refused():
    with pytest.raises(ValueError, match="has 2 phases, but the trial only 1 epochs"):
        parse_strategy("all>none").epochs(1, 0.3)
