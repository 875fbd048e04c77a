# Exported from chapters/part_4_scaling_up/4_8_data_at_scale.ipynb. Edit the lesson, then run: make export
"""A corpus larger than memory: token shards on disk, written one at a time, read through a memory map.

    folder/tokens_00000.npy   folder/tokens_00001.npy   …   folder/index.json

Every shard is a `.npy` file of `data.datasets`, in the smallest unsigned type that holds the vocabulary. The index
is written last, so a folder without one was never finished.
"""

import bisect
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from tutorial_lib.data.datasets import open_tokens, write_tokens
from tutorial_lib.files import write_text

__all__ = ["ShardWriter", "ShardedTokens"]


_INDEX = "index.json"


class ShardWriter:
    """Cut a stream of token ids into shards of equal size (the last one is what is left), then write the index.

        with ShardWriter("corpus", vocab_size=257, tokenizer="byte") as writer:
            for document in documents:
                writer.add(tokenizer.encode(document) + [tokenizer.eos_id])

    It holds one shard in memory. If the block ends with an error, no index
    is written. What such an attempt left behind (files named as shards, no index) is cleared away by the next one.

    Args:
        folder: Made if missing.
        vocab_size: Settles the type of the ids, and every id is checked against it.
        tokenizer: Its name or the path of its file, kept in the index for whoever reads the shards.
        shard_tokens: Tokens in a shard. 2²⁵ ids of two bytes are 67 MB: few files, quickly copied.

    Raises:
        FileExistsError: if the folder already holds an index; nothing is touched.
        ValueError: if a size is not positive.
    """

    def __init__(
        self, folder: str | Path, vocab_size: int, tokenizer: str | None = None, shard_tokens: int = 1 << 25
    ) -> None:
        if vocab_size < 1 or shard_tokens < 1:
            raise ValueError(f"vocab_size {vocab_size} and shard_tokens {shard_tokens} must be at least 1")
        self.folder, self.vocab_size, self.tokenizer = Path(folder), vocab_size, tokenizer
        if (self.folder / _INDEX).exists():
            raise FileExistsError(
                f"{folder} already holds finished shards: delete it or choose another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob("tokens_" + "[0-9]" * 5 + ".npy"):
            left_over.unlink()
        self.total = 0
        self._shards: list[dict[str, str | int]] = []
        self._buffer = np.empty(shard_tokens, np.min_scalar_type(vocab_size - 1))
        self._filled, self._closed = 0, False

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append ids, of one document or of many. `bytes` are taken as the ids 0 to 255.

        Raises:
            ValueError: if an id is outside the vocabulary, `ids` is not one line of integers, or the writer is closed.
                Nothing of it is kept.
        """
        if self._closed:
            raise ValueError(f"{self.folder} is finished: its index is written")
        ids = np.frombuffer(ids, np.uint8) if isinstance(ids, (bytes, bytearray)) else np.asarray(ids)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"token ids are one line of integers, not {ids.dtype} of shape {ids.shape}")
        # Before they go into the buffer: there, 65536 would become 0 without a word.
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = ids.max() if ids.max() >= self.vocab_size else ids.min()
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {self.vocab_size}: wrong tokenizer?"
            )
        done = 0
        while done < len(ids):
            taken = min(len(ids) - done, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = ids[done : done + taken]
            done, self._filled = done + taken, self._filled + taken
            if self._filled == len(self._buffer):
                self._flush()
        self.total += len(ids)

    def close(self) -> None:
        """Write what is left, then the index. A second call does nothing.

        Raises:
            ValueError: if no token was added.
        """
        if self._closed:
            return
        self._flush()
        if not self._shards:
            raise ValueError(f"no tokens were added, so {self.folder} gets no index")
        index = {"format": 1, "vocab_size": self.vocab_size, "tokenizer": self.tokenizer}
        index |= {"dtype": str(self._buffer.dtype), "total": self.total, "shards": self._shards}
        self._closed = True
        write_text(self.folder / _INDEX, json.dumps(index, indent=1) + "\n")

    def _flush(self) -> None:
        if self._filled:
            path = self.folder / f"tokens_{len(self._shards):05d}.npy"
            write_tokens(path, self._buffer[: self._filled], self.vocab_size)
            self._shards.append({"file": path.name, "tokens": self._filled, "bytes": path.stat().st_size})
            self._filled = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


class ShardedTokens:
    """The shards of a folder as one long line of token ids, of which only the pages that are touched are read.

    It stands where an array of ids is measured and sliced: `TokenWindows(ShardedTokens("corpus"), 256)`.

    Args:
        folder: What `ShardWriter` has finished.

    Attributes:
        vocab_size, tokenizer: As the writer was given them.

    Raises:
        FileNotFoundError: if there is no index (the folder is unfinished, or no folder of shards), or a shard is missing.
        ValueError: if the index is damaged, a shard has another size than it had, or there are shards that the
            index does not know. Contents are not compared: that would mean reading all of them.
    """

    MAX_OPEN = 256
    """Maps kept open at once; each costs a file descriptor, of which a process often has 1024."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer: str | None = index["tokenizer"]
        self.dtype = np.dtype(index["dtype"])
        self._files: list[str] = [shard["file"] for shard in index["shards"]]
        lengths = [shard["tokens"] for shard in index["shards"]]
        self._starts = [0, *itertools.accumulate(lengths)]  # shard k holds tokens starts[k] to starts[k + 1]
        self._first, self._last = 0, self._starts[-1]
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, where: int | slice) -> np.ndarray:
        """One id, or a slice of them as an array, across the borders of shards. Steps are not supported.

        The array lies in the map (and is read-only) where one shard has it all, and is a copy otherwise: do not write
        into it, and do not slice more than fits into memory; `part` gives a piece without reading it.
        """
        if not isinstance(where, slice):
            if not -len(self) <= where < len(self):
                raise IndexError(f"token {where} of {len(self)}")
            where = int(where) % len(self)
            return self[where : where + 1][0]
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of shards has step 1, not {step}")
        start, stop = start + self._first, max(start, stop) + self._first
        pieces = []
        shard = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            offset, end = self._starts[shard], self._starts[shard + 1]
            pieces.append(self._shard(shard)[start - offset : min(stop, end) - offset])
            start, shard = end, shard + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.empty(0, self.dtype), *pieces])

    def part(self, start: int, stop: int) -> "ShardedTokens":
        """The tokens from `start` to `stop` as `ShardedTokens` of their own; nothing is read. For train and validation.

        Raises:
            ValueError: unless 0 ≤ start ≤ stop ≤ len(self).
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"{start} to {stop} does not lie within {len(self)} tokens")
        piece = object.__new__(ShardedTokens)
        piece.__dict__ |= self.__getstate__()
        piece._first, piece._last = self._first + start, self._first + stop
        return piece

    def _shard(self, k: int) -> np.ndarray:
        if k not in self._open:
            if len(self._open) >= self.MAX_OPEN:
                del self._open[next(iter(self._open))]  # the one opened first
            tokens = open_tokens(self.folder / self._files[k])
            if tokens.dtype != self.dtype or len(tokens) != self._starts[k + 1] - self._starts[k]:
                raise ValueError(f"{self.folder / self._files[k]} is not the shard that the index describes")
            self._open[k] = tokens
        return self._open[k]

    def __getstate__(self) -> dict[str, object]:
        # A pickled memory map is a copy of the file; a DataLoader's worker shall open its own.
        return {**self.__dict__, "_open": {}}


def _read_index(folder: Path) -> dict:
    """The index of a folder, after checking that the files beside it are those it speaks of."""
    if not (folder / _INDEX).is_file():
        begun = folder.is_dir() and any(folder.glob("tokens_*.npy"))
        why = "token shards but no index, so writing them was never finished" if begun else "no token shards"
        raise FileNotFoundError(f"{folder} holds {why}: run llm-scratch tokenize, or use ShardWriter")
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        np.dtype(index["dtype"]), index["tokenizer"], int(index["vocab_size"])
        shards = {str(s["file"]): (int(s["tokens"]), int(s["bytes"])) for s in index["shards"]}
        sound = index["format"] == 1 and sum(tokens for tokens, _ in shards.values()) == index["total"] > 0
        if not sound or any(Path(name).name != name for name in shards):
            raise ValueError("its numbers do not fit together")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / _INDEX} is no index of token shards ({error!r}): write them again"
        ) from error
    for name, (_, size) in shards.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing, but the index lists it: copy or write it again"
            )
        if (found := (folder / name).stat().st_size) != size:
            raise ValueError(
                f"{folder / name} has {found:,} bytes instead of {size:,}: copy or write it again"
            )
    if foreign := sorted(path.name for path in folder.glob("*.npy") if path.name not in shards):
        raise ValueError(
            f"{folder} holds {', '.join(foreign[:3])}, which the index does not list: move it away"
        )
    return index
