"""`llm-scratch generate`: write on from a prompt."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tutorial_lib.cli.common import run_alone, sentences, speak, take_any_bytes, write
from tutorial_lib.cli.models import Device, Dtype, Model, open_model
from tutorial_lib.serve.respond import Request, complete, respond

__all__ = ["generate"]

AT_ONCE = 32
"""Texts that are written together: each has a cache of its own."""


def generate(
    model: Model = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to write on from; - reads it from stdin, none is an empty line. Several go at once."
        ),
    ] = None,
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
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; may be given several times.")
    ] = None,
    num_samples: Annotated[
        int, typer.Option("--num-samples", "--num_samples", help="Texts for each prompt.")
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(help="The same seed writes the same texts: the second has seed + 1, …")
    ] = None,
    dtype: Dtype = "fp32",
    device: Device = None,
) -> None:
    """Write on: llm-scratch generate --ckpt runs/tiny/latest.ckpt --prompt "WinCode LLM says:" --temperature 0.7

    Pretrained models, too: llm-scratch generate --model smollm2 --prompt "The sea is"
    """
    with sentences():
        if num_samples < 1:
            raise ValueError(f"--num-samples is {num_samples}, but must be at least 1")
        how = (max_new_tokens, temperature, top_k, top_p, repetition_penalty)
        Request([0], *how, seed, stop=tuple(stop or ()))  # complains before a model is loaded
        take_any_bytes()
        texts = [sys.stdin.read() if text == "-" else text for text in prompt or ["\n"]]
        if "" in texts:
            raise ValueError("the prompt is empty: give at least one character")
        found = open_model(model, dtype, device)
        texts = [text for text in texts for _ in range(num_samples)]
        requests = [
            Request(
                [*found.starts, *found.tokenizer.encode(text)],
                *how,
                None if seed is None else seed + number,  # each text has a seed of its own
                found.stop_ids,
                tuple(stop or ()),
            )
            for number, text in enumerate(texts)
        ]
        longest, reads = max(len(request.ids) for request in requests), found.model.config.max_seq_len
        if longest > reads:
            speak(f"note: a prompt has {longest:,} tokens, and the model reads only the last {reads:,}")
        if len(texts) == 1:
            write(texts[0])
            for _, piece in respond(found.model, found.tokenizer, requests):
                write(piece)
            write("\n")
            return
        for start in range(0, len(texts), AT_ONCE):
            replies = complete(found.model, found.tokenizer, requests[start : start + AT_ONCE])
            for number, reply in enumerate(replies, start):
                speak(f"── {number + 1} of {len(texts)}")
                write(texts[number] + reply.text + "\n")


if __name__ == "__main__":
    run_alone(generate)
