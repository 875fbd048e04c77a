"""The byte tokenizer: round trips over any text, and a text for any ids."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutorial_lib.data import tokenize
from tutorial_lib.data.tokenize import ByteTokenizer

NAMES = ["<|eos|>", "<|user|>", "<|user|><|eos|>", "|", "a.c", "né"]  # prefixes, patterns, plain letters
TOKENIZER = ByteTokenizer(NAMES)

ids_of_the_vocabulary = st.lists(st.integers(0, TOKENIZER.vocab_size - 1))
texts_with_names = st.lists(st.sampled_from(NAMES) | st.text(max_size=6)).map("".join)


@given(st.text())
def test_any_text_survives_the_round_trip(text: str):
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert TOKENIZER.decode(ids) == text


@given(texts_with_names)
def test_text_with_specials_survives(text: str):
    ids = TOKENIZER.encode(text, allow_specials=True)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


@given(texts_with_names)
def test_text_never_makes_a_special(text: str):
    assert all(i < 256 for i in TOKENIZER.encode(text))


@given(texts_with_names)
def test_specials_are_found_from_left_to_right_the_longest_first(text: str):
    assert TOKENIZER.encode(text, allow_specials=True) == by_looking_at_each_place(text)


def by_looking_at_each_place(text: str) -> list[int]:
    ids, at = [], 0
    while at < len(text):
        here = max((name for name in NAMES if text.startswith(name, at)), key=len, default=None)
        ids += list(text[at].encode("utf-8")) if here is None else [TOKENIZER.specials[here]]
        at += len(here or text[at])
    return ids


@given(st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=4), st.text())
def test_any_names_will_do(names: list[str], text: str):
    tokenizer = ByteTokenizer(names)
    text = text.join(names) if names else text
    assert tokenizer.decode(tokenizer.encode(text, allow_specials=True)) == text


@given(st.lists(st.integers(0, 255)))
def test_any_bytes_decode_as_python_decodes_them(ids: list[int]):
    assert TOKENIZER.decode(ids) == bytes(ids).decode("utf-8", errors="replace")


@given(ids_of_the_vocabulary)
def test_stream_is_decode_in_pieces(ids: list[int]):
    pieces = list(TOKENIZER.stream(iter(ids)))
    assert "".join(pieces) == TOKENIZER.decode(ids)
    assert all(pieces), "an empty piece"


@given(ids_of_the_vocabulary, ids_of_the_vocabulary)
def test_what_was_shown_stays(ids: list[int], more: list[int]):
    """Whatever comes later, the screen only grows: what the first ids showed before the end is a prefix."""
    shown = []
    for piece, taken in told(TOKENIZER, ids):
        if taken < len(ids):
            shown.append(piece)
    assert TOKENIZER.decode(ids + more).startswith("".join(shown))


def told(tokenizer: ByteTokenizer, ids: list[int]):
    """Each piece with the number of ids taken before it came."""
    taken = 0

    def feed():
        nonlocal taken
        for i in ids:
            yield i
            taken += 1

    for piece in tokenizer.stream(feed()):
        yield piece, taken


@given(st.text())
def test_a_character_is_shown_with_its_last_byte(text: str):
    ids = TOKENIZER.encode(text)
    due, at = [], 0
    for character in text:
        at += len(character.encode("utf-8"))
        due.append((character, at - 1))
    assert list(told(TOKENIZER, ids)) == due


@given(st.lists(st.integers(0, 255), max_size=3))
def test_a_special_ends_an_unfinished_character(ids: list[int]):
    assert TOKENIZER.decode([*ids, 256, *ids]) == TOKENIZER.decode(ids) + "<|eos|>" + TOKENIZER.decode(ids)


def test_ids_may_be_numpy_or_torch():
    import numpy as np
    import torch

    ids = TOKENIZER.encode("né")
    assert TOKENIZER.decode(np.array(ids, dtype=np.uint8)) == "né"
    assert TOKENIZER.decode(torch.tensor(ids)) == "né"


@pytest.mark.parametrize("bad", [-1, TOKENIZER.vocab_size, 10**9])
def test_an_id_outside_is_an_error_that_says_so(bad: int):
    with pytest.raises(
        ValueError, match=f"token id {bad} is outside the vocabulary of {TOKENIZER.vocab_size}"
    ):
        TOKENIZER.decode([97, bad])


def test_names_must_differ_and_not_be_empty():
    with pytest.raises(ValueError, match="named twice"):
        ByteTokenizer(["<|eos|>", "<|eos|>"])
    with pytest.raises(ValueError, match="empty name"):
        ByteTokenizer(["<|eos|>", ""])


def test_half_a_surrogate_pair_is_not_text():
    with pytest.raises(UnicodeEncodeError):
        TOKENIZER.encode("\ud83d")


def test_specials_stand_after_the_256_bytes():
    assert (ByteTokenizer().vocab_size, ByteTokenizer().eos_id) == (256, None)
    assert (TOKENIZER.vocab_size, TOKENIZER.eos_id) == (256 + len(NAMES), 256)


def test_many_specials_take_time_in_proportion():
    """Quadratic code, which cuts the rest of the text off at each special, takes minutes here."""
    n = 100_000
    assert TOKENIZER.encode("<|eos|>x" * n, allow_specials=True) == [256, ord("x")] * n


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(tokenize).failed == 0
