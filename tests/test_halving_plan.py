"""A plan says where trials are judged, and what of a space halving cannot end."""

from collections import Counter

import pytest

from cxr_models.trial import TrialConfig
from sweep.halving import Rungs
from sweep.halving_plan import HalvingPlan, plan_halving
from sweep.spec import HalvingSpec


def longest(*freezes: str, backbone: str = "densenet121", epochs: int = 27) -> list[TrialConfig]:
    return [TrialConfig(backbone, freeze=freeze, epochs=epochs) for freeze in freezes]


def planned(configs: list[TrialConfig], trials: int = 99, known: Counter | None = None, **section: int) -> HalvingPlan:
    spec = HalvingSpec(**{"grace_epochs": 4, **section})
    return plan_halving(spec, configs, 1000, trials, known)


def test_nothing_is_said_without_halving():
    assert plan_halving(None, longest("all"), 1000, 9, None) == HalvingPlan(None, "", ())


def test_rungs_in_epochs_and_in_images():
    plan = planned(longest("all", "none"))
    assert plan.rungs == Rungs((4000, 12000), 1000)
    assert plan.sentence == (
        "after epochs 4 and 12 (4,000 and 12,000 images seen), the best third so far of each backbone and freeze "
        "strategy goes on, at least 1, and the others end"
    )
    assert plan.notes == ()


def test_a_segmentation_has_no_strategies_to_tell_apart():
    plan = planned(longest("none", backbone="unet"), known=Counter({("unet", "none"): 1}))
    assert "the best third so far goes on, at least 1, and the others end" in plan.sentence
    (note,) = plan.notes
    assert note.startswith("halving cannot end any trial of U-Net: ")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"grace_epochs": 9}, "after epoch 9 (9,000 images seen), the best third"),
        ({"grace_epochs": 3, "reduction_factor": 2}, "after epochs 3, 6, 12 and 24 ("),
        ({"reduction_factor": 2}, "the best half so far"),
        ({"reduction_factor": 6}, "the best 1 in 6 so far"),
        ({"least_survivors": 2}, "goes on, at least 2, and"),
    ],
)
def test_the_numbers_are_those_of_the_file(section, words):
    assert words in planned(longest("all"), **section).sentence


def test_where_a_head_trains_first_it_is_said_what_counts():
    told = "; where the head alone trains first, epochs count from the end of that"
    assert planned(longest("all", "all>stages:1")).sentence.endswith(told)
    assert told not in planned(longest("all", "stages:1>none")).sentence


def test_no_rung():
    plan = planned(longest("all", epochs=4))
    assert (plan.rungs, plan.sentence) == (None, "")
    assert plan.notes == ("halving has no rung: grace_epochs 4, most epochs 4",)


def test_a_strategy_that_comes_to_no_rung():
    plan = planned(longest("all", "all>none", epochs=5))
    assert plan.notes == (
        "halving never judges all>none: its fine-tuning is over after 4 epochs or fewer (grace_epochs)",
    )
    assert planned(longest("all", "all>none", epochs=7)).notes == ()


class TestTooFewTrials:
    def test_a_grid_names_the_strategies(self):
        known = Counter({("densenet121", "all"): 1, ("densenet121", "none"): 2})
        (note,) = planned(longest("all", "none"), known=known).notes
        assert note == (
            "halving cannot end any trial of all: it ends none before more than 1 trial of one came to a rung"
        )
        (note,) = planned(longest("all", "none"), known=known, least_survivors=2).notes
        assert note.startswith("halving cannot end any trial of all and none: it ends none before more than 2 trials")

    def test_what_a_grid_cuts_off_altogether_is_not_named(self):
        assert planned(longest("all", "none"), known=Counter({("densenet121", "all"): 9})).notes == ()

    def test_backbones_are_named_where_there_are_several_and_long_lists_cut(self):
        configs = [*longest("all"), *(row for k in range(9) for row in longest("all", backbone=f"b{k}"))]
        known = Counter({(config.backbone, config.freeze): 1 for config in configs})
        (note,) = planned(configs, known=known).notes
        assert "densenet121 all, b0 all, " in note
        assert "b6 all and 2 more: " in note

    def test_other_searches_are_measured_by_their_mean(self):
        (note,) = planned(longest("all", "none", "stages:1"), trials=5).notes
        assert note.startswith("halving will end few trials, 5 for 3 pairs of backbone and freeze strategy: ")
        assert planned(longest("all", "none", "stages:1"), trials=6).notes == ()
        assert planned(longest("all", "none", "stages:1"), trials=6, least_survivors=2).notes
