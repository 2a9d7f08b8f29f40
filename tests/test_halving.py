"""Which trials go on, and that a restart changes no decision."""

import math
import random

import pytest

from sweep.halving import Halving, rungs


class TestRungs:
    @pytest.mark.parametrize(
        ("grace", "factor", "epochs", "expected"),
        [
            (1, 3, 9, (1, 3)),
            (1, 3, 10, (1, 3, 9)),
            (2, 4, 15, (2, 8)),
            (1, 10, 1001, (1, 10, 100, 1000)),
            (5, 3, 5, ()),
            (9, 2, 4, ()),
        ],
    )
    def test_powers_below_the_last_epoch(self, grace, factor, epochs, expected):
        assert rungs(grace, factor, epochs) == expected

    def test_exact_where_logarithms_are_not(self):
        for factor in range(2, 12):
            for power in range(1, 12):
                assert len(rungs(1, factor, factor**power)) == power
                assert len(rungs(1, factor, factor**power + 1)) == power + 1

    @pytest.mark.parametrize(("grace", "factor"), [(0, 3), (1, 1)])
    def test_impossible_numbers(self, grace, factor):
        with pytest.raises(ValueError, match="must be at least"):
            rungs(grace, factor, 10)


def judged(halving: Halving, values: list[float], epoch: int = 1) -> list[bool]:
    return [halving.keep(f"trial-{index}", epoch, value) for index, value in enumerate(values)]


class TestKeep:
    def test_between_rungs_every_trial_goes_on(self):
        halving = Halving((2, 6), 3, "max")
        halving.keep("good", 2, 1.0)
        assert all(halving.keep("bad", epoch, 0.0) for epoch in (1, 3, 4, 5, 7))
        assert not halving.keep("bad", 2, 0.0)

    @pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
    def test_the_first_and_every_new_best_go_on(self, mode, sign):
        values = [sign * value for value in range(40)]
        assert all(judged(Halving((1,), 3, mode), values))

    @pytest.mark.parametrize(("mode", "sign"), [("max", -1), ("min", 1)])
    def test_of_ever_worse_trials_only_the_first_goes_on(self, mode, sign):
        values = [sign * value for value in range(40)]
        assert judged(Halving((1,), 3, mode), values) == [True] + [False] * 39

    def test_equals_go_on(self):
        assert all(judged(Halving((1,), 4, "max"), [0.5] * 20))

    def test_among_the_best_third_of_nine(self):
        values = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
        for last, goes_on in ((7.5, True), (6.5, True), (5.5, False)):
            halving = Halving((1,), 3, "max")
            judged(halving, values)
            assert halving.keep("last", 1, last) == goes_on

    @pytest.mark.parametrize("factor", [2, 3, 4])
    def test_about_one_in_reduction_factor_survives(self, factor):
        values = [float(value) for value in range(600)]
        shares = []
        for seed in range(10):
            random.Random(seed).shuffle(values)
            shares.append(sum(judged(Halving((1,), factor, "max"), values)) / len(values))
        assert sum(shares) / len(shares) == pytest.approx(1 / factor, rel=0.1)

    def test_a_better_value_never_turns_a_yes_into_a_no(self):
        draw = random.Random(0)
        for _ in range(200):
            before = [draw.random() for _ in range(draw.randrange(12))]
            verdicts = []
            for value in sorted(draw.random() for _ in range(5)):
                halving = Halving((1,), 3, "max")
                judged(halving, before)
                verdicts.append(halving.keep("last", 1, value))
            assert verdicts == sorted(verdicts)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_ends_and_does_not_count(self, value):
        halving = Halving((1,), 3, "max")
        assert not halving.keep("diverged", 1, value)
        assert halving.keep("next", 1, 0.1)

    def test_a_retried_trial_gets_the_same_answer_and_counts_once(self):
        halving = Halving((1,), 2, "max")
        assert halving.keep("early", 1, 0.1)
        assert judged(halving, [0.2]) == [True]
        assert halving.keep("early", 1, 0.1)
        # The second of three does not go on; had the retry counted, it would be the second of four.
        assert not halving.keep("late", 1, 0.15)

    def test_an_unknown_mode(self):
        with pytest.raises(ValueError, match="mode must be max or min, but got 'best'"):
            Halving((1,), 3, "best")
