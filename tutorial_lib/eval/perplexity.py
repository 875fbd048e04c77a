# Exported from chapters/part_2_training_a_tiny_llm/2_6_validation_and_early_stopping.ipynb.
# Edit the lesson, then run: make export
"""How good is a model on text that it has not seen?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.train.losses import IGNORE_INDEX, bits_per_byte, lm_loss, perplexity

__all__ = ["Evaluation", "spread_batches", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    loss: float
    """Nats per token."""
    perplexity: float
    """e^loss."""
    bits_per_byte: float
    """Comparable between tokenizers, and with compressors."""
    tokens: int
    """How many tokens were predicted."""


def spread_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int = 32, max_windows: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels `(B, T)`: windows that do not overlap, in order.

    Args:
        max_windows: Only so many, spread evenly over the text; None for all.

    Raises:
        ValueError: if the tokens do not fill one window, or no window is asked for.
    """
    windows = TokenWindows(tokens, seq_len)
    n = len(windows) if max_windows is None else min(max_windows, len(windows))
    if n < 1:
        raise ValueError(f"max_windows is {max_windows}, but at least one window must be looked at")
    which = np.linspace(0, len(windows) - 1, n).astype(int)
    return (windows.batch(which[start : start + batch_size]) for start in range(0, n, batch_size))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    seq_len: int,
    batch_size: int = 32,
    max_windows: int | None = None,
    bytes_per_token: float = 1.0,
) -> Evaluation:
    """The loss on `tokens`, each predicted once, in windows that do not overlap.

    Sums before it divides: a mean of batch means would weigh a short last batch too much. The model is in
    eval mode meanwhile, and afterwards in the mode in which it came.

    Args:
        max_windows: As in `spread_batches`, which also raises.
        bytes_per_token: Of this text under this tokenizer; 1 for bytes.
    """
    batches = spread_batches(tokens, seq_len, batch_size, max_windows)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in batches:
            inputs, labels = (part.to(device) for part in batch)
            total += lm_loss(model(inputs), labels, reduction="sum").item()
            count += int((labels != IGNORE_INDEX).sum())
    finally:
        model.train(was_training)
    loss = total / count
    return Evaluation(loss, perplexity(loss), bits_per_byte(total, count * bytes_per_token), count)
