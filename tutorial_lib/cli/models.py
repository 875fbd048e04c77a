"""What the commands that use a model ask for: which one, in what numbers, and where."""

from __future__ import annotations

from typing import Annotated

import typer

from tutorial_lib.interop.pretrained import DTYPES, Pretrained, open_pretrained
from tutorial_lib.kinds import KINDS
from tutorial_lib.tools.devices import pick_device

__all__ = ["Device", "Dtype", "Model", "named", "open_model"]

Model = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "--ckpt",
        help="A checkpoint of yours (runs/tiny/latest.ckpt), smollm2, a .gguf file, a Hugging Face folder, or "
        "owner/model on the hub.",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help=f"{', '.join(DTYPES)}: the smaller, the less memory.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; the best by default.")]


def open_model(
    names: list[str] | None, dtype: str, device: str | None, write: bool = True, default: str | None = None
) -> Pretrained:
    """The model that the command line names.

    Args:
        write: It is going to write token by token: on a CPU, its matrices are put in order for that.
        default: The one to take if it names none.

    Raises:
        ValueError: if it names none, or several, or one that does not write; and whatever `open_pretrained` raises.
    """
    name = named(names, default)
    found = open_pretrained(name, dtype, pick_device(device), write)
    kind = KINDS[type(found.model).__name__]
    if not kind.writes:
        raise ValueError(
            f"{name} is a {kind.name}, which gives no scores for next tokens: it can neither write nor be judged by a text"
        )
    return found


def named(names: list[str] | None, default: str | None = None) -> str:
    """The one name among those that were given."""
    names = names or ([] if default is None else [default])
    if len(names) > 1:
        raise ValueError(f"say which model, one of {' and '.join(names)}")
    if not names:
        raise ValueError("say which model, one: --model runs/tiny/latest.ckpt, or --model smollm2")
    return names[0]
