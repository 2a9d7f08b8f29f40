"""Cuts: what can be one, that none lies behind a layer that has trained, and that none is needlessly wide."""

from collections.abc import Sequence
from math import prod

import pytest

from cxr_models.backbones import BACKBONES, build_backbone
from cxr_models.cuts import (
    BYTES_PER_ELEMENT,
    IMAGE,
    LEAST_GAIN,
    RECOMPUTED_SHARE,
    TRAFFIC,
    TRAINING_STEP,
    Cut,
    choose_cut,
    cut_layers,
    forward_work,
    tapped_layers,
    work,
)
from cxr_models.freezing import Phase, frozen_layers, parse_strategy
from cxr_models.layer_table import Layer, LayerTable, layer_tables, read_table

MOBILENET = BACKBONES["mobilenet_v2_0.35"]
HEAD = 5_124  # parameters of a small head

# Backbone -> layers that can be cuts, layers, and millions of multiply-accumulates for an image of 224 pixels.
KNOWN = {
    "mobilenet_v2_0.35": (74, 154, 58.0),
    "mobilenet_v2_1.0": (74, 154, 299.5),
    "efficientnet_b0": (83, 237, 384.5),
    "resnet50": (39, 175, 3855.9),
    "densenet121": (79, 427, 2833.1),
}
RULES = ("all", "none", "first:1", "first:77", "last:3", "fraction:0.5", "convs:1", "convs:3", "stages:1", "stages:3")
PHASES = ("all>stages:1", "convs:1>stages:1", "stages:1>convs:1", "stages:2>all", "none>all", "all>convs:2>none")


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory) -> LayerTable:
    return layer_tables([(MOBILENET.name, 224)], tmp_path_factory.mktemp("none"))[MOBILENET.name, 224]


def chosen(freeze: str, table: LayerTable, *, pooling: str = "average", head: int = HEAD) -> Cut | None:
    phases = parse_strategy(freeze).phases
    return choose_cut(phases, BACKBONES[table.backbone], table, pooling=pooling, taps=1, head_parameters=head)


def place(cut: Cut, table: LayerTable) -> int:
    return [layer.name for layer in table.layers].index(cut.layer)


def boundary(phases: Sequence[Phase], table: LayerTable) -> int:
    """The first layer that trains in any of the phases."""
    return min(frozen_layers(phase, BACKBONES[table.backbone], table) for phase in phases)


def forward(table: LayerTable, first: int, end: int) -> float:
    return sum(map(forward_work, table.layers[first:end]))


def hand_made(*rows: tuple[str, str, tuple[str, ...], tuple[int, ...]]) -> LayerTable:
    """A table of (name, kind, inputs, output); a convolution has a 3x3 kernel over 2 channels."""
    layers = [
        Layer(name, kind, ((3, 3, 2, output[-1]),) if kind == "Conv2D" else (), (True,), inputs, output)
        for name, kind, inputs, output in rows
    ]
    return LayerTable(MOBILENET.name, 8, tuple(layers))


RESIDUAL = hand_made(
    ("input", "InputLayer", (), (8, 8, 2)),
    ("conv", "Conv2D", ("input",), (8, 8, 4)),
    ("left", "Conv2D", ("conv",), (4, 4, 2)),
    ("right", "Conv2D", ("conv",), (4, 4, 2)),
    ("sum", "Add", ("left", "right"), (4, 4, 2)),
    ("last", "Conv2D", ("sum",), (4, 4, 16)),
)


@pytest.mark.parametrize("name", KNOWN)
def test_possible_cuts_and_work_of_the_backbones(name):
    cuts, layers, million = KNOWN[name]
    table = read_table(BACKBONES[name], build_backbone(BACKBONES[name], 224))
    assert (len(cut_layers(table)), len(table.layers)) == (cuts, layers)
    computed = sum(forward_work(layer) - TRAFFIC * prod(layer.output) for layer in table.layers)
    assert computed / 1e6 == pytest.approx(million, rel=0.002)


def test_a_layer_beside_which_another_path_runs_can_be_no_cut():
    assert [RESIDUAL.layers[number].name for number in cut_layers(RESIDUAL)] == ["input", "conv", "sum", "last"]


