"""Answers that attackers of the checker have tried: the wrong must not pass, and the right must not be refused.

What people often write is a misconception, with a name, in the exercise's own list. Here is the rest: what is
too odd for a name, and what is right in another way than the solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_lib.checks.grade import grade
from tutorial_lib.checks.gradings import find_exercise

Answer = Callable[..., Any]


def reference(exercise_id: str) -> Answer:
    return find_exercise(exercise_id).reference


# ── 0.4.c: the entropy of a masked softmax ────────────────────────────────────────────────────────────────


def entropy_filled_with(number: Callable[[torch.dtype], float]) -> Answer:
    def masked_entropy(logits: Tensor, mask: Tensor) -> Tensor:
        log_p = logits.masked_fill(~mask, number(logits.dtype)).log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1) * mask.any(dim=-1)

    return masked_entropy


# ── 3.2.d: NTK-aware frequencies ──────────────────────────────────────────────────────────────────────────


def frequencies(of: Callable[[int, float, float], Tensor], refused: int = 2) -> Answer:
    """The same care as the solution's around a formula for C > 2."""

    def ntk_frequencies(d_head: int, base: float, factor: float) -> Tensor:
        if d_head > 2 and d_head % refused or d_head % 2:
            raise ValueError("odd")
        return of(d_head, base, factor) if d_head > 2 else torch.ones(1)

    return ntk_frequencies


def powers(d_head: int, base: float) -> Tensor:
    return base ** (-torch.arange(0, d_head, 2) / d_head)


# ── 3.4.b: a prompt in pieces ─────────────────────────────────────────────────────────────────────────────


