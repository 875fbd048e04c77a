"""Exercises of lesson 2.5, sampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Probe
from tutorial_lib.core.sampler import repetition_penalty, top_p_filter

NEVER = float("-inf")


def _only_cuts(original: Tensor):
    """A property of (filtered, the input afterwards): numbers stay or become -inf, and the input is left alone."""

    def violated(result: tuple[Tensor, Tensor]) -> str | None:
        filtered, given = result
        if not torch.equal(given, original):
            return "it wrote into the logits that it was given: the caller still needs them"
        if filtered.shape != original.shape:
            return f"the shape is {tuple(filtered.shape)}, expected {tuple(original.shape)}"
        moved = (filtered != original) & (filtered != NEVER)
        if moved.any():
            where = tuple(moved.nonzero()[0].tolist())
            return (
                f"logit {list(where)} was {original[where]:.2f} and became {filtered[where]:.2f}: "
                "a filter leaves a logit as it is or makes it -inf"
            )
        if (filtered == NEVER).all(-1).any():
            return "a row has nothing left: at least one token must stay"
        return None

    return violated


# ── 2.5.a  top-p ─────────────────────────────────────────────────────────────────────────────────────────


def _by_hand() -> Tensor:
    return torch.tensor([0.15, 0.50, 0.05, 0.30]).log()


def _sure() -> Tensor:
    return torch.tensor([[0.01, 0.02, 0.95, 0.02], [0.97, 0.01, 0.01, 0.01]]).log()


def _tail() -> Tensor:
    return torch.tensor([-21.0, 0.0, -20.0, -40.0])


def _big() -> Tensor:
    return torch.tensor([[1000.0, 999.0, 990.0, 995.0], [-1000.0, -1001.0, -1010.0, -1003.0]])


def _filter_twice(f, x: Tensor, how: float) -> tuple[Tensor, Tensor]:
    given = x.clone()
    return f(given, how), given


def _need_p(p: float) -> None:
    if not 0 < p <= 1:
        raise ValueError("p")


def _back(logits: Tensor, index: Tensor, drop: Tensor) -> Tensor:
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), NEVER)


def the_crossing_token_is_cut(logits: Tensor, p: float) -> Tensor:
    """You drop a token when the sum including itself is above p, but the token that carries the sum over p
    belongs to the set; look at the probability before it."""
    _need_p(p)
    ordered, index = logits.sort(dim=-1, descending=True)
    return logits if p == 1 else _back(logits, index, ordered.softmax(-1).cumsum(-1) > p)


def the_mask_stays_in_sorted_order(logits: Tensor, p: float) -> Tensor:
    """The right number of tokens is cut, but the wrong ones: the mask belongs to the sorted logits, and must
    go back through the sort's indices (scatter)."""
    _need_p(p)
    ordered = logits.sort(dim=-1, descending=True).values
    probs = ordered.softmax(-1)
    return logits.masked_fill(probs.cumsum(-1) - probs >= p, NEVER)


def counted_from_the_least_likely(logits: Tensor, p: float) -> Tensor:
    """sort() puts the smallest first unless told otherwise, so the running sum began at the unlikely end and
    the best tokens were cut: sort in descending order."""
    _need_p(p)
    ordered, index = logits.sort(dim=-1)
    probs = ordered.softmax(-1)
    return _back(logits, index, probs.cumsum(-1) - probs >= p)


def probabilities_come_back(logits: Tensor, p: float) -> Tensor:
    """The kept set is right, but a filter takes logits and returns logits; the softmax comes once, at the
    end, and twice would flatten everything."""
    return top_p_filter(logits, p).softmax(-1)


def zero_instead_of_minus_infinity(logits: Tensor, p: float) -> Tensor:
    """A logit of 0 is not 'never': it has weight e^0 = 1, more than any negative logit. Never is -inf."""
    filtered = top_p_filter(logits, p)
    return filtered.masked_fill(filtered == NEVER, 0.0)


def a_running_sum_of_logits(logits: Tensor, p: float) -> Tensor:
    """Logits can be negative and do not add up to 1, so their sum means nothing: take the softmax of the
    sorted logits first."""
    _need_p(p)
    ordered, index = logits.sort(dim=-1, descending=True)
    return _back(logits, index, ordered.cumsum(-1) - ordered >= p)


