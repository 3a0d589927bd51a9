"""Counts the bytes that a pack moves on a GPU outside matrix products and attention, forward and backward pass.

Norms, rotations, SwiGLU, residual sums and casts do little arithmetic: their time is what they read and write. The
count is in values a token. Eager code runs PyTorch's kernels one by one; compiled code (`flow.compile`) runs fused
functions, each of which reads a value once and writes one once. The test compares with two counts of the eager code
on tensors without values (2026-11-30), with norms in fp32 and in bf16.

Symbols: D width, Q query width, K key width, M the MLP's inner width.
"""

from __future__ import annotations

from dataclasses import dataclass

from generator.config import GeneratorConfig, MotConfig
from generator.sizing import FP32_BYTES, PackSize, head_kept_bytes

MOVED_PER_KEPT = {False: 5.3, True: 2.1}
"""Bytes moved over bytes kept for the backward pass, eager and compiled, in a layer of the 0.5B mixture. It stands in
where nothing was counted (a DDT head, class-conditional generators, tokenizer stages)."""
LAYER_LAUNCHES = {False: 178, True: 70}
"""Kernels that a layer launches, both experts and attention: eager (counted on tensors without values) and compiled
(24 products, the functions between them, and the attention)."""
END_LAUNCHES = 60
"""Kernels before and after the layers."""
RMS_BACKWARD = 5  # reads the gradient and x, writes dx; reads both again for the weight


@dataclass(frozen=True)
class ValueBytes:
    """Bytes of one value, and the number of products that take a normed token."""

    stream: int
    """Bytes of a value in the residual stream."""
    norm: int
    """Bytes of a value that a norm gives."""
    product: int
    """Bytes of a value that enters or leaves a matrix product or the attention."""
    copies_qkv: int = 1
    copies_mlp: int = 1

    @classmethod
    def of(cls, precision: str) -> ValueBytes:
        """Sizes for EngineConfig's `precision`. Norms keep the dtype of the stream."""
        if precision == "fp32":
            return cls(FP32_BYTES, FP32_BYTES, FP32_BYTES)
        stream = 2 if precision == "bf16" else FP32_BYTES
        return cls(stream, stream, 2)


def moved_bytes(
    size: PackSize, config: GeneratorConfig, channels: int, sizes: ValueBytes, *, compiled: bool
) -> float:
    """Bytes that one pack moves. `compiled`: flow.compile."""
    mot = config.backbone
    keys, rest = (_compiled if compiled else _eager)(mot, sizes)
    num_tokens = size.num_understanding + size.num_generation
    complete = num_tokens * (keys + rest)
    last = complete if config.text_output else num_tokens * keys + size.num_noisy * rest
    total = (mot.num_layers - 1) * complete + last + _key_bytes(size, config, sizes)
    if config.head is not None:
        kept = head_kept_bytes(config.head, channels, "fp32" if sizes.product == FP32_BYTES else "bf16")
        total += size.num_noisy * kept * MOVED_PER_KEPT[compiled]
    return total + _end_bytes(size, config, channels, sizes)


def num_launches(config: GeneratorConfig, *, compiled: bool) -> int:
    """Kernels that one pack launches."""
    head = 0 if config.head is None else config.head.num_layers * LAYER_LAUNCHES[False]
    return config.backbone.num_layers * LAYER_LAUNCHES[compiled] + head + END_LAUNCHES


