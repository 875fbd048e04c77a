# Exported from chapters/part_3_modernizing/3_4_kv_cache.ipynb. Edit the lesson, then run: make export
"""Grouped-query attention, with all that a modern layer brings: rotation, QK-norm, a cache, a rule who sees whom.

Letters: B batch · T new tokens · K keys · H query heads · G key heads · C channels of a head · D model width.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tutorial_lib.core.kv_cache import KVCache
from tutorial_lib.core.multihead import merge_heads, split_heads
from tutorial_lib.core.norms import RMSNorm
from tutorial_lib.core.rope import apply_rope

__all__ = ["Causal", "GroupedQueryAttention"]


class Causal:
    """The rule of a causal layer: each token sees itself and its past, whole. Other rules derive from it."""

    def covers(self, n_keys: int) -> bool:
        """Whether nobody loses sight of anything when there are `n_keys` consecutive tokens."""
        return True

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Who may see whom, from where they stand and not from where they lie in memory.

        Args:
            query_positions: `(B, T)` or `(T,)`; -1 is padding.
            key_positions: `(B, K)` or `(K,)`; -1 is padding or an empty slot.

        Returns:
            Bool `(B, T, K)` or `(T, K)`. Nobody sees padding but padding itself, which must look somewhere:
            a softmax over nothing is NaN.
        """
        query, key = query_positions[..., :, None], key_positions[..., None, :]
        return (key <= query) & ((key >= 0) | (query < 0))


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))


class GroupedQueryAttention(nn.Module):
    """Causal self-attention in which groups of query heads share one key head (Ainslie et al. 2023).

    `n_kv_heads = n_heads` is multi-head attention, 1 is multi-query attention (Shazeer 2019).

    Args:
        d_model: Width of the residual stream.
        n_heads: Query heads.
        n_kv_heads: Key heads; must divide `n_heads`. The cache shrinks by n_heads / n_kv_heads.
        d_head: Channels of a head; d_model / n_heads when None.
        bias: Whether the projections have one.
        qk_norm: RMS-normalize queries and keys head by head before they are rotated (Henry et al. 2020; as in
            Qwen3): scores cannot grow without bound.
        norm_eps: Of that norm.
        rule: Who may see whom.
        dropout: Probability of dropping an attention weight while training.

    Raises:
        ValueError: if heads cannot be shared out evenly.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rule: Causal | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            near = _nearest_divisor(n_heads, n_kv_heads)
            raise ValueError(
                f"{n_heads} query heads cannot share {n_kv_heads} key heads evenly: try n_kv_heads={near}"
            )
        if d_head is None:
            if d_model % n_heads:
                near = _nearest_divisor(d_model, n_heads)
                raise ValueError(
                    f"d_model {d_model} does not split into {n_heads} heads: try n_heads={near}, or set d_head"
                )
            d_head = d_model // n_heads
        self.n_heads, self.n_kv_heads, self.d_head, self.dropout = n_heads, n_kv_heads, d_head, dropout
        self.rule = rule or Causal()
        self.q = nn.Linear(d_model, n_heads * d_head, bias=bias)
        self.k = nn.Linear(d_model, n_kv_heads * d_head, bias=bias)
        self.v = nn.Linear(d_model, n_kv_heads * d_head, bias=bias)
        self.out = nn.Linear(n_heads * d_head, d_model, bias=bias)
        self.q_norm = RMSNorm(d_head, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(d_head, norm_eps) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from the tokens of `x` to themselves and to what the cache remembers.

        Args:
            x: `(B, T, D)`.
            positions: Where the tokens stand: `(T,)`, consecutive, when all rows agree, else `(B, T)` with -1
                for padding.
            rope: Cosines and sines for these positions; None does not rotate.
            cache: Gets the new keys and values; None attends within `x` alone.
            mask: Bool, True = may attend, broadcastable to `(B, H, T, K)`; further restricts the rule.

        Returns:
            `(B, T, D)`.
        """
        q, k, v = self.project(x, rope)  # (B, H, T, C), (B, G, T, C), (B, G, T, C)
        key_positions = positions
        if cache is not None:
            k, v, key_positions = cache.append(k, v, positions)  # (B, G, K, C), (B, K)
            k, v = k.type_as(q), v.type_as(q)  # a cache may keep numbers in a smaller type than the model
        padded = positions.ndim == 2 or (cache is not None and cache.padded)
        visible, is_causal = self._visible(positions, key_positions, padded, mask)
        one_token = x.shape[1] == 1 and mask is None
        if one_token:  # the queries of a group line up before their key head, like tokens: nothing is copied
            q = rearrange(q, "b (g h) 1 c -> b g h c", g=self.n_kv_heads)
        else:
            k, v = self._share(k), self._share(v)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,  # the kernel does not know about .eval()
        )
        if one_token:
            mixed = rearrange(mixed, "b g h c -> b (g h) 1 c")
        return self.out(merge_heads(mixed))  # (B, H, T, C) -> (B, T, D)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, H, T, C)`, keys and values `(B, G, T, C)`: normalized, then rotated, before any cache."""
        q, k = split_heads(self.q(x), self.n_heads), split_heads(self.k(x), self.n_kv_heads)
        v = split_heads(self.v(x), self.n_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)  # values are not rotated
        return q, k, v

    def _share(self, k: Tensor) -> Tensor:
        # Neighbors share: query heads 0 … H/G − 1 use key head 0, and so on.
        groups = self.n_heads // self.n_kv_heads
        return k if groups == 1 else k.repeat_interleave(groups, dim=1)  # (B, G, K, C) -> (B, H, K, C)

    def _visible(
        self, positions: Tensor, key_positions: Tensor, padded: bool, mask: Tensor | None
    ) -> tuple[Tensor | None, bool]:
        # What the kernel needs: a mask, or is_causal, or neither when the newest token may see everything.
        T, K = positions.shape[-1], key_positions.shape[-1]
        if mask is None and not padded and self.rule.covers(K):
            if T == 1:  # is_causal would align the lone query with the first key, and see nothing else
                return None, False
            if T == K:
                return None, True
        visible = self.rule(positions, key_positions)  # (B, T, K) or (T, K)
        visible = visible[:, None] if visible.ndim == 3 else visible  # (B, 1, T, K): the same for all heads
        return (visible if mask is None else visible & mask), False
