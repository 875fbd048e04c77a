"""How good is a model at its objective, whatever that is, on rows that it was not trained on?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tutorial_lib.train.objective import Batch, Objective, Totals

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
    totals, count = Totals(device), 0
    try:
        for batch in batches:
            count += int(objective.count(batch))
            totals.add(*objective.loss(model, tuple(part.to(device) for part in batch)))
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("nothing in the held-out batches counts: there is nothing to evaluate")
    return {name: mean.item() for name, mean in totals.means(count).items()}
