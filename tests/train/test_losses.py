"""The loss against torch's own and against its definition in float64; its gradient; its translations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tutorial_lib.train.losses import IGNORE_INDEX, bits_per_byte, lm_loss, perplexity

REDUCTIONS = ("mean", "sum", "none")


def example(*shape: int, V: int = 11, seed: int = 0, hidden: float = 0.3, scale: float = 2.0):
    """Logits `(*shape, V)` and labels, a share of them -100, the first never."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, V, generator=generator)
    labels = torch.randint(V, shape, generator=generator)
    hide = torch.rand(shape, generator=generator) < hidden
    hide.view(-1)[:1] = False
    return logits, labels.masked_fill(hide, IGNORE_INDEX)


def by_definition(logits, labels):
    """-ln p of each label, in float64; 0 where it is -100."""
    logits = logits.double()
    counts = labels != IGNORE_INDEX
    z_y = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logits.logsumexp(-1) - z_y) * counts, counts


# --- the value ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (1, 1)])
@pytest.mark.parametrize("hidden", [0.0, 0.4])
def test_equals_torch_and_the_definition(shape, hidden):
    logits, labels = example(*shape, hidden=hidden)
    losses, counts = by_definition(logits, labels)
    expected = {"mean": losses.sum() / counts.sum(), "sum": losses.sum(), "none": losses}
    for reduction in REDUCTIONS:
        ours = lm_loss(logits, labels, reduction)
        theirs = F.cross_entropy(logits.reshape(-1, 11), labels.reshape(-1), reduction=reduction)
        assert ours.shape == (labels.shape if reduction == "none" else ())
        assert torch.equal(ours.reshape(-1), theirs.reshape(-1))
        torch.testing.assert_close(ours.double(), expected[reduction], rtol=1e-5, atol=1e-5)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    V=st.integers(1, 40),
    seed=st.integers(0, 999),
    hidden=st.floats(0, 1),
    scale=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
)
def test_reductions_agree_at_any_size(shape, V, seed, hidden, scale):
    logits, labels = example(*shape, V=V, seed=seed, hidden=hidden, scale=scale)
    losses = lm_loss(logits, labels, "none")
    n = int((labels != IGNORE_INDEX).sum())
    assert losses.isfinite().all() and (losses >= 0).all() and (losses[labels == IGNORE_INDEX] == 0).all()
    torch.testing.assert_close(lm_loss(logits, labels, "sum"), losses.sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(lm_loss(logits, labels), losses.sum() / n, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(losses.double(), by_definition(logits, labels)[0], rtol=1e-5, atol=1e-3)


def test_knowing_nothing_costs_ln_v_and_being_right_costs_nothing():
    labels = torch.arange(256).view(4, 64)
    assert lm_loss(torch.zeros(4, 64, 256), labels).item() == pytest.approx(math.log(256))
    assert lm_loss(50.0 * F.one_hot(labels, 256), labels).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e30])
def test_extreme_logits_have_a_finite_loss(size):
    logits = torch.tensor([[0.0, size], [-size, -2 * size], [size, size]])
    losses = lm_loss(logits, torch.tensor([0, 0, 1]), "none")
    torch.testing.assert_close(losses, torch.tensor([size, 0.0, math.log(2)]))


def test_forbidden_tokens_may_have_minus_infinity():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    assert lm_loss(logits, torch.tensor([1])).item() == pytest.approx(math.log(2))
    assert lm_loss(logits, torch.tensor([2])).item() == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_widened_first(dtype):
    logits, labels = example(4, 8, V=300)
    logits = logits.to(dtype)
    loss = lm_loss(logits, labels)
    assert loss.dtype == torch.float32 and torch.equal(loss, lm_loss(logits.float(), labels))


def test_float64_stays_float64():
    logits, labels = example(4, 8)
    loss = lm_loss(logits.double(), labels)
    losses, counts = by_definition(logits, labels)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, losses.sum() / counts.sum(), rtol=1e-13, atol=0)


