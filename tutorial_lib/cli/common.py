"""What all commands share: errors as sentences, and exit codes that mean something."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import typer
from rich.console import Console
from safetensors import SafetensorError

from tutorial_lib.data.corpora import CorpusError
from tutorial_lib.runs.config import ConfigError
from tutorial_lib.runs.terminal import printable
from tutorial_lib.train.checkpoints import CheckpointError
from tutorial_lib.train.trainer import DivergedError

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "run_alone", "sentences", "speak", "take_any_bytes", "write"]

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: what was asked for cannot be done; it was tried and failed; Ctrl-C."""

console = Console(stderr=True, highlight=False)


def speak(sentence: str) -> None:
    """One line for the person at the terminal; results go to stdout, this does not. Names in it may be a stranger's."""
    console.print(printable(sentence), markup=False, soft_wrap=True)


def write(text: str) -> None:
    """A result on stdout, at once. A pipe or a file gets it as it is, a terminal without what it would obey."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def take_any_bytes() -> None:
    """Let stdin hand on bytes that are no text: they are named where the text is used. And stdout shows what it can."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def sentences() -> Iterator[None]:
    """Turn every error into one sentence and an exit code; `LLM_SCRATCH_DEBUG=1` shows the traceback as well."""
    try:
        yield
    except (typer.Exit, typer.Abort, SystemExit):
        raise
    except KeyboardInterrupt:
        speak("stopped")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # `llm-scratch generate … | head`
        sys.stdout = open(os.devnull, "w")
        raise typer.Exit(0) from None
    except Exception as error:
        if os.environ.get("LLM_SCRATCH_DEBUG"):
            raise
        code, sentence = _explain(error)
        speak(f"error: {sentence}")
        raise typer.Exit(code) from None


def _explain(error: Exception) -> tuple[int, str]:
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        hint = "lower train.micro_batch_size or train.seq_len, or set train.activation_checkpointing=true"
        return FAILED, f"the device is out of memory: {hint}"
    if isinstance(error, (ConfigError, CheckpointError)):
        return BAD_INPUT, text
    if isinstance(error, DivergedError):
        return FAILED, text
    if isinstance(error, SafetensorError):  # it only writes here; what it cannot read is a CheckpointError
        return FAILED, f"a file of weights could not be written, and those before it are whole: {text[:200]}"
    if isinstance(
        error, UnicodeEncodeError
    ):  # a terminal's or a pipe's bytes, as Python keeps what it cannot read
        return BAD_INPUT, "what was typed or piped in is not UTF-8 text"
    if isinstance(error, (CorpusError, ImportError, ValueError)):
        return BAD_INPUT, text
    if isinstance(error, RuntimeError) and "home directory" in text:  # ~somebody
        return BAD_INPUT, "a path begins with ~ and the name of somebody who has no home on this machine"
    if isinstance(error, OSError) and error.errno is None:  # one of our own sentences
        return BAD_INPUT, text
    if isinstance(error, OSError):
        return FAILED, f"{error.strerror or text}" + (f": {error.filename}" if error.filename else "")
    return FAILED, f"{type(error).__name__}: {text[:300]} (LLM_SCRATCH_DEBUG=1 shows where)"


def run_alone(command: Callable[..., Any]) -> None:
    """For `python -m tutorial_lib.cli.<command>`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()
