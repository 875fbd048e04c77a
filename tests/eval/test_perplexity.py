"""Evaluation on text: the same number however it is batched, and comparable between tokenizers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.eval.perplexity import Evaluation, evaluate

few = settings(max_examples=100, deadline=None)
T = 8


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 17, 500).astype(np.uint8)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=17, max_seq_len=T, d_model=16, n_heads=2, n_layers=1, dropout=0.5))
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.3)
    return gpt


@torch.no_grad()
def direct(model: nn.Module, tokens: np.ndarray, windows: list[int]) -> float:
    """The loss label by label, from log_softmax alone."""
    model.eval()
    losses = []
    for w in windows:
        window = torch.tensor(tokens[w * T : w * T + T + 1].astype(np.int64))
        log_probs = model(window[None, :-1])[0].double().log_softmax(-1)
        losses += [-log_probs[t, window[t + 1]].item() for t in range(T)]
    return sum(losses) / len(losses)


def test_equals_the_loss_computed_label_by_label(model, tokens):
    n = (len(tokens) - 1) // T
    found = evaluate(model, tokens, T)
    assert found.loss == pytest.approx(direct(model, tokens, list(range(n))), abs=1e-5)
    assert found.tokens == n * T
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16, 61, 62, 1000])
def test_the_batch_size_does_not_matter(model, tokens, batch_size):
    found, expected = evaluate(model, tokens, T, batch_size=batch_size), evaluate(model, tokens, T)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_restored(model, tokens, training):
    model.train(training)
    assert evaluate(model, tokens, T) == evaluate(model, tokens, T)
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_restored_when_the_model_fails(model, tokens):
    model.train()
    with pytest.raises(IndexError):
        evaluate(model, tokens + np.uint8(100), T)  # ids outside the vocabulary
    assert model.training


@few
@given(st.integers(1, 80))
def test_max_windows_spreads_over_the_text(n):
    seen: list[int] = []

    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, ids):
            seen.extend(ids[:, 0].tolist())
            return self.weight.expand(*ids.shape, 500)

    found = evaluate(Notes(), np.arange(500), T, max_windows=n, batch_size=7)
    total = len(TokenWindows(np.arange(500), T))
    windows = [start // T for start in seen]
    assert len(windows) == min(n, total) == found.tokens // T
    assert windows == sorted(set(windows)), "in order, and none twice"
    assert windows[0] == 0 and (n == 1 or windows[-1] == total - 1), "from the first to the last"
    if len(windows) > 2:
        gaps = np.diff(windows)
        assert gaps.max() - gaps.min() <= 1, "evenly"


def test_max_windows_picks_the_same_ones_each_time(model, tokens):
    found = evaluate(model, tokens, T, max_windows=5)
    assert found == evaluate(model, tokens, T, max_windows=5)
    which = np.linspace(0, 61, 5).astype(int).tolist()
    assert found.loss == pytest.approx(direct(model, tokens, which), abs=1e-5)
    assert evaluate(model, tokens, T, max_windows=10**6).tokens == evaluate(model, tokens, T).tokens


def test_bits_per_byte_do_not_depend_on_the_tokenizer(model, tokens):
    one = evaluate(model, tokens, T)
    four = evaluate(model, tokens, T, bytes_per_token=4.0)
    assert four.bits_per_byte == pytest.approx(one.bits_per_byte / 4)
    assert (four.loss, four.perplexity, four.tokens) == (one.loss, one.perplexity, one.tokens)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(tokens):
    class Uniform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(256))

        def forward(self, ids):
            return self.weight.expand(*ids.shape, 256)

    found = evaluate(Uniform(), tokens, T)
    assert found.perplexity == pytest.approx(256, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(8, rel=1e-6)


def test_what_cannot_be_evaluated(model, tokens):
    with pytest.raises(ValueError, match="too few"):
        evaluate(model, tokens[:T], T)
    with pytest.raises(ValueError, match="at least one window"):
        evaluate(model, tokens, T, max_windows=0)
    assert evaluate(model, tokens[: T + 1], T).tokens == T


def test_an_evaluation_cannot_be_changed():
    found = Evaluation(1.0, math.e, 1.44, 8)
    with pytest.raises(AttributeError):
        found.loss = 0.0  # type: ignore[misc]
