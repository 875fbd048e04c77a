"""Exercises of lesson 4.6, compile and flash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, holds, leaks, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe

INF = torch.inf
NO_ORDER = "the larger of two numbers has no order"
ANY_FINITE = "−∞ minus any finite number is −∞"

# --- 4.6.a --------------------------------------------------------------------------------------------------

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _step(
    maximum: str = "running", subtract: str = "running", rescaled: str = "both", safe: bool = True
) -> Step:
    """The reference, or, with other arguments, one of its misconceptions."""

    def online_softmax_step(
        m: Tensor, l: Tensor, acc: Tensor, scores: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tile = scores.amax(dim=-1, keepdim=True)
        m_new = tile if maximum == "tile" else torch.maximum(m, tile)
        finite = m_new.masked_fill(m_new == -INF, 0.0) if safe else m_new
        rescale = (m - finite).exp()
        if rescaled == "upside down":
            rescale = torch.where(m == -INF, 0.0, (finite - m).exp())
        old = tile.masked_fill(tile == -INF, 0.0) if subtract == "tile" else finite
        p = (scores - old).exp()
        keep_l = 1.0 if rescaled in ("acc", "none") else rescale
        keep_acc = 1.0 if rescaled in ("l", "none") else rescale
        return m_new, keep_l * l + p.sum(dim=-1, keepdim=True), keep_acc * acc + p @ v

    return online_softmax_step


def divided_at_every_step(
    m: Tensor, l: Tensor, acc: Tensor, scores: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """acc was divided by l. It must remain a plain sum, or the next tile cannot be added to it: divide once,
    after the last tile."""
    m, l, acc = _step()(m, l, acc, scores, v)
    return m, l, acc / l.clamp(min=1e-30)


def _nothing(*shape: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((*shape, 1), -INF), torch.zeros(*shape, 1), torch.zeros(*shape, channels)


def _row(step: Step, scores: Tensor, v: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """All of a row of scores, `width` at a time, from nothing."""
    state = _nothing(*scores.shape[:-1], channels=v.shape[-1])
    for j in range(0, scores.shape[-1], width):
        state = step(*state, scores[..., j : j + width].clone(), v[..., j : j + width, :].clone())
    return state


def _widths(step: Step) -> list[Tensor]:
    scores, v = 3 * randn(2, 3, 12, seed=1), randn(2, 12, 4, seed=2)
    results = []
    for width in (12, 1, 5):
        _, l, acc = _row(step, scores, v, width)
        results.append(acc / l)
    return results


def _one_number(
    m: float, l: float, acc: float, scores: list[float], values: list[float]
) -> Callable[[Step], Any]:
    one = torch.tensor
    return lambda step: step(
        one([[m]]), one([[l]]), one([[acc]]), one([scores]), one([[value] for value in values])
    )


def _two_tiles(step: Step) -> list[Tensor]:
    first = _one_number(-INF, 0.0, 0.0, [0.0, 0.0], [10.0, 20.0])(step)
    then = step(*(x.clone() for x in first), torch.tensor([[0.0]]), torch.tensor([[30.0]]))
    return [*(x.clone() for x in first), *then]


def _empty_rows(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    scores = randn(3, 6, seed=3)
    scores[0, :4], scores[1], scores[2, 2:] = -INF, -INF, -INF
    return _row(step, scores, randn(6, 2, seed=4), 2)


STEP = Exercise(
    id="4.6.a",
    symbol="online_softmax_step",
    reference=_step(),
    look_again="A softmax in one pass",
    equivalent_mutants={
        "`torch.maximum(m, scores.amax(dim=-1, keepdim=True))` became "
        "`torch.maximum(scores.amax(dim=-1, keepdim=True), m)`": NO_ORDER,
        "`0.0` became `1.0`": ANY_FINITE,
    },
    probes=[
        Probe(
            "shape and dtype",
            lambda step: step(*_nothing(2, 3, channels=4), randn(2, 3, 5), randn(2, 5, 4)),
            same_shape,
        ),
        Probe(
            "the first tile and another, by hand",
            _two_tiles,
            equals(digits=3),
            given="m = −∞, l = 0, acc = 0; scores 0 and 0, values 10 and 20; then a tile of one score 0, value 30",
        ),
        Probe(
            "a larger score, by hand",
            _one_number(1.0, 1.0, 10.0, [3.0], [20.0]),
            equals(digits=3),
            given="m = 1, l = 1, acc = 10; score 3, value 20",
        ),
        Probe(
            "a smaller score, by hand",
            _one_number(3.0, 1.0, 20.0, [2.0], [30.0]),
            equals(digits=3),
            given="m = 3, l = 1, acc = 20; score 2, value 30",
        ),
        Probe("any width of tile gives the softmax", _widths, equals()),
        Probe(
            "equals the reference, step by step",
            lambda step: _row(step, 2 * randn(2, 2, 3, 8, seed=5), randn(2, 2, 8, 4, seed=6), 3),
            equals(),
        ),
        Probe(
            "scores of ±10⁴",
            lambda step: _row(step, 1e4 * randn(3, 8, seed=7).sign() + randn(3, 8, seed=8), randn(8, 2), 3),
            equals(1e-3),
        ),
        Probe(
            "queries that see nobody, or nobody yet",
            _empty_rows,
            equals(),
            given="three queries: the first sees only the last tile, the second nothing, the third only the first",
        ),
    ],
    misconceptions=[
        Misconception(
            "the past is not rescaled",
            _step(rescaled="none"),
            "The new weights are relative to the new maximum, but l and acc are still relative to the old one. "
            "Multiply both by exp(m − m_new) before you add.",
        ),
        Misconception(
            "only l is rescaled",
            _step(rescaled="l"),
            "acc is a sum of the same weights as l, so it needs the same factor exp(m − m_new).",
        ),
        Misconception(
            "only acc is rescaled",
            _step(rescaled="acc"),
            "l is a sum of the same weights as acc, so it needs the same factor exp(m − m_new).",
        ),
        Misconception(
            "rescaled upside down",
            _step(rescaled="upside down"),
            "The past was multiplied by exp(m_new − m). When the maximum grows, old weights become smaller: the "
            "factor is exp(m − m_new), at most 1.",
        ),
        Misconception(
            "the maximum of this tile",
            _step(maximum="tile"),
            "m became the largest score of this tile. It is the largest of all so far, and never falls: if it "
            "did, exp(m − m_new) could overflow.",
        ),
        Misconception(
            "weights relative to the tile",
            _step(subtract="tile"),
            "The weights of this tile are relative to its own maximum, and not to the running one that l and "
            "acc are relative to. Subtract m_new.",
        ),
        divided_at_every_step,
        Misconception(
            "infinity minus infinity",
            _step(safe=False),
            "A query that has seen nobody has m = −∞, and −∞ − (−∞) is NaN. Subtract a finite number there, "
            "and still hand −∞ back.",
        ),
    ],
)

# --- 4.6.b --------------------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


def _tiled(
    mask_past: bool = True,
    skip: str = "last position",
    columns: str = "global",
    strict: bool = False,
    masked: bool = True,
) -> Attend:
    """The reference, or, with other arguments, one of its misconceptions."""

    def tiled_attention(q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int) -> Tensor:
        T, K = q.shape[0], k.shape[0]
        out = torch.empty(T, v.shape[1])
        for top in range(0, T, block_q):
            q_i = q[top : top + block_q] / q.shape[1] ** 0.5
            rows = top + torch.arange(len(q_i))
            positions = K - T + rows
            limit = {
                "last position": positions[-1],
                "first position": positions[0],
                "last row": rows[-1],
                "first row": rows[0],
            }[skip]
            m, l = torch.full((len(q_i), 1), -INF), torch.zeros(len(q_i), 1)
            acc = torch.zeros(len(q_i), v.shape[1])
            for left in range(0, K, block_k):
                if left > limit:
                    break
                k_j, v_j = k[left : left + block_k], v[left : left + block_k]
                keys = (left if columns == "global" else 0) + torch.arange(len(k_j))
                asking = (positions if mask_past else rows)[:, None]
                future = keys >= asking if strict else keys > asking
                scores = q_i @ k_j.T
                if masked:
                    scores = scores.masked_fill(future, -INF)
                m, l, acc = _step()(m, l, acc, scores, v_j)
            out[top : top + block_q] = acc / l
        return out

    return tiled_attention


def _case(T: int, K: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return scale * randn(T, 6, seed=seed), randn(K, 6, seed=seed + 1), randn(K, 5, seed=seed + 2)


def _sees_the_future(attend: Attend) -> tuple[Tensor, str | None]:
    def layer(x: Tensor) -> Tensor:  # (1, T, C)
        return attend(x[0], x[0], x[0], 4, 4)[None]

    x = randn(1, 8, 6, seed=9)
    return layer(x), leaks(layer, x)


def _last_rows(attend: Attend) -> Tensor:
    """The last four of nine tokens, asked alone, in tiles whose edges lie apart."""
    q, k, v = _case(9, 9, 20)
    return torch.cat([attend(q[-4:].clone(), k.clone(), v.clone(), 4, width) for width in (4, 3)])


def _inputs_after(attend: Attend) -> list[Tensor]:
    inputs = _case(3, 5)
    attend(*inputs, 2, 2)
    return [*inputs]


DEBUG = Exercise(
    id="4.6.b",
    symbol="tiled_attention",
    reference=_tiled(),
    look_again="Tiles",
    equivalent_mutants={
        "`torch.maximum(m, scores.amax(dim=1, keepdim=True))` became "
        "`torch.maximum(scores.amax(dim=1, keepdim=True), m)`": NO_ORDER,
    },
    probes=[
        Probe("shape and dtype", lambda attend: attend(*_case(6, 6), 2, 2), same_shape),
        Probe(
            "no output sees the future",
            _sees_the_future,
            holds(lambda result: result[1]),
        ),
        Probe(
            "two queries on top of a cache of two, by hand",
            lambda attend: attend(
                torch.zeros(2, 1), torch.zeros(4, 1), torch.tensor([[1.0], [2.0], [6.0], [11.0]]), 2, 2
            ),
            equals(),
            given="all scores are 0, values 1, 2, 6, 11: the first query sees three of them, the second all four",
        ),
        Probe("T = K, square tiles", lambda attend: attend(*_case(8, 8, 3), 4, 4), equals()),
        Probe("a cache: the last rows as in one pass", _last_rows, equals()),
        Probe(
            "T = K, tiles wide and narrow",
            lambda attend: [attend(*_case(8, 8, 6), *blocks) for blocks in ((4, 2), (2, 4), (8, 1), (1, 8))],
            equals(),
        ),
        Probe(
            "any T and K, any tiles",
            lambda attend: [
                attend(*_case(T, K, T + K), *blocks)
                for T, K in ((1, 7), (5, 11), (7, 7), (6, 7))
                for blocks in ((3, 2), (2, 5), (64, 64), (1, 1))
            ],
            equals(),
        ),
        Probe("q, k and v stay as they are", _inputs_after, equals()),
        Probe("large scores", lambda attend: attend(*_case(7, 9, 12, 1e3), 3, 2), equals(1e-3)),
    ],
    misconceptions=[
        Misconception(
            "the code as given",
            _tiled(mask_past=False, skip="first row"),
            "Rows were taken for positions: query i of T stands at K − T + i. The code as given is right only "
            "when T = K and tiles are square.",
        ),
        Misconception(
            "only the mask is mended",
            _tiled(skip="first row"),
            "The mask asks for positions now, but tiles are still skipped by the row: of a long past only the "
            "first tiles are visited.",
        ),
        Misconception(
            "only the skipping is mended",
            _tiled(mask_past=False),
            "The right tiles are visited, but the mask still compares keys with rows: the first query on top of "
            "a cache sees key 0 alone. It stands at position K − T.",
        ),
        Misconception(
            "skipped by the first query",
            _tiled(skip="first position"),
            "A tile was skipped because the first query of the block does not see it. The last one sees "
            "farthest: skip only what is in the future for all of them.",
        ),
        Misconception(
            "skipped by the last row",
            _tiled(skip="last row"),
            "The last query of the block is asked, but by its row; its position is K − T further on.",
        ),
        Misconception(
            "keys counted from the tile's edge",
            _tiled(columns="local"),
            "The mask counts keys from the left edge of the tile. Key j of a tile that begins at left is key "
            "left + j of the text; otherwise late tiles seem to lie in the past.",
        ),
        Misconception(
            "a token does not see itself",
            _tiled(strict=True),
            "Future means later than the query: key position > query position. With ≥ a token does not see "
            "itself, and the first one sees nobody.",
        ),
        Misconception(
            "no mask on the diagonal",
            _tiled(masked=False),
            "Tiles in the future are skipped, but a tile on the diagonal has future in its upper corner: it "
            "still needs its mask.",
        ),
    ],
)

# --- 4.6.c --------------------------------------------------------------------------------------------------

Merge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _merge(weights_from: str = "softmax", total: str = "logsumexp", safe: bool = True) -> Merge:
    """The reference, or, with other arguments, one of its misconceptions."""

    def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        lse = lses.logsumexp(dim=0)
        if weights_from == "overflowing":
            weights = lses.exp() / lses.exp().sum(dim=0)
            return (weights[..., None] * outs).sum(dim=0), lses.exp().sum(dim=0).log()
        if weights_from == "mean":
            weights = torch.ones_like(lses) / lses.shape[0]
        elif weights_from == "linear":
            weights = lses / lses.sum(dim=0)
        elif weights_from == "queries":
            weights = lses.softmax(dim=-1)
        elif weights_from == "unnormalized":
            weights = lses.exp()
        else:
            weights = (lses - (lse.masked_fill(lse == -INF, 0.0) if safe else lse)).exp()
        merged = (weights[..., None] * outs).sum(dim=0)
        return merged, {"sum": lses.sum(dim=0), "max": lses.amax(dim=0)}.get(total, lse)

    return merge_parts


def _parts(cuts: list[int], T: int = 3, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Attention of `(2, T, 4)` queries to each part of the keys by itself."""
    q, k, v = scale * randn(2, T, 4, seed=seed), randn(2, cuts[-1], 4, seed=seed + 1), randn(2, cuts[-1], 5)
    scores = q @ k.transpose(-2, -1)
    outs, lses = [], []
    for left, right in zip([0, *cuts[:-1]], cuts, strict=True):
        outs.append(scores[..., left:right].softmax(dim=-1) @ v[:, left:right])
        lses.append(scores[..., left:right].logsumexp(dim=-1))
    return torch.stack(outs), torch.stack(lses)


