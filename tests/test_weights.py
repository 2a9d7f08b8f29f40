"""Weights a sweep has begun with are those it ends with."""

from sweep.weights import kept_weights


def test_a_file_that_is_replaced_changes_nothing(tmp_path):
    given = tmp_path / "own.weights.h5"
    given.write_bytes(b"one")
    kept = kept_weights(given, tmp_path / "cache")
    given.write_bytes(b"two")
    assert kept.read_bytes() == b"one"
    assert kept.name == given.name, "its ending tells how it is read"
    other = kept_weights(given, tmp_path / "cache")
    assert (other.read_bytes(), other != kept) == (b"two", True)


def test_the_same_contents_are_kept_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.weights.h5").write_bytes(b"one")
    kept = [kept_weights(tmp_path / name / "own.weights.h5", tmp_path / "cache") for name in ("a", "b")]
    assert kept[0] == kept[1]
    assert len(list((tmp_path / "cache").rglob("*.h5"))) == 1
