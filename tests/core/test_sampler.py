"""Sampling: what each filter keeps, that it agrees with `transformers`, and that the loop can be trusted."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.core.sampler import (
    apply_temperature,
    generate,
    repetition_penalty,
    sample,
    top_k_filter,
    top_p_filter,
)

NEVER = float("-inf")
few = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 10**6)
sizes = st.integers(2, 40)


def logits_of(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def kept(filtered: Tensor) -> Tensor:
    return filtered > NEVER


def only_cuts(filtered: Tensor, logits: Tensor) -> bool:
    return bool((~kept(filtered) | (filtered == logits)).all())


def keeps_the_best(filtered: Tensor, logits: Tensor) -> bool:
    """Nothing that was cut is more likely than something that stays."""
    worst_kept = logits.masked_fill(~kept(filtered), math.inf).amin(-1)
    best_cut = logits.masked_fill(kept(filtered), -math.inf).amax(-1)
    return bool((best_cut <= worst_kept).all())


# ── Filters ──────────────────────────────────────────────────────────────────────────────────────────────


@few
@given(seeds, sizes, st.floats(0.05, 20))
def test_temperature_keeps_the_order_and_moves_the_entropy(seed, V, temperature):
    logits = logits_of(seed, 3, V)
    scaled = apply_temperature(logits, temperature)
    in_order = scaled.gather(-1, logits.argsort(dim=-1))
    assert (in_order.diff() >= 0).all()
    assert torch.equal(scaled.gather(-1, logits.argmax(-1, keepdim=True)), scaled.amax(-1, keepdim=True))

    def entropy(z: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=z.double()).entropy()

    change = entropy(scaled) - entropy(logits)
    assert (change >= -1e-6).all() if temperature >= 1 else (change <= 1e-6).all()


@few
@given(seeds, sizes, st.integers(1, 50))
def test_top_k_keeps_exactly_k_without_ties(seed, V, k):
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed)).float()
    logits = torch.stack([order, -order]) * 0.7 - 3
    filtered = top_k_filter(logits, k)
    assert (kept(filtered).sum(-1) == min(k, V)).all()
    assert only_cuts(filtered, logits) and keeps_the_best(filtered, logits)


@few
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.integers(1, 12))
def test_top_k_keeps_all_that_tie_for_the_last_place(values, k):
    logits = torch.tensor(values).float()
    least = sorted(values, reverse=True)[min(k, len(values)) - 1]
    assert kept(top_k_filter(logits, k)).tolist() == [v >= least for v in values]


@few
@given(seeds, sizes, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed, V, p):
    logits = logits_of(seed, 2, 3, V)
    filtered = top_p_filter(logits, p)
    assert only_cuts(filtered, logits) and keeps_the_best(filtered, logits)
    probs = logits.double().softmax(-1)
    mass = (probs * kept(filtered)).sum(-1)
    least = probs.masked_fill(~kept(filtered), math.inf).amin(-1)
    assert (mass >= p - 1e-5).all(), "the set must reach p"
    assert (mass - least < p + 1e-5).all(), "and without its least likely token it must not"
    assert kept(filtered).gather(-1, logits.argmax(-1, keepdim=True)).all(), "the first always stays"


@few
@given(seeds, st.floats(0, 1, exclude_min=True, exclude_max=True), st.floats(0, 1, exclude_min=True))
def test_a_larger_p_keeps_no_less(seed, p, q):
    logits = logits_of(seed, 30)
    small, large = sorted((p, q))
    assert (kept(top_p_filter(logits, small)) <= kept(top_p_filter(logits, large))).all()


def test_p_of_one_keeps_what_rounding_would_cut():
    logits = torch.tensor([[0.0, -20.0, -40.0], [5.0, 5.0, -30.0]])
    assert torch.equal(top_p_filter(logits, 1.0), logits)


def test_p_that_is_reached_exactly_is_enough():
    assert kept(top_p_filter(torch.zeros(4), 0.5)).sum() == 2
    assert kept(top_p_filter(torch.zeros(4), 0.51)).sum() == 3


@few
@given(seeds, sizes, st.floats(1.01, 5))
def test_penalty_lowers_what_was_written_and_leaves_the_rest(seed, V, penalty):
    logits = logits_of(seed, 2, V)
    previous = torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(seed + 1))
    after = repetition_penalty(logits, previous, penalty)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, previous, True)
    assert (after[seen] < logits[seen]).all()
    assert torch.equal(after[~seen], logits[~seen])
    repeated = repetition_penalty(logits, torch.cat([previous, previous], dim=1), penalty)
    assert torch.equal(repeated, after), "however often a token was written, it is penalized once"
    assert torch.equal(repetition_penalty(logits, previous, 1.0), logits)


@pytest.mark.parametrize(
    "call",
    [
        lambda z: apply_temperature(z, 0),
        lambda z: apply_temperature(z, -1),
        lambda z: top_k_filter(z, 0),
        lambda z: top_p_filter(z, 0),
        lambda z: top_p_filter(z, 1.1),
        lambda z: repetition_penalty(z, torch.zeros(1, 1, dtype=torch.long), 0),
        lambda z: sample(z, temperature=-0.5),
    ],
)
def test_impossible_settings_are_refused(call):
    with pytest.raises(ValueError, match=r"must|probability"):
        call(torch.zeros(1, 4))


def test_filters_leave_their_input_alone():
    logits, previous = logits_of(0, 2, 9), torch.tensor([[1, 2], [3, 3]])
    before = logits.clone()
    for changed in (
        apply_temperature(logits, 0.5),
        top_k_filter(logits, 2),
        top_p_filter(logits, 0.5),
        repetition_penalty(logits, previous, 1.5),
    ):
        assert not torch.equal(changed, logits)
        assert torch.equal(logits, before)


# ── The same as `transformers` ───────────────────────────────────────────────────────────────────────────


def test_agrees_with_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    for seed in range(20):
        logits = logits_of(seed, 3, 50)
        ids = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(seed))
        temperature, k, p, penalty = 0.3 + 0.1 * seed, 1 + 2 * seed, 0.05 + 0.045 * seed, 1.0 + 0.07 * seed
        ours_and_theirs = [
            (apply_temperature(logits, temperature), processors.TemperatureLogitsWarper(temperature)),
            (top_k_filter(logits, k), processors.TopKLogitsWarper(top_k=k)),
            (top_p_filter(logits, p), processors.TopPLogitsWarper(top_p=p)),
            (
                repetition_penalty(logits, ids, penalty),
                processors.RepetitionPenaltyLogitsProcessor(penalty=penalty),
            ),
        ]
        for ours, processor in ours_and_theirs:
            theirs = processor(ids, logits.clone())
            assert torch.equal(kept(ours), kept(theirs)), type(processor).__name__
            torch.testing.assert_close(ours, theirs, msg=type(processor).__name__)


def test_p_of_one_agrees_with_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = logits_of(0, 2, 1000, scale=8.0)
    theirs = processors.TopPLogitsWarper(top_p=1.0)(torch.zeros(2, 1, dtype=torch.long), logits.clone())
    assert torch.equal(top_p_filter(logits, 1.0), theirs)


# ── Drawing ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "penalty": 1.3},
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(how):
    """Pearson's statistic: its mean is the degrees of freedom; 4 standard deviations above is far out."""
    n, logits = 20_000, logits_of(1, 1, 8, scale=1.5)
    previous = torch.tensor([[0, 5]])
    expected = logits
    if "penalty" in how:
        expected = repetition_penalty(expected, previous, how["penalty"])
    expected = expected / how.get("temperature", 1.0)
    if "top_k" in how:
        expected = top_k_filter(expected, how["top_k"])
    if "top_p" in how:
        expected = top_p_filter(expected, how["top_p"])
    probs = expected.double().softmax(-1)[0]
    drawn = sample(
        logits.expand(n, -1), previous.expand(n, -1), generator=torch.Generator().manual_seed(0), **how
    )
    counts = drawn.bincount(minlength=8).double()
    possible = probs > 0
    assert counts[~possible].sum() == 0, "something was drawn that had been cut"
    freedom = int(possible.sum()) - 1
    statistic = ((counts - n * probs) ** 2 / (n * probs))[possible].sum().item()
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), f"{counts.tolist()} for {probs.tolist()}"


