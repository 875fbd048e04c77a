"""BPE against itself written plainly, against tiktoken and against Hugging Face, on texts that nobody chose."""

from __future__ import annotations

import doctest
import json
import os
import pickle
import sys
from collections import Counter

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from tutorial_lib.data import bpe, bpe_merges
from tutorial_lib.data.bpe import GPT2_PATTERN, BPETokenizer
from tutorial_lib.data.bpe_formats import gpt2_characters
from tutorial_lib.data.bpe_merges import learn_merges, merge_by_rank, split_chunks
from tutorial_lib.data.corpora import VOCABULARIES, cache_folder, load_text

NAMES = ["<|eos|>", "<|user|>", "<|user|><|eos|>", "a.c"]
TRAINED_ON = (
    "To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer the slings and "
    "arrows of outrageous fortune, naïve café — née 12345 人人生而自由，在尊严和权利上一律平等。 🙂🙂👩‍🔬\n\n    it's we'll "
    "\tEl\u0301 E\u0301l 1234 12 aaaa aaaaaaa banana bananas  \n"
) * 3
TOKENIZER = BPETokenizer.train(TRAINED_ON, 420, NAMES)

# No unassigned code points: the three libraries know different versions of Unicode.
characters = st.characters(codec="utf-8", exclude_categories=("Cs", "Cn"))
pieces = st.sampled_from(
    [*NAMES, "  ", "\n\n ", "\u00a0", "'ll", "'LL", "🙂", "e\u0301", "人", "na", " the", "aaa"]
)
texts = st.lists(pieces | st.text(characters, max_size=6), max_size=12).map("".join)
few_letters = st.lists(st.text("ab ", max_size=14) | st.text("aé 人\n", max_size=8), min_size=1, max_size=6)


# --- training -----------------------------------------------------------------------------------------------


def naive_merges(chunks: list[str], n_merges: int) -> list[tuple[int, int]]:
    """BPE as its definition says: count all pairs, merge the best everywhere, again."""
    words = [list(chunk.encode()) for chunk in chunks]
    merges: list[tuple[int, int]] = []
    while len(merges) < n_merges:
        counts = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [naive_merge(word, best, 256 + len(merges)) for word in words]
        merges.append(best)
    return merges


def naive_merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    merged, i = [], 0
    while i < len(word):
        found = tuple(word[i : i + 2]) == pair
        merged.append(new if found else word[i])
        i += 2 if found else 1
    return merged


@given(few_letters, st.integers(0, 60))
def test_the_merges_are_the_naive_ones_ties_included(corpus: list[str], n_merges: int):
    chunks = [chunk for text in corpus for chunk in split_chunks(text)]
    assert learn_merges(Counter(chunks), n_merges) == naive_merges(chunks, n_merges)


@given(st.lists(st.text("ab", max_size=40), min_size=1, max_size=3), st.integers(0, 60))
def test_long_runs_and_overlapping_pairs(chunks: list[str], n_merges: int):
    assert learn_merges(Counter(chunks), n_merges) == naive_merges(chunks, n_merges)


def test_a_tie_goes_to_the_smaller_pair_of_ids():
    assert learn_merges({"ba": 1, "ab": 1, "aa": 1}, 3) == [(97, 97), (97, 98), (98, 97)]
    assert learn_merges({"ab": 2, "aa": 1}, 1) == [(97, 98)]


def test_only_chunks_that_hold_the_pair_are_looked_at(monkeypatch):
    looked_at = []
    monkeypatch.setattr(bpe_merges, "neighbors", lambda w: looked_at.append(w) or map(str.__add__, w, w[1:]))
    learn_merges({"ab" * 50: 1, **{chr(1000 + i): 1 for i in range(500)}}, 1)
    assert len(looked_at) == 501 + 2


@given(few_letters, st.integers(256, 300), st.integers(0, 40))
def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one(corpus: list[str], size: int, more: int):
    small, large = BPETokenizer.train(corpus, size), BPETokenizer.train(corpus, size + more)
    assert small.ranks == {token: i for token, i in large.ranks.items() if i < size}


