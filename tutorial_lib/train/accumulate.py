# Exported from chapters/part_4_scaling_up/4_2_accumulation_and_mixed_precision.ipynb.
# Edit the lesson, then run: make export
"""A large batch in small pieces: exactly the gradient of the whole, however the valid tokens are spread."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tutorial_lib.train.distributed import all_sum, gradient_sync, world_size
from tutorial_lib.train.losses import IGNORE_INDEX, lm_loss
from tutorial_lib.train.precision import Precision

__all__ = ["SummedLoss", "summed_lm_loss", "split_batch", "accumulate_gradients"]


SummedLoss: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Model, inputs and labels to the loss *summed* over the labels that count."""


def summed_lm_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the labels that are not -100; 0 if there is none."""
    return lm_loss(model(inputs), labels, reduction="sum")


def split_batch(inputs: Tensor, labels: Tensor, size: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Cut a batch `(B, T)` into micro-batches of at most `size` rows; None leaves it whole.

    Raises:
        ValueError: if `size` is below 1.
    """
    size = len(inputs) if size is None else size
    if size < 1:
        raise ValueError(f"a micro-batch of {size} rows: at least 1 is needed")
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    precision: Precision | None = None,
    loss: SummedLoss = summed_lm_loss,
) -> Tensor:
    """Add up the gradients of all micro-batches, of all processes; returns the mean loss per valid token.

    Each piece's *sum* is divided by the number of valid labels in the *whole* batch. (A mean of the pieces' means
    would weigh a label in a short piece more than one in a full piece.)

    Args:
        model: On its device; micro-batches are moved there one at a time. Gradients are added to those that its
            parameters have: call `zero_grad` once before.
        micro_batches: Pairs `(B, T)` of inputs and labels; the last one lets the processes share gradients.
        precision: Autocast and loss scale; fp32 when None. The gradients carry its scale.
        loss: Summed over the labels that count.

    Raises:
        ValueError: if no label counts, in any process.
    """
    device = next(model.parameters()).device
    precision = precision or Precision(device)
    valid = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in micro_batches)
    count = all_sum(torch.tensor(float(valid), device=device))
    if count == 0:  # in all processes or in none: nobody is left waiting
        raise ValueError("every label is -100: there is nothing to learn from in this batch")
    total = torch.zeros((), device=device)
    for i, (inputs, labels) in enumerate(micro_batches):
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with gradient_sync(model, enabled=i == len(micro_batches) - 1):
            with precision.autocast():
                share = loss(model, inputs, labels) / count
            # Data-parallel wrappers average gradients over the processes; the sum is wanted here.
            precision.backward(share * world_size())
        total += share.detach()
    return all_sum(total)
