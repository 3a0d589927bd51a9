"""Kernels and bytes of one layer of the 0.5B mixture, forward and backward, without a GPU: python -m benchmarks.kernels

A pack has 12,288 tokens (30 % text), bf16 weights under autocast, as in the paper's runs. Eager: the forward pass is
traced on fake CUDA tensors, which includes autocast's casts and CUDA's fused norms, and replayed with gradients. An
operation that moves data is one kernel, which reads its inputs and writes its outputs once. Compiled: the kernels that
inductor's scheduler fuses, each read and written buffer once. The scheduler gets fake CPU tensors, whose bf16 norms
need no autocast. The attention is one operation each way; it and matrix products are counted apart.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaluation.environment import versions
from generator.mot import MotLayer, rope_table
from generator.qwen import QWEN2_5_0_5B
from tokenizer.norms import RmsNorm

NUM_TEXT, NUM_LATENTS = 3_686, 8_602
CLASSES = {
    "products": ("mm", "addmm", "bmm"),
    "attention": ("attention", "attention_backward"),
    "norms": ("norm", "norm_input_gradient", "norm_weight_gradient"),
    "casts": ("_to_copy",),
    "copies": ("cat", "clone", "copy_", "slice_backward", "constant_pad_nd", "zeros", "new_zeros"),
}
"""Class -> names of its operations. All other operations are pointwise operations and sums."""
UNCOUNTED = ("_unsafe_view", "detach", "empty_like", "new_empty_strided")
APART = ("products", "attention")


@torch.library.custom_op("benchmark::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands for a kernel that reads q, k, v and writes the output."""
    return torch.empty_like(q)