def hugging_face_merges(texts: list[str], vocab_size: int, pattern: str) -> list[tuple[bytes, bytes]]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    byte_of = {character: byte for byte, character in gpt2_characters().items()}
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(bytes(byte_of[c] for c in a), bytes(byte_of[c] for c in b)) for a, b in pairs]


@given(st.lists(st.text("ab_xyz.", max_size=30), min_size=1, max_size=6))
def test_hugging_face_learns_the_same_merges(corpus: list[str]):
    """Visible ASCII has the same order in both numberings of the bytes, so ties are decided alike."""
    pattern = r"_?[a-z]+|[^a-z]"
    assert BPETokenizer.train(corpus, 300, pattern=pattern).merges() == hugging_face_merges(
        corpus, 300, pattern
    )


def test_hugging_face_differs_only_in_ties():
    """With GPT-2's numbering, a space comes after the letters: each of its choices must still be a best one."""
    theirs = hugging_face_merges([TRAINED_ON], 400, GPT2_PATTERN)
    words = [[bytes([b]) for b in chunk.encode()] for chunk in split_chunks(TRAINED_ON)]
    assert len(theirs) > 100
    for pair in theirs:
        counts = Counter(p for word in words for p in zip(word, word[1:], strict=False))
        assert counts[pair] == max(counts.values())
        words = [naive_merge(word, pair, pair[0] + pair[1]) for word in words]


@pytest.fixture(scope="module")
def plays() -> str:
    return load_text("shakespeare").decode("utf-8")


@pytest.mark.slow
def test_the_plays_to_8192_as_hugging_face(plays):
    """Every one of 7,936 merges: the text written in visible ASCII, so that ties are decided alike."""
    documents = plays.replace(" ", "_").replace("\n", "|").replace("—", "~").split("||#_")
    pattern = r"_?[A-Za-z]+|[^A-Za-z]+"
    ours = BPETokenizer.train(documents, 8192, pattern=pattern).merges()
    assert len(ours) == 7936 and ours == hugging_face_merges(documents, 8192, pattern)


@pytest.mark.slow
def test_the_plays_in_three_encoders(plays):
    tokenizer = BPETokenizer.train(plays, 4096, ["<|eos|>"])
    part = plays[-400_000:]
    ids = tokenizer.encode(part)
    assert tokenizer.decode(ids) == part
    assert ids == tokenizer.to_tiktoken().encode_ordinary(part)
    assert ids == tokenizer.to_huggingface().encode(part).ids


def test_sizes_and_what_training_refuses():
    assert TOKENIZER.vocab_size == 420 and TOKENIZER.specials["<|eos|>"] == 416 == TOKENIZER.eos_id
    assert BPETokenizer.train("ab", 1000).vocab_size == 257, "the text ran out of pairs"
    assert BPETokenizer.train([], 300).vocab_size == BPETokenizer.train("", 256).vocab_size == 256
    assert BPETokenizer.train("ab", 300).eos_id is None
    with pytest.raises(ValueError, match="257 is too small for 256 bytes and 2 special tokens"):
        BPETokenizer.train("ab", 257, ["<a>", "<b>"])


def test_one_text_or_many_give_the_same_merges():
    assert BPETokenizer.train("ab ab", 260).ranks == BPETokenizer.train(iter(["ab", " ab"]), 260).ranks


# --- encoding and decoding ----------------------------------------------------------------------------------


