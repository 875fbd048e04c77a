"""Documents of any length, read from files a piece at a time: none is ever whole in memory.

A piece is about half a megabyte and ends where no chunk of a BPE goes on: the ids of the pieces, one after the other,
are those of the document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

__all__ = ["Documents", "Piece", "cut", "part_of_document", "some_documents"]

PIECE = 1 << 20
"""Bytes that a piece has at most; where lines and words are found, it has hardly more than half of them."""

LINE, WORD = re.compile(rb"[!-~]\n(?=[A-Za-z])"), re.compile(rb"[!-~](?= [A-Za-z])")
"""Between a line that ends in a visible character and one that begins with a letter; before a space and a letter."""

Piece: TypeAlias = tuple[bytes, bool]
"""Some bytes of a document, and whether it ends with them."""


def cut(text: bytes) -> Iterator[bytes]:
    """The text in pieces. Where half a megabyte has neither a line nor a word, a character is all that stays whole."""
    start = 0
    while len(text) - start > PIECE:
        end = _place(text, start)
        yield text[start:end]
        start = end
    yield text[start:]


def _place(text: bytes, start: int) -> int:
    """Where the piece that begins at `start` ends."""
    for place in (LINE, WORD):
        if found := place.search(text, start + PIECE // 2, start + PIECE):
            return found.end()
    end = start + PIECE
    while end > start + PIECE - 3 and text[end] & 0xC0 == 0x80:  # a byte that goes on with a character
        end -= 1
    return end


@dataclass(frozen=True)
class Documents:
    """The documents of some files, to be gone through as often as one likes. What has nothing but spaces is none."""

    files: Sequence[Path]
    """Each is a document,"""
    separator: bytes | None = None
    """or what this cuts it into."""

    def __iter__(self) -> Iterator[Piece]:
        inside = False
        for piece, ends in (piece for path in self.files for piece in self._read(path)):
            if inside or not ends or piece.strip():
                yield piece, ends
            inside = not ends

    def _read(self, path: Path) -> Iterator[Piece]:
        held = b""
        with path.open("rb") as file:
            while block := file.read(PIECE):
                held += block
                if self.separator:
                    *whole, held = held.split(self.separator)
                    yield from ((document, True) for document in whole)
                while len(held) > 2 * PIECE:  # the rest could be the beginning of a separator
                    end = _place(held, 0)
                    yield held[:end], False
                    held = held[end:]
        yield held, True

    def measure(self) -> tuple[int, int]:
        """How many documents there are, and how many bytes they have."""
        number = size = 0
        for piece, ends in self:
            number, size = number + ends, size + len(piece)
        return number, size


def some_documents(documents: Iterable[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The documents from number `start` to `stop`."""
    number = 0
    for piece, ends in documents:
        if number >= stop:
            return
        if number >= start:
            yield piece, ends
        number += ends


def part_of_document(document: Iterable[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The bytes from `start` to `stop` of one document, as a document."""
    at = 0
    for piece, _ in document:
        yield piece[max(0, start - at) : max(0, stop - at)], False
        at += len(piece)
    yield b"", True
