# Exported from chapters/part_5_moe/5_1_routing_and_load_balancing.ipynb.
# Edit the lesson, then run: make export
"""A router: a linear layer and a top-k say which experts work on a token, and how much each has to say.

Letters: N tokens (all rows together) · D model width · E experts · K experts of a token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Routing", "Router"]


class Routing(NamedTuple):
    """What a router said about N tokens."""

    logits: Tensor
    """`(N, E)`, fp32: the scores."""
    probs: Tensor
    """`(N, E)`, fp32: their softmax over *all* experts."""
    experts: Tensor
    """`(N, K)`: which experts work on each token, the likeliest first."""
    weights: Tensor
    """`(N, K)`, fp32: by how much each one's output is multiplied."""
    kept: Tensor | None = None
    """`(N, K)`, bool: what a layer with a capacity found room for; None: all of it."""


class Router(nn.Module):
    """Scores every expert for every token and picks K (Shazeer et al. 2017; Fedus et al. 2021, "Switch Transformer").

    It computes in fp32 whatever the model does: where two experts score nearly the same, bf16 sends the token to the
    other one. Its last `Routing` stays with it, since an objective wants to know.

    Args:
        d_model: D.
        n_experts: E.
        experts_per_token: K.
        renormalize: Whether the K weights are divided by their sum (Mixtral). Not with K = 1: the one weight would always
            be 1, and the router learn nothing.
        balance_bias: Whether it has a bias that decides who is picked, and not how much he has to say: for balance
            without a loss (`train.balance.NudgeBias`).

    Raises:
        ValueError: if a token cannot have K of E experts.
    """

    full_precision = True  # int8 leaves it as it is

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        experts_per_token: int = 2,
        renormalize: bool = True,
        balance_bias: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= n_experts:
            raise ValueError(f"a token cannot have {experts_per_token} of {n_experts} experts")
        self.n_experts, self.experts_per_token, self.renormalize = n_experts, experts_per_token, renormalize
        self.weight = nn.Parameter(torch.randn(n_experts, d_model) * d_model**-0.5)
        # Never learned by gradients: a buffer, so that it is saved and that no optimizer sees it.
        self.register_buffer("bias", torch.zeros(n_experts) if balance_bias else None)
        # Plain attributes, and no named tuple: torch 2.11 compiles no model that keeps one.
        self._said: tuple[Tensor, ...] = ()
        self.kept: Tensor | None = None

    @property
    def routing(self) -> Routing:
        """What it said last."""
        return Routing(*self._said, self.kept)

    def forward(self, x: Tensor) -> Routing:
        """Tokens `(N, D)` to who works on them."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # (N, E)
            probs = logits.softmax(
                dim=-1
            )  # over all experts, and then the best: P of the balancing loss needs all
            favour = probs.detach() if self.bias is None else probs.detach() + self.bias
            experts = favour.topk(self.experts_per_token, dim=-1).indices  # (N, K)
            weights = probs.gather(-1, experts)  # without the bias
            if self.renormalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        self._said, self.kept = (logits, probs, experts, weights), None
        return Routing(logits, probs, experts, weights)
