"""`make gpu` without a GPU: what it says, what it records, which kernels it knows, what its page holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from base.objective import LossOutput
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import page
from benchmarks.gpu.images import Images, stage_run
from benchmarks.gpu.kernels import kernel_class, shares
from benchmarks.gpu.recording import Recorder
from benchmarks.gpu.steps import PlainEngine
from benchmarks.throughput import LONGEST, Shape, packs
from engine.deepspeed_engine import Forward
from engine.engine_config import OptimizerConfig
from tokenizer.training.build_stage import autoencoder_config


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def training(**values: object) -> dict:
    found = {
        "kernel": "flash3", "tokens_per_s": 90_000.0, "images_per_s": 250.0, "tflops_per_s": 200.0, "mfu": 0.4,
        "peak_gib": 70.0, "shares": shares([("gemm", 3.0), ("copy", 1.0)]),
    }  # fmt: skip
    return {"group": "training", "name": "49,152 tokens, compiled, flash3", "values": {**found, **values}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_has_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    assert command.main() == 3
    out, err = capsys.readouterr()
    assert not out and err.startswith("no GPU: ") and err.count("\n") == 1


def test_a_measurement_that_fails_or_has_no_time_is_a_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    record = Recorder(tmp_path / "lines", "training", budget_s=100)

    def too_large() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 20 GiB")

    assert record.run("first", too_large, needs_s=1) is None
    assert record.run("second", lambda: {"mfu": 0.4}, needs_s=1) == {"mfu": 0.4}
    assert record.run("third", lambda: {"mfu": 0.4}, needs_s=1000) is None
    first, second, third = entries(tmp_path / "lines")
    assert first["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"
    assert second["values"]["mfu"] == 0.4 and second["values"]["took_s"] >= 0
    assert "needs about 1000" in third["skipped"]
    lines = page.falls_short([first, second | {"name": "x", "group": "y"}, third])
    assert any("first: error: OutOfMemoryError" in line for line in lines)
    assert any("third: skipped: " in line for line in lines)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90>>", "attention"),
        ("flash_fwd_splitkv_kernel", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("triton_red_fused__fused_rms_norm_add_cat_2", "norms and elementwise"),
        ("triton_tem_fused_mm_3", "matrix products"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>", "norms and elementwise"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("cudnn::ops::nchwToNhwcKernel", "copies"),
        ("sm80_xmma_fprop_implicit_gemm_bf16", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::mul", "norms and elementwise"),
        ("a kernel nobody knows", "other"),
    ],
)  # fmt: skip
def test_kernels_are_sorted_by_their_names(name: str, kind: str) -> None:
    assert kernel_class(name) == kind


def test_shares_of_all_classes_add_up_to_one() -> None:
    found = shares([("gemm", 2.0), ("gemm_2", 1.0), ("memcpy", 1.0)])
    assert found["matrix products"] == 0.75 and found["copies"] == 0.25 and found["communication"] == 0
    assert sum(found.values()) == pytest.approx(1)


def test_the_page_has_every_number_beside_its_goal() -> None:
    found = [training(), training(mfu=0.5)]
    text = page.render({"gpu": "NVIDIA H100 80GB HBM3"}, {"torch": "2.11.0"}, found)
    assert "| 49,152 tokens, compiled, flash3 | flash3 | 90,000 | 250 | 200.0 | 40.0% | 70.0 |" in text
    assert "MFU of the 0.5B mixture at 49,152 tokens a pack: 50.0%, goal 45.0%" in text
    assert page.falls_short(found) == [], "the best of all kernels counts"
    short = page.falls_short([training(tokens_per_s=50_000.0)])
    assert len(short) == 2 and "40.0%, goal 45.0%" in short[0] and "50,000, goal 78,000" in short[1]
    assert len(page.falls_short([])) == 2 and "not measured" in page.falls_short([])[0]


def test_the_ring_is_eight_packs_of_different_lengths_and_the_papers_step() -> None:
    ring = packs((64, 16, 16), 12_288, 8, 64)
    assert len({pack.attention.causal.k_lens for pack in ring}) == 8
    for pack in ring:
        assert 12_288 - LONGEST - 258 < pack.attention.num_tokens <= 12_288
    for tokens, num_packs in ((12_288, 4), (24_576, 2), (49_152, 1)):
        run = Shape().run(tokens, compiled=True)
        assert run.data.num_streams == num_packs and run.flow.compile
        assert (run.engine.precision, run.engine.zero_stage) == ("bf16", 1)


def test_the_engine_without_deepspeed_takes_the_steps_of_fp32_masters() -> None:
    """Against AdamW written out: three steps of two packs with clipping; bf16 weights follow their masters."""
    torch.manual_seed(0)
    module = nn.Linear(8, 4)
    master = nn.Linear(8, 4)
    master.load_state_dict(module.state_dict())
    x = torch.randn(6, 16, 8)

    def loss(batch, _step):
        return LossOutput(module(batch).float().square().sum())

    config = OptimizerConfig(lr=0.05, beta2=0.99, grad_clip=1.0)
    engine = PlainEngine(
        Forward(module, loss, "bf16"), config, precision="bf16", accumulation_steps=2, zero_stage=1
    )
    plain = torch.optim.AdamW(master.parameters(), lr=0.05, betas=(0.9, 0.99), weight_decay=0)
    for index, batch in enumerate(x):
        sums, _ = engine(batch, 0)
        engine.backward(sums[""], scale_wrt_gas=False)
        engine.step()
        master(batch).square().sum().backward()
        if index % 2:
            torch.nn.utils.clip_grad_norm_(master.parameters(), 1.0)
            plain.step()
            plain.zero_grad()
    assert module.weight.dtype == torch.bfloat16
    # Gradients of bf16 products (2^-8) in three steps of 0.05 each.
    torch.testing.assert_close(module.weight.float(), master.weight, rtol=0.02, atol=0.01)
    assert not torch.equal(module.weight, nn.Linear(8, 4).weight.bfloat16())


def test_later_stages_start_from_the_shape_of_the_earlier_one(tmp_path: Path) -> None:
    """The paper's configs, whose exports are not there: nothing but config.json is written."""
    stages = ("pivot", "bridge", "decoder")
    shapes = {name: autoencoder_config(stage_run(Images(), name, tmp_path).stage) for name in stages}
    assert shapes["pivot"].bridge is None and shapes["bridge"].bridge is not None
    assert shapes["decoder"] == shapes["bridge"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_every_measurement_runs_at_a_small_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for busy cores take minutes
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--small", "--out", str(tmp_path)])
    assert command.main() == 0
    found = json.loads((tmp_path / "gpu_cpu.json").read_text())["measurements"]
    groups = {entry["group"]: [] for entry in found}
    for entry in found:
        assert "values" in entry, entry
        groups[entry["group"]].append(entry)
    assert [len(groups[group]) for group in command.GROUPS] == [1, 2, 3, 2, 1]
    for entry in groups["training"]:
        values = entry["values"]
        assert values["tokens_per_s"] > 0 and values["different_packs"] == 8
        assert values["shares"]["matrix products"] > 0 and sum(values["shares"].values()) == pytest.approx(1)
    phases = [len(entry["values"]["phases"]) for entry in groups["tokenizer"]]
    assert phases == [3, 1, 3], "with and without the adversary"
    assert "what falls short" in capfd.readouterr().out
