# Exported from chapters/part_3_modernizing/3_6_rolling_kv_cache.ipynb. Edit the lesson, then run: make export
"""A cache that never grows: sinks that stay, and a ring of the last `window` tokens.

Letters: B batch · H heads (of keys) · T new tokens · S slots = sinks + window · C channels of a head.
"""

import torch
from torch import Tensor

from tutorial_lib.core.kv_cache import EMPTY, KVCache

__all__ = ["RollingKVCache"]


class RollingKVCache(KVCache):
    """Keys and values of the first `sinks` tokens and of the last `window`, whatever the length of the text.

    A token at position p lies in slot p while p < sinks, and later in slot sinks + (p − sinks) mod window,
    where it replaces the token that stood exactly one window before. Positions never restart: a key keeps the
    rotation with which it came, so distances stay true after any number of rounds. It is exact for a layer
    whose rule is `SlidingWindow(window, sinks)`.

    Args:
        batch_size: B.
        n_kv_heads: Key heads of the layer.
        window: Length of the ring.
        sinks: First tokens that are never replaced.
        d_head: C.
        device: Where.
        dtype: The keys' type.
    """

    def __init__(
        self,
        batch_size: int,
        n_kv_heads: int,
        window: int,
        sinks: int,
        d_head: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # One slot more than sinks and window: the bin. What need not be kept is written there, and no token
        # ever sees it, since its position stays EMPTY.
        super().__init__(batch_size, n_kv_heads, sinks + window + 1, d_head, device, dtype)
        self.window, self.sinks = window, sinks

    def slot(self, position: Tensor) -> Tensor:
        """Where a token at this position is kept."""
        ring = self.sinks + (position - self.sinks) % self.window
        return torch.where(position < self.sinks, position, ring)

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Remember new tokens, and hand back all that they may have to look at; see `KVCache.append`.

        A chunk of any length is exact. Its first tokens must still see what its last tokens push out, so the
        old contents and the whole chunk are handed back, side by side, and the ring keeps only the rest.
        """
        self._check(k)
        k, v = k.type_as(self.keys), v.type_as(self.values)  # scatter does not convert
        B, _, T, _ = k.shape
        self.padded |= positions.ndim == 2
        positions = positions.expand(B, T)
        if T == 1:  # it pushes out only what it can no longer see: no copy is needed, the ring itself will do
            self._write(k, v, positions)
            return self._held()
        old_k, old_v, old_positions = self._held()
        seen = (
            torch.cat([old_k, k], dim=2),  # (B, H, K, C)
            torch.cat([old_v, v], dim=2),
            torch.cat([old_positions, positions], dim=1),  # (B, K)
        )
        self._write(k, v, positions)
        return seen

    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        # Rows of one length fill the slots from the left. Padded rows differ, and they need the bin, too: a
        # lone padding token must find padding to look at, or its softmax is over nothing.
        S = self.sinks + self.window
        held = S + 1 if self.padded else min(self.length, S)
        return self.keys[:, :, :held], self.values[:, :, :held], self.positions[:, :held]

    def _write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        # Of a long chunk only the sinks and the last window are written: two tokens for one slot would leave
        # it open which of them stays. The bin may be written many times over.
        last = positions.max(dim=1, keepdim=True).values  # (B, 1)
        keep = (positions >= 0) & ((positions < self.sinks) | (positions > last - self.window))
        slots = self.slot(positions).where(keep, self.sinks + self.window)  # (B, T)
        index = slots[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index, k)
        self.values.scatter_(2, index, v)
        self.positions.scatter_(1, slots, positions.where(keep, EMPTY))
        self.length += k.shape[2]
