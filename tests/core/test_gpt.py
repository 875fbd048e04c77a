"""Every class of Part 1 against torch's own (and GPT-2's) on random weights, norms and biases included."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutorial_lib.checks.probes import fill_by_name, leaks, randn
from tutorial_lib.core.attention import scaled_dot_product_attention
from tutorial_lib.core.block import Block
from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.core.head import AttentionHead
from tutorial_lib.core.masks import causal_mask
from tutorial_lib.core.mlp import ACTIVATIONS, MLP, gelu_tanh, relu_squared
from tutorial_lib.core.multihead import MultiHeadAttention, merge_heads, split_heads
from tutorial_lib.core.norms import LayerNorm, RMSNorm
from tutorial_lib.core.positional import (
    LearnedPositionalEmbedding,
    SinusoidalPositionalEmbedding,
    sinusoidal_table,
)


def close(ours, theirs, atol=1e-5, rtol=1e-4):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol, check_dtype=True)


def some_mask(*shape: int, seed: int = 0):
    """A random mask in which every query may attend to itself."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    return mask | torch.eye(shape[-1], dtype=torch.bool)


def same_gradients(ours: tuple, theirs: tuple, atol=1e-5):
    """Sum each output against the same random numbers, and compare the gradients of the inputs given."""
    (y, inputs), (z, others) = ours, theirs
    against = randn(*y.shape, seed=99).to(y.dtype)
    mine = torch.autograd.grad((y * against).sum(), inputs)
    expected = torch.autograd.grad((z * against).sum(), others)
    for a, b in zip(mine, expected, strict=True):
        close(a, b, atol=atol, rtol=1e-3)


# ── Positions ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("T", "D", "base"), [(1, 2, 1e4), (50, 16, 1e4), (333, 64, 1e4), (20, 10, 100.0)])
def test_the_sinusoidal_table_is_a_set_of_clock_hands(T, D, base):
    # Independent closed form, in float64: the pair (cos, sin) is the power of one complex number.
    one_step = torch.exp(1j * base ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D))
    hands = one_step[None, :] ** torch.arange(T, dtype=torch.float64)[:, None]
    table = sinusoidal_table(T, D, base)
    assert table.shape == (T, D) and table.dtype == torch.float32
    close(table[:, 0::2].double(), hands.imag, atol=1e-4)  # fp32 angles of some hundred radians
    close(table[:, 1::2].double(), hands.real, atol=1e-4)


def test_the_sinusoidal_embedding_looks_up_and_saves_nothing():
    layer = SinusoidalPositionalEmbedding(40, 8)
    positions = torch.tensor([[3, 0], [39, 3]])
    assert torch.equal(layer(positions), sinusoidal_table(40, 8)[positions])
    assert not list(layer.parameters()) and not layer.state_dict()


def test_an_odd_width_has_no_pairs():
    with pytest.raises(ValueError, match="d_model is 7, but sines and cosines come in pairs"):
        sinusoidal_table(4, 7)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 1)])
def test_learned_positions_are_an_embedding(shape):
    ours, theirs = LearnedPositionalEmbedding(12, 6), nn.Embedding(12, 6)
    fill_by_name(ours)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    positions = torch.randint(12, shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(positions), theirs(positions))
    same_gradients((ours(positions), [ours.weight]), (theirs(positions), [theirs.weight]))


@pytest.mark.parametrize("layer", [LearnedPositionalEmbedding(4, 2), SinusoidalPositionalEmbedding(4, 2)])
def test_a_position_past_the_table_is_an_error(layer):
    with pytest.raises(IndexError, match="position 4 is past the table of 4"):
        layer(torch.tensor([0, 4]))


# ── Norms ────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = [(4,), (3, 16), (2, 5, 64), (2, 3, 4, 33)]


def trained(layer: nn.Module) -> nn.Module:
    """Random scales around one and random shifts."""
    for name, p in layer.named_parameters():
        values = randn(*p.shape, seed=len(name))
        p.data.copy_(1 + 0.3 * values if name == "weight" else values)
    return layer


