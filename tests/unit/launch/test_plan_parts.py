"""The estimate of a run, part by part: what is added raises a number by exactly its bytes or seconds.

Totals of a large run hide a missing part. So every test here adds one part to any plan and looks at the difference.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.engine_config import EngineConfig
from engine.memory import StateBytes
from engine.schedule import OptimizerConfig
from launch.runs.tasks import read_run
from launch.sizing.estimate import PEAK, Plan
from launch.sizing.report import plan_run
from launch.sizing.stage_size import PhaseSize
from launch.sizing.step_time import H100, REACHED, Work
from tokenizer.representation import Representation, RepresentationConfig

CONFIGS = Path(__file__).parents[3] / "configs"
T2I, EDIT = "generator/t2i_cc12m", "generator/edit_omniedit"
CLASS, PIVOT = "generator/class/rpiae64_80", "quickstart/pivot"
MEMORY = REACHED.memory * H100.memory_bytes_per_s
PRODUCTS, PAIRS = REACHED.products * H100.peak_flops, REACHED.attention * H100.peak_flops
WEIGHT_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2}
HUGE = 10**13
"""Activations beside which the end of a backward pass is the fullest moment, not the optimizer's step."""


@functools.lru_cache
def plan(path: str, *overrides: str) -> Plan:
    return plan_run(read_run(str(CONFIGS / f"{path}.yaml"), overrides)).plan


def engine(**changes: Any) -> EngineConfig:
    return dataclasses.replace(EngineConfig(100, OptimizerConfig(1e-4), ema_decay=0.0), **changes)


def made(**changes: Any) -> Plan:
    """A plan of arbitrary numbers: three phases, the last two of which train a discriminator."""
    phases = tuple(
        PhaseSize(str(index), HUGE + index, 1e12 * (index + 1), updates_adversary=index > 0)
        for index in range(3)
    )
    works = tuple(Work(1e14 * (index + 1), 1e13, 1e11, 700) for index in range(3))
    numbers: dict[str, Any] = {
        "trained": {"encoder": 10**8, "decoder": 3 * 10**7},
        "frozen": {"encoder": 10**7, "decoder": 0},
        "num_adversary": 10**6,
        "helper_bytes": 10**8,
        "phases": phases,
        "phase_steps": (50, 30, 20),
        "works": works,
        "num_tokens": 1000,
        "num_images": 10,
        "pack_units": 4,
        "engine": engine(),
        "num_streams": 32,
    }
    return Plan(**(numbers | changes))


engines = st.builds(
    engine,
    precision=st.sampled_from(sorted(WEIGHT_BYTES)),
    zero_stage=st.sampled_from([1, 2, 3]),
    ema_decay=st.sampled_from([0.0, 0.99, (0.99, 0.999)]),
)
plans = st.builds(
    made,
    engine=engines,
    num_streams=st.integers(1, 100),
    num_adversary=st.sampled_from([0, 10**6]),
    helper_bytes=st.integers(0, 10**10),
    recomputing=st.sampled_from([1.0, 4 / 3]),
)
gpus = st.integers(1, 64)
EACH = settings(max_examples=100, deadline=None)


@pytest.mark.parametrize("num_streams", range(1, 41))
def test_the_fullest_rank_has_the_packs_that_the_first_rank_is_dealt(num_streams: int) -> None:
    """Rank r owns streams r, r + R, r + 2R, ... (docs/architecture.md), and the others wait for the fullest one."""
    of = made(num_streams=num_streams)
    for num_gpus in range(1, num_streams + 1):
        num_packs = max(len(range(rank, num_streams, num_gpus)) for rank in range(num_gpus))
        assert of.packs(num_gpus) == num_packs
        assert of.step_time(num_gpus).compute_s == pytest.approx(
            num_packs * of.step_time(num_streams).compute_s
        )
        mfu_s = of.phases[-1].flops * num_packs / (0.4 * PEAK)
        assert of.compute_s(num_gpus, 0.4) == pytest.approx(mfu_s)


@EACH
@given(plans, gpus, st.integers(1, 10**11))
def test_frozen_networks_beside_the_model_raise_every_peak_by_their_size(
    of: Plan, num_gpus: int, more: int
) -> None:
    larger = dataclasses.replace(of, helper_bytes=of.helper_bytes + more)
    for phase in (*of.phases, None):
        assert larger.peak(num_gpus, phase) - of.peak(num_gpus, phase) == pytest.approx(more, abs=0.1)
    assert larger.memory_gib(num_gpus) - of.memory_gib(num_gpus) == pytest.approx(more / 2**30)


