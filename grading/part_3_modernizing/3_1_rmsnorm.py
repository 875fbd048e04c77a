"""Exercises of lesson 3.1, RMSNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, fill_by_name, holds, randn, same_parameters, same_shape
from tutorial_lib.checks.spec import Exercise, Failure, Misconception, Probe, same_value
from tutorial_lib.core import norms
from tutorial_lib.core.gpt import GPT, GPTConfig

# --- 3.1.a  the backward pass -------------------------------------------------------------------------------

Gradients = tuple[Tensor, Tensor]


def _parts(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)  # (..., 1)
    return r, x * r


def _to_weight(grad: Tensor, x_hat: Tensor) -> Tensor:
    return (grad * x_hat).reshape(-1, x_hat.shape[-1]).sum(dim=0)


def _mean(values: Tensor) -> Tensor:
    return values.mean(dim=-1, keepdim=True)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> Gradients:
    r, x_hat = _parts(x, eps)
    u = grad * weight
    return r * (u - x_hat * _mean(u * x_hat)), _to_weight(grad, x_hat)


def the_scale_taken_for_a_constant(grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> Gradients:
    """You differentiated x · r with r held fixed. But r depends on every x_j, and that gives the second term,
    which takes out the component along x."""
    r, x_hat = _parts(x, eps)
    return r * grad * weight, _to_weight(grad, x_hat)


def a_sum_where_a_mean_belongs(grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> Gradients:
    """The second term has a sum over the channels; r holds a mean of squares, so its derivative brings a
    factor 1/D, and the sum becomes a mean."""
    r, x_hat = _parts(x, eps)
    u = grad * weight
    return r * (u - x_hat * (u * x_hat).sum(dim=-1, keepdim=True)), _to_weight(grad, x_hat)


def the_weight_multiplied_at_the_end(grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> Gradients:
    """The weight stands behind the normalization, so on the way back it comes first: u = grad · weight, and
    everything after that uses u."""
    r, x_hat = _parts(x, eps)
    return r * (grad - x_hat * _mean(grad * x_hat)) * weight, _to_weight(grad, x_hat)


def the_weight_forgotten_on_the_way_to_x(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> Gradients:
    """grad is the gradient at the output y = x̂ · weight. At x̂ it is u = grad · weight; with weights of one
    you would never notice."""
    return _backward(grad, x, torch.ones_like(weight), eps)


def the_backward_of_LayerNorm(grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> Gradients:
    """You also subtracted the mean of u. That is the backward of a recentering, and RMSNorm has none."""
    r, x_hat = _parts(x, eps)
    u = grad * weight
    return r * (u - _mean(u) - x_hat * _mean(u * x_hat)), _to_weight(grad, x_hat)


def one_factor_r_too_few(grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> Gradients:
    """Only the first term was multiplied by r. dr/dx_j = −r² x̂_j / D, and with x = x̂ / r one r is left
    over: it stands before both terms."""
    r, x_hat = _parts(x, eps)
    u = grad * weight
    return r * u - x_hat * _mean(u * x_hat), _to_weight(grad, x_hat)


def the_gradient_of_the_weight_from_x(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> Gradients:
    """grad_weight is grad times what the weight was multiplied with, and that is the normalized x̂, not x."""
    return _backward(grad, x, weight, eps)[0], _to_weight(grad, x)


def the_gradient_of_the_weight_averaged_over_tokens(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> Gradients:
    """All tokens share one weight, so their contributions add up. If the loss was a mean, the division is in
    grad already."""
    dx, dw = _backward(grad, x, weight, eps)
    return dx, dw / (x.numel() // x.shape[-1])


def _case(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """An upstream gradient, an x and a weight."""
    return (
        randn(*shape, seed=seed),
        2 * randn(*shape, seed=seed + 1),
        1 + 0.3 * randn(shape[-1], seed=seed + 2),
    )


def _along_x(f: Callable[..., Gradients]) -> tuple[Tensor, float]:
    grad, x, weight = _case(4, 3, 16)
    dx = f(grad, x, weight, 0.0)[0]
    cosines = torch.nn.functional.cosine_similarity(x, dx, dim=-1)
    return dx, cosines.abs().max().item()


def _not_orthogonal(result: tuple[Tensor, float]) -> str | None:
    if result[1] < 1e-4:
        return None
    return (
        f"with eps = 0 the gradient has a component along x (cosine {result[1]:.2f}), though a longer x "
        "gives the same output"
    )


def _by_hand(f: Callable[..., Gradients]) -> Gradients:
    return f(
        torch.tensor([[0.0, 3.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 3.0, 1.0, 5.0]]),
        torch.tensor([1.0, 2.0, 1.0, 1.0]),
        0.0,
    )


def _inputs_after(f: Callable[..., Gradients]) -> bool:
    case = _case(2, 3, 8)
    f(*case)
    return all(torch.equal(a, b) for a, b in zip(case, _case(2, 3, 8), strict=True))


def _written_into(same: bool) -> str | None:
    return None if same else "grad, x or weight was overwritten, as by x *= …: write x = x * …"


BACKWARD = Exercise(
    id="3.1.a",
    symbol="rms_norm_backward",
    reference=_backward,
    look_again="The gradient, by hand",
    probes=[
        Probe("shapes and dtypes of both gradients", lambda f: f(*_case(2, 5, 8)), same_shape),
        Probe("nothing along x", _along_x, holds(_not_orthogonal)),
        Probe(
            "one token by hand",
            _by_hand,
            equals(),
            given="x = [1, 3, 1, 5], whose RMS is 3; weight = [1, 2, 1, 1]; grad = [0, 3, 0, 0]; eps = 0",
        ),
        Probe("equals the reference", lambda f: f(*_case(3, 7, 16, seed=4)), equals()),
        Probe(
            "any number of leading dimensions",
            lambda f: [x for shape in ((6,), (4, 6), (2, 3, 4, 6)) for x in f(*_case(*shape, seed=7))],
            equals(),
            given="x of shape (6,), of (4, 6) and of (2, 3, 4, 6); grad_weight is always (6,)",
        ),
        Probe(
            "eps = 2 goes under the root",
            lambda f: f(*_case(2, 3, 8, seed=10), 2.0),
            equals(),
            given="eps = 2",
        ),
        Probe(
            "a tiny token: eps is 1e-5 unless told otherwise",
            lambda f: f(randn(1, 2, 8), randn(1, 2, 8, seed=1) / 500, randn(8, seed=2)),
            equals(),
            given="x = randn(1, 2, 8) / 500",
        ),
        Probe(
            "float64 stays float64, to ten digits",
            lambda f: f(*(t.double() for t in _case(2, 3, 8, seed=13))),
            equals(atol=1e-10, rtol=1e-10),
        ),
        Probe("the inputs are as before", _inputs_after, holds(_written_into)),
    ],
    misconceptions=[
        the_scale_taken_for_a_constant,
        a_sum_where_a_mean_belongs,
        the_weight_multiplied_at_the_end,
        the_weight_forgotten_on_the_way_to_x,
        the_backward_of_LayerNorm,
        one_factor_r_too_few,
        the_gradient_of_the_weight_from_x,
        the_gradient_of_the_weight_averaged_over_tokens,
    ],
)

# --- 3.1.b  in 16 bits --------------------------------------------------------------------------------------

Forward = Callable[[nn.Module, Tensor], Tensor]


def _norm_like(forward: Forward) -> type[nn.Module]:
    """RMSNorm with another way forward."""

    class Wrong(nn.Module):
        def __init__(self, d_model: int, eps: float = 1e-5) -> None:
            super().__init__()
            self.eps = eps
            self.weight = nn.Parameter(torch.ones(d_model))

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Wrong


def _scale(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _by_std(self: nn.Module, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().var(dim=-1, correction=0, keepdim=True) + self.eps)
    return (x.float() * scale).type_as(x) * self.weight


def _eps_outside(self: nn.Module, x: Tensor) -> Tensor:
    rms = x.float().square().mean(dim=-1, keepdim=True).sqrt()
    return (x.float() / (rms + self.eps)).type_as(x) * self.weight


def _own_dtype(self: nn.Module, x: Tensor) -> Tensor:
    return x * _scale(x, self.eps) * self.weight


def _squared_too_early(self: nn.Module, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.square().float().mean(dim=-1, keepdim=True) + self.eps)
    return (x.float() * scale).type_as(x) * self.weight


def _scale_rounded(self: nn.Module, x: Tensor) -> Tensor:
    return x * _scale(x.float(), self.eps).type_as(x) * self.weight


def _weight_before_cast(self: nn.Module, x: Tensor) -> Tensor:
    return (x.float() * _scale(x.float(), self.eps) * self.weight.float()).type_as(x)


def _stays_fp32(self: nn.Module, x: Tensor) -> Tensor:
    return x.float() * _scale(x.float(), self.eps) * self.weight


def _detached(self: nn.Module, x: Tensor) -> Tensor:
    return (x.float() * _scale(x.float(), self.eps).detach()).type_as(x) * self.weight


def _trained(cls: type[nn.Module], d_model: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The norm with a weight around 1, as a trained one has."""
    layer = cls(d_model)
    with torch.no_grad():
        layer.weight.copy_(1 + 0.3 * randn(d_model, seed=9))  # type: ignore[operator, union-attr]
    return layer.to(dtype)


