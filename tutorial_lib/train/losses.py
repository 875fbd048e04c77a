"""The language-model loss, in nats, and its translations."""

import math

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""A label with this value carries no loss."""


def lm_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each label under the softmax of its logits, in nats. The course has no other.

    Labels are already shifted (`labels[t]` is the token after position t); -100 carries no loss.

    Args:
        logits: `(..., V)`, of any float type; the sum over the vocabulary is done in fp32.
        labels: `(...)`, integers.
        reduction: `"mean"` over the labels that count, `"sum"`, or `"none"` for one loss per label.

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
    loss = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction
    )
    return loss.view(labels.shape) if reduction == "none" else loss


def perplexity(nats_per_token: float) -> float:
    """e^loss: the size of a fair die as surprising as the model finds the text."""
    return math.exp(nats_per_token)


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """A summed loss in bits for each byte of text: comparable between tokenizers, and with gzip."""
    return nats / math.log(2) / n_bytes
