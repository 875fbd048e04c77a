"""Exercises of lesson 5.3, capacity, hybrids and upcycling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_lib.checks.probes import equals, fill_by_name, randn, same_parameters, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.moe.experts import Experts
from tutorial_lib.moe.layers import MoELayer
from tutorial_lib.moe.model import MoEConfig, MoETransformer
from tutorial_lib.moe.router import Router

# ── 5.3.a  Who finds room? ───────────────────────────────────────────────────────────────────────────────


def _served(choices: Tensor, order: Tensor, n_experts: int, capacity: int) -> Tensor:
    """Of choices in one row, served in this order, those that find room."""
    room, kept = [capacity] * n_experts, torch.zeros(len(choices), dtype=torch.bool)
    for i in order.tolist():
        e = int(choices[i])
        kept[i] = room[e] > 0
        room[e] -= 1
    return kept


def find_room(experts: Tensor, weights: Tensor, n_experts: int, capacity: int, by_score: bool) -> Tensor:
    """The reference."""
    N, K = experts.shape
    order = torch.arange(K * N)
    if by_score:
        order = weights.T.flatten().argsort(descending=True, stable=True)
    return _served(experts.T.flatten(), order, n_experts, capacity).view(K, N).T


def token_after_token(
    experts: Tensor, weights: Tensor, n_experts: int, capacity: int, by_score: bool
) -> Tensor:
    """You flattened (N, K) as it lies, so the second choice of token 0 is served before the first choice of token 1. First
    choices of all tokens come first: turn it to (K, N) before."""
    N, K = experts.shape
    order = torch.arange(K * N)
    if by_score:
        order = weights.flatten().argsort(descending=True, stable=True)
    return _served(experts.flatten(), order, n_experts, capacity).view(N, K)


def the_score_is_not_looked_at(
    experts: Tensor, weights: Tensor, n_experts: int, capacity: int, by_score: bool
) -> Tensor:
    """by_score changes nothing: choices are served by their position in both cases."""
    return find_room(experts, weights, n_experts, capacity, False)


def the_smallest_weight_first(
    experts: Tensor, weights: Tensor, n_experts: int, capacity: int, by_score: bool
) -> Tensor:
    """By score, you serve the smallest weights first; argsort rises unless it is told descending=True."""
    return find_room(experts, -weights, n_experts, capacity, by_score)


def tokens_by_their_best_choice(
    experts: Tensor, weights: Tensor, n_experts: int, capacity: int, by_score: bool
) -> Tensor:
    """By score, you sorted tokens by their largest weight, and all first choices still come before any second one. Asked
    for is one order of all choices: a second choice of 0.45 comes before a first one of 0.4."""
    if not by_score:
        return find_room(experts, weights, n_experts, capacity, False)
    order = weights.amax(dim=1).argsort(descending=True, stable=True)
    kept = torch.empty_like(experts, dtype=torch.bool)
    kept[order] = find_room(experts[order], weights[order], n_experts, capacity, False)
    return kept


def left_in_the_order_of_service(
    experts: Tensor, weights: Tensor, n_experts: int, capacity: int, by_score: bool
) -> Tensor:
    """By score, the answers stay in the order of service. They must go back to where the choices came from,
    as in kept[order] = ranks that fit."""
    N, K = experts.shape
    choices = experts.T.flatten()
    if by_score:
        choices = choices[weights.T.flatten().argsort(descending=True, stable=True)]
    return _served(choices, torch.arange(K * N), n_experts, capacity).view(K, N).T


def one_too_many(experts: Tensor, weights: Tensor, n_experts: int, capacity: int, by_score: bool) -> Tensor:
    """Every expert takes capacity + 1 choices. Ranks that count from 1 are kept while rank <= capacity, and ranks that
    count from 0 while rank < capacity."""
    return find_room(experts, weights, n_experts, capacity + 1, by_score)


def one_too_few(experts: Tensor, weights: Tensor, n_experts: int, capacity: int, by_score: bool) -> Tensor:
    """Every expert takes capacity - 1 choices. Ranks that count from 1 are kept while rank <= capacity."""
    return find_room(experts, weights, n_experts, capacity - 1, by_score)


def room_for_each_rank(
    experts: Tensor, weights: Tensor, n_experts: int, capacity: int, by_score: bool
) -> Tensor:
    """Each column of choices has the whole capacity for itself, so an expert gets up to K times what it has room for.
    Second choices find only what the first ones left."""
    columns = [
        find_room(experts[:, k : k + 1], weights[:, k : k + 1], n_experts, capacity, by_score)
        for k in range(experts.shape[1])
    ]
    return torch.cat(columns, dim=1)


def the_last_come_first(
    experts: Tensor, weights: Tensor, n_experts: int, capacity: int, by_score: bool
) -> Tensor:
    """By position, you keep the last choices of each expert and drop the first ones."""
    if by_score:
        return find_room(experts, weights, n_experts, capacity, True)
    N, K = experts.shape
    return _served(experts.T.flatten(), torch.arange(K * N).flip(0), n_experts, capacity).view(K, N).T


def _six_choices() -> tuple[Tensor, Tensor]:
    experts = torch.tensor([[0, 1], [0, 1], [1, 0]])
    weights = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.55, 0.45]])
    return experts, weights


def _drawn(N: int, K: int, E: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choices as a router makes them: no expert twice, the largest weight first."""
    top = (randn(N, E, seed=seed) + torch.linspace(1, 0, E)).softmax(dim=-1).topk(K)
    return top.indices, top.values


