# Exported from chapters/part_0_foundations/0_4_debugging_tactics.ipynb.
# Edit the lesson, then run: make export
"""Who made the first NaN? Follow the numbers through a model, forward and back, and name the module."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Range", "NonFinite", "NonFiniteError", "NaNHunter"]


@dataclass(frozen=True)
class Range:
    """Some floats at a glance: how many, how many of them bad, and from where to where they go."""

    numbers: int
    nan: int
    inf: int
    lowest: float
    highest: float

    @classmethod
    def of(cls, x: Any) -> "Range":
        """That of all float tensors in `x`, however deep in tuples, lists and dicts."""
        tensors = [t.detach() for t in tree_leaves(x) if isinstance(t, Tensor)]
        floats = [t for t in tensors if t.is_floating_point() and t.numel()]
        ends = [end.item() for t in floats for end in t.aminmax()]  # one pass, and NaN and inf show in it
        count = [] if all(map(math.isfinite, ends)) else floats
        return cls(
            numbers=sum(t.numel() for t in floats),
            nan=sum(int(t.isnan().sum()) for t in count),
            inf=sum(int(t.isinf().sum()) for t in count),
            lowest=min(ends, default=math.nan),
            highest=max(ends, default=math.nan),
        )

    def __str__(self) -> str:
        if not self.numbers:
            return "no floats"
        if self.nan or self.inf:
            return f"{self.numbers:,} numbers with {self.nan:,} NaN and {self.inf:,} infinite"
        return f"{self.numbers:,} finite numbers ({self.lowest:.3g} to {self.highest:.3g})"


@dataclass(frozen=True)
class NonFinite:
    """Where finite numbers became something else. Printed, it is one sentence."""

    when: str  # "forward" or "backward"
    module: str  # its name; "the loss" for a gradient that was bad before it reached the model
    kind: str  # its class
    given: Range | None
    made: Range
    note: str = ""

    def __str__(self) -> str:
        if self.given is None:
            return f"{self.when}: the gradient that came to the model from outside already held {self.made}"
        what = " a gradient of" if self.when == "backward" else ""
        return f"{self.when}: {self.module} ({self.kind}) was given{what} {self.given} and made {self.made}{self.note}"


class NonFiniteError(ArithmeticError):
    """Raised by `NaNHunter`, with its finding."""


class NaNHunter:
    """Names the first module that turns finite numbers into NaN or infinity, forward or backward.

        with NaNHunter(model):
            loss_fn(model(inputs), labels).backward()

    It copies what goes in and out of modules: for hunting, not for long runs. It raises `NonFiniteError`, or with
    `stop=False` goes on and keeps the first finding of each pass in `found`. Say `inf=False` if modules of yours
    return −inf on purpose.
    """

    def __init__(self, model: nn.Module, stop: bool = True, inf: bool = True) -> None:
        self.model, self.stop, self.inf = model, stop, inf
        self.found: list[NonFinite] = []
        self._handles: list[Any] = []

    @property
    def first(self) -> NonFinite | None:
        return self.found[0] if self.found else None

    def __enter__(self) -> "NaNHunter":
        if self._handles:
            raise RuntimeError("this hunter is already at work: leave its `with` block first")
        self.found = []
        self._new_pass()
        for name, module in self.model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True),
                module.register_forward_hook(partial(self._leave, name)),
            ]
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    look = partial(self._gradient_leaves, name, f" as the gradient of its {own}")
                    self._handles.append(parameter.register_hook(look))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _new_pass(self) -> None:
        self._told: set[str] = set()  # one finding forward, one backward: the rest is consequence
        self._receiver: str | None = None  # the first module that was handed something bad
        self._given: dict[str, list[Range]] = defaultdict(list)  # to each module's calls under way
        self._arrived: dict[str, Range] = {}  # the latest gradient at each module's output

    def _bad(self, seen: Range) -> int:
        return 2 if seen.nan else int(self.inf and seen.inf > 0)

    # Forward: compare what a module was given with what it made.

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not name:
            self._new_pass()
        given = Range.of((args, kwargs))  # now: a module that works in place will overwrite it
        if self._bad(given) and self._receiver is None:
            self._receiver = name
        self._given[name].append(given)
        return _door((args, kwargs), partial(self._gradient_leaves, name, ""))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        given, made = self._given[name].pop(), Range.of(output)
        if self._bad(made) > self._bad(given):
            note = ""
            if spoilt := [own for own, p in module.named_parameters(recurse=False) if self._bad(Range.of(p))]:
                note = f"; but its {' and '.join(spoilt)} was bad before: look at the step before this one"
            elif self._receiver and self._receiver.startswith(f"{name}." if name else ""):
                note = f", in its own code, before it called {self._receiver}"
            self._blame("forward", name, given, made, note)
        return _door(output, partial(self._gradient_arrives, name))

    # Backward: gradients arrive at outputs and leave at inputs and parameters. The first bad one tells.

    def _gradient_arrives(self, name: str, grad: Tensor) -> None:
        seen = self._arrived[name] = Range.of(grad)
        above = name
        while self._bad(seen) and above:
            above = above.rpartition(".")[0]
            if above in self._arrived:  # the module around it got a good one, or had been blamed
                note = f", in its own code, on the way back to {name}"
                return self._blame("backward", above, self._arrived[above], seen, note)
        if self._bad(seen):
            self._blame("backward", "the loss", None, seen)

    def _gradient_leaves(self, name: str, note: str, grad: Tensor) -> None:
        seen = Range.of(grad)
        if self._bad(seen) and name in self._arrived:
            self._blame("backward", name, self._arrived[name], seen, note)

    def _blame(self, when: str, name: str, given: Range | None, made: Range, note: str = "") -> None:
        if when in self._told or not self._handles:  # the graph outlives the `with` block
            return
        self._told.add(when)
        kind = "" if given is None else type(self.model.get_submodule(name)).__name__
        self.found.append(NonFinite(when, name or "the model itself", kind, given, made, note))
        if self.stop:
            raise NonFiniteError(self.found[-1])


def _door(x: Any, hook: Callable[[Tensor], None]) -> Any:
    """The same, with copies of the tensors in it that show their gradient to `hook`."""

    def copy(t: Any) -> Any:
        if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
            t = t.clone()  # not a view: the module may write into it
            t.register_hook(hook)
        return t

    return tree_map(copy, x)
