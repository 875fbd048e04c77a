"""Exercises of lesson 3.2, RoPE."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.core.rope import apply_rope as rotate
from tutorial_lib.core.rope import half_to_interleaved, interleaved_to_half

Turn = Callable[..., Tensor]


def _angles(positions: Tensor, C: int, base: float, per_pair: float = 2.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(T, C/2)` for the frequencies base^(−per_pair · i / C)."""
    angle = positions[:, None].float() * base ** (-per_pair * torch.arange(C // 2) / C)
    return angle.cos(), angle.sin()


# --- 3.2.a --------------------------------------------------------------------------------------------------


def apply_rope(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """The reference: half-split pairs, angles in fp32."""
    if x.shape[-1] % 2:
        raise ValueError(f"{x.shape[-1]} channels cannot be cut into pairs")
    return rotate(x, *_angles(positions, x.shape[-1], base))


def _reorder(x: Tensor, order: Callable[[Tensor, int], Tensor]) -> Tensor:
    return x[..., order(torch.arange(x.shape[-1]), 1)]


def interleaved_pairs(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """You paired 2i with 2i+1. It is a valid RoPE, but Llama's layout pairs i with i + C/2, and our weights
    expect that one."""
    return _reorder(apply_rope(_reorder(x, interleaved_to_half), positions, base), half_to_interleaved)


def written_back_interleaved(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """The halves were turned correctly, but stacked and flattened, so the two numbers of a pair came out side
    by side. Channel i goes back to place i: concatenate the halves."""
    return _reorder(apply_rope(x, positions, base), half_to_interleaved)


def exponent_without_its_2(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Your speeds are base^(−i/C). Pair i turns with base^(−2i/C), so that C/2 pairs span the range from 1
    down to nearly 1/base."""
    return rotate(x, *_angles(positions, x.shape[-1], base, per_pair=1.0))


def clockwise(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """The sine has the wrong sign: hands turn the other way. All distances are respected, but weights that
    were trained the usual way do not fit. Minus belongs in the first half."""
    cos, sin = _angles(positions, x.shape[-1], base)
    return rotate(x, cos, -sin)


def no_minus_sign(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Both halves add their sine term. That is no rotation (lengths change): the first half subtracts."""
    cos, sin = _angles(positions, x.shape[-1], base)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos + first * sin], dim=-1).type_as(x)


def counts_by_itself(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """You used 0, 1, 2, … instead of the positions that were handed in. With a cache, the one new token would
    always stand at 0."""
    return apply_rope(x, torch.arange(x.shape[2]), base)


def base_forgotten(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """The argument base is not used: the speeds are those of 10,000. Llama 3 has 500,000."""
    return apply_rope(x, positions)


def angles_in_the_type_of_x(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """With x in bf16 your positions or angles are bf16, too, and there position 257 is 256. Compute angles in
    fp32 and round only the result."""
    if x.shape[-1] % 2:
        raise ValueError("odd")
    C = x.shape[-1]
    frequency = base ** (-torch.arange(0, C, 2) / C)
    angle = positions.to(x.dtype)[:, None] * frequency.to(x.dtype)
    return rotate(x, angle.cos(), angle.sin())


def _tiny() -> Tensor:
    return torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)


def _lengths(f: Turn) -> Tensor:
    return f(randn(2, 3, 5, 8, seed=1), torch.arange(3, 8)).norm(dim=-1)


def _not_the_old_lengths(lengths: Tensor) -> str | None:
    off = (lengths - randn(2, 3, 5, 8, seed=1).norm(dim=-1)).abs().max()
    return None if off < 1e-4 else f"a vector's length changed by {off:.2f}: a rotation keeps every length"


def _shifted(f: Turn, shift: int) -> Tensor:
    q, k = randn(1, 2, 6, 8, seed=2), randn(1, 2, 6, 8, seed=3)
    positions = torch.tensor([0, 1, 2, 3, 7, 9]) + shift
    return f(q, positions) @ f(k, positions).transpose(-2, -1)


def _same_scores(results: tuple[Tensor, Tensor]) -> str | None:
    off = (results[0] - results[1]).abs().max()
    return (
        None
        if off < 1e-3
        else f"all positions + 500 changed a score by {off:.2f}: only distances should matter"
    )


def _one_by_one(f: Turn) -> tuple[Tensor, Tensor]:
    """Six keys turned at once, and as they come in one at a time: what a cache holds."""
    k = randn(2, 2, 6, 8, seed=4)
    steps = [f(k[:, :, t : t + 1], torch.tensor([t + 20])) for t in range(6)]
    return f(k, torch.arange(20, 26)), torch.cat(steps, dim=2)


BUILD = Exercise(
    id="3.2.a",
    symbol="apply_rope",
    reference=apply_rope,
    look_again="Which dimensions turn together?",
    probes=[
        Probe("shape and dtype", lambda f: f(randn(2, 3, 5, 8), torch.arange(5)), same_shape),
        Probe("norm preserved", _lengths, holds(_not_the_old_lengths)),
        Probe(
            "position 0 unchanged",
            lambda f: f(randn(1, 2, 3, 4, seed=5), torch.zeros(3, dtype=torch.long)),
            equals(),
        ),
        Probe("relative shift", lambda f: (_shifted(f, 0), _shifted(f, 500)), holds(_same_scores)),
        Probe(
            "equals the reference at position 1",
            lambda f: f(_tiny(), torch.tensor([1])).flatten(),
            equals(),
            given=_tiny().flatten(),
        ),
        Probe(
            "equals the reference",
            lambda f: f(randn(2, 3, 7, 16, seed=6), torch.tensor([0, 1, 2, 5, 40, 300, 1000])),
            equals(2e-3, 1e-3),
        ),
        Probe(
            "another base", lambda f: f(randn(1, 2, 5, 16, seed=7), torch.arange(5) + 30, 100.0), equals(1e-4)
        ),
        Probe("KV-cache parity", _one_by_one, equals(1e-4)),
        Probe(
            "bf16 at positions 256 and 257",
            lambda f: f(randn(1, 1, 2, 8, seed=8).bfloat16(), torch.tensor([256, 257])),
            equals(2e-2, 2e-2),
            given="x is bf16; tokens stand at positions 256 and 257",
        ),
        Probe(
            "5 channels: a ValueError",
            lambda f: outcome(lambda: f(randn(1, 1, 2, 5), torch.arange(2))),
            equals(),
        ),
    ],
    misconceptions=[
        interleaved_pairs,
        written_back_interleaved,
        exponent_without_its_2,
        clockwise,
        no_minus_sign,
        counts_by_itself,
        base_forgotten,
        angles_in_the_type_of_x,
    ],
)


# --- 3.2.b --------------------------------------------------------------------------------------------------


def _attention(
    keys: str = "turned",
    values: bool = False,
    restart: bool = False,
    per_pair: float = 2.0,
) -> Turn:
    """The reference, and the ways to get it wrong."""

    def rotary_attention(
        q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor, base: float = 10_000.0
    ) -> Tensor:
        C = q.shape[-1]
        at_q = torch.arange(q.shape[2]) if restart else q_positions
        at_k = torch.arange(k.shape[2]) if restart else k_positions
        k_angles = _angles(at_k, C, base, per_pair)
        q = rotate(q, *_angles(at_q, C, base, per_pair))
        if keys == "turned":
            k = rotate(k, *k_angles)
        elif keys == "clockwise":
            k = rotate(k, k_angles[0], -k_angles[1])
        v = rotate(v, *k_angles) if values else v
        scores = q @ k.transpose(-2, -1) / math.sqrt(C)
        visible = k_positions <= q_positions[:, None]
        return scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v

    return rotary_attention


def _piece(
    T: int, K: int, C: int = 8, seed: int = 0, start: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and positions of the last T of K tokens."""
    q, k, v = (randn(2, 2, n, C, seed=seed + i) for i, n in enumerate((T, K, K)))
    return q, k, v, torch.arange(K - T, K) + start, torch.arange(K) + start


def _two_keys(f: Turn) -> Tensor:
    """One query at position 1, two keys that it fits equally well but for the distance, values 0 and 1."""
    q = torch.tensor([[2.0, 0.0]]).view(1, 1, 1, 2)
    k = torch.tensor([[2.0, 0.0], [2.0, 0.0]]).view(1, 1, 2, 2)
    v = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    return f(q, k, v, torch.tensor([1]), torch.tensor([0, 1])).flatten()


def _moved(f: Turn) -> tuple[Tensor, Tensor]:
    return f(*_piece(6, 6, seed=3)), f(*_piece(6, 6, seed=3, start=100))


def _not_moved(results: tuple[Tensor, Tensor]) -> str | None:
    off = (results[0] - results[1]).abs().max()
    return None if off < 1e-3 else f"all positions + 100 changed an output by {off:.2f}"


def _lone_key(f: Turn) -> Tensor:
    v = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    at = torch.tensor([3])
    return f(randn(1, 1, 1, 4, seed=1), randn(1, 1, 1, 4, seed=2), v, at, at).flatten()


def _in_pieces(f: Turn) -> tuple[Tensor, Tensor]:
    q, k, v, at, _ = _piece(7, 7, seed=12)
    parts = [f(q[:, :, a:b], k[:, :, :b], v[:, :, :b], at[a:b], at[:b]) for a, b in ((0, 3), (3, 4), (4, 7))]
    return f(q, k, v, at, at), torch.cat(parts, dim=2)


DEBUG = Exercise(
    id="3.2.b",
    symbol="rotary_attention",
    reference=_attention(),
    look_again="What goes wrong",
    equivalent_mutants={
        "`k.transpose(-2, -1)` became `k.transpose(-1, -2)`": "swapping two dimensions has no order",
        "`-2` became `2`": "of four dimensions, 2 is the last but one",
        "`first * cos - second * sin` became `second * sin - first * cos`": "queries and keys both change "
        "the sign of their first half, and a product does not notice",
    },
    probes=[
        Probe("shape and dtype", lambda f: f(*_piece(3, 7)), same_shape),
        Probe(
            "a lone key hands over its value",
            _lone_key,
            equals(),
            given="one query and one key, both at position 3; the value is [1, 2, 3, 4], its weight is 1",
        ),
        Probe("moved as a whole, nothing changes", _moved, holds(_not_moved)),
        Probe(
            "two keys, by hand",
            _two_keys,
            equals(),
            given="query [2, 0] at position 1, keys [2, 0] at 0 and 1, values [0, 0] and [1, 0], C = 2",
        ),
        Probe("equals the reference", lambda f: f(*_piece(6, 6, 16, seed=6, start=7)), equals(1e-4)),
        Probe("the last 3 of 9 tokens", lambda f: f(*_piece(3, 9, seed=9, start=2)), equals(1e-4)),
        Probe("in three pieces as in one", _in_pieces, equals(1e-4)),
        Probe("another base", lambda f: f(*_piece(4, 8, seed=15), 100.0), equals(1e-4)),
        Probe(
            "scores in the hundreds",
            lambda f: f(*(30 * part if part.ndim == 4 else part for part in _piece(4, 8, seed=18))),
            equals(5e-2, 1e-3),
        ),
    ],
    misconceptions=[
        Misconception(
            "as it was given",
            _attention(values=True, restart=True, per_pair=1.0),
            "All three bugs are still in. Begin with the value of a lone key: it comes out turned.",
        ),
        Misconception(
            "positions restart",
            _attention(restart=True),
            "Queries and keys are both counted from 0, whatever positions were handed in. A later piece of "
            "queries then claims to stand at the beginning of the text.",
        ),
        Misconception(
            "values turned",
            _attention(values=True),
            "Values are rotated, too. Only what meets in a product may be turned; a value is handed over, and "
            "nothing turns it back.",
        ),
        Misconception(
            "positions restart, values turned",
            _attention(values=True, restart=True),
            "The speeds are right now. Values are still turned, and positions are still counted from 0.",
        ),
        Misconception(
            "exponent without its 2",
            _attention(per_pair=1.0),
            "Positions and values are right now. Your speeds are base^(−i/C), but pair i turns with base^(−2i/C).",
        ),
        Misconception(
            "positions restart, and no 2",
            _attention(restart=True, per_pair=1.0),
            "Values are right now. Positions are still counted from 0, and the exponent lacks its 2.",
        ),
        Misconception(
            "keys left as they were",
            _attention(keys="plain"),
            "Only the queries are turned, so a score depends on where the query stands and not on the distance.",
        ),
        Misconception(
            "keys turned backward",
            _attention(keys="clockwise"),
            "Queries turn one way and keys the other, so scores depend on the sum of the positions. Both turn "
            "the same way; the product makes the difference.",
        ),
    ],
)


# --- 3.2.c --------------------------------------------------------------------------------------------------


def apply_rope_2d(x: Tensor, rows: Tensor, columns: Tensor, base: float = 100.0) -> Tensor:
    """The reference: a RoPE of C/2 channels for the row, another for the column."""
    if x.shape[-1] % 4:
        raise ValueError("a multiple of 4 channels is needed")
    by_row, by_column = x.chunk(2, dim=-1)
    return torch.cat([apply_rope(by_row, rows, base), apply_rope(by_column, columns, base)], dim=-1)


def row_for_both(x: Tensor, rows: Tensor, columns: Tensor, base: float = 100.0) -> Tensor:
    """Both halves are turned by the row. Two patches of one row then look as if they stood on each other."""
    return apply_rope_2d(x, rows, rows, base)


def rows_and_columns_swapped(x: Tensor, rows: Tensor, columns: Tensor, base: float = 100.0) -> Tensor:
    """The first half was turned by the column. The exercise gives the first half to the row."""
    return apply_rope_2d(x, columns, rows, base)


def one_rotation_after_the_other(x: Tensor, rows: Tensor, columns: Tensor, base: float = 100.0) -> Tensor:
    """You turned all channels by the row and then all of them by the column. Angles add up, so only row +
    column is left, and (2, 1) looks like (1, 2)."""
    return apply_rope(apply_rope(x, rows, base), columns, base)


def speeds_of_the_whole_head(x: Tensor, rows: Tensor, columns: Tensor, base: float = 100.0) -> Tensor:
    """The exponent was divided by C, so each direction got only the fast half of the speeds. Each half is a
    RoPE of its own, with C/2 channels."""
    C = x.shape[-1]
    speeds = base ** (-torch.arange(0, C // 2, 2) / C)  # C/4 speeds, spaced as for C channels
    halves = zip(x.chunk(2, dim=-1), (rows, columns), strict=True)
    angles = [(half, positions[:, None] * speeds) for half, positions in halves]
    return torch.cat([rotate(half, a.cos(), a.sin()) for half, a in angles], dim=-1)


def pairs_across_the_whole_head(x: Tensor, rows: Tensor, columns: Tensor, base: float = 100.0) -> Tensor:
    """Channels i and i + C/2 were paired, one from each half. A pair lies within one half: i and i + C/4."""
    C = x.shape[-1]
    speeds = base ** (-torch.arange(0, C // 2, 2) / (C // 2))
    angle = torch.cat([rows[:, None] * speeds, columns[:, None] * speeds], dim=-1)  # (T, C/2)
    return rotate(x, angle.cos(), angle.sin())


def neighbors_paired_within_a_half(x: Tensor, rows: Tensor, columns: Tensor, base: float = 100.0) -> Tensor:
    """Within each half you paired neighbors, 2i with 2i+1. Half-split pairs i with i + C/4 there."""
    by_row, by_column = x.chunk(2, dim=-1)
    return torch.cat(
        [interleaved_pairs(by_row, rows, base), interleaved_pairs(by_column, columns, base)], dim=-1
    )


def columns_forgotten(x: Tensor, rows: Tensor, columns: Tensor, base: float = 100.0) -> Tensor:
    """The second half is not turned at all, so a score does not know the columns."""
    return apply_rope_2d(x, rows, torch.zeros_like(columns), base)


def base_of_a_text(x: Tensor, rows: Tensor, columns: Tensor, base: float = 100.0) -> Tensor:
    """The speeds are those of base 10,000 whatever base says."""
    return apply_rope_2d(x, rows, columns, 10_000.0)


def _image(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of all patches, in reading order."""
    at = torch.arange(height * width)
    return at // width, at % width


def _lengths_2d(f: Turn) -> Tensor:
    return f(randn(1, 2, 6, 8, seed=1), *_image(2, 3)).norm(dim=-1)


def _not_the_old_lengths_2d(lengths: Tensor) -> str | None:
    off = (lengths - randn(1, 2, 6, 8, seed=1).norm(dim=-1)).abs().max()
    return None if off < 1e-4 else f"a vector's length changed by {off:.2f}: a rotation keeps every length"


def _shifted_2d(f: Turn) -> tuple[Tensor, Tensor]:
    def scores(down: int, right: int) -> Tensor:
        rows, columns = _image(2, 3)
        q, k = (f(randn(1, 2, 6, 8, seed=s), rows + down, columns + right) for s in (2, 3))
        return q @ k.transpose(-2, -1)

    return scores(0, 0), scores(40, 7)


def _same_scores_2d(results: tuple[Tensor, Tensor]) -> str | None:
    off = (results[0] - results[1]).abs().max()
    return None if off < 1e-3 else f"moving the whole image changed a score by {off:.2f}"


EXTEND = Exercise(
    id="3.2.c",
    symbol="apply_rope_2d",
    reference=apply_rope_2d,
    look_again="A hand for every pair",
    probes=[
        Probe("shape and dtype", lambda f: f(randn(2, 3, 6, 8), *_image(2, 3)), same_shape),
        Probe("norm preserved", _lengths_2d, holds(_not_the_old_lengths_2d)),
        Probe("only distances matter", _shifted_2d, holds(_same_scores_2d)),
        Probe(
            "row 1, column 0, by hand",
            lambda f: f(torch.ones(1, 1, 1, 4), torch.tensor([1]), torch.tensor([0])).flatten(),
            equals(),
            given="[1, 1, 1, 1] at row 1, column 0",
        ),
        Probe(
            "row 0, column 2, by hand",
            lambda f: f(torch.ones(1, 1, 1, 4), torch.tensor([0]), torch.tensor([2])).flatten(),
            equals(),
            given="[1, 1, 1, 1] at row 0, column 2",
        ),
        Probe("equals the reference", lambda f: f(randn(2, 3, 12, 16, seed=4), *_image(3, 4)), equals(1e-4)),
        Probe("another base", lambda f: f(randn(1, 2, 6, 16, seed=5), *_image(3, 2), 1000.0), equals(1e-4)),
        Probe(
            "patches out of order",
            lambda f: f(randn(1, 1, 3, 8, seed=6), torch.tensor([5, 0, 9]), torch.tensor([2, 7, 30])),
            equals(1e-4),
        ),
        Probe(
            "6 channels: a ValueError",
            lambda f: outcome(lambda: f(randn(1, 1, 2, 6), torch.arange(2), torch.arange(2))),
            equals(),
        ),
    ],
    misconceptions=[
        row_for_both,
        rows_and_columns_swapped,
        one_rotation_after_the_other,
        speeds_of_the_whole_head,
        pairs_across_the_whole_head,
        neighbors_paired_within_a_half,
        columns_forgotten,
        base_of_a_text,
    ],
)

# --- 3.2.d --------------------------------------------------------------------------------------------------


def _frequencies(d_head: int, base: float) -> Tensor:
    if d_head % 2:
        raise ValueError("odd")
    return base ** (-torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)


def ntk_frequencies(d_head: int, base: float, factor: float) -> Tensor:
    """The reference."""
    return _frequencies(d_head, base * factor ** (d_head / (d_head - 2)) if d_head > 2 else base)


def the_base_times_the_factor(d_head: int, base: float, factor: float) -> Tensor:
    """You multiplied the base by s. The slowest hand feels only the power (C − 2) / C of its base, so it came
    out less than s times slower: the base must grow by a little more."""
    return _frequencies(d_head, base * factor)


def all_hands_slowed_alike(d_head: int, base: float, factor: float) -> Tensor:
    """That is linear scaling: every hand is s times slower, the fastest as well. Here the base changes, so
    that the fastest keeps its 1."""
    return _frequencies(d_head, base) / factor


def the_exponent_upside_down(d_head: int, base: float, factor: float) -> Tensor:
    """The base grew by s to the power (C − 2) / C. Solve for it once more: k to that power must be s."""
    return _frequencies(d_head, base * factor ** ((d_head - 2) / d_head))


def faster_instead_of_slower(d_head: int, base: float, factor: float) -> Tensor:
    """The base got smaller, so the slow hands turn faster and go round before the context ends. A larger base
    means slower hands."""
    return _frequencies(d_head, base / factor ** (d_head / (d_head - 2)) if d_head > 2 else base)


def only_the_slowest_hand(d_head: int, base: float, factor: float) -> Tensor:
    """You slowed the last hand and left the others. One new base changes all of them, each a little more than
    the one before."""
    frequencies = _frequencies(d_head, base)
    frequencies[1:][-1:] /= factor
    return frequencies


def in_even_steps(d_head: int, base: float, factor: float) -> Tensor:
    """You divided the frequencies by numbers that rise evenly from 1 to s. With a new base the slowdowns are
    powers of one number: they rise by equal factors, not by equal amounts."""
    return _frequencies(d_head, base) / torch.linspace(1, factor, d_head // 2)


def half_the_exponent(d_head: int, base: float, factor: float) -> Tensor:
    """Your speeds are b′^(−i/C). Pair i turns with b′^(−2i/C); so you have the square root of each speed."""
    return ntk_frequencies(d_head, base, factor).sqrt()


def exponent_without_its_minus(d_head: int, base: float, factor: float) -> Tensor:
    """Your numbers rise from 1, and speeds fall from it: the exponent is −2i/C, with a minus."""
    return 1 / ntk_frequencies(d_head, base, factor)


NTK = Exercise(
    id="3.2.d",
    symbol="ntk_frequencies",
    reference=ntk_frequencies,
    equivalent_mutants={
        "`2` became `3`": "d_head is even, so more than 2 and more than 3 are the same",
        "`torch.arange(0, d_head, 2, dtype=torch.float32)` became `torch.arange(0, d_head, 2)`": "the division "
        "makes fp32 of it",
    },
    look_again="Reading further than one was trained to",
    probes=[
        Probe("shape and dtype", lambda f: f(16, 10_000.0, 4.0), same_shape),
        Probe("factor 1 changes nothing", lambda f: f(12, 500.0, 1.0), equals()),
        Probe(
            "three hands, by hand",
            lambda f: f(6, 1000.0, 4.0),
            equals(digits=4),
            given="C = 6, base 1000, factor 4: the hands turned 1, 0.1 and 0.01, and shall turn 1, 0.1 / 2 and 0.01 / 4",
        ),
        Probe("equals the reference", lambda f: torch.log(f(32, 10_000.0, 8.0)), equals()),
        Probe(
            "a small base, an odd number of hands",
            lambda f: torch.log(f(10, 30.0, 2.5)),
            equals(digits=4),
            given="C = 10, base 30, factor 2.5; logarithms of the frequencies",
        ),
        Probe("only one hand", lambda f: f(2, 10_000.0, 8.0), equals()),
        Probe("an odd d_head: a ValueError", lambda f: outcome(lambda: f(7, 10_000.0, 2.0)), equals()),
    ],
    misconceptions=[
        the_base_times_the_factor,
        all_hands_slowed_alike,
        the_exponent_upside_down,
        faster_instead_of_slower,
        only_the_slowest_hand,
        in_even_steps,
        half_the_exponent,
        exponent_without_its_minus,
    ],
)

EXERCISES = [BUILD, DEBUG, EXTEND, NTK]
