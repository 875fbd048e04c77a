"""Exercises of lesson 1.4, multi-head attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_lib.checks.probes import (
    causality,
    equals,
    fill_by_name,
    holds,
    leaks,
    outcome,
    randn,
    same_parameters,
    same_shape,
)
from tutorial_lib.checks.spec import Exercise, Probe
from tutorial_lib.core.masks import causal_mask
from tutorial_lib.core.multihead import MultiHeadAttention, merge_heads, split_heads

NO_ORDER = "swapping two dimensions has no order"


def _same_swaps(*calls: str) -> dict[str, str]:
    return {f"`{call}.transpose(1, 2)` became `{call}.transpose(2, 1)`": NO_ORDER for call in calls}


# --- 1.4.a --------------------------------------------------------------------------------------------------


def _tiny() -> Tensor:
    return torch.arange(8.0).reshape(1, 2, 4)  # B=1, T=2, D=4


def reshape_without_transpose(x: Tensor, n_heads: int) -> Tensor:
    """The shape is right, but a plain reshape to (B, H, T, C) hands each head a run of whole tokens; split
    the channels first, then swap time and heads."""
    B, T, D = x.shape
    return x.reshape(B, n_heads, T, D // n_heads)


def interleaved_channels(x: Tensor, n_heads: int) -> Tensor:
    """Each head took every H-th channel; head h owns the block of channels from h·C to (h+1)·C."""
    B, T, D = x.shape
    return x.reshape(B, T, D // n_heads, n_heads).permute(0, 3, 1, 2)


def heads_left_behind_time(x: Tensor, n_heads: int) -> Tensor:
    """You cut the channels correctly, but attention works on the last two dimensions: move the heads before
    time."""
    B, T, D = x.shape
    return x.reshape(B, T, n_heads, D // n_heads)


def width_taken_for_number(x: Tensor, n_heads: int) -> Tensor:
    """You made D / n_heads heads of n_heads channels; there are n_heads heads, and each has D / n_heads
    channels."""
    B, T, D = x.shape
    return x.reshape(B, T, D // n_heads, n_heads).transpose(1, 2)


def time_last(x: Tensor, n_heads: int) -> Tensor:
    """Each head has its own channels, but time and channels have changed places: the channels stay last, (B,
    H, T, C)."""
    return split_heads(x, n_heads).transpose(-2, -1)


SPLIT = Exercise(
    id="1.4.a",
    symbol="split_heads",
    reference=split_heads,
    look_again="Cut one wide projection into heads",
    equivalent_mutants=_same_swaps("x.view(B, T, n_heads, D // n_heads)"),
    probes=[
        Probe("shape and dtype", lambda f: f(randn(2, 5, 12), 3), same_shape),
        Probe("two tokens, two heads, by hand", lambda f: f(_tiny(), 2), equals(), given=_tiny()),
        Probe("equals the reference", lambda f: f(randn(3, 7, 24, seed=1), 4), equals()),
        Probe("one head, and as many heads as channels", lambda f: (f(_tiny(), 1), f(_tiny(), 4)), equals()),
        Probe(
            "a third of a wide projection (not contiguous, float64)",
            lambda f: f(randn(2, 5, 36, seed=2).double().chunk(3, dim=-1)[1], 3),
            equals(),
        ),
    ],
    misconceptions=[
        reshape_without_transpose,
        interleaved_channels,
        heads_left_behind_time,
        width_taken_for_number,
        time_last,
    ],
)


# --- 1.4.b --------------------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """The reference, in steps that the misconceptions below replace one at a time."""

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (self._split(part) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self._allowed(x.shape[1], mask), dropout_p=self._dropout()
        )
        return self.out(self._merge(mixed))

    def _split(self, part: Tensor) -> Tensor:
        return split_heads(part, self.n_heads)

    def _merge(self, mixed: Tensor) -> Tensor:
        return merge_heads(mixed)

    def _allowed(self, T: int, mask: Tensor | None) -> Tensor | None:
        return causal_mask(T) if mask is None else causal_mask(T) & mask

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


class MergedWithoutTheTranspose(CausalSelfAttention):
    """A plain reshape of (B, H, T, C) to (B, T, D) glues heads and times together as they happen to lie in
    memory, so a token gets pieces of other tokens. Move the heads back behind time first."""

    def _merge(self, mixed: Tensor) -> Tensor:
        return mixed.reshape(mixed.shape[0], mixed.shape[2], -1)


class SplitWithoutTheTranspose(CausalSelfAttention):
    """Now the split is a plain reshape, and each head gets a run of whole tokens. The split was right as it
    came; look at the way back."""

    def _split(self, part: Tensor) -> Tensor:
        return reshape_without_transpose(part, self.n_heads)


class NoTransposeAtAll(MergedWithoutTheTranspose):
    """Split and merge are each other's inverse now, but what each head takes for time is not time: the heads
    must be moved before time, and back."""

    def _split(self, part: Tensor) -> Tensor:
        return reshape_without_transpose(part, self.n_heads)


class TheMaskReplacesTheTriangle(CausalSelfAttention):
    """As soon as there is a mask, nobody is causal any more. A token may be attended to if the mask allows it
    and it is not in the future: mask & triangle."""

    def _allowed(self, T: int, mask: Tensor | None) -> Tensor | None:
        return causal_mask(T) if mask is None else mask


class TheMaskIsIgnored(CausalSelfAttention):
    """Causal in every case, but the mask that was handed in is never used, so padding is attended to."""

    def _allowed(self, T: int, mask: Tensor | None) -> Tensor | None:
        return causal_mask(T)


class EitherIsEnough(CausalSelfAttention):
    """You joined mask and triangle with or; a token must be allowed by both."""

    def _allowed(self, T: int, mask: Tensor | None) -> Tensor | None:
        return causal_mask(T) if mask is None else causal_mask(T) | mask


class DropoutNeverStops(CausalSelfAttention):
    """The layer still drops weights after .eval(): F.scaled_dot_product_attention does not know the module's
    mode, so its dropout_p must be 0 unless self.training."""

    def _dropout(self) -> float:
        return self.dropout


class DropoutNeverStarts(CausalSelfAttention):
    """Evaluation is right, but training drops nothing either. dropout_p is self.dropout while self.training
    holds."""

    def _dropout(self) -> float:
        return 0.0


Layer = Callable[..., nn.Module]


def _padding() -> Tensor:
    """Two sequences of five tokens; the first two, or the last, are padding. Nobody is left with nothing."""
    real = torch.tensor([[True, False, False, True, True], [True, True, True, True, False]])
    return real[:, None, None, :]  # (B, 1, 1, T)


def _one_head(cls: Layer) -> Tensor:
    """Zero queries: each token gets the mean of what it may see; values are the input."""
    layer = cls(2, 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.qkv.weight[4:] = torch.eye(2)  # type: ignore[index, operator]
        layer.out.weight.copy_(torch.eye(2))  # type: ignore[union-attr, operator]
    return layer.eval()(torch.tensor([[[2.0, 0.0], [4.0, 1.0], [0.0, 5.0]]]))


def _causal_with_mask(cls: Layer) -> tuple[Tensor, str | None]:
    layer, x = fill_by_name(cls(8, 2)).eval(), randn(1, 5, 8, seed=4)
    everyone = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    return layer(x, everyone), leaks(lambda y: layer(y, everyone), x)


def _no_padding_seen(cls: Layer) -> Tensor:
    layer = fill_by_name(cls(8, 2)).eval()
    return layer(randn(2, 5, 8, seed=3), _padding())


def _evaluates_alike(cls: Layer) -> tuple[Tensor, Tensor]:
    layer, x = fill_by_name(cls(8, 2, dropout=0.5)).eval(), randn(2, 6, 8, seed=5)
    return layer(x), layer(x)


def _drops_while_training(cls: Layer) -> bool:
    layer, x = fill_by_name(cls(8, 2, dropout=0.5)).train(), randn(2, 6, 8, seed=5)
    return not torch.equal(layer(x), layer(x))


def _not_dropped(dropped: bool) -> str | None:
    return (
        None if dropped else "two training passes with dropout 0.5 gave the same output: nothing is dropped"
    )


def _lone_tokens(cls: Layer) -> Tensor:
    """400 tokens, each alone, with values of 1: a head gives 1 / (1 - dropout) everywhere, or 0."""
    layer = cls(8, 2, dropout=0.25)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.qkv.weight[16:] = torch.eye(8)  # type: ignore[index, operator]
        layer.out.weight.copy_(torch.eye(8))  # type: ignore[union-attr, operator]
        return layer.train()(torch.ones(400, 1, 8))


def _dropped_otherwise(out: Tensor) -> str | None:
    heads = out.view(-1, 4)
    if (heads != heads[:, :1]).any():
        return (
            "a head lost single channels: dropout acts on the attention weights, before they mix the values"
        )
    dropped = (heads[:, 0] == 0).float().mean()
    if abs(dropped - 0.25) > 0.08:
        return f"with dropout 0.25, {dropped:.0%} of the attention weights were zero"
    size = heads.max()
    if abs(size - 4 / 3) > 1e-4:
        return f"a weight of 1 that was not dropped became {size:.2f}; dropout makes it 1 / (1 − 0.25) = 1.33"
    return None


DEBUG = Exercise(
    id="1.4.b",
    symbol="CausalSelfAttention",
    reference=CausalSelfAttention,
    look_again="What goes wrong",
    equivalent_mutants=_same_swaps("part.view(B, T, self.n_heads, -1)", "mixed"),
    probes=[
        Probe(
            "projections qkv and out",
            lambda cls: {n: tuple(p.shape) for n, p in cls(8, 2).named_parameters()},
            same_parameters,
        ),
        Probe("shape and dtype", lambda cls: fill_by_name(cls(12, 3))(randn(2, 5, 12)), same_shape),
        causality(
            lambda cls: lambda x, layer=fill_by_name(cls(8, 2)).eval(): layer(x), randn(1, 6, 8, seed=1)
        ),
        Probe(
            "one head, no preferences, by hand",
            _one_head,
            equals(),
            given="values [2, 0], [4, 1], [0, 5]: each token gets the mean of the values so far",
        ),
        Probe(
            "equals the reference",
            lambda cls: fill_by_name(cls(24, 4))(
                randn(3, 7, 24, seed=2)
            ),  # training, with the default dropout: 0
            equals(),
        ),
        Probe("no output sees the future when there is a mask", _causal_with_mask, holds(lambda r: r[1])),
        Probe(
            "padding is hidden",
            _no_padding_seen,
            equals(),
            given="the mask (B, 1, 1, T) hides tokens 1 and 2 of sequence 0, and token 4 of sequence 1",
        ),
        Probe("evaluated twice, the same", _evaluates_alike, equals()),
        Probe("dropout acts while training", _drops_while_training, holds(_not_dropped)),
        Probe(
            "dropout drops whole weights",
            _lone_tokens,
            holds(_dropped_otherwise),
            given="dropout 0.25; one token alone, so each head has one weight, which is 1; all values are 1",
        ),
        Probe(
            "scores in the hundreds",
            lambda cls: fill_by_name(cls(12, 3))(30 * randn(4, 6, 12, seed=6)),
            equals(1e-2),
        ),
    ],
    misconceptions=[
        MergedWithoutTheTranspose,
        SplitWithoutTheTranspose,
        NoTransposeAtAll,
        TheMaskReplacesTheTriangle,
        EitherIsEnough,
        TheMaskIsIgnored,
        DropoutNeverStops,
        DropoutNeverStarts,
    ],
)


# --- 1.4.c --------------------------------------------------------------------------------------------------


class GroupedQueryAttention(nn.Module):
    """The reference: causal attention whose query heads share keys and values in groups."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        if n_heads % n_kv_heads:
            raise ValueError(f"{n_heads} query heads do not share {n_kv_heads} key heads evenly")
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        d_head = d_model // n_heads
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, n_kv_heads * d_head, bias=False)
        self.v = nn.Linear(d_model, n_kv_heads * d_head, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.n_heads)
        k, v = (split_heads(part, self.n_kv_heads) for part in (self.k(x), self.v(x)))
        return self.out(merge_heads(self._attend(q, self._share(k), self._share_values(v))))

    def _share(self, k: Tensor) -> Tensor:
        return k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)

    def _share_values(self, v: Tensor) -> Tensor:
        return self._share(v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class GroupsInTurns(GroupedQueryAttention):
    """Head h took key head h % n_kv_heads. Neighbors share: with 4 heads in 2 groups, heads 0 and 1 use key
    head 0. repeat lines copies up in turns, repeat_interleave side by side."""

    def _share(self, k: Tensor) -> Tensor:
        return k.repeat(1, self.n_heads // self.n_kv_heads, 1, 1)


class ValuesInAnotherOrderThanKeys(GroupedQueryAttention):
    """Keys are shared by neighbors, but values in turns: what is found by a key must be handed over by the
    value of the same head."""

    def _share_values(self, v: Tensor) -> Tensor:
        return v.repeat(1, self.n_heads // self.n_kv_heads, 1, 1)


class TheFirstForAll(GroupedQueryAttention):
    """Every query head used key head 0, so the others are never read and never learn."""

    def _share(self, k: Tensor) -> Tensor:
        return k[:, :1].expand(-1, self.n_heads, -1, -1)


class TheMeanForAll(GroupedQueryAttention):
    """You averaged the key heads and gave all query heads the same. Each group has a key head of its own."""

    def _share(self, k: Tensor) -> Tensor:
        return k.mean(dim=1, keepdim=True).expand(-1, self.n_heads, -1, -1)


class TheFutureIsVisible(GroupedQueryAttention):
    """This layer is causal, like the one of the lesson: pass is_causal=True, or mask with a triangle."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class TheScaleOfTheWholeWidth(GroupedQueryAttention):
    """The scores were divided by √d_model. Sharing changes who asks whom, not how long a key is: √C, the
    width of one head."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = (q.shape[1] * q.shape[-1]) ** -0.5
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


class MergedByAReshape(GroupedQueryAttention):
    """The heads were glued together without moving them back behind time, so tokens get pieces of other
    tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.n_heads)
        k, v = (split_heads(part, self.n_kv_heads) for part in (self.k(x), self.v(x)))
        return self.out(self._attend(q, self._share(k), self._share(v)).reshape(x.shape))


def _one_token(cls: Layer) -> Tensor:
    """A single token sees only itself, so each head hands over the value of its group."""
    layer = cls(4, 4, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.v.weight[0, 0], layer.v.weight[1, 1] = 1.0, 1.0  # type: ignore[index, operator, union-attr]
        layer.out.weight.copy_(torch.eye(4))  # type: ignore[union-attr, operator]
    return layer(torch.tensor([[[1.0, 2.0, 0.0, 0.0]]]))


def _all_their_own(cls: Layer) -> bool:
    """Whether, with as many key heads as query heads, it is `MultiHeadAttention`."""
    layer, plain, x = (
        fill_by_name(cls(12, 3, 3)),
        MultiHeadAttention(12, 3, True, bias=False),
        randn(2, 5, 12),
    )
    parts = dict(layer.named_parameters())
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([parts[f"{name}.weight"] for name in "qkv"]))
        plain.out.weight.copy_(parts["out.weight"])
        return bool((layer(x) - plain(x)).abs().max() < 1e-5)


EXTEND = Exercise(
    id="1.4.c",
    symbol="GroupedQueryAttention",
    reference=GroupedQueryAttention,
    look_again="H heads are one multiplication",
    equivalent_mutants=_same_swaps(
        "self.q(x).view(B, T, self.n_heads, -1)",
        "self.k(x).view(B, T, self.n_kv_heads, -1)",
        "self.v(x).view(B, T, self.n_kv_heads, -1)",
        "mixed",
    ),
    probes=[
        Probe(
            "projections of the right widths",
            lambda cls: {n: tuple(p.shape) for n, p in cls(24, 6, 2).named_parameters()},
            same_parameters,
        ),
        Probe("shape and dtype", lambda cls: fill_by_name(cls(24, 6, 2))(randn(2, 5, 24)), same_shape),
        causality(lambda cls: lambda x, layer=fill_by_name(cls(16, 4, 2)): layer(x), randn(1, 6, 16)),
        Probe(
            "one token, four heads in two groups, by hand",
            _one_token,
            equals(),
            given="the values of the two groups are 1 and 2: heads 0 and 1 get 1, heads 2 and 3 get 2",
        ),
        Probe(
            "equals the reference",
            lambda cls: fill_by_name(cls(24, 6, 2))(randn(3, 7, 24, seed=2)),
            equals(),
        ),
        Probe(
            "one key head for all",
            lambda cls: fill_by_name(cls(12, 3, 1))(randn(2, 5, 12, seed=3)),
            equals(),
        ),
        Probe(
            "scores in the hundreds",
            lambda cls: fill_by_name(cls(12, 4, 2))(30 * randn(4, 6, 12, seed=6)),
            equals(1e-2),
        ),
        Probe(
            "as many key heads as query heads: plain attention",
            _all_their_own,
            holds(lambda same: None if same else "it differs from MultiHeadAttention with the same weights"),
        ),
        Probe(
            "5 heads and 2 key heads: a ValueError",
            lambda cls: outcome(lambda: cls(20, 5, 2) and "no error"),
            equals(),
        ),
    ],
    misconceptions=[
        GroupsInTurns,
        ValuesInAnotherOrderThanKeys,
        TheFirstForAll,
        TheMeanForAll,
        TheFutureIsVisible,
        TheScaleOfTheWholeWidth,
        MergedByAReshape,
    ],
)

EXERCISES = [SPLIT, DEBUG, EXTEND]
