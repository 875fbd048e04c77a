# Exported from chapters/part_4_scaling_up/4_1_bpe.ipynb. Edit the lesson, then run: make export
"""Byte-level BPE in the formats of others: GPT-2's merges file, tiktoken, Hugging Face's `tokenizers`."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

__all__ = ["gpt2_characters", "read_gpt2_tokens", "make_tiktoken", "make_huggingface"]


def gpt2_characters() -> dict[int, str]:
    """The character that stands for each byte in GPT-2's files, in the order of GPT-2's ids.

    The 188 bytes that Latin-1 can show stand for themselves and come first; the others follow, as the
    characters from U+0100 on. A space is "Ġ".
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def read_gpt2_tokens(vocab_bpe: str) -> list[bytes]:
    """The tokens by id, from the text of GPT-2's file `vocab.bpe`: one merge a line, two tokens and a space.

    Raises:
        ValueError: at a line that is not a merge.
    """
    byte_of = {character: byte for byte, character in gpt2_characters().items()}
    tokens = [bytes([byte]) for byte in byte_of.values()]
    lines = vocab_bpe.removesuffix("\n").split("\n")
    for line in lines[1:] if lines[0].startswith("#version") else lines:
        try:
            left, right = line.split(" ")
            tokens.append(bytes(byte_of[character] for character in left + right))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{line[:40]!r} is not a line of GPT-2's merges file") from error
    return tokens


def make_tiktoken(
    ranks: Mapping[bytes, int], specials: Mapping[str, int], pattern: str
) -> "tiktoken.Encoding":
    """tiktoken's encoder with this vocabulary. See `data.bpe` for the arguments."""
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError("to_tiktoken needs the package tiktoken: pip install tiktoken") from error
    return tiktoken.Encoding(
        "llm-from-scratch",
        pat_str=pattern,
        mergeable_ranks=dict(ranks),
        special_tokens=dict(specials),
    )


def make_huggingface(
    ranks: Mapping[bytes, int],
    merges: Iterable[tuple[bytes, bytes]],
    specials: Iterable[str],
    pattern: str,
) -> "tokenizers.Tokenizer":
    """Hugging Face's tokenizer with this vocabulary; `merges` are the two halves of each merged token."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise ImportError("to_huggingface needs the package tokenizers: pip install tokenizers") from error
    characters = gpt2_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocab = {written(token): i for token, i in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(written(a), written(b)) for a, b in merges]))
    chunks = pre_tokenizers.Split(Regex(pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([chunks, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials])
    tokenizer.encode_special_tokens = True
    return tokenizer