def test_a_path_around_many_layers_leaves_no_cut_between():
    skipping = hand_made(
        ("input", "InputLayer", (), (8, 8, 2)),
        ("a", "Conv2D", ("input",), (8, 8, 2)),
        ("b", "Conv2D", ("a",), (8, 8, 2)),
        ("c", "Conv2D", ("b",), (8, 8, 2)),
        ("sum", "Add", ("c", "input"), (8, 8, 2)),
    )
    assert [skipping.layers[number].name for number in cut_layers(skipping)] == ["input", "sum"]


def test_everything_behind_a_cut_depends_on_it_alone(mobilenet):
    names = [layer.name for layer in mobilenet.layers]
    cuts = cut_layers(mobilenet)
    for number in range(len(names)):
        behind = mobilenet.layers[number + 1 :]
        alone = all(names.index(read) >= number for layer in behind for read in layer.inputs)
        assert (number in cuts) == alone


def test_work_of_a_convolution_and_of_what_only_moves_data():
    conv, add = RESIDUAL.layers[1], RESIDUAL.layers[4]
    assert forward_work(conv) == 8 * 8 * 4 * (3 * 3 * 2) + TRAFFIC * 8 * 8 * 4
    assert forward_work(add) == TRAFFIC * 4 * 4 * 2


@pytest.mark.parametrize("pooling", ["average", "flatten"])
@pytest.mark.parametrize("freeze", [*RULES, *PHASES])
def test_no_cut_lies_behind_a_layer_that_has_trained(freeze, pooling, mobilenet):
    phases = parse_strategy(freeze).phases
    for number in range(1, len(phases) + 1):
        cut = choose_cut(phases[:number], MOBILENET, mobilenet, pooling=pooling, taps=1, head_parameters=HEAD)
        if cut is not None:
            assert place(cut, mobilenet) < boundary(phases[:number], mobilenet)
            assert place(cut, mobilenet) in cut_layers(mobilenet)


@pytest.mark.parametrize(
    ("freeze", "layer"),
    [
        ("convs:1", "block_16_project_BN"),
        ("convs:2", "block_15_add"),
        ("convs:3", "block_15_add"),
        ("stages:1", "block_12_add"),
        ("stages:2", "block_5_add"),
        ("all>stages:1", "block_12_add"),
        ("convs:1>stages:1", "block_12_add"),
        ("stages:1>convs:1", "block_12_add"),  # what the first phase moved stays moved
    ],
)
def test_the_cuts_of_mobilenet(freeze, layer, mobilenet):
    cut = chosen(freeze, mobilenet)
    assert cut is not None
    assert (cut.layer, cut.pooling) == (layer, "")
    assert cut.shape == mobilenet.layers[place(cut, mobilenet)].output


def test_a_boundary_inside_a_block_cuts_at_its_input(mobilenet):
    names = [layer.name for layer in mobilenet.layers]
    for inside in ("block_15_expand", "block_15_depthwise", "block_15_project_BN"):
        cut = chosen(f"first:{names.index(inside) + 1}", mobilenet)
        assert cut is not None
        assert cut.layer == "block_14_add"


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_with_the_head_alone_training_the_pooled_vector_is_stored(pooling, mobilenet):
    cut = chosen("all", mobilenet, pooling=pooling)
    assert cut == Cut("out_relu", pooling, (1280,))
    assert cut.name == f"out_relu-{pooling}"
    assert cut.bytes_per_image == 1280 * BYTES_PER_ELEMENT


def test_a_flattened_map_is_stored_as_a_map(mobilenet):
    cut = chosen("all", mobilenet, pooling="flatten")
    assert cut is not None
    assert (cut.pooling, len(cut.shape)) == ("", 3)


def test_once_a_backbone_layer_has_trained_nothing_is_pooled(mobilenet):
    cut = chosen("stages:1>all", mobilenet)
    assert cut is not None
    assert (cut.layer, cut.pooling) == ("block_12_add", "")


@pytest.mark.parametrize("freeze", ["none", "none>all", "first:1"])
def test_without_a_frozen_layer_there_is_no_cut(freeze, mobilenet):
    assert chosen(freeze, mobilenet) is None


