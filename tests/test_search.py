"""Suggestions are reproducible, respect conditions, and the study learns what became of them."""

import math
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from cxr_models.backbones import BACKBONES
from cxr_models.trial import Outcome, TrialConfig
from sweep import search as search_module
from sweep import study_journal
from sweep.search import Search, Suggestion
from sweep.spec import SweepSpec, read_spec

SPEC = """\
name: searched
data: phantom
objective: macro_f1
search: {trials: 30}
space:
  backbone: [mobilenet_v2_0.35, vanilla_cnn]
  weights: bundled
  freeze:
    choices: [all, "stages:1", none]
    when: [{if: {backbone: vanilla_cnn}, value: none}]
  learning_rate:
    low: 1e-4
    high: 1e-2
    log: true
    when: [{if: {freeze: [none, "stages:1"]}, low: 1e-6, high: 1e-5, log: true}]
  hidden_units: [[], [128], [1024, 512]]
  dropout: {low: 0, high: 0.5, step: 0.1}
  batch_size: {low: 8, high: 64, log: true}
"""

GRID = """\
name: grid
data: phantom
objective: loss
search: {algorithm: grid, trials: 100}
space:
  backbone: [mobilenet_v2_0.35, vanilla_cnn]
  freeze:
    choices: [all, "stages:1", none]
    when: [{if: {backbone: vanilla_cnn}, value: none}]
  learning_rate: [1e-4, 1e-3]
  dropout: {low: 0, high: 0.4, step: 0.2}
"""


@pytest.fixture
def spec(tmp_path) -> Callable[..., SweepSpec]:
    def read(*overrides: str, text: str = SPEC) -> SweepSpec:
        path = tmp_path / "spec.yaml"
        path.write_text(text)
        return read_spec(path, overrides)

    return read


def suggestions(search: Search) -> Iterable[Suggestion]:
    while suggestion := search.suggest():
        yield suggestion


def run(search: Search, objective: Callable[[TrialConfig], float]) -> list[TrialConfig]:
    """Run one trial after the other to its end."""
    configs = []
    for suggestion in suggestions(search):
        search.finish(suggestion.number, Outcome.COMPLETED, objective(suggestion.config))
        configs.append(suggestion.config)
    return configs


def toy(config: TrialConfig) -> float:
    """Best, 0, at the last stage and a rate of 3e-6, which only the conditional range reaches."""
    return -abs(math.log10(config.learning_rate / 3e-6)) - abs(config.dropout - 0.2) - (config.freeze != "stages:1")