def naive_encode(data: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [data[i : i + 1] for i in range(len(data))]
    while found := [
        (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
    ]:
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@given(st.text("abn aé人", max_size=60))
def test_the_heap_merges_as_the_definition_does(text: str):
    assert merge_by_rank(text.encode(), TOKENIZER.ranks) == naive_encode(text.encode(), TOKENIZER.ranks)


@given(st.lists(st.text("ab", min_size=2, max_size=7), unique=True, max_size=25), st.text("ab", max_size=40))
def test_the_heap_merges_as_the_definition_does_with_any_ranks(tokens: list[str], text: str):
    """Ranks in an order that no training would give."""
    ranks = {bytes([b]): b for b in range(256)} | {t.encode(): 256 + i for i, t in enumerate(tokens)}
    assert merge_by_rank(text.encode(), ranks) == naive_encode(text.encode(), ranks)


TIKTOKEN, HUGGING_FACE = TOKENIZER.to_tiktoken(), TOKENIZER.to_huggingface()


@given(texts)
def test_three_encoders_one_list_of_ids(text: str):
    ids = TOKENIZER.encode(text)
    assert ids == TIKTOKEN.encode_ordinary(text)
    assert ids == HUGGING_FACE.encode(text).ids
    assert (
        TOKENIZER.decode(ids)
        == text
        == TIKTOKEN.decode(ids)
        == HUGGING_FACE.decode(ids, skip_special_tokens=False)
    )


@given(texts)
def test_three_encoders_agree_on_specials(text: str):
    """Hugging Face is left out where two names begin together: tiktoken takes the first there, we the longest."""
    text = text.replace("<|user|><|eos|>", "")
    ids = TOKENIZER.encode(text, allow_specials=True)
    assert TOKENIZER.decode(ids) == text
    assert ids == TIKTOKEN.encode(text, allowed_special="all")
    HUGGING_FACE.encode_special_tokens = False
    try:
        assert ids == HUGGING_FACE.encode(text).ids
    finally:
        HUGGING_FACE.encode_special_tokens = True


@given(texts)
def test_text_never_makes_a_special(text: str):
    assert all(i < 416 for i in TOKENIZER.encode(text))


@given(st.text())
def test_any_text_survives(text: str):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text and TOKENIZER.decode_bytes(ids) == text.encode()
    assert TOKENIZER.encode_bytes(text.encode()) == ids


@given(st.binary() | st.text("né人🙂 ").map(lambda text: text.encode()[1:-1]))
def test_any_bytes_survive(data: bytes):
    assert TOKENIZER.decode_bytes(TOKENIZER.encode_bytes(data)) == data


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_stream_is_decode_in_pieces(ids: list[int]):
    streamed = list(TOKENIZER.stream(iter(ids)))
    assert "".join(streamed) == TOKENIZER.decode(ids) and all(streamed)
    assert TOKENIZER.decode(ids) == TIKTOKEN.decode(ids)


def test_stream_holds_back_an_unfinished_character():
    emoji = list("🙂 é".encode())
    assert list(TOKENIZER.stream(emoji)) == ["🙂", " ", "é"]
    assert list(TOKENIZER.stream([*emoji[:2], TOKENIZER.eos_id, 97])) == ["�<|eos|>", "a"]
    assert list(TOKENIZER.stream(emoji[:2])) == ["�"]


def test_ids_may_be_numpy_or_torch():
    import numpy as np
    import torch

    ids = TOKENIZER.encode("the question")
    assert TOKENIZER.decode(np.array(ids)) == TOKENIZER.decode(torch.tensor(ids)) == "the question"


@pytest.mark.parametrize("bad", [-1, TOKENIZER.vocab_size, 10**9])
def test_an_id_outside_is_an_error_that_says_so(bad: int):
    for read in (TOKENIZER.decode, TOKENIZER.decode_bytes, lambda ids: list(TOKENIZER.stream(ids))):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 420"):
            read([97, bad])


def test_half_a_surrogate_pair_is_not_text():
    for text in ("\ud83d", "a\udc80"):
        with pytest.raises(UnicodeEncodeError):
            TOKENIZER.encode(text)


def test_a_long_chunk_takes_time_in_proportion():
    """Quadratic code takes minutes here."""
    text = "na人" * 40_000
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(bpe, "_CACHED_CHUNKS", 5)
    tokenizer = BPETokenizer(TOKENIZER.ranks)
    text = " ".join(map(str, range(100))) + "x" * 1000
    assert tokenizer.encode(text) == TOKENIZER.encode(text)
    assert len(tokenizer._cache) <= 5 and "x" * 1000 not in tokenizer._cache


def test_a_tokenizer_may_travel_to_another_process():
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.encode("the question") == TOKENIZER.encode("the question")


# --- vocabularies and files ---------------------------------------------------------------------------------

BYTES = {bytes([b]): b for b in range(256)}


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        ({b: i for b, i in BYTES.items() if i}, {}, "must be 0 to 254"),
        ({**{b: i for b, i in BYTES.items() if i < 255}, b"ab": 255}, {}, "1 of the 256 single bytes"),
        ({**BYTES, b"ab": 257}, {}, "must be 0 to 256"),
        ({**BYTES, b"ab": 255}, {}, "each once"),
        ({**BYTES, b"abc": 256}, {}, "token 256, b'abc', is not two tokens"),
        ({**BYTES, b"abc": 256, b"ab": 257}, {}, "is not two tokens of lower ids joined"),
        ({**BYTES, b"": 256}, {}, "is not two tokens"),
        (BYTES, {"specials": ["<a>", "<a>"]}, "named twice"),
        (BYTES, {"specials": [""]}, "empty name"),
        (BYTES, {"pattern": "("}, "not a regular expression"),
        (BYTES, {"pattern": "(a)|b"}, "capturing group"),
    ],
)
def test_a_vocabulary_that_is_none(ranks, options, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer(ranks, **options)


def test_a_pattern_that_loses_text_is_refused():
    with pytest.raises(ValueError, match="skips a part of the text"):
        BPETokenizer.train("two words", 300, pattern=r"\w+")
    with pytest.raises(ValueError, match="skips a part of the text"):
        BPETokenizer(BYTES, pattern=r"\w+").encode("two words")


def test_a_pattern_of_ones_own_cuts_digits_by_three():
    pattern = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}{1,3}")
    tokenizer = BPETokenizer.train("1234567 " * 9, 400, pattern=pattern)
    assert tokenizer.encode("1234567") == tokenizer.to_tiktoken().encode_ordinary("1234567")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["123", "456", "7"]


