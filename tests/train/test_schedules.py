"""Schedules by name, the range test, and optimizers with every parameter in its group."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tutorial_lib.checks.probes import fill_by_name, randn
from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.train.loop import TrainConfig, make_optimizer, train
from tutorial_lib.train.losses import lm_loss
from tutorial_lib.train.muon import Muon
from tutorial_lib.train.optim import AdamW
from tutorial_lib.train.optimizers import OPTIMIZERS, build_optimizer
from tutorial_lib.train.sched import warmup_cosine
from tutorial_lib.train.schedules import SCHEDULES, constant, linear, range_test, wsd

each_schedule = pytest.mark.parametrize("name", SCHEDULES)
fraction = st.floats(0, 1)


# ── Schedules ────────────────────────────────────────────────────────────────────────────────────────────


def test_each_name_is_its_schedule():
    assert SCHEDULES == {"cosine": warmup_cosine, "linear": linear, "wsd": wsd, "constant": constant}


@each_schedule
@given(progress=st.floats(0, 3), warmup=fraction, floor=fraction)
def test_between_zero_and_one_wherever(name, progress, warmup, floor):
    factor = SCHEDULES[name](progress, warmup, floor)
    assert 0 <= factor <= 1 + 1e-12
    if progress >= warmup:
        assert factor >= floor - 1e-12


@each_schedule
@given(warmup=st.floats(0.01, 0.8), floor=fraction, inside=fraction)
def test_all_warm_up_in_the_same_line(name, warmup, floor, inside):
    assert SCHEDULES[name](inside * warmup, warmup, floor) == pytest.approx(inside)


@each_schedule
def test_never_up_again_after_the_warmup_and_at_the_floor_in_the_end(name):
    factors = [SCHEDULES[name](0.1 + 0.9 * i / 200, 0.1, 0.2) for i in range(201)]
    assert factors[0] == 1 and factors == sorted(factors, reverse=True)
    end = 1.0 if name == "constant" else 0.2
    assert all(SCHEDULES[name](p, 0.1, 0.2) == pytest.approx(end) for p in (1.0, 1.2, 9.0))


@each_schedule
def test_without_a_warmup_it_begins_at_the_top(name):
    assert SCHEDULES[name](0.0, 0.0, 0.1) == 1


@each_schedule
def test_no_schedule_jumps(name):
    factors = [SCHEDULES[name](i / 10_000, 0.05, 0.1) for i in range(10_001)]
    jump = max(abs(a - b) for a, b in zip(factors, factors[1:], strict=False))
    assert jump < (0.03 if name == "wsd" else 0.003)  # a root is steep where it begins


def test_linear_by_hand():
    assert [linear(p, 0.2, 0.0) for p in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1, 0.5, 0])
    assert linear(0.6, 0.2, 0.5) == pytest.approx(0.75)


def test_wsd_by_hand():
    points = [0.1, 0.2, 0.5, 0.6, 0.7, 0.9, 1.0]
    expected = [0.5, 1, 1, 1, 0.5, 1 - math.sqrt(0.75), 0]
    assert [wsd(p, 0.2, 0.0, decay=0.4) for p in points] == pytest.approx(expected)
    assert wsd(0.7, 0.2, 0.5, decay=0.4) == pytest.approx(0.75)


@given(progress=st.floats(0.05, 1), decay=st.floats(0.01, 0.9))
def test_wsd_is_constant_until_it_decays(progress, decay):
    if progress <= 1 - decay:
        assert wsd(progress, 0.05, 0.0, decay) == 1
    elif progress > 1 - decay + 1e-6:
        assert wsd(progress, 0.05, 0.0, decay) < 1


def test_wsd_without_a_decay_stays_and_with_no_room_for_a_plateau_is_a_tent():
    assert wsd(1.0, 0.1, 0.0, decay=0.0) == 1
    tent = [wsd(i / 100, 0.6, 0.0, decay=0.8) for i in range(101)]
    top = tent.index(max(tent))
    assert tent[: top + 1] == sorted(tent[: top + 1]) and tent[top:] == sorted(tent[top:], reverse=True)
    assert tent[-1] == 0


@each_schedule
def test_the_loop_follows_every_schedule(name):
    rates = []
    model, batches = tiny(), forever()
    train(model, batches, TrainConfig(steps=10, lr=0.01), [lambda info: rates.append(info.lr)],
          schedule=lambda progress: SCHEDULES[name](progress, 0.2, 0.1))  # fmt: skip
    assert rates == pytest.approx([0.01 * SCHEDULES[name]((s + 0.5) / 10, 0.2, 0.1) for s in range(10)])
    assert all(rate > 0 for rate in rates)


# ── The range test ───────────────────────────────────────────────────────────────────────────────────────


def tiny(dropout: float = 0.0, **changes) -> Transformer:
    shape = {"vocab_size": 13, "max_seq_len": 8, "d_model": 16, "n_heads": 2, "n_layers": 1}
    torch.manual_seed(0)
    return Transformer(ModelConfig(**shape | changes, dropout=dropout))


def forever():
    generator = torch.Generator().manual_seed(1)
    while True:
        ids = torch.randint(13, (4, 9), generator=generator)
        yield ids[:, :-1], ids[:, 1:]


def test_the_rate_climbs_by_the_same_factor():
    found = range_test(tiny(), forever(), build_optimizer, 1e-6, 1e-3, steps=16)
    rates = [rate for rate, _ in found]
    assert rates[0] == pytest.approx(1e-6) and rates[-1] == pytest.approx(1e-3) and len(rates) == 16
    assert [b / a for a, b in zip(rates, rates[1:], strict=False)] == pytest.approx([1000 ** (1 / 15)] * 15)


def test_its_losses_are_those_of_a_loop_by_hand():
    model, batches = tiny(), forever()
    found = range_test(model, forever(), lambda m: torch.optim.SGD(m.parameters(), lr=5.0), 0.01, 0.1, 6, 1e9)
    for i, (_, found_loss) in enumerate(found):
        inputs, labels = next(batches)
        loss = lm_loss(model(inputs), labels)
        assert found_loss == pytest.approx(loss.item(), rel=1e-4)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * 10 ** (i / 5) * p.grad
    assert len(found) == 6


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_changes(training):
    model = tiny(dropout=0.3).train(training)
    model.tokens.weight.requires_grad_(False)
    optimizer = build_optimizer(model)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    generator = torch.get_rng_state()
    range_test(model, forever(), build_optimizer, 1e-3, 10.0, steps=30)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer.state_dict() == state and model.training is training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())
    assert not model.tokens.weight.requires_grad and model.head.weight is model.tokens.weight


def test_the_model_survives_an_error_in_the_middle():
    model = tiny()
    before = copy.deepcopy(model.state_dict())

    def breaks():
        yield next(forever())
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="disk"):
        range_test(model, breaks(), build_optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_stops_when_the_loss_blows_up():
    sgd = range_test(tiny(), forever(), lambda m: torch.optim.SGD(m.parameters(), 1.0), 1e-2, 1e6, 200, 1e9)
    losses = [loss for _, loss in sgd]
    assert len(sgd) < 200
    assert not losses[-1] <= 2 * min(losses) or not math.isfinite(losses[-1])
    assert all(loss <= 2 * min(losses[: i + 1]) for i, loss in enumerate(losses[:-1]))


def test_it_stops_at_a_loss_that_is_no_number_even_the_first():
    model = tiny()
    with torch.no_grad():
        model.tokens.weight.fill_(math.inf)
    assert len(range_test(model, forever(), build_optimizer)) == 1


def test_groups_keep_their_ratio():
    seen = []

    def watched(model):
        optimizer = build_optimizer(model, "muon", lr=0.001, matrix_lr=0.01)
        step = optimizer.step
        optimizer.step = lambda: (seen.append([group["lr"] for group in optimizer.param_groups]), step())[1]
        return optimizer

    found = range_test(tiny(), forever(), watched, 1e-5, 1e-2, steps=5)
    for (rate, _), (matrices, tables, vectors) in zip(found, seen, strict=True):
        assert matrices == pytest.approx(rate) and tables == vectors == pytest.approx(rate / 10)


def test_it_ends_with_the_batches_and_takes_no_more_than_it_needs():
    two = [batch for batch, _ in zip(forever(), range(2), strict=False)]
    assert len(range_test(tiny(), two, build_optimizer)) == 2
    batches = iter([two[0]] * 5)
    range_test(tiny(), batches, build_optimizer, steps=3)
    assert len(list(batches)) == 2


@pytest.mark.parametrize("wrong", [{"low": 0.0}, {"low": 1.0, "high": 0.1}, {"steps": 1}])
def test_a_range_that_is_none(wrong):
    with pytest.raises(ValueError, match="0 < low < high"):
        range_test(tiny(), forever(), build_optimizer, **wrong)


# ── Optimizers ───────────────────────────────────────────────────────────────────────────────────────────

MODELS = {
    "tied": tiny,
    "untied": lambda: tiny(tie_embeddings=False),
    "gpt2": lambda: tiny(rope=False, norm="layernorm", mlp="gelu_tanh", bias=True),
    "qk-norm, two layers": lambda: tiny(qk_norm=True, n_layers=2, n_kv_heads=1),
    "frozen table": lambda: _frozen(tiny(tie_embeddings=False)),
    "Part 2's GPT": lambda: GPT(GPTConfig(vocab_size=13, max_seq_len=8, d_model=16, n_heads=2, n_layers=1)),
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))


def _frozen(model):
    model.tokens.weight.requires_grad_(False)
    return model


@each_model
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_trainable_parameter_is_in_exactly_one_group(make, kind):
    model = make()
    groups = build_optimizer(model, kind).param_groups
    counts = Counter(id(p) for group in groups for p in group["params"])
    assert counts == Counter({id(p): 1 for p in model.parameters() if p.requires_grad})


@each_model
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_decays_and_at_which_rate(make, kind):
    model = make()
    optimizer = build_optimizer(model, kind, lr=0.003, weight_decay=0.25, matrix_lr=0.02)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        group = of[id(p)]
        assert group["weight_decay"] == (0.25 if p.ndim >= 2 else 0.0), name
        by_muon = kind == "muon" and name.startswith("blocks.") and p.ndim == 2
        assert group["lr"] == (0.02 if by_muon else 0.003), name
        assert group.get("muon", False) == by_muon, name


def test_matrix_lr_defaults_to_lr():
    assert {group["lr"] for group in build_optimizer(tiny(), "muon", lr=0.007).param_groups} == {0.007}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_betas_and_momentum_reach_the_optimizer(kind):
    optimizer = build_optimizer(tiny(), kind, betas=(0.7, 0.8), momentum=0.6)
    assert all(group["betas"] == (0.7, 0.8) for group in optimizer.param_groups)
    if kind == "muon":
        assert isinstance(optimizer, Muon) and all(g["momentum"] == 0.6 for g in optimizer.param_groups)
    else:
        assert type(optimizer) is torch.optim.AdamW


def test_adamw_is_part_2s_optimizer_and_lesson_2_4s_rule():
    one, two, three = tiny(), tiny(), tiny()
    config = TrainConfig(lr=0.01)
    rules = [build_optimizer(one, lr=0.01), make_optimizer(two, config)]
    rules += [AdamW(build_optimizer(three).param_groups, lr=0.01)]
    for group in rules[2].param_groups:
        group["lr"] = 0.01
    for step in range(5):
        for model, rule in zip((one, two, three), rules, strict=True):
            for i, p in enumerate(model.parameters()):
                p.grad = randn(*p.shape, seed=100 * step + i)
            rule.step()
    for a, b, c in zip(one.parameters(), two.parameters(), three.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in 2.9")
def test_muon_is_torchs_muon_with_adamw_beside_it():
    ours, theirs = fill_by_name(tiny(), 0.1), fill_by_name(tiny(), 0.1)
    one = build_optimizer(ours, "muon", lr=0.003, matrix_lr=0.02)
    matrices, *rest = build_optimizer(theirs, "muon", lr=0.003, matrix_lr=0.02).param_groups
    two = torch.optim.Muon(matrices["params"], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    three = torch.optim.AdamW([{k: group[k] for k in ("params", "lr", "weight_decay")} for group in rest],
                              betas=(0.9, 0.95))  # fmt: skip
    start = [p.detach().clone() for p in ours.parameters()]
    for step in range(3):
        for model in (ours, theirs):
            for i, p in enumerate(model.parameters()):
                p.grad = randn(*p.shape, seed=100 * step + i)
        for optimizer in (one, two, three):
            optimizer.step()
    for a, b, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        assert (a - b).norm() < 0.02 * (a - before).norm()  # torch's Muon iterates in bf16


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_learns(kind):
    model, (inputs, labels) = tiny(), next(forever())
    optimizer = build_optimizer(model, kind, lr=0.01)
    for _ in range(60):
        loss = lm_loss(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert lm_loss(model(inputs), labels) < 1.5


@pytest.mark.parametrize(("kind", "near"), [("adam", "adamw"), ("Muon", "muon"), ("mu0n", "muon")])
def test_an_unknown_kind_names_the_nearest(kind, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        build_optimizer(tiny(), kind)


def test_muon_on_a_wrapper_is_refused():
    with pytest.raises(ValueError, match=r"no matrices in model\.blocks"):
        build_optimizer(nn.Sequential(tiny()), "muon")
