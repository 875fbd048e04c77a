"""Tokenizers of others, Hugging Face's and tiktoken's, with the manners of our own."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.bpe_formats import gpt2_characters
from tutorial_lib.data.bpe_merges import GPT2_PATTERN
from tutorial_lib.data.rules import check_rules, check_speed
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.files import read_json, write_text

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

__all__ = ["HuggingFaceTokenizer", "TiktokenTokenizer", "as_huggingface", "read_tokenizer_config"]


LARGEST = 1 << 26
"""Bytes of a tokenizer's file. A quarter of a million tokens and their merges have half of that."""


class _ByBytes:
    """What follows from knowing the bytes of each token."""

    specials: dict[str, int]

    def token_bytes(self, i: int) -> bytes:
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, exactly; specials by their names. A ValueError at an id outside the vocabulary."""
        return b"".join(self.token_bytes(int(i)) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (a model may write them) become U+FFFD, �."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode as ids arrive, holding back the bytes of an unfinished character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if piece := decoder.decode(self.token_bytes(int(i))):
                yield piece
        if tail := decoder.decode(b"", final=True):
            yield tail


class HuggingFaceTokenizer(_ByBytes):
    """A `tokenizers.Tokenizer`: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM), or SentencePiece's BPE with bytes to
    fall back on (Llama 2, Mistral).

    Args:
        tokenizer: Its rules, names and merges.
        eos: The name of the token that ends a text or an answer; None looks for one of the usual names.
        bos: The name of the token that a text begins with, for those who want it.

    Raises:
        ValueError: if it decodes in a way that is not known, or has no token of that name.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, eos: str | None = None, bos: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        tokenizer.no_truncation()  # some files carry what batches were once cut and filled up to
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in sorted(added.items()) if token.special}
        for name in (eos, bos):
            if name is not None and tokenizer.token_to_id(name) is None:
                raise ValueError(f"the tokenizer has no token {name!r}")
        usual = ("<|eos|>", "<|endoftext|>", "<|end_of_text|>", "</s>")
        self.eos = eos or next((name for name in usual if name in self.specials), None)
        self.bos = bos
        if not (found := self._all_bytes({i: token.content.encode() for i, token in added.items()})):
            raise ValueError("the tokenizer has no tokens")
        self._bytes = found

    @classmethod
    def load(cls, path: str | Path, rules: dict[str, Any] | None = None) -> HuggingFaceTokenizer:
        """From a `tokenizer.json`; what ends a text is in a `tokenizer_config.json` beside it.

        Args:
            rules: What the file says, if it has been read.

        Raises:
            ValueError: if it is no such file.
        """
        path = Path(path)
        try:
            import tokenizers
        except ImportError:
            raise ImportError(f"{path} needs the package tokenizers: pip install tokenizers") from None
        rules = read_json(path, LARGEST) if rules is None else rules
        about = read_tokenizer_config(path.parent)
        try:
            check_rules(rules)
            with _no_panic("the package tokenizers does not read it"):
                # What was looked at, not the file: two readers of JSON need not agree on a name that comes twice.
                known = tokenizers.Tokenizer.from_str(json.dumps(rules))
            found = cls(known, _name(about.get("eos_token")), _name(about.get("bos_token")))
            check_speed(found.encode)
            return found
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path, chat_template: str | None = None) -> None:
        """Write `tokenizer.json`, and beside it `tokenizer_config.json`, as Hugging Face's models have them."""
        path = Path(path)
        write_text(path, self.tokenizer.to_str(pretty=True) + "\n")
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos, "bos_token": self.bos}
        about |= {"chat_template": chat_template, "clean_up_tokenization_spaces": False}
        about = {key: value for key, value in about.items() if value is not None}
        write_text(path.with_name("tokenizer_config.json"), json.dumps(about, indent=2) + "\n")

    @property
    def rules(self) -> dict[str, Any]:
        """All that it is, as `tokenizer.json` says it. Made when asked for: it is large."""
        return json.loads(self.tokenizer.to_str())

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes) + 1

    @property
    def starts(self) -> list[int]:
        """What it puts before a text if it is asked to: BOS, or nothing. `encode` never does."""
        with _no_panic("the tokenizer cannot be used"):
            ids = self.tokenizer.encode("").ids
        return ids if self.bos is not None and ids == [self.tokenizer.token_to_id(self.bos)] else []

    @property
    def eos_id(self) -> int | None:
        """The id of the token that ends a text."""
        return None if self.eos is None else self.tokenizer.token_to_id(self.eos)

    def encode(self, text: str, allow_specials: bool = False) -> list[int]:
        """The ids of `text`, as in `ByteTokenizer.encode`; nothing is put before or after it.

        Raises:
            ValueError: if the tokenizer's own rules fail on the text.
        """
        text.encode("utf-8")  # half a surrogate pair: say so here
        self.tokenizer.encode_special_tokens = (
            not allow_specials
        )  # its name is misleading: True keeps them text
        with _no_panic("the tokenizer cannot cut this text"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of a text's bytes.

        Raises:
            UnicodeDecodeError: if they are not UTF-8, which these tokenizers cannot take.
        """
        return self.encode(data.decode("utf-8"))

    def token_bytes(self, i: int) -> bytes:
        """The bytes that a token stands for."""
        if (token := self._bytes.get(i)) is None:
            raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return token

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceTokenizer) and self._essence() == other._essence()

    __hash__ = object.__hash__

    def _essence(self) -> tuple[Any, ...]:
        """What decides the ids. Whether a special is listed among the other tokens as well does not."""
        rules, vocab = self.rules, self.tokenizer.get_vocab(with_added_tokens=True)
        added = sorted((t["id"], t["content"], t["special"]) for t in rules["added_tokens"])
        cut = json.dumps([rules["normalizer"], rules["pre_tokenizer"]]).replace(
            '"trim_offsets": false', '"trim_offsets": true'
        )
        return vocab, added, rules["model"].get("merges"), rules["model"].get("ignore_merges"), cut

    def _all_bytes(self, added: dict[int, bytes]) -> dict[int, bytes]:
        decoder = self.tokenizer.decoder
        decoders = {} if decoder is None else json.loads(decoder.__getstate__())
        steps = [step.get("type") for step in decoders.get("decoders", [decoders])]
        if "ByteLevel" in steps:
            byte_of = {character: byte for byte, character in gpt2_characters().items()}
            spell = lambda token: bytes(byte_of[c] for c in token)  # noqa: E731
        elif "ByteFallback" in steps:
            spell = _sentencepiece
        else:
            raise ValueError(
                f"its decoder {steps} is not known: byte-level BPE and SentencePiece's with bytes are"
            )
        vocab = self.tokenizer.get_vocab(with_added_tokens=False)
        try:
            return {i: spell(token) for token, i in vocab.items() if i not in added} | added
        except KeyError as error:
            raise ValueError(f"a token has the character {error}, which stands for no byte") from None


@contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """Make a ValueError of whatever the package raises: nothing specific, and panics, which are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:200]}") from None


