"""The shape of the smallest mixture of transformers in which every part works."""

from generator.mot import MotConfig

BACKBONE = MotConfig(
    vocab_size=32, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48
)
