"""SwiGLU against Hugging Face's, the width rule, and the errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_lib.checks.probes import fill_by_name, randn
from tutorial_lib.core.mlp import ACTIVATIONS
from tutorial_lib.core.swiglu import SwiGLU, gated_width


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_it_is_llamas_mlp_outputs_and_gradients(bias, activation):
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        mlp_bias=bias,
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation),
    )
    theirs = fill_by_name(llama.LlamaMLP(config))
    ours = SwiGLU(24, 40, activation, bias)
    ours.load_state_dict({name.replace("_proj", ""): w for name, w in theirs.state_dict().items()})
    x = randn(3, 5, 24).requires_grad_()
    against = randn(3, 5, 24, seed=1)
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z)
    mine = torch.autograd.grad((y * against).sum(), [x, *ours.parameters()])
    other = torch.autograd.grad((z * against).sum(), [x, *theirs.parameters()])
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_two_units_multiply():
    layer = SwiGLU(2, 2)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        layer.up.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
        layer.down.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        x = 10 * randn(50, 2)
        torch.testing.assert_close(layer(x)[:, 0], x[:, 0] * x[:, 1], atol=1e-3, rtol=1e-5)


@settings(max_examples=200, deadline=None)
@given(d_model=st.integers(1, 20_000), multiple_of=st.integers(1, 512))
def test_the_width_costs_what_a_plain_mlp_costs(d_model, multiple_of):
    width = gated_width(d_model, multiple_of)
    assert width % multiple_of == 0
    # Three matrices against two of width 4 · d_model: never cheaper, and dearer by less than one multiple.
    assert 0 <= 3 * d_model * width - 8 * d_model**2 < 3 * d_model * multiple_of


def test_the_widths_are_those_of_public_models():
    assert gated_width(4096, 256) == 11008  # Llama 7B
    assert gated_width(576) == 1536  # SmolLM2-135M
    assert SwiGLU(72).up.out_features == 192


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="unknown activation 'swish'") as error:
        SwiGLU(8, activation="swish")
    assert all(name in str(error.value) for name in ACTIVATIONS)
