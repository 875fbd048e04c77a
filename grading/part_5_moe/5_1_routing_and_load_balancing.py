"""Exercises of lesson 5.1, routing and load balancing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_lib.checks.probes import equals, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Probe

# ── 5.1.a  The balancing loss ────────────────────────────────────────────────────────────────────────────


def _load(experts: Tensor, E: int) -> Tensor:
    return experts.flatten().bincount(minlength=E).float()


def balancing_loss(logits: Tensor, K: int) -> Tensor:
    """The reference."""
    E = logits.shape[1]
    load = _load(logits.topk(K).indices, E)
    return E * (load / load.sum() * logits.softmax(-1).mean(0)).sum()


def f_sums_to_k(logits: Tensor, K: int) -> Tensor:
    """Your f is counts by tokens, so it sums to K, as in transformers. Divide by all N·K choices."""
    return K * balancing_loss(logits, K)


def without_e(logits: Tensor, K: int) -> Tensor:
    """The factor E is missing: at evenness the loss is then 1/E, and its strength depends on how many experts
    there are."""
    return balancing_loss(logits, K) / logits.shape[1]


def p_from_the_chosen_only(logits: Tensor, K: int) -> Tensor:
    """P leaves out the probabilities of experts that were not chosen. It is the mean of the full softmax."""
    N, E = logits.shape
    probs = logits.softmax(-1)
    best = logits.topk(K).indices
    P = torch.zeros_like(probs).scatter(1, best, probs.gather(1, best)).mean(0)
    return E * (_load(best, E) / (N * K) * P).sum()


def p_without_a_gradient(logits: Tensor, K: int) -> Tensor:
    """The number is right, but P was detached, so nothing has a gradient. Only f is a constant."""
    return balancing_loss(logits.detach(), K)


def probabilities_in_place_of_counts(logits: Tensor, K: int) -> Tensor:
    """You used P twice, E · Σ P². f is a count: how often each expert was chosen."""
    P = logits.softmax(-1).mean(0)
    return logits.shape[1] * (P * P).sum()


def softmax_over_the_tokens(logits: Tensor, K: int) -> Tensor:
    """The softmax goes over the tokens. Each token divides itself among the experts: the last dimension."""
    N, E = logits.shape
    return E * (_load(logits.topk(K).indices, E) / (N * K) * logits.softmax(0).mean(0)).sum()


def only_the_first_choice_is_counted(logits: Tensor, K: int) -> Tensor:
    """You counted each token's best expert alone. All K choices are work, and all are counted."""
    return balancing_loss_of(logits, logits.topk(1).indices)


def balancing_loss_of(logits: Tensor, experts: Tensor) -> Tensor:
    """E · Σ f·P for choices that are already made."""
    E = logits.shape[1]
    load = _load(experts, E)
    return E * (load / load.sum() * logits.softmax(-1).mean(0)).sum()


def _gradient(f: Any, K: int) -> tuple[bool, Tensor]:
    logits = randn(9, 5, seed=4).requires_grad_()
    loss = f(logits, K)
    if not loss.requires_grad:
        return False, torch.zeros(9, 5)
    loss.backward()
    return True, torch.zeros(9, 5) if logits.grad is None else logits.grad


BALANCE = Exercise(
    id="5.1.a",
    symbol="balancing_loss",
    reference=balancing_loss,
    look_again="A loss that asks for evenness",
    probes=[
        Probe("one number", lambda f: f(randn(6, 4), 2), same_shape, given="scores (6, 4), K = 2"),
        Probe(
            "even and sure is 1",
            lambda f: f(20 * torch.eye(4), 1),
            equals(),
            given="four tokens, each sure of an expert of its own",
        ),
        Probe(
            "all to one is E",
            lambda f: f(20 * torch.eye(4)[:1].repeat(5, 1), 1),
            equals(),
            given="five tokens, all sure of expert 0 of 4",
        ),
        Probe("equals the reference, top-1", lambda f: f(randn(30, 6, seed=1), 1), equals()),
        Probe(
            "equals the reference, top-2 and top-3",
            lambda f: (f(randn(30, 6), 2), f(randn(7, 5), 3)),
            equals(),
        ),
        Probe("the gradient of the scores", lambda f: (_gradient(f, 1), _gradient(f, 2)), equals()),
    ],
    misconceptions=[
        f_sums_to_k,
        without_e,
        p_from_the_chosen_only,
        p_without_a_gradient,
        probabilities_in_place_of_counts,
        softmax_over_the_tokens,
        only_the_first_choice_is_counted,
    ],
)


