# Exported from chapters/part_5_moe/5_2_moe_layer.ipynb. Edit the lesson, then run: make export
"""All experts of a layer as stacks of matrices, and each token sent to its own: sorted, multiplied, put back.

Letters: N tokens · D model width · M width inside an expert · E experts · K experts of a token · R = N·K rows, one for each
choice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_lib.core.mlp import ACTIVATIONS

__all__ = ["sort_by_expert", "Experts", "Move"]


def sort_by_expert(experts: Tensor) -> tuple[Tensor, Tensor]:
    """For choices `(N, K)`: the order `(R,)` that sorts them all by expert, and the one that undoes it."""
    order = experts.flatten().argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return order, back


class Experts(nn.Module):
    """E feed-forwards: each `down(activation(gate(x)) · up(x))` or, without a gate, `down(activation(up(x)))`.

    Their matrices lie in stacks `(E, out, in)`, so that Muon, int8 and a GPU's grouped product see them together.

    Args:
        n_experts: E.
        d_model: D.
        d_expert: M.
        activation: A name from `ACTIVATIONS`.
        gated: Whether there is a gate, as in SwiGLU.

    Raises:
        ValueError: if `ACTIVATIONS` has no such name.
    """

    def __init__(
        self, n_experts: int, d_model: int, d_expert: int, activation: str = "silu", gated: bool = True
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]

        def stack(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(n_experts, rows, columns) * columns**-0.5)

        self.gate = stack(d_expert, d_model) if gated else None
        self.up = stack(d_expert, d_model)
        self.down = stack(d_model, d_expert)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """Rows `(R, D)`, those of expert 0 first, to as many rows; `sizes` `(E,)` says how many each has (or none)."""
        stacks = [weight for weight in (self.gate, self.up, self.down) if weight is not None]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, stacks = x.to(dtype), [w.to(dtype) if isinstance(w, Tensor) else w for w in stacks]
        # The kernel wants rows of whole 16 bytes.
        aligned = all(width % 8 == 0 for width in self.up.shape[1:])
        if x.is_cuda and x.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm"):
            # One kernel for all, which reads the sizes where they are: the processor need not wait for them.
            ends = sizes.cumsum(0, dtype=torch.int32)
            return self._feed(x, stacks, lambda rows, weight: F.grouped_mm(rows, weight[:].mT, offs=ends))
        return self._one_by_one(x, stacks, sizes)

    @torch.compiler.disable  # how many rows there are is known only when it runs
    def _one_by_one(self, x: Tensor, stacks: list[Any], sizes: Tensor) -> Tensor:
        # Backward of weight[e] makes a stack of zeros for each e, that of unbind one for all. Int8 has no backward.
        stacks = [w.unbind() if isinstance(w, Tensor) else w for w in stacks]
        groups = x.split(sizes.tolist())
        busy = [e for e, rows in enumerate(groups) if len(rows)] or [0]  # without tokens, still a result
        return torch.cat([self._feed(groups[e], [w[e] for w in stacks], F.linear) for e in busy])

    def _feed(self, x: Tensor, weights: list[Any], product: Any) -> Tensor:
        *gate, up, down = weights
        if not gate:
            return product(self.activation(product(x, up)), down)
        return product(self.activation(product(x, gate[0])) * product(x, up), down)

    def batched(self, x: Tensor) -> Tensor:
        """As many rows for each expert, `(E, C, D)` to `(E, C, D)`."""
        stacks = [weight[:] for weight in (self.gate, self.up, self.down) if weight is not None]
        return self._feed(x, stacks, lambda rows, weight: rows @ weight.mT)


class Move(torch.autograd.Function):
    """`x[index // K]`: every row of x is read K times, and `back` says where.

    Of an index that may be any, autograd must add gradients up row by row, since two may fall on one place. Here it is
    known who meets whom: backward is the same kind of read, and a sum over K.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, K: int) -> Tensor:
        """`(R / K, D)`, and two orders `(R,)` that undo each other, to `(R, D)`."""
        ctx.save_for_backward(back)
        ctx.K = K
        return x.index_select(0, index if K == 1 else index // K)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient's rows, put back and added up."""
        (back,) = ctx.saved_tensors
        rows = grad.index_select(0, back)
        return rows if ctx.K == 1 else rows.unflatten(0, (-1, ctx.K)).sum(dim=1), None, None, None