def test_temperature_zero_is_greedy_and_the_penalty_still_counts():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample(logits, temperature=0).tolist() == [1]
    assert sample(logits, torch.tensor([[1]]), temperature=0, penalty=2.0).tolist() == [2]
    assert sample(logits, top_k=1).tolist() == [1]
    assert sample(logits, top_p=0.01).tolist() == [1]


def test_sampling_leaves_the_global_generator_alone_when_given_one():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    sample(torch.zeros(4, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_fine(dtype):
    logits = logits_of(4, 64, 30).to(dtype)
    drawn = sample(logits, temperature=0.7, top_k=10, top_p=0.9, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (64,) and drawn.dtype == torch.int64


# ── The loop ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=17, max_seq_len=8, d_model=16, n_heads=2, n_layers=1, dropout=0.3))
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.3)
    return gpt.eval()


class Counts(nn.Module):
    """Sure that i + 1 follows i; notes what it was asked, and in which mode."""

    def __init__(self, max_seq_len: int = 4) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_seq_len=max_seq_len)
        self.lengths: list[int] = []
        self.modes: list[bool] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.lengths.append(ids.shape[1])
        self.modes.append(self.training)
        return 20.0 * nn.functional.one_hot((ids + 1) % 10, 10)


def write(model: nn.Module, ids: Tensor, n: int, seed: int | None = None, **how: object) -> Tensor:
    if seed is not None:
        how["generator"] = torch.Generator().manual_seed(seed)
    return torch.stack(list(generate(model, ids, n, **how)), dim=1)


def test_a_seed_repeats_the_text(model):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(write(model, ids, 30, seed=5), write(model, ids, 30, seed=5))
    assert not torch.equal(write(model, ids, 30, seed=5), write(model, ids, 30, seed=6))


@pytest.mark.parametrize("how", [{}, {"penalty": 1.5}], ids=str)
def test_a_batch_writes_what_each_row_writes_alone(model, how):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 7, 7]])
    together = write(model, ids, 20, temperature=0, **how)
    for row, expected in zip(ids, together, strict=True):
        assert torch.equal(write(model, row[None], 20, temperature=0, **how)[0], expected)


