"""What a tokenizer is: the manners that our bytes and our BPE have, and the adapters give to others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from tutorial_lib.data.tokenize import ByteTokenizer

__all__ = ["Tokenizer", "token_bytes"]


class Tokenizer(Protocol):
    """What training and writing ask of a tokenizer: our bytes and our BPE have it, and the adapters of others."""

    specials: dict[str, int]

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str, allow_specials: bool = False) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def stream(self, ids: Iterable[int]) -> Iterator[str]: ...


def token_bytes(tokenizer: Tokenizer, i: int) -> bytes:
    """The bytes that a token stands for; a special's are its name."""
    if isinstance(tokenizer, ByteTokenizer):
        return bytes([i]) if 0 <= i < 256 else tokenizer.decode([i]).encode("utf-8")
    return tokenizer.decode_bytes([i])
