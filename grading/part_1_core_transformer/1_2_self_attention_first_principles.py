"""Exercises of lesson 1.2, self-attention from first principles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checks.probes import causality, equals, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.core.attention import scaled_dot_product_attention
from tutorial_lib.core.masks import causal_mask

_TRANSPOSE = {
    "`k.transpose(-2, -1)` became `k.transpose(-1, -2)`": "swapping two dimensions works in either order",
}

# ── 1.2.a ────────────────────────────────────────────────────────────────────────────────────────────────


def _reference_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    return scaled_dot_product_attention(q, k, torch.zeros(*k.shape[:-1], 1), mask)[1]


def _weights(
    divide: Callable[[Tensor], float] = lambda q: math.sqrt(q.shape[-1]),
    axis: int = -1,
    forbidden: float = float("-inf"),
    invert: bool = False,
    after: bool = False,
    mend: bool = True,
) -> Callable:
    """`attention_weights` with one thing changed."""

    def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-2, -1) / divide(q)
        if mask is None:
            return scores.softmax(axis)
        allowed = ~mask if invert else mask
        if after:
            return scores.softmax(axis).masked_fill(~allowed, 0.0)
        weights = scores.masked_fill(~allowed, forbidden).softmax(axis)
        return weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0) if mend else weights

    return attention_weights


def _words() -> tuple[Tensor, Tensor]:
    """The queries and keys of "river bank closed" in the lesson."""
    return torch.tensor([[2.0, 2], [2, 1], [1, 0]]), torch.tensor([[2.0, 0], [1, 1], [0, 1]])


_WORDS = "q = [[2, 2], [2, 1], [1, 0]], k = [[2, 0], [1, 1], [0, 1]]"
_EMPTY = torch.tensor([[False, False, False], [True, False, True], [True, True, True]])


def _rows_do_not_sum(weights: Tensor) -> str | None:
    rows = weights.sum(-1)
    if torch.allclose(rows, torch.ones_like(rows), atol=1e-4):
        return None
    columns = weights.sum(-2)
    if torch.allclose(columns, torch.ones_like(columns), atol=1e-4):
        return "the columns sum to 1, the rows do not: a query shares out its attention over the keys"
    return f"the first row sums to {rows.flatten()[0]:.2f}, and should sum to 1"


def _untouched(f: Any) -> tuple[Tensor, ...]:
    q, k = randn(2, 3, 4, 8, seed=3), randn(2, 3, 6, 8, seed=4)
    mask = randn(3, 4, 6, seed=5) > -0.5  # one for each head, the same for both sequences
    mask[1, 2] = False
    return f(q, k), f(q, k, mask), q, k, mask


WEIGHTS = Exercise(
    id="1.2.a",
    symbol="attention_weights",
    equivalent_mutants=_TRANSPOSE,
    reference=_reference_weights,
    look_again="All words at once",
    probes=[
        Probe("shape and dtype", lambda f: f(randn(2, 3, 8), randn(2, 5, 8, seed=1)), same_shape),
        Probe(
            "every row sums to 1",
            lambda f: f(randn(3, 4, 8), randn(3, 7, 8, seed=1)),
            holds(_rows_do_not_sum),
        ),
        Probe("three words, by hand", lambda f: f(*_words()), equals(), given=_WORDS),
        Probe(
            "three words with a causal mask, by hand",
            lambda f: f(*_words(), causal_mask(3)),
            equals(),
            given=f"{_WORDS}, and a causal mask (True on and below the diagonal)",
        ),
        Probe(
            "a query that may attend to nothing gets zeros",
            lambda f: f(*_words(), _EMPTY.clone()),
            equals(),
            given=f"{_WORDS}, mask = [[F, F, F], [T, F, T], [T, T, T]]",
        ),
        Probe("equals the reference with batch, heads and mask, and leaves them alone", _untouched, equals()),
        Probe(
            "large scores stay finite", lambda f: f(100 * randn(3, 8), 100 * randn(4, 8, seed=1)), equals()
        ),
        Probe(
            "large scores under one mask for all queries",
            lambda f: f(
                100 * randn(2, 9, 8, seed=6),
                100 * randn(2, 4, 8, seed=7),
                torch.tensor([[True, False, True, False]]),
            ),
            equals(),
            given="scores in the thousands; mask = [[T, F, T, F]], which broadcasts to (Q, K)",
        ),
    ],
    misconceptions=[
        Misconception(
            "softmax over the queries",
            _weights(axis=-2),
            "The softmax runs down the columns, so each key shares itself out among the queries. It is the "
            "query that has one unit of attention: normalize over the last dimension, that of the keys.",
        ),
        Misconception(
            "not scaled",
            _weights(lambda q: 1.0),
            "The scores are not divided by √C. They then grow with the width, and softmax saturates: one key "
            "takes all and hardly any gradient comes through.",
        ),
        Misconception(
            "divided by C, not by its root",
            _weights(lambda q: q.shape[-1]),
            "You divided by C. A sum of C products has variance C, so its standard deviation is √C; dividing "
            "by C leaves the weights nearly uniform for wide heads.",
        ),
        Misconception(
            "the root of the number of tokens",
            _weights(lambda q: math.sqrt(q.shape[-2])),
            "Under the root stands q.shape[-2], the number of queries. The score is a sum over channels, "
            "so the size that counts is the last one, C.",
        ),
        Misconception(
            "mask upside down",
            _weights(invert=True),
            "You blocked the keys that the mask allows. Here True means may attend, and masked_fill fills "
            "where its argument is True: give it ~mask.",
        ),
        Misconception(
            "mask after the softmax",
            _weights(after=True),
            "The forbidden weights are zero, but their exponentials are still in the sum, so the row adds up "
            "to less than 1 (and a masked future still leaks in). Mask the scores, then take the softmax.",
        ),
        Misconception(
            "NaN for an empty row",
            _weights(mend=False),
            "A query without any allowed key has only −∞, and softmax gives 0/0 = NaN, which spreads through "
            "the model from there. Fill such rows with 0 after the softmax.",
        ),
        Misconception(
            "a large negative number for −∞",
            _weights(forbidden=-1e9, mend=False),
            "With −10⁹ in place of −∞ an empty row has equal scores everywhere, and softmax makes it uniform: "
            "it attends to all the keys that are forbidden. The row should be zero.",
        ),
    ],
)

# ── 1.2.b ────────────────────────────────────────────────────────────────────────────────────────────────


def _causal(
    allowed: Callable[[Tensor], Tensor] = lambda ones: ones.tril(),
    size: int = -1,
    axis: int = -1,
    fill: float = float("-inf"),
    after: bool = False,
) -> Callable:
    """`causal_attention` with one thing changed."""

    def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = allowed(torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[size])
        if after:
            return scores.softmax(axis).masked_fill(~mask, 0.0) @ v
        return scores.masked_fill(~mask, fill).softmax(axis) @ v

    return causal_attention


def _layer(f: Any) -> Callable[[Tensor], Tensor]:
    """Self-attention of the learner's on `(B, T, 3·C)`."""
    return lambda x: f(*x.chunk(3, dim=-1))


