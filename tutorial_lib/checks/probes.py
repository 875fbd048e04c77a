"""The shared library of judges and properties. The tests of `tutorial_lib` use it too.

Judges compare a result with the reference's (`equals`, `same_shape`) or ask whether a property holds
(`holds`). The functions below them compute properties of any model or layer: does it see the future, does a
cache change the answer, does only the distance matter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.checks.spec import Failure, Judge, Probe, same_value

__all__ = [
    "brief",
    "causality",
    "differs_with_cache",
    "equals",
    "fill_by_name",
    "holds",
    "leaks",
    "outcome",
    "randn",
    "same_parameters",
    "same_shape",
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that depend on nothing but the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill_by_name(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Give every parameter values that depend on its name and shape alone, norms and biases included.

    Two modules with the same parameter names then hold the same weights, in whatever order they were built.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(values + 1 if "norm" in name and name.endswith("weight") else values)
    return module


def outcome(call: Callable[[], Any]) -> Any:
    """What `call` returns, or, if it raises an ordinary error, that error's type as text: `"ValueError"`.

    For probes that ask for an error. NotImplementedError goes through: it means "not started".
    """
    try:
        return call()
    except NotImplementedError:
        raise
    except Exception as error:
        return type(error).__name__


def brief(value: Any, digits: int = 2) -> str:
    """A short text of a value: small tensors whole, large ones by shape and first numbers."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.numel() > 24:
            start = ", ".join(_number(x, digits) for x in value.flatten()[:6].tolist())
            return f"[{start}, …] of shape {tuple(value.shape)}"
        return _nested(value.tolist(), digits)
    if isinstance(value, float):
        return _number(value, digits + 2)
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(brief(x, digits) for x in value[:6]) + (", …)" if len(value) > 6 else ")")
    text = repr(value)
    return text if len(text) <= 90 else text[:87] + "…"


def _number(x: Any, digits: int) -> str:
    return f"{x:.{digits}f}" if isinstance(x, float) else str(x)


def _nested(x: Any, digits: int) -> str:
    return "[" + ", ".join(_nested(y, digits) for y in x) + "]" if isinstance(x, list) else _number(x, digits)


def _kind(value: Any) -> str:
    return (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )


def same_shape(yours: Any, expected: Any) -> Failure | None:
    """A judge: shape and dtype are the reference's (item by item in tuples)."""
    if isinstance(expected, (tuple, list)):
        if not isinstance(yours, (tuple, list)) or len(yours) != len(expected):
            return Failure(f"it returned {_kind(yours)}, expected {len(expected)} values")
        return next((f for y, e in zip(yours, expected, strict=True) if (f := same_shape(y, e))), None)
    if isinstance(expected, Tensor):
        if not isinstance(yours, Tensor):
            return Failure(f"it returned {_kind(yours)}, expected {_kind(expected)}")
        if yours.shape != expected.shape:
            return Failure(f"the shape is {tuple(yours.shape)}, expected {tuple(expected.shape)}")
        if yours.dtype != expected.dtype:
            return Failure(f"the dtype is {yours.dtype}, expected {expected.dtype}")
        return None
    if type(yours) is not type(expected) and not (
        isinstance(yours, (int, float)) and isinstance(expected, float)
    ):
        return Failure(f"it returned {_kind(yours)}, expected a {type(expected).__name__}")
    return None


def equals(atol: float = 1e-5, rtol: float = 1e-4, digits: int = 2) -> Judge:
    """A judge: the value is the reference's, within a tolerance; shows both where they first differ."""

    def judge(yours: Any, expected: Any) -> Failure | None:
        if wrong := same_shape(yours, expected) if _tensors(expected) else None:
            return wrong
        if same_value(yours, expected, atol, rtol):
            return None
        if isinstance(expected, (tuple, list)) and isinstance(yours, (tuple, list)):
            if len(yours) == len(expected):
                for i, (y, e) in enumerate(zip(yours, expected, strict=True)):
                    if not same_value(y, e, atol, rtol):
                        if isinstance(e, Tensor):
                            inner = judge(y, e)
                            assert inner is not None
                            return Failure(f"value {i + 1}: {inner.sentence}", inner.table)
                        return Failure(f"value {i + 1} differs", {"yours": brief(y), "expected": brief(e)})
        if isinstance(expected, Tensor) and isinstance(yours, Tensor):
            return _tensor_difference(yours.detach(), expected.detach(), atol, rtol, digits)
        return Failure("the value differs", {"yours": brief(yours), "expected": brief(expected)})

    return judge


def _tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value)
    )


