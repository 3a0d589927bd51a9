"""The store of expensive answers: nothing is asked twice, nothing torn is read, ranks share."""

import json
from pathlib import Path

import pytest

from base.config import UserError
from evaluation.store import Question, RecordStore, config_hash, share


class Oracle:
    def __init__(self, die_at: int | None = None) -> None:
        self.asked: list[str] = []
        self._die_at = die_at

    def question(self, item: str, number: int = 0, config: str = "c") -> Question:
        def ask() -> dict[str, str]:
            if len(self.asked) == self._die_at:
                raise KeyboardInterrupt
            self.asked.append(item)
            return {"answer": f"{item}.{number}.{config}"}

        return Question(item, number, config, ask)


KEYS = ["a", "b", "c", "d", "e"]


def test_a_killed_run_goes_on_where_it_stopped_to_the_same_bytes(tmp_path: Path) -> None:
    whole = Oracle()
    RecordStore(tmp_path / "whole").answer([whole.question(key) for key in KEYS], "oracle")
    with pytest.raises(KeyboardInterrupt):
        dying = Oracle(die_at=3)
        RecordStore(tmp_path / "killed").answer([dying.question(key) for key in KEYS], "oracle")
    path = tmp_path / "killed/records-00000.jsonl"
    path.write_bytes(path.read_bytes() + b'{"item": "d", "pa')  # it was killed while it wrote
    second = Oracle()
    RecordStore(tmp_path / "killed").answer([second.question(key) for key in KEYS], "oracle")
    assert second.asked == ["d", "e"]
    assert path.read_bytes() == (tmp_path / "whole/records-00000.jsonl").read_bytes()


def test_pass_and_config_are_part_of_the_question(tmp_path: Path) -> None:
    oracle = Oracle()
    questions = [oracle.question("a", number, config) for number in (0, 1) for config in ("c", "d")]
    RecordStore(tmp_path).answer(questions, "oracle")
    store = RecordStore(tmp_path)
    assert len(store) == 4 and store.find("a", 1, "d") == {"answer": "a.1.d"}
    with pytest.raises(UserError, match="no answer for 'a', pass 2"):
        store.find("a", 2, "c")


def test_ranks_share_and_read_each_other_whatever_their_number(tmp_path: Path) -> None:
    first = Oracle()
    for rank in range(3):
        mine = share([first.question(key) for key in KEYS[:4]], rank, 3)
        RecordStore(tmp_path, rank).answer(mine, "oracle")
    assert sorted(first.asked) == KEYS[:4]
    second = Oracle()
    RecordStore(tmp_path).answer([second.question(key) for key in KEYS], "oracle")
    assert second.asked == ["e"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{torn", r"records-00001\.jsonl:1: is no record"),
        ('{"item": "a"}', "is no record"),
        ('{"item": "a", "pass": 0, "config": "c", "value": 2}', "another answer to 'a', pass 0"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    record = {"item": "a", "pass": 0, "config": "c", "value": 1}
    (tmp_path / "records-00000.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "records-00001.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        RecordStore(tmp_path)


def test_config_hashes_tell_values_apart_and_not_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1}, {"b": 2})
