# Exported from chapters/part_2_training_a_tiny_llm/2_3_cross_entropy.ipynb.
# Edit the lesson, then run: make export
"""The language-model loss, in nats, and its translations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORE_INDEX", "lm_loss", "perplexity", "bits_per_byte"]


IGNORE_INDEX = -100
"""A label with this value carries no loss."""


def lm_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each label under the softmax of its logits, in nats. The course has no other.

    Labels are already shifted (`labels[t]` is the token after position t); -100 carries no loss.

    Args:
        logits: `(..., V)`, of any float type; the sum over the vocabulary is done in fp32 (in fp64 if the
            logits are). Logits, not probabilities: the softmax is in here.
        labels: `(...)`, int64.
        reduction: `"mean"` over the labels that count, `"sum"`, or `"none"` for one loss per label (0 where
            the label is -100).

    Raises:
        ValueError: if the shapes do not match, or no label counts (a mean of nothing is NaN).
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need labels of shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    if reduction == "mean" and not (labels != IGNORE_INDEX).any():
        raise ValueError("every label is -100: there is nothing to take the mean of")
    # 16 bits are too few for a sum over the vocabulary, and for its result.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),  # (B·T, V)
        labels.reshape(-1),  # (B·T,)
        ignore_index=IGNORE_INDEX,
        reduction=reduction,
    )
    return loss.view(labels.shape) if reduction == "none" else loss


def perplexity(nats_per_token: float) -> float:
    """e^loss: the size of a fair die as surprising as the model finds the text; infinite beyond all floats."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:  # above 709 nats: a run that has blown up should still be able to report it
        return math.inf


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """A summed loss in bits for each byte of text: comparable between tokenizers, and with gzip."""
    return nats / math.log(2) / n_bytes
