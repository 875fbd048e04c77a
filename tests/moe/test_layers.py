"""The layer is the sum that its equation says, token by token, for any shape; capacity drops whom it should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tutorial_lib.core.swiglu import SwiGLU
from tutorial_lib.moe.balance import expert_load
from tutorial_lib.moe.capacity import capacity_of, find_slots
from tutorial_lib.moe.experts import Experts, Move, sort_by_expert
from tutorial_lib.moe.layers import MoELayer
from tutorial_lib.moe.router import Router
from tutorial_lib.quant.int8 import Int8Stack, quantize_rows


def make(
    E: int, K: int, D: int = 8, M: int = 12, gated: bool = True, shared: bool = False, **more
) -> MoELayer:
    """With weights as small as a model's, so that 1e-6 means what it says."""
    router = Router(D, E, K, renormalize=K > 1)
    layer = MoELayer(router, Experts(E, D, M, "silu", gated), SwiGLU(D, M) if shared else None, **more)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


def by_hand(layer: MoELayer, x: Tensor) -> Tensor:
    """One token and one expert at a time, from the equation alone; what was dropped adds nothing."""
    routing, experts = layer.router.routing, layer.experts
    rows = []
    for n, token in enumerate(x):
        probs = (layer.router.weight @ token).softmax(-1)
        weights = probs[routing.experts[n]]
        weights = weights / weights.sum() if layer.router.renormalize else weights
        y = torch.zeros_like(token)
        for k, e in enumerate(routing.experts[n].tolist()):
            if routing.kept is None or routing.kept[n, k]:
                inner = experts.up[e] @ token
                inner = F.silu(inner) if experts.gate is None else F.silu(experts.gate[e] @ token) * inner
                y = y + weights[k] * (experts.down[e] @ inner)
        rows.append(y if layer.shared is None else y + layer.shared(token))
    return torch.stack(rows) if rows else x[:, :]


@settings(max_examples=40)
@given(st.data())
def test_the_layer_is_a_loop_over_tokens_forward_and_backward(data):
    E = data.draw(st.integers(1, 9), "experts")
    K = data.draw(st.integers(1, E), "of a token")
    N = data.draw(st.integers(0, 17), "tokens")
    factor = data.draw(st.sampled_from([None, 0.3, 1.0, 1.5]), "capacity")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    layer = make(
        E, K, gated=data.draw(st.booleans()), shared=data.draw(st.booleans()), capacity_factor=factor
    )
    if data.draw(st.booleans(), "everybody to the same"):  # the others get no token
        nn.init.zeros_(layer.router.weight)
    x = torch.randn(N, 8, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    wanted, direction = by_hand(layer, x) if N else y.detach() + 0 * x.sum(), torch.randn(N, 8)
    close(y, wanted)
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad(y, inputs, direction, retain_graph=True, allow_unused=True)
    if N:
        theirs = torch.autograd.grad(wanted, inputs, direction, allow_unused=True)
        for our, their in zip(ours, theirs, strict=True):
            their = torch.zeros_like(our) if their is None else their
            close(our, their)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-6, of the largest number where that is above one."""
    scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, atol=1e-6 * scale, rtol=0)


def test_every_expert_takes_part_even_one_without_tokens():
    layer = make(6, 2)
    layer(torch.randn(1, 1, 8)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters()), "DDP would wait for it for ever"
    idle = set(range(6)) - set(layer.router.routing.experts.flatten().tolist())
    assert len(idle) == 4 and all(layer.experts.down.grad[e].abs().sum() == 0 for e in idle)


def test_any_dimensions_before_the_last():
    torch.manual_seed(0)
    layer, x = make(4, 2, shared=True), torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(layer(x), layer(x.view(30, 8)).view(2, 3, 5, 8))
    assert layer(torch.empty(2, 0, 8)).shape == (2, 0, 8)


def test_move_has_the_gradient_of_an_index():
    torch.manual_seed(0)
    order, back = sort_by_expert(torch.randint(3, (5, 2)))
    assert torch.equal(order[back], torch.arange(10))
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: Move.apply(rows, order, back, 2), x)
    assert torch.equal(Move.apply(x, order, back, 2), x[order // 2])


def test_in_bf16_the_router_is_still_exact():
    torch.manual_seed(0)
    layer, x = make(8, 2), torch.randn(64, 8)
    layer(x)
    exact = layer.router.routing
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert layer.router.routing.logits.dtype == torch.float32 and torch.equal(
        layer.router.routing.experts, exact.experts
    )
    torch.testing.assert_close(y, by_hand(layer, x), atol=0.02, rtol=0.05)


def test_the_grouped_product_is_the_same():
    """What a GPU runs in bf16, here on the CPU."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped product")
    torch.manual_seed(0)
    experts, x = Experts(4, 16, 32).bfloat16(), torch.randn(10, 16).bfloat16()
    sizes = torch.tensor([3, 0, 6, 1])
    stacks, ends = [experts.gate, experts.up, experts.down], sizes.cumsum(0, dtype=torch.int32)
    grouped = experts._feed(x, stacks, lambda rows, w: F.grouped_mm(rows, w[:].mT, offs=ends))
    torch.testing.assert_close(grouped, experts(x, sizes), atol=0.05, rtol=0.05)


