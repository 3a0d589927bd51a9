"""The commands of make_shards that write shards: their arguments, and the sources built from them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base import files, threads
from base.config import UserError
from data.shards import MAKE_SHARDS, SHARD_FILES, claim_shards
from data.sources.base import InUnits, Source
from data.sources.caption_table import CaptionTable, build_caption_table
from data.sources.draws import Shuffled
from data.sources.folder import FolderSource
from data.sources.imagenet import ImageNetSource
from data.sources.omniedit import OmniEditFilter, omniedit_source
from data.sources.parquet import ParquetColumns, ParquetSource
from data.sources.prepare import Preparation
from data.sources.tar_samples import find_tars
from data.sources.webdataset import WebDatasetSource
from data.sources.write import Ledger, Workers

NUM_PROCESSES = threads.num_cores()
CAPTION_TABLE = "captions.sqlite"  # in the output folder


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds one command for each kind of source."""
    folder = commands.add_parser("folder", help="a folder of images with captions, or one folder per class")
    folder.add_argument("--images", type=Path, required=True)
    folder.add_argument(
        "--captions", type=Path, help='jsonl of {"file", "caption"}; without it NAME.json or NAME.txt'
    )
    folder.add_argument(
        "--labels", action="store_true", help="folders below --images are classes; no captions"
    )
    folder.add_argument(
        "--no-links-outside",
        action="store_true",
        help="refuse links to files that lie outside --images (default: they are read, and counted at the end)",
    )

    cc12m = commands.add_parser("cc12m", help="CC12M's tars with the LLaVA-Next captions")
    cc12m.add_argument("--captions", type=Path, nargs="+", required=True, help="parquet, jsonl or jsonl.gz")
    cc12m.add_argument("--join", choices=("key", "url"), default="url", help="what captions and images share")

    others = commands.add_parser("webdataset", help="any WebDataset tars")
    others.add_argument("--caption-fields", nargs="+", default=[], help="of json; txt: the part txt")
    for command in (cc12m, others):
        command.add_argument("--tars", type=Path, nargs="+", required=True, help="files, or folders of them")

    imagenet = commands.add_parser("imagenet", help="ImageNet's archives: ILSVRC2012_img_train.tar, _val.tar")
    imagenet.add_argument(
        "--tars", type=Path, required=True, help="an archive, or a folder of the classes' tars"
    )
    imagenet.add_argument("--labels", type=Path, help="of validation images, one a line: synset or number")

    parquet = commands.add_parser("parquet", help="any parquet files with images in a column")
    parquet.add_argument("--image", help="column; edits: --source and --target")
    parquet.add_argument("--source")
    parquet.add_argument("--target")
    parquet.add_argument("--caption", nargs="+", default=[], help="columns; several are kinds of caption")
    parquet.add_argument("--instruction", help="column of an edit")
    parquet.add_argument("--label", help="column of a class number")
    parquet.add_argument("--key", help="column, unique")
    parquet.add_argument("--keep", nargs="+", default=[], help="further columns, for json")

    omniedit = commands.add_parser("omniedit", help="OmniEdit-Filtered-1.2M's parquet files")
    omniedit.add_argument(
        "--min-score", nargs="+", default=[], metavar="SCORE=VALUE", help="such as o_score=9"
    )
    omniedit.add_argument("--tasks", nargs="+", default=[], help="to keep (default: all)")
    for command in (parquet, omniedit):
        command.add_argument("--files", nargs="+", required=True, help="files, folders, globs or fsspec urls")
    for command in (folder, cc12m, others, imagenet, parquet, omniedit):
        add_workers(command)
    for command in (folder, cc12m, others, imagenet, parquet, omniedit):
        _add_preparation(command)
    for command in (folder, imagenet, parquet, omniedit):
        command.add_argument("--max-samples-per-shard", type=int, default=10_000)
    for command in (folder, imagenet):
        command.add_argument("--shuffle-seed", type=int, help="write in a random order (imagenet: 0)")
    imagenet.set_defaults(shuffle_seed=0)


def add_workers(command: argparse.ArgumentParser) -> None:
    """Adds the options of processes and nodes, which every command that writes shards has."""
    command.add_argument("--out", type=Path, required=True, help="folder of the data set")
    command.add_argument("--processes", type=int, default=NUM_PROCESSES, help="the bytes do not depend on it")
    command.add_argument("--node", type=int, default=0, help="this node, from 0; all run the same command")
    command.add_argument("--nodes", type=int, default=1)


