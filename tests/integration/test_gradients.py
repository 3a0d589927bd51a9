"""What the optimizers see is the gradient of the mean over all packs of all ranks, whatever shards and accumulates.

The oracle is plain PyTorch: autograd in fp64 on the union of the packs, and one AdamW on whole tensors.
"""

import collections
import importlib.util
from pathlib import Path

import pytest
import torch

from engine.schedule import build_optimizer

SCRIPT = Path(__file__).parent / "scripts" / "gradients.py"
SPEC = importlib.util.spec_from_file_location("gradients", SCRIPT)
gradients = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gradients)

TOLERANCE = {"fp32": 1e-5, "bf16_autocast": 4e-2, "bf16": 4e-2}
"""Of a parameter's gradient, beside the sum of the norms of the packs'. fp32: 6e-8 a rounding, of hundreds; bf16: each
of about ten products in a row rounds by 4e-3."""
PROBE = {"fp32": 1e-6, "bf16_autocast": 1e-6, "bf16": 4e-3}
"""Of a gradient that no product rounds: one cast to bf16. ZeRO-2 and 3 divide by the ranks in bf16: one more."""
WAITS = {
    ("bf16", 1): (1, 1),
    ("bf16", 2): (4, 2),
    ("bf16", 3): (1, 0),
    ("", 1): (3, 1),
    ("", 2): (3, 1),
    ("", 3): (1, 0),
}
"""Of the host for its device in a step of the main engine, which clips, and of the adversary's, by precision (empty:
fp32 weights) and ZeRO stage: whether the gradients are finite is read once or twice, and once more a group to clip.
docs/recipes.md names them."""


@pytest.fixture
def check(start_ranks, tmp_path):
    """check(number of ranks, cases) runs and compares all of them."""

    def run(ranks, cases):
        output = tmp_path / "log"
        processes = start_ranks("gradients.py", ["--root", tmp_path, *cases], ranks, output)
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * ranks, output.read_text()[-8000:]
        for case in cases:
            assert_case(case, torch.load(tmp_path / f"{case}:{ranks}.pt", weights_only=False))

    return run


def test_the_paper_s_accumulation_in_bf16_under_zero_1(check):
    """Four packs a rank, as t2i_cc12m has on 8 GPUs; buckets smaller and larger than parameters."""
    check(2, ["bf16:1:8:30", "bf16:1:7:1000", "bf16:2:4:30", "fp32:1:4:30"])


