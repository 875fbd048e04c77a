"""What keeps experts busy: closed forms, whose gradients reach whom, and runs that collapse without it."""

from __future__ import annotations

import math

import pytest
import torch

from tutorial_lib.data.corpora import load_text
from tutorial_lib.moe.balance import balancing_loss, expert_load, router_z_loss
from tutorial_lib.moe.model import MoEConfig, MoETransformer
from tutorial_lib.moe.router import Router
from tutorial_lib.train.accumulate import accumulate_gradients, split_batch
from tutorial_lib.train.balance import Balanced, NudgeBias, routers_of
from tutorial_lib.train.compiled import Compiled
from tutorial_lib.train.losses import lm_loss
from tutorial_lib.train.optimizers import build_optimizer
from tutorial_lib.train.trainer import Trainer


def test_the_load_counts_choices_and_leaves_padding_out():
    experts = torch.tensor([[0, 1], [0, 2], [3, 0]])
    assert expert_load(experts, 4).tolist() == [3, 1, 1, 1]
    assert expert_load(experts, 4, torch.tensor([True, False, True])).tolist() == [2, 1, 0, 1]


@pytest.mark.parametrize("K", [1, 2, 3])
def test_balance_is_one_when_even_and_its_most_when_all_go_to_one(K):
    N, E = 60, 6
    even = torch.stack([(torch.arange(N) + k) % E for k in range(K)], 1)
    assert balancing_loss(torch.full((N, E), 1 / E), expert_load(even, E)) == pytest.approx(1.0)
    sure = torch.eye(E)[torch.zeros(N, dtype=torch.long)]
    assert balancing_loss(sure, torch.tensor([N, 0, 0, 0, 0, 0])) == pytest.approx(E)


def test_its_gradient_is_e_times_f_over_n_and_goes_through_p_alone():
    torch.manual_seed(0)
    probs = torch.rand(10, 4).softmax(-1).requires_grad_()
    load = expert_load(probs.topk(2).indices, 4)
    balancing_loss(probs, load).backward()
    torch.testing.assert_close(probs.grad, (4 * load / load.sum() / 10).expand(10, 4))


def test_who_does_not_count_has_no_gradient():
    torch.manual_seed(0)
    logits = torch.randn(6, 4, requires_grad=True)
    real = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
    load = expert_load(logits.topk(2).indices, 4, real)
    loss = balancing_loss(logits.softmax(-1), load, real) + router_z_loss(logits, real)
    loss.backward()
    assert (logits.grad[~real] == 0).all() and (logits.grad[real] != 0).any()
    short = logits.detach()[real]
    alone = balancing_loss(short.softmax(-1), expert_load(short.topk(2).indices, 4)) + router_z_loss(short)
    torch.testing.assert_close(loss.detach(), alone)


def test_the_z_loss_is_the_square_of_the_log_of_the_sum():
    assert router_z_loss(torch.zeros(5, 8)) == pytest.approx(math.log(8) ** 2)
    nobody = torch.zeros(3, dtype=torch.bool)
    assert (
        router_z_loss(torch.randn(3, 4), nobody)
        == 0
        == balancing_loss(torch.rand(3, 4), torch.zeros(4), nobody)
    )


def small(**more) -> MoETransformer:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "max_seq_len": 16, "d_model": 32, "n_heads": 4, "n_layers": 2, "d_expert": 16}
    return MoETransformer(MoEConfig(**shape | more))


