"""The same numbers in another order in memory, where that is read faster.

Writing one token reads every weight once and does little else, so its speed is that of memory. A matrix lies there
row by row: each output is a row's product with the input. Column by column, the outputs grow together, all by one
column at a time, and where a column is long that is easier on a CPU: on one with two cores, SmolLM2 wrote 1.2 times
as fast. Nothing changes but the strides, and the last bit of a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["lay_out"]


@torch.no_grad()
def lay_out(model: nn.Module) -> nn.Module:
    """Put the matrices of a CPU's linear layers in order for writing token by token, in place.

    Those that have at least as many rows as columns come to lie column by column. The rule looks at shapes alone,
    and not at a clock: the same seed has to write the same text tomorrow.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
            if module.out_features >= module.in_features:
                module.weight.data = _by_columns(module.weight.data)  # a tied table stays tied: one parameter
    return model


def _by_columns(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()
