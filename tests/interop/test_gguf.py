"""GGUF files: read as the package `gguf` reads them, written so that others read them, and SmolLM2 as transformers has it.

What is damaged or made up by somebody with bad intentions is in test_hostile.py.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.interop.models import CONFIGS, GPT2, LLAMA3, SHAPE, one_sentence, ours, same_weights, weights

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

import gguf
from gguf.quants import dequantize, quantize

from tutorial_lib.core.decoding import generate_cached
from tutorial_lib.core.model import PRESETS, ModelConfig, Transformer
from tutorial_lib.core.rope import RopeScaling, half_to_interleaved, interleaved_to_half
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.corpora import fetch, load_text
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop import gguf_file
from tutorial_lib.interop.gguf import gguf_config, gguf_tokenizer, load_gguf, save_gguf
from tutorial_lib.interop.gguf_file import GGUFError, GGUFFile
from tutorial_lib.interop.gguf_vocabulary import vocabulary_fields
from tutorial_lib.interop.names import GGUF
from tutorial_lib.interop.weights import WeightsError
from tutorial_lib.moe.model import MoEConfig, MoETransformer
from tutorial_lib.quant.int8 import to_int8

TYPES = gguf.GGMLQuantizationType
IDS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
WRITABLE = {name: config for name, config in CONFIGS.items() if config.window is None}
WRITABLE["mixtral-scaled"] = replace(CONFIGS["mixtral-window"], window=None)


# --- reading, against the package's own reader --------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A file of the package's own making, with every kind of value, and tensors of many types."""
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -3)
    writer.add_uint16("a.u16", 60_000)
    writer.add_int16("a.i16", -300)
    writer.add_uint32("a.u32", 4_000_000_000)
    writer.add_int32("a.i32", -70_000)
    writer.add_uint64("a.u64", 1 << 63)
    writer.add_int64("a.i64", -(1 << 62))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve 人 🙂")
    writer.add_array("a.strings", ["", "x", "é"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_array("a.bools", [True, False])
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        for shape in ((64,), (6, 32), (5, 96), (2, 3, 64)):
            numbers = rng.normal(size=shape).astype(np.float32)
            name = f"{kind}.{'x'.join(map(str, shape))}"
            if kind in ("F32", "F16"):
                writer.add_tensor(name, numbers.astype(kind.replace("F", "float")))
            else:
                writer.add_tensor(name, quantize(numbers, TYPES[kind]), raw_dtype=TYPES[kind])
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):  # the package only reads these: any bytes will do
        block, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
        raw = rng.integers(0, 60, (3, 512 // block * size), dtype=np.uint8)
        writer.add_tensor(f"{kind}.3x512", raw, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_what_the_package_reads(mixed):
    fields = gguf.GGUFReader(mixed).fields
    found = GGUFFile(mixed).metadata
    assert found.keys() == {key for key in fields if not key.startswith("GGUF.")}
    for key, value in found.items():
        value = value if isinstance(value, (str, bool, int, float)) else list(value)
        assert value == fields[key].contents(), key
    assert found["a.string"] == "naïve 人 🙂" and found["a.f64"] == 0.1 and found["a.bool"] is True


def test_tensors_are_what_the_package_reads(mixed):
    file = GGUFFile(mixed)
    known = {tensor.name: tensor for tensor in gguf.GGUFReader(mixed).tensors}
    assert file.tensors.keys() == known.keys() and len(known) == 37
    for name, tensor in known.items():
        info = file.tensors[name]
        shape = tuple(int(n) for n in tensor.shape)[::-1]
        assert (info.shape, info.type, info.start, info.nbytes) == (
            shape,
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        assert name == f"{info.type}.{'x'.join(map(str, shape))}"
        wanted = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        np.testing.assert_array_equal(file.read(name).numpy(), wanted)
        assert torch.equal(file.read(name, torch.bfloat16), torch.from_numpy(wanted).bfloat16())


def test_large_tensors_are_read_in_pieces(mixed, monkeypatch):
    file = GGUFFile(mixed)
    whole = {name: file.read(name) for name in file.tensors}
    for chunk in (1, 64, 100):
        monkeypatch.setattr(gguf_file, "CHUNK", chunk)
        assert all(torch.equal(file.read(name), whole[name]) for name in whole)


def test_blocks_by_hand(tmp_path):
    """Two scales, 2 and 1/2, and what the formats say about the numbers 0 to 31."""
    path = tmp_path / "hand.gguf"
    numbers = np.arange(32, dtype=np.int8)
    nibbles = (np.arange(16) | (15 - np.arange(16)) << 4).astype(np.uint8)  # below: 0 … 15; above: 15 … 0
    half = lambda x: np.float16(x).tobytes()  # noqa: E731
    writer = gguf.GGUFWriter(path, "llama")
    for name, blocks in {
        "Q8_0": [half(2) + numbers.tobytes(), half(-0.5) + numbers.tobytes()],
        "Q4_0": [half(2) + nibbles.tobytes()],
        "Q4_1": [half(2) + half(-7) + nibbles.tobytes()],
    }.items():
        raw = np.frombuffer(b"".join(blocks), np.uint8)[None]
        writer.add_tensor(name, raw, raw_dtype=TYPES[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, up = GGUFFile(path), torch.arange(16.0)
    assert torch.equal(file.read("Q8_0")[0], torch.cat([2 * torch.arange(32.0), -0.5 * torch.arange(32.0)]))
    assert torch.equal(file.read("Q4_0")[0], 2 * (torch.cat([up, up.flip(0)]) - 8))
    assert torch.equal(file.read("Q4_1")[0], 2 * torch.cat([up, up.flip(0)]) - 7)


# --- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITABLE)
def test_in_32_bits_nothing_is_lost(name, tmp_path):
    model = ours(WRITABLE[name])
    back = load_gguf(save_gguf(model, tmp_path / "deep" / "m.gguf", kind="F32"))
    assert same_weights(back, model) and not back.training
    assert replace(back.config, d_mlp=80) == replace(load_gguf(tmp_path / "deep/m.gguf").config)
    with torch.no_grad():
        assert torch.equal(back(IDS), model(IDS))
    assert back.config.rope_scaling == model.config.rope_scaling
    assert (back.head.weight is back.tokens.weight) == model.config.tie_embeddings
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("name", WRITABLE)
def test_in_16_bits_each_number_is_rounded_once(name, tmp_path):
    model = ours(WRITABLE[name])
    back = weights(load_gguf(save_gguf(model, tmp_path / "m.gguf")))
    for (key, weight), read in zip(weights(model).items(), back.values(), strict=True):
        assert torch.equal(read, weight if weight.ndim == 1 or "router" in key else weight.half().float())


def q8_bound(weight: torch.Tensor) -> torch.Tensor:
    """Half a scale d, and what rounding d itself to fp16 does to 127 of them: at most 2⁻¹¹ of it, or 2⁻²⁵."""
    scale = weight.reshape(-1, 32).abs().amax(dim=1) / 127
    return scale / 2 + 127 * torch.maximum(scale * 2**-11, torch.tensor(2.0**-25)) + 1e-9


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3", "gpt2", "mixtral", "qwen3_moe"])
def test_in_8_bits_no_number_is_off_by_more_than_the_step(name, tmp_path):
    config = replace(WRITABLE[name], d_model=64, d_mlp=96, d_head=WRITABLE[name].d_head and 32)
    config = replace(config, d_expert=32) if name == "qwen3_moe" else config
    model = ours(config)
    back = weights(load_gguf(save_gguf(model, tmp_path / "m.gguf", kind="Q8_0")))
    interleaved = name.startswith("llama")
    coarse = 0
    for (key, weight), read in zip(weights(model).items(), back.values(), strict=True):
        if weight.ndim == 1 or "router" in key:
            assert torch.equal(read, weight)
            continue
        error = (weight - read).reshape(-1, 32).abs().amax(dim=1)
        assert (error <= q8_bound(weight)).all(), key
        largest = weight.reshape(-1, 32).abs().amax(dim=1)
        assert (error <= largest / 225).all(), key  # as the docstring says
        coarse += int((error > q8_bound(weight) / 4).sum())
    assert coarse > 100  # and it is not that nothing was rounded
    assert interleaved == (f"{GGUF['tokens']}.weight" == "token_embd.weight" and name in ("llama", "llama3"))


def test_what_has_no_whole_blocks_is_stored_in_16_bits(tmp_path):
    save_gguf(ours(CONFIGS["llama"]), tmp_path / "m.gguf", kind="Q8_0")  # rows of 48 and of 80
    kinds = {info.type for info in GGUFFile(tmp_path / "m.gguf").tensors.values()}
    assert kinds == {"F32", "F16"}


@pytest.mark.parametrize(("kind", "most"), [("F16", 65504), ("Q8_0", 65504)])
def test_what_is_too_large_is_refused(kind, most, tmp_path):
    model = ours(ModelConfig(**{**SHAPE, "d_model": 64}))
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = most
    load_gguf(save_gguf(model, tmp_path / "good.gguf", kind=kind))
    for bad in (1e7, float("nan"), float("inf")):
        with torch.no_grad():
            model.blocks[1].mlp.down.weight[0, 0] = bad
        with pytest.raises(WeightsError, match="blk.1.ffn_down.weight") as error:
            save_gguf(model, tmp_path / "bad.gguf", kind=kind)
        assert one_sentence(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["good.gguf"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (CONFIGS["mistral"], "window"),
        (CONFIGS["qwen3-windows"], "window"),
        (ModelConfig(**SHAPE, rope_scaling=RopeScaling("ntk", 2.0)), "rope_scaling"),
        (ModelConfig(**SHAPE, logit_soft_cap=30.0), "logit_soft_cap"),
        (ModelConfig(**SHAPE, mlp="gelu"), "mlp"),
    ],
)
def test_what_llama_cpp_has_not_is_named(config, said, tmp_path):
    with pytest.raises(WeightsError, match=said) as error:
        save_gguf(ours(config), tmp_path / "m.gguf")
    assert one_sentence(error.value) and not list(tmp_path.iterdir())


def test_int8_and_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="int8"):
        save_gguf(to_int8(ours(CONFIGS["llama"])), tmp_path / "m.gguf")
    with pytest.raises(WeightsError, match="Q4_0.*F32, F16, Q8_0"):
        save_gguf(ours(CONFIGS["llama"]), tmp_path / "m.gguf", kind="Q4_0")
    assert not list(tmp_path.iterdir())


def test_whole_numbers_where_fractions_are_meant(tmp_path):
    """`factor: 2` in a YAML file: other readers want a float there, and so do we."""
    config = ModelConfig(**SHAPE, rope_base=10_000, rope_scaling=RopeScaling("linear", 2))
    back = load_gguf(save_gguf(ours(config), tmp_path / "m.gguf")).config
    assert back.rope_scaling == config.rope_scaling and back.rope_base == 10_000
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    for name in ("freq_base", "scaling.factor"):
        assert fields[f"llama.rope.{name}"].types == [gguf.GGUFValueType.FLOAT32]


@pytest.mark.parametrize("factor", [1.1, 2.5, 40.0])
def test_numbers_come_back_as_they_were_written_down(factor, tmp_path):
    config = ModelConfig(**SHAPE, norm_eps=1e-6, rope_scaling=RopeScaling("linear", factor), rope_base=1e6)
    back = gguf_config(save_gguf(ours(config), tmp_path / "m.gguf"))
    assert back == replace(config, n_kv_heads=4)


def test_llama3s_factors_without_our_note(tmp_path):
    """llama.cpp's own files have the factors only: Meta's settings are recognized by them, others are refused."""
    usual, unusual = RopeScaling("llama3", 32.0), LLAMA3
    for scaling in (usual, unusual):
        model = ours(ModelConfig(**{**SHAPE, "d_head": 64}, rope_base=5e5, rope_scaling=scaling))
        save_gguf(model, tmp_path / "ours.gguf", kind="F32")
        reader = gguf.GGUFReader(tmp_path / "ours.gguf")
        writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
        for key, field in reader.fields.items():
            if not key.startswith(("GGUF.", "general.architecture", "llm_scratch")):
                writer.add_key_value(key, field.contents(), field.types[0])
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if scaling is usual:
            back = load_gguf(tmp_path / "theirs.gguf")
            assert back.config.rope_scaling == usual
            assert same_weights(back, model)
        else:
            with pytest.raises(GGUFError, match="not those of Llama 3") as error:
                load_gguf(tmp_path / "theirs.gguf")
            assert one_sentence(error.value)


# --- what others make of our files --------------------------------------------------------------------------

TEXT = "To be, or not to be: that's the question.\n\n  1234 naïve café 人人 🙂\t\r\n end  <|eos|>"
OWN = BPETokenizer.train(TEXT * 9, 300, ["<|eos|>", "<|user|>"])


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_the_package_reads_what_we_write(kind, tmp_path):
    config = ModelConfig(**{**SHAPE, "vocab_size": 310, "d_model": 64}, n_kv_heads=2, tie_embeddings=False)
    model = ours(config)
    save_gguf(model, tmp_path / "m.gguf", OWN, kind, name="mine", chat_template="{{ messages }}")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "llama" and said["general.name"] == "mine"
    wanted: dict[str, Any] = {
        "context_length": 64, "embedding_length": 64, "block_count": 3, "feed_forward_length": 80,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 16, "vocab_size": 310,
    }  # fmt: skip
    assert {name: said[f"llama.{name}"] for name in wanted} == wanted
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert said["tokenizer.chat_template"] == "{{ messages }}"
    tokens = said["tokenizer.ggml.tokens"]
    assert len(tokens) == 310 and len(set(tokens)) == 310 and tokens[65] == "A" and tokens[298] == "<|eos|>"
    assert said["tokenizer.ggml.token_type"] == [1] * 298 + [3] * 2 + [5] * 10
    assert len(said["tokenizer.ggml.merges"]) == 42 and said["tokenizer.ggml.eos_token_id"] == 298
    expected = {
        name.format(i)
        for i in range(3)
        for name in GGUF.values()
        if "norm" not in name or "attn_norm" in name or "ffn_norm" in name
    }
    expected = {f"{name}.weight" for name in expected | {"output_norm"}}
    assert {tensor.name for tensor in reader.tensors} == expected
    for tensor in reader.tensors:
        rows = [int(n) for n in tensor.shape][::-1]
        matrix = "F16" if kind == "Q8_0" and rows[-1] % 32 else kind
        assert tensor.tensor_type.name == ("F32" if len(rows) == 1 else matrix), tensor.name
        assert tensor.data_offset % 32 == 0
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    numbers = dequantize(table.data, table.tensor_type).reshape(310, 64)
    np.testing.assert_allclose(
        numbers, model.tokens.weight.detach().numpy(), atol={"F32": 0, "F16": 4e-4, "Q8_0": 5e-3}[kind]
    )
    queries = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    turned = half_to_interleaved(model.blocks[0].attn.q.weight.detach(), 4).numpy()
    if kind == "F32":
        np.testing.assert_array_equal(queries.data, turned)


@pytest.mark.parametrize("tokenizer", [OWN, ByteTokenizer(["<|eos|>", "<|user|>"]), ByteTokenizer()])
@pytest.mark.parametrize("spare", [0, 7])
def test_the_tokenizer_goes_along(tokenizer, spare, tmp_path):
    """With as many rows as there are tokens, or more."""
    model = ours(ModelConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size + spare, "n_layers": 1}))
    back = gguf_tokenizer(save_gguf(model, tmp_path / "m.gguf", tokenizer))
    assert back.vocab_size == tokenizer.vocab_size and back.eos_id == tokenizer.eos_id
    assert back.specials == tokenizer.specials
    for allow in (False, True):
        assert back.encode(TEXT, allow) == tokenizer.encode(TEXT, allow)
    assert back.decode(back.encode(TEXT)) == TEXT
    with pytest.raises(ValueError, match="outside the vocabulary"):
        back.decode([tokenizer.vocab_size])


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="300 tokens, the model only 96"):
        save_gguf(ours(CONFIGS["llama"]), tmp_path / "m.gguf", OWN)
    odd = BPETokenizer(OWN.ranks, (), r"\S+|\s+")
    with pytest.raises(WeightsError, match="no name for how this tokenizer cuts"):
        save_gguf(ours(ModelConfig(**{**SHAPE, "vocab_size": 300})), tmp_path / "m.gguf", odd)
    assert not list(tmp_path.iterdir())


# --- a wrong tensor is named --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), "'blk.1.ffn_up.weight' is missing"),
        (lambda t: t.update({"blk.3.ffn_up.weight": np.ones((80, 48), np.float32)}), "'blk.3.ffn_up.weight' is not part"),
        (lambda t: t.update({"blk.1.ffn_up.weight": np.ones((48, 80), np.float32)}), r"ffn_up.*\(48, 80\).*\(80, 48\)"),
        (lambda t: t.update({"output_norm.weight": np.ones(47, np.float32)}), r"output_norm.*\(47,\).*\(48,\)"),
        (lambda t: t.update({"blk.0.attn_q.bias": np.ones(48, np.float32)}), "attn_k.bias.*missing|attn_q.bias"),
        (lambda t: t.pop("token_embd.weight"), "token_embd.weight"),
        (lambda t: t.update({"blk.0.ffn_gate_inp.weight": np.ones((4, 48), np.float32)}), "ffn_gate_inp"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named(change, said, tmp_path):
    save_gguf(ours(CONFIGS["llama"]), tmp_path / "good.gguf", kind="F32")
    reader = gguf.GGUFReader(tmp_path / "good.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    change(tensors)
    writer = gguf.GGUFWriter(tmp_path / "bad.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0])
    for name, numbers in tensors.items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightsError, match=said) as error:
        load_gguf(tmp_path / "bad.gguf")
    assert one_sentence(error.value)


# --- transformers reads small models of ours ----------------------------------------------------------------

THEY_READ = {  # their reader takes the rest of a shape from the defaults of its classes
    "llama": CONFIGS["llama"],
    "qwen3": ModelConfig(
        **{**SHAPE, "d_model": 256, "n_layers": 2}, n_kv_heads=2, d_head=128, qk_norm=True, norm_eps=1e-6
    ),
    "qwen3_moe": replace(CONFIGS["qwen3_moe"], d_expert=768),  # of Mixtral, they read no GGUF
    "gpt2": ModelConfig(50257, 1024, 48, 4, n_layers=2, **GPT2),
}


@pytest.fixture(scope="module")
def their_gguf():
    """How transformers loads a GGUF file; what it does twice, or 397 times, is remembered: it takes a third of the time."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    def load(path: Path):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
        return model.eval()

    reader = gguf.GGUFReader

    @functools.cache
    def read_at_once(path: str) -> gguf.GGUFReader:  # 150,000 slices of a memory map take long
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np, "memmap", lambda path, mode: np.fromfile(path, np.uint8))
            return reader(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", read_at_once)
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        yield load


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", THEY_READ)
def test_transformers_computes_the_same_from_our_file(name, their_gguf, tmp_path):
    model = ours(THEY_READ[name])
    theirs = their_gguf(save_gguf(model, tmp_path / "m.gguf", kind="F32"))
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=2e-5, rtol=0)


# --- SmolLM2 ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path() -> Path:
    return fetch("smollm2")  # 98 MB, once


@pytest.fixture(scope="module")
def model(path):
    return load_gguf(path)


@pytest.fixture(scope="module")
def tokenizer(path):
    return gguf_tokenizer(path)


CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
PROMPTS = [
    CHAT,
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Die Straße ist naß — 12345 × 678 = 人工知能 🙂",
]


@pytest.mark.slow
def test_its_shape_is_the_preset(path, model):
    assert gguf_config(path) == model.config
    assert model.config == PRESETS["smollm2-135m"]
    assert model.num_params() == 134_515_008
    assert model.head.weight is model.tokens.weight and not model.training


@torch.no_grad()
@pytest.mark.slow
def test_it_is_transformers_smollm2(path, model, tokenizer, their_gguf):
    """The same logits, and the same words as long as no two are nearly as likely."""
    theirs = their_gguf(path)
    compared = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt, allow_specials=True)])
        written = torch.stack(list(generate_cached(model, ids, 32, temperature=0)), dim=1)
        # What they score before and behind our words, all at once: the same as their own writing, up to the first
        # difference.
        scores, n = theirs(torch.cat([ids, written], dim=1)).logits, ids.shape[1]
        # Scores of about 20, sums in another order: 0.0 apart on one processor, 1.6e-4 on another.
        torch.testing.assert_close(model(ids), scores[:, :n], atol=1e-3, rtol=0)
        scores = scores[0, n - 1 : -1]
        best, chosen = scores.topk(2).values, scores.argmax(-1)
        steps = 0
        for step in range(32):
            if best[step, 0] - best[step, 1] < 1e-3:
                break
            assert chosen[step] == written[0, step], (prompt, step)
            steps += 1
        compared.append(steps)
    assert sum(compared) >= 100, compared


@pytest.mark.slow
def test_it_knows_the_capital_of_france(model, tokenizer):
    ids = torch.tensor([tokenizer.encode(CHAT, allow_specials=True)])
    end = tokenizer.specials["<|im_end|>"]
    answer = [int(token) for token in generate_cached(model, ids, 24, temperature=0, eos_id=end)]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
def test_the_marks_of_the_chat_are_single_tokens(tokenizer):
    marks = "<|im_start|><|im_end|>"
    assert len(tokenizer.encode(marks, allow_specials=True)) == 2
    assert len(tokenizer.encode(marks)) > 2 and tokenizer.decode(tokenizer.encode(marks)) == marks
    assert len(tokenizer.encode("1234")) == 4  # digit by digit
    line = "Into the air; and what seem'd corporal\n\tmelted — as breath into the wind."
    assert tokenizer.decode(tokenizer.encode(line)) == line
    assert tokenizer.eos == "<|im_end|>" and tokenizer.vocab_size == 49152


@pytest.mark.slow
def test_what_we_would_write_of_its_tokenizer_is_what_its_makers_wrote(path, tokenizer):
    found = GGUFFile(path).metadata
    for key, value in vocabulary_fields(tokenizer, 49152).items():
        assert value == (list(found[key]) if isinstance(value, list) else found[key]), key


@torch.no_grad()
def loss(model: Transformer, ids: list[int]) -> float:
    logits = model(torch.tensor([ids[:-1]]))
    return float(F.cross_entropy(logits[0], torch.tensor(ids[1:])))


@pytest.mark.slow
def test_queries_and_keys_must_be_put_back_in_order(model, tokenizer):
    """llama.cpp stores their rows for interleaved pairs; with these, each head turns the wrong pairs."""
    ids = tokenizer.encode(load_text("shakespeare")[-3000:].decode())[:160]
    right = loss(model, ids)

    def reorder(how) -> None:
        with torch.no_grad():
            for block in model.blocks:
                attn = block.attn
                attn.q.weight.copy_(how(attn.q.weight, attn.n_heads))
                attn.k.weight.copy_(how(attn.k.weight, attn.n_kv_heads))

    reorder(half_to_interleaved)
    try:
        wrong = loss(model, ids)
    finally:
        reorder(interleaved_to_half)
    assert np.exp(right) < 150 and np.exp(wrong) > 2 * np.exp(right)
    assert loss(model, ids) == pytest.approx(right, abs=1e-4)


# --- memory -------------------------------------------------------------------------------------------------

MEASURE = """
import json, os, sys
from pathlib import Path
import torch
from tutorial_lib.interop.gguf import load_gguf
from tutorial_lib.interop.hf import load_hf
from tutorial_lib.interop.weights import put
from tutorial_lib.quant.int8 import put_int8

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

def ratio(path, dtype, how):
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark
    before = status("VmRSS")
    load = load_gguf if path.endswith(".gguf") else load_hf
    model = load(path, getattr(torch, dtype), put={"int8": put_int8, "": put}[how])
    numbers = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return (status("VmHWM") - before) / sum(numbers.values())

for job in sys.argv[3:]:
    if not (child := os.fork()):  # each with memory that nobody used before
        for tiny in sys.argv[1:3]:
            ratio(tiny, "float32", "")  # all code that it takes is in memory now
        print(json.dumps([job, ratio(*job.split("|"))]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells how much memory there was"
)
def test_loading_takes_hardly_more_memory_than_the_model(tmp_path, path):
    from tutorial_lib.interop.hf import save_hf

    tiny = [save_gguf(ours(CONFIGS["llama"]), tmp_path / "tiny.gguf")]
    tiny.append(save_hf(ours(CONFIGS["llama"]), tmp_path / "tiny"))
    model = Transformer(ModelConfig(4000, 512, 512, 8, 4, 4, d_mlp=1536, tie_embeddings=False))  # 66 MB
    one, many = save_hf(model, tmp_path / "one"), save_hf(model, tmp_path / "many", shard_bytes=2 * 10**7)
    file = save_gguf(model, tmp_path / "m.gguf", kind="F32")
    jobs = [f"{place}|float32|" for place in (one, many, file, path)]  # path: SmolLM2
    jobs += [f"{one}|bfloat16|", f"{file}|float32|int8"]
    shape = MoEConfig(
        4000, 512, 256, 4, n_layers=3, d_mlp=512, tie_embeddings=False, n_experts=8, qk_norm=True
    )
    experts = save_hf(
        MoETransformer(shape), tmp_path / "experts"
    )  # 46 MB, 8 · 9 of its 105 tensors are experts
    jobs += [f"{experts}|float32|", f"{experts}|bfloat16|", f"{experts}|float32|int8"]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, tiny), *jobs], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = {job.rpartition("/")[2]: ratio for job, ratio in map(json.loads, run.stdout.splitlines())}
    assert len(found) == len(jobs) and all(0.9 < ratio for ratio in found.values()), found
    # Whatever it becomes, a tensor is in memory once as it was in the file: of int8, half of this model is one table.
    most = {
        "float32|": 1.3,
        "bfloat16|": 1.7,
        "int8": 2.7,
    }  # all of it in fp32 would be 2 and 4 times as much, and more
    assert all(
        ratio <= next(v for k, v in most.items() if job.endswith(k)) for job, ratio in found.items()
    ), found


@pytest.mark.parametrize("most", [300, 20_000])  # in the header; among the tensors
def test_a_disk_that_is_full(tmp_path, most):
    """Nothing half-written stays, and the sentence names the file."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(OSError, match="(could not be written|too large).*m.gguf") as found:
            save_gguf(ours(CONFIGS["llama"]), tmp_path / "m.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.value.errno and not list(tmp_path.iterdir())