@EACH
@given(plans, gpus, st.integers(1, 10**8))
def test_frozen_parameters_of_the_model_raise_every_peak_by_their_weights(
    of: Plan, num_gpus: int, more: int
) -> None:
    """ZeRO-3 shards them, and gathers them, too: all of these plans' weights are live at once."""
    larger = dataclasses.replace(of, frozen=of.frozen | {"decoder": more})
    weight = WEIGHT_BYTES[of.engine.precision]
    expected: float = weight * more
    if of.engine.zero_stage == 3:
        expected = weight * more / num_gpus + (weight * more if num_gpus > 1 else 0)
    # The discriminator's own pass gathers none of the model's weights.
    if of.engine.zero_stage < 3:
        assert larger.peak(num_gpus) - of.peak(num_gpus) == pytest.approx(expected, abs=0.1)
    first = of.phases[0]
    assert larger.peak(num_gpus, first) - of.peak(num_gpus, first) == pytest.approx(expected, abs=0.1)
    assert larger.checkpoint_bytes() == of.checkpoint_bytes(), "a checkpoint holds what is trained"
    assert larger.export_bytes() - of.export_bytes() == more * (2 if of.engine.precision == "bf16" else 4)
    assert larger.step_time(num_gpus) == of.step_time(num_gpus)


@EACH
@given(plans, gpus)
def test_a_further_average_raises_memory_checkpoint_and_step_by_its_own(of: Plan, num_gpus: int) -> None:
    """4 bytes a trained parameter, sharded in memory; the step reads both, and writes one: 12 bytes of a shard."""
    decays = (*of.engine.ema_decays, 0.5)
    more = dataclasses.replace(of, engine=dataclasses.replace(of.engine, ema_decay=decays))
    num_trained, share = of.num_trained, (of.num_trained + of.num_adversary) / num_gpus
    assert more.peak(num_gpus) - of.peak(num_gpus) == pytest.approx(4 * num_trained / num_gpus, abs=0.1)
    assert more.checkpoint_bytes() - of.checkpoint_bytes() == 4 * num_trained
    assert more.export_bytes() == of.export_bytes()
    seconds = more.exchange_s(num_gpus) - of.exchange_s(num_gpus)
    assert seconds == pytest.approx(12 * share / MEMORY, rel=1e-6)
    assert more.step_time(num_gpus).packs == of.step_time(num_gpus).packs


@EACH
@given(plans, st.integers(1, 10**9))
def test_trained_parameters_and_the_discriminators_raise_a_checkpoint_by_masters_and_moments(
    of: Plan, more: int
) -> None:
    """Masters and two moments in fp32, and for the model's an average each. The projection is not exported."""
    per_parameter = 12 + 4 * len(of.engine.ema_decays)
    larger = dataclasses.replace(of, trained=of.trained | {"projection": more}, num_unexported=more)
    assert larger.checkpoint_bytes() - of.checkpoint_bytes() == per_parameter * more
    assert larger.export_bytes() == of.export_bytes()
    larger = dataclasses.replace(of, num_adversary=of.num_adversary + more)
    assert larger.checkpoint_bytes() - of.checkpoint_bytes() == 12 * more
    assert larger.export_bytes() == of.export_bytes()


@EACH
@given(engines, gpus, st.integers(1, 10**9), st.integers(0, 10**9), st.booleans())
def test_states_that_last_are_weights_masters_moments_and_averages(
    config: EngineConfig, num_gpus: int, num_trained: int, num_frozen: int, accumulates: bool
) -> None:
    state = StateBytes.of(config, num_trained, num_frozen, num_gpus, accumulates=accumulates)
    share, stage = num_trained / num_gpus, config.zero_stage
    weights = WEIGHT_BYTES[config.precision] * (num_trained + num_frozen) / (num_gpus if stage == 3 else 1)
    average = 4 * share * len(config.ema_decays)
    assert (state.weights, state.optimizer, state.ema) == pytest.approx((weights, 12 * share, average))
    assert state.lasting == pytest.approx(weights + 12 * share + average)
    keeps_two = (
        stage == 2 and accumulates and config.precision != "bf16"
    )  # the sum so far, and the last pack's
    held = 4 * num_trained if stage == 1 else 4 * share * (2 if keeps_two else 1)
    assert state.gradients == pytest.approx(held)
    ends = state.gradients + state.buffers
    assert state.peak(0) == pytest.approx(state.lasting + max(ends, state.stepping))
    assert state.peak(HUGE) == pytest.approx(state.lasting + ends + HUGE)


@pytest.mark.parametrize(("activations", "peak"), [(6, 1 + 2 + 3 + 100), (95, 1 + 2 + 3 + 4 + 5 + 95)])
def test_the_fullest_moment_is_the_optimizers_step_or_the_end_of_the_backward_pass(
    activations: int, peak: int
) -> None:
    state = StateBytes(weights=1, optimizer=2, ema=3, gradients=4, buffers=5, stepping=100)
    assert state.peak(activations) == peak


