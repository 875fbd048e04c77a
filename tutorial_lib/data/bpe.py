# Exported from chapters/part_4_scaling_up/4_1_bpe.ipynb. Edit the lesson, then run: make export
"""Byte-level BPE: tokens learned from text, by merging the two neighbors that stand together most often."""

import base64
import codecs
import json
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from tutorial_lib.data.bpe_formats import make_huggingface, make_tiktoken, read_gpt2_tokens
from tutorial_lib.data.bpe_merges import GPT2_PATTERN, learn_merges, merge_by_rank, split_chunks
from tutorial_lib.files import write_text

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

__all__ = ["BPETokenizer"]


_FORMAT = "llm-from-scratch bpe 1"
_MOST_CHUNKS = 1 << 19  # different chunks that training counts at once: each takes about half a kilobyte
_CACHED_CHUNKS = 1 << 16  # how many chunks an encoder remembers,
_CACHED_LENGTH = 64  # and how long they may be: together they bound its memory


class BPETokenizer:
    """Text to chunks, chunks to bytes, bytes merged to tokens by rank; and back. Specials come last.

    >>> tokenizer = BPETokenizer.train("to be or not to be", vocab_size=260)
    >>> [tokenizer.decode_bytes([i]) for i in tokenizer.encode("to be")]
    [b'to', b' be']

    Args:
        ranks: Each token's bytes, and its id. Ids run from 0; all 256 bytes are there, and every longer token
            is two tokens of lower ids joined. The lower the id, the earlier it is merged.
        specials: Names such as `"<|eos|>"`, which get the ids after. `encode` never produces one from text by
            itself; ask for it with `allow_specials=True`.
        pattern: A regular expression (of the package `regex`) whose matches are the chunks.

    Raises:
        ValueError: if the ranks are not such a vocabulary, the pattern is no pattern, or a name is empty or
            comes twice.
    """

    def __init__(
        self, ranks: Mapping[bytes, int], specials: Sequence[str] = (), pattern: str = GPT2_PATTERN
    ) -> None:
        self.ranks = dict(ranks)
        self.pattern = pattern
        self.specials = {name: len(self.ranks) + i for i, name in enumerate(specials)}
        self._bytes = {i: token for token, i in self.ranks.items()}
        if sorted(self._bytes) != list(range(len(self.ranks))):
            raise ValueError(
                f"the ids of {len(self.ranks)} tokens must be 0 to {len(self.ranks) - 1}, each once"
            )
        if missing := [b for b in range(256) if bytes([b]) not in self.ranks]:
            raise ValueError(
                f"{len(missing)} of the 256 single bytes have no token, the first is {missing[0]}"
            )
        for token, rank in self.ranks.items():
            splits = ((token[:k], token[k:]) for k in range(1, len(token)))
            made = any(self.ranks.get(a, rank) < rank > self.ranks.get(b, rank) for a, b in splits)
            if len(token) != 1 and not made:
                raise ValueError(f"token {rank}, {token!r}, is not two tokens of lower ids joined")
        if len(self.specials) != len(specials):
            raise ValueError(f"a special token is named twice in {list(specials)}")
        if "" in self.specials:
            raise ValueError("a special token has an empty name, which would be found everywhere")
        try:
            split_chunks("", pattern)
        except regex.error as error:
            raise ValueError(f"the pattern is not a regular expression ({error})") from error
        self._bytes |= {i: name.encode("utf-8") for name, i in self.specials.items()}
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls,
        texts: str | Iterable[str],
        vocab_size: int,
        specials: Sequence[str] = (),
        pattern: str = GPT2_PATTERN,
    ) -> "BPETokenizer":
        """Learn a vocabulary of `vocab_size` ids, specials included (fewer if the text runs out of pairs).

        Ids 0 to 255 are the bytes, then the tokens in the order of their merges: a smaller vocabulary is the
        beginning of a larger one. See `learn_merges` for ties. `texts` is one text or many; no chunk spans two.
        Where they have more than half a million different chunks, the rarest are forgotten between two texts.
        """
        n_merges = vocab_size - 256 - len(specials)
        if n_merges < 0:
            raise ValueError(
                f"vocab_size {vocab_size} is too small for 256 bytes and {len(specials)} special tokens"
            )
        counts: Counter[str] = Counter()
        for text in [texts] if isinstance(texts, str) else texts:
            counts.update(split_chunks(text, pattern))
            if len(counts) > _MOST_CHUNKS:  # there is no end to new words, and the rarest teach least
                counts = Counter(dict(counts.most_common(_MOST_CHUNKS // 2)))
        tokens = [bytes([b]) for b in range(256)]
        for left, right in learn_merges(counts, n_merges):
            tokens.append(tokens[left] + tokens[right])
        return cls({token: i for i, token in enumerate(tokens)}, specials, pattern)

    @property
    def vocab_size(self) -> int:
        """Bytes, merged tokens and specials."""
        return len(self._bytes)

    @property
    def eos_id(self) -> int | None:
        """The id of `<|eos|>`, or of `<|endoftext|>`, as GPT-2 calls it, or None."""
        return self.specials.get("<|eos|>", self.specials.get("<|endoftext|>"))

    def encode(self, text: str, allow_specials: bool = False) -> list[int]:
        """The ids of `text`.

        Args:
            text: Any text. Half a surrogate pair is not text, and raises a UnicodeEncodeError.
            allow_specials: Turn the names of specials into their ids. Only for text that you wrote yourself.
                Names are found from left to right; where two begin together, the longer one counts.
        """
        text.encode("utf-8")  # half a surrogate pair: say so here
        if not allow_specials or not self.specials:
            return self._encode_chunks(text)
        longest_first = sorted(self.specials, key=len, reverse=True)
        names = "|".join(regex.escape(name) for name in longest_first)
        ids: list[int] = []
        for piece in regex.split(f"({names})", text):  # text, special, text, special, …, text
            ids += [self.specials[piece]] if piece in self.specials else self._encode_chunks(piece)
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, UTF-8 or not: `decode_bytes(encode_bytes(data)) == data`, always."""
        return self._encode_chunks(data.decode("utf-8", errors="surrogateescape"))

    def _encode_chunks(self, text: str) -> list[int]:
        ids: list[int] = []
        remembered = self._cache.get
        for chunk in split_chunks(text, self.pattern):
            ids += remembered(chunk) or self._encode_chunk(chunk)
        return ids

    def _encode_chunk(self, chunk: str) -> list[int]:
        data = chunk.encode("utf-8", errors="surrogateescape")
        parts = [data] if data in self.ranks else merge_by_rank(data, self.ranks)
        ids = [self.ranks[part] for part in parts]
        if len(chunk) <= _CACHED_LENGTH:
            if len(self._cache) >= _CACHED_CHUNKS:
                self._cache.clear()
            self._cache[chunk] = ids
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, exactly; specials by their names. A ValueError at an id outside the vocabulary."""
        return b"".join(map(self._token, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (a model may write them) become U+FFFD, �."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode as ids arrive, holding back the bytes of an unfinished character.

        Raises:
            ValueError: at an id outside the vocabulary.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if piece := decoder.decode(self._token(i)):
                yield piece
        if tail := decoder.decode(b"", final=True):
            yield tail

    def _token(self, i: int) -> bytes:
        if (token := self._bytes.get(int(i))) is None:
            raise ValueError(f"token id {int(i)} is outside the vocabulary of {self.vocab_size}")
        return token

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The two halves of every merged token, in the order of the merges."""
        found = []
        for token, rank in sorted(self.ranks.items(), key=operator.itemgetter(1)):
            if len(token) > 1:
                halves = merge_by_rank(token, self.ranks, below=rank)
                if len(halves) != 2:
                    raise ValueError(f"no order of merges makes token {rank}, {token!r}")
                found.append((halves[0], halves[1]))
        return found

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all: the pattern, the specials, the tokens by id in base64."""
        tokens = [base64.b64encode(self._bytes[i]).decode("ascii") for i in range(len(self.ranks))]
        content = {"format": _FORMAT, "pattern": self.pattern, "specials": [*self.specials], "tokens": tokens}
        write_text(Path(path), json.dumps(content, indent=0) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read what `save` wrote. A ValueError says in one sentence why a file is not such a vocabulary."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise ValueError(f"it does not say {_FORMAT!r}")
            names, pattern, written = (content.get(key) for key in ("specials", "pattern", "tokens"))
            lists = isinstance(names, list) and isinstance(written, list)
            if not lists or not all(isinstance(text, str) for text in [pattern, *names, *written]):
                raise ValueError("its pattern, its specials or its tokens are missing or are not text")
            tokens = [base64.b64decode(token, validate=True) for token in written]
            if len(set(tokens)) != len(tokens):
                raise ValueError("a token is listed twice")
            return cls({token: i for i, token in enumerate(tokens)}, names, pattern)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a BPE vocabulary that this course wrote: {error}") from error

    @classmethod
    def from_gpt2(cls, vocab_bpe: str) -> "BPETokenizer":
        """GPT-2's tokenizer from the text of its merges file, `vocab.bpe`: 50,257 ids with `<|endoftext|>`."""
        tokens = read_gpt2_tokens(vocab_bpe)
        return cls({token: i for i, token in enumerate(tokens)}, ["<|endoftext|>"])

    def to_tiktoken(self) -> "tiktoken.Encoding":
        """The same tokenizer in tiktoken, OpenAI's encoder in Rust."""
        return make_tiktoken(self.ranks, self.specials, self.pattern)

    def to_huggingface(self) -> "tokenizers.Tokenizer":
        """The same tokenizer in Hugging Face's `tokenizers`; names of specials in a text stay text there, too.

        Set `encode_special_tokens = False` on it to turn them into ids.
        """
        return make_huggingface(self.ranks, self.merges(), self.specials, self.pattern)
