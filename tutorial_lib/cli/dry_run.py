"""`llm-scratch train --dry-run`: what a run would take, without running it."""

from __future__ import annotations

import os

import torch
from rich.markup import escape
from rich.table import Table

from tutorial_lib.cli.common import console
from tutorial_lib.kinds import kind_named
from tutorial_lib.runs.config import Config, ConfigError
from tutorial_lib.runs.inputs import pretrained
from tutorial_lib.runs.parts import pick_precision
from tutorial_lib.runs.settings import TrainTable, model_config, new_model
from tutorial_lib.tools.accounting import ModelShape, count_parameters, flops_per_token, training_memory
from tutorial_lib.tools.devices import pick_device
from tutorial_lib.tools.profiling import measure_roofline, time_call
from tutorial_lib.train.accumulate import accumulate_gradients

__all__ = ["report"]

UTILIZATION = 0.4
"""The share of the measured peak that a large model may hope for."""


def report(config: Config) -> None:
    """Print parameters, FLOPs, memory and an estimate of the time.

    Raises:
        ConfigError: if nobody said what this kind of model costs.
    """
    pretrained(config)  # its shape is what counts
    train, kind = config.train, kind_named(config.model.kind)
    if kind.shape is None:
        raise ConfigError(
            f"nobody said what a {kind.name} costs: register it with a shape (tutorial_lib.kinds)"
        )
    shape = kind.shape(model_config(config))
    device = pick_device(train.device)
    precision = pick_precision(train.amp, device)
    flops = flops_per_token(shape, train.seq_len)["training"]
    tokens = train.batch_size * train.seq_len * train.steps

    table = Table(title=escape(f"{config.log.name}: a dry run"), show_header=False, title_justify="left")
    counts = count_parameters(shape)
    for name, count in counts.items():
        if count and (name != "active" or count != counts["total"]):
            table.add_row(f"parameters: {name}", f"{count:,}")
    table.add_section()
    table.add_row("tokens", f"{tokens:,} = {train.batch_size} × {train.seq_len} × {train.steps:,} steps")
    table.add_row("FLOPs per token", f"{flops:,} (forward and backward)")
    table.add_row("FLOPs in all", f"{flops * tokens:.3g}")
    table.add_section()
    _memory(table, train, shape, device, 4 if precision.dtype == torch.float32 else 2)
    table.add_section()
    _time(table, config, flops, tokens, device, precision.dtype)
    console.print(table)


def _memory(
    table: Table, train: TrainTable, shape: ModelShape, device: torch.device, activation_bytes: int
) -> None:
    rows = train.micro_batch_size or train.batch_size
    memory = training_memory(shape, rows, train.seq_len, activation_bytes=activation_bytes)
    total = memory.pop("total")
    # When the backward pass begins, beside all that is kept for it: the scores and their gradient, in fp32.
    memory["scores"] = 2 * 4 * rows * train.seq_len * shape.vocab_size
    memory["total"] = total + memory["scores"]
    for name, size in memory.items():
        note = f" ({rows} rows at once, estimated)" if name == "activations" else ""
        table.add_row(f"memory: {name}", f"{size / 2**20:,.0f} MiB{note}")
    here = _machine_memory()
    always = sum(memory[name] for name in ("weights", "gradients", "optimizer"))
    # Recomputed activations count for nothing here: how many of them are kept depends on the layers.
    least = always + memory["scores"] if train.activation_checkpointing else memory["total"]
    if device.type == "cpu" and here is not None and least > here:
        fewer = always < here and rows > 1
        advice = "a smaller train.micro_batch_size" if fewer else "a smaller model, or several devices (fsdp)"
        table.add_row("", f"[bold]more than this machine's {here / 2**20:,.0f} MiB[/]: it takes {advice}")
    if train.activation_checkpointing:
        table.add_row("", "activation checkpointing keeps a fraction of the activations")


def _time(
    table: Table, config: Config, flops: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> None:
    peak = measure_roofline(device, dtype).flops_per_second
    table.add_row("peak, measured", f"{peak / 1e12:.3g} TFLOP/s in {str(dtype)[6:]} on {device}")
    per_second, how = _tokens_per_second(config, flops, peak)
    seconds, most = tokens / per_second, config.train.max_seconds
    table.add_row("speed", f"{per_second:,.0f} tokens/s, {how}")
    table.add_row("time", f"{_duration(seconds)} on one device")
    if most is not None and most < seconds:
        share = most / seconds
        table.add_row("", f"train.max_seconds {most:g} ends it after about {share:.0%} of the steps")


def _machine_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _tokens_per_second(config: Config, flops_per_token: float, peak: float) -> tuple[float, str]:
    """Measured on a micro-batch of random tokens, if that is quick; else from the peak."""
    train = config.train
    rows = train.micro_batch_size or train.batch_size
    rate = peak * UTILIZATION / flops_per_token
    if not kind_named(config.model.kind).writes:
        return rate, f"at {UTILIZATION:.0%} of the peak (a guess: it is not trained on plain text)"
    if rows * train.seq_len / rate > 5:
        return rate, f"at {UTILIZATION:.0%} of the peak (a guess: a micro-batch takes too long to try)"
    device = pick_device(train.device)
    try:
        model = new_model(config).to(device)
        ids = torch.randint(config.model.vocab_size, (rows, train.seq_len + 1))
        pieces = [(ids[:, :-1], ids[:, 1:])]
        precision = pick_precision(train.amp, device)
        step = time_call(
            lambda: accumulate_gradients(model, pieces, precision), repeats=2, warmup=1, device=device
        )
    except torch.OutOfMemoryError:
        return rate, f"at {UTILIZATION:.0%} of the peak (a micro-batch does not fit into memory)"
    return rows * train.seq_len / step.median, "measured on a micro-batch, without the optimizer"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