def test_what_is_saved_comes_back(tmp_path):
    pattern = r"\p{N}|[^\p{N}]+"
    for tokenizer in (TOKENIZER, BPETokenizer.train("né 12 né 12", 280, pattern=pattern)):
        tokenizer.save(tmp_path / "new" / "bpe.json")
        loaded = BPETokenizer.load(str(tmp_path / "new" / "bpe.json"))
        assert (loaded.ranks, loaded.specials, loaded.pattern) == (
            tokenizer.ranks,
            tokenizer.specials,
            tokenizer.pattern,
        )
        assert loaded.merges() == tokenizer.merges()
    assert os.listdir(tmp_path / "new") == ["bpe.json"]


@given(data=st.data())
def test_a_damaged_file_is_one_sentence(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "bpe.json"
    BPETokenizer.train("banana bandana", 264, ["<|eos|>"]).save(path)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 3))
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="is not a BPE vocabulary that this course wrote: ") as error:
        BPETokenizer.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "another"},
        {"tokens": None},
        {"tokens": "AA=="},
        {"tokens": ["?"]},
        {"tokens": [1]},
        {"tokens": []},
        {"specials": "<|eos|>"},
        {"specials": [1]},
        {"specials": ["<a>", "<a>"]},
        {"pattern": None},
        {"pattern": "("},
        {"pattern": "(a)"},
    ],
)
def test_a_foreign_file_is_one_sentence(change, tmp_path):
    path = tmp_path / "bpe.json"
    TOKENIZER.save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match="is not a BPE vocabulary that this course wrote") as error:
        BPETokenizer.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("swap", [(300, 301), (256, 400), (97, 98)])
