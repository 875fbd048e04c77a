"""Lesson 2.4: the optimizer, the schedule and the loop."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.train import loop
from tutorial_lib.train.loop import StepInfo, TrainConfig, make_optimizer, train, train_step
from tutorial_lib.train.losses import lm_loss
from tutorial_lib.train.optim import AdamW, decay_groups
from tutorial_lib.train.sched import warmup_cosine

VOCAB, T = 11, 6


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(seed: int = 0, **how) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=VOCAB, max_seq_len=T, d_model=16, n_heads=2, n_layers=1, **how))


def batch(seed: int = 0, batch_size: int = 4):
    ids = torch.randint(VOCAB, (batch_size, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def batches(n: int | None = None):
    return (batch(i) for i in (itertools.count() if n is None else range(n)))


def vector(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ── AdamW ────────────────────────────────────────────────────────────────────────────────────────────────

shapes = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None)
@given(
    shapes=shapes,
    n_groups=st.integers(1, 3),
    lr=st.floats(1e-5, 0.3),
    beta1=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    beta2=st.sampled_from([0.0, 0.9, 0.95, 0.999]),
    eps=st.sampled_from([1e-8, 1e-3]),
    decay=st.sampled_from([0.0, 0.01, 0.5]),
    p_missing=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_adamw_equals_torchs(shapes, n_groups, lr, beta1, beta2, eps, decay, p_missing, seed):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = [], []
    for number in range(n_groups):
        start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        how = {"lr": lr * (number + 1), "weight_decay": decay * number} if number else {}
        for groups in (ours, theirs):
            groups.append({"params": [nn.Parameter(w.clone()) for w in start], **how})
    settings_ = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
    optimizers = AdamW(ours, **settings_), torch.optim.AdamW(theirs, **settings_)
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            for p, q in zip(a["params"], b["params"], strict=True):
                missing = torch.rand((), generator=generator) < p_missing
                grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.grad, q.grad = (None, None) if missing else (grad, grad.clone())
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_adamw_leaves_a_parameter_without_gradient_alone():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3)) and unused not in optimizer.state
    assert (used < 1).all()


def test_adamw_first_step_is_one_lr_long_whatever_the_scale():
    for scale in (1e-3, 1.0, 1e6):
        w = nn.Parameter(torch.zeros(2))
        optimizer = AdamW([w], lr=0.1, weight_decay=0.0)
        w.grad = torch.tensor([scale, -scale])
        optimizer.step()
        torch.testing.assert_close(w.detach(), torch.tensor([-0.1, 0.1]), rtol=1e-4, atol=0)


def test_adamw_does_not_change_the_gradient():
    w = nn.Parameter(torch.ones(4))
    w.grad = torch.randn(4)
    before = w.grad.clone()
    AdamW([w], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(w.grad, before)


def test_adamw_state_can_be_saved_and_loaded():
    one = tiny()
    first = AdamW(one.parameters(), lr=0.01)
    for i in range(3):
        train_step(one, first, *batch(i), 1.0)
    two = copy.deepcopy(one)
    second = AdamW(two.parameters(), lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for i in range(3, 6):
        assert train_step(one, first, *batch(i), 1.0) == train_step(two, second, *batch(i), 1.0)
    assert torch.equal(vector(one), vector(two))


def test_adamw_closure_may_use_gradients():
    w = nn.Parameter(torch.ones(1))
    optimizer = AdamW([w], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert w.item() < 1


# ── decay_groups ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_decay_groups_hold_every_parameter_once(tie, bias):
    model = tiny(tie_embeddings=tie, bias=bias)
    decayed, kept = decay_groups(model, 0.3)
    ids = [id(p) for p in decayed["params"] + kept["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}
    assert decayed["weight_decay"] == 0.3 and kept["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"])
    undecayed = {id(p) for p in kept["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in undecayed) == ("norm" in name or name.endswith("bias")), name


def test_decay_groups_leave_frozen_parameters_out():
    model = tiny()
    model.tokens.weight.requires_grad_(False)
    ids = [id(p) for group in decay_groups(model, 0.1) for p in group["params"]]
    assert id(model.tokens.weight) not in ids


def test_a_group_may_be_empty():
    model = nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB, bias=False))
    info = train(model, batches(), TrainConfig(steps=2))
    assert info.step == 2


# ── warmup_cosine ────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(warmup=st.floats(0, 0.99), floor=st.floats(0, 1))
def test_warmup_cosine_rises_then_falls_to_the_floor(warmup, floor):
    points = [i / 500 for i in range(501)]
    factors = [warmup_cosine(p, warmup, floor) for p in points]
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    rising = [f for p, f in zip(points, factors, strict=True) if p < warmup]
    falling = [f for p, f in zip(points, factors, strict=True) if p >= warmup]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(falling))
    assert all(f >= floor - 1e-12 for f in falling)
    assert warmup_cosine(1.0, warmup, floor) == pytest.approx(floor)
    assert warmup_cosine(1.7, warmup, floor) == pytest.approx(floor)
    assert warmup_cosine(warmup, warmup, floor) == pytest.approx(1.0)


def test_warmup_cosine_by_hand():
    assert warmup_cosine(0.025) == pytest.approx(0.5)
    assert warmup_cosine(0.525) == pytest.approx(0.55)  # the middle of the descent
    assert warmup_cosine(0.0) == 0.0


def test_warmup_cosine_without_and_with_nothing_but_warmup():
    assert warmup_cosine(0.0, warmup=0.0) == 1.0
    assert warmup_cosine(1.0, warmup=0.0, floor=0.2) == pytest.approx(0.2)
    assert warmup_cosine(0.0, warmup=1.0) == 0.0
    assert warmup_cosine(0.75, warmup=1.0) == 0.75
    assert warmup_cosine(1.0, warmup=1.0, floor=0.2) == 0.2


# ── train_step ───────────────────────────────────────────────────────────────────────────────────────────


def test_train_step_tells_the_loss_before_the_step_and_the_norm_before_the_clip():
    model = tiny()
    loss = lm_loss(model(batch()[0]), batch()[1])
    grads = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    told = train_step(model, optimizer, *batch(), grad_clip=norm / 10)
    assert told == pytest.approx((loss.item(), norm), rel=1e-5)
    assert all(type(x) is float for x in told)


@pytest.mark.parametrize("clip", [1e-3, 0.1])
def test_the_clip_bounds_the_update(clip):
    model = tiny()
    before = vector(model)
    _, norm = train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), *batch(), clip)
    assert norm > clip
    assert (vector(model) - before).norm().item() == pytest.approx(clip, rel=1e-3)


def test_a_small_gradient_is_not_clipped():
    one, two = tiny(), tiny()
    for model, clip in ((one, 1e6), (two, 1e9)):
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), *batch(), clip)
    assert torch.equal(vector(one), vector(two))


def test_gradients_do_not_add_up():
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    told = {train_step(model, optimizer, *batch(), 1.0) for _ in range(3)}
    assert len(told) == 1


# ── train ────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_takes_the_steps_and_tells_about_each():
    seen: list[StepInfo] = []
    info = train(tiny(), batches(), TrainConfig(steps=7), [seen.append])
    assert [i.step for i in seen] == list(range(1, 8))
    assert info == seen[-1]
    assert [i.tokens for i in seen] == [4 * T * step for step in range(1, 8)]
    assert [i.progress for i in seen] == pytest.approx([step / 7 for step in range(1, 8)])
    assert all(b.seconds >= a.seconds >= 0 for a, b in itertools.pairwise(seen))
    assert all(math.isfinite(i.loss) and i.grad_norm > 0 for i in seen)


def test_it_does_not_read_a_batch_that_it_will_not_use():
    stream = batches()
    train(tiny(), stream, TrainConfig(steps=3))
    assert torch.equal(next(stream)[0], batch(3)[0])


def test_it_stops_when_the_data_end():
    assert train(tiny(), batches(3), TrainConfig(steps=10)).step == 3
    assert train(tiny(), [batch(0), batch(1)], TrainConfig(steps=10)).step == 2


def test_no_data_no_step():
    model = tiny()
    before = vector(model)
    assert train(model, [], TrainConfig(steps=10)) is None
    assert torch.equal(vector(model), before)


def test_it_stops_when_a_callback_says_so_and_tells_all_the_others():
    first, last = [], []
    stop_at_4 = lambda info: info.step == 4  # noqa: E731
    callbacks = [lambda info: first.append(info.step), stop_at_4, lambda info: last.append(info.step)]
    info = train(tiny(), batches(), TrainConfig(steps=10), callbacks)
    assert info.step == 4
    assert first == last == [1, 2, 3, 4]


def test_callbacks_may_come_from_an_iterator():
    seen = []
    train(tiny(), batches(), TrainConfig(steps=3), (f for f in [lambda info: seen.append(info.step)]))
    assert seen == [1, 2, 3]


class Clock:
    """A clock that moves on by `tick` at every look."""

    def __init__(self, tick: float = 1.0) -> None:
        self.now, self.tick = 0.0, tick

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now


def test_it_stops_after_max_seconds_and_the_schedule_follows_the_clock(monkeypatch):
    monkeypatch.setattr(loop, "time", Clock())  # two looks a step: every step takes one second
    seen: list[StepInfo] = []
    config = TrainConfig(steps=1000, max_seconds=10, lr=1.0, warmup=0.2, lr_floor=0.1)
    info = train(tiny(), batches(), config, [seen.append])
    assert info.step == 10 and info.seconds == 10 and info.progress == 1.0
    expected = [warmup_cosine(max(s / 10, (s + 0.5) / 1000), 0.2, 0.1) for s in range(10)]
    assert [i.lr for i in seen] == pytest.approx(expected)


def test_the_time_spent_in_callbacks_is_not_training_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)

    def slow(info: StepInfo) -> None:
        clock.now += 100

    assert train(tiny(), batches(), TrainConfig(steps=2), [slow]).seconds == 2


def test_the_rate_follows_the_schedule_and_is_never_zero():
    rates = []
    train(tiny(), batches(), TrainConfig(steps=20, lr=0.01), [lambda info: rates.append(info.lr)])
    assert rates == pytest.approx([0.01 * warmup_cosine((s - 0.5) / 20) for s in range(1, 21)])
    assert rates[0] > 0
    for steps in (1, 2, 1000):
        first = train(tiny(), batches(1), TrainConfig(steps=steps))
        assert first.lr > 0


def test_every_group_has_its_own_peak():
    model = tiny()
    matrices, vectors = (group["params"] for group in decay_groups(model, 0.0))
    optimizer = torch.optim.SGD([{"params": matrices, "lr": 0.1}, {"params": vectors, "lr": 0.02}])
    rates = []
    train(
        model,
        batches(),
        TrainConfig(steps=5, lr=123.0),
        [lambda info: rates.append([group["lr"] for group in optimizer.param_groups])],
        optimizer=optimizer,
        schedule=lambda progress: 1 - progress,
    )
    expected = [[0.1 * (1 - (s - 0.5) / 5), 0.02 * (1 - (s - 0.5) / 5)] for s in range(1, 6)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


def test_training_on_with_the_same_optimizer_keeps_its_peak():
    model, rates = tiny(), []
    optimizer = make_optimizer(model, TrainConfig(lr=0.01))
    for _ in range(2):
        train(model, batches(), TrainConfig(steps=5), [lambda i: rates.append(i.lr)], optimizer=optimizer)
    assert rates[:5] == rates[5:]
    fresh = make_optimizer(model, TrainConfig(lr=0.5))
    fresh.load_state_dict(optimizer.state_dict())  # as from a checkpoint
    info = train(model, batches(), TrainConfig(steps=5), optimizer=fresh)
    assert info.lr == rates[4]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_same_seed_gives_the_same_bits(dropout):
    results = []
    for _ in range(2):
        model = tiny(seed=3, dropout=dropout)
        train(model, batches(), TrainConfig(steps=6, lr=0.01))
        results.append(vector(model))
    assert torch.equal(*results)
    other = tiny(seed=4, dropout=dropout)
    train(other, batches(), TrainConfig(steps=6, lr=0.01))
    assert not torch.equal(results[0], vector(other))


def test_every_step_is_in_training_mode_whatever_a_callback_did():
    modes, model = [], tiny().eval()
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    train(model, batches(), TrainConfig(steps=3), [lambda info: model.eval() and None])
    assert modes == [True, True, True]


def test_labels_that_do_not_count_do_not_train():
    inputs, labels = batch()
    masked = labels.clone()
    masked[:, : T // 2] = -100
    other = labels.clone()
    other[:, : T // 2] = (labels[:, : T // 2] + 1) % VOCAB
    other_masked = other.clone()
    other_masked[:, : T // 2] = -100
    one, two = tiny(), tiny()
    train(one, [(inputs, masked)], TrainConfig(steps=1))
    train(two, [(inputs, other_masked)], TrainConfig(steps=1))
    assert torch.equal(vector(one), vector(two))


@pytest.mark.parametrize("optimizer", [None, AdamW])
def test_it_overfits_one_batch(optimizer):
    model = tiny()
    config = TrainConfig(steps=150, lr=0.02)
    if optimizer is not None:
        optimizer = optimizer(decay_groups(model, config.weight_decay), lr=config.lr, betas=config.betas)
    losses = []
    fixed = itertools.repeat(batch(batch_size=2))
    train(model, fixed, config, [lambda info: losses.append(info.loss)], optimizer=optimizer)
    assert abs(losses[0] - math.log(VOCAB)) < 0.5
    assert losses[-1] < 0.1


def test_make_optimizer_follows_the_config():
    optimizer = make_optimizer(tiny(), TrainConfig(lr=0.5, betas=(0.1, 0.2), weight_decay=0.3))
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == 0.3 and vectors["weight_decay"] == 0.0
    assert all(g["lr"] == 0.5 and tuple(g["betas"]) == (0.1, 0.2) for g in optimizer.param_groups)
