# Exported from chapters/part_5_moe/5_1_routing_and_load_balancing.ipynb.
# Edit the lesson, then run: make export
"""How evenly experts are used, and what pushes a router towards evenness.

Letters: N tokens · E experts · K experts of a token. `real` says which tokens count: bool `(N,)`, all when None. Padding does
not: it would teach the router about a token that nobody reads.
"""

import torch
from torch import Tensor

__all__ = ["expert_load", "balancing_loss", "router_z_loss"]


def expert_load(experts: Tensor, n_experts: int, real: Tensor | None = None) -> Tensor:
    """How often each expert was chosen: `(N, K)` to whole numbers `(E,)`, their sum is K times the tokens that count."""
    ones = torch.ones_like(experts) if real is None else real[:, None].expand_as(experts).long()
    return experts.new_zeros(n_experts).scatter_add_(0, experts.flatten(), ones.flatten())


def balancing_loss(probs: Tensor, load: Tensor, real: Tensor | None = None) -> Tensor:
    """E · Σₑ fₑ Pₑ (Fedus et al. 2021, "Switch Transformer", equations 4 to 6): 1 where all experts are used alike.

    f is each expert's share of all choices, and a count: no gradient goes through it. P is the mean probability that the
    router gives it. Where f is large, P is pushed down.

    Args:
        probs: `(N, E)`, the softmax over *all* experts.
        load: `(E,)`, from `expert_load`: of these tokens, or of those of all processes.
    """
    f = load / load.sum().clamp(min=1)
    if real is None:
        P = probs.mean(dim=0)
    else:
        P = (probs * real[:, None]).sum(dim=0) / real.sum().clamp(min=1)
    return probs.shape[-1] * (f * P).sum()


def router_z_loss(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """The mean of (log Σₑ exp logitₑ)² (Zoph et al. 2022, "ST-MoE", equation 5): keeps scores small, and softmax exact."""
    squares = logits.logsumexp(dim=-1).square()
    return squares.mean() if real is None else (squares * real).sum() / real.sum().clamp(min=1)
