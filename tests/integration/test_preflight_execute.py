"""The pre-flight's real steps: every phase, what was measured beside what was estimated, and running out of memory."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.distributed import free_port

ROOT = Path(__file__).parents[2]
PREFLIGHT = ROOT / "launch" / "preflight.py"
SCRIPT = Path(__file__).parent / "scripts" / "state_bytes.py"
LAST = ["EMA", "samples", "save", "load", "export"]
VIT = "{img_size: 64, patch_size: 16, embed_dim: 48, depth: 2, num_heads: 2}"
PARTS = ("autoencoder.representation", "perceptual.representation", "discriminator.representation")
PIVOT = [
    *(f"stage.{part}.{field}" for part in PARTS for field in (f"overrides={VIT}", "weights=random")),
    "stage.autoencoder.decoder={width: 64, layers: 2, heads: 2, mlp_width: 128, patch_px: 16}",
    "engine.optimizer.name=adamw",
]
T2I = [
    "generator.backbone={vocab_size: 768, width: 64, num_layers: 2, num_heads: 2, num_kv_heads: 2, head_dim: 32, "
    "mlp_width: 128}",
    "engine.optimizer.name=adamw",
]


def run(arguments: list[str], *, ranks: int = 1, status: int = 0, limit_gib: int = 0) -> str:
    """`limit_gib`: of address space, so that a larger tensor is refused on any machine; 0: none."""
    command = [sys.executable]
    if ranks > 1:
        launcher = str(Path(sys.executable).parent / "deepspeed")
        command = [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port())]

    def limit() -> None:
        if limit_gib:
            resource.setrlimit(resource.RLIMIT_AS, (limit_gib << 30, limit_gib << 30))

    result = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, preexec_fn=limit,
    )  # fmt: skip
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


def execute(config: str, *arguments: str, **options: int) -> str:
    return run([str(PREFLIGHT), f"configs/{config}.yaml", "--execute", *arguments], **options)


def phases(printed: str) -> dict[str, list[float]]:
    """Seconds, GiB of tensors, GiB resident."""
    table = printed.partition("fullest of")[2].partition("estimate and")[0]
    rows = re.findall(r"^  (\S.*?) {2,}([\d.]+) +([\d.]+) +([\d.]+)$", table, re.MULTILINE)
    return {name: [float(value) for value in values] for name, *values in rows}


def errors(printed: str, *, beside_gib: float = 0.0) -> dict[str, float]:
    """In per cent. `beside_gib`: what is known to be measured and not estimated."""
    row = r"^  (\S.*?) {2,}estimate +([\d.]+) GiB +measured +([\d.]+) GiB +error ([+-][\d.]+) %$"
    found = {}
    for name, estimate, measured, error in re.findall(row, printed, re.MULTILINE):
        assert float(error) == pytest.approx(
            100 * (float(estimate) / float(measured) - 1), abs=0.5 / float(measured)
        )
        found[name] = 100 * ((float(estimate) + beside_gib) / float(measured) - 1)
    return found


def test_a_generator_takes_every_phase_and_leaves_nothing_behind(tmp_path: Path) -> None:
    printed = execute("quickstart/t2i", *T2I, f"run_dir={tmp_path / 'run'}")
    measured = phases(printed)
    assert list(measured) == ["data", "start", "first step", "a step", *LAST]
    assert all(resident > 0.1 for _, _, resident in measured.values()), "a process that imported torch"
    # Attention on a CPU pads and masks, which the arithmetic for a GPU's kernels leaves out.
    assert abs(errors(printed)["a step"]) < 5 and abs(errors(printed)["a checkpoint"]) < 10
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_stage_takes_every_phase_as_large_as_estimated(tmp_path: Path) -> None:
    printed = execute("quickstart/pivot", *PIVOT, f"run_dir={tmp_path / 'run'}", ranks=2)
    steps = ["losses", "+ discriminator's update", "+ its loss for the decoder"]
    measured = phases(printed)
    assert list(measured) == ["data", "start", "first step", *steps, *LAST]
    assert "fullest of 2 ranks, 1 packs each a step" in printed
    assert all(abs(errors(printed)[name]) < 2 for name in steps)
    assert not list(tmp_path.iterdir())


def test_a_class_conditional_run_takes_every_phase_as_large_as_estimated(tmp_path: Path) -> None:
    width, layers, images = 128, 4, 32
    small = [f"generator.width={width}", f"generator.num_layers={layers}", "generator.num_heads=4"]
    packs = [f"packing.images_per_pack={images}", "data.num_streams=2", f"run_dir={tmp_path / 'run'}"]
    printed = execute("generator/class/rpiae64_80", *small, *packs)
    measured = phases(printed)
    assert list(measured) == ["data", "start", "first step", "a step", *LAST]
    assert "random weights, latents and classes" in printed and "latents are shown in grey" in printed
    assert measured["samples"][1] < measured["a step"][1]
    # A CPU's RMSNorm keeps what it has normed once more: four in a block, one behind; of queries and keys, which come
    # in bf16, an fp32 copy as well.
    norms = 4 * images * 256 * width * (6 * layers + 1) / 2**30
    assert abs(errors(printed, beside_gib=norms)["a step"]) < 2 and norms < 0.15 * measured["a step"][1]
    assert abs(errors(printed)["a checkpoint"]) < 10
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_evaluation_is_one_of_the_phases_or_left_out_with_a_reason(
    emoji_shards: Callable[..., None], tmp_path: Path
) -> None:
    emoji_shards(tmp_path / "pixels", "scenes-train", 12)
    scores = (
        "evaluation={every_steps: 1, suites: {reconstruction: {inception: none, vgg16: none}}, shards: %s}"
    )
    printed = execute("quickstart/pivot", *PIVOT, f"run_dir={tmp_path}/run", scores % (tmp_path / "pixels"))
    assert list(phases(printed))[-6:] == [*LAST[:2], "evaluation", *LAST[2:]]
    assert "evaluated step" in printed
    printed = execute("quickstart/pivot", *PIVOT, f"run_dir={tmp_path}/run", scores % (tmp_path / "none"))
    assert "evaluation: left out, " in printed and "evaluation" not in phases(printed)


@pytest.mark.slow
def test_running_out_of_memory_names_the_phase_and_what_to_lower(tmp_path: Path) -> None:
    huge = ["pixels.images_per_pack=5000000", f"run_dir={tmp_path / 'run'}"]  # 61 GB of pixels
    printed = execute("quickstart/pivot", *PIVOT, *huge, "--gpu-memory", "16", status=2, limit_gib=40)
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert "out of memory in phase 'data': " in line and "GiB more were asked for" in line
    assert "stage.activation_checkpointing=true" in line and "pixels.images_per_pack=" in line
    assert "Traceback" not in printed and not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_deepspeed_holds_is_what_the_arithmetic_says(ranks: int) -> None:
    """Every ZeRO stage, in fp32 and bf16, with and without accumulation."""
    rows = [
        json.loads(line) for line in run([str(SCRIPT)], ranks=ranks).splitlines() if line.startswith('["')
    ]
    assert len(rows) == 12
    for *case, expected, found in rows:
        # Beside the model: one layer's activations and gradients, 1 % of it each.
        assert expected == pytest.approx(found, rel=0.02), case
