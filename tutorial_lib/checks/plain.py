"""What learner code gives back, as plain data: numbers, texts, tensors, and tuples, lists and dicts of them.

An object of a learner's can say yes to every comparison, and a pickle of it can run code. So a result is taken
apart at once, where the learner's code runs (`plain`), and travels as JSON with the tensors beside it, in
safetensors (`pack`, `unpack`). The judges only ever see what came out of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch

__all__ = ["MOST_BYTES", "Foreign", "pack", "plain", "readable", "unpack"]

MOST_BYTES = 64 * 2**20
"""Of one tensor, and of all that comes back at once."""
MOST_ITEMS = 200_000
"""Numbers, texts and containers in one result."""
MOST_TEXT = 8 * 2**20
"""Of the JSON: read, it takes up to twenty times as much memory."""
DEEPEST = 30
"""Containers in containers."""
NUMBERS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
"""What a tensor may hold: with anything else, it is foreign to the judges."""


class Foreign:
    """Stands for what is none of the plain types. Its type's name is that of the learner's, and it equals nothing."""

    @classmethod
    def named(cls, name: str) -> Foreign:
        """One whose type has this name."""
        return type(readable(name)[:80] or "?", (cls,), {})()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def readable(text: str) -> str:
    """A text that a terminal only shows: without control characters and halves of characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def plain(value: Any) -> Any:
    """The same value in Python's and torch's own types; a copy, which no code of the learner's can reach.

    A subclass becomes what it is a subclass of; what is none of the plain types becomes `Foreign`.

    Raises:
        ValueError: if there are more than `MOST_ITEMS` items in it.
    """
    return _plain(value, 0, [0])


def _plain(value: Any, depth: int, count: list[int]) -> Any:
    count[0] += 1
    if count[0] > MOST_ITEMS:
        raise ValueError(f"it gave back more than {MOST_ITEMS:,} things")
    kind = type(value)  # isinstance would believe an object's own `__class__`
    if value is None or kind is bool:
        return value
    if issubclass(kind, torch.Tensor):
        return _plain_tensor(value)
    if issubclass(kind, np.generic) and not issubclass(type(number := value.item()), np.generic):
        return _plain(number, depth + 1, count)
    if issubclass(kind, int):
        whole = int.__int__(value)
        return whole if whole.bit_length() <= 4096 else Foreign.named("number of a thousand digits")
    if issubclass(kind, float):
        return float.__float__(value)
    if issubclass(kind, str):
        return str.__str__(value)
    if depth == DEEPEST:
        return Foreign.named(kind.__name__)
    if issubclass(kind, tuple):
        return tuple(_plain(x, depth + 1, count) for x in tuple.__iter__(value))
    if issubclass(kind, list):
        return [_plain(x, depth + 1, count) for x in list.__iter__(value)]
    if issubclass(kind, Mapping):
        return {_plain_key(key, depth, count): _plain(value[key], depth + 1, count) for key in value}
    return Foreign.named(kind.__name__)


def _plain_key(key: Any, depth: int, count: list[int]) -> Any:
    key = _plain(key, depth + 1, count)
    try:
        hash(key)
    except TypeError:  # a tuple with a list in it, that the learner's class had made a key of
        return Foreign.named(type(key).__name__)
    return key


def _plain_tensor(value: torch.Tensor) -> Any:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        tensor = torch.Tensor.as_subclass(torch.Tensor.detach(value), torch.Tensor)
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in NUMBERS:
            layout = str(tensor.layout).removeprefix("torch.")
            return Foreign.named(f"tensor of {tensor.dtype}, {layout}, on {tensor.device.type}")
        if tensor.numel() * tensor.element_size() > MOST_BYTES:
            return Foreign.named(f"tensor of shape {tuple(tensor.shape)}")
        return tensor.clone(memory_format=torch.contiguous_format)


# ── on the way ────────────────────────────────────────────────────────────────────────────────────────────


def pack(value: Any) -> bytes:
    """Plain data as bytes: the length of the JSON in eight bytes, the JSON, the tensors in safetensors.

    Raises:
        ValueError: if it is too much.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_written(value, tensors)).encode()
    if len(text) > MOST_TEXT or sum(t.numel() * t.element_size() for t in tensors.values()) > MOST_BYTES:
        raise ValueError(f"it gave back more than {MOST_BYTES // 2**20} MiB")
    return len(text).to_bytes(8, "little") + text + safetensors.torch.save(tensors)


def _written(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Foreign):
        return {"foreign": type(value).__name__}
    if isinstance(value, tuple):
        return {"tuple": [_written(x, tensors) for x in value]}
    if isinstance(value, list):
        return [_written(x, tensors) for x in value]
    if isinstance(value, dict):
        return {"dict": [[_written(k, tensors), _written(v, tensors)] for k, v in value.items()]}
    return value


def unpack(data: bytes) -> Any:
    """What `pack` was given. Whoever wrote the bytes: nothing in them is run.

    Raises:
        ValueError: if `pack` cannot have written them.
    """
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        if end > 8 + MOST_TEXT:
            raise ValueError
        tensors = safetensors.torch.load(data[end:])
        if any(tensor.dtype not in NUMBERS for tensor in tensors.values()):
            raise TypeError
        return plain(_read(json.loads(data[8:end]), tensors))
    except Exception:
        raise ValueError("these bytes are no answer of the checker's") from None


def _read(written: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(written, list):
        return [_read(x, tensors) for x in written]
    if not isinstance(written, dict):
        return written
    [(kind, content)] = written.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "foreign":
        return Foreign.named(content)
    if kind == "tuple":
        return tuple(_read(x, tensors) for x in content)
    if kind == "dict":
        return {_read(key, tensors): _read(value, tensors) for key, value in content}
    raise ValueError(kind)
