"""A real GGUF file: SmolLM2 answers, and what is no GGUF file of a model that we know is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from tutorial_lib.core.decoding import generate_cached
from tutorial_lib.core.model import PRESETS, Transformer
from tutorial_lib.core.rope import half_to_interleaved, interleaved_to_half
from tutorial_lib.data.corpora import fetch, load_text
from tutorial_lib.interop.gguf import GGUFError, gguf_config, gguf_tokenizer, load_gguf

pytestmark = pytest.mark.slow  # 98 MB to fetch once, and 540 MB of weights in memory


@pytest.fixture(scope="module")
def path() -> Path:
    return fetch("smollm2")


@pytest.fixture(scope="module")
def model(path):
    return load_gguf(path)


@pytest.fixture(scope="module")
def tokenizer(path):
    return gguf_tokenizer(path)


def test_its_shape_is_the_preset(path, model):
    assert gguf_config(path) == model.config
    assert model.config.norm_eps == pytest.approx(1e-5)  # the file has it in 32 bits
    assert replace(model.config, norm_eps=1e-5) == PRESETS["smollm2-135m"]
    assert model.num_params() == 134_515_008
    assert model.head.weight is model.tokens.weight and not model.training


def test_it_knows_the_capital_of_france(model, tokenizer):
    chat = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokenizer.encode(chat).ids])
    end = tokenizer.token_to_id("<|im_end|>")
    answer = [int(token) for token in generate_cached(model, ids, 24, temperature=0, eos_id=end)]
    assert "Paris" in tokenizer.decode(answer)


def test_the_marks_of_the_chat_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("<|im_start|><|im_end|>").ids) == 2
    assert len(tokenizer.encode("1234").ids) == 4  # digit by digit
    line = "Into the air; and what seem'd corporal\n\tmelted — as breath into the wind."
    assert tokenizer.decode(tokenizer.encode(line).ids) == line


@torch.no_grad()
def loss(model: Transformer, ids: list[int]) -> float:
    logits = model(torch.tensor([ids[:-1]]))
    return float(F.cross_entropy(logits[0], torch.tensor(ids[1:])))


def test_queries_and_keys_must_be_put_back_in_order(model, tokenizer):
    """llama.cpp stores their rows for interleaved pairs; with these, each head turns the wrong pairs."""
    ids = tokenizer.encode(load_text("shakespeare")[-3000:].decode()).ids[:160]
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
    assert right < 5 and wrong > right + 1  # nats
    assert loss(model, ids) == pytest.approx(right, abs=1e-4)


def one_sentence(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value) and not str(error.value).rstrip().endswith(":")


@pytest.mark.parametrize("size", [0, 3, 100, 5000, 2_000_000, 50_000_000])
def test_a_truncated_file_is_refused(path, tmp_path, size):
    short = tmp_path / "short.gguf"
    with path.open("rb") as file:
        short.write_bytes(file.read(size))
    with pytest.raises(GGUFError, match="not a GGUF file, or was cut short") as error:
        load_gguf(short)
    assert one_sentence(error)


def test_a_text_file_is_refused(tmp_path):
    text = tmp_path / "hamlet.gguf"
    text.write_text("To be, or not to be, that is the question.\n" * 100, encoding="utf-8")
    for read in (load_gguf, gguf_config, gguf_tokenizer):
        with pytest.raises(GGUFError, match="not a GGUF file") as error:
            read(text)
        assert one_sentence(error)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(GGUFError, match="there is no file"):
        load_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(GGUFError, match="there is no file"):
        load_gguf(tmp_path)  # a folder
