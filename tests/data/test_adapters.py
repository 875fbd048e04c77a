"""Tokenizers of others behave like our own: nothing is lost, nothing is smuggled in, and the cuts are theirs."""

from __future__ import annotations

import json
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")

import tokenizers
from tokenizers import decoders, models, normalizers

from tutorial_lib.data.adapters import HuggingFaceTokenizer, TiktokenTokenizer, as_huggingface
from tutorial_lib.data.bpe import GPT2_PATTERN, BPETokenizer
from tutorial_lib.data.bpe_formats import gpt2_characters
from tutorial_lib.data.protocol import token_bytes
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.gguf_vocabulary import CUTS, _empty
from tutorial_lib.interop.tokenizers import encode_bytes, load_tokenizer, same_tokenizer, token_lengths

NAMES = ["<|eos|>", "<|user|>", "<|user|><|eos|>"]
TRAINED_ON = (
    "To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer the slings and "
    "arrows of outrageous fortune, naïve café — née 12345 人人生而自由，在尊严和权利上一律平等。 🙂🙂👩‍🔬\n\n    it's we'll "
    "\tEl\u0301 E\u0301l 1234 12 aaaa aaaaaaa banana bananas  \n"
) * 3
OWN = BPETokenizer.train(TRAINED_ON, 420, NAMES)
BYTES = ByteTokenizer(NAMES)

# No unassigned code points: the libraries know different versions of Unicode.
characters = st.characters(codec="utf-8", exclude_categories=("Cs", "Cn"))
pieces = st.sampled_from(
    [
        *NAMES,
        "  ",
        "\n\n ",
        "\r\n",
        "\u00a0",
        "'ll",
        "'LL",
        "'S",
        "'ſ",
        "🙂",
        "e\u0301",
        "人",
        " the",
        "aaa",
        "123 4½",
        "\t",
        "!?\n",
    ]
)
texts = st.lists(pieces | st.text(characters, max_size=6), max_size=12).map("".join)


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2's and Mistral's: ▁ for a space, one at the front, and bytes for what is not in the vocabulary."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "b",
        "th",
        "the",
        "▁the",
        "▁b",
        "é",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "b")]
    vocab = {word: i for i, word in enumerate(words)}
    theirs = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    theirs.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    theirs.add_special_tokens(["<unk>", "<s>", "</s>"])
    return theirs


def with_cut(cut: str) -> HuggingFaceTokenizer:
    """The vocabulary of our own, with another way of cutting."""
    rules = json.loads(as_huggingface(OWN).tokenizer.to_str())["model"]
    theirs = _empty(cut, rules["vocab"], [tuple(pair) for pair in rules["merges"]])
    theirs.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in NAMES])
    return HuggingFaceTokenizer(theirs)


KNOWN = {
    "own": as_huggingface(OWN),
    "bytes": as_huggingface(BYTES),
    "tiktoken": TiktokenTokenizer(OWN.to_tiktoken()),
    **{cut: with_cut(cut) for cut in CUTS},
}
EXACT = [name for name in KNOWN if name != "qwen2"]  # which normalizes to NFC first
each = pytest.mark.parametrize("name", KNOWN)


# --- one protocol -------------------------------------------------------------------------------------------


@each
@settings(max_examples=50)
@given(text=texts)
def test_nothing_is_lost(name, text):
    tokenizer = KNOWN[name]
    text = text if name in EXACT else unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode() == tokenizer.decode_bytes(ids)
    assert "".join(tokenizer.stream(ids)) == text
    assert tokenizer.encode_bytes(text.encode()) == ids == encode_bytes(tokenizer, text.encode()).tolist()
    assert not set(ids) & set(tokenizer.specials.values())  # names in a text are text
    assert all(0 <= i < tokenizer.vocab_size and isinstance(i, int) for i in ids)


@each
@settings(max_examples=50)
@given(text=texts)
def test_specials_only_when_asked_for(name, text):
    """Names that begin together are for the longest of them; tiktoken takes the first."""
    tokenizer = KNOWN[name]
    if name == "tiktoken":
        text = text.replace(NAMES[2], "")
    found = regex.split("(" + "|".join(map(regex.escape, sorted(NAMES, key=len, reverse=True))) + ")", text)
    wanted = []
    for part in found:
        wanted += [tokenizer.specials[part]] if part in NAMES else tokenizer.encode(part)
    assert tokenizer.encode(text, allow_specials=True) == wanted
    assert tokenizer.encode(text) == tokenizer.encode(text)  # asking once changes nothing for later