# ── 5.1.b  The router that does not learn ────────────────────────────────────────────────────────────────

Routed = tuple[Tensor, Tensor]


def route(x: Tensor, weight: Tensor, K: int) -> Routed:
    """The reference."""
    weights, experts = (x @ weight.T).softmax(-1).topk(K)
    return experts, weights / weights.sum(-1, keepdim=True) if K > 1 else weights


def as_it_was_given(x: Tensor, weight: Tensor, K: int) -> Routed:
    """Both bugs are still there: the scores are taken under no_grad, and with K = 1 the softmax of one score
    is 1."""
    with torch.no_grad():
        scores, experts = (x @ weight.T).topk(K)
    return experts, scores.softmax(-1)


def only_no_grad_is_gone(x: Tensor, weight: Tensor, K: int) -> Routed:
    """The gradient may flow now, but with K = 1 the weight is the softmax of one score: always 1, and its
    slope 0. Take the softmax before the choice."""
    scores, experts = (x @ weight.T).topk(K)
    return experts, scores.softmax(-1)


def divided_by_themselves(x: Tensor, weight: Tensor, K: int) -> Routed:
    """A single weight divided by its sum is 1 again, and has no slope. Renormalise only where K > 1."""
    weights, experts = (x @ weight.T).softmax(-1).topk(K)
    return experts, weights / weights.sum(-1, keepdim=True)


def never_renormalised(x: Tensor, weight: Tensor, K: int) -> Routed:
    """The weights are the bare probabilities. For K > 1 they should be divided by their sum."""
    weights, experts = (x @ weight.T).softmax(-1).topk(K)
    return experts, weights


def still_under_no_grad(x: Tensor, weight: Tensor, K: int) -> Routed:
    """The numbers are right, but they are computed where autograd does not look. Only the choice may be."""
    with torch.no_grad():
        return route(x, weight, K)


def the_sum_is_detached(x: Tensor, weight: Tensor, K: int) -> Routed:
    """The numbers are right, but the sum that you divide by is detached: a router can then raise all its
    weights at once, and its gradient is another one."""
    weights, experts = (x @ weight.T).softmax(-1).topk(K)
    return experts, weights / weights.sum(-1, keepdim=True).detach() if K > 1 else weights


def _slope(f: Any, K: int) -> tuple[bool, Tensor]:
    weight = randn(5, 4, seed=2).requires_grad_()
    _, weights = f(randn(7, 4, seed=3), weight, K)
    if not weights.requires_grad:
        return False, torch.zeros(5, 4)
    (weights * randn(7, K, seed=5)).sum().backward()
    return True, weight.grad


ROUTE = Exercise(
    id="5.1.b",
    symbol="route",
    reference=route,
    look_again="Softmax before or after",
    probes=[
        Probe(
            "shapes", lambda f: f(randn(6, 4), randn(5, 4, seed=1), 2), same_shape, given="x (6, 4), K = 2"
        ),
        Probe(
            "one token by hand, top-1",
            lambda f: f(torch.tensor([[1.0]]), torch.tensor([[2.0], [1.0], [0.0]]), 1),
            equals(),
            given="scores 2, 1, 0",
        ),
        Probe(
            "one token by hand, top-2",
            lambda f: f(torch.tensor([[1.0]]), torch.tensor([[2.0], [1.0], [0.0]]), 2),
            equals(),
            given="scores 2, 1, 0",
        ),
        Probe(
            "equals the reference",
            lambda f: tuple(f(randn(20, 4), randn(6, 4, seed=1), K) for K in (1, 2, 3)),
            equals(),
        ),
        Probe("the router learns, top-1", lambda f: _slope(f, 1), equals()),
        Probe("the router learns, top-2", lambda f: _slope(f, 2), equals()),
    ],
    misconceptions=[
        as_it_was_given,
        only_no_grad_is_gone,
        divided_by_themselves,
        never_renormalised,
        still_under_no_grad,
        the_sum_is_detached,
    ],
)


# ── 5.1.c  Padding in the load ───────────────────────────────────────────────────────────────────────────


def _from(f: Tensor, P: Tensor) -> Tensor:
    return len(f) * (f / f.sum() * P).sum()


