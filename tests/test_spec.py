"""A file is read whole or refused with everything that is wrong with it."""

import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from cxr_models.trial import AXES, TrialConfig
from sweep.space import Choice, Constant, Range
from sweep.spec import HalvingSpec, SpecError, SweepSpec, json_schema, read_spec

SMALL = """\
name: small
data: phantom
objective: macro_f1
search: {trials: 4}
space:
  backbone: vanilla_cnn
"""

FULL = """\
name: full
data: {source: phantom, patient: nih, seed: 5}
objective: {metric: loss}
search:
  algorithm: tpe
  trials: 16
  seed: 3
  halving: {grace_epochs: 2, reduction_factor: 4}
  fixed:
    - {backbone: mobilenet_v2_0.35, freeze: all, learning_rate: 3e-3, hidden_units: [128]}
space:
  backbone: [mobilenet_v2_0.35, vanilla_cnn]
  weights: bundled
  freeze:
    choices: [all, "convs:1", "stages:1", none]
    when:
      - {if: {backbone: vanilla_cnn}, value: none}
  learning_rate:
    low: 1e-4
    high: 1e-2
    log: true
    when:
      - {if: {freeze: [none, "stages:1"]}, low: 1e-5, high: 1e-3, log: true}
  hidden_units: [[], 128, [1024, 512]]
  dropout: {low: 0, high: 0.5, step: 0.1}
  batch_size: [16, 32]
  image_side: 96
resources: {cpus_per_trial: 1, gpus_per_trial: 0.5}
tracking: {uri: "http://localhost:5000"}
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text: str | bytes) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


@pytest.fixture
def read(write):
    return lambda text, *overrides: read_spec(write(text), overrides)


@pytest.fixture
def problems(write):
    """The problems of a text, one string each."""

    def read_problems(text: str | bytes, *overrides: str) -> tuple[str, ...]:
        with pytest.raises(SpecError) as caught:
            read_spec(write(text), overrides)
        return caught.value.problems

    return read_problems


def with_axis(line: str) -> str:
    return f"{SMALL}  {line}\n"


def with_fixed(point: str) -> str:
    return FULL.replace("fixed:\n", f"fixed:\n    - {point}\n")


class TestReading:
    def test_every_form_of_an_axis(self, read):
        axes = read(FULL).space.axes
        assert axes["image_side"].domain == Constant(96)
        assert axes["batch_size"].domain == Choice((16, 32))
        assert axes["hidden_units"].domain == Choice(((), (128,), (1024, 512)))
        assert axes["dropout"].domain == Range(0.0, 0.5, step=0.1)
        assert axes["learning_rate"].domain == Range(1e-4, 1e-2, log=True)
        assert axes["learning_rate"].domain_given({"freeze": "stages:1"}) == Range(1e-5, 1e-3, log=True)
        assert axes["learning_rate"].domain_given({"freeze": "all"}) == Range(1e-4, 1e-2, log=True)

    def test_unnamed_axes_are_constants_with_the_defaults_of_a_trial(self, read):
        axes = read(SMALL).space.axes
        assert set(axes) == set(AXES)
        default = TrialConfig(backbone="vanilla_cnn")
        assert {name: axis.domain for name, axis in axes.items()} == {
            name: Constant(getattr(default, name)) for name in AXES
        }

    def test_the_search_seed_is_that_of_the_split_and_of_the_trials(self, read):
        spec = read(SMALL.replace("trials: 4", "trials: 4, seed: 9"))
        assert spec.data.seed == 9
        assert spec.space.axes["seed"].domain == Constant(9)

    def test_seeds_given_in_their_place_win(self, read):
        spec = read(FULL + "\n", "space.seed=[1, 2]")
        assert spec.data.seed == 5
        assert spec.space.axes["seed"].domain == Choice((1, 2))

    @pytest.mark.parametrize(("metric", "mode"), [("loss", "min"), ("auroc", "max")])
    def test_the_mode_follows_from_the_metric(self, read, metric, mode):
        assert read(SMALL, f"objective={metric}").objective.mode == mode

    def test_numbers_and_words_are_those_of_yaml_1_2(self, read):
        spec = read(with_axis("learning_rate: 3e-3\n  class_weights: none\n  weight_decay: 1E-4"), "name=on")
        assert spec.name == "on"
        assert spec.space.axes["learning_rate"].domain == Constant(3e-3)
        assert spec.space.axes["weight_decay"].domain == Constant(1e-4)
        assert spec.space.axes["class_weights"].domain == Constant("none")

    @pytest.mark.parametrize("text", ["{value: [1024, 512]}", "{choices: [[1024, 512]]}"])
    def test_a_head_of_two_layers(self, read, text):
        assert read(with_axis(f"hidden_units: {text}")).space.reachable("hidden_units") == ((1024, 512),)

    def test_halving_is_off_unless_asked_for(self, read):
        assert read(SMALL).search.halving is None
        assert read(SMALL, "search.halving=none").search.halving is None
        assert read(FULL).search.halving == HalvingSpec(grace_epochs=2, reduction_factor=4)

    def test_a_backbone_without_pretraining_starts_from_scratch(self, read):
        combinations = read(FULL).space.combinations("backbone", "weights")
        assert combinations == {("mobilenet_v2_0.35", "bundled"), ("vanilla_cnn", "none")}

    def test_the_order_of_the_axes_does_not_depend_on_the_order_of_the_lines(self, read):
        head, axes = with_axis("epochs: 2\n  batch_size: 8").split("space:\n")
        turned = head + "space:\n" + "\n".join(reversed(axes.splitlines()))
        assert list(read(turned).space.axes) == list(read(head + "space:\n" + axes).space.axes)

    def test_an_axis_comes_after_those_it_looks_at(self, read):
        text = with_axis(
            "weights: none\n  image_side: {value: 64, when: [{if: {freeze: [none], epochs: 8}, value: 96}]}"
        )
        names = list(read(text.replace("weights: none", "freeze: none\n  epochs: 8")).space.axes)
        assert names.index("image_side") > max(names.index("freeze"), names.index("epochs"))


class TestWriting:
    @pytest.mark.parametrize("text", [SMALL, FULL], ids=["small", "full"])
    def test_the_resolved_spec_reads_back_equal(self, read, text):
        spec = read(text)
        again = read(spec.to_yaml())
        assert again == spec
        assert list(again.space.axes) == list(spec.space.axes)
        assert again.to_yaml() == spec.to_yaml()

    def test_text_that_looks_like_something_else_stays_text(self, read):
        spec = read(FULL, "tracking.experiment='3e-3'", r"data.patient=^(\d+)_: #", "tracking.uri=null")
        assert (spec.tracking.experiment, spec.data.patient, spec.tracking.uri) == ("3e-3", r"^(\d+)_: #", "null")
        assert read(spec.to_yaml()) == spec

    def test_readers_of_yaml_1_1_see_the_same_words(self, read):
        values = yaml.safe_load(read(FULL, "tracking.experiment=on").to_yaml())
        assert values["tracking"]["experiment"] == "on"


class TestOverrides:
    def test_a_bare_axis_and_a_path(self, read):
        spec = read(FULL, "freeze=all", "space.learning_rate.high=1e-3", "search.trials=2", "search.fixed=[]")
        assert spec.space.axes["freeze"].domain == Constant("all")
        assert spec.space.axes["learning_rate"].domain == Range(1e-4, 1e-3, log=True)
        assert (spec.search.trials, spec.search.fixed) == (2, ())

    def test_an_axis_can_be_replaced_by_a_range(self, read):
        assert read(SMALL, "dropout={low: 0.1, high: 0.2}").space.axes["dropout"].domain == Range(0.1, 0.2)

    def test_the_last_one_wins(self, read):
        assert read(SMALL, "epochs=3", "epochs=5").space.axes["epochs"].domain == Constant(5)

    @pytest.mark.parametrize("pattern", [r"^(\d{8})_", "a: b", "[0-9]+", "123", "null", "x=y", ""])
    def test_a_patient_pattern_is_taken_as_it_is(self, read, pattern):
        assert read(SMALL, f"data.patient={pattern}").data.patient == pattern

    def test_a_key_inside_a_short_form_or_an_absent_section(self, read):
        spec = read(
            SMALL, "data.seed=2", "objective.mode=min", "search.halving.grace_epochs=3", "resources.concurrency=2"
        )
        assert (spec.data.source, spec.data.seed) == ("phantom", 2)
        assert spec.objective.mode == "min"
        assert spec.search.halving == HalvingSpec(grace_epochs=3)
        assert spec.resources.concurrency == 2

    def test_conditions_and_fixed_points_that_no_longer_fit_are_left_out(self, read):
        spec = read(with_fixed("{batch_size: 16}"), "backbone=vanilla_cnn", "freeze=[all, none]")
        assert spec.space.combinations("backbone", "weights", "freeze") == {
            ("vanilla_cnn", "none", "all"),
            ("vanilla_cnn", "none", "none"),
        }
        assert spec.space.axes["learning_rate"].cases[0].when == {"freeze": ("none",)}
        assert spec.search.fixed == ({"batch_size": 16},)
        assert read(spec.to_yaml()) == spec

    def test_a_list_where_values_are_lists_is_noted_with_the_other_way_to_write_it(self, read):
        spec = read(SMALL, "hidden_units=[1024, 512]")
        assert spec.space.reachable("hidden_units") == ((1024,), (512,))
        assert spec.notes == (
            "--set hidden_units='[1024, 512]' was taken as 2 choices, 1024 or 512; "
            "one choice that is this list is --set hidden_units='[[1024, 512]]'",
        )
        assert read(SMALL, "hidden_units=[1024, 512]", "hidden_units=[[1024, 512]]").notes == ()

    @pytest.mark.parametrize(
        ("override", "choices"),
        [
            ("hidden_units=[[1024, 512]]", ((1024, 512),)),
            ("hidden_units=[1024]", ((1024,),)),
            ("hidden_units=[[], 128]", ((), (128,))),
            ("hidden_units={choices: [64, 32]}", ((64,), (32,))),
            ("dropout=[0.1, 0.2]", ((),)),
        ],
    )
    def test_a_list_that_can_be_read_in_one_way_alone_is_not_noted(self, read, override, choices):
        spec = read(SMALL, override)
        assert spec.space.reachable("hidden_units") == choices
        assert spec.notes == ()

    def test_a_list_in_the_file_is_not_noted(self, read):
        assert read(with_axis("hidden_units: [64, 32]")).notes == ()

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            (
                "learning_rate=-1",
                "--set learning_rate=-1, space.learning_rate: must be above 0 and finite, but got -1.0",
            ),
            ("lerning_rate=1", "--set lerning_rate=1: unknown 'lerning_rate'; did you mean 'learning_rate'?"),
            ("data.soruce=x", "--set data.soruce=x, data.soruce: unknown key; did you mean 'source'?"),
            ("trials", "--set trials: expected KEY=VALUE, such as search.trials=8"),
            ("epochs.low=3", "--set epochs.low=3, space.epochs: is 8, which has no key 'low' to set"),
            ("dropout={low: 1", "--set dropout={low: 1, space.dropout: expected a number, got '{low: 1'"),
        ],
    )
    def test_a_problem_names_the_argument(self, problems, override, message):
        (problem,) = problems(with_axis("epochs: 8"), override)
        assert problem.startswith(message)


class TestProblems:
    def test_all_are_shown_at_once_in_the_order_of_the_lines(self, write):
        path = write(
            FULL.replace("vanilla_cnn]", "densnet121]")
            .replace("high: 1e-2", "high: 1e-5")
            .replace("trials: 16", "trials: 0")
            .replace("metric: loss", "metric: los")
        )
        with pytest.raises(SpecError) as caught:
            read_spec(path, ["epochs=0"])
        title, *lines = str(caught.value).splitlines()
        assert title == f"{path} has 5 problems:"
        assert [line.split(": ")[0] for line in lines] == [
            "  - line 3, objective.metric",
            "  - line 6, search.trials",
            "  - line 12, space.backbone",
            "  - line 18, space.learning_rate",
            "  - --set epochs=0, space.epochs",
        ]

    @pytest.mark.parametrize(
        ("axis", "message"),
        [
            ("lerning_rate: 1", "line 7, space.lerning_rate: unknown key; did you mean 'learning_rate'?"),
            ("zzz: 1", "space.zzz: unknown key; allowed: backbone, weights, "),
            ("epochs: many", "space.epochs: expected a whole number, got 'many'"),
            ("epochs: 2.5", "expected a whole number, got 2.5"),
            ("epochs: true", "expected a whole number, got True"),
            ("epochs: 0", "must be at least 1, but got 0"),
            ("epochs: 99999999999999999999", "expected a number that fits into 64 bits"),
            ("freeze: 3", "expected text, got 3; put it in quotes"),
            ("freeze: true", "expected text, got True"),
            ("freeze: no", "expected a freeze strategy"),
            ("freeze: [all, 'conv:1']", "but got 'conv:1'"),
            ("dropout: 1.5", r"must lie in [0, 1), but got 1.5"),
            ("learning_rate: .nan", "must be above 0 and finite, but got nan"),
            ("optimizer: adm", "unknown 'adm'; did you mean 'adam'? known: adam, adamw, rmsprop, sgd"),
            ("weights: bundeld", "unknown 'bundeld'; did you mean 'bundled'?"),
            ("weights: model.onnx", "known: imagenet, bundled, none, or the path of a .weights.h5, .h5 or .keras file"),
            ("weights: https://host/a.h5", "expected a URL with the checksum of its file behind it"),
            ("hidden_units: [[0]]", "must each be at least 1, but got [0]"),
            ("hidden_units: []", "expected at least one choice, got an empty list; no hidden layer is [[]]"),
            ("batch_size: [16, 32, 16]", "16 is listed twice"),
            ("hidden_units: [128, [128]]", "[128] is listed twice"),
            ("dropout: {low: 0.5, high: 0.1}", "line 7, space.dropout: expected low <= high, got low=0.5, high=0.1"),
            ("dropout: {low: 0, high: 0.1, log: true}", "expected low > 0 with log: true, got low=0.0"),
            ("dropout: {low: 0.1, high: 0.2, log: true, step: 0.1}", "expected either log or step"),
            ("dropout: {low: 0.1, high: 0.2, step: 0}", "expected step > 0, got step=0.0"),
            ("dropout: {low: 0.1, high: 0.2, step: -0.1}", "expected step > 0, got step=-0.1"),
            ("dropout: {low: 0, high: 0.5, step: 1e-9}", "expected at most 1,000,000 steps"),
            ("dropout: {low: 0, high: 1}", "space.dropout.high: must lie in [0, 1), but got 1.0"),
            ("dropout: {low: 0, high: 0.5, log: maybe}", "space.dropout.log: expected true or false, got 'maybe'"),
            ("epochs: {low: 1, high: 9, step: 0.5}", "space.epochs.step: expected a whole number, got 0.5"),
            ("dropout: {low: 0}", "expected `value`, or `choices`, or `low` and `high`"),
            ("dropout: {value: 0, low: 0}", "got low, value"),
            ("pooling: {low: 1, high: 2}", "a range needs numbers; list the values instead"),
            ("pooling: {choices: max}", "space.pooling.choices: expected a list, got 'max'"),
            ("epochs: {value: 8, wen: []}", "space.epochs.wen: unknown key; did you mean 'when'?"),
            ("epochs: {value: 8, when: 3}", "space.epochs.when: expected a list such as"),
            ("epochs: {value: 8, when: [{value: 3}]}", "expected a case such as {if: {backbone: ...}"),
            (
                "epochs: {value: 8, when: [{if: {freze: all}, value: 3}]}",
                "space.epochs.when[0].if.freze: unknown key; did you mean 'freeze'?",
            ),
            (
                "epochs: {value: 8, when: [{if: {freeze: none}, value: 3}]}",
                "space.epochs.when[0].if.freeze: freeze never is 'none' here; it can be: all",
            ),
            (
                "epochs: {value: 8, when: [{if: {epochs: 8}, value: 3}]}",
                "space.epochs: expected `when` without a circle, got epochs -> epochs",
            ),
            (
                "dropout: {low: 0, high: 0.5}\n  epochs: {value: 8, when: [{if: {dropout: 0.5}, value: 3}]}",
                "line 8, space.epochs.when[0].if.dropout: dropout is a range, which a condition cannot name",
            ),
        ],
    )
    def test_of_an_axis(self, problems, axis, message):
        (problem,) = problems(with_axis(axis))
        assert message in problem

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("name: small", "name: ../up", "line 1, name: expected letters, digits"),
            ("name: small", "name: 2024", "line 1, name: expected letters"),
            ("name: small\n", "", "name: missing"),
            ("data: phantom\n", "", "data: missing"),
            ("data: phantom", "data: {}", "line 2, data.source: missing"),
            (
                "data: phantom",
                "data: {source: phantom, patient: '('}",
                "expected a regular expression or a built-in name",
            ),
            ("macro_f1", "macro_f2", "unknown 'macro_f2'; did you mean 'macro_f1'?"),
            ("macro_f1", "{metric: loss, mode: down}", "objective.mode: unknown 'down'; known: min, max"),
            ("trials: 4", "trials: 0", "line 4, search.trials: expected at least 1, got 0"),
            ("trials: 4", "trials: yes", "search.trials: expected a whole number, got 'yes'"),
            ("trials: 4", "trials: 4, algorithm: bayes", "unknown 'bayes'; known: tpe, random, grid"),
            ("trials: 4", "trials: 4, sed: 1", "search.sed: unknown key; did you mean 'seed'?"),
            ("trials: 4", "trials: 4, halving: {grace_epochs: 0}", "grace_epochs: expected at least 1, got 0"),
            ("trials: 4", "trials: 4, halving: {grace_epochs: 1, reduction_factor: 1}", "expected at least 2, got 1"),
            ("trials: 4", "trials: 4, halving: {grace_epochs: 1.0}", "expected a whole number, got 1.0"),
            ("trials: 4", "trials: 4, halving: asha", "search.halving: expected a section with keys, got 'asha'"),
            ("trials: 4", "trials: 4, fixed: {}", "search.fixed: expected a list of points"),
            ("space:\n  backbone: vanilla_cnn", "space: {epochs: 3}", "line 5, space.backbone: missing"),
            ("space:\n  backbone: vanilla_cnn", "space: 3", "line 5, space: expected a section with keys, got 3"),
            ("space:", "resources: {gpus_per_trial: 1.5}\nspace:", "expected a share of one GPU or a whole number"),
            ("space:", "resources: {cpus_per_trial: 0}\nspace:", "cpus_per_trial: expected more than 0, got 0"),
            ("space:", "serch: {}\nspace:", "line 5, serch: unknown key; did you mean 'search'?"),
            ("search:", "name: again\nsearch:", "line 4, name: given twice, first in line 1"),
        ],
    )
    def test_of_a_section(self, problems, old, new, message):
        (problem,) = problems(SMALL.replace(old, new))
        assert message in problem

    @pytest.mark.parametrize(
        ("point", "message"),
        [
            ("{learning_rte: 1}", "line 10, search.fixed[0].learning_rte: unknown key; did you mean 'learning_rate'?"),
            ("3", "line 10, search.fixed: expected axes and their values"),
            ("{batch_size: 64}", "expected a value of space.batch_size (16, 32), got 64"),
            ("{dropout: 0.15}", "expected a value of space.dropout (0.0 to 0.5 in steps of 0.1), got 0.15"),
            ("{hidden_units: [256]}", "got [256]"),
            (
                "{backbone: mobilenet_v2_0.35, freeze: 'stages:1', learning_rate: 5e-3}",
                "(1e-05 to 0.001 (log)), got 0.005",
            ),
            ("{backbone: vanilla_cnn, freeze: all}", "expected a value of space.freeze (none), got all"),
            ("{backbone: vanilla_cnn, weights: bundled}", "expected a value of space.weights (none), got bundled"),
            ("{learning_rate: 5e-3}", "only for some values of freeze; name those in the point too"),
        ],
    )
    def test_of_a_fixed_point(self, problems, point, message):
        (problem,) = problems(with_fixed(point))
        assert message in problem

    def test_a_fixed_point_is_left_out_only_where_the_command_line_is_why(self, read, problems):
        assert read(with_fixed("{dropout: 0.1}"), "batch_size=64")
        with pytest.raises(SpecError, match=r"search.fixed\[0\].batch_size: expected a value of space.batch_size"):
            read(with_fixed("{batch_size: 64}"), "dropout=0.1")

    def test_a_fixed_point_is_checked_although_another_axis_is_broken(self, problems):
        point, broken = problems(with_fixed("{batch_size: 64}").replace("image_side: 96", "image_side: 0"))
        assert "space.batch_size (16, 32), got 64" in point
        assert "space.image_side" in broken

    @pytest.mark.parametrize(
        "point",
        [
            "{freeze: none, learning_rate: 1e-5}",
            "{learning_rate: 5e-4}",
            "{dropout: 0.3}",
            "{}",
            "{weights: none, backbone: vanilla_cnn}",
        ],
    )
    def test_good_fixed_points(self, read, point):
        assert len(read(with_fixed(point)).search.fixed) == 2

    def test_a_circle_of_two(self, problems):
        (problem,) = problems(
            with_axis(
                "epochs: {value: 8, when: [{if: {patience: 0}, value: 3}]}\n"
                "  patience: {value: 0, when: [{if: {epochs: 3}, value: 1}]}"
            )
        )
        assert "expected `when` without a circle, got " in problem
        assert "epochs -> patience" in problem

    def test_a_grid_needs_listed_values(self, problems):
        (problem,) = problems(FULL, "search.algorithm=grid")
        assert problem == (
            "line 18, space.learning_rate: a grid cannot list a range without `step`; give one, or the values"
        )


class TestFile:
    def test_missing_offers_the_nearest(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "search_spaces").mkdir()
        (tmp_path / "search_spaces" / "strategies.yaml").write_text(SMALL)
        with pytest.raises(SpecError, match=r"did you mean search_spaces/strategies\.yaml"):
            read_spec(Path("strategy.yaml"))
        with pytest.raises(
            SpecError, match=re.escape(f"does not exist: {tmp_path / 'q.yaml'}; there are: search_spaces")
        ):
            read_spec(Path("q.yaml"))

    def test_a_folder(self, tmp_path):
        with pytest.raises(SpecError, match="is a folder; name a YAML file in it"):
            read_spec(tmp_path)

    def test_a_syntax_error_points_at_the_place(self, problems):
        (problem,) = problems(SMALL.replace("data: phantom", "data: phantom: x"))
        first, line, pointer = problem.splitlines()
        assert first == "line 2: mapping values are not allowed here"
        assert line[pointer.index("^") :] == ": x"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "the file is empty"),
            ("# nothing\n", "the file is empty"),
            ("- a\n- b\n", "expected keys such as `name:` and `space:`, got ['a', 'b']"),
            ("a: &x [1]\nb: *x\n", "line 2: aliases (*name) are not supported; write the value out"),
            ("a: " + "[" * 5000, "nested more than 20 levels deep"),
            ("a: 1\n---\nb: 2\n", "expected a single document"),
            (b"name: \xff\xfe", "expected UTF-8 text, got other bytes at byte 6"),
            (b"name: \x00", "line 1: the character U+0000 is not allowed in YAML"),
            ("#" * 100_001, "expected at most 100,000 bytes, got 100,001"),
        ],
        ids=range(9),
    )
    def test_what_is_not_a_spec(self, problems, text, message):
        assert message in problems(text)[0]

    def test_the_resolved_file_of_a_sweep_may_be_longer(self, write):
        assert read_spec(write(SMALL + "#" * 100_001), most_bytes=None).name == "small"

    def test_objects_are_not_made(self, problems):
        found = problems(SMALL.replace("phantom", "!!python/object/apply:os.getcwd []"))
        assert any("line 2, data: the tag tag:yaml.org,2002:python/object/apply:os.getcwd" in text for text in found)

    def test_a_byte_order_mark_is_no_part_of_the_first_key(self, read):
        assert read("\ufeff" + SMALL).name == "small"


DATA = """\
data:
  sources:
    - {source: a, classes: {COVID: covid, Lung_Opacity: null}, patient: kermany}
    - b
  classes: {"0": healthy}
  split: {train: 0.7, val: 0.3}
  subset: 0.25
  patient: nih
