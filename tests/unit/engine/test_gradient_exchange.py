"""bf16 gradients under ZeRO-1: what adding one costs, and in which order the sums are sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Names of all that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace == "aten":
            self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Any:
    """sums(sizes of the parameters, ranks, bucket): an optimizer of one group, as far as the exchange looks at it."""
    from engine import gradient_exchange

    def build(sizes: list[int], world: int, bucket_elements: int, device: str = "cpu") -> Any:
        monkeypatch.setattr(gradient_exchange, "BUCKET_ELEMENTS", bucket_elements)
        monkeypatch.setattr(gradient_exchange.comm, "get_world_size", lambda group: world)
        sent: list[tuple[int, int]] = []

        def reduce(values: torch.Tensor, owner: int, **_: Any) -> Any:
            sent.append((owner, int(values.storage_offset())))
            return SimpleNamespace(wait=lambda: None)

        monkeypatch.setattr(gradient_exchange.comm, "reduce", reduce)
        optimizer = object.__new__(gradient_exchange.ShardedSums)
        flat = torch.zeros(-(-sum(sizes) // world) * world, device=device)
        shard = len(flat) // world
        parameters = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device=device)) for n in sizes]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        vars(optimizer).update(
            dp_process_group=None,
            bf16_groups=[parameters],
            param_names={parameter: str(i) for i, parameter in enumerate(parameters)},
            optimizer=SimpleNamespace(param_groups=[{}]),
            fp32_groups_flat_partition=[flat[:shard]],
            fp32_groups_gradients_flat=[flat],
            fp32_groups_gradient_flat_partition=[flat[:shard]],
            fp32_groups_gradients=[[flat[i : i + n] for i, n in zip(starts, sizes, strict=True)]],
            fp32_groups_has_gradients=[[False] * len(sizes)],
            _backward_hook_state=SimpleNamespace(backward_active_depth=1),
            _is_gradient_accumulation_boundary=False,
        )
        optimizer._plan_exchange()

        def give(index: int, value: float) -> None:
            parameters[index].grad = torch.full_like(parameters[index], value)
            optimizer.accumulate_hp_grads_and_remove_lp(parameters[index], 0, index)
            assert parameters[index].grad is None

        return SimpleNamespace(optimizer=optimizer, flat=flat, give=give, sent=sent, parameters=parameters)

    return build


def test_a_gradient_is_added_by_one_kernel_without_a_copy(sums: Any) -> None:
    with FakeTensorMode():
        made = sums([12], 1, 100, "cuda")
        for expected in (["copy_"], ["add_"], ["add_"]):
            gradient = torch.ones(12, dtype=torch.bfloat16, device="cuda")
            made.parameters[0].grad = gradient
            with Operators() as operators:
                made.optimizer.accumulate_hp_grads_and_remove_lp(made.parameters[0], 0, 0)
            assert operators.names == expected
        assert made.flat.dtype == torch.float32


def test_sums_of_a_step_replace_those_of_the_one_before(sums: Any) -> None:
    made = sums([3, 2], 1, 100)
    made.give(0, float("nan"))
    made.optimizer.clear_hp_grads()
    made.give(0, 1.0)
    made.give(0, 0.0078125)  # less than bf16 would keep beside 1
    made.optimizer.reduce_gradients(pipeline_parallel=False)
    assert made.flat.tolist() == [1.0078125] * 3 + [0.0] * 2


def test_sums_are_sent_during_the_last_pass_in_one_order_on_every_rank(sums: Any) -> None:
    """Shards of 6 elements, buckets of 4: (owner, place) 0-0, 0-4, 1-6, 1-10 hold parameters 0, 0+1, 1+2, 2."""
    made = sums([5, 3, 4], 2, 4)
    for index in (2, 1, 0):
        made.give(index, 1.0)
    assert not made.sent, "another pack is to come"
    made.optimizer._is_gradient_accumulation_boundary = True
    made.give(1, 1.0)
    assert not made.sent, "the last bucket goes first, ready or not"
    made.give(2, 1.0)
    assert made.sent == [(1, 10), (1, 6)]
    made.give(0, 1.0)
    assert made.sent == [(1, 10), (1, 6), (0, 0), (0, 4)]
    made.optimizer.reduce_gradients(pipeline_parallel=False)
    assert len(made.sent) == 4
    assert (
        made.flat.tolist() == [1.0] * 6 + [2.0] * 6
    )  # two packs, the mean over two ranks of this one's shard
    made.optimizer.clear_hp_grads()
    made.give(2, 3.0)  # a parameter that a rank has no gradient for must not hold the others up
    made.optimizer.reduce_gradients(pipeline_parallel=False)
    assert made.sent[4:] == made.sent[:4] and made.flat.tolist()[:6] == [0.0] * 6


def test_a_second_gradient_in_one_pass_is_an_error_not_a_wrong_sum(sums: Any) -> None:
    made = sums([4], 2, 100)
    made.optimizer._is_gradient_accumulation_boundary = True
    made.give(0, 1.0)
    with pytest.raises(AssertionError, match="two gradients in one backward pass"):
        made.give(0, 1.0)


def test_a_backward_pass_that_deepspeed_does_not_know_of_is_an_error(sums: Any) -> None:
    made = sums([4], 1, 100)
    made.optimizer._backward_hook_state.backward_active_depth = 0
    with pytest.raises(AssertionError):
        made.give(0, 1.0)


def test_ops_are_probed_on_cpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed makes its table of ops when it is read, with compilers; only a CPU has the one that is left out."""
    from engine import distributed

    class Ops:
        reads = 0

        @property
        def __compatible_ops__(self) -> dict[str, bool]:
            self.reads += 1
            return {}

    class Joined(Exception):  # noqa: N818
        pass

    def meet(seconds: int) -> None:
        raise Joined

    ops = Ops()
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", SimpleNamespace(ops=ops))
    monkeypatch.setattr(distributed.peers, "meet", meet)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    for has_cuda, reads in ((True, 0), (False, 1)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_cuda=has_cuda: has_cuda)
        with pytest.raises(Joined):
            distributed.start()
        assert ops.reads == reads
