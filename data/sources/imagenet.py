"""ImageNet (ILSVRC 2012) in its distributed form: tars of JPEG files, which are read in place.

Training: ILSVRC2012_img_train.tar, a tar of 1000 tars nXXXXXXXX.tar, or a folder of those tars; FolderSource with
`labels` reads unpacked class folders. Validation: ILSVRC2012_img_val.tar and a file of labels. Labels number the
synsets nXXXXXXXX in sorted order. Training images come class by class: wrap this source in draws.Shuffled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from base import files, limits
from base.config import UserError
from base.progress import ProgressLine
from data.samples.images import IMAGE_PARTS
from data.shards import Sample
from data.shards.index import KEY_PATTERN
from data.sources.base import BadItemError
from data.sources.folder_walk import is_hidden, tell_passed_over
from data.sources.tar_file import Member, TarReader
from data.sources.text_files import read_text

NUM_CLASSES = 1000
SYNSET = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True)
class _Archive:
    """A tar of images: a file, or a member of a tar."""

    path: Path
    inside: Member | None
    synset: str  # "": images of all classes


class ImageNetSource:
    """The images of one split. Implements data.sources.base.IndexedItems.

    The constructor reads all headers (1.28 M small reads for training); no archive is unpacked.
    """

    def __init__(self, tars: Path, labels: Path | None = None, *, num_classes: int = NUM_CLASSES) -> None:
        """`labels`: makes it the validation split; one line per image in the order of names, a synset or a number.

        TensorFlow's imagenet_2012_validation_synset_labels.txt lists synsets; the second column of Caffe's val.txt
        lists numbers from 0. The development kit's numbers (from 1, in another order) are refused.
        Raises UserError: a missing or damaged archive, a repeated class, or a wrong number of classes or labels.
        """
        if labels is None:
            archives = _training_archives(tars)
            self._classes: list[str] | None = [archive.synset for archive in archives]
            synset, times = Counter(self._classes).most_common(1)[0] if self._classes else ("", 0)
            if times > 1:
                raise UserError(
                    f"{tars}: holds {times} archives of class {synset}; leave one: labels are places in the sorted list"
                )
            if len(self._classes) != num_classes:
                raise UserError(
                    f"{tars}: {len(self._classes)} classes, expected {num_classes}; download what is missing, or "
                    "say how many classes there are: labels are places in their sorted list"
                )
        else:
            archives = [_Archive(tars, None, "")]
        self._paths = [archive.path for archive in archives]
        owners, members = _list(archives)
        if not members:
            raise UserError(f"{tars}: holds no image; give an archive of ILSVRC 2012")
        self._archive = np.array(owners, np.int32)
        self._places = np.array([(member.data_offset, member.num_bytes) for member in members], np.int64)
        self._names = np.array(
            [member.name.encode() for member in members]
        )  # one block, which forked workers share
        about, self._labels = "training", self._archive
        if labels is not None:
            order = np.argsort(self._names, kind="stable")
            self._places, self._names = self._places[order], self._names[order]  # all of one archive
            self._classes, self._labels = _read_labels(labels, len(order), num_classes)
            about = f"validation with labels {files.sha256(labels)[:12]}"
        digest = hashlib.sha256(self._places.tobytes() + self._names.tobytes()).hexdigest()[:12]
        self.description = (
            f"ImageNet (ILSVRC 2012, image-net.org terms) {about}, {len(self)} images of {num_classes} classes, "
            f"listing {digest}"
        )

    def __len__(self) -> int:
        """Number of images, good and bad."""
        return len(self._names)

    def sample(self, index: int) -> Sample:
        """Item `index`. Raises BadItemError: its name is not an image's. UserError: the archive became shorter."""
        name = self._names[index].decode()
        label = int(self._labels[index])
        key, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix.lower().lstrip(".")
        if suffix not in IMAGE_PARTS or not KEY_PATTERN.fullmatch(key):
            raise BadItemError(key, f"no image: file '{name}'")
        offset, num_bytes = self._places[index].tolist()
        if num_bytes == 0:
            raise BadItemError(key, f"no image: file '{name}' is empty")
        if num_bytes > limits.IMAGE_BYTES:
            raise BadItemError(
                key, f"too large: file '{name}' has {num_bytes} bytes, over {limits.IMAGE_BYTES}"
            )
        with TarReader(self._paths[self._archive[index]]) as tar:
            payload = tar.read(offset, num_bytes)
        meta: dict[str, int | str] = {"label": label, "file": name}
        if self._classes is not None:
            meta["class"] = self._classes[label]
        part = "jpg" if suffix == "jpeg" else suffix
        return Sample(key, {part: payload, "json": json.dumps(meta, sort_keys=True).encode()})