def pieces_hidden_by(number: float) -> Answer:
    def read_in_pieces(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
        pieces = []
        for start in range(0, q.shape[2], chunk):
            piece, end = q[:, :, start : start + chunk], start + chunk
            future = torch.ones(piece.shape[2], min(end, q.shape[2]), dtype=torch.bool).triu(start + 1)
            mask = torch.zeros(future.shape, dtype=q.dtype).masked_fill(future, number)
            pieces.append(F.scaled_dot_product_attention(piece, k[:, :, :end], v[:, :, :end], mask))
        return torch.cat(pieces, dim=2)

    return read_in_pieces


# ── 3.4.d: fewer key heads ────────────────────────────────────────────────────────────────────────────────


def pooled(
    pool: Callable[[Tensor, int, int, int], Tensor], check: Callable[[int, int], Any] | None = None
) -> Answer:
    def share_heads(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
        if check(n_heads, n_kv_heads) if check else n_heads % n_kv_heads:
            raise ValueError("unequal groups")
        return pool(weight, n_heads, n_kv_heads, weight.shape[0] // n_heads)

    return share_heads


def by_matrix(weight: Tensor, H: int, G: int, C: int) -> Tensor:
    mean = torch.kron(torch.eye(G), torch.full((1, H // G), G / H))
    return torch.kron(mean, torch.eye(C)).to(weight.dtype) @ weight


def added_up(weight: Tensor, H: int, G: int, C: int) -> Tensor:
    out = weight.new_zeros(G * C, *weight.shape[1:])
    for head, rows in enumerate(weight.split(C)):
        group = head // (H // G)
        out[group * C : (group + 1) * C] += rows / (H // G)
    return out


def by_index(weight: Tensor, H: int, G: int, C: int) -> Tensor:
    groups = torch.arange(H) // (H // G)
    sums = weight.new_zeros(G, C, *weight.shape[1:]).index_add(0, groups, weight.unflatten(0, (H, C)))
    return sums.div(H // G).flatten(0, 1)


# ── 3.6: a ring, and a stream ─────────────────────────────────────────────────────────────────────────────


def zeroes_its_chunk(keys: Tensor, held: Tensor, k: Tensor, start: int, window: int, sinks: int) -> Any:
    seen = reference("3.6.a")(keys, held, k, start, window, sinks)
    k.zero_()
    return seen


def keys_detached(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    return reference("3.6.c")(q, k.detach(), v, window, sinks)


# ── 4.3.a: parameters in groups ───────────────────────────────────────────────────────────────────────────


def freezes(model: torch.nn.Module, *numbers: float) -> list[dict]:
    groups = reference("4.3.a")(model, *numbers)
    for p in groups[2]["params"]:
        p.requires_grad = False
    return groups


def spares_no_vector(model: torch.nn.Module, lr: float, matrix_lr: float, weight_decay: float) -> list[dict]:
    """Asks for requires_grad, but of matrices and tables only."""
    lists: tuple[list, list, list] = ([], [], [])
    for name, p in model.named_parameters():
        if p.ndim < 2:
            lists[2].append(p)
        elif p.requires_grad:
            lists[0 if p.ndim == 2 and name.startswith("blocks.") else 1].append(p)
    groups = reference("4.3.a")(model, lr, matrix_lr, weight_decay)
    return [{**group, "params": params} for group, params in zip(groups, lists, strict=True)]


RIGHT: dict[str, dict[str, Answer]] = {
    "0.4.c": {
        "filled with −1e9": entropy_filled_with(lambda dtype: -1e9),
        "filled with finfo.min": entropy_filled_with(lambda dtype: torch.finfo(dtype).min),
    },
    "3.2.d": {
        "a slowdown for each hand": frequencies(
            lambda C, b, s: powers(C, b) * s ** (-torch.arange(C // 2) / (C // 2 - 1))
        ),
        "evenly between the ends' logarithms": frequencies(
            lambda C, b, s: torch.linspace(0, -(C - 2) / C * math.log(b) - math.log(s), C // 2).exp()
        ),
        "a list of Python's numbers": frequencies(
            lambda C, b, s: torch.tensor([(b * s ** (C / (C - 2))) ** (-2 * i / C) for i in range(C // 2)])
        ),
        "in float64 on the way": frequencies(
            lambda C, b, s: powers(C, b * s ** (C / (C - 2))).double().float()
        ),
        "counted in hands": frequencies(
            lambda C, b, s: (b * s ** (C / 2 / (C / 2 - 1))) ** (-torch.arange(C // 2) / (C / 2))
        ),
    },
    "3.4.b": {
        "−∞ added": pieces_hidden_by(-math.inf),
        "−1e9 added": pieces_hidden_by(-1e9),
        "finfo.min added": pieces_hidden_by(torch.finfo(torch.float32).min),
    },
    "3.4.d": {
        "a matrix of means": pooled(by_matrix),
        "added up in a loop": pooled(added_up),
        "index_add": pooled(by_index),
        "chunks, stacked": pooled(
            lambda w, H, G, C: torch.cat([torch.stack(group.split(C)).mean(0) for group in w.chunk(G)])
        ),
        "unflatten, and the weight itself where nothing is to do": pooled(
            lambda w, H, G, C: w if H == G else w.unflatten(0, (G, H // G, C)).mean(1).flatten(0, 1)
        ),
    },
}

WRONG: dict[str, dict[str, Answer]] = {
    "3.2.d": {
        "the base rounded": frequencies(lambda C, b, s: powers(C, int(b * s ** (C / (C - 2))))),
        "ten channels refused": frequencies(lambda C, b, s: powers(C, b * s ** (C / (C - 2))), refused=4),
    },
    "3.4.b": {"−1e5 added": pieces_hidden_by(-1e5)},
    "3.4.d": {
        "always float32": pooled(lambda w, H, G, C: reference("3.4.d")(w.float(), H, G)),
        "only odd numbers of heads refused": pooled(
            lambda w, H, G, C: reference("3.4.d")(w, H, G), check=lambda H, G: H % 2 and G > 1
        ),
        "more groups than heads accepted": pooled(
            lambda w, H, G, C: w.unflatten(0, (-1, max(H // G, 1), C)).mean(1).flatten(0, 1),
            check=lambda H, G: G < H and H % G,
        ),
    },
    "3.6.a": {"the chunk set to zero": zeroes_its_chunk},
    "3.6.c": {
        "detached": lambda *given: reference("3.6.c")(*given).detach(),
        "under no_grad": torch.no_grad()(lambda *given: reference("3.6.c")(*given)),
        "keys detached": keys_detached,
    },
    "4.3.a": {"freezes what it sorts": freezes, "frozen vectors": spares_no_vector},
}


def each(answers: dict[str, dict[str, Answer]]) -> Any:
    cases = [(i, name, answer) for i, named in answers.items() for name, answer in named.items()]
    ids = [f"{i} {name}" for i, name, _ in cases]
    return pytest.mark.parametrize(("exercise_id", "answer"), [(i, a) for i, _, a in cases], ids=ids)


@each(RIGHT)
def test_right_in_another_way(exercise_id: str, answer: Answer):
    result = grade(find_exercise(exercise_id), answer)
    assert result.passed, repr(result)


@each(WRONG)
def test_wrong_in_an_odd_way(exercise_id: str, answer: Answer):
    result = grade(find_exercise(exercise_id), answer)
    assert result.status in ("wrong", "crashed") and result.sentence, repr(result)


def test_the_table_of_tokens_counted_besides_a_tied_head_is_named():
    exact = reference("3.7.d")

    def counts_both(config, batch, context, weight_bytes=4, cache_bytes=4):
        flops, n_bytes = exact(config, batch, context, weight_bytes, cache_bytes)
        table = config.vocab_size * config.d_model
        return flops + batch * 2 * table, n_bytes + weight_bytes * table

    result = grade(find_exercise("3.7.d"), counts_both)
    assert result.diagnosis == "a multiplication with both tables", repr(result)


def test_a_result_without_gradients_is_said_to_be_one():
    result = grade(find_exercise("3.6.c"), WRONG["3.6.c"]["detached"])
    assert "no gradient comes back" in result.sentence, repr(result)
