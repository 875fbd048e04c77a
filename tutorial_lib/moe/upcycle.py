# Exported from chapters/part_5_moe/5_3_hybrid_dense_moe.ipynb. Edit the lesson, then run: make export
"""Sparse upcycling: a dense model's MLPs become experts, and at first nothing changes (Komatsuzaki et al. 2023)."""

from dataclasses import asdict
from typing import Any

import torch

from tutorial_lib.core.model import Transformer
from tutorial_lib.moe.model import MoEConfig, MoETransformer

__all__ = ["upcycle"]


@torch.no_grad()
def upcycle(model: Transformer, **settings: Any) -> MoETransformer:
    """A model whose experts are copies of this one's MLPs: it computes the same, until training lets them part.

    The weights of a token's experts add up to 1, so equal experts give what the one MLP gave. Only the routers are new, and
    random: each expert sees other tokens, and so learns something else.

    Args:
        model: Dense.
        settings: Of `MoEConfig`: n_experts, experts_per_token, moe_every, …

    Raises:
        ValueError: for settings with which it would not be the same function.
    """
    config = MoEConfig(**{**asdict(model.config), **settings})
    for name, same in (("renormalize", True), ("n_shared_experts", 0), ("d_expert", None)):
        if getattr(config, name) != same:
            raise ValueError(
                f"{name} is {getattr(config, name)}, but experts that are copies of an MLP need {same}"
            )
    new, dense = MoETransformer(config), model.state_dict()
    state = new.state_dict()
    for name, weight in state.items():
        if name in dense:
            weight.copy_(dense[name])
        elif ".experts." in name:  # blocks.0.mlp.experts.up from blocks.0.mlp.up.weight, E times
            weight.copy_(dense[name.replace(".experts.", ".") + ".weight"])
    return new