def test_greedy_equals_the_loop_written_out(model):
    ids = torch.tensor([[1, 2, 3]])
    expected = ids
    for _ in range(12):
        best = model(expected[:, -8:])[:, -1].argmax(-1)
        expected = torch.cat([expected, best[:, None]], dim=1)
    assert torch.equal(write(model, ids, 12, temperature=0), expected[:, 3:])


def test_the_context_is_cropped_to_its_end(model):
    counts = Counts(max_seq_len=4)
    assert write(counts, torch.tensor([[0, 1]]), 5, temperature=0).tolist() == [[2, 3, 4, 5, 6]]
    assert counts.lengths == [2, 3, 4, 4, 4]
    counts = Counts(max_seq_len=4)
    write(counts, torch.arange(6)[None], 2, max_seq_len=3, temperature=0)
    assert counts.lengths == [3, 3], "an explicit max_seq_len counts"
    long = torch.randint(17, (1, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(write(model, long, 5, temperature=0), write(model, long[:, -8:], 5, temperature=0))


def test_the_penalty_sees_what_the_model_no_longer_does():
    ids = torch.tensor([[5, 1, 1, 1, 1, 4]])
    logits = torch.zeros(10)
    logits[5], logits[6] = 3.0, 2.0

    def constant(seen: Tensor) -> Tensor:
        return logits.expand(*seen.shape, -1)

    assert write(constant, ids, 1, max_seq_len=2, temperature=0, penalty=2.0).item() == 6


def test_finished_rows_repeat_eos_and_the_loop_stops_when_all_have():
    ids = torch.tensor([[1, 2], [0, 0]])
    assert write(Counts(), ids, 100, eos_id=5, temperature=0).tolist() == [[3, 4, 5, 5, 5], [1, 2, 3, 4, 5]]
    assert write(Counts(), ids, 4, eos_id=5, temperature=0).tolist() == [[3, 4, 5, 5], [1, 2, 3, 4]]
    # A prompt that ends in eos is not finished: only what is written counts.
    assert write(Counts(), torch.tensor([[5]]), 3, eos_id=9, temperature=0).tolist() == [[6, 7, 8]]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_eval_inside_and_as_it_was_outside(training):
    counts = Counts().train(training)
    for i, _ in enumerate(generate(counts, torch.tensor([[1]]), 10)):
        assert counts.training == training, "the consumer must never meet a model in the wrong mode"
        if i == 3:
            break
    assert counts.training == training
    assert counts.modes == [False] * 4


def test_the_mode_is_restored_when_the_consumer_closes_or_the_model_fails():
    counts = Counts().train()
    writing = generate(counts, torch.tensor([[1]]), 10)
    next(writing)
    writing.close()
    assert counts.training

    class Fails(Counts):
        def forward(self, ids: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    broken = Fails().train()
    with pytest.raises(RuntimeError, match="out of order"):
        next(generate(broken, torch.tensor([[1]]), 10))
    assert broken.training


def test_no_gradient_inside_and_the_callers_mode_outside(model):
    for token in generate(model, torch.tensor([[1]]), 2):
        assert torch.is_grad_enabled()
        assert not token.requires_grad


def test_nothing_to_write_from_or_to_write(model):
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(model, torch.zeros(1, 0, dtype=torch.long), 3))
    assert list(generate(model, torch.tensor([[1]]), 0)) == []
    with pytest.raises(ValueError, match="top_k"):
        next(generate(model, torch.tensor([[1]]), 3, top_k=0))
