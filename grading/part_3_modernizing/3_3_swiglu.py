"""Exercises of lesson 3.3, SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, fill_by_name, randn, same_parameters, same_shape
from tutorial_lib.checks.spec import Exercise, Probe
from tutorial_lib.core.swiglu import SwiGLU, gated_width

# ── 3.3.a  An inner product, written by hand ─────────────────────────────────────────────────────────────

Weights = tuple[Tensor, Tensor, Tensor]


def _blocks(n: int, a: float = -1.0, b: float = -1.0) -> Weights:
    """Gates read a and `a` times a; contents are b and `b` times b."""
    one, none = torch.eye(n), torch.zeros(n, n)
    gate = torch.cat([torch.cat([one, none], dim=1), torch.cat([a * one, none], dim=1)])
    up = torch.cat([torch.cat([none, one], dim=1), torch.cat([none, b * one], dim=1)])
    return gate, up, torch.ones(1, 2 * n)


def inner_product_weights(n: int) -> Weights:
    """The reference."""
    return _blocks(n)


def the_minus_is_missing(n: int) -> Weights:
    """The two units are added: silu(a)·b + silu(-a)·b is nearly |a|·b for large a. Their difference gives
    a·b, so the second content (or the second weight of down) needs a minus."""
    return _blocks(n, b=1.0)


def one_unit_for_a_product(n: int) -> Weights:
    """silu(a)·b alone is a·b only while a is large and positive; for a negative a the gate is shut. A second
    unit must look after those."""
    gate, up, down = _blocks(n)
    down[:, n:] = 0
    return gate, up, down


def one_unit_doubled(n: int) -> Weights:
    """2·silu(a)·b starts like a·b at zero, where the slope of silu is one half, but it is no line: a second
    unit that reads -a straightens it."""
    gate, up, down = _blocks(n)
    down[:, :n], down[:, n:] = 2, 0
    return gate, up, down


def twice_the_same_unit(n: int) -> Weights:
    """Both units read a and say b, so the result is 2·silu(a)·b. The second gate must read -a, and its
    content must be -b."""
    return _blocks(n, a=1.0, b=1.0)


def a_with_itself(n: int) -> Weights:
    """Gate and content both read a, so you get a². Up has to read the right half of x."""
    gate, _, down = _blocks(n)
    return gate, gate.clone(), down


def every_a_with_every_b(n: int) -> Weights:
    """Each content is the sum of all b, so you get (sum of a)·(sum of b). Unit i needs b_i alone: an identity
    block, not ones."""
    gate, up, down = _blocks(n)
    up = torch.cat([torch.zeros(2 * n, n), torch.ones(2 * n, n)], dim=1)
    up[n:] *= -1
    return gate, up, down


def a_and_b_in_turns(n: int) -> Weights:
    """Your weights expect a₁ b₁ a₂ b₂ …, but here all of a comes first, then all of b."""
    gate, up, down = _blocks(n)
    order = torch.arange(2 * n).view(n, 2).T.flatten()  # where a, and then b, would stand in a₁ b₁ a₂ b₂ …
    back = order.argsort()
    return gate[:, back], up[:, back], down


def half_of_it(n: int) -> Weights:
    """Everything is half as large as it should be: silu(z) − silu(−z) is z itself, so down needs ones."""
    gate, up, down = _blocks(n)
    return gate, up, down / 2


def _apply(weights: Weights, x: Tensor) -> Tensor:
    gate, up, down = weights
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _six() -> Tensor:
    return torch.tensor([[3.0, 2.0], [-3.0, 2.0], [3.0, -2.0], [0.0, 5.0]])


INNER = Exercise(
    id="3.3.a",
    symbol="inner_product_weights",
    reference=inner_product_weights,
    look_again="Two units that multiply",
    probes=[
        Probe("three matrices of the right shapes", lambda f: f(3), same_shape, given="n = 3"),
        Probe("one product, by hand", lambda f: _apply(f(1), _six()), equals(), given=_six()),
        Probe(
            "two products, summed",
            lambda f: _apply(f(2), torch.tensor([[1.0, 2.0, 10.0, 100.0]])),
            equals(),
            given="a = (1, 2), b = (10, 100): 10 + 200",
        ),
        Probe("equals the inner product", lambda f: _apply(f(5), randn(20, 10)), equals()),
        Probe(
            "large numbers",
            lambda f: _apply(f(1), torch.tensor([[200.0, 100.0], [-300.0, 50.0]])),
            equals(1e-2),
            given="a = 200, b = 100, and a = -300, b = 50",
        ),
    ],
    misconceptions=[
        the_minus_is_missing,
        one_unit_for_a_product,
        one_unit_doubled,
        twice_the_same_unit,
        a_with_itself,
        every_a_with_every_b,
        a_and_b_in_turns,
        half_of_it,
    ],
)


# ── 3.3.b  The layer that passes the parity test ─────────────────────────────────────────────────────────


class _GatedMLP(SwiGLU):
    """The reference, in steps that the misconceptions below replace one at a time."""

    def __init__(self, d_model: int, d_mlp: int | None = None, multiple_of: int = 8) -> None:
        super().__init__(d_model, self.width(d_model, multiple_of) if d_mlp is None else d_mlp)

    def width(self, d_model: int, multiple_of: int) -> int:
        return gated_width(d_model, multiple_of)

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mix(self.gate(x), self.up(x)))

    names = ("gate", "up", "down")

    @torch.no_grad()
    def load_llama(self, weights: dict[str, Tensor]) -> None:
        for ours, theirs in zip(self.names, ("gate", "up", "down"), strict=True):
            getattr(self, ours).weight.copy_(weights[f"{theirs}_proj.weight"])


class OnlyForwardIsMended(_GatedMLP):
    """forward is right now, but load_llama still puts Llama's gate into up, and its up into gate. The shapes
    are the same, so nothing complains."""

    names = ("up", "gate", "down")


class OnlyTheLoaderIsMended(_GatedMLP):
    """The weights now arrive where they belong, but forward still bends up in place of the gate: before, two
    bugs canceled each other."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * F.silu(up)


