# Exported from chapters/part_0_foundations/0_4_debugging_tactics.ipynb.
# Edit the lesson, then run: make export
"""Questions to a model that trains badly, from cheap to dear; each tool answers one.

Their larger relatives: `gradient_check` (is this gradient right?) and `nan_hunter` (who made the first NaN?).
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = [
    "check_shape",
    "overfit_one_batch",
    "ActivationRow",
    "ActivationStats",
    "ParameterRow",
    "gradient_stats",
    "as_table",
]


def check_shape(x: Tensor, spec: str, /, **sizes: int) -> dict[str, int]:
    """The sizes of a tensor's dimensions by name, or an error that says which one is wrong.

        sizes = check_shape(ids, "b t")                       # {"b": 4, "t": 32}
        sizes = check_shape(logits, "b t v", v=256, **sizes)  # b and t must be what they were

    `spec` has a word for each dimension: the same name means the same size, a number means itself, `_` is any
    size, and `...` any number of dimensions. Known `sizes` that `spec` does not use are passed on.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, got a {type(x).__name__}: did a layer return two things?")
    words, shape, known = spec.split(), tuple(x.shape), dict(sizes)
    if words.count("...") == 1 and len(shape) >= len(words) - 1:
        at = words.index("...")
        words[at : at + 1] = ["_"] * (len(shape) - len(words) + 1)
    if len(words) != len(shape):
        raise ValueError(f'"{spec}" names {len(words)} of {len(shape)} dimensions: the shape is {shape}')
    for i, (word, size) in enumerate(zip(words, shape, strict=True)):
        expected = size if word == "_" else int(word) if word.isdigit() else known.setdefault(word, size)
        if size != expected:
            seen = words.index(word)
            why = f"but {expected} in dimension {seen}" if seen < i else f"expected {expected}"
            raise ValueError(f'dimension {i}, "{word}" of "{spec}", is {size}, {why}: the shape is {shape}')
    return known


def overfit_one_batch(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Sequence[Tensor],
    steps: int = 60,
    lr: float = 3e-3,
) -> list[float]:
    """The loss before each step of training a copy on one batch; a model that works learns it by heart.

    Dropout makes that impossible: build the model without it, or call `.eval()` first. For a batch of
    `inputs, *rest`, the loss is `loss_fn(model(inputs), *rest)`.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    inputs, *rest = batch
    losses = []
    for _ in range(steps):
        loss = loss_fn(model(inputs), *rest)
        if not loss.requires_grad:
            raise ValueError("no parameter reaches the loss: is something detached, frozen or under no_grad?")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@dataclass
class ActivationRow:
    """What one call of one module put out, in numbers."""

    module: str
    call: int  # 1 for the module's first
    mean: float
    std: float
    max_abs: float
    zeros: float  # fraction of entries that are exactly zero
    dead: float  # fraction of units (last dimension) that are zero for every token of the batch
    grad_std: float | None = None  # of the output's gradient, once a backward pass has come by


class ActivationStats:
    """Records the size of activations, and of their gradients, module by module.

        with ActivationStats(model) as stats:
            loss_fn(model(inputs), labels).backward()
        print(as_table(stats.rows))

    `filter(name, module)` says whom to record; without it, modules that have no parts.
    """

    def __init__(self, model: nn.Module, filter: Callable[[str, nn.Module], bool] | None = None) -> None:
        self.model = model
        self.filter = filter or (lambda name, module: not list(module.children()))
        self.rows: list[ActivationRow] = []
        self._calls: Counter[str] = Counter()
        self._handles: list[Any] = []

    def __enter__(self) -> "ActivationStats":
        for name, module in self.model.named_modules():
            if self.filter(name, module):
                self._handles.append(module.register_forward_hook(partial(self._record, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _record(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        y = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()), None)
        if y is None or not y.numel():
            return
        x = y.detach().float()
        zero = (x == 0).reshape(-1, x.shape[-1] if x.ndim else 1)  # (tokens, units)
        std, mean = torch.std_mean(x, correction=0)
        sizes = (mean, std, x.abs().max(), zero.float().mean(), zero.all(0).float().mean())
        self._calls[name] += 1
        row = ActivationRow(name, self._calls[name], *(size.item() for size in sizes))
        self.rows.append(row)
        if y.requires_grad:  # this hook belongs to the graph, and goes with it
            y.register_hook(lambda grad: setattr(row, "grad_std", grad.float().std(correction=0).item()))


@dataclass(frozen=True)
class ParameterRow:
    """One parameter and its gradient, in numbers."""

    parameter: str
    numbers: int
    weight_norm: float
    grad_norm: float | None  # None: detached, frozen, unused, or no backward pass yet
    update_ratio: float | None  # lr · |gradient| / |weight|: how much of itself a step of plain SGD moves


def gradient_stats(model: nn.Module, lr: float = 1.0) -> list[ParameterRow]:
    """For each parameter, the size of its gradient next to its own; call it after `backward`."""
    rows = []
    for name, parameter in model.named_parameters():
        weight, grad, ratio = parameter.detach().float().norm().item(), None, None
        if parameter.grad is not None:
            grad = parameter.grad.float().norm().item()
            ratio = lr * grad / weight if weight else math.inf if grad else 0.0  # a bias begins at zero
        rows.append(ParameterRow(name, parameter.numel(), weight, grad, ratio))
    return rows


def as_table(rows: list[Any]) -> str:
    """Rows of a dataclass as aligned text, one line each below their names."""
    if not rows:
        return "(no rows)"
    show = lambda x: "–" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)  # noqa: E731
    lines = [list(vars(rows[0])), *([show(x) for x in vars(row).values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
    )
