# Exported from chapters/part_0_foundations/0_4_debugging_tactics.ipynb.
# Edit the lesson, then run: make export
"""From a symptom to the line at fault: small tools, each of which answers one question.

`check_shape` names dimensions · `overfit_one_batch` asks whether a model can learn at all · `gradient_check`
compares autograd with differences · `NaNHunter` finds the first module that made a NaN · `ActivationStats` and
`gradient_stats` measure what flows forward and back.
"""

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "check_shape",
    "overfit_one_batch",
    "GradientEntry",
    "GradientReport",
    "gradient_check",
    "Range",
    "NonFinite",
    "NonFiniteError",
    "NaNHunter",
    "ActivationRow",
    "ActivationStats",
    "ParameterRow",
    "gradient_stats",
    "as_table",
]


def check_shape(x: Tensor, spec: str, /, **sizes: int) -> dict[str, int]:
    """The sizes of a tensor's dimensions by name, or an error that says which one is wrong.

        sizes = check_shape(ids, "b t")                      # {"b": 4, "t": 32}
        sizes = check_shape(logits, "b t v", v=256, **sizes)  # b and t must be what they were

    Args:
        spec: A word for each dimension. The same name means the same size, a number means itself, `_` is any
            size, and `...` stands for any number of dimensions.
        sizes: Sizes that are known beforehand; names that `spec` does not use are passed on.

    Raises:
        ValueError: if a dimension has another size, or their number differs.
        TypeError: if `x` is no tensor.
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
    """Train a copy of the model on one batch; a model that works learns it by heart.

    Dropout makes that impossible: build the model without it, or call `.eval()` first.

    Args:
        loss_fn: Called as `loss_fn(model(inputs), *rest)` for a batch of `inputs, *rest`.

    Returns:
        The loss before each step.

    Raises:
        ValueError: if no parameter reaches the loss.
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


@dataclass(frozen=True)
class GradientEntry:
    """One entry of one tensor: what autograd says about it, and what the differences say."""

    tensor: str
    index: tuple[int, ...]
    autograd: float
    numeric: float
    connected: bool
    """Whether autograd found a path to this tensor at all."""
    excess: float
    """The disagreement, in multiples of what the tolerance allows."""

    def __str__(self) -> str:
        place = f"{self.tensor}[{', '.join(map(str, self.index))}]" if self.index else self.tensor
        path = "" if self.connected else " (there is no path to it: detached?)"
        return f"{place}: autograd says {self.autograd:.6g}{path}, differences say {self.numeric:.6g}"


@dataclass(frozen=True)
class GradientReport:
    """What `gradient_check` found. Printed, it is one sentence."""

    entries: tuple[GradientEntry, ...]
    """The worst entry of each tensor."""
    checked: int
    """How many entries were compared, of all tensors together."""

    @property
    def worst(self) -> GradientEntry:
        """The entry that is furthest off."""
        return max(self.entries, key=lambda entry: entry.excess)

    @property
    def wrong(self) -> list[str]:
        """The tensors whose gradient is wrong."""
        return [entry.tensor for entry in self.entries if entry.excess > 1]

    @property
    def ok(self) -> bool:
        """Whether autograd and the differences agree everywhere."""
        return not self.wrong

    def raise_if_wrong(self) -> "GradientReport":
        """Itself, if all is well; for tests.

        Raises:
            AssertionError: with the sentence.
        """
        if not self.ok:
            raise AssertionError(str(self))
        return self

    def __str__(self) -> str:
        verdict = "right" if self.ok else f"wrong in {len(self.wrong)} of {len(self.entries)} tensors"
        return f"the gradient is {verdict} ({self.checked} entries checked); the worst is {self.worst}"


