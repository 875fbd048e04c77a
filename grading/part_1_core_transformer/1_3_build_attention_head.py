"""Exercises of lesson 1.3, one attention head."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tutorial_lib.checks.probes import (
    causality,
    equals,
    fill_by_name,
    holds,
    leaks,
    randn,
    same_parameters,
    same_shape,
)
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.core.attention import scaled_dot_product_attention
from tutorial_lib.core.head import AttentionHead
from tutorial_lib.core.masks import causal_mask

MINUS_INFINITY = float("-inf")
SAME_SWAP = {"`k.transpose(-2, -1)` became `k.transpose(-1, -2)`": "swapping two dimensions has no order"}


# --- 1.3.a --------------------------------------------------------------------------------------------------


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def _set(module: nn.Module, **rows: list) -> nn.Module:
    """Give each named projection these weights, a row per output channel, and no bias."""
    with torch.no_grad():
        for name, values in rows.items():
            getattr(module, name).weight.copy_(torch.tensor(values, dtype=torch.float32))
    return module


def _apple(cls: type[nn.Module]) -> Tensor:
    head = _set(cls(3, 1), q=[[2, 0, 0]], k=[[0, 2, 0]], v=[[0, 0, 1]])
    return head(torch.tensor([[[0.0, 0, 0], [0, 1, 5], [1, 0, 0]]]))


def _four_channels(cls: type[nn.Module]) -> Tensor:
    ones, first = [[1, 0]] * 4, [[1, 0], [0, 0], [0, 0], [0, 0]]
    return _set(cls(2, 4), q=ones, k=ones, v=first)(torch.tensor([[[1.0, 0], [0, 0]]]))


def _padded(cls: type[nn.Module]) -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])[:, None, :]  # (B, 1, T)
    out = fill_by_name(cls(8, 4, bias=True))(randn(2, 4, 8, seed=2), mask)
    return out, mask


def _gradients(module: nn.Module, out: Tensor) -> dict[str, bool]:
    """Which parameters a gradient reaches."""
    if not out.requires_grad:
        return {name: False for name, _ in module.named_parameters()}
    (out * randn(*out.shape, seed=9)).sum().backward()
    return {
        name: p.grad is not None and bool(p.grad.abs().sum() > 0)
        for name, p in module.named_parameters()
        if name != "k.bias"  # cancelled by the softmax, so that its gradient is rounding noise
    }


def _head_gradients(cls: type[nn.Module]) -> dict[str, bool]:
    head = fill_by_name(cls(6, 4))
    return _gradients(head, head(randn(2, 5, 6)))


def _unreached(reached: dict[str, bool]) -> str | None:
    missing = [name for name, arrived in reached.items() if not arrived]
    return f"no gradient reaches {', '.join(missing)}: the head could not learn" if missing else None


def _variant(weights_of: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]) -> type[nn.Module]:
    """A head whose weights come from `weights_of(q, k, mask, d_model)`."""

    class Variant(AttentionHead):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return weights_of(self.q(x), self.k(x), mask, x.shape[-1]) @ self.v(x)

    return Variant


def _masked_softmax(scores: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor:
    if mask is not None:
        scores = scores.masked_fill(~mask, MINUS_INFINITY)
    return scores.softmax(dim=dim)


def _products(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return _products(q, k) / math.sqrt(q.shape[-1])


def _times_mask(q: Tensor, k: Tensor, mask: Tensor | None, d_model: int) -> Tensor:
    scores = _scores(q, k)
    return (scores if mask is None else scores * mask).softmax(dim=-1)


def _upside_down(q: Tensor, k: Tensor, mask: Tensor | None, d_model: int) -> Tensor:
    return _masked_softmax(_scores(q, k), None if mask is None else ~mask)


def _after_softmax(q: Tensor, k: Tensor, mask: Tensor | None, d_model: int) -> Tensor:
    weights = _scores(q, k).softmax(dim=-1)
    return weights if mask is None else weights * mask


def _by_hand_softmax(q: Tensor, k: Tensor, mask: Tensor | None, d_model: int) -> Tensor:
    power = _scores(q, k).exp()
    power = power if mask is None else power * mask
    return power / power.sum(dim=-1, keepdim=True)


BUILD = Exercise(
    id="1.3.a",
    symbol="AttentionHead",
    reference=AttentionHead,
    look_again="The equations, with their shapes",
    equivalent_mutants=SAME_SWAP,
    probes=[
        Probe("projections q, k and v", lambda cls: _shapes(cls(6, 3)), same_parameters),
        Probe("a bias when asked for", lambda cls: _shapes(cls(6, 3, bias=True)), same_parameters),
        Probe("shape and dtype", lambda cls: fill_by_name(cls(12, 5))(randn(2, 7, 12)), same_shape),
        causality(
            lambda cls: lambda x, head=fill_by_name(cls(6, 4)): head(x, causal_mask(6)), randn(1, 6, 6)
        ),
        Probe(
            "the red apple, by hand",
            _apple,
            equals(),
            given="the example of the lesson: [noun, adjective, redness] of the, red, apple",
        ),
        Probe(
            "four channels, by hand",
            _four_channels,
            equals(digits=3),
            given="q = k = [1, 1, 1, 1] for token 0, zeros for token 1: one score is 4 / √4 = 2, the rest 0",
        ),
        Probe(
            "equals the reference",
            lambda cls: fill_by_name(cls(16, 4, bias=True))(randn(3, 9, 16, seed=1), causal_mask(9)),
            equals(),
        ),
        Probe("a mask for each sequence, left as it was", _padded, equals()),
        Probe(
            "scores in the hundreds",
            lambda cls: fill_by_name(cls(8, 4))(50 * randn(4, 6, 8), causal_mask(6)),
            equals(1e-2),
        ),
        Probe("all three projections can learn", _head_gradients, holds(_unreached)),
    ],
    misconceptions=[
        Misconception(
            "no scale",
            _variant(lambda q, k, mask, d_model: _masked_softmax(_products(q, k), mask)),
            "The scores were not divided by √d_head; the wider the head, the sooner its softmax is all or "
            "nothing, and then it hardly learns.",
        ),
        Misconception(
            "the scale of d_model",
            _variant(lambda q, k, mask, d_model: _masked_softmax(_products(q, k) / math.sqrt(d_model), mask)),
            "You divided by √d_model. A score is a sum over the head's own channels, so it grows with d_head, "
            "and √d_head is what brings it back: the last dimension of q, not of x.",
        ),
        Misconception(
            "a scale of zero",
            _variant(lambda q, k, mask, d_model: _masked_softmax(0.0 * _products(q, k), mask)),
            "Every token was looked at alike, as if all scores were zero. Is the scale an integer division, "
            "such as 1 // d_head ** 0.5? That is 0.",
        ),
        Misconception(
            "softmax over the queries",
            _variant(lambda q, k, mask, d_model: _masked_softmax(_scores(q, k), mask, dim=-2)),
            "The softmax ran down the columns. Each query shares out one unit of attention among the keys, and "
            "the keys are the last dimension: dim=-1.",
        ),
        Misconception(
            "the mask multiplies the scores",
            _variant(_times_mask),
            "You multiplied the scores by the mask. A score of 0 still gets the weight e⁰ before normalizing; "
            "what may not be seen needs a score of −inf.",
        ),
        Misconception(
            "the mask upside down",
            _variant(_upside_down),
            "You hid what may be seen and showed the rest. Here True means that a token may be attended to, so "
            "−inf goes where the mask is False: ~mask.",
        ),
        Misconception(
            "masked after the softmax",
            _variant(_after_softmax),
            "You set weights to zero after the softmax, so the ones that remain no longer sum to 1. Mask the "
            "scores, before it.",
        ),
        Misconception(
            "exp without a safety net",
            _variant(_by_hand_softmax),
            "Your softmax is right for small scores, but e¹⁰⁰ does not fit into a float32. torch.softmax "
            "subtracts the largest score of each row first; the result is the same and never overflows.",
        ),
    ],
)


# --- 1.3.b --------------------------------------------------------------------------------------------------


def causal_head(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """The reference: `(B, T, D)` with three `(D, C)` matrices to `(B, T, C)`."""
    return scaled_dot_product_attention(x @ w_q, x @ w_k, x @ w_v, causal_mask(x.shape[1]))[0]


Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _matrices(D: int, C: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(randn(D, C, seed=seed).to(dtype) / math.sqrt(D) for seed in (11, 12, 13))  # type: ignore


def _no_future(f: Head) -> tuple[Tensor, str | None]:
    matrices, x = _matrices(8, 4), randn(1, 6, 8)
    return f(x.clone(), *matrices), leaks(lambda y: f(y, *matrices), x)


def _first_token(f: Head) -> Tensor:
    """What token 0 gets: nothing but its own value, since it can see nothing else."""
    return f(randn(2, 5, 8, seed=3), *_matrices(8, 4))[:, 0]


def _two_tokens(f: Head) -> Tensor:
    """q = k = (2, 2, 0, 0) for both tokens, so all scores are 8 / √4 = 4; values 1 and 3 in channel 0."""
    to_score, to_value = torch.zeros(2, 4), torch.zeros(2, 4)
    to_score[0, :2], to_value[1, 0] = 2.0, 1.0
    return f(torch.tensor([[[1.0, 1.0], [1.0, 3.0]]]), to_score, to_score, to_value)


def _strong_and_weak(f: Head) -> Tensor:
    """Token 1 asks with (1, 1, 1, 1): it finds token 0 at 4 / √4 = 2 and itself at 0."""
    w_q, w_k, w_v = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4)
    w_q[0], w_k[1], w_v[2, 0] = 1.0, 1.0, 1.0
    return f(torch.tensor([[[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]]), w_q, w_k, w_v)


def _past(T: int) -> Tensor:
    return torch.tril(torch.ones(T, T))


def both_bugs_still_there(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """These are the numbers of the code as it came: the future has the score 0, which still gets weight after
    the softmax, and the scale is that of the wrong width."""
    scores = _products(x @ w_q, x @ w_k) / math.sqrt(x.shape[-1])
    return (scores * _past(x.shape[1]).to(x)).softmax(dim=-1) @ (x @ w_v)


def the_mask_still_multiplies(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """The scale is mended. The future still has a score of 0, and e⁰ = 1 is not nothing: it needs −inf."""
    return (_scores(x @ w_q, x @ w_k) * _past(x.shape[1]).to(x)).softmax(dim=-1) @ (x @ w_v)


def the_scale_of_the_whole_width(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """The future is hidden now. One bug is left: a score is a sum of d_head products, and the code divides by
    the root of the width of x."""
    scores = _products(x @ w_q, x @ w_k) / math.sqrt(x.shape[-1])
    return _masked_softmax(scores, causal_mask(x.shape[1])) @ (x @ w_v)


def masked_after_the_softmax(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """You set the weights of the future to zero after the softmax: the rest of the row no longer sums to 1,
    and the future still sat in the sum that it was divided by. Mask the scores."""
    weights = _scores(x @ w_q, x @ w_k).softmax(dim=-1)
    return (weights * _past(x.shape[1]).to(x)) @ (x @ w_v)


def a_token_may_not_see_itself(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """Your triangle leaves out the diagonal, so token 0 may see nothing and its softmax is 0/0. A token sees
    the past and itself."""
    mask = _past(x.shape[1]).tril(-1).bool()
    return _masked_softmax(_scores(x @ w_q, x @ w_k), mask) @ (x @ w_v)


def the_other_triangle(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """You kept the upper triangle: every token sees itself and what follows. The lower triangle has the
    past."""
    mask = _past(x.shape[1]).T.bool()
    return _masked_softmax(_scores(x @ w_q, x @ w_k), mask) @ (x @ w_v)


def softmax_over_the_queries(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """The softmax ran down the columns, so a row's weights depend on the queries that come later. It goes
    over the keys, dim=-1."""
    scores = _scores(x @ w_q, x @ w_k).masked_fill(~causal_mask(x.shape[1]), MINUS_INFINITY)
    return scores.softmax(dim=-2) @ (x @ w_v)


DEBUG = Exercise(
    id="1.3.b",
    symbol="causal_head",
    reference=causal_head,
    look_again="A mask of the wrong kind",
    equivalent_mutants=SAME_SWAP,
    probes=[
        Probe("shape and dtype", lambda f: f(randn(2, 5, 8), *_matrices(8, 4)), same_shape),
        Probe("no output sees the future", _no_future, holds(lambda result: result[1])),
        Probe("token 0 gets its own value", _first_token, equals()),
        Probe(
            "two equal scores, by hand",
            _two_tokens,
            equals(),
            given="values 1 and 3, all scores 4: token 0 gets 1, token 1 gets (1 + 3) / 2",
        ),
        Probe(
            "one strong score, by hand",
            _strong_and_weak,
            equals(digits=3),
            given="token 1 finds token 0 (value 1) at 4 / √4 = 2 and itself (value 0) at 0",
        ),
        Probe(
            "equals the reference",
            lambda f: f(randn(3, 7, 32, seed=4), *_matrices(32, 4)),
            equals(),
        ),
        Probe(
            "works in float64",
            lambda f: f(randn(2, 5, 8).double(), *_matrices(8, 4, torch.float64)),
            equals(),
        ),
        Probe(
            "scores in the hundreds",
            lambda f: f(100 * randn(8, 6, 8, seed=5), *_matrices(8, 4)),
            equals(1e-2),
        ),
    ],
    misconceptions=[
        both_bugs_still_there,
        the_mask_still_multiplies,
        the_scale_of_the_whole_width,
        masked_after_the_softmax,
        a_token_may_not_see_itself,
        the_other_triangle,
        softmax_over_the_queries,
    ],
)


# --- 1.3.c --------------------------------------------------------------------------------------------------


class CrossAttentionHead(nn.Module):
    """The reference: queries from one sequence, keys and values from another."""

    def __init__(self, d_model: int, d_source: int, d_head: int) -> None:
        super().__init__()
        self.q = nn.Linear(d_model, d_head, bias=False)
        self.k = nn.Linear(d_source, d_head, bias=False)
        self.v = nn.Linear(d_source, d_head, bias=False)

    def forward(self, x: Tensor, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """`(B, T, d_model)` and `(B, S, d_source)`, mask `(B, S)`, to `(B, T, d_head)`."""
        return self._attend(
            self.q(x), self.k(source), self.v(source), None if source_mask is None else source_mask[:, None]
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask)[0]


class TheWrongSideAsks(CrossAttentionHead):
    """The source asked and x answered. The one who wants to know brings the query: q comes from x, k and v
    from the source."""

    def forward(self, x: Tensor, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        return super().forward(source, x, source_mask)


class TheSourceIsNeverRead(CrossAttentionHead):
    """This is self-attention on x: keys and values must come from the source."""

    def forward(self, x: Tensor, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, x, source_mask)


class ValuesFromTheWrongSide(CrossAttentionHead):
    """You looked in the source and brought back values of x. What is found by a key and what is handed over
    belong to the same token: v comes from the source as k does."""

    def forward(self, x: Tensor, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        mask = None if source_mask is None else source_mask[:, None]
        return self._attend(self.q(x), self.k(source), self.v(x), mask)


class TheMaskIsIgnored(CrossAttentionHead):
    """Padding of the source was attended to: source_mask was not used."""

    def forward(self, x: Tensor, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, source)


class True_taken_for_padding(CrossAttentionHead):
    """You hid the real tokens and showed the padding. True means that a token may be attended to."""

    def forward(self, x: Tensor, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, source, None if source_mask is None else ~source_mask)


class TheMaskOnTheQueries(CrossAttentionHead):
    """You spread the mask over the rows of the scores, which are the askers. It belongs to the source, the
    last dimension: (B, S) becomes (B, 1, S)."""

    def forward(self, x: Tensor, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        scores = _scores(self.q(x), self.k(source))
        return _masked_softmax(scores, None if source_mask is None else source_mask[:, :, None]) @ self.v(
            source
        )


class CausalAcrossTwoSequences(CrossAttentionHead):
    """You hid source tokens behind a triangle. Position 3 of x and position 3 of the source have nothing to
    do with one another: all of the source may be seen."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        past = torch.ones(q.shape[-2], k.shape[-2]).tril().bool()
        return super()._attend(q, k, v, past if mask is None else past & mask)