def _in_a_layer(f: Any, by_score: bool) -> Tensor:
    """What a layer of four experts puts out for 24 tokens when only what `f` keeps is heard."""
    experts, weights = _drawn(24, 2, 4, seed=5)
    stack, x = fill_by_name(Experts(4, 6, 5)), randn(24, 6, seed=6)
    said = torch.stack(
        [stack.batched(x.expand(4, 24, 6))[experts[:, k], torch.arange(24)] for k in (0, 1)], 1
    )
    kept = f(experts, weights, 4, 8, by_score)
    return (said * (weights * kept)[..., None]).sum(dim=1)


ROOM = Exercise(
    id="5.3.a",
    symbol="find_room",
    reference=find_room,
    look_again="Who is dropped?",
    probes=[
        Probe(
            "shape and dtype",
            lambda f: (f(*_drawn(5, 2, 4, 0), 4, 2, False), f(*_drawn(5, 2, 4, 0), 4, 2, True)),
            same_shape,
        ),
        Probe(
            "room for all", lambda f: f(*_drawn(9, 2, 4, 1), 4, 9, False), equals(), given="capacity 9 = N"
        ),
        Probe(
            "one expert each, by hand",
            lambda f: f(
                torch.tensor([[0], [0], [1], [0], [2], [1], [0], [1]]), torch.ones(8, 1), 4, 2, False
            ),
            equals(),
            given="the lesson's eight tokens want 0 0 1 0 2 1 0 1, capacity 2",
        ),
        Probe(
            "two experts each, by position, by hand",
            lambda f: f(*_six_choices(), 2, 2, False),
            equals(),
            given="choices (0, 1), (0, 1), (1, 0), capacity 2: first choices, then second ones",
        ),
        Probe(
            "two experts each, by score, by hand",
            lambda f: f(*_six_choices(), 2, 2, True),
            equals(),
            given="weights (0.6, 0.4), (0.9, 0.1), (0.55, 0.45), choices (0, 1), (0, 1), (1, 0), capacity 2",
        ),
        Probe(
            "equal weights, by position",
            lambda f: f(torch.tensor([[0, 1], [1, 0], [0, 1]] * 20), torch.full((60, 2), 0.5), 2, 25, True),
            equals(),
            given="all weights are 0.5: by score is then by position",
        ),
        Probe(
            "equals the reference, by position",
            lambda f: tuple(f(*_drawn(40, K, 8, seed=K), 8, 6, False) for K in (1, 2, 3)),
            equals(),
        ),
        Probe(
            "equals the reference, by score",
            lambda f: tuple(f(*_drawn(40, K, 8, seed=K), 8, 6, True) for K in (1, 2, 3)),
            equals(),
        ),
        Probe(
            "a layer that hears only these", lambda f: (_in_a_layer(f, False), _in_a_layer(f, True)), equals()
        ),
    ],
    misconceptions=[
        token_after_token,
        the_score_is_not_looked_at,
        the_smallest_weight_first,
        tokens_by_their_best_choice,
        left_in_the_order_of_service,
        one_too_many,
        one_too_few,
        room_for_each_rank,
        the_last_come_first,
    ],
)


# ── 5.3.b  Back on the stream ────────────────────────────────────────────────────────────────────────────


