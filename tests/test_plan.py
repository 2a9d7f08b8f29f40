"""A plan reads the data as the file says: sources, classes, subset and split, with a note on whatever matters."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from cxr_models.dataset import DataError
from cxr_models.splits import patients_on_two_sides
from cxr_models.trial import SPLITS, TEST, TRAIN, VAL
from sweep import splitting
from sweep.document import SpecError
from sweep.halving import Rungs
from sweep.machine import Machine, Node
from sweep.plan import Plan, make_plan
from sweep.plan_view import render_plan
from sweep.spec import read_spec
from sweep.splitting import stored_splits
from tests import layouts
from tests.damages import flipped

SPACE = """\
name: planned
data: {data}
objective: macro_f1
search: {{trials: 2}}
space:
  backbone: mobilenet_v2_0.35
  weights: bundled
  image_side: 96
  freeze: all
  epochs: 2
"""


@pytest.fixture
def plan(tmp_path: Path, cache_dir: Path):
    """Plan a sweep whose `data` section is given; more of its search, and other axes."""

    def make(
        data: str,
        search: Sequence[str] = (),
        axes: Mapping[str, str] | None = None,
        nodes: tuple[Node, ...] = (Node(cores=2, gpus=0, memory_bytes=8 * 2**30),),
    ) -> Plan:
        file = tmp_path / "planned.yaml"
        sections = {"search": dict(entry.split(": ", 1) for entry in ("trials: 6", *search)), "space": axes or {}}
        overrides = [f"{section}.{key}={value}" for section, own in sections.items() for key, value in own.items()]
        file.write_text(SPACE.format(data=data))
        return make_plan(read_spec(file, overrides), Machine(nodes), source=str(file), cache_dir=cache_dir)

    return make


def shown(plan: Plan) -> str:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(render_plan(plan))
    return capture.get()


def test_shares_are_those_of_the_file(plan, tmp_path):
    made = plan(f"{{source: {layouts.nested(tmp_path / 'x', images=40)}, split: {{train: 0.5, val: 0.3, test: 0.2}}}}")
    assert [Counter(made.splits)[part] / 80 for part in SPLITS] == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


def test_the_plan_of_a_cluster_shows_where_trials_go_and_how_many_wait(plan, tmp_path):
    nodes = (
        Node(cores=0, gpus=0, memory_bytes=2**30, node_id="a", address="10.0.0.1"),
        Node(cores=3, gpus=0, memory_bytes=64 * 2**30, node_id="b", address="10.0.0.2"),
        Node(cores=1, gpus=0, memory_bytes=64 * 2**30, node_id="c", address="10.0.0.3"),
    )
    told = shown(plan(f"{{source: {layouts.nested(tmp_path / 'x', images=40)}}}", nodes=nodes))
    rows = [line.split() for line in told.splitlines() if "10.0.0." in line]
    assert [(row[1], row[3], row[-2]) for row in rows] == [
        ("10.0.0.1", "0", "0"),
        ("10.0.0.2", "3", "3"),
        ("10.0.0.3", "1", "1"),
    ]
    assert "4 trials at once; 2 trials wait for one of these to end, or for nodes that join" in told
    assert "10.0.0" not in shown(plan(f"{{source: {tmp_path / 'x'}}}")), "one machine has no nodes to tell of"


def test_without_a_test_part_the_plan_says_what_figures_are(plan, tmp_path):
    made = plan(f"{{source: {layouts.nested(tmp_path / 'x', images=20)}, split: {{train: 0.7, val: 0.3}}}}")
    assert Counter(made.splits) == {TRAIN: 28, VAL: 12}
    assert "no test part (data.split): figures are validation figures that choices were made on" in made.notes
    assert len(made.indices(TEST)) == 0
    assert not any(line.strip().startswith("│ test") for line in shown(made).splitlines())
    assert (made.trial_data({}, {}).labels >= 0).all()


def test_folds_are_dealt_from_all_that_is_not_the_test_set(plan, tmp_path, monkeypatch):
    source = layouts.nested(tmp_path / "x", images=40)
    plain = plan(f"{{source: {source}}}")
    made = plan(f"{{source: {source}, folds: 3, repeats: 2}}", ("algorithm: grid", "halving: {grace_epochs: 1}"))
    assert made.folds.shape == (2, 80)
    assert set(made.indices(TEST)) == set(plain.indices(TEST))  # the same test set with folds and without
    pool = set(made.indices(TRAIN).tolist())
    assert pool == {*range(80)} - set(plain.indices(TEST).tolist())
    data = made.trial_data({}, {})
    assert {*data.train.tolist()} == {*data.val.tolist()} == pool
    assert len(data.folds) == 6
    for own in data.in_turn:
        assert not {*own.train.tolist()} & {*own.val.tolist()}
        assert {*own.train.tolist()} | {*own.val.tolist()} == pool
    assert "validation macro_f1, maximum, the mean over 3 folds, dealt 2 times: 6 trainings a trial" in shown(made)
    assert "trained again on the images of all folds (1 seed), then tested" in shown(made)
    assert made.halving.rungs.epoch_images == sum(len(own.train) for own in data.in_turn)
    monkeypatch.setattr(splitting, "assign_folds", None)  # what is stored is not made again
    again = plan(f"{{source: {source}, folds: 3, repeats: 2}}")
    assert (again.folds == made.folds).all()


def test_folds_take_no_more_room_than_their_images(plan, tmp_path):
    source = layouts.nested(tmp_path / "x", images=40)
    augmented = {"augmentation": "light", "epochs": "2"}
    sizes = {}
    for folds in ("", ", folds: 4"):
        for axes in ({}, augmented):
            made = plan(f"{{source: {source}, split: {{train: 0.75, val: 0.25}}{folds}}}", axes=axes)
            ((phase,),) = made.strategies[0].caches
            sizes[folds, bool(axes)] = phase.stored_bytes // phase.cut.bytes_per_image
    assert sizes == {("", False): 80, (", folds: 4", False): 80, ("", True): 20 + 2 * 60, (", folds: 4", True): 3 * 80}


def test_a_given_validation_part_joins_the_folds(plan, tmp_path):
    for part, images in ((TRAIN, 40), (VAL, 40), (TEST, 20)):
        layouts.class_folders(tmp_path / "x" / part, images=images)
    given = plan(f"{{source: {tmp_path / 'x'}, allow: [duplicate_on_two_sides]}}")
    made = plan(f"{{source: {tmp_path / 'x'}, folds: 2, allow: [duplicate_on_two_sides]}}")
    counts = Counter(given.splits)
    assert counts[VAL]
    assert Counter(made.splits) == {TRAIN: counts[TRAIN] + counts[VAL], TEST: counts[TEST]}


def test_too_many_folds_are_refused(plan, tmp_path):
    with pytest.raises(DataError, match=r"one for each fold \(data.folds\)\n.*\n.*set fewer folds"):
        plan(f"{{source: {layouts.nested(tmp_path / 'x', images=8)}, folds: 20}}")


def test_a_given_test_part_is_kept_where_none_would_be_cut(plan, tmp_path):
    source = layouts.kermany(tmp_path / "x", images=40)
    made = plan(f"{{source: {source}, split: {{train: 0.7, val: 0.3}}}}")
    assert Counter(made.splits)[TEST] == 8
    assert not any("no test part" in note for note in made.notes)


def test_a_subset_is_said_in_the_plan_and_split_by_patient(plan, tmp_path):
    made = plan(f"{{source: {layouts.covid_radiography(tmp_path / 'x', images=24)}, subset: 0.25}}")
    assert "subset 0.25: 24 of 96 images, chosen by patients, stratified by class" in shown(made)
    assert Counter(record.label for record in made.manifest.records) == dict.fromkeys(layouts.RADIOGRAPHY, 6)
    assert patients_on_two_sides(made.manifest, made.splits) == ()


def test_several_sources_with_their_classes(plan, tmp_path):
    one, two = layouts.nested(tmp_path / "one"), layouts.class_folders(tmp_path / "two")
    made = plan(
        f"{{sources: [{{source: {one}, classes: {{NORMAL: No_findings, COVID: Covid-19}}}}, {two}], "
        "classes: {Pneumonia: null}}"
    )
    assert made.manifest.classes == ("Covid-19", "No_findings")
    assert Counter(record.source for record in made.manifest.records) == {"one": 16, "two": 16}
    assert "left out as the class map says: 8 images of 'Pneumonia'" in made.notes
    assert f"{one} + {two}" in shown(made)


def test_notes_of_the_data_are_notes_of_the_plan(plan, tmp_path):
    made = plan(f"{{source: {layouts.kermany(tmp_path / 'x')}, split: {{train: 0.8, val: 0.2}}}}")
    assert any("merged into train's 400, and a new one is cut" in note for note in made.notes)
    assert Counter(made.splits)[VAL] / 416 == pytest.approx(0.2, abs=0.02)


def test_a_class_that_is_not_there_stops_the_plan(plan, tmp_path):
    with pytest.raises(DataError, match="did you mean 'COVID'"):
        plan(f"{{source: {layouts.nested(tmp_path / 'x')}, classes: {{Covid: a}}}}")


def test_where_and_among_whom_trials_are_judged_is_told(plan, tmp_path):
    source = layouts.nested(tmp_path / "x", images=40)
    made = plan(
        f"{{source: {source}, split: {{train: 0.5, val: 0.5}}}}",
        ("algorithm: grid", "halving: {grace_epochs: 2}"),
        {"freeze": '[all, "all>none"]', "epochs": "8", "learning_rate": "{low: 1, high: 3, step: 1}"},
    )
    assert made.halving.rungs == Rungs((2 * 40, 6 * 40), epoch_images=40)
    assert "after epochs 2 and 6 (80 and 240 images seen), the best third so far of each backbone" in shown(made)
    assert "where the head alone trains first, epochs count from the end of that" in shown(made)
    assert made.trials == 6
    assert not [note for note in made.notes if "halving" in note]


def test_a_grid_with_one_trial_of_a_strategy_cannot_be_halved_there(plan, tmp_path):
    made = plan(
        f"{{source: {layouts.nested(tmp_path / 'x', images=20)}}}",
        ("algorithm: grid", "trials: 9", "halving: {grace_epochs: 2}"),
        {
            "freeze": "[all, none]",
            "epochs": "8",
            "dropout": "{value: 0, when: [{if: {freeze: none}, choices: [0.1, 0.2]}]}",
        },
    )
    assert made.trials == 3
    (note,) = (note for note in made.notes if "halving" in note)
    assert note.startswith("halving cannot end any trial of all: ")
    assert note in shown(made)


def test_without_halving_every_trial_runs_to_its_end(plan, tmp_path):
    made = plan(f"{{source: {layouts.nested(tmp_path / 'x', images=20)}}}")
    assert made.halving.rungs is None
    assert "none: every trial runs to its end" in shown(made)


def test_a_stored_split_is_that_of_its_shares(plan, tmp_path, cache_dir, monkeypatch):
    manifest = plan(f"{{source: {layouts.nested(tmp_path / 'x', images=20)}}}").manifest
    thirds = stored_splits(manifest, 0, cache_dir, (0.5, 0.5, 0.0))
    assert Counter(thirds) == {TRAIN: 20, VAL: 20}
    assert stored_splits(manifest, 0, cache_dir) != thirds
    monkeypatch.setattr(splitting, "assign_splits", None)  # what is stored is not made again
    assert stored_splits(manifest, 0, cache_dir, (0.5, 0.5, 0.0)) == thirds


@pytest.mark.parametrize("place", [3, 50, -3])
def test_a_stored_split_that_is_damaged_is_made_again(plan, tmp_path, place):
    """A patient moved to the test set by a flipped bit would be there for good."""
    manifest = plan(f"{{source: {layouts.nested(tmp_path / 'x', images=20)}}}").manifest
    good = stored_splits(manifest, 7, tmp_path)
    (stored,) = (tmp_path / "splits").iterdir()
    whole = stored.read_bytes()
    flipped(stored, place % len(whole))
    assert stored_splits(manifest, 7, tmp_path) == good
    assert stored.read_bytes() == whole
    stored.write_text(json.dumps([TEST, *good[1:]]))
    assert stored_splits(manifest, 7, tmp_path) == good


def test_values_that_cannot_go_together_are_told_with_the_backbone(plan, tmp_path):
    folder = layouts.nested(tmp_path / "x", images=40)
    with pytest.raises(
        SpecError, match=r"space: mobilenet_v2_0.35: taps above 1 need pooling average or max, .*`when`"
    ):
        plan(str(folder), axes={"taps": "[1, 3]", "pooling": "[average, flatten]"})


def test_weights_from_drawings_are_told_beside_real_images(plan, tmp_path):
    assert "bundled were pretrained on phantoms" in " ".join(plan(str(layouts.nested(tmp_path / "x", images=40))).notes)
    assert "bundled were pretrained" not in " ".join(plan("phantom").notes)
