"""Tokenizers by name, behind one small protocol."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np

from tutorial_lib.data.adapters import LARGEST, HuggingFaceTokenizer, TiktokenTokenizer, as_huggingface
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.corpora import fetch
from tutorial_lib.data.documents import cut
from tutorial_lib.data.protocol import Tokenizer, token_bytes
from tutorial_lib.data.rules import check_pattern, check_speed
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.files import read_json
from tutorial_lib.interop.gguf_file import GGUFFile
from tutorial_lib.interop.gguf_vocabulary import read_vocabulary

__all__ = [
    "NAMES",
    "Tokenizer",
    "encode_bytes",
    "load_tokenizer",
    "same_tokenizer",
    "token_lengths",
]

NAMES = ("byte", "gpt2", "smollm2")
"""Those that need no file of yours."""


def load_tokenizer(name: str, beside: Path | None = None) -> Tokenizer:
    """A tokenizer by its name, or from a file.

    Args:
        name: `byte`; `gpt2` or `smollm2` (fetched once); the path of a vocabulary that `llm-scratch tokenize`
            wrote, of a Hugging Face `tokenizer.json`, of a folder with one, or of a GGUF file.
        beside: A folder in which a relative path is looked for first: a checkpoint's, say.

    Raises:
        ValueError: if there is no such tokenizer, or the file is no vocabulary.
        CorpusError: if it cannot be fetched.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return BPETokenizer.from_gpt2(fetch("gpt2").read_text(encoding="utf-8"))
    if name == "smollm2":
        return _from_file(fetch("smollm2"))
    for path in ([beside / name] if beside else []) + [Path(name).expanduser()]:
        if (path / "tokenizer.json").is_file():
            path = path / "tokenizer.json"
        if path.is_file():
            return _from_file(path)
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.6)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"choose {', '.join(NAMES)}, or give the path of a vocabulary"
    )
    raise ValueError(f"there is no tokenizer {name!r}: {hint}")


def _from_file(path: Path) -> Tokenizer:
    if path.suffix.lower() == ".gguf":
        return read_vocabulary(GGUFFile(path))
    content = read_json(path, LARGEST)
    if "added_tokens" in content:
        return HuggingFaceTokenizer.load(path, content)
    if "format" not in content:
        raise ValueError(
            f"{path} is neither a tokenizer.json of Hugging Face's nor a vocabulary that `llm-scratch tokenize` wrote"
        )
    try:
        check_pattern(str(content.get("pattern")))
        found = BPETokenizer.load(path)
        check_speed(found.encode)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(str(path)) else f"{path}: {said}") from None
    return found


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether both give every text the same ids."""
    if isinstance(a, TiktokenTokenizer):
        return a == b
    if isinstance(a, HuggingFaceTokenizer) or isinstance(b, HuggingFaceTokenizer):
        try:  # ours may be the same, said in other words
            return as_huggingface(a) == as_huggingface(b)
        except ValueError:
            return False
    return type(a) is type(b) and all(
        getattr(a, what, None) == getattr(b, what, None) for what in ("ranks", "pattern", "specials")
    )


def encode_bytes(tokenizer: Tokenizer, data: bytes) -> np.ndarray:
    """The ids of a text's bytes, in the smallest type that holds them; a broken character does no harm to ours.

    The text is cut where no chunk of a BPE goes on, so that only a piece is ever a list of Python's numbers. (A
    tokenizer that puts a space before every text, as Llama 2's, puts it before every piece.)
    """
    kind = np.min_scalar_type(tokenizer.vocab_size - 1)
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(data, np.uint8).astype(kind, copy=False)
    return np.concatenate([np.array(tokenizer.encode_bytes(piece), kind) for piece in cut(data)])


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for; specials stand for none. Bits per byte need it."""
    lengths = np.zeros(tokenizer.vocab_size, np.int64)
    for i in set(range(tokenizer.vocab_size)) - set(tokenizer.specials.values()):
        try:
            lengths[i] = len(token_bytes(tokenizer, i))
        except ValueError:
            pass  # a gap in somebody's vocabulary
    return lengths
