"""Another order in memory changes nothing but the strides."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.interop.models import CONFIGS, ours, same_weights
from tutorial_lib.core.decoding import generate_cached, left_pad
from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.data.adapters import as_huggingface
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.gguf import load_gguf, save_gguf
from tutorial_lib.interop.hf import load_hf, save_hf
from tutorial_lib.interop.layout import lay_out, put_laid_out
from tutorial_lib.quant.int8 import to_int8

MODELS = ["llama", "llama3", "qwen3", "qwen3-windows", "gpt2"]
each_model = pytest.mark.parametrize("name", MODELS)
IDS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))


def pair(name: str):
    """A model, and the same laid out."""
    plain = ours(CONFIGS[name])
    model = copy.deepcopy(plain)
    assert lay_out(model) is model
    return plain, model


def order(model) -> dict[str, tuple[int, ...]]:
    return {name: parameter.stride() for name, parameter in model.named_parameters()}


@each_model
def test_the_numbers_are_the_same_and_only_the_strides_are_not(name):
    plain, model = pair(name)
    assert same_weights(plain, model)
    assert (model.head.weight is model.tokens.weight) == CONFIGS[name].tie_embeddings
    turned = set()
    for block in model.blocks:
        if CONFIGS[name].bias:  # it keeps them apart
            continue
        for group in [(block.attn.q, block.attn.k, block.attn.v), (block.mlp.gate, block.mlp.up)]:
            rows = sum(member.out_features for member in group)
            assert [member.weight.stride() for member in group] == [(1, rows)] * len(group)
            assert len({member.weight.untyped_storage().data_ptr() for member in group}) == 1
            turned.update(member.weight for member in group)
    for module_name, module in model.named_modules():
        alone = isinstance(module, torch.nn.Linear) and module.weight not in turned
        if alone and module.out_features >= module.in_features:
            assert module.weight.stride() == (1, module.out_features), module_name
            turned.add(module.weight)
    assert all(p.is_contiguous() for p in model.parameters() if p not in turned) and len(turned) > 9


@each_model
def test_it_says_the_same(name):
    plain, model = pair(name)
    with torch.no_grad():
        expected = plain(IDS)
        assert (model(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()
        caches = [m.new_cache(2, 20) for m in (plain, model)]
        for piece in IDS.split([9, 1, 1, 9], dim=1):  # prefill, decoding
            a, b = (m(piece, cache=cache) for m, cache in zip((plain, model), caches, strict=True))
            assert (a - b).abs().max() < 1e-4 * expected.abs().max()
    one, other = (
        torch.stack(list(generate_cached(m.double(), IDS, 12, temperature=0))) for m in (plain, model)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama", "linear", "mistral", "qwen3", "qwen3-windows"])
def test_prompts_of_different_lengths_get_the_same_answers(name):
    plain, model = pair(name)
    ids, positions = left_pad([[5, 7, 9], list(range(1, 12)), [3]])
    one, other = (list(generate_cached(m, ids, 14, positions, temperature=0)) for m in (plain, model))
    assert torch.equal(torch.stack(one), torch.stack(other))


def test_one_token_takes_fewer_products():
    config = CONFIGS["qwen3"]
    model = lay_out(ours(config))
    seen: list[int] = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear:
                seen.append(args[1].shape[0])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        cache = model.new_cache(1, 8)
        model(IDS[:1, :4], cache=cache)
        assert len(seen) == 6 * config.n_layers + 1  # q · k · v · out · gate and up · down
        seen.clear()
        model(IDS[:1, 4:5], cache=cache)
        assert len(seen) == 4 * config.n_layers + 1  # q, k, v · out · gate and up · down


def test_a_weight_that_was_replaced_is_the_one_that_is_read():
    plain, model = pair("llama")
    with torch.no_grad():
        for m in (plain, model):
            for layer, name in ((m.blocks[1].attn, "k"), (m.blocks[0].mlp, "up"), (m.blocks[2].attn, "q")):
                linear = getattr(layer, name)
                linear.weight = torch.nn.Parameter(linear.weight.flip(0).contiguous())
            m.blocks[2].attn.v.weight.mul_(2)  # in place
        caches = [m.new_cache(2, 20) for m in (plain, model)]
        for piece in IDS.split([3, 1, 1, 1, 14], dim=1):
            a, b = (m(piece, cache=cache) for m, cache in zip((plain, model), caches, strict=True))
            assert (a - b).abs().max() < 1e-4 * a.abs().max()


@each_model
def test_a_second_time_changes_nothing(name):
    plain, model = pair(name)
    before = order(model)
    lay_out(model)
    assert order(model) == before and same_weights(plain, model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_trained_as_before(name):
    losses = []
    for model in pair(name):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            logits = model(IDS[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert (model.head.weight is model.tokens.weight) == CONFIGS[name].tie_embeddings
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4) and losses[2] < losses[0]


@each_model
def test_what_is_saved_comes_back(name, tmp_path):
    plain, model = pair(name)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh, turned = ours(CONFIGS[name], seed=1), lay_out(ours(CONFIGS[name], seed=2))
    for into in (fresh, turned):
        into.load_state_dict(state)
        assert same_weights(into, plain)
    before = order(turned)
    turned.load_state_dict(plain.state_dict())
    assert order(turned) == before and same_weights(turned, plain)
    half = model.to(torch.bfloat16)  # what was stacked is not any more
    assert same_weights(half, plain.to(torch.bfloat16))
    with torch.no_grad():
        assert half(IDS[:, :1], cache=half.new_cache(2, 4)).isfinite().all()


@each_model
def test_weights_of_huggingface_may_be_laid_out_as_they_are_read(name, tmp_path):
    plain, model = pair(name)
    save_hf(model, tmp_path / "hf")
    assert same_weights(load_hf(tmp_path / "hf"), plain)
    loaded = load_hf(tmp_path / "hf", put=put_laid_out)
    assert order(loaded) == order(model) and same_weights(loaded, plain)
    assert (loaded.head.weight is loaded.tokens.weight) == CONFIGS[name].tie_embeddings


def test_weights_of_a_gguf_file_too(tmp_path):
    config = replace(CONFIGS["llama"], vocab_size=257)
    plain = ours(config)
    model = lay_out(copy.deepcopy(plain))
    save_gguf(model, tmp_path / "m.gguf", as_huggingface(ByteTokenizer(["<|eos|>"])), kind="F32")
    loaded = load_gguf(tmp_path / "m.gguf", put=put_laid_out)
    assert same_weights(loaded, plain) and order(loaded) == order(model)


def test_gpt_is_laid_out_and_int8_left_alone():
    gpt = GPT(GPTConfig(96, 32, 48, 4, 2)).eval()
    with torch.no_grad():
        expected = gpt(IDS)
        assert (lay_out(gpt)(IDS) - expected).abs().max() < 1e-5
        assert gpt.head.weight is gpt.tokens.weight and gpt.head.weight.stride() == (1, 96)
        small = to_int8(ours(CONFIGS["llama"]))
        expected = small(IDS)
        assert torch.equal(lay_out(small)(IDS), expected), "there is nothing to lay out"
