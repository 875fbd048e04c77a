"""`llm-scratch eval`: how well a model predicts a text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from tutorial_lib.cli.common import run_alone, sentences, speak
from tutorial_lib.cli.models import Device, Dtype, Model, named, open_model
from tutorial_lib.data.corpora import CORPORA
from tutorial_lib.eval.perplexity import evaluate as measure
from tutorial_lib.eval.right_answers import ask, held_out_problems, score_by_task
from tutorial_lib.interop.pretrained import Pretrained
from tutorial_lib.interop.tokenizers import same_tokenizer
from tutorial_lib.runs.parts import pick_precision
from tutorial_lib.runs.source import Source, check_fits, open_source
from tutorial_lib.tools.devices import pick_device

__all__ = ["evaluate"]

LONGEST = 1024
"""Tokens in a window for a model that can read more: reading is what takes the time."""


def source_of(found: Pretrained, dataset: str | None = None) -> Source:
    """The text that a checkpoint's run was trained on, Shakespeare for a model without one, or another text."""
    data = found.about.get("run", {}).get("data", {"dataset": found.about.get("dataset", "shakespeare")})
    tokenizer = found.tokenizer_name
    if dataset is not None:
        return open_source(dataset, tokenizer, beside=found.folder)
    if (
        data["dataset"] not in CORPORA and Path(data["dataset"]).expanduser().is_dir()
    ):  # token shards know their tokenizer, and where it is
        tokenizer = None
    return open_source(
        data["dataset"], tokenizer, data.get("val"), data.get("val_fraction", 0.1), found.folder
    )


class _Started(nn.Module):
    """A model, with what stood before every text that it was trained on (BOS) before every window."""

    def __init__(self, model: nn.Module, starts: list[int]) -> None:
        super().__init__()
        self.model, self.starts = model, starts

    def forward(self, ids: Tensor) -> Tensor:
        starts = torch.tensor(self.starts, device=ids.device).expand(len(ids), -1)
        return self.model(torch.cat([starts, ids], dim=1))[:, len(self.starts) :]


def evaluate(
    model: Model = None,
    split: Annotated[str, typer.Option(help="train or val")] = "val",
    data: Annotated[
        str | None, typer.Option(help="Another text, as data.dataset names it; the run's own by default.")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len", "--seq_len", help="Tokens in a window; as trained by default, at most 1024."
        ),
    ] = None,
    max_windows: Annotated[
        int | None,
        typer.Option(
            "--max-windows", "--max_windows", help="Look at so many, spread evenly; all by default."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", help="Windows at once.")] = 16,
    dtype: Dtype = "fp32",
    device: Device = None,
    amp: Annotated[bool, typer.Option("--amp/--no-amp", help="Mixed precision.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    problems: Annotated[
        int | None,
        typer.Option(help="Ask so many held-out problems of each task instead, and count the right answers."),
    ] = None,
) -> None:
    """Evaluate a model: llm-scratch eval --ckpt runs/base/latest.ckpt --split val, or --model smollm2

    Every token is predicted once, in windows that do not overlap (after BOS, if all its texts began so). Loss and
    perplexity are per token, and mean nothing beside another tokenizer's; bits per byte and byte perplexity do.

    A model that was taught to answer: llm-scratch eval --ckpt runs/sft/best.ckpt --problems 100
    """
    with sentences():
        if problems is not None:
            if (data, seq_len, max_windows) != (None, None, None):
                raise ValueError(
                    "--problems asks questions: --data, --seq-len and --max-windows are for a text"
                )
            _problems(open_model(model, dtype, device), problems, named(model), as_json)
            return
        found = open_model(model, dtype, device, write=False)
        source = source_of(found, data)
        tokens = source.part(split)
        if not same_tokenizer(found.tokenizer, source.tokenizer):
            raise ValueError(f"{data or 'the text'} was written with another tokenizer than the model's")
        run = found.about.get("run", {})
        starts = [] if run else found.starts  # a run of ours reads its text from anywhere
        T = _window(found, seq_len or run.get("train", {}).get("seq_len"), len(starts))
        if batch_size < 1:
            raise ValueError(f"--batch-size is {batch_size}, but must be at least 1")
        check_fits(tokens, T, "evaluate on")
        ratio = source.bytes_per_token(tokens)
        with pick_precision(amp, pick_device(device)).autocast():
            score = measure(
                _Started(found.model, starts) if starts else found.model,
                tokens,
                T,
                batch_size,
                max_windows,
                ratio,
            )
        result = {
            "split": split,
            "tokens": score.tokens,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "bytes_per_token": ratio,
            "byte_perplexity": math.exp(score.loss / ratio),
        }
        if as_json:
            print(json.dumps({"ckpt": named(model), **result}))
            return
        if max_windows is not None:
            speak(f"{score.tokens:,} of {len(tokens):,} tokens")
        _show(result, T)


def _problems(found: Pretrained, n: int, name: str, as_json: bool) -> None:
    if n < 1:
        raise ValueError(f"--problems is {n}, but must be at least 1")
    asked = held_out_problems(n)
    scores = score_by_task(asked, [*ask(found, [problem.prompt for problem in asked])])
    if as_json:
        tasks = {task: {"n": one.n, "right": one.right, "error": one.error} for task, one in scores.items()}
        print(json.dumps({"ckpt": name, "tasks": tasks}))
        return
    print("right answers to held-out problems, ± a standard error")
    for task, one in scores.items():
        print(f"  {task:10} {one.share:7.1%} ± {one.error:.1%}  ({one.right} of {one.n})")
    print(f"  {'mean':10} {sum(one.share for one in scores.values()) / len(scores):7.1%}")


def _window(found: Pretrained, asked: int | None, starts: int) -> int:
    """How many tokens of the text are in a window, before which so many others stand."""
    longest = found.model.config.max_seq_len - starts
    T = asked or min(LONGEST, longest)
    if T < 1:
        raise ValueError(f"--seq-len is {T}, but must be at least 1")
    if T > longest and getattr(found.model, "positions", None) is not None:
        raise ValueError(f"--seq-len is {T:,}, but the model has positions for {longest:,} tokens only")
    if T > longest:
        speak(f"note: the model was trained on {longest:,} tokens, not on {T:,}")
    return T


def _show(result: dict[str, Any], seq_len: int) -> None:
    print(
        "{split}: {tokens:,} tokens in windows of {T}, {bytes_per_token:.3f} bytes each".format(
            **result, T=seq_len
        )
    )
    print(f"  loss             {result['loss']:8.4f}  nats per token")
    print(f"  perplexity       {result['perplexity']:8.3f}  per token")
    print("  normalized by length, comparable between tokenizers:")
    print(f"  bits per byte    {result['bits_per_byte']:8.4f}")
    print(f"  loss per byte    {math.log(result['byte_perplexity']):8.4f}  nats")
    print(f"  byte perplexity  {result['byte_perplexity']:8.3f}")


if __name__ == "__main__":
    run_alone(evaluate)
