"""The sources of launch/make_shards.py: for each a dataclass of its options, and a case of `build`.

Functions import the libraries that read images and tables, so that --help does not wait for them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from base import files
from base.bounds import Amount, Count
from base.config import UserError
from base.options import add_options, fields_of
from base.threads import num_cores
from data.sources.config import Join, ParquetConfig, PreparationConfig

if TYPE_CHECKING:
    from data.sources.base import Source
    from data.sources.write import Ledger, Workers

CAPTION_TABLE = "captions.sqlite"  # in the output folder


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Where shards are written, and which processes and nodes write them."""

    out: Path
    """Folder of the data set."""
    processes: Count = field(default_factory=num_cores)
    """Number of processes; the bytes do not depend on it."""
    node: Amount = 0
    """Number of this node, from 0; all nodes run the same command."""
    nodes: Count = 1
    """Number of nodes that divide the work."""


@dataclass(frozen=True, kw_only=True)
class WritingOptions(WorkerOptions, PreparationConfig):
    """Options of every source."""

    strict: bool = False
    """Stop at the first bad item; otherwise rejected.jsonl lists bad items."""
    deduplicate: int | None = None
    """Drop images that are alike but for this many bits of a hash, 0 to 3."""


@dataclass(frozen=True, kw_only=True)
class RowOptions(WritingOptions):
    """Options of every source but tars of samples, of which each makes a shard."""

    max_samples_per_shard: Count = 10_000
    """Most samples of a shard."""


@dataclass(frozen=True, kw_only=True)
class FolderOptions(RowOptions):
    """A folder of images with captions, or one folder per class."""

    images: Path
    """Folder that holds the images."""
    captions: Path | None = None
    """jsonl of {"file", "caption"}; without it each image has NAME.json or NAME.txt."""
    labels: bool = False
    """Folders below --images are classes; there are no captions."""
    no_links_outside: bool = False
    """Refuse links to files that lie outside --images; otherwise they are read, and counted at the end."""
    shuffle_seed: int | None = None
    """Write in a random order, drawn with this seed."""


@dataclass(frozen=True, kw_only=True)
class Cc12mOptions(WritingOptions):
    """CC12M's tars with the LLaVA-Next captions."""

    tars: tuple[Path, ...]
    """Tars, or folders of them."""
    captions: tuple[Path, ...]
    """Files of captions: parquet, jsonl or jsonl.gz."""
    join: Join = "url"
    """What captions and images share."""


@dataclass(frozen=True, kw_only=True)
class WebDatasetOptions(WritingOptions):
    """Any WebDataset tars."""

    tars: tuple[Path, ...]
    """Tars, or folders of them."""
    caption_fields: tuple[str, ...] = ()
    """Fields of json that hold captions; txt: the part txt."""


@dataclass(frozen=True, kw_only=True)
class ImageNetOptions(RowOptions):
    """ImageNet's archives: ILSVRC2012_img_train.tar, _val.tar."""

    tars: Path
    """An archive, or a folder of the classes' tars."""
    labels: Path | None = None
    """Labels of validation images, one a line: synset or number."""
    shuffle_seed: int = 0
    """Seed of the random order in which images are written."""


@dataclass(frozen=True, kw_only=True)
class ParquetOptions(ParquetConfig, RowOptions):
    """Any parquet files with images in a column."""

    files: tuple[str, ...]
    """Parquet files, folders, globs or fsspec urls."""


@dataclass(frozen=True, kw_only=True)
class OmniEditOptions(RowOptions):
    """OmniEdit-Filtered-1.2M's parquet files."""

    files: tuple[str, ...]
    """Parquet files, folders, globs or fsspec urls."""
    min_score: tuple[str, ...] = ()
    """Least scores as SCORE=VALUE, such as o_score=9."""
    tasks: tuple[str, ...] = ()
    """Tasks to keep; without it all tasks are kept."""


