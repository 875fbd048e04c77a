"""RoPE against Llama's in transformers, against complex numbers, and against its own promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_lib.checks.probes import randn
from tutorial_lib.core.rope import (
    RopeScaling,
    RotaryEmbedding,
    apply_rope,
    half_to_interleaved,
    interleaved_to_half,
    rope_frequencies,
)

LENGTH = 8192
SCALINGS = {
    "default": (None, {"rope_type": "default"}),
    "linear": (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        RopeScaling("llama3", 8.0, LENGTH),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": LENGTH,
        },
    ),
}


def theirs(d_head: int, base: float, parameters: dict) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(
        head_dim=d_head, max_position_embeddings=131072, rope_parameters={"rope_theta": base, **parameters}
    )
    return llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("d_head", [16, 64, 128])
@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_are_llamas(kind: str, d_head: int, base: float):
    scaling, parameters = SCALINGS[kind]
    expected = theirs(d_head, base, parameters).inv_freq
    torch.testing.assert_close(rope_frequencies(d_head, base, scaling), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotation_is_llamas(kind: str):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    scaling, parameters = SCALINGS[kind]
    q, k = randn(2, 4, 9, 64), randn(2, 2, 9, 64, seed=1)  # fewer key heads
    positions = torch.randint(2000, (2, 9), generator=torch.Generator().manual_seed(0))
    angles = RotaryEmbedding(64, 500_000.0, scaling)(positions)
    expected = llama.apply_rotary_pos_emb(q, k, *theirs(64, 500_000.0, parameters)(q, positions))
    for ours, their in zip((apply_rope(q, *angles), apply_rope(k, *angles)), expected, strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-3)


def scores(q, k, positions, rope):
    return apply_rope(q, *rope(positions)) @ apply_rope(k, *rope(positions)).transpose(-2, -1)


@settings(max_examples=40, deadline=None)
@given(
    shift=st.integers(0, 5000),
    pairs=st.integers(1, 16),
    base=st.sampled_from([100.0, 10_000.0, 1e6]),
    scaling=st.sampled_from([None, *(s for s, _ in SCALINGS.values() if s), RopeScaling("ntk", 4.0)]),
    seed=st.integers(0, 99),
)
def test_only_distances_matter(shift, pairs, base, scaling, seed):
    rope = RotaryEmbedding(2 * pairs, base, scaling)
    q, k = (randn(1, 2, 7, 2 * pairs, seed=seed + i) / (2 * pairs) ** 0.25 for i in (0, 100))
    positions = torch.tensor([0, 1, 2, 3, 9, 30, 200])
    moved = scores(q, k, positions + shift, rope)
    torch.testing.assert_close(moved, scores(q, k, positions, rope), rtol=0, atol=1e-2)


@settings(max_examples=40, deadline=None)
@given(position=st.integers(0, 10**7), pairs=st.integers(1, 32), seed=st.integers(0, 99))
def test_lengths_are_kept_and_the_way_back_exists(position, pairs, seed):
    x = randn(1, 1, 1, 2 * pairs, seed=seed)
    cos, sin = RotaryEmbedding(2 * pairs)(torch.tensor([position]))
    turned = apply_rope(x, cos, sin)
    torch.testing.assert_close(turned.norm(), x.norm(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(apply_rope(turned, cos, -sin), x, rtol=1e-5, atol=1e-5)


def test_the_first_position_changes_nothing():
    x = randn(2, 3, 1, 8)
    assert torch.equal(apply_rope(x, *RotaryEmbedding(8)(torch.tensor([0]))), x)


def test_position_one_turns_by_one_radian():
    cos, sin = RotaryEmbedding(4)(torch.tensor([1]))
    turned = apply_rope(torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]]), cos, sin).flatten()
    torch.testing.assert_close(turned, torch.tensor([math.cos(1), 0.0, math.sin(1), 0.0]))


@settings(max_examples=30, deadline=None)
@given(n_heads=st.integers(1, 4), pairs=st.integers(1, 6), bias=st.booleans())
def test_layouts_there_and_back(n_heads, pairs, bias):
    shape = (n_heads * 2 * pairs,) if bias else (n_heads * 2 * pairs, 5)
    weight = randn(*shape)
    assert torch.equal(half_to_interleaved(interleaved_to_half(weight, n_heads), n_heads), weight)
    assert torch.equal(interleaved_to_half(half_to_interleaved(weight, n_heads), n_heads), weight)


def test_half_split_is_complex_multiplication_under_the_conversion():
    H, C, T, D = 3, 8, 6, 10
    x, weight = randn(2, T, D), randn(H * C, D, seed=1)
    angle = torch.arange(T)[:, None] * rope_frequencies(C)  # (T, C/2)

    def heads(w):
        return (x @ w.T).view(2, T, H, C).transpose(1, 2)  # (B, H, T, C)

    numbers = torch.view_as_complex(heads(weight).contiguous().unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(numbers * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    ours = apply_rope(heads(interleaved_to_half(weight, H)), angle.cos(), angle.sin())
    back = half_to_interleaved(torch.arange(C), 1)  # where each channel of the half-split layout goes
    torch.testing.assert_close(ours[..., back], expected, rtol=1e-4, atol=1e-5)


def test_rows_at_their_own_positions():
    rope, x = RotaryEmbedding(8), randn(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [70, 71, 90, 5]])
    cos, sin = rope(positions)
    assert cos.shape == sin.shape == (2, 1, 4, 4)
    for row in range(2):
        alone = apply_rope(x[row : row + 1], *rope(positions[row]))
        torch.testing.assert_close(apply_rope(x, cos, sin)[row : row + 1], alone)


def test_angles_stay_in_fp32_and_the_result_in_the_type_of_x():
    rope = RotaryEmbedding(8).bfloat16()
    assert not list(rope.parameters()) and not rope.state_dict()
    cos, sin = rope(torch.tensor([256, 257]))
    assert cos.dtype == torch.float32 and (cos[0] - cos[1]).abs().max() > 0.5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert apply_rope(randn(1, 1, 2, 8).to(dtype), cos, sin).dtype == dtype


def test_scalings_do_what_they_say():
    plain = rope_frequencies(64)
    assert torch.equal(rope_frequencies(64, scaling=RopeScaling("linear", 4.0)), plain / 4)
    ntk = rope_frequencies(64, scaling=RopeScaling("ntk", 4.0)) / plain
    assert ntk[0] == 1 and ntk[-1].item() == pytest.approx(1 / 4, rel=1e-5) and (ntk.diff() < 0).all()
    llama3 = rope_frequencies(64, scaling=RopeScaling("llama3", 4.0, 1000))
    turns = 1000 * plain / (2 * math.pi)
    assert torch.equal(llama3[turns > 4], plain[turns > 4])
    torch.testing.assert_close(llama3[turns < 1], plain[turns < 1] / 4)
    between = (turns > 1) & (turns < 4)
    assert between.any() and ((llama3 < plain) & (llama3 > plain / 4))[between].all()
    for kind in ("linear", "ntk", "llama3"):
        torch.testing.assert_close(rope_frequencies(64, scaling=RopeScaling(kind, 1.0)), plain)


def test_one_pair_has_one_speed():
    assert rope_frequencies(2).tolist() == [1.0]
    assert rope_frequencies(2, scaling=RopeScaling("ntk", 4.0)).tolist() == [1.0]


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="even number"):
        rope_frequencies(7)
    with pytest.raises(ValueError, match="even number"):
        RotaryEmbedding(7)
    with pytest.raises(ValueError, match="choose linear, ntk or llama3"):
        RopeScaling("yarn", 2.0)
    with pytest.raises(ValueError, match="factor is 0.5"):
        RopeScaling("linear", 0.5)
    with pytest.raises(ValueError, match="x has 8 channels, but there are angles for 4"):
        apply_rope(randn(1, 1, 3, 8), *RotaryEmbedding(4)(torch.arange(3)))
