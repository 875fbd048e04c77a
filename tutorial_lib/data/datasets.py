# Exported from chapters/part_2_training_a_tiny_llm/2_2_batching_and_shift.ipynb.
# Edit the lesson, then run: make export
"""From one long line of tokens to batches of inputs and labels. The shift by one happens here, only here."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tutorial_lib.files import beside

__all__ = ["write_tokens", "open_tokens", "TokenWindows", "random_batches"]


def write_tokens(path: str | Path, ids: Sequence[int] | np.ndarray, vocab_size: int) -> Path:
    """Write token ids as a `.npy` file in the smallest unsigned type that holds `vocab_size`.

    The file appears whole or not at all (written beside, then renamed).

    Args:
        ids: One line of integers; `bytes` are taken as the ids 0 to 255.

    Raises:
        ValueError: if an id is outside the vocabulary, or `ids` is not one line of integers.
    """
    path = Path(path)
    # numpy would take bytes for one string.
    ids = np.frombuffer(ids, np.uint8) if isinstance(ids, (bytes, bytearray)) else np.asarray(ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"token ids are one line of integers, not {ids.dtype} of shape {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids.max() if ids.max() >= vocab_size else ids.min()
        raise ValueError(f"token id {bad} is outside the vocabulary of {vocab_size}: wrong tokenizer?")
    with beside(path) as place, open(place, "wb") as file:
        np.save(file, ids.astype(np.min_scalar_type(vocab_size - 1), copy=False), allow_pickle=False)
    return path


def open_tokens(path: str | Path) -> np.ndarray:
    """Map a token file into memory: the system reads the pages that are touched, when they are touched.

    Raises:
        ValueError: if the file holds anything but one line of integers.
    """
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # NumPy reads a header as Python, and hands on what Python says of it
        raise ValueError(f"{path} is no .npy file of token ids: {error or type(error).__name__}") from None
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}, not a line of token ids")
    return tokens


class TokenWindows(torch.utils.data.Dataset):
    """Windows of `seq_len` tokens, each with its labels: `labels[t]` is the token that follows `inputs[t]`.

    Labels are already shifted. Nothing after this shifts again.

    Args:
        tokens: A one-dimensional array of ids; a memory map is read window by window.
        seq_len: T, how many tokens the model sees at once.
        stride: Distance between the starts of two windows. `seq_len` (the default) makes every token a
            label once, but for the very first and for a rest at the end that fills no window; 1 gives
            every window there is.

    Raises:
        ValueError: if the tokens do not fill one window, or a length is not positive.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, stride: int | None = None) -> None:
        stride = seq_len if stride is None else stride
        if seq_len < 1 or stride < 1:
            raise ValueError(f"seq_len {seq_len} and stride {stride} must be at least 1")
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"{len(tokens)} tokens are too few for one window: seq_len {seq_len} needs {seq_len + 1}"
            )
        self.tokens, self.seq_len, self.stride = tokens, seq_len, stride

    def __len__(self) -> int:
        # A window reads T + 1 tokens: T inputs and the label of the last one.
        return (len(self.tokens) - self.seq_len - 1) // self.stride + 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Window `i`: inputs `(T,)` and labels `(T,)`, both int64."""
        window = torch.from_numpy(self._cut(i).astype(np.int64))  # (T+1,)
        # The clone gives the labels memory of their own: -100 written into them must not reach the inputs.
        return window[:-1], window[1:].clone()

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Several windows: inputs `(B, T)` and labels `(B, T)`, converted all at once."""
        windows = torch.from_numpy(
            np.stack([self._cut(int(i)) for i in indices]).astype(np.int64)
        )  # (B, T+1)
        return windows[:, :-1].clone(), windows[:, 1:].clone()

    def _cut(self, i: int) -> np.ndarray:
        """The T + 1 tokens of window `i`, in the array's own type: slice first, so that only these leave the disk."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        start = (i % len(self)) * self.stride
        return self.tokens[start : start + self.seq_len + 1]


def random_batches(
    tokens: np.ndarray, batch_size: int, seq_len: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches `(B, T)` of inputs and labels from random places, for ever.

    The generator makes the order repeatable; the global one is left alone when it is given.
    """
    windows = TokenWindows(tokens, seq_len, stride=1)
    while True:
        yield windows.batch(torch.randint(len(windows), (batch_size,), generator=generator))
