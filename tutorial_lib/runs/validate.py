"""What types cannot say of a configuration: each thing that is wrong is one sentence with the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tutorial_lib.core.kernels import KERNELS
from tutorial_lib.interop.weights import LIMITS, absurd
from tutorial_lib.kinds import kind_named
from tutorial_lib.runs.settings import Config, LogTable, TrainTable, model_config
from tutorial_lib.train.optimizers import OPTIMIZERS
from tutorial_lib.train.schedules import SCHEDULES

__all__ = ["ConfigError", "check", "first_line"]

TOKENS_IN_A_STEP = 1 << 27
"""Ten times those of any run that was heard of. More is a typing error, and would fill the memory with one batch."""


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one sentence."""


def check(config: Config) -> None:
    """Raise a ConfigError if a run cannot be like this."""
    _check_train(config.train)
    if not 0 < config.data.val_fraction < 1:
        raise ConfigError(f"data.val_fraction is {config.data.val_fraction}, but must lie between 0 and 1")
    _check_log(config.log)
    _check_model(config)


def _check_train(train: TrainTable) -> None:
    at_least_one = ("batch_size", "micro_batch_size", "seq_len", "steps", "eval_every", "eval_windows")
    for name in (*at_least_one, "patience", "save_every", "keep_last"):
        if (value := getattr(train, name)) is not None and value < 1:
            raise ConfigError(f"train.{name} is {value}, but must be at least 1")
    if (tokens := train.batch_size * train.seq_len) > TOKENS_IN_A_STEP:
        raise ConfigError(
            f"train.batch_size {train.batch_size:,} × train.seq_len {train.seq_len:,} are {tokens:,} tokens in a step, "
            f"but {TOKENS_IN_A_STEP:,} are the most"
        )
    for name in ("lr", "matrix_lr", "max_seconds", "grad_clip"):
        if (value := getattr(train, name)) is not None and not 0 < value < float("inf"):
            raise ConfigError(f"train.{name} is {value}, but must be above 0")
    for name in ("warmup_steps", "weight_decay", "keep_best", "seed"):
        if not 0 <= getattr(train, name) < float("inf"):
            raise ConfigError(f"train.{name} is {getattr(train, name)}, but must be 0 or more")
    for name, low, high in (("lr_floor", 0, 1), ("momentum", 0, 1), ("ema", 0, 1)):
        if (value := getattr(train, name)) is not None and not low <= value <= high:
            raise ConfigError(f"train.{name} is {value}, but must lie between {low} and {high}")
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise ConfigError(
            f"train.betas is {train.betas}, but must be two numbers, each 0 or more and below 1"
        )
    if train.warmup_steps >= train.steps and train.warmup_steps > 0:
        raise ConfigError(
            f"train.warmup_steps is {train.warmup_steps}, but the run has {train.steps} steps in all: "
            "train.warmup_steps=0 does without"
        )
    _one_of("train.schedule", train.schedule, SCHEDULES)
    _one_of("train.optimizer", train.optimizer, OPTIMIZERS)
    _one_of("train.attention", train.attention, KERNELS)
    _one_of("train.parallel", train.parallel, ("ddp", "fsdp", "deepspeed"))
    if isinstance(train.amp, str):
        _one_of("train.amp", train.amp, ("bf16", "fp16"))
    if train.zero_stage not in (1, 2, 3):
        raise ConfigError(f"train.zero_stage is {train.zero_stage}, but must be 1, 2 or 3")
    if train.parallel in ("fsdp", "deepspeed"):
        for name, off in (("optimizer", "adamw"), ("ema", None)):
            if getattr(train, name) != off:
                raise ConfigError(
                    f"train.parallel={train.parallel} does not go with train.{name}={getattr(train, name)}: use ddp"
                )


def _check_log(log: LogTable) -> None:
    if log.trace_at is not None and log.trace_at < 3:
        raise ConfigError(f"log.trace_at is {log.trace_at}, but the first step that can be traced is 3")
    if log.every < 1:
        raise ConfigError(f"log.every is {log.every}, but must be at least 1")
    if log.name is not None and (Path(log.name).name != log.name or log.name in ("", ".", "..")):
        raise ConfigError(f"log.name is {log.name!r}, but must be the plain name of a folder in log.dir")


def _check_model(config: Config) -> None:
    settings = asdict(config.model)
    if (name := absurd(settings)) is not None:  # a typing error, and slow to find out
        raise ConfigError(
            f"model.{name} is {settings[name]}, but must be at least 1 and at most {LIMITS[name]:,}"
        )
    window = settings.get("window")
    if not (
        window is None
        or _whole(window)
        or (isinstance(window, list) and all(w is None or _whole(w) for w in window))
    ):
        raise ConfigError(f"model.window is {window!r}, but must be a length, null, or a list of these")
    scaling = settings.get("rope_scaling")
    if not isinstance(scaling, (dict, type(None))):
        raise ConfigError(f"model.rope_scaling is {scaling!r}, but must be a table or null")
    try:
        shape = model_config(config)
        if "n_layers" in settings:
            shape = replace(
                shape, n_layers=min(shape.n_layers, len(window) if isinstance(window, list) else 1)
            )
        model = kind_named(config.model.kind).outline(shape)  # the layers have checks of their own
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"model: {first_line(error)}") from None
    if getattr(model, "positions", None) is not None and config.train.seq_len > shape.max_seq_len:
        raise ConfigError(
            f"train.seq_len is {config.train.seq_len}, but the model's positions end at "
            f"model.max_seq_len {shape.max_seq_len}"
        )


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _one_of(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), [*choices], n=1, cutoff=0.0)
        raise ConfigError(f"{name} is {value!r}: did you mean {near[0]!r}? There are {', '.join(choices)}")


def first_line(error: Exception) -> str:
    """Of what a library says, enough for a sentence."""
    return " ".join(str(error).split("\n")[0].split())