def test_memory_order_does_not_matter():
    logits, labels = example(3, 5)
    strided = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    for reduction in REDUCTIONS:
        ours = lm_loss(strided, labels.T.contiguous().T, reduction)
        torch.testing.assert_close(ours, lm_loss(logits, labels, reduction))


def test_labels_are_not_shifted():
    labels = torch.arange(6)[None]
    assert lm_loss(30.0 * F.one_hot(labels, 6), labels) < 1e-6
    assert lm_loss(30.0 * F.one_hot(labels + 1, 7), labels) > 10


def test_padding_does_not_count_and_tokens_weigh_the_same():
    logits, labels = example(2, 7, hidden=0)
    labels[0, 1:] = IGNORE_INDEX
    losses = lm_loss(logits, labels, "none")
    assert lm_loss(logits, labels).item() == pytest.approx(losses.sum().item() / 8)
    more = torch.cat([logits, torch.randn(2, 3, 11)], 1)
    padded = torch.cat([labels, torch.full((2, 3), IGNORE_INDEX)], 1)
    torch.testing.assert_close(lm_loss(more, padded), lm_loss(logits, labels))
    pieces = sum(lm_loss(logits[i], labels[i], "sum") for i in range(2))
    torch.testing.assert_close(pieces / 8, lm_loss(logits, labels))


# --- the gradient -------------------------------------------------------------------------------------------


def test_gradient_is_softmax_minus_one_hot():
    logits, labels = example(4, 6)
    logits.requires_grad_()
    lm_loss(logits, labels).backward()
    counts = labels != IGNORE_INDEX
    expected = (logits.detach().softmax(-1) - F.one_hot(labels.clamp(min=0), 11)) * counts[..., None]
    torch.testing.assert_close(logits.grad, expected / counts.sum())
    assert (logits.grad[~counts] == 0).all() and logits.grad.sum(-1).abs().max() < 1e-6


def test_the_gradient_is_the_slope_of_the_loss():
    logits, labels = example(3, 4, V=5)
    logits = logits.double().requires_grad_()
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(lambda z, r=reduction: lm_loss(z, labels, r), logits)


def test_gradient_keeps_the_type_of_the_logits():
    logits, labels = example(2, 3)
    low = logits.bfloat16().requires_grad_()
    lm_loss(low, labels).backward()
    assert low.grad.dtype == torch.bfloat16 and low.grad.isfinite().all()


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "labels"), [((2, 3, 5), (2, 4)), ((6, 5), (2, 3)), ((2, 3, 5), (2, 3, 1)), ((5,), (1,))]
)
def test_shapes_must_match(logits, labels):
    with pytest.raises(ValueError, match="need labels of shape"):
        lm_loss(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_a_mean_of_nothing_is_said(shape):
    logits, labels = torch.zeros(*shape, 5), torch.full(shape, IGNORE_INDEX)
    with pytest.raises(ValueError, match="nothing to take the mean of"):
        lm_loss(logits, labels)
    assert lm_loss(logits, labels, "sum") == 0 and lm_loss(logits, labels, "none").shape == shape


@pytest.mark.parametrize("label", [5, -1])
def test_a_label_outside_the_vocabulary_is_refused(label):
    with pytest.raises(IndexError):
        lm_loss(torch.zeros(1, 5), torch.tensor([label]))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError):
        lm_loss(torch.zeros(1, 5), torch.tensor([0]), "average")


# --- translations -------------------------------------------------------------------------------------------


@given(st.floats(1, 1e6))
def test_perplexity_of_a_fair_die_is_its_sides(sides):
    assert perplexity(math.log(sides)) == pytest.approx(sides)


def test_perplexity_survives_a_run_that_has_blown_up():
    assert (
        perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan)) and perplexity(math.inf) == math.inf
    )


def test_bits_per_byte_are_nats_over_ln_2():
    assert bits_per_byte(math.log(2), 1) == pytest.approx(1)
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)
    assert bits_per_byte(math.log(2) * 12, 4 * 1.5) == pytest.approx(2), "bytes may be an estimate"
    with pytest.raises(ZeroDivisionError):
        bits_per_byte(1.0, 0)
