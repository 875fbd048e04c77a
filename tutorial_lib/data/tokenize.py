# Exported from chapters/part_2_training_a_tiny_llm/2_1_byte_tokenizer.ipynb.
# Edit the lesson, then run: make export
"""The smallest honest tokenizer: every byte is a token, so every text there is can be written."""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["ByteTokenizer"]


class ByteTokenizer:
    """Text to UTF-8 bytes to the numbers 0 to 255, and back. Special tokens come after, from 256.

    >>> ByteTokenizer().encode("né")
    [110, 195, 169]

    Args:
        specials: Names such as `"<|eos|>"`. `encode` never produces one from text by itself, so that
            nobody can smuggle an end-of-text into a prompt; ask for it with `allow_specials=True`.

    Raises:
        ValueError: if a name is empty or comes twice.
    """

    def __init__(self, specials: Sequence[str] = ()) -> None:
        self.specials = {name: 256 + i for i, name in enumerate(specials)}
        self._names = {i: name for name, i in self.specials.items()}
        if len(self.specials) != len(specials):
            raise ValueError(f"a special token is named twice in {list(specials)}")
        if "" in self.specials:
            raise ValueError("a special token has an empty name, which would be found everywhere")

    @property
    def vocab_size(self) -> int:
        """256 bytes and the specials."""
        return 256 + len(self.specials)

    @property
    def eos_id(self) -> int | None:
        """The id of `<|eos|>`, or None."""
        return self.specials.get("<|eos|>")

    def encode(self, text: str, allow_specials: bool = False) -> list[int]:
        """The ids of `text`.

        Args:
            text: Any text. Half a surrogate pair is not text, and raises a UnicodeEncodeError.
            allow_specials: Turn the names of specials into their ids. Only for text that you wrote yourself.
                Names are found from left to right; where two begin together, the longer one counts.
        """
        if not allow_specials or not self.specials:
            return list(text.encode("utf-8"))
        longest_first = sorted(self.specials, key=len, reverse=True)
        pattern = "|".join(re.escape(name) for name in longest_first)
        ids: list[int] = []
        for piece in re.split(f"({pattern})", text):  # text, special, text, special, …, text
            ids += [self.specials[piece]] if piece in self.specials else piece.encode("utf-8")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (a model may write them) become U+FFFD, �."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode as ids arrive, holding back the bytes of an unfinished character.

        >>> list(ByteTokenizer().stream([110, 195, 169]))
        ['n', 'é']

        Raises:
            ValueError: at an id outside the vocabulary.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            i = int(i)
            if i in self._names:  # a special ends whatever character was unfinished
                piece = decoder.decode(b"", final=True) + self._names[i]
                decoder.reset()
            elif 0 <= i < 256:
                piece = decoder.decode(bytes([i]))
            else:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
            if piece:
                yield piece
        if tail := decoder.decode(b"", final=True):
            yield tail