def journal_of(path: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.load_study(study_name="searched", storage=storage).trials


class TestSuggestions:
    @pytest.mark.parametrize("algorithm", ["tpe", "random"])
    def test_the_same_seed_leads_to_the_same_trials(self, spec, algorithm):
        searched = spec(f"search.algorithm={algorithm}")
        first, second = run(Search(searched), toy), run(Search(searched), toy)
        assert first == second
        assert run(Search(spec(f"search.algorithm={algorithm}", "search.seed=1", "seed=0")), toy) != first

    @pytest.mark.parametrize("algorithm", ["tpe", "random"])
    def test_conditions_and_domains_are_respected(self, spec, algorithm):
        searched = spec(f"search.algorithm={algorithm}", "search.trials=200")
        configs = run(Search(searched), toy)
        assert len(configs) == 200
        for config in configs:
            values = config.to_json() | {"hidden_units": config.hidden_units}
            assert all(values[axis.name] in axis.domain_given(values) for axis in searched.space.axes.values())
        assert {config.freeze for config in configs} == {"all", "stages:1", "none"}
        assert {config.hidden_units for config in configs} == {(), (128,), (1024, 512)}
        assert {config.dropout for config in configs} == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}

    def test_backbones_without_pretraining_start_from_scratch(self, spec):
        for config in run(Search(spec("search.algorithm=random")), toy):
            assert config.weights == ("bundled" if BACKBONES[config.backbone].pretrained else "none")

    @pytest.mark.parametrize("algorithm", ["tpe", "random"])
    def test_fixed_points_come_first_and_in_order(self, spec, algorithm):
        fixed = (
            "search.fixed=[{backbone: mobilenet_v2_0.35, freeze: 'stages:1', learning_rate: 2e-6},"
            "{hidden_units: [1024, 512], dropout: 0.3, batch_size: 17}, {backbone: vanilla_cnn, freeze: none}]"
        )
        first, second, third = run(Search(spec(f"search.algorithm={algorithm}", fixed)), toy)[:3]
        assert (first.backbone, first.freeze, first.learning_rate) == ("mobilenet_v2_0.35", "stages:1", 2e-6)
        assert (second.hidden_units, second.dropout, second.batch_size) == ((1024, 512), 0.3, 17)
        assert (third.backbone, third.weights, third.freeze) == ("vanilla_cnn", "none", "none")

    def test_no_more_fixed_points_than_trials(self, spec):
        search = Search(spec("search.trials=1", "search.fixed=[{dropout: 0.1}, {dropout: 0.2}]"))
        assert [config.dropout for config in run(search, toy)] == [0.1]
        assert search.suggest() is None

    def test_eight_open_at_once_differ(self, spec):
        search = Search(spec("search.trials=60"))
        for _ in range(20):
            suggestion = search.suggest()
            search.finish(suggestion.number, Outcome.COMPLETED, toy(suggestion.config))
        together = [search.suggest() for _ in range(8)]
        assert len({suggestion.config for suggestion in together}) == 8
        assert len({suggestion.number for suggestion in together}) == 8

    def test_a_repeated_configuration_gets_its_own_id(self, spec):
        search = Search(spec(text=GRID.replace("algorithm: grid", "algorithm: random")))
        ids = [suggestion.trial_id for suggestion in suggestions(search)]
        assert len(set(ids)) == 100
        assert {"2", "3"} <= {trial_id.partition("-")[2] for trial_id in ids}

    def test_tpe_beats_random_on_a_conditional_space(self, spec):
        def best(algorithm: str, seed: int) -> float:
            searched = spec(f"search.algorithm={algorithm}", "search.trials=40", f"search.seed={seed}")
            return max(map(toy, run(Search(searched), toy)))

        tpe, chance = ([best(algorithm, seed) for seed in range(7)] for algorithm in ("tpe", "random"))
        assert statistics.median(tpe) > statistics.median(chance)


def by_rate(config: TrialConfig) -> tuple:
    """Trials of one backbone follow each other, and the largest learning rate comes first."""
    return config.backbone, -config.learning_rate


