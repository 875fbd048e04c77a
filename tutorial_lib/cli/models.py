"""What the commands that use a model ask for: which one, in what numbers, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutorial_lib.interop.pretrained import DTYPES, Pretrained, open_checkpoint, open_pretrained
from tutorial_lib.tools.devices import pick_device

__all__ = ["Ckpt", "Device", "Dtype", "Model", "open_model"]

Ckpt = Annotated[
    Path | None,
    typer.Option("--ckpt", help="A checkpoint of yours: runs/tiny/latest.ckpt", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A pretrained model: smollm2, a .gguf file, a Hugging Face folder, or owner/model on the hub.",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help=f"{', '.join(DTYPES)}: the smaller, the less memory.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; the best by default.")]


def open_model(
    ckpt: Path | None, model: str | None, dtype: str, device: str | None, write: bool = True
) -> Pretrained:
    """The model that the command line names.

    Args:
        write: It is going to write token by token: on a CPU, its matrices are put in order for that.

    Raises:
        ValueError: if it names none, or two; and whatever `open_pretrained` raises.
    """
    if (ckpt is None) == (model is None):
        raise ValueError("say which model, one of --ckpt runs/tiny/latest.ckpt and --model smollm2")
    where = pick_device(device)
    if ckpt is not None:
        return open_checkpoint(ckpt, dtype, where, write)
    return open_pretrained(model, dtype, where, write)
