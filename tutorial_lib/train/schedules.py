# Exported from chapters/part_4_scaling_up/4_3_lr_schedules.ipynb. Edit the lesson, then run: make export
"""Schedules by name: what to multiply the peak learning rate with, when a fraction of the run is done."""

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tutorial_lib.train.loop import train_step
from tutorial_lib.train.sched import warmup_cosine

__all__ = ["constant", "linear", "wsd", "SCHEDULES", "range_test"]


def constant(progress: float, warmup: float = 0.05, floor: float = 0.1) -> float:
    """Up in a line, then 1 to the end and beyond.

    Args:
        progress: Fraction of the run that is done, in steps or in time.
        warmup: Fraction spent rising from 0 to 1.
        floor: Not used: it is here so that all schedules are called alike.
    """
    return progress / warmup if progress < warmup else 1.0


def linear(progress: float, warmup: float = 0.05, floor: float = 0.1) -> float:
    """Up in a line, then down in a line; the arguments are those of `warmup_cosine`."""
    if progress < warmup:
        return progress / warmup
    left = max(0.0, 1 - progress) / (1 - warmup) if warmup < 1 else 0.0
    return floor + (1 - floor) * left


def wsd(progress: float, warmup: float = 0.05, floor: float = 0.1, decay: float = 0.2) -> float:
    """Warm up, stay, decay (Hu et al. 2024, section 4), the descent by 1 - √ (Hägele et al. 2024, section 3).

    Between the warm-up and the descent nothing depends on the length of the run: train on as long as you like,
    then decay.

    Args:
        progress: Fraction of the run that is done; beyond 1 the factor stays at the floor.
        warmup: Fraction spent rising from 0 to 1.
        floor: The factor at the end.
        decay: Fraction spent falling from 1 to the floor. With `warmup` more than 1 there is no plateau, and
            the lower of the two counts.
    """
    up = progress / warmup if progress < warmup else 1.0
    fallen = min(1.0, 1 - (1 - progress) / decay) if progress > 1 - decay else 0.0
    return min(up, floor + (1 - floor) * (1 - math.sqrt(fallen)))


# By the names that a config uses; each is called `(progress, warmup, floor)`.
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "cosine": warmup_cosine,
    "linear": linear,
    "wsd": wsd,
    "constant": constant,
}


def range_test(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    low: float = 1e-5,
    high: float = 1.0,
    steps: int = 100,
    grad_clip: float = 1.0,
) -> list[tuple[float, float]]:
    """Train while the rate climbs from `low` to `high`, and see where the loss blows up (Smith 2017, section 3.3).

    It works on a copy: the model, its mode and torch's random state are afterwards what they were.

    Args:
        model: Ids `(B, T)` to logits `(B, T, V)`.
        batches: Pairs of inputs and shifted labels, `(B, T)`; if they run out, the test ends.
        make_optimizer: Gives the copy an optimizer. Groups keep the ratio of their rates.
        low: Rate of the first step.
        high: Rate of the last; from step to step the rate grows by the same factor.
        steps: How many at most. It stops when the loss is not finite, or twice the lowest so far.
        grad_clip: The largest gradient norm that is let through.

    Returns:
        The rate of each step (the first group's) and the loss that the step found, before it moved.
    """
    if not 0 < low < high or steps < 2:
        raise ValueError(
            f"low {low:g}, high {high:g}, {steps} steps: give 0 < low < high, and 2 steps or more"
        )
    device = next(model.parameters()).device
    found: list[tuple[float, float]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = copy.deepcopy(model).train()
        optimizer = make_optimizer(model)
        ratios = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
        for step, batch in zip(range(steps), batches, strict=False):
            rate = low * (high / low) ** (step / (steps - 1))
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = rate * ratio
            loss, _ = train_step(model, optimizer, *(part.to(device) for part in batch), grad_clip)
            found.append((rate, loss))
            if not math.isfinite(loss) or loss > 2 * min(loss for _, loss in found):
                break
    return found