def norm_by_definition(x, weight, bias, eps, center):
    """In float64, whatever x is."""
    x, weight = x.double(), weight.double()
    x = x - x.mean(-1, keepdim=True) if center else x
    y = x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_is_torchs(shape, eps, bias):
    ours = trained(LayerNorm(shape[-1], eps=eps, bias=bias))
    theirs = nn.LayerNorm(shape[-1], eps=eps, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, z = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
    close(ours(x), theirs(z))
    close(ours(x).double(), norm_by_definition(x, ours.weight, ours.bias, eps, center=True))
    same_gradients((ours(x), [x, *ours.parameters()]), (theirs(z), [z, *theirs.parameters()]))


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_its_definition(shape, eps):
    ours = trained(RMSNorm(shape[-1], eps=eps))
    x = randn(*shape)
    close(ours(x).double(), norm_by_definition(x, ours.weight, None, eps, center=False))


@pytest.mark.skipif(not hasattr(nn, "RMSNorm"), reason="torch's RMSNorm came with 2.4")
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_torchs(shape, eps):
    ours, theirs = trained(RMSNorm(shape[-1], eps=eps)), nn.RMSNorm(shape[-1], eps=eps)
    theirs.load_state_dict(ours.state_dict())
    x, z = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
    close(ours(x), theirs(z))
    same_gradients((ours(x), [x, ours.weight]), (theirs(z), [z, theirs.weight]))


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.01, 1.0, 300.0])
def test_norms_in_half_precision_lose_only_the_last_bits(kind, dtype, size):
    # 300² is above fp16's largest number: a statistic taken in the input's own type would be infinite.
    layer = trained(kind(128)).to(dtype)
    x = (size * randn(4, 9, 128)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = norm_by_definition(x, layer.weight, getattr(layer, "bias", None), 1e-5, center=kind is LayerNorm)
    ulp = torch.finfo(dtype).eps
    close(y.double(), exact, atol=2 * ulp, rtol=2 * ulp)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norms_take_each_token_for_itself_and_do_not_care_for_its_size(kind):
    layer, x = trained(kind(32)), randn(2, 6, 32)
    assert leaks(layer, x) is None
    close(layer(7 * x), layer(x), atol=1e-3)
    if kind is LayerNorm:
        close(layer(x + 7), layer(x), atol=1e-3)
    assert torch.isfinite(layer(torch.zeros(2, 32))).all()


def test_layer_norm_divides_by_d_and_not_by_d_minus_one():
    close(LayerNorm(2)(torch.tensor([-1.0, 1.0])), torch.tensor([-1.0, 1.0]))  # D − 1 would give ±0.71


# ── Attention ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 3, 7, 16)])
@pytest.mark.parametrize("masked", ["no", "causal", "random"])
def test_attention_is_torchs(shape, masked):
    q, k, v = (randn(*shape, seed=s).requires_grad_() for s in (1, 2, 3))
    T = shape[-2]
    mask = {"no": None, "causal": causal_mask(T), "random": some_mask(T, T)}[masked]
    ours, weights = scaled_dot_product_attention(q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    close(ours, theirs)
    close(weights.sum(-1), torch.ones(shape[:-1]))
    if mask is not None:
        assert (weights.masked_select(~mask) == 0).all()
    same_gradients((ours, [q, k, v]), (theirs, [q, k, v]))


def test_attention_with_other_numbers_of_queries_and_keys_and_other_values():
    q, k, v = randn(2, 3, 8, seed=1), randn(2, 6, 8, seed=2), randn(2, 6, 5, seed=3)
    mask = causal_mask(3, 6)
    ours, weights = scaled_dot_product_attention(q, k, v, mask)
    close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert weights.shape == (2, 3, 6)


def test_attention_to_nothing_is_zero():
    mask = torch.tensor([[True, False], [False, False]])
    out, weights = scaled_dot_product_attention(*(randn(2, 4, seed=s) for s in (1, 2, 3)), mask)
    assert not out.isnan().any() and (out[1] == 0).all() and (weights[1] == 0).all()


def test_attention_in_double_is_exact():
    q, k, v = (randn(2, 5, 8, seed=s).double() for s in (1, 2, 3))
    close(
        scaled_dot_product_attention(q, k, v)[0],
        F.scaled_dot_product_attention(q, k, v),
        atol=1e-12,
        rtol=1e-10,
    )


def test_queries_and_keys_of_other_widths_are_an_error():
    with pytest.raises(ValueError, match="queries have 4 channels and keys 3: they must match"):
        scaled_dot_product_attention(randn(2, 4), randn(2, 3), randn(2, 4))


@pytest.mark.parametrize(("Q", "K"), [(1, 1), (4, 4), (2, 7), (1, 9)])
def test_the_causal_mask_is_a_triangle_at_the_end(Q, K):
    assert torch.equal(causal_mask(Q, K), torch.ones(Q, K).tril(K - Q).bool())


def test_more_queries_than_keys_are_an_error():
    with pytest.raises(ValueError, match="3 queries but only 2 keys"):
        causal_mask(3, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_head_is_torchs_attention_with_one_head(bias, causal):
    ours = fill_by_name(AttentionHead(12, 12, bias=bias))
    theirs = nn.MultiheadAttention(12, 1, bias=bias, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.out_proj.weight.copy_(torch.eye(12))
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
            theirs.out_proj.bias.zero_()
    x, mask = randn(2, 6, 12), causal_mask(6) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=None if mask is None else ~mask)
    close(ours(x, mask), expected)


def torchs_attention(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    """torch's own layer with our weights (its masks mean the opposite: True = may not)."""
    theirs = nn.MultiheadAttention(
        ours.out.in_features, ours.n_heads, bias=ours.out.bias is not None, batch_first=True
    )
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.out_proj.weight.copy_(ours.out.weight)
        if ours.out.bias is not None:
            theirs.in_proj_bias.copy_(ours.qkv.bias)
            theirs.out_proj.bias.copy_(ours.out.bias)
    return theirs


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("B", "T", "D", "H", "bias"), [(1, 1, 4, 1, True), (2, 7, 24, 4, True), (3, 5, 8, 8, False)]
)
def test_multi_head_attention_is_torchs(B, T, D, H, bias, masked, causal, fused):
    ours = fill_by_name(MultiHeadAttention(D, H, causal=causal, bias=bias, fused=fused))
    theirs = torchs_attention(ours)
    x, z = randn(B, T, D).requires_grad_(), randn(B, T, D).requires_grad_()
    mask = some_mask(T, T) if masked else None
    allowed = causal_mask(T) if causal else torch.ones(T, T, dtype=torch.bool)
    allowed = allowed if mask is None else allowed & mask
    expected, weights = theirs(z, z, z, attn_mask=~allowed, average_attn_weights=False)
    y = ours(x, mask)
    close(y, expected)
    close(ours.weights(x, mask), weights)
    params = [[x, ours.qkv.weight, ours.out.weight], [z, theirs.in_proj_weight, theirs.out_proj.weight]]
    same_gradients((y, params[0]), (expected, params[1]), atol=1e-4)


def test_a_mask_for_each_head_and_row():
    ours = fill_by_name(MultiHeadAttention(12, 3, causal=True))
    mask, x = some_mask(2, 3, 5, 5), randn(2, 5, 12)
    both = (mask & causal_mask(5)).flatten(0, 1)  # torch wants (B·H, T, T)
    expected, _ = torchs_attention(ours)(x, x, x, attn_mask=~both)
    close(ours(x, mask), expected)
    ours.fused = False
    close(ours(x, mask), expected)


def test_heads_are_cut_and_joined_again():
    x = randn(2, 5, 12)
    heads = split_heads(x, 3)
    assert torch.equal(merge_heads(heads), x)
    assert torch.equal(heads[:, 1], x[..., 4:8])


def test_heads_that_do_not_divide_the_width_are_an_error():
    with pytest.raises(ValueError, match="d_model 10 does not split into 4 heads: try n_heads=5"):
        MultiHeadAttention(10, 4)


def test_attention_weights_are_dropped_only_while_training():
    for fused in (True, False):
        layer, x = fill_by_name(MultiHeadAttention(8, 2, dropout=0.5, fused=fused)), randn(1, 6, 8)
        assert not torch.equal(layer.train()(x), layer(x))
        assert torch.equal(layer.eval()(x), layer(x))


# ── MLP ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_activations_are_torchs():
    x = torch.linspace(-8, 8, 401)
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3))
    close(gelu_tanh(x).double(), 0.5 * x.double() * (1 + tanh))
    assert torch.equal(relu_squared(x), torch.where(x > 0, x * x, 0.0))
    for name, theirs in {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}.items():
        close(ACTIVATIONS[name](x), theirs(x))


@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("d_mlp", "bias"), [(None, True), (7, False)])
def test_the_mlp_is_two_linear_layers(activation, d_mlp, bias):
    ours = fill_by_name(MLP(6, d_mlp, activation, bias=bias))
    assert ours.up.out_features == (d_mlp or 24)
    hidden = F.linear(randn(2, 3, 6), ours.up.weight, ours.up.bias)
    bent = hidden.clamp(min=0) ** 2 if activation == "relu2" else ACTIVATIONS[activation](hidden)
    close(ours(randn(2, 3, 6)), F.linear(bent, ours.down.weight, ours.down.bias))
    assert leaks(ours, randn(1, 4, 6)) is None