@EACH
@given(engines.filter(lambda config: config.zero_stage < 3), gpus, st.integers(1, 100))
def test_a_discriminator_adds_what_it_holds_while_the_model_learns_and_its_own_pass(
    config: EngineConfig, num_gpus: int, num_streams: int
) -> None:
    """It has no average. While it is updated, the model's sums of gradients stay if a rank has several packs."""
    of = made(engine=config, num_streams=num_streams)
    alone = dataclasses.replace(of, num_adversary=0)
    before, updating = of.phases[0], of.phases[-1]
    own = 10**6 * (WEIGHT_BYTES[config.precision] + 12 / num_gpus)
    assert of.peak(num_gpus, before) - alone.peak(num_gpus, before) == pytest.approx(own, abs=0.1)
    accumulates = of.packs(num_gpus) > 1
    state = StateBytes.of(config, of.num_trained, 10**7, num_gpus, accumulates=accumulates)
    without_average = dataclasses.replace(config, ema_decay=0.0)
    adversary = StateBytes.of(without_average, 10**6, 0, num_gpus, accumulates=accumulates)
    both = state.lasting + own + updating.activations + of.helper_bytes
    models, discriminators = (one.gradients + one.buffers for one in (state, adversary))
    if accumulates and config.zero_stage == 1:  # both engines keep their sums and buffers
        expected = both + models + discriminators
    else:
        expected = both + max(models, discriminators + (state.gradients if accumulates else 0))
    assert of.peak(num_gpus, updating) == pytest.approx(expected, abs=0.1)
    assert of.peak(num_gpus) == max(of.peak(num_gpus, phase) for phase in of.phases)


@EACH
@given(plans, gpus)
def test_the_parts_of_a_step_are_its_amounts_over_the_rates(of: Plan, num_gpus: int) -> None:
    """The last phase. Recomputation repeats everything that a pack does; sums, exchange and optimizer are not repeated.

    Autocast casts each weight to bf16 and each gradient back, once a pack.
    """
    work, config = of.works[-1], of.engine
    num_trained, packs = of.num_trained + of.num_adversary, of.packs(num_gpus)
    weight = WEIGHT_BYTES[config.precision]
    casts = num_trained * 2 * (4 + 2) if config.precision == "bf16_autocast" else 0
    device = {
        "matrix products": work.products * of.recomputing / PRODUCTS,
        "norms, rotations, SwiGLU, casts": (work.moved * of.recomputing + casts) / MEMORY,
        "attention": work.attention * of.recomputing / PAIRS,
        "gradient sums": num_trained * (weight + 4 + 4) / MEMORY,
    }
    host_s = round(work.launches * of.recomputing) * REACHED.launch_s
    waiting = REACHED.pack_s + max(0.0, host_s - sum(device.values()))
    found = of.step_time(num_gpus)
    expected = {name: packs * seconds for name, seconds in device.items()}
    assert found.packs == pytest.approx(expected | {"waiting for the host": packs * waiting})
    times_out, times_back = {1: (1, 1), 2: (packs, 1), 3: (packs, 2 * packs)}[config.zero_stage]
    near, far = REACHED.node * H100.node_bytes_per_s, REACHED.far * H100.far_bytes_per_s
    link, others = near if num_gpus <= 8 else far, 1 - 1 / num_gpus
    # A gradient is scaled, read for the norm, zeroed; master and two moments go in and out, an average thrice.
    shard = 4 * (3 + 6 + 3 * len(config.ema_decays)) + weight
    boundary = {
        "gradients exchanged": num_trained * 4 * times_out * others / link,
        "weights exchanged": num_trained * weight * times_back * others / link,
        "gradients scaled, their norm, zeroed": num_trained / num_gpus * 16 / MEMORY,
        "optimizer and averages": num_trained / num_gpus * shard / MEMORY,
    }
    assert found.boundary == pytest.approx(boundary)
    assert of.compute_s(num_gpus, 0.5) == pytest.approx(
        of.phases[-1].flops * packs * of.recomputing / (0.5 * PEAK)
    )


def test_a_small_pack_waits_longer_for_the_host_when_it_is_recomputed() -> None:
    small = made(works=(Work(0, 0, 0, 3000),) * 3)
    again = dataclasses.replace(small, recomputing=4 / 3)
    waits = [of.step_time(1).packs["waiting for the host"] for of in (small, again)]
    assert waits[1] - waits[0] == pytest.approx(32 * 1000 * REACHED.launch_s)