class OnlyTheWidthIsMended(OnlyTheLoaderIsMended):
    """silu is still on up, so `up` is what opens and shuts. That the outputs with Llama's weights are right
    comes from load_llama, which exchanges the two: mend both."""

    names = ("up", "gate", "down")


class AsItWasGiven(OnlyTheWidthIsMended):
    """All three bugs are still there. Begin with the width: three matrices at ratio 4 are half again as many
    parameters as a plain MLP has; equal cost is 8/3."""

    def width(self, d_model: int, multiple_of: int) -> int:
        return -(-4 * d_model // multiple_of) * multiple_of


class RoundedDown(_GatedMLP):
    """The width is a multiple as asked, but the one below 8/3 · d_model. Take the ceiling."""

    def width(self, d_model: int, multiple_of: int) -> int:
        return 8 * d_model // (3 * multiple_of) * multiple_of


class TheProductIsBent(_GatedMLP):
    """You bent gate · up. Then neither branch decides: only the gate goes through silu, and the product is
    left as it is."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate * up)


class BothAreBent(_GatedMLP):
    """silu is on both branches, so a content can hardly be negative any more. Only the gate is bent."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * F.silu(up)


class ASigmoidForAGate(_GatedMLP):
    """This is the GLU of 2017, sigmoid(gate) · up. SwiGLU has silu there, which is z · sigmoid(z)."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate.sigmoid() * up


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


@torch.no_grad()
def _one_unit_layer(cls: Any) -> Tensor:
    """The gate reads channel 0, up reads channel 1, down writes to channel 0."""
    layer = cls(2, 1)
    layer.gate.weight.copy_(torch.tensor([[1.0, 0.0]]))
    layer.up.weight.copy_(torch.tensor([[0.0, 1.0]]))
    layer.down.weight.copy_(torch.tensor([[1.0], [0.0]]))
    return layer(torch.tensor([[2.0, 3.0], [-20.0, 1.0], [1.0, -20.0]]))[:, 0]


def _llama(d_model: int = 6, d_mlp: int = 10) -> dict[str, Tensor]:
    return {
        "gate_proj.weight": randn(d_mlp, d_model, seed=1),
        "up_proj.weight": randn(d_mlp, d_model, seed=2),
        "down_proj.weight": randn(d_model, d_mlp, seed=3),
    }


def _loaded(cls: Any) -> Any:
    layer = cls(6, 10)
    layer.load_llama(_llama())
    return layer


MEND = Exercise(
    id="3.3.b",
    symbol="GatedMLP",
    reference=_GatedMLP,
    look_again="What goes wrong",
    probes=[
        Probe(
            "parameters at the default width", lambda cls: _shapes(cls(24)), same_parameters, "GatedMLP(24)"
        ),
        Probe(
            "the width is rounded up",
            lambda cls: _shapes(cls(100, multiple_of=32)),
            same_parameters,
            "GatedMLP(100, multiple_of=32)",
        ),
        Probe(
            "parameters at a chosen width",
            lambda cls: _shapes(cls(6, d_mlp=10)),
            same_parameters,
            "GatedMLP(6, d_mlp=10)",
        ),
        Probe(
            "shape and dtype",
            lambda cls: (fill_by_name(cls(6))(randn(2, 5, 6)), fill_by_name(cls(6))(randn(6))),
            same_shape,
        ),
        Probe(
            "one unit, by hand",
            _one_unit_layer,
            equals(),
            given="(gate, up) = (2, 3), then (-20, 1), then (1, -20); a gate of -20 is shut",
        ),
        Probe("equals the reference", lambda cls: fill_by_name(cls(8, 12))(randn(3, 5, 8)), equals()),
        Probe(
            "Llama's weights arrive under their own names",
            lambda cls: tuple(getattr(_loaded(cls), name).weight for name in ("gate", "up", "down")),
            equals(),
            given="value 1 is gate.weight, 2 up.weight, 3 down.weight",
        ),
        Probe("Llama's outputs", lambda cls: _loaded(cls)(randn(4, 6, seed=5)), equals()),
        Probe(
            "numbers in the hundreds", lambda cls: _loaded(cls)(100 * randn(4, 6, seed=6)), equals(1e-1, 1e-3)
        ),
    ],
    misconceptions=[
        AsItWasGiven,
        RoundedDown,
        OnlyTheWidthIsMended,
        OnlyTheLoaderIsMended,
        OnlyForwardIsMended,
        TheProductIsBent,
        BothAreBent,
        ASigmoidForAGate,
    ],
)


# ── 3.3.c  One matrix for two ────────────────────────────────────────────────────────────────────────────


class _Fused(nn.Module):
    """The reference, in steps that the misconceptions below replace one at a time."""

    def __init__(self, d_model: int, d_mlp: int, interleaved: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_mlp, bias=False)
        self.down = nn.Linear(d_mlp, d_model, bias=False)
        self.interleaved = interleaved

    def cut(self, both: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return both[..., 0::2], both[..., 1::2]
        gate, up = both.chunk(2, dim=-1)
        return gate, up

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack([gate, up], dim=1).flatten(0, 1)
        return torch.cat([gate, up])

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.cut(self.gate_up(x))
        return self.down(F.silu(gate) * up)

    @torch.no_grad()
    def load_separate(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self.gate_up.weight.copy_(self.join(gate, up))
        self.down.weight.copy_(down)


class UpFirst(_Fused):
    """You put up before the gate, in loading and in forward. That agrees with itself and with nobody else:
    public checkpoints have the gate first, in both layouts."""

    def cut(self, both: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = super().cut(both)
        return up, gate

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().join(up, gate)


class LoadedUpFirst(_Fused):
    """forward takes the gate first, as it should, but load_separate writes up first: gate and up are
    exchanged."""

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().join(up, gate)


class AlwaysStacked(_Fused):
    """`interleaved` is not looked at: with it, gate and up come in turns, and a cut in halves mixes them."""

    def __init__(self, d_model: int, d_mlp: int, interleaved: bool = False) -> None:
        super().__init__(d_model, d_mlp)


class AlwaysInTurns(_Fused):
    """Every second channel is taken for the gate, in the stacked layout too, where the gate is the first
    half."""

    def __init__(self, d_model: int, d_mlp: int, interleaved: bool = False) -> None:
        super().__init__(d_model, d_mlp, interleaved=True)


class InterleavedOnTheWayOutOnly(_Fused):
    """forward reads the rows in turns, but load_separate has stacked them. The rows must be dealt in turns
    when they are written, too."""

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.cat([gate, up])


class ColumnsInTurns(_Fused):
    """You interleaved the numbers within the rows. A whole row belongs to one unit: stack along a new
    dimension after the rows (dim=1), and flatten the first two."""

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack([gate, up], dim=2).flatten(1).view(2 * gate.shape[0], -1)
        return torch.cat([gate, up])


class NotDoubled(_Fused):
    """gate_up has d_mlp rows, so gate and up have half of the width each. d_mlp is the width of each: 2 ·
    d_mlp rows."""

    def __init__(self, d_model: int, d_mlp: int, interleaved: bool = False) -> None:
        super().__init__(d_model, d_mlp, interleaved)
        self.gate_up = nn.Linear(d_model, d_mlp, bias=False)
        self.down = nn.Linear(d_mlp // 2, d_model, bias=False)


def _matrices(d_model: int = 6, d_mlp: int = 10) -> Weights:
    return randn(d_mlp, d_model, seed=1), randn(d_mlp, d_model, seed=2), randn(d_model, d_mlp, seed=3)


@torch.no_grad()
def _rows_by_hand(cls: Any, interleaved: bool) -> Tensor:
    """Two units: rows of `gate_up` that give the numbers 1, 2, 3, 4 for x = (1, 0); down writes each unit out."""
    layer = cls(2, 2, interleaved)
    layer.gate_up.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]]))
    layer.down.weight.copy_(torch.eye(2))
    return layer(torch.tensor([1.0, 0.0]))


def _filled_rows(cls: Any, interleaved: bool) -> Tensor:
    layer = cls(1, 3, interleaved)
    gate, up = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[-1.0], [-2.0], [-3.0]])
    layer.load_separate(gate, up, torch.tensor([[1.0, 1.0, 1.0]]))
    return layer.gate_up.weight.detach()[:, 0]


def _all_filled(cls: Any, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    layer = cls(6, 10, interleaved)
    layer.load_separate(*_matrices())
    return layer.gate_up.weight, layer.down.weight, layer(randn(2, 5, 6, seed=4))


def _both(ask: Any) -> Any:
    return lambda cls: (ask(cls, False), ask(cls, True))


FUSE = Exercise(
    id="3.3.c",
    symbol="FusedSwiGLU",
    reference=_Fused,
    look_again="The same as Llama's",
    probes=[
        Probe(
            "parameters",
            lambda cls: _shapes(cls(6, 10)),
            same_parameters,
            given="FusedSwiGLU(6, 10)",
        ),
        Probe(
            "shape and dtype",
            _both(lambda cls, turns: fill_by_name(cls(6, 10, turns))(randn(2, 5, 6))),
            same_shape,
        ),
        Probe(
            "two units by hand, stacked",
            lambda cls: _rows_by_hand(cls, False),
            equals(),
            given="gate_up(x) is 1, 2, 3, 4: the gates are 1 and 2, the contents 3 and 4",
        ),
        Probe(
            "two units by hand, interleaved",
            lambda cls: _rows_by_hand(cls, True),
            equals(),
            given="gate_up(x) is 1, 2, 3, 4: the gates are 1 and 3, the contents 2 and 4",
        ),
        Probe(
            "equals the reference, both layouts",
            _both(lambda cls, turns: fill_by_name(cls(6, 10, turns))(randn(3, 7, 6, seed=2))),
            equals(),
        ),
        Probe(
            "the order of the rows that load_separate writes",
            _both(_filled_rows),
            equals(),
            given="gate rows 1, 2, 3 and up rows -1, -2, -3; value 1 is stacked, value 2 interleaved",
        ),
        Probe("the same as three matrices, stacked", lambda cls: _all_filled(cls, False), equals()),
        Probe("the same as three matrices, interleaved", lambda cls: _all_filled(cls, True), equals()),
        Probe(
            "one token alone",
            _both(lambda cls, turns: fill_by_name(cls(6, 10, turns))(randn(6, seed=3))),
            equals(),
        ),
        Probe(
            "stacked is the default",
            lambda cls: fill_by_name(cls(6, 10))(randn(4, 6, seed=3)),
            equals(),
        ),
    ],
    misconceptions=[
        UpFirst,
        LoadedUpFirst,
        AlwaysStacked,
        AlwaysInTurns,
        InterleavedOnTheWayOutOnly,
        ColumnsInTurns,
        NotDoubled,
    ],
)

EXERCISES = [INNER, MEND, FUSE]
