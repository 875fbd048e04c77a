# Exported from chapters/part_1_core_transformer/1_5_feed_forward.ipynb.
# Edit the lesson, then run: make export
"""The feed-forward layer: expand, bend, contract. Each position thinks for itself."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["gelu_tanh", "relu_squared", "ACTIVATIONS", "MLP"]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation that GPT-2 was trained with (Hendrycks & Gimpel 2016, section 2).

    0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))). It differs from the exact x·Φ(x) by up to 0.0005: weights
    trained with one form want that form.
    """
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
"""What `MLP(activation=…)` understands."""


class MLP(nn.Module):
    """Expand, bend, contract: `down(activation(up(x)))`, the same for every position.

    "Attention Is All You Need", equation 2, with a choice of activation.

    Args:
        d_model: Width of the residual stream.
        d_mlp: Width in the middle; 4 · d_model when None, the ratio of the original Transformer.
        activation: A name from `ACTIVATIONS`.
        bias: Whether the two projections have one.

    Raises:
        ValueError: if `ACTIVATIONS` has no such name.
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
        return self.down(self.activation(self.up(x)))  # the activation between the two: never after
