"""What a model's bits per byte should be compared with: counting, and the compressors everybody has."""

from __future__ import annotations

import bz2
import gzip
import lzma

import numpy as np

__all__ = ["bigram", "compressors", "unigram"]


def unigram(train: np.ndarray, test: np.ndarray, vocab_size: int = 256) -> float:
    """Bits per token of `test` from the frequencies in `train` (plus one, so that none is 0)."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log2(counts / counts.sum())[test].mean())


def bigram(train: np.ndarray, test: np.ndarray, vocab_size: int = 256) -> float:
    """Bits per token of `test` from the frequencies of pairs in `train`, mixed with the unigram.

    A pair that never occurred falls back on how common its second token is (one imagined count, shared out
    by the unigram), which is fairer to bigrams than adding one to each of 65,536 pairs.
    """
    single = np.bincount(train, minlength=vocab_size) + 1.0
    single /= single.sum()
    pairs = np.zeros((vocab_size, vocab_size))
    np.add.at(pairs, (train[:-1], train[1:]), 1.0)
    pairs += single
    pairs /= pairs.sum(axis=1, keepdims=True)
    return float(-np.log2(pairs[test[:-1], test[1:]]).mean())


def compressors(train: bytes, test: bytes) -> dict[str, float]:
    """Bits per byte of `test` under gzip, xz and bzip2, and under xz when it has read `train` first.

    The last is the fair one to set beside a model that was trained on `train`: the size of both together
    less the size of `train` alone.
    """

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=6))

    sizes = {
        "gzip": len(gzip.compress(test, 9, mtime=0)),
        "xz": xz(test),
        "bzip2": len(bz2.compress(test)),
        "xz, having read the training text": xz(train + test) - xz(train),
    }
    return {name: 8 * size / len(test) for name, size in sizes.items()}
