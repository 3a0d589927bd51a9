"""A whole training against plain PyTorch: every logged number, both averages, the steps that are saved and exported."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "scripts" / "toy_train.py"
SPEC = importlib.util.spec_from_file_location("toy_train", SCRIPT)
toy_train = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(toy_train)

STEPS, STREAMS, POISONED = 9, 3, 5
LR, CLIP, WARMUP, TEXT_WEIGHT, ADVERSARY_START = 1e-2, 1.0, 2, 0.1, 2
DECAYS = (0.9, 0.15)
CLOSE = 1e-4
"""AdamW divides by the gradient's size: fp32 roundings of 6e-8 of small gradients, through 9 steps."""


def rate(step):
    """Linear warm-up to LR, then a cosine to 0 at the last step."""
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    return LR * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def plain_training():
    """Rows of the log for each step, and the weights of both averages after each step."""
    objective = toy_train.ToyObjective("a", True, -1, 0, 8, lambda name: None)
    source = toy_train.ToySource(STREAMS, 0, 1, POISONED, -1, lambda name: None)
    model, critic = objective.model, objective.critic
    main, adversary = (
        torch.optim.AdamW(m.parameters(), betas=(0.9, 0.95), weight_decay=0.0) for m in (model, critic)
    )
    averages = [{key: value.clone() for key, value in model.state_dict().items()} for _ in DECAYS]
    rows, history = [], []
    for step in range(STEPS):
        batches = source.next_step()
        is_adversarial = step >= ADVERSARY_START
        units = sum(len(batch.x) for batch in batches)
        few = sum(int((batch.x[:, 0] > 0).sum()) for batch in batches)
        row = {"loss": 0.0, "rec": 0.0, "positive_loss": 0.0, "adversary_loss": 0.0}
        for batch in batches:
            output = objective.loss(batch, step)
            further = output.further["positive"].loss_sum
            (output.loss_sum / units + TEXT_WEIGHT * further / few).backward()
            row["loss"] += float(output.loss_sum.detach()) / units
            row["rec"] += float(output.metrics["rec"]) / units
            row["positive_loss"] += float(further.detach()) / few
            if is_adversarial:
                loss = objective.adversary_loss(output.adversary_batch, step).loss_sum / units
                loss.backward()
                row["adversary_loss"] += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        row |= {"grad_norm": norm, "lr": rate(step), "samples": float(STREAMS)}
        row["nonfinite_steps"] = float(step >= POISONED)
        if step != POISONED:
            main.param_groups[0]["lr"], adversary.param_groups[0]["lr"] = rate(step), LR
            main.step()
            if is_adversarial:
                adversary.step()
            for decay, average in zip(DECAYS, averages, strict=True):
                d = min(decay, (1 + step) / (10 + step))
                for key, value in model.state_dict().items():
                    average[key] = d * average[key] + (1 - d) * value
        main.zero_grad()
        adversary.zero_grad()
        rows.append(row if is_adversarial else {k: v for k, v in row.items() if k != "adversary_loss"})
        history.append([dict(average) for average in averages])
    return rows, history


def assert_weights(folder, expected):
    found = torch.load(folder / "model.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=CLOSE, atol=CLOSE * LR)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_training_is_that_of_plain_pytorch(toy, tmp_path, ranks):
    """Three packs, a further term, a discriminator that begins later, a schedule, clipping, a step that is refused."""
    options = ["--steps", STEPS, "--streams", STREAMS, "--poison-step", POISONED, "--export-at", 4, 7]
    options += ["--ema", *DECAYS, "--checkpoint-every", 4]
    result = toy(tmp_path / "run", *options, ranks=ranks)
    assert result.returncode == 0, result.output
    rows, history = plain_training()
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    assert any(row["grad_norm"] > CLIP for row in rows)
    for step, (row, found) in enumerate(zip(rows, logged, strict=True)):
        for name in ("lr", "samples", "nonfinite_steps") if step == POISONED else row:
            assert found[name] == pytest.approx(row[name], rel=CLOSE), (step, name)
        assert ("adversary_loss" in found) == (step >= ADVERSARY_START)
    assert_weights(tmp_path / "run/export", history[-1][0])
    assert_weights(tmp_path / "run" / f"export_ema_{DECAYS[1]}", history[-1][1])
    for step in (4, 7):
        assert_weights(tmp_path / "run" / f"export_step_{step:08d}", history[step - 1][0])
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir())
    assert saved == ["step_00000008", "step_00000009"]
