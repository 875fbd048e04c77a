# Exported from chapters/part_4_scaling_up/4_2_accumulation_and_mixed_precision.ipynb.
# Edit the lesson, then run: make export
"""Mixed precision: where 16 bits are enough, and the scale that keeps small gradients alive in fp16."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Precision"]


class Precision:
    """Autocast around the forward pass, and loss scaling where the format needs it (Micikevicius et al. 2018).

    Weights, gradients and the optimizer stay in fp32; matrix products run in `dtype`. fp16 has few exponents, so
    small gradients would become zero: the loss is multiplied by a large factor before backward, and gradients are
    divided by it before anybody looks at them. bf16 has the exponents of fp32 and needs no factor.

    Args:
        device: Where the model is.
        dtype: fp32 switches everything here off; bf16; fp16.
        init_scale: fp16's first factor. A step whose gradients overflow is left out and halves it.
        growth_interval: After so many good steps in a row it doubles.

    Raises:
        ValueError: for any other format.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        init_scale: float = 2.0**16,
        growth_interval: int = 2000,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"mixed precision in {dtype}? choose float32, bfloat16 or float16")
        self.device, self.dtype = torch.device(device), dtype
        self.scaler = torch.amp.GradScaler(
            self.device.type,
            init_scale=init_scale,
            growth_interval=growth_interval,
            enabled=dtype == torch.float16,
        )

    def autocast(self) -> torch.autocast:
        """For the forward pass and the loss, not for backward: `with precision.autocast(): …`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss, times the scale, to the parameters' `.grad`."""
        self.scaler.scale(loss).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        grad_clip: float | None = None,
    ) -> Tensor:
        """Unscale, clip, step, update the scale. Returns the norm of the true gradients, before clipping.

        The order is the point: clipping scaled gradients would compare 65536 · g with the limit.
        A step whose gradients are not finite is left out under fp16 (the norm that is returned says so).

        Args:
            optimizer: Of the model whose gradients `backward` made.
            parameters: Those whose norm is taken.
            grad_clip: The largest norm that is let through; None for all.
        """
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if grad_clip is None else grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The scale and its counters; nothing without fp16."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the scale of an earlier run, if it had one."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
