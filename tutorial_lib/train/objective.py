# Exported from chapters/part_4_scaling_up/4_2_accumulation_and_mixed_precision.ipynb.
# Edit the lesson, then run: make export
"""What is learned from a batch: how many terms count, and the loss summed over them. A trainer needs no more."""

from collections.abc import Mapping
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from tutorial_lib.train.losses import IGNORE_INDEX, lm_loss

__all__ = ["Batch", "Metrics", "Objective", "NextToken"]


Batch: TypeAlias = tuple[Tensor, ...]
"""Tensors with the same rows, the first of them what the model reads: `(inputs, labels)`, for one."""

Metrics: TypeAlias = Mapping[str, Tensor]
"""Sums by name."""


class Objective(Protocol):
    """A loss that can be computed in pieces, since it says what it is a sum over."""

    def count(self, batch: Batch) -> Tensor:
        """How many terms the sum over this batch has: one integer, known before the forward pass."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss, *summed* over what counts, and more sums that are worth knowing.

        Gradients descend the first. A metric called `loss` stands for it in reports: with a penalty added, it is the
        loss without.
        """
        ...


class NextToken:
    """Pretraining: cross-entropy in nats of every label that is not -100. Batches are inputs and labels, `(B, T)`."""

    def count(self, batch: Batch) -> Tensor:
        """The labels that count."""
        return (batch[1] != IGNORE_INDEX).sum()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Their cross-entropies, summed; 0 if there is none."""
        inputs, labels = batch
        return lm_loss(model(inputs), labels, reduction="sum"), {}