def _tensor_difference(yours: Tensor, expected: Tensor, atol: float, rtol: float, digits: int) -> Failure:
    if yours.dtype.is_floating_point and yours.isnan().any() and not expected.isnan().any():
        return Failure(f"{int(yours.isnan().sum())} of {yours.numel()} numbers are NaN")
    off = ~torch.isclose(yours.double(), expected.double(), rtol, atol, equal_nan=True)
    where = tuple(off.nonzero()[0].tolist())
    sentence = f"{int(off.sum())} of {off.numel()} numbers differ"
    if expected.ndim == 0 or expected.numel() <= 24:
        return Failure(sentence, {"yours": brief(yours, digits), "expected": brief(expected, digits)})
    row = where[:-1]  # show the whole last dimension around the first difference
    at = ", ".join(map(str, row + (":",)))
    return Failure(
        f"{sentence}, the first at {list(where)}",
        {f"yours[{at}]": _row(yours[row], digits), f"expected[{at}]": _row(expected[row], digits)},
    )


def _row(row: Tensor, digits: int) -> str:
    if row.numel() <= 12:
        return brief(row, digits)
    return "[" + ", ".join(_number(x, digits) for x in row[:12].tolist()) + ", …]"


def holds(violated: Callable[[Any], str | None]) -> Judge:
    """A judge for a property: `violated(result)` returns None, or the sentence that says what is broken."""

    def judge(yours: Any, expected: Any) -> Failure | None:
        sentence = violated(yours)
        return Failure(sentence) if sentence else None

    return judge


def same_parameters(yours: Any, expected: Any) -> Failure | None:
    """A judge for `run=lambda cls: {name: tuple(p.shape) for name, p in cls(…).named_parameters()}`."""
    missing = [name for name in expected if name not in yours]
    extra = [name for name in yours if name not in expected]
    if missing or extra:
        parts = []
        if missing:
            parts.append("missing: " + ", ".join(missing))
        if extra:
            parts.append("not asked for: " + ", ".join(extra))
        return Failure("the parameters have other names than the exercise gives (" + "; ".join(parts) + ")")
    for name, shape in expected.items():
        if tuple(yours[name]) != tuple(shape):
            return Failure(f"parameter {name} has shape {tuple(yours[name])}, expected {tuple(shape)}")
    return None


def leaks(layer: Callable[[Tensor], Tensor], x: Tensor, atol: float = 1e-6) -> str | None:
    """Whether a causal layer sees the future: change one time step at a time, look at all before it.

    Args:
        layer: `(B, T, ...)` in, `(B, T, ...)` out.
        x: An input, of integers (token ids) or floats.

    Returns:
        None, or a sentence such as "output 4 changed when only input 15 changed: it sees the future".
    """
    with torch.no_grad():
        before = layer(x.clone())
        for t in range(x.shape[1] - 1, 0, -1):
            changed = x.clone()
            changed[:, t] = changed[:, t] + 1 if x.is_floating_point() else (x[:, t] + 1) % int(x.max() + 1)
            moved = (layer(changed) - before).abs().reshape(*x.shape[:2], -1).amax(dim=(0, 2))[:t] > atol
            if moved.any():
                first = int(moved.nonzero()[0])
                return f"output {first} changed when only input {t} changed: it sees the future"
    return None


def causality(build: Callable[[Any], Callable[[Tensor], Tensor]], x: Tensor) -> Probe:
    """The probe "no output sees the future" for the layer that `build` makes from the learner's object."""

    def run(learner: Any) -> tuple[Tensor, str | None]:
        layer = build(learner)
        with torch.no_grad():
            return layer(x.clone()), leaks(layer, x)

    return Probe("no output sees the future", run, holds(lambda result: result[1]))


def differs_with_cache(model: Any, ids: Tensor, sizes: Sequence[int], atol: float = 1e-5) -> str | None:
    """Whether a KV cache changes what a model says: read at once without one, and in pieces with one.

    Args:
        model: Called with `(ids, cache=…)`, gives logits `(B, T, V)`; its `new_cache(B, T)` gives a cache.
        ids: `(B, T)`.
        sizes: Lengths of the pieces; their sum is T.

    Returns:
        None, or a sentence such as "read in pieces of 6, 6, the output at token 6 is off by 0.42".
    """
    with torch.no_grad():
        expected, cache = model(ids), model.new_cache(*ids.shape)
        pieces = [model(piece, cache=cache) for piece in ids.split(list(sizes), dim=1)]
    off = (torch.cat(pieces, dim=1) - expected).abs().amax(dim=(0, 2))
    if bool((off <= atol).all()):
        return None
    first = int((~(off <= atol)).nonzero()[0])
    shown = ", ".join(map(str, sizes[:6])) + (", …" if len(sizes) > 6 else "")
    return f"read in pieces of {shown}, the output at token {first} is off by {off[first]:.2g}"
