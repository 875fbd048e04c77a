"""Exercises of lesson 5.1, routing and load balancing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_lib.checks.probes import equals, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Probe

# ── 5.1.a  The balancing loss ────────────────────────────────────────────────────────────────────────────


def _shares(experts: Tensor, n_experts: int) -> Tensor:
    load = F.one_hot(experts, n_experts).sum(dim=(0, 1))
    return load / load.sum()


def balancing_loss(logits: Tensor, experts: Tensor) -> Tensor:
    """The reference."""
    E = logits.shape[-1]
    return E * (_shares(experts, E) * logits.softmax(-1).mean(0)).sum()


def without_the_number_of_experts(logits: Tensor, experts: Tensor) -> Tensor:
    """The factor E is missing: at an even load the loss should be 1, whatever the number of experts, and is 1/E."""
    return balancing_loss(logits, experts) / logits.shape[-1]


def f_sums_to_the_number_of_choices(logits: Tensor, experts: Tensor) -> Tensor:
    """Your f is divided by the tokens, and a token has K choices, so it sums to K and so does the loss at an even load.
    Divide by all choices."""
    return balancing_loss(logits, experts) * experts.shape[1]


def the_count_is_not_a_share(logits: Tensor, experts: Tensor) -> Tensor:
    """f is a count here, so the loss grows with the batch. Divide it by the number of all choices."""
    return balancing_loss(logits, experts) * experts.numel()


def a_sum_over_tokens(logits: Tensor, experts: Tensor) -> Tensor:
    """P is summed over the tokens and not averaged, so the loss grows with the batch."""
    return balancing_loss(logits, experts) * logits.shape[0]


def only_the_chosen_have_a_probability(logits: Tensor, experts: Tensor) -> Tensor:
    """P is made of the chosen experts' probabilities alone. It needs the full softmax of every token: what was not chosen
    could have been."""
    E = logits.shape[-1]
    p = logits.softmax(-1)
    chosen = torch.zeros_like(p).scatter(1, experts, 1.0)
    return E * (_shares(experts, E) * (p * chosen).mean(0)).sum()


def renormalized_over_the_chosen(logits: Tensor, experts: Tensor) -> Tensor:
    """P is made of the weights, the softmax over the chosen scores. With one expert for each token they are all 1, and the
    loss has no gradient: take the softmax over all experts."""
    E = logits.shape[-1]
    weights = logits.gather(1, experts).softmax(-1)
    P = torch.zeros_like(logits).scatter(1, experts, weights).mean(0)
    return E * (_shares(experts, E) * P).sum()


def p_is_detached(logits: Tensor, experts: Tensor) -> Tensor:
    """The value is right, but P was detached, so nothing is pushed anywhere. f is the one without a gradient."""
    return balancing_loss(logits.detach(), experts) + 0 * logits.sum()


def a_softmax_over_the_tokens(logits: Tensor, experts: Tensor) -> Tensor:
    """The softmax goes over the tokens (dim=0). Each token's probabilities over the experts must sum to 1: dim=-1."""
    E = logits.shape[-1]
    return E * (_shares(experts, E) * logits.softmax(0).mean(0)).sum()


def the_scores_themselves(logits: Tensor, experts: Tensor) -> Tensor:
    """P is the mean of the scores; it should be the mean of their softmax."""
    E = logits.shape[-1]
    return E * (_shares(experts, E) * logits.mean(0)).sum()


