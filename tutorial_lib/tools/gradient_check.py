# Exported from chapters/part_0_foundations/0_4_debugging_tactics.ipynb.
# Edit the lesson, then run: make export
"""Is this gradient right? Compare autograd with measured slopes, and name the entry that is furthest off."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["GradientEntry", "GradientReport", "gradient_check"]


@dataclass(frozen=True)
class GradientEntry:
    """One entry of one tensor: its slope by autograd, and by differences."""

    tensor: str
    index: tuple[int, ...]
    autograd: float
    numeric: float
    connected: bool  # did autograd find a path to this tensor at all?
    excess: float  # the disagreement, in multiples of what the tolerance allows

    def __str__(self) -> str:
        place = f"{self.tensor}[{', '.join(map(str, self.index))}]" if self.index else self.tensor
        path = "" if self.connected else " (there is no path to it: detached?)"
        return f"{place}: autograd says {self.autograd:.6g}{path}, differences say {self.numeric:.6g}"


@dataclass(frozen=True)
class GradientReport:
    """What `gradient_check` found. Printed, it is one sentence."""

    entries: tuple[GradientEntry, ...]  # the worst of each tensor
    checked: int  # how many were compared, of all tensors together

    @property
    def worst(self) -> GradientEntry:
        return max(self.entries, key=lambda entry: entry.excess)

    @property
    def wrong(self) -> list[str]:
        """The tensors whose gradient is wrong."""
        return [entry.tensor for entry in self.entries if entry.excess > 1]

    @property
    def ok(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        verdict = "right" if self.ok else f"wrong in {len(self.wrong)} of {len(self.entries)} tensors"
        return f"the gradient is {verdict} ({self.checked} entries checked); the worst is {self.worst}"


def gradient_check(
    fn: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    h: float = 1e-6,
    tol: float = 1e-4,
    samples: int = 100,
) -> GradientReport:
    """Compare autograd with central differences, on copies in float64: float32 rounds more than most bugs weigh.

    Args:
        fn: A function, or a module, whose parameters are checked as well. What it returns (a tensor, or a tuple
            or dict of them) is summed with fixed random weights.
        inputs: Its arguments. Float tensors are checked, anything else is handed on.
        h: The step to either side; about 1e-2 for a function that rounds to float32 *inside*.
        tol: The two may differ by tol · (0.01 + the larger of them).
        samples: How many entries of each tensor, at random, the one with the largest gradient among them.
    """
    args = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    args = [x.detach().to(torch.float64, copy=True).requires_grad_() if _is_float(x) else x for x in args]
    tensors = {f"input {i}": x for i, x in enumerate(args) if _is_float(x)}
    if isinstance(fn, nn.Module):
        fn = copy.deepcopy(fn).double()
        tensors.update((name, p) for name, p in fn.named_parameters() if p.requires_grad)
    tensors = {name: x for name, x in tensors.items() if x.numel()}
    if not tensors:
        raise ValueError("nothing to check: hand over a float tensor, or a module with parameters")

    def value() -> Tensor:
        return _as_scalar(fn(*args))

    total = value()
    if not total.isfinite():
        raise ValueError("the value is not finite, so it has no slope: first hunt the NaN")
    if value() != total:
        raise ValueError("a second call gives another value: is dropout on? Call .eval() first")
    grads: dict[str, Tensor | None] = {}
    if total.requires_grad:  # if not, autograd found no path to anything
        found = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
        grads = dict(zip(tensors, found, strict=True))
    worst, checked = [], 0
    with torch.no_grad():
        for name, x in tensors.items():
            grad, entries = grads.get(name), []
            for index in _places(x, grad, samples):
                numeric = _slope(value, x, index, h)
                autograd = 0.0 if grad is None else grad[index].item()
                excess = abs(autograd - numeric) / (tol * (0.01 + max(abs(autograd), abs(numeric))))
                excess = math.inf if math.isnan(excess) else excess  # a NaN agrees with nothing
                entries.append(GradientEntry(name, index, autograd, numeric, grad is not None, excess))
            worst.append(max(entries, key=lambda entry: entry.excess))
            checked += len(entries)
    return GradientReport(tuple(worst), checked)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _as_scalar(outputs: Any) -> Tensor:
    """What a function returned as one number, to which every entry adds something else."""
    floats = [y for y in tree_leaves(outputs) if _is_float(y)]
    if not floats or any(y.dtype != torch.float64 for y in floats):
        raise ValueError(
            "the value is not float64, and float32 rounds too much to measure a slope: hand over the module "
            "itself, not a lambda around it, and take .float() out"
        )
    y = torch.cat([y.flatten() for y in floats])
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype).to(y.device)
    return y.sum() if y.numel() == 1 else y @ weights  # a scalar keeps the gradient that you know


def _slope(value: Callable[[], Tensor], x: Tensor, index: tuple[int, ...], h: float) -> float:
    """The central difference (f(x + h) - f(x - h)) / 2h in one entry of x, which is put back afterwards."""
    here = x[index].item()
    x[index] = here + h
    above = value().item()
    x[index] = here - h
    below = value().item()
    x[index] = here
    return (above - below) / (2 * h)


def _places(x: Tensor, grad: Tensor | None, n: int) -> list[tuple[int, ...]]:
    """Where to look: n places at random, with the largest gradient among them."""
    flat = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))[:n].tolist()
    if grad is not None and (largest := int(grad.abs().argmax())) not in flat:  # a NaN counts as the largest
        flat[-1] = largest
    return [tuple(map(int, torch.unravel_index(torch.tensor(i), x.shape))) for i in flat]
