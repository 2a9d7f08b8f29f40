"""Parts and folds are cut between patients, meet their shares in every class, and follow from the seed."""

import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from cxr_models.dataset import DataError, ImageRecord, Manifest
from cxr_models.splits import assign_folds, assign_splits, patients_on_two_sides, write_split_csv
from cxr_models.trial import SPLITS, TEST, TRAIN, VAL


def manifest_of(rows: Iterable[tuple[str, str, str]]) -> Manifest:
    """A manifest of (patient, label, given split) without files."""
    records = tuple(
        ImageRecord(f"{i:05}.png", label, patient, "", split, "", f"{i:064x}", 8, 8, "L", True)
        for i, (patient, label, split) in enumerate(rows)
    )
    return Manifest(Path(), "CSV", records, (), 0)


def study(seed: int) -> Manifest:
    """90 patients with 1 to 5 images, some in two classes of three, the third one rare."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(90):
        label = "a" if patient < 50 else "b" if patient < 80 else "c"
        rows += [(f"P{patient}", label, "")] * int(rng.integers(1, 6))
        rows += [(f"P{patient}", "b", "")] * int(patient % 10 == 0)
    return manifest_of(rows)


@pytest.mark.parametrize("seed", range(5))
def test_splits_share_no_patient_and_meet_the_shares_in_every_class(seed: int) -> None:
    manifest = study(seed)
    splits = assign_splits(manifest, seed=seed)
    assert patients_on_two_sides(manifest, splits) == ()
    for label in manifest.classes:
        parts = Counter(part for part, record in zip(splits, manifest.records, strict=True) if record.label == label)
        images = sum(parts.values())
        one_patient = 5 / images
        assert parts[TRAIN] / images == pytest.approx(0.70, abs=0.03 + one_patient)
        assert parts[VAL] / images == pytest.approx(0.15, abs=0.03 + one_patient)
        assert parts[TEST] / images == pytest.approx(0.15, abs=0.03 + one_patient)


def test_shares_are_the_users() -> None:
    manifest = manifest_of((f"P{i}", "ab"[i % 2], "") for i in range(2000))
    parts = Counter(assign_splits(manifest, seed=0, shares=(0.5, 0.2, 0.3)))
    assert [parts[part] / 2000 for part in SPLITS] == pytest.approx([0.5, 0.2, 0.3], abs=0.01)


def test_splits_depend_on_the_seed_alone() -> None:
    manifest = study(0)
    first = assign_splits(manifest, seed=3)
    assert assign_splits(study(0), seed=3) == first
    assert assign_splits(manifest, seed=4) != first


@pytest.mark.parametrize("patients", range(3, 9))
def test_every_part_has_every_class_however_rare(patients: int) -> None:
    rows = [(f"P{i}", "common", "") for i in range(60)] + [(f"P{i}", "rare", "") for i in range(patients)]
    manifest = manifest_of(rows)
    for seed in range(5):
        splits = assign_splits(manifest, seed=seed)
        both = {(record.label, part) for record, part in zip(manifest.records, splits, strict=True)}
        assert len(both) == 6
        assert patients_on_two_sides(manifest, splits) == ()


def test_a_given_test_is_not_touched_and_val_is_cut_from_train() -> None:
    rows = [(f"P{i}", "ab"[i % 2], TEST if i < 100 else TRAIN if i < 600 else "") for i in range(1100)]
    manifest = manifest_of(rows)
    splits = assign_splits(manifest, seed=0)
    assert [part == TEST for part in splits] == [record.split == TEST for record in manifest.records]
    assert splits.count(VAL) / 1000 == pytest.approx(0.15 / 0.85, abs=0.01)


def test_a_given_val_is_kept_and_test_is_cut_from_train() -> None:
    manifest = manifest_of((f"P{i}", "ab"[i % 2], VAL if i < 10 else TRAIN) for i in range(1010))
    splits = assign_splits(manifest, seed=0)
    assert [part == VAL for part in splits] == [record.split == VAL for record in manifest.records]
    assert splits.count(TEST) / 1000 == pytest.approx(0.15 / 0.85, abs=0.01)


def test_a_whole_given_split_is_kept_and_its_torn_patients_are_named() -> None:
    rows = [(f"P{i % 5}", "ab"[i % 2], SPLITS[i // 10]) for i in range(30)]
    rows += [("Q1", "a", TRAIN), ("Q1", "b", TRAIN)]
    manifest = manifest_of(rows)
    splits = assign_splits(manifest, seed=0)
    assert splits == tuple(record.split for record in manifest.records)
    assert patients_on_two_sides(manifest, splits) == ("P0", "P1", "P2", "P3", "P4")


def test_too_few_patients_are_refused() -> None:
    rows = [(f"P{i}", "a", "") for i in range(9)]
    two = manifest_of([*rows, ("Q", "X", ""), ("Q", "X", ""), ("R", "X", "")])
    with pytest.raises(
        DataError, match="class 'X' has 2 patients; at least 3 are needed, one for each of train, val and test"
    ):
        assign_splits(two, seed=0)
    one = manifest_of([*rows, ("Q", "X", ""), ("S", "X", TEST), ("S", "a", TEST)])
    with pytest.raises(
        DataError, match="class 'X' has 1 patients; at least 2 are needed, one for each of train and val"
    ):
        assign_splits(one, seed=0)


def test_parts_that_no_deal_can_fill_are_refused() -> None:
    lines = ("012", "034", "056", "135", "146", "236", "245")  # of the Fano plane: some line is always of two colours
    rows = [(f"P{point}", f"class {line}", "") for line in lines for point in line]
    with pytest.raises(DataError, match="none of the deals tried"):
        assign_splits(manifest_of(rows), seed=0)


def test_a_given_part_without_a_class_is_refused() -> None:
    rows = [(f"P{i}", "ab"[i % 2], TRAIN) for i in range(20)] + [("Q", "a", TEST)]
    with pytest.raises(DataError, match="the given test split has none of class 'b'"):
        assign_splits(manifest_of(rows), seed=0)


def test_shares_must_add_up() -> None:
    for shares in ((0.8, 0.2, 0.1), (0.8, 0.0, 0.2), (0.0, 0.5, 0.5), (0.8, 0.3, -0.1)):
        with pytest.raises(ValueError, match=r"shares must be above 0 \(test: or 0\) with sum 1"):
            assign_splits(study(0), seed=0, shares=shares)


@pytest.mark.parametrize("shares", [(0.70, 0.30, 0.0), (0.5, 0.25, 0.25), (0.96, 0.02, 0.02), (0.1, 0.45, 0.45)])
def test_any_shares_are_met_in_every_class(shares: tuple[float, float, float]) -> None:
    manifest = manifest_of((f"P{i}", "aab"[i % 3], "") for i in range(3000))
    splits = assign_splits(manifest, seed=0, shares=shares)
    assert patients_on_two_sides(manifest, splits) == ()
    for label in manifest.classes:
        own = [part for part, record in zip(splits, manifest.records, strict=True) if record.label == label]
        assert [own.count(part) / len(own) for part in SPLITS] == pytest.approx(shares, abs=0.01)


def test_without_a_test_share_a_given_test_is_still_kept() -> None:
    manifest = manifest_of((f"P{i}", "ab"[i % 2], TEST if i < 100 else "") for i in range(1100))
    splits = assign_splits(manifest, seed=0, shares=(0.7, 0.3, 0.0))
    assert [part == TEST for part in splits] == [record.split == TEST for record in manifest.records]
    assert splits.count(VAL) / 1000 == pytest.approx(0.3, abs=0.01)


# Folds


@pytest.mark.parametrize("seed", range(3))
def test_folds_share_no_patient_and_have_every_class_evenly(seed: int) -> None:
    manifest = study(seed)
    splits = assign_splits(manifest, seed=seed)
    folds = assign_folds(manifest, splits, folds=5, repeats=2, seed=seed)
    assert folds.shape == (2, len(manifest.records))
    outside = np.array(splits) == TEST
    for dealt in folds:
        assert (dealt[outside] == -1).all()
        assert {*dealt[~outside].tolist()} == {0, 1, 2, 3, 4}
        fold_of: dict[str, set[int]] = {}
        for record, fold in zip(manifest.records, dealt, strict=True):
            fold_of.setdefault(record.patient, set()).add(int(fold))
        assert {len(found) for found in fold_of.values()} == {1}
        for label in range(3):
            counts = np.bincount(dealt[~outside & (manifest.labels == label)], minlength=5)
            assert counts.min() >= 1
            assert counts.max() <= max(2.2 * counts.mean(), counts.mean() + 5)


def test_repeats_are_dealt_anew_and_follow_from_the_seed() -> None:
    manifest = study(0)
    splits = assign_splits(manifest, seed=0)
    first = assign_folds(manifest, splits, folds=3, repeats=2, seed=1)
    assert (first[0] != first[1]).any()
    assert (assign_folds(study(0), splits, folds=3, repeats=2, seed=1) == first).all()
    assert (assign_folds(manifest, splits, folds=3, repeats=2, seed=2) != first).any()
    assert (assign_folds(manifest, splits, folds=3, repeats=1, seed=1)[0] == first[0]).all()


def test_copies_stay_in_one_fold() -> None:
    manifest = manifest_of([(f"P{number}", "ab"[number % 2], "") for number in range(40)])
    groups = [f"G{number // 4}" for number in range(40)]
    (dealt,) = assign_folds(manifest, [TRAIN] * 40, folds=3, seed=0, groups=groups)
    assert all(len({*dealt[start : start + 4].tolist()}) == 1 for start in range(0, 40, 4))


def test_more_folds_than_patients_of_a_class_are_refused() -> None:
    rows = [(f"P{number}", "a", "") for number in range(30)] + [(f"Q{number}", "rare", "") for number in range(4)]
    manifest = manifest_of(rows)
    with pytest.raises(DataError, match=r"at least 5 patients of every class .*\n.*4 of class 'rare'\n.*fewer folds"):
        assign_folds(manifest, [TRAIN] * 34, folds=5, seed=0)


def test_every_fold_has_every_class_though_one_patient_has_most_images() -> None:
    rows = [(f"P{number % 3}", label, "") for number in range(3) for label in "ab"] + [("P9", "a", "")] * 90
    manifest = manifest_of(rows)
    dealt = assign_folds(manifest, [TRAIN] * len(rows), folds=3, seed=0)
    assert all(len({*manifest.labels[dealt[0] == fold].tolist()}) == 2 for fold in range(3))


def test_folds_that_no_deal_can_fill_are_refused() -> None:
    """Each class has two patients, and each patient two classes: of three, two stand in one fold."""
    rows = [(patient, label, "") for label, both in (("a", "PQ"), ("b", "QR"), ("c", "PR")) for patient in both]
    with pytest.raises(DataError, match=r"dealt into 2 folds \(data.folds\) .*\n.*\n.*set fewer folds, or add images"):
        assign_folds(manifest_of(rows), [TRAIN] * len(rows), folds=2, seed=0)


def test_the_split_file_has_a_column_for_each_deal(tmp_path: Path) -> None:
    manifest = study(0)
    splits = assign_splits(manifest, seed=0)
    folds = assign_folds(manifest, splits, folds=3, repeats=2, seed=0)
    write_split_csv(tmp_path / "twice.csv", manifest, splits, folds)
    write_split_csv(tmp_path / "once.csv", manifest, splits, folds[:1])
    with (tmp_path / "twice.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "patient", "split", "pixels", "fold_1", "fold_2"]
    assert [row["fold_2"] for row in rows] == [str(fold + 1) if fold >= 0 else "" for fold in folds[1]]
    assert (tmp_path / "once.csv").read_text().startswith("path,label,patient,split,pixels,fold\n")