def masked_balancing_loss(probs: Tensor, experts: Tensor, real: Tensor) -> Tensor:
    """The reference."""
    return _from(_load(experts[real], probs.shape[1]), probs[real].mean(0))


def padding_is_still_in_both(probs: Tensor, experts: Tensor, real: Tensor) -> Tensor:
    """As it was given: padding is in the load, and in the number that P is divided by."""
    return _from(_load(experts, probs.shape[1]), (probs * real[:, None]).mean(0))


def only_the_load_is_mended(probs: Tensor, experts: Tensor, real: Tensor) -> Tensor:
    """The load is right, but P is a sum over real tokens divided by all of them. It should sum to 1."""
    return _from(_load(experts[real], probs.shape[1]), (probs * real[:, None]).mean(0))


def only_the_probabilities_are_mended(probs: Tensor, experts: Tensor, real: Tensor) -> Tensor:
    """P is right, but the load still counts where padding was sent."""
    return _from(_load(experts, probs.shape[1]), probs[real].mean(0))


def padding_sent_to_expert_zero(probs: Tensor, experts: Tensor, real: Tensor) -> Tensor:
    """Multiplying the choices by the mask does not remove them: it makes them choices of expert 0."""
    return _from(_load(experts * real[:, None], probs.shape[1]), probs[real].mean(0))


def the_mask_the_other_way_round(probs: Tensor, experts: Tensor, real: Tensor) -> Tensor:
    """You kept the padding and left the tokens out: `real` is True where a token counts."""
    return masked_balancing_loss(probs, experts, ~real)