class TestOrder:
    @pytest.mark.parametrize(("algorithm", "text"), [("grid", GRID), ("random", SPEC)])
    def test_the_same_trials_in_the_order_asked_for(self, spec, algorithm, text):
        searched = spec(f"search.algorithm={algorithm}", text=text)
        as_drawn, ordered, again = (run(Search(searched, order=order), toy) for order in (None, by_rate, by_rate))
        assert ordered == again == sorted(as_drawn, key=by_rate)
        assert ordered != as_drawn

    @pytest.mark.parametrize(("algorithm", "text"), [("grid", GRID), ("random", SPEC), ("tpe", SPEC)])
    def test_fixed_points_stay_before_the_rest(self, spec, algorithm, text):
        fixed = [
            f"{{backbone: {backbone}, freeze: {freeze}, learning_rate: {rate}}}"
            for backbone, freeze, rate in (
                ("vanilla_cnn", "none", 1e-4 if algorithm == "grid" else 1e-6),
                ("mobilenet_v2_0.35", "all", 1e-4),
                ("mobilenet_v2_0.35", "all", 1e-3),
            )
        ]
        searched = spec(f"search.algorithm={algorithm}", f"search.fixed=[{', '.join(fixed)}]", text=text)
        configs = run(Search(searched, order=by_rate), toy)
        assert [config.learning_rate for config in configs[:3]] == [1e-3, 1e-4, 1e-4 if algorithm == "grid" else 1e-6]
        ahead = configs[3 : 10 if algorithm == "tpe" else None]
        assert ahead == sorted(ahead, key=by_rate)
        unordered = run(Search(searched), toy)
        assert set(configs[:3]) == set(unordered[:3])
        assert set(ahead) == set(unordered[3 : 3 + len(ahead)])

    def test_only_what_no_result_can_change_is_drawn_ahead(self, spec):
        """Of 30 trials TPE draws 10 at random; every later one depends on results."""
        good, bad = (run(Search(spec(), order=by_rate), objective) for objective in (toy, lambda config: -toy(config)))
        assert good[:10] == bad[:10] == sorted(good[:10], key=by_rate)
        assert not set(good[10:]) & set(bad[10:])

    def test_numbers_are_those_of_the_journal(self, spec, tmp_path):
        search = Search(spec("search.algorithm=random"), tmp_path / "journal.log", order=by_rate)
        given = list(suggestions(search))
        for suggestion in reversed(given):
            search.finish(suggestion.number, Outcome.COMPLETED, suggestion.config.dropout)
        assert [suggestion.number for suggestion in given] == list(range(30))
        assert [trial.number for trial in journal_of(tmp_path / "journal.log")] == list(range(30))
        assert [trial.value for trial in journal_of(tmp_path / "journal.log")] == [
            suggestion.config.dropout for suggestion in given
        ]


class TestManyTrials:
    @pytest.fixture
    def looked_at(self, monkeypatch) -> list[list[optuna.trial.FrozenTrial]]:
        """The ended trials TPE had before it, suggestion by suggestion; costs grow with nothing else."""
        seen = []
        sample = TPESampler.sample_relative

        def spy(self: TPESampler, study: optuna.Study, *rest: object) -> dict:
            ended = (TrialState.COMPLETE, TrialState.PRUNED)
            seen.append(study.get_trials(deepcopy=False, states=ended))
            return sample(self, study, *rest)

        monkeypatch.setattr(TPESampler, "sample_relative", spy)
        return seen

    def test_a_suggestion_costs_the_same_after_many(self, spec, looked_at, monkeypatch):
        monkeypatch.setattr(search_module, "HISTORY", 60)
        monkeypatch.setattr(search_module, "RECENT_KEPT", 20)
        monkeypatch.setattr(search_module, "BEST_KEPT", 20)
        run(Search(spec("search.trials=200")), toy)
        assert len(looked_at) == 200
        assert max(map(len, looked_at)) == 60
        assert [len(trials) for trials in looked_at[:62]] == [*[0] * 10, *range(10, 61), 40]

    def test_the_product_looks_at_few_hundred(self):
        assert search_module.BEST_KEPT + search_module.RECENT_KEPT < search_module.HISTORY <= 300

    def test_the_best_and_the_most_recent_are_remembered(self, spec, looked_at, monkeypatch):
        monkeypatch.setattr(search_module, "HISTORY", 40)
        monkeypatch.setattr(search_module, "RECENT_KEPT", 10)
        monkeypatch.setattr(search_module, "BEST_KEPT", 5)
        values = []
        search = Search(spec("search.trials=42"))
        for suggestion in suggestions(search):
            values.append(toy(suggestion.config))
            if suggestion.number % 4:
                search.finish(suggestion.number, Outcome.COMPLETED, values[-1])
            else:
                search.report(suggestion.number, 1, 10.0)  # pruned ones rank behind those that ran to their end
                search.finish(suggestion.number, Outcome.STOPPED_EARLY, None)
        recent = [10.0 if number % 4 == 0 else values[number] for number in range(31, 41)]
        assert [trial.value for trial in looked_at[41][-10:]] == recent
        best = sorted((values[n] for n in range(31) if n % 4), reverse=True)[:5]
        assert sorted((trial.value for trial in looked_at[41][:-10]), reverse=True) == best

    def test_trials_that_are_open_meanwhile_count_when_they_end(self, spec, looked_at, monkeypatch, tmp_path):
        monkeypatch.setattr(search_module, "HISTORY", 30)
        monkeypatch.setattr(search_module, "RECENT_KEPT", 10)
        monkeypatch.setattr(search_module, "BEST_KEPT", 10)
        search = Search(spec("search.trials=100"), tmp_path / "journal.log")
        waiting = [search.suggest() for _ in range(8)]
        for suggestion in suggestions(search):
            waiting.append(suggestion)
            ended = waiting.pop(0)
            search.finish(ended.number, Outcome.COMPLETED, toy(ended.config))
            assert ended.number + 8 == suggestion.number
        for ended in waiting:
            search.finish(ended.number, Outcome.COMPLETED, toy(ended.config))
        assert max(map(len, looked_at)) == 30
        trials = journal_of(tmp_path / "journal.log")
        assert len(trials) == 100
        assert {trial.state for trial in trials} == {TrialState.COMPLETE}

    def test_the_same_seed_leads_to_the_same_trials(self, spec, monkeypatch):
        monkeypatch.setattr(search_module, "HISTORY", 30)
        monkeypatch.setattr(search_module, "RECENT_KEPT", 10)
        monkeypatch.setattr(search_module, "BEST_KEPT", 10)
        first, second = (run(Search(spec("search.trials=100")), toy) for _ in range(2))
        assert first == second
        assert len(set(first)) > 90  # a new study does not begin the random numbers again


