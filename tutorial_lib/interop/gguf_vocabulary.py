"""The tokenizer inside a GGUF file: its tokens, its merges, and the name of the rule that cuts a text into chunks."""

from __future__ import annotations

import json
from array import array
from functools import cache
from typing import TYPE_CHECKING, Any

from tutorial_lib.data.adapters import HuggingFaceTokenizer, as_huggingface
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.interop.gguf_file import GGUFError, GGUFFile
from tutorial_lib.interop.weights import WeightsError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["CUTS", "read_vocabulary", "vocabulary_fields"]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF's types of tokens: <|im_start|> and the like are control tokens."""

NO_MERGE = "þ ÿ"
"""llama.cpp wants a merge at least. This one never happens: no UTF-8 text has the bytes 254 and 255."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt-2": None,
    "smollm": "digits",
    "llama-bpe": LLAMA3,
    "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}
"""How a text is cut into chunks, by the name that llama.cpp gives it: GPT-2's own way, that with each digit alone,
or a regular expression."""


def _empty(cut: str, vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    how = CUTS[cut]
    # Llama 3 has chunks that are tokens, and that no order of merges makes.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=cut == "llama-bpe"))
    if how is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif how == "digits":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        cuts = pre_tokenizers.Split(Regex(how), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cuts, to_bytes])
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def _known_cuts() -> dict[str, str]:
    """What `tokenizers` writes for each cut, and our name for it."""
    return {_cut_of(json.loads(_empty(cut, {}, []).to_str())): cut for cut in CUTS}


def _cut_of(rules: dict[str, Any]) -> str:
    def bare(value: Any) -> Any:  # `trim_offsets` only matters to those who ask where a token stood
        if isinstance(value, dict):
            return {key: bare(v) for key, v in value.items() if key != "trim_offsets"}
        return [bare(v) for v in value] if isinstance(value, list) else value

    return json.dumps([bare(rules["normalizer"]), bare(rules["pre_tokenizer"])], sort_keys=True)


def read_vocabulary(file: GGUFFile) -> HuggingFaceTokenizer:
    """The byte-level BPE tokenizer that the file carries.

    Raises:
        GGUFError: if its kind is one that we do not know, or its parts do not fit together.
    """
    try:
        import tokenizers
    except ImportError:
        raise GGUFError("a tokenizer needs the package tokenizers: pip install tokenizers") from None

    kind, cut = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or not isinstance(cut, str) or cut not in CUTS:
        known = ", ".join(f"gpt2/{name}" for name in CUTS)
        raise GGUFError(f"{file.path} has a tokenizer of kind {kind!r:.40}/{cut!r:.40}: known are {known}")
    tokens, merges = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.merges", [])
    types = file.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens) if isinstance(tokens, list) else [])
    types = list(types) if isinstance(types, array) else types
    if not all(isinstance(part, list) for part in (tokens, merges, types)) or len(types) != len(tokens):
        raise GGUFError(f"{file.path} is damaged: its tokens, their types and the merges do not fit together")
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges if merge != NO_MERGE]
        vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
        tokenizer = _empty(cut, vocab, pairs)
        added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind != NORMAL]
        for token, kind in added:
            if kind in (CONTROL, USER_DEFINED):
                special = tokenizers.AddedToken(token, normalized=False, special=kind == CONTROL)
                (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)([special])
        ends = [file.metadata.get(f"tokenizer.ggml.{which}_token_id") for which in ("eos", "bos")]
        names = [tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else None for i in ends]
        if names[1] is not None and file.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe"):
            from tokenizers.processors import TemplateProcessing

            first = [(names[1], ends[1])]
            tokenizer.post_processor = TemplateProcessing(single=f"{names[1]} $A", special_tokens=first)
        return HuggingFaceTokenizer(tokenizer, *names)
    except Exception as error:  # the package raises nothing more specific
        said = " ".join(str(error).split())[:200]
        raise GGUFError(f"{file.path} has a tokenizer that cannot be built: {said}") from None


def vocabulary_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer.

    Raises:
        WeightsError: if llama.cpp has no name for its rules, or the model has no row for one of its tokens.
    """
    try:
        tokenizer = as_huggingface(tokenizer)
    except ValueError as error:
        raise WeightsError(f"{error}, so it cannot go into a GGUF file") from None
    rules = tokenizer.rules
    cut = _known_cuts().get(_cut_of(rules))
    if rules["model"]["type"] != "BPE" or cut is None:
        raise WeightsError(
            f"llama.cpp has no name for how this tokenizer cuts a text: known are {', '.join(CUTS)}"
        )
    if bool(rules["model"].get("ignore_merges")) != (cut == "llama-bpe"):
        raise WeightsError(
            f"llama.cpp cuts as {cut}, and takes whole chunks that are tokens {'as' if cut == 'llama-bpe' else 'not as'} "
            "they are: this tokenizer does otherwise (ignore_merges)"
        )
    if tokenizer.vocab_size > vocab_size:
        raise WeightsError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only {vocab_size:,} rows"
        )
    tokens = [f"<|unused {i}|>" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i in rules["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for token in rules["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in rules["model"]["merges"]]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": bool(tokenizer.starts),
    }
    fields["tokenizer.ggml.merges"] = merges or [NO_MERGE]
    for which in ("eos", "bos"):
        if (name := getattr(tokenizer, which)) is not None:
            fields[f"tokenizer.ggml.{which}_token_id"] = tokenizer.tokenizer.token_to_id(name)
    return fields
