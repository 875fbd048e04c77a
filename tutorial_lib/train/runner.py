"""From a configuration to a trained model in a folder: puts the pieces of Parts 1 to 4 together.

runs/tiny/config.yaml  metrics.csv  tensorboard/  step_00001000.ckpt …  latest.ckpt  best.ckpt
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import OmegaConf
from rich.console import Console

from tutorial_lib.config import Config, ConfigError, model_config
from tutorial_lib.core.kernels import attention_kernel
from tutorial_lib.core.model import Transformer
from tutorial_lib.data.source import Source, check_fits
from tutorial_lib.files import write_text
from tutorial_lib.tools.devices import autocast_dtype, pick_device, supports_bf16
from tutorial_lib.tools.seeds import derive_seed, seed_everything
from tutorial_lib.train.callbacks import Evaluate, Sample, Save, Show, Stop
from tutorial_lib.train.checkpoint import model_header
from tutorial_lib.train.checkpoints import CheckpointFolder
from tutorial_lib.train.distributed import barrier, is_main, rank, start, unwrap, world_size
from tutorial_lib.train.inputs import in_a_file, open_text, pretrained, save_tokenizer
from tutorial_lib.train.loggers import (
    CSVLogger,
    Logger,
    Loggers,
    TensorBoardLogger,
    WandbLogger,
)
from tutorial_lib.train.loop import StepInfo
from tutorial_lib.train.optimizers import build_optimizer
from tutorial_lib.train.parallel import parallelize
from tutorial_lib.train.precision import Precision
from tutorial_lib.train.recompute import recompute_blocks
from tutorial_lib.train.schedules import SCHEDULES
from tutorial_lib.train.trainer import Trainer
from tutorial_lib.train.watchers import LogSteps, LogWeights, TraceProfiler

if TYPE_CHECKING:
    from tutorial_lib.interop.pretrained import Pretrained

__all__ = ["Outcome", "pick_precision", "train_run"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    last: StepInfo | None
    """None if there was nothing left to do."""
    val_loss: float | None
    best: float
    """The lowest validation loss."""
    stopped_early: bool
    """Whether the validation loss ended it."""
    stopped_by: str | None
    """The signal that ended it, if one did."""


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


def train_run(config: Config, resume: bool = False, console: Console | None = None) -> Outcome:
    """Train as the configuration says, into `log.dir/log.name`. Under torchrun, every process calls this.

    Args:
        resume: Go on from the newest whole checkpoint in the folder; begin if there is none.

    Raises:
        ConfigError: if the parts do not fit together; nothing is written then.
        CorpusError, CheckpointError, OSError: if something cannot be had or read.
        DivergedError: if the loss is no number any more.
    """
    console = console or Console(stderr=True)
    device = start(pick_device(config.train.device))
    tell = partial(console.print, markup=False, soft_wrap=True) if is_main() else _silent
    train, log = config.train, config.log
    folder = Path(log.dir).expanduser() / (log.name or "run")
    checkpoints = CheckpointFolder(folder, train.keep_last, train.keep_best)
    if checkpoints.files() and not resume:
        raise ConfigError(
            f"{folder} already holds a run ({checkpoints.files()[0].name}): "
            "add --resume to go on with it, or log.name=… to begin another"
        )
    names = [name for name in ("latest.ckpt", "best.ckpt") if (folder / name).is_file()]
    if names and not checkpoints.files():
        raise ConfigError(
            f"{folder} has {names[0]} but no step_….ckpt, which a run goes on from: "
            "rename it to step_00000000.ckpt, with its step, or choose another log.name"
        )
    start_with = pretrained(config, checkpoints.files() if resume else ())
    source = open_text(config, tell, start_with)
    val_tokens = source.val
    for tokens, what in ((source.train, "train on"), (val_tokens, "validate on")):
        if tokens is not None:
            check_fits(tokens, train.seq_len, what)
    trainer, header = _trainer(config, source, device, tell, start_with)

    # From here on the folder is written to.
    lock = _lock(folder) if is_main() else None
    found = checkpoints.newest(tell) if resume else None
    if resume:
        tell(f"going on from {found[2]}" if found else f"nothing to resume in {folder}: starting")
    barrier()  # every process has read, before the first one writes
    step = 0
    if found is not None:
        _check_same_model(found[1], header, found[2])
        try:
            trainer.load_state_dict(found[0])
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{found[2]}: {error}: has train.seed or the text changed?") from None
        step = trainer.step
    logger = _loggers(config, folder, step if found else None, tell)
    try:
        rows = train.micro_batch_size or max(1, train.batch_size // world_size())
        evaluator = Evaluate(
            trainer,
            val_tokens,
            train.seq_len,
            rows,
            train.eval_every,
            logger,
            train.eval_windows,
            source.bytes_per_token(val_tokens),
            train.patience,
        )
        save = Save(trainer, checkpoints, train.save_every, header, evaluator)
        if found is not None:
            save.load_state_dict(found[0]["callbacks"])
            save.step = step
        if is_main():
            write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.as_dict())))
            save_tokenizer(source, folder / "tokenizer.json", start_with)
        sample = Sample(trainer, source.tokenizer, log.prompt, evaluator, logger) if log.prompt else None
        show, stop = Show(console, evaluator, sample), Stop(tell)
        trace = TraceProfiler(folder / "trace.json.gz", log.trace_at) if log.trace_at and is_main() else None
        weights = LogWeights(unwrap(trainer.model), logger, train.eval_every) if log.histograms else None
        steps = LogSteps(logger, log.every)
        callbacks = [c for c in (steps, weights, trace, evaluator, sample, save, show, stop) if c is not None]
        kernel = nullcontext() if train.attention == "auto" else attention_kernel(train.attention)
        with stop.listening(), show.bar, kernel:
            last = trainer.run(callbacks)
            if last is not None:
                save.save()
        if trace is not None:
            trace.close()
    finally:
        logger.close()
        if lock is not None:
            os.close(lock)
    loss = None if evaluator.last is None else evaluator.last.loss
    early = last is not None and last.progress < 1 and stop.asked is None
    return Outcome(folder, last, loss, evaluator.stopping.best, early, stop.asked)


def _lock(folder: Path) -> int | None:
    """Keep other runs out of the folder until the handle is closed, or this process is gone."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself is locked: no file to be left behind
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"another process is training in {folder}: choose another log.name") from None
    except OSError:  # a disk that knows no locks
        pass
    return handle


