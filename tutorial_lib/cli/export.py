"""`llm-scratch export`: a model in the files of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutorial_lib.cli.common import run_alone, sentences
from tutorial_lib.cli.models import Model, open_model
from tutorial_lib.core.model import Transformer
from tutorial_lib.interop.gguf import FORMATS, save_gguf
from tutorial_lib.interop.hf import save_hf
from tutorial_lib.interop.pretrained import DTYPES
from tutorial_lib.moe.model import MoETransformer

__all__ = ["export"]


def export(
    out: Annotated[Path, typer.Argument(help="model.gguf, or a folder for Hugging Face's format.")],
    model: Model = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help=f"The numbers: {', '.join(FORMATS)} in GGUF; fp32, bf16 or fp16 in a folder.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a model so that others read it: llm-scratch export tiny.gguf --ckpt runs/tiny/best.ckpt --kind Q8_0

    A name that ends in .gguf is for llama.cpp and its friends, any other is a folder for transformers.
    """
    with sentences():
        to_gguf = out.suffix.lower() == ".gguf"
        kinds = FORMATS if to_gguf else ("fp32", "bf16", "fp16")
        kind = kind or ("F16" if to_gguf else "fp32")
        if kind not in kinds:
            raise ValueError(f"--kind is {kind!r}, but {out} can hold {', '.join(kinds)}")
        if out.exists() and (to_gguf or not out.is_dir() or any(out.iterdir())):  # said before all is loaded
            raise ValueError(f"{out} is there already: choose another name, or remove it")
        found = open_model(model, "fp32", "cpu", write=False)
        if type(found.model) not in (Transformer, MoETransformer):
            name = type(found.model).__name__
            raise ValueError(
                f"a {name} has no public format: only the Transformers of lessons 3.6 and 5.3 have"
            )
        template = found.template.source if found.chats else None
        if to_gguf:
            save_gguf(found.model, out, found.tokenizer, kind, out.stem, template)
        else:
            save_hf(found.model, out, found.tokenizer, DTYPES[kind], chat_template=template)
        print(out)


if __name__ == "__main__":
    run_alone(export)
