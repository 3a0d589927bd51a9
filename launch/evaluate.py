"""Images -> scores: launch/evaluate.py SUITE --images DIR --out DIR (each with --help; under deepspeed on all ranks)

SUITE             images in                          scores
reconstruction    results beside their originals     PSNR, SSIM, LPIPS, rFID
generation        samples, or an .npz of them        FID, sFID, inception score, precision, recall, KID, FD-DINOv2, CMMD
linear            ImageNet's validation folders      top-1 of DINOv2's published head
geneval dpg       drawn from the benchmark's prompts GenEval; DPG-Bench by a named judge
gedit imgedit     edits of the benchmark's images    GEdit-Bench-EN, ImgEdit-Bench by a named judge

--run RUN --prompts FILE draws the images first. A repeated command continues where it stopped.
prompts           converts a benchmark's files into a file of prompts
calibrate         compares finished scores of a known image set with published ones (SUITE --calibrate: right away)
report            writes one page with runs beside the paper's tables, and the images of failed items
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base import files
from base.bounds import Count
from base.config import UserError
from base.files import read_json
from base.options import add_options, given_options, read_options
from base.terminal import say
from evaluation import calibration
from generator.sampling_config import SamplingConfig
from launch.runs import entry
from launch.runs.sampling_options import add_sampling_options, read_sampling_options
from launch.runs.suites import SUITES, build

if TYPE_CHECKING:
    from base.team import Team


@dataclass(frozen=True, kw_only=True)
class ImageSetOptions:
    """What every suite of launch/evaluate.py takes: the images, and what draws them."""

    images: Path
    """Folder of the image set; with --run it is drawn there."""
    manifest: Path | None = None
    """List of the items; without it manifest.jsonl in --images."""
    out: Path
    """Folder of scores.json and per_item.jsonl."""
    store: Path | None = None
    """Folder of features and judgments, kept for the next run; without it OUT/store."""
    allow_partial: bool = False
    """Score what is there and mark the scores partial."""
    run: Path | None = None
    """run_dir of a finished training that draws the images first."""
    prompts: Path | None = None
    """With --run: what to draw (generator/prompts.py)."""
    num_images: Count = 1
    """With --run: images of each prompt."""


def main() -> None:
    """Scores the images, prints each score with its interval, and writes scores.json and per_item.jsonl to --out."""
    arguments = _parser().parse_args()
    entry.use_torch()
    commands = {"prompts": _write_prompts, "calibrate": _calibrate, "report": _report}
    commands.get(arguments.command, _score)(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = entry.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for name, options in SUITES.items():
        suite = commands.add_parser(name, description=options.__doc__)
        add_options(suite, ImageSetOptions)
        if known := calibration.known_of(name):
            suite.add_argument(
                "--calibrate", choices=known, help="known set that --images are: compare at the end"
            )
        add_options(suite, options)
        add_sampling_options(suite, default="the run's preview_sampling")
    prompts = commands.add_parser("prompts").add_argument
    prompts("benchmark", choices=["geneval", "geneval_rewritten", "dpg", "gedit", "imgedit"])
    prompts("--file", type=Path, nargs="+", help="the benchmark's own (default: download, but for gedit)")
    prompts("--images", type=Path, help="imgedit: folder of the original images")
    prompts("--expect-sha256", help="hash that a given file must have")
    prompts("--out", type=Path, default=Path("prompts"), help="folder of prompts.jsonl")
    calibrate = commands.add_parser("calibrate").add_argument
    calibrate("known", choices=[one.name for one in calibration.KNOWN], help="image set that was scored")
    calibrate("--scores", type=Path, required=True, help="its scores.json")
    report = commands.add_parser("report").add_argument
    report("runs", type=Path, nargs="+", help="folders with a scores.json in or below them, one column each")
    images = "folders whose images may be shown, beside those of runs"
    report("--images", type=Path, nargs="+", default=[], help=images)
    shown = "failed items shown of each suite and run"
    report("--max-failed", type=int, default=argparse.SUPPRESS, help=shown)
    report("--out", type=Path, required=True, help="the page, an .html file")
    return parser


def _score(arguments: argparse.Namespace) -> None:
    from engine import distributed
    from evaluation.runner import check_scores, evaluate
    from launch.runs.team import meet

    options = read_options(ImageSetOptions, arguments)
    chosen = read_options(SUITES[arguments.command], arguments)
    check_scores(options.out)
    team, device = meet()
    _draw(options, arguments, team, device)
    suite = build(chosen, options.store or options.out / "store", device)
    is_linear = arguments.command == "linear"
    images, manifest = _prepare(options, team, in_classes=is_linear)
    scores = evaluate(
        suite,
        images,
        options.out,
        seed=_seed(images),
        allow_partial=options.allow_partial,
        team=team,
        manifest=manifest,
        follow_links=is_linear,  # the names come from the class folders, not from a list
    )
    for name, value in scores.get("scores", {}).items():
        interval = "" if value["low"] is None else f" ({value['low']:.4g} to {value['high']:.4g})"
        mean = "-" if value["mean"] is None else f"{value['mean']:.4g}"
        say(f"{name}: {mean}{interval}, n = {value['n']} {value.get('note', '')}".rstrip())
    distributed.stop()
    if scores and getattr(arguments, "calibrate", None) is not None:
        _compare(arguments.calibrate, scores)


def _draw(options: ImageSetOptions, arguments: argparse.Namespace, team: Team, device: str) -> None:
    """Draws the set with the models of --run, if it is given. Raises UserError: other options for drawing are alone."""
    from generator.prompt_set import SampledSetConfig, draw_set
    from launch.runs.drawable import prompt_models

    if options.run is None:
        given = ["--prompts"] * (options.prompts is not None) + list(given_options(SamplingConfig, arguments))
        if given:
            raise UserError(f"{', '.join(given)}: for drawing; give --run with it")
        return
    if options.prompts is None:
        raise UserError("--run draws from --prompts; see launch/evaluate.py prompts")
    models, base = prompt_models(options.run)
    sampling, count = read_sampling_options(arguments, base), options.num_images
    config = SampledSetConfig(options.prompts, options.images, *models, sampling, count, device=device)
    draw_set(config, team)


def _prepare(options: ImageSetOptions, team: Team, *, in_classes: bool) -> tuple[Path, Path | None]:
    """The folder of the image set, given or made in --out, and its manifest (None: the folder's own).

    Rank 0 makes a set of an .npz, or `in_classes` of folders that are ImageNet's classes. Raises UserError: another
    number of folders than classes.
    """
    from data.image_set import MANIFEST_NAME, write_class_folders
    from data.samples.images import IMAGE_PARTS
    from evaluation.image_source import NPZ_NAME, write_npz_set
    from evaluation.linear_head import NUM_CLASSES
    from evaluation.runner import SCORES_NAME

    made = options.out / "images"
    is_npz = options.images.suffix == ".npz" and not in_classes
    if team.rank == 0 and (in_classes or is_npz):
        left = (made / NPZ_NAME, options.out / SCORES_NAME)  # an earlier version left no marker
        names = ("*.png", MANIFEST_NAME, NPZ_NAME)
        files.claim(made, "evaluate", names, lambda _: any(path.is_file() for path in left))
        if is_npz:
            write_npz_set(options.images, made)
        else:
            num_classes = write_class_folders(options.images, made, IMAGE_PARTS)
            if num_classes != NUM_CLASSES:  # labels are positions in the sorted list of folders
                raise UserError(
                    f"{options.images}: {num_classes} class folders, the head names {NUM_CLASSES}"
                )
    team.barrier()
    if in_classes:
        return options.images, made / MANIFEST_NAME
    return made if is_npz else options.images, options.manifest


def _seed(images: Path) -> int:
    """The seed with which launch/sample.py drew an image set; 0 for other sets."""
    from generator.draw_on_ranks import SETTINGS_NAME

    path = images / SETTINGS_NAME
    return int(read_json(path)["seed"]) if path.is_file() else 0


def _write_prompts(arguments: argparse.Namespace) -> None:
    """Writes a file of prompts for launch/sample.py."""
    from evaluation import benchmark_files, prompt_sets

    out, given = arguments.out, arguments.file
    if arguments.benchmark in ("geneval", "geneval_rewritten"):
        say(benchmark_files.obtain(arguments.benchmark, given and given[0], arguments.expect_sha256))
        return
    if arguments.benchmark == "dpg":
        count = prompt_sets.write_dpg(
            benchmark_files.obtain("dpg", given and given[0], arguments.expect_sha256), out
        )
    elif arguments.benchmark == "gedit":
        if not given:
            raise UserError("gedit: give --file, the parquet files of stepfun-ai/GEdit-Bench")
        count = prompt_sets.write_gedit(given, out)
    else:
        if arguments.images is None:
            raise UserError("imgedit: give --images, the folder of ImgEdit-Bench's original images")
        edits = benchmark_files.obtain("imgedit", given and given[0], arguments.expect_sha256)
        count = prompt_sets.write_imgedit(edits, arguments.images, out)
    say(f"{out / prompt_sets.PROMPTS_NAME}: {count} lines")


def _calibrate(arguments: argparse.Namespace) -> None:
    _compare(arguments.known, read_json(arguments.scores))


def _compare(known: str, scores: Mapping[str, Any]) -> None:
    """Compares scores with the published ones of the set `known`. Raises UserError: they differ."""
    of = calibration.known(known)
    verdicts = calibration.compare(of, scores)
    say(f"{of.what} ({of.source})")
    for verdict in verdicts:
        say(verdict.line())
    wrong = sum(not verdict.holds for verdict in verdicts)
    if wrong:
        raise UserError(
            f"{wrong} of {len(verdicts)} numbers differ: trust no score of '{of.suite}' before they agree"
        )
    say(f"calibrated: all {len(verdicts)} numbers agree")


def _report(arguments: argparse.Namespace) -> None:
    from report.benchmarks import MAX_FAILED, render_benchmarks

    max_failed = getattr(arguments, "max_failed", MAX_FAILED)
    say(render_benchmarks(arguments.runs, arguments.out, max_failed, arguments.images))


if __name__ == "__main__":
    sys.exit(entry.run(main))
