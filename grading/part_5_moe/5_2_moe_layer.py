"""Exercises of lesson 5.2, the MoE layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_lib.checks.probes import equals, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Probe

# ── 5.2.a  Dispatch and combine ──────────────────────────────────────────────────────────────────────────


def _said(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What every expert says to every token, `(N, E, D)`: nobody would compute it."""
    return torch.einsum("nem,edm->ned", F.relu(torch.einsum("nd,emd->nem", x, up)).square(), down)


def _answers(x: Tensor, experts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    N, K = experts.shape
    return _said(x, up, down).gather(1, experts[..., None].expand(N, K, x.shape[1]))  # (N, K, D)


def moe(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The reference."""
    return (_answers(x, experts, up, down) * weights[..., None]).sum(dim=1)


def the_weights_are_forgotten(
    x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Each token gets the plain sum of its experts' answers: multiply each by the weight that the router gave it."""
    return _answers(x, experts, up, down).sum(dim=1)


def the_token_is_weighed_and_not_the_answer(
    x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """You multiply the token by the weight before the expert. An expert is not linear: weigh what it says."""
    N, K = experts.shape
    said = [moe(x * weights[:, k, None], experts[:, k, None], torch.ones(N, 1), up, down) for k in range(K)]
    return torch.stack(said).sum(dim=0)


def one_answer_is_kept(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A token's answers were written to its place and not added there, so the one of the last expert is what is left."""
    last = experts.argmax(dim=1, keepdim=True)
    return moe(x, experts.gather(1, last), weights.gather(1, last), up, down)


def _sorted(experts: Tensor) -> Tensor:
    return experts.flatten().argsort(stable=True)


def sent_out_and_never_fetched_home(
    x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """The rows are still sorted by expert when they are added up: undo the order first, or add each to its own token."""
    rows = _answers(x, experts, up, down).flatten(0, 1)[_sorted(experts)]
    return (rows.view(*experts.shape, -1) * weights[..., None]).sum(dim=1)


def the_order_once_more(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """You apply the sorting order a second time. What undoes a permutation is its inverse, and the two are often equal for
    a handful of tokens."""
    order = _sorted(experts)
    rows = _answers(x, experts, up, down).flatten(0, 1)[order][order]
    return (rows.view(*experts.shape, -1) * weights[..., None]).sum(dim=1)


def weights_in_the_other_order(
    x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """The rows were in the experts' order when you weighed them, and the weights in the tokens': one of the two has to be
    moved."""
    order = _sorted(experts)
    rows = _answers(x, experts, up, down).flatten(0, 1)[order] * weights.flatten()[:, None]
    return torch.zeros_like(x).index_add(0, order // experts.shape[1], rows)


def rows_of_the_wrong_tokens(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The token of choice r is r // K. Yours is r % N: with K = 1 the same, otherwise somebody else's."""
    N, K = experts.shape
    token = torch.arange(N * K) % max(N, 1)
    rows = _answers(x[token], experts.reshape(-1, 1), up, down).view(N, K, x.shape[1])
    return (rows * weights[..., None]).sum(dim=1)


def only_the_first_choice(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Only the first of each token's K experts works on it."""
    return moe(x, experts[:, :1], weights[:, :1], up, down)


def relu_without_the_square(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The activation is relu(h)², and yours is relu(h)."""
    hidden = F.relu(torch.einsum("nd,emd->nem", x, up))
    said = torch.einsum("nem,edm->ned", hidden, down)
    N, K = experts.shape
    return (said.gather(1, experts[..., None].expand(N, K, x.shape[1])) * weights[..., None]).sum(dim=1)


def _case(N: int = 24, D: int = 6, M: int = 5, E: int = 4, K: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    weights, experts = randn(N, E, seed=seed).softmax(-1).topk(K)
    stacks = randn(E, M, D, seed=seed + 1), randn(E, D, M, seed=seed + 2)
    return randn(N, D, seed=seed + 3), experts, weights, *stacks


def _by_hand() -> tuple[Tensor, ...]:
    """Experts that scale by 1, by 2 and by 3, squared: one channel."""
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    experts = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.75, 0.25], [0.5, 0.5]])
    return x, experts, weights, torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), torch.ones(3, 1, 1)


def _gradients(f: Any) -> tuple[Tensor, ...]:
    x, experts, weights, up, down = _case(seed=9)
    leaves = [part.clone().requires_grad_() for part in (x, weights, up, down)]
    y = f(leaves[0], experts, *leaves[1:])
    (y * randn(*y.shape, seed=4)).sum().backward()
    return tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)


def _one_sided(f: Any) -> Tensor:
    x, _, weights, up, down = _case(seed=5)
    return f(x, torch.tensor([[3, 1]]).expand(len(x), 2), weights, up, down)


MOE = Exercise(
    id="5.2.a",
    symbol="moe",
    equivalent_mutants={
        "`experts.flatten().argsort(stable=True)` became `experts.flatten().argsort()`": "which of two rows of one expert "
        "comes first makes no difference",
        "`True` became `False`": "which of two rows of one expert comes first makes no difference",
    },
    reference=moe,
    look_again="Sort, multiply, put back",
    probes=[
        Probe("shape", lambda f: f(*_case()), same_shape, given="24 tokens, 4 experts, 2 choices"),
        Probe(
            "four tokens, by hand",
            lambda f: f(*_by_hand()),
            equals(),
            given="x = 1, 2, 3, 4; experts that give (1·x)², (2·x)², (3·x)²; the lesson's choices and weights",
        ),
        Probe("one expert for each token", lambda f: f(*_case(K=1, seed=1)), equals(1e-4)),
        Probe("equals a loop over tokens", lambda f: f(*_case(seed=2)), equals(1e-4)),
        Probe("more experts than tokens", lambda f: f(*_case(3, E=9, K=3, seed=3)), equals(1e-4)),
        Probe("experts without tokens", _one_sided, equals(1e-4), given="all tokens choose experts 3 and 1"),
        Probe("no tokens", lambda f: f(*_case(0)), equals(), given="a batch of none"),
        Probe("its gradients", _gradients, equals(1e-3), given="at tokens, weights and both stacks"),
    ],
    misconceptions=[
        the_weights_are_forgotten,
        the_token_is_weighed_and_not_the_answer,
        one_answer_is_kept,
        sent_out_and_never_fetched_home,
        the_order_once_more,
        weights_in_the_other_order,
        rows_of_the_wrong_tokens,
        only_the_first_choice,
        relu_without_the_square,
    ],
)


# ── 5.2.b  Answers that do not come home ─────────────────────────────────────────────────────────────────


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The reference."""
    N, K = weights.shape
    weighted = rows.float() * weights.flatten()[order, None].float()
    return torch.zeros(N, rows.shape[1]).index_add(0, order // K, weighted).to(rows.dtype)


def _written(rows: Tensor, token: Tensor, N: int) -> Tensor:
    """The last row of each token, as an assignment leaves it."""
    y = torch.zeros(N, rows.shape[1], dtype=rows.dtype)
    for row, n in zip(rows, token.tolist(), strict=True):
        y[n] = row
    return y


def as_it_was_given(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """All three mistakes are still there. Begin with the weights: the rows are sorted by expert, the weights are not."""
    N, K = weights.shape
    return _written(rows * weights.flatten()[:, None].to(rows.dtype), order // K, N)


def weights_that_were_not_sorted(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The answers are added now, but each is multiplied by the weight that stands at its place in the *tokens'* order."""
    N, K = weights.shape
    weighted = rows.float() * weights.flatten()[:, None].float()
    return torch.zeros(N, rows.shape[1]).index_add(0, order // K, weighted).to(rows.dtype)


def written_and_not_added(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The weights are right. But `y[index] = …` keeps one of the answers that go to the same token: add them."""
    N, K = weights.shape
    weighted = rows.float() * weights.flatten()[order, None].float()
    return _written(weighted, order // K, N).to(rows.dtype)


def added_up_in_few_bits(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The right sum in the wrong type: in bf16 each product and each addition rounds. Widen first, and narrow once at the
    end."""
    N, K = weights.shape
    weighted = rows * weights.flatten()[order, None].to(rows.dtype)
    return torch.zeros(N, rows.shape[1], dtype=rows.dtype).index_add(0, order // K, weighted)


def left_in_fp32(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The sum is right and wide, and stays wide: give it back in the type of the rows."""
    N, K = weights.shape
    weighted = rows.float() * weights.flatten()[order, None].float()
    return torch.zeros(N, rows.shape[1]).index_add(0, order // K, weighted)


def the_tokens_by_remainder(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Choice r belongs to token r // K, and not to r % N."""
    N, K = weights.shape
    weighted = rows.float() * weights.flatten()[order, None].float()
    return torch.zeros(N, rows.shape[1]).index_add(0, order % max(N, 1), weighted).to(rows.dtype)


def weights_sorted_the_other_way(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The weights went through the order that undoes the sorting. They are to follow the rows: `weights.flatten()[order]`."""
    N, K = weights.shape
    weighted = rows.float() * weights.flatten()[order.argsort(), None].float()
    return torch.zeros(N, rows.shape[1]).index_add(0, order // K, weighted).to(rows.dtype)


def the_order_once_more(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """You fetch the rows home with the order that sent them out. What undoes a permutation is its inverse, and the two are
    often equal for a handful of tokens."""
    home = rows.float()[order].unflatten(0, weights.shape)
    return (home * weights[..., None].float()).sum(dim=1).to(rows.dtype)


def a_mean_over_the_experts(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The weighted answers are averaged over K. The weights have done that already: add them up."""
    return combine(rows, order, weights / weights.shape[1])


def _rows(N: int = 20, K: int = 2, E: int = 4, D: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    weights, experts = randn(N, E, seed=seed).softmax(-1).topk(K)
    return randn(N * K, D, seed=seed + 1), _sorted(experts), weights / weights.sum(-1, keepdim=True)


def _in_bf16() -> tuple[Tensor, Tensor, Tensor]:
    rows, order, weights = _rows(64, 4, 8, seed=6)
    return rows.bfloat16(), order, weights


COMBINE = Exercise(
    id="5.2.b",
    symbol="combine",
    reference=combine,
    look_again="Lost, overwritten, exchanged",
    probes=[
        Probe(
            "shape and type",
            lambda f: (f(*_rows()), f(*_in_bf16())),
            same_shape,
            given="rows in fp32, rows in bf16",
        ),
        Probe(
            "three tokens, by hand",
            lambda f: f(
                torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0]]),
                torch.tensor([3, 0, 4, 1, 5, 2]),
                torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]),
            ),
            equals(),
            given="rows 10 to 60 answer choices 3, 0, 4, 1, 5, 2; token 0 has choices 0 and 1: ½ · 20 + ½ · 40",
        ),
        Probe("one expert for each token", lambda f: f(*_rows(K=1, seed=3)), equals()),
        Probe("equals the sum, token by token", lambda f: f(*_rows(seed=1)), equals()),
        Probe("eight experts for each token", lambda f: f(*_rows(12, 8, 10, seed=2)), equals()),
        Probe("rows in bf16: rounded once", lambda f: f(*_in_bf16()).float(), equals(1e-6)),
        Probe(
            "no tokens",
            lambda f: f(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), torch.zeros(0, 2)),
            equals(),
        ),
    ],
    misconceptions=[
        as_it_was_given,
        weights_that_were_not_sorted,
        written_and_not_added,
        added_up_in_few_bits,
        left_in_fp32,
        the_tokens_by_remainder,
        weights_sorted_the_other_way,
        the_order_once_more,
        a_mean_over_the_experts,
    ],
)


# ── 5.2.c  Whose weights, and one for everybody ──────────────────────────────────────────────────────────


def _weights(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    weights, experts = logits.softmax(-1).topk(k)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), experts


def _sum(weights: Tensor, experts: Tensor, said: Tensor) -> Tensor:
    chosen = said.gather(1, experts[..., None].expand(*experts.shape, said.shape[-1]))
    return (weights[..., None] * chosen).sum(dim=1)


def mix(
    logits: Tensor, said: Tensor, shared: Tensor | None, k: int, renormalize: bool = True, scale: float = 1.0
) -> Tensor:
    """The reference."""
    y = scale * _sum(*_weights(logits, k, renormalize), said)
    return y if shared is None else y + shared


def always_renormalized(
    logits: Tensor, said: Tensor, shared: Tensor | None, k: int, renormalize: bool = True, scale: float = 1.0
) -> Tensor:
    """`renormalize` is not looked at: with False the weights are the probabilities as they are."""
    return mix(logits, said, shared, k, True, scale)


def never_renormalized(
    logits: Tensor, said: Tensor, shared: Tensor | None, k: int, renormalize: bool = True, scale: float = 1.0
) -> Tensor:
    """`renormalize` is not looked at: with True the weights are divided by their sum."""
    return mix(logits, said, shared, k, False, scale)


def the_scale_is_forgotten(
    logits: Tensor, said: Tensor, shared: Tensor | None, k: int, renormalize: bool = True, scale: float = 1.0
) -> Tensor:
    """`scale` multiplies what the routed experts say, and yours is always 1."""
    return mix(logits, said, shared, k, renormalize)


def the_scale_is_divided_away(
    logits: Tensor, said: Tensor, shared: Tensor | None, k: int, renormalize: bool = True, scale: float = 1.0
) -> Tensor:
    """You scale the probabilities and then divide by their sum, which takes the scale out again: scale last."""
    return mix(logits, said, shared, k, renormalize, 1.0 if renormalize else scale)


def the_shared_one_is_scaled_too(
    logits: Tensor, said: Tensor, shared: Tensor | None, k: int, renormalize: bool = True, scale: float = 1.0
) -> Tensor:
    """The scale is for the routed experts. The shared one's answer has weight 1."""
    return mix(logits, said, None if shared is None else scale * shared, k, renormalize, scale)


def the_shared_one_is_left_out(
    logits: Tensor, said: Tensor, shared: Tensor | None, k: int, renormalize: bool = True, scale: float = 1.0
) -> Tensor:
    """The shared expert's answer is never added."""
    return mix(logits, said, None, k, renormalize, scale)


def everybody_answers(
    logits: Tensor, said: Tensor, shared: Tensor | None, k: int, renormalize: bool = True, scale: float = 1.0
) -> Tensor:
    """All experts are weighed in, and not the k likeliest alone."""
    return mix(logits, said, shared, logits.shape[1], renormalize, scale)


def the_first_experts_and_not_the_chosen(
    logits: Tensor, said: Tensor, shared: Tensor | None, k: int, renormalize: bool = True, scale: float = 1.0
) -> Tensor:
    """The weights are right, but they meet the answers of experts 0 to k − 1: pick the answers of the chosen ones."""
    weights, _ = _weights(logits, k, renormalize)
    y = scale * (weights[..., None] * said[:, :k]).sum(dim=1)
    return y if shared is None else y + shared


def _mixed(seed: int = 0, k: int = 2, **how: Any) -> dict[str, Any]:
    given = {
        "logits": randn(9, 5, seed=seed),
        "said": randn(9, 5, 3, seed=seed + 1),
        "shared": randn(9, 3, seed=seed + 2),
    }
    return {**given, "k": k, **how}


def _mix_gradient(f: Any) -> Tensor:
    given = _mixed(7, renormalize=False, scale=2.0)
    given["logits"] = given["logits"].clone().requires_grad_()
    f(**given).square().sum().backward()
    return given["logits"].grad


MIX = Exercise(
    id="5.2.c",
    symbol="mix",
    reference=mix,
    look_again="Whose word counts how much",
    probes=[
        Probe("shape", lambda f: f(**_mixed()), same_shape),
        Probe(
            "one token, by hand",
            lambda f: f(
                torch.tensor([[0.5, 0.25, 0.25]]).log(),
                torch.tensor([[[8.0], [4.0], [4.0]]]),
                torch.tensor([[100.0]]),
                1,
                False,
            ),
            equals(),
            given="p = (½, ¼, ¼), the first is chosen and says 8, the shared one says 100: ½ · 8 + 100",
        ),
        Probe("renormalized", lambda f: f(**_mixed(1, shared=None)), equals()),
        Probe("plain", lambda f: f(**_mixed(2, shared=None, renormalize=False)), equals()),
        Probe("with a shared expert", lambda f: f(**_mixed(3)), equals()),
        Probe("scaled, renormalized", lambda f: f(**_mixed(4, scale=2.5)), equals()),
        Probe("scaled, plain", lambda f: f(**_mixed(5, 3, renormalize=False, scale=16.0)), equals(1e-4)),
        Probe("the router's gradient", _mix_gradient, equals(1e-4)),
    ],
    misconceptions=[
        always_renormalized,
        never_renormalized,
        the_scale_is_forgotten,
        the_scale_is_divided_away,
        the_shared_one_is_scaled_too,
        the_shared_one_is_left_out,
        everybody_answers,
        the_first_experts_and_not_the_chosen,
    ],
    equivalent_mutants={
        "`-1` became `1`": "of a matrix, the last dimension is dimension 1",
        "`logits.softmax(dim=-1).topk(k, dim=-1)` became `logits.softmax(dim=-1).topk(k)`": "the last dimension is the default",
    },
)


# ── 5.2.d  Experts that choose their tokens ──────────────────────────────────────────────────────────────


def _taken(p: Tensor, by: Tensor, C: int) -> Tensor:
    return p * torch.zeros_like(p).scatter(0, by.topk(C, dim=0).indices, 1.0)


def expert_choice(logits: Tensor, said: Tensor, C: int) -> Tensor:
    """The reference."""
    p = logits.softmax(-1)
    return (_taken(p, p, C)[..., None] * said).sum(dim=1)


def the_tokens_choose(logits: Tensor, said: Tensor, C: int) -> Tensor:
    """The top-C goes over the experts, so tokens choose experts as ever. Each *expert* takes C tokens: dim=0."""
    p = logits.softmax(-1)
    C = min(C, p.shape[1])
    return (p * torch.zeros_like(p).scatter(1, p.topk(C, dim=1).indices, 1.0))[..., None].mul(said).sum(dim=1)


def a_softmax_over_the_tokens(logits: Tensor, said: Tensor, C: int) -> Tensor:
    """The softmax goes over the tokens. The probabilities are a token's, over the experts; only the choice is the experts'."""
    p = logits.softmax(0)
    return (_taken(p, p, C)[..., None] * said).sum(dim=1)


def chosen_by_the_raw_scores(logits: Tensor, said: Tensor, C: int) -> Tensor:
    """The experts choose by the scores. They should choose by the probabilities: a token whose scores are all high is not
    theirs more than others."""
    return (_taken(logits.softmax(-1), logits, C)[..., None] * said).sum(dim=1)


def nobody_is_weighed(logits: Tensor, said: Tensor, C: int) -> Tensor:
    """The answers are added up as they are; each counts with the probability that the token gives this expert."""
    p = logits.softmax(-1)
    return ((_taken(p, p, C) > 0)[..., None] * said).sum(dim=1)


def weights_that_add_up_to_one(logits: Tensor, said: Tensor, C: int) -> Tensor:
    """You divide by the sum of a token's weights. Here they stay as they are, and a token that nobody took has none to
    divide by."""
    p = logits.softmax(-1)
    taken = _taken(p, p, C)
    return ((taken / taken.sum(1, keepdim=True).clamp(min=1e-9))[..., None] * said).sum(dim=1)


def everybody_takes_everything(logits: Tensor, said: Tensor, C: int) -> Tensor:
    """C is not looked at: all experts work on all tokens."""
    return (logits.softmax(-1)[..., None] * said).sum(dim=1)


def _choosing(N: int = 10, E: int = 4, C: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    return 2 * randn(N, E, seed=seed), randn(N, E, 3, seed=seed + 1), C


CHOICE = Exercise(
    id="5.2.d",
    symbol="expert_choice",
    reference=expert_choice,
    look_again="Whose word counts how much",
    probes=[
        Probe("shape", lambda f: f(*_choosing()), same_shape),
        Probe(
            "three tokens, by hand",
            lambda f: f(
                torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]).log(),
                torch.tensor([[[8.0], [80.0]]] * 3),
                1,
            ),
            equals(),
            given="p = (¾, ¼), (½, ½), (¼, ¾), C = 1: the first expert takes token 0, the second token 2, nobody token 1",
        ),
        Probe("equals the reference", lambda f: f(*_choosing(seed=1)), equals()),
        Probe("every expert takes one", lambda f: f(*_choosing(7, 5, 1, seed=2)), equals()),
        Probe("every expert takes all", lambda f: f(*_choosing(6, 3, 6, seed=3)), equals()),
        Probe(
            "a token whose scores are all high",
            lambda f: f(
                _choosing(seed=4)[0] + torch.tensor([50.0, *[0.0] * 9])[:, None], *_choosing(seed=4)[1:]
            ),
            equals(),
            given="50 is added to all scores of the first token: its probabilities are the same",
        ),
    ],
    misconceptions=[
        the_tokens_choose,
        a_softmax_over_the_tokens,
        chosen_by_the_raw_scores,
        nobody_is_weighed,
        weights_that_add_up_to_one,
        everybody_takes_everything,
    ],
    equivalent_mutants={"`-1` became `1`": "of a matrix, the last dimension is dimension 1"},
)


# ── 5.2.e  What a token costs ────────────────────────────────────────────────────────────────────────────


def count(d_model: int, d_expert: int, n_experts: int, k: int, n_shared: int = 0) -> tuple[int, int]:
    """The reference."""
    each, router = 3 * d_model * d_expert, n_experts * d_model
    return router + (n_experts + n_shared) * each, router + (k + n_shared) * each


def the_router_is_forgotten(
    d_model: int, d_expert: int, n_experts: int, k: int, n_shared: int = 0
) -> tuple[int, int]:
    """The router has weights, too: one row of d_model for each routed expert, and every token meets all of them."""
    total, active = count(d_model, d_expert, n_experts, k, n_shared)
    return total - n_experts * d_model, active - n_experts * d_model


def only_the_chosen_rows_of_the_router(
    d_model: int, d_expert: int, n_experts: int, k: int, n_shared: int = 0
) -> tuple[int, int]:
    """In `active` you count k rows of the router. It scores all experts before it chooses: all rows are active."""
    total, active = count(d_model, d_expert, n_experts, k, n_shared)
    return total, active - (n_experts - k) * d_model


def two_matrices_an_expert(
    d_model: int, d_expert: int, n_experts: int, k: int, n_shared: int = 0
) -> tuple[int, int]:
    """A gated expert has three matrices: gate, up and down."""
    each, router = 2 * d_model * d_expert, n_experts * d_model
    return router + (n_experts + n_shared) * each, router + (k + n_shared) * each


def the_shared_are_not_active(
    d_model: int, d_expert: int, n_experts: int, k: int, n_shared: int = 0
) -> tuple[int, int]:
    """Every token meets the shared experts: they belong to `active`."""
    total, _ = count(d_model, d_expert, n_experts, k, n_shared)
    return total, count(d_model, d_expert, n_experts, k)[1]


def the_shared_are_routed(
    d_model: int, d_expert: int, n_experts: int, k: int, n_shared: int = 0
) -> tuple[int, int]:
    """The router has no rows for the shared experts: nobody chooses them."""
    total, active = count(d_model, d_expert, n_experts, k, n_shared)
    return total + n_shared * d_model, active + n_shared * d_model


def active_first(d_model: int, d_expert: int, n_experts: int, k: int, n_shared: int = 0) -> tuple[int, int]:
    """The two numbers are in the other order: total, then active."""
    return count(d_model, d_expert, n_experts, k, n_shared)[::-1]


COUNT = Exercise(
    id="5.2.e",
    symbol="count",
    reference=count,
    look_again="What is counted",
    probes=[
        Probe(
            "by hand",
            lambda f: f(2, 3, 4, 1),
            equals(),
            given="three matrices of 6 each, a router of 8: 8 + 4 · 18 and 8 + 18",
        ),
        Probe("no experts to choose from but one", lambda f: f(5, 7, 1, 1), equals()),
        Probe("with shared experts", lambda f: f(8, 4, 16, 4, 2), equals()),
        Probe("one shared, one routed", lambda f: f(8, 4, 7, 1, n_shared=1), equals()),
        Probe("Mixtral's layer", lambda f: f(4096, 14336, 8, 2), equals()),
    ],
    misconceptions=[
        the_router_is_forgotten,
        only_the_chosen_rows_of_the_router,
        two_matrices_an_expert,
        the_shared_are_not_active,
        the_shared_are_routed,
        active_first,
    ],
)

EXERCISES = [MOE, COMBINE, MIX, CHOICE, COUNT]
