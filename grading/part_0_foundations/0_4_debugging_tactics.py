"""Exercises of lesson 0.4, debugging tactics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Failure, Misconception, Probe

# ── 0.4.a ────────────────────────────────────────────────────────────────────────────────────────────────

Function = Callable[[Tensor], Tensor]


def numerical_gradient(f: Function, x: Tensor, h: float = 1e-6) -> Tensor:
    """The reference: one direction at a time."""
    x = x.detach().double()
    slopes = []
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=torch.float64)
        step[i] = h
        step = step.view(x.shape)
        with torch.no_grad():
            slopes.append((f(x + step) - f(x - step)).item() / (2 * h))
    return torch.tensor(slopes, dtype=torch.float64).view(x.shape)


def _slopes(
    one_side: bool = False,
    span: float = 2.0,
    restore: bool = True,
    single: bool = False,
    callers: bool = False,
    by_reshape: bool = False,
) -> Callable[..., Tensor]:
    def wrong(f: Function, x: Tensor, h: float = 1e-6) -> Tensor:
        x = x.detach() if callers else x.detach().clone()
        if not single:
            x = x.double()
        gradient = torch.zeros(x.numel(), dtype=torch.float64)
        flat = x.reshape(-1) if by_reshape else None
        with torch.no_grad():
            for i, index in enumerate(_indices(x)):
                at = (flat, i) if flat is not None else (x, index)
                here = at[0][at[1]].item()
                at[0][at[1]] = here + h
                above = f(x).item()
                at[0][at[1]] = here - (0 if one_side else h)
                below = f(x).item()
                if restore:
                    at[0][at[1]] = here
                gradient[i] = (above - below) / (span * h)
        return gradient.view(x.shape)

    return wrong


def _indices(x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(index) for index in torch.ones(x.shape).nonzero().tolist()] if x.ndim else [()]


def all_entries_at_once(f: Function, x: Tensor, h: float = 1e-6) -> Tensor:
    """x + h moves all entries together, which gives the sum of all slopes; move one entry at a time."""
    x = x.detach().double()
    with torch.no_grad():
        return torch.full_like(x, (f(x + h) - f(x - h)).item() / (2 * h))


def _quadratic(x: Tensor) -> Tensor:
    return x[0] ** 2 + 3 * x[0] * x[1]


_COLUMNS = randn(3, 2, seed=9)


def _bent(x: Tensor) -> Tensor:
    """Of a matrix of three columns; every entry matters differently."""
    return (x @ _COLUMNS.to(x.dtype)).sin().square().sum() + (x**3).mean() + 40


def _afterwards(f: Any) -> Tensor:
    x = randn(2, 3, seed=1).double()
    f(_bent, x, 0.1)  # a step that no float holds exactly: adding it again does not restore the entry
    return x


def _unchanged(yours: Any, expected: Any) -> Failure | None:
    if torch.equal(yours, expected):
        return None
    return Failure(
        "your function changed the x that it was given: work on a copy, and put each entry back",
        {"x before": str(expected[0].tolist()), "x after": str(yours[0].tolist())},
    )


def _requires_grad(f: Any) -> tuple[Tensor, str]:
    made = f(_bent, randn(2, 3, seed=4).requires_grad_())
    return made, "requires grad" if made.requires_grad else "plain"


A = Exercise(
    id="0.4.a",
    symbol="numerical_gradient",
    reference=numerical_gradient,
    look_again="Is the gradient right?",
    equivalent_mutants={
        "`f(x).item()` became `f(x)`": "a tensor of one number can be subtracted and stored just as well",
    },
    probes=[
        Probe("shape and dtype", lambda f: f(_bent, randn(2, 3)), same_shape),
        Probe("what came in is unchanged", _afterwards, _unchanged),
        Probe(
            "a quadratic, by hand",
            lambda f: f(_quadratic, torch.tensor([1.0, 2.0]), 0.5),
            equals(1e-4),
            given="f = x₀² + 3 x₀ x₁ at (1, 2), h = 0.5: the slopes are 2·1 + 3·2 and 3·1",
        ),
        Probe(
            "the bend of a cube, by hand",
            lambda f: f(lambda x: x**3, torch.tensor(2.0), 0.1),
            equals(1e-4),
            given="f = x³ at 2, h = 0.1: (9.261 − 6.859) / 0.2",
        ),
        Probe(
            "a matrix, with your own h", lambda f: f(_bent, randn(4, 3, seed=2).double()), equals(1e-6, 1e-6)
        ),
        Probe(
            "float32 in, float64 inside",
            lambda f: f(_bent, randn(4, 3, seed=5)),
            equals(1e-6, 1e-6, digits=4),
        ),
        Probe(
            "columns for rows (not contiguous)",
            lambda f: f(_bent, randn(3, 4, seed=3).double().T),
            equals(1e-6, 1e-6, digits=4),
        ),
        Probe("an x that requires grad, a result that does not", _requires_grad, equals(1e-6, 1e-6)),
        Probe(
            "the h of your own signature",
            lambda f: f(lambda x: x.abs(), torch.tensor(1.5e-6)),
            equals(1e-4, digits=3),
            given="f = |x| at 0.0000015, h left out: a step of 1e-6 does not reach the kink at 0",
        ),
    ],
    misconceptions=[
        Misconception(
            "a step to one side",
            _slopes(one_side=True, span=1.0),
            "You took the slope between x and x + h. It is off by the bend times h/2; step to both sides, and the "
            "bend cancels.",
        ),
        Misconception(
            "divided by h",
            _slopes(span=1.0),
            "Everything is twice too large: from x − h to x + h it is two steps, so divide by 2h.",
        ),
        Misconception(
            "entries not put back",
            _slopes(restore=False),
            "After its turn an entry stayed where it was, so the later slopes are taken at another point: put the "
            "old value back.",
        ),
        Misconception(
            "computed in float32",
            _slopes(single=True),
            "The slope was taken in float32: f(x + h) and f(x − h) agree in almost all of its seven digits, and "
            "the difference is rounding. Make the copy float64.",
        ),
        Misconception(
            "written into the caller's x",
            _slopes(callers=True, restore=False),
            ".double() and .detach() copy nothing when x already is float64, so you changed the caller's tensor: "
            "clone it.",
        ),
        all_entries_at_once,
        Misconception(
            "a reshape that copied",
            _slopes(by_reshape=True),
            "reshape(-1) of a tensor that is not contiguous is a copy: f never saw your steps, and every slope is "
            "0. Make a contiguous copy first, and take view(-1) of it.",
        ),
    ],
)

# ── 0.4.b ────────────────────────────────────────────────────────────────────────────────────────────────


def _hunter(
    nan_only: bool = False,
    look_at_input: bool = True,
    pick: str = "first",
    leaves: bool = False,
    cleanup: str = "finally",
) -> Callable[..., str | None]:
    """A hunter; the reference by default."""

    def finite(values: Any) -> bool:
        values = values if isinstance(values, tuple) else (values,)
        tensors = [v for v in values if isinstance(v, Tensor)]
        return not any(bool((v.isnan() if nan_only else ~v.isfinite()).any()) for v in tensors)

    def first_culprit(model: nn.Module, *inputs: Tensor) -> str | None:
        culprits: list[str] = []

        def watch(name: str) -> Any:
            def hook(module: nn.Module, given: tuple, made: Any) -> None:
                if (not look_at_input or finite(given)) and not finite(made):
                    culprits.append(name)

            return hook

        names = dict(model.named_modules())
        handles = [
            module.register_forward_hook(watch(name))
            for name, module in names.items()
            if not (leaves and next(module.children(), None))
        ]
        try:
            model(*inputs)
        except Exception:
            if cleanup == "at the end":
                handles = []
            raise
        finally:
            if cleanup != "never":
                for handle in handles:
                    handle.remove()
        if pick == "registered":
            culprits = [name for name in names if name in culprits]
        return culprits[-1 if pick == "last" else 0] if culprits else None

    return first_culprit


first_culprit = _hunter()


class _Make(nn.Module):
    """Returns what `make` makes of its input; parts, if given, run before."""

    def __init__(self, make: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.make, self.parts = make, nn.ModuleList(parts)

    def forward(self, *x: Any) -> Any:
        for part in self.parts:
            x = part(*x)
            x = x if isinstance(x, tuple) else (x,)
        return self.make(*x)


def _same(x: Tensor) -> Tensor:
    return x + 0


def _nan(x: Tensor) -> Tensor:
    return (x - x) / (x - x)


def _inf(x: Tensor) -> Tensor:
    return x / 0


class _TwoBranches(nn.Module):
    """Both branches make NaN, and the sum is healed; the order of the calls is the caller's choice."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.a, self.b, self.order = _Make(_nan), _Make(_nan), order

    def forward(self, x: Tensor) -> Tensor:
        return sum(getattr(self, name)(x) for name in self.order).nan_to_num()  # type: ignore[attr-defined]


