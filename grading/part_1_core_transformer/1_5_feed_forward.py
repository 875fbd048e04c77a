"""Exercises of lesson 1.5, the feed-forward layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, fill_by_name, holds, randn, same_parameters, same_shape
from tutorial_lib.checks.spec import Exercise, Probe
from tutorial_lib.core.mlp import MLP, gelu_tanh

# ── 1.5.a  GELU, the tanh form ───────────────────────────────────────────────────────────────────────────

ROOT = math.sqrt(2 / math.pi)


def _inner(x: Tensor) -> Tensor:
    return ROOT * (x + 0.044715 * x**3)


def _few() -> Tensor:
    return torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])


def _far() -> Tensor:
    return torch.tensor([-1e4, -30.0, 30.0, 1e4])


def the_exact_form(x: Tensor) -> Tensor:
    """These are the numbers of the exact GELU, x·Φ(x) with erf; GPT-2 was trained with the tanh form, which
    differs by up to 0.0005."""
    return F.gelu(x)


def without_the_cube(x: Tensor) -> Tensor:
    """The tanh got √(2/π)·x alone; the term 0.044715·x³ belongs inside the bracket, too."""
    return 0.5 * x * (1 + torch.tanh(ROOT * x))


def square_root_over_the_2_only(x: Tensor) -> Tensor:
    """The factor is the square root of the whole fraction, √(2/π) ≈ 0.798; you took √2 / π ≈ 0.450."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2) / math.pi * (x + 0.044715 * x**3)))


def the_sigmoid_form(x: Tensor) -> Tensor:
    """This is x·σ(1.702·x), a third and coarser approximation of GELU; here the tanh form is wanted."""
    return x * torch.sigmoid(1.702 * x)


def the_half_is_missing(x: Tensor) -> Tensor:
    """Everything is twice as large as it should be: 1 + tanh runs from 0 to 2, and the factor ½ makes it a
    gate from 0 to 1."""
    return x * (1 + torch.tanh(_inner(x)))


def only_the_gate(x: Tensor) -> Tensor:
    """You returned the gate, ½(1 + tanh(…)), which is Φ(x); GELU is x times that gate."""
    return 0.5 * (1 + torch.tanh(_inner(x)))


def the_one_is_missing(x: Tensor) -> Tensor:
    """Without the 1 the gate runs from −½ to ½, so negative inputs come out positive; it is 1 + tanh(…)."""
    return 0.5 * x * torch.tanh(_inner(x))


GELU = Exercise(
    id="1.5.a",
    symbol="gelu_tanh",
    reference=gelu_tanh,
    look_again="GELU, derived twice",
    probes=[
        Probe("shape and dtype", lambda f: (f(randn(2, 3, 4)), f(randn(5).double())), same_shape),
        Probe("GELU(x) − GELU(−x) = x", lambda f: f(_few()) - f(-_few()), equals(), given=_few()),
        Probe("five values", lambda f: f(_few()), equals(1e-6, 1e-6, digits=4), given=_few()),
        Probe("equals the reference", lambda f: f(2 * randn(64)), equals(1e-6, 1e-5, digits=4)),
        Probe("far from zero", lambda f: f(_far()), equals(), given=_far()),
        Probe(
            "a gradient comes through",
            lambda f: torch.autograd.functional.jacobian(lambda x: f(x).sum(), _few()),
            equals(digits=4),
            given=_few(),
        ),
    ],
    misconceptions=[
        the_exact_form,
        without_the_cube,
        square_root_over_the_2_only,
        the_sigmoid_form,
        the_half_is_missing,
        only_the_gate,
        the_one_is_missing,
    ],
)


# ── 1.5.b  The MLP that only adds ────────────────────────────────────────────────────────────────────────


class _FeedForward(MLP):
    def __init__(self, d_model: int, d_mlp: int | None = None, bias: bool = True) -> None:
        super().__init__(d_model, d_mlp, activation="relu", bias=bias)


class TheExpansionIsForgotten(_FeedForward):
    """The middle is as wide as the stream: when d_mlp is None it should be 4 · d_model."""

    def __init__(self, d_model: int, d_mlp: int | None = None) -> None:
        super().__init__(d_model, d_model if d_mlp is None else d_mlp)


def _bent_after(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.down(self.up(x)))


class AsItWasGiven(TheExpansionIsForgotten):
    """Both bugs are still there: the layer does not expand, and the bend stands after the down projection."""

    forward = _bent_after


class BentAfterTheDownProjection(_FeedForward):
    """ReLU is the last step, so no output is ever negative; it belongs between up and down."""

    forward = _bent_after