def p_of_one_loses_the_tail(logits: Tensor, p: float) -> Tensor:
    """In exact arithmetic you are right. In fp32 the running sum rounds to 1 before the last tokens, and they
    are cut; p = 1 means no filter, so return early."""
    _need_p(p)
    ordered, index = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    return _back(logits, index, probs.cumsum(-1) - probs >= p)


def written_into_the_input(logits: Tensor, p: float) -> Tensor:
    """The answer is right, but the caller's logits were overwritten (a masked_fill_ or an assignment by
    index): whoever scores the token afterwards finds -inf there."""
    return logits.copy_(top_p_filter(logits, p))


TOP_P = Exercise(
    id="2.5.a",
    symbol="top_p_filter",
    reference=top_p_filter,
    look_again="Top-p",
    probes=[
        Probe("shape and dtype", lambda f: f(randn(2, 3, 7), 0.8), same_shape),
        Probe(
            "a logit stays or becomes -inf",
            lambda f: _filter_twice(f, randn(4, 9, seed=1), 0.7),
            holds(_only_cuts(randn(4, 9, seed=1))),
        ),
        Probe(
            "four tokens, by hand",
            lambda f: f(_by_hand(), 0.7),
            equals(),
            given="the logarithms of 0.15, 0.50, 0.05, 0.30; p = 0.7",
        ),
        Probe("the first token always stays", lambda f: f(_sure(), 0.1), equals(), given=_sure()),
        Probe(
            "reaching p exactly is enough",
            lambda f: int((f(torch.zeros(4), 0.5) > NEVER).sum()),
            equals(),
            given="four equal logits, p = 0.5; the answer is how many stay",
        ),
        Probe("equals the reference", lambda f: f(randn(3, 5, 40, seed=2) * 2, 0.85), equals()),
        Probe("logits of 1000 do no harm", lambda f: f(_big(), 0.8), equals(), given=_big()),
        Probe("p = 1 keeps everything", lambda f: f(_tail(), 1.0), equals(), given=_tail()),
        Probe(
            "refuses what is no probability",
            lambda f: [outcome(lambda p=p: f(randn(1, 4), p) is None) for p in (0.0, -0.2, 1.2)],
            equals(),
            given="p = 0, -0.2 and 1.2",
        ),
    ],
    misconceptions=[
        the_crossing_token_is_cut,
        the_mask_stays_in_sorted_order,
        counted_from_the_least_likely,
        probabilities_come_back,
        zero_instead_of_minus_infinity,
        a_running_sum_of_logits,
        p_of_one_loses_the_tail,
        written_into_the_input,
    ],
)


# ── 2.5.b  the repetition penalty ────────────────────────────────────────────────────────────────────────


def _hand_logits() -> Tensor:
    return torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def _mixed() -> tuple[Tensor, Tensor]:
    logits = torch.tensor([[1.5, -0.5, 0.4, -2.0, 0.8], [-1.0, 2.0, -0.3, 0.6, 1.0]])
    return logits, torch.tensor([[0, 1, 1], [4, 4, 2]])


def _penalize_twice(f, penalty: float) -> tuple[Tensor, Tensor]:
    logits, previous = _mixed()
    return f(logits, previous, penalty), logits


def _goes_down(result: tuple[Tensor, Tensor]) -> str | None:
    penalized, given = result
    logits, previous = _mixed()
    if not torch.equal(given, logits):
        return "it wrote into the logits that it was given: the caller still needs them"
    for row, seen in enumerate(previous.tolist()):
        for token in range(logits.shape[1]):
            before, after = float(logits[row, token]), float(penalized[row, token])
            if token not in seen and abs(after - before) > 1e-6:
                return (
                    f"token {token} of row {row} was never written there, yet its logit went from {before:.2f} "
                    f"to {after:.2f}"
                )
            if token in seen and not after < before:
                return (
                    f"token {token} of row {row} was written, and its logit went from {before:.2f} up to "
                    f"{after:.2f}"
                )
    return None


def _need_penalty(penalty: float) -> None:
    if penalty <= 0:
        raise ValueError("penalty")