def _sentencepiece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode("utf-8")


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` in a folder says; nothing if there is none.

    Raises:
        ValueError: if it is no JSON object.
    """
    path = folder / "tokenizer_config.json"
    return read_json(path, LARGEST) if path.is_file() else {}


def _name(token: Any) -> str | None:
    """A token's name, as it stands in such a file: a text, or an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


class TiktokenTokenizer(_ByBytes):
    """A `tiktoken.Encoding`, OpenAI's: `TiktokenTokenizer(tiktoken.get_encoding("cl100k_base"))`."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.specials = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TiktokenTokenizer) and (
            self.encoding.__getstate__()
            == other.encoding.__getstate__()  # all of it, or its name in the registry
        )

    __hash__ = object.__hash__

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.encoding.n_vocab

    @property
    def eos_id(self) -> int | None:
        """The id of the token that ends a text."""
        return self.specials.get("<|endoftext|>", self.specials.get("<|eos|>"))

    def encode(self, text: str, allow_specials: bool = False) -> list[int]:
        """The ids of `text`, as in `ByteTokenizer.encode`."""
        text.encode("utf-8")
        if allow_specials:
            return self.encoding.encode(text, allowed_special="all")
        return self.encoding.encode_ordinary(text)

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of a text's bytes, which must be UTF-8."""
        return self.encode(data.decode("utf-8"))

    def token_bytes(self, i: int) -> bytes:
        """The bytes that a token stands for."""
        try:
            return self.encoding.decode_single_token_bytes(i)
        except (KeyError, OverflowError):
            raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}") from None


def as_huggingface(tokenizer: Any) -> HuggingFaceTokenizer:
    """Any of our tokenizers in Hugging Face's words.

    Raises:
        ValueError: if it cannot be said in them.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer
    if isinstance(tokenizer, ByteTokenizer):  # BPE without merges
        tokenizer = BPETokenizer({bytes([b]): b for b in range(256)}, list(tokenizer.specials))
    if not isinstance(tokenizer, BPETokenizer):
        raise ValueError(f"a {type(tokenizer).__name__} has no form in Hugging Face's tokenizers")
    theirs = tokenizer.to_huggingface()
    if tokenizer.pattern == GPT2_PATTERN:  # they have a name for it, and llama.cpp, too
        from tokenizers import pre_tokenizers

        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    eos = next((name for name, i in tokenizer.specials.items() if i == tokenizer.eos_id), None)
    found = HuggingFaceTokenizer(theirs, eos)
    if found.specials != tokenizer.specials:  # theirs gives a name that is a token already that token's id
        raise ValueError(
            "a special token has the name of an ordinary one, which Hugging Face's tokenizers cannot say"
        )
    return found
