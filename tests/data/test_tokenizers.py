"""Tokenizers by name: pieces give the same ids as the whole, lengths add up to bytes, wrong names get an answer."""

from __future__ import annotations

import numpy as np
import pytest

from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.tokenizers import encode_bytes, load_tokenizer, same_tokenizer, token_lengths

TEXT = "To be, or not to be,\nthat is the question.\nWhether 'tis nobler\n\nin the mind\r\n  to suffer\n" * 5
BPE = BPETokenizer.train(TEXT, 300, ["<|eos|>"])


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), ByteTokenizer(["<|eos|>"]), BPE])
def test_the_lengths_of_ids_add_up_to_the_bytes(tokenizer):
    data = TEXT.encode() + b"\xff\xfe broken"
    ids = encode_bytes(tokenizer, data)
    assert ids.dtype == np.min_scalar_type(tokenizer.vocab_size - 1)
    assert token_lengths(tokenizer)[ids].sum() == len(data)
    assert token_lengths(tokenizer).shape == (tokenizer.vocab_size,)
    assert len(encode_bytes(tokenizer, b"")) == 0


def test_a_name_or_a_path_is_a_tokenizer(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    assert same_tokenizer(load_tokenizer(str(tmp_path / "tokenizer.json")), BPE)
    assert same_tokenizer(load_tokenizer("tokenizer.json", beside=tmp_path), BPE)
    assert not same_tokenizer(ByteTokenizer(), BPE)
    assert not same_tokenizer(BPETokenizer(BPE.ranks, ["<|end|>"]), BPE)
    assert isinstance(load_tokenizer("byte"), ByteTokenizer)
    with pytest.raises(ValueError, match="did you mean 'byte'"):
        load_tokenizer("bytes")
    with pytest.raises(ValueError, match="path of a vocabulary"):
        load_tokenizer("nothing-like-it.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is neither a tokenizer.json"):
        load_tokenizer(str(tmp_path / "other.json"))


@pytest.mark.slow
def test_gpt2_has_the_ids_that_its_users_know():
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.vocab_size == 50257 and tokenizer.eos_id == 50256
    assert tokenizer.encode("Hello world") == [15496, 995]  # ids that GPT-2's users know by heart