def _add_preparation(command: argparse.ArgumentParser) -> None:
    command.add_argument("--strict", action="store_true", help="stop at the first bad item, do not list it")
    command.add_argument(
        "--deduplicate", type=int, metavar="BITS", help="drop images alike but for 0 to 3 bits"
    )
    command.add_argument("--resolution", type=int, help="fit images to a square of this side, pixels")
    command.add_argument(
        "--fit",
        choices=("crop", "pad"),
        default="crop",
        help="to the square: cut its centre out, or add white",
    )
    command.add_argument("--min-px", type=int, help="short side of an image (default: --resolution)")
    command.add_argument("--max-aspect", type=float, help="longer side / shorter side")
    for kind in ("words", "letters"):
        command.add_argument(f"--min-{kind}", type=int, default=0, help="of a caption")
        command.add_argument(f"--max-{kind}", type=int, help="of a caption")
    command.add_argument(
        "--encoding", choices=("jpeg", "png", "webp"), default="jpeg", help="of changed images"
    )


def workers(arguments: argparse.Namespace) -> Workers:
    """The processes and nodes that write."""
    return Workers(arguments.processes, arguments.node, arguments.nodes)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of write_sources for filters and fitting."""
    prepare = Preparation(
        resolution=arguments.resolution,
        min_px=arguments.min_px,
        max_aspect=arguments.max_aspect,
        min_words=arguments.min_words,
        max_words=arguments.max_words,
        min_letters=arguments.min_letters,
        max_letters=arguments.max_letters,
        encoding=arguments.encoding,
        fit=arguments.fit,
    )
    return {"prepare": prepare, "deduplicate_bits": arguments.deduplicate, "strict": arguments.strict}


def told(ledgers: Mapping[Path, Ledger]) -> list[str]:
    """A line for each folder: how many samples were written and rejected."""
    lines = [(directory, line) for directory, ledger in ledgers.items() for line in (ledger.cut_line, ledger)]
    return [f"{directory}: {line}" for directory, line in lines if line]


def source(arguments: argparse.Namespace) -> tuple[Source, str]:
    """The source for the folder `--out`, and a line about the input for the summary ("": none).

    Raises UserError: input is missing or unfit.
    """
    _check_inputs(arguments)
    if arguments.command == "folder":
        return _folder(arguments)
    return _source(arguments), ""


def _check_inputs(arguments: argparse.Namespace) -> None:
    """Raises UserError: the output would overwrite the input, or lie in it."""
    given = [getattr(arguments, name, None) or [] for name in ("tars", "captions", "labels", "files")]
    inputs = [
        Path(path) for one in given for path in (one if isinstance(one, list) else [one]) if path is not True
    ]
    files.check_inputs(arguments.out, SHARD_FILES, inputs)
    for path in arguments.tars if arguments.command in ("cc12m", "webdataset") else []:
        if arguments.out.resolve().is_relative_to(path.resolve()):
            raise UserError(
                f"--out {arguments.out} lies in --tars {path}: its shards would be read as input; move it"
            )


def _folder(arguments: argparse.Namespace) -> tuple[Source, str]:
    folder = FolderSource(
        arguments.images,
        arguments.captions,
        labels=arguments.labels,
        without=arguments.out,
        links_outside=not arguments.no_links_outside,
    )
    seed = arguments.shuffle_seed
    source = InUnits(folder if seed is None else Shuffled(folder, seed), arguments.max_samples_per_shard)
    return source, folder.outside_line


def _source(arguments: argparse.Namespace) -> Source:
    match arguments.command:
        case "imagenet":
            images = ImageNetSource(arguments.tars, arguments.labels)
            return InUnits(Shuffled(images, arguments.shuffle_seed), arguments.max_samples_per_shard)
        case "cc12m":
            claim_shards(arguments.out, MAKE_SHARDS)
            table = arguments.out / CAPTION_TABLE
            build_caption_table(arguments.captions, table)
            return WebDatasetSource(
                find_tars(arguments.tars), captions=CaptionTable(table, join=arguments.join)
            )
        case "webdataset":
            return WebDatasetSource(find_tars(arguments.tars), caption_fields=arguments.caption_fields)
        case "omniedit":
            wanted = OmniEditFilter(_scores(arguments.min_score), tuple(arguments.tasks))
            return omniedit_source(arguments.files, arguments.max_samples_per_shard, wanted)
        case _:
            columns = ParquetColumns(
                image=arguments.image,
                source=arguments.source,
                target=arguments.target,
                captions=tuple(arguments.caption),
                instruction=arguments.instruction,
                label=arguments.label,
                key=arguments.key,
                kept=tuple(arguments.keep),
            )
            return ParquetSource(arguments.files, columns, arguments.max_samples_per_shard)


def _scores(limits: list[str]) -> dict[str, float]:
    scores = {}
    for limit in limits:
        name, _, value = limit.partition("=")
        try:
            scores[name] = float(value)
        except ValueError:
            raise UserError(f"--min-score {limit}: write it as SCORE=VALUE, such as o_score=9") from None
    return scores