def test_a_cut_that_hardly_saves_anything_is_not_taken(mobilenet):
    assert chosen("first:3", mobilenet) is None
    huge = 10**10  # a head beside which the backbone is nothing
    assert chosen("stages:1", mobilenet, head=huge) is None


@pytest.mark.parametrize("head", [HEAD, 64_800_000])
@pytest.mark.parametrize("freeze", [*RULES, *PHASES])
def test_the_narrowest_cut_within_the_bound_is_taken(freeze, head, mobilenet):
    phases = parse_strategy(freeze).phases
    cut = chosen(freeze, mobilenet, pooling="flatten", head=head)
    end, frozen = boundary(phases, mobilenet), frozen_layers(phases[-1], MOBILENET, mobilenet)
    candidates = [number for number in cut_layers(mobilenet) if 0 < number < end]
    if not candidates:
        assert cut is None
        return
    last = len(mobilenet.layers)
    trained = TRAINING_STEP * (forward(mobilenet, frozen, last) + head)
    costs = {number: forward(mobilenet, number + 1, frozen) + trained for number in candidates}
    bound = (1 + RECOMPUTED_SHARE) * costs[candidates[-1]]
    width = {number: prod(mobilenet.layers[number].output) for number in candidates if costs[number] <= bound}
    if cut is None:
        narrowest = mobilenet.layers[max(number for number in width if width[number] == min(width.values()))]
        poor = Cut(narrowest.name, "", narrowest.output)
        assert work(poor, phases, MOBILENET, mobilenet, head_parameters=head).gain < LEAST_GAIN
        return
    assert costs[place(cut, mobilenet)] <= bound
    assert prod(cut.shape) == min(width.values())
    assert place(cut, mobilenet) == max(number for number in width if width[number] == min(width.values()))


def test_what_an_epoch_costs_with_and_without_a_cut(mobilenet):
    phases = parse_strategy("convs:1").phases
    cut = chosen("convs:1", mobilenet)
    found = work(cut, phases, MOBILENET, mobilenet, head_parameters=HEAD)
    without = work(None, phases, MOBILENET, mobilenet, head_parameters=HEAD)
    frozen = frozen_layers(phases[0], MOBILENET, mobilenet)
    trained = TRAINING_STEP * (forward(mobilenet, frozen, len(mobilenet.layers)) + HEAD)
    assert found.whole == without.whole == without.rest == forward(mobilenet, 0, frozen) + trained + IMAGE
    assert without.gain == 1.0
    assert trained < found.rest < found.whole / 2


def test_a_cut_behind_the_first_trained_layer_is_refused(mobilenet):
    pooled = chosen("all", mobilenet)
    with pytest.raises(ValueError, match="out_relu-average lies behind the first trained layer, block_13_expand"):
        work(pooled, parse_strategy("all>stages:1").phases, MOBILENET, mobilenet, head_parameters=HEAD)


@pytest.mark.parametrize("taps", [2, 3, 5, 7])
@pytest.mark.parametrize("freeze", ["stages:1", "stages:2", "convs:1", "all>stages:1"])
def test_with_several_taps_a_cut_lies_in_front_of_the_first(taps, freeze, mobilenet):
    """From there on more than one tensor is needed; a network that begins at a tap cannot be built either."""
    phases = parse_strategy(freeze).phases
    cut = choose_cut(phases, MOBILENET, mobilenet, pooling="average", taps=taps, head_parameters=HEAD)
    if cut is not None:
        names = [layer.name for layer in mobilenet.layers]
        assert names.index(cut.layer) < names.index(tapped_layers(mobilenet, taps)[0].name)


def test_a_linear_probe_of_several_taps_stores_their_joined_vectors(mobilenet):
    phases = parse_strategy("all").phases
    cut = choose_cut(phases, MOBILENET, mobilenet, pooling="average", taps=4, head_parameters=HEAD)
    tapped = tapped_layers(mobilenet, 4)
    assert cut.taps == tuple(layer.name for layer in tapped)
    assert cut.shape == (sum(layer.output[-1] for layer in tapped),)
    assert tapped[-1] == mobilenet.layers[-1]
    with pytest.raises(ValueError, match=r"taps: 999 does not fit mobilenet_v2_0\.35, which can be tapped at"):
        tapped_layers(mobilenet, 999)
