"""What an exercise is, to the checker: probes in order, and the wrong ideas that people have about it.

A probe feeds the learner's function (or class) to `run` and judges what comes back. The same `run` is fed the
reference, which gives the expected value, and every misconception, which is how a diagnosis is made: it is
claimed only when the learner's numbers equal a misconception's numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "Exercise",
    "Failure",
    "Judge",
    "Misconception",
    "Probe",
    "same_value",
]


@dataclass(frozen=True)
class Failure:
    """Why a probe failed: one sentence, and what to put side by side beneath it."""

    sentence: str
    table: Mapping[str, str] = field(default_factory=dict)


Judge = Callable[[Any, Any], Failure | None]
"""Called with what came back and what the reference gives; returns None when all is well."""


@dataclass(frozen=True)
class Probe:
    """One question to the learner's code.

    Args:
        name: What holds when it passes, in a few words: "norm preserved".
        run: Takes the learner's object, returns tensors, numbers, strings, or tuples, lists and dicts of
            them. It builds its inputs afresh at every call, since learners may write into them.
        judge: See `tutorial_lib.checks.probes` for ready ones.
        given: The input, to be shown when the probe fails; a tensor or a text.
    """

    name: str
    run: Callable[[Any], Any]
    judge: Judge
    given: Any = None


@dataclass(frozen=True)
class Misconception:
    """A wrong implementation that people really write, with one sentence that tells them what happened."""

    name: str
    wrong: Any
    sentence: str

    @classmethod
    def of(cls, wrong: Any) -> Misconception:
        """A function or class says both itself: `def mean_of_means` (or `class MeanOfMeans`), and its docstring.

        Raises:
            ValueError: if it has no docstring.
        """
        if isinstance(wrong, cls):
            return wrong
        name, sentence = wrong.__name__, " ".join((wrong.__doc__ or "").split())
        if not sentence:
            raise ValueError(f"the misconception {name} needs a docstring: the sentence that learners read")
        words = name if "_" in name else re.sub("(?<!^)(?=[A-Z])", " ", name).lower()
        return cls(words.replace("_", " "), wrong, sentence)


@dataclass(frozen=True)
class Exercise:
    """An exercise as the checker sees it. Its text, stars, minutes and hints live in the notebook."""

    id: str
    symbol: str
    """The function or class that the learner defines."""
    reference: Any
    probes: Sequence[Probe]
    misconceptions: Sequence[Misconception]
    """A function or class may stand for one: see `Misconception.of`."""
    look_again: str
    """A heading of the lesson, word for word."""
    equivalent_mutants: Mapping[str, str] = field(default_factory=dict)
    """Mutants of the solution that no probe can tell from it, each with the reason."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "misconceptions", tuple(map(Misconception.of, self.misconceptions)))

    @property
    def lesson(self) -> str:
        """`"1.4"` for exercise 1.4.a."""
        return self.id.rpartition(".")[0]

    @property
    def part(self) -> int:
        """1 for exercise 1.4.a."""
        return int(self.id.split(".")[0])


def same_value(a: Any, b: Any, atol: float = 1e-5, rtol: float = 1e-4) -> bool:
    """Whether two results are the same: tensors by shape and value, containers item by item."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or a.shape != b.shape:
            return False
        a, b = a.detach(), b.detach()
        if not (a.is_floating_point() or b.is_floating_point()):
            return bool((a == b).all())
        return torch.allclose(a.double(), b.double(), rtol, atol, equal_nan=True)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_value(a[key], b[key], atol, rtol) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_value(x, y, atol, rtol) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) or isinstance(b, float):
        try:
            return same_value(torch.tensor(float(a)).double(), torch.tensor(float(b)).double(), atol, rtol)
        except (TypeError, ValueError):
            return False
    try:
        return bool(a == b)
    except Exception:  # an object of the learner's whose == does not give a truth value
        return False