@torch.library.custom_op("benchmark::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for attention's backward kernel."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


attention.register_fake(lambda q, k, v: torch.empty_like(q))
attention_backward.register_fake(
    lambda gradient, q, k, v, out: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)
attention.register_autograd(
    lambda ctx, gradient: attention_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


@torch.library.custom_op("benchmark::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """CUDA's fused RMSNorm, which a CPU lacks: the output, and the fp32 factor of every row."""
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("benchmark::norm_input_gradient", mutates_args=())
def norm_input_gradient(gradient: Tensor, x: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """Stands for the first of the norm's two backward kernels."""
    return torch.empty_like(x)


@torch.library.custom_op("benchmark::norm_weight_gradient", mutates_args=())
def norm_weight_gradient(gradient: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Stands for the second of the norm's two backward kernels."""
    return x.new_empty(x.shape[-1:])


norm.register_fake(
    lambda x, weight: (torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
)
norm_input_gradient.register_fake(lambda gradient, x, factor, weight: torch.empty_like(x))
norm_weight_gradient.register_fake(lambda gradient, x, factor: x.new_empty(x.shape[-1:]))
norm.register_autograd(
    lambda ctx, gradient, _: (
        norm_input_gradient(gradient, *ctx.saved_tensors),
        norm_weight_gradient(gradient, *ctx.saved_tensors[:2]),
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output[1], inputs[1]),
)


class Moved:
    """Number of kernels, and bytes moved, by class."""

    def __init__(self) -> None:
        self.is_paused = False
        self.kernels: Counter[str] = Counter()
        self.bytes: defaultdict[str, int] = defaultdict(int)

    def add(self, kind: str, num_bytes: int) -> None:
        """Counts one kernel."""
        self.kernels[kind] += 1
        self.bytes[kind] += num_bytes

    @property
    def other_bytes(self) -> int:
        """Bytes of all classes but products and attention."""
        return sum(number for kind, number in self.bytes.items() if kind not in APART)


class Counting(TorchDispatchMode):
    """Adds every operation that moves data to `moved`."""

    def __init__(self, moved: Moved) -> None:
        super().__init__()
        self.moved = moved

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not self.moved.is_paused and not is_view and name not in UNCOUNTED and func.namespace != "prim":
            tensors = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
            kind = next((kind for kind, names in CLASSES.items() if name in names), "pointwise, sums")
            self.moved.add(kind, sum(_held_bytes(x) for x in tensors.values()))
        return result


def _held_bytes(x: Tensor) -> int:
    """Bytes of `x` that a kernel reads or writes; an expanded dimension counts once."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * x.element_size()


def eager() -> Moved:
    """Kernels and bytes of the uncompiled layer."""
    moved = Moved()
    with FakeTensorMode(allow_non_fake_inputs=True):
        gpu = torch.device("cuda")
        with _cuda_autocast(), torch.no_grad():
            graph = make_fx(partial(_run, _layer(gpu)))(*_inputs(gpu))
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten._fused_rms_norm.default:
                x, _, weight, _ = node.args
                node.target, node.args = torch.ops.benchmark.norm.default, (x, weight)
        graph.recompile()
        inputs = _inputs(torch.device("cpu"))
        with Counting(moved):
            out = graph(*inputs)
            torch.autograd.backward(out, [torch.empty_like(x) for x in out])
    return moved


def compiled() -> Moved:
    """Kernels and bytes of the layer under flow.compile."""
    moved, between = Moved(), Moved()
    count = partial(_schedule, moved, between)
    backend = aot_autograd(
        fw_compiler=count,
        bw_compiler=count,
        decompositions=select_decomp_table(),
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = _layer(torch.device("cpu"))
        _lay_side_by_side(layer)
        layer.backend = backend
        inputs = _inputs(torch.device("cpu"))
        names = [name for name, _ in layer.named_parameters()]
        x_UD, x_GD, rope = inputs[len(names)], inputs[len(names) + 1], tuple(inputs[len(names) + 2 :])

        def counted(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with Counting(between):
                return attention(q, k, v)

        out = layer(x_UD, x_GD, rope, counted)
        with Counting(between):
            torch.autograd.backward(out, [torch.empty_like(x) for x in out])
    for kind in between.kernels:
        moved.kernels[kind] += between.kernels[kind]
        moved.bytes[kind] += between.bytes[kind]
    return moved


def _schedule(
    moved: Moved, between: Moved, graph: torch.fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Adds the kernels that inductor would make of `graph` to `moved`. Returns the graph itself: its operations
    do not count among those that autograd runs `between` the compiled functions."""
    mode = detect_fake_mode(inputs)
    assert mode is not None
    with V.set_fake_mode(mode):
        lowered = copy.deepcopy(graph)
        post_grad_passes(lowered, is_inference=False)
        lowering = GraphLowering(lowered, example_inputs=inputs, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering._update_scheduler()
            for node in lowering.scheduler.nodes:
                if not isinstance(node, NopKernelSchedulerNode):
                    is_product = isinstance(node, ExternKernelSchedulerNode)
                    kind = "products" if is_product else "fused kernels"
                    moved.add(kind, int(node.get_read_write_buffers_sizes()))

    def run(*flat: Any) -> Any:
        between.is_paused = True
        result = graph(*flat)
        between.is_paused = False
        return result

    return make_boxed_func(run)


def main() -> None:
    """Prints a table of all four counts, and the bytes that are neither products nor attention."""
    print(f"versions: {versions()}")
    print(f"one layer of Qwen2.5-0.5B's mixture, {NUM_TEXT:,} text and {NUM_LATENTS:,} latent tokens, bf16")
    with norms_by_autocast():
        before = eager()
    for name, moved in (("eager, norms by autocast", before), ("eager", eager()), ("compiled", compiled())):
        print(f"\n{name}")
        for kind, kernels in sorted(moved.kernels.items(), key=lambda item: -moved.bytes[item[0]]):
            print(f"  {kind:16s} {kernels:4d} kernels {moved.bytes[kind] / 1e6:9.1f} MB")
        share = moved.other_bytes / before.other_bytes
        total = sum(moved.kernels.values())
        print(
            f"  in all {total} kernels; {moved.other_bytes / 1e6:,.1f} MB besides products and attention: {share:.1%}"
        )


def _layer(device: torch.device) -> MotLayer:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return MotLayer(QWEN2_5_0_5B, 0)
    finally:
        torch.set_default_dtype(default)


def _inputs(device: torch.device) -> list[Tensor]:
    """Parameters, tokens of both experts, rotary table."""
    weights = list(_layer(device).parameters())
    width = QWEN2_5_0_5B.width
    tokens = [
        torch.empty(n, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        for n in (NUM_TEXT, NUM_LATENTS)
    ]
    positions = torch.empty(NUM_TEXT + NUM_LATENTS, dtype=torch.int64, device=device)
    return [*weights, *tokens, *rope_table(positions, QWEN2_5_0_5B.head_dim, QWEN2_5_0_5B.rope_theta)]


def _run(layer: MotLayer, *flat: Tensor) -> tuple[Tensor, Tensor]:
    names = [name for name, _ in layer.named_parameters()]
    x_UD, x_GD, cos, sin = flat[len(names) :]
    arguments = (x_UD, x_GD, (cos, sin), lambda _layer, q, k, v: attention(q, k, v))
    weights = dict(zip(names, flat[: len(names)], strict=True))
    out: tuple[Tensor, Tensor] = torch.func.functional_call(layer, weights, arguments)
    return out


def _lay_side_by_side(layer: nn.Module) -> None:
    """Makes the matrices neighbours in memory, as in DeepSpeed's flat buffers."""
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    flat = torch.empty(sum(p.numel() for p in matrices), dtype=matrices[0].dtype)
    for matrix, part in zip(matrices, torch.split(flat, [p.numel() for p in matrices]), strict=True):
        matrix.data = part.view(matrix.shape)


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """Context of autocast's flags for CUDA; torch.autocast itself would need a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@contextmanager
def norms_by_autocast() -> Iterator[None]:
    """Context in which RMSNorm is torch's own, which autocast makes fp32."""
    ours = RmsNorm.forward
    RmsNorm.forward = nn.RMSNorm.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        RmsNorm.forward = ours  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