def test_an_unknown_activation_is_an_error():
    with pytest.raises(ValueError, match="unknown activation 'swish': choose one of relu, "):
        MLP(4, activation="swish")


# ── Block ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("d_model", "n_heads", "d_mlp", "bias"), [(8, 2, None, True), (12, 3, 20, True), (8, 1, None, False)]
)
def test_the_block_is_torchs_encoder_layer_with_the_norm_first(d_model, n_heads, d_mlp, bias):
    ours = fill_by_name(Block(d_model, n_heads, d_mlp, bias=bias))
    theirs = nn.TransformerEncoderLayer(
        d_model,
        n_heads,
        d_mlp or 4 * d_model,
        dropout=0.0,
        activation=gelu_tanh,
        batch_first=True,
        norm_first=True,
        bias=bias,
    )
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.out.",
        "linear1.": "mlp.up.",
        "linear2.": "mlp.down.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    source = ours.state_dict()
    prefix = {name: next(p for p in names if name.startswith(p)) for name in theirs.state_dict()}
    theirs.load_state_dict({n: source[names[p] + n.removeprefix(p)] for n, p in prefix.items()})
    x, z = randn(2, 6, d_model).requires_grad_(), randn(2, 6, d_model).requires_grad_()
    expected = theirs(z, src_mask=~causal_mask(6))
    close(ours(x), expected)
    same_gradients((ours(x), [x]), (expected, [z]), atol=1e-4)
    mask = some_mask(6, 6)
    close(ours(x, mask), theirs(x, src_mask=~(mask & causal_mask(6))))


