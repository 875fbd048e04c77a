"""Muon: the direction of an SVD, the step of torch's own Muon, AdamW for the rest; and the ladder that it tops."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from torch import nn

from tests.core.experts import FORMS, Experts
from tutorial_lib.checks.probes import fill_by_name, randn
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.tour.ladder import RUNGS, climb_one, measured
from tutorial_lib.train.muon import Muon, muon_groups, orthogonalize
from tutorial_lib.train.optimizers import build_optimizer

SHAPES = [(24, 16), (16, 24), (16, 16), (16, 24)]
needs_torch_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in 2.9"
)


def build(**changes) -> Transformer:
    shape = {"vocab_size": 31, "max_seq_len": 16, "d_model": 16, "n_heads": 2, "n_layers": 2} | changes
    return fill_by_name(Transformer(ModelConfig(**shape)), 0.1)


def parameters(shapes=SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]


def give_gradients(params, step: int) -> None:
    for i, p in enumerate(params):
        p.grad = randn(*p.shape, seed=100 * step + i)


def furthest(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# ── orthogonalize ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("m", "n"), [(8, 8), (32, 80), (80, 32), (1, 5), (5, 1)])
def test_directions_of_the_svd_and_singular_values_near_one(m, n):
    U, _, Vt = torch.linalg.svd(randn(m, n), full_matrices=False)
    S = torch.logspace(0, -1.5, len(Vt))
    made = orthogonalize(7.0 * U @ torch.diag(S) @ Vt)
    inside = U.mT @ made @ Vt.mT
    after = inside.diagonal()
    assert after.min() > 0.6 and after.max() < 1.3
    torch.testing.assert_close(inside, torch.diag(after), atol=1e-4, rtol=0)


def test_more_steps_reach_smaller_singular_values():
    M = torch.diag(torch.tensor([1.0, 1e-4]))
    assert orthogonalize(M, 5)[1, 1] < 0.1
    assert 0.6 < orthogonalize(M, 9)[1, 1] < 1.3


def test_tall_is_the_transpose_of_wide():
    M = randn(12, 5)
    torch.testing.assert_close(orthogonalize(M), orthogonalize(M.mT).mT)


def test_a_batch_is_each_alone_whatever_the_sizes():
    M = randn(2, 3, 6, 9) * torch.tensor([1.0, 100.0, 1e-3]).view(3, 1, 1)
    made = orthogonalize(M)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(made[i, j], orthogonalize(M[i, j]), atol=1e-5, rtol=1e-4)


def test_the_scale_does_not_matter_and_zero_stays_zero():
    M = randn(6, 9)
    torch.testing.assert_close(orthogonalize(1e-4 * M), orthogonalize(M), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(orthogonalize(1e4 * M), orthogonalize(M), atol=1e-4, rtol=1e-3)
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_the_input_is_kept_and_the_dtype_too():
    M = randn(6, 9)
    before = M.clone()
    orthogonalize(M)
    assert torch.equal(M, before)
    assert orthogonalize(M.bfloat16()).dtype == torch.bfloat16
    rough = orthogonalize(M, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32 and 0 < furthest([rough], [orthogonalize(M)]) < 0.05


# ── Muon against torch's ─────────────────────────────────────────────────────────────────────────────────


def side_by_side(steps: int = 6):
    ours, theirs, start = parameters(), parameters(), parameters()
    group = {"params": ours, "lr": 0.02, "weight_decay": 0.1, "muon": True}
    one = Muon([group], momentum=0.9)
    two = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(steps):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one.step()
        two.step()
        yield furthest(ours, theirs), furthest(ours, start)


@needs_torch_muon
def test_every_step_is_torchs_but_for_its_sixteen_bits():
    for apart, moved in side_by_side():
        assert apart < 0.05 * moved


@needs_torch_muon
def test_with_torchs_newton_schulz_in_fp32_every_step_is_the_same(monkeypatch):
    import torch.optim._muon as theirs

    if not hasattr(theirs, "_zeropower_via_newtonschulz"):
        pytest.skip("this torch has moved its Newton–Schulz")
    monkeypatch.setattr(
        theirs, "_zeropower_via_newtonschulz", lambda g, _, steps, eps: orthogonalize(g, steps)
    )
    for apart, moved in side_by_side():
        assert apart < 1e-5 < moved


def test_shapes_that_go_together_step_as_if_alone():
    together, alone = parameters(), parameters()
    optimizers = [Muon([{"params": together, "lr": 0.02, "weight_decay": 0.1, "muon": True}])]
    optimizers += [Muon([{"params": [p], "lr": 0.02, "weight_decay": 0.1, "muon": True}]) for p in alone]
    for step in range(3):
        give_gradients(together, step)
        give_gradients(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    assert furthest(together, alone) < 1e-6


def test_a_stack_steps_as_its_matrices_would():
    """Wide, tall, and two stacks of one shape; a stack of more matrices than they have rows steps no further."""
    stacks = parameters([(3, 6, 9), (12, 9, 6), (3, 6, 9)])
    slices = [nn.Parameter(matrix.detach().clone()) for stack in stacks for matrix in stack]
    start = [matrix.detach().clone() for matrix in slices]
    how = {"lr": 0.02, "weight_decay": 0.1, "muon": True}
    stacked, apart = Muon([{"params": stacks, **how}]), Muon([{"params": slices, **how}])
    for step in range(4):
        give_gradients(stacks, step)
        for matrix, gradient in zip(slices, [g for p in stacks for g in p.grad], strict=True):
            matrix.grad = gradient.clone()
        stacked.step()
        apart.step()
        assert furthest([matrix for stack in stacks for matrix in stack], slices) < 1e-6
    assert min((a - b).abs().max().item() for a, b in zip(slices, start, strict=True)) > 0.01


def test_a_parameter_without_a_gradient_stays():
    first, second = parameters([(4, 6), (4, 6)])
    before = second.detach().clone()
    optimizer = Muon([{"params": [first, second], "lr": 0.1, "weight_decay": 0.5, "muon": True}])
    first.grad = randn(4, 6)
    optimizer.step()
    assert torch.equal(second, before) and second not in optimizer.state


def test_a_closure_is_called_and_its_loss_handed_back():
    (p,) = parameters([(4, 6)])
    optimizer = Muon([{"params": [p], "lr": 0.1, "weight_decay": 0.0, "muon": True}])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


# ── AdamW for the rest ───────────────────────────────────────────────────────────────────────────────────


def test_the_rest_is_torchs_adamw():
    shapes = [(7, 5), (5,), (3,)]
    ours, theirs = parameters(shapes), parameters(shapes)
    one = Muon([{"params": ours, "lr": 0.03, "weight_decay": 0.2, "muon": False}], betas=(0.8, 0.9), eps=1e-6)
    two = torch.optim.AdamW(theirs, lr=0.03, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    for step in range(6):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one.step()
        two.step()
        assert furthest(ours, theirs) < 1e-5


# ── Groups ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("changes", [
    {"tie_embeddings": True}, {"tie_embeddings": False}, {"qk_norm": True},
    {"rope": False, "norm": "layernorm", "mlp": "gelu_tanh", "bias": True},
], ids=["tied", "untied", "qk-norm", "gpt2"])  # fmt: skip
def test_every_parameter_is_in_one_group(changes):
    model = build(**changes)
    matrices, tables, vectors = groups = muon_groups(model, 0.02, 0.003, 0.1)
    counts = Counter(id(p) for group in groups for p in group["params"])
    assert counts == Counter(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].startswith("blocks.") and p.ndim == 2 for p in matrices["params"])
    assert all(not names[id(p)].startswith("blocks.") and p.ndim == 2 for p in tables["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    assert len(tables["params"]) >= 1 + (not model.config.tie_embeddings)
    assert [g["muon"] for g in groups] == [True, False, False]
    assert [g["lr"] for g in groups] == [0.02, 0.003, 0.003]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]


@pytest.mark.parametrize("stacked", FORMS.values(), ids=FORMS)
def test_experts_are_matrices_in_the_blocks(stacked):
    model = Transformer(build().config, lambda layer: Experts(16, 8, 3, stacked=stacked))
    optimizer = build_optimizer(model, "muon", lr=0.003, matrix_lr=0.02)
    counts = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    assert counts == Counter(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, tables, vectors = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    experts = ("gate", "up", "down") if stacked else [f"experts.{e}.down.weight" for e in range(3)]
    assert {f"blocks.1.mlp.{name}" for name in (*experts, "router.weight", "shared.down.weight")} < matrices
    assert tables == {"tokens.weight"} and "blocks.0.mlp.router.bias" in vectors
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give_gradients(list(model.parameters()), 0)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_frozen_parameters_are_left_out():
    model = build()
    model.tokens.weight.requires_grad_(False)
    listed = [id(p) for group in muon_groups(model, 0.02, 0.003) for p in group["params"]]
    assert id(model.tokens.weight) not in listed and len(listed) == len(list(model.parameters())) - 1


def test_the_state_survives_a_round_trip():
    def steps(model, optimizer, first, n):
        for step in range(first, first + n):
            give_gradients(list(model.parameters()), step)
            optimizer.step()

    straight = build()
    optimizer = Muon(muon_groups(straight, 0.02, 0.003))
    steps(straight, optimizer, 0, 3)
    resumed = copy.deepcopy(straight)
    saved = copy.deepcopy(optimizer.state_dict())
    steps(straight, optimizer, 3, 3)

    again = Muon(muon_groups(resumed, 0.9, 0.9))
    again.load_state_dict(saved)
    steps(resumed, again, 3, 3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


# ── The ladder ───────────────────────────────────────────────────────────────────────────────────────────

NAMED = [{"norm", "bias"}, {"rope"}, {"mlp"}, {"qk_norm"}, set()]


def test_each_rung_changes_what_its_name_says_and_nothing_else():
    assert len(RUNGS) == len(NAMED) + 1
    for below, rung, named in zip(RUNGS, RUNGS[1:], NAMED, strict=False):
        a, b = asdict(below.model), asdict(rung.model)
        assert {key for key in a if a[key] != b[key]} == named, rung.name
        assert below.batch_size == rung.batch_size
    assert all(rung.training == RUNGS[0].training and rung.muon_lr is None for rung in RUNGS[:-1])
    assert RUNGS[-1].muon_lr is not None


def test_the_stored_run_is_whole_and_fair():
    results = measured()
    seeds = {r.seed for r in results}
    assert len(seeds) >= 3
    assert Counter((r.rung, r.seed) for r in results) == Counter((g.name, s) for g in RUNGS for s in seeds)
    for seed in seeds:
        mine = [r for r in results if r.seed == seed]
        assert len({r.machine for r in mine}) == 1
        assert max(r.seconds for r in mine) < 1.05 * min(r.seconds for r in mine)
    parameters = {g.name: g.make_model().num_params() for g in RUNGS}
    assert all(r.parameters == parameters[r.rung] for r in results), "the run is of other models: repeat it"


def test_one_rung_for_a_second():
    text = b"O Romeo, Romeo, wherefore art thou Romeo?\n" * 200
    result = climb_one(RUNGS[-1], seconds=1.0, seed=3, text=text, max_windows=4)
    assert (result.rung, result.seed) == (RUNGS[-1].name, 3)
    assert result.steps >= 1 and result.tokens == result.steps * RUNGS[-1].batch_size * 128
    assert 0 < result.loss < 6 and result.parameters == RUNGS[-1].make_model().num_params()
