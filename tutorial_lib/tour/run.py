"""The run: get the text, cut it in two, train, keep the best, sample on the way."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tutorial_lib.data.corpora import load_text
from tutorial_lib.data.datasets import open_tokens, random_batches, write_tokens
from tutorial_lib.data.holdout import split_train_val
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.eval import baselines
from tutorial_lib.eval.perplexity import evaluate
from tutorial_lib.files import read_json, write_text
from tutorial_lib.interop.checkpoint import load_model, model_header, save_model
from tutorial_lib.runs.callbacks import Evaluate, Sample, Save, shares, write_on
from tutorial_lib.runs.folder import locked
from tutorial_lib.runs.terminal import Show, Stop, printable
from tutorial_lib.tour.recipes import Recipe
from tutorial_lib.train.checkpoint_folder import CheckpointFolder
from tutorial_lib.train.loggers import Logger
from tutorial_lib.train.loop import StepInfo
from tutorial_lib.train.trainer import Trainer

__all__ = ["Story", "machine", "run"]


PROMPT = "**JULIET**  \n"
EVALUATIONS = 16
QUICK_WINDOWS = 512  # for the curve; the number at the end is of the whole validation text
RESULT = "result.json"
SAMPLE = 240
"""Bytes in a sample."""


@dataclass
class Story:
    """What happened, for the report; written to `result.json`."""

    recipe: dict[str, Any]
    dataset: str
    seed: int
    parameters: int
    train_bytes: int
    val_bytes: int
    machine: str
    train_curve: list[tuple[float, float]] = field(default_factory=list)
    """(seconds, loss of the batch)"""
    val_curve: list[tuple[float, float]] = field(default_factory=list)
    """(seconds, loss on a part of the validation text)"""
    samples: list[tuple[float, int, str]] = field(default_factory=list)
    """(progress, step, text)"""
    baselines: dict[str, float] = field(default_factory=dict)
    """bits per byte"""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    progress: float = 0.0
    """of the run that was planned"""
    loss: float | None = None
    """nats per byte over the whole validation text, of the best checkpoint"""
    bits_per_byte: float | None = None
    interrupted: bool = False


def machine() -> str:
    """The processor, threads and torch version: what a time is worthless without."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def run(recipe: Recipe, dataset: str, folder: Path, seed: int = 0, console: Console | None = None) -> Story:
    """Train by the recipe, write checkpoints and `result.json` to the folder, and tell the story.

    Raises:
        CorpusError: if the text cannot be had.
        ValueError: if it is too short to train on, or the folder holds a run that is no tour.
    """
    console = console or Console()
    text = load_text(dataset)
    parts = split_train_val(np.frombuffer(text, dtype=np.uint8), 0.1)
    T = recipe.model.max_seq_len
    if len(parts[1]) < T + 1:
        raise ValueError(
            f"the text has {len(text)} bytes; its last tenth must hold a window of {T + 1}: "
            f"give at least {10 * (T + 1)} bytes"
        )
    checkpoints = _own(folder)
    torch.manual_seed(seed)
    model = recipe.make_model()
    story = Story(
        _described(recipe), dataset, seed, model.num_params(), len(parts[0]), len(parts[1]), machine()
    )
    console.print(
        f"[bold]{story.parameters:,}[/] parameters, [bold]{story.train_bytes:,}[/] bytes to train on, "
        f"the last [bold]{story.val_bytes:,}[/] to validate on, {torch.get_num_threads()} threads"
    )
    # From here on the text is read from disk, window by window, as a text of any size would be.
    train, val = (
        open_tokens(write_tokens(folder / f"{name}.npy", part, 256))
        for name, part in zip(("train", "val"), parts, strict=True)
    )
    batches = random_batches(train, recipe.batch_size, T, torch.Generator().manual_seed(seed))
    about = {"tokenizer": "byte", "dataset": dataset}
    with locked(folder):
        best = _train(story, recipe.make_trainer(model, batches), val, T, checkpoints, about, console)
    model, _ = load_model(folder / "best.ckpt")
    save_model(folder / "best.safetensors", model, {**about, "val_loss": best})  # without what training needs
    last = printable(write_on(model, ByteTokenizer(), PROMPT, SAMPLE))
    story.samples.append((story.progress, story.steps, last))
    console.print(f"[dim]── the best model {'─' * 40}[/]")
    console.print(last, markup=False, highlight=False)
    if not story.interrupted:
        final = evaluate(model, val, T, batch_size=64)
        story.loss, story.bits_per_byte = final.loss, final.bits_per_byte
        story.baselines = {
            "uniform": 8.0,
            "unigram": baselines.unigram(*parts),
            "bigram": baselines.bigram(*parts),
            **baselines.compressors(*(part.tobytes() for part in parts)),
        }
    write_text(folder / RESULT, json.dumps(asdict(story), indent=1))
    return story