def _two_tokens() -> tuple[Tensor, Tensor, Tensor]:
    q = torch.tensor([[[1.0, 0, 0, 0], [2, 0, 0, 0]]])  # scores of token 1: 0 and 2, over √4 = 2
    k = torch.tensor([[[0.0, 1, 0, 0], [1, 0, 0, 0]]])
    v = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0]]])
    return q, k, v


def _with_inputs(f: Any) -> tuple[Tensor, ...]:
    q, k, v = (randn(3, 9, 16, seed=seed) for seed in (2, 6, 7))
    return f(q, k, v), q, k, v


CAUSAL = Exercise(
    id="1.2.b",
    symbol="causal_attention",
    equivalent_mutants=_TRANSPOSE,
    reference=_causal(),
    look_again="No looking ahead: the causal mask",
    probes=[
        Probe("shape and dtype", lambda f: _layer(f)(randn(2, 5, 24)), same_shape),
        causality(_layer, randn(2, 6, 24, seed=1)),
        Probe(
            "the first token sees itself and nothing else",
            lambda f: f(randn(1, 3, 4), randn(1, 3, 4, seed=1), randn(1, 3, 4, seed=2))[:, 0],
            equals(),
            given="T = 3; the result at position 0 must be v at position 0",
        ),
        Probe(
            "two tokens, by hand",
            lambda f: f(*_two_tokens()),
            equals(),
            given="q = [[1, 0, 0, 0], [2, 0, 0, 0]], k = [[0, 1, 0, 0], [1, 0, 0, 0]], "
            "v = [[1, 0, 0, 0], [0, 1, 0, 0]]",
        ),
        Probe("equals the reference, and leaves q, k and v alone", _with_inputs, equals()),
        Probe("one token alone", lambda f: _layer(f)(randn(2, 1, 12, seed=3)), equals()),
        Probe("large scores stay finite", lambda f: _layer(f)(100 * randn(8, 4, 24, seed=4)), equals(1e-2)),
    ],
    misconceptions=[
        Misconception(
            "the code as given",
            _causal(lambda ones: ones.tril(diagonal=1), size=-2, axis=1),
            "This is still the given code. Start with its mask: read row 0 for T = 4, and ask what position 0 "
            "may see.",
        ),
        Misconception(
            "the triangle reaches one too far",
            _causal(lambda ones: ones.tril(diagonal=1)),
            "With diagonal=1 the triangle includes the next position, the very token that is to be guessed. "
            "tril() without an argument ends at the diagonal.",
        ),
        Misconception(
            "softmax over the queries",
            _causal(axis=1),
            "With a batch, dimension 1 is that of the queries. Each position then competes with later ones, "
            "and the future leaks in through the sum. The keys are the last dimension.",
        ),
        Misconception(
            "the other triangle",
            _causal(lambda ones: ones.triu()),
            "triu allows the upper triangle: each position sees itself and the future. For a mask in which "
            "True means may attend you want the lower one.",
        ),
        Misconception(
            "mask after the softmax",
            _causal(after=True),
            "Zeroing weights after the softmax leaves the future in the denominator: the row's sum changes "
            "when a later token does. Fill the scores with −∞ before it.",
        ),
        Misconception(
            "a score of 0 for forbidden keys",
            _causal(fill=0.0),
            "A score of 0 is not no attention: e⁰ is 1, so forbidden keys keep a good share of the weight. "
            "The score that gets none is −∞.",
        ),
        Misconception(
            "the root of the length",
            _causal(size=-2),
            "The mask and the softmax are right now, but under the root stands T. A score is a sum over the C "
            "channels; with √T the attention would get flatter the longer the text.",
        ),
        Misconception(
            "only the past, without itself",
            lambda q, k, v: torch.nan_to_num(_causal(lambda ones: ones.tril(diagonal=-1))(q, k, v)),
            "Each position sees the past but not itself, and the first sees nothing at all. The diagonal "
            "belongs to the triangle.",
        ),
    ],
)