def test_a_block_with_silent_branches_is_the_identity():
    block, x = fill_by_name(Block(8, 2)), randn(2, 5, 8)
    with torch.no_grad():
        for layer in (block.attn.out, block.mlp.down):
            layer.weight.zero_()
            layer.bias.zero_()
    assert torch.equal(block(x), x)


def test_dropout_falls_on_the_branches_and_never_on_the_stream():
    block, x = fill_by_name(Block(8, 2)).train(), randn(2, 5, 8)
    block.dropout.p = 1.0
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


# ── Who sees the future ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_sees_the_future_only_when_it_may(fused, masked):
    mask, x = some_mask(9, 9) if masked else None, randn(2, 9, 12)
    causal = fill_by_name(MultiHeadAttention(12, 3, causal=True, fused=fused))
    assert leaks(lambda x: causal(x, mask), x) is None
    free = fill_by_name(MultiHeadAttention(12, 3, causal=False, fused=fused))
    assert "it sees the future" in leaks(lambda x: free(x, mask), x)


def test_block_and_gpt_do_not_see_the_future():
    block, x = fill_by_name(Block(12, 3)), randn(2, 9, 12)
    assert leaks(block, x) is None
    assert leaks(lambda x: block(x, some_mask(9, 9)), x) is None
    model = fill_by_name(GPT(GPTConfig(31, 16, 12, 3, 3)))
    ids = torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(0))
    assert leaks(model, ids) is None


def test_packed_documents_stay_apart():
    model = fill_by_name(GPT(GPTConfig(31, 16, 12, 3, 2)))
    ids = torch.randint(31, (1, 10), generator=torch.Generator().manual_seed(0))
    document = torch.tensor([0] * 4 + [1] * 6)
    mask = document[:, None] == document[None, :]
    other = ids.clone()
    other[:, :4] = (other[:, :4] + 1) % 31
    assert torch.equal(model(ids, mask)[:, 4:], model(other, mask)[:, 4:])
    assert not torch.equal(model(ids)[:, 4:], model(other)[:, 4:])


# ── The whole model ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("D", "H", "L", "expected"),
    [(768, 12, 12, 124_439_808), (1024, 16, 24, 354_823_168), (1600, 25, 48, 1_557_611_200)],
)
def test_gpt2_has_as_many_parameters_as_published(D, H, L, expected):
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, D, H, L))
    assert model.num_params() == expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("d_mlp", [None, 40])