"""


class TestData:
    def test_sources_classes_shares_and_subset(self, read):
        data = read(SMALL.replace("data: phantom\n", DATA)).data
        assert [(source.source, source.patient) for source in data.all_sources] == [("a", "kermany"), ("b", "nih")]
        assert data.all_sources[0].classes == {"COVID": "covid", "Lung_Opacity": None}
        assert (data.classes, data.split.shares, data.subset) == ({"0": "healthy"}, (0.7, 0.3, 0.0), 0.25)
        assert data.name == "a + b"

    def test_an_expression_that_holds_a_built_in_name_is_no_slip(self, read):
        assert read(SMALL, r"data.patient=(chexpert\d+)").data.patient == r"(chexpert\d+)"

    def test_folds_survive_the_round_trip(self, read, tmp_path):
        spec = read(SMALL, "data.folds=5", "data.repeats=2")
        assert (spec.data.folds, spec.data.repeats) == (5, 2)
        (tmp_path / "again.yaml").write_text(spec.to_yaml())
        assert read_spec(tmp_path / "again.yaml").data == spec.data

    def test_without_them_all_images_are_split_as_before(self, read):
        data = read(SMALL).data
        assert (data.split.shares, data.subset, data.classes) == ((0.70, 0.15, 0.15), 1.0, {})
        assert [source.source for source in data.all_sources] == ["phantom"]

    def test_the_resolved_file_says_the_same(self, read):
        spec = read(SMALL.replace("data: phantom\n", DATA))
        assert read(spec.to_yaml()) == spec
        jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(spec.to_yaml()))

    def test_a_source_on_the_command_line_takes_the_place_of_several(self, read):
        spec = read(
            SMALL.replace("data: phantom\n", DATA), "data.source=~/x", "data.split.test=0.1", "data.split.val=0.2"
        )
        assert [source.source for source in spec.data.all_sources] == ["~/x"]
        assert spec.data.split.shares == (0.7, 0.2, 0.1)
        spec = read(SMALL, "data.sources=[one, two]")
        assert (spec.data.source, spec.data.name) == ("", "one + two")

    @pytest.mark.parametrize(
        ("section", "messages"),
        [
            ("{source: x, sources: [y]}", ["line 2, data.sources: give either source or sources, not both"]),
            ("{sources: []}", ["expected a list such as - {source: DIR}, got []"]),
            ("{sources: {a: b}}", ["expected a list such as - {source: DIR}, got {'a': 'b'}"]),
            ("{sources: [{sorce: x}]}", ["data.sources[0].source: missing", "did you mean 'source'?"]),
            (
                "{sources: [{source: x, patient: '('}, 3]}",
                ["regular expression", "expected a section with keys, got 3"],
            ),
            (
                "{source: x, split: {train: 0.7, val: 0.15, test: 0.1}}",
                ["line 2, data.split: expected shares with sum 1", "got 0.7 + 0.15 + 0.1 = 0.95"],
            ),
            ("{source: x, split: {train: 0.7}}", ["data.split.val: missing"]),
            ("{source: x, split: {train: 1, val: 0}}", ["train: expected less than 1", "val: expected more than 0"]),
            ("{source: x, split: {train: 0.7, vall: 0.3}}", ["data.split.vall: unknown key; did you mean 'val'?"]),
            ("{source: x, split: half}", ["data.split: expected a section with keys, got 'half'"]),
            ("{source: x, folds: 1}", ["data.folds: expected at least 2, got 1"]),
            ("{source: x, folds: 5.0}", ["data.folds: expected a whole number, got 5.0"]),
            ("{source: x, repeats: 3}", ["line 2, data: repeats 3 needs folds, such as folds: 5"]),
            ("{source: x, patient: nihh}", ["data.patient: unknown 'nihh'; did you mean 'nih'? known: nih, kermany"]),
            ("{source: x, subset: 0}", ["data.subset: expected more than 0, got 0"]),
            ("{source: x, subset: 1.5}", ["data.subset: expected at most 1, got 1.5"]),
            ("{source: x, classes: {a: 1}}", ["data.classes.a: expected text, got 1"]),
            ("{source: x, classes: [a]}", ["data.classes: expected a section with keys, got ['a']"]),
            ("{source: x, clases: {}}", ["data.clases: unknown key; did you mean 'classes'?"]),
            (
                "{source: x, subset: 2, split: {train: 0.5, val: 0.6}, seed: -1}",
                ["data.subset", "data.split: expected shares", "data.seed: expected at least 0"],
            ),
        ],
        ids=range(20),
    )
    def test_every_problem_is_told(self, problems, section, messages):
        found = "\n".join(problems(SMALL.replace("data: phantom", f"data: {section}")))
        for message in messages:
            assert message in found


def test_the_schema_agrees_on_good_files_and_refuses_unknown_names(read):
    schema = jsonschema.Draft202012Validator(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema.schema)
    resolved = [yaml.safe_load(read(text).to_yaml()) for text in (SMALL, FULL)]
    for values in [yaml.safe_load(SMALL), *resolved]:
        schema.validate(values)
    for path, value in [("space", {"backbone": "vgg"}), ("objective", {"metric": "f2"}), ("serch", {})]:
        assert not schema.is_valid({**resolved[0], path: value})


def test_reading_loads_nothing_heavy():
    code = "import sys, sweep.spec, sweep.halving; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"optuna", "ray", "mlflow", "keras", "tensorflow", "sklearn", "pandas"} & set(loaded)


def test_a_spec_cannot_be_changed(read):
    spec: SweepSpec = read(SMALL)
    with pytest.raises(AttributeError):
        spec.name = "other"
    with pytest.raises(ValueError, match="frozen"):
        spec.search.trials = 9


class TestFewEpochs:
    """`--max-epochs 1`, to try a file out."""

    SPACE = """\