def test_int8_stacks_are_read_one_expert_at_a_time():
    torch.manual_seed(0)
    layer, x = make(4, 2).eval(), torch.randn(9, 8)
    plain = layer(x)
    for name in ("gate", "up", "down"):
        weight = getattr(layer.experts, name).detach()
        delattr(layer.experts, name)
        setattr(layer.experts, name, Int8Stack(*quantize_rows(weight)))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain, atol=0.01, rtol=0.05)


# --- capacity -----------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_first_choices_come_first_and_then_who_stands_earlier(N, E, C, seed):
    torch.manual_seed(seed)
    K = min(2, E)
    experts = torch.rand(N, E).topk(K).indices
    slots, taken = find_slots(experts, E, C), [0] * E
    for k in range(K):
        for n in range(N):
            e = int(experts[n, k])
            wanted = e * C + taken[e] if taken[e] < C else E * C
            assert slots[n, k] == wanted
            taken[e] += 1


def test_capacity_is_a_share_of_the_choices():
    assert capacity_of(100, 8, 2, 1.0) == 25 and capacity_of(100, 8, 2, 1.25) == 32
    assert capacity_of(0, 8, 2, 1.0) == 0


def test_who_is_dropped_adds_nothing_and_the_rest_is_as_it_was():
    torch.manual_seed(0)
    tight, x = make(4, 2, capacity_factor=0.5), torch.randn(16, 8)
    y = tight(x)
    kept = tight.router.routing.kept
    assert 0 < (~kept).sum() and torch.equal(y[~kept.any(1)], torch.zeros_like(y[~kept.any(1)]))
    assert (expert_load(tight.router.routing.experts, 4).sum(), kept.sum() <= 16) == (32, True)
    whole = tight.eval()(x)  # when it writes or is judged, nobody is dropped
    assert tight.router.routing.kept is None
    torch.testing.assert_close(y[kept.all(1)], whole[kept.all(1)])
    roomy = make(4, 2, capacity_factor=4.0)
    torch.testing.assert_close(roomy(x), roomy.eval()(x))


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [0, 5])
def test_a_token_cannot_have_more_experts_than_there_are(K):
    with pytest.raises(ValueError, match=f"a token cannot have {K} of 4 experts"):
        Router(8, 4, K)


def test_top_1_renormalized_teaches_its_router_nothing():
    torch.manual_seed(0)
    for renormalize in (True, False):
        layer = MoELayer(Router(8, 4, 1, renormalize), Experts(4, 8, 12))
        layer(torch.randn(32, 8)).square().sum().backward()
        size = layer.router.weight.grad.abs().max()
        assert size < 1e-4 if renormalize else size > 1e-2