class SoftmaxOverTheQueries(CrossAttentionHead):
    """The softmax ran over the askers. Each of them shares out one unit of attention over the source,
    dim=-1."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _masked_softmax(_scores(q, k), mask, dim=-2) @ v


def _question_and_book(cls: type[nn.Module]) -> Tensor:
    """Two askers and two lines: asker 0 wants line 1, asker 1 wants line 0; the score is 3 and not 0."""
    half = math.sqrt(2) / 2
    head = _set(cls(2, 2, 2), q=[[0, 3], [3, 0]], k=[[half, 0], [0, half]], v=[[5, 0], [0, 0.5]])
    return head(torch.eye(2)[None], 2 * torch.eye(2)[None])


def _real_tokens(cls: type[nn.Module]) -> tuple[Tensor, Tensor]:
    """The output with two padded source tokens, and how much it moves when these change."""
    head = fill_by_name(cls(6, 6, 4))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x, source = randn(2, 3, 6, seed=1), randn(2, 3, 6, seed=2)
    before = head(x, source.clone(), mask.clone())
    source[~mask] += 5.0
    return before, (head(x, source, mask.clone()) - before).abs().amax()


def _padding_counts(result: tuple[Tensor, Tensor]) -> str | None:
    if result[0].isnan().any():
        return "some outputs are NaN: a query was left with nothing to attend to"
    if result[1] > 1e-6:
        return "the output moved when only padding of the source changed: the mask does not hide it"
    return None


def _wide(cls: type[nn.Module]) -> Tensor:
    mask = torch.arange(9)[None] < torch.tensor([[9], [4], [1]])
    return fill_by_name(cls(8, 12, 4))(randn(3, 5, 8, seed=3), randn(3, 9, 12, seed=4), mask)


def _loud(cls: type[nn.Module]) -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[True, False, True, False]] * 6)
    source = 30 * randn(6, 4, 10, seed=8)
    return fill_by_name(cls(6, 10, 4))(30 * randn(6, 5, 6, seed=7), source, mask), source


def _cross_gradients(cls: type[nn.Module]) -> dict[str, bool]:
    head = fill_by_name(cls(6, 10, 4))
    return _gradients(head, head(randn(2, 5, 6), randn(2, 3, 10, seed=1)))


EXTEND = Exercise(
    id="1.3.c",
    symbol="CrossAttentionHead",
    reference=CrossAttentionHead,
    look_again="One vector, three roles",
    equivalent_mutants=SAME_SWAP,
    probes=[
        Probe("projections of the right widths", lambda cls: _shapes(cls(6, 10, 4)), same_parameters),
        Probe(
            "shape and dtype",
            lambda cls: fill_by_name(cls(6, 6, 4))(randn(2, 3, 6), randn(2, 3, 6, seed=1)),
            same_shape,
        ),
        Probe(
            "two askers, two lines, by hand",
            _question_and_book,
            equals(digits=3),
            given="asker 0 finds line 1 (value [0, 1]) at 3 and line 0 (value [10, 0]) at 0; asker 1 the reverse",
        ),
        Probe(
            "equals the reference",
            lambda cls: fill_by_name(cls(6, 6, 4))(randn(2, 4, 6, seed=5), randn(2, 4, 6, seed=6)),
            equals(),
        ),
        Probe("padding of the source is not seen", _real_tokens, holds(_padding_counts)),
        Probe("equals the reference under the mask", lambda cls: _real_tokens(cls)[0], equals()),
        Probe("5 askers, 9 source tokens, other widths", _wide, equals()),
        Probe("scores in the hundreds, and the source is as before", _loud, equals(1e-2)),
        Probe("all three projections can learn", _cross_gradients, holds(_unreached)),
    ],
    misconceptions=[
        TheWrongSideAsks,
        TheSourceIsNeverRead,
        ValuesFromTheWrongSide,
        TheMaskIsIgnored,
        True_taken_for_padding,
        TheMaskOnTheQueries,
        CausalAcrossTwoSequences,
        SoftmaxOverTheQueries,
    ],
)

EXERCISES = [BUILD, DEBUG, EXTEND]
