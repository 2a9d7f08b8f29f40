"""What does not belong to a sweep's task is refused with what does."""

import pytest

from cxr_models.trial import Objective
from sweep.spec import SpecError, read_spec

UNET = """\
name: lungs
task: segment
data: phantom
objective: dice
search: {algorithm: random, trials: 2}
space: {backbone: unet, image_side: 64}
"""
CNN = UNET.replace("task: segment\n", "").replace("dice", "macro_f1").replace("unet", "vanilla_cnn").replace("64", "96")


@pytest.fixture
def read(tmp_path):
    def reader(text, *overrides):
        (tmp_path / "space.yaml").write_text(text)
        return read_spec(tmp_path / "space.yaml", overrides)

    return reader


@pytest.fixture
def problem(read):
    def the_problem(text, *overrides):
        with pytest.raises(SpecError) as caught:
            read(text, *overrides)
        (found,) = caught.value.problems
        return found

    return the_problem


def test_a_segmentation_is_read_and_written_back(read):
    spec = read(UNET)
    assert spec.task == "segment"
    assert spec.objective == Objective("dice", "max", "segment")
    (point,) = spec.space.points()
    assert (point["freeze"], point["weights"], point["unet_filters"]) == ("none", "none", 12)
    assert read(spec.to_yaml()) == spec
    assert read(CNN).task == "classify"
    assert read(read(CNN).to_yaml()) == read(CNN)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (UNET.replace("segment", "segmnt"), (), "unknown 'segmnt'; did you mean 'segment'?"),
        (UNET, ["backbone=resnet50"], "unknown 'resnet50'; known: unet (for task: segment)"),
        (UNET, ["objective=macro_f1"], "macro_f1 belongs to task: classify; unknown 'macro_f1'"),
        (UNET, ["objective=dise"], "did you mean 'dice'?"),
        (CNN, ["objective=dice"], "dice belongs to task: segment"),
        (UNET, ["freeze=all"], "trains as a whole: expected none, got 'all'"),
        (UNET, ["weights=imagenet"], "starts from random weights and trains as a whole: expected none"),
        (UNET, ["image_side=100"], "divisible by 16, such as 96 or 112; got 100"),
        (UNET, ["image_side=[64, 72]"], "such as 64 or 80; got 72"),
        (UNET, ["pooling=[max, average]"], "means nothing for task: segment; leave it out"),
        (UNET, ["lung_mask=dataset"], "means nothing for task: segment"),
        (CNN, ["unet_filters=8"], "means nothing for task: classify"),
        (CNN, ["backbone=unet"], "unknown 'unet'"),
        (UNET, ["unet_depth=0"], "must be at least 1"),
    ],
)
def test_what_does_not_belong_is_refused(problem, read, text, overrides, message):
    if "segmnt" in text:
        with pytest.raises(SpecError, match="did you mean 'segment'"):
            read(text)
        return
    assert message in problem(text, *overrides)


def test_losses_of_different_kinds_do_not_rank(problem, read):
    losses = ["objective=loss", "mask_loss=[dice, both]"]
    assert "loss cannot compare trials that differ in mask_loss" in problem(UNET, *losses)
    assert read(UNET, "objective=loss", "mask_loss=dice").objective.mode == "min"
