# Exported from chapters/part_5_moe/5_3_hybrid_dense_moe.ipynb. Edit the lesson, then run: make export
"""Room for so many tokens in each expert, and none for the rest: what shapes that are known beforehand cost.

Letters: N tokens · D model width · E experts · K experts of a token · C capacity.
"""

import math

import torch
from torch import Tensor

from tutorial_lib.moe.experts import Experts

__all__ = ["capacity_of", "find_slots", "run_with_capacity"]


def capacity_of(n_tokens: int, n_experts: int, experts_per_token: int, factor: float) -> int:
    """C: the rows that each expert has room for, `factor` times an even share, rounded up (Fedus et al. 2021, eq. 3)."""
    return math.ceil(factor * n_tokens * experts_per_token / n_experts)


def find_slots(experts: Tensor, n_experts: int, capacity: int) -> Tensor:
    """A place for each choice: `(N, K)` to slots `(N, K)`, expert·C + rank, or E·C for a choice that found none.

    All first choices are served before any second one; among those, who stands earlier in the batch comes first (Lepikhin
    et al. 2020, "GShard", algorithm 1).
    """
    choices = experts.T.flatten()  # (K·N,): first choices first
    order = choices.argsort(stable=True)
    load = choices.new_zeros(n_experts).scatter_add_(0, choices, torch.ones_like(choices))
    first = load.cumsum(0) - load  # where each expert's run begins
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[choices[order]]
    slots = torch.where(rank < capacity, choices * capacity + rank, n_experts * capacity)
    return slots.view(experts.shape[1], -1).T


def run_with_capacity(experts: Experts, x: Tensor, slots: Tensor, capacity: int) -> Tensor:
    """Tokens `(N, D)` through the experts in whose slots `(N, K)` they are, to `(N, K, D)`; 0 for a choice without one."""
    N, K = slots.shape
    E, D = len(experts.up), x.shape[-1]
    token = x.new_full((E * capacity + 1,), N, dtype=torch.long)  # who is in each slot; N: nobody
    token[slots.flatten()] = torch.arange(N, device=x.device).repeat_interleave(K)
    filled = torch.cat([x, x.new_zeros(1, D)])[token[:-1]]  # (E·C, D)
    done = experts.batched(filled.view(E, capacity, D)).view(E * capacity, D)
    return torch.cat([done, done.new_zeros(1, D)])[slots]
