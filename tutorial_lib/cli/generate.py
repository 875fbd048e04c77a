"""`llm-scratch generate`: write on from a prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tutorial_lib.cli.common import run_alone, sentences, speak
from tutorial_lib.core.decoding import generate_cached
from tutorial_lib.core.gpt import GPT
from tutorial_lib.core.model import Transformer
from tutorial_lib.core.sampler import generate as generate_uncached
from tutorial_lib.data.tokenizers import load_tokenizer
from tutorial_lib.tools.devices import pick_device
from tutorial_lib.train.checkpoint import load_model

__all__ = ["generate"]


def write_on(
    model: GPT | Transformer, ids: torch.Tensor, n: int, eos_id: int | None, **how: Any
) -> Iterator[torch.Tensor]:
    """Through the cache as long as all fits into the length that the model was trained on; beyond it, by a window
    that moves over the text and is read anew for each token (positions past the training length were never seen)."""
    if isinstance(model, Transformer) and ids.shape[1] + n <= model.config.max_seq_len:
        return generate_cached(model, ids, n, eos_id=eos_id, **how)
    return generate_uncached(model, ids, n, eos_id=eos_id, **how)


def generate(
    ckpt: Annotated[
        Path, typer.Option("--ckpt", help="A checkpoint: runs/tiny/latest.ckpt", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="What to write on from; - reads it from stdin.")] = "\n",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max_new_tokens", help="How many tokens to write.")
    ] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", "--top_p", help="Draw from the likeliest that reach this probability."),
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", "--top_k", help="Draw from so many.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", "--repetition_penalty", help="1 is none.")
    ] = 1.0,
    num_samples: Annotated[
        int, typer.Option("--num-samples", "--num_samples", help="Texts, one after the other.")
    ] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best by default.")] = None,
) -> None:
    """Write on: llm-scratch generate --ckpt runs/tiny/latest.ckpt --prompt "WinCode LLM says:" --temperature 0.7"""
    with sentences():
        if max_new_tokens < 0 or num_samples < 1:
            raise ValueError("--max-new-tokens must be at least 0 and --num-samples at least 1")
        if temperature < 0:
            raise ValueError(f"--temperature is {temperature}, but must be 0 or more")
        where = pick_device(device)
        model, about = load_model(ckpt, where)
        tokenizer = load_tokenizer(about.get("tokenizer", "byte"), ckpt.parent)
        text = sys.stdin.read() if prompt == "-" else prompt
        ids = torch.tensor([tokenizer.encode(text)], dtype=torch.long, device=where)
        if ids.shape[1] == 0:
            raise ValueError("the prompt is empty: give at least one character")
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "penalty": repetition_penalty}
        how["generator"] = torch.Generator(where)
        how["generator"].seed() if seed is None else how["generator"].manual_seed(seed)
        for number in range(num_samples):
            if num_samples > 1:
                speak(f"── {number + 1} of {num_samples}")
            print(text, end="", flush=True)
            known = tokenizer.vocab_size  # a model may have more rows than its tokenizer has tokens
            written = (int(t) for t in write_on(model, ids, max_new_tokens, tokenizer.eos_id, **how))
            for piece in tokenizer.stream(t for t in written if t < known):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    run_alone(generate)
