"""What fine-tuning descends: the cross-entropy of what the assistant says, and how often its next token is the likeliest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tutorial_lib.sft.batches import document_mask
from tutorial_lib.train.losses import IGNORE_INDEX, lm_loss
from tutorial_lib.train.objective import Batch, Metrics

__all__ = ["Answers"]


class Answers:
    """The mean over all learned tokens of all rows, in nats: of `(inputs, labels)`, or `(inputs, labels, positions)`.

    With positions, rows are packed: each example sees itself alone. The metric `accuracy` is the share of the learned
    tokens that the model finds likeliest, given what stands before them.
    """

    def count(self, batch: Batch) -> Tensor:
        """The labels that count."""
        return (batch[1] != IGNORE_INDEX).sum()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Their cross-entropies, summed; 0 if there is none."""
        inputs, labels = batch[:2]
        if len(batch) == 2:
            logits = model(inputs)
        else:
            positions = batch[2]
            logits = model(inputs, positions, mask=document_mask(positions))
        with torch.no_grad():
            right = (logits.argmax(dim=-1) == labels).sum()  # -100 is no token
        return lm_loss(logits, labels, reduction="sum"), {"accuracy": right}
