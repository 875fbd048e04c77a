"""Reading a GGUF file (llama.cpp's format, version 2 or 3) that nobody vouches for.

    magic "GGUF" · version · number of tensors · number of metadata
    metadata:  key · type · value           (a value may be an array)
    tensors:   name · dimensions · type · offset
    padding, then the tensors' bytes

Every length is compared with what is left of the file before anything is made of it, and no two tensors may share
bytes, so a file cannot ask for much more memory than it has bytes. Quantized blocks are decoded by the package `gguf` (extra `interop`).
"""

from __future__ import annotations

import math
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tutorial_lib.interop.weights import WeightsError, room

__all__ = ["GGUFError", "GGUFFile", "TensorInfo", "need_gguf"]

# Types of a metadata value: its number in the file, and how struct calls it.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""The types of tensors that are read."""

CHUNK = 1 << 18
"""So many numbers are decoded at once."""


class GGUFError(WeightsError):
    """A file that is no GGUF of a model that we know. The message is one sentence."""


def need_gguf() -> Any:
    """The package `gguf`, or a sentence that says how to get it."""
    try:
        import gguf
    except ImportError:
        raise GGUFError("GGUF files need the package gguf: pip install gguf") from None
    return gguf


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and in what form."""

    shape: tuple[int, ...]
    """As torch has it: rows first. (The file has the innermost dimension first.)"""
    type: str
    """`F32`, `F16`, `Q8_0`, `Q4_1`, …"""
    start: int
    """Bytes from the beginning of the file."""
    nbytes: int


class _Cursor:
    """Walks through the header; steps past the end of the file are errors."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.at = file, path, 0
        self.size = os.fstat(file.fileno()).st_size

    def bytes(self, n: int) -> bytes:
        if n > self.size - self.at:
            raise GGUFError(
                f"{self.path} is not a GGUF file, or was cut short: at byte {self.at:,} it speaks of {n:,} bytes, "
                f"but {self.size - self.at:,} are left"
            )
        self.at += n
        return self.file.read(n)

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.bytes(struct.calcsize("<" + kind)))[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise GGUFError(
                f"{self.path} is damaged: at byte {self.at:,} there is a value of unknown type {kind}"
            )
        kind, n = self.number("I"), self.number("Q")
        if kind in NUMBERS:  # all of them at once
            code = NUMBERS[kind]
            size = struct.calcsize("<" + code)
            # A list would take ten times as much.
            return array("B" if code == "?" else code, self.bytes(n * size))
        if kind != STRING:  # arrays of arrays: no model needs them, and they could be nested without end
            raise GGUFError(f"{self.path} has an array of unknown type {kind} at byte {self.at:,}")
        if n * 8 > self.size - self.at:  # a string has at least its length
            self.bytes(n * 8)
        return [self.string() for _ in range(n)]


class GGUFFile:
    """A GGUF file's metadata, and its tensors, which are read when asked for.

    Raises:
        GGUFError: if it is no such file, or anything in it points outside of it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.gguf = need_gguf()
        if not self.path.is_file():
            raise GGUFError(f"there is no file at {path}")
        with self.path.open("rb") as file:
            self._read_header(_Cursor(file, self.path))

    def _read_header(self, cursor: _Cursor) -> None:
        path, self.size = self.path, cursor.size
        if (magic := cursor.bytes(4)) != b"GGUF":
            raise GGUFError(f"{path} is not a GGUF file: it begins with {magic!r}, not with b'GGUF'")
        if (version := cursor.number("I")) not in (2, 3):
            raise GGUFError(f"{path} is GGUF version {version}: versions 2 and 3 are read")
        n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_fields):
            key = cursor.string()
            if key in self.metadata:
                raise GGUFError(f"{path} is damaged: {key!r:.80} comes twice among its metadata")
            self.metadata[key] = cursor.value(cursor.number("I"))
        found = [self._info(cursor) for _ in range(n_tensors)]
        start = self._align(cursor.at)
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in found:
            self.tensors[name] = self._place(name, shape, kind, start + offset)
        if len(self.tensors) != n_tensors:
            raise GGUFError(f"{path} is damaged: a tensor's name comes twice")
        placed = sorted(self.tensors.values(), key=lambda info: info.start)
        if any(a.start + a.nbytes > b.start for a, b in zip(placed, placed[1:], strict=False)):
            raise GGUFError(f"{path} is damaged: two of its tensors share bytes")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata; an error if there is none, and no default."""
        if key not in self.metadata and default is None:
            raise GGUFError(f"{self.path} has no {key!r} among its metadata")
        return self.metadata.get(key, default)

    def _info(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = cursor.string(), cursor.number("I")
        if not 1 <= n_dims <= 4:
            raise GGUFError(
                f"{self.path}: the tensor {name!r:.80} has {n_dims} dimensions, but 1 to 4 are possible"
            )
        shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
        return name, shape, cursor.number("I"), cursor.number("Q")

    def _align(self, at: int) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise GGUFError(f"{self.path} is damaged: an alignment of {alignment!r:.40} is no power of two")
        return -(-at // alignment) * alignment

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
        types = {t.value: t.name for t in self.gguf.GGMLQuantizationType}
        known = types.get(kind, f"number {kind}")
        if known not in TYPES:
            raise GGUFError(
                f"{self.path}: the tensor {name!r:.80} is of type {known}, but only {', '.join(TYPES)} are read"
            )
        block, size = self.gguf.GGML_QUANT_SIZES[self.gguf.GGMLQuantizationType[known]]
        if 0 in shape or shape[-1] % block:
            raise GGUFError(
                f"{self.path}: the tensor {name!r:.80} of shape {shape} has no whole blocks of {known}"
            )
        nbytes = math.prod(shape) // block * size
        if start + nbytes > self.size:
            raise GGUFError(
                f"{self.path} was cut short: the tensor {name!r:.80} ends at byte {start + nbytes:,}, "
                f"the file at {self.size:,}"
            )
        return TensorInfo(shape, known, start, nbytes)

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor, decoded. Row by row, so that there is never a second copy of it."""
        import numpy as np
        from gguf.quants import dequantize

        info = self.tensors[name]
        kind = self.gguf.GGMLQuantizationType[info.type]
        rows = math.prod(info.shape[:-1])
        out = room((rows, info.shape[-1]), dtype)
        step = max(1, CHUNK // info.shape[-1])
        with self.path.open("rb") as file, np.errstate(all="ignore"):  # `fill` looks at what came out
            file.seek(info.start)
            for piece in out.split(step):
                raw = np.fromfile(file, np.uint8, info.nbytes // rows * len(piece)).reshape(len(piece), -1)
                if info.type in ("F32", "F16"):
                    raw = raw.view(np.float32 if info.type == "F32" else np.float16)
                piece.copy_(torch.from_numpy(dequantize(raw, kind).astype(np.float32, copy=False)))
        return out.view(info.shape)
