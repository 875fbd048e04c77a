"""What a run begins with: a text, its tokenizer, and perhaps a pretrained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tutorial_lib.core.model import Transformer
from tutorial_lib.data.adapters import as_huggingface
from tutorial_lib.data.corpora import CORPORA
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.tokenizers import same_tokenizer
from tutorial_lib.kinds import kind_of
from tutorial_lib.moe.model import MoETransformer
from tutorial_lib.moe.upcycle import upcycle
from tutorial_lib.runs.config import Config, ConfigError
from tutorial_lib.runs.settings import ModelTable, model_config, model_table
from tutorial_lib.runs.source import Source, open_source
from tutorial_lib.train.checkpoints import CheckpointError

if TYPE_CHECKING:
    from tutorial_lib.interop.pretrained import Pretrained

__all__ = ["in_a_file", "open_text", "pretrained", "save_tokenizer"]


def pretrained(config: Config, checkpoints: Sequence[Path] = ()) -> Pretrained | None:
    """The model that `train.init_from` names; its shape and its tokenizer's name are put into the configuration.

    Args:
        checkpoints: Of the run that goes on: they have all that is needed, should that model be gone.

    Raises:
        ConfigError: if it does not go with the rest of the configuration.
    """
    if config.train.init_from is None:
        return None
    from tutorial_lib.interop.pretrained import open_pretrained  # it knows all formats

    for path in checkpoints:
        with suppress(CheckpointError):  # the one before it may be whole
            found = open_pretrained(path)
            own = path.parent / found.tokenizer_name
            config.data.tokenizer = str(own) if own.is_file() else found.tokenizer_name
            break
    else:
        found = open_pretrained(config.train.init_from)
    brought = model_table(kind_of(found.model).name)(**asdict(found.model.config))
    grows = (brought.kind, config.model.kind) == (Transformer.__name__, MoETransformer.__name__)
    if config.model.kind not in (ModelTable().kind, brought.kind) and not grows:
        raise ConfigError(
            f"model.kind is {config.model.kind}, but train.init_from {config.train.init_from} is a {brought.kind}: "
            "leave the model table out"
        )
    usual = type(config.model)(max_seq_len=config.train.seq_len)  # `load_config` fills this one in
    for name, value in asdict(model_config(config)).items():
        if grows and not hasattr(brought, name):
            continue  # of the experts, the dense model says nothing
        theirs = getattr(brought, name, None)
        if value not in (getattr(usual, name), getattr(ModelTable(), name, None), theirs):
            raise ConfigError(
                f"model.{name} is {value!r}, but train.init_from {config.train.init_from} brings its own shape, with "
                f"{theirs!r}: leave the model table out"
            )
    if grows:
        brought = _with_experts(found, brought, config)
    config.model = brought
    if config.train.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"train.seq_len is {config.train.seq_len}, but {config.train.init_from} reads at most "
            f"{config.model.max_seq_len:,} tokens"
        )
    dataset = config.data.dataset
    shards = dataset not in CORPORA and Path(dataset).expanduser().is_dir()  # they know their tokenizer
    if config.data.tokenizer is None and not shards:
        config.data.tokenizer = found.tokenizer_name
    return found


def _with_experts(found: Pretrained, dense: Any, config: Config) -> Any:
    """Upcycle the model; returns the table of what it has become."""
    settings = {
        name: value for name, value in asdict(model_config(config)).items() if not hasattr(dense, name)
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)  # the same routers on every process
            found.model = upcycle(found.model, **settings)
    except ValueError as error:
        raise ConfigError(
            f"train.init_from {config.train.init_from} cannot become a MoETransformer: {error}"
        ) from None
    return model_table(MoETransformer.__name__)(**asdict(found.model.config))


def open_text(config: Config, tell: Callable[[str], None], start_with: Pretrained | None = None) -> Source:
    """The text to train on, its ids as the model knows them.

    Raises:
        ConfigError: if the parts do not fit together.
    """
    data, vocab_size = config.data, config.model.vocab_size
    try:
        source = open_source(data.dataset, data.tokenizer, data.val, data.val_fraction)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    needed = source.tokenizer.vocab_size
    if start_with is not None:  # it may well have more rows than tokens
        if not same_tokenizer(start_with.tokenizer, source.tokenizer):
            raise ConfigError(
                f"train.init_from {config.train.init_from} reads another tokenizer's ids than {source.tokenizer_name}'s"
            )
        return source
    if vocab_size < needed:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, but the tokenizer {source.tokenizer_name} has {needed} tokens"
        )
    rows = vocab_size - needed
    if rows >= 64 or (rows and vocab_size % 64):  # up to the next multiple of 64: a GPU multiplies it faster
        tell(
            f"warning: model.vocab_size is {vocab_size:,}, but the tokenizer {source.tokenizer_name} has only "
            f"{needed:,} tokens: {rows:,} rows of the embedding, {rows * config.model.d_model:,} weights, are wasted"
        )
    return source


def in_a_file(source: Source) -> bool:
    """Whether the tokenizer has to go along with the run: it is not one that everybody can have by its name."""
    return not isinstance(source.tokenizer, ByteTokenizer) and source.tokenizer_name != "gpt2"


def save_tokenizer(source: Source, path: Path, start_with: Pretrained | None = None) -> None:
    """Put the tokenizer beside the checkpoints, if it has to go along."""
    if not in_a_file(source):
        return
    if start_with is None:
        source.tokenizer.save(path)
    else:  # with the way it was taught to chat
        as_huggingface(source.tokenizer).save(path, start_with.template.source)