def test_tokens_out_of_order_or_twice(swap, tmp_path):
    path = tmp_path / "bpe.json"
    TOKENIZER.save(path)
    content = json.loads(path.read_text())
    content["tokens"][swap[0]] = content["tokens"][swap[1]]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a token is listed twice"):
        BPETokenizer.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"format": []}']
)
def test_any_other_file_is_refused(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a BPE vocabulary"):
        BPETokenizer.load(path)


@pytest.mark.parametrize(
    ("package", "method"), [("tiktoken", "to_tiktoken"), ("tokenizers", "to_huggingface")]
)
def test_a_missing_package_is_named(package, method, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install"):
        getattr(TOKENIZER, method)()


# --- GPT-2 --------------------------------------------------------------------------------------------------


def test_gpt2_order_of_bytes_is_hugging_faces():
    from tokenizers import pre_tokenizers

    assert list(gpt2_characters().values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert gpt2_characters()[ord(" ")] == "Ġ"


def test_a_small_file_of_gpt2s_kind():
    tokenizer = BPETokenizer.from_gpt2("#version: 0.2\nĠ t\nh e\nĠt he\n")
    assert tokenizer.vocab_size == 256 + 3 + 1 and tokenizer.eos_id == 259
    assert tokenizer.encode(" the") == [258] and tokenizer.encode("!") == [0]
    assert tokenizer.merges() == [(b" ", b"t"), (b"h", b"e"), (b" t", b"he")]
    for line in ("Ġ", "Ġ t h", "é 人", ""):
        with pytest.raises(ValueError, match="is not a line of GPT-2's merges file"):
            BPETokenizer.from_gpt2(f"#version: 0.2\nĠ t\n{line}\nh e\n")


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    path = cache_folder() / VOCABULARIES["gpt2"].filename
    if not path.is_file():
        pytest.skip("GPT-2's merges are not in the cache: lesson 4.1 fetches them")
    return BPETokenizer.from_gpt2(path.read_text(encoding="utf-8"))


def test_gpt2s_vocabulary_gives_the_same_ids_in_three_hands(gpt2, tmp_path):
    """Ids that are known from OpenAI's own encoder, then a vocabulary in three other hands."""
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert gpt2.encode(" SolidGoldMagikarp") == [43453]
    assert gpt2.encode("a<|endoftext|>", allow_specials=True) == [64, 50256]
    gpt2.save(tmp_path / "gpt2.json")
    assert BPETokenizer.load(tmp_path / "gpt2.json").ranks == gpt2.ranks

    face, tik = gpt2.to_huggingface(), gpt2.to_tiktoken()
    for text in (
        TRAINED_ON,
        "def f(x):\n    return x ** 2  # naïve\r\n",
        "".join(map(chr, range(0x300, 0x370))),
    ):
        ids = gpt2.encode(text)
        assert ids == tik.encode_ordinary(text) == face.encode(text).ids and gpt2.decode(ids) == text


@pytest.mark.slow
def test_gpt2_as_transformers_reads_the_file(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = (cache_folder() / VOCABULARIES["gpt2"].filename).read_text(encoding="utf-8")
    merges = [tuple(line.split(" ")) for line in source.strip().split("\n")[1:]]
    vocab = {c: i for i, c in enumerate([*gpt2_characters().values(), *("".join(m) for m in merges)])}
    vocab["<|endoftext|>"] = 50256
    reference = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
    text = load_text("shakespeare").decode()[:200_000] + TRAINED_ON
    assert reference(text)["input_ids"] == gpt2.encode(text)


def test_the_pattern_is_gpt2s():
    """As OpenAI writes it, and as we do."""
    openais = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    for text in (TRAINED_ON, "'s 't're've'm'll'd'x ''s I'll\u3000\n"):
        assert regex.findall(openais, text) == split_chunks(text)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(bpe).failed == doctest.testmod(bpe_merges).failed == 0


def test_where_there_is_no_end_to_new_words_the_rarest_are_forgotten(monkeypatch):
    """Memory is bounded, and what is frequent is learned all the same."""
    monkeypatch.setattr(bpe, "_MOST_CHUNKS", 100)
    seen = []
    learn = bpe.learn_merges
    monkeypatch.setattr(bpe, "learn_merges", lambda counts, n: seen.append(len(counts)) or learn(counts, n))
    texts = ["the banana " * 20 + " ".join(f"w{i}x{k}" for k in range(30)) for i in range(50)]
    tokenizer = BPETokenizer.train(texts, 270)
    assert seen[0] <= 100 and b" banana" in tokenizer.ranks
