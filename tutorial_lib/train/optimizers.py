# Exported from chapters/part_4_scaling_up/4_3_lr_schedules.ipynb. Edit the lesson, then run: make export
"""Optimizers by name, with every parameter in the group where it belongs."""

import difflib

import torch
from torch import nn

from tutorial_lib.train.muon import Muon, muon_groups
from tutorial_lib.train.optim import decay_groups

__all__ = ["OPTIMIZERS", "build_optimizer"]


OPTIMIZERS = ("adamw", "muon")


def build_optimizer(
    model: nn.Module,
    kind: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    matrix_lr: float | None = None,
    momentum: float = 0.95,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters, each in exactly one group (a tied one is there once).

    `adamw` (torch's) has two groups: all that has two dimensions or more decays, embeddings too; norms and
    biases do not. `muon` (lesson 3.8's) has three: the matrices in `model.blocks`; the other tables and
    matrices, by AdamW and with decay; norms and biases, by AdamW and without.

    Args:
        model: Not wrapped by anything that renames its parameters.
        kind: `adamw` or `muon`.
        lr: Peak rate.
        weight_decay: λ of the groups that decay.
        betas: AdamW's memory for the gradient and for its square.
        matrix_lr: Muon's rate for the matrices in the blocks; `lr` when None. AdamW does not look at it.
        momentum: Muon's memory for the gradient; AdamW does not look at it.

    Raises:
        ValueError: if `kind` is unknown, or if it is `muon` and the model has no matrices in `blocks`.
    """
    if kind == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
        return torch.optim.AdamW(decay_groups(model, weight_decay), lr=lr, betas=betas, fused=fused)
    if kind == "muon":
        groups = muon_groups(model, lr if matrix_lr is None else matrix_lr, lr, weight_decay)
        if not groups[0]["params"]:
            raise ValueError(
                "muon found no matrices in model.blocks: hand it the model itself, not a wrapper"
            )
        return Muon(groups, momentum=momentum, betas=betas)
    near = difflib.get_close_matches(kind, OPTIMIZERS, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown optimizer {kind!r}: did you mean {near!r}? There are {', '.join(OPTIMIZERS)}")
