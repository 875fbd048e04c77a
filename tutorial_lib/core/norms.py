# Exported from chapters/part_1_core_transformer/1_6_transformer_block.ipynb.
# Edit the lesson, then run: make export
"""Two ways to keep the residual stream at a readable size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(nn.Module):
    """(x − mean) / √(variance + eps) · weight + bias, over the last dimension (Ba et al. 2016, eq. 4).

    The variance is the biased one (divided by D, not D − 1).

    Args:
        d_model: D, the size of the last dimension.
        eps: Keeps a token of equal numbers from a division by zero.
        bias: Whether there is a learned shift.
    """

    def __init__(self, d_model: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d_model)` in and out. One fused kernel; the lesson writes it out and shows them equal."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight, over the last dimension (Zhang & Sennrich 2019, eq. 4).

    No mean is subtracted and no bias added. The statistic is taken in fp32, so bf16 input keeps its scale.

    Args:
        d_model: The size of the last dimension.
        eps: Keeps a token of zeros from a division by zero.
    """

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d_model)` in and out."""
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)  # (..., 1)
        return (x.float() * scale).type_as(x) * self.weight
