"""What the pre-flight says before anything is started: kinds of runs, what fits, what to change, storage, time."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch

from base.config import UserError, load
from data.shards import Sample, ShardWriter
from engine.memory import StateBytes, TensorBytes, asked_for, reset_resident_peak, resident_peak_bytes
from engine.rehearsal import Meter, OutOfMemoryError
from launch.runs import entry
from launch.runs.configs import GeneratorRun
from launch.runs.tasks import RUNS, read_run
from launch.sizing import dry_run
from launch.sizing.estimate import GIB, PEAK, untrained_latents
from launch.sizing.report import Preflight, plan_run, remedies, report
from launch.sizing.stage_size import PHASES, stage_size
from launch.sizing.synthetic import SyntheticText, latent_pack

CONFIGS = Path(__file__).parents[3] / "configs"
T2I = str(CONFIGS / "generator" / "t2i_cc12m.yaml")
EDIT = str(CONFIGS / "generator" / "edit_omniedit.yaml")
CLASS = str(CONFIGS / "generator" / "class" / "rpiae64_80.yaml")
PIVOT = str(CONFIGS / "quickstart" / "pivot.yaml")


def preflight(path: str = T2I, *overrides: str) -> Preflight:
    return plan_run(read_run(path, overrides))


def tables(of: Preflight, *, num_gpus: int = 8, gpu_gib: float = 80, mfu: float | None = None) -> str:
    return report(of, num_gpus=num_gpus, gpu_gib=gpu_gib, mfu=mfu)


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_the_kind_of_every_config_is_found_or_refused_in_one_line(path: Path) -> None:
    folder, below = path.relative_to(CONFIGS).parts[:2]
    is_class = folder == "quickstart_class" and path.stem in ("rpiae", "rae", "vae")
    is_part = path.parent.name == "parts"
    if (
        is_part
        or folder == "latents"
        or path.stem.startswith("latents_")
        or path.stem in ("data", "judge", "latents", "run", "standin", "features")
    ):
        with pytest.raises(
            UserError, match=rf"{path.name}: there is no 'task'.*tokenizer, t2i, edit, class$"
        ):
            read_run(str(path))
    elif is_class or below == "class":
        assert read_run(str(path)).task == "class"
    elif folder == "generator" or (folder == "quickstart" and path.stem in ("t2i", "edit")):
        assert read_run(str(path)).task == ("edit" if "edit" in path.stem else "t2i")
    else:
        assert read_run(str(path)).task == "tokenizer"


@pytest.mark.parametrize("task", ["t2v", "[t2i]", "3", "{t2i: edit}", "''"])
def test_an_unknown_task_is_refused_in_one_line_that_lists_the_known_ones(task: str) -> None:
    with pytest.raises(UserError, match=r"pivot\.yaml: task is .*tokenizer, t2i, edit, class$") as error:
        read_run(PIVOT, [f"task={task}"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", RUNS)
@pytest.mark.parametrize("path", [T2I, EDIT, CLASS, PIVOT], ids=["t2i", "edit", "class", "pivot"])
def test_each_command_refuses_a_config_of_another_task_and_names_the_command_for_it(
    path: str, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = read_run(path).task
    monkeypatch.setattr(sys, "argv", [f"train_{task}", "--config", path, "--dry-run"])
    monkeypatch.setattr(dry_run, "report", lambda run: f"report of {run.task}")
    status = entry.run(importlib.import_module(f"launch.train_{task}").main)
    printed = capsys.readouterr()
    if task == own:
        assert (status, printed.out, printed.err) == (0, f"report of {task}\n", "")
    else:
        (line,) = printed.err.splitlines()
        assert (status, printed.out) == (2, "") and Path(path).name in line
        assert line.endswith(f": task is {own}: start this config with launch/train_{own}.py")
        assert (CONFIGS.parent / "launch" / f"train_{own}.py").is_file()


@pytest.mark.parametrize("path", [T2I, CLASS], ids=["t2i", "class"])
def test_the_papers_run_fits_and_the_parts_add_up_to_its_peak(path: str) -> None:
    of = preflight(path)
    lines = {line[:42].strip(): line[42:].split() for line in tables(of).splitlines()}
    names = ["weights", "optimizer: fp32 weights, moments", "EMA", "gradients", "communication buffers"]
    parts = [[float(value) for value in lines[name]] for name in [*names, "activations: a step"]]
    peaks = [float(value) for value in lines["peak of a step"]]
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(
        peaks, abs=0.03
    )  # two decimals
    assert lines["fits in 80 less 3 for CUDA"] == ["yes"] * 3
    assert "the config's ZeRO-1 fits" in tables(of)


@pytest.mark.parametrize(
    ("path", "gib", "pack"), [(T2I, 24, "packing.tokens_per_pack="), (CLASS, 25, "packing.images_per_pack=")]
)
def test_what_does_not_fit_is_told_with_what_to_change_and_each_change_does_fit(
    path: str, gib: float, pack: str
) -> None:
    of = preflight(path)
    printed = tables(of, gpu_gib=gib)
    assert "ZeRO-1 does NOT fit; what would:" in printed
    lines = remedies(of, 8, gib)
    # Compiled layers, as the paper's runs have, are not for ZeRO-3.
    keys = [
        "engine.zero_stage=2",
        "engine.zero_stage=3 flow.compile=false",
        "flow.activation_checkpointing=true",
    ]
    assert [line.partition(":")[0] for line in lines[:3]] == keys
    assert lines[3].startswith(pack) and len(lines) == 4
    for line in lines:
        changes, _, rest = line.partition(": ")
        changed = preflight(path, *changes.split())
        assert f"{changed.plan.memory_gib(8):.1f} GiB" in rest and changed.plan.memory_gib(8) <= gib - 3
    assert changed.plan.num_tokens >= of.plan.num_tokens, "the smaller packs make up the same step"
    assert all(line in printed for line in lines)


def test_where_nothing_fits_more_gpus_are_asked_for() -> None:
    *_, last = remedies(preflight(), 1, 12)
    assert "no packing.tokens_per_pack does it alone" in last and "more GPUs" in last


def test_a_discriminator_has_no_zero_3_column_and_its_phases_are_listed() -> None:
    printed = tables(preflight(PIVOT), num_gpus=2)
    assert "ZeRO-2" in printed and "ZeRO-3" not in printed
    assert all(f"activations: {phase}" in printed for phase in PHASES)
    assert "discriminator heads" in printed and "frozen networks" in printed


def test_more_gpus_than_packs_are_refused() -> None:
    with pytest.raises(UserError, match=r"64 GPUs, but a step has 32 packs \(data.num_streams\)"):
        tables(preflight(), num_gpus=64)


def test_hours_follow_the_stated_mfu() -> None:
    of = preflight()
    flops = of.plan.step_flops / 8
    assert of.plan.compute_s(8, 0.2) == pytest.approx(flops / (0.2 * PEAK))
    assert "if the MFU is 0.2" in tables(of, mfu=0.2) and "an assumption" in tables(of, mfu=0.2)
    exchange_h = of.plan.exchange_s(8) * 200_000 / 3600
    assert of.plan.hours(8, 0.2) - exchange_h == pytest.approx(2 * (of.plan.hours(8, 0.4) - exchange_h))


def test_phases_of_a_stage_have_the_steps_that_its_config_gives_them() -> None:
    plan = preflight(PIVOT).plan
    assert plan.phase_steps == (430, 20, 50)
    assert plan.phases[0].flops < plan.phases[1].flops < plan.phases[2].flops
    total = sum(phase.flops * steps for phase, steps in zip(plan.phases, plan.phase_steps, strict=True))
    assert plan.run_flops == pytest.approx(2 * total)


def test_a_class_conditional_run_counts_images_imagenets_latents_and_both_exports() -> None:
    of = preflight(CLASS)
    printed = tables(of)
    assert "take 32 KiB, of ImageNet's 1,281,167 39 GiB, with their mirror images twice that" in printed
    assert "of a million 31 GiB, with their" in tables(preflight(CLASS, "generator.num_classes=44"))
    assert "32 packs of 32 images, 1,024 images, 262,144 tokens" in printed
    assert f"100,080 steps, {100_080 * 1024:,} images" in printed
    assert of.plan.step_flops == pytest.approx(7.29e14, rel=0.001)
    assert "export: 2.52 GiB each, 2 of them" in printed, "AutoGuidance's weak model and the last one"
    assert of.plan.export_bytes() == 4 * 675_629_696


def test_a_projection_is_trained_but_not_exported() -> None:
    plain, aligned = preflight(CLASS).plan, preflight(CLASS, "flow.align={layer: 8, width: 2048}").plan
    more = 2048 * (1152 + 2048 + 64) + 2048 + 2048 + 64
    assert aligned.num_trained - plain.num_trained == more
    assert aligned.export_bytes() == plain.export_bytes()
    assert aligned.checkpoint_bytes() - plain.checkpoint_bytes() == 16 * more
    assert aligned.activations > plain.activations and aligned.step_flops > plain.step_flops
    with pytest.raises(UserError, match=r"align\.layer 29: the backbone has 28 layers"):
        preflight(CLASS, "flow.align={layer: 29}")


def test_storage_is_the_manifests_where_the_shards_are_and_else_by_the_latents_shape(tmp_path: Path) -> None:
    assert "latents of a sample take 32 KiB, of a million 31 GiB" in tables(preflight())
    latents = dataclasses.replace(untrained_latents((4, 2, 2)), dtype="fp32")
    with ShardWriter(tmp_path, max_samples_per_shard=2, source="test", latent=latents) as writer:
        for key in ("a", "b", "c"):
            writer.write(Sample(key, {"latent": bytes(latents.num_bytes), "json": b'{"caption": "a"}'}))
    of = preflight(T2I, f"data.shards={tmp_path}")
    assert of.shape == (4, 2, 2) and not of.note
    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert f"{num_bytes / GIB:.2f} GiB, 3 samples" in tables(of)
    assert "unknown" in next(
        line for line in tables(preflight(PIVOT), num_gpus=2).splitlines() if "shards" in line
    )


def test_a_synthetic_pack_is_as_full_as_the_config_allows() -> None:
    for num_tokens in (60, 200, 1000):
        pack = latent_pack(
            (4, 4, 4), num_tokens=num_tokens, text_tokens=50, num_sources=1, num_draws=1, has_text_loss=False,
            text=SyntheticText(64), max_side=4, seed=0,
        )  # fmt: skip
        assert pack.attention.num_tokens == num_tokens
    assert max(SyntheticText(64).encode("a text é")) < 64


def test_sizes_of_a_stage_are_those_of_its_modules_and_need_no_weights() -> None:
    run = load(type(read_run(PIVOT)), PIVOT)
    size = stage_size(run.stage, run.pixels, run.engine.precision)
    fewer = dataclasses.replace(run.pixels, images_per_pack=run.pixels.images_per_pack // 2)
    half = stage_size(run.stage, fewer, run.engine.precision)
    for whole, part in zip(size.phases, half.phases, strict=True):
        # What does not grow with the images, in this small model 6 %: gradients of parameters under way.
        assert part.activations == pytest.approx(whole.activations / 2, rel=0.1)
    checkpointing = dataclasses.replace(run.stage, activation_checkpointing=True)
    less = stage_size(checkpointing, run.pixels, run.engine.precision)
    assert (
        less.phases[0].activations < size.phases[0].activations
        and less.phases[0].flops > size.phases[0].flops
    )


def test_of_a_state_each_stage_shards_what_it_is_named_after() -> None:
    run = load(GeneratorRun, T2I)
    states = [
        StateBytes.of(dataclasses.replace(run.engine, zero_stage=stage), 10**8, 10**7, 4, accumulates=True)
        for stage in (1, 2, 3)
    ]
    assert [state.optimizer for state in states] == [12 * 10**8 / 4] * 3
    assert [state.gradients for state in states] == [4e8, 1e8, 1e8]
    assert [state.weights for state in states] == [2.2e8, 2.2e8, 0.55e8]


def test_tensor_bytes_count_what_lives_at_the_same_time() -> None:
    with TensorBytes() as counted:
        kept = torch.zeros(1000)
        (kept + 1).sum()
        (kept + 2).view(10, 100).sum()
        assert counted.now == 4000
        assert counted.peak == 8000 + 4  # the sum is there before what it was taken of goes
        counted.reset_peak()
        torch.ones(100, 100) @ torch.ones(100, 100)
        assert counted.peak == 4000 + 3 * 40_000 and counted.flops == 2 * 100**3
    assert counted.now == 4000


def test_a_phases_resident_peak_is_its_own() -> None:
    if not reset_resident_peak():
        pytest.skip("this system does not forget a peak")
    before = resident_peak_bytes()
    big = bytearray(300 << 20)
    with_big = resident_peak_bytes()
    del big
    assert reset_resident_peak()
    after = resident_peak_bytes()
    assert with_big - before > 250 << 20 and with_big - after > 250 << 20


def test_errors_of_allocators_say_how_much_was_asked_for() -> None:
    cuda = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of"
    )
    assert asked_for(cuda) == "20.00 GiB more were asked for"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert asked_for(caught.value) == "1048576.00 GiB more were asked for"
    assert asked_for(RuntimeError("shapes do not fit")) is None


class Alone:
    """Ranks of one process, without a process group."""

    device = torch.device("cpu")

    def barrier(self) -> None:
        pass

    def gather(self, value: object) -> list[object]:
        return [value]


def test_a_phase_without_memory_is_named_and_others_keep_their_own_peaks() -> None:
    meter = Meter(Alone())  # type: ignore[arg-type]
    with pytest.raises(OutOfMemoryError, match=r"phase 'load': 1048576.00 GiB more"), meter:
        with meter("big"):
            torch.zeros(1000, 1000)
        with meter("small"):
            torch.zeros(10)
        with meter("load"):
            torch.empty(1 << 50, dtype=torch.uint8)
    assert [(peak.name, peak.tensors) for peak in meter.peaks] == [("big", 4_000_000), ("small", 40)]
