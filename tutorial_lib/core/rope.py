# Exported from chapters/part_3_modernizing/3_2_rope.ipynb. Edit the lesson, then run: make export
"""Rotary position embedding: each pair of channels is a clock hand, and position is how far it has turned.

Letters: B batch · H heads · T time · C channels of a head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "apply_rope",
    "interleaved_to_half",
    "half_to_interleaved",
    "RopeScaling",
    "rope_frequencies",
    "RotaryEmbedding",
]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair `(i, i + C/2)` of queries or keys by the angle of its position.

    The half-split layout of Llama and of Hugging Face's weights: the pair's first numbers are the first half
    of the channels. (The paper's own layout interleaves: pairs `(2i, 2i + 1)`; see `interleaved_to_half`.)

    Args:
        x: Queries or keys `(B, H, T, C)`.
        cos: Cosines of the angles `(T, C/2)`, or `(B, 1, T, C/2)` when rows stand at different positions.
        sin: Their sines, of the same shape.

    Returns:
        `(B, H, T, C)` in the type of `x`. Lengths are unchanged: a rotation moves nothing nearer to zero.

    Raises:
        ValueError: if there are not C/2 angles.
    """
    if x.shape[-1] != 2 * cos.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} channels, but there are angles for {2 * cos.shape[-1]}")
    first, second = x.float().chunk(2, dim=-1)  # (B, H, T, C/2) each
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.type_as(x)


def interleaved_to_half(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the output rows of a query or key projection from pairs `(2i, 2i+1)` to pairs `(i, i + C/2)`.

    Queries and keys reordered alike have the same products, so nothing else in the model changes.

    Args:
        weight: `(n_heads·C, ...)`: the weight of a linear layer, or its bias.
        n_heads: Heads in this projection (key heads for the key projection).
    """
    C = weight.shape[0] // n_heads
    pairs = weight.reshape(n_heads, C // 2, 2, *weight.shape[1:])  # head, pair, which of the two
    return pairs.transpose(1, 2).reshape(weight.shape)


def half_to_interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of `interleaved_to_half`."""
    C = weight.shape[0] // n_heads
    halves = weight.reshape(n_heads, 2, C // 2, *weight.shape[1:])  # head, which of the two, pair
    return halves.transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class RopeScaling:
    """How to slow the hands down, so that a model reads further than it was trained to."""

    kind: str = "linear"
    """`linear` (Chen et al. 2023: every position divided by the factor), `ntk` (a larger base: fast hands
    keep their speed, the slowest is slowed by the factor) or `llama3` (fast hands untouched, slow hands
    divided by the factor, a ramp between)."""
    factor: float = 1.0
    """How many times longer the context becomes."""
    original_max_seq_len: int = 8192
    """`llama3`: the length that the model was trained on first."""
    low_freq_factor: float = 1.0
    """`llama3`: hands that turn fewer times than this in the original length are slow."""
    high_freq_factor: float = 4.0
    """`llama3`: hands that turn more times than this in the original length are fast."""

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "ntk", "llama3"):
            raise ValueError(f"unknown RoPE scaling {self.kind!r}: choose linear, ntk or llama3")
        if self.factor < 1:
            raise ValueError(
                f"RoPE scaling factor is {self.factor}, but 1 changes nothing and more reads further"
            )


def rope_frequencies(
    d_head: int,
    base: float = 10_000.0,
    scaling: RopeScaling | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """How far each hand turns per token, in radians: θᵢ = base^(−2i / C) (Su et al. 2021, section 3.2.2).

    Returns:
        A float tensor of shape `(d_head / 2,)`, from the fastest hand (1 radian) to the slowest.

    Raises:
        ValueError: if `d_head` is odd (a hand needs two channels).
    """
    if d_head % 2:
        raise ValueError(f"d_head is {d_head}, but RoPE turns channels in pairs: use an even number")
    if scaling is not None and scaling.kind == "ntk":
        base = base * scaling.factor ** (d_head / max(d_head - 2, 1))  # the slowest hand: exactly 1/factor
    # One over a power, as Llama's code has it, and not a negative power: at position 5000 the last bit counts.
    frequency = 1 / base ** (
        torch.arange(0, d_head, 2, dtype=torch.float32, device=device) / d_head
    )  # (C/2,)
    if scaling is None or scaling.kind == "ntk":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_max_seq_len / (2 * math.pi / frequency)  # full turns in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    fast = ((turns - low) / (high - low)).clamp(0, 1)  # 0 for slow hands, 1 for fast ones
    return fast * frequency + (1 - fast) * frequency / scaling.factor


class RotaryEmbedding(nn.Module):
    """From positions to the cosines and sines that `apply_rope` wants. Nothing to learn, and no longest length.

    Angles are computed in fp32 whatever the model's type: in bf16 position 257 would be position 256.

    Args:
        d_head: C, channels of a head; even.
        base: θ's base: larger means slower hands and a longer reach.
        scaling: How to read further than the training length.
    """

    def __init__(self, d_head: int, base: float = 10_000.0, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        rope_frequencies(d_head, base, scaling)  # complains now, not at the first token
        self.d_head, self.base, self.scaling = d_head, base, scaling

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions `(T,)` give `(T, C/2)` twice; `(B, T)` give `(B, 1, T, C/2)`, ready for all heads."""
        # Computed anew each time: a buffer would follow the model to bf16, and these few numbers cost nothing.
        frequency = rope_frequencies(self.d_head, self.base, self.scaling, positions.device)
        angle = positions[..., None].float() * frequency  # (..., T, C/2)
        if positions.ndim == 2:
            angle = angle[:, None]  # the same for every head
        return angle.cos(), angle.sin()
