"""One attention head: three linear maps around scaled dot-product attention."""

from torch import Tensor, nn

from tutorial_lib.core.attention import scaled_dot_product_attention


class AttentionHead(nn.Module):
    """Asks (q), is asked (k), and answers (v).

    Args:
        d_model: Width of the residual stream that comes in.
        d_head: Width of the queries, keys and values.
        bias: Whether the three projections have one.
    """

    def __init__(self, d_model: int, d_head: int, bias: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(d_model, d_head, bias=bias)
        self.k = nn.Linear(d_model, d_head, bias=bias)
        self.v = nn.Linear(d_model, d_head, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x` is `(B, T, d_model)`, `mask` broadcasts to `(B, T, T)`; returns `(B, T, d_head)`."""
        out, _ = scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask)
        return out