class NothingBends(_FeedForward):
    """There is no ReLU left: up and down in a row are one linear map, however wide the middle is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class BentTwice(_FeedForward):
    """The first ReLU is in the right place, but a second one after down cuts off every negative output."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.down(F.relu(self.up(x))))


class GELU_instead_of_ReLU(_FeedForward):
    """The bend is in the right place, but it is GELU; the exercise asks for ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class TheResidualIsAddedHere(_FeedForward):
    """You returned x + MLP(x); the block adds the residual, and if the layer does it too, it is there
    twice."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class NoBiases(_FeedForward):
    """The two projections have lost their biases; the equation has b_up and b_down."""

    def __init__(self, d_model: int, d_mlp: int | None = None) -> None:
        super().__init__(d_model, d_mlp, bias=False)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def _filled(cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
    return fill_by_name(cls(*args, **kwargs))


@torch.no_grad()
def _rest(cls: Any) -> Tensor:
    """f(a + b) − f(a) − f(b) + f(0): zero for an affine map, whatever its weights."""
    f, a, b = _filled(cls, 6), randn(4, 6, seed=1), randn(4, 6, seed=2)
    return f(a + b) - f(a) - f(b) + f(torch.zeros(4, 6))


@torch.no_grad()
def _moved(cls: Any) -> list[int]:
    f, x = _filled(cls, 6), randn(1, 7, 6)
    changed = x.clone()
    changed[:, 3] += 1
    return ((f(changed) - f(x)).abs().amax(dim=(0, 2)) > 1e-6).nonzero().flatten().tolist()


def _two_channels() -> Tensor:
    return torch.tensor([[9.0, 1.0], [1.0, 3.0], [4.0, 4.0]])


@torch.no_grad()
def _difference(cls: Any) -> Tensor:
    """Weights set by hand so that the outputs are |x₁ − x₂| and its negative."""
    layer = cls(2, 2)
    layer.up.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    layer.down.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    layer.up.bias.zero_()
    layer.down.bias.zero_()
    return layer(_two_channels())


MEND = Exercise(
    id="1.5.b",
    symbol="FeedForward",
    reference=_FeedForward,
    look_again="What goes wrong",
    probes=[
        Probe("parameters at ratio 4", lambda cls: _shapes(cls(6)), same_parameters, given="FeedForward(6)"),
        Probe(
            "parameters at a chosen width",
            lambda cls: _shapes(cls(6, d_mlp=10)),
            same_parameters,
            given="FeedForward(6, d_mlp=10)",
        ),
        Probe(
            "shape and dtype",
            lambda cls: (_filled(cls, 6)(randn(2, 5, 6)), _filled(cls, 6)(randn(6))),
            same_shape,
        ),
        Probe(
            "it bends",
            _rest,
            holds(
                lambda rest: (
                    None
                    if rest.abs().max() > 1e-3
                    else "f(a + b) = f(a) + f(b) − f(0) for all inputs tried: nothing bends, it is one linear map"
                )
            ),
        ),
        Probe("each position alone", _moved, equals(), given="7 positions, number 3 changed; which move?"),
        Probe("|x₁ − x₂| and its negative, by hand", _difference, equals(), given=_two_channels()),
        Probe("equals the reference", lambda cls: _filled(cls, 8)(randn(3, 5, 8)), equals()),
        Probe(
            "a view that is not contiguous",
            lambda cls: _filled(cls, 8, 12)(randn(5, 3, 8).transpose(0, 1)),
            equals(),
        ),
    ],
    misconceptions=[
        AsItWasGiven,
        TheExpansionIsForgotten,
        BentAfterTheDownProjection,
        NothingBends,
        BentTwice,
        GELU_instead_of_ReLU,
        TheResidualIsAddedHere,
        NoBiases,
    ],
)


# ── 1.5.c  SwiGLU at equal cost ──────────────────────────────────────────────────────────────────────────


class _SwiGLU(nn.Module):
    bias = False

    def __init__(self, d_model: int, d_mlp: int | None = None, multiple_of: int = 32) -> None:
        super().__init__()
        d_mlp = self.width(d_model, multiple_of) if d_mlp is None else d_mlp
        self.gate = nn.Linear(d_model, d_mlp, bias=self.bias)
        self.up = nn.Linear(d_model, d_mlp, bias=self.bias)
        self.down = nn.Linear(d_mlp, d_model, bias=self.bias)

    def width(self, d_model: int, multiple_of: int) -> int:
        return -(-8 * d_model // (3 * multiple_of)) * multiple_of

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mix(self.gate(x), self.up(x)))


class ratio_4(_SwiGLU):
    """You took 4 · d_model; with three matrices instead of two that is half as large again as the plain MLP,
    and equal cost asks for 8/3 · d_model."""

    def width(self, d_model: int, multiple_of: int) -> int:
        return -(-4 * d_model // multiple_of) * multiple_of


class RoundedDown(_SwiGLU):
    """The width is rounded down to a multiple; the convention is up, so that the layer is never smaller than
    the one it replaces."""

    def width(self, d_model: int, multiple_of: int) -> int:
        return 8 * d_model // (3 * multiple_of) * multiple_of


class OneMultipleTooMany(_SwiGLU):
    """You round down and add one multiple, which goes wrong when 8/3 · d_model already is a multiple: take
    the ceiling."""

    def width(self, d_model: int, multiple_of: int) -> int:
        return (8 * d_model // (3 * multiple_of) + 1) * multiple_of


class BiasesLeftOn(_SwiGLU):
    """The projections have biases, nn.Linear's default; Llama's layer has none, so its weights would leave
    yours uninitialized."""

    bias = True


class TheGateIsNotBent(_SwiGLU):
    """You multiply the two branches, but no SiLU is applied: that is the bilinear variant, x·W_gate ⊙
    x·W_up."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * up


class SiLU_on_the_other_branch(_SwiGLU):
    """SiLU went around up(x); it belongs around gate(x), or pretrained weights do not fit."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * F.silu(up)


class SigmoidGate(_SwiGLU):
    """The gate is a sigmoid, as in the original GLU; SwiGLU's is SiLU, which is gate · sigmoid(gate)."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate.sigmoid() * up


class TheProductIsBent(_SwiGLU):
    """SiLU is applied to the product of the branches; it belongs on the gate alone, before multiplying."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate * up)


def _widths(cls: Any) -> dict[str, int]:
    """The default d_mlp for several d_model; on the meta device, where weights take no memory."""
    with torch.device("meta"):
        found = {f"SwiGLU({d})": cls(d).up.weight.shape[0] for d in (24, 96, 100, 105, 768)}
        found["SwiGLU(101, multiple_of=1)"] = cls(101, multiple_of=1).up.weight.shape[0]  # 269 + 1/3
        found["SwiGLU(4096, multiple_of=256)"] = cls(4096, multiple_of=256).up.weight.shape[0]
    return found


def _widths_right(yours: Any) -> str | None:
    for call, width in _widths(_SwiGLU).items():
        if yours[call] != width:
            return f"{call} has d_mlp {yours[call]}, expected {width}"
    return None


@torch.no_grad()
def _one_unit(cls: Any) -> Tensor:
    layer = cls(1, d_mlp=1)
    for name, weight in (("gate", 2.0), ("up", 3.0), ("down", 1.0)):
        getattr(layer, name).weight.fill_(weight)
    return layer(torch.tensor([[1.0]]))


@torch.no_grad()
def _closed(cls: Any) -> Tensor:
    layer = _filled(cls, 8, d_mlp=12)
    layer.gate.weight.zero_()
    return layer(randn(2, 3, 8))


SWIGLU = Exercise(
    id="1.5.c",
    symbol="SwiGLU",
    reference=_SwiGLU,
    look_again="SwiGLU, named",
    probes=[
        Probe(
            "parameters",
            lambda cls: _shapes(cls(6, d_mlp=10)),
            same_parameters,
            given="SwiGLU(6, d_mlp=10)",
        ),
        Probe("the default width", _widths, holds(_widths_right)),
        Probe("shape and dtype", lambda cls: _filled(cls, 6)(randn(2, 5, 6)), same_shape),
        Probe("a closed gate lets nothing through", _closed, equals(), given="W_gate = 0"),
        Probe(
            "one unit, by hand",
            _one_unit,
            equals(digits=4),
            given="x = 1, W_gate = 2, W_up = 3, W_down = 1: SiLU(2) · 3",
        ),
        Probe("equals the reference", lambda cls: _filled(cls, 8, d_mlp=12)(randn(3, 5, 8)), equals()),
        Probe(
            "large inputs",
            lambda cls: _filled(cls, 8, multiple_of=8)(100 * randn(4, 8, seed=3)),
            equals(1e-2, 1e-4),
        ),
    ],
    misconceptions=[
        ratio_4,
        RoundedDown,
        OneMultipleTooMany,
        BiasesLeftOn,
        TheGateIsNotBent,
        SiLU_on_the_other_branch,
        SigmoidGate,
        TheProductIsBent,
    ],
)

EXERCISES = [GELU, MEND, SWIGLU]
