"""`llm-scratch fetch`: get a pinned corpus, vocabulary or model, once."""

from __future__ import annotations

from typing import Annotated

import typer

from tutorial_lib.cli.common import run_alone, sentences
from tutorial_lib.data import corpora
from tutorial_lib.interop.hub import download, looks_like_hub_id

__all__ = ["fetch"]


def fetch(
    name: Annotated[
        str,
        typer.Argument(help="shakespeare, gpt2 (a vocabulary), smollm2 (a model), or owner/model on the hub"),
    ],
) -> None:
    """Fetch what the course uses, check it against its hash, and print where it lies."""
    with sentences():
        print(download(name) if looks_like_hub_id(name) else corpora.fetch(name))


if __name__ == "__main__":
    run_alone(fetch)
