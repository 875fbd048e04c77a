# Exported from chapters/part_2_training_a_tiny_llm/2_6_validation_and_early_stopping.ipynb.
# Edit the lesson, then run: make export
"""How good is it on text that it has not seen? And when to stop."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.train.losses import bits_per_byte, lm_loss, perplexity

__all__ = ["split_train_val", "Evaluation", "evaluate", "EarlyStopping"]


def split_train_val(tokens: np.ndarray, val_fraction: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """The first part to train on, the last to validate on: one cut, so no window straddles both.

    (Random windows of one text would overlap: the model would be tested on what it was trained on.)

    Returns:
        Two views of `tokens`, in order; the second has `int(val_fraction · N)` of its N tokens.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, but must lie between 0 and 1")
    cut = len(tokens) - int(len(tokens) * val_fraction)
    return tokens[:cut], tokens[cut:]


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
        max_windows: Look at only so many windows, spread evenly over the text; None takes them all.
        bytes_per_token: Of this text under this tokenizer; 1 for bytes.

    Raises:
        ValueError: if the tokens do not fill one window, or no window is asked for.
    """
    windows = TokenWindows(tokens, seq_len)
    n = len(windows) if max_windows is None else min(max_windows, len(windows))
    if n < 1:
        raise ValueError(f"max_windows is {max_windows}, but at least one window must be looked at")
    which = np.linspace(0, len(windows) - 1, n).astype(int)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for start in range(0, n, batch_size):
            inputs, labels = (part.to(device) for part in windows.batch(which[start : start + batch_size]))
            total += lm_loss(model(inputs), labels, reduction="sum").item()
            count += labels.numel()
    finally:
        model.train(was_training)
    loss = total / count
    return Evaluation(loss, perplexity(loss), bits_per_byte(total, count * bytes_per_token), count)


class EarlyStopping:
    """Says stop after `patience` evaluations in a row without a gain of more than `min_delta`.

    Attributes:
        best: The loss to beat: the lowest that counted as an improvement.
        bad: How many evaluations in a row have not improved on it.
        improved: Whether the latest one did (the moment to save a checkpoint).
    """

    def __init__(self, patience: int = 3, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"patience is {patience}, but at least one bad evaluation must be allowed")
        self.patience, self.min_delta = patience, min_delta
        self.best, self.bad, self.improved = math.inf, 0, False

    def update(self, loss: float) -> bool:
        """Take in a validation loss; True means stop. A NaN counts as no improvement."""
        self.improved = loss < self.best - self.min_delta
        if self.improved:
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        return self.bad >= self.patience
