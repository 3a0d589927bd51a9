import pytest

from base import files
from base.config import UserError


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


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"\xff\xfe{}", b""])
def test_json_that_cannot_be_read_is_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json: ") as error:
        files.read_json(path)
    assert "\n" not in str(error.value)
    path.write_text("[1]")
    with pytest.raises(UserError, match="no JSON object"):
        files.read_object(path)
