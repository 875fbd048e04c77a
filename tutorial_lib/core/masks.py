# Exported from chapters/part_1_core_transformer/1_2_self_attention_first_principles.ipynb.
# Edit the lesson, then run: make export
"""Who may look at whom. In every mask of this course, True means "may attend" (PyTorch's meaning)."""

import torch
from torch import Tensor

__all__ = ["causal_mask"]


def causal_mask(n_queries: int, n_keys: int | None = None, device: torch.device | None = None) -> Tensor:
    """Each query sees itself and the past, never the future.

    The queries are the *last* `n_queries` of `n_keys` positions (by default all of them). That offset is
    what a KV cache needs later: two new queries after eight cached keys see nine and ten keys.

    Returns:
        A bool tensor of shape `(n_queries, n_keys)`.

    Raises:
        ValueError: if there are fewer keys than queries.
    """
    n_keys = n_queries if n_keys is None else n_keys
    if n_keys < n_queries:
        raise ValueError(f"{n_queries} queries but only {n_keys} keys: every query needs its own key")
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]  # (Q, 1) absolute positions
    key = torch.arange(n_keys, device=device)[None, :]  # (1, K)
    return key <= query  # (Q, K)