def _training_archives(path: Path) -> list[_Archive]:
    """The archives of all classes, sorted by synset."""
    if path.is_dir():
        there = sorted(below for below in path.iterdir() if not is_hidden(below.name))
        found = [
            _Archive(tar, None, tar.stem)
            for tar in there
            if tar.suffix == ".tar" and SYNSET.fullmatch(tar.stem)
        ]
        tell_passed_over(
            path, [other.name for other in there if other not in {archive.path for archive in found}]
        )
    else:
        found = []
        with TarReader(path) as tar:
            for member in tar.members():
                name = PurePosixPath(member.name)
                if member.kind == "folder":
                    continue
                if member.kind != "file" or name.suffix != ".tar" or not SYNSET.fullmatch(name.stem):
                    raise UserError(
                        f"{path}: holds '{member.name}', not nXXXXXXXX.tar; for training give "
                        "ILSVRC2012_img_train.tar, for validation the labels too"
                    )
                found.append(_Archive(path, member, name.stem))
    return sorted(found, key=lambda archive: archive.synset)


def _list(archives: Sequence[_Archive]) -> tuple[list[int], list[Member]]:
    """(number of each file's archive, the files), in the order of the archives. Raises UserError."""
    owners: list[int] = []
    members: list[Member] = []
    progress = ProgressLine("headers of ImageNet", "images")
    for number, archive in enumerate(archives):
        with TarReader(archive.path) as tar:
            start = archive.inside.data_offset if archive.inside else 0
            num_bytes = archive.inside.num_bytes if archive.inside else tar.num_bytes
            for member in tar.members(archive.inside):
                if member.kind == "other":
                    raise UserError(
                        f"{archive.path}: '{member.name}' is a link or device; pack the files themselves"
                    )
                if member.kind == "file" and not any(map(is_hidden, PurePosixPath(member.name).parts)):
                    owners.append(number)
                    members.append(member)
                progress.show(len(members), (number + (member.offset - start) / num_bytes) / len(archives))
        if archive.synset and (not owners or owners[-1] != number):
            raise UserError(f"{archive.path}: class {archive.synset} has no image; fetch its archive again")
    progress.show(len(members), 1)
    return owners, members


def _read_labels(
    path: Path, num_images: int, num_classes: int
) -> tuple[list[str] | None, npt.NDArray[np.int32]]:
    """(synsets in the order of labels, or None for a file of numbers; labels, int32 [num_images])."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a text file with one synset or number a line")
    words = read_text(path).split()
    if len(words) != num_images:
        raise UserError(f"{path}: {len(words)} labels for {num_images} images; one line for each is needed")
    classes: list[str] | None = None
    if all(SYNSET.fullmatch(word) for word in words):
        classes = sorted(set(words))
        numbers = {synset: label for label, synset in enumerate(classes)}
        labels = [numbers[word] for word in words]
    elif all(re.fullmatch(r"[0-9]{1,6}", word) for word in words):
        labels = [int(word) for word in words]
    else:
        raise UserError(
            f"{path}: not every line is a synset nXXXXXXXX, nor every one a number; convert the file"
        )
    if set(labels) != set(range(num_classes)):
        raise UserError(
            f"{path}: {len(set(labels))} classes, {min(labels)} to {max(labels)}; expected each of 0 to "
            f"{num_classes - 1}, in the order of the synsets (the development kit's numbers must be converted)"
        )
    return classes, np.array(labels, np.int32)