def some(rows: int = 6, cut: bool = True):
    ids = torch.randint(64, (rows, 17), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    if cut:
        for row in range(rows):
            labels[row, 3 + 2 * row :] = -100
    return ids[:, :-1], labels


def test_the_objective_is_the_sum_that_its_parts_make():
    model, batch = small(), some()
    means = accumulate_gradients(model, [batch], objective=Balanced(balance=0.3, z=0.2))
    real = (batch[1] != -100).flatten()
    plain = lm_loss(model(batch[0]), batch[1])
    said = [router.routing for router in routers_of(model)]
    loads = [expert_load(r.experts, 8, real) for r in said]
    balance = [balancing_loss(r.probs, load, real) for r, load in zip(said, loads, strict=True)]
    z = [router_z_loss(r.logits, real) for r in said]
    assert means["loss"] == pytest.approx(plain.item(), rel=1e-5)
    assert means["balance_loss"] == pytest.approx(sum(balance).item() / 2, rel=1e-5)
    assert means["objective"] == pytest.approx((plain + 0.3 * sum(balance) + 0.2 * sum(z)).item(), rel=1e-5)
    assert means["max_load"] == pytest.approx(
        sum((x.max() / x.float().mean()).item() for x in loads) / 2, rel=1e-5
    )


def test_in_pieces_the_z_loss_is_the_same_and_the_loads_are_those_of_the_whole():
    batch, found = some(), {}
    for size in (None, 2, 1):
        model = small(bias_update_speed=0.01)
        nudge = NudgeBias(model, 0.01)
        means = accumulate_gradients(
            model, split_batch(batch, size), objective=Balanced(balance=0.0, z=0.1, nudge=nudge)
        )
        found[size] = (means["objective"], nudge.load.clone(), [p.grad.clone() for p in model.parameters()])
    for size in (2, 1):
        torch.testing.assert_close(found[size][0], found[None][0])
        assert torch.equal(found[size][1], found[None][1])
        for ours, whole in zip(found[size][2], found[None][2], strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-4)


def test_a_piece_is_asked_to_be_even_by_itself():
    """f·P of pieces is not that of the whole: the docstring of `Balanced` says so. It differs little, upward."""
    batch = some(8, cut=False)
    whole, pieces = (
        accumulate_gradients(small(), split_batch(batch, size), objective=Balanced())["balance_loss"]
        for size in (None, 1)
    )
    assert 1.0 <= whole < pieces < 1.3 * whole


def test_what_was_padded_does_not_matter():
    """With other tokens where nothing counts, the loss and what is asked of routers stay as they are."""
    inputs, labels = some()
    other = inputs.clone()
    for row in range(6):
        other[row, 3 + 2 * row :] = 7
    means = [accumulate_gradients(small(), [(x, labels)], objective=Balanced()) for x in (inputs, other)]
    for name in ("loss", "balance_loss", "z_loss", "max_load"):
        assert means[0][name] == pytest.approx(means[1][name].item(), rel=1e-5), name


def test_the_bias_goes_up_for_the_idle_and_moves_nobody_else():
    model = small(bias_update_speed=0.01)
    nudge, before = NudgeBias(model, 0.01), {n: p.clone() for n, p in model.named_parameters()}
    accumulate_gradients(model, [some()], objective=Balanced(nudge=nudge))
    loads = nudge.load.clone()
    nudge()
    for router, load in zip(routers_of(model), loads, strict=True):
        torch.testing.assert_close(router.bias, 0.01 * (load.mean() - load).sign())
    assert nudge.load.sum() == 0 and all(torch.equal(before[n], p) for n, p in model.named_parameters())
    with torch.no_grad():  # what is looked at is not counted
        Balanced(nudge=nudge).loss(model.eval(), some())
    assert nudge.load.sum() == 0


def test_the_bias_says_who_is_chosen_and_not_how_much_he_says():
    torch.manual_seed(0)
    router, x = Router(8, 4, 2, balance_bias=True), torch.randn(20, 8)
    plain = router(x)
    router.bias[:] = torch.tensor([0.0, 0.0, 0.0, 5.0])
    pushed = router(x)
    assert (pushed.experts == 3).any(1).all() and not (plain.experts == 3).any(1).all()
    weights = plain.probs.gather(1, pushed.experts)
    torch.testing.assert_close(pushed.weights, weights / weights.sum(1, keepdim=True))


def test_with_capacity_it_is_one_compiled_graph_and_the_same_step():
    """Shapes that are known beforehand; without capacity on a CPU the graph is cut around the experts."""
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    batch = some(cut=False)
    found = []
    for compiled in (False, True):
        model = small(capacity_factor=1.0, bias_update_speed=0.01)
        objective = Balanced(nudge=NudgeBias(model))
        wrapped = Compiled(objective, backend=look, fullgraph=True) if compiled else objective
        found.append(accumulate_gradients(model, [batch], objective=wrapped))
        grads = [p.grad for p in model.parameters()]
        found.append([objective.nudge.load, *grads])
    assert len(graphs) == 1 and found[0]["dropped"] > 0
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[2][name], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found[1], found[3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# --- collapse, over three seeds -----------------------------------------------------------------------------

STEPS = 250
REMEDIES = {
    "none": {"aux_loss_coef": 0.0},
    "aux": {"aux_loss_coef": 0.1},
    "aux and z": {"aux_loss_coef": 0.1, "z_loss_coef": 0.001},
    "bias": {"aux_loss_coef": 0.0, "bias_update_speed": 0.003},
}


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.frombuffer(bytearray(load_text("shakespeare")), dtype=torch.uint8)


def largest_load(text: torch.Tensor, seed: int, settings: dict[str, float]) -> float:
    """Of the last 20 steps: the largest load by the mean, the mean of the layers."""
    torch.manual_seed(seed)
    config = MoEConfig(
        256, 32, 64, 4, n_layers=2, d_expert=64, experts_per_token=2, **{"z_loss_coef": 0.0, **settings}
    )
    model = MoETransformer(config)
    nudge = NudgeBias(model, config.bias_update_speed) if config.bias_update_speed else None
    draw, loads = torch.Generator().manual_seed(seed), []

    def batches():
        while True:
            rows = torch.stack(
                [text[i : i + 33] for i in torch.randint(len(text) - 33, (16,), generator=draw)]
            ).long()
            yield rows[:, :-1], rows[:, 1:]

    trainer = Trainer(
        model,
        build_optimizer(model, lr=2e-3),
        batches(),
        STEPS,
        objective=Balanced(balance=config.aux_loss_coef, z=config.z_loss_coef, nudge=nudge),
    )
    trainer.run([*([nudge] if nudge else []), lambda info: loads.append(info.metrics["max_load"])])
    return sum(loads[-20:]) / 20


@pytest.mark.slow
@pytest.mark.parametrize("remedy", REMEDIES)
def test_without_help_experts_are_forgotten_and_with_any_remedy_they_are_not(text, remedy, record_property):
    loads = [largest_load(text, seed, REMEDIES[remedy]) for seed in range(3)]
    record_property("loads", loads)
    print(remedy, loads)
    if remedy == "none":
        assert min(loads) >= 2.5, f"no collapse: {loads}"
    else:
        assert max(loads) <= 1.5, f"{remedy} does not balance: {loads}"
