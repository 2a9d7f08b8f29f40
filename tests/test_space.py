"""Domains, conditions and what can occur together."""

from itertools import islice

import pytest

from sweep.space import Axis, Case, Choice, Constant, Range, Space

BACKBONE = Axis("backbone", Choice(("small", "large")))
FREEZE = Axis("freeze", Choice(("all", "none")), (Case({"backbone": ("small",)}, Constant("none")),))
RATE = Axis(
    "learning_rate",
    Range(1e-4, 1e-2, log=True),
    (Case({"freeze": ("none",), "backbone": ("large",)}, Constant(1e-5)), Case({"freeze": ("none",)}, Constant(1e-4))),
)
EPOCHS = Axis("epochs", Range(2, 8, step=3))


def space(*axes: Axis) -> Space:
    return Space({axis.name: axis for axis in axes})


class TestRange:
    def test_listed_values_carry_no_rounding_noise(self):
        assert list(Range(0.0, 0.5, step=0.1)) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]

    def test_the_last_step_does_not_pass_the_end(self):
        assert list(Range(0.0, 0.5, step=0.2)) == [0.0, 0.2, 0.4]
        assert Range(0.0, 0.5, step=0.2).nearest(0.5) == 0.4

    def test_whole_numbers_stay_whole(self):
        assert [(value, type(value)) for value in Range(1, 7, step=3)] == [(1, int), (4, int), (7, int)]
        assert list(Range(1, 3)) == [1, 2, 3]

    @pytest.mark.parametrize(
        ("value", "inside"), [(0.3, True), (0.25, False), (0.6, False), (-0.1, False), ("0.3", False)]
    )
    def test_membership_respects_the_step(self, value, inside):
        assert (value in Range(0.0, 0.5, step=0.1)) == inside

    def test_nearest_snaps_to_a_step_and_into_the_range(self):
        stepped = Range(0.0, 0.5, step=0.1)
        assert [stepped.nearest(value) for value in (0.30000000000000004, 0.26, -1.0, 9.0)] == [0.3, 0.3, 0.0, 0.5]
        assert Range(0.1, 0.5).nearest(0.1234567) == 0.1234567

    def test_a_range_without_step_cannot_be_listed(self):
        assert not Range(0.0, 1.0).finite
        with pytest.raises(ValueError, match=r"cannot be listed: 0\.0 to 1\.0"):
            list(Range(0.0, 1.0))

    def test_a_long_range_is_listed_lazily(self):
        assert list(islice(Range(0, 2**40), 3)) == [0, 1, 2]


class TestConditions:
    @pytest.mark.parametrize(
        ("values", "domain"),
        [
            ({"freeze": "all", "backbone": "large"}, RATE.domain),
            ({"freeze": "none", "backbone": "large"}, Constant(1e-5)),
            ({"freeze": "none", "backbone": "small"}, Constant(1e-4)),
        ],
        ids=["none matches", "first wins", "second"],
    )
    def test_the_first_case_of_which_every_part_matches(self, values, domain):
        assert RATE.domain_given(values) == domain

    def test_combinations_are_those_that_occur(self):
        found = space(BACKBONE, FREEZE, RATE, EPOCHS).combinations("freeze", "backbone")
        assert found == {("none", "small"), ("all", "large"), ("none", "large")}

    def test_axes_the_named_ones_depend_on_may_be_left_out(self):
        assert space(BACKBONE, FREEZE).combinations("freeze") == {("all",), ("none",)}

    def test_reachable_leaves_out_what_conditions_exclude(self):
        only_small = Axis("backbone", Constant("small"))
        assert space(only_small, FREEZE).reachable("freeze") == ("none",)
        assert space(BACKBONE, FREEZE).reachable("freeze") == ("all", "none")
        assert space(EPOCHS).reachable("epochs") == (2, 5, 8)

    def test_a_range_has_no_combinations(self):
        with pytest.raises(ValueError, match="cannot be listed"):
            space(BACKBONE, FREEZE, RATE).combinations("learning_rate")

    @pytest.mark.parametrize(
        ("point", "possible"),
        [
            ({}, {RATE.domain, Constant(1e-5), Constant(1e-4)}),
            ({"backbone": "small"}, {Constant(1e-4)}),
            ({"freeze": "all"}, {RATE.domain}),
            ({"backbone": "large", "freeze": "none"}, {Constant(1e-5)}),
        ],
        ids=str,
    )
    def test_possible_domains_narrow_with_what_is_known(self, point, possible):
        assert set(space(BACKBONE, FREEZE, RATE).possible_domains("learning_rate", point)) == possible


class TestPoints:
    def test_every_point_once_and_the_last_axis_fastest(self):
        points = [tuple(point.values()) for point in space(BACKBONE, FREEZE, EPOCHS).points()]
        assert points == [
            *(("small", "none", epochs) for epochs in (2, 5, 8)),
            *(("large", freeze, epochs) for freeze in ("all", "none") for epochs in (2, 5, 8)),
        ]

    def test_with_axes_fixed(self):
        points = list(space(BACKBONE, FREEZE, EPOCHS).points({"freeze": "all", "epochs": 5}))
        assert points == [{"backbone": "large", "freeze": "all", "epochs": 5}]