class _SecondTime(nn.Module):
    """Calls one layer twice; the second time its input is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.root, self.after = _Make(torch.sqrt), _Make(_same)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.root(-self.root(x)))


X = torch.ones(2, 3)


def _three(middle: Callable[..., Any]) -> nn.Module:
    return nn.Sequential(_Make(_same), _Make(middle), _Make(_same))


def _count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _left_over(f: Any) -> int:
    model = _three(_nan)
    f(model, X)
    return _count_hooks(model)


def _own_hook_stays(f: Any) -> int:
    model = _three(_nan)
    model[0].register_forward_hook(lambda *_: None)
    f(model, X)
    return _count_hooks(model)


def _fail(x: Tensor) -> Tensor:
    raise KeyError("a bug in the model")


def _after_an_error(f: Any) -> tuple[str, int]:
    model = _three(_fail)
    return outcome(lambda: f(model, X) or "no error"), _count_hooks(model)


def _gone(yours: Any, expected: Any) -> Failure | None:
    left = yours - expected
    if left == 0:
        return None
    if left < 0:
        return Failure("a hook that was not yours is gone: remove your own handles, not everybody's")
    return Failure(f"{left} hooks are still on the model after the call")


def _gone_after_error(yours: Any, expected: Any) -> Failure | None:
    if yours[0] != expected[0]:
        return Failure(f"the model raised a KeyError, and the caller got: {yours[0]}")
    return _gone(yours[1], expected[1])


def _name_or_none(result: Any) -> str | None:
    if result is None or isinstance(result, str):
        return None
    return f"it returned a {type(result).__name__}, expected a name or None"


B = Exercise(
    id="0.4.b",
    symbol="first_culprit",
    reference=first_culprit,
    look_again="Where the first NaN is born",
    probes=[
        Probe("a name, or None", lambda f: f(_three(_nan), X), holds(_name_or_none)),
        Probe(
            "the middle one of three layers",
            lambda f: f(_three(_nan), X),
            equals(),
            given="nn.Sequential of three layers; layer 1 makes NaN of ones",
        ),
        Probe("nobody, if all is finite", lambda f: f(_three(_same), X), equals()),
        Probe(
            "large numbers are finite",
            lambda f: f(_three(lambda x: x * 3e38), X),
            equals(),
            given="layer 1 makes 3e38 of ones, which float32 still holds; it does not hold their sum",
        ),
        Probe(
            "nobody, if the NaN came from outside",
            lambda f: f(_three(_same), X * math.nan),
            equals(),
            given="the model's own input is NaN",
        ),
        Probe(
            "an infinity counts",
            lambda f: (
                f(_three(_inf), X),
                f(nn.Sequential(_Make(_inf), _Make(lambda x: x - x)), X),
                f(_three(_same), X / 0),
            ),
            equals(),
            given="layer 1 divides by 0; then: layer 0 does, and layer 1 makes NaN of it; then: the input is inf",
        ),
        Probe(
            "some bad numbers are enough",
            lambda f: f(_three(lambda x: x.index_fill(1, torch.tensor([2]), math.nan)), X),
            equals(),
            given="one column of three becomes NaN",
        ),
        Probe(
            "parts, and code between parts",
            lambda f: (
                f(nn.Sequential(_Make(_same), _Make(_same, _Make(_same), _Make(_nan))), X),
                f(nn.Sequential(_Make(_same), _Make(_nan, _Make(_same)), _Make(_same)), X),
                f(_Make(_nan, _Make(_same)), X),
            ),
            equals(),
            given="NaN from a part of layer 1; then from layer 1 itself, which has a part; then from the model itself",
        ),
        Probe(
            "in the order of the calls",
            lambda f: (f(_TwoBranches("ab"), X), f(_TwoBranches("ba"), X)),
            equals(),
            given="branches a and b both make NaN; called as a, b and then as b, a",
        ),
        Probe("a module that is called twice", lambda f: f(_SecondTime(), X), equals()),
        Probe(
            "tuples and single numbers",
            lambda f: (
                f(nn.Sequential(_Make(lambda x: (x, _nan(x))), _Make(lambda xs: xs[0])), X),
                f(
                    _Make(
                        _same,
                        _Make(lambda x, y: (x, y)),
                        _Make(lambda x, y: (x, _inf(y))),
                        _Make(lambda x, y: x + y),
                    ),
                    X,
                    X,
                ),
                f(_Make(_same, _Make(lambda x: _nan(x).sum())), X),
            ),
            equals(),
        ),
        Probe(
            "integers and other things that are no floats",
            lambda f: f(
                _Make(_nan, _Make(lambda ids: ("text", ids.float(), 3)), _Make(lambda t, x, n: x)), X.long()
            ),
            equals(),
        ),
        Probe("no hook is left behind", _left_over, _gone),
        Probe("and no other hook taken away", _own_hook_stays, _gone),
        Probe("even if the model fails", _after_an_error, _gone_after_error),
    ],
    misconceptions=[
        Misconception(
            "the last one downstream",
            _hunter(nan_only=True, look_at_input=False, pick="last", cleanup="never"),
            "As in the code that was given, all who put out a NaN are accused, and the last of them is named. That is "
            "always the model itself: the whole finishes after its parts.",
        ),
        Misconception(
            "the last instead of the first",
            _hunter(pick="last"),
            "You return the last culprit. A module finishes after its parts, so the last one is the model itself; "
            "the first one is where it began.",
        ),
        Misconception(
            "all downstream are accused",
            _hunter(look_at_input=False),
            "You look at outputs alone, so a layer that was handed a NaN is accused of it; ask whether its input "
            "was finite.",
        ),
        Misconception(
            "infinities go by",
            _hunter(nan_only=True),
            "isnan does not see an infinity, which is a NaN in the making: use isfinite.",
        ),
        Misconception(
            "only modules without parts",
            _hunter(leaves=True),
            "You watch only modules that have no parts, but the code of a larger module, between its parts, can make "
            "a NaN as well.",
        ),
        Misconception(
            "the order of registration",
            _hunter(pick="registered"),
            "You return the first culprit in the order in which the modules were defined; ask which one finished "
            "first.",
        ),
        Misconception(
            "the hooks stay",
            _hunter(cleanup="never"),
            "The answers are right, but your hooks stay on the model and run with every later call: remove each by "
            "its handle.",
        ),
        Misconception(
            "the hooks stay after an error",
            _hunter(cleanup="at the end"),
            "Your hooks are removed at the end, which is never reached if the model raises: put it into a finally.",
        ),
    ],
)

# ── 0.4.c ────────────────────────────────────────────────────────────────────────────────────────────────


def masked_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """The reference: `where` before the dangerous operation, and again after it."""
    safe = torch.where(mask, logits, torch.full_like(logits, -1e9))
    log_p = safe.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return torch.where(mask.any(dim=-1), entropy, torch.zeros_like(entropy))


def masked_after_the_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """The softmax was taken over all entries, so what is not allowed keeps its share and the rest does not
    sum to 1: mask the logits."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).masked_fill(~mask, 0.0).sum(dim=-1)


