"""Files from somebody who means no good: each is loaded or refused with one sentence, and none may take much memory."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.interop.models import GPT2, LLAMA3, one_sentence, ours, same_weights

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from tutorial_lib.core.model import ModelConfig
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.interop.gguf import gguf_tokenizer, load_gguf, save_gguf
from tutorial_lib.interop.gguf_file import GGUFError, GGUFFile
from tutorial_lib.interop.hf import load_hf, save_hf
from tutorial_lib.interop.pretrained import open_pretrained
from tutorial_lib.interop.tokenizers import load_tokenizer
from tutorial_lib.interop.weights import WeightsError

ROOM = 200 << 20
SMALL = ModelConfig(264, 32, 16, 2, 1, 1, d_head=8, d_mlp=24, rope_scaling=LLAMA3)
TOKENIZER = BPETokenizer.train("to be or not to be, " * 3, 262, ["<|eos|>"])
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """All is imported and was used once: what is measured later is the file's."""
    folder = tmp_path_factory.mktemp("warm")
    for config in (SMALL, ModelConfig(264, 32, 16, 2, n_layers=1, **GPT2)):
        name = str(config.rope)
        open_pretrained(save_gguf(ours(config), folder / f"{name}.gguf", TOKENIZER))
        open_pretrained(save_hf(ours(config), folder / name, TOKENIZER), "int8")


@pytest.fixture(autouse=True)
def bounded(warm):
    """No test here may ask the system for more than 200 MB; whoever does gets a MemoryError, which is no sentence."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if not Path("/proc/self/statm").exists():
        yield
        return
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(load: Callable[..., Any], *args: Any) -> str | None:
    """None if it loads, else the sentence with which it was refused. Anything else is an error of ours."""
    try:
        load(*args)
    except WeightsError as error:
        assert one_sentence(error), str(error)
        return str(error)
    return None


# --- GGUF, made by hand -------------------------------------------------------------------------------------

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def field(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return text(key) + struct.pack("<I", STRING) + text(value)
    if isinstance(value, float):
        return text(key) + struct.pack("<If", F32, value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", U32, value)
    return text(key) + value  # its type and its bytes


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(
    fields: list[bytes] | tuple = (),
    tensors: list[bytes] | tuple = (),
    data: int = 0,
    version: int = 3,
    **counts: int,
) -> bytes:
    n_tensors, n_fields = counts.get("n_tensors", len(tensors)), counts.get("n_fields", len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + b"".join([*fields, *tensors])
    return head + bytes(-len(head) % 32) + bytes(data)


LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 32,
    "llama.embedding_length": 16,
    "llama.block_count": 1,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
NAMES = {
    "token_embd": (16, 40), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,),
    "blk.0.attn_q": (16, 16), "blk.0.attn_k": (16, 16), "blk.0.attn_v": (16, 16), "blk.0.attn_output": (16, 16),
    "blk.0.ffn_gate": (16, 24), "blk.0.ffn_up": (16, 24), "blk.0.ffn_down": (24, 16),
}  # fmt: skip


def llama(
    tensors: dict[str, bytes] | None = None, extra: dict[str, tuple[int, ...]] | None = None, **fields: Any
) -> bytes:
    """A small Llama of zeros, with some things changed; a dot in a field's name is written as two underscores."""
    said = {**LLAMA, **{key.replace("__", "."): value for key, value in fields.items()}}
    rows, at = {}, 0
    for name, dims in {**NAMES, **(extra or {})}.items():
        rows[name] = tensor(f"{name}.weight", dims, 0, at)
        at += 4 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        at += -at % 32
    rows |= tensors or {}
    return file([field(k, v) for k, v in said.items() if v is not None], list(rows.values()), at)


