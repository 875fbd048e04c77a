"""How good is a model at its objective, whatever that is, on rows that it was not trained on?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tutorial_lib.train.objective import Batch, Objective

__all__ = ["held_out"]


@torch.no_grad()
def held_out(model: nn.Module, batches: Iterable[Batch], objective: Objective) -> dict[str, float]:
    """The means over all that counts in the batches: `loss`, and the objective's metrics.

    The sums are divided once, at the end. The model is in eval mode meanwhile, and afterwards in the mode in which
    it came.

    Raises:
        ValueError: if nothing in them counts.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {}
    count = 0
    try:
        for batch in batches:
            count += int(objective.count(batch))
            loss, metrics = objective.loss(model, tuple(part.to(device) for part in batch))
            for name, total in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + total.item()
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("nothing in the held-out batches counts: there is nothing to evaluate")
    return {name: total / count for name, total in sums.items()}
