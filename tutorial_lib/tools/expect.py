"""What comes back from a file, held against what it must look like: the one reader of all that a run goes on from.

    expect(state, {"seen": int, "left": [int], "moment": torch.zeros(3), "average": Maybe(dict)}, "batches")

A checkpoint's digest says that nothing was damaged on the way. It does not say that its writer meant well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Maybe", "expect"]

NAMES = {
    int: "a whole number from 0 on",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a table",
    list: "a list",
    Tensor: "a tensor",
    None: "nothing",
}


@dataclass(frozen=True)
class Maybe:
    """What may be None, or not there at all."""

    wanted: Any


def expect(found: Any, wanted: Any, where: str) -> None:
    """Look through a tree, and say what is wrong in it.

    Args:
        wanted: `int` (from 0 to 2^63), `float` (any number but NaN), `bool`, `str`, `dict`, `list` or `Tensor` for any of
            its sort, and so is any such value; None; a tensor for one of its shape that holds numbers of its sort; a
            dict for these keys and no others; a list of one thing for any number of these; `Maybe`.
        where: What the tree is called.

    Raises:
        ValueError: that names the first place where it is otherwise, what is there, and what must be.
    """
    if isinstance(wanted, Maybe):
        if found is not None:
            expect(found, wanted.wanted, where)
    elif isinstance(wanted, dict):
        expect(found, dict, where)
        for key in wanted:
            if key not in found and not isinstance(wanted[key], Maybe):
                raise ValueError(f"{where} has no {key}")
        for key in found:
            if key not in wanted:
                raise ValueError(f"{where} has {key!r:.60}, which is no part of it")
            expect(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        expect(found, list, where)
        for i, item in enumerate(found):
            expect(item, wanted[0], f"{where}[{i}]")
    elif isinstance(wanted, (bool, int, float, str)):
        expect(found, type(wanted), where)
    elif not _fits(found, wanted):
        must = _described(wanted) if isinstance(wanted, Tensor) else NAMES[wanted]
        raise ValueError(f"{where} is {_described(found)}, but must be {must}")


def _fits(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        return (
            isinstance(found, Tensor)
            and found.shape == wanted.shape
            and (found.dtype == wanted.dtype or found.is_floating_point() and wanted.is_floating_point())
        )
    if wanted is None:
        return found is None
    if wanted is int:
        return isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**63
    if wanted is float:  # NaN is not equal to itself; what no float can hold is no number either
        return isinstance(found, float) and found == found or _fits(found, int)
    return isinstance(found, wanted)


def _described(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return f"a tensor {tuple(thing.shape)} of {str(thing.dtype).removeprefix('torch.')}"
    if isinstance(thing, (dict, list)):
        return NAMES[type(thing)]
    if isinstance(thing, int) and abs(thing) >= 2**63:  # Python refuses to write down what is too long
        return "a number beyond 2^63"
    return f"{thing!r:.60}"
