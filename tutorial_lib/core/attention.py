# Exported from chapters/part_1_core_transformer/1_2_self_attention_first_principles.ipynb.
# Edit the lesson, then run: make export
"""Scaled dot-product attention, written out: compare, normalize, mix.

Letters: Q queries · K keys · C channels of a head.
"""

import math

from torch import Tensor

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √C) v, from "Attention Is All You Need", equation 1.

    Args:
        q: Queries `(..., Q, C)`.
        k: Keys `(..., K, C)`.
        v: Values `(..., K, C_v)`.
        mask: Bool, broadcastable to `(..., Q, K)`; True = may attend. A query that may attend to
            nothing gets zeros (a plain softmax over nothing would be NaN).

    Returns:
        The mixed values `(..., Q, C_v)` and the attention weights `(..., Q, K)`, whose rows sum to 1.

    Raises:
        ValueError: if queries and keys differ in width.
    """
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"queries have {q.shape[-1]} channels and keys {k.shape[-1]}: they must match")
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., Q, K)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))  # before the softmax, or the sums are wrong
    weights = scores.softmax(dim=-1)  # over the keys: each query shares out exactly one unit of attention
    if mask is not None:
        weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)  # rows of NaN: nobody to ask
    return weights @ v, weights  # (..., Q, C_v), (..., Q, K)
