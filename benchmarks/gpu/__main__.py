"""Proof on one GPU, in at most 8 minutes and without a network: python -m benchmarks.gpu (`make gpu`)

It runs tests/gpu, then training throughput, tokenizer stages, encoding and sampling, the most important first. Each
group has a process and a time limit of its own. Writes benchmarks/results/gpu_DEVICE.json and .md (--out: elsewhere)
and prints what falls short. Exit status 0; 1: a test failed; 3: there is no GPU.
`--device cpu --small`: the same code on tiny shapes, to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import page, steps
from benchmarks.gpu.images import CONFIGS, Images, measure_encoding, measure_sampling, measure_stages
from benchmarks.gpu.recording import Recorder, free
from benchmarks.throughput import Shape, Training, usable_kernels
from engine.distributed import Ranks
from evaluation.environment import machine, versions

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
TESTS_FAILED, NO_GPU = 1, 3
BUDGET_S = 470.0
GROUPS = {"tests": 150.0, "training": 190.0, "tokenizer": 70.0, "sampling": 45.0, "encoding": 15.0}
"""Seconds of each group, in the order of the groups. Time that a group leaves goes to the next."""
PACK_TOKENS = (49_152, 12_288, 24_576)
WAYS = (True, False)
"""Whether compiled, in order of measurement."""
TINY = {
    "width": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "mlp_width": 64,
    "vocab_size": 256,
}
SMALL_SHAPE = Shape(
    CONFIGS / "quickstart" / "t2i.yaml",
    ("engine.precision=bf16", *(f"generator.backbone.{name}={value}" for name, value in TINY.items())),
    (4, 4, 4),
    step_tokens=800,
    at_least_s=0.0,
)
SMALL_IMAGES = Images(
    CONFIGS / "quickstart", CONFIGS / "quickstart" / "t2i.yaml", CONFIGS / "quickstart_class" / "rpiae.yaml",
    latents=(4, 4, 4), pack_images=2, batch_images=2, num_steps=2, at_least_s=0.0,
)  # fmt: skip
SMALL_TOKENS, SMALL_WAYS = (800, 400), (False,)  # compiling takes a CPU a minute


def main() -> int:
    """Runs all groups; returns the exit status."""
    arguments = _parser().parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} finds no CUDA device here", file=sys.stderr)
        return NO_GPU
    if arguments.group:
        _measure(arguments.group, arguments.lines, arguments.budget, small=arguments.small)
        return 0
    begin_s = time.monotonic()
    name = machine()["gpu"] if arguments.device == "cuda" else "cpu"
    print(f"{name}; {', '.join(f'{key} {value}' for key, value in versions().items())}")
    if not steps.HAS_DEEPSPEED:
        print(steps.HOW_TO_BRING_DEEPSPEED)
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.jsonl"
        lines.touch()
        _run_groups(arguments, lines, begin_s)
        entries = [json.loads(line) for line in lines.read_text().splitlines()]
    _write(arguments.out, name, entries)
    print(f"{time.monotonic() - begin_s:.0f} s")
    failed = [e for e in entries if e["group"] == "tests" and e.get("values", {}).get("status", 0) != 0]
    return TESTS_FAILED if failed else 0


def _run_groups(arguments: argparse.Namespace, lines: Path, begin_s: float) -> None:
    """Runs every group in turn. A group that dies or hangs costs only its own time."""
    due_s = 0.0
    for group, seconds in GROUPS.items():
        due_s += seconds * arguments.budget / BUDGET_S
        left_s = begin_s + due_s - time.monotonic()
        if group == "tests":
            Recorder(lines, group, left_s).run("tests/gpu", lambda left_s=left_s: _tests(left_s), needs_s=5)
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", arguments.device, "--group", group]
        command += ["--lines", str(lines), "--budget", str(left_s), *(["--small"] if arguments.small else [])]
        print(f"{group}: {left_s:.0f} s", flush=True)
        try:
            status = subprocess.run(command, cwd=REPOSITORY, timeout=max(left_s, 1)).returncode  # noqa: S603  # our own command
            trouble = f"its process ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            trouble = f"stopped after {left_s:.0f} s"
        if trouble:
            Recorder(lines, group, 0).write("the rest of the group", error=trouble)


def _tests(left_s: float) -> dict[str, Any]:
    """Runs tests/gpu; returns pytest's exit status (5: no tests collected) and its counts."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    try:
        done = subprocess.run(  # noqa: S603  # our own command
            command, cwd=REPOSITORY, timeout=max(left_s, 1), capture_output=True, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"tests/gpu was stopped after {left_s:.0f} s") from error
    print(done.stdout, done.stderr, flush=True)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout.strip().rpartition("\n")[2])
    return {"status": done.returncode, **{kind: int(number) for number, kind in counts}}


def _measure(group: str, lines: Path, budget_s: float, *, small: bool) -> None:
    record = Recorder(lines, group, budget_s)
    ranks, images = steps.start(), SMALL_IMAGES if small else Images()
    if group == "training":
        if small:
            _train(SMALL_SHAPE, SMALL_TOKENS, SMALL_WAYS, ranks, record)
        else:
            _train(Shape(), PACK_TOKENS, WAYS, ranks, record)
        return
    measures: dict[str, Callable[[Images, Ranks, Recorder], None]] = {
        "tokenizer": measure_stages,
        "encoding": measure_encoding,
        "sampling": measure_sampling,
    }
    measures[group](images, ranks, record)


def _train(
    shape: Shape, sizes: tuple[int, ...], ways: tuple[bool, ...], ranks: Ranks, record: Recorder
) -> None:
    """Measures large packs before small, compiled before eager, all sizes on the first kernel before other kernels."""
    first, *others = usable_kernels(ranks.device)
    for kernels, needs_s in ([first], 12.0), (others, 15.0):
        for tokens, compiled in itertools.product(sizes if kernels else (), ways):
            with contextlib.ExitStack() as stack:
                run = shape.run(tokens, compiled=compiled)
                built = functools.cache(
                    lambda run=run, stack=stack: stack.enter_context(Training(shape, run, ranks))
                )
                for kernel in kernels:
                    name = f"{tokens:,} tokens, {'compiled' if compiled else 'eager'}, {kernel}"
                    record.run(name, lambda k=kernel, built=built: built().measure(k), needs_s=needs_s)
            del built
            free()


def _write(folder: Path, name: str, entries: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}"
    found = {**machine(), "gpu": name}
    path.with_suffix(".json").write_text(
        json.dumps({"machine": found, "versions": versions(), "measurements": entries}, indent=1) + "\n"
    )
    path.with_suffix(".md").write_text(page.render(found, versions(), entries))
    print(f"{path}.json and .md; what falls short:")
    for line in page.falls_short(entries) or ["nothing"]:
        print(f"  {line}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--group", choices=tuple(GROUPS), help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
