# Exported from chapters/part_3_modernizing/3_3_swiglu.ipynb. Edit the lesson, then run: make export
"""SwiGLU: a feed-forward layer in which one half of the width decides how much of the other passes."""

from torch import Tensor, nn

from tutorial_lib.core.mlp import ACTIVATIONS

__all__ = ["gated_width", "SwiGLU"]


def gated_width(d_model: int, multiple_of: int = 8) -> int:
    """The width at which three matrices cost what two of width 4 · d_model do: 8/3 · d_model, rounded up.

    Rounding to a multiple keeps the matrices friendly to the hardware (Llama: 256).
    """
    return -(-8 * d_model // (3 * multiple_of)) * multiple_of


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) · up(x))` (Shazeer 2020, "GLU Variants Improve Transformer", equation 6).

    Args:
        d_model: Width of the residual stream.
        d_mlp: Width in the middle; when None, `gated_width(d_model)`: as many parameters as a plain MLP.
        activation: What bends the gate: `silu` makes it SwiGLU, `gelu` GEGLU, `relu` ReGLU.
        bias: Whether the three projections have one.

    Raises:
        ValueError: if `ACTIVATIONS` has no such name.
    """

    def __init__(
        self, d_model: int, d_mlp: int | None = None, activation: str = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        d_mlp = gated_width(d_model) if d_mlp is None else d_mlp
        self.gate = nn.Linear(d_model, d_mlp, bias=bias)
        self.up = nn.Linear(d_model, d_mlp, bias=bias)
        self.down = nn.Linear(d_mlp, d_model, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d_model)` in, `(..., d_model)` out."""
        return self.down(self.activation(self.gate(x)) * self.up(x))  # only the gate is bent, never `up`