SourceOptions = (
    FolderOptions | Cc12mOptions | WebDatasetOptions | ImageNetOptions | ParquetOptions | OmniEditOptions
)
SOURCES: Mapping[str, type[SourceOptions]] = {
    "folder": FolderOptions,
    "cc12m": Cc12mOptions,
    "webdataset": WebDatasetOptions,
    "imagenet": ImageNetOptions,
    "parquet": ParquetOptions,
    "omniedit": OmniEditOptions,
}
PARQUET_NAMES = {"captions": "caption", "kept": "keep"}


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds one command for each kind of source."""
    for name, source in SOURCES.items():
        names = PARQUET_NAMES if source is ParquetOptions else {}
        add_options(commands.add_parser(name, help=source.__doc__), source, names=names)


def write(options: SourceOptions) -> list[str]:
    """Writes the shards; returns lines about what was written. Raises UserError: input is missing or unfit."""
    from data.shards import SHARD_FILES
    from data.sources.prepare import Preparation
    from data.sources.write import write_sources

    files.check_inputs(options.out, SHARD_FILES, _inputs(options))
    source, note = build(options)
    ledgers = write_sources(
        {options.out: source},
        workers(options),
        prepare=Preparation(**fields_of(PreparationConfig, options)),
        deduplicate_bits=options.deduplicate,
        strict=options.strict,
    )
    return [*told(ledgers), *([note] if note and ledgers else [])]


def build(options: SourceOptions) -> tuple[Source, str]:
    """The source, and a line about its input for the summary ("": none). Raises UserError: the input is unfit."""
    from data.shards import MAKE_SHARDS, claim_shards
    from data.sources.base import InUnits
    from data.sources.caption_table import CaptionTable, build_caption_table
    from data.sources.draws import Shuffled
    from data.sources.image_folder import FolderSource
    from data.sources.imagenet import ImageNetSource
    from data.sources.omniedit import OmniEditFilter, omniedit_source
    from data.sources.parquet import ParquetColumns, ParquetSource
    from data.sources.webdataset import WebDatasetSource

    match options:
        case FolderOptions():
            folder = FolderSource(
                options.images,
                options.captions,
                labels=options.labels,
                without=options.out,
                links_outside=not options.no_links_outside,
            )
            seed = options.shuffle_seed
            ordered = folder if seed is None else Shuffled(folder, seed)
            return InUnits(ordered, options.max_samples_per_shard), folder.outside_line
        case ImageNetOptions():
            images = Shuffled(ImageNetSource(options.tars, options.labels), options.shuffle_seed)
            return InUnits(images, options.max_samples_per_shard), ""
        case Cc12mOptions():
            found, table = _find_tars(options.tars, options.out), options.out / CAPTION_TABLE
            claim_shards(options.out, MAKE_SHARDS)
            build_caption_table(options.captions, table)
            return WebDatasetSource(found, captions=CaptionTable(table, join=options.join)), ""
        case WebDatasetOptions():
            found = _find_tars(options.tars, options.out)
            return WebDatasetSource(found, caption_fields=options.caption_fields), ""
        case OmniEditOptions():
            wanted = OmniEditFilter(dict(map(_score, options.min_score)), options.tasks)
            return omniedit_source(options.files, options.max_samples_per_shard, wanted), ""
        case ParquetOptions():
            columns = ParquetColumns(**fields_of(ParquetConfig, options))
            return ParquetSource(options.files, columns, options.max_samples_per_shard), ""


def workers(options: WorkerOptions) -> Workers:
    """The processes and nodes that write. Raises UserError: there is no such node."""
    from data.sources.write import Workers

    return Workers(options.processes, options.node, options.nodes)


def told(ledgers: Mapping[Path, Ledger]) -> list[str]:
    """A line for each folder: how many samples were written and rejected."""
    lines = [(directory, line) for directory, ledger in ledgers.items() for line in (ledger.cut_line, ledger)]
    return [f"{directory}: {line}" for directory, line in lines if line]


def _inputs(options: SourceOptions) -> list[Path]:
    """The files that are read, without folders of images: the output may lie in those."""
    values = [value for name, value in vars(options).items() if name not in ("out", "images")]
    listed = [path for value in values for path in (value if isinstance(value, tuple) else (value,))]
    named = (
        options.files if isinstance(options, (ParquetOptions, OmniEditOptions)) else ()
    )  # texts: also urls
    return [*(path for path in listed if isinstance(path, Path)), *map(Path, named)]


def _find_tars(tars: tuple[Path, ...], out: Path) -> list[Path]:
    """The tars in `tars`. Raises UserError: `out` lies in one of the folders, or as data.sources.tar_samples."""
    from data.sources.tar_samples import find_tars

    for path in tars:
        if out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--out {out} lies in --tars {path}: its shards would be read as input; move it")
    return find_tars(tars)


def _score(limit: str) -> tuple[str, float]:
    name, _, value = limit.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--min-score {limit}: write it as SCORE=VALUE, such as o_score=9") from None
