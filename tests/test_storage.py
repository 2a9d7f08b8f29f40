"""A reader sees the old file or the new one, never a part."""

from pathlib import Path

import pytest

from cxr_models.storage import remove_scratch, written_whole


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "below" / "model.keras"
    with written_whole(path) as scratch:
        scratch.write_text("whole")
        assert not path.exists()
        assert scratch.parent == path.parent
        assert scratch.name.endswith(".keras")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_stays_until_then(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with written_whole(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def half_a_file(path: Path) -> None:
    with written_whole(path) as scratch:
        scratch.write_text("ne")
        raise RuntimeError("in the middle")


def test_a_failed_block_changes_nothing(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="in the middle"):
        half_a_file(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_wrote_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "nothing.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_scratch_files_of_one_file_are_removed_and_no_other(tmp_path):
    names = ("checkpoint.npz", ".17-checkpoint.npz", ".18-checkpoint.npz", ".17-best.npz")
    for name in names:
        (tmp_path / name).touch()
    remove_scratch(tmp_path / "checkpoint.npz")
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[3]}
    remove_scratch(tmp_path / "no folder" / "checkpoint.npz")
