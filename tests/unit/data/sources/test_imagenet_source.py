"""ImageNet's archives in place: labels are places of sorted synsets, and every shard gets all classes."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from base.config import UserError
from data.shards import Sample, ShardDataset
from data.sources.base import BadItemError, InUnits
from data.sources.draws import Draws, Shuffled
from data.sources.imagenet import ImageNetSource
from data.sources.write import Workers, write_sources
from helpers.trees import tar_of

SYNSETS = ["n01440764", "n01443537", "n02099601"]  # three of the 1000
PER_CLASS = 7


def content(name: str) -> bytes:
    return name.encode() * 40


def pack(files: dict[str, bytes]) -> bytes:
    """A tar of these files, in GNU's format as ImageNet's are."""
    return tar_of(files.items(), tarfile.GNU_FORMAT)


def class_tar(synset: str, count: int = PER_CLASS) -> bytes:
    names = [f"{synset}_{number}.JPEG" for number in (10026, 10027, *range(3, count + 1))]
    return pack({name: content(name) for name in names})


def training_tar(folder: Path) -> Path:
    """The classes are not sorted in it, as in the real one."""
    path = folder / "ILSVRC2012_img_train.tar"
    path.write_bytes(pack({f"{synset}.tar": class_tar(synset) for synset in reversed(SYNSETS)}))
    return path


def validation(folder: Path, labels: list[str]) -> tuple[Path, Path]:
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(labels) + 1)]
    path, text = folder / "ILSVRC2012_img_val.tar", folder / "labels.txt"
    path.write_bytes(pack({name: content(name) for name in reversed(names)}))
    text.write_text("\n".join(labels) + "\n")
    return path, text


def check(source: ImageNetSource) -> None:
    """Every image of training once, with its own bytes and class."""
    seen = set()
    for index in range(len(source)):
        sample = source.sample(index)
        tree = json.loads(sample.parts["json"])
        assert sample.parts["jpg"] == content(tree["file"])
        assert tree["file"] == f"{sample.key}.JPEG"
        assert tree["class"] == sample.key.partition("_")[0]
        assert tree["label"] == SYNSETS.index(tree["class"])
        seen.add(sample.key)
    assert len(seen) == len(source) == 3 * PER_CLASS


def test_training_is_read_inside_the_tar_of_tars(tmp_path: Path) -> None:
    check(ImageNetSource(training_tar(tmp_path), num_classes=3))


def test_training_is_read_from_a_folder_of_the_class_tars(tmp_path: Path) -> None:
    for synset in SYNSETS:
        (tmp_path / f"{synset}.tar").write_bytes(class_tar(synset))
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(pack({}))  # beside them, not one of them
    check(ImageNetSource(tmp_path, num_classes=3))


@pytest.mark.parametrize("numbers", [False, True])
def test_validation_labels_go_by_the_names_of_the_images(tmp_path: Path, numbers: bool) -> None:
    order = [2, 0, 1, 1, 2]
    tar, labels = validation(tmp_path, [str(label) if numbers else SYNSETS[label] for label in order])
    source = ImageNetSource(tar, labels, num_classes=3)
    assert len(source) == 5
    for index, label in enumerate(order):
        sample = source.sample(index)
        name = f"ILSVRC2012_val_{index + 1:08d}.JPEG"
        expected = {"label": label, "file": name} | ({} if numbers else {"class": SYNSETS[label]})
        assert json.loads(sample.parts["json"]) == expected
        assert sample.parts["jpg"] == content(name)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "1"], "2 labels for 3 images"),
        (["1", "2", "3"], "1 to 3; expected each of 0 to 2"),  # as the development kit counts
        (["0", "1", "1"], "2 classes"),
        (["0", "1", "n01440764"], "not every line"),
        (["tench", "goldfish", "retriever"], "not every line"),
    ],
)
def test_wrong_labels_are_refused(tmp_path: Path, labels: list[str], message: str) -> None:
    tar, text = validation(tmp_path, ["0", "1", "2"])
    text.write_text("\n".join(labels))
    with pytest.raises(UserError, match=rf"labels\.txt: .*{message}"):
        ImageNetSource(tar, text, num_classes=3)


def test_a_missing_class_is_refused_for_it_would_shift_the_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 classes, expected 1000"):
        ImageNetSource(training_tar(tmp_path))


def test_a_class_that_is_there_twice_is_refused_for_it_would_shift_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(
        pack({f"{folder}/{synset}.tar": class_tar(synset) for folder in "ab" for synset in SYNSETS[:2]})
    )
    with pytest.raises(UserError, match=rf"2 archives of class {SYNSETS[0]}"):
        ImageNetSource(path, num_classes=2)


def test_a_damaged_class_inside_is_named_by_its_byte(tmp_path: Path) -> None:
    path = training_tar(tmp_path)
    with tarfile.open(path) as tar:
        inner = tar.getmember(f"{SYNSETS[1]}.tar")
    raw = bytearray(path.read_bytes())
    raw[inner.offset_data + 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=rf"train\.tar: damaged at byte {inner.offset_data}"):
        ImageNetSource(path, num_classes=3)
    path.write_bytes(path.read_bytes()[: inner.offset_data + 512])
    with pytest.raises(UserError, match=r"train\.tar: cut short"):
        ImageNetSource(path, num_classes=3)


def test_another_archive_is_refused(tmp_path: Path) -> None:
    tar, _ = validation(tmp_path, ["0", "1", "2"])
    with pytest.raises(UserError, match=r"holds 'ILSVRC2012_val_\d+\.JPEG', not nXXXXXXXX\.tar"):
        ImageNetSource(tar)
    with pytest.raises(UserError, match=r"gone\.tar: cannot be opened"):
        ImageNetSource(tmp_path / "gone.tar")


def test_what_is_no_image_is_a_bad_item(tmp_path: Path) -> None:
    (tmp_path / "n00000001.tar").write_bytes(
        pack({"README": b"x", "n00000001_1.JPEG": b"", "a b.JPEG": b"x"})
    )
    source = ImageNetSource(tmp_path, num_classes=1)
    for index in range(3):
        with pytest.raises(BadItemError) as caught:
            source.sample(index)
        assert caught.value.reason.startswith("no image: ")
    assert len(source) == 3


def test_every_shard_gets_all_classes_in_an_order_of_the_seed(tmp_path: Path) -> None:
    source = ImageNetSource(training_tar(tmp_path), num_classes=3)
    out = {seed: tmp_path / f"seed-{seed}" for seed in (0, 1)}
    for seed, folder in out.items():
        units = InUnits(Shuffled(source, seed), 11)
        ledger = write_sources({folder: units}, Workers(2), strict=True)[folder]
        assert ledger.num_written == 3 * PER_CLASS
    sets = {seed: ShardDataset.open(folder) for seed, folder in out.items()}
    keys = {seed: [sample.key for sample in data.read(range(len(data)))] for seed, data in sets.items()}
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(source.sample(i).key for i in range(len(source)))
    first = Counter(json.loads(sample.parts["json"])["label"] for sample in sets[0].read(range(11)))
    assert set(first) == {0, 1, 2}


class Numbers:
    """Items whose keys are their numbers."""

    description = "numbers"

    def __len__(self) -> int:
        return 12

    def sample(self, index: int) -> Sample:
        return Sample(f"k{index}", {"json": b"{}"})


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_of_more_than_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=f"seed {seed}: give a whole number from 0"):
        Shuffled(Numbers(), seed)
    with pytest.raises(UserError, match=f"seed {seed}: give a whole number from 0"):
        Draws(seed, "test", 0)


def test_the_random_order_never_changes() -> None:
    """Golden: shards already written would get other samples on a resume."""
    shuffled = Shuffled(Numbers(), seed=5)
    order = [int(shuffled.sample(place).key[1:]) for place in range(12)]
    assert sorted(order) == list(range(12))
    assert order == [2, 0, 5, 1, 3, 7, 8, 4, 11, 6, 10, 9]
