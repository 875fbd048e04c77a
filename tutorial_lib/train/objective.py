# Exported from chapters/part_4_scaling_up/4_2_accumulation_and_mixed_precision.ipynb.
# Edit the lesson, then run: make export
"""What is learned from a batch: how many terms count, and the loss summed over them. A trainer needs no more."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from tutorial_lib.train.losses import IGNORE_INDEX, lm_loss

__all__ = ["Batch", "Metrics", "Objective", "NextToken", "Totals"]


Batch: TypeAlias = tuple[Tensor, ...]
"""Tensors with the same rows, the first of them what the model reads: `(inputs, labels)`, for one."""

Metrics: TypeAlias = Mapping[str, Tensor | tuple[Tensor, Tensor]]
"""Sums by name, each one number; or `(sum, count)`, where something else is counted than in the loss."""


class Objective(Protocol):
    """A loss that can be computed in pieces, since it says what it is a sum over."""

    def count(self, batch: Batch) -> Tensor:
        """How many terms the sum over this batch has: one whole number, known before the forward pass."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss, *summed* over what counts, and more sums that are worth knowing: the same names at every call.

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


class Totals:
    """Adds up what an objective hands out, piece by piece, and makes means of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, loss: Tensor, metrics: Metrics) -> None:
        """One piece's. With a metric called `loss`, the sum that gradients descend is kept as `objective`.

        Raises:
            ValueError: if a metric is not one number.
        """
        for name, value in {"objective" if "loss" in metrics else "loss": loss, **metrics}.items():
            if isinstance(value, tuple):
                value, count = value
                self._counts[name] = self._counts.get(name, 0) + self._number(name, count)
            self._sums[name] = self._sums.get(name, 0) + self._number(name, value)

    def _number(self, name: str, value: Any) -> Tensor:
        number = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
        if number.ndim:
            raise ValueError(f"the metric {name!r} has shape {tuple(number.shape)}, but must be one number")
        return number

    def means(
        self, count: float, over_all: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, Tensor]:
        """Each sum over its own count, or over `count`; `over_all` adds up over processes."""
        names = sorted(self._sums)  # the same order in every process
        none = torch.zeros((), device=self.device)
        rows = over_all(torch.stack([torch.stack([self._sums[n], self._counts.get(n, none)]) for n in names]))
        means = {
            name: total / (own if name in self._counts else count)
            for name, (total, own) in zip(names, rows, strict=True)
        }
        return {name: means[name] for name in self._sums}
