"""Where is each token? Two tables of position vectors, one computed and one learned."""

import torch
from torch import Tensor, nn


def sinusoidal_table(max_seq_len: int, d_model: int, base: float = 10_000.0) -> Tensor:
    """The fixed position vectors of "Attention Is All You Need", section 3.5.

    Columns come in pairs `(2i, 2i+1)`: the sine and the cosine of `position · base^(-2i / d_model)`, one
    clock hand per pair, from one turn every 2π tokens to one turn every 2π · base tokens.

    Returns:
        A float tensor of shape `(max_seq_len, d_model)`.

    Raises:
        ValueError: if `d_model` is odd (every sine needs its cosine).
    """
    if d_model % 2:
        raise ValueError(f"d_model is {d_model}, but sines and cosines come in pairs: use an even number")
    position = torch.arange(max_seq_len, dtype=torch.float32)[:, None]  # (T, 1)
    frequency = base ** (-torch.arange(0, d_model, 2, dtype=torch.float32) / d_model)  # (D/2,)
    angle = position * frequency  # (T, D/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (T, D/2, 2) -> (T, D)


def _check_positions(positions: Tensor, max_seq_len: int) -> None:
    if positions.numel() and int(positions.max()) >= max_seq_len:
        raise IndexError(
            f"position {int(positions.max())} is past the table of {max_seq_len}: "
            "shorten the sequence or build the model with a larger max_seq_len"
        )


class SinusoidalPositionalEmbedding(nn.Module):
    """Looks positions up in `sinusoidal_table`. Nothing to learn, and nothing to save."""

    def __init__(self, max_seq_len: int, d_model: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.register_buffer("table", sinusoidal_table(max_seq_len, d_model, base), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions `(..., T)` of integers in, vectors `(..., T, d_model)` out."""
        _check_positions(positions, self.max_seq_len)
        return self.table[positions]


class LearnedPositionalEmbedding(nn.Module):
    """One trainable vector for each position, as in GPT-2. A position never trained on means nothing."""

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.weight = nn.Parameter(torch.randn(max_seq_len, d_model) * 0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions `(..., T)` of integers in, vectors `(..., T, d_model)` out."""
        _check_positions(positions, self.max_seq_len)
        return self.weight[positions]