class TestGrid:
    def test_complete_and_without_duplicates(self, spec):
        search = Search(spec(text=GRID))
        configs = run(search, lambda config: config.dropout)
        assert search.total == len(configs) == len(set(configs)) == (3 + 1) * 2 * 3
        assert {config.freeze for config in configs if config.backbone == "vanilla_cnn"} == {"none"}
        assert {config.dropout for config in configs} == {0.0, 0.2, 0.4}

    def test_no_more_than_the_trials_asked_for(self, spec):
        search = Search(spec("search.trials=5", text=GRID))
        assert search.total == len(run(search, toy)) == 5

    def test_fixed_points_move_to_the_front(self, spec):
        everything = set(run(Search(spec(text=GRID)), toy))
        configs = run(
            Search(spec("search.fixed=[{dropout: 0.4}, {dropout: 0.4}, {backbone: vanilla_cnn}]", text=GRID)), toy
        )
        assert [config.dropout for config in configs[:2]] == [0.4, 0.4]
        assert configs[2].backbone == "vanilla_cnn"
        assert len(configs) == len(everything)
        assert set(configs) == everything


class TestOutcomes:
    def test_each_end_is_told_as_what_it_is(self, spec, tmp_path):
        search = Search(spec(), tmp_path / "state" / "journal.log")
        ends = [
            (Outcome.COMPLETED, 0.7),
            (Outcome.STOPPED_EARLY, 0.4),
            (Outcome.STOPPED_EARLY, None),
            (Outcome.FAILED, None),
            (Outcome.FAILED, 0.9),
            (Outcome.COMPLETED, math.nan),
            (Outcome.COMPLETED, math.inf),
        ]
        for outcome, value in ends:
            number = search.suggest().number
            search.report(number, 1, 0.3)
            search.report(number, 2, 0.4)
            search.finish(number, outcome, value)
        trials = journal_of(tmp_path / "state" / "journal.log")
        assert [trial.state for trial in trials] == [
            TrialState.COMPLETE,
            TrialState.PRUNED,
            TrialState.PRUNED,
            *[TrialState.FAIL] * 4,
        ]
        assert trials[0].value == 0.7
        assert trials[1].intermediate_values == {1: 0.3, 2: 0.4}

    def test_the_journal_holds_what_a_case_chose_under_a_name_of_its_own(self, spec, tmp_path):
        run(Search(spec(), tmp_path / "journal.log"), toy)
        for trial in journal_of(tmp_path / "journal.log"):
            case = "learning_rate[freeze=none|stages:1]"
            assert (case in trial.params) != ("learning_rate" in trial.params)
            assert (case in trial.params) == (trial.params.get("freeze", "none") != "all")

    @pytest.mark.parametrize(("objective", "direction"), [("macro_f1", "MAXIMIZE"), ("loss", "MINIMIZE")])
    def test_the_direction_is_the_objective_s(self, spec, tmp_path, objective, direction):
        Search(spec(f"objective={objective}"), tmp_path / "journal.log")
        storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
        assert optuna.load_study(study_name="searched", storage=storage).direction.name == direction

    @pytest.mark.filterwarnings("error")
    def test_a_retried_trial_may_report_an_epoch_again_and_a_diverged_one_nan(self, spec, tmp_path):
        search = Search(spec(), tmp_path / "journal.log")
        number = search.suggest().number
        for epoch, value in ((1, 0.3), (2, math.nan), (1, 0.5), (3, 0.6)):
            search.report(number, epoch, value)
        search.finish(number, Outcome.STOPPED_EARLY, None)
        assert journal_of(tmp_path / "journal.log")[0].intermediate_values == {1: 0.3, 3: 0.6}

    def test_a_trial_ends_once(self, spec):
        search = Search(spec())
        number = search.suggest().number
        search.finish(number, Outcome.FAILED, None)
        with pytest.raises(ValueError, match=r"trial 0 is not open; open are: \[\]"):
            search.finish(number, Outcome.COMPLETED, 1.0)
        with pytest.raises(ValueError, match="trial 7 is not open"):
            search.report(7, 1, 0.5)

    def test_completed_needs_a_value(self, spec):
        search = Search(spec())
        with pytest.raises(ValueError, match="trial 0 completed, but got no value"):
            search.finish(search.suggest().number, Outcome.COMPLETED, None)

    def test_the_journal_shows_trials_that_run(self, spec, tmp_path, monkeypatch):
        monkeypatch.setattr(study_journal, "JOURNAL_INTERVAL_S", 0.0)
        search = Search(spec(), tmp_path / "journal.log")
        suggestion = search.suggest()
        search.report(suggestion.number, 1, 0.3)
        (trial,) = journal_of(tmp_path / "journal.log")
        assert trial.state is TrialState.RUNNING
        assert trial.intermediate_values == {1: 0.3}
        assert trial.params["dropout"] == pytest.approx(suggestion.config.dropout)

    def test_epochs_do_not_wait_for_the_disk(self, spec, tmp_path, monkeypatch):
        monkeypatch.setattr(study_journal, "JOURNAL_INTERVAL_S", 3600.0)
        search = Search(spec(), tmp_path / "journal.log")
        synced = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), fsync(file)))
        number = search.suggest().number
        for epoch in range(1, 21):
            search.report(number, epoch, 0.3)
        assert not synced
        search.finish(number, Outcome.COMPLETED, 0.3)
        assert len(synced) == 1
        assert len(journal_of(tmp_path / "journal.log")[0].intermediate_values) == 20

    def test_the_journal_of_another_sweep_is_refused(self, spec, tmp_path):
        Search(spec(), tmp_path / "journal.log")
        with pytest.raises(FileExistsError, match="expected a journal that does not exist yet"):
            Search(spec(), tmp_path / "journal.log")


@pytest.mark.filterwarnings("error")
def test_a_whole_search_warns_of_nothing(spec, capfd):
    search = Search(spec("dropout={low: 0, high: 0.5, step: 0.2}"))
    for suggestion in suggestions(search):
        search.report(suggestion.number, 1, 0.5)
        search.finish(suggestion.number, Outcome.STOPPED_EARLY, None)
    assert capfd.readouterr() == ("", "")
