"""`llm-scratch chat`: talk to a model."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from tutorial_lib.cli.common import BAD_INPUT, console, run_alone, sentences, speak, take_any_bytes, write
from tutorial_lib.cli.models import Device, Dtype, Model, named, open_model
from tutorial_lib.serve.conversation import Conversation
from tutorial_lib.serve.respond import Request

__all__ = ["chat"]

HELP = """/reset        forget what was said
/temp 0.7     draw more boldly (1 and above) or more soberly (0: always the likeliest token)
/system TEXT  what the model is told before everything else; begins anew
/seed 1       the same seed and the same words give the same answers; begins anew
/help         this list
/quit         leave (so does Ctrl-D); Ctrl-C stops an answer"""


class Quit(Exception):
    """Somebody wants to leave."""


def chat(
    model: Model = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told first; its own by default.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max_new_tokens", help="The longest answer, in tokens.")
    ] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", "--top_p", help="Draw from the likeliest that reach this probability."),
    ] = 0.95,
    top_k: Annotated[int | None, typer.Option("--top-k", "--top_k", help="Draw from so many.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", "--repetition_penalty", help="1 is none.")
    ] = 1.0,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens that the conversation may take; all that the model can by default."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    dtype: Dtype = "fp32",
    device: Device = None,
) -> None:
    """Talk to a model, smollm2 if none is named: llm-scratch chat --model smollm2

    Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists what else there is. Lines from a pipe are
    answered one after the other; the exit code says whether all were.
    """
    with sentences():
        if max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens is {max_new_tokens}, but must be at least 1")
        name = named(model, "smollm2")
        # What is wrong with it is said before a model is loaded.
        how = Request([0], max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
        found = open_model([name], dtype, device)
        how = replace(how, stop_ids=found.stop_ids, stop=found.stop)
        talk = Conversation(found.model, found.tokenizer, found.template, how, context, system)
        take_any_bytes()
        person = sys.stdin.isatty()
        if person:
            with suppress(ImportError):  # on Windows, the terminal itself edits lines
                import readline  # noqa: F401 - arrow keys, and what was typed before
            speak(f"{name}: {talk.context:,} tokens of context. /help lists the commands, Ctrl-D leaves.")
        failed = False
        while True:
            try:
                line = _read(person)
                line.encode()  # bytes that are no text are noticed here, and not when they have been said
                if line.startswith("/"):
                    speak(_command(talk, line))
                elif line:
                    _answer(talk, line, person)
            except (EOFError, Quit):
                if failed and not person:  # a script wants to know
                    raise typer.Exit(BAD_INPUT) from None
                return
            except ValueError as error:  # too long, or a command that was mistyped: nothing is lost
                failed = True
                said = "this line is not UTF-8 text" if isinstance(error, UnicodeEncodeError) else error
                speak(f"error: {said}")


def _read(person: bool) -> str:
    if not person:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()
    while True:
        try:
            return input("\nyou › ").strip()
        except KeyboardInterrupt:
            speak("\nCtrl-D or /quit leaves")
        except EOFError:
            write("\n")
            raise


def _answer(talk: Conversation, line: str, person: bool) -> None:
    start, forgotten, pieces, read = time.perf_counter(), talk.forgotten, 0, 0
    try:
        if person:
            write("\n")
        for piece in talk.ask(line):
            write(piece)
            pieces, read = pieces + 1, read or talk.used
        write("\n")
    except KeyboardInterrupt:
        write(" …\n")
    if person:
        seconds = time.perf_counter() - start
        written = max(
            pieces, talk.used - read if read else 0
        )  # a token may be no text yet, and wait for the next
        console.print(
            f"[dim]{written / seconds:.1f} tokens/s, {talk.used:,} of {talk.context:,} tokens[/]",
            highlight=False,
        )
    if (n := talk.forgotten - forgotten) > 0:
        speak(f"the oldest {n} messages did not fit into the context any more, and are forgotten")


def _command(talk: Conversation, line: str) -> str:
    """Do it, and say so."""
    name, _, argument = line.partition(" ")
    name = name.lower()
    argument = argument.strip()
    commands: dict[str, Callable[[], str]] = {
        "/help": lambda: HELP,
        "/quit": _quit,
        "/exit": _quit,
        "/reset": lambda: _reset(talk, "everything said is forgotten"),
        "/temp": lambda: _temperature(talk, argument),
        "/system": lambda: _system(talk, argument),
        "/seed": lambda: _seed(talk, argument),
    }
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "/help lists them"
        raise ValueError(f"there is no command {name}: {hint}")
    return commands[name]()


def _quit() -> str:
    raise Quit


def _reset(talk: Conversation, sentence: str) -> str:
    talk.reset()
    return sentence


def _temperature(talk: Conversation, argument: str) -> str:
    talk.how = replace(talk.how, temperature=_number(float, "/temp 0.7", argument))
    return f"temperature {talk.how.temperature:g}"


def _system(talk: Conversation, argument: str) -> str:
    talk.system = argument or None
    return _reset(
        talk, "told; the conversation begins anew" if argument else "its own words again, from the start"
    )


def _seed(talk: Conversation, argument: str) -> str:
    talk.how = replace(talk.how, seed=_number(int, "/seed 1", argument))
    return _reset(talk, f"seed {talk.how.seed}; the conversation begins anew")


def _number(kind: type, example: str, text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number: write it as in {example}") from None


if __name__ == "__main__":
    run_alone(chat)
