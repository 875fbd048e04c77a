# Exported from chapters/part_3_modernizing/3_4_kv_cache.ipynb. Edit the lesson, then run: make export
"""What was computed for the past is kept: keys and values, and the position at which each of them stands.

Letters: B batch · H heads (of keys) · T new tokens · S slots · C channels of a head.
"""

import torch
from torch import Tensor

__all__ = ["EMPTY", "KVCache"]


EMPTY = -1
"""The position of padding, and of a slot that nothing was written to."""


class KVCache:
    """Room for the keys and values of one attention layer, filled from the left.

    A plain object that is handed to the layer, so that one model serves many conversations. Every slot knows
    the position of its token, and that alone decides who may see it: `positions` is `EMPTY` where there is
    padding or nothing yet.

    Args:
        batch_size: B.
        n_kv_heads: Key heads of the layer.
        max_len: S, the most tokens that it can hold.
        d_head: C.
        device: Where.
        dtype: The keys' type.
    """

    def __init__(
        self,
        batch_size: int,
        n_kv_heads: int,
        max_len: int,
        d_head: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch_size, n_kv_heads, max_len, d_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # zeros: an unseen NaN would still spread
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.positions = torch.full((batch_size, max_len), EMPTY, device=device)
        self.length = 0
        self.padded = False

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: 2 · B · H · S · C · bytes per number."""
        return self.keys.nbytes + self.values.nbytes

    def reset(self) -> None:
        """Forget everything; the memory stays. Old numbers may stay too: no position points to them."""
        self.positions.fill_(EMPTY)
        self.length = 0
        self.padded = False

    def next_positions(self, n_tokens: int) -> Tensor:
        """Where the next tokens stand: `(T,)` when all rows go on together, `(B, T)` when they differ."""
        new = torch.arange(n_tokens, device=self.positions.device)
        if not self.padded:
            return self.length + new
        return self.positions.max(dim=1, keepdim=True).values + 1 + new

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Remember new tokens, and hand back all that they may have to look at.

        Args:
            k: Keys `(B, H, T, C)`, already rotated.
            v: Values `(B, H, T, C)`.
            positions: `(T,)` when every row continues at the same place, one after the other; else `(B, T)`,
                with `EMPTY` for padding.

        Returns:
            Keys and values `(B, H, K, C)` and their positions `(B, K)`: views, not copies.

        Raises:
            ValueError: if they do not fit.
        """
        self._check(k)
        start, end = self.length, self.length + k.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(
                f"the cache has room for {self.keys.shape[2]} tokens and holds {start}: {k.shape[2]} more do "
                "not fit, so make it with a larger max_len"
            )
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.positions[:, start:end] = positions
        self.length = end
        self.padded |= positions.ndim == 2
        return self.keys[:, :, :end], self.values[:, :, :end], self.positions[:, :end]

    def _check(self, k: Tensor) -> None:
        B, H, _, C = self.keys.shape
        if (k.shape[0], k.shape[1], k.shape[3]) != (B, H, C):
            raise ValueError(
                f"the cache is for {B} rows, {H} key heads and {C} channels, but got {k.shape[0]}, {k.shape[1]} "
                f"and {k.shape[3]}: make one for this batch and model"
            )
        if k.requires_grad:  # writing would tie every later step to this one's graph
            raise ValueError("a KV cache is for inference: call the model under torch.no_grad()")
