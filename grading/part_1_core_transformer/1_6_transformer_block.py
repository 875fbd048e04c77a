"""Exercises of lesson 1.6, the Transformer block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tutorial_lib.checks.probes import (
    causality,
    equals,
    fill_by_name,
    holds,
    leaks,
    randn,
    same_parameters,
    same_shape,
)
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.core import block, norms
from tutorial_lib.core.mlp import MLP
from tutorial_lib.core.multihead import MultiHeadAttention

# --- 1.6.a  LayerNorm ---------------------------------------------------------------------------------------


def _norm_like(forward: Callable[[nn.Module, Tensor], Tensor]) -> type[nn.Module]:
    """LayerNorm with another way forward."""

    class Wrong(nn.Module):
        def __init__(self, d_model: int, eps: float = 1e-5) -> None:
            super().__init__()
            self.eps = eps
            self.weight = nn.Parameter(torch.ones(d_model))
            self.bias = nn.Parameter(torch.zeros(d_model))

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Wrong


def _over(dim: int | tuple[int, ...]) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        mean, var = x.mean(dim, keepdim=True), x.var(dim, correction=0, keepdim=True)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias

    return forward


def _unbiased(self: nn.Module, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias


def _rms(self: nn.Module, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def _no_root(self: nn.Module, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (var + self.eps) * self.weight + self.bias


def _eps_outside(self: nn.Module, x: Tensor) -> Tensor:
    mean, std = x.mean(-1, keepdim=True), x.std(-1, correction=0, keepdim=True)
    return (x - mean) / (std + self.eps) * self.weight + self.bias


def _difference_of_squares(self: nn.Module, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = x.square().mean(-1, keepdim=True) - mean.square()
    return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias


def _not_learned(self: nn.Module, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + self.eps)


def _four() -> Tensor:
    return torch.tensor([[[1.0, 2.0, 3.0, 6.0], [2.0, 4.0, 6.0, 12.0]]])  # B=1, T=2, D=4


def _alone(cls: type[nn.Module]) -> tuple[Tensor, str | None]:
    layer, x = cls(8), randn(2, 5, 8)
    with torch.no_grad():
        return layer(x), leaks(layer, x)


def _mixes_tokens(result: tuple[Tensor, str | None]) -> str | None:
    return result[1] and "an earlier token's result changed when only a later token did: tokens are mixed"


def _trained_norm(cls: type[nn.Module]) -> Tensor:
    return fill_by_name(cls(16))(randn(3, 7, 16, seed=1))


def _given_x(layer: nn.Module) -> tuple[Tensor, Tensor]:
    x = randn(2, 5, 8, seed=6)
    with torch.no_grad():
        layer(x)
    return x, randn(2, 5, 8, seed=6)


def _wrote_into_x(pair: tuple[Tensor, Tensor]) -> str | None:
    if torch.equal(*pair):
        return None
    return (
        "the x of the caller was overwritten, as by x += … or x -= …: write x = x + …, which makes a new one"
    )


LAYER_NORM = Exercise(
    id="1.6.a",
    symbol="LayerNorm",
    reference=norms.LayerNorm,
    look_again="LayerNorm by hand",
    probes=[
        Probe(
            "parameters weight and bias",
            lambda cls: {name: tuple(p.shape) for name, p in cls(6).named_parameters()},
            same_parameters,
        ),
        Probe("shape and dtype", lambda cls: cls(8)(randn(2, 5, 8)), same_shape),
        Probe("each token for itself", _alone, holds(_mixes_tokens)),
        Probe("x is as before", lambda cls: _given_x(cls(8)), holds(_wrote_into_x)),
        Probe(
            "two tokens by hand",
            lambda cls: cls(4)(_four()),
            equals(),
            given=_four(),
        ),
        Probe("weight and bias are used", _trained_norm, equals()),
        Probe(
            "any number of leading dimensions",
            lambda cls: [
                fill_by_name(cls(6))(randn(*shape, seed=3)) for shape in ((6,), (4, 6), (2, 3, 4, 6))
            ],
            equals(),
            given="x of shape (6,), of (4, 6) and of (2, 3, 4, 6)",
        ),
        Probe(
            "eps = 1 goes under the root",
            lambda cls: cls(4, eps=1.0)(_four()),
            equals(),
            given=_four(),
        ),
        Probe(
            "a tiny token: eps is 1e-5 unless told otherwise",
            lambda cls: cls(4)(_four() / 1000),
            equals(),
            given="[1, 2, 3, 6] / 1000 and [2, 4, 6, 12] / 1000",
        ),
        Probe(
            "a token of equal numbers gives zeros",
            lambda cls: cls(4)(torch.full((1, 2, 4), 5.0)),
            equals(),
            given=torch.full((1, 2, 4), 5.0),
        ),
        Probe(
            "still right with 1000 added to every number",
            lambda cls: cls(64)(randn(2, 3, 64, seed=2) + 1000),
            equals(atol=2e-3),
            given="randn(2, 3, 64) + 1000",
        ),
    ],
    misconceptions=[
        Misconception(
            "unbiased variance",
            _norm_like(_unbiased),
            "The variance was divided by D − 1, which `x.var()` does by default; a norm describes these D "
            "numbers and divides by D: `correction=0`, or the mean of the squared deviations.",
        ),
        Misconception(
            "normalized over time",
            _norm_like(_over(-2)),
            "Mean and variance were taken over the tokens of the sequence, so each token learns about later "
            "ones; the statistics of a token come from its own channels, dim=-1.",
        ),
        Misconception(
            "one mean for the whole sequence",
            _norm_like(_over((-2, -1))),
            "Mean and variance were taken over time and channels together; every token needs a mean and a "
            "variance of its own, over dim=-1 alone.",
        ),
        Misconception(
            "RMSNorm",
            _norm_like(_rms),
            "The mean was not subtracted: this is RMSNorm, with a bias. LayerNorm centers first, and takes "
            "the variance of what is left.",
        ),
        Misconception(
            "divided by the variance",
            _norm_like(_no_root),
            "The deviations were divided by the variance, not by its square root, so larger tokens come out "
            "smaller; the result of a token and of twice that token should be the same.",
        ),
        Misconception(
            "eps outside the root",
            _norm_like(_eps_outside),
            "eps was added to the standard deviation; the equation adds it to the variance, under the root. "
            "With trained weights of another model the two are not the same function.",
        ),
        Misconception(
            "mean of squares minus square of the mean",
            _norm_like(_difference_of_squares),
            "The variance was computed as mean(x²) − mean(x)². On paper that is the same, but in fp32 two "
            "large numbers cancel and little is left: subtract the mean first, then square.",
        ),
        Misconception(
            "weight and bias are never used",
            _norm_like(_not_learned),
            "The normalization is right, but the learned scale and shift were left out: multiply by weight, "
            "then add bias.",
        ),
    ],
)

# --- 1.6.b  Block -------------------------------------------------------------------------------------------

BlockForward = Callable[[nn.Module, Tensor, "Tensor | None"], Tensor]


def _block_like(forward: BlockForward) -> type[nn.Module]:
    """The block with another way forward."""

    class Wrong(nn.Module):
        def __init__(self, d_model: int, n_heads: int) -> None:
            super().__init__()
            self.norm1 = norms.LayerNorm(d_model)
            self.attn = MultiHeadAttention(d_model, n_heads, causal=True)
            self.norm2 = norms.LayerNorm(d_model)
            self.mlp = MLP(d_model, activation="gelu_tanh")

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return forward(self, x, mask)

    return Wrong


def _post_norm(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    x = self.norm1(x + self.attn(x, mask))
    return self.norm2(x + self.mlp(x))


def _normed_stream(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    x = self.norm1(x)
    x = x + self.attn(x, mask)
    x = self.norm2(x)
    return x + self.mlp(x)


def _no_mlp_residual(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    x = x + self.attn(self.norm1(x), mask)
    return self.mlp(self.norm2(x))


def _no_attn_residual(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    x = self.attn(self.norm1(x), mask)
    return x + self.mlp(self.norm2(x))


def _half_normed(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    x = self.norm1(x)
    x = x + self.attn(x, mask)
    return x + self.mlp(self.norm2(x))


def _mlp_reads_input(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    return x + self.attn(self.norm1(x), mask) + self.mlp(self.norm2(x))


def _one_norm_twice(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    x = x + self.attn(self.norm1(x), mask)
    return x + self.mlp(self.norm1(x))


def _no_mask(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


def _silent(cls: type[nn.Module]) -> Tensor:
    layer, x = fill_by_name(cls(8, 2)), randn(1, 3, 8, seed=3)
    with torch.no_grad():
        for last in (layer.attn.out, layer.mlp.down):
            last.weight.zero_()
            last.bias.zero_()
        return layer(x)


def _by_hand(cls: type[nn.Module]) -> Tensor:
    """One token [1, 3]. Attention hands on what it gets, the MLP always says [10, 20]."""
    layer = cls(2, 1)
    with torch.no_grad():
        for p in (*layer.attn.parameters(), *layer.mlp.parameters()):
            p.zero_()
        layer.attn.qkv.weight[4:] = torch.eye(2)  # the values
        layer.attn.out.weight.copy_(torch.eye(2))
        layer.mlp.down.bias.copy_(torch.tensor([10.0, 20.0]))
        return layer(torch.tensor([[[1.0, 3.0]]]))


def _random_block(cls: type[nn.Module]) -> Tensor:
    return fill_by_name(cls(12, 3))(randn(2, 6, 12, seed=4))


def _masked_block(cls: type[nn.Module]) -> Tensor:
    """Two documents of three tokens, packed into one sequence: neither may look at the other."""
    same = torch.tensor([0, 0, 0, 1, 1, 1])
    return fill_by_name(cls(12, 3))(randn(2, 6, 12, seed=4), same[:, None] == same[None, :])


HAND = "x = [1, 3]; attention returns what it is given, the MLP returns [10, 20]"


def _block_probes(parameters: str, causal_build: Callable) -> list[Probe]:
    return [
        Probe(
            parameters,
            lambda cls: {name: tuple(p.shape) for name, p in cls(8, 2).named_parameters()},
            same_parameters,
        ),
        Probe("shape and dtype", lambda cls: fill_by_name(cls(8, 2))(randn(2, 5, 8)), same_shape),
        Probe(
            "silent branches leave the stream untouched",
            _silent,
            equals(),
            given="a random x; the last layers of attention and MLP are zero, so the result should be x",
        ),
        Probe("one token by hand", _by_hand, equals(atol=1e-4), given=HAND),
        causality(causal_build, randn(2, 6, 8, seed=5)),
        Probe("equals the reference", _random_block, equals()),
        Probe("the mask reaches attention", _masked_block, equals()),
        Probe("x is as before", lambda cls: _given_x(fill_by_name(cls(8, 2))), holds(_wrote_into_x)),
    ]


BLOCK = Exercise(
    id="1.6.b",
    symbol="Block",
    reference=block.Block,
    look_again="The block",
    probes=_block_probes("parameters of norm1, attn, norm2, mlp", lambda cls: fill_by_name(cls(8, 2))),
    misconceptions=[
        Misconception(
            "post-norm",
            _block_like(_post_norm),
            "The norms stand after the additions, so the stream itself is rescaled twice in every block; in "
            "pre-norm only what a branch reads is normalized.",
        ),
        Misconception(
            "the normalized stream is handed on",
            _block_like(_normed_stream),
            "x was overwritten by its norm before the addition, so the branch adds to the normalized stream; "
            "normalize inside the call of the branch and keep x as it is.",
        ),
        Misconception(
            "the stream is normalized on the way to attention",
            _block_like(_half_normed),
            "The MLP is joined correctly, but x was overwritten by norm1(x) before attention was added: the "
            "residual must be the x that came in.",
        ),
        Misconception(
            "no residual around the MLP",
            _block_like(_no_mlp_residual),
            "The MLP's output replaced the stream instead of being added to it: all that attention and the "
            "earlier blocks wrote is lost.",
        ),
        Misconception(
            "no residual around attention",
            _block_like(_no_attn_residual),
            "Attention's output replaced the stream instead of being added to it: each token forgets what it "
            "was, and after a few blocks all are alike.",
        ),
        Misconception(
            "the MLP does not see what attention added",
            _block_like(_mlp_reads_input),
            "Both branches read the block's input; in this block they come one after the other, and the MLP "
            "reads the stream with attention's addition in it.",
        ),
        Misconception(
            "norm1 used twice",
            _block_like(_one_norm_twice),
            "The MLP was given norm1's result and norm2 is never used; fresh norms are all alike, so it shows "
            "only once they are trained.",
        ),
        Misconception(
            "mask dropped",
            _block_like(_no_mask),
            "The block takes a mask but does not hand it to attention, so padding and foreign documents are "
            "read along with the rest.",
        ),
    ],
)

# --- 1.6.c  ParallelBlock -----------------------------------------------------------------------------------


def _parallel_like(forward: BlockForward, causal: bool = True) -> type[nn.Module]:
    class Parallel(nn.Module):
        def __init__(self, d_model: int, n_heads: int) -> None:
            super().__init__()
            self.norm = norms.LayerNorm(d_model)
            self.attn = MultiHeadAttention(d_model, n_heads, causal=causal)
            self.mlp = MLP(d_model, activation="gelu_tanh")

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return forward(self, x, mask)

    return Parallel


def _parallel(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    h = self.norm(x)
    return x + self.attn(h, mask) + self.mlp(h)


def _sequential(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    x = x + self.attn(self.norm(x), mask)
    return x + self.mlp(self.norm(x))


def _x_twice(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    h = self.norm(x)
    return (x + self.attn(h, mask)) + (x + self.mlp(h))


def _adds_to_norm(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    x = self.norm(x)
    return x + self.attn(x, mask) + self.mlp(x)


def _mlp_reads_raw(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    return x + self.attn(self.norm(x), mask) + self.mlp(x)


def _no_residual(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    h = self.norm(x)
    return self.attn(h, mask) + self.mlp(h)


def _parallel_no_mask(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    h = self.norm(x)
    return x + self.attn(h) + self.mlp(h)


PARALLEL = Exercise(
    id="1.6.c",
    symbol="ParallelBlock",
    reference=_parallel_like(_parallel),
    look_again="The block",
    probes=_block_probes("parameters of norm, attn, mlp", lambda cls: fill_by_name(cls(8, 2))),
    misconceptions=[
        Misconception(
            "one after the other",
            _parallel_like(_sequential),
            "The MLP read the stream after attention had added to it: that is the ordinary block with one "
            "norm; here both branches read the same norm(x).",
        ),
        Misconception(
            "x added twice",
            _parallel_like(_x_twice),
            "Each branch got a residual of its own and the two were added, so x is in the sum twice and the "
            "stream doubles with every block.",
        ),
        Misconception(
            "branches added to the normalized stream",
            _parallel_like(_adds_to_norm),
            "x was overwritten by its norm, so the residual is the normalized stream; keep x, and give the "
            "normalized copy a name of its own.",
        ),
        Misconception(
            "the MLP reads the raw stream",
            _parallel_like(_mlp_reads_raw),
            "Attention reads norm(x), but the MLP reads x itself, whose size grows from block to block; both "
            "read norm(x).",
        ),
        Misconception(
            "no residual",
            _parallel_like(_no_residual),
            "The two branches were added to each other but not to x: the stream ends here.",
        ),
        Misconception(
            "not causal",
            _parallel_like(_parallel, causal=False),
            "The attention was built without `causal=True`, so every token reads the ones to come.",
        ),
        Misconception(
            "mask dropped",
            _parallel_like(_parallel_no_mask),
            "The block takes a mask but does not hand it to attention.",
        ),
    ],
)

EXERCISES = [LAYER_NORM, BLOCK, PARALLEL]
