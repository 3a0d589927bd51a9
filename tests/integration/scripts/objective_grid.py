"""Three steps of every objective under every ZeRO stage, on 1 to 3 ranks, against plain PyTorch on the union of the
packs. The first rank prints one JSON line for each case and stage; `compare` names its entries.

The first argument is the optimizer. `adamw` has a large epsilon, so that an update is nearly proportional to the
gradient. `sgd` makes it proportional, and the gradient is clipped in some of the steps. The plain side counts the units
of each loss itself, from the sizes that the packs were made with.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from data.packs.class_batch import ClassBatch
from data.packs.packed_batch import ImageSplit, TextSplit, build_packed_batch
from data.samples.images import PixelBatch
from data.shards import LatentInfo
from engine import deepspeed_engine, distributed
from engine.engine_config import EngineConfig, OptimizerConfig
from engine.metric_window import Window
from engine.spans import Spans
from engine.step import Stepper
from generator.class_conditional.config import AlignConfig, ClassFlowConfig, DitConfig, WideHeadConfig
from generator.class_conditional.objective import build_class_objective
from generator.config import DdtHeadConfig, FlowConfig, GeneratorConfig
from generator.objective import build_objective
from helpers.generators import BACKBONE
from helpers.texts import Letters
from tokenizer.config import AutoencoderConfig, BridgeConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.rpiae import Autoencoder
from tokenizer.training import losses
from tokenizer.training.build_stage import build_stage
from tokenizer.training.discriminator import DiscriminatorConfig
from tokenizer.training.stage_config import PerceptualConfig, StageConfig

SHAPE = (4, 2, 3)
LATENTS = LatentInfo("fp32", SHAPE, (0.0,) * 4, (1.0,) * 4, "autoencoder", "text")
OPTIMIZER = OptimizerConfig(lr=0.1, eps=1.0, weight_decay=0.1, warmup_steps=2)
ADVERSARY_OPTIMIZER = dataclasses.replace(OPTIMIZER, lr=0.04)
STEPS, PACKS = 3, 3
WINDOW_ENDS = (0, 2)
"""Steps after which the log is written."""
NOT_COMPARED = {"step_s", "tflops_per_s"}
ADVERSARY_START = 2
"""The step, inside a window, from which the discriminator is trained and is part of the loss."""
TEXT_WEIGHT, ALIGN_WEIGHT = 0.3, 0.6


@dataclass(frozen=True)
class Sized:
    """A micro-batch, and what its maker knows of its size."""

    batch: Any
    units: int
    """Noisy latent tokens or images."""
    texts: int = 0
    """Text tokens that are predicted."""


def image(seed, noisy):
    return ImageSplit(torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)), noisy)


def packs(step, has_source, marks_text):
    """Of unequal sizes, and with unequal numbers of texts that are predicted: the second pack has none."""
    found = []
    for number in range(PACKS):
        seed = 10 * step + number
        predicts = marks_text and number != 1
        samples, texts = [], 0
        for index in range(1 + (step + number) % 2):
            source = [image(seed + 50, False)] if has_source else []
            ids = [26, *range(3 + index), 27]
            texts += (len(ids) - 1) * predicts
            samples.append([*source, TextSplit(ids, loss=predicts), image(seed + index, True)])
        batch = build_packed_batch(
            samples,
            vision_start_id=28,
            vision_end_id=29,
            max_side=4,
            seed=seed,
            sample_ids=[str(index) for index in range(len(samples))],
        )
        found.append(Sized(batch, len(samples) * SHAPE[1] * SHAPE[2], texts))
    return found


def flow_cases():
    for task, text, checkpointing, head in itertools.product(
        ("t2i", "edit"), ("none", "tied", "own"), (False, True), (False, True)
    ):
        if task == "t2i" and text != "none":
            continue
        config = GeneratorConfig(
            BACKBONE,
            max_side=4,
            head=DdtHeadConfig(width=32, num_layers=1, num_heads=4) if head else None,
            text_output=text != "none",
            tied_text_output=text != "own",
        )
        flow = FlowConfig(
            activation_checkpointing=checkpointing, text_loss_weight=0.0 if text == "none" else TEXT_WEIGHT
        )
        objective = build_objective(task, config, flow, LATENTS, Letters(), seed=0)
        with torch.no_grad():  # it starts at zero, and with it the gradients of all before it
            objective.model.latent_out.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        name = f"{task} text={text} checkpointing={checkpointing} head={head}"
        yield name, objective, [packs(step, task == "edit", text != "none") for step in range(STEPS)]


def class_cases():
    for checkpointing, head, aligns in (
        (False, False, False),
        (False, True, False),
        (True, False, False),
        (True, True, False),
        (False, False, True),
    ):
        config = DitConfig(num_classes=5, width=32, num_layers=2, num_heads=4)
        if head:
            config = dataclasses.replace(config, head=WideHeadConfig(48, 1, 4))
        flow = ClassFlowConfig(
            activation_checkpointing=checkpointing,
            align=AlignConfig(layer=1, weight=ALIGN_WEIGHT, width=48) if aligns else None,
        )
        objective = build_class_objective(config, flow, LATENTS, seed=0)
        steps = []
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            sizes = [2 + (step + number) % 3 for number in range(PACKS)]
            steps.append(
                [
                    Sized(
                        ClassBatch(
                            torch.randn((size, *SHAPE), generator=generator),
                            torch.arange(size),
                            tuple(map(str, range(size))),
                            10 * step + number,
                        ),
                        size,
                    )
                    for number, size in enumerate(sizes)
                ]
            )
        yield f"class checkpointing={checkpointing} head={head} align={aligns}", objective, steps


def stage_cases():
    """With an adversary there is no ZeRO-3."""
    vit = RepresentationConfig(
        name="vit_tiny_patch16_224",
        input_px=32,
        weights="random",
        overrides={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    )
    plain = AutoencoderConfig(
        vit, PixelDecoderConfig(width=64, layers=2, heads=4, mlp_width=64, patch_px=8), 32
    )
    bridged = dataclasses.replace(plain, bridge=BridgeConfig(6, decoder_layers=1, num_heads=4))
    common = {
        "perceptual": PerceptualConfig("representation", representation=vit, depths=(0, 1)),
        "adaptive_pivot_start_step": 1,
    }
    adversary = {
        "discriminator": DiscriminatorConfig(vit, depths=(0, 1), kernel_size=3),
        "gan_update_start_step": ADVERSARY_START,
        "gan_loss_start_step": ADVERSARY_START,
    }
    new = {"pivot": plain, "joint": bridged}
    for stage, checkpointing, adaptive in itertools.product(new, (False, True), (False, True)):
        config = StageConfig(
            stage=stage,
            autoencoder=new[stage],
            activation_checkpointing=checkpointing,
            adaptive_pivot=adaptive,
            **common,
        )
        name = f"{stage} checkpointing={checkpointing} adaptive={adaptive}"
        yield name, build_stage(config), pictures()
    for stage in new:
        config = StageConfig(stage=stage, autoencoder=new[stage], **common, **adversary)
        yield f"{stage} with an adversary", build_stage(config), pictures()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Autoencoder(bridged).save(folder)
        yield "bridge", build_stage(StageConfig(stage="bridge", init_from=folder, **common)), pictures()
        config = StageConfig(stage="decoder", init_from=folder, **common, **adversary)
        yield "decoder with an adversary", build_stage(config), pictures()


def pictures():
    """Packs of different numbers of random images."""
    steps = []
    for step in range(STEPS):
        steps.append([])
        for number in range(PACKS):
            size, seed = 2 + (step + number) % 2, 10 * step + number
            generator = torch.Generator().manual_seed(seed)
            pixels = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
            keys = tuple(map(str, range(size)))
            steps[-1].append(Sized(PixelBatch(pixels, keys, seed, tuple({} for _ in keys)), size))
    return steps


@dataclass(frozen=True)
class Taken:
    """What the steps left: weights by name (`adversary.` before the discriminator's), gradient norms of each engine in
    the order of the steps, and the metrics of both windows."""

    weights: dict[str, torch.Tensor]
    norms: dict[str, list[float]]
    windows: list[dict[str, float]]


def modules(objective):
    found = {"main": objective.model, "adversary": objective.adversary}
    return {name: module for name, module in found.items() if module is not None}


def weights(objective):
    return {
        ("" if name == "main" else "adversary.") + key: value.detach().clone()
        for name, module in modules(objective).items()
        for key, value in module.named_parameters()
    }


class Plain:
    """Training in plain PyTorch: the union of the packs, one step of a plain optimizer."""

    def __init__(self, objective, configs, uses_sgd):
        self.objective, self.configs = objective, configs
        self.trained, self.optimizers, self.norms = {}, {}, {}
        for name, module in modules(objective).items():
            trained = [p for p in module.parameters() if p.requires_grad]
            self.trained[name], self.norms[name] = trained, []
            self.optimizers[name] = torch.optim.SGD(trained) if uses_sgd else adamw(trained, configs[name])
        self.windows = []

    def take(self, steps):
        sums, counts = Counter(), Counter()
        for step, sized in enumerate(steps):
            self.step(step, sized, sums, counts)
            if step in WINDOW_ENDS:
                self.windows.append({name: value / counts[unit_of(name)] for name, value in sums.items()})
                sums.clear()
                counts.clear()
        return Taken(weights(self.objective), self.norms, self.windows)

    def step(self, step, sized, sums, counts):
        has_adversary = "adversary" in self.trained and step >= ADVERSARY_START
        units, texts = sum(each.units for each in sized), sum(each.texts for each in sized)
        counts.update({"": units, "text": texts, "adversary": units * has_adversary})
        for each in sized:
            output = self.objective.loss(each.batch, step)
            loss = output.loss_sum / units
            add(sums, "", output)
            if texts:
                text = output.further["text"].loss_sum
                loss = loss + TEXT_WEIGHT * text / texts
                sums["text_loss"] += float(text.detach())
            loss.backward()
            if has_adversary:
                output = self.objective.adversary_loss(output.adversary_batch, step)
                add(sums, "adversary_", output)
                (output.loss_sum / units).backward()
        for name in self.trained if has_adversary else ["main"]:
            self.update(name, step)

    def update(self, name, step):
        config, optimizer = self.configs[name], self.optimizers[name]
        gradients = [p.grad for p in self.trained[name] if p.grad is not None]
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        self.norms[name].append(norm)
        if 0 < config.grad_clip < norm:
            for gradient in gradients:
                gradient.mul_(config.grad_clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min((step + 1) / config.warmup_steps, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def adamw(trained, config):
    groups = [
        {
            "params": [p for p in trained if (p.ndim >= 2) == decays],
            "weight_decay": config.weight_decay * decays,
        }
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)


def add(sums, prefix, output):
    for name, value in {"loss": output.loss_sum, **output.metrics}.items():
        sums[prefix + name] += float(value.detach())


def unit_of(name):
    """The loss whose units a metric is a mean over."""
    first, _, rest = name.partition("_")
    return first if rest and first in ("text", "adversary") else ""


def with_the_engine(objective, steps, stage, ranks, configs):
    config = EngineConfig(
        STEPS, configs["main"], adversary_optimizer=configs["adversary"], zero_stage=stage, ema_decay=0.0
    )
    stepper = Stepper(objective, config, ranks, Spans(ranks.device), PACKS)
    window, windows = Window(ranks, None), []
    norms = {name: [] for name in stepper.engines}
    for step, sized in enumerate(steps):
        mine = [each.batch for each in sized[ranks.rank :: ranks.world]]
        outcome = stepper.take(mine, step, window, lambda _: False)
        assert outcome.is_taken
        window.close_step(outcome.counts, {}, 1.0)
        if step in WINDOW_ENDS:
            windows.append(window.read())
        for name in norms if step >= ADVERSARY_START else ["main"]:
            norms[name].append(float(stepper.engines[name].get_global_grad_norm()))
    with contextlib.ExitStack() as stack:
        for engine in stepper.engines.values():
            stack.enter_context(deepspeed_engine.gathered(engine))
        taken = Taken(weights(objective), norms, windows)
    for engine in stepper.engines.values():
        engine.destroy()
    return taken


def clips(norms):
    """Limits by engine, from the norms of steps that nothing clips: one of the main engine's first two exceeds its
    limit and the other one does not; the adversary's only one does."""
    limits = {"main": math.sqrt(norms["main"][0] * norms["main"][1])}
    return limits | {name: 0.9 * values[0] for name, values in norms.items() if name != "main"}


def compare(start, plain, found, configs):
    """How far the results lie apart. `moved`: the largest change of a weight; `off`: the largest difference of one;
    `change_off`: of a parameter's change, by the norm of the change; `norm_off`, `metric_off`: relative; `clipped`:
    whether each step of the main engine was; `metrics`: their names in the last window."""
    change_off, off = [], []
    for key, before in start.items():
        change, error = plain.weights[key] - before, found.weights[key] - plain.weights[key]
        rounding = 2**-24 * STEPS * float(before.norm())  # of the weight itself, to which the change is added
        size = float(change.norm()) or 1.0
        change_off.append((float(error.norm()) - rounding) / size)
        off.append(float(error.abs().max()))
    norm_off = [
        abs(norm - got) / norm
        for name, norms in plain.norms.items()
        for norm, got in zip(norms, found.norms[name], strict=True)
    ]
    metric_off = []
    for wanted, got in zip(plain.windows, found.windows, strict=True):
        assert got.keys() - wanted.keys() <= NOT_COMPARED, got.keys()
        metric_off += [abs(value - got[name]) / max(abs(value), 1e-3) for name, value in wanted.items()]
    return {
        "moved": max(float((plain.weights[key] - start[key]).abs().max()) for key in start),
        "off": worst(off),
        "change_off": worst(change_off),
        "norm_off": worst(norm_off),
        "metric_off": worst(metric_off),
        "clipped": [norm > configs["main"].grad_clip > 0 for norm in plain.norms["main"]],
        "metrics": sorted(plain.windows[-1]),
    }


def worst(values):
    return max(math.inf if math.isnan(value) else value for value in values)


def is_refused_under_3(objective, name):
    """The adaptive pivot weight differentiates towards inner tensors: launch/runs/configs.py says more."""
    return objective.adversary is not None or name.endswith("adaptive=True")


def main():
    uses_sgd, asked = sys.argv[1] == "sgd", sys.argv[2:]  # parts of the cases' names; none: all cases
    ranks = distributed.start()
    # To 8 bits, one rounding of fp32 would become another pixel.
    losses.quantise = lambda pixels: pixels.clamp(0, 1)
    if uses_sgd:
        deepspeed_engine.build_optimizer = lambda config, module: torch.optim.SGD(
            [p for p in module.parameters() if p.requires_grad], lr=config.lr
        )
    for name, objective, steps in itertools.chain(flow_cases(), class_cases(), stage_cases()):
        if asked and not any(part in name for part in asked):
            continue
        start = weights(objective)
        configs = {"main": OPTIMIZER, "adversary": ADVERSARY_OPTIMIZER}
        if uses_sgd:
            free = Plain(copy.deepcopy(objective), configs, uses_sgd).take(steps)
            for engine, clip in clips(free.norms).items():
                configs[engine] = dataclasses.replace(configs[engine], grad_clip=clip)
        plain = Plain(copy.deepcopy(objective), configs, uses_sgd).take(steps)
        for stage in (1, 2) if is_refused_under_3(objective, name) else (1, 2, 3):
            found = with_the_engine(copy.deepcopy(objective), steps, stage, ranks, configs)
            if ranks.is_first:
                line = {"name": name, "stage": stage, **compare(start, plain, found, configs)}
                print(json.dumps(line), flush=True)
    distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