HUGE = (1 << 64) - 1
GGUF_CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short"),
    "text": (b"To be, or not to be" * 99, "begins with b'To b'"),
    "magic alone": (b"GGUF", "cut short"),
    "version 1": (file(version=1), "version 1"),
    "version from the other end": (file(version=3 << 24), "version"),
    "nothing in it": (file(), "general.architecture"),
    "endless fields": (file(n_fields=HUGE), "cut short"),
    "endless tensors": (file([field("general.architecture", "llama")], n_tensors=HUGE), "cut short|dimensions|twice"),
    "long key": (file([struct.pack("<Q", HUGE) + b"general"]), "speaks of 18,446,744,073,709,551,615 bytes"),
    "long string": (file([text("k") + struct.pack("<IQ", STRING, 1 << 40)]), "1,099,511,627,776 bytes"),
    "long array of numbers": (file([text("k") + struct.pack("<IIQ", ARRAY, U64, 1 << 61)]), "bytes"),
    "long array of bytes": (file([text("k") + struct.pack("<IIQ", ARRAY, 0, HUGE)]), "bytes"),
    "long array of strings": (file([text("k") + struct.pack("<IIQ", ARRAY, STRING, HUGE)]), "bytes"),
    "nested arrays": (
        file([text("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 50_000]),
        "array of unknown type 9",
    ),
    "unknown value": (file([text("k") + struct.pack("<I", 77) + bytes(64)]), "unknown type 77"),
    "a key twice": (file([field("k", 1), field("k", 2)]), "'k' comes twice"),
    "a tensor twice": (file(tensors=[tensor("t", (8,)), tensor("t", (8,), 0, 32)], data=64), "comes twice"),
    "no dimensions": (file(tensors=[tensor("t", ())]), "0 dimensions"),
    "many dimensions": (file(tensors=[tensor("t", (1,) * 5)]), "5 dimensions"),
    "endless dimensions": (file(tensors=[text("t") + struct.pack("<IQ", (1 << 32) - 1, 1)]), "dimensions"),
    "a product that overflows": (file(tensors=[tensor("t", (1 << 32, 1 << 32, 1, 4))], data=64), "ends at byte"),
    "a product of nothing": (file(tensors=[tensor("t", (1 << 62, 0))], data=64), "no whole blocks"),
    "an offset outside": (file(tensors=[tensor("t", (8,), 0, 1 << 40)], data=64), "ends at byte"),
    "an offset that overflows": (file(tensors=[tensor("t", (8,), 0, HUGE - 7)], data=64), "ends at byte"),
    "tensors that share bytes": (file(tensors=[tensor("t", (8,)), tensor("u", (8,), 0, 16)], data=64), "share bytes"),
    "no whole blocks": (file(tensors=[tensor("t", (33,), 8)], data=64), "no whole blocks of Q8_0"),
    "an unknown kind": (file(tensors=[tensor("t", (8,), 4_000)], data=64), "number 4000"),
    "a kind that is not read": (file(tensors=[tensor("t", (8,), 24)], data=64), "type I8"),
    "alignment 0": (file([field("general.alignment", 0)]), "alignment of 0"),
    "alignment 24": (file([field("general.alignment", 24)]), "alignment of 24"),
    "alignment 2³¹": (file([field("general.alignment", 1 << 31)]), "alignment of 2147483648"),
    "alignment in words": (file([field("general.alignment", "x")]), "alignment of 'x'"),
    "another architecture": (llama(general__architecture="mamba"), "'mamba'"),
    "architecture 7": (llama(general__architecture=7), "architecture 7"),
    "no width": (llama(llama__embedding_length=None), "llama.embedding_length"),
    "width in words": (llama(llama__embedding_length="x"), "embedding_length is 'x'"),
    "width 0": (llama(llama__embedding_length=0), "embedding_length is 0"),
    "absurd width": (llama(llama__embedding_length=1 << 31), "embedding_length is 2147483648"),
    "absurd heads": (llama(llama__attention__head_count=1 << 31), "head_count is 2147483648"),
    "heads that do not fit": (llama(llama__attention__head_count=3), "describes no model|n_heads"),
    "key heads that do not fit": (llama(llama__attention__head_count_kv=3), "n_kv_heads"),
    "key heads in an array": (
        llama(llama__attention__head_count_kv=struct.pack("<IIQII", ARRAY, U32, 2, 1, 1)), "head_count_kv is",
    ),
    "absurd context": (llama(llama__context_length=(1 << 32) - 1), "context_length is"),
    "absurd layers": (llama(llama__block_count=1 << 31), "block_count is 2147483648, but it must be"),
    "more layers than there are": (llama(llama__block_count=3), "blk.1.attn_norm.weight' is missing"),
    "layers in words": (llama(llama__block_count="x"), "block_count is 'x'"),
    "absurd mlp": (llama(llama__feed_forward_length=1 << 31), "feed_forward_length is"),
    "eps in words": (llama(llama__attention__layer_norm_rms_epsilon="x"), "layer_norm_rms_epsilon is 'x'"),
    "eps NaN": (llama(llama__attention__layer_norm_rms_epsilon=float("nan")), "layer_norm_rms_epsilon is nan"),
    "base −1": (llama(llama__rope__freq_base=-1.0), "freq_base is -1"),
    "base in words": (llama({}, {"rope_freqs": (4,)}, llama__rope__freq_base="x"), "freq_base is 'x'"),
    "head length in words": (llama({}, {"rope_freqs": (4,)}, llama__attention__key_length="8"), "key|d_head|'8'"),
    "an odd head": (llama({}, {"rope_freqs": (4,)}, llama__attention__key_length=9), "d_head is 9|even"),
    "another value length": (llama(llama__attention__value_length=4), "value_length is 4"),
    "half a rotation": (llama(llama__rope__dimension_count=4), "dimension_count is 4"),
    "a window in words": (llama(llama__attention__sliding_window="x"), "sliding_window is 'x'"),
    "a window below zero": (
        llama(llama__attention__sliding_window=struct.pack("<Ii", 5, -3)), "sliding_window is -3",
    ),
    "another scaling": (llama(llama__rope__scaling__type="yarn"), "'yarn'"),
    "scaling NaN": (
        llama(llama__rope__scaling__type="linear", llama__rope__scaling__factor=float("nan")), "linear",
    ),
    "factors of zero": (llama({}, {"rope_freqs": (4,)}), "not those of Llama 3"),
    "too few factors": (llama({}, {"rope_freqs": (3,)}), "each of the 4 hands"),
    "settings that are none": (llama({}, {"rope_freqs": (4,)}, llm_scratch__rope_scaling="{"), "settings of RoPE"),
    "settings in a list": (llama({}, {"rope_freqs": (4,)}, llm_scratch__rope_scaling="[1]"), "settings of RoPE"),
    "settings in words": (
        llama({}, {"rope_freqs": (4,)}, llm_scratch__rope_scaling='{"factor": 2, "original_max_seq_len": "x"}'),
        "settings of RoPE",
    ),
    "settings without end": (
        llama({}, {"rope_freqs": (4,)}, llm_scratch__rope_scaling="[" * 100_000), "settings of RoPE",
    ),
    "settings beyond numbers": (
        llama({}, {"rope_freqs": (4,)}, llm_scratch__rope_scaling=json.dumps({"factor": 10**400})), "settings of RoPE|not those",
    ),
    "one layer twice": (llama({}, {"blk.1.attn_q": (16, 16)}), "blk.1.attn_q.weight' is not part"),
    "an absurd table": (llama({"token_embd": tensor("token_embd.weight", (16, 1 << 40))}), "ends at byte"),
    "a table of one dimension": (llama({"token_embd": tensor("token_embd.weight", (16,))}), r"\(16,\)"),
}  # fmt: skip


def test_the_file_that_they_are_made_from_is_good(tmp_path):
    (tmp_path / "m.gguf").write_bytes(llama())
    assert load_gguf(tmp_path / "m.gguf").config.vocab_size == 40
    with pytest.raises(GGUFError, match="tokenizer.ggml.model"):
        open_pretrained(tmp_path / "m.gguf")


@pytest.mark.parametrize("case", GGUF_CASES)
def test_a_hostile_gguf_is_refused(case, tmp_path):
    content, said = GGUF_CASES[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=said) as error:
        load_gguf(path)
    assert one_sentence(error.value), str(error.value)
    assert outcome(open_pretrained, path) is not None


def test_numbers_in_the_header_take_no_more_memory_than_the_file(tmp_path):
    """Lists of Python's numbers would: ten to twenty times as much."""
    n = 24 << 20
    path = tmp_path / "m.gguf"
    path.write_bytes(file([text("k") + struct.pack("<IIQ", ARRAY, 2, n // 2) + os.urandom(n)]))
    with pytest.raises(GGUFError, match="general.architecture"):
        load_gguf(path)


def vocabulary(model: str = "gpt2", **changed: Any) -> bytes:
    """The small Llama with a tokenizer of two letters."""
    strings = lambda *of: struct.pack("<IIQ", ARRAY, STRING, len(of)) + b"".join(map(text, of))  # noqa: E731
    numbers = lambda *of: struct.pack(f"<IIQ{len(of)}i", ARRAY, 5, len(of), *of)  # noqa: E731
    parts = {
        "tokens": strings("a", "b", "ab", "<e>"),
        "merges": strings("a b"),
        "token_type": numbers(1, 1, 1, 3),
    }
    parts |= {"pre": "gpt-2", "eos_token_id": 3, "model": model}
    made = {"strings": strings, "numbers": numbers}
    parts |= {key: value(**made) if callable(value) else value for key, value in changed.items()}
    return llama(**{f"tokenizer__ggml__{key}": value for key, value in parts.items()})


VOCABULARIES: dict[str, tuple[bytes, str]] = {
    "another kind": (vocabulary("llama"), "'llama'"),
    "kind 7": (vocabulary(model=7), "kind 7"),
    "another cut": (vocabulary(pre="deepseek"), "deepseek"),
    "a cut in an array": (vocabulary(pre=lambda strings, numbers: strings("gpt-2")), "known are"),
    "no tokens": (vocabulary(tokens=None), "tokenizer.ggml.tokens"),
    "tokens in one string": (vocabulary(tokens="ab"), "do not fit"),
    "tokens that are numbers": (vocabulary(tokens=lambda strings, numbers: numbers(1, 2, 3, 4)), "do not fit"),
    "no tokens in the list": (vocabulary(tokens=lambda strings, numbers: strings(), token_type=lambda strings, numbers: numbers(), merges=None), "token"),
    "merges that are numbers": (vocabulary(merges=lambda strings, numbers: numbers(1)), "do not fit"),
    "a merge of one": (vocabulary(merges=lambda strings, numbers: strings("a")), "cannot be built"),
    "a merge of three": (vocabulary(merges=lambda strings, numbers: strings("a b a")), "cannot be built"),
    "a merge of others": (vocabulary(merges=lambda strings, numbers: strings("x y")), "cannot be built"),
    "a merge into nothing": (vocabulary(merges=lambda strings, numbers: strings("b a")), "cannot be built"),
    "too few types": (vocabulary(token_type=lambda strings, numbers: numbers(1)), "do not fit"),
    "letters that are no bytes": (vocabulary(tokens=lambda strings, numbers: strings("a", "b", "ab", "人"), token_type=lambda strings, numbers: numbers(1, 1, 1, 1)), "stands for no byte"),
    "an end that is no token": (vocabulary(eos_token_id=99), ""),
    "an end in words": (vocabulary(eos_token_id="x"), ""),
    "an end before the first": (vocabulary(eos_token_id=struct.pack("<Ii", 5, -1)), ""),
    "a token twice": (vocabulary(tokens=lambda strings, numbers: strings("a", "a", "ab", "b")), ""),
    "all tokens unused": (vocabulary(merges=None, token_type=lambda strings, numbers: numbers(5, 5, 5, 5)), "no token .<e>"),
}  # fmt: skip


@pytest.mark.parametrize("case", VOCABULARIES)
def test_a_hostile_vocabulary_is_refused_or_harmless(case, tmp_path):
    content, said = VOCABULARIES[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    found = outcome(gguf_tokenizer, path)
    if said:
        assert found is not None
        with pytest.raises(WeightsError, match=said):
            open_pretrained(path)
    elif found is None:  # nothing is wrong that matters
        assert gguf_tokenizer(path).eos_id in (None, 3)


@pytest.fixture(scope="module")
def good(warm, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    return save_gguf(ours(SMALL), path, TOKENIZER, "F32", chat_template=TEMPLATE).read_bytes()


def header_of(content: bytes, tmp_path: Path) -> int:
    (tmp_path / "good.gguf").write_bytes(content)
    return min(info.start for info in GGUFFile(tmp_path / "good.gguf").tensors.values())


def test_cut_short_at_many_points(good, tmp_path):
    path = tmp_path / "m.gguf"
    header = header_of(good, tmp_path)
    end = max(info.start + info.nbytes for info in GGUFFile(tmp_path / "good.gguf").tensors.values())
    for size in [*range(0, header, 13), *range(header, end, 4001), end - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(GGUFError, match="cut short") as error:
            load_gguf(path)
        assert one_sentence(error.value)


def flip(content: bytes, end: int, chance: random.Random) -> bytes:
    """One to three bytes changed: another value, one bit, or a byte that files like this are full of."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(end)
        changed[at] = chance.choice([chance.randrange(256), changed[at] ^ (1 << chance.randrange(8)), 0, 255])
    return bytes(changed)


def gguf_flips(good: bytes, tmp_path: Path, seeds: range) -> tuple[int, int]:
    path, header = tmp_path / "m.gguf", header_of(good, tmp_path)
    loaded = refused = 0
    for seed in seeds:
        path.write_bytes(flip(good, header, random.Random(seed)))
        found = [outcome(load, path) for load in (load_gguf, gguf_tokenizer)]
        refused += found != [None, None]
        loaded += found == [None, None]
    return loaded, refused


def test_bytes_flipped_in_the_header(good, tmp_path):
    loaded, refused = gguf_flips(good, tmp_path, range(400))
    assert loaded > 20 and refused > 100


# --- a folder of Hugging Face's -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_hf(ours(SMALL), tmp_path / "m", TOKENIZER, chat_template=TEMPLATE)


@pytest.fixture
def shards(tmp_path) -> Path:
    return save_hf(ours(SMALL), tmp_path / "m", TOKENIZER, shard_bytes=4000)


def deep(n: int = 100_000) -> str:
    return "[" * n + "]" * n


WEIRD = [
    "null", "true", "-1", "0", "1", "3", "1.5", "NaN", "Infinity", "1e999", "-0.0", str(1 << 31), str(1 << 63),
    "1" + "0" * 4000, "1" + "0" * 5000, '"x"', '""', "[]", "{}", "[1, 2]", '{"rope_type": "linear"}',
    '{"rope_type": "llama3", "factor": 1e300}', '{"rope_type": ["llama3"]}', deep(500),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt2", "mixtral", "qwen3_moe"])
def test_weird_values_in_the_configuration(kind, folder):
    path = folder / "config.json"
    about = {
        "llama": {},
        "qwen3": {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["x"]},
        "mistral": {"model_type": "mistral", "sliding_window": 4},
        "gpt2": {
            "model_type": "gpt2", "n_positions": 32, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_inner": 24,
            "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
        },
        "mixtral": {
            "model_type": "mixtral", "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.1, "router_jitter_noise": 0.0,
        },
        "qwen3_moe": {
            "model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 4, "num_experts": 2, "num_local_experts": 2,
            "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "router_aux_loss_coef": 0.1,
        },
    }[kind]  # fmt: skip
    about = {**json.loads(path.read_text()), "partial_rotary_factor": 1.0, **about}
    refused = 0
    for name in about:
        for value in WEIRD:
            others = json.dumps({key: about[key] for key in about if key != name})
            path.write_text(f'{others[:-1]}, "{name}": {value}}}')
            refused += outcome(load_hf, folder) is not None
    assert refused > 100


CONFIGURATIONS = {
    "empty": "",
    "no object": "[]",
    "a number": "1",
    "cut short": '{"model_type": "llama"',
    "without end": deep(),
    "binary": b"\xff\xfe\x00",
    "a long number": '{"vocab_size": 1' + "0" * 10_000 + "}",
    "huge": " " * ((1 << 22) + 1),
    "many small things": "[" + "[]," * ((1 << 21) // 3 - 1) + "[]]",
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_what_is_no_configuration_is_refused(case, folder):
    content = CONFIGURATIONS[case]
    (folder / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert outcome(load_hf, folder) and outcome(open_pretrained, folder)


def test_a_missing_configuration_is_named(folder):
    (folder / "config.json").unlink()
    assert "config.json" in outcome(load_hf, folder) and "config.json" in outcome(open_pretrained, folder)
    (folder / "config.json").mkdir()
    assert "config.json" in outcome(load_hf, folder) and "config.json" in outcome(open_pretrained, folder)
    assert "config.json" in outcome(load_hf, folder / "nowhere")


def test_a_model_that_is_far_larger_than_its_file(folder):
    """Sizes that are possible, and would take terabytes: the shapes in the file are looked at first."""
    path = folder / "config.json"
    about = json.loads(path.read_text())
    large = {"hidden_size": 1 << 18, "intermediate_size": 1 << 20, "vocab_size": 1 << 22, "head_dim": 1 << 14}
    path.write_text(json.dumps({**about, **large}))
    assert "the model needs" in outcome(load_hf, folder)
    path.write_text(json.dumps({**about, "num_hidden_layers": 4096}))
    assert "more than there are" in outcome(load_hf, folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    {
        "null": ({"hidden_size": None}, "does not say hidden_size"),
        "zero": ({"hidden_size": 0}, "hidden_size is 0, but it must be"),
        "no key heads": ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        "no channels": ({"head_dim": 0}, "head_dim is 0"),
        "no layers": ({"num_hidden_layers": None}, "does not say num_hidden_layers"),
        "two bases": (
            {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 8.0}},
            "RoPE's rope_theta: 8.0 and 7.0",
        ),
        "no base": ({"rope_theta": None, "rope_parameters": {"rope_theta": -8.0}}, "rope_theta is -8.0"),
        "two scalings": (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "RoPE's rope_type: 'default' and 'yarn'",
        ),
    }.values(),
)
def test_settings_that_are_none_are_refused(changes, sentence, folder):
    path = folder / "config.json"
    about = json.loads(path.read_text())
    if "rope_parameters" in changes:
        about.pop("rope_theta"), about.pop("rope_scaling")
    path.write_text(json.dumps({**about, **changes}))
    assert re.search(sentence, outcome(load_hf, folder))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(number, folder, tmp_path):
    """Noise in a file is told, and not talked."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bad = tensors["model.norm.weight"].to(dtype)
        bad[3] = number
        save_file({**tensors, "model.norm.weight": bad}, path)
        assert "'model.norm.weight' has numbers that are not finite" in outcome(load_hf, folder)
    good = tmp_path / "good.gguf"
    good.write_bytes(llama())
    info = GGUFFile(good).tensors["output_norm.weight"]
    content = bytearray(good.read_bytes())
    content[info.start : info.start + 4] = struct.pack("<f", number)
    good.write_bytes(content)
    assert "'output_norm.weight' has numbers that are not finite" in outcome(load_gguf, good)


def safetensors(header: Any, data: int = 64, length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + bytes(data)


def one(dtype: str = "F32", shape: tuple = (16,), offsets: tuple = (0, 64)) -> dict[str, Any]:
    return {"model.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "eight bytes": bytes(8),
    "an absurd header": safetensors({}, length=1 << 62),
    "a header of 4 GB": safetensors({}, length=1 << 32),
    "a header outside": safetensors({}, length=1000),
    "no JSON": safetensors(b"\xff" * 40),
    "without end": safetensors(deep().encode()),
    "a list": safetensors([]),
    "an unknown type": safetensors(one("F33")),
    "an absurd shape": safetensors(one(shape=(1 << 62, 4))),
    "a shape that overflows": safetensors(one(shape=(1 << 33, 1 << 33))),
    "a negative shape": safetensors(one(shape=(-16,))),
    "offsets outside": safetensors(one(offsets=(0, 1 << 40))),
    "offsets the wrong way": safetensors(one(offsets=(64, 0))),
    "bytes for nobody": safetensors(one(), data=128),
    "shared bytes": safetensors({**one(), "b": one()["model.norm.weight"]}),
    "nothing in it": safetensors({}, data=0),
    "metadata that is none": safetensors({"__metadata__": {"a": 1}, **one()}),
    "a pickle": pickle.dumps({"model.norm.weight": [1.0]}),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_hostile_safetensors_are_refused(case, folder):
    (folder / "model.safetensors").write_bytes(SAFETENSORS[case])
    assert outcome(load_hf, folder) and outcome(open_pretrained, folder)


def test_every_type_of_number(folder):
    """Those that are numbers with a point are taken, all others refused."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    others = [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    for dtype in others:
        save_file({**tensors, "model.norm.weight": torch.ones(16).to(dtype)}, path)
        assert torch.equal(load_hf(folder).norm.weight, torch.ones(16))
    for dtype in (
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.complex64,
    ):
        save_file({**tensors, "model.norm.weight": torch.ones(16).to(dtype)}, path)
        assert f"holds {str(dtype).removeprefix('torch.')}" in outcome(load_hf, folder)
    header = {name: {"dtype": "F32", "shape": list(t.shape)} for name, t in tensors.items()}
    for dtype, shape in (("F8_E8M0", 16), ("F4", 32), ("F6_E2M3", 64), ("U64", 2)):
        at = 0
        for name, about in header.items():
            size = tensors[name].nbytes
            if name == "model.norm.weight":
                about |= {"dtype": dtype, "shape": [shape]}
                size = {"F4": 16, "F6_E2M3": 48}.get(dtype, 16)
            about["data_offsets"], at = [at, at + size], at + size
        path.write_bytes(safetensors(header, at))
        assert outcome(load_hf, folder) or shape == 16


def test_safetensors_cut_short_at_many_points(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for size in [*range(0, header, 29), *range(header, len(content), 3001), len(content) - 1]:
        path.write_bytes(content[:size])
        assert "not a safetensors file, or was cut short" in outcome(load_hf, folder)


def test_bytes_flipped_in_the_header_of_safetensors(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    refused = 0
    for seed in range(200):
        path.write_bytes(flip(content, header, random.Random(seed)))
        refused += outcome(load_hf, folder) is not None
    assert refused > 100


def weight_map(shards: Path, change: Callable[[dict[str, str]], Any]) -> str | None:
    path = shards / "model.safetensors.index.json"
    about = json.loads(path.read_text())
    change(about["weight_map"])
    path.write_text(json.dumps(about))
    return outcome(load_hf, shards)


def test_an_index_that_leads_out_of_the_folder(shards, tmp_path):
    outside = shutil.copy(next(shards.glob("*.safetensors")), tmp_path / "outside.safetensors")
    path = shards / "model.safetensors.index.json"
    good = path.read_text()
    for name in (
        "../outside.safetensors",
        str(outside),
        "m/../../outside.safetensors",
        "/etc/passwd",
        "..",
        "",
        "a\0b",
    ):
        said = weight_map(shards, lambda where, name=name: where.update({"model.norm.weight": name}))
        assert "no safetensors file beside it" in said, said
        path.write_text(good)


def test_an_index_that_does_not_fit(shards):
    path = shards / "model.safetensors.index.json"
    good = path.read_text()
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda where: where.pop("model.norm.weight"), "'model.norm.weight', which .* does not say"),
        (lambda where: where.update({"more": where["model.norm.weight"]}), "'more', which is not in"),
        (
            lambda where: where.update({"model.norm.weight": "other.safetensors"}),
            "other.safetensors|does not say",
        ),
        (lambda where: where.update({"model.norm.weight": 7}), "no weight_map"),
        (lambda where: where.update({"model.norm.weight": ["a"]}), "no weight_map"),
        (lambda where: where.update({"model.norm.weight": "pytorch_model.bin"}), "pytorch_model.bin"),
        (lambda where: where.clear(), "more than there are"),
    ]
    for change, said in changes:
        found = weight_map(shards, change)
        assert found is not None
        assert re.search(said, found), found
        path.write_text(good)
    for content in ("", "[]", "{}", '{"weight_map": []}', deep()):
        path.write_text(content)
        assert outcome(load_hf, shards)
    path.write_text(good)
    assert same_weights(load_hf(shards), ours(SMALL))
    sorted(shards.glob("*.safetensors"))[1].unlink()
    assert "model-00002-of" in outcome(load_hf, shards)


# --- pickles ------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "pytorch_model-00001-of-00002.bin"]
)
def test_a_pickle_is_never_opened(name, folder):
    mark = folder.parent / "it ran"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    torch.save({"model.norm.weight": Bomb(mark)}, folder / name) if name == "model.pt" else None
    for load in (load_hf, open_pretrained):
        assert "a pickle, which can run code" in outcome(load, folder)
    assert "a pickle, which can run code" in outcome(open_pretrained, folder / name)
    for other in ("model.safetensors", "m.gguf"):  # under another name
        shutil.copy(folder / name, folder / other)
        assert outcome(open_pretrained, folder if other == "model.safetensors" else folder / other)
    with pytest.raises(ValueError) as error:
        open_pretrained(shutil.copy(folder / name, folder / "m.ckpt"))
    assert one_sentence(error.value)
    shutil.copy(folder / name, folder / "tokenizer.json")
    with pytest.raises(ValueError) as error:
        open_pretrained(folder)
    assert one_sentence(error.value)
    assert not mark.exists()
    with (folder / name).open("rb") as stream:
        torch.load(stream, weights_only=False) if name == "model.pt" else pickle.load(stream)
    assert mark.exists()  # it would have


# --- tokenizers ---------------------------------------------------------------------------------------------


def tokenizer_outcome(path: Path) -> str | None:
    try:
        found = load_tokenizer(str(path))
        found.decode(found.encode("to be <|eos|> é"))
    except ValueError as error:
        assert one_sentence(error), str(error)
        return str(error)
    return None


def test_a_tokenizer_that_is_none(folder):
    path = folder / "tokenizer.json"
    good = json.loads(path.read_text())
    cases: list[Any] = [
        "", "[]", "{}", "1", deep(), b"\xff\xfe", '{"added_tokens": []}', {**good, "model": None},
        {**good, "model": {**good["model"], "type": "Magic"}}, {**good, "decoder": None}, {**good, "decoder": {"type": "WordPiece"}},
        {**good, "model": {**good["model"], "vocab": {}}}, {**good, "model": {**good["model"], "merges": [["x", "y"]]}},
        {**good, "model": {**good["model"], "vocab": {**good["model"]["vocab"], "人": 999}}},
        {**good, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {**good, "added_tokens": [{"id": "x"}]}, {**good, "added_tokens": 7}, {**good, "version": "9.9"},
        {**good, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ]  # fmt: skip
    for content in cases:
        content = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        assert tokenizer_outcome(path), content[:200]
        with pytest.raises(ValueError) as error:
            open_pretrained(folder)
        assert one_sentence(error.value)
    path.unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        open_pretrained(folder)


def test_bytes_flipped_in_a_tokenizer(folder):
    path = folder / "tokenizer.json"
    content = path.read_bytes()
    refused = 0
    for seed in range(150):
        path.write_bytes(flip(content, len(content), random.Random(seed)))
        refused += tokenizer_outcome(path) is not None
    assert refused > 20


@pytest.mark.parametrize("content", ["", "[]", "1", b"\xff", deep(), '{"eos_token": "nowhere"}'])
def test_a_tokenizers_configuration_that_is_none(content, folder):
    path = folder / "tokenizer_config.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as error:
        open_pretrained(folder)
    assert one_sentence(error.value)


@pytest.mark.parametrize(
    "content",
    ['{"eos_token": 7, "chat_template": 7}', '{"chat_template": [1, {"name": 2}]}', '{"eos_token": ["a"]}'],
)
def test_what_is_odd_in_it_is_not_looked_at(content, folder):
    (folder / "tokenizer_config.json").write_text(content)
    assert open_pretrained(folder).tokenizer.eos == "<|eos|>"


def test_a_vocabulary_larger_than_the_model(tmp_path):
    small = ModelConfig(200, 32, 16, 2, 1, 1, d_mlp=24)
    folder = save_hf(ours(small), tmp_path / "m", TOKENIZER)
    assert "262 tokens, but the model only 200 rows" in outcome(open_pretrained, folder)


def test_ends_that_are_none_are_passed_over(folder):
    for ends in (deep(500), "[1, null, [2]]", '"x"', "-1", "1e999", "true"):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
        assert outcome(open_pretrained, folder) is None
    (folder / "generation_config.json").write_text("[")
    assert outcome(open_pretrained, folder)


# --- the command line ---------------------------------------------------------------------------------------


def test_the_command_line_says_it_in_one_line(folder, tmp_path):
    """Exit code 2, one line on stderr, nothing on stdout."""
    from typer.testing import CliRunner

    from tutorial_lib.cli.main import app

    (tmp_path / "short.gguf").write_bytes(llama()[:300])
    (tmp_path / "absurd.gguf").write_bytes(GGUF_CASES["long string"][0])
    (tmp_path / "pickle.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "it ran")))
    (folder / "model.safetensors").write_bytes(SAFETENSORS["an absurd header"])
    names = ["short.gguf", "absurd.gguf", "pickle.bin", "m", "nowhere.gguf", "nowhere"]
    for name in names:
        done = CliRunner().invoke(app, ["generate", "--model", str(tmp_path / name), "--prompt", "x"])
        assert done.exit_code == 2, (name, done.output)
        assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "it ran").exists()


@pytest.mark.slow
def test_so_it_does_as_a_program(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUF_CASES["endless fields"][0])
    command = [sys.executable, "-m", "tutorial_lib.cli.main", "generate", "--model", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ") and "cut short" in done.stderr


def test_a_tokenizer_of_absurd_size_is_not_read(tmp_path):
    """Of holes alone, so that the disk does not mind."""
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="has 1,099,511,627,776 bytes, and such a file at most 67,108,864"):
        load_tokenizer(str(path))
