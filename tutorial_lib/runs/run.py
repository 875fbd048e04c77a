"""What every run has: a folder of its own, a place to go on from, callbacks, and an end that is told.

runs/tiny/config.yaml  metrics.csv  tensorboard/  step_00001000.ckpt …  latest.ckpt  best.ckpt

A kind of run (`runs.pretrain`, for one) says how its `Work` is made; `carry_out` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console

from tutorial_lib.core.kernels import attention_kernel
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.interop.checkpoint import described
from tutorial_lib.runs.callbacks import Evaluate, HasState, Look, Sample, Save, every
from tutorial_lib.runs.config import Config, ConfigError
from tutorial_lib.runs.folder import check_free, furnish, locked
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
    through: Callable[..., Iterator[Any]] = lambda items, of=None: iter(items)
    """`start.through(batches, of=64)` are the same batches; the person sees how far a look is, and can end it."""


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
    ask: Callable[[str], list[int]] | None = None
    """How `log.prompt` is put to the model; as a text to go on with when None."""


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
    stop = Stop(tell)
    begin = Start(device, tell, checkpoints.files() if resume else (), stop.through)
    work = prepare(config, begin)
    with locked(folder):
        if is_main():
            check_free(checkpoints, resume)  # another run may have come and gone meanwhile
        logger = Loggers([])
        try:
            return _train(config, work, checkpoints, resume, logger, console, stop)
        finally:
            logger.close()


def _train(
    config: Config,
    work: Work,
    checkpoints: CheckpointFolder,
    resume: bool,
    logger: Loggers,
    console: Console,
    stop: Stop,
) -> Outcome:
    train, log, trainer, folder = config.train, config.log, work.trainer, checkpoints.folder
    evaluator = Evaluate(
        trainer, work.look, every(train.eval_every), logger, work.bytes_per_token, train.patience
    )
    keep = partial(furnish, folder, config.as_dict(), work.keep, stop.tell)
    save = Save(trainer, checkpoints, every(train.save_every), work.header, evaluator, work.also, keep)
    goes_on = resume and _go_on(work, save, checkpoints, stop.tell)
    barrier()  # every process has read, before the first one writes
    if is_main():
        keep(anew=True)
        logger.loggers += _loggers(config, folder, trainer.step if goes_on else None, stop.tell)
    sample = None
    if log.prompt and work.tokenizer is not None:
        more = {"context": train.seq_len, "through": stop.through, "encode": work.ask}
        sample = Sample(trainer, work.tokenizer, log.prompt, evaluator.looked, logger, **more)
    show = Show(console, evaluator, sample)
    stop.looking = show.looking
    watchers = _watchers(log, train.eval_every, trainer, logger, folder)
    callbacks = [*work.callbacks, *watchers, evaluator, *([sample] if sample else []), save, show, stop]
    kernel = nullcontext() if train.attention == "auto" else attention_kernel(train.attention)
    with stop.listening(), show.bar, kernel:
        # A look that was broken off comes first; it may say that the end was reached.
        ended = evaluator.owes and evaluator.look(trainer.step)
        last = None if ended else trainer.run(callbacks)
        if last is not None:
            save.save()
            if evaluator.loss is None and stop.asked is None:  # the batches ended before the first look
                evaluator.look(last.step)
        if trainer.step:
            save.save()
    for watcher in watchers:
        if isinstance(watcher, TraceProfiler):
            watcher.close()
    return Outcome(folder, last, evaluator.loss, evaluator.stopping.best, evaluator.said_stop, stop.asked)


def _go_on(work: Work, save: Save, checkpoints: CheckpointFolder, tell: Tell) -> bool:
    """Give the trainer and the callbacks the state of the newest whole checkpoint; False if there is none."""
    found = checkpoints.newest(tell)
    if found is None:
        tell(f"nothing to resume in {checkpoints.folder}: starting")
        return False
    state, header, path = found
    _check_same_model(header, work.header, path)
    tell(f"going on from {path}")
    try:
        callbacks = state.pop("callbacks", None)
        work.trainer.load_state_dict(state)
        save.load_state_dict(callbacks)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return True


def _check_same_model(found: dict[str, str], own: dict[str, str], path: Path) -> None:
    (kind, was), (own_kind, now) = described(found, path), described(own, path)
    if kind != own_kind:
        raise ConfigError(
            f"{path} holds a {kind.name}, but the configuration asks for a {own_kind.name}: "
            "use the run's own config.yaml, or another log.name"
        )
    for name in was:
        if was[name] != now.get(name):
            raise ConfigError(
                f"{path} holds a model with {name}={was[name]!s:.60}, but the configuration says {now.get(name)}: "
                "use the run's own config.yaml, or another log.name"
            )


def _watchers(log: LogTable, rarely: int, trainer: Trainer, logger: Logger, folder: Path) -> list[Callback]:
    found: list[Callback] = [LogSteps(logger, log.every)]
    if log.histograms:
        found.append(LogWeights(unwrap(trainer.model), logger, rarely))
    if log.trace_at and is_main():
        found.append(TraceProfiler(folder / "trace.json.gz", log.trace_at))
    return found


def _loggers(config: Config, folder: Path, resume_step: int | None, tell: Tell) -> list[Logger]:
    log = config.log
    loggers: list[Logger] = [CSVLogger(folder / "metrics.csv", resume_step)]
    if log.tensorboard:
        try:
            loggers.append(TensorBoardLogger(folder / "tensorboard", resume_step))
        except ImportError as error:  # it is on by default, and not everybody has it
            tell(f"{error}; metrics.csv is written in any case")
    if log.wandb:
        loggers.append(WandbLogger(folder, log.project, folder.name, config.as_dict(), resume_step))
    return loggers


def _silent(*_: object) -> None:
    pass
