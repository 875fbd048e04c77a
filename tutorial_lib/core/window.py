# Exported from chapters/part_3_modernizing/3_5_sliding_window_and_sinks.ipynb.
# Edit the lesson, then run: make export
"""Attention that forgets: a window over the nearest past, and sinks at the start that are never forgotten."""

from torch import Tensor

from tutorial_lib.core.gqa import Causal

__all__ = ["SlidingWindow"]


class SlidingWindow(Causal):
    """Each token sees the last `window` tokens, itself among them, and the first `sinks` of the text.

    Window: Beltagy et al. 2020, "Longformer", section 3.1; sinks: Xiao et al. 2023, "Efficient Streaming
    Language Models with Attention Sinks". The same rule serves training, prefill and decode, since it only
    looks at positions.

    Args:
        window: How many tokens back, the token itself included; at least 1.
        sinks: How many first tokens stay visible for ever.

    Raises:
        ValueError: if the window is below 1 or sinks below 0.
    """

    def __init__(self, window: int, sinks: int = 0) -> None:
        if window < 1:
            raise ValueError(f"window is {window}, but a token must at least see itself: use 1 or more")
        if sinks < 0:
            raise ValueError(f"sinks is {sinks}, but must be 0 (none) or more")
        self.window, self.sinks = window, sinks

    def covers(self, n_keys: int) -> bool:
        """Whether nobody loses sight of anything when there are `n_keys` consecutive tokens."""
        return n_keys <= self.sinks + self.window

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Bool `(B, T, K)` or `(T, K)`, from positions, as in `Causal`."""
        query, key = query_positions[..., :, None], key_positions[..., None, :]
        near = (query - key < self.window) | (key < self.sinks)
        return super().__call__(query_positions, key_positions) & near  # the sinks' future stays hidden, too
