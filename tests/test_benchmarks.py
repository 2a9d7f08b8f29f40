"""The arithmetic and the page of the benchmarks; nothing is measured here."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from cxr_models.dataset import ImageRecord, Manifest
from cxr_models.phantom import CLASSES
from sweep.halving import Halving, Rungs
from sweep.spec import read_spec

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # programs, not a package

import audit_speed
import darkcovidnet
from comparing import compared, full_seconds, mean_accuracies, mean_pause, ratios, trial_seconds
from halving import CURVES, SCENARIOS, Scenario, draw_trials, play, simulate
from learning_curves import Strategy, curve, read_measured
from mixes import BATCH_SIZES, MIXES, Mix, list_trials, listed_values, to_space, trials_for_baselines
from rendering import NOT_MEASURED, read_results, render, render_one
from speed_of_light import read_rates, speed_of_light

MIX = Mix("small", {"all": 4, "none": 2}, 5)


def ran(freeze: str, began: float, epochs: tuple[float, ...], *, mix: str = "small", index: int = 0) -> dict:
    """A trial as a baseline writes it; one second of it is outside its epochs."""
    return {
        "mix": mix,
        "index": index,
        "freeze": freeze,
        "began": began,
        "ended": began + sum(epochs) + 1.0,
        "epoch_seconds": list(epochs),
        "val_accuracy": 0.5,
        "trainable_parameters": {"all": 10, "none": 99}[freeze],
    }


def report(*trials: dict, at_once: int = 1, wall: float = 100.0) -> dict:
    return {
        "trials": list(trials),
        "at_once": at_once,
        "wall_seconds": wall,
        "startup_seconds": 3.0,
        "memory": {"driver": {"largest": 2**20, "together": 2**20}},
    }


def product(mix: Mix = MIX) -> dict:
    strategies = [freeze for freeze, count in mix.counts.items() for _ in range(count)]
    return {
        "wall_seconds": 20.0,
        "seconds": {"total": 19.0, "startup": 10.0, "trials": 8.0, "features": 2.0},
        "at_once": 2,
        "memory": {"driver": {"largest": 2**30, "together": 2**30}},
        "speed_of_light": None,
        "trials": [
            {
                "index": index,
                "freeze": freeze,
                "val_accuracies": [epoch / 10 for epoch in range(1, mix.epochs + 1)],
                "trainable_parameters": {"all": 10, "none": 99}[freeze],
                "seconds": 1.5,
            }
            for index, freeze in enumerate(strategies)
        ],
    }


class TestScalingEpochs:
    def test_missing_epochs_take_the_mean_without_the_first_which_compiles(self):
        assert trial_seconds(ran("all", 7.0, (9.0, 2.0, 4.0)), 10) == pytest.approx(9 + 2 + 4 + 1 + 7 * 3)

    def test_a_whole_trial_is_taken_as_it_is(self):
        assert trial_seconds(ran("all", 7.0, (9.0, 2.0, 4.0)), 3) == pytest.approx(16.0)
        assert trial_seconds(ran("all", 7.0, (9.0,)), 1) == pytest.approx(10.0)

    def test_the_compiling_epoch_alone_stands_for_no_other(self):
        with pytest.raises(ValueError, match="1 epochs cannot be scaled to 5; run at least 2"):
            trial_seconds(ran("all", 0.0, (9.0,)), 5)


class TestScalingTrials:
    def test_a_strategy_counts_as_often_as_the_mix_has_it(self):
        both = report(ran("all", 10.0, (4.0, 2.0)), ran("none", 17.0, (30.0, 8.0)), wall=70.0)
        head, whole = 4 + 2 + 1 + 3 * 2, 30 + 8 + 1 + 3 * 8  # one trial of five epochs
        around = 70.0 - (56.0 - 10.0)  # start-up and exit: what is not between the first begin and the last end
        assert full_seconds(both, MIX) == pytest.approx(around + 4 * head + 2 * whole + 5 * 0.0)

    def test_pauses_between_trials_are_scaled_too(self):
        close = report(ran("all", 0.0, (4.0, 2.0)), ran("none", 7.0, (4.0, 2.0)))
        apart = report(ran("all", 0.0, (4.0, 2.0)), ran("none", 9.0, (4.0, 2.0)), wall=102.0)
        assert full_seconds(apart, MIX) - full_seconds(close, MIX) == pytest.approx(5 * 2.0)

    def test_trials_at_once_share_the_seconds(self):
        trials = [ran(freeze, 0.0, (4.0, 2.0)) for freeze in MIX.counts]
        around = 100.0 - 7.0
        assert full_seconds(report(*trials, at_once=2), MIX) == pytest.approx(around + 6 * (7 + 3 * 2) / 2)

    def test_one_run_serves_mixes_that_have_only_some_of_its_strategies(self):
        both = report(ran("all", 0.0, (4.0, 2.0)), ran("none", 7.0, (90.0, 80.0)), wall=190.0)
        head = Mix("head", {"all": 60}, 5)
        assert full_seconds(both, head) == pytest.approx(190.0 - 178.0 + 60 * (7 + 3 * 2))

    def test_a_run_of_just_the_mix_is_taken_as_it_is(self):
        strategies = [freeze for freeze, count in MIX.counts.items() for _ in range(count)]
        trials = [ran(freeze, 6.0 * place, (1.0,) * 5) for place, freeze in enumerate(strategies)]
        assert full_seconds(report(*trials, at_once=2), MIX) == 100.0
        elsewhere = [{**trial, "mix": "other"} for trial in trials]
        assert full_seconds(report(*elsewhere, at_once=2), MIX) != 100.0

    def test_a_strategy_that_never_ran_is_an_error(self):
        with pytest.raises(ValueError, match="expected a trial of the strategy none, but none ran"):
            full_seconds(report(ran("all", 0.0, (1.0, 1.0))), MIX)

    def test_the_pause_is_from_an_end_to_the_next_begin_on_the_same_place(self):
        trials = [ran("all", began, (4.0, 2.0)) for began in (0.0, 1.0, 10.0, 13.0)]  # they end 7 seconds later
        assert mean_pause(trials, 2) == pytest.approx(((10 - 7) + (13 - 8)) / 2)
        assert mean_pause(trials[:2], 2) == 0.0


class TestComparing:
    def test_ratios_with_and_without_start_up(self):
        found = ratios(report(), 203.0, product())
        assert found == pytest.approx({"cold": 203.0 / 20.0, "warm": 200.0 / 10.0})

    def test_no_ratio_without_a_measured_start_up(self):
        assert ratios(report(), 203.0, {"wall_seconds": 20.0, "seconds": {}})["warm"] is None

    def test_accuracies_are_of_the_same_trials_after_the_same_epochs(self):
        trials = ran("all", 0.0, (1.0, 1.0), index=1), ran("none", 3.0, (1.0, 1.0), mix="other", index=7)
        assert mean_accuracies(report(*trials), MIX, product()) == pytest.approx((0.5, 0.2))
        assert mean_accuracies(report(trials[1]), MIX, product()) is None

    def test_another_number_of_trained_parameters_is_seen(self):
        trials = [ran(freeze, 9.0 * place, (1.0, 1.0)) for place, freeze in enumerate(MIX.counts)]
        assert compared(report(*trials), MIX, product())["same_parameters"]
        trials[1]["trainable_parameters"] += 1
        assert not compared(report(*trials), MIX, product())["same_parameters"]


class TestSpeedOfLight:
    def test_one_extraction_and_the_suffixes_on_all_cores(self):
        least = speed_of_light(MIX, 100.0, {"all": 0.5, "none": 7.0}, images=800, cores=2)
        assert least == pytest.approx(8.0 + (4 * 5 * 0.5 + 2 * 5 * 7.0) / 2)

    def test_nothing_is_extracted_where_everything_trains(self):
        assert speed_of_light(Mix("all train", {"none": 2}, 3), 1.0, {"none": 7.0}, images=800, cores=2) == 21.0

    def test_a_file_of_rates_with_another_key_is_refused(self, tmp_path):
        (tmp_path / "rates.json").write_text('{"side": 64, "images": 3}')
        with pytest.raises(ValueError, match="expected a JSON object with the keys side, extraction_rate"):
            read_rates(tmp_path / "rates.json")


@pytest.mark.parametrize("mix", MIXES.values(), ids=lambda mix: mix.name)
class TestMixes:
    def test_the_product_takes_every_trial_as_a_fixed_point(self, mix, tmp_path):
        trials = list_trials(mix, side=64, weights="bundled")
        space = tmp_path / "space.yaml"
        space.write_text(to_space(mix, trials, data="phantom", patient="nih"))
        spec = read_spec(space)
        assert spec.search.trials == mix.trials == len(trials)
        assert [dict(point) for point in spec.search.fixed] == [listed_values(trial) for trial in trials]

    def test_a_list_is_the_same_every_time_and_holds_each_strategy_as_often_as_said(self, mix):
        trials = list_trials(mix, side=64, weights="bundled")
        assert trials == list_trials(mix, side=64, weights="bundled")
        assert {freeze: sum(trial.freeze == freeze for trial in trials) for freeze in mix.counts} == mix.counts
        assert [trial.seed for trial in trials] == list(range(mix.trials))


class TestTrialsForBaselines:
    LISTS: ClassVar = {mix.name: list_trials(mix, side=64, weights="bundled") for mix in MIXES.values()}

    def test_each_strategy_runs_once_for_all_mixes_with_both_batch_sizes(self):
        chosen = trials_for_baselines(self.LISTS, 2)
        strategies = {freeze for mix in MIXES.values() for freeze in mix.counts}
        found = {freeze: [own.config for own in chosen if own.config.freeze == freeze] for freeze in strategies}
        assert all({trial.batch_size for trial in own} == set(BATCH_SIZES) for own in found.values())
        assert len(chosen) == 2 * len(strategies)

    def test_a_trial_is_that_of_its_mix(self):
        assert all(self.LISTS[own.mix][own.index] == own.config for own in trials_for_baselines(self.LISTS, 4))

    def test_without_a_bound_a_single_mix_runs_whole(self):
        name = "blocks"
        chosen = trials_for_baselines({name: self.LISTS[name]}, None)
        assert sorted(own.index for own in chosen) == list(range(MIXES[name].trials))


class TestAuditSpeed:
    def test_the_audit_finds_what_the_benchmark_plants(self, tmp_path, monkeypatch):
        monkeypatch.setattr(audit_speed, "COPY_EVERY", 4)
        for name in CLASSES:
            (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):  # one of each change
            audit_speed.write_image(tmp_path / "images", number)
        watch = audit_speed.Watch()
        planted = {frozenset((f"{number:05}.png", f"{number:05}-copy.png")) for number in range(0, 20, 4)}
        for run in ("cold", "cached"):
            found = audit_speed.audit(tmp_path / "images", tmp_path / "cache", watch, run)
            assert audit_speed.finds(found, planted) == {"found": 5, "false": 0}
        assert watch.seconds["cached: read"]["processor"] < watch.seconds["cold: read"]["processor"]
        files = sorted((tmp_path / "images").rglob("*.png"))
        (loop,) = audit_speed.all_pairs(files, watch).values()
        assert audit_speed.finds(loop, planted)["found"] == 5

    def test_loops_over_fewer_files_are_scaled_by_their_pairs(self):
        steps = [f"{run}: {step}" for run in ("cold", "cached") for step in ("read", "compare", "judge")]
        steps += [f"{way}: {step}" for way in ("pixels", "hashes") for step in ("read", "compare")]
        result = {
            "kind": "audit_speed",
            "images": 990,
            "files": 1000,
            "looped_files": 100,
            "imagehash": "4.3",
            "seconds": {step: {"wall": 9.0, "processor": 2.0} for step in steps},
            "planted": 10,
            "planted_looped": 3,
            "audit": {"found": 10, "false": 0},
            "loops": {"all pairs": {"found": 3, "false": 1}, "ImageHash's phash": {"found": 2, "false": 40}},
        }
        page = render_one({**result, "environment": TestPage().result(MIX, 2)["environment"]})
        assert "| the audit, cold | 1,000 | 27.0 | 6.0 | 167 | 10 of 10 | 0 |" in page
        assert "| all pairs | 100 | 18.0 | 220.0 | 5 | 3 of 3 | 1 |" in page  # 2 s x 10 to read, 2 s x 100 to compare
        assert "| ImageHash's phash | 100 | 18.0 | 220.0 | 5 | 2 of 3 | 40 |" in page


class TestPage:
    def result(self, mix: Mix, epochs: int) -> dict:
        trials = [ran(freeze, 30.0 * place, (1.0,) * epochs) for place, freeze in enumerate(mix.counts)]
        return {
            "kind": "sweep_speed",
            "environment": {
                "cpu": "a processor",
                "cores": 2,
                "memory_bytes": 2**33,
                "python": "3.11",
                "versions": {"keras": "3.15"},
                "commit": "0123abc",
                "date": "2026-01-01",
                "command": "python benchmarks/sweep_speed.py --data DIR",
            },
            "mix": {"name": mix.name, "counts": dict(mix.counts), "epochs": mix.epochs, "trials": mix.trials},
            "side": 64,
            "weights": "weights.h5",
            "images": {"train": 6, "val": 2},
            "product": product(mix),
            "baselines": {"ray": compared(report(*trials), mix, product(mix))},
        }

    def test_it_says_what_was_scaled(self):
        page = render([self.result(MIX, 2)])
        assert "| 2 of 6 | 2 of 5 |" in page
        assert "(scaled)" in page
        assert "Scaled: Ray Tune + Keras." in page
        assert "python benchmarks/sweep_speed.py --data DIR\n" in page

    def test_what_ran_whole_is_not_called_scaled(self):
        page = render([self.result(replace(MIX, counts={"all": 1, "none": 1}), 5)])
        assert "| 2 of 2 | 5 of 5 | 100.0 |" in page
        assert "(scaled)" not in page

    def test_a_figure_that_is_not_there_is_called_not_measured(self):
        assert NOT_MEASURED in render([self.result(MIX, 2)]).partition("## Mix")[2]

    def test_one_host_and_three_stand_beside_each_other_and_differences_are_told(self):
        row = {"slots": 2, "wall_seconds": 90.0, "search_seconds": 70.0, "trials_seconds": 50.0, "train_seconds": 80.0}
        row |= {"processor_seconds": 75.5, "sent_bytes": 0, "received_bytes": 0}
        three = {**row, "name": "three hosts", "train_seconds": 60.0, "sent_bytes": 25_000_000}
        facts = {"kind": "cluster", "environment": self.result(MIX, 2)["environment"], "trials": 24}
        same = {**facts, "rows": [{**row, "name": "one host"}, three], "complaints": []}
        page = render([same])
        assert "| one host | 2 | 90.0 | 70.0 | 50.0 | 80 | 75.5 | 0.0, 0.0 |" in page
        assert "| three hosts | 2 | 90.0 | 70.0 | 50.0 | 60 | 75.5 | 25.0, 0.0 |" in page
        assert "equal to the last bit" in page
        other = render([{**same, "complaints": ["epoch 3 of a-1 differs"]}])
        assert "They are not the same:\n\n- epoch 3 of a-1 differs" in other
        assert "equal to the last bit" not in other.partition("## One host")[2]

    def test_results_of_other_programs_are_read_and_other_files_left_out(self, tmp_path):
        facts = self.result(MIX, 2)["environment"]
        reader = {"kind": "pixel_reader", "environment": facts, "side": 64, "images": 9, "repeats": 2, "rows": []}
        row = {"freeze": "all", "cut": "out_relu", "seconds_whole": 3.0, "seconds_stored": 0.1}
        gains = {
            "kind": "cut_gains",
            "environment": facts,
            "side": 64,
            "rows": [{**row, "expected": 9, "measured": 30}],
        }
        steps = {
            "kind": "compiled_steps",
            "environment": facts,
            "side": 64,
            "batch_size": 16,
            "training": [{"freeze": "all", "plain": 0.02, "xla": 0.5}],
            "inference": {"8": 201.4, "16": 190.0},
        }
        files = {"small": self.result(MIX, 2), "pixels": reader, "gains": gains, "steps": steps, "rates": {"side": 64}}
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        page = render(read_results(tmp_path))
        headings = ("## Mix `small`", "## Gain of storing", "## Compiled steps", "## Reading pixels, 64 px")
        places = [page.index(heading) for heading in headings]
        assert places == sorted(places)
        assert "| `all` | 0.020 | 0.500 | 25.0 |" in page
        assert "| 8 | 201 |" in page


def planted(freeze: str, end: float, tau: float, noise: float = 0.0) -> Strategy:
    return Strategy(freeze, fits=((0.2, end, tau),), never=0.0, constant=0.0, noise=noise, seconds=1.0)


class TestHalvingSimulation:
    HEADS_AND_WHOLE = (planted("all", 0.7, 1.0), planted("none", 0.95, 10.0))

    def test_planted_parameters_are_found_in_their_curves(self):
        noise = np.random.default_rng(0).normal(0.0, 0.01, (4, 27))
        scores = [curve(27, 0.3, 0.8, 4.0) + noise[0], curve(27, 0.3, 0.8, 4.0) + noise[1], np.full(27, 0.2)]
        rows = [{"freeze": "none", "epochs": 27, "probe_share": 0.3, "seconds": 2.0, "scores": own} for own in scores]
        found = Strategy.fitted("none", rows)
        assert np.array(found.fits) == pytest.approx(np.array([[0.3, 0.8, 4.0]] * 2), rel=0.1)
        assert (found.never, found.constant, found.seconds) == (pytest.approx(1 / 3), 0.2, 2.0)
        assert found.noise == pytest.approx(0.01, rel=0.2)

    def test_of_phases_only_the_fine_tuning_is_fitted(self):
        scores = [*curve(8, 0.3, 0.7, 2.0), *curve(19, 0.1, 0.9, 3.0)]
        row = {"freeze": "all>none", "epochs": 27, "probe_share": 0.3, "seconds": 2.0, "scores": scores}
        assert Strategy.fitted("all>none", [row]).fits[0] == pytest.approx((0.1, 0.9, 3.0), rel=1e-3)

    def test_a_slow_starter_that_ends_best_is_lost_among_all_and_kept_among_its_own(self):
        scenario = Scenario("planted", trials=6)
        measured = {strategy.freeze: strategy for strategy in self.HEADS_AND_WHOLE}
        found = {row["way"]: row["found"] for row in simulate(scenario, measured, sweeps=20, seed=0)}
        assert found["every trial to its end"] == found["fair halving"] == 1.0
        assert found["ASHA over all strategies"] < 0.8

    def test_every_way_is_simulated_and_the_seed_decides(self):
        measured = read_measured(CURVES)
        rows = simulate(SCENARIOS[0], measured, sweeps=3, seed=1)
        assert rows == simulate(SCENARIOS[0], measured, sweeps=3, seed=1)
        assert rows != simulate(SCENARIOS[0], measured, sweeps=3, seed=2)
        whole, fewer, among_all, fair, fairer = rows
        assert (whole["epochs"], whole["seconds"], whole["spared"]) == (1.0, pytest.approx(1.0), 1.0)
        assert among_all["epochs"] < fair["epochs"] < fairer["epochs"] < 1.0
        assert fewer["epochs"] <= fair["epochs"]

    def test_trials_run_side_by_side_and_quick_ones_come_to_a_rung_first(self):
        trials = draw_trials(self.HEADS_AND_WHOLE, 4, np.random.default_rng(0))
        arrived = []

        class Noting(Halving):
            def keep(self, trial_id, config, epoch, value):
                arrived.append((trial_id, epoch))
                return super().keep(trial_id, config, epoch, value)

        quick = replace(trials[3], seconds=trials[3].seconds / 100)
        ran = play([*trials[:3], quick, *trials[4:]], Noting(Rungs((4, 12), 1), 3, "max"))
        assert arrived[0] == (quick.trial_id, 4)
        assert set(ran) == {trial.trial_id for trial in trials}
        assert set(ran.values()) <= {4, 12, 27}

    def test_the_scenarios_are_what_their_names_say(self):
        measured = {strategy.freeze: strategy for strategy in self.HEADS_AND_WHOLE}
        ends = {row.freeze: row.end for row in Scenario("", ends="reversed").strategies(measured)}
        assert ends == pytest.approx({"all": 0.95, "none": 0.7})
        alike = Scenario("", ends="alike").strategies(measured)
        assert len({row.fits for row in alike}) == 1
        taus = {row.freeze: row.fits[0][2] for row in Scenario("", slower=4.0).strategies(measured)}
        assert taus == {"all": 1.0, "none": 40.0}

    def test_the_page_has_a_line_for_every_way(self):
        scenarios = [{"name": "planted", "trials": 2, "rows": simulate(SCENARIOS[3], read_measured(CURVES), 2, 0)}]
        result = {
            "kind": "halving",
            "environment": TestPage().result(MIX, 2)["environment"],
            **{"sweeps": 2, "epochs": 27, "rungs": [4, 12], "reduction_factor": 3, "at_once": 4, "between": 0.02},
            "strategies": [asdict(strategy) for strategy in self.HEADS_AND_WHOLE],
            "scenarios": scenarios,
        }
        page = render([result])
        assert "| planted | every trial to its end | 100 | " in page
        assert "|  | fair halving, least_survivors 2 | " in page
        assert (
            "| `none` | 1 | 0.20 (0.20 to 0.20) | 0.950 (0.950 to 0.950) | 10.0 (10.0 to 10.0) | 0 | 0.000 | 1.00 |"
            in page
        )


class TestDarkCovidNet:
    def manifest(self) -> Manifest:
        records = [
            ImageRecord(f"{number}.png", "ab"[number % 2], f"p{number // 4}", "", "", "", "", 8, 8, "L", True)
            for number in range(80)
        ]
        return Manifest(Path("/nowhere"), "folders", tuple(records), (), 0)

    @pytest.mark.parametrize("grouping", darkcovidnet.GROUPINGS)
    def test_every_image_is_held_out_once_and_patients_only_where_they_should(self, grouping):
        manifest, everything = self.manifest(), np.arange(80)
        held_out, astray = [], 0
        together = (
            [record.patient for record in manifest.records] if grouping == "patient" else list(map(str, everything))
        )
        for rest, fold in darkcovidnet.cut(manifest, everything, together, 5, seed=0):
            assert {*rest} | {*fold} == {*everything}
            assert not {*rest} & {*fold}
            patients = [{manifest.records[index].patient for index in part} for part in (rest, fold)]
            astray += len(patients[0] & patients[1])
            held_out.extend(fold)
        assert sorted(held_out) == everything.tolist()
        assert (astray == 0) == (grouping == "patient")

    def test_the_best_mean_accuracy_is_chosen_and_the_lower_loss_of_equals(self):
        first, second = darkcovidnet.candidates(32, 3, 0)[:2]
        curves = {
            first: (np.array([0.5, 0.8, 0.7]), np.array([1.0, 0.6, 0.5])),
            second: (np.array([0.5, 0.7, 0.8]), np.array([1.0, 0.6, 0.5])),
        }
        assert darkcovidnet.chosen(curves) == (second, 2)
