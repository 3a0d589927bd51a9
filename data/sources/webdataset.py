"""WebDataset tars (img2dataset's, the hub's, our own pixel shards) -> samples. Payloads stay unchanged.

A sample has one image part, or the image parts of an edit or an interleaved sample (data/samples/layouts.py). Texts
come from the parts `txt` and `json`, a class from `cls` or json's "label". data/sources/prepare.py examines the images.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from base import files, limits
from base.config import UserError
from data.samples.captions import TEXT_FIELDS, clean_text, read_object
from data.samples.images import IMAGE_PARTS, part_name
from data.samples.layouts import ROLE_PATTERN, check_roles, is_interleaved, of_kind, read_splits
from data.shards import Sample
from data.shards.index import KEY_PATTERN
from data.sources.base import BadItemError, Unit
from data.sources.caption_table import CaptionTable
from data.sources.prepare import Texts, clean_splits, select_texts
from data.sources.table_values import shown, whole_number_in
from data.sources.tar_file import Member, TarReader
from data.sources.tar_samples import Group, groups
from data.sources.text_files import decode_text

MAX_KEY_LETTERS = 64
DIGEST_LETTERS = 16  # in a key that had to be changed
# img2dataset's fields about the download, and a block of text about the camera.
DROPPED_FIELDS = ("status", "error_message", "exif")
TEXT_PARTS = ("json", "txt", "cls")


class WebDatasetSource:
    """Tars as a source; each tar is a unit. Implements data.sources.base.Source.

    Keys are `{tar's stem}-{key in the tar}`, changed if our shards do not allow them; json's "source_key" holds the key
    in the tar. The first of these that exists gives the captions: the table `captions`; the json fields
    `caption_fields` ("txt" is the part), as "captions" {field: text} if several; json's "captions"; the part txt;
    json's "caption". Other fields of json are kept, except null and DROPPED_FIELDS.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        *,
        caption_fields: Sequence[str] = (),
        captions: CaptionTable | None = None,
    ) -> None:
        """Raises UserError: no tars, a missing tar, or caption fields and a caption table at once."""
        if not tars:
            raise UserError("no tars given; name at least one, or a folder that holds them")
        if caption_fields and captions is not None:
            raise UserError("give caption fields or a caption table, not both")
        for path in tars:
            if not path.is_file():
                raise UserError(f"{path}: no such file; download it, or leave it out")
        self._tars = list(tars)
        self._caption_fields = tuple(caption_fields)
        self._table = captions
        self.units = [Unit(str(path), num_bytes=path.stat().st_size) for path in tars]
        root = os.path.commonpath([path.resolve().parent for path in tars])
        names = [path.resolve().relative_to(root).as_posix() for path in tars]
        self._prefixes = _prefixes(names)
        listing = files.digest([[name, unit.num_bytes] for name, unit in zip(names, self.units, strict=True)])
        about = [f"{len(tars)} WebDataset tars of {Path(root).name}, listing {listing[:12]}"]
        if caption_fields:
            about.append(f"captions from {', '.join(caption_fields)}")
        if captions is not None:
            about.append(captions.description)
        self.description = "; ".join(about)

    def items(self, unit: int) -> Iterator[Sample | BadItemError]:
        """See Source. Raises UserError: a damaged tar."""
        with TarReader(self._tars[unit]) as tar:
            for group in groups(tar):
                key = _shard_key(self._prefixes[unit], group.key)
                if isinstance(group, BadItemError):
                    yield BadItemError(key, group.reason)
                    continue
                try:
                    item: Sample | BadItemError = self._sample(key, group, tar)
                except BadItemError as error:
                    item = error
                yield item

    def _sample(self, key: str, group: Group, tar: TarReader) -> Sample:
        images = _image_parts(key, group)
        payloads = {
            part: _payload(key, tar, group.parts[part], limits.CAPTION_BYTES)
            for part in TEXT_PARTS
            if part in group.parts
        }
        tree = _tree(key, payloads.get("json", b"{}"))
        if "cls" in payloads:
            tree["label"] = _label(key, "cls", _decoded(key, "cls", payloads["cls"]))
        texts: dict[str, Texts] = {}
        if is_interleaved(images):
            tree["splits"] = _splits(key, tree, images)
        elif of_kind(images, "target"):
            found = select_texts(tree.get("instructions")) or select_texts(tree.get("instruction"))
            if found is None:
                raise BadItemError(key, "no instruction: json has no text in 'instructions'")
            texts = {"instructions": [found] if isinstance(found, str) else found}
        else:
            texts = self._captions(key, group.key, tree, _decoded(key, "txt", payloads.get("txt", b"")))
            wants_class = self._table is None and not self._caption_fields
            if not texts and wants_class and tree.get("label") is not None:
                tree["label"] = _label(key, "json", tree["label"])
            elif not texts:
                raise BadItemError(
                    key, f"no caption: all are empty or missing; the parts are {', '.join(group.parts)}"
                )
        fields = {name: value for name, value in tree.items() if name not in TEXT_FIELDS}
        meta = json.dumps({**fields, **texts, "source_key": group.key}, sort_keys=True)
        parts = {"json": meta.encode()}
        for role, part in images.items():
            suffix = part.rpartition(".")[2].replace("jpeg", "jpg")
            parts[part_name(role, suffix)] = _payload(key, tar, group.parts[part], limits.IMAGE_BYTES)
        return Sample(key, parts)

    def _captions(self, key: str, source_key: str, tree: Mapping[str, Any], txt: str) -> dict[str, Texts]:
        """The json fields of the captions: {"caption": text} or {"captions": list or object}; {}: no captions."""
        if self._table is not None:
            own_key = str(tree.get("key", source_key.rpartition("/")[2]))
            return {"captions": self._table.find(key, own_key, str(tree.get("url", "")))}
        if self._caption_fields:
            named = {field: txt if field == "txt" else tree.get(field) for field in self._caption_fields}
            found = select_texts(named if len(named) > 1 else next(iter(named.values())))
        else:
            found = select_texts(tree.get("captions")) or select_texts(txt or tree.get("caption"))
        if found is None:
            return {}
        return {"caption" if isinstance(found, str) else "captions": found}


