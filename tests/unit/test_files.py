import pytest

from engine import files


def test_an_interrupted_directory_leaves_the_old_one(tmp_path):
    target = tmp_path / "out"
    with files.directory(target) as new:
        (new / "a").write_text("old")
    with pytest.raises(RuntimeError), files.directory(target, lambda _: True) as new:
        (new / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    with files.directory(target, lambda _: True) as new:
        (new / "b").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == ["b"]


def test_write_replaces_whole_files_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "deep" / "x.json"
    files.write_json(path, {"b": 1, "a": [2]})
    files.write_json(path, {"b": 2, "a": [2]})
    assert files.read_json(path) == {"a": [2], "b": 2}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_digest_ignores_key_order_but_not_values():
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1})
    assert files.digest({"a": 1}) != files.digest({"a": 2})
