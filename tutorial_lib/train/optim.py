# Exported from chapters/part_2_training_a_tiny_llm/2_4_training_loop.ipynb.
# Edit the lesson, then run: make export
"""AdamW from its update rule, and which parameters should decay."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

__all__ = ["AdamW", "decay_groups"]


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    Written to be read; `torch.optim.AdamW(..., fused=True)` does the same arithmetic in one kernel. As there,
    the decay is multiplied by the learning rate.

    Args:
        params: Tensors, or groups: dicts with `"params"` and whatever of the rest differs for them.
        lr: η, roughly how far a weight moves in one step.
        betas: β₁ and β₂, the memory for the gradient and for its square.
        eps: ε, keeps a weight without gradient from dividing by zero.
        weight_decay: λ; each step first multiplies the weights by 1 - lr · weight_decay.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:  # not part of this loss: no step, no decay, and its own count stands still
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["m"] = torch.zeros_like(p)  # running mean of the gradient
                    state["v"] = torch.zeros_like(p)  # running mean of its square
                state["step"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])  # decay first, and not through the gradient
                state["m"].lerp_(p.grad, 1 - beta1)
                state["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                m_hat = state["m"] / (1 - beta1 ** state["step"])  # both started at zero: undo that bias
                v_hat = state["v"] / (1 - beta2 ** state["step"])
                p.addcdiv_(m_hat, v_hat.sqrt().add_(group["eps"]), value=-group["lr"])
        return loss


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; biases and norm weights do not (pulling a norm's scale to zero mutes its layer).

    Every trainable parameter is in exactly one of the two groups; a tied one (`head.weight`) is there once,
    since `parameters()` names each tensor once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