@each
@settings(max_examples=50)
@given(data=st.data())
def test_any_ids_can_be_read(name, data):
    """A model may write half a character: the stream and the whole say the same."""
    tokenizer = KNOWN[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)
    assert tokenizer.decode_bytes(ids) == b"".join(token_bytes(tokenizer, i) for i in ids)
    assert all("\ufffd" not in piece for piece in tokenizer.stream(tokenizer.encode("naïve 人 🙂")))


@each
def test_ids_outside_and_texts_that_are_none(name):
    tokenizer = KNOWN[name]
    for i in (-1, tokenizer.vocab_size, 1 << 40):
        with pytest.raises(ValueError, match=f"{i} is outside the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([0, i])
        with pytest.raises(ValueError):
            list(tokenizer.stream([i]))
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")
    with pytest.raises(UnicodeDecodeError):
        tokenizer.encode_bytes(b"\xff")
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@each
def test_ends_are_known_and_lengths_add_up_to_bytes(name):
    tokenizer = KNOWN[name]
    assert tokenizer.eos_id == tokenizer.specials["<|eos|>"] and set(tokenizer.specials) == set(NAMES)
    lengths = token_lengths(tokenizer)
    ids = tokenizer.encode(TRAINED_ON)
    text = TRAINED_ON if name in EXACT else unicodedata.normalize("NFC", TRAINED_ON)
    assert lengths[ids].sum() == len(text.encode()) and len(lengths) == tokenizer.vocab_size
    assert all(lengths[i] == 0 for i in tokenizer.specials.values())


@given(texts, st.booleans())
def test_in_their_words_the_ids_are_ours(text, allow):
    """Our BPE and our bytes, as Hugging Face and tiktoken run them."""
    assert KNOWN["own"].encode(text, allow) == OWN.encode(text, allow)
    assert KNOWN["bytes"].encode(text, allow) == BYTES.encode(text, allow)
    assert KNOWN["tiktoken"].encode(text) == OWN.encode(text)
    assert KNOWN["gpt-2"].encode(text, allow) == OWN.encode(text, allow)


def test_what_has_no_form_in_their_words():
    assert as_huggingface(KNOWN["own"]) is KNOWN["own"]
    with pytest.raises(ValueError, match="TiktokenTokenizer has no form"):
        as_huggingface(KNOWN["tiktoken"])
    with pytest.raises(ValueError, match="ordinary one"):
        as_huggingface(ByteTokenizer(["a"]))
    with pytest.raises(ValueError, match="ordinary one"):
        as_huggingface(BPETokenizer(OWN.ranks, ["aa"]))


# --- cuts ---------------------------------------------------------------------------------------------------

LLAMA3 = (  # as Meta published them, and the Qwen team
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def chunks(cut: str, text: str) -> list[str]:
    """What a regular expression says, by another engine."""
    if cut == "smollm":  # each digit alone, and between them as GPT-2 does
        return [
            chunk
            for part in regex.split(r"(\p{N})", text)
            if part
            for chunk in regex.findall(GPT2_PATTERN, part)
        ]
    return regex.findall({"gpt-2": GPT2_PATTERN, "llama-bpe": LLAMA3, "qwen2": QWEN2}[cut], text)


@pytest.mark.parametrize("cut", CUTS)
@given(text=texts)
def test_a_text_is_cut_as_the_expression_says(cut, text):
    byte_of = {character: byte for byte, character in gpt2_characters().items()}
    found = KNOWN[cut].tokenizer.pre_tokenizer.pre_tokenize_str(text)
    cut_up = [bytes(byte_of[c] for c in piece).decode() for piece, _ in found]
    assert cut_up == chunks(cut, text)


@pytest.mark.parametrize(
    ("cut", "text", "wanted"),
    [
        ("gpt-2", "I'LL we'll 12345\n\n x", ["I", "'", "LL", " we", "'ll", " 12345", "\n\n", " x"]),
        ("smollm", "we'll 123 a  1", ["we", "'ll", " ", "1", "2", "3", " a", "  ", "1"]),
        ("llama-bpe", "I'LL 12345 !!\n\n x", ["I", "'LL", " ", "123", "45", " !!\n\n", " x"]),
        ("qwen2", "I'LL 12345 !!\n\n x", ["I", "'LL", " ", "1", "2", "3", "4", "5", " !!\n\n", " x"]),
    ],
)
def test_cuts_by_hand(cut, text, wanted):
    found = KNOWN[cut].tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in found] == wanted


def test_what_belongs_to_a_cut():
    """Qwen composes characters; of Llama 3's chunks those that are tokens need no merges."""
    assert KNOWN["qwen2"].encode("e\u0301") == KNOWN["qwen2"].encode("é") != KNOWN["gpt-2"].encode("e\u0301")
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}
    merges = [("b", "c"), ("a", "b")]  # no way to abc
    assert HuggingFaceTokenizer(_empty("llama-bpe", vocab, merges)).encode("abc") == [4]
    assert HuggingFaceTokenizer(_empty("gpt-2", vocab, merges)).encode("abc") == [0, 5]


