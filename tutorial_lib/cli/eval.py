"""`llm-scratch eval`: how well a model predicts a text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from tutorial_lib.cli.common import run_alone, sentences, speak
from tutorial_lib.data.source import Source, check_fits, open_source
from tutorial_lib.data.tokenizers import NAMES, load_tokenizer, same_tokenizer
from tutorial_lib.tools.devices import pick_device
from tutorial_lib.train.checkpoint import load_model
from tutorial_lib.train.evaluate import evaluate as measure
from tutorial_lib.train.runner import pick_precision

__all__ = ["evaluate"]


def source_of(about: dict[str, Any], beside: Path, dataset: str | None = None) -> Source:
    """The text that a checkpoint's run was trained on, or another one for its tokenizer."""
    data = about.get("run", {}).get("data", {"dataset": about.get("dataset", "shakespeare")})
    tokenizer = about.get("tokenizer", "byte")
    if dataset is not None:
        return open_source(dataset, tokenizer, beside=beside)
    if Path(data["dataset"]).is_dir():  # token shards know their tokenizer, and where it is
        tokenizer = None
    return open_source(data["dataset"], tokenizer, data.get("val"), data.get("val_fraction", 0.1), beside)


def evaluate(
    ckpt: Annotated[
        Path, typer.Option("--ckpt", help="A checkpoint: runs/tiny/latest.ckpt", show_default=False)
    ],
    split: Annotated[str, typer.Option(help="train or val")] = "val",
    data: Annotated[
        str | None, typer.Option(help="Another text, as data.dataset names it; the run's own by default.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", "--seq_len", help="Tokens in a window; as trained by default.")
    ] = None,
    max_windows: Annotated[
        int | None,
        typer.Option(
            "--max-windows", "--max_windows", help="Look at so many, spread evenly; all by default."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", help="Windows at once.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best by default.")] = None,
    amp: Annotated[bool, typer.Option("--amp/--no-amp", help="Mixed precision.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Evaluate a checkpoint: llm-scratch eval --ckpt runs/base/latest.ckpt --split val

    Every token is predicted once, in windows that do not overlap. Loss and perplexity are per token, and mean
    nothing beside another tokenizer's; bits per byte and the perplexities of words and bytes do.
    """
    with sentences():
        where = pick_device(device)
        model, about = load_model(ckpt, where)
        source = source_of(about, ckpt.parent, data)
        tokens = source.part(split)
        if source.tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the text's vocabulary of {source.tokenizer.vocab_size} does not fit the model's {model.config.vocab_size}"
            )
        name = about.get("tokenizer", "byte")
        if name in NAMES or (ckpt.parent / name).is_file():
            if not same_tokenizer(load_tokenizer(name, ckpt.parent), source.tokenizer):
                raise ValueError(f"{data or 'the text'} was written with another tokenizer than the model's")
        T = seq_len or about.get("run", {}).get("train", {}).get("seq_len") or model.config.max_seq_len
        if T < 1 or batch_size < 1:
            raise ValueError(f"--seq-len is {T} and --batch-size {batch_size}, but both must be at least 1")
        check_fits(tokens, T, "evaluate on")
        ratio = source.bytes_per_token(tokens)
        with pick_precision(amp, where).autocast():
            found = measure(model, tokens, T, batch_size, max_windows, ratio)
        per_byte = found.loss / ratio
        result = {
            "split": split,
            "tokens": found.tokens,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "bytes_per_token": ratio,
            "byte_perplexity": math.exp(per_byte),
        }
        if as_json:
            print(json.dumps({"ckpt": str(ckpt), **result}))
            return
        if max_windows is not None:
            speak(f"{found.tokens:,} of {len(tokens):,} tokens")
        print(f"{split}: {found.tokens:,} tokens in windows of {T}, {ratio:.3f} bytes each")
        print(f"  loss             {found.loss:8.4f}  nats per token")
        print(f"  perplexity       {found.perplexity:8.3f}  per token")
        print("  normalized by length, comparable between tokenizers:")
        print(f"  bits per byte    {found.bits_per_byte:8.4f}")
        print(f"  loss per byte    {per_byte:8.4f}  nats")
        print(f"  byte perplexity  {math.exp(per_byte):8.3f}")


if __name__ == "__main__":
    run_alone(evaluate)
