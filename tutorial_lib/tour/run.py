"""The run: get the text, cut it in two, train, keep the best, sample on the way."""

from __future__ import annotations

import json
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tutorial_lib.core.gpt import GPT
from tutorial_lib.core.model import Transformer
from tutorial_lib.core.sampler import generate
from tutorial_lib.data.corpora import load_text
from tutorial_lib.data.datasets import open_tokens, random_batches, write_tokens
from tutorial_lib.data.holdout import split_train_val
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.eval import baselines
from tutorial_lib.eval.perplexity import evaluate
from tutorial_lib.files import write_text
from tutorial_lib.interop.checkpoint import load_model, save_model
from tutorial_lib.tour.recipes import Recipe
from tutorial_lib.train.loop import StepInfo

__all__ = ["Story", "run"]


PROMPT = "**JULIET**  \n"
EVALUATIONS = 16
QUICK_WINDOWS = 512  # for the curve; the number at the end is of the whole validation text


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


@contextmanager
def polite_interrupt() -> Iterator[list[bool]]:
    """The first Ctrl-C asks the loop to stop after its step (no half-updated weights); a second one insists."""
    asked = [False]

    def handler(*_: Any) -> None:
        if asked[0]:
            raise KeyboardInterrupt
        asked[0] = True

    old = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, old)


def write_sample(model: GPT | Transformer, tokenizer: ByteTokenizer, n: int = 240, seed: int = 0) -> str:
    """What the model writes after the prompt, always from the same random numbers."""
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    generator = torch.Generator().manual_seed(seed)
    how = {"temperature": 0.8, "top_p": 0.95, "generator": generator}
    return tokenizer.decode([*ids[0].tolist(), *(int(t) for t in generate(model, ids, n, **how))])


def run(recipe: Recipe, dataset: str, folder: Path, seed: int = 0, console: Console | None = None) -> Story:
    """Train by the recipe, write checkpoints and `result.json` to the folder, and tell the story.

    Raises:
        CorpusError: if the text cannot be had.
        ValueError: if it is too short to train on.
    """
    console = console or Console()
    tokenizer = ByteTokenizer()
    text = load_text(dataset)
    tokens = np.frombuffer(text, dtype=np.uint8)
    train_part, val_part = split_train_val(tokens, 0.1)
    T = recipe.model.max_seq_len
    if len(val_part) < T + 1:
        raise ValueError(
            f"the text has {len(text)} bytes; its last tenth must hold a window of {T + 1}: "
            f"give at least {10 * (T + 1)} bytes"
        )
    # From here on the text is read from disk, window by window, as a text of any size would be.
    train_tokens = open_tokens(write_tokens(folder / "train.npy", train_part, tokenizer.vocab_size))
    val_tokens = open_tokens(write_tokens(folder / "val.npy", val_part, tokenizer.vocab_size))

    torch.manual_seed(seed)
    model = recipe.make_model()
    described = {
        "name": recipe.name,
        "model": asdict(recipe.model),
        "training": {
            **asdict(recipe.training),
            "muon_lr": recipe.muon_lr,
            "muon_momentum": recipe.muon_momentum,
        },
        "batch_size": recipe.batch_size,
    }
    story = Story(described, dataset, seed, model.num_params(), len(train_part), len(val_part), machine())
    console.print(
        f"[bold]{story.parameters:,}[/] parameters, [bold]{story.train_bytes:,}[/] bytes to train on, "
        f"the last [bold]{story.val_bytes:,}[/] to validate on, {torch.get_num_threads()} threads"
    )
    best = [float("inf")]

    def validate(info: StepInfo | None) -> float:
        loss = evaluate(model, val_tokens, T, max_windows=QUICK_WINDOWS).loss
        story.val_curve.append((info.seconds if info else 0.0, loss))
        about = {"tokenizer": "byte", "step": info.step if info else 0, "val_loss": loss, "dataset": dataset}
        save_model(folder / "latest.safetensors", model, about)
        if loss < best[0]:
            best[0] = loss
            save_model(folder / "best.safetensors", model, about)
        return loss

    def take_sample(info: StepInfo | None, progress: float) -> None:
        text = write_sample(model, tokenizer)
        # An untrained model writes control characters, too; a terminal would obey them.
        text = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
        story.samples.append((progress, info.step if info else 0, text))
        console.print(f"[dim]── sample at {progress:.0%} {'─' * 40}[/]")
        console.print(text, markup=False, highlight=False)

    take_sample(None, 0.0)
    val_loss = validate(None)
    budget = recipe.training.max_seconds
    columns = [
        TextColumn("[bold]step {task.fields[step]:>5}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("loss [#4361ee]{task.fields[loss]:.3f}[/]  val [#f3722c]{task.fields[val]:.3f}[/]"),
        TextColumn("{task.fields[speed]:>7,.0f} tokens/s"),
        TextColumn("ETA {task.fields[eta]:>4.0f} s"),
    ]
    with polite_interrupt() as interrupted, Progress(*columns, console=console) as bar:
        fields = {
            "step": 0,
            "loss": story.val_curve[0][1],
            "val": val_loss,
            "speed": 0.0,
            "eta": budget or 0.0,
        }
        task = bar.add_task("train", total=1.0, **fields)
        due_evaluation, due_sample = [1 / EVALUATIONS], [0.5]

        def follow(info: StepInfo) -> bool:
            story.train_curve.append((round(info.seconds, 3), round(info.loss, 4)))
            fields.update(step=info.step, loss=info.loss, speed=info.tokens / info.seconds)
            fields["eta"] = info.seconds / max(info.progress, 1e-9) * (1 - info.progress)
            if info.progress >= due_evaluation[0] and info.progress < 1 and not interrupted[0]:
                due_evaluation[0] += 1 / EVALUATIONS
                fields["val"] = validate(info)
                if not bar.console.is_terminal:
                    console.print(
                        f"step {info.step:>5}  {info.progress:4.0%}  loss {info.loss:.3f}  "
                        f"val {fields['val']:.3f}  {fields['speed']:,.0f} tokens/s  ETA {fields['eta']:.0f} s"
                    )
            if info.progress >= due_sample[0] and info.progress < 1 and not interrupted[0]:
                due_sample[0] = 2.0
                take_sample(info, info.progress)
            bar.update(task, completed=info.progress, **fields)
            return interrupted[0]

        batches = random_batches(train_tokens, recipe.batch_size, T, torch.Generator().manual_seed(seed))
        began = time.perf_counter()
        last = recipe.make_trainer(model, batches).run([follow])
        assert last is not None
        story.interrupted = interrupted[0]
        validate(last)
    story.steps, story.tokens, story.seconds = last.step, last.tokens, last.seconds
    console.print(f"trained {last.seconds:.0f} s, {time.perf_counter() - began:.0f} s with evaluations")
    model, _ = load_model(folder / "best.safetensors")
    take_sample(last, last.progress)
    if not story.interrupted:
        final = evaluate(model, val_tokens, T, batch_size=64)
        story.loss, story.bits_per_byte = final.loss, final.bits_per_byte
        train_bytes, val_bytes = train_part.tobytes(), val_part.tobytes()
        story.baselines = {
            "uniform": 8.0,
            "unigram": baselines.unigram(train_part, val_part),
            "bigram": baselines.bigram(train_part, val_part),
            **baselines.compressors(train_bytes, val_bytes),
        }
    write_text(folder / "result.json", json.dumps(asdict(story), indent=1))
    return story
