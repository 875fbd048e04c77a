# Exported from chapters/part_1_core_transformer/1_6_transformer_block.ipynb.
# Edit the lesson, then run: make export
"""A Transformer block: attention moves information between positions, the MLP works on each."""

from torch import Tensor, nn

from tutorial_lib.core.mlp import MLP
from tutorial_lib.core.multihead import MultiHeadAttention
from tutorial_lib.core.norms import LayerNorm

__all__ = ["Block"]


class Block(nn.Module):
    """A pre-norm block, as in GPT-2: `x + attn(norm(x))`, then `x + mlp(norm(x))`.

    The residual stream is only ever added to, so gradients reach the first layer undamped.

    Args:
        d_model: Width of the residual stream.
        n_heads: Attention heads; must divide `d_model`.
        d_mlp: Width inside the MLP; 4 · d_model when None.
        dropout: Probability of dropping attention weights and branch outputs while training.
        bias: Whether linear layers and norms have one.
    """

    def __init__(
        self, d_model: int, n_heads: int, d_mlp: int | None = None, dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(d_model, bias=bias)
        self.attn = MultiHeadAttention(d_model, n_heads, causal=True, bias=bias, dropout=dropout)
        self.norm2 = LayerNorm(d_model, bias=bias)
        self.mlp = MLP(d_model, d_mlp, activation="gelu_tanh", bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, T, d_model)` in and out; `mask` (True = may attend) further restricts the causal one."""
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x
