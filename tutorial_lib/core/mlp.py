"""The feed-forward layer: each position thinks for itself."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation that GPT-2 was trained with (Hendrycks & Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    """max(0, x)² (So et al. 2021, "Primer")."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": relu_squared,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
}


class MLP(nn.Module):
    """Expand, bend, contract: `down(activation(up(x)))`, the same for every position.

    Args:
        d_model: Width of the residual stream.
        d_mlp: Width in the middle; 4 · d_model when None, the ratio of the original Transformer.
        activation: A name from `ACTIVATIONS`.
        bias: Whether the two projections have one.
    """

    def __init__(
        self, d_model: int, d_mlp: int | None = None, activation: str = "gelu", bias: bool = True
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        d_mlp = 4 * d_model if d_mlp is None else d_mlp
        self.up = nn.Linear(d_model, d_mlp, bias=bias)
        self.down = nn.Linear(d_mlp, d_model, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d_model)` in, `(..., d_model)` out."""
        return self.down(self.activation(self.up(x)))