def _own(folder: Path) -> CheckpointFolder:
    """The folder's checkpoints, if a tour may write there: over those of another tour, and over nobody else's."""
    checkpoints = CheckpointFolder(folder, keep_last=1, keep_best=1)
    if (old := _old(checkpoints)) and not _is_tour(folder):
        raise ValueError(f"{folder} holds a run that is no tour ({old[0].name}): choose another --out")
    return checkpoints


def _old(checkpoints: CheckpointFolder) -> list[Path]:
    names = ("latest.ckpt", "best.ckpt", "latest.safetensors")
    return [*checkpoints.files(), *(p for name in names if (p := checkpoints.folder / name).is_file())]


def _clear(checkpoints: CheckpointFolder) -> None:
    """Remove what the tour before has left: called when this one has something to put in its place."""
    write_text(checkpoints.folder / RESULT, json.dumps({"recipe": None}))  # a tour, even if it is killed
    for path in _old(checkpoints):
        path.unlink()


def _is_tour(folder: Path) -> bool:
    try:
        return "recipe" in read_json(folder / RESULT, 1 << 24)
    except ValueError:
        return False


def _described(recipe: Recipe) -> dict[str, Any]:
    muon = {"muon_lr": recipe.muon_lr, "muon_momentum": recipe.muon_momentum}
    return {
        "name": recipe.name,
        "model": asdict(recipe.model),
        "training": asdict(recipe.training) | muon,
        "batch_size": recipe.batch_size,
    }


def _train(
    story: Story,
    trainer: Trainer,
    val: np.ndarray,
    seq_len: int,
    checkpoints: CheckpointFolder,
    about: dict[str, Any],
    console: Console,
) -> float:
    """Train to the end or to Ctrl-C; returns the best loss on a part of the validation text."""
    quick = partial(evaluate, tokens=val, seq_len=seq_len, max_windows=QUICK_WINDOWS)
    evaluator = Evaluate(trainer, lambda model: {"loss": quick(model).loss}, shares(EVALUATIONS), Logger())
    sample = Sample(trainer, ByteTokenizer(), PROMPT, _halfway(), Logger(), seq_len, SAMPLE)
    save = Save(trainer, checkpoints, evaluator.looked, model_header(trainer.model, about), evaluator)
    show, stop = Show(console, evaluator, sample), Stop(partial(console.print, markup=False))

    def remember(info: StepInfo) -> None:
        if info.step:
            story.train_curve.append((round(info.seconds, 3), round(info.loss, 4)))
        if evaluator.looked(info):
            story.val_curve.append((info.seconds, evaluator.loss))
        if sample.step == info.step:
            story.samples.append((info.progress, info.step, printable(sample.text)))
        story.steps, story.tokens, story.seconds = info.step, info.tokens, info.seconds
        story.progress = info.progress

    with stop.listening(), show.bar:
        evaluator.look(0)  # what an untrained model says and writes
        start = StepInfo(0, evaluator.loss, 0.0, 0.0, 0, 0.0, 0.0)
        sample.write(0)
        _clear(checkpoints)
        save.save()
        remember(start)
        show(start)
        last = trainer.run([evaluator, sample, save, remember, show, stop])
        assert last is not None
        if not evaluator.looked(last):  # it was stopped
            save.save()
            evaluator.look(last.step)
            story.val_curve.append((last.seconds, evaluator.loss))
            save.save()
    story.interrupted = stop.asked is not None
    return evaluator.stopping.best


def _halfway() -> Callable[[StepInfo], bool]:
    due = shares(2)
    return lambda info: due(info) and info.progress < 1