def back_to_stream(x: Tensor, said: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """The reference."""
    return x + (said.masked_fill(~kept[..., None], 0.0) * weights[..., None]).sum(dim=1)


def as_it_was_given(x: Tensor, said: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """All three bugs are still there. Begin with a token that found none of its experts: it must come out as it came
    in."""
    weights = weights * kept
    weights = weights / weights.sum(dim=1, keepdim=True)
    y = (said * weights[..., None]).nan_to_num().sum(dim=1)
    return torch.where(kept.any(dim=1, keepdim=True), x + y, y)


def the_weights_are_still_blown_up(x: Tensor, said: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """The stream is back, but what was kept is scaled up to a sum of 1: an expert of weight 0.4 is heard at full strength
    because another one was full."""
    scaled = weights * kept
    scaled = scaled / scaled.sum(dim=1, keepdim=True).clamp(min=1e-9)
    return back_to_stream(x, said, scaled, kept)


def the_stream_is_still_lost(x: Tensor, said: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """Weights and NaN are mended, but a token that found none of its experts still comes out as zero. x is added for
    everyone."""
    y = back_to_stream(torch.zeros_like(x), said, weights, kept)
    return torch.where(kept.any(dim=1, keepdim=True), x + y, y)


def nan_is_still_swept_away(x: Tensor, said: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """nan_to_num is still there, so an expert that was heard and really diverged goes unnoticed. Replace only what nobody
    wrote, where kept is false."""
    return x + (said * (weights * kept)[..., None]).nan_to_num().sum(dim=1)


def zero_times_nan(x: Tensor, said: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """You multiply what nobody wrote by zero, and 0 times NaN is NaN. Replace it (masked_fill) before anything is
    multiplied."""
    return x + (said * (weights * kept)[..., None]).sum(dim=1)


def filled_after_the_product(x: Tensor, said: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """The output is right, but you fill after the product: the gradient of a weight is still 0 times NaN. Fill `said`
    before it is multiplied."""
    return x + (said * weights[..., None]).masked_fill(~kept[..., None], 0.0).sum(dim=1)


def only_who_found_all(x: Tensor, said: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """A token that found one of its experts, and not the other, gets nothing at all. Each choice counts by itself."""
    y = back_to_stream(torch.zeros_like(x), said, weights, kept)
    return torch.where(kept.all(dim=1, keepdim=True), x + y, x)


def the_stream_once_for_each_choice(x: Tensor, said: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """x is added before the sum over choices, so it comes K times. Add it once, after the sum."""
    return (x[:, None] + said.masked_fill(~kept[..., None], 0.0) * weights[..., None]).sum(dim=1)


def the_layer_without_the_stream(x: Tensor, said: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """You return what the layer adds, without the stream that it is added to."""
    return back_to_stream(torch.zeros_like(x), said, weights, kept)


def _three_tokens(rubbish: float = float("nan")) -> tuple[Tensor, ...]:
    """Both found, one found, none found."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    said = torch.tensor([[[10.0, 0.0], [0.0, 10.0]], [[10.0, 10.0], [rubbish] * 2], [[rubbish] * 2] * 2])
    weights = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.7, 0.3]])
    return x, said, weights, torch.tensor([[True, True], [True, False], [False, False]])


def _random(seed: int = 0, K: int = 2) -> tuple[Tensor, ...]:
    N, D = 7, 5
    said, weights = randn(N, K, D, seed=seed + 1), randn(N, K, seed=seed + 2).softmax(dim=1)
    kept = randn(N, K, seed=seed + 3) > 0
    return randn(N, D, seed=seed), said.masked_fill(~kept[..., None], float("nan")), weights, kept


def _gradients(f: Any) -> tuple[Tensor, ...]:
    x, said, weights, kept = _random(seed=4)
    leaves = [t.requires_grad_() for t in (x, said, weights)]
    f(x, said, weights, kept).square().sum().backward()
    return tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)


def _diverged(f: Any) -> Tensor:
    x, said, weights, kept = _three_tokens(0.0)
    said[0, 0, 0] = float("nan")  # of an expert that was heard
    return f(x, said, weights, kept)


STREAM = Exercise(
    id="5.3.b",
    symbol="back_to_stream",
    reference=back_to_stream,
    look_again="What a dropped token gets",
    probes=[
        Probe("shape and dtype", lambda f: f(*_three_tokens()), same_shape),
        Probe(
            "three tokens, by hand",
            lambda f: f(*_three_tokens(0.0)),
            equals(),
            given="the first found both experts, the second one of weight 0.4, the third none; the rest holds zeros",
        ),
        Probe(
            "whatever was in that memory",
            lambda f: f(*_three_tokens()),
            equals(),
            given="the same, and NaN where nobody wrote",
        ),
        Probe(
            "an expert that diverged is seen",
            _diverged,
            equals(),
            given="NaN in the answer of an expert that was heard",
        ),
        Probe("equals the reference", lambda f: tuple(f(*_random(K, K)) for K in (1, 2, 3)), equals()),
        Probe(
            "gradients of x, said and weights",
            _gradients,
            equals(),
            given="loss = Σ out²; value 1 is x's gradient, 2 is said's, 3 is the weights'",
        ),
    ],
    misconceptions=[
        as_it_was_given,
        the_weights_are_still_blown_up,
        the_stream_is_still_lost,
        nan_is_still_swept_away,
        zero_times_nan,
        filled_after_the_product,
        only_who_found_all,
        the_stream_once_for_each_choice,
        the_layer_without_the_stream,
    ],
)


# ── 5.3.c  From a dense checkpoint to experts ────────────────────────────────────────────────────────────

State = dict[str, Tensor]


def upcycle_state(dense: State, fresh: State) -> State:
    """The reference."""
    return _state(dense, fresh)


def _state(
    dense: State,
    fresh: State,
    taken: Callable[[str], bool] = lambda name: True,
    copies: Callable[[Tensor, Tensor], Tensor] = lambda matrix, stack: matrix.repeat(len(stack), 1, 1),
    new: Callable[[Tensor], Tensor] = torch.clone,
    own: Callable[[Tensor], Tensor] = torch.clone,
) -> State:
    """The reference, in steps that the misconceptions replace one at a time."""
    state = {}
    for name, weight in fresh.items():
        if name in dense and taken(name):
            state[name] = own(dense[name])
        elif ".experts." in name:
            state[name] = copies(dense[name.replace(".experts.", ".") + ".weight"], weight)
        else:
            state[name] = new(weight)
    return state


def the_routers_are_missing(dense: State, fresh: State) -> State:
    """The result has no routers. Go through the names of the new model: each needs a value, and theirs is the fresh one."""
    return {name: weight for name, weight in _state(dense, fresh).items() if "router" not in name}


def a_router_of_zeros(dense: State, fresh: State) -> State:
    """Your routers are zero. All scores are equal then, top-k takes the same K experts for every token, and the rest have
    nothing to do: leave the routers as random as they are."""
    return _state(dense, fresh, new=torch.zeros_like)


def the_old_mlps_are_still_there(dense: State, fresh: State) -> State:
    """The dense MLPs are still in the result beside the experts. It must have the names of the new model and no others."""
    return {name: weight.clone() for name, weight in dense.items()} | _state(dense, fresh)


def only_the_first_expert(dense: State, fresh: State) -> State:
    """Expert 0 is a copy of the MLP, and the others are as random as they were: the sum is not the MLP any more."""

    def first(matrix: Tensor, stack: Tensor) -> Tensor:
        stack = stack.clone()
        stack[0] = matrix
        return stack

    return _state(dense, fresh, copies=first)


def experts_that_share_the_work(dense: State, fresh: State) -> State:
    """You divided by the number of experts. Their weights already add up to 1, so each expert is a whole copy."""
    return _state(dense, fresh, copies=lambda matrix, stack: matrix.repeat(len(stack), 1, 1) / len(stack))


def only_the_experts_are_taken(dense: State, fresh: State) -> State:
    """The experts are copies of the MLPs, but embeddings, norms and attention are the fresh model's."""
    return _state(dense, fresh, taken=lambda name: False)


def the_layers_without_experts_are_fresh(dense: State, fresh: State) -> State:
    """In a hybrid, the MLPs of layers without experts have the same names in both models, and you left them fresh: take
    whatever both have from the dense one."""
    return _state(dense, fresh, taken=lambda name: ".mlp." not in name)


def all_experts_in_one_memory(dense: State, fresh: State) -> State:
    """The values are right, but `expand` makes E views of one matrix: the first step of training would move all experts
    at once, or fail. Make the copies real."""
    return _state(dense, fresh, copies=lambda matrix, stack: matrix.expand(len(stack), -1, -1))


def shared_with_the_dense_model(dense: State, fresh: State) -> State:
    """The values are right, but what both models have is the same memory: training one trains the other. Clone it."""
    return _state(dense, fresh, own=lambda weight: weight)


def nothing_is_copied(dense: State, fresh: State) -> State:
    """The values are right, and all of it is borrowed: the experts are views of one MLP, and the rest is the memory of the
    two models. Training would change all of them at once: copy everything that you hand on."""
    borrow: Callable[[Tensor], Tensor] = lambda weight: weight  # noqa: E731
    return _state(
        dense, fresh, copies=lambda matrix, stack: matrix.expand(len(stack), -1, -1), new=borrow, own=borrow
    )


def _pair(**settings: Any) -> tuple[Transformer, MoETransformer]:
    """A dense model and one with experts, both with numbers of their own."""
    dense = ModelConfig(vocab_size=11, max_seq_len=8, d_model=8, n_heads=2, n_layers=2, d_mlp=12)
    with_experts = MoEConfig(**{**vars(dense), "n_experts": 4, **settings})
    new = MoETransformer(with_experts)
    with torch.no_grad():
        for parameter in fill_by_name(new).parameters():
            parameter.mul_(-1)  # names that both have would hold the same numbers
    return fill_by_name(Transformer(dense)), new


def _states(**settings: Any) -> tuple[State, State]:
    dense, new = _pair(**settings)
    return dense.state_dict(), new.state_dict()


def _tiny() -> tuple[State, State]:
    """One matrix, one router and a norm."""
    dense = {
        "blocks.0.norm2.weight": torch.tensor([7.0, 8.0]),
        "blocks.0.mlp.up.weight": torch.tensor([[1.0, 2.0]]),
    }
    fresh = {
        "blocks.0.norm2.weight": torch.ones(2),
        "blocks.0.mlp.router.weight": torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
        "blocks.0.mlp.experts.up": torch.zeros(2, 1, 2),
    }
    return dense, fresh


@torch.no_grad()
def _logits(f: Any, **settings: Any) -> Tensor:
    """Of the new model, with the state that was made."""
    dense, new = _pair(**settings)
    new.load_state_dict(f(dense.state_dict(), new.state_dict()))
    return new.eval()(torch.arange(8)[None])


@torch.no_grad()
def _apart(f: Any) -> tuple[State, State, State]:
    """The result after the first row of each tensor was moved, and what became of the two that were handed in."""
    dense, fresh = _states(moe_every=2)
    state = f(dense, fresh)
    for weight in state.values():
        weight[0] += 1  # expert 0, where it is a stack
    return state, dense, fresh


UPCYCLE = Exercise(
    id="5.3.c",
    symbol="upcycle_state",
    reference=upcycle_state,
    look_again="From dense to experts",
    probes=[
        Probe(
            "names and shapes",
            lambda f: {name: tuple(weight.shape) for name, weight in f(*_states()).items()},
            same_parameters,
            given="two layers with four experts each",
        ),
        Probe(
            "one matrix, by hand",
            lambda f: dict(sorted(f(*_tiny()).items())),
            equals(),
            given="up is (1, 2), the norm (7, 8), the fresh router ((3, 4), (5, 6)), two experts",
        ),
        Probe(
            "the first logits are the dense model's",
            lambda f: _logits(f),
            equals(),
            given="four experts in both layers",
        ),
        Probe("in a hybrid, too", lambda f: _logits(f, moe_every=2), equals(), given="moe_every = 2"),
        Probe(
            "equals the reference",
            lambda f: f(*_states(n_experts=3, moe_every=2, bias_update_speed=0.1)),
            equals(),
            given="three experts, moe_every = 2, a router with a bias",
        ),
        Probe(
            "nothing shares memory",
            lambda f: _apart(f),
            equals(),
            given="after 1 was added to the first row of each tensor (expert 0 of a stack); value 2 is the dense state, 3 the fresh one",
        ),
    ],
    misconceptions=[
        the_routers_are_missing,
        a_router_of_zeros,
        the_old_mlps_are_still_there,
        only_the_first_expert,
        experts_that_share_the_work,
        only_the_experts_are_taken,
        the_layers_without_experts_are_fresh,
        all_experts_in_one_memory,
        shared_with_the_dense_model,
        nothing_is_copied,
    ],
)


# ── 5.3.d  How much of it works? ─────────────────────────────────────────────────────────────────────────


class _Counter:
    """The reference, in steps that the misconceptions replace one at a time."""

    matrices = 3

    def has_experts(self, i: int, moe_every: int, dense_first: int) -> bool:
        return i >= dense_first and (i + 1) % moe_every == 0

    def router(self, d_model: int, n_experts: int) -> int:
        return n_experts * d_model

    def shared(self, n_shared: int) -> tuple[int, int]:
        """How many count in the total, and in what is active."""
        return n_shared, n_shared

    def chosen(self, experts_per_token: int, sparse: int) -> int:
        return sparse * experts_per_token

    def plain(self, n_layers: int, sparse: int) -> int:
        return n_layers - sparse

    def __call__(
        self,
        n_layers: int,
        d_model: int,
        d_mlp: int,
        d_expert: int,
        n_experts: int,
        experts_per_token: int,
        n_shared: int = 0,
        moe_every: int = 1,
        dense_first: int = 0,
    ) -> tuple[int, int]:
        sparse = sum(self.has_experts(i, moe_every, dense_first) for i in range(n_layers))
        expert = self.matrices * d_model * d_expert
        always = self.plain(n_layers, sparse) * self.matrices * d_model * d_mlp
        always += sparse * self.router(d_model, n_experts)
        in_all, in_use = self.shared(n_shared)
        total = always + sparse * (n_experts + in_all) * expert
        return total, always + (self.chosen(experts_per_token, sparse) + sparse * in_use) * expert


class _EveryOtherFromZero(_Counter):
    def has_experts(self, i: int, moe_every: int, dense_first: int) -> bool:
        return i >= dense_first and i % moe_every == 0


class _CountedAfterTheDenseOnes(_Counter):
    def has_experts(self, i: int, moe_every: int, dense_first: int) -> bool:
        return i >= dense_first and (i - dense_first + 1) % moe_every == 0


class _OneDenseTooMany(_Counter):
    def has_experts(self, i: int, moe_every: int, dense_first: int) -> bool:
        return i > dense_first and (i + 1) % moe_every == 0


class _NoRouter(_Counter):
    def router(self, d_model: int, n_experts: int) -> int:
        return 0


class _SharedIdle(_Counter):
    def shared(self, n_shared: int) -> tuple[int, int]:
        return n_shared, 0


class _SharedAmongAll(_Counter):
    def shared(self, n_shared: int) -> tuple[int, int]:
        return 0, n_shared


class _ChosenOnce(_Counter):
    def chosen(self, experts_per_token: int, sparse: int) -> int:
        return experts_per_token


class _OnlyExperts(_Counter):
    def plain(self, n_layers: int, sparse: int) -> int:
        return 0


class _MlpEverywhere(_Counter):
    def plain(self, n_layers: int, sparse: int) -> int:
        return n_layers


class _TwoMatrices(_Counter):
    matrices = 2


def _count(*sizes: int, **more: int) -> Callable[[Any], Any]:
    return lambda f: f(*sizes, **more)


COUNT = Exercise(
    id="5.3.d",
    symbol="count_feed_forwards",
    reference=_Counter(),
    look_again="What it costs",
    probes=[
        Probe("two whole numbers", _count(1, 2, 9, 5, 4, 2), same_shape),
        Probe(
            "one layer, by hand",
            _count(1, 2, 9, 5, 4, 2),
            equals(),
            given="d_model 2, four experts of width 5, two for each token: each has 30 parameters, the router 8",
        ),
        Probe(
            "one shared expert besides",
            _count(1, 2, 9, 5, 4, 2, n_shared=1),
            equals(),
            given="the same layer and n_shared = 1: 30 more, for every token",
        ),
        Probe(
            "every second layer",
            _count(5, 2, 9, 5, 4, 2, moe_every=2),
            equals(),
            given="5 layers, moe_every = 2: layers 1 and 3 have experts",
        ),
        Probe(
            "the first layers dense",
            _count(5, 2, 9, 5, 4, 2, dense_first=2),
            equals(),
            given="5 layers, dense_first = 2: layers 2, 3 and 4 have experts",
        ),
        Probe(
            "both",
            _count(8, 2, 9, 5, 4, 2, moe_every=2, dense_first=3),
            equals(),
            given="8 layers, moe_every = 2, dense_first = 3: layers 3, 5 and 7 have experts",
        ),
        Probe(
            "Mixtral 8x7B",
            _count(32, 4096, 14336, 14336, 8, 2),
            equals(),
            given="32, 4096, 14336, 14336, 8, 2",
        ),
        Probe(
            "DeepSeek-V3",
            _count(61, 7168, 18432, 2048, 256, 8, n_shared=1, dense_first=3),
            equals(),
            given="61 layers, 256 experts and a shared one, the first three layers dense",
        ),
        Probe(
            "drawn shapes",
            lambda f: [
                f(n, 3, 7, 4, 6, k, n_shared=s, moe_every=m, dense_first=d)
                for n, k, s, m, d in ((5, 1, 0, 3, 0), (7, 6, 2, 2, 1), (9, 3, 1, 3, 4), (4, 2, 3, 1, 3))
            ],
            equals(),
        ),
    ],
    misconceptions=[
        Misconception(
            "the first layer has experts, and one in so many after it",
            _EveryOtherFromZero(),
            "You asked whether i is a multiple of moe_every; asked for is i + 1, so that with 2 it is the second layer, "
            "the fourth, and so on.",
        ),
        Misconception(
            "counting begins after the dense layers",
            _CountedAfterTheDenseOnes(),
            "You count moe_every from dense_first on. Layers are counted from the first one in any case, so with "
            "moe_every 2 and dense_first 3 they are 3, 5, 7.",
        ),
        Misconception(
            "one dense layer too many",
            _OneDenseTooMany(),
            "Layer dense_first is taken for dense. Layers count from 0, so it is the first one that may have experts.",
        ),
        Misconception(
            "the router is missing",
            _NoRouter(),
            "The routers are not counted: n_experts × d_model in each layer with experts, in both numbers.",
        ),
        Misconception(
            "shared experts are idle",
            _SharedIdle(),
            "Shared experts are in the total only. They work on every token, so they are active, too.",
        ),
        Misconception(
            "shared experts among the others",
            _SharedAmongAll(),
            "Shared experts are counted as active, but not in the total: they come besides the n_experts to choose from.",
        ),
        Misconception(
            "two experts in the whole model",
            _ChosenOnce(),
            "You counted experts_per_token experts once. A token has so many in every layer that has experts.",
        ),
        Misconception(
            "layers without experts are missing",
            _OnlyExperts(),
            "Layers without experts have an MLP of width d_mlp, which counts in both numbers.",
        ),
        Misconception(
            "an MLP in every layer",
            _MlpEverywhere(),
            "You counted an MLP in layers with experts, too. There the experts stand in its place.",
        ),
        Misconception(
            "two matrices",
            _TwoMatrices(),
            "A SwiGLU has three matrices (gate, up, down), and you counted two.",
        ),
    ],
)


# ── 5.3.e  Cut finer ─────────────────────────────────────────────────────────────────────────────────────

Cut = tuple[Tensor, Tensor, Tensor, Tensor]


def _rows(weight: Tensor, parts: int) -> Tensor:
    E, M, D = weight.shape
    return weight.reshape(E * parts, M // parts, D)


def _columns(down: Tensor, parts: int) -> Tensor:
    E, D, M = down.shape
    return down.view(E, D, parts, M // parts).transpose(1, 2).reshape(E * parts, D, M // parts)


def split_experts(gate: Tensor, up: Tensor, down: Tensor, router: Tensor, parts: int) -> Cut:
    """The reference."""
    rows = router.repeat_interleave(parts, dim=0)
    return _rows(gate, parts), _rows(up, parts), parts * _columns(down, parts), rows


def columns_cut_like_rows(gate: Tensor, up: Tensor, down: Tensor, router: Tensor, parts: int) -> Cut:
    """down was reshaped as gate and up were, which cuts its rows and mixes them. A unit is a column there: the cut goes
    through the last dimension, and the parts then move in front of D."""
    E, D, M = down.shape
    gate, up, _, router = split_experts(gate, up, down, router, parts)
    return gate, up, parts * down.reshape(E * parts, D, M // parts), router


def each_part_is_too_quiet(gate: Tensor, up: Tensor, down: Tensor, router: Tensor, parts: int) -> Cut:
    """Everything is cut right, and the output is 1/P of what it should be: each part has only 1/P of the expert's weight,
    so its answer must be P times as large."""
    gate, up, down, router = split_experts(gate, up, down, router, parts)
    return gate, up, down / parts, router


def the_factor_goes_through_silu(gate: Tensor, up: Tensor, down: Tensor, router: Tensor, parts: int) -> Cut:
    """You multiplied gate by P, and silu is not linear. Put the factor into down (or up)."""
    gate, up, down, router = split_experts(gate, up, down, router, parts)
    return parts * gate, up, down / parts, router


def up_and_down_are_multiplied(gate: Tensor, up: Tensor, down: Tensor, router: Tensor, parts: int) -> Cut:
    """Both up and down are multiplied by P, which makes P². One of them is enough."""
    gate, up, down, router = split_experts(gate, up, down, router, parts)
    return gate, parts * up, down, router


def routers_in_turns(gate: Tensor, up: Tensor, down: Tensor, router: Tensor, parts: int) -> Cut:
    """The router's rows come 0, 1, …, 0, 1, …, but all parts of expert 0 come first: so each part must have its own
    expert's row, 0, 0, …, 1, 1, … (repeat_interleave)."""
    gate, up, down, _ = split_experts(gate, up, down, router, parts)
    return gate, up, down, router.repeat(parts, 1)


def the_router_is_divided(gate: Tensor, up: Tensor, down: Tensor, router: Tensor, parts: int) -> Cut:
    """You divided the router's rows by P. They are scores before the softmax: dividing them makes the router less sure,
    and that equal rows share the weight comes by itself."""
    gate, up, down, router = split_experts(gate, up, down, router, parts)
    return gate, up, down, router / parts


def whole_copies(gate: Tensor, up: Tensor, down: Tensor, router: Tensor, parts: int) -> Cut:
    """You repeated each expert P times and cut nothing. The parts are to be 1/P as wide."""
    return tuple(w.repeat_interleave(parts, dim=0) for w in (gate, up, down, router))  # type: ignore[return-value]


def units_that_do_not_meet(gate: Tensor, up: Tensor, down: Tensor, router: Tensor, parts: int) -> Cut:
    """Rows were dealt out in turns and columns in runs, so a part's down belongs to other units than its gate and up. Cut
    all three the same way."""
    E, M, D = gate.shape
    dealt = [
        w.reshape(E, M // parts, parts, D).transpose(1, 2).reshape(E * parts, M // parts, D)
        for w in (gate, up)
    ]
    _, _, down, router = split_experts(gate, up, down, router, parts)
    return dealt[0], dealt[1], down, router


def _layer(E: int, D: int, M: int, seed: int = 0) -> Cut:
    shapes = ((E, M, D), (E, M, D), (E, D, M), (E, D))
    gate, up, down, router = (randn(*shape, seed=seed + i) for i, shape in enumerate(shapes))
    return gate, up, down, router


def _answers(cut: Cut, x: Tensor) -> Tensor:
    """Every expert's answer to every row, `(experts, rows, D)`."""
    gate, up, down, _ = cut
    return (F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT


@torch.no_grad()
def _through(f: Any, parts: int, E: int = 4, K: int = 2) -> Tensor:
    """What a `MoELayer` with the cut experts says."""
    gate, up, down, router = f(*_layer(E, 6, 12), parts)
    layer = MoELayer(Router(6, E * parts, K * parts), Experts(E * parts, 6, 12 // parts))
    for parameter, weight in (
        (layer.experts.gate, gate),
        (layer.experts.up, up),
        (layer.experts.down, down),
        (layer.router.weight, router),
    ):
        parameter.copy_(weight)
    return layer.eval()(randn(3, 10, 6, seed=9))


def _sums(f: Any) -> Tensor:
    """For each expert, the sum of its parts' answers."""
    cut = f(*_layer(2, 3, 4), 2)
    return _answers(cut, randn(5, 3, seed=8)).unflatten(0, (2, 2)).sum(dim=1)


FINER = Exercise(
    id="5.3.e",
    symbol="split_experts",
    reference=split_experts,
    look_again="Which layers, and how many experts",
    probes=[
        Probe("shapes", lambda f: f(*_layer(2, 3, 8), 4), same_shape, given="E 2, D 3, M 8, four parts"),
        Probe(
            "one part is the expert itself",
            lambda f: _answers(f(*_layer(2, 3, 4), 1), randn(5, 3, seed=8)),
            equals(),
            given="parts = 1",
        ),
        Probe(
            "the parts of each expert, summed",
            _sums,
            equals(),
            given="two experts of width 4 in two parts each: their sum is twice the expert",
        ),
        Probe(
            "the router's rows",
            lambda f: f(*_layer(3, 2, 4), 2)[3],
            equals(),
            given="three experts, two parts: the rows of experts 0, 0, 1, 1, 2, 2",
        ),
        Probe(
            "a layer says the same", lambda f: _through(f, 3), equals(1e-4), given="top-2 of 4, three parts"
        ),
        Probe(
            "for any number of parts",
            lambda f: tuple(_through(f, parts) for parts in (1, 2, 4, 6, 12)),
            equals(1e-4),
        ),
        Probe(
            "a dense MLP, cut",
            lambda f: _through(f, 4, E=1, K=1),
            equals(1e-4),
            given="E = K = 1, four parts",
        ),
    ],
    misconceptions=[
        columns_cut_like_rows,
        each_part_is_too_quiet,
        the_factor_goes_through_silu,
        up_and_down_are_multiplied,
        routers_in_turns,
        the_router_is_divided,
        whole_copies,
        units_that_do_not_meet,
    ],
    equivalent_mutants={
        "`down.reshape(E, D, parts, narrow).transpose(1, 2)` became "
        "`down.reshape(E, D, parts, narrow).transpose(2, 1)`": "exchanging two dimensions has no order",
    },
)

EXERCISES = [ROOM, STREAM, UPCYCLE, COUNT, FINER]
