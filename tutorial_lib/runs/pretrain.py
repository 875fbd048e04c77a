"""Pretraining: a text, a model, and the next token."""

from __future__ import annotations

from functools import partial
from math import ceil

import torch
from rich.console import Console

from tutorial_lib.eval.held_out import held_out
from tutorial_lib.eval.perplexity import spread_batches
from tutorial_lib.interop.checkpoint import model_header
from tutorial_lib.runs.config import Config
from tutorial_lib.runs.inputs import in_a_file, open_text, pretrained, save_tokenizer
from tutorial_lib.runs.parts import described, make_trainer, pick_precision, rows_at_once, with_balance
from tutorial_lib.runs.run import Outcome, Start, Work, carry_out
from tutorial_lib.runs.settings import new_model
from tutorial_lib.runs.source import check_fits
from tutorial_lib.tools.seeds import derive_seed
from tutorial_lib.train.distributed import rank, world_size
from tutorial_lib.train.objective import NextToken

__all__ = ["pretrain"]


def pretrain(config: Config, resume: bool = False, console: Console | None = None) -> Outcome:
    """Train a model on a text, as `carry_out` says, which also raises."""
    return carry_out(config, _prepare, resume, console)


def _prepare(config: Config, start: Start) -> Work:
    train = config.train
    begin_with = pretrained(config, start.checkpoints)
    source = open_text(config, start.tell, begin_with)
    for tokens, what in ((source.train, "train on"), (source.val, "validate on")):
        if tokens is not None:
            check_fits(tokens, train.seq_len, what)
    rows, precision = rows_at_once(train), pick_precision(train.amp, start.device)
    torch.manual_seed(train.seed)  # the same weights on every process
    model = new_model(config) if begin_with is None else begin_with.model.train()
    model = model.to(start.device)
    start.tell(
        f"{described(model, start.device, precision)}; "
        + (f"{len(source.train):,} tokens to train on, " if source.train is not None else "")
        + f"{len(source.val):,} to validate on"
    )
    name = "tokenizer.json" if in_a_file(source) else source.tokenizer_name
    header = model_header(model, {"tokenizer": name, "run": config.as_dict()})
    batches = source.batches(
        train.batch_size, train.seq_len, derive_seed(train.seed, "data"), rank(), world_size()
    )
    objective, callbacks = with_balance(model, NextToken())
    trainer = make_trainer(config, model, objective, batches)
    val_batches = partial(spread_batches, source.val, train.seq_len, rows, train.eval_windows)
    windows = min(train.eval_windows or len(source.val), (len(source.val) - 1) // train.seq_len)
    looks = partial(start.through, of=ceil(windows / rows))
    return Work(
        trainer,
        header,
        lambda judged: held_out(judged, looks(val_batches()), trainer.objective),
        source.tokenizer,
        source.bytes_per_token(source.val),
        lambda folder: save_tokenizer(source, folder / "tokenizer.json", begin_with),
        callbacks,
        also={"text": source},
    )