def where_comes_afterwards(logits: Tensor, mask: Tensor) -> Tensor:
    """The values are right, and the gradient is NaN: p · ln p was computed where p is 0, and where's gradient
    of 0 times infinity is NaN. Make the input harmless, then take the logarithm."""
    p = logits.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return -torch.where(p > 0, p * p.log(), torch.zeros_like(p)).sum(dim=-1)


def NaN_mended_afterwards(logits: Tensor, mask: Tensor) -> Tensor:
    """nan_to_num mends the value; its gradient of 0 then meets −∞ on the way back, and is NaN again. Fill
    with a finite number, so that there is nothing to mend."""
    log_p = logits.masked_fill(~mask, -math.inf).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).nan_to_num().sum(dim=-1)


def the_mask_multiplied_in(logits: Tensor, mask: Tensor) -> Tensor:
    """Times the mask, a logit becomes 0, and e^0 is 1: not allowed, and yet as likely as others. Put a large
    negative number there."""
    log_p = (logits * mask).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def added_instead_of_replaced(logits: Tensor, mask: Tensor) -> Tensor:
    """You subtracted a large number from what is not allowed: a NaN or an infinity that stood there is still
    there. Replace it, with masked_fill."""
    log_p = (logits - 1e9 * ~mask).log_softmax(dim=-1)
    return (-(log_p.exp() * log_p).sum(dim=-1)).masked_fill(~mask.any(dim=-1), 0.0)