def test_ranks_that_repeat_a_pack_do_not_count_it_twice(check):
    check(3, ["bf16:1:4:30", "bf16:1:5:78"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_precision_stage_and_number_of_packs(check, ranks):
    check(
        ranks,
        [
            f"{precision}:{zero}:{streams}:{bucket}"
            for precision in TOLERANCE
            for zero in (1, 2, 3)
            for streams, bucket in zip(
                {1: range(1, 6), 2: (2, 3, 6, 8, 9), 3: (3, 4, 8, 10, 15)}[ranks],
                (30, 1000, 78, 1000, 1000),
                strict=True,
            )
        ],
    )


def assert_case(case, found, on_cpu=True):
    """`on_cpu`: elsewhere the objective and ZeRO-3 wait in ways that are not counted alike."""
    precision, zero, streams, _ = case.split(":")
    replays = {
        name: Replay(name, precision, module)
        for name, module in (("main", gradients.Net()), ("adversary", torch.nn.Linear(gradients.WIDTH, 1)))
        if name in found["masters"]
    }
    num_skipped = 0
    for step, row in enumerate(found["steps"]):
        where = (case, step, row["kind"])
        num_skipped += row["kind"] in ("nonfinite", "spike")
        assert set(row["skipped"].values()) == {num_skipped}, where
        if step > 1 and on_cpu:  # at first ZeRO-3 compares its trace between ranks
            waits = sum(WAITS["bf16" if precision == "bf16" else "", int(zero)])
            if row["kind"] in ("nonfinite", "spike"):
                waits = min(waits, 1 + ("adversary" in found["masters"]))
            assert row["waits"] - 1 <= waits, (*where, row["waits"])  # engine.on_loss_spike reads the loss
        if row["kind"] in ("nonfinite", "spike"):
            assert not row["is_taken"] and not row["seen"], where
            continue
        assert row["is_taken"], where
        expected, sizes, logged = oracle(row["before"], gradients.packs(step, int(streams)))
        assert row["means"] == [pytest.approx(logged["loss"], rel=TOLERANCE[precision])], where
        assert ("text_loss" in row["logged"]) == ("text_loss" in logged), where
        for name, value in logged.items():
            if name != "adversary_loss" or "adversary" in replays:
                assert row["logged"][name] == pytest.approx(value, rel=TOLERANCE[precision]), (*where, name)
        for name, replay in replays.items():
            norm = torch.stack([g.norm() for g in expected[name].values()]).norm().item()
            slack = TOLERANCE[precision] * torch.stack(list(sizes[name].values())).norm().item()
            assert row["norms"][name] == pytest.approx(norm, abs=slack), where
            clip = gradients.CLIP if name == "main" else 0.0
            clipped = clip / (row["norms"][name] + 1e-6) if 0 < clip < row["norms"][name] else 1.0
            assert name == "adversary" or (clipped < 1) == (row["kind"] == "clipped"), where
            for parameter, gradient in expected[name].items():
                seen = row["seen"][name][parameter].double()
                error = (seen - clipped * gradient).norm() / clipped
                assert error <= TOLERANCE[precision] * sizes[name][parameter] + 1e-9, (
                    *where,
                    parameter,
                    error,
                )
                if parameter == "probe":
                    rtol = PROBE[precision] * (1 if zero == "1" else 2)
                    torch.testing.assert_close(seen, clipped * gradient, rtol=rtol, atol=1e-9)
            replay.step(row["seen"][name])
    for name, replay in replays.items():
        replay.assert_ends_with(found["masters"][name])


def oracle(before, packs):
    """Gradients of both losses by parameter, the sum of the norms of what each pack contributes to them, and the means
    that the log shows.
    """
    net = gradients.Net().double()
    critic = torch.nn.Linear(gradients.WIDTH, 1).double()
    load(net, before["main"])
    load(critic, before.get("adversary", {}))
    rows = sum(len(pack.x) for pack in packs)
    few = max(sum(pack.num_text for pack in packs), 1)
    gradients_of, sizes = {"main": {}, "adversary": {}}, {"main": {}, "adversary": {}}
    logged = collections.Counter()
    for pack in packs:
        rec, further, y = gradients.loss_sums(net, pack.to(torch.float64))
        losses = {
            "main": (net, rec / rows + 0.25 * further / few),
            "adversary": (critic, gradients.critic_sum(critic, y.detach()) / rows),
        }
        logged["loss"] += float(rec.detach()) / rows
        logged["rec"] += float(rec.detach()) / rows
        if any(each.num_text for each in packs):
            logged["text_loss"] += float(further.detach()) / few
        logged["adversary_loss"] += float(losses["adversary"][1].detach())
        for name, (module, loss) in losses.items():
            trained = {key: value for key, value in module.named_parameters() if value.requires_grad}
            for key, part in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
                gradients_of[name][key] = gradients_of[name].get(key, 0) + part
                sizes[name][key] = sizes[name].get(key, 0) + part.norm()
    return gradients_of, sizes, logged


@torch.no_grad()
def load(module, values):
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.copy_(values[name])


class Replay:
    """AdamW on whole fp32 tensors, from the initial weights, with the gradients that were seen at the steps taken."""

    def __init__(self, name, precision, module):
        start = gradients.Toy(True)
        load(module, dict((start.model if name == "main" else start.critic).named_parameters()))
        if precision == "bf16":  # the masters start from the model's weights
            module.bfloat16().float()
        self.module = module
        config = gradients.OPTIMIZER if name == "main" else gradients.ADVERSARY_OPTIMIZER
        self.optimizer = build_optimizer(config, module)

    def step(self, seen):
        for name, parameter in self.module.named_parameters():
            parameter.grad = seen[name] if parameter.requires_grad else None
        self.optimizer.step()

    def assert_ends_with(self, masters):
        expected = {key: value for key, value in self.module.named_parameters() if value.requires_grad}
        assert expected.keys() == masters.keys()
        for name, values in masters.items():
            # The same fused kernel, over other vectors of it: a few roundings of fp32.
            torch.testing.assert_close(values, expected[name].detach(), rtol=1e-5, atol=1e-6)