@EACH
@given(plans, gpus, st.sampled_from([None, 0.4]))
def test_hours_are_those_of_every_phase_and_of_the_exchange_after_every_step(
    of: Plan, num_gpus: int, mfu: float | None
) -> None:
    seconds = 0.0
    for index, steps in enumerate(of.phase_steps):
        alone = dataclasses.replace(of, phases=of.phases[: index + 1], works=of.works[: index + 1])
        seconds += steps * (alone.compute_s(num_gpus, mfu) + alone.exchange_s(num_gpus))
    assert of.hours(num_gpus, mfu) == pytest.approx(seconds / 3600)
    flops = sum(phase.flops * steps for phase, steps in zip(of.phases, of.phase_steps, strict=True))
    assert of.run_flops == pytest.approx(flops * of.num_streams)


@pytest.mark.parametrize("path", [T2I, EDIT, CLASS])
@pytest.mark.parametrize("num_gpus", [5, 8])
def test_checkpointing_repeats_the_forward_pass_in_time_and_frees_memory(path: str, num_gpus: int) -> None:
    plain, again = plan(path), plan(path, "flow.activation_checkpointing=true")
    before, after = plain.step_time(num_gpus), again.step_time(num_gpus)
    for part in ("matrix products", "attention"):
        assert after.packs[part] == pytest.approx(4 / 3 * before.packs[part])
    assert after.boundary == before.boundary and after.packs["gradient sums"] == before.packs["gradient sums"]
    assert again.compute_s(num_gpus, 0.4) == pytest.approx(4 / 3 * plain.compute_s(num_gpus, 0.4))
    assert again.activations < 0.5 * plain.activations
    freed = plain.activations - again.activations
    assert plain.peak(num_gpus) - again.peak(num_gpus) == pytest.approx(freed, rel=1e-6)
    assert again.step_flops == plain.step_flops and again.run_flops == plain.run_flops


def test_a_stages_checkpointing_is_in_its_phases_work() -> None:
    """Everything else is made again with the products: with less memory a step takes longer, not shorter."""
    plain, again = plan(PIVOT), plan(PIVOT, "stage.activation_checkpointing=true")
    for before, after in zip(plain.works, again.works, strict=True):
        assert 1 < after.products / before.products < 2
        assert after.moved / before.moved == pytest.approx(after.products / before.products)
    assert again.activations < plain.activations


@pytest.mark.parametrize(
    ("path", "overrides", "sample_tokens", "sample_images"),
    [
        (T2I, (), 102 + 258, 1),  # a text of 102 tokens, 16 x 16 places between two marks
        (T2I, ("packing.draws_per_caption=3",), 102 + 3 * 258, 3),
        (EDIT, (), 258 + 32 + 258, 1),
        (EDIT, ("packing.draws_per_caption=2",), 258 + 32 + 2 * 258, 2),
    ],
)
def test_a_pack_is_counted_as_so_many_samples_as_its_tokens_hold(
    path: str, overrides: tuple[str, ...], sample_tokens: int, sample_images: int
) -> None:
    of = plan(path, *overrides)
    assert of.num_images == round(of.num_tokens * sample_images / sample_tokens)


@pytest.mark.parametrize(
    ("overrides", "num_helpers"),
    [
        ((), 3),  # the replica, the perceptual distance's network and the discriminator's
        (("stage.train_encoder=false",), 2),
        (("stage.discriminator=null",), 2),
        (("stage.w_lpips=0", "stage.discriminator=null"), 1),
    ],
)
def test_every_frozen_network_beside_a_stage_is_in_its_bytes(
    overrides: tuple[str, ...], num_helpers: int
) -> None:
    """All of the miniature's are its stand-in; buffers are held as well (mean and deviation of pixels)."""
    standin = RepresentationConfig(
        "vit_tiny_patch16_224",
        64,
        "random",
        {"img_size": 64, "patch_size": 16, "embed_dim": 192, "depth": 2, "num_heads": 6},
    )
    with torch.device("meta"):
        network = Representation(standin)
    num_bytes = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    assert plan(PIVOT, *overrides).helper_bytes == num_helpers * num_bytes


def test_a_text_losses_logits_are_in_the_estimate() -> None:
    """A chunk's logits, their fp32 copy and gradient (bf16: 2 + 4 + 4 bytes), and the products of every token's."""
    silent = plan(EDIT, "generator.text_output=false")
    learning = plan(EDIT, "generator.text_output=true", "flow.text_loss_weight=1")
    num_texts = round(6144 / (258 + 32 + 258))
    num_predicted = num_texts * 31  # of 32 tokens the first is not predicted
    assert learning.activations - silent.activations > num_predicted * 151_936 * 10
    more_flops = (learning.step_flops - silent.step_flops) / learning.num_streams
    assert more_flops > 0.95 * 6 * num_predicted * 896 * 151_936  # rounded to whole samples