name: phases
data: phantom
objective: macro_f1
search:
  trials: 2
  fixed:
    - {backbone: mobilenet_v2_1.0, freeze: "all>stages:1>none"}
    - {backbone: mobilenet_v2_1.0, freeze: all}
space:
  backbone: [mobilenet_v2_1.0, vanilla_cnn]
  freeze:
    choices: [all, "all>stages:1", "all>stages:1>none"]
    when: [{if: {backbone: vanilla_cnn}, value: none}]
  optimizer:
    choices: [adam, "adam>sgd"]
    when:
      - {if: {freeze: "all>stages:1>none"}, value: adam}
      - {if: {freeze: [all, none]}, value: adam}
  epochs: 20
"""

    def read(self, tmp_path, *overrides):
        path = tmp_path / "phases.yaml"
        path.write_text(self.SPACE)
        return read_spec(path, overrides)

    def test_strategies_with_more_phases_are_left_out_and_told(self, tmp_path):
        spec = self.read(tmp_path, "space.epochs=2")
        assert spec.space.reachable("freeze") == ("all", "all>stages:1", "none")
        assert spec.dropped_strategies == ("all>stages:1>none",)
        assert [point["freeze"] for point in spec.search.fixed] == ["all"]
        assert spec.dropped_points == 1
        assert self.read(tmp_path, "space.epochs=1").space.reachable("freeze") == ("all", "none")
        assert self.read(tmp_path, "space.epochs=3").dropped_strategies == ()

    def test_where_none_is_left_it_is_a_mistake(self, tmp_path):
        with pytest.raises(SpecError, match="freeze 'all>none' has 2 phases, but 1 epochs"):
            self.read(tmp_path, "freeze=all>none", "space.epochs=1")

    def test_an_optimizer_for_each_phase_must_fit_the_phases(self, tmp_path):
        with pytest.raises(SpecError, match="one value, or one for each of the 3 phases of freeze 'all>stages:1>none'"):
            self.read(tmp_path, "optimizer=adam>sgd", "freeze=all>stages:1>none")

    def test_rates_for_each_phase_must_fit_the_phases(self, tmp_path):
        spec = self.read(tmp_path, 'phase_rate=["0.1>0.5", 0.1]', "freeze=all>stages:1>none", "epochs=3")
        assert list(spec.space.axes["phase_rate"].domain) == ["0.1>0.5", 0.1]
        with pytest.raises(SpecError, match=r"expected one value of freeze 'all>none', got '0.1>0.5'"):
            self.read(tmp_path, 'phase_rate="0.1>0.5"', "freeze=all>none", "epochs=3")
        with pytest.raises(SpecError, match=r"phase_rate: must be above 0 and finite, or one .*, but got '0.1>no'"):
            self.read(tmp_path, 'phase_rate="0.1>no"')
        with pytest.raises(SpecError, match="one value, or one for each of the 2 phases after the first of freeze"):
            self.read(tmp_path, "phase_rate=0.1>1>2", "freeze=all>stages:1>none")
