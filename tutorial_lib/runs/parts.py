"""From settings to the trainer of a run: precision, parallelism, optimizer and schedule, for any objective."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from tutorial_lib.moe.model import MoEConfig
from tutorial_lib.runs.config import Config, ConfigError
from tutorial_lib.runs.settings import TrainTable
from tutorial_lib.tools.devices import autocast_dtype, supports_bf16
from tutorial_lib.tools.seeds import derive_seed, seed_everything
from tutorial_lib.train.balance import Balanced, NudgeBias
from tutorial_lib.train.compiled import Compiled
from tutorial_lib.train.distributed import rank, world_size
from tutorial_lib.train.loop import Callback
from tutorial_lib.train.objective import Batch, Objective
from tutorial_lib.train.optimizers import build_optimizer
from tutorial_lib.train.parallel import parallelize
from tutorial_lib.train.precision import Precision
from tutorial_lib.train.recompute import recompute_blocks
from tutorial_lib.train.schedules import SCHEDULES
from tutorial_lib.train.trainer import Trainer

__all__ = ["described", "make_trainer", "pick_precision", "rows_at_once", "with_balance"]


def pick_precision(amp: bool | str, device: torch.device) -> Precision:
    """What `train.amp` means on this device.

    Raises:
        ConfigError: if the device cannot do it.
    """
    if amp is False:
        return Precision(device)
    if amp is True:
        return Precision(device, autocast_dtype(device))
    if device.type == "cpu" and (amp == "fp16" or not supports_bf16(device)):
        raise ConfigError(
            f"train.amp is {amp}, but this CPU does not compute in it: use false, or true for the best"
        )
    return Precision(device, {"bf16": torch.bfloat16, "fp16": torch.float16}[amp])


def described(model: nn.Module, device: torch.device, precision: Precision) -> str:
    """What is trained, where and in what: the beginning of a run's first sentence."""
    size = sum(p.numel() for p in model.parameters())
    return f"{size:,} parameters on {device.type} × {world_size()} in {str(precision.dtype)[6:]}"


def rows_at_once(train: TrainTable) -> int:
    """Rows that a process computes together.

    Raises:
        ConfigError: if the processes cannot share a batch evenly.
    """
    if train.batch_size % world_size():
        raise ConfigError(
            f"train.batch_size {train.batch_size} cannot be shared evenly by {world_size()} processes"
        )
    return train.micro_batch_size or train.batch_size // world_size()


def with_balance(model: nn.Module, objective: Objective) -> tuple[Objective, tuple[Callback, ...]]:
    """What a model asks of its training: an objective that keeps its experts busy if it has any, and who acts after a step."""
    config = model.config
    if not isinstance(config, MoEConfig):
        return objective, ()
    nudge = NudgeBias(model, config.bias_update_speed) if config.bias_update_speed else None
    balanced = Balanced(objective, config.aux_loss_coef, config.z_loss_coef, nudge)
    return balanced, () if nudge is None else (nudge,)


def make_trainer(config: Config, model: nn.Module, objective: Objective, batches: Iterable[Batch]) -> Trainer:
    """The trainer that the `train` table describes.

    Args:
        model: On this process's device, with its layers in `model.blocks`, and the same on every process.
        objective: What is learned.
        batches: This process's rows.

    Raises:
        ConfigError: if the processes cannot share a batch evenly, or the device cannot compute in `train.amp`.
    """
    train = config.train
    rows_at_once(train)
    precision = pick_precision(train.amp, next(model.parameters()).device)
    if train.amp:
        torch.set_float32_matmul_precision("high")  # what autocast leaves in fp32 may use TF32
    if train.activation_checkpointing:
        recompute_blocks(model.blocks)
    how = train.parallel if world_size() > 1 else "none"
    wrapped = _spread(model, how, precision.dtype, train.compile)
    if train.compile and how in ("none", "ddp"):
        objective = Compiled(objective)
    optimizer = build_optimizer(
        model,
        train.optimizer,
        train.lr,
        train.weight_decay,
        (train.betas[0], train.betas[1]),
        train.matrix_lr,
        train.momentum,
    )
    seed_everything(derive_seed(train.seed, "process", rank()))  # equal weights, but other dropout
    shape = partial(SCHEDULES[train.schedule], floor=train.lr_floor)
    more: dict[str, Any] = {
        "schedule": partial(shape, warmup=train.warmup_steps / train.steps),
        "grad_clip": train.grad_clip,
        "micro_batch_size": train.micro_batch_size,
        "max_seconds": train.max_seconds,
        "objective": objective,
    }
    if how == "deepspeed":
        from tutorial_lib.train.deepspeed_engine import deepspeed_trainer

        stage, dtype = train.zero_stage, precision.dtype
        return deepspeed_trainer(model, optimizer, batches, train.steps, stage, dtype, **more)
    trainer = Trainer(wrapped, optimizer, batches, train.steps, precision=precision, ema=train.ema, **more)
    if train.max_seconds is not None and train.warmup_steps:
        # The clock says how far the run is, but a warm-up of 100 steps has 100 steps.
        trainer.schedule = lambda done: (
            min(1.0, (trainer.step + 0.5) / train.warmup_steps) * shape(done, warmup=0.0)
        )
    return trainer


def _spread(model: nn.Module, how: str, dtype: torch.dtype, compile: bool) -> nn.Module:
    """The model over the processes. Where it is cut among them, what is compiled are its pieces."""
    if compile and how == "fsdp":  # block by block, so that each can be gathered before it runs
        for block in model.blocks:
            block.compile()
    if compile and how == "deepspeed":
        model.compile()
    return parallelize(model, "none" if how == "deepspeed" else how, dtype)