def _with_offset(cls: type[nn.Module]) -> tuple[Tensor, float]:
    out = cls(64)(randn(5, 64) + 3)
    return out, out.square().mean().item()


def _not_one(result: tuple[Tensor, float]) -> str | None:
    if abs(result[1] - 1) < 1e-3:
        return None
    return f"the mean square of the output is {result[1]:.2f}, and should be 1 whatever comes in"


def _half(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float16)


def _mostly_the_same_bits(yours: Any, expected: Any) -> Failure | None:
    """A judge: another order of fp32 arithmetic may flip one bit in a thousand, another cast flips a fourth."""
    if wrong := same_shape(yours, expected):
        return wrong
    differ = (yours != expected).float().mean().item()
    if differ < 0.01:
        return None
    return Failure(f"{differ:.0%} of the numbers have other bits than those of the order that was asked for")


def _gradient(cls: type[nn.Module]) -> tuple[Tensor, float]:
    x = randn(6, 16, seed=5).requires_grad_()
    (dx,) = torch.autograd.grad(cls(16)(x), x, randn(6, 16, seed=6))
    return dx, torch.nn.functional.cosine_similarity(x, dx, dim=-1).abs().max().item()


def _pushes_along_x(result: tuple[Tensor, float]) -> str | None:
    if result[1] < 1e-3:
        return None
    return f"the outputs are right, but x · dx is not 0 (cosine {result[1]:.2f}): the scale gets no gradient"