# ── 1.2.c ────────────────────────────────────────────────────────────────────────────────────────────────


def _decoder_mask(real: Tensor, n_queries: int) -> Tensor:
    return causal_mask(n_queries, real.shape[1]) & real[:, None, None, :]


def the_triangle_starts_at_the_first_key(real: Tensor, n_queries: int) -> Tensor:
    """Your triangle puts query 0 at position 0. The queries are the last n_queries of the positions, so query
    i stands at K − n_queries + i and sees all keys up to there."""
    n_keys = real.shape[1]
    if n_queries > n_keys:
        raise ValueError
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril() & real[:, None, None, :]


def or_instead_of_and(real: Tensor, n_queries: int) -> Tensor:
    """You joined the two masks with |, so a key is allowed when one condition holds. A key must be in the
    past and be real: with True = may attend, masks meet with &."""
    return causal_mask(n_queries, real.shape[1]) | real[:, None, None, :]


def padded_queries_emptied(real: Tensor, n_queries: int) -> Tensor:
    """You also closed the rows of padded queries. Nobody reads these rows, and every closed row is one over
    which a plain softmax gives NaN. The formula asks only about the key."""
    return _decoder_mask(real, n_queries) & real[:, None, real.shape[1] - n_queries :, None]


def queries_masked_not_keys(real: Tensor, n_queries: int) -> Tensor:
    """You laid the padding along the rows: padded queries see nothing, and everyone still attends to padded
    keys. It belongs on the last dimension, the keys."""
    causal = causal_mask(n_queries, real.shape[1])
    return causal & real[:, None, real.shape[1] - n_queries :, None]