def divides_negative_logits_too(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """-1 divided by 2 is -0.5, which is more: a token with a negative logit is rewarded for having been
    written. Multiply the negative ones."""
    _need_penalty(penalty)
    return logits.scatter(-1, previous, logits.gather(-1, previous) / penalty)


def multiplies_positive_logits_too(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """Multiplying pushes negative logits down, but 2 · 2 = 4: every token with a positive logit is rewarded.
    Divide the positive ones."""
    _need_penalty(penalty)
    return logits.scatter(-1, previous, logits.gather(-1, previous) * penalty)


def once_for_each_time_it_was_written(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """The sign is right now, but the loop goes over the written tokens, so e is punished once for every e in
    the text: start from the original logits each time."""
    for t in range(previous.shape[1]):
        logits = repetition_penalty(logits, previous[:, t : t + 1], penalty)
    return logits


def divides_every_logit_once_for_each_time(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """Both bugs are still there: follow by hand a written token whose logit is negative, and one that was
    written three times."""
    for t in range(previous.shape[1]):
        logits = divides_negative_logits_too(logits, previous[:, t : t + 1], penalty)
    return logits


def subtracts_the_penalty(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """Subtracting is another method (the presence penalty of some services); this one divides positive logits
    and multiplies negative ones, and 1 changes nothing."""
    _need_penalty(penalty)
    return logits.scatter(-1, previous, logits.gather(-1, previous) - penalty)


def works_on_probabilities(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """You divided the probabilities and went back with a logarithm; that moves every logit and is a
    subtraction of log(penalty). The rule acts on the logits themselves."""
    _need_penalty(penalty)
    probs = logits.softmax(-1)
    return probs.scatter(-1, previous, probs.gather(-1, previous) / penalty).log()


def the_text_of_one_row_for_all(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """Each row was penalized for what any row has written; the rows of a batch are separate texts, so use
    gather and scatter along the last dimension."""
    return repetition_penalty(logits, previous.reshape(1, -1).expand(len(logits), -1), penalty)


def the_input_is_overwritten(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """The numbers are right, but the caller's logits were overwritten: work on a copy (scatter without the
    underscore makes one)."""
    return logits.copy_(repetition_penalty(logits, previous, penalty))


def _random_text(seed: int) -> Tensor:
    return torch.randint(20, (4, 30), generator=torch.Generator().manual_seed(seed))


PENALTY = Exercise(
    id="2.5.b",
    symbol="repetition_penalty",
    reference=repetition_penalty,
    look_again="The repetition penalty",
    probes=[
        Probe("shape and dtype", lambda f: f(randn(2, 6), torch.tensor([[0, 1], [2, 2]]), 1.3), same_shape),
        Probe(
            "what was written goes down, the rest stays",
            lambda f: _penalize_twice(f, 1.5),
            holds(_goes_down),
            given="logits of either sign, penalty 1.5",
        ),
        Probe(
            "four tokens, by hand",
            lambda f: f(_hand_logits(), torch.tensor([[0, 3]]), 2.0),
            equals(),
            given="logits 2, 1, 0, -1; tokens 0 and 3 were written; penalty 2",
        ),
        Probe(
            "written three times, penalized once",
            lambda f: f(_hand_logits(), torch.tensor([[0, 3, 0, 0, 3]]), 2.0),
            equals(),
            given="logits 2, 1, 0, -1; tokens 0, 3, 0, 0, 3 were written; penalty 2",
        ),
        Probe("equals the reference", lambda f: f(randn(4, 20, seed=3), _random_text(4), 1.2), equals()),
        Probe(
            "1 changes nothing, below 1 rewards",
            lambda f: [f(randn(4, 20, seed=5), _random_text(6), penalty) for penalty in (1.0, 0.5)],
            equals(),
            given="penalty 1 and 0.5",
        ),
        Probe(
            "refuses 0 and less",
            lambda f: [
                outcome(lambda p=p: f(_hand_logits(), torch.tensor([[0]]), p) is None) for p in (0.0, -1.0)
            ],
            equals(),
            given="penalty 0 and -1",
        ),
    ],
    misconceptions=[
        divides_every_logit_once_for_each_time,
        divides_negative_logits_too,
        multiplies_positive_logits_too,
        once_for_each_time_it_was_written,
        subtracts_the_penalty,
        works_on_probabilities,
        the_text_of_one_row_for_all,
        the_input_is_overwritten,
    ],
    equivalent_mutants={
        "`seen > 0` became `seen >= 0`": "a logit of exactly 0 is 0 divided and 0 multiplied",
        "`-1` became `1`": "logits are (B, V): dimension 1 is the last",
    },
)


# ── 2.5.c  min-p ─────────────────────────────────────────────────────────────────────────────────────────


def _min_p(logits: Tensor, min_p: float) -> Tensor:
    _need_p(min_p)
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), NEVER)


def an_absolute_threshold(logits: Tensor, min_p: float) -> Tensor:
    """You cut below min_p itself. The threshold is a share of the best token's probability; where nothing is
    above min_p, an absolute one would cut every token."""
    _need_p(min_p)
    return logits.masked_fill(logits.softmax(-1) < min_p, NEVER)


def a_share_of_the_largest_logit(logits: Tensor, min_p: float) -> Tensor:
    """min_p is a share of the largest probability. Logits have no zero that means anything, and a share of a
    negative logit is a larger one; in logits, the share becomes an added log(min_p)."""
    _need_p(min_p)
    return logits.masked_fill(logits < min_p * logits.amax(-1, keepdim=True), NEVER)


def one_maximum_for_the_whole_batch(logits: Tensor, min_p: float) -> Tensor:
    """Every row was measured by the surest row's best token: take the maximum along the last dimension and
    keep that dimension."""
    _need_p(min_p)
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < min_p * probs.max(), NEVER)


def returns_probabilities(logits: Tensor, min_p: float) -> Tensor:
    """The kept set is right, but a filter takes logits and returns logits; the softmax comes once, at the
    end."""
    return _min_p(logits, min_p).softmax(-1)


def zero_for_the_unlikely(logits: Tensor, min_p: float) -> Tensor:
    """A logit of 0 is not 'never': it has weight e^0 = 1. Never is -inf."""
    filtered = _min_p(logits, min_p)
    return filtered.masked_fill(filtered == NEVER, 0.0)


def top_p_with_one_minus_min_p(logits: Tensor, min_p: float) -> Tensor:
    """That is top-p by another name: it adds probabilities up. min-p compares each token with the best one
    and adds nothing."""
    _need_p(min_p)
    return top_p_filter(logits, max(1 - min_p, 1e-6))


def exp_overflows(logits: Tensor, min_p: float) -> Tensor:
    """The ratio is right, but exp(1000) is infinite and infinity is not below infinity, so nothing is cut.
    Subtract the maximum first, use softmax, or stay in logits."""
    _need_p(min_p)
    weight = logits.exp()
    return logits.masked_fill(weight < min_p * weight.amax(-1, keepdim=True), NEVER)


def _two_rows() -> Tensor:
    return torch.tensor([[0.90, 0.06, 0.03, 0.01], [0.20, 0.28, 0.26, 0.26]]).log()


MIN_P = Exercise(
    id="2.5.c",
    symbol="min_p_filter",
    reference=_min_p,
    look_again="Top-p",
    probes=[
        Probe("shape and dtype", lambda f: f(randn(2, 3, 7), 0.1), same_shape),
        Probe(
            "a logit stays or becomes -inf",
            lambda f: _filter_twice(f, randn(4, 9, seed=1), 0.25),
            holds(_only_cuts(randn(4, 9, seed=1))),
        ),
        Probe(
            "four tokens, by hand",
            lambda f: f(_by_hand(), 0.2),
            equals(),
            given="the logarithms of 0.15, 0.50, 0.05, 0.30; min_p = 0.2",
        ),
        Probe(
            "each row by its own best token",
            lambda f: f(_two_rows(), 0.1),
            equals(),
            given="a sure row and an open row, min_p = 0.1",
        ),
        Probe("equals the reference", lambda f: f(randn(3, 5, 40, seed=2) * 2, 0.05), equals()),
        Probe("min_p = 1 keeps the best alone", lambda f: f(randn(2, 3, 6, seed=7), 1.0), equals()),
        Probe("logits of 1000 do no harm", lambda f: f(_big(), 0.1), equals(), given=_big()),
        Probe(
            "refuses what is no share",
            lambda f: [outcome(lambda p=p: f(randn(1, 4), p) is None) for p in (0.0, -0.2, 1.2)],
            equals(),
            given="min_p = 0, -0.2 and 1.2",
        ),
    ],
    misconceptions=[
        an_absolute_threshold,
        a_share_of_the_largest_logit,
        one_maximum_for_the_whole_batch,
        returns_probabilities,
        zero_for_the_unlikely,
        top_p_with_one_minus_min_p,
        exp_overflows,
    ],
    equivalent_mutants={
        "`0 < min_p <= 1` became `0 <= min_p <= 1`": "math.log(0) is a ValueError, too",
    },
)

EXERCISES = [TOP_P, PENALTY, MIN_P]