def _x_as_before(cls: type[nn.Module]) -> bool:
    x = randn(2, 5, 8, seed=6)
    with torch.no_grad():
        cls(8)(x)
    return torch.equal(x, randn(2, 5, 8, seed=6))


IN_16_BITS = Exercise(
    id="3.1.b",
    symbol="RMSNorm",
    reference=norms.RMSNorm,
    look_again="Sixteen bits",
    probes=[
        Probe(
            "one parameter, weight",
            lambda cls: {name: tuple(p.shape) for name, p in cls(6).named_parameters()},
            same_parameters,
        ),
        Probe(
            "shape and dtype, in fp32, fp16 and bf16",
            lambda cls: [
                _trained(cls, 8, dtype)(randn(2, 5, 8).to(dtype))
                for dtype in (torch.float32, torch.float16, torch.bfloat16)
            ],
            same_shape,
        ),
        Probe("mean square 1, also with an offset", _with_offset, holds(_not_one), given="randn(5, 64) + 3"),
        Probe(
            "one token by hand",
            lambda cls: cls(4)(torch.tensor([[1.0, 3.0, 1.0, 5.0]])),
            equals(),
            given=torch.tensor([[1.0, 3.0, 1.0, 5.0]]),
        ),
        Probe(
            "eps = 16 goes under the root",
            lambda cls: cls(4, eps=16.0)(torch.tensor([[1.0, 3.0, 1.0, 5.0]])),
            equals(),
            given="[1, 3, 1, 5] with mean square 9, and √(9 + 16) = 5",
        ),
        Probe(
            "equals the reference",
            lambda cls: _trained(cls, 16)(randn(3, 7, 16, seed=1)),
            equals(),
        ),
        Probe(
            "any number of leading dimensions, not contiguous",
            lambda cls: [
                _trained(cls, 6)(x)
                for x in (randn(6), randn(4, 6, seed=1), randn(2, 3, 4, 6, seed=2), randn(6, 5, seed=3).T)
            ],
            equals(),
        ),
        Probe(
            "fp16: a channel of 256",
            lambda cls: cls(4).half()(_half(256, 32, 32, 32)),
            equals(atol=4e-3, rtol=4e-3),
            given=_half(256, 32, 32, 32),
        ),
        Probe(
            "fp16: a token of 0.0002",
            lambda cls: cls(4, eps=1e-8).half()(_half(2e-4, -2e-4, 2e-4, 2e-4)),
            equals(atol=4e-3, rtol=4e-3),
            given="0.0002 four times, one of them negative, with eps = 1e-8",
        ),
        Probe(
            "bf16: back to 16 bits first, then the weight",
            lambda cls: _trained(cls, 64, torch.bfloat16)(randn(40, 64, seed=8).bfloat16()),
            _mostly_the_same_bits,
        ),
        Probe(
            "a tiny token, and one of zeros",
            lambda cls: cls(4)(torch.tensor([[0.001, 0.003, 0.001, 0.005], [0.0] * 4])),
            equals(),
            given=torch.tensor([[0.001, 0.003, 0.001, 0.005], [0.0] * 4]),
        ),
        Probe(
            "x is as before",
            _x_as_before,
            holds(lambda same: None if same else "the x of the caller was overwritten, as by x *= …"),
        ),
        Probe("no gradient along x", _gradient, holds(_pushes_along_x)),
    ],
    misconceptions=[
        Misconception(
            "still the standard deviation",
            _norm_like(_by_std),
            "`std` and `var` subtract the mean before they square, so a token with an offset comes out too "
            "large. RMSNorm takes the mean of the squares of x as it is.",
        ),
        Misconception(
            "eps outside the root",
            _norm_like(_eps_outside),
            "eps was added to the root mean square; the equation adds it to the mean square, under the root.",
        ),
        Misconception(
            "the statistic in 16 bits",
            _norm_like(_own_dtype),
            "In fp16, 256² is infinity, its root too, and one over it is 0; and 0.0002² is 0. Take the mean of "
            "the squares in fp32.",
        ),
        Misconception(
            "cast after squaring",
            _norm_like(_squared_too_early),
            "The mean is taken in fp32, but the squares were computed before the cast, and there 256² has "
            "already become infinity: x.float() first, then square.",
        ),
        Misconception(
            "the scale rounded to 16 bits",
            _norm_like(_scale_rounded),
            "The scale was computed in fp32 and then rounded, so that every channel of a token is off by the "
            "same factor: multiply in fp32, and round the product.",
        ),
        Misconception(
            "the weight before the cast",
            _norm_like(_weight_before_cast),
            "This is Gemma's order: multiply by the weight in fp32, cast last. It is as good, but Llama, and so "
            "this course, casts first, and with its weights the bits should agree.",
        ),
        Misconception(
            "the result stays in fp32",
            _norm_like(_stays_fp32),
            "What came in as 16 bits went out as 32, and every layer behind it would do the same or complain: "
            "cast the normalized x back to the type of x.",
        ),
        Misconception(
            "the scale is cut off from autograd",
            _norm_like(_detached),
            "The output is right, but the scale was detached (or computed under no_grad), so the gradient "
            "keeps a component along x that should have been taken out.",
        ),
    ],
)

