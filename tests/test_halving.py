"""Which trials go on, each strategy among its own, and that a restart changes no decision."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from cxr_models.trial import TrialConfig
from sweep.halving import Halving, Rungs, head_epochs

TRIAL = TrialConfig("densenet121", freeze="none", epochs=27)
PROBE = replace(TRIAL, freeze="all")


def rungs(*epochs: int) -> Rungs:
    return Rungs(epochs, epoch_images=1)


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
        assert Rungs.spaced(grace, factor, epochs, 1).images == expected
        assert Rungs.spaced(grace, factor, epochs, 788).images == tuple(788 * epoch for epoch in expected)

    def test_exact_where_logarithms_are_not(self):
        for factor in range(2, 12):
            for power in range(1, 12):
                assert len(Rungs.spaced(1, factor, factor**power, 1).images) == power
                assert len(Rungs.spaced(1, factor, factor**power + 1, 1).images) == power + 1

    @pytest.mark.parametrize(("grace", "factor"), [(0, 3), (1, 1)])
    def test_impossible_numbers(self, grace, factor):
        with pytest.raises(ValueError, match="must be at least"):
            Rungs.spaced(grace, factor, 10, 1)


class TestRungsOfATrial:
    def test_after_as_many_epochs_as_the_file_says(self):
        assert Rungs.spaced(4, 3, 27, 788).of_trial(TRIAL) == {4: 4 * 788, 12: 12 * 788}

    def test_a_short_trial_comes_to_fewer(self):
        assert list(Rungs.spaced(4, 3, 27, 788).of_trial(replace(TRIAL, epochs=11))) == [4]

    @pytest.mark.parametrize("other", [{"batch_size": 64}, {"sampling": "balanced"}, {"augmentation": "light"}])
    def test_the_same_for_every_way_to_draw_batches(self, other):
        marks = Rungs.spaced(4, 3, 27, 788)
        assert marks.of_trial(replace(TRIAL, **other)) == marks.of_trial(TRIAL)

    def test_where_epochs_have_other_numbers_of_images_it_is_the_images_that_count(self):
        marks = Rungs.spaced(4, 3, 27, 800)
        smaller_fold = replace(marks, epoch_images=600)
        assert smaller_fold.of_trial(TRIAL) == {6: 3200, 16: 9600}

    @pytest.mark.parametrize(
        ("freeze", "probe_share", "expected"),
        [
            ("all", 0.3, 0),
            ("stages:1", 0.3, 0),
            ("stages:1>none", 0.3, 0),
            ("all>stages:1", 0.3, 8),
            ("all>stages:1", 0.5, 14),
            ("last:0>none", 0.3, 8),
            ("all>stages:1>none", 0.3, 8),
            ("all>fraction:1>none", 0.3, 17),
        ],
    )
    def test_a_head_that_trains_alone_first_is_not_judged(self, freeze, probe_share, expected):
        trial = replace(TRIAL, freeze=freeze, probe_share=probe_share)
        assert head_epochs(trial) == expected
        judged = Rungs.spaced(4, 3, 27, 788).of_trial(trial)
        assert list(judged) == [epoch for epoch in (expected + 4, expected + 12) if epoch <= 27]
        assert min(judged) - head_epochs(trial) == 4, "after as many images of fine-tuning in every trial"


def judged(halving: Halving, values: list[float], epoch: int = 1, trial: TrialConfig = TRIAL) -> list[bool]:
    return [halving.keep(f"{trial.freeze}-{index}", trial, epoch, value) for index, value in enumerate(values)]


class TestKeep:
    def test_between_rungs_every_trial_goes_on(self):
        halving = Halving(rungs(2, 6), 3, "max")
        halving.keep("good", TRIAL, 2, 1.0)
        assert all(halving.keep("bad", TRIAL, epoch, 0.0) for epoch in (1, 3, 4, 5, 7))
        assert not halving.keep("bad", TRIAL, 2, 0.0)

    @pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
    def test_the_first_and_every_new_best_go_on(self, mode, sign):
        values = [sign * value for value in range(40)]
        assert all(judged(Halving(rungs(1), 3, mode), values))

    @pytest.mark.parametrize(("mode", "sign"), [("max", -1), ("min", 1)])
    def test_of_ever_worse_trials_only_the_first_goes_on(self, mode, sign):
        values = [sign * value for value in range(40)]
        assert judged(Halving(rungs(1), 3, mode), values) == [True] + [False] * 39

    @pytest.mark.parametrize("factor", [2, 3, 4])
    def test_of_equals_as_many_go_on_as_of_others(self, factor):
        """Trials that all answer one class are no better than one another, and not all worth their epochs."""
        assert sum(judged(Halving(rungs(1), factor, "max"), [0.14] * 24)) == 24 // factor

    def test_an_equal_that_had_to_end_takes_nobody_s_place(self):
        values = [0.5, 0.9, 0.5, 0.1, 0.1]
        halving = Halving(rungs(1), 2, "max")
        assert judged(halving, values) == [True, True, False, False, False]
        assert halving.keep("the third of six", TRIAL, 1, 0.5)

    def test_among_the_best_third_of_nine(self):
        values = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
        for last, goes_on in ((7.5, True), (6.5, True), (5.5, False)):
            halving = Halving(rungs(1), 3, "max")
            judged(halving, values)
            assert halving.keep("last", TRIAL, 1, last) == goes_on

    @pytest.mark.parametrize("factor", [2, 3, 4])
    def test_about_one_in_reduction_factor_survives(self, factor):
        values = [float(value) for value in range(600)]
        shares = []
        for seed in range(10):
            random.Random(seed).shuffle(values)
            shares.append(sum(judged(Halving(rungs(1), factor, "max"), values)) / len(values))
        assert sum(shares) / len(shares) == pytest.approx(1 / factor, rel=0.1)

    def test_a_better_value_never_turns_a_yes_into_a_no(self):
        draw = random.Random(0)
        for _ in range(200):
            before = [draw.random() for _ in range(draw.randrange(12))]
            verdicts = []
            for value in sorted(draw.random() for _ in range(5)):
                halving = Halving(rungs(1), 3, "max")
                judged(halving, before)
                verdicts.append(halving.keep("last", TRIAL, 1, value))
            assert verdicts == sorted(verdicts)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_ends_and_does_not_count(self, value):
        halving = Halving(rungs(1), 3, "max")
        assert not halving.keep("diverged", TRIAL, 1, value)
        assert halving.keep("next", TRIAL, 1, 0.1)

    def test_a_retried_trial_gets_the_same_answer_and_counts_once(self):
        halving = Halving(rungs(1), 2, "max")
        assert halving.keep("early", TRIAL, 1, 0.1)
        assert judged(halving, [0.2]) == [True]
        assert halving.keep("early", TRIAL, 1, 0.1)
        # The second of three does not go on; had the retry counted, it would be the second of four.
        assert not halving.keep("late", TRIAL, 1, 0.15)

    def test_at_its_own_last_epoch_a_trial_is_not_ended_and_counts_for_the_others(self):
        halving = Halving(rungs(2), 2, "max")
        short = replace(TRIAL, epochs=2)
        assert all(halving.keep(f"short-{value}", short, 2, value) for value in (0.9, 0.1))
        assert not halving.keep("long", TRIAL, 2, 0.8)
        assert halving.decisions(short) == set()
        assert halving.decisions(TRIAL) == {2}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mode": "best"}, "mode must be max or min, but got 'best'"),
            ({"mode": "max", "least_survivors": 0}, "least_survivors must be at least 1, but got 0"),
        ],
    )
    def test_arguments_that_mean_nothing(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Halving(rungs(1), 3, **arguments)


class TestStrata:
    def test_slow_starters_are_judged_among_their_own(self):
        """Whatever the heads score by then, the trials that train everything lose none to them."""
        values = [0.3, 0.2, 0.35, 0.1, 0.4]
        alone, beside = Halving(rungs(1), 3, "max"), Halving(rungs(1), 3, "max")
        judged(beside, [0.9, 0.8, 0.7, 0.95], trial=PROBE)
        assert judged(beside, values) == judged(alone, values)

    def test_each_backbone_too(self):
        halving = Halving(rungs(1), 3, "max")
        other = replace(TRIAL, backbone="resnet50")
        assert judged(halving, [0.9, 0.1]) == [True, False]
        assert halving.keep("other", other, 1, 0.2)

    def test_other_axes_do_not_part_trials(self):
        halving = Halving(rungs(1), 3, "max")
        assert halving.keep("one", TRIAL, 1, 0.5)
        other = replace(TRIAL, learning_rate=1e-5, image_side=224, batch_size=8, batch_norm="train", epochs=20)
        assert not halving.keep("two", other, 1, 0.4)

    def test_phases_of_other_lengths_meet_after_as_much_fine_tuning(self):
        halving = Halving(rungs(4), 3, "max")
        phased = replace(TRIAL, freeze="all>stages:1")
        longer = replace(phased, probe_share=0.5)
        assert head_epochs(phased) == 8
        assert halving.keep("one", phased, 4, 0.1), "its fine-tuning has not begun"
        assert halving.keep("one", phased, 8 + 4, 0.6)
        assert not halving.keep("two", longer, 14 + 4, 0.5)


class Arrivals:
    """Trials of one stratum that run side by side, come to their rungs in random order, and now and then fail."""

    def __init__(self, halving: Halving, seed: int, trials: int, failing: float) -> None:
        self.halving = halving
        self.draw = random.Random(seed)
        self.failing = failing
        self.epochs = {f"t{index}": 0 for index in range(trials)}
        self.values = {trial: self.draw.random() for trial in self.epochs}
        self.running = set(self.epochs)
        self.completed: set[str] = set()
        self.failed: set[str] = set()
        self.ended: dict[str, int] = {}

    def step(self) -> None:
        """One trial runs an epoch, or fails in it."""
        trial = self.draw.choice(sorted(self.running))
        if self.draw.random() < self.failing:
            self.halving.strike(trial)
            self.failed.add(trial)
            self.running.remove(trial)
            return
        self.epochs[trial] += 1
        value = self.values[trial] + 0.2 * self.draw.random()
        if not self.halving.keep(trial, TRIAL, self.epochs[trial], value):
            self.ended[trial] = self.epochs[trial]
            self.running.remove(trial)
        elif self.epochs[trial] == TRIAL.epochs:
            self.completed.add(trial)
            self.running.remove(trial)

    def ahead(self, epoch: int) -> int:
        """How many are past an epoch and have come to no bad end."""
        return sum(self.epochs[trial] >= epoch for trial in self.running | self.completed)


class TestSurvivors:
    def test_so_many_go_on_before_anybody_ends(self):
        assert judged(Halving(rungs(1), 3, "max", least_survivors=3), [9.0, 8.0, 7.0, 6.0]) == [True] * 3 + [False]

    def test_the_first_to_come_do_not_use_the_minimum_up(self):
        """The best two of all have gone on, although two weak ones came first."""
        values = [0.1, 0.2, 0.9, 0.8, 0.3]
        assert judged(Halving(rungs(1), 3, "max", least_survivors=2), values) == [True, True, True, True, False]

    def test_a_survivor_that_fails_makes_room(self):
        halving = Halving(rungs(1), 3, "max")
        assert judged(halving, [0.6, 0.5]) == [True, False]
        halving.strike("none-0")
        # The one that had to end is still better, but nobody of the stratum would come to the end without the next.
        assert halving.keep("next", TRIAL, 1, 0.4)
        assert not halving.keep("one more", TRIAL, 1, 0.3)

    def test_a_survivor_that_was_ended_later_leaves_one_behind_who_was_better(self):
        halving = Halving(rungs(1, 3), 3, "max")
        assert halving.keep("one", TRIAL, 1, 0.5)
        assert halving.keep("two", TRIAL, 1, 0.6)
        assert halving.keep("two", TRIAL, 3, 0.7)
        assert not halving.keep("one", TRIAL, 3, 0.6)
        assert not halving.keep("three", TRIAL, 1, 0.4), "two is on its way"
        halving.strike("two")
        assert halving.keep("four", TRIAL, 1, 0.4)

    @pytest.mark.parametrize("least", [1, 2, 3])
    def test_without_failures_the_minimum_reaches_the_last_epoch(self, least):
        for seed in range(30):
            halving = Halving(rungs(1, 3, 9), 3, "max", least_survivors=least)
            trials = Arrivals(halving, seed, trials=12, failing=0.0)
            while trials.running:
                trials.step()
            assert len(trials.completed) >= least
            assert len(trials.completed) < 12

    @pytest.mark.parametrize("least", [1, 2, 3])
    def test_whoever_ends_leaves_the_minimum_ahead_alive(self, least):
        ended = 0
        for seed in range(60):
            trials = Arrivals(Halving(rungs(1, 3, 9), 3, "max", least_survivors=least), seed, trials=12, failing=0.03)
            while trials.running:
                before = dict(trials.ended)
                trials.step()
                for trial in trials.ended.keys() - before:
                    ended += 1
                    assert trials.ahead(trials.ended[trial]) >= least
        assert ended > 60


class TestFailures:
    def test_one_that_failed_ends_no_more_others(self):
        """A rate that learns fast and then diverges."""
        halving = Halving(rungs(1), 2, "max")
        assert judged(halving, [0.9, 0.5, 0.4]) == [True, False, False]
        halving.strike("none-0")
        assert halving.keep("next", TRIAL, 1, 0.6)

    def test_nor_does_it_count_as_one_that_others_are_better_than(self):
        """Of four, the second best would go on; of the two that did not fail, it does not."""
        values = [0.1, 0.2, 0.9]
        halving = Halving(rungs(1), 2, "max")
        judged(halving, values)
        assert halving.keep("last", TRIAL, 1, 0.5)
        halving = Halving(rungs(1), 2, "max")
        judged(halving, values)
        halving.strike("none-0")
        halving.strike("none-1")
        assert not halving.keep("last", TRIAL, 1, 0.5)

    def test_what_it_ended_before_stays_ended(self):
        halving = Halving(rungs(1), 2, "max")
        assert judged(halving, [0.9, 0.5]) == [True, False]
        halving.strike("none-0")
        assert not halving.keep("none-1", TRIAL, 1, 0.5)


class TestRestart:
    def events(self, seed: int) -> list[tuple]:
        """What a sweep tells halving: epochs of several strategies side by side, and trials to strike."""
        draw = random.Random(seed)
        trials = {f"t{index}": replace(TRIAL, freeze=draw.choice(["all", "none", "all>none"])) for index in range(24)}
        events: list[tuple] = []
        epochs = dict.fromkeys(trials, 0)
        while epochs:
            trial = draw.choice(sorted(epochs))
            epochs[trial] += 1
            if draw.random() < 0.02:
                events.append(("strike", trial))
            else:
                value = math.nan if draw.random() < 0.02 else draw.random()
                events.append(("keep", trial, trials[trial], epochs[trial], value))
            if events[-1][0] == "strike" or epochs[trial] == TRIAL.epochs:
                del epochs[trial]
        return events

    def tell(self, halving: Halving, events: list[tuple]) -> list[bool | None]:
        return [getattr(halving, what)(*told) for what, *told in events]

    def make(self, journal: Path | None) -> Halving:
        return Halving(rungs(2, 6, 18), 3, "max", least_survivors=2, journal=journal)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_second_half_is_decided_as_if_it_had_never_stopped(self, seed, tmp_path):
        events = self.events(seed)
        whole = self.tell(self.make(None), events)
        assert {True, False, None} == {*whole}
        half = len(events) // 2
        journal = tmp_path / "halving.jsonl"
        assert self.tell(self.make(journal), events[:half]) == whole[:half]
        assert self.tell(self.make(journal), events[half:]) == whole[half:]

    def test_who_comes_again_gets_the_same_answer(self, tmp_path):
        events = [event for event in self.events(0) if event[0] == "keep"]
        journal = tmp_path / "halving.jsonl"
        told = self.tell(self.make(journal), events)
        again = self.make(journal)
        lines = journal.read_text()
        assert self.tell(again, events) == told
        assert journal.read_text() == lines, "nothing is written twice"

    def test_a_line_that_a_crash_cut_short_was_told_to_nobody(self, tmp_path):
        journal = tmp_path / "halving.jsonl"
        judged(self.make(journal), [0.5, 0.6], epoch=2)
        lines = journal.read_text().splitlines(keepends=True)
        assert [json.loads(line)["goes_on"] for line in lines] == [True, True]
        journal.write_text(lines[0] + lines[1][:20])
        self.make(journal).keep("none-2", TRIAL, 2, 0.7)
        assert journal.read_text().startswith(lines[0])
        assert [json.loads(line)["trial_id"] for line in journal.read_text().splitlines()] == ["none-0", "none-2"]
        self.make(journal).keep("none-1", TRIAL, 2, 0.6)
        assert len(journal.read_text().splitlines()) == 3
