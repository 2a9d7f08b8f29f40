"""What a sweep keeps of frozen layers: as much as there is room for, the best first, and what is not kept is said."""

import io
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from cxr_models.cuts import Cut
from cxr_models.layer_table import layer_tables
from cxr_models.storage import size_text
from cxr_models.trial import TrialConfig
from sweep import caching
from sweep.caching import CachePlan, CacheRules, default_limit_bytes, features_folder, group_of, plan_cache
from sweep.machine import Machine, Node
from sweep.plan import Plan, make_plan
from sweep.plan_view import render_plan
from sweep.progress import StepProgress
from sweep.session import prepare
from sweep.spec import read_spec

TRAIN, VAL = 100, 20
PLENTY = 10**12
CONFIG = TrialConfig("mobilenet_v2_0.35", weights="bundled", image_side=96, epochs=10)
FREEZES = ("all", "convs:1", "stages:1")

SPACE = """\
name: kept
data: {data}
objective: macro_f1
search: {{algorithm: grid, trials: 24}}
space:
  backbone: [mobilenet_v2_0.35, vanilla_cnn]
  weights: bundled
  image_side: 96
  freeze:
    choices: [all, "convs:1", "stages:1", "all>stages:1", none]
    when: [{{if: {{backbone: vanilla_cnn}}, value: none}}]
  batch_size: [16, 32]
  learning_rate: [0.001, 0.0001]
  epochs: 4
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory) -> CacheRules:
    wanted = [(CONFIG.backbone, 96), (CONFIG.backbone, 224), ("vanilla_cnn", 96)]
    return CacheRules(layer_tables(wanted, tmp_path_factory.mktemp("none")), 4, TRAIN, VAL)


@pytest.fixture
def make(tmp_path, radiography_folder, cache_dir):
    def plan(cache_bytes: int | None = PLENTY, **changed: str) -> Plan:
        path = tmp_path / "kept.yaml"
        path.write_text(SPACE.format(data=radiography_folder))
        spec = read_spec(path, [f"{key}={value}" for key, value in changed.items()])
        machine = Machine((Node(cores=2, gpus=0, memory_bytes=8 * 1024**3),))
        return make_plan(spec, machine, source=str(path), cache_dir=cache_dir, cache_bytes=cache_bytes)

    return plan


def kept(plan: CachePlan, config: TrialConfig = CONFIG) -> set[Cut]:
    assert plan.budget is not None
    return set(plan.budget.cuts[group_of(config)])


def sizes(rules: CacheRules, *configs: TrialConfig) -> dict[Cut, tuple[int, float]]:
    return {cut: found for config in configs for cut, found in rules.wanted(config).items()}


def with_freezes(*freezes: str, **changed: object) -> list[TrialConfig]:
    return [replace(CONFIG, freeze=freeze, **changed) for freeze in freezes]


def shown(plan: Plan) -> str:
    file = io.StringIO()
    Console(file=file, width=220).print(render_plan(plan))
    return file.getvalue()


class TestPlanCache:
    def test_no_room_keeps_nothing(self, rules, tmp_path):
        assert plan_cache(rules, [CONFIG], tmp_path, 0) == CachePlan(None, ())

    def test_with_room_every_cut_is_kept(self, rules, tmp_path):
        configs = with_freezes(*FREEZES, "none")
        plan = plan_cache(rules, configs, tmp_path, PLENTY)
        assert kept(plan) == set(sizes(rules, *configs))
        assert {cut.layer for cut in kept(plan)} == {"out_relu", "block_16_project_BN", "block_12_add"}
        assert plan.notes == ()
        assert plan.budget is not None
        assert (plan.budget.folder, plan.budget.limit_bytes) == (features_folder(tmp_path), PLENTY)

    @pytest.mark.parametrize("fitting", [0, 1, 2])
    def test_what_saves_most_for_its_size_is_kept_and_the_rest_is_told(self, rules, tmp_path, fitting):
        configs = with_freezes(*FREEZES)
        wanted = sizes(rules, *configs)
        best = sorted(wanted, key=lambda cut: wanted[cut][0] / wanted[cut][1])
        limit = sum(wanted[cut][0] for cut in best[:fitting]) or 1
        plan = plan_cache(rules, configs, tmp_path, limit)
        assert kept(plan) == set(best[:fitting])
        assert len(plan.notes) == len(best) - fitting
        for cut in best[fitting:]:
            (note,) = (note for note in plan.notes if f"at {cut.name}," in note)
            assert f"take {size_text(wanted[cut][0])}, and the cache has room for " in note
            assert "these trials run from the pixels; more room (--cache-gb) would spare that" in note

    def test_a_small_cut_is_kept_behind_a_large_one_that_does_not_fit(self, rules, tmp_path):
        """The best for its size may be the larger."""
        wanted = {Cut("large", "", (100,)): (1000, 100.0), Cut("small", "", (50,)): (500, 2.0)}
        given = SimpleNamespace(problem=lambda config: "", wanted=lambda config: wanted)
        assert kept(plan_cache(given, [CONFIG], tmp_path, 999)) == {Cut("small", "", (50,))}
        assert kept(plan_cache(given, [CONFIG], tmp_path, 1000)) == {Cut("large", "", (100,))}

    def test_each_backbone_and_side_has_the_whole_cache(self, rules, tmp_path):
        """They are not used at the same time: what was used last gives way."""
        configs = [CONFIG, replace(CONFIG, image_side=224), replace(CONFIG, weights="none")]
        plan = plan_cache(rules, configs, tmp_path, rules.wanted(CONFIG).popitem()[1][0])
        assert plan.notes == ()
        assert all(len(kept(plan, config)) == 1 for config in configs)

    def test_the_most_views_of_a_cut_count(self, rules, tmp_path):
        few, many = (replace(CONFIG, augmentation="light", augmented_views=views) for views in (2, 5))
        size = sizes(rules, many).popitem()[1][0]
        for configs in ([few, many], [many, few]):
            assert len(kept(plan_cache(rules, configs, tmp_path, size))) == 1
            assert not kept(plan_cache(rules, configs, tmp_path, size - 1))

    def test_a_head_that_does_not_fit_the_data_keeps_nothing(self, rules, tmp_path):
        sigmoid = replace(CONFIG, output="sigmoid", freeze="stages:1")
        assert kept(plan_cache(rules, [sigmoid, CONFIG], tmp_path, PLENTY)) == set(sizes(rules, CONFIG))

    def test_with_augmentation_fewer_views_are_named_as_a_remedy(self, rules, tmp_path):
        configs = [*with_freezes("stages:1", augmentation="light"), replace(CONFIG, weights="none", freeze="stages:1")]
        augmented, plain = plan_cache(rules, configs, tmp_path, 1).notes
        assert "fewer views (augmented_views, which is not the same training) or more room (--cache-gb)" in augmented
        assert "augmented_views" not in plain


class TestPhases:
    def budget(self, rules: CacheRules, config: TrialConfig):
        return plan_cache(rules, [config], Path("unused"), PLENTY).budget

    def test_each_phase_has_its_own_cut(self, rules):
        config = replace(CONFIG, freeze="all>stages:1")
        head, stage = rules.phases(config, self.budget(rules, config))
        assert (head.cut.name, stage.cut.name) == ("out_relu-average", "block_12_add")
        assert head.stored_bytes == (TRAIN + VAL) * 1280 * 4
        assert head.gain > stage.gain > 1
        assert head.epoch_work < stage.epoch_work

    def test_without_a_budget_every_phase_runs_from_the_pixels(self, rules):
        (found,) = rules.phases(CONFIG, None)
        assert (found.cut, found.stored_bytes, found.gain) == (None, 0, 1.0)

    def test_a_cut_that_is_not_kept_is_not_used(self, rules):
        (found,) = rules.phases(replace(CONFIG, freeze="stages:1"), self.budget(rules, CONFIG))
        assert found.cut is None

    @pytest.mark.parametrize(("views", "stored"), [(0, 10), (3, 3), (10, 10), (99, 10)])
    def test_every_view_of_the_training_images_takes_room(self, rules, views, stored):
        config = replace(CONFIG, augmentation="light", augmented_views=views)
        (found,) = rules.phases(config, self.budget(rules, config))
        assert found.stored_bytes == (VAL + stored * TRAIN) * 1280 * 4
        assert rules.wanted(config)[found.cut] == (found.stored_bytes, found.gain)

    def test_a_phase_has_views_for_its_own_epochs(self, rules):
        config = replace(CONFIG, freeze="all>stages:1", augmentation="light")
        head, stage = rules.phases(config, self.budget(rules, config))
        assert head.stored_bytes == (VAL + 3 * TRAIN) * head.cut.bytes_per_image
        assert stage.stored_bytes == (VAL + 7 * TRAIN) * stage.cut.bytes_per_image

    @pytest.mark.parametrize(("views", "stored"), [(0, 10), (4, 4)])
    def test_phases_that_share_a_cut_need_room_for_the_views_of_both(self, rules, views, stored):
        config = replace(CONFIG, freeze="stages:1>convs:1", augmentation="light", augmented_views=views)
        ((cut, (size, _)),) = rules.wanted(config).items()
        assert size == (VAL + stored * TRAIN) * cut.bytes_per_image


class TestDefaultLimit:
    def test_a_quarter_of_what_is_free_or_taken_by_features(self, tmp_path, monkeypatch):
        monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=1_000_000))
        assert default_limit_bytes(tmp_path / "new") == 250_000
        stored = features_folder(tmp_path / "new") / "digest"
        stored.mkdir(parents=True)
        (stored / "cut.f32").write_bytes(bytes(4000))
        assert default_limit_bytes(tmp_path / "new") == 251_000


class TestPlan:
    def test_cut_size_and_gain_of_each_strategy_are_shown(self, make):
        plan = make()
        text = shown(plan)
        images = plan.rules.train_images + plan.rules.val_images
        assert "Frozen layers, computed once" in text
        rows = {line.split("│")[2].strip(): line for line in text.splitlines() if "times less" in line}
        assert rows.keys() == {"all", "convs:1", "stages:1", "all>stages:1"}
        for freeze, layers in (
            ("all", ("out_relu-average",)),
            ("stages:1", ("block_12_add",)),
            ("all>stages:1", ("out_relu-average", "block_12_add")),
        ):
            config = replace(CONFIG, freeze=freeze, epochs=4)
            for layer, phase in zip(layers, plan.rules.phases(config, plan.cache.budget), strict=True):
                assert phase.cut is not None
                assert layer in rows[freeze]
                assert size_text(images * phase.cut.bytes_per_image) in rows[freeze]
                assert (f"{phase.gain:.1f} times less" in rows[freeze]) == (phase.gain < 20)
        (scratch,) = (line for line in text.splitlines() if "vanilla_cnn" in line and "the same" in line)
        assert "nothing" in scratch
        assert "Features may take 1000.0 GB" in text

    def test_that_nothing_is_kept_is_shown(self, make):
        text = shown(make(cache_bytes=0))
        assert "no features are kept: every trial runs its frozen layers in every epoch" in text
        assert "computed once" not in text

    def test_what_does_not_fit_is_noted(self, make):
        text = " ".join(shown(make(cache_bytes=1)).split())
        assert "note: the features of mobilenet_v2_0.35 at block_12_add, 96 px, take" in text
        assert "and the cache has room for 0.0 kB" in text

    def test_trials_get_what_is_planned(self, make, cache_dir):
        plan = make()
        assert plan.trial_data({}, {}).features is plan.cache.budget
        assert {file.parent.parent for file in prepare(plan, cache_dir, StepProgress(Console())).weights.values()} == {
            cache_dir / "weights"
        }, "trials start from the sweep's own copies"
        assert make(cache_bytes=0).trial_data({}, {}).features is None

    def test_trials_of_one_group_and_cut_follow_each_other_the_deep_ones_first(self, make):
        plan = make()
        configs = [TrialConfig.from_json(point) for point in plan.spec.space.points()]
        ordered = sorted(configs, key=plan.order)

        def prefix(config: TrialConfig):
            return (*group_of(config), *(phase.cut for phase in plan.rules.phases(config, plan.cache.budget)))

        runs = [key for key, _ in groupby(ordered, prefix)]
        assert len(runs) == len(set(runs)), "a prefix comes twice"
        mine = [config for config in ordered if config.backbone == CONFIG.backbone]
        depths = [freeze for freeze, _ in groupby(config.freeze for config in mine)]
        assert depths == ["none", "stages:1", "all>stages:1", "convs:1", "all"]
        for freeze in depths:
            batches = [config.batch_size for config in mine if config.freeze == freeze]
            assert batches == sorted(batches), "trials of one program follow each other"


def test_sizes_as_a_person_reads_them():
    assert [size_text(size) for size in (600, 1_234_000, 2_500_000_000)] == ["0.6 kB", "1.2 MB", "2.5 GB"]


class TestPrefix:
    """Trials that share one find each other's features, and should run on one node."""

    def test_what_it_follows_from(self, make):
        plan = make()
        known = plan.prefix(CONFIG)
        assert known is not None
        same = {"freeze": "stages:1", "learning_rate": 1e-5, "batch_size": 64, "seed": 7, "dropout": 0.5}
        assert {plan.prefix(replace(CONFIG, **{axis: value})) for axis, value in same.items()} == {known}
        others = [{"lung_mask": "dataset"}, {"augmentation": "light"}, {"augmentation": "light", "seed": 7}]
        assert len({known, *(plan.prefix(replace(CONFIG, **changed)) for changed in others)}) == 4

    def test_what_keeps_no_features_has_none(self, make):
        assert make().prefix(replace(CONFIG, freeze="none")) is None
        assert make(0).prefix(CONFIG) is None
