"""Tokenizers by name, behind one small protocol."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.corpora import fetch
from tutorial_lib.data.tokenize import ByteTokenizer

__all__ = ["NAMES", "Tokenizer", "encode_bytes", "load_tokenizer", "same_tokenizer", "token_lengths"]

NAMES = ("byte", "gpt2")
"""Those that need no file of yours."""


class Tokenizer(Protocol):
    """What training and writing ask of a tokenizer."""

    specials: dict[str, int]

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str, allow_specials: bool = False) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def stream(self, ids: Iterable[int]) -> Iterator[str]: ...


def load_tokenizer(name: str, beside: Path | None = None) -> Tokenizer:
    """`byte`, `gpt2` (fetched once), or the path of a vocabulary that `llm-scratch tokenize` wrote.

    Args:
        beside: A folder in which a relative path is looked for first: a checkpoint's, say.

    Raises:
        ValueError: if there is no such tokenizer, or the file is no vocabulary.
        CorpusError: if GPT-2's merges cannot be fetched.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return BPETokenizer.from_gpt2(fetch("gpt2").read_text(encoding="utf-8"))
    for path in ([beside / name] if beside else []) + [Path(name)]:
        if path.is_file():
            return BPETokenizer.load(path)
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.6)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"choose {', '.join(NAMES)}, or give the path of a vocabulary"
    )
    raise ValueError(f"there is no tokenizer {name!r}: {hint}")


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether both give every text the same ids."""
    return type(a) is type(b) and all(
        getattr(a, what, None) == getattr(b, what, None) for what in ("ranks", "pattern", "specials")
    )


def encode_bytes(tokenizer: Tokenizer, data: bytes) -> np.ndarray:
    """The ids of a text's bytes, in the smallest type that holds them; a broken character does no harm.

    The text is cut where a line ends in a visible character and the next begins with a letter, which no chunk of
    a BPE spans, so that only a piece is ever a list of Python's numbers.
    """
    kind = np.min_scalar_type(tokenizer.vocab_size - 1)
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(data, np.uint8).astype(kind, copy=False)
    assert isinstance(tokenizer, BPETokenizer)
    return np.concatenate(
        [np.array(tokenizer.encode_bytes(piece), kind) for piece in _pieces(data)] or [np.empty(0, kind)]
    )


def _pieces(data: bytes, size: int = 1 << 20) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        end = start + size
        while end < len(data):
            end = data.find(b"\n", end) + 1
            if end == 0:
                end = len(data)
            elif 33 <= data[end - 2] < 127 and data[end : end + 1].isalpha():
                break
        yield data[start:end]
        start = end


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for; specials stand for none. Bits per byte need it."""
    lengths = np.zeros(tokenizer.vocab_size, np.int64)
    if isinstance(tokenizer, ByteTokenizer):
        lengths[:256] = 1
    else:
        assert isinstance(tokenizer, BPETokenizer)
        for token, i in tokenizer.ranks.items():
            lengths[i] = len(token)
    return lengths