# --- 3.1.c  from LayerNorm to RMSNorm -----------------------------------------------------------------------


def _rms_of(old: nn.Module) -> norms.RMSNorm:
    new = norms.RMSNorm(len(old.weight), old.eps)  # type: ignore[arg-type]
    new.load_state_dict({"weight": old.weight})
    return new


def _swap_norms(model: GPT, make: Callable[[nn.Module], nn.Module] = _rms_of) -> GPT:
    for block in model.blocks:
        block.norm1, block.norm2 = make(block.norm1), make(block.norm2)  # type: ignore[arg-type]
    model.norm = make(model.norm)  # type: ignore[assignment]
    return model


@torch.no_grad()
def _convert(
    model: GPT,
    tables: tuple[str, ...] = ("tokens", "positions"),
    branches: bool = True,
    output_dim: int = 0,
    untie: bool = True,
    make: Callable[[nn.Module], nn.Module] = _rms_of,
    in_place: bool = False,
) -> GPT:
    """The reference, with a switch for each way to get it wrong."""
    new = model if in_place else copy.deepcopy(model)
    if untie:
        new.head.weight = nn.Parameter(model.head.weight.clone())
    for name in tables:
        table = getattr(new, name).weight  # (V or T, D)
        table -= table.mean(dim=1, keepdim=True)
    for block in new.blocks if branches else ():
        for linear in (block.attn.out, block.mlp.down):  # type: ignore[union-attr]
            weight = linear.weight  # type: ignore[union-attr]
            weight -= weight.mean(dim=output_dim, keepdim=True)  # type: ignore[operator, union-attr, misc]
    return _swap_norms(new, make)


