# Exported from chapters/part_1_core_transformer/1_1_positional_embeddings.ipynb.
# Edit the lesson, then run: make export
"""Where is each token? Two tables of position vectors, one computed and one learned."""

import torch
from torch import Tensor, nn

__all__ = ["sinusoidal_table", "SinusoidalPositionalEmbedding", "LearnedPositionalEmbedding"]


def sinusoidal_table(max_seq_len: int, d_model: int, base: float = 10_000.0) -> Tensor:
    """The fixed position vectors of "Attention Is All You Need", section 3.5.

    Columns come in pairs `(2i, 2i+1)`: the sine and the cosine of `position · base^(-2i / d_model)`, one
    clock hand per pair. The fastest goes round once in 2π tokens, the slowest in almost 2π · base.

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
    # A compiled graph cannot stop to look at a number, so it goes without this check.
    if torch.compiler.is_compiling() or not positions.numel():
        return
    lowest, highest = (int(bound) for bound in positions.aminmax())
    if highest >= max_seq_len:
        raise IndexError(
            f"position {highest} is past the table of {max_seq_len}: "
            "shorten the sequence or build the model with a larger max_seq_len"
        )
    if lowest < 0:  # Python would count it from the table's end, and say nothing
        raise IndexError(f"position {lowest} is negative: positions start at 0")


class SinusoidalPositionalEmbedding(nn.Module):
    """Looks positions up in `sinusoidal_table`. Nothing to learn, and nothing to save."""

    def __init__(self, max_seq_len: int, d_model: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        # A buffer follows .to(device), and the optimizer leaves it alone.
        self.register_buffer("table", sinusoidal_table(max_seq_len, d_model, base), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions `(..., T)` of integers in, vectors `(..., T, d_model)` out.

        Raises:
            IndexError: if a position is negative or past the table.
        """
        _check_positions(positions, self.max_seq_len)
        return self.table[positions]


class LearnedPositionalEmbedding(nn.Module):
    """One trainable vector for each position, as in GPT-2. A position never trained on means nothing."""

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.weight = nn.Parameter(torch.randn(max_seq_len, d_model) * 0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions `(..., T)` of integers in, vectors `(..., T, d_model)` out.

        Raises:
            IndexError: if a position is negative or past the table.
        """
        _check_positions(positions, self.max_seq_len)
        return self.weight[positions]
