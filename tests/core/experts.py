"""A layer of experts, as plain as can be, for tests of all that has to know of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_lib.core.swiglu import SwiGLU

FORMS = {"modules": False, "stacks": True}
"""How a layer keeps its experts: `stacked` or not."""


class Experts(nn.Module):
    """E gated MLPs, K of them for each token, and one more for all; each a module, or all together three stacks."""

    def __init__(self, D: int, M: int, E: int, K: int = 2, stacked: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.K, self.stacked = K, stacked
        self.router, self.shared = nn.Linear(D, E, bias), SwiGLU(D, M)
        self.router.full_precision = True
        if stacked:
            self.gate, self.up = nn.Parameter(torch.empty(E, M, D)), nn.Parameter(torch.empty(E, M, D))
            self.down = nn.Parameter(torch.empty(E, D, M))
        else:
            self.experts = nn.ModuleList(SwiGLU(D, M) for _ in range(E))

    def expert(self, e: int, x: Tensor) -> Tensor:
        """`(n, D)` in and out."""
        if not self.stacked:
            return self.experts[e](x)
        return F.linear(F.silu(F.linear(x, self.gate[e])) * F.linear(x, self.up[e]), self.down[e])

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` in and out."""
        weights, chosen = self.router(x).softmax(dim=-1).topk(self.K)  # (B, T, K)
        y = self.shared(x)
        for e in range(self.router.out_features):
            b, t, k = (chosen == e).nonzero(as_tuple=True)
            y = y.index_put((b, t), weights[b, t, k, None] * self.expert(e, x[b, t]), accumulate=True)
        return y
