# Exported from chapters/part_1_core_transformer/1_4_multi_head_attention.ipynb.
# Edit the lesson, then run: make export
"""Multi-head attention: one wide projection, cut into heads that attend side by side.

Letters: B batch · T time · D model width · H heads · C channels of a head (D = H·C).
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tutorial_lib.core.attention import scaled_dot_product_attention
from tutorial_lib.core.masks import causal_mask

__all__ = ["split_heads", "merge_heads", "MultiHeadAttention"]


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """`(B, T, H·C)` -> `(B, H, T, C)`: head `h` takes channels `h·C` to `(h+1)·C`."""
    return rearrange(x, "b t (h c) -> b h t c", h=n_heads)


def merge_heads(x: Tensor) -> Tensor:
    """`(B, H, T, C)` -> `(B, T, H·C)`: the inverse of `split_heads`."""
    return rearrange(x, "b h t c -> b t (h c)")


class MultiHeadAttention(nn.Module):
    """Self-attention with `n_heads` heads ("Attention Is All You Need", section 3.2.2).

    Args:
        d_model: Width of the residual stream; `n_heads` must divide it.
        n_heads: How many heads look in parallel.
        causal: Whether a position is kept from seeing the future.
        bias: Whether the projections have one.
        dropout: Probability of dropping an attention weight while training.
        fused: Use torch's fused kernel, which never stores the T×T weights. The result is the same.

    Raises:
        ValueError: if `n_heads` does not divide `d_model`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            near = [n for n in range(1, d_model + 1) if d_model % n == 0]
            near = min(near, key=lambda n: abs(n - n_heads))
            raise ValueError(f"d_model {d_model} does not split into {n_heads} heads: try n_heads={near}")
        self.n_heads, self.causal, self.dropout, self.fused = n_heads, causal, dropout, fused
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)  # three projections in one multiplication
        self.out = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x` is `(B, T, D)`, `mask` (True = may attend) broadcasts to `(B, H, T, T)`; gives `(B, T, D)`."""
        q, k, v = (split_heads(part, self.n_heads) for part in self.qkv(x).chunk(3, dim=-1))  # (B, H, T, C)
        if self.causal and (mask is not None or not self.fused):
            causal = causal_mask(x.shape[1], device=x.device)  # (T, T)
            mask = causal if mask is None else mask & causal
        dropout = self.dropout if self.training else 0.0  # the kernel does not know about .eval()
        if self.fused:
            # is_causal spares the kernel the masked half; a mask of our own already holds the triangle.
            is_causal = self.causal and mask is None
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
            )
        else:
            _, weights = scaled_dot_product_attention(q, k, v, mask)  # (B, H, T, T)
            mixed = F.dropout(weights, dropout) @ v
        return self.out(merge_heads(mixed))  # (B, H, T, C) -> (B, T, D)

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention weights `(B, H, T, T)` for `x`, to look at."""
        q, k, v = (split_heads(part, self.n_heads) for part in self.qkv(x).chunk(3, dim=-1))
        if self.causal:
            causal = causal_mask(x.shape[1], device=x.device)
            mask = causal if mask is None else mask & causal
        return scaled_dot_product_attention(q, k, v, mask)[1]