def _silent(*_: object) -> None:
    pass


def _trainer(
    config: Config, source: Source, device: torch.device, tell, start_with: Pretrained | None
) -> tuple[Trainer, dict[str, str]]:
    train = config.train
    if train.batch_size % world_size():
        raise ConfigError(
            f"train.batch_size {train.batch_size} cannot be shared evenly by {world_size()} processes"
        )
    precision = pick_precision(train.amp, device)
    if train.amp:
        torch.set_float32_matmul_precision("high")  # what autocast leaves in fp32 may use TF32
    torch.manual_seed(train.seed)  # the same weights on every process …
    model = Transformer(model_config(config)) if start_with is None else start_with.model.train()
    model = model.to(device)
    header = _header(config, source, model)
    tell(
        f"{model.num_params():,} parameters on {device.type} × {world_size()} in {str(precision.dtype)[6:]}; "
        + (f"{len(source.train):,} tokens to train on, " if source.train is not None else "")
        + f"{len(source.val):,} to validate on"
    )
    if train.activation_checkpointing:
        recompute_blocks(model.blocks)
    how = train.parallel if world_size() > 1 else "none"
    zero = how == "deepspeed"
    if train.compile and how == "fsdp":  # block by block, so that each can be gathered before it runs
        for block in model.blocks:
            block.compile()
    wrapped = parallelize(model, "none" if zero else how, precision.dtype)
    if train.compile and how != "fsdp":  # around DDP: it then cuts the graph where gradients are sent
        wrapped.compile()
    optimizer = build_optimizer(
        model,
        train.optimizer,
        train.lr,
        train.weight_decay,
        (train.betas[0], train.betas[1]),
        train.matrix_lr,
        train.momentum,
    )
    seed_everything(derive_seed(train.seed, "process", rank()))  # … and other dropout
    batches = source.batches(
        train.batch_size, train.seq_len, derive_seed(train.seed, "data"), rank(), world_size()
    )
    schedule = partial(
        SCHEDULES[train.schedule], warmup=train.warmup_steps / train.steps, floor=train.lr_floor
    )
    more = {
        "schedule": schedule,
        "grad_clip": train.grad_clip,
        "micro_batch_size": train.micro_batch_size,
        "max_seconds": train.max_seconds,
    }
    if zero:
        from tutorial_lib.train.deepspeed_engine import deepspeed_trainer

        stage, dtype = train.zero_stage, precision.dtype
        return deepspeed_trainer(model, optimizer, batches, train.steps, stage, dtype, **more), header
    trainer = Trainer(wrapped, optimizer, batches, train.steps, precision=precision, ema=train.ema, **more)
    if train.max_seconds is not None and train.warmup_steps:
        # The clock says how far the run is, but a warm-up of 100 steps has 100 steps.
        shape = partial(SCHEDULES[train.schedule], warmup=0.0, floor=train.lr_floor)
        trainer.schedule = lambda done: min(1.0, (trainer.step + 0.5) / train.warmup_steps) * shape(done)
    return trainer, header


def _header(config: Config, source: Source, model: Transformer) -> dict[str, str]:
    name = "tokenizer.json" if in_a_file(source) else source.tokenizer_name
    return model_header(model, {"tokenizer": name, "run": config.as_dict()})


def _check_same_model(found: dict[str, str], own: dict[str, str], path: Path) -> None:
    was, now = json.loads(found["config"]), json.loads(own["config"])
    for name in was:
        if was[name] != now.get(name):
            raise ConfigError(
                f"{path} holds a model with {name}={was[name]}, but the configuration says {now.get(name)}: "
                "use the run's own config.yaml, or another log.name"
            )


def _loggers(config: Config, folder: Path, resume_step: int | None, tell) -> Logger:
    if not is_main():
        return Logger()
    log = config.log
    loggers: list[Logger] = [CSVLogger(folder / "metrics.csv", resume_step)]
    if log.tensorboard:
        try:
            loggers.append(TensorBoardLogger(folder / "tensorboard", resume_step))
        except ImportError as error:  # it is on by default, and not everybody has it
            tell(f"{error}; metrics.csv is written in any case")
    if log.wandb:
        loggers.append(WandbLogger(folder, log.project, folder.name, config.as_dict(), resume_step))
    return Loggers(loggers)