def _masked(pad: int, seed: int = 0, K: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Ten real tokens, and `pad` others whose content follows from `seed`."""
    logits = torch.cat([randn(10, 4), 2 * randn(pad, 4, seed=9 + seed)])
    probs = logits.softmax(-1)
    return probs, probs.topk(K).indices, torch.arange(10 + pad) < 10


def _in_the_middle() -> tuple[Tensor, Tensor, Tensor]:
    probs, experts, real = _masked(6)
    order = torch.tensor([0, 12, 3, 4, 15, 1, 2, 10, 5, 11, 6, 7, 13, 8, 14, 9])
    return probs[order], experts[order], real[order]


def _masked_gradient(f: Any) -> Tensor:
    probs, experts, real = _masked(5)
    probs.requires_grad_()
    f(probs, experts, real).backward()
    return probs.grad


def _even() -> tuple[Tensor, Tensor, Tensor]:
    who = torch.tensor([0, 1, 2, 3, 3, 3])
    return torch.eye(4)[who], who[:, None], torch.arange(6) < 4


PADDING = Exercise(
    id="5.1.c",
    symbol="masked_balancing_loss",
    reference=masked_balancing_loss,
    look_again="What goes wrong",
    probes=[
        Probe("one number", lambda f: f(*_masked(3)), same_shape),
        Probe(
            "by hand",
            lambda f: f(*_even()),
            equals(),
            given="experts 0, 1, 2, 3, and two of padding at 3: the loss is 1",
        ),
        Probe("no padding", lambda f: f(*_masked(0)), equals()),
        Probe("equals the reference", lambda f: (f(*_masked(5)), f(*_masked(8, K=1))), equals()),
        Probe(
            "other padding, the same loss",
            lambda f: (f(*_masked(5)), f(*_masked(5, seed=1)), f(*_masked(20, seed=2))),
            equals(),
            given="5 of padding, 5 others, and 20",
        ),
        Probe("padding in the middle", lambda f: f(*_in_the_middle()), equals()),
        Probe("the gradient of the probabilities", _masked_gradient, equals()),
    ],
    misconceptions=[
        padding_is_still_in_both,
        only_the_load_is_mended,
        only_the_probabilities_are_mended,
        padding_sent_to_expert_zero,
        the_mask_the_other_way_round,
    ],
)


# ── 5.1.d  The step of the bias ──────────────────────────────────────────────────────────────────────────


def step_bias(bias: Tensor, pieces: list[Tensor], speed: float) -> Tensor:
    """The reference."""
    load = _load(torch.cat([piece.flatten() for piece in pieces]), len(bias))
    return bias + speed * (load.mean() - load).sign()


def the_busy_are_favoured(bias: Tensor, pieces: list[Tensor], speed: float) -> Tensor:
    """The sign is the wrong way round: experts above the mean load go up, and get more."""
    return bias - (step_bias(bias, pieces, speed) - bias)


def in_proportion_to_the_load(bias: Tensor, pieces: list[Tensor], speed: float) -> Tensor:
    """The step is as large as the difference of the loads. Only its sign counts: each expert moves by speed, or
    not at all."""
    load = _load(torch.cat([piece.flatten() for piece in pieces]), len(bias))
    return bias + speed * (load.mean() - load)


def a_step_for_each_piece(bias: Tensor, pieces: list[Tensor], speed: float) -> Tensor:
    """You took a step for each piece. Counts of the pieces are added up, and then there is one step."""
    for piece in pieces:
        bias = step_bias(bias, [piece], speed)
    return bias


def only_the_last_piece(bias: Tensor, pieces: list[Tensor], speed: float) -> Tensor:
    """Only the last piece was counted. The load is that of the whole batch."""
    return step_bias(bias, pieces[-1:], speed)


def the_mean_without_the_idle(bias: Tensor, pieces: list[Tensor], speed: float) -> Tensor:
    """Your mean leaves out experts without a token. They belong to it: they are the ones to be helped."""
    load = _load(torch.cat([piece.flatten() for piece in pieces]), len(bias))
    return bias + speed * (load[load > 0].mean() - load).sign()


def only_upwards(bias: Tensor, pieces: list[Tensor], speed: float) -> Tensor:
    """The idle go up, but the busy stay. Experts above the mean go down by the same step."""
    return bias + (step_bias(bias, pieces, speed) - bias).clamp(min=0)


def the_bias_is_not_carried_on(bias: Tensor, pieces: list[Tensor], speed: float) -> Tensor:
    """You return the step alone. It is added to the bias that was there."""
    return step_bias(bias, pieces, speed) - bias


def changed_in_place(bias: Tensor, pieces: list[Tensor], speed: float) -> Tensor:
    """The result is right, but the bias that was handed in has changed too. Return a new tensor."""
    return bias.copy_(step_bias(bias, pieces, speed))


def _choices() -> list[Tensor]:
    return [torch.tensor([[0, 1], [0, 1], [0, 2]]), torch.tensor([[1, 2], [4, 1]])]


def _step(f: Any) -> tuple[Tensor, Tensor]:
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0, 0.0])
    return f(bias, _choices(), 0.1), bias


BIAS = Exercise(
    id="5.1.d",
    symbol="step_bias",
    reference=step_bias,
    look_again="A bias in place of a loss",
    probes=[
        Probe("shape and dtype", lambda f: f(torch.zeros(5), _choices(), 0.1), same_shape),
        Probe(
            "by hand, one piece",
            lambda f: f(torch.zeros(4), [torch.tensor([[0, 1], [1, 2], [1, 0]])], 0.5),
            equals(),
            given="loads 2, 3, 1, 0: their mean is 1.5",
        ),
        Probe(
            "exactly at the mean nobody moves",
            lambda f: f(torch.zeros(3), [torch.tensor([[0, 0], [1, 1], [2, 2]])[:, :1]], 0.5),
            equals(),
            given="loads 1, 1, 1",
        ),
        Probe(
            "two pieces, one step",
            lambda f: f(torch.zeros(5), _choices(), 0.1),
            equals(),
            given="loads 3, 4, 2, 0, 1: their mean is 2",
        ),
        Probe(
            "added to what was there, which stays",
            _step,
            equals(),
            given="value 1 is the result, value 2 the bias handed in",
        ),
    ],
    misconceptions=[
        the_busy_are_favoured,
        in_proportion_to_the_load,
        a_step_for_each_piece,
        only_the_last_piece,
        the_mean_without_the_idle,
        only_upwards,
        the_bias_is_not_carried_on,
        changed_in_place,
    ],
)


# ── 5.1.e  Noise before the choice ───────────────────────────────────────────────────────────────────────


def _gates(h: Tensor, K: int) -> Tensor:
    best, experts = h.topk(K)
    return torch.full_like(h, float("-inf")).scatter(-1, experts, best).softmax(-1)


def noisy_gates(x: Tensor, gate: Tensor, size: Tensor, noise: Tensor, K: int, training: bool) -> Tensor:
    """The reference."""
    h = x @ gate.T
    return _gates(h + noise * F.softplus(x @ size.T) if training else h, K)


def noise_when_it_is_not_training(
    x: Tensor, gate: Tensor, size: Tensor, noise: Tensor, K: int, training: bool
) -> Tensor:
    """There is noise when the model does not train, too: the same text then gives another answer each time."""
    return noisy_gates(x, gate, size, noise, K, True)


def noise_of_one_size(x: Tensor, gate: Tensor, size: Tensor, noise: Tensor, K: int, training: bool) -> Tensor:
    """All noise has size 1. Its size is softplus of the second linear layer, token by token."""
    return _gates(x @ gate.T + noise * training, K)


def a_size_that_may_be_negative(
    x: Tensor, gate: Tensor, size: Tensor, noise: Tensor, K: int, training: bool
) -> Tensor:
    """softplus is missing around the noise's size."""
    return _gates(x @ gate.T + noise * (x @ size.T) * training, K)


def softmax_before_the_choice(
    x: Tensor, gate: Tensor, size: Tensor, noise: Tensor, K: int, training: bool
) -> Tensor:
    """The weights of the chosen do not sum to 1: here the softmax is taken of the K chosen alone."""
    h = x @ gate.T + (noise * F.softplus(x @ size.T) if training else 0)
    return h.softmax(-1) * (_gates(h, K) > 0)


def zero_in_place_of_minus_infinity(
    x: Tensor, gate: Tensor, size: Tensor, noise: Tensor, K: int, training: bool
) -> Tensor:
    """The others were set to 0 before the softmax, and exp(0) is 1. Set them to minus infinity."""
    h = x @ gate.T + (noise * F.softplus(x @ size.T) if training else 0)
    return (h * (_gates(h, K) > 0)).softmax(-1)


def weights_without_the_noise(
    x: Tensor, gate: Tensor, size: Tensor, noise: Tensor, K: int, training: bool
) -> Tensor:
    """The noise decides who is chosen, but the weights come from the scores without it. They are of h too, or the
    size of the noise would learn nothing."""
    clean = x @ gate.T
    chosen = noisy_gates(x, gate, size, noise, K, training) > 0
    return clean.masked_fill(~chosen, float("-inf")).softmax(-1)


def _noisy(f: Any, K: int = 2, training: bool = True, N: int = 12) -> Tensor:
    return f(randn(N, 4), randn(6, 4, seed=1), randn(6, 4, seed=2), randn(N, 6, seed=3), K, training)


def _by_hand(f: Any, training: bool) -> Tensor:
    gate, size = torch.tensor([[2.0], [1.0], [0.0]]), torch.tensor([[0.0], [0.0], [0.0]])
    return f(torch.tensor([[1.0]]), gate, size, torch.tensor([[0.0, 0.0, 4.0]]), 2, training)


def _noise_slope(f: Any) -> tuple[Tensor, Tensor]:
    gate, size = randn(6, 4, seed=1).requires_grad_(), randn(6, 4, seed=2).requires_grad_()
    (f(randn(12, 4), gate, size, randn(12, 6, seed=3), 2, True) * randn(12, 6, seed=4)).sum().backward()
    return tuple(torch.zeros(6, 4) if w.grad is None else w.grad for w in (gate, size))


NOISE = Exercise(
    id="5.1.e",
    symbol="noisy_gates",
    reference=noisy_gates,
    look_again="Where to go next",
    probes=[
        Probe("shape", lambda f: _noisy(f), same_shape),
        Probe(
            "by hand, without noise", lambda f: _by_hand(f, False), equals(), given="scores 2, 1, 0, K = 2"
        ),
        Probe(
            "by hand, with noise",
            lambda f: _by_hand(f, True),
            equals(),
            given="scores 2, 1, 0; noise 0, 0, 4, each of size softplus(0) = 0.69",
        ),
        Probe("equals the reference", lambda f: (_noisy(f), _noisy(f, 3), _noisy(f, 1)), equals()),
        Probe("equals the reference, not training", lambda f: _noisy(f, training=False), equals()),
        Probe("gradients of both weights", _noise_slope, equals()),
    ],
    misconceptions=[
        noise_when_it_is_not_training,
        noise_of_one_size,
        a_size_that_may_be_negative,
        softmax_before_the_choice,
        zero_in_place_of_minus_infinity,
        weights_without_the_noise,
    ],
)

EXERCISES = [BALANCE, ROUTE, PADDING, BIAS, NOISE]
