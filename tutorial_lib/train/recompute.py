# Exported from chapters/part_4_scaling_up/4_2_accumulation_and_mixed_precision.ipynb.
# Edit the lesson, then run: make export
"""Activation checkpointing: forget what a block computed, and compute it again when backward needs it."""

import functools
from collections.abc import Iterable

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute_blocks"]


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keep only the input of each block from forward to backward (Chen et al. 2016, section 4).

    Memory for activations falls from a dozen tensors of a block to one, for a second forward pass: about a third
    more time. Names of parameters do not change, and without gradients nothing changes at all. Dropout draws the
    same numbers again. Doing it twice does nothing more.

    Args:
        blocks: `model.blocks`, or some of them.
    """
    for block in blocks:
        if getattr(block.forward, "func", None) is not checkpoint:  # wrapping twice would compute three times
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
