# Exported from chapters/part_3_modernizing/3_8_modern_recipe.ipynb. Edit the lesson, then run: make export
"""Muon: momentum, and then every direction of a matrix gets the same say (Jordan et al. 2024)."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tutorial_lib.train.optim import AdamW

__all__ = ["orthogonalize", "Muon", "muon_groups"]


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Push all singular values of each matrix towards 1 (Newton–Schulz, with Jordan's coefficients).

    With M = U S Vᵀ, an odd polynomial in M acts on S alone: a·M + b·(M Mᵀ) M + c·(M Mᵀ)² M has the singular
    values a·s + b·s³ + c·s⁵. These coefficients rise steeply at 0: five steps bring all s
    from 0.002 (of the matrix's norm) to 1 between 0.68 and 1.2, which is near enough, and cheaper than an SVD.
    Fainter directions are lifted by a⁵ = 485.

    Args:
        matrices: `(..., m, n)`.
        steps: How often.
        dtype: What to compute in; None: bf16 on a GPU, else fp32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype = dtype or (torch.bfloat16 if matrices.is_cuda else torch.float32)
    X = matrices.to(dtype)
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # the smaller Gram matrix is the cheaper one
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1, or it diverges
    for _ in range(steps):
        gram = X @ X.mT
        X = a * X + (b * gram + c * gram @ gram) @ X
    return (X.mT if tall else X).to(matrices.dtype)


class Muon(AdamW):
    """Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer.

    Matrices of one shape are orthogonalized together: one batched multiplication in place of many small ones.
    A parameter `(E, m, n)` is a stack of E matrices, each with directions of its own: experts, for one.
    The update is scaled by 0.2·√max(m, n), which gives it the size of an AdamW update, so that a rate for one
    serves the other (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).

    Args:
        groups: Dicts with `params`, `lr`, `weight_decay` and `muon` (bool); see `muon_groups`.
        momentum: Memory for the gradient of a matrix (Nesterov's form).
        betas: AdamW's, for the rest.
        eps: AdamW's.
        ns_steps: Newton–Schulz steps; fewer are cheaper and flatten the singular values less.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        ns_steps: int = 5,
    ) -> None:
        ours = {"momentum": momentum, "ns_steps": ns_steps, "muon": False}
        super().__init__([ours | group for group in groups], betas=betas, eps=eps)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        everything = self.param_groups
        for group in everything:
            if group["muon"]:
                self._muon(group, [p for p in group["params"] if p.grad is not None])
        try:  # the other groups are lesson 2.4's business
            self.param_groups = [group for group in everything if not group["muon"]]
            super().step()
        finally:
            self.param_groups = everything
        return loss

    def _muon(self, group: dict, params: list[Tensor]) -> None:
        by_shape: dict[tuple, list[Tensor]] = defaultdict(list)
        for p in params:
            by_shape[p.shape, p.dtype, p.device].append(p)
        for (shape, _, _), same in by_shape.items():
            updates = []
            for p in same:
                momentum = self.state[p].setdefault("m", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(momentum, group["momentum"]))  # Nesterov: look one step ahead
            directions = orthogonalize(torch.stack(updates), group["ns_steps"])  # (N, m, n) or (N, E, m, n)
            size = 0.2 * max(shape[-2:]) ** 0.5
            for p, direction in zip(same, directions, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"] * size)


def muon_groups(model: nn.Module, lr: float, adamw_lr: float, weight_decay: float = 0.1) -> list[dict]:
    """Three groups: the blocks' matrices (Muon), embeddings and output layer (AdamW), norms and biases (no decay).

    An embedding is a table of rows and not a map between spaces: making its rows orthogonal means nothing. A
    router of experts does map, and is one of the blocks' matrices.

    Args:
        model: With its layers in `model.blocks`.
        lr: Peak rate of the matrices, stacks of them included.
        adamw_lr: Peak rate of the rest.
        weight_decay: For all that has two dimensions or more.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [p for name, p in named if name.startswith("blocks.") and p.ndim >= 2]
    taken = {id(p) for p in inside}
    rest = [p for _, p in named if id(p) not in taken]
    return [
        {"params": inside, "lr": lr, "weight_decay": weight_decay, "muon": True},
        {
            "params": [p for p in rest if p.ndim >= 2],
            "lr": adamw_lr,
            "weight_decay": weight_decay,
            "muon": False,
        },
        {"params": [p for p in rest if p.ndim < 2], "lr": adamw_lr, "weight_decay": 0.0, "muon": False},
    ]
