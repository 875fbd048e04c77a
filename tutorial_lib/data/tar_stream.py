"""Batches of tokens from tar files of text (`data.tar_shards` writes them), streamed from disk or over http.

    batches = stream_batches("tars/*.tar", tokenizer, batch_size=8, seq_len=256, seed=1)
    inputs, labels = next(batches)
    state = batches.state_dict()

For corpora that lie elsewhere. What is on this machine and tokenized is served better by `data.shards`: any window at
once, a full shuffle, a resume that skips nothing. A stream shuffles the order of its files, and a buffer of documents.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tutorial_lib.data.tar_shards import find_shards, read_texts
from tutorial_lib.tools.expect import Maybe, expect

__all__ = ["TokenStream", "shuffle_buffer", "stream_batches"]

T = TypeVar("T")


def shuffle_buffer(items: Iterable[T], size: int, rng: random.Random) -> Iterator[T]:
    """Hold `size` items; hand out one of them at random and put the next in its place. Size 1 keeps the order.

    An item comes at most `size - 1` places early, so what lay together stays together, more or less: a corpus sorted
    by source is still sorted by source. Shuffle documents before they are written.
    """
    held: list[T] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        k = rng.randrange(size)
        held[k], item = item, held[k]
        yield item
    rng.shuffle(held)
    yield from held


class TokenStream:
    """Endless batches `(inputs, labels)`, int64 `(B, T)`, of documents packed head to tail with `<|eos|>` after each.

    In each epoch the tar files are shuffled and dealt out to the ranks, so each document comes once an epoch on one
    rank. Ranks hold unequal amounts of text, so one may begin its next epoch while another is still in the last.

    Iterate in the main process: each worker of a DataLoader would hold a copy of the stream and give everything again.
    See `stream_batches` for the arguments.
    """

    def __init__(
        self, shards: list[str], tokenizer: Any, batch_size: int, seq_len: int, **settings: int | None
    ) -> None:
        self.shards, self.tokenizer = shards, tokenizer
        self.settings = {"batch_size": batch_size, "seq_len": seq_len, "shards": len(shards), **settings}
        self.epoch = 0
        """The epoch that is being read."""
        self._documents = 0  # taken from this epoch's stream
        self._left: list[int] = []  # their tokens that are in no batch yet
        self._source: Iterator[str] | None = None

    def _epoch_documents(self) -> Iterator[str]:
        """This epoch's documents for this rank, in their order."""
        s = self.settings
        order = list(self.shards)
        random.Random(f"{s['seed']} {self.epoch}").shuffle(order)  # the same on every rank
        mine = order[s["rank"] :: s["world_size"]]

        texts = itertools.chain.from_iterable(map(read_texts, mine))
        return shuffle_buffer(texts, s["buffer"], random.Random(f"{s['seed']} {self.epoch} {s['rank']}"))

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        B, T = self.settings["batch_size"], self.settings["seq_len"]
        while len(self._left) < B * T + 1:
            if self.epoch == self.settings["epochs"]:
                raise StopIteration
            if self._source is None:
                # After a resume, documents are read and passed over, but not tokenized again.
                self._source = itertools.islice(self._epoch_documents(), self._documents, None)
            text = next(self._source, None)
            if text is not None:
                self._left += [*self.tokenizer.encode(text), self.tokenizer.eos_id]
                self._documents += 1
            elif self._documents == 0:
                raise ValueError(f"no .txt documents in {', '.join(self.shards[:3])}")
            else:
                self.epoch, self._documents, self._source = self.epoch + 1, 0, None
        line = torch.tensor(self._left[: B * T + 1])  # (B·T+1,): a last token that is label only
        self._left = self._left[B * T :]  # and is the next batch's first input
        return line[:-1].view(B, T), line[1:].clone().view(B, T)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain numbers: the next batch of a stream that loads it is the next of this."""
        place = {"epoch": self.epoch, "documents": self._documents, "left": list(self._left)}
        return {**place, "settings": dict(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken. This epoch's earlier documents are read again, and skipped.

        Raises:
            ValueError: if the stream was made with other settings; `epochs` alone may differ.
        """
        if not isinstance(state.get("settings"), dict):
            raise ValueError(
                "the run has read another kind of data so far, and cannot go on with a stream of tar files"
            )
        settings = dict.fromkeys(self.settings, Maybe(int))
        expect(state, {"epoch": int, "documents": int, "left": [int], "settings": settings}, "batches")
        for name, value in self.settings.items():
            if name != "epochs" and (was := state["settings"].get(name)) != value:
                raise ValueError(f"the state is of a stream with {name} {was}, and this one has {value}")
        if state["left"] and max(state["left"]) >= self.tokenizer.vocab_size:
            raise ValueError(f"batches.left has a token {max(state['left'])}, which the tokenizer has not")
        self.epoch, self._documents = state["epoch"], state["documents"]
        self._left, self._source = list(state["left"]), None


def stream_batches(
    shards: str | Path | Sequence[str | Path],
    tokenizer: Any,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    buffer: int = 1000,
    epochs: int | None = None,
) -> TokenStream:
    """Batches from tar files: an iterator with `state_dict` and `load_state_dict`.

    Args:
        shards: Paths, patterns or http addresses, see `find_shards`.
        tokenizer: With `encode(text)` and an `eos_id`.
        batch_size: B, of this rank.
        seq_len: T.
        buffer: Documents held for shuffling; 1 keeps the order within a tar file.
        epochs: Stop after so many; what then fills no batch is left out. None: never stop.

    Raises:
        ValueError: if a size is impossible, the tokenizer has no `<|eos|>`, or there are fewer tar files than ranks.
        FileNotFoundError: if no tar file matches.
        ImportError: if webdataset is missing; the message names the extra.
    """
    found = find_shards(shards)
    settings = {"seed": seed, "rank": rank, "world_size": world_size, "buffer": buffer, "epochs": epochs}
    if min(batch_size, seq_len, buffer) < 1 or not 0 <= rank < world_size:
        raise ValueError(f"impossible: batch_size {batch_size}, seq_len {seq_len}, {settings}")
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no <|eos|> to put between documents")
    if len(found) < world_size:
        raise ValueError(f"{len(found)} tar files are too few to be dealt to {world_size} ranks")
    return TokenStream(found, tokenizer, batch_size, seq_len, **settings)
