"""What a run is: four small tables in a YAML file, and `key=value` overrides on the command line.

    model: {d_model: 256, n_heads: 4, n_layers: 8}
    train: {steps: 2000, lr: 3e-4}
    data:  {tokenizer: byte, dataset: shakespeare}
    log:   {wandb: false}

OmegaConf reads it (to plain YAML, `3e-4` is a text) and checks the types; what it cannot know, such as that d_model
must be divisible by n_heads, is checked here. Whatever is wrong is one sentence with the nearest right name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from tutorial_lib.core.kernels import KERNELS
from tutorial_lib.kinds import KINDS, kind_named
from tutorial_lib.runs.settings import Config, LogTable, ModelTable, TrainTable, model_table, tables
from tutorial_lib.train.optimizers import OPTIMIZERS
from tutorial_lib.train.schedules import SCHEDULES

__all__ = ["Config", "ConfigError", "load_config", "model_config", "new_model"]

AnyConfig = TypeVar("AnyConfig", bound=Config)


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one sentence."""


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), shape: type[AnyConfig] = Config
) -> AnyConfig:
    """The configuration in a file, with overrides such as `train.lr=2e-4`, checked.

    Args:
        shape: `Config`, or a subclass with more tables: they are read and named in errors like the four.

    Raises:
        ConfigError: whatever is wrong, in one sentence.
    """
    given = _read(Path(path), tables(shape=shape)) if path is not None else OmegaConf.create({})
    layers = [(str(path), given), *((override, _override(override)) for override in overrides)]
    known = tables(_kind([table for _, table in layers]), shape)
    for where, table in layers:
        _check_keys(table, known, where)
        _check_plain(OmegaConf.to_container(table, resolve=False), where)
        try:
            given = OmegaConf.merge(given, table)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {_first_line(error)}") from None
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(shape(known["model"]())), given))
    except OmegaConfBaseException as error:
        raise ConfigError(_mistyped(error, given, known)) from None
    assert isinstance(config, Config)
    if "max_seq_len" not in given.get("model", {}):
        config.model.max_seq_len = config.train.seq_len
    _check(config)
    return config


def model_config(config: Config) -> Any:
    """The model's part, as the model wants it: the configuration of its kind."""
    settings = asdict(config.model)
    return kind_named(settings.pop("kind")).config(**settings)


def new_model(config: Config) -> nn.Module:
    """A model of the kind and the shape that it asks for, with fresh weights."""
    return kind_named(config.model.kind).model(model_config(config))


def _read(path: Path, known: Iterable[str]) -> DictConfig:
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.3
        )
        hint = f": did you mean {path.with_name(near[0])}?" if near else ""
        raise ConfigError(f"there is no configuration at {path}{hint}")
    try:
        given = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not YAML: {_first_line(error)}") from None
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path} is not a table of {', '.join(known)}")
    return given


def _kind(layers: list[DictConfig]) -> str:
    """The kind of model that is asked for: it decides which settings the model's table has."""
    name = ModelTable().kind
    for table in layers:
        model = table._get_node("model") if "model" in table else None
        if isinstance(model, DictConfig) and "kind" in model:
            name = OmegaConf.to_container(model, resolve=False)["kind"]
    try:
        return kind_named(name).name
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.kind: {error}") from None


def _check_keys(table: DictConfig, known: dict[str, type], where: str) -> None:
    settings = {f"{name}.{f.name}" for name, kind in known.items() for f in fields(kind)}
    for key in _keys(table, known):
        if key not in settings and key not in known:
            owner = next(
                (kind for kind in KINDS if key in {f"model.{f.name}" for f in fields(model_table(kind))}),
                None,
            )
            if owner is not None:
                raise ConfigError(
                    f"{where}: {key} is a setting of a {owner}, and model.kind asks for another model"
                )
            raise ConfigError(_unknown(key, [*sorted(settings), *known], where))
        if key in known and not isinstance(table._get_node(key), DictConfig):
            example = fields(known[key])[0].name
            raise ConfigError(f"{where}: {key} must be a table of settings, such as {key}.{example}")


def _override(text: str) -> DictConfig:
    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} is no override: write key=value, as in train.lr=2e-4")
    try:
        return OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{text!r} is no override: {_first_line(error)}") from None


def _check_plain(value: Any, where: str, key: str = "") -> None:
    """Refuse what OmegaConf would put something else in place of: a stranger's file could read the environment so."""
    if isinstance(value, dict):
        for name, inside in value.items():
            _check_plain(inside, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inside in value:
            _check_plain(inside, where, key)
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{where}: {key} is {value!r:.80}, but nothing is filled in here: write the value itself"
        )


def _keys(table: DictConfig, known: dict[str, type], prefix: str = "") -> Iterator[str]:
    """`model`, `model.d_model`, …; a table's fields one level deep, as nothing here is deeper."""
    for key in table:
        inside = table._get_node(key)
        if isinstance(inside, DictConfig) and not prefix and len(inside):
            if key in known:
                yield key
            yield from _keys(inside, known, f"{key}.")
        else:
            yield f"{prefix}{key}"


def _unknown(key: str, candidates: list[str], where: str) -> str:
    last = key.rpartition(".")[2]
    same = [name for name in candidates if name.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
    return f"{where}: there is no setting {key!r}: did you mean {near[0]!r}?"


def _mistyped(error: OmegaConfBaseException, given: DictConfig, known: dict[str, type]) -> str:
    table, _, name = (error.full_key or "").partition(".")
    name = name.partition("[")[0].partition(".")[0]
    hint = get_type_hints(known[table]).get(name) if table in known else None
    if hint is None or "nterpolation" in f"{type(error).__name__} {error}":
        return f"{error.full_key or 'the configuration'}: {_first_line(error)}"
    kind = hint.__name__ if isinstance(hint, type) else str(hint)
    value = OmegaConf.to_container(given, resolve=False)[table][name]
    return f"{table}.{name} is {value!r}, but must be {kind.replace('typing.', '').replace('None', 'null')}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())


def _check(config: Config) -> None:
    """What types cannot say."""
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
    for name in ("d_model", "n_heads", "n_kv_heads", "n_layers", "d_head", "d_mlp"):
        value = settings.get(name)
        if value is not None and not 1 <= value <= 10**6:  # beyond it a typing error, and slow to find out
            raise ConfigError(f"model.{name} is {value}, but must be at least 1 and at most a million")
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
        raise ConfigError(f"model: {_first_line(error)}") from None
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
