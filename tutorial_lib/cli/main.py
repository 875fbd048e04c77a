"""`llm-scratch`: all commands under one name."""

from __future__ import annotations

import typer

from tutorial_lib.cli.chat import chat
from tutorial_lib.cli.eval import evaluate
from tutorial_lib.cli.export import export
from tutorial_lib.cli.fetch import fetch
from tutorial_lib.cli.generate import generate
from tutorial_lib.cli.sft import sft
from tutorial_lib.cli.tokenize import tokenize
from tutorial_lib.cli.train import train

__all__ = ["main"]

app = typer.Typer(
    help="Train, evaluate and use the models that the course builds.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(sft)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(chat)
app.command()(export)
app.command()(tokenize)
app.command()(fetch)


def main() -> None:
    """The console command."""
    app()


if __name__ == "__main__":
    main()
