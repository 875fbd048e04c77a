"""What every run has: a folder of its own, a place to go on from, callbacks, and an end that is told.

runs/tiny/config.yaml  metrics.csv  tensorboard/  step_00001000.ckpt …  latest.ckpt  best.ckpt

A kind of run (`runs.pretrain`, for one) says how its `Work` is made; `carry_out` does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from omegaconf import OmegaConf
from rich.console import Console

from tutorial_lib.core.kernels import attention_kernel
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.files import write_text
from tutorial_lib.runs.callbacks import Evaluate, HasState, Look, Sample, Save, every
from tutorial_lib.runs.config import Config, ConfigError
from tutorial_lib.runs.folder import check_free, locked
from tutorial_lib.runs.settings import LogTable
from tutorial_lib.runs.terminal import Show, Stop
from tutorial_lib.tools.devices import pick_device
from tutorial_lib.train.checkpoint_folder import CheckpointFolder
from tutorial_lib.train.distributed import barrier, is_main, start, unwrap
from tutorial_lib.train.loggers import CSVLogger, Logger, Loggers, TensorBoardLogger, WandbLogger
from tutorial_lib.train.loop import Callback, StepInfo
from tutorial_lib.train.trainer import Trainer
from tutorial_lib.train.watchers import LogSteps, LogWeights, TraceProfiler

__all__ = ["Outcome", "Start", "Tell", "Work", "carry_out"]

Tell: TypeAlias = Callable[[str], None]
"""Says a sentence to the person at the terminal."""


@dataclass(frozen=True)
class Start:
    """What a kind of run may need to know before it begins."""

    device: torch.device
    tell: Tell
    checkpoints: Sequence[Path]
    """Of the run that goes on, the newest first; none for one that begins."""


@dataclass
class Work:
    """What a kind of run brings."""

    trainer: Trainer
    header: dict[str, str]
    """What `load_model` will need: from `model_header`."""
    look: Look
    """What the model is judged by: `loss` chooses the best checkpoint and ends the run when patience does."""
    tokenizer: Tokenizer | None = None
    """For samples: `log.prompt`."""
    bytes_per_token: float | None = None
    """Of what is held out, if that is text."""
    keep: Callable[[Path], None] = lambda folder: None
    """Puts into the run's folder what has to go along with its checkpoints: the tokenizer, say."""
    callbacks: Sequence[Callback] = field(default_factory=tuple)
    """More of them; they come first."""
    also: Mapping[str, HasState] = field(default_factory=dict)
    """What else is saved with every checkpoint and given back on resuming, by name: a controller's state, say."""


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


def carry_out(
    config: Config,
    prepare: Callable[[Config, Start], Work],
    resume: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Train as the configuration says, into `log.dir/log.name`. Under torchrun, every process calls this.

    Args:
        prepare: Makes the work; whatever is wrong with it is said before anything is written.
        resume: Go on from the newest whole checkpoint in the folder; begin if there is none.

    Raises:
        ConfigError: if the parts do not fit together; nothing is written then.
        CorpusError, CheckpointError, OSError: if something cannot be had or read.
        DivergedError: if the loss is no number any more.
    """
    console = console or Console(stderr=True)
    device = start(pick_device(config.train.device))
    tell = partial(console.print, markup=False, soft_wrap=True) if is_main() else _silent
    folder = Path(config.log.dir).expanduser() / (config.log.name or "run")
    checkpoints = CheckpointFolder(folder, config.train.keep_last, config.train.keep_best)
    check_free(checkpoints, resume)
    work = prepare(config, Start(device, tell, checkpoints.files() if resume else ()))
    # From here on the folder is written to.
    with locked(folder):
        found = _go_on(work, checkpoints, tell) if resume else None
        barrier()  # every process has read, before the first one writes
        logger = _loggers(config, folder, work.trainer.step if found else None, tell)
        try:
            return _train(config, work, checkpoints, found, logger, console, tell)
        finally:
            logger.close()


def _train(
    config: Config,
    work: Work,
    checkpoints: CheckpointFolder,
    found: dict[str, Any] | None,
    logger: Logger,
    console: Console,
    tell: Tell,
) -> Outcome:
    train, log, trainer, folder = config.train, config.log, work.trainer, checkpoints.folder
    evaluator = Evaluate(
        trainer, work.look, every(train.eval_every), logger, work.bytes_per_token, train.patience
    )
    save = Save(trainer, checkpoints, every(train.save_every), work.header, evaluator, work.also)
    if found is not None:
        save.load_state_dict(found["callbacks"])
        save.step = trainer.step
    if is_main():
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.as_dict())))
        work.keep(folder)
    sample = None
    if log.prompt and work.tokenizer is not None:
        sample = Sample(trainer, work.tokenizer, log.prompt, evaluator.looked, logger, train.seq_len)
    show, stop = Show(console, evaluator, sample), Stop(tell)
    watchers = _watchers(log, train.eval_every, trainer, logger, folder)
    callbacks = [*work.callbacks, *watchers, evaluator, *([sample] if sample else []), save, show, stop]
    kernel = nullcontext() if train.attention == "auto" else attention_kernel(train.attention)
    with stop.listening(), show.bar, kernel:
        last = trainer.run(callbacks)
        if last is not None:
            if evaluator.loss is None and stop.asked is None:  # the batches ended before the first look
                evaluator.look(last.step)
            save.save()
    for watcher in watchers:
        if isinstance(watcher, TraceProfiler):
            watcher.close()
    return Outcome(folder, last, evaluator.loss, evaluator.stopping.best, evaluator.said_stop, stop.asked)


def _go_on(work: Work, checkpoints: CheckpointFolder, tell: Tell) -> dict[str, Any] | None:
    """Give the trainer the state of the newest whole checkpoint, and return it; None if there is none."""
    found = checkpoints.newest(tell)
    if found is None:
        tell(f"nothing to resume in {checkpoints.folder}: starting")
        return None
    state, header, path = found
    _check_same_model(header, work.header, path)
    tell(f"going on from {path}")
    try:
        work.trainer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: {error}: has train.seed or the text changed?") from None
    return state


def _check_same_model(found: dict[str, str], own: dict[str, str], path: Path) -> None:
    if found["kind"] != own["kind"]:
        raise ConfigError(
            f"{path} holds a {found['kind']}, but the configuration asks for a {own['kind']}: "
            "use the run's own config.yaml, or another log.name"
        )
    was, now = json.loads(found["config"]), json.loads(own["config"])
    for name in was:
        if was[name] != now.get(name):
            raise ConfigError(
                f"{path} holds a model with {name}={was[name]}, but the configuration says {now.get(name)}: "
                "use the run's own config.yaml, or another log.name"
            )


def _watchers(log: LogTable, rarely: int, trainer: Trainer, logger: Logger, folder: Path) -> list[Callback]:
    found: list[Callback] = [LogSteps(logger, log.every)]
    if log.histograms:
        found.append(LogWeights(unwrap(trainer.model), logger, rarely))
    if log.trace_at and is_main():
        found.append(TraceProfiler(folder / "trace.json.gz", log.trace_at))
    return found


def _loggers(config: Config, folder: Path, resume_step: int | None, tell: Tell) -> Logger:
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


def _silent(*_: object) -> None:
    pass
