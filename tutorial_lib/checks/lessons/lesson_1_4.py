"""Exercises of lesson 1.4, multi-head attention."""

from __future__ import annotations

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.core.multihead import split_heads


def _tiny() -> Tensor:
    return torch.arange(8.0).reshape(1, 2, 4)  # B=1, T=2, D=4


def _reshape_only(x: Tensor, n_heads: int) -> Tensor:
    B, T, D = x.shape
    return x.reshape(B, n_heads, T, D // n_heads)


def _interleaved(x: Tensor, n_heads: int) -> Tensor:
    B, T, D = x.shape
    return x.reshape(B, T, D // n_heads, n_heads).permute(0, 3, 1, 2)


def _no_transpose(x: Tensor, n_heads: int) -> Tensor:
    B, T, D = x.shape
    return x.reshape(B, T, n_heads, D // n_heads)


EXERCISES = [
    Exercise(
        id="1.4.a",
        symbol="split_heads",
        reference=split_heads,
        look_again="Cut one wide projection into heads",
        probes=[
            Probe("shape and dtype", lambda f: f(randn(2, 5, 12), 3), same_shape),
            Probe("two tokens, two heads, by hand", lambda f: f(_tiny(), 2), equals(), given=_tiny()),
            Probe("equals the reference", lambda f: f(randn(3, 7, 24, seed=1), 4), equals()),
        ],
        misconceptions=[
            Misconception(
                "reshape without transpose",
                _reshape_only,
                "The shape is right, but a plain reshape to (B, H, T, C) hands each head a run of "
                "whole tokens; split the channels first, then swap time and heads.",
            ),
            Misconception(
                "interleaved channels",
                _interleaved,
                "Each head took every H-th channel; head h owns the block of channels from h·C to (h+1)·C.",
            ),
            Misconception(
                "heads left behind time",
                _no_transpose,
                "You cut the channels correctly, but attention works on the last two dimensions: "
                "move the heads before time.",
            ),
        ],
    )
]
