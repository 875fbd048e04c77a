"""Weights in eight bits: the step that was promised, and a model that computes what its rounded matrices say."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.core.experts import FORMS, Experts
from tests.interop.models import CONFIGS, ours, shaken
from tutorial_lib.core.decoding import generate_cached
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.gguf import load_gguf, save_gguf
from tutorial_lib.interop.hf import load_hf, save_hf
from tutorial_lib.interop.layout import lay_out
from tutorial_lib.interop.names import Rule
from tutorial_lib.interop.pretrained import open_pretrained
from tutorial_lib.interop.weights import fill
from tutorial_lib.quant import int8
from tutorial_lib.quant.int8 import Int8Embedding, Int8Linear, Int8Stack, put_int8, quantize_rows, to_int8

IDS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What is left of a matrix; written plainly, row by row."""
    rows = []
    for row in weight.detach().double().flatten(0, -2):
        scale = max(float(row.abs().max()), 1e-12) / 127
        rows.append((row / scale).round() * scale)
    return torch.stack(rows).float().view(weight.shape)


def dequantized(model: Transformer) -> Transformer:
    """The same model, with each matrix as int8 has it, in fp32 again."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            matrix = isinstance(module, (nn.Linear, nn.Embedding)) and name.endswith("weight")
            if (matrix or weight.ndim == 3) and "router" not in name:
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


def test_rows_rounded_by_hand():
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


def test_a_table_gives_its_rounded_rows():
    table = torch.randn(50, 8)
    small = Int8Embedding(*quantize_rows(table))
    ids = torch.tensor([[0, 49], [7, 7]])
    torch.testing.assert_close(small(ids), rounded(table)[ids])
    assert Int8Embedding(*quantize_rows(table), torch.bfloat16)(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_its_matrices(dtype):
    weight = torch.randn(3, 130, 8).to(dtype)
    small = Int8Stack(*quantize_rows(weight), dtype)
    assert small.shape == (3, 130, 8) and len(small) == 3
    assert small.weight.dtype == torch.int8 and small.scale.shape == (3, 130)
    for e, matrix in enumerate(small):
        assert matrix.shape == (130, 8) and matrix.dtype == dtype
        alone = quantize_rows(weight[e])
        assert torch.equal(small.weight[e], alone[0]) and torch.equal(small.scale[e], alone[1])
        half_a_step = alone[1][:, None] / 2 + torch.finfo(dtype).eps * weight[e].abs()
        assert ((matrix - weight[e]).abs() <= half_a_step).all()
    assert torch.equal(small[:], torch.stack([small[0], small[1], small[2]]))
    assert torch.equal(small[torch.tensor([2, 0])], torch.stack([small[2], small[0]]))


class Largest(TorchDispatchMode):
    """How many numbers the largest new tensor of floating point had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            if out.untyped_storage().data_ptr() not in given:  # not a view
                self.numel = max(self.numel, out.numel())
        return out


def test_no_second_copy_of_a_stack_in_full_precision():
    model = nn.Module()
    model.down = nn.Parameter(torch.randn(4, 16 * int8.ROWS, 40))
    with torch.no_grad(), Largest() as largest:
        put_int8(model, "down", model.down.detach())
    assert isinstance(model.down, Int8Stack) and 0 < largest.numel <= 4 * int8.ROWS * 40
    with Largest() as largest:
        model.down[3]
    assert largest.numel == 16 * int8.ROWS * 40


# --- models -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_computes_what_its_rounded_matrices_say(name):
    """Tied and not, with biases, with windows, GPT-2 with its table of positions."""
    model = ours(CONFIGS[name])
    wanted, exact = dequantized(model)(IDS), model(IDS)
    small = to_int8(copy.deepcopy(model))
    torch.testing.assert_close(small(IDS), wanted, atol=1e-4, rtol=0)
    off = (wanted - exact).abs()
    # Something was rounded, and not much: a token that is sent to another expert may be far off, and few are.
    assert 1e-3 < off.max() and off.mean() < 0.1 * exact.std()


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


# --- experts ------------------------------------------------------------------------------------------------

SHAPE = ModelConfig(96, 64, 48, n_kv_heads=2, n_layers=2, d_mlp=80, tie_embeddings=False)


def with_experts(stacked: bool) -> Transformer:
    return shaken(Transformer(SHAPE, lambda layer: Experts(48, 80, 6, stacked=stacked)))


each_form = pytest.mark.parametrize("stacked", FORMS.values(), ids=FORMS)


@torch.no_grad()
@each_form
def test_experts_compute_what_their_rounded_matrices_say(stacked):
    model = with_experts(stacked)
    wanted, exact = dequantized(model)(IDS), model(IDS)
    small = to_int8(copy.deepcopy(model))
    torch.testing.assert_close(small(IDS), wanted, atol=1e-4, rtol=0)
    assert (wanted - exact).abs().max() > 1e-3
    for before, after in zip(model.blocks, small.blocks, strict=True):
        assert type(after.mlp.router) is nn.Linear and isinstance(after.mlp.shared.down, Int8Linear)
        assert torch.equal(before.mlp.router.weight, after.mlp.router.weight)
        assert torch.equal(before.mlp.router.bias, after.mlp.router.bias)
    assert not any(p.requires_grad for p in small.parameters())
    left = {name for name, p in small.named_parameters() if p.ndim > 1}
    assert left == {f"blocks.{layer}.mlp.router.weight" for layer in range(2)}


@each_form
def test_experts_take_a_quarter_of_the_memory(stacked):
    model = with_experts(stacked)
    kept = [p for name, p in model.named_parameters() if p.ndim == 1 or "router" in name]
    rounded_ones = [p for name, p in model.named_parameters() if p.ndim > 1 and "router" not in name]
    numbers, rows = sum(p.numel() for p in rounded_ones), sum(p[..., 0].numel() for p in rounded_ones)
    assert nbytes(to_int8(model)) == numbers + 4 * rows + sum(p.nbytes for p in kept)
    assert numbers > 20 * sum(p.numel() for p in kept)


@each_form
def test_experts_are_filled_one_tensor_at_a_time(stacked):
    model = with_experts(stacked)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = to_int8(model).state_dict()
    rules = [Rule(f"their.{name}", (name,)) for name in weights]
    shapes = {f"their.{name}": tuple(weight.shape) for name, weight in weights.items()}
    empty = Transformer(SHAPE, lambda layer: Experts(48, 80, 6, stacked=stacked))
    found = fill(empty, rules, shapes, lambda name: weights[name[6:]], "a file", put=put_int8).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    again = to_int8(Transformer(SHAPE, lambda layer: Experts(48, 80, 6, stacked=stacked)))
    again.load_state_dict(found)  # what was saved loads
    assert all(torch.equal(again.state_dict()[name], wanted[name]) for name in wanted)


def test_a_module_that_wants_full_precision_keeps_all_that_is_inside_it():
    model = with_experts(stacked=True)
    model.blocks[0].mlp.full_precision = True
    before = {name: p.detach().clone() for name, p in model.blocks[0].mlp.named_parameters()}
    to_int8(model)
    after = dict(model.blocks[0].mlp.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert isinstance(model.blocks[0].attn.out, Int8Linear) and isinstance(
        model.blocks[1].mlp.down, Int8Stack
    )


# --- from files ---------------------------------------------------------------------------------------------


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


def test_any_format_opens_to_the_same_eight_bits(tmp_path):
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
