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

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base.config import UserError
from base.files import read_json
from base.team import Team
from base.terminal import say
from engine import distributed
from evaluation import calibration
from evaluation.runner import check_scores, evaluate
from generator.drawn_set import SETTINGS_NAME
from generator.sampled_set import SampledSetConfig, draw_set
from generator.sampling_config import SamplingConfig
from launch.runs import entry
from launch.runs.drawable import prompt_models
from launch.runs.evaluation_options import SUITES, add_commands, prepare_images, write_prompts
from launch.runs.sampling_options import read_sampling_options
from launch.runs.team import meet
from report.benchmarks import render_benchmarks


def main() -> None:
    """Scores the images, prints each score with its interval, and writes scores.json and per_item.jsonl to --out."""
    parser = entry.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_commands(parser)
    arguments = parser.parse_args()
    entry.use_torch()
    if arguments.command in SUITES:
        _score(arguments)
    else:
        {"prompts": write_prompts, "calibrate": _calibrate, "report": _report}[arguments.command](arguments)


def _score(arguments: argparse.Namespace) -> None:
    check_scores(arguments.out)
    team, device = meet()
    if arguments.run is not None:
        _draw(arguments, team, device)
    elif arguments.prompts is not None or _sampling_options(arguments):
        options = ["--prompts"] * (arguments.prompts is not None) + _sampling_options(arguments)
        raise UserError(f"{', '.join(options)}: for drawing; give --run with it")
    suite = SUITES[arguments.command](arguments, device)
    images, manifest = prepare_images(arguments, team)
    scores = evaluate(
        suite,
        images,
        arguments.out,
        seed=_seed(images),
        allow_partial=arguments.allow_partial,
        team=team,
        manifest=manifest,
        follow_links=arguments.command == "linear",  # the names come from the class folders, not from a list
    )
    for name, value in scores.get("scores", {}).items():
        interval = "" if value["low"] is None else f" ({value['low']:.4g} to {value['high']:.4g})"
        mean = "-" if value["mean"] is None else f"{value['mean']:.4g}"
        say(f"{name}: {mean}{interval}, n = {value['n']} {value.get('note', '')}".rstrip())
    distributed.stop()
    if scores and getattr(arguments, "calibrate", None) is not None:
        _compare(arguments.calibrate, scores)


def _sampling_options(arguments: argparse.Namespace) -> list[str]:
    """Options of SamplingConfig's fields that the command line gives."""
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    return [name for name in names if getattr(arguments, name, None) is not None]


def _seed(images: Path) -> int:
    """The seed with which launch/sample.py drew an image set; 0 for other sets."""
    path = images / SETTINGS_NAME
    return int(read_json(path)["seed"]) if path.is_file() else 0


def _draw(arguments: argparse.Namespace, team: Team, device: str) -> None:
    if arguments.prompts is None:
        raise UserError("--run draws from --prompts; see launch/evaluate.py prompts")
    models, base = prompt_models(arguments.run)
    sampling = read_sampling_options(arguments, base)
    config = SampledSetConfig(arguments.prompts, arguments.images, *models, sampling, arguments.num_images)
    config = dataclasses.replace(config, device=device)
    draw_set(config, team)


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
    say(render_benchmarks(arguments.runs, arguments.out, arguments.max_failed, arguments.images))


if __name__ == "__main__":
    sys.exit(entry.run(main))
