"""Exercises of lesson 3.5, sliding window and sinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_lib.checks.probes import causality, equals, holds, leaks, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.core.window import SlidingWindow

ON_CPU = "exercises are graded on a CPU"

# --- 3.5.a --------------------------------------------------------------------------------------------------

Rule = Callable[..., Tensor]


def who_sees_whom(query_positions: Tensor, key_positions: Tensor, window: int, sinks: int = 0) -> Tensor:
    """The reference is the lesson's own rule."""
    return SlidingWindow(window, sinks)(query_positions, key_positions)


def _pairs(query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
    return query_positions[..., :, None], key_positions[..., None, :]


def _real(query: Tensor, key: Tensor) -> Tensor:
    return (key >= 0) | (query < 0)


def one_token_too_many(query_positions: Tensor, key_positions: Tensor, window: int, sinks: int = 0) -> Tensor:
    """Your window counts the tokens before the token itself, so it shows window + 1. The token itself is one
    of them: the difference of the positions is less than the window, not equal to it."""
    return who_sees_whom(query_positions, key_positions, window + 1, sinks)


def near_and_a_sink(query_positions: Tensor, key_positions: Tensor, window: int, sinks: int = 0) -> Tensor:
    """A token had to be near and a sink at once, so soon nobody sees anything. It is enough to be one of
    them: join these two with or."""
    query, key = _pairs(query_positions, key_positions)
    near = (query - key < window) & (key < sinks) if sinks else query - key < window
    return (key <= query) & near & _real(query, key)


def sinks_escape_causality(
    query_positions: Tensor, key_positions: Tensor, window: int, sinks: int = 0
) -> Tensor:
    """The sinks were added after the causal rule, by or, so the first tokens see sinks that come later. In
    the past, and (near or a sink): & binds tighter than |, so the brackets are needed."""
    query, key = _pairs(query_positions, key_positions)
    return (((key <= query) & (query - key < window)) | (key < sinks)) & _real(query, key)


def the_window_goes_both_ways(
    query_positions: Tensor, key_positions: Tensor, window: int, sinks: int = 0
) -> Tensor:
    """You compared the absolute distance, so a token sees as many tokens after it as before it. A language
    model's window only looks back."""
    query, key = _pairs(query_positions, key_positions)
    return (((query - key).abs() < window) | (key < sinks)) & _real(query, key)


def padding_is_seen(query_positions: Tensor, key_positions: Tensor, window: int, sinks: int = 0) -> Tensor:
    """Position −1 is in everybody's past, near the first tokens, and below any number of sinks, so real
    tokens see padding. Say explicitly that a key at −1 is not for them."""
    query, key = _pairs(query_positions, key_positions)
    return (key <= query) & ((query - key < window) | (key < sinks))


def padding_is_blind(query_positions: Tensor, key_positions: Tensor, window: int, sinks: int = 0) -> Tensor:
    """No row of padding sees anything, and a softmax over nothing is NaN. Let padding see padding."""
    return who_sees_whom(query_positions, key_positions, window, sinks) & (key_positions >= 0)[..., None, :]


def places_instead_of_positions(
    query_positions: Tensor, key_positions: Tensor, window: int, sinks: int = 0
) -> Tensor:
    """You counted rows and columns. That is right only when every key lies at its position; in a chunk, a
    ring or a padded row it does not. Compare the positions that were handed in."""
    T, K = query_positions.shape[-1], key_positions.shape[-1]
    mask = who_sees_whom(torch.arange(T), torch.arange(K), window, sinks)
    return mask.expand(*query_positions.shape[:-1], T, K)


def the_first_columns_are_the_sinks(
    query_positions: Tensor, key_positions: Tensor, window: int, sinks: int = 0
) -> Tensor:
    """You took the first columns for sinks, wherever their tokens stand. With left padding or in a ring the
    first columns hold other tokens: a sink is a key whose position is below sinks."""
    query, key = _pairs(query_positions, key_positions)
    near = (query - key < window) | (torch.arange(key_positions.shape[-1]) < sinks)
    return (key <= query) & near & _real(query, key)


def _future_hidden(f: Rule) -> Tensor:
    return f(torch.arange(8), torch.arange(8), 3, 2)


def _sees_ahead(mask: Tensor) -> str | None:
    ahead = mask & torch.ones_like(mask).triu(1)
    if not ahead.any():
        return None
    i, j = ahead.nonzero()[0].tolist()
    return f"token {i} sees token {j}, which comes later"


def _ring() -> tuple[Tensor, Tensor]:
    return torch.tensor([11]), torch.tensor([10, 0, 11, 1, 8, 9, 7])


def _left_padded() -> tuple[Tensor, Tensor]:
    """Two rows of six; the first begins with two tokens of padding."""
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    return positions, positions


BUILD = Exercise(
    id="3.5.a",
    symbol="who_sees_whom",
    reference=who_sees_whom,
    look_again="The rule knows positions, not places",
    probes=[
        Probe(
            "shape and dtype",
            lambda f: (f(torch.arange(3), torch.arange(5), 2), f(torch.zeros(2, 3), torch.zeros(2, 5), 2, 1)),
            same_shape,
        ),
        Probe("nobody sees the future", _future_hidden, holds(_sees_ahead), given="window 3, sinks 2"),
        Probe(
            "window 3 on six tokens, by hand",
            lambda f: f(torch.arange(6), torch.arange(6), 3).int(),
            equals(),
            given="rows ask: token 2 sees 0 1 2, token 3 sees 1 2 3, token 5 sees 3 4 5",
        ),
        Probe(
            "with one sink, by hand",
            lambda f: f(torch.arange(6), torch.arange(6), 3, 1)[3:].int(),
            equals(),
            given="tokens 3, 4 and 5 see token 0, too",
        ),
        Probe(
            "a chunk on top of a cache",
            lambda f: f(torch.arange(6, 9), torch.arange(9), 4, 2).int(),
            equals(),
            given="queries at 6, 7, 8, keys at 0 … 8, window 4, sinks 2",
        ),
        Probe(
            "decode from a ring",
            lambda f: f(*_ring(), 4, 2).int(),
            equals(),
            given="query at 11, keys at 10, 0, 11, 1, 8, 9, 7, window 4, sinks 2: only 7 is too old",
        ),
        Probe(
            "real tokens do not see padding",
            lambda f: f(*_left_padded(), 3, 1)[0, 2:].int(),
            equals(),
            given="positions −1 −1 0 1 2 3, window 3, sinks 1; the rows of 0 … 3",
        ),
        Probe(
            "padding sees padding",
            lambda f: f(*_left_padded(), 3, 1)[:, :2].int(),
            equals(),
            given="positions −1 −1 0 1 2 3, window 3, sinks 1; the rows of both −1",
        ),
        Probe(
            "equals the reference",
            lambda f: [
                f(torch.randint(-1, 20, (3, 7)), torch.randint(-1, 20, (3, 11)), w, s).int()
                for w, s in ((1, 0), (1, 5), (6, 0), (6, 3), (30, 2))
            ],
            equals(),
        ),
    ],
    misconceptions=[
        one_token_too_many,
        near_and_a_sink,
        sinks_escape_causality,
        the_window_goes_both_ways,
        padding_is_seen,
        padding_is_blind,
        places_instead_of_positions,
        the_first_columns_are_the_sinks,
    ],
)

# --- 3.5.b --------------------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    T, K = q.shape[2], k.shape[2]
    return torch.arange(K - T, K)[:, None], torch.arange(K)[None, :]


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The reference."""
    query, key = _positions(q, k)
    return _attend(q, k, v, (key <= query) & (query - key < window))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cropped_with_a_triangle(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The keys are the last ones of the text, and the kernel's triangle starts at the first of them, so early
    queries meet keys from their future. Leave the keys whole, and say with a mask who sees whom."""
    k, v = k[:, :, -window:], v[:, :, -window:]
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


def no_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal, but every token sees its whole past: the far end of the window is missing."""
    query, key = _positions(q, k)
    return _attend(q, k, v, key <= query)


def the_window_and_one_more(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Each token sees itself and window others. It is one of the window: the distance must be less than the
    window."""
    return windowed_attention(q, k, v, window + 1)


def queries_counted_from_0(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Right while T = K. But the queries are the last T tokens: with K keys the first of them stands at K −
    T, not at 0."""
    query, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    return _attend(q, k, v, (key <= query) & (query - key < window))


def the_mask_as_numbers(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """A mask of floats is added to the scores: 1 for visible and 0 for hidden hides nothing. Pass booleans,
    or −∞ for what is hidden."""
    query, key = _positions(q, k)
    return _attend(q, k, v, ((key <= query) & (query - key < window)).to(q.dtype))


def only_the_far_end(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Distances to the future are negative, hence less than the window: without a second condition, key ≤
    query, everybody sees all that is to come."""
    query, key = _positions(q, k)
    return _attend(q, k, v, query - key < window)


def True_means_hidden(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The mask is upside down: for F.scaled_dot_product_attention True means may attend."""
    query, key = _positions(q, k)
    return _attend(q, k, v, ~((key <= query) & (query - key < window)))


def masked_but_still_cropped(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The mask is right, but the keys that early queries need are gone: the crop is measured from the last
    token, and with T queries the first looks T − 1 further back. Keep the keys."""
    query, key = _positions(q, k)
    mask = (key <= query) & (query - key < window)
    return _attend(q, k[:, :, -window:], v[:, :, -window:], mask[:, -window:])


def _as_layer(f: Attend, window: int = 3) -> Callable[[Tensor], Tensor]:
    """`(B, T, C)` in and out: the input is query, key and value at once."""
    return lambda x: f(x[:, None], x[:, None], x[:, None], window)[:, 0]


def _zero_queries(f: Attend) -> Tensor:
    """All keys are equal: each token gets the mean of the values that it sees."""
    nothing, values = torch.zeros(1, 1, 5, 1), torch.tensor([1.0, 3.0, 5.0, 11.0, 20.0])
    return f(nothing, nothing, values.view(1, 1, 5, 1), 2).flatten()


def _last(f: Attend, T: int, K: int, window: int, seed: int = 0) -> Tensor:
    q, k, v = (randn(2, 3, n, 8, seed=seed + i) for i, n in enumerate((T, K, K)))
    return f(q, k, v, window)


DEBUG = Exercise(
    id="3.5.b",
    symbol="windowed_attention",
    reference=windowed_attention,
    look_again="Cropped keys and `is_causal=True`",
    equivalent_mutants={
        "`torch.arange(K - T, K, device=q.device)` became `torch.arange(K - T, K)`": ON_CPU,
        "`torch.arange(K, device=q.device)` became `torch.arange(K)`": ON_CPU,
    },
    probes=[
        Probe("shape and dtype", lambda f: _last(f, 4, 6, 3), same_shape),
        causality(_as_layer, randn(1, 8, 4, seed=1)),
        Probe(
            "window 2, no preferences, by hand",
            _zero_queries,
            equals(),
            given="values 1, 3, 5, 11, 20: each token gets the mean of its own and the one before",
        ),
        Probe("training: T = K", lambda f: _last(f, 16, 16, 5, seed=2), equals()),
        Probe("decode: T = 1", lambda f: _last(f, 1, 9, 4, seed=5), equals()),
        Probe("a chunk on top of a cache: T = 4, K = 10", lambda f: _last(f, 4, 10, 3, seed=8), equals()),
        Probe(
            "a window of 1, and one that holds all",
            lambda f: (_last(f, 6, 6, 1, seed=11), _last(f, 3, 6, 50, seed=14)),
            equals(),
        ),
    ],
    misconceptions=[
        cropped_with_a_triangle,
        no_window,
        the_window_and_one_more,
        queries_counted_from_0,
        the_mask_as_numbers,
        only_the_far_end,
        True_means_hidden,
        masked_but_still_cropped,
    ],
)

# --- 3.5.c --------------------------------------------------------------------------------------------------


class _Alibi:
    """The reference, in steps that the misconceptions below replace one at a time."""

    def __call__(self, n_heads: int, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        if n_heads < 1 or n_heads & (n_heads - 1):
            raise ValueError(f"n_heads is {n_heads}, but must be a power of two")
        distance = self.distance(query_positions, key_positions)
        bias = self.sign * self.slopes(n_heads)[:, None, None] * distance
        return self.hide(bias, (distance < 0) | (key_positions < 0))

    sign = -1.0

    def distance(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return query_positions[:, None] - key_positions[None, :]

    def slopes(self, n_heads: int) -> Tensor:
        return 2.0 ** (-8 * torch.arange(1, n_heads + 1) / n_heads)

    def hide(self, bias: Tensor, hidden: Tensor) -> Tensor:
        return bias.masked_fill(hidden, -torch.inf)


class _FarFirst(_Alibi):
    sign = 1.0


class _FromZero(_Alibi):
    def slopes(self, n_heads: int) -> Tensor:
        return 2.0 ** (-8 * torch.arange(n_heads) / n_heads)


class _SameForAnyH(_Alibi):
    def slopes(self, n_heads: int) -> Tensor:
        return 2.0 ** -torch.arange(1.0, n_heads + 1)


class _SlopesReversed(_Alibi):
    def slopes(self, n_heads: int) -> Tensor:
        return super().slopes(n_heads).flip(0)


class _NothingHidden(_Alibi):
    def hide(self, bias: Tensor, hidden: Tensor) -> Tensor:
        return bias


class _HiddenByZero(_Alibi):
    def hide(self, bias: Tensor, hidden: Tensor) -> Tensor:
        return bias.masked_fill(hidden, 0.0)


class _EmptySlots(_Alibi):
    def __call__(self, n_heads: int, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        bias = super().__call__(n_heads, query_positions, key_positions.clamp(min=0))
        distance = self.distance(query_positions, key_positions)
        empty = -self.slopes(n_heads)[:, None, None] * distance
        return torch.where(key_positions < 0, empty, bias)


class _Places(_Alibi):
    def distance(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        T, K = len(query_positions), len(key_positions)
        return torch.arange(K - T, K)[:, None] - torch.arange(K)[None, :]


Bias = Callable[[int, Tensor, Tensor], Tensor]


def _with_alibi(f: Bias) -> Callable[[Tensor], Tensor]:
    def layer(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        q = x[:, None].expand(-1, 4, -1, -1)  # (B, 4, T, C)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=f(4, positions, positions)).sum(1)

    return layer


def _in_use(f: Bias) -> tuple[Tensor, Any]:
    layer, x = _with_alibi(f), randn(1, 6, 4, seed=3)
    return layer(x), leaks(layer, x)


def _shifted(f: Bias) -> tuple[Tensor, Tensor]:
    positions = torch.arange(5)
    return f(2, positions, positions), f(2, positions + 1000, positions + 1000)


def _depends_on_place(pair: tuple[Tensor, Tensor]) -> str | None:
    if torch.allclose(*pair, atol=1e-4):
        return None
    return "the same five tokens, 1000 further on, get another bias: only distances should count"


EXTEND = Exercise(
    id="3.5.c",
    symbol="alibi",
    reference=_Alibi(),
    look_again="How far can a token see?",
    equivalent_mutants={
        "`torch.arange(1, n_heads + 1, device=key_positions.device)` became `torch.arange(1, n_heads + 1)`": ON_CPU
    },
    probes=[
        Probe("shape and dtype", lambda f: f(4, torch.arange(3), torch.arange(5)), same_shape),
        Probe("no output sees the future", _in_use, holds(lambda result: result[1])),
        Probe("only the distance counts", _shifted, holds(_depends_on_place)),
        Probe(
            "two heads, three tokens, by hand",
            lambda f: f(2, torch.arange(3), torch.arange(3)),
            equals(digits=4),
            given="slopes 1/16 and 1/256; token 2 is at distance 2 from token 0",
        ),
        Probe(
            "eight heads: slopes 1/2 to 1/256",
            lambda f: f(8, torch.tensor([1]), torch.tensor([0])).flatten(),
            equals(1e-6, digits=4),
            given="one query at 1, one key at 0",
        ),
        Probe("one head", lambda f: f(1, torch.tensor([300]), torch.tensor([0, 44, 300])), equals()),
        Probe(
            "keys in any order, an empty slot",
            lambda f: f(2, torch.tensor([9, 10]), torch.tensor([8, -1, 10, 0, 9])),
            equals(digits=3),
            given="queries at 9 and 10, keys at 8, −1 (empty), 10, 0, 9",
        ),
        Probe("equals the reference", lambda f: f(16, torch.arange(20, 30), torch.arange(30)), equals()),
        Probe(
            "6 heads, and none: a ValueError",
            lambda f: [outcome(lambda n=n: f(n, torch.arange(2), torch.arange(2)) is None) for n in (6, 0)],
            equals(),
        ),
    ],
    misconceptions=[
        Misconception(
            "far tokens are favored",
            _FarFirst(),
            "Your bias grows with the distance, so the oldest token gets most. It is a penalty: minus the slope "
            "times the distance.",
        ),
        Misconception(
            "slopes from h = 0",
            _FromZero(),
            "The first slope is 2⁰ = 1, since your h starts at 0. It runs from 1 to H, so that the last slope is "
            "2⁻⁸ for any H.",
        ),
        Misconception(
            "slopes that ignore H",
            _SameForAnyH(),
            "Your slopes are 1/2, 1/4, 1/8, … for any number of heads, which is right for H = 8 only. The "
            "exponent is 8h/H: the last slope is always 1/256.",
        ),
        Misconception(
            "slopes in reverse",
            _SlopesReversed(),
            "The slopes are right, but in the opposite order: head 1 has the steepest. Weights that were "
            "trained with one order do not fit the other.",
        ),
        Misconception(
            "the future is favored",
            _NothingHidden(),
            "Nothing is hidden, and a negative distance makes a positive bias: the further in the future, the "
            "more. Put −∞ there.",
        ),
        Misconception(
            "hidden by a zero",
            _HiddenByZero(),
            "You put 0 where a query must not look. The bias is added to the scores, and 0 changes nothing, so "
            "the future gets more than the past. Only −∞ hides.",
        ),
        Misconception(
            "empty slots are seen",
            _EmptySlots(),
            "A key at −1 is an empty slot and holds rubbish; you treated it as a token that stands just before "
            "the text. Hide it.",
        ),
        Misconception(
            "places instead of positions",
            _Places(),
            "You counted rows and columns. In a ring the keys lie in any order, so the distance must come from "
            "the positions that were handed in.",
        ),
    ],
)

EXERCISES = [BUILD, DEBUG, EXTEND]
