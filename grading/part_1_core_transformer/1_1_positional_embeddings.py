"""Exercises of lesson 1.1, positional embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.core.positional import sinusoidal_table

# ── 1.1.a ────────────────────────────────────────────────────────────────────────────────────────────────


def _off_the_circle(table: Tensor) -> str | None:
    length = table[:, 0::2] ** 2 + table[:, 1::2] ** 2  # (T, D/2)
    off = ((length - 1).abs() > 1e-4).nonzero()
    if not len(off):
        return None
    p, i = off[0].tolist()
    a, b = table[p, 2 * i : 2 * i + 2].tolist()
    return (
        f"at position {p}, columns {2 * i} and {2 * i + 1} hold ({a:.2f}, {b:.2f}), "
        "which is not a sine and the cosine of the same angle"
    )


def _table(frequency: Callable[[int, float], Tensor], first: int = 0, swap: bool = False) -> Callable:
    """A table with one thing changed."""

    def build(max_seq_len: int, d_model: int, base: float = 10_000.0) -> Tensor:
        if d_model % 2:
            raise ValueError
        angle = torch.arange(first, max_seq_len + first)[:, None] * frequency(d_model, base)
        parts = [angle.cos(), angle.sin()] if swap else [angle.sin(), angle.cos()]
        return torch.stack(parts, dim=-1).flatten(1)

    return build


def _right(d_model: int, base: float) -> Tensor:
    return base ** (-torch.arange(0, d_model, 2) / d_model)


def all_sines_then_all_cosines(max_seq_len: int, d_model: int, base: float = 10_000.0) -> Tensor:
    """The hands are right, but the columns are concatenated where this table interleaves them. Both layouts
    work in a model trained with them; a checkpoint trained with one cannot read the other."""
    table = sinusoidal_table(max_seq_len, d_model, base)
    return torch.cat([table[:, 0::2], table[:, 1::2]], dim=-1)


def a_frequency_for_every_column(max_seq_len: int, d_model: int, base: float = 10_000.0) -> Tensor:
    """The exponent grew with every column, so a sine and the cosine beside it turn at different speeds. The
    formula gives columns 2i and 2i+1 the same frequency: count pairs, not columns."""
    if d_model % 2:
        raise ValueError
    angle = torch.arange(max_seq_len)[:, None] * base ** (-torch.arange(d_model) / d_model)
    angle[:, 0::2] = angle[:, 0::2].sin()
    angle[:, 1::2] = angle[:, 1::2].cos()
    return angle


def an_odd_width_slips_through(max_seq_len: int, d_model: int, base: float = 10_000.0) -> Tensor:
    """With an odd d_model the last sine has no cosine, and a shift is no longer a rotation. Raise a
    ValueError instead of building such a table."""
    angle = torch.arange(max_seq_len)[:, None] * _right(d_model, base)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :d_model]


TABLE = Exercise(
    id="1.1.a",
    symbol="sinusoidal_table",
    reference=sinusoidal_table,
    look_again="The formula, with shapes",
    probes=[
        Probe("shape and dtype", lambda f: f(5, 6), same_shape),
        Probe("each pair is a sine and its cosine", lambda f: f(6, 8), holds(_off_the_circle)),
        Probe(
            "two hands, three positions, by hand",
            lambda f: f(3, 4),
            equals(digits=4),
            given="max_seq_len = 3, d_model = 4",
        ),
        Probe(
            "another base",
            lambda f: f(4, 6, 100.0),
            equals(),
            given="max_seq_len = 4, d_model = 6, base = 100",
        ),
        Probe("equals the reference on a long table", lambda f: f(300, 64), equals(atol=1e-3)),
        Probe(
            "an odd d_model raises ValueError",
            lambda f: outcome(lambda: f(3, 5)),
            equals(),
            given="max_seq_len = 3, d_model = 5",
        ),
    ],
    misconceptions=[
        all_sines_then_all_cosines,
        a_frequency_for_every_column,
        Misconception(
            "the 2 in the exponent is lost",
            _table(lambda D, base: base ** (-torch.arange(D // 2) / D)),
            "Your exponent is i/D; the formula has 2i/D. With i/D the hands never get slower than one turn "
            "in 2π·√base tokens, and the table repeats itself far too soon.",
        ),
        Misconception(
            "spread to D/2 − 1",
            _table(lambda D, base: base ** (-torch.arange(D // 2) / (D // 2 - 1))),
            "You divided by the number of pairs minus one, so that the last hand hits 1/base exactly. An early "
            "library of the paper's authors does that; the paper's formula, and ours, divide 2i by D.",
        ),
        Misconception(
            "sine and cosine swapped",
            _table(_right, swap=True),
            "Position 0 should read 0, 1, 0, 1: the sine stands in the even column. You put the cosine first.",
        ),
        Misconception(
            "positions from 1",
            _table(_right, first=1),
            "Your first row is position 1. Positions count from 0, where every hand points up (0, 1).",
        ),
        Misconception(
            "hands that get faster",
            _table(lambda D, base: base ** (torch.arange(0, D, 2) / D)),
            "The minus sign of the exponent is missing: later hands turn thousands of radians per token, and "
            "what is left of that after whole turns looks random.",
        ),
        an_odd_width_slips_through,
    ],
)

# ── 1.1.b ────────────────────────────────────────────────────────────────────────────────────────────────


def _embed(ids: Tensor, token_table: Tensor, position_table: Tensor, start: int = 0) -> Tensor:
    T, D = ids.shape[1], token_table.shape[1]
    return math.sqrt(D) * token_table[ids] + position_table[torch.arange(start, start + T)]


def _embed_with(
    rows: Callable[[Tensor, Tensor, int], Tensor], scale_tokens: bool = True, scale_sum: bool = False
) -> Callable:
    """`embed` with another way to find the position rows, or another place for the root."""

    def embed(ids: Tensor, token_table: Tensor, position_table: Tensor, start: int = 0) -> Tensor:
        root = math.sqrt(token_table.shape[1])
        x = token_table[ids] * (root if scale_tokens else 1)
        return (x + rows(position_table, ids, start)) * (root if scale_sum else 1)

    return embed


def _looked_up(table: Tensor, ids: Tensor, start: int) -> Tensor:
    return table[torch.arange(start, start + ids.shape[1])]


def _from_zero(table: Tensor, ids: Tensor, start: int) -> Tensor:
    return table[: ids.shape[1]]


def _by_batch_row(table: Tensor, ids: Tensor, start: int) -> Tensor:
    return table[torch.arange(start, start + ids.shape[0])][:, None]


def _sliced(table: Tensor, ids: Tensor, start: int) -> Tensor:
    return table[start : start + ids.shape[1]]


def _wrapped(table: Tensor, ids: Tensor, start: int) -> Tensor:
    return table[torch.arange(start, start + ids.shape[1]) % len(table)]


_TOKENS = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
_POSITIONS = torch.tensor([[10.0] * 4, [20.0] * 4, [30.0] * 4, [40.0] * 4])
_BY_HAND = "D = 4, √D = 2; token i is a row of zeros with a 1 in column i; position p is a row of 10·(p + 1)"


def _chunks(embed: Any) -> Tensor:
    ids = torch.tensor([[3, 1, 4, 1, 5, 2], [2, 6, 5, 3, 0, 4]])
    tokens, positions = randn(7, 8), randn(10, 8, seed=1)
    return torch.cat([embed(ids[:, a:b], tokens, positions, a) for a, b in ((0, 3), (3, 4), (4, 6))], dim=1)


def _twins(embed: Any) -> Tensor:
    return embed(torch.tensor([[2, 0, 1], [2, 0, 1]]), randn(3, 6), randn(5, 6, seed=1))


def _twins_differ(out: Tensor) -> str | None:
    if torch.allclose(out[0], out[1]):
        return None
    return "two sequences of the same tokens got different vectors: the position must not depend on the batch"


def _leaves_tables_alone(embed: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, positions = randn(5, 8, seed=2), randn(9, 8, seed=3)
    out = embed(torch.tensor([[4, 0, 4], [1, 2, 3]]).T.contiguous().T, tokens, positions, 4)
    return out, tokens, positions


EMBED = Exercise(
    id="1.1.b",
    symbol="embed",
    reference=_embed,
    look_again="The sequence is longer than the table",
    probes=[
        Probe(
            "shape and dtype",
            lambda f: f(torch.tensor([[0, 1, 2], [2, 1, 0]]), randn(3, 8), randn(6, 8)),
            same_shape,
        ),
        Probe("equal sequences get equal vectors", _twins, holds(_twins_differ)),
        Probe(
            "two tokens from position 0, by hand",
            lambda f: f(torch.tensor([[0, 1]]), _TOKENS.clone(), _POSITIONS.clone()),
            equals(),
            given=f"ids = [[0, 1]], start = 0; {_BY_HAND}",
        ),
        Probe(
            "one token at position 2, by hand",
            lambda f: f(torch.tensor([[1]]), _TOKENS.clone(), _POSITIONS.clone(), 2),
            equals(),
            given=f"ids = [[1]], start = 2; {_BY_HAND}",
        ),
        Probe(
            "the last row of the table can be used",
            lambda f: f(torch.tensor([[0, 1]]), _TOKENS.clone(), _POSITIONS.clone(), 2),
            equals(),
            given=f"ids = [[0, 1]], start = 2, and a table of 4 positions (0 to 3); {_BY_HAND}",
        ),
        Probe("in three pieces as at once", _chunks, equals()),
        Probe("equals the reference, and the tables are as before", _leaves_tables_alone, equals()),
        Probe(
            "one token past the table raises IndexError",
            lambda f: outcome(lambda: f(torch.tensor([[0]]), _TOKENS.clone(), _POSITIONS.clone(), 4)),
            equals(),
            given="ids = [[0]], start = 4, and a table of 4 positions (0 to 3)",
        ),
        Probe(
            "the last of two tokens past the table raises IndexError",
            lambda f: outcome(lambda: f(torch.tensor([[0, 1]]), _TOKENS.clone(), _POSITIONS.clone(), 3)),
            equals(),
            given="ids = [[0, 1]], start = 3, and a table of 4 positions (0 to 3)",
        ),
    ],
    misconceptions=[
        Misconception(
            "the code as given",
            _embed_with(_from_zero, scale_tokens=False, scale_sum=True),
            "This is still the given code. Compare it with the formula term by term: what is under the root's "
            "multiplication, and where does start come in?",
        ),
        Misconception(
            "positions restart",
            _embed_with(_from_zero),
            "Every piece begins at position 0 again, so the model believes that each piece is the start of "
            "the text. The first token stands at position start.",
        ),
        Misconception(
            "the root multiplies the positions too",
            _embed_with(_looked_up, scale_tokens=False, scale_sum=True),
            "You scaled the sum, so the positions grew along with the tokens and their sizes are as unequal "
            "as before. √D belongs to the token's vector alone.",
        ),
        Misconception(
            "no scaling",
            _embed_with(_looked_up, scale_tokens=False),
            "The positions are right, but the token's vector is not multiplied by √D. Small tokens drown in "
            "positions whose pairs all have length 1.",
        ),
        Misconception(
            "position of the row in the batch",
            _embed_with(_by_batch_row),
            "You counted along the batch: every token of a sequence got the same position. In (B, T) the "
            "position runs along T.",
        ),
        Misconception(
            "a slice that comes back short",
            _embed_with(_sliced),
            "position_table[start : start + T] does not complain at the end of the table: it comes back short "
            "or empty, and broadcasting hides it. Look the rows up with a tensor of positions.",
        ),
        Misconception(
            "positions wrap around",
            _embed_with(_wrapped),
            "With a modulo, the first position past the table poses as position 0 and the order is lost "
            "without an error. Let it raise.",
        ),
    ],
)

# ── 1.1.c ────────────────────────────────────────────────────────────────────────────────────────────────


def _shift_with(block: Callable[[Tensor], Tensor], angles: Callable[[int, int, float], Tensor]) -> Callable:
    """The matrix made of 2×2 blocks: `block(angle)` for each of the `angles(k, D, base)`."""

    def shift(k: int, d_model: int, base: float = 10_000.0) -> Tensor:
        return torch.block_diag(*(block(angle) for angle in angles(k, d_model, base)))

    return shift


def _clockwise(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).reshape(2, 2)


def _mirror(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin(), angle.sin(), -angle.cos()]).reshape(2, 2)


def _angles(k: int, d_model: int, base: float) -> Tensor:
    return k * _right(d_model, base)


_shift_matrix = _shift_with(_clockwise, _angles)


def pairs_half_a_row_apart(k: int, d_model: int, base: float = 10_000.0) -> Tensor:
    """You paired column i with column i + D/2, which suits a table with all sines first. In our table the
    partners are neighbors, 2i and 2i+1, so the blocks stand on the diagonal."""
    cosine, sine = torch.diag(_angles(k, d_model, base).cos()), torch.diag(_angles(k, d_model, base).sin())
    return torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)], 0)


def _moved(shift: Any) -> list[Tensor]:
    table = sinusoidal_table(80, 16)
    return [(shift(k, 16) @ table[40]).float() for k in (1, 13, -13, 30)]


def _moves_wrong(rows: list[Tensor]) -> str | None:
    table = sinusoidal_table(80, 16)
    for k, row in zip((1, 13, -13, 30), rows, strict=True):
        if not torch.allclose(row, table[40 + k], atol=1e-3):
            return f"shift_matrix({k}, 16) @ table[40] is not table[{40 + k}]"
    return None


def _not_orthogonal(matrix: Tensor) -> str | None:
    if torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-4):
        return None
    return "matrix @ matrix.T is not the identity: a turn changes no length"


SHIFT = Exercise(
    id="1.1.c",
    symbol="shift_matrix",
    reference=_shift_matrix,
    look_again="One rotation moves every position",
    probes=[
        Probe("shape and dtype", lambda f: f(3, 6), same_shape),
        Probe("a turn changes no length", lambda f: f(3, 6), holds(_not_orthogonal)),
        Probe("a shift by 0 is the identity", lambda f: f(0, 4), equals(), given="k = 0, d_model = 4"),
        Probe("one hand, by hand", lambda f: f(1, 2), equals(), given="k = 1, d_model = 2"),
        Probe("two hands, by hand", lambda f: f(2, 4), equals(digits=3), given="k = 2, d_model = 4"),
        Probe("it moves the table, both ways", _moved, holds(_moves_wrong)),
        Probe("another base", lambda f: f(5, 8, 100.0), equals(), given="k = 5, d_model = 8, base = 100"),
        Probe("equals the reference", lambda f: f(-11, 32), equals(atol=1e-4)),
    ],
    misconceptions=[
        Misconception(
            "the other way round",
            lambda k, d_model, base=10_000.0: _shift_matrix(-k, d_model, base),
            "Your matrix takes position p to p − k. It is the textbook rotation for (cosine, sine); our pairs "
            "are (sine, cosine), which moves the minus sign to the other corner.",
        ),
        pairs_half_a_row_apart,
        Misconception(
            "the shift is ignored",
            _shift_with(_clockwise, lambda k, D, base: _right(D, base)),
            "The matrix is the same for every k: it always moves by one. Multiply every frequency by k "
            "before taking sine and cosine.",
        ),
        Misconception(
            "k times a step",
            lambda k, d_model, base=10_000.0: k * _shift_matrix(1, d_model, base),
            "You multiplied the matrix of one step by k, which stretches vectors. Steps are composed by "
            "multiplying matrices with each other, or, more simply, angles by k.",
        ),
        Misconception(
            "one speed for all hands",
            _shift_with(_clockwise, lambda k, D, base: torch.full((D // 2,), float(k))),
            "Every block turns by the angle k. Only the first hand has frequency 1; block i turns by "
            "k · base^(−2i/D).",
        ),
        Misconception(
            "a mirror",
            _shift_with(_mirror, _angles),
            "Your blocks are reflections, [[c, s], [s, −c]]: they flip each clock over. In a rotation both "
            "cosines have the same sign and the sines have opposite ones.",
        ),
        Misconception(
            "the 2 in the exponent is lost",
            _shift_with(_clockwise, lambda k, D, base: k * base ** (-torch.arange(D // 2) / D)),
            "Block i turns with the exponent i/D where the table has 2i/D, so all hands but the first are "
            "too fast.",
        ),
    ],
)

EXERCISES = [TABLE, EMBED, SHIFT]
