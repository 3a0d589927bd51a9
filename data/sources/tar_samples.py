"""Groups the members of WebDataset tars into samples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from base.config import UserError
from data.sources.base import BadItemError
from data.sources.folder_walk import below, tell_passed_over
from data.sources.tar_file import Member, TarReader

# The key ends at the first dot of the path's last component, as in WebDataset.
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True)
class Group:
    """The neighbouring members KEY.part of one sample; part names in lower case, in file order."""

    key: str
    parts: Mapping[str, Member]


def groups(tar: TarReader) -> Iterator[Group | BadItemError]:
    """Yields the samples of a WebDataset tar in file order, and BadItemErrors for members that belong to no sample.

    Raises UserError: as `TarReader.members`; members of one key are not neighbours.
    """
    seen: set[str] = set()
    key, parts, repeated = "", dict[str, Member](), ""
    for member in tar.members():
        match = NAME.fullmatch(member.name)
        if member.kind == "folder":
            continue
        if match is None or member.kind == "other":
            reason = "no file name KEY.part" if match is None else "a link or device"
            yield BadItemError(member.name, f"not a sample: '{member.name}' is {reason}")
            continue
        if match[1] != key:
            if parts:
                yield _group(key, parts, repeated)
            key, parts, repeated = match[1], {}, ""
            if key in seen:
                raise UserError(
                    f"{tar.path}: the members of '{key}' are not neighbours (byte {member.offset}); "
                    "pack it again with the names sorted"
                )
            seen.add(key)
        part = match[2].lower()
        if part in parts:
            repeated = member.name
        parts[part] = member
    if parts:
        yield _group(key, parts, repeated)


def find_tars(paths: Sequence[Path]) -> list[Path]:
    """The tars in `paths`, in order; a folder stands for every *.tar below it, in the order of paths.

    data/sources/folder_walk.py defines which files count; other files are reported. Raises UserError: no such file or
    folder, no tar at all, or a tar given twice or reached by two links.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; give tars, or folders with tars")
        if path.is_dir():
            there = below(path)
            names = [name for name in there.files if name.endswith(".tar")]
            found += [path / name for name in names]
            tell_passed_over(path, sorted({*there.files, *dict(there.others)} - set(names)))
        else:
            found.append(path)
    if not found:
        raise UserError(f"{', '.join(map(str, paths)) or 'no path given'}: no *.tar there")
    tar, times = Counter(path.resolve() for path in found).most_common(1)[0]
    if times > 1:
        raise UserError(f"{tar}: given twice, or by two links; name each tar once")
    return found


def _group(key: str, parts: Mapping[str, Member], repeated: str) -> Group | BadItemError:
    if repeated:
        return BadItemError(key, f"repeated part: '{repeated}' is there more than once")
    return Group(key, parts)