def _case(n: int = 12, E: int = 5, k: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    logits = randn(n, E, seed=seed)
    return logits, logits.topk(k).indices


def _loss_and_gradient(f: Any, *case: Any) -> tuple[Tensor, Tensor]:
    logits, experts = case
    leaf = logits.clone().requires_grad_()
    loss = f(leaf, experts)
    loss.backward()
    return loss.detach(), torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _two_tokens() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.tensor([[0], [0]])


BALANCE = Exercise(
    id="5.1.a",
    symbol="balancing_loss",
    equivalent_mutants={
        "`-1` became `1`": "of a matrix, the last dimension is dimension 1",
    },
    reference=balancing_loss,
    look_again="The auxiliary loss",
    probes=[
        Probe("one number", lambda f: f(*_case()), same_shape, given="12 tokens, 5 experts, 2 choices each"),
        Probe(
            "two tokens, by hand",
            lambda f: f(*_two_tokens()),
            equals(),
            given="p = (¾, ¼) and (½, ½), both choose expert 0: f = (1, 0), P = (⅝, ⅜)",
        ),
        Probe(
            "1 at an even load, whatever K",
            lambda f: tuple(
                f(torch.zeros(4, 4), torch.stack([(torch.arange(4) + i) % 4 for i in range(k)], dim=1))
                for k in (1, 2, 3)
            ),
            equals(),
            given="four experts, four tokens that like all of them alike; K = 1, 2, 3",
        ),
        Probe("equals the reference, K = 1", lambda f: f(*_case(k=1)), equals()),
        Probe("equals the reference, K = 3", lambda f: f(*_case(20, 7, 3, seed=1)), equals()),
        Probe(
            "an expert that nobody chose",
            lambda f: f(randn(6, 8, seed=3), torch.zeros(6, 1, dtype=torch.long)),
            equals(),
        ),
        Probe("its gradient", lambda f: _loss_and_gradient(f, *_case(9, 4, 1, seed=2)), equals(1e-6)),
    ],
    misconceptions=[
        without_the_number_of_experts,
        f_sums_to_the_number_of_choices,
        the_count_is_not_a_share,
        a_sum_over_tokens,
        only_the_chosen_have_a_probability,
        renormalized_over_the_chosen,
        p_is_detached,
        a_softmax_over_the_tokens,
        the_scores_themselves,
    ],
)


# ── 5.1.b  A router that learns nothing ──────────────────────────────────────────────────────────────────


def _probabilities(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() @ weight.float().T).softmax(-1)


def route(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The reference."""
    weights, experts = _probabilities(x, weight).topk(k)
    return experts, weights / weights.sum(-1, keepdim=True) if k > 1 else weights


def as_it_was_given(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Nothing is mended yet: with k = 1 the weight is the softmax over one score, which is 1 and has no gradient."""
    best, experts = (x @ weight.T).float().topk(k)
    return experts, best.softmax(-1)


def the_only_weight_is_always_one(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """With k = 1 the weight is 1 for every token, and has no gradient: a softmax over one score is 1, and so is a
    probability divided by itself. Take the softmax over all experts, and divide only if k > 1."""
    best, experts = (x.float() @ weight.float().T).topk(k)
    return experts, best.softmax(-1)


def never_divided_by_their_sum(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The weights of two experts should sum to 1: for k > 1 divide by their sum."""
    weights, experts = _probabilities(x, weight).topk(k)
    return experts, weights


def rounded_before_it_was_widened(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The softmax is in fp32, but the product of tokens and matrix is still in the tokens' type: widen both before they
    meet."""
    weights, experts = (x @ weight.T).float().softmax(-1).topk(k)
    return experts, weights / weights.sum(-1, keepdim=True) if k > 1 else weights


def a_sigmoid_for_each(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each expert has a sigmoid of its own. That has a gradient (DeepSeek-V3 does it), but it is not the softmax that was
    asked for."""
    weights, experts = (x.float() @ weight.float().T).sigmoid().topk(k)
    return experts, weights / weights.sum(-1, keepdim=True) if k > 1 else weights


def the_weights_are_detached(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The numbers are right, but the weights carry no gradient: the choice needs none, the weights do."""
    experts, weights = route(x, weight, k)
    return experts, weights.detach()


def _tokens(n: int = 16, D: int = 6, E: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(n, D, seed=seed), randn(E, D, seed=seed + 100)


def _router_gradient(f: Any, k: int) -> Tensor:
    x, weight = _tokens(seed=4)
    weight = weight.clone().requires_grad_()
    _, weights = f(x, weight, k)
    if not weights.requires_grad:
        return torch.zeros_like(weight)
    (weights * randn(*weights.shape, seed=5)).sum().backward()
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _in_bf16(f: Any) -> tuple[Tensor, Tensor]:
    x, weight = _tokens(64, 32, 6, seed=7)
    return f(x.bfloat16(), weight.bfloat16(), 2)


ROUTE = Exercise(
    id="5.1.b",
    symbol="route",
    equivalent_mutants={
        "`-1` became `1`": "of a matrix, the last dimension is dimension 1",
        "`probs.topk(k, dim=-1)` became `probs.topk(k)`": "the last dimension is the default",
    },
    reference=route,
    look_again="A router is a linear layer and a top-k",
    probes=[
        Probe("shapes and types", lambda f: f(*_tokens(), 2), same_shape),
        Probe("weights, k = 2", lambda f: f(*_tokens(), 2), equals()),
        Probe("tokens in bf16 are scored in fp32", _in_bf16, equals(1e-6)),
        Probe(
            "two tokens, by hand, k = 1",
            lambda f: f(torch.eye(2), torch.tensor([[3.0, 0.0], [1.0, 0.0]]).log().nan_to_num(neginf=0.0), 1),
            equals(),
            given="scores log 3 and log 1, so p = (¾, ¼), for the first token",
        ),
        Probe("weights, k = 1", lambda f: f(*_tokens(seed=1), 1), equals()),
        Probe("the router's gradient, k = 1", lambda f: _router_gradient(f, 1), equals(1e-6)),
        Probe("the router's gradient, k = 2", lambda f: _router_gradient(f, 2), equals(1e-6)),
    ],
    misconceptions=[
        as_it_was_given,
        the_only_weight_is_always_one,
        never_divided_by_their_sum,
        rounded_before_it_was_widened,
        a_sigmoid_for_each,
        the_weights_are_detached,
    ],
)


# ── 5.1.c  Padding in the load ───────────────────────────────────────────────────────────────────────────


def _count(experts: Tensor, E: int, real: Tensor) -> Tensor:
    return (F.one_hot(experts, E) * real[:, None, None]).sum(dim=(0, 1))


def _loss(load: Tensor, P: Tensor) -> Tensor:
    return P.shape[0] * (load / load.sum().clamp(min=1) * P).sum()


def load_and_loss(probs: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The reference."""
    load = _count(experts, probs.shape[-1], real)
    return load, _loss(load, (probs * real[:, None]).sum(0) / real.sum().clamp(min=1))


def nothing_is_mended(probs: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The load still counts the padding, and P is still divided by all tokens."""
    load = _count(experts, probs.shape[-1], torch.ones_like(real))
    return load, _loss(load, (probs * real[:, None]).mean(0))


def only_the_load_is_mended(probs: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The load is right. P is a sum over the real tokens, divided by *all* tokens: divide by the real ones."""
    load = _count(experts, probs.shape[-1], real)
    return load, _loss(load, (probs * real[:, None]).mean(0))


def only_the_probabilities_are_mended(probs: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """P is right, but the padding's choices are still counted in the load."""
    load = _count(experts, probs.shape[-1], torch.ones_like(real))
    return load, _loss(load, (probs * real[:, None]).sum(0) / real.sum().clamp(min=1))


def the_mask_is_not_looked_at(probs: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """`real` is not used at all: this is the load and the loss of padding and text together."""
    load = _count(experts, probs.shape[-1], torch.ones_like(real))
    return load, _loss(load, probs.mean(0))


def the_padding_alone(probs: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The mask is upside down: `real` is True where a token counts."""
    return load_and_loss(probs, experts, ~real)


def no_guard_against_nothing(probs: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of padding alone divides by zero, and one NaN spoils the whole model: `clamp(min=1)` what you divide by."""
    load = _count(experts, probs.shape[-1], real)
    P = (probs * real[:, None]).sum(0) / real.sum()
    return load, P.shape[0] * (load / load.sum() * P).sum()


def a_choice_for_each_token_only(probs: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Only the first choice of each token is counted in the load."""
    return load_and_loss(probs, experts[:, :1], real)


def _padded(
    n: int = 10, E: int = 4, k: int = 2, n_real: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    probs = randn(n, E, seed=seed).softmax(-1)
    real = torch.arange(n) < n_real
    probs = torch.where(real[:, None], probs, torch.tensor([0.97, *[0.03 / (E - 1)] * (E - 1)]))
    return probs, probs.topk(k).indices, real


def _padding_gradient(f: Any) -> Tensor:
    probs, experts, real = _padded(seed=3)
    leaf = probs.clone().requires_grad_()
    f(leaf, experts, real)[1].backward()
    return leaf.grad


PADDING = Exercise(
    id="5.1.c",
    symbol="load_and_loss",
    equivalent_mutants={
        "`-1` became `1`": "of a matrix, the last dimension is dimension 1",
    },
    reference=load_and_loss,
    look_again="What goes wrong",
    probes=[
        Probe("shapes", lambda f: f(*_padded()), same_shape),
        Probe(
            "one real token, by hand",
            lambda f: f(
                torch.tensor([[0.75, 0.25], [0.5, 0.5]]),
                torch.tensor([[0], [1]]),
                torch.tensor([True, False]),
            ),
            equals(),
            given="p = (¾, ¼) is real and chooses 0; (½, ½) is padding and chooses 1: load (1, 0), loss 2 · ¾",
        ),
        Probe("all tokens are real", lambda f: f(*_padded(n_real=10)), equals()),
        Probe("the load of the real tokens", lambda f: f(*_padded())[0], equals()),
        Probe("the loss of the real tokens", lambda f: f(*_padded(seed=1))[1], equals()),
        Probe("as if the padding were not there", lambda f: f(*_padded(14, 4, 1, 6, seed=2)), equals()),
        Probe(
            "nothing is real",
            lambda f: f(*_padded(n_real=0)),
            equals(),
            given="six tokens of padding: loss 0",
        ),
        Probe("its gradient: none at the padding", _padding_gradient, equals(1e-6)),
    ],
    misconceptions=[
        nothing_is_mended,
        only_the_load_is_mended,
        only_the_probabilities_are_mended,
        the_mask_is_not_looked_at,
        the_padding_alone,
        no_guard_against_nothing,
        a_choice_for_each_token_only,
    ],
)


# ── 5.1.d  A thermostat ──────────────────────────────────────────────────────────────────────────────────


class _BalanceBias:
    """The reference, in steps that the misconceptions below replace one at a time."""

    def __init__(self, n_experts: int, speed: float) -> None:
        self.bias, self.speed = torch.zeros(n_experts), speed

    def favour(self, probs: Tensor) -> Tensor:
        return probs.detach() + self.bias

    def weigh(self, probs: Tensor, experts: Tensor) -> Tensor:
        weights = probs.gather(-1, experts)
        return weights / weights.sum(-1, keepdim=True)

    def choose(self, probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
        experts = self.favour(probs).topk(k).indices
        return experts, self.weigh(probs, experts)

    def push(self, load: Tensor) -> Tensor:
        return (load.mean() - load).sign()

    def step(self, load: Tensor) -> None:
        self.bias = self.bias + self.speed * self.push(load.float())


class TheBiasIsInTheWeights(_BalanceBias):
    """The weights are taken from p + b. The bias says who works; what the output is multiplied by are the probabilities
    without it."""

    def weigh(self, probs: Tensor, experts: Tensor) -> Tensor:
        return super().weigh(probs + self.bias, experts)


class TheBiasIsNotUsed(_BalanceBias):
    """The bias is turned, but nobody looks at it when the experts are chosen: top-k of p + b."""

    def favour(self, probs: Tensor) -> Tensor:
        return probs


class WeightsThatAreNotDivided(_BalanceBias):
    """The weights are the probabilities as they are; they should be divided by their sum."""

    def weigh(self, probs: Tensor, experts: Tensor) -> Tensor:
        return probs.gather(-1, experts)


class TheBusyAreFavoured(_BalanceBias):
    """The sign is the wrong way round: an expert with more than the mean gets a larger bias, and even more to do."""

    def push(self, load: Tensor) -> Tensor:
        return -super().push(load)


class InProportionToTheError(_BalanceBias):
    """The bias is moved by mean − load itself: one uneven batch throws it far. Only the sign counts."""

    def push(self, load: Tensor) -> Tensor:
        return load.mean() - load


class ComparedWithTheMedian(_BalanceBias):
    """You compare with the median of the loads; the mean is what an even load would be."""

    def push(self, load: Tensor) -> Tensor:
        return (load.median() - load).sign()


class ComparedWithOneOverE(_BalanceBias):
    """You compare counts with 1/E, which is a share: nearly every load is above it. Compare with their mean."""

    def push(self, load: Tensor) -> Tensor:
        return (1 / load.numel() - load).sign()


class TheBiasBeginsAnew(_BalanceBias):
    """Each step overwrites the bias. It has to add up over many steps."""

    def step(self, load: Tensor) -> None:
        self.bias = self.speed * self.push(load.float())


class TheSpeedIsForgotten(_BalanceBias):
    """The bias moves by 1 at each step, and not by the speed: probabilities are smaller than that."""

    def step(self, load: Tensor) -> None:
        self.bias = self.bias + self.push(load.float())


def _turned(cls: Any, *loads: list[int], speed: float = 0.1) -> Any:
    made = cls(len(loads[0]), speed)
    for load in loads:
        made.step(torch.tensor(load))
    return made


def _weights_gradient(cls: Any) -> Tensor:
    leaf = randn(7, 3, seed=6).softmax(-1).requires_grad_()
    _, weights = _turned(cls, [5, 1, 0]).choose(leaf, 2)
    (weights * randn(7, 2, seed=8)).sum().backward()
    return leaf.grad


THERMOSTAT = Exercise(
    id="5.1.d",
    symbol="BalanceBias",
    equivalent_mutants={
        "`-1` became `1`": "of a matrix, the last dimension is dimension 1",
        "`(probs.detach() + self.bias).topk(k, dim=-1)` became `(probs.detach() + self.bias).topk(k)`": "the last dimension is "
        "the default",
        "`probs.detach()` became `probs`": "indices carry no gradient",
    },
    reference=_BalanceBias,
    look_again="The way without a loss",
    probes=[
        Probe("shapes", lambda cls: cls(4, 0.1).choose(randn(6, 4).softmax(-1), 2), same_shape),
        Probe(
            "before any step it chooses the likeliest",
            lambda cls: cls(4, 0.1).choose(randn(6, 4).softmax(-1), 2),
            equals(),
        ),
        Probe(
            "one step, by hand",
            lambda cls: _turned(cls, [6, 3, 3, 0]).bias,
            equals(),
            given="loads 6, 3, 3, 0, mean 3, speed 0.1",
        ),
        Probe(
            "steps add up",
            lambda cls: _turned(cls, [9, 2, 1, 0], [0, 4, 4, 4], [5, 5, 1, 1], speed=0.25).bias,
            equals(),
        ),
        Probe("the mean, of uneven loads", lambda cls: _turned(cls, [10, 2, 2, 1, 1]).bias, equals()),
        Probe(
            "the bias changes the choice",
            lambda cls: _turned(cls, [4, 0], [4, 0]).choose(torch.tensor([[0.6, 0.4], [0.9, 0.1]]), 1)[0],
            equals(),
            given="p = (0.6, 0.4) and (0.9, 0.1), bias (-0.2, 0.2)",
        ),
        Probe(
            "and not the weights",
            lambda cls: _turned(cls, [9, 0, 0], [9, 0, 0]).choose(randn(8, 3, seed=1).softmax(-1), 2),
            equals(),
        ),
        Probe("the weights have a gradient", _weights_gradient, equals(1e-6)),
    ],
    misconceptions=[
        TheBiasIsInTheWeights,
        TheBiasIsNotUsed,
        WeightsThatAreNotDivided,
        TheBusyAreFavoured,
        InProportionToTheError,
        ComparedWithTheMedian,
        ComparedWithOneOverE,
        TheBiasBeginsAnew,
        TheSpeedIsForgotten,
    ],
)


# ── 5.1.e  The z-loss ────────────────────────────────────────────────────────────────────────────────────


def z_loss(logits: Tensor) -> Tensor:
    """The reference."""
    return logits.logsumexp(-1).square().mean()


def exponentials_that_overflow(logits: Tensor) -> Tensor:
    """The formula is right, but exp of a score above 88 is infinite in fp32: `logsumexp` does it without."""
    return logits.exp().sum(-1).log().square().mean()


def not_squared(logits: Tensor) -> Tensor:
    """The square is missing: without it the loss goes down for ever as the scores do."""
    return logits.logsumexp(-1).mean()


def the_square_of_the_mean(logits: Tensor) -> Tensor:
    """You square the mean over the tokens. Tokens of opposite signs cancel each other there: square each, then average."""
    return logits.logsumexp(-1).mean().square()


def the_squares_of_the_scores(logits: Tensor) -> Tensor:
    """This is the mean of the squared scores. The loss is about the logarithm of the sum of their exponentials."""
    return logits.square().mean()


def over_the_tokens(logits: Tensor) -> Tensor:
    """The sum goes over the tokens (dim=0) and not over the experts."""
    return logits.logsumexp(0).square().mean()


def a_sum_and_no_mean(logits: Tensor) -> Tensor:
    """The loss is summed over the tokens, so it grows with the batch: take the mean."""
    return logits.logsumexp(-1).square().sum()


Z = Exercise(
    id="5.1.e",
    symbol="z_loss",
    equivalent_mutants={
        "`-1` became `1`": "of a matrix, the last dimension is dimension 1",
    },
    reference=z_loss,
    look_again="The z-loss, which is for something else",
    probes=[
        Probe("one number", lambda f: f(randn(5, 4)), same_shape),
        Probe(
            "two tokens, by hand",
            lambda f: f(torch.tensor([[1.0, 1.0], [0.0, 0.0]]) - torch.tensor(2.0).log()),
            equals(),
            given="the exponentials sum to e and to 1: (1² + 0²) / 2",
        ),
        Probe("equals the reference", lambda f: f(3 * randn(20, 6, seed=1)), equals()),
        Probe("scores of a thousand", lambda f: f(1000 + randn(4, 3, seed=2)), equals(1.0)),
        Probe("scores of minus a thousand", lambda f: f(-1000 + randn(4, 3, seed=2)), equals(1.0)),
    ],
    misconceptions=[
        exponentials_that_overflow,
        not_squared,
        the_square_of_the_mean,
        the_squares_of_the_scores,
        over_the_tokens,
        a_sum_and_no_mean,
    ],
)

EXERCISES = [BALANCE, ROUTE, PADDING, THERMOSTAT, Z]