def _to_rms_norm(model: GPT) -> GPT:
    return _convert(model)


def only_the_norms_exchanged(model: GPT) -> GPT:
    """The norms are RMSNorms now, but the stream still has a mean, which nobody subtracts any more: take it
    out of everything that writes to the stream."""
    return _convert(model, tables=(), branches=False)


def centered_along_the_input(model: GPT) -> GPT:
    """nn.Linear keeps its weight as (out, in), so the mean over the outputs, which is what arrives in the
    stream, is the mean over dim 0. You took it over the inputs."""
    return _convert(model, output_dim=1)


def the_positions_forgotten(model: GPT) -> GPT:
    """The token table was centered, but the position table writes to the stream as well, in the same sum."""
    return _convert(model, tables=("tokens",))


def the_branches_forgotten(model: GPT) -> GPT:
    """The stream starts without a mean, and the first branch brings one back: attn.out and mlp.down write to
    it, in every block."""
    return _convert(model, branches=False)


def the_tied_head_centered_too(model: GPT) -> GPT:
    """The head shares its matrix with the token table, so centering one changed the other. The head reads, it
    does not write: give it the old matrix as one of its own."""
    return _convert(model, untie=False)


def fresh_norm_weights(model: GPT) -> GPT:
    """The new norms start with weights of one: what the old ones had learned is lost. Copy the weight."""
    return _convert(model, make=lambda old: norms.RMSNorm(len(old.weight), old.eps))  # type: ignore[arg-type]


def eps_lost(model: GPT) -> GPT:
    """The new norms have the default eps, not that of the norms they replace."""

    def make(old: nn.Module) -> nn.Module:
        new = norms.RMSNorm(len(old.weight))  # type: ignore[arg-type]
        new.load_state_dict({"weight": old.weight})
        return new

    return _convert(model, make=make)


def done_to_the_model_itself(model: GPT) -> GPT:
    """The new model is right, but it is the old one, changed: the caller's LayerNorm model is gone. Work on a
    copy."""
    return _convert(model, in_place=True)


def _gpt(eps: float = 1e-5, tied: bool = True, d_model: int = 8, n_layers: int = 2) -> GPT:
    """A model with random weights, norms included, and a stream with a mean that matters."""
    config = GPTConfig(
        vocab_size=11,
        max_seq_len=6,
        d_model=d_model,
        n_heads=2,
        n_layers=n_layers,
        bias=False,
        tie_embeddings=tied,
    )
    model = fill_by_name(GPT(config)).eval()
    for module in model.modules():
        if isinstance(module, norms.LayerNorm):
            module.eps = eps
    return model  # type: ignore[return-value]


IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def _kinds(f: Callable[[GPT], GPT]) -> list[str]:
    model = f(_gpt())
    return [type(m).__name__ for block in model.blocks for m in (block.norm1, block.norm2)] + [
        type(model.norm).__name__
    ]


def _wrong_kind(kinds: list[str]) -> str | None:
    wrong = [kind for kind in kinds if kind != "RMSNorm"]
    if not wrong:
        return None
    return f"{len(wrong)} of the {len(kinds)} norms are {wrong[0]}: two in each block, and the one at the end"