# --- SentencePiece ------------------------------------------------------------------------------------------


@given(texts.filter(lambda text: text and "▁" not in text))
def test_bytes_to_fall_back_on(text):
    """A text gets a space in front, as Llama 2 has learned it; its ids say so, too."""
    tokenizer = HuggingFaceTokenizer(sentencepiece())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == " " + text == "".join(tokenizer.stream(ids))
    assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) == text  # they take it away again
    assert b"".join(map(tokenizer.token_bytes, ids)) == b" " + text.encode()


def test_sentencepiece_by_hand():
    tokenizer = HuggingFaceTokenizer(sentencepiece())
    words = tokenizer.tokenizer.get_vocab()
    assert tokenizer.encode("the bé 人") == [
        words[w] for w in ("▁the", "▁b", "é", "▁", "<0xE4>", "<0xBA>", "<0xBA>")
    ]
    assert tokenizer.eos == "</s>" and tokenizer.eos_id == 2 and tokenizer.vocab_size == len(words)
    assert tokenizer.token_bytes(words["<0x0A>"]) == b"\n" and tokenizer.token_bytes(2) == b"</s>"
    assert list(tokenizer.stream(tokenizer.encode("人"))) == [" ", "人"]
    assert tokenizer.encode("</s>", allow_specials=True)[-1] == 2 and 2 not in tokenizer.encode("</s>")


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "tiktoken"])
def test_what_is_saved_comes_back(name, tmp_path):
    tokenizer = KNOWN[name]
    tokenizer.save(tmp_path / "deep" / "tokenizer.json", chat_template="{{ messages }}")
    back = load_tokenizer(str(tmp_path / "deep"))
    assert back == tokenizer and same_tokenizer(back, tokenizer) and back.eos == tokenizer.eos
    assert back.encode(TRAINED_ON, True) == tokenizer.encode(TRAINED_ON, True)
    assert same_tokenizer(load_tokenizer("tokenizer.json", tmp_path / "deep"), tokenizer)
    assert not same_tokenizer(back, KNOWN["bytes" if name != "bytes" else "own"])
    assert (
        json.loads((tmp_path / "deep/tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    )


def test_tokenizers_that_differ_are_told_apart():
    own = BPETokenizer.train(TRAINED_ON, 280, NAMES)
    other = BPETokenizer.train(
        "other words, whose merges are quite another thing; numbers, letters, lines " * 9, 280, NAMES
    )
    assert own.specials == other.specials
    for make in (as_huggingface, lambda t: TiktokenTokenizer(t.to_tiktoken())):
        assert same_tokenizer(make(own), make(own))
        assert not same_tokenizer(make(own), make(other))
        assert not same_tokenizer(make(own), make(BPETokenizer(own.ranks, ["<|eos|>"])))
        assert not same_tokenizer(make(own), make(BPETokenizer(own.ranks, NAMES, r"\S+|\s+")))
        said_again = make is as_huggingface  # the same, in other words; tiktoken's insides cannot be seen
        assert same_tokenizer(make(own), own) == same_tokenizer(own, make(own)) == said_again
    assert len({id(KNOWN[name]) for name in KNOWN}) == len(KNOWN) == len(set(KNOWN.values()))
    for cut in CUTS:
        assert [c for c in CUTS if same_tokenizer(KNOWN[c], KNOWN[cut])] == [cut]


@pytest.mark.parametrize(
    ("said", "eos", "bos"),
    [
        ({"eos_token": "<|user|>"}, "<|user|>", None),
        (
            {"eos_token": {"content": "<|user|>", "lstrip": False}, "bos_token": "<|eos|>"},
            "<|user|>",
            "<|eos|>",
        ),
        ({"eos_token": None}, "<|eos|>", None),
        (None, "<|eos|>", None),
    ],
)
def test_what_ends_a_text_is_read_from_the_config(said, eos, bos, tmp_path):
    KNOWN["own"].save(tmp_path / "tokenizer.json")
    path = tmp_path / "tokenizer_config.json"
    path.unlink() if said is None else path.write_text(json.dumps(said))
    found = HuggingFaceTokenizer.load(tmp_path / "tokenizer.json")
    assert (found.eos, found.bos, found.eos_id) == (eos, bos, OWN.specials[eos])


def test_an_end_that_is_no_token(tmp_path):
    with pytest.raises(ValueError, match="no token '<nowhere>'"):
        HuggingFaceTokenizer(KNOWN["own"].tokenizer, "<nowhere>")
    none = as_huggingface(BPETokenizer(OWN.ranks))
    assert none.eos is None and none.eos_id is None


def test_cut_and_filled_up_batches_are_somebody_elses(tmp_path):
    """Some files carry the lengths that their makers once cut and padded to."""
    theirs = tokenizers.Tokenizer.from_str(KNOWN["own"].tokenizer.to_str())
    theirs.enable_truncation(3)
    theirs.enable_padding(length=16)
    theirs.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert found.encode("To be, or not") == OWN.encode("To be, or not")
    assert found.encode("T") == OWN.encode("T")


def test_added_words_that_are_no_specials():
    """Qwen's <think> is an ordinary word that is never cut, whoever writes it."""
    theirs = tokenizers.Tokenizer.from_str(KNOWN["own"].tokenizer.to_str())
    theirs.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    found = HuggingFaceTokenizer(theirs)
    assert "<think>" not in found.specials
    assert found.encode("a<think>b") == [*found.encode("a"), OWN.vocab_size, *found.encode("b")]
    assert found.decode(found.encode("a<think>b")) == "a<think>b" and found.vocab_size == OWN.vocab_size + 1


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Metaspace(), decoders.BPEDecoder()])
def test_ways_to_decode_that_are_not_known(decoder):
    theirs = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        theirs.decoder = decoder
    with pytest.raises(ValueError, match="decoder.*not known"):
        HuggingFaceTokenizer(theirs)


def test_vocabularies_that_are_none_are_refused():
    for vocab, said in (({}, "no tokens"), ({"人": 0}, "stands for no byte")):
        theirs = tokenizers.Tokenizer(models.BPE(vocab, []))
        theirs.decoder = decoders.ByteLevel()
        with pytest.raises(ValueError, match=said):
            HuggingFaceTokenizer(theirs)


@pytest.mark.slow
def test_three_encoders_of_gpt2_give_the_same_ids():
    """Ours from its merges, tiktoken's and Hugging Face's encoders: one vocabulary, the same ids."""
    gpt2 = load_tokenizer("gpt2")
    others = [as_huggingface(gpt2), TiktokenTokenizer(gpt2.to_tiktoken())]
    for text in (TRAINED_ON, "<|endoftext|>", "Hello world", " \n\n\t x'S"):
        for other in others:
            assert other.encode(text) == gpt2.encode(text)
            assert other.encode(text, True) == gpt2.encode(text, True)
    assert all(other.eos_id == 50256 and other.vocab_size == 50257 for other in others)
    assert all(
        other.token_bytes(i) == gpt2.decode_bytes([i]) for other in others for i in range(0, 50257, 97)
    )
