# Exported from chapters/part_0_foundations/0_3_reproducibility.ipynb. Edit the lesson, then run: make export
"""Splits that stay put and do not leak, and a measure of what leaks all the same."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["key_fraction", "split_by_hash", "letters_only", "overlap"]


def key_fraction(key: str | bytes, salt: str = "") -> float:
    """Where a key falls in [0, 1): settled by the key and the salt alone, evenly spread over many keys."""
    # The salt's own digest has a fixed length, so "a" + "bc" and "ab" + "c" stay two different things.
    raw = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else bytes(key)
    digest = hashlib.sha256(hashlib.sha256(salt.encode()).digest() + raw).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits fit into a float exactly


def split_by_hash(
    keys: Sequence[str | bytes],
    val_fraction: float = 0.1,
    salt: str = "",
    group: Callable[[str | bytes], str | bytes] | None = None,
) -> tuple[list[int], list[int]]:
    """Which of the keys are for training and which are held out, by a hash of each.

    A key's side depends on nothing but the key: it does not move when others come, go, or change places. A
    larger fraction moves keys from training to validation only. The fraction holds on average; ten keys may
    well come out as 10 and 0.

    Args:
        keys: Names of documents, or the documents themselves.
        val_fraction: The share to hold out, 0 to 1.
        salt: Another salt, another split. For a third part, split the training keys again with another salt.
        group: Key to group; what is in one group stays on one side: `lambda name: name.split("/")[0]` keeps
            the chapters of a book together, `letters_only` keeps copies of a text together.

    Returns:
        The positions of the training keys and those of the validation keys, both in order.

    Raises:
        ValueError: if the fraction is outside 0 to 1.
    """
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"val_fraction is {val_fraction}, but must be between 0 and 1")
    sides: tuple[list[int], list[int]] = ([], [])
    for i, key in enumerate(keys):
        held_out = key_fraction(key if group is None else group(key), salt) < val_fraction
        sides[held_out].append(i)
    return sides


def letters_only(text: str | bytes) -> str:
    """A text without case, spaces and marks: what copies have in common after being reformatted."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return "".join(char for char in text.casefold() if char.isalnum())


def overlap(train: bytes | Sequence[bytes], val: bytes | Sequence[bytes], n: int = 32) -> float:
    """The share of all runs of `n` bytes in `val` that occur in `train`, too; 0.0 if `val` has no such run.

    Args:
        train: A text, or pieces of text; no run reaches across the end of a piece.
        val: Likewise.
        n: 32 bytes are about six words of English. Short runs occur everywhere, so they say little.

    Raises:
        ValueError: if `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"n is {n}, but a run has at least one byte")
    seen = np.unique(_run_hashes(train, n))
    asked = _run_hashes(val, n)
    if not len(asked) or not len(seen):
        return 0.0
    nearest = seen[np.searchsorted(seen, asked).clip(max=len(seen) - 1)]
    return float((nearest == asked).mean())


_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


def _run_hashes(text: bytes | Sequence[bytes], n: int) -> np.ndarray:
    """A 64-bit hash of each run of `n` bytes. uint64 wraps around, which is arithmetic modulo 2**64."""
    pieces = [text] if isinstance(text, (bytes, bytearray)) else text
    joined = np.frombuffer(b"".join(pieces), np.uint8).astype(np.uint64)  # (N,)
    if len(joined) < n:
        return np.zeros(0, np.uint64)
    powers, inverses = (_powers(base, len(joined)) for base in (_BASE, pow(_BASE, -1, 2**64)))
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum((joined + np.uint64(1)) * powers)])  # (N+1,)
    hashes = (prefix[n:] - prefix[:-n]) * inverses[: len(joined) - n + 1]  # (N-n+1,)
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = np.arange(len(hashes))
    whole = starts + n <= ends[np.searchsorted(ends, starts, side="right")]  # the run ends within its piece
    return hashes[whole]


def _powers(base: int, count: int) -> np.ndarray:
    """1, base, base², … modulo 2**64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