def _eager(mot: MotConfig, sizes: ValueBytes) -> tuple[float, float]:
    """Bytes of a token in a layer: (for its keys and values, for the rest)."""
    s, p = sizes.stream, sizes.product
    width, query, key = mot.width, mot.num_heads * mot.head_dim, mot.num_kv_heads * mot.head_dim
    bias: float = p if mot.qkv_bias else 0  # a bias's gradient is a sum over tokens
    head = _eager_head(mot, sizes) + bias
    keys = width * (_norm(s, sizes.norm) + 3 * s + _taken(sizes, 1)) + key * (head + 2 * p + bias)
    rest: float = width * (_taken(sizes, sizes.copies_qkv) - _taken(sizes, 1))
    rest += query * (head + 2 * p)  # both parts of the attention are joined
    rest += width * (_norm(s, sizes.norm) + _taken(sizes, sizes.copies_mlp))
    # The residual sums: two forward, one of gradients backward. Then the casts of gradients that enter products.
    rest += width * (2 * (p + 2 * s) + 3 * s + 2 * _cast(s, p))
    return keys, rest + (2 + 3 + 3 + 3 + 3) * mot.mlp_width * p  # silu, times up; the gradients of both


def _eager_head(mot: MotConfig, sizes: ValueBytes) -> float:
    """Bytes for one value of q or k: QK-norm, joining both experts, and the rotation in fp32 with its gradient."""
    n, p, f = sizes.norm, sizes.product, FP32_BYTES
    rotated = 2 * (n + f) + 3 * f + 2 * f + _cast(f, p)
    gradient = _cast(f, p) + 2 * (2 * f + _cast(f, n)) + 3 * n + 2 * n
    return (_norm(p, n) if mot.qk_norm else 0) + 2 * n + rotated + gradient


def _compiled(mot: MotConfig, sizes: ValueBytes) -> tuple[float, float]:
    """Bytes as in `_eager`, but of what enters and what leaves each function between products."""
    s, p = sizes.stream, sizes.product
    width, query, key = mot.width, mot.num_heads * mot.head_dim, mot.num_kv_heads * mot.head_dim
    norm = (s + p) + (p + 3 * s)  # x in, normed out; its gradient, x, the stream's gradient, their sum
    keys = width * norm + 2 * key * 5 * p  # k and v before and after, and their gradients
    rest = query * (5 * p + 2 * p)
    rest += width * (
        norm + (p + s) + (p + 2 * s) + 2 * _cast(s, p)
    )  # x' is written; the MLP's output is added to it
    return keys, rest + (3 + 6) * mot.mlp_width * p  # gate, up, out; all three, a gradient, two gradients


def _norm(entering: int, leaving: int) -> int:
    """Bytes a norm moves forward and backward, with a cast to its dtype and back."""
    return entering + leaving + 2 * _cast(entering, leaving) + RMS_BACKWARD * leaving


def _taken(sizes: ValueBytes, copies: int) -> int:
    """Bytes of a normed value that `copies` products take: casts, their gradients, and the gradients' sum."""
    return copies * 2 * _cast(sizes.norm, sizes.product) + (copies - 1) * 3 * sizes.norm


def _cast(one: int, other: int) -> int:
    return one + other if one != other else 0


def _key_bytes(size: PackSize, config: GeneratorConfig, sizes: ValueBytes) -> float:
    """Keys and values gathered for each segment are read and written; their gradients are read and added to a sum."""
    mot = config.backbone
    last = size.num_keys if config.text_output else size.output_keys
    rows = (mot.num_layers - 1) * size.num_keys + last
    return 2 * rows * mot.num_kv_heads * mot.head_dim * 5 * sizes.product


def _end_bytes(size: PackSize, config: GeneratorConfig, channels: int, sizes: ValueBytes) -> float:
    """Latents with noise, embeddings, last norm, loss; the text embedding's gradient is written as a whole."""
    mot, s, p, f = config.backbone, sizes.stream, sizes.product, FP32_BYTES
    total = size.num_generation * (channels * 8 * f + mot.width * (3 * 3 * s + 3 * s))
    total += size.num_noisy * (mot.width * (_norm(s, sizes.norm) + 3 * s) + channels * 10 * f)
    total += 4 * size.num_understanding * mot.width * s + mot.vocab_size * mot.width * p
    if (
        config.text_output
    ):  # logits in p and in fp32, exponentials, gradients; a chunk's forward pass runs twice
        total += size.num_predicted * mot.vocab_size * (4 * p + 6 * f)
    return float(total)