def _in_turns(merge: Merge) -> list[Tensor]:
    """Three parts at once, and two by two in another order."""
    outs, lses = _parts([2, 7, 9], seed=3)
    at_once = merge(outs.clone(), lses.clone())
    first = merge(outs[1:].clone(), lses[1:].clone())
    then = merge(torch.stack([first[0], outs[0]]), torch.stack([first[1], lses[0]]))
    return [*at_once, *then]


def _parts_after(merge: Merge) -> list[Tensor]:
    outs, lses = _parts([4, 9])
    merge(outs, lses)
    return [outs, lses]


def _nobody(merge: Merge) -> tuple[Tensor, Tensor]:
    outs, lses = randn(2, 3, 4, seed=5), randn(2, 3, seed=6)
    for part, query in ((0, 0), (1, 1), (0, 2), (1, 2)):
        outs[part, query], lses[part, query] = 0.0, -INF
    return merge(outs, lses)


MERGE = Exercise(
    id="4.6.c",
    symbol="merge_parts",
    reference=_merge(),
    look_again="Forward",
    equivalent_mutants={"`0.0` became `1.0`": ANY_FINITE},
    probes=[
        Probe("shape and dtype", lambda merge: merge(*_parts([4, 9])), same_shape),
        Probe(
            "by hand: two keys and six keys",
            lambda merge: merge(torch.tensor([[[8.0]], [[0.0]]]), torch.tensor([[2.0], [6.0]]).log()),
            equals(digits=3),
            given="all scores are 0: two keys (output 8, L = log 2), then six keys (output 0, L = log 6)",
        ),
        Probe("two parts make the whole", lambda merge: merge(*_parts([4, 9])), equals()),
        Probe("any number of parts, in any order", _in_turns, equals()),
        Probe("the parts stay as they are", _parts_after, equals()),
        Probe(
            "log-sum-exps of ±10⁴",
            lambda merge: [
                *merge(randn(3, 2, 4), torch.tensor([[1e4, -1e4], [1e4 + 1, -1e4], [0.0, -1e4 - 1]]))
            ],
            equals(1e-3),
        ),
        Probe(
            "queries that saw nobody in one part, or in all",
            _nobody,
            equals(),
            given="query 0 saw nobody in part 0, query 1 nobody in part 1, query 2 nobody at all",
        ),
    ],
    misconceptions=[
        Misconception(
            "the mean of the outputs",
            _merge("mean"),
            "All parts got the same weight. A part counts by its denominator exp(Lₙ): one with larger scores, "
            "or more keys, counts more.",
        ),
        Misconception(
            "weights linear in the log-sum-exp",
            _merge("linear"),
            "Each part was weighted by Lₙ itself. L is a logarithm (it may even be negative); the weight is "
            "exp(Lₙ − L).",
        ),
        Misconception(
            "a softmax over the queries",
            _merge("queries"),
            "The weights were normalized over the queries. Each query shares out its attention among the parts: "
            "the first dimension.",
        ),
        Misconception(
            "not divided by the whole",
            _merge("unnormalized"),
            "The outputs were weighted by exp(Lₙ), which gives the numerator. Divide by the denominator of the "
            "whole: exp(Lₙ − L).",
        ),
        Misconception(
            "log-sum-exps added",
            _merge(total="sum"),
            "The new log-sum-exp is the sum of the old ones. Denominators add up, not their logarithms: log Σ exp Lₙ.",
        ),
        Misconception(
            "the largest log-sum-exp",
            _merge(total="max"),
            "The new log-sum-exp is the largest of the old ones, which leaves the other parts out of the "
            "denominator: log Σ exp Lₙ.",
        ),
        Misconception(
            "exponentials that overflow",
            _merge("overflowing"),
            "exp(Lₙ) was computed by itself, and is infinite (or 0) for large L. Subtract before you "
            "exponentiate: torch.logsumexp, then exp(Lₙ − L).",
        ),
        Misconception(
            "infinity minus infinity",
            _merge(safe=False),
            "For a query that saw nobody anywhere L is −∞, and −∞ − (−∞) is NaN. Subtract a finite number there.",
        ),
    ],
)

EXERCISES = [STEP, DEBUG, MERGE]
