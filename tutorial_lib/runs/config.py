"""What a run is: four small tables in a YAML file, and `key=value` overrides on the command line.

    model: {d_model: 256, n_heads: 4, n_layers: 8}
    train: {steps: 2000, lr: 3e-4}
    data:  {tokenizer: byte, dataset: shakespeare}
    log:   {wandb: false}

OmegaConf reads it (to plain YAML, `3e-4` is a text) and checks the types; what it cannot know, such as that d_model
must be divisible by n_heads, is checked in `runs.validate`. Whatever is wrong is one sentence with the nearest right name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from tutorial_lib.kinds import KINDS, kind_named
from tutorial_lib.runs.settings import Config, ModelTable, model_table, tables
from tutorial_lib.runs.validate import ConfigError, check, first_line

__all__ = ["Config", "ConfigError", "load_config"]

AnyConfig = TypeVar("AnyConfig", bound=Config)


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
            raise ConfigError(f"{where}: {first_line(error)}") from None
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(shape(known["model"]())), given))
    except OmegaConfBaseException as error:
        raise ConfigError(_mistyped(error, given, known)) from None
    assert isinstance(config, Config)
    if "max_seq_len" not in given.get("model", {}):
        config.model.max_seq_len = config.train.seq_len
    check(config)
    return config


def _read(path: Path, known: Iterable[str]) -> DictConfig:
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.3
        )
        hint = f": did you mean {path.with_name(near[0])}?" if near else ""
        raise ConfigError(f"there is no configuration at {path}{hint}")
    try:
        given = OmegaConf.load(path)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path} is not YAML{line}: {error.problem or first_line(error)}") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {first_line(error)}") from None
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
        raise ConfigError(f"{text!r} is no override: {first_line(error)}") from None


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
        return f"{error.full_key or 'the configuration'}: {first_line(error)}"
    kind = hint.__name__ if isinstance(hint, type) else str(hint)
    value = OmegaConf.to_container(given, resolve=False)[table][name]
    return f"{table}.{name} is {value!r}, but must be {kind.replace('typing.', '').replace('None', 'null')}"