def gradient_check(
    fn: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    eps: float = 1e-6,
    atol: float = 1e-6,
    rtol: float = 1e-4,
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> GradientReport:
    """Compare autograd with central differences, entry by entry.

    All is done on copies in float64, because float32's rounding is larger than the bugs one looks for. A
    function that rounds to float32 *inside* needs `eps=1e-2` and tolerances to match.

    Args:
        fn: A function or a module; a module's parameters are checked as well. It returns a tensor, or a tuple
            or dict of them. What is not a scalar is summed with fixed random weights.
        inputs: Its arguments. Float tensors are checked, anything else is handed on.
        eps: The step to either side.
        atol, rtol: The two may differ by atol + rtol · the larger of them.
        samples: How many entries of each tensor, chosen at random (100 when None); the one with the largest
            gradient is always among them.
        generator: For that choice and those weights; one with seed 0 when None.

    Raises:
        ValueError: if there is nothing to check, or no slope to measure: the value is float32, not finite, or
            not the same when computed twice.
    """
    generator = generator or torch.Generator().manual_seed(0)
    args = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    args = [x.detach().to(torch.float64, copy=True).requires_grad_() if _is_float(x) else x for x in args]
    tensors = {f"input {i}": x for i, x in enumerate(args) if _is_float(x)}
    if isinstance(fn, nn.Module):
        fn = copy.deepcopy(fn).double()
        tensors.update((name, p) for name, p in fn.named_parameters() if p.requires_grad)
    tensors = {name: x for name, x in tensors.items() if x.numel()}
    if not tensors:
        raise ValueError("nothing to check: hand over a float tensor, or a module with parameters")
    weights: list[Tensor] = []

    def value() -> Tensor:
        outputs = [y for y in _tensors(fn(*args)) if _is_float(y)]
        if not outputs or any(y.dtype != torch.float64 for y in outputs):
            raise ValueError(
                "the value is not float64, though the inputs were: float32 rounds too much to measure a slope; "
                "hand over the module itself (not a lambda around it), and take .float() out of the function"
            )
        if not weights:  # a scalar keeps its own gradient, so that the report shows numbers you know
            shapes = [y.shape if y.numel() > 1 else () for y in outputs]
            drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
            weights.extend(
                w.to(y.device) if w.ndim else w * 0 + 1 for w, y in zip(drawn, outputs, strict=True)
            )
        return torch.stack([(w * y).sum() for w, y in zip(weights, outputs, strict=True)]).sum()

    total = value()
    found: Sequence[Tensor | None] = [None] * len(tensors)
    if total.requires_grad:
        found = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
    entries, checked = [], 0
    with torch.no_grad():
        if not total.isfinite():
            raise ValueError("the value is not finite, so it has no slope: first hunt the NaN")
        if value() != total:
            raise ValueError("a second call gives another value: is dropout on? Call .eval() first")
        for (name, x), grad in zip(tensors.items(), found, strict=True):
            compared = []
            for index in _sample(x, grad, 100 if samples is None else samples, generator):
                here, ends = x[index].item(), []
                for end in (here + eps, here - eps):
                    x[index] = end
                    ends.append(value().item())
                x[index] = here
                numeric = (ends[0] - ends[1]) / (2 * eps)
                ours = 0.0 if grad is None else grad[index].item()
                excess = abs(ours - numeric) / (atol + rtol * max(abs(ours), abs(numeric)))
                excess = math.inf if math.isnan(excess) else excess  # a NaN agrees with nothing
                compared.append(GradientEntry(name, index, ours, numeric, grad is not None, excess))
            entries.append(max(compared, key=lambda entry: entry.excess))
            checked += len(compared)
    return GradientReport(tuple(entries), checked)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _sample(x: Tensor, grad: Tensor | None, n: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Where to look: n places at random, and the one with the largest gradient."""
    places = torch.randperm(x.numel(), generator=generator)[: max(n, 1)]
    if grad is not None:
        largest = grad.abs().argmax().cpu()  # a NaN counts as the largest
        places = places if (places == largest).any() else torch.cat([places[1:], largest[None]])
    return (
        [tuple(place) for place in torch.stack(torch.unravel_index(places, x.shape), -1).tolist()]
        if x.ndim
        else [()]
    )


def _tensors(x: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists, dicts and dataclasses, however deep."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _tensors(item)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
    elif is_dataclass(x) and not isinstance(x, type):
        yield from _tensors(list(vars(x).values()))


@dataclass(frozen=True)
class Range:
    """Some floats at a glance: how many, how many of them bad, and from where to where the others go."""

    numbers: int
    nan: int
    inf: int
    lowest: float
    highest: float

    def __str__(self) -> str:
        if not self.numbers:
            return "no floats"
        if self.nan or self.inf:
            return f"{self.numbers:,} numbers with {self.nan:,} NaN and {self.inf:,} infinite"
        return f"{self.numbers:,} finite numbers ({self.lowest:.3g} to {self.highest:.3g})"


def _range(x: Any) -> Range:
    numbers = nan = inf = 0
    lowest, highest = math.inf, -math.inf
    for t in _tensors(x):
        t = (t.coalesce().values() if t.is_sparse else t).detach()
        if not t.is_floating_point() or not t.numel():
            continue
        numbers += t.numel()
        low, high = (bound.item() for bound in t.aminmax())  # one pass, and it shows NaN and inf as well
        if not math.isfinite(low) or not math.isfinite(high):
            nan, inf = nan + int(t.isnan().sum()), inf + int(t.isinf().sum())
            t = t[t.isfinite()]
            low, high = (b.item() for b in t.aminmax()) if t.numel() else (math.inf, -math.inf)
        lowest, highest = min(lowest, low), max(highest, high)
    return Range(numbers, nan, inf, lowest, highest)


@dataclass(frozen=True)
class NonFinite:
    """Where finite numbers became something else. Printed, it is one sentence."""

    when: str
    """`"forward"` or `"backward"`."""
    module: str
    """The module's name; `"the loss"` for a gradient that was bad before it reached the model."""
    kind: str
    """The module's class."""
    given: Range | None
    made: Range
    note: str = ""

    def __str__(self) -> str:
        if self.given is None:
            return f"{self.when}: the gradient that came to the model from outside already held {self.made}"
        what = " a gradient of" if self.when == "backward" else ""
        return f"{self.when}: {self.module} ({self.kind}) was given{what} {self.given} and made {self.made}{self.note}"


class NonFiniteError(ArithmeticError):
    """Raised by `NaNHunter`; `finding` has the numbers."""

    def __init__(self, finding: NonFinite) -> None:
        super().__init__(str(finding))
        self.finding = finding


@dataclass
class _Call:
    """One call of one module: what it was given, and the gradient that arrived at what it made."""

    given: Range
    arrived: Range | None = None


class NaNHunter:
    """Names the first module that turns finite numbers into NaN or infinity, forward or backward.

        with NaNHunter(model):
            loss_fn(model(inputs), labels).backward()

    While it is at work, it copies what goes in and out of modules: for hunting, not for long runs. What happens
    outside of modules (in the loss, say) it knows only by the gradient that comes from there.

    Args:
        stop: Raise `NonFiniteError` at once. Otherwise go on, and keep the first finding of each pass in `found`.
        inf: Whether infinity counts. Say False if modules of yours return −inf on purpose.
    """

    def __init__(self, model: nn.Module, stop: bool = True, inf: bool = True) -> None:
        self.model, self.stop, self.inf = model, stop, inf
        self.found: list[NonFinite] = []
        self._handles: list[Any] = []

    @property
    def first(self) -> NonFinite | None:
        """The first finding, if any."""
        return self.found[0] if self.found else None

    def __enter__(self) -> "NaNHunter":
        if self._handles:
            raise RuntimeError("this hunter is already at work: leave its `with` block first")
        self.found = []
        self._modules = dict(self.model.named_modules())
        self._calls: dict[str, list[_Call]] = defaultdict(list)
        self._arrived: dict[str, Range] = {}  # the latest gradient at each module's output
        self._new_pass()
        owners: dict[nn.Parameter, list[tuple[str, str]]] = defaultdict(list)  # tied weights have several
        for name, module in self._modules.items():
            self._handles += [
                module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True),
                module.register_forward_hook(partial(self._leave, name)),
            ]
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    owners[parameter].append((name, own))
        for parameter, names in owners.items():
            self._handles.append(parameter.register_hook(partial(self._gradient_of_parameter, names)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _new_pass(self) -> None:
        self._told: set[str] = set()
        self._receiver: str | None = None  # the first module that was handed something bad
        self._arrived.clear()

    def _bad(self, seen: Range) -> int:
        return 2 if seen.nan else int(self.inf and seen.inf > 0)

    # Forward: compare what a module was given with what it made.

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not name:
            self._new_pass()
        call = _Call(_range((args, kwargs)))  # now: a module that works in place will overwrite it
        if self._bad(call.given) and self._receiver is None:
            self._receiver = name
        self._calls[name].append(call)
        return self._doors((args, kwargs), partial(self._gradient_leaves, name, call))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        call, made = self._calls[name].pop(), _range(output)
        if self._bad(made) > self._bad(call.given):
            note = ""
            spoilt = [n for n, p in module.named_parameters(recurse=False) if self._bad(_range(p))]
            if spoilt:
                note = f"; but its {' and '.join(spoilt)} was bad before: look at the step before this one"
            elif self._receiver is not None and self._receiver.startswith(f"{name}." if name else ""):
                note = f", in its own code, before it called {self._receiver}"
            self._blame("forward", name, call.given, made, note)
        return self._doors(output, partial(self._gradient_arrives, name, call))

    def _doors(self, x: Any, hook: Callable[[Tensor], None]) -> Any:
        copies: dict[int, Tensor] = {}  # the same tensor twice stays one tensor

        def door(t: Tensor) -> Tensor:
            if not (t.requires_grad and torch.is_grad_enabled()):
                return t
            if id(t) not in copies:
                copies[id(t)] = t.clone()  # not a view: the module may write into it
                copies[id(t)].register_hook(hook)
            return copies[id(t)]

        return _replace(x, door)

    # Backward: gradients arrive at outputs and leave at inputs and parameters.

    def _gradient_arrives(self, name: str, call: _Call, grad: Tensor) -> None:
        if not self._handles:  # the graph outlives the `with` block
            return
        seen = _range(grad)
        if call.arrived is None or self._bad(seen) >= self._bad(call.arrived):
            call.arrived = seen
        self._arrived[name] = seen
        above = name
        while self._bad(seen) and above:
            above = above.rpartition(".")[0]
            if above in self._arrived:  # the module around it: was the gradient still good there?
                if not self._bad(self._arrived[above]):
                    note = f", in its own code, on the way back to {name}"
                    self._blame("backward", above, self._arrived[above], seen, note)
                return
        if self._bad(seen):
            self._blame("backward", None, None, seen)

    def _gradient_leaves(self, name: str, call: _Call, grad: Tensor) -> None:
        seen = _range(grad)
        if self._handles and call.arrived is not None and self._bad(seen) > self._bad(call.arrived):
            self._blame("backward", name, call.arrived, seen)

    def _gradient_of_parameter(self, owners: list[tuple[str, str]], grad: Tensor) -> None:
        seen = _range(grad)
        arrived = [self._arrived[name] for name, _ in owners if name in self._arrived]
        if self._bad(seen) and arrived and not any(map(self._bad, arrived)):
            name, own = next(owner for owner in owners if owner[0] in self._arrived)
            self._blame("backward", name, self._arrived[name], seen, f" as the gradient of its {own}")

    def _blame(self, when: str, name: str | None, given: Range | None, made: Range, note: str = "") -> None:
        if when in self._told and not self.stop:
            return
        self._told.add(when)
        kind = "outside the model" if name is None else type(self._modules[name]).__name__
        module = "the loss" if name is None else name or "the model itself"
        self.found.append(NonFinite(when, module, kind, given, made, note))
        if self.stop:
            raise NonFiniteError(self.found[-1])


def _replace(x: Any, swap: Callable[[Tensor], Tensor]) -> Any:
    """The same tuples, lists and dicts with other tensors in them."""
    if isinstance(x, Tensor):
        return swap(x)
    if isinstance(x, tuple) and hasattr(x, "_fields"):  # a named tuple
        return type(x)(*(_replace(item, swap) for item in x))
    if isinstance(x, (tuple, list)):
        return type(x)(_replace(item, swap) for item in x)
    if isinstance(x, dict):
        new = copy.copy(x)
        new.update((key, _replace(value, swap)) for key, value in x.items())
        return new
    return x


@dataclass
class ActivationRow:
    """What one call of one module put out, in numbers."""

    module: str
    call: int
    """1 for the module's first call."""
    mean: float
    std: float
    max_abs: float
    zeros: float
    """Fraction of entries that are exactly zero."""
    dead: float
    """Fraction of units (last dimension) that are zero for every token of the batch."""
    grad_std: float | None = None
    """Of the gradient of the output; None until a backward pass has come by."""


class ActivationStats:
    """Records the size of activations, and of their gradients, module by module.

        with ActivationStats(model) as stats:
            loss_fn(model(inputs), labels).backward()
        print(as_table(stats.rows))

    Args:
        filter: Called with a module's name and the module; says whether to record it. When None, modules that
            have no parts.
    """

    def __init__(self, model: nn.Module, filter: Callable[[str, nn.Module], bool] | None = None) -> None:
        self.model = model
        self.filter = filter or (lambda name, module: next(module.children(), None) is None)
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
        y = next((t for t in _tensors(output) if t.is_floating_point() and t.numel()), None)
        if y is None:
            return
        x = y.detach().float()
        zero = (x == 0).reshape(-1, x.shape[-1] if x.ndim else 1)  # (tokens, units)
        self._calls[name] += 1
        std, mean = torch.std_mean(x, correction=0)
        sizes = (mean, std, x.abs().max(), zero.float().mean(), zero.all(0).float().mean())
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
    grad_norm: float | None
    """None if there is no gradient at all: detached, frozen, unused, or no backward pass yet."""
    update_ratio: float | None
    """lr · |gradient| / |weight|: which part of itself one step of plain SGD would move it."""


def gradient_stats(model: nn.Module, lr: float = 1.0) -> list[ParameterRow]:
    """For each parameter, the size of its gradient next to its own; call it after `backward`.

    The update ratio is plain SGD's. Adam rescales each gradient, so measure its steps on the weights themselves.
    """
    rows = []
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().norm().item()
        grad = None if parameter.grad is None else parameter.grad.float().norm().item()
        if grad is None:
            ratio = None
        elif weight == 0:  # a bias at its start: any step is infinitely larger
            ratio = math.inf if grad else 0.0
        else:
            ratio = lr * grad / weight
        rows.append(ParameterRow(name, parameter.numel(), weight, grad, ratio))
    return rows


def as_table(rows: list[Any]) -> str:
    """Rows of a dataclass as aligned text, one line each below their names."""
    if not rows:
        return "(no rows)"
    lines = [[field.name for field in fields(rows[0])]]
    for row in rows:
        cells = astuple(row)
        lines.append(["–" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