def the_sign(logits: Tensor, mask: Tensor) -> Tensor:
    """The sum of p ln p is negative; an entropy is minus that."""
    return -masked_entropy(logits, mask)


def empty_rows_are_uniform(logits: Tensor, mask: Tensor) -> Tensor:
    """A row in which nothing is allowed is a row of equal numbers, and its entropy came out as ln V; set it
    to 0 at the end."""
    log_p = logits.masked_fill(~mask, -1e9).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def bits(logits: Tensor, mask: Tensor) -> Tensor:
    """Your numbers are the right ones divided by ln 2: that is bits, and nats were asked for."""
    return masked_entropy(logits, mask) / math.log(2)


def _random(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    mask = randn(3, 4, 6, seed=seed + 50) > -0.3
    mask[..., 0] = True
    return scale * randn(3, 4, 6, seed=seed), mask


def _gradient(f: Any, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The entropies, and the gradient of their weighted sum."""
    logits = logits.clone().requires_grad_()
    entropy = f(logits, mask)
    weights = 1 / (1 + torch.arange(entropy.numel()).view(entropy.shape))  # finfo.min has no room for a 2
    return entropy, torch.autograd.grad((weights * entropy).sum(), logits)[0]


def _finite_and_equal(yours: Any, expected: Any) -> Failure | None:
    for what, values in zip(("entropies", "numbers of the gradient"), yours, strict=True):
        if bad := int((~values.isfinite()).sum()):
            return Failure(f"{bad} of {values.numel()} {what} are not finite")
    return equals(1e-5, 1e-4, digits=3)(yours, expected)


def _nothing_allowed() -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    return torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), mask


def _rubbish() -> tuple[Tensor, Tensor]:
    logits = [
        [0.0, 1.0, math.nan, -math.inf],
        [math.inf, 2.0, 1.0, 5e9],
        [math.nan, math.inf, 1.0, -math.inf],
    ]
    mask = [[True, True, False, False], [False, True, True, False], [False] * 4]
    return torch.tensor(logits), torch.tensor(mask)


def _far_below() -> tuple[Tensor, Tensor]:
    logits = torch.tensor([[-200.0, -201.0, 0.0], [-20000.0, -20001.0, 3.0]])
    return logits, torch.tensor([[True, True, False], [True, True, False]])


def _inputs_after(f: Any) -> tuple[Tensor, Tensor]:
    logits, mask = _random(3)
    f(logits, mask)
    return logits, mask


def _left_alone(yours: Any, expected: Any) -> Failure | None:
    for name, mine, theirs in zip(("logits", "mask"), yours, expected, strict=True):
        if not torch.equal(mine, theirs):
            return Failure(
                f"your function changed the {name} that it was given: masked_fill, not masked_fill_"
            )
    return None


C = Exercise(
    id="0.4.c",
    symbol="masked_entropy",
    reference=masked_entropy,
    look_again="Forward fine, backward NaN",
    equivalent_mutants={
        "`1000000000.0` became `2000000000.0`": "e to the power of either is exactly 0",
    },
    probes=[
        Probe("shape and dtype", lambda f: f(*_random()), same_shape),
        Probe("what came in is unchanged", _inputs_after, _left_alone),
        Probe(
            "two of four, equally likely, by hand",
            lambda f: f(torch.zeros(4), torch.tensor([True, False, True, False])),
            equals(1e-5, digits=3),
            given="logits 0, 0, 0, 0; the first and third are allowed: ln 2 = 0.693",
        ),
        Probe(
            "what is not allowed does not count",
            lambda f: f(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([False, True, True])),
            equals(1e-5, digits=3),
            given="logits 3, 1, 1; the last two are allowed: ln 2 again",
        ),
        Probe("equals the reference", lambda f: f(*_random(1, 2.0)), equals(digits=3)),
        Probe(
            "its gradient, too",
            lambda f: _gradient(f, *_random(2)),
            _finite_and_equal,
            given="random logits and mask; the gradient of a weighted sum of the entropies",
        ),
        Probe(
            "a row in which nothing is allowed",
            lambda f: _gradient(f, *_nothing_allowed()),
            _finite_and_equal,
            given="logits 1, 2, 3 twice; in the second row nothing is allowed: 0, and a gradient of 0",
        ),
        Probe(
            "rubbish where nothing is allowed",
            lambda f: _gradient(f, *_rubbish()),
            _finite_and_equal,
            given="NaN, −inf, inf and 5e9, none of them allowed; in the third row, nothing is",
        ),
        Probe(
            "allowed logits far below zero",
            lambda f: _gradient(f, *_far_below()),
            equals(5e-3, digits=3),  # logsumexp minus the mean logit is sound, and rounds there
            given="allowed −200 and −201, then −20000 and −20001: with a common shift the entropy stays 0.582",
        ),
        Probe(
            "logits far apart",
            lambda f: _gradient(
                f, torch.tensor([[0.0, -300.0, 5.0], [9e3, -9e3, 0.0]]), torch.ones(2, 3, dtype=torch.bool)
            ),
            _finite_and_equal,
            given="allowed logits 0, −300, 5 and 9000, −9000, 0",
        ),
        Probe("float64", lambda f: _gradient(f, _random(4)[0].double(), _random(4)[1]), same_shape),
    ],
    misconceptions=[
        masked_after_the_softmax,
        where_comes_afterwards,
        NaN_mended_afterwards,
        the_mask_multiplied_in,
        added_instead_of_replaced,
        the_sign,
        empty_rows_are_uniform,
        bits,
    ],
)

EXERCISES = [A, B, C]
