# Exported from chapters/part_2_training_a_tiny_llm/2_4_training_loop.ipynb.
# Edit the lesson, then run: make export
"""The learning rate over a run: up in a line, down along a cosine."""

import math

__all__ = ["warmup_cosine"]


def warmup_cosine(progress: float, warmup: float = 0.05, floor: float = 0.1) -> float:
    """The factor on the peak learning rate when `progress` (0 to 1) of the run is done.

    The cosine is that of Loshchilov & Hutter 2017 (SGDR, equation 5), without restarts.

    Args:
        progress: Fraction of the run, in steps or in time; beyond 1 the factor stays at the floor.
        warmup: Fraction spent rising from 0 to 1.
        floor: The factor at the end.
    """
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / (1 - warmup)) if warmup < 1 else 1.0
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
