"""Weights in eight bits: the step that was promised, and a model that computes what its rounded matrices say."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.interop.models import CONFIGS, ours
from tutorial_lib.core.decoding import generate_cached
from tutorial_lib.core.model import Transformer
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.gguf import load_gguf, save_gguf
from tutorial_lib.interop.hf import load_hf, save_hf
from tutorial_lib.interop.layout import lay_out
from tutorial_lib.interop.pretrained import open_pretrained
from tutorial_lib.quant import int8
from tutorial_lib.quant.int8 import Int8Embedding, Int8Linear, put_int8, quantize_rows, to_int8

IDS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What is left of a matrix; written plainly, row by row."""
    rows = []
    for row in weight.detach().double():
        scale = max(float(row.abs().max()), 1e-12) / 127
        rows.append((row / scale).round() * scale)
    return torch.stack(rows).float()


def dequantized(model: Transformer) -> Transformer:
    """The same model, with each matrix as int8 has it, in fp32 again."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, (nn.Linear, nn.Embedding)) and name.endswith("weight"):
                weight.copy_(rounded(weight))
    return model


# --- rows ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 40), st.integers(-30, 30), st.integers(0, 1000))
def test_no_number_is_off_by_more_than_half_a_scale(rows, columns, power, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 2.0**power
    weight[torch.rand(rows, generator=generator) < 0.1] = 0  # rows of nothing
    q, scale = quantize_rows(weight)
    assert q.dtype == torch.int8 and q.shape == weight.shape and scale.shape == (rows,)
    assert q.min() >= -127 and torch.isfinite(scale).all() and (scale > 0).all()
    error = (q.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-5)).all()
    largest = weight.abs().amax(dim=1) > 1e-12
    assert (q.int().abs().amax(dim=1)[largest] == 127).all()  # all of the range is used


def test_by_hand():
    q, scale = quantize_rows(
        torch.tensor([[1.0, -2.0, 0.5, 2.54], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.3, 0.0, 0.0]])
    )
    assert q.tolist() == [[50, -100, 25, 127], [0, 0, 0, 0], [-127, 38, 0, 0]]
    torch.testing.assert_close(scale[[0, 2]], torch.tensor([0.02, 1 / 127]))


def test_in_pieces_as_at_once(monkeypatch):
    weight = torch.randn(130, 7)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = quantize_rows(weight.to(dtype))
        for rows in (1, 60, 1000):
            monkeypatch.setattr(int8, "ROWS", rows)
            again = quantize_rows(weight.to(dtype))
            assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
        assert whole[1].dtype == torch.float32


# --- layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 6)])
def test_a_linear_layer(bias, shape):
    layer, x = nn.Linear(6, 9, bias), torch.randn(shape)
    small = Int8Linear(*quantize_rows(layer.weight.detach()), layer.bias.detach() if bias else None)
    with torch.no_grad():
        layer.weight.copy_(rounded(layer.weight))
        torch.testing.assert_close(small(x), layer(x), atol=1e-5, rtol=1e-5)
    assert small.out_features == 9 and not any(p.requires_grad for p in small.parameters())


def test_a_table():
    table = torch.randn(50, 8)
    small = Int8Embedding(*quantize_rows(table))
    ids = torch.tensor([[0, 49], [7, 7]])
    torch.testing.assert_close(small(ids), rounded(table)[ids])
    assert Int8Embedding(*quantize_rows(table), torch.bfloat16)(ids).dtype == torch.bfloat16


# --- models -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_computes_what_its_rounded_matrices_say(name):
    """Tied and not, with biases, with windows, GPT-2 with its table of positions."""
    model = ours(CONFIGS[name])
    wanted, exact = dequantized(model)(IDS), model(IDS)
    small = to_int8(copy.deepcopy(model))
    torch.testing.assert_close(small(IDS), wanted, atol=1e-4, rtol=0)
    assert 1e-3 < (wanted - exact).abs().max() < 0.5 * exact.std()  # something was rounded, and not much


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_with_a_cache_as_without(name):
    model = to_int8(ours(CONFIGS[name]))
    cache = model.new_cache(2, 24)
    pieces = [model(IDS[:, :10], cache=cache)]
    pieces += [model(IDS[:, t : t + 1], cache=cache) for t in range(10, 24)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(IDS), atol=1e-4, rtol=0)
    written = [int(token) for token in generate_cached(model, IDS[:1], 8, temperature=0)]
    assert len(written) == 8


def nbytes(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


@pytest.mark.parametrize("name", ["llama", "llama3", "gpt2"])
def test_a_quarter_of_the_memory(name):
    model = ours(CONFIGS[name])
    before = nbytes(model)
    vectors = sum(4 * p.numel() for p in model.parameters() if p.ndim == 1)
    scales = sum(4 * len(p) for p in model.parameters() if p.ndim == 2)
    positions = 0 if model.positions is None else model.positions.weight.nbytes
    matrices = before - vectors - positions
    assert nbytes(to_int8(model)) <= matrices / 4 + vectors + positions + scales
    tied = model.config.tie_embeddings
    assert (model.head.weight.data_ptr() == model.tokens.weight.data_ptr()) == tied


@pytest.mark.parametrize("name", ["llama", "llama3", "gpt2", "qwen3"])
def test_loaded_so_or_made_so(name, tmp_path):
    """From a folder, from a GGUF file, with open_pretrained: the same bytes as those of the loaded model."""
    model = ours(CONFIGS[name])
    wanted = to_int8(load_hf(save_hf(model, tmp_path / "m"))).state_dict()
    file = save_gguf(model, tmp_path / "m.gguf", kind="F32")
    for found in (load_hf(tmp_path / "m", put=put_int8), load_gguf(file, put=put_int8)):
        state = found.state_dict()
        assert state.keys() == wanted.keys() and not found.training
        assert all(
            torch.equal(state[key], wanted[key]) and state[key].dtype == wanted[key].dtype for key in state
        )
        assert not any(p.requires_grad for p in found.parameters())


def test_open_pretrained(tmp_path):
    from dataclasses import replace

    model = ours(replace(CONFIGS["llama3"], vocab_size=257))
    folder = save_hf(model, tmp_path / "m", ByteTokenizer(["<|eos|>"]))
    wanted = to_int8(load_hf(folder)).state_dict()
    for place in (folder, save_gguf(model, tmp_path / "m.gguf", ByteTokenizer(["<|eos|>"]), "F32")):
        found = open_pretrained(place, dtype="int8")
        state = found.model.state_dict()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted) and state.keys() == wanted.keys()
        assert found.tokenizer.eos_id == 256 and found.stop_ids == {256}
    with pytest.raises(ValueError, match="int4.*fp32, bf16, fp16, int8"):
        open_pretrained(folder, dtype="int4")


@torch.no_grad()
def test_laid_out_for_writing_it_is_the_same_model():
    model = ours(CONFIGS["llama3"])
    wanted = to_int8(copy.deepcopy(model))
    torch.testing.assert_close(to_int8(lay_out(model))(IDS), wanted(IDS), atol=1e-5, rtol=0)
    torch.testing.assert_close(lay_out(wanted)(IDS), wanted(IDS), atol=1e-5, rtol=0)
