"""Which node is named, on reports that were made up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from base.config import StoppedError, UserError
from engine import peers
from engine.distributed import Ranks
from engine.link_speed import Link
from launch.check_nodes import number_of_nodes, slow_links
from launch.runs import entry, nodes
from launch.runs.nodes import GIB, Condition, Report


def report(rank: int, host: str, **facts: dict[str, str]) -> Report:
    return Report(rank, host, {"version": {"torch": "2.15.0"}, "config": {"engine.steps": "5"}, **facts})


def test_equal_nodes_give_no_line() -> None:
    assert nodes.differences([report(rank, f"node-{rank // 2}") for rank in range(8)]) == []


def test_the_node_with_another_version_is_named_with_what_to_do() -> None:
    old = {"torch": "2.14.0", "deepspeed": "0.18.0"}
    new = {"torch": "2.15.0", "deepspeed": "0.19.8"}
    reports = [report(rank, "node-a", version=new) for rank in (0, 1)]
    reports += [report(rank, "node-b", version=old) for rank in (2, 3)]
    (line,) = nodes.differences(reports)
    assert line == (
        "node-b (ranks 2-3): version deepspeed 0.18.0 where node-a has 0.19.8 (and 1 more); "
        "install the pinned versions (constraints.txt) there"
    )


def test_the_odd_node_is_named_even_if_it_is_the_first() -> None:
    reports = [report(0, "node-a", config={"engine.steps": "6"}), *(report(i, f"node-{i}") for i in (1, 2))]
    (line,) = nodes.differences(reports)
    assert line.startswith("node-a (rank 0): config engine.steps 6 where node-1 has 5")


def test_a_package_that_one_node_lacks_is_a_difference() -> None:
    reports = [report(0, "node-a"), report(1, "node-b", version={})]
    assert "node-b (rank 1): version torch none where node-a has 2.15.0" in nodes.differences(reports)[0]


def test_two_odd_nodes_are_two_lines() -> None:
    values = ["5", "5", "5", "6", "7"]
    reports = [report(i, f"node-{i}", config={"engine.steps": value}) for i, value in enumerate(values)]
    assert [line.split(" ")[0] for line in nodes.differences(reports)] == ["node-3", "node-4"]


def test_an_uncommitted_edit_changes_the_source_hash_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "loop.py").write_text("a = 1\n")
    before = nodes.source_hashes(tmp_path)
    assert list(before) == ["engine/loop.py"]
    (tmp_path / "engine" / "loop.py").write_text("a = 2\n")
    assert nodes.source_hashes(tmp_path) != before
    assert "launch/runs/nodes.py" in nodes.source_hashes(entry.REPOSITORY)


def test_config_keys_are_named_with_their_sections() -> None:
    assert nodes.flatten({"engine": {"optimizer": {"lr": 0.1}, "steps": 5}, "data": {}}) == {
        "engine.optimizer.lr": "0.1",
        "engine.steps": "5",
        "data": "{}",
    }


def state(host: str, clock_s: float = 0.0, gpu_free: int = 80 * GIB) -> Condition:
    return Condition(host, 100 * GIB, 100 * GIB, gpu_free, 80 * GIB, clock_s)


def test_a_clock_that_is_off_and_a_gpu_in_use_are_named() -> None:
    states = [state("node-a"), state("node-b", clock_s=0.5), state("node-c", -60.0, gpu_free=20 * GIB)]
    assert nodes.suspects(states) == [
        "node-c (rank 2): clock is -60.0 s off; run an NTP client there",
        "node-c (rank 2): 60 of 80 GiB of its GPU are in use; end the other process (nvidia-smi)",
    ]


def test_a_slow_connection_is_named() -> None:
    hosts = ["node-a", "node-b", "node-c"]
    links = [Link(0, 1, 1e-5, 20e9), Link(1, 2, 1e-5, 1e9), Link(2, 0, 1e-5, 18e9)]
    (line,) = slow_links(links, hosts)
    assert line.startswith("node-b -> node-c: 1.00 GB/s where the median is 18.00")


class TwoRanks(Ranks):
    """Rank 0 of two; the other one's answers are given."""

    def __init__(self, others: list[object]) -> None:
        super().__init__(0, 2, torch.device("cpu"), None)
        object.__setattr__(self, "others", others)

    def gather(self, value: object) -> list[object]:
        return [value, self.others.pop(0)]  # type: ignore[attr-defined]


def test_a_run_folder_that_is_not_shared_names_the_node_and_leaves_no_token(tmp_path: Path) -> None:
    ranks = TwoRanks([None, ("node-b", False)])
    (line,) = nodes.not_shared(ranks, tmp_path / "run")
    assert line.startswith(f"node-b (rank 1): run_dir {tmp_path / 'run'} is not the folder that ")
    assert list((tmp_path / "run").iterdir()) == []


def test_two_starts_at_once_do_not_blame_the_storage(tmp_path: Path) -> None:
    """Each looks for what its own first rank has written; the run lock is what refuses the second one."""

    class Interrupted(TwoRanks):
        def gather(self, value: object) -> list[object]:
            if not isinstance(value, tuple):  # between writing and looking the other start does all of this
                assert nodes.not_shared(TwoRanks([None, ("node-a", True)]), tmp_path) == []
            return super().gather(value)

    ranks = Interrupted([None, ("node-a", True)])
    assert nodes.not_shared(ranks, tmp_path, within_s=0.5) == []
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="cannot write there"):
        nodes.not_shared(TwoRanks([]), tmp_path / "run")


def test_a_start_with_different_nodes_is_refused_with_one_line(tmp_path: Path) -> None:
    other = Report(1, "node-b", {**nodes.facts({"steps": 5}), "config": {"steps": "6"}})
    ranks = TwoRanks(["another digest", other, None, ("node-b", False)])
    with pytest.raises(UserError) as refusal:
        nodes.check_start(ranks, tmp_path / "run", {"steps": 5})
    line = str(refusal.value)
    assert line.startswith("node-b (rank 1): config steps 6 where ") and "\n" not in line
    assert line.endswith("; 1 more, see launch/check_nodes.py")


def test_equal_nodes_start(tmp_path: Path) -> None:
    config = {"steps": 5}
    ranks = TwoRanks([nodes.files.digest(nodes.facts(config)), None, ("node-b", True)])
    nodes.check_start(ranks, tmp_path / "run", config)


def test_the_exit_status_tells_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    def end(error: Exception) -> int:
        def main() -> None:
            raise error

        return entry.run(main)

    assert end(UserError("wrong")) == 2
    assert end(StoppedError("saved")) == entry.STOPPED == 75
    assert end(peers.LostContactError("gone")) == entry.LOST_CONTACT == 76
    assert capsys.readouterr().err.splitlines() == ["error: wrong", "error: saved", "error: gone"]


def test_a_reader_that_is_gone_does_not_end_the_run(tmp_path: Path) -> None:
    import subprocess

    script = "from base.terminal import say\nimport sys\nfor i in range(3): say('x' * 100)\nsys.exit(7)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=entry.REPOSITORY
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 7, process.stderr.read()
    process.stderr.close()


def test_fewer_nodes_than_expected_are_named() -> None:
    assert number_of_nodes(["a", "b"], None) == number_of_nodes(["a", "b"], 2) == []
    (line,) = number_of_nodes(["a"], 2)
    assert line == "1 node met where --expect says 2: a; check the hostfile's name and lines"
