"""From the `data` table of a configuration to tokens and batches: text, token shards, or a stream of tar files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tutorial_lib.data.corpora import CORPORA, load_text
from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.data.holdout import split_train_val
from tutorial_lib.data.shards import ShardedTokens
from tutorial_lib.data.shuffle import ShuffledBatches
from tutorial_lib.interop.tokenizers import (
    NAMES,
    Tokenizer,
    encode_bytes,
    load_tokenizer,
    same_tokenizer,
    token_lengths,
)
from tutorial_lib.tools.expect import Maybe, expect

__all__ = ["Source", "open_source"]


@dataclass
class Source:
    """What a run trains on and is judged by."""

    tokenizer: Tokenizer
    tokenizer_name: str
    """As `load_tokenizer` wants it."""
    train: np.ndarray | ShardedTokens | None
    """None if it streams in."""
    val: np.ndarray | ShardedTokens
    tars: str | None = None
    """The pattern of the tar files, if it does."""

    def batches(
        self, batch_size: int, seq_len: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, ...]]:
        """Shuffled batches for one process, with a place that can be saved."""
        if self.train is not None:
            windows = TokenWindows(self.train, seq_len)
            return ShuffledBatches(windows, batch_size, seed, rank, world_size)
        from tutorial_lib.data.tar_stream import stream_batches

        assert self.tars is not None
        rows = batch_size // world_size
        return stream_batches(self.tars, self.tokenizer, rows, seq_len, seed, rank, world_size)

    def bytes_per_token(self, tokens: np.ndarray | ShardedTokens) -> float:
        """Bytes of text that a token of this part stands for, on average."""
        lengths, total, step = token_lengths(self.tokenizer), 0, 1 << 22
        for start in range(0, len(tokens), step):
            total += int(lengths[tokens[start : start + step]].sum())
        return total / len(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Which texts these are; of one that streams in, nobody knows before it is read."""
        parts = {"train": self.train, "val": self.val}
        return {name: fingerprint(tokens) for name, tokens in parts.items() if tokens is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Whether a run that goes on reads the texts that it has read so far; a ValueError if not."""
        expect(state, {"train": Maybe(str), "val": Maybe(str)}, "callbacks.text")
        for name, digest in self.state_dict().items():
            if state.get(name) not in (None, digest):
                what = {"train": "train on", "val": "validate on"}[name]
                raise ValueError(
                    f"the text to {what} is not the one that the run has read so far: has it changed?"
                )

    def part(self, split: str) -> np.ndarray | ShardedTokens:
        """`train` or `val`."""
        if split not in ("train", "val"):
            raise ValueError(f"there is no split {split!r}: choose train or val")
        tokens = self.train if split == "train" else self.val
        if tokens is None:
            raise ValueError("the training text streams in and has no end: evaluate on val")
        return tokens


def fingerprint(tokens: np.ndarray | ShardedTokens) -> str:
    """SHA-256 of the ids; of more than 2²⁶ only that of 1024 pieces, spread evenly: another text is seen at once."""
    length, piece = len(tokens), 1 << 16
    starts = (
        range(0, length, piece) if length <= 1 << 26 else np.linspace(0, length - piece, 1024).astype(int)
    )
    digest = hashlib.sha256(f"{length}".encode())
    for start in starts:
        digest.update(np.ascontiguousarray(tokens[int(start) : int(start) + piece], dtype="<u4"))
    return digest.hexdigest()


def open_source(
    dataset: str,
    tokenizer: str | None = None,
    val: str | None = None,
    val_fraction: float = 0.1,
    beside: Path | None = None,
) -> Source:
    """Find the text that a configuration names, and its tokenizer.

    Args:
        dataset: A corpus, a pattern of text files, a folder of token shards, or a pattern of `.tar` files.
        tokenizer: Its name; None for a folder's own, or bytes.
        val: Text to validate on; None cuts off the last `val_fraction`, or takes a folder's own.
        beside: Where a tokenizer's relative path is looked for first.

    Raises:
        ValueError: if the parts do not fit together, or there is too little.
        CorpusError: if a text cannot be had.
        OSError: if a file cannot be read.
    """
    folder = Path(dataset).expanduser()
    if dataset not in CORPORA and folder.is_dir():
        return _open_folder(folder, tokenizer, val, beside)
    name = tokenizer or "byte"
    known = load_tokenizer(name, beside)
    if _is_tar(dataset):
        if val is None:
            raise ValueError("tar files that stream in have no last tenth: name a text in data.val")
        return Source(known, name, None, _tokens(val, known, name, beside), dataset)
    text = np.frombuffer(load_text(dataset), np.uint8)
    if val is not None:
        return Source(known, name, encode_bytes(known, text.tobytes()), _tokens(val, known, name, beside))
    parts = split_train_val(text, val_fraction)  # cut before encoding: the same for all tokenizers
    return Source(known, name, *(encode_bytes(known, part.tobytes()) for part in parts))


def _is_tar(dataset: str) -> bool:
    return dataset.endswith((".tar", ".tar}"))


def _open_folder(folder: Path, tokenizer: str | None, val: str | None, beside: Path | None) -> Source:
    train = ShardedTokens(folder / "train" if (folder / "train" / "index.json").is_file() else folder)
    own = train.tokenizer or "byte"
    name = own if own in NAMES else str(folder / own)
    if tokenizer is not None and tokenizer not in (own, name):
        raise ValueError(
            f"data.tokenizer is {tokenizer!r}, but {folder} was written with {own!r}: leave it out"
        )
    known = load_tokenizer(name, beside)
    if val is None and not (folder / "val" / "index.json").is_file():
        raise ValueError(f"{folder} has no folder val: name a text to validate on in data.val")
    return Source(known, name, train, _tokens(val or str(folder / "val"), known, name, beside))


def _tokens(dataset: str, known: Tokenizer, name: str, beside: Path | None) -> np.ndarray | ShardedTokens:
    if _is_tar(dataset):
        raise ValueError(
            f"{dataset} are tar files, which only stream: validate on a text or a folder of shards"
        )
    if Path(dataset).is_dir():
        tokens = ShardedTokens(dataset)
        own = tokens.tokenizer or "byte"
        at = next((p for p in (Path(dataset) / own, Path(dataset).parent / own) if p.is_file()), None)
        theirs = load_tokenizer(str(at) if at else own, beside) if at or own in NAMES else None
        if tokens.vocab_size != known.vocab_size or (theirs and not same_tokenizer(theirs, known)):
            raise ValueError(f"{dataset} was written with another tokenizer than {name}")
        return tokens
    return encode_bytes(known, load_text(dataset))


def check_fits(tokens: Sequence[int] | np.ndarray | ShardedTokens, seq_len: int, what: str) -> None:
    """A ValueError if the tokens do not fill one window."""
    if len(tokens) < seq_len + 1:
        raise ValueError(
            f"the text to {what} has {len(tokens):,} tokens, but a sequence length of {seq_len} needs {seq_len + 1}"
        )
