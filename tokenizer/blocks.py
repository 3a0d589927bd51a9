"""torch.compile for a network's repeated blocks; names of parameters, exports and checkpoints do not change.

A block's `forward` is compiled in place (nn.Module.compile). A copy of a compiled block runs uncompiled, with its own
weights, until it is compiled itself.
"""

from __future__ import annotations

import torch._functorch.config
from torch import nn

from tokenizer.bridge import Bridge
from tokenizer.cnn_decoder import CnnDecoder
from tokenizer.representation import Representation


def compile_blocks(network: nn.Module, *, leave: int = 0) -> None:
    """Compiles the blocks of an encoder, a bridge or a decoder, except the last `leave` blocks.

    Blocks left out stay visible to autograd, which an adaptive loss weight needs: it is measured at one layer's weight.
    A compiled block's backward pass always computes its parameters' gradients, asked for or not.
    """
    # A donated buffer is overwritten in the backward pass; the adaptive weights pass twice through some blocks.
    torch._functorch.config.donated_buffer = False
    blocks = list(repeated(network))
    for block in blocks[: len(blocks) - leave]:
        block.compile()


def repeated(network: nn.Module) -> nn.ModuleList:
    """The list of blocks that makes up most of the network."""
    if isinstance(network, Representation):
        return network.blocks
    if isinstance(network, CnnDecoder):
        found = network.net.up_blocks
    else:
        found = (network.decoder if isinstance(network, Bridge) else network).layers
    assert isinstance(found, nn.ModuleList)
    return found
