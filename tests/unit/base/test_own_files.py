"""Single files, image sets and exports: a command replaces what it can show to be its own, and nothing else."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base import files
from base.config import UserError
from base.team import ALONE
from data.adm_npz import write_npz
from data.image_set import ImageSet, Item, write_image
from data.shards import Sample, ShardWriter
from generator.draw_on_ranks import draw_on_ranks
from launch import sample
from launch.runs import training


class One:
    """An image to draw."""

    def is_done(self, out: Path) -> bool:
        return (out / "result/a.png").is_file()


def draw(out: Path, seed: int = 0) -> int:
    def write(block, drawn) -> None:
        write_image(out / "result/a.png", torch.full((3, 4, 4), seed, dtype=torch.uint8))

    return draw_on_ranks(
        [One()],
        out,
        block_images=1,
        drawn_with={"seed": seed},
        start=lambda: lambda block: None,
        write=write,
        item=lambda one: Item("a", {"result": "result/a.png"}, {}),
        team=ALONE,
    )


@pytest.mark.parametrize("name", ["result/a.png", "manifest.jsonl"])
def test_images_of_a_stranger_are_not_taken_for_drawn_ones(name, tmp_path) -> None:
    path = tmp_path / "set" / name
    files.write_text(path, "mine")
    with pytest.raises(
        UserError, match=rf"holds {name.partition('/')[0]}, which sample would write and did not"
    ):
        draw(tmp_path / "set")
    assert [p for p in (tmp_path / "set").rglob("*") if p.is_file()] == [path] and path.read_text() == "mine"


def test_a_drawn_set_goes_on_as_one_of_an_earlier_version_does(tmp_path) -> None:
    for _ in range(2):
        assert draw(tmp_path / "set") == 1
    (tmp_path / "set/.made-by-sample").unlink()  # earlier versions left none
    assert draw(tmp_path / "set") == 1
    with pytest.raises(UserError, match="images of other settings"):
        draw(tmp_path / "set", seed=1)


def test_an_npz_replaces_its_own_kind_only(tmp_path) -> None:
    draw(tmp_path / "set")
    images = ImageSet.open(tmp_path / "set")
    for _ in range(2):
        write_npz(images, tmp_path / "out.npz")
    assert np.load(tmp_path / "out.npz")["arr_0"].shape == (1, 4, 4, 3)
    np.savez(tmp_path / "theirs.npz", arr_0=np.ones(3))
    before = (tmp_path / "theirs.npz").read_bytes()
    with pytest.raises(UserError, match="no command of this project wrote it"):
        write_npz(images, tmp_path / "theirs.npz")
    assert (tmp_path / "theirs.npz").read_bytes() == before


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_drawn_image_is_known_again_and_a_photo_is_kept(suffix, tmp_path) -> None:
    signed = Image.Exif()
    signed[305] = sample.SIGN  # EXIF: Software
    Image.new("RGB", (4, 4)).save(tmp_path / f"own{suffix}", exif=signed)
    Image.new("RGB", (4, 4)).save(tmp_path / f"photo{suffix}")
    own = Namespace(out=str(tmp_path / f"own{suffix}"), num_images=1)
    assert sample._image_paths(own) == [tmp_path / f"own{suffix}"]
    with pytest.raises(UserError, match="this command did not draw it"):
        sample._image_paths(Namespace(out=str(tmp_path / f"photo{suffix}"), num_images=1))
    Image.new("RGB", (4, 4)).save(tmp_path / f"photo-1{suffix}")
    with pytest.raises(UserError, match=rf"photo-1\{suffix}: exists"):
        (tmp_path / f"photo{suffix}").unlink()
        sample._image_paths(Namespace(out=str(tmp_path / f"photo{suffix}"), num_images=2))


def test_the_writer_of_shards_removes_no_file_that_is_no_side_file(tmp_path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path, max_samples_per_shard=1, source="t") as writer:
            for number in range(writer.num_consumed, 3):
                writer.write(Sample(f"k{number}", {"txt": b"a"}))

    write()
    (tmp_path / "shard-notes.json").write_text("mine")
    (tmp_path / "shard-000001.tar").unlink()
    write()
    assert (tmp_path / "shard-notes.json").read_text() == "mine"
    assert (tmp_path / "shard-000002.tar").is_file()


def test_a_folder_is_replaced_only_if_it_is_empty_or_known(tmp_path) -> None:
    out = tmp_path / "out"
    files.write_text(out / "thesis.txt", "mine")
    with pytest.raises(UserError, match="is not an empty folder"), files.directory(out):
        pytest.fail("was not refused")
    files.write_text(tmp_path / ".new.tmp/thesis.txt", "mine")
    with (
        pytest.raises(UserError, match=r"\.new\.tmp: is not an empty folder"),
        files.directory(tmp_path / "new"),
    ):
        pytest.fail("was not refused")
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(UserError, match="link: is not a folder"), files.directory(tmp_path / "link"):
        pytest.fail("was not refused")
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_killed_commands_half_folder_is_removed_by_the_next(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), files.directory(tmp_path / "out") as half:
        (half / "a").touch()
        raise KeyboardInterrupt
    with files.directory(tmp_path / "out") as whole:
        (whole / "b").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"run_dir": "a", "engine": {}}'),
        (".lock", '{"host": "h", "machine": "m", "pid": 1, "since_s": 0}'),
        ("checkpoints/step_00000001/state.json", "{}"),
    ],
)
def test_a_run_of_an_earlier_version_is_known_by_what_it_wrote(name, content, tmp_path) -> None:
    files.write_text(tmp_path / "metrics.jsonl", "")
    with pytest.raises(UserError, match=r"holds metrics\.jsonl"):
        files.check_claim(tmp_path, training.COMMAND, training.RUN_FILES, training._is_run)
    files.write_text(tmp_path / name, content)
    files.claim(tmp_path, training.COMMAND, training.RUN_FILES, training._is_run)