def no_dimension_for_the_heads(real: Tensor, n_queries: int) -> Tensor:
    """The mask is (B, Q, K). Against scores (B, H, Q, K) it would be lined up with the heads: put a 1 in
    their place."""
    return causal_mask(n_queries, real.shape[1]) & real[:, None, :]


def too_many_queries_slip_through(real: Tensor, n_queries: int) -> Tensor:
    """With more queries than keys the first query stands at a negative position and sees nothing, silently.
    Raise a ValueError."""
    n_keys = real.shape[1]
    query = torch.arange(n_keys - n_queries, n_keys)[:, None]
    return (torch.arange(n_keys) <= query) & real[:, None, None, :]


def _real(*rows: str) -> Tensor:
    """From texts such as "..abc", a dot for padding."""
    return torch.tensor([[letter != "." for letter in row] for row in rows])


def _sees_wrong(mask: Tensor) -> str | None:
    if mask[0, 0].triu(diagonal=1).any():
        return "a query may attend to a later key: it sees the future"
    if mask[0, 0, :, 0].any():
        return "a query may attend to key 0, which is padding"
    return None


MASK = Exercise(
    id="1.2.c",
    symbol="decoder_mask",
    reference=_decoder_mask,
    look_again="A row with nothing to look at",
    probes=[
        Probe("shape and dtype", lambda f: f(_real("abcde", "abc..", "..abc"), 3), same_shape),
        Probe("neither the future nor padding", lambda f: f(_real(".abc"), 4), holds(_sees_wrong)),
        Probe(
            "padding on the left, by hand",
            lambda f: f(_real(".ab"), 3).int(),
            equals(),
            given="real = [[False, True, True]], n_queries = 3",
        ),
        Probe(
            "padding on the right, by hand",
            lambda f: f(_real("ab."), 3).int(),
            equals(),
            given="real = [[True, True, False]], n_queries = 3",
        ),
        Probe(
            "two new queries after cached keys, by hand",
            lambda f: f(_real(".abc"), 2).int(),
            equals(),
            given="real = [[False, True, True, True]], n_queries = 2",
        ),
        Probe(
            "one new query, by hand",
            lambda f: f(_real(".abc"), 1).int(),
            equals(),
            given="real = [[False, True, True, True]], n_queries = 1",
        ),
        Probe(
            "equals the reference",
            lambda f: f(_real("abcdefgh", "....efgh", "abc.....", "a.c.e.g."), 5).int(),
            equals(),
        ),
        Probe(
            "more queries than keys raise ValueError",
            lambda f: outcome(lambda: f(_real("abc"), 4)),
            equals(),
            given="3 keys, n_queries = 4",
        ),
    ],
    misconceptions=[
        or_instead_of_and,
        the_triangle_starts_at_the_first_key,
        queries_masked_not_keys,
        padded_queries_emptied,
        no_dimension_for_the_heads,
        Misconception(
            "True = blocked",
            lambda real, n_queries: ~_decoder_mask(real, n_queries),
            "This is the opposite mask. In this course, as in torch's attention function, True means may "
            "attend.",
        ),
        too_many_queries_slip_through,
    ],
)

EXERCISES = [WEIGHTS, CAUSAL, MASK]
