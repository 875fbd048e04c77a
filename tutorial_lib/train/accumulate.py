# Exported from chapters/part_4_scaling_up/4_2_accumulation_and_mixed_precision.ipynb.
# Edit the lesson, then run: make export
"""A large batch in small pieces: exactly the gradient of the whole, however what counts is spread over them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tutorial_lib.train.distributed import all_sum, gradient_sync, world_size
from tutorial_lib.train.objective import Batch, NextToken, Objective, Totals
from tutorial_lib.train.precision import Precision

__all__ = ["split_batch", "accumulate_gradients"]


def split_batch(batch: Batch, size: int | None = None) -> list[Batch]:
    """Cut a batch into micro-batches of at most `size` rows; None leaves it whole.

    Raises:
        ValueError: if its tensors have not the same rows, or `size` is below 1.
    """
    rows = [len(part) for part in batch]
    if len(set(rows)) != 1:
        raise ValueError(f"the tensors of a batch have {rows} rows: they need the same number of them")
    size = max(1, rows[0]) if size is None else size  # without rows, one piece without rows
    if size < 1:
        raise ValueError(f"a micro-batch of {size} rows: at least 1 is needed")
    return list(zip(*(part.split(size) for part in batch), strict=True))


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    precision: Precision | None = None,
    objective: Objective | None = None,
) -> dict[str, Tensor]:
    """Add up the gradients of all micro-batches, of all processes; returns the means: `loss`, and the metrics.

    Each piece's *sum* is divided by what counts in the *whole* batch. (A mean of the pieces' means would weigh a
    label in a short piece more than one in a full piece.)

    Args:
        model: On its device; micro-batches are moved there one at a time. Gradients are added to those that its
            parameters have: call `zero_grad` once before.
        micro_batches: From `split_batch`, one at least and as many in every process; the last one lets the processes
            share gradients.
        precision: Autocast and loss scale; fp32 when None. The gradients carry its scale.
        objective: `NextToken` when None.

    Raises:
        ValueError: if nothing counts, in any process.
    """
    objective = objective or NextToken()
    device = next(model.parameters()).device
    precision = precision or Precision(device)
    counts = sum(objective.count(batch) for batch in micro_batches)
    # In the processor's memory, where the batch is: asking a GPU for a number would be waiting for it.
    count = all_sum(torch.as_tensor(counts, dtype=torch.float64, device="cpu")).item()
    if count == 0:  # in all processes or in none: nobody is left waiting
        raise ValueError(
            "nothing in this batch counts (every label is -100?): there is nothing to learn from"
        )
    totals = Totals(device)
    for i, batch in enumerate(micro_batches):
        batch = _moved(batch, device)
        with gradient_sync(model, enabled=i == len(micro_batches) - 1):
            with precision.autocast():
                loss, metrics = objective.loss(model, batch)
                share = loss / count
            # Data-parallel wrappers average gradients over the processes; the sum is wanted here.
            precision.backward(share * world_size())
        totals.add(loss, metrics)
    return totals.means(count, all_sum)


def _moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device. A GPU copies pinned memory while it computes; for any other, it is waited for first."""
    pins = device.type == "cuda"
    return tuple(
        (part.pin_memory() if pins and not part.is_cuda else part).to(device, non_blocking=True)
        for part in batch
    )
