"""A stranger's tokenizer: what people use is read as before, and what would take all the time or memory is refused."""

from __future__ import annotations

import copy
import json

import pytest

pytest.importorskip("tokenizers")

import tokenizers
from tokenizers import pre_tokenizers

from tutorial_lib.data.adapters import HuggingFaceTokenizer, as_huggingface
from tutorial_lib.data.bpe import GPT2_PATTERN, BPETokenizer
from tutorial_lib.data.rules import check_pattern, check_speed
from tutorial_lib.interop.gguf_vocabulary import CUTS, _empty
from tutorial_lib.interop.tokenizers import load_tokenizer

OWN = BPETokenizer.train("to be or not to be, " * 3, 262, ["<|eos|>"])
RULES = json.loads(as_huggingface(OWN).tokenizer.to_str())

IN_USE = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "ours": GPT2_PATTERN,
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "Qwen 2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "GPT-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "DeepSeek": "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*",
    "BLOOM": " ?[^(\\s|[.,!?…。，、।۔،])]+",
    "SuperBPE": r"(?=(\d{3})+(?!\d))",
}  # fmt: skip


def cut(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**RULES["pre_tokenizer"], "use_regex": False}]}


def stored(tmp_path, **changes):
    """A `tokenizer.json` as ours, but for some of its rules; `model__vocab` is one of its model's."""
    rules = copy.deepcopy(RULES)
    for key, value in changes.items():
        *tables, last = key.split("__")
        place = rules[tables[0]] if tables else rules
        place[last] = value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(rules))
    return str(path)


@pytest.mark.parametrize("name", IN_USE)
def test_what_people_use_is_read(name, tmp_path):
    check_pattern(IN_USE[name])
    found = load_tokenizer(stored(tmp_path, pre_tokenizer=cut(IN_USE[name])))
    text = "To be 12345, [or] (not)\n\n we'll 人生"
    assert found.decode(found.encode(text)) == text


@pytest.mark.parametrize("name", CUTS)
def test_what_we_write_is_read(name, tmp_path):
    theirs = _empty(name, RULES["model"]["vocab"], [tuple(pair) for pair in RULES["model"]["merges"]])
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode("to be") == HuggingFaceTokenizer(theirs).encode("to be")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$", r"(a|a)+$", r"(?:a*)*b", r"((a?){2,}b)*", r"(a|b|ab)*c", r"(?:(?:a+)b?)+", r"(a{1,2})+",
        r"(?:a+){30}", r"(?i:(?:\w\s?)+)*", r"(?>(a+)+)$", r"(?:a|b){2,}?", r"(?=(a+)+$)", r"x(?:y|(a+){2})",
        r"a+{2,}", r"a**", r"a{1,2}+", r"(.)\1", r"(?<x>a\g<x>?b)", r"(?#c)(a+)", r"(?x)a", r"(?~abc)",
        r"[]a](a+)+", r"[^]](a+)+", r"[a[b](a+)+$]", r"[a[b]](a+)+$", r"\Qa\E", "\\", "[",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["Hugging Face's", "ours"])
def test_patterns_that_could_take_for_ever_are_refused(pattern, form, tmp_path):
    if form == "ours":
        path = tmp_path / "tokenizer.json"
        OWN.save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pattern": pattern}))
    else:
        path = stored(tmp_path, pre_tokenizer=cut(pattern))
    with pytest.raises(ValueError, match="repeats a group that can be matched|cannot be followed") as error:
        load_tokenizer(str(path))
    assert str(error.value).startswith(str(path))


def test_a_slow_pattern_is_noticed_before_a_text_is_long(tmp_path):
    """No group is repeated here, but three places can move: the time grows with the cube of the length."""
    path = stored(tmp_path, pre_tokenizer=cut(r"[\s\S]*[\s\S]+(?=☃)|[\s\S]"))
    with pytest.raises(ValueError, match=r"it takes .* s for [\d,]+ characters"):
        load_tokenizer(path)
    asked = []
    check_speed(asked.append)
    assert max(map(len, asked)) >= 4096 and len(set(asked)) > 30


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
LIGATURE = {
    "type": "Replace",
    "pattern": {"String": " "},
    "content": "ﷺ",
}  # has three spaces when taken apart


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__vocab": RULES["model"]["vocab"] | {"far": 2**31}}, "the id 2147483648, but only 263 tokens"),
        ({"model__vocab": RULES["model"]["vocab"] | {"far": -1}}, "the id -1"),
        ({"model__vocab": RULES["model"]["vocab"] | {"far": "x"}}, "the id 'x'"),
        ({"model__vocab": [["a", 0.0]], "model__type": "Unigram"}, "no BPE"),
        ({"model": None}, "no BPE"),
        ({"added_tokens": [{**RULES["added_tokens"][0], "id": 2**31}]}, "the id 2147483648"),
        ({"added_tokens": [{**RULES["added_tokens"][0], "content": "x" * 300}]}, "300 characters"),
        ({"added_tokens": 3}, "no list"),
        ({"added_tokens": [{**RULES["added_tokens"][0], "content": f"{i:0250}"} for i in range(2000)]}, "500,000 characters"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}}, "what is not there"),
        ({"normalizer": {"normalizers": [REPLACE] * 8}}, "characters of one"),  # which does not say that it is a sequence
        ({"normalizer": {"prepend": "x"}}, "step None is not known"),
        ({"post_processor": {"processors": [{"type": "TemplateProcessing", "special_tokens": {}, "pair": [], "single": [{"Sequence": {"id": "A"}}] * 2}]}}, "repeats the text"),
        ({"model__end_of_word_suffix": "y" * 10**6}, "1,000,000 characters"),
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 8}}, "characters of one"),
        ({"normalizer": {"type": "Sequence", "normalizers": [LIGATURE, {"type": "NFKD"}] * 9}}, "of one"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 9}}, "of one"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 2000}}, "of one"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**5}}, "its rules have"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y" * 2000}}, "of one"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(x+)+"}, "content": "y"}}, "repeats a group"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "'Precompiled' is not known"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 9}}, "of one"),
        ({"post_processor": {"type": "TemplateProcessing", "special_tokens": {}, "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
          "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 50}}, "repeats the text"),
    ],
)  # fmt: skip
def test_more_than_a_tokenizer_needs_is_refused(changes, said, tmp_path):
    path = stored(tmp_path, **changes)
    with pytest.raises(ValueError, match=said) as error:
        load_tokenizer(path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_llama_2s_rules_are_read(tmp_path):
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "NFKC"},
    ]
    path = stored(tmp_path, normalizer={"type": "Sequence", "normalizers": steps})
    assert load_tokenizer(path).decode(load_tokenizer(path).encode("a b")) == "▁a▁b"


def test_what_is_read_is_what_was_looked_at(tmp_path):
    """A name that comes twice: one reader may take the first, and another the last."""
    path = tmp_path / "tokenizer.json"
    evil = json.dumps({**RULES, "pre_tokenizer": cut("(a+)+$")})[:-1]
    path.write_text(f'{evil}, "pre_tokenizer": {json.dumps(RULES["pre_tokenizer"])}}}')
    assert load_tokenizer(str(path)) == as_huggingface(OWN)


def test_where_the_library_panics_there_is_a_sentence():
    theirs = tokenizers.Tokenizer.from_str(json.dumps(RULES))
    theirs.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    with pytest.raises(ValueError, match="the tokenizer cannot cut this text"):
        HuggingFaceTokenizer(theirs).encode("a" * 40 + "!")
