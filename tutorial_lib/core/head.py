# Exported from chapters/part_1_core_transformer/1_3_build_attention_head.ipynb.
# Edit the lesson, then run: make export
"""One attention head: three linear maps around scaled dot-product attention.

Letters: B batch · T time · D model width · C channels of the head.
"""

from torch import Tensor, nn

from tutorial_lib.core.attention import scaled_dot_product_attention

__all__ = ["AttentionHead"]


class AttentionHead(nn.Module):
    """Asks (q), is asked (k), and answers (v).

    Args:
        d_model: D, the width of the residual stream that comes in.
        d_head: C, the width of the queries, keys and values.
        bias: Whether the three projections have one.
    """

    def __init__(self, d_model: int, d_head: int, bias: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(d_model, d_head, bias=bias)
        self.k = nn.Linear(d_model, d_head, bias=bias)
        self.v = nn.Linear(d_model, d_head, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x` is `(B, T, D)`, `mask` (True = may attend) broadcasts to `(B, T, T)`; gives `(B, T, C)`."""
        out, _ = scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask)
        return out