def test_the_count_follows_the_config(bias, tie, d_mlp):
    V, T, D, L, M = 50, 20, 16, 3, d_mlp or 64
    model = GPT(GPTConfig(V, T, D, 4, L, d_mlp, bias=bias, tie_embeddings=tie))
    block = 4 * D * D + 2 * D * M + 2 * D + (4 * D + M + D + 2 * D) * bias
    assert model.num_params() == V * D * (1 if tie else 2) + T * D + L * block + D + D * bias
    assert (model.head.weight is model.tokens.weight) == tie


def test_gpt_starts_as_gpt2_does():
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 64, 128, 4, 8))
    for name, p in model.named_parameters():
        if p.ndim < 2:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            end = name.endswith(("attn.out.weight", "mlp.down.weight"))
            expected = 0.02 / math.sqrt(16) if end else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < 0.1 * expected, name


@pytest.mark.parametrize("depth", [1, 6, 24])
@pytest.mark.parametrize("V", [65, 256, 5000])
def test_the_first_loss_is_that_of_a_fair_die(depth, V):
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, 32, 64, 4, depth))
    ids = torch.randint(V, (16, 33))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert abs(loss - math.log(V)) < 0.15


def test_every_parameter_gets_a_gradient():
    model = fill_by_name(GPT(GPTConfig(31, 16, 12, 3, 3)))
    ids = torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_tie_survives_a_copy_and_a_reload():
    model = GPT(GPTConfig(31, 16, 12, 3, 1))
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.tokens.weight and twin.head.weight is not model.head.weight
    fresh = GPT(model.config)
    fresh.load_state_dict(fill_by_name(model).state_dict())
    assert fresh.head.weight is fresh.tokens.weight
    ids = torch.arange(10)[None]
    assert torch.equal(fresh(ids), model(ids))


def test_a_sequence_that_is_too_long_is_an_error():
    model = GPT(GPTConfig(max_seq_len=8, d_model=8, n_heads=2, n_layers=1))
    assert model(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 256)
    with pytest.raises(ValueError, match="9 tokens do not fit in max_seq_len 8: crop the input to its end"):
        model(torch.zeros(1, 9, dtype=torch.long))


# ── GPT-2 as the world uses it ───────────────────────────────────────────────────────────────────────────

NAMES = {
    "norm1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def gpt2_name(name: str) -> str:
    """Our parameter's name in `GPT2LMHeadModel`."""
    if name.startswith("blocks."):
        _, i, rest = name.split(".", 2)
        rest, _, kind = rest.rpartition(".")
        return f"transformer.h.{i}.{NAMES[rest]}.{kind}"
    whole = {"tokens": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"}
    module, _, kind = name.rpartition(".")
    return f"{whole.get(module, 'lm_head')}.{kind}"


def ours_and_gpt2(tie: bool = True, **shape: int):
    """Both models with the same random weights (theirs are stored transposed), and some ids."""
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(tie_embeddings=tie, **shape)
    ours = fill_by_name(GPT(config), scale=0.2).eval()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.d_mlp,
            tie_word_embeddings=tie,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    targets = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            target = targets.pop(gpt2_name(name))
            target.copy_(p.T if stored_transposed(name) else p)
    assert not targets, f"nobody filled {list(targets)}"
    generator = torch.Generator().manual_seed(0)
    return ours, theirs, torch.randint(config.vocab_size, (2, config.max_seq_len), generator=generator)


def stored_transposed(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith("weight") and "norm" not in name


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {"vocab_size": 101, "max_seq_len": 24, "d_model": 32, "n_heads": 4, "n_layers": 3},
        {"vocab_size": 64, "max_seq_len": 7, "d_model": 30, "n_heads": 5, "n_layers": 1, "d_mlp": 50},
    ],
    ids=["three layers", "odd sizes"],
)
def test_gpt_is_gpt2(shape, tie):
    ours, theirs, ids = ours_and_gpt2(tie, **shape)
    with torch.no_grad():
        for T in (1, ids.shape[1]):
            a, b = ours(ids[:, :T]), theirs(ids[:, :T]).logits
            assert b.std() > 0.3  # numbers that could differ
            assert (a - b).abs().max() <= 2e-5


@pytest.mark.slow
def test_the_gradients_of_gpt_are_gpt2s():
    ours, theirs, ids = ours_and_gpt2(vocab_size=101, max_seq_len=24, d_model=32, n_heads=4, n_layers=3)
    labels = ids.roll(-1, dims=1)
    for logits in (ours(ids), theirs(ids).logits):
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        expected = theirs_by_name[gpt2_name(name)].grad
        close(p.grad, expected.T if stored_transposed(name) else expected, atol=1e-5, rtol=1e-3)