def _image_parts(key: str, group: Group) -> dict[str, str]:
    """Role -> image part. Raises BadItemError: the images fit no layout."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for part in group.parts:
        role, _, suffix = part.rpartition(".")
        if suffix in IMAGE_PARTS and ROLE_PATTERN.fullmatch(role):
            found[role].append(part)
    if not found:
        raise BadItemError(key, f"no image: the parts are {', '.join(group.parts)}")
    try:
        check_roles(sorted(role for role, parts in found.items() for _ in parts))
    except ValueError as error:
        raise BadItemError(key, f"unclear images: {error}") from None
    images = {role: part for role, (part,) in found.items()}
    for part in images.values():
        if group.parts[part].num_bytes == 0:
            raise BadItemError(key, f"no image: part '{part}' is empty")
    return images


def _splits(key: str, tree: Mapping[str, Any], images: Mapping[str, str]) -> object:
    splits = clean_splits(tree.get("splits"))
    try:
        read_splits({"splits": splits}, list(images))
    except ValueError as error:
        raise BadItemError(key, f"bad splits: {error}") from None
    return splits


def _payload(key: str, tar: TarReader, member: Member, limit_bytes: int) -> bytes:
    try:
        return tar.payload(member, limit_bytes)
    except OSError as error:
        raise BadItemError(key, f"too large: {error.strerror}") from None


def _tree(key: str, payload: bytes) -> dict[str, Any]:
    """The fields of the part json that are kept. Raises BadItemError: bad json."""
    try:
        tree = read_object(payload)
    except ValueError as error:
        raise BadItemError(key, f"bad json: {error}") from None
    return {name: value for name, value in tree.items() if value is not None and name not in DROPPED_FIELDS}


def _decoded(key: str, part: str, payload: bytes) -> str:
    try:
        return clean_text(decode_text(payload))
    except ValueError as error:
        raise BadItemError(key, f"bad text: part '{part}' is no text ({error})") from None


def _label(key: str, part: str, value: object) -> int:
    try:
        label = whole_number_in(value)
    except ValueError as error:
        raise BadItemError(key, f"bad label: part '{part}' holds {error}") from None
    if label is None or label < 0:
        raise BadItemError(key, f"bad label: part '{part}' holds {shown(value)}, no class number")
    return label


def _prefixes(names: Sequence[str]) -> list[str]:
    """A prefix for the keys of each tar, such that no two tars can yield one key.

    A stem gets a digest of its path if another tar has that stem or continues it with "-": otherwise 1-5 in train.tar
    and 5 in train-1.tar would yield one key.
    """
    stems = [_fit(Path(name).stem) or "tar" for name in names]
    counts = collections.Counter(stems)
    heads = {stem[:place] for stem in counts for place, letter in enumerate(stem) if letter == "-"}
    return [
        f"{stem}-{_digest(name)[:8]}" if counts[stem] > 1 or stem in heads else stem
        for stem, name in zip(stems, names, strict=True)
    ]


def _shard_key(prefix: str, source_key: str) -> str:
    """A valid key of our shards. A key that is not allowed is changed, and gets a digest of the original."""
    key = f"{prefix}-{source_key}"
    if KEY_PATTERN.fullmatch(key):
        return key
    head = _fit(key)[: MAX_KEY_LETTERS - DIGEST_LETTERS - 1]
    return f"{head}-{_digest(key)[:DIGEST_LETTERS]}"


def _fit(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", text).lstrip("_-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