@torch.no_grad()
def _means(f: Callable[[GPT], GPT]) -> tuple[Tensor, list[float]]:
    """What each norm of the new model is given to read: the largest mean of a token."""
    model, seen = f(_gpt()), []
    for norm in (*(n for b in model.blocks for n in (b.norm1, b.norm2)), model.norm):
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean(-1).abs().max().item()))
    return model(IDS), seen


def _has_a_mean(result: tuple[Tensor, list[float]]) -> str | None:
    for number, mean in enumerate(result[1]):
        if mean > 1e-4:
            return (
                f"norm {number + 1} of {len(result[1])} reads tokens whose mean is up to {mean:.2f}: something "
                "before it writes a mean to the stream"
            )
    return None


def _hand(f: Callable[[GPT], GPT]) -> Tensor:
    """A model without branches and positions: its stream is a row of the token table."""
    model = _gpt(d_model=4, n_layers=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0 if "norm" in name else 0.0)
        model.tokens.weight[2] = torch.tensor([1.0, 2.0, 3.0, 6.0])
        new = f(model)
        return new.tokens.weight[2]


def _logits(f: Callable[[GPT], GPT], **kind: Any) -> Tensor:
    with torch.no_grad():
        return f(_gpt(**kind)).eval()(IDS)


def _is_the_layer_norm_models(**kind: Any) -> Callable[[Any, Any], Failure | None]:
    """A judge: the logits are those of the model that came in."""

    def judge(yours: Any, expected: Any) -> Failure | None:
        with torch.no_grad():
            before = _gpt(**kind)(IDS)
        if same_value(yours, before, atol=1e-4):
            return None
        if wrong := same_shape(yours, expected):
            return wrong
        return Failure(
            f"the logits differ from the LayerNorm model's by up to {(yours - before).abs().max():.2f}",
            {"yours": _row(yours), "before": _row(before)},
        )

    return judge


def _row(logits: Tensor) -> str:
    return "[" + ", ".join(f"{v:.2f}" for v in logits[0, -1, :6].tolist()) + ", …]"


@torch.no_grad()
def _original_after(f: Callable[[GPT], GPT]) -> tuple[bool, bool, Tensor]:
    """Whether the old model still is what it was, and also after the new one has been trained (here: zeroed)."""
    model = _gpt()
    new, expected = f(model), _gpt()(IDS)

    def says() -> Tensor:
        try:
            return model(IDS)
        except Exception:
            return torch.zeros_like(expected)

    at_once = torch.equal(says(), expected)
    for p in new.parameters():
        p.zero_()
    after = says()
    return at_once, torch.equal(after, expected), after


def _touched(result: tuple[bool, bool, Tensor]) -> str | None:
    if not result[0]:
        return "the model that came in has changed: work on a copy"
    if not result[1]:
        return "the new model shares weights with the one that came in: train one, and the other changes. Clone them"
    return None


CONVERT = Exercise(
    id="3.1.c",
    symbol="to_rms_norm",
    reference=_to_rms_norm,
    look_again="How large is the mean, really?",
    probes=[
        Probe("every norm is an RMSNorm", _kinds, holds(_wrong_kind)),
        Probe(
            "a row of the token table by hand",
            _hand,
            equals(),
            given="[1, 2, 3, 6], whose mean is 3",
        ),
        Probe("no norm reads a mean", _means, holds(_has_a_mean)),
        Probe(
            "the same logits, untied head",
            lambda f: _logits(f, tied=False),
            _is_the_layer_norm_models(tied=False),
        ),
        Probe("the same logits, tied head", lambda f: _logits(f), _is_the_layer_norm_models()),
        Probe(
            "the same logits with an eps of 0.1",
            lambda f: _logits(f, eps=0.1),
            _is_the_layer_norm_models(eps=0.1),
        ),
        Probe("the old model is left alone", _original_after, holds(_touched)),
    ],
    misconceptions=[
        only_the_norms_exchanged,
        centered_along_the_input,
        the_positions_forgotten,
        the_branches_forgotten,
        the_tied_head_centered_too,
        fresh_norm_weights,
        eps_lost,
        done_to_the_model_itself,
    ],
)

EXERCISES = [BACKWARD, IN_16_BITS, CONVERT]
