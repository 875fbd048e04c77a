# Exported from chapters/part_2_training_a_tiny_llm/2_4_training_loop.ipynb.
# Edit the lesson, then run: make export
"""The training loop: one step fits on a screen, and everything else is a callback."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tutorial_lib.train.losses import lm_loss
from tutorial_lib.train.optim import decay_groups
from tutorial_lib.train.sched import warmup_cosine

__all__ = ["TrainConfig", "StepInfo", "Callback", "make_optimizer", "train_step", "train"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    steps: int = 1000
    """Optimizer steps; with `max_seconds`, the most there may be."""
    max_seconds: float | None = None
    """Stop after this much training time (evaluation not counted); the schedule follows whichever of
    steps and seconds is further along."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: float = 0.05
    """Fraction of the run spent rising to it."""
    lr_floor: float = 0.1
    """The factor on `lr` at the end."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's memory for the gradient and for its square."""
    weight_decay: float = 0.1
    """Pull of the matrices towards zero."""
    grad_clip: float = 1.0
    """The largest gradient norm that is let through."""


@dataclass(frozen=True)
class StepInfo:
    """What callbacks are told after each step."""

    step: int
    """1 after the first step."""
    loss: float
    """Mean loss of this step's batch, nats per token."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """The rate that this step used."""
    tokens: int
    """Tokens trained on so far."""
    seconds: float
    """Training time so far, without the time spent in callbacks."""
    progress: float
    """Fraction of the run that is done, 0 to 1."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What else there is to tell of this step's batch, by name."""


Callback: TypeAlias = Callable[[StepInfo], bool | None]
"""Called after every step; returning True ends the run."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """torch's AdamW with decay on the matrices only."""
    groups = decay_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, grad_clip: float
) -> tuple[float, float]:
    """Forward, backward, clip, step. Returns the loss and the gradient norm before clipping."""
    loss = lm_loss(model(inputs), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.item(), grad_norm.item()


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: TrainConfig,
    callbacks: Iterable[Callback] = (),
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Callable[[float], float] | None = None,
) -> StepInfo | None:
    """Train until the steps, the seconds or the data run out, or a callback says stop.

    Args:
        model: Ids `(B, T)` to logits `(B, T, V)`.
        batches: Pairs of inputs and already shifted labels, both `(B, T)`.
        callbacks: All are told of every step, in this order, even when one of them says stop.
        optimizer: `make_optimizer`'s when None. Each group's own `lr` is its peak. It is kept in the group
            as `initial_lr` (torch's own name for it), so that training on with the same optimizer, or with
            one from a checkpoint, does not take the decayed rate for the peak.
        schedule: Progress (0 to 1) to the factor on the peak rate; warm-up and cosine when None.

    Returns:
        What the last step's callbacks were told; None if there was no step.
    """
    optimizer = optimizer or make_optimizer(model, config)
    peaks = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    schedule = schedule or (lambda progress: warmup_cosine(progress, config.warmup, config.lr_floor))
    callbacks = list(callbacks)  # an iterator would be empty after the first step
    device = next(model.parameters()).device
    stream: Iterator = iter(batches)
    info, tokens, seconds = None, 0, 0.0
    for step in range(1, config.steps + 1):
        began = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            break
        # A step's rate is that of its middle: never zero at the first step.
        progress = (step - 0.5) / config.steps
        if config.max_seconds is not None:
            progress = max(progress, seconds / config.max_seconds)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(progress)
        inputs, labels = (part.to(device) for part in batch)
        model.train()  # at every step: a callback may have evaluated the model
        loss, grad_norm = train_step(model, optimizer, inputs, labels, config.grad_clip)
        tokens += labels.numel()
        seconds += time.perf_counter() - began
        out_of_time = config.max_seconds is not None and seconds >= config.max_seconds
        done = 1.0 if out_of_time else max(progress, step / config.steps)
        info = StepInfo(step, loss, grad_norm, optimizer.param_groups[0]["lr"], tokens, seconds, done)
        wants_to_stop = [callback(info) for callback in callbacks]  # a list: every callback is told
        if any(wants_to_stop) or out_of_time:
            break
    return info
