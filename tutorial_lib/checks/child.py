"""The process in which one learner's object answers: it loads their definitions, then runs probes as it is asked.

Nothing here is trusted: learner code shares the process and can change all of it. What leaves it is plain data,
which the parent judges.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import linecache
import os
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tutorial_lib.checks import confine
from tutorial_lib.checks.answers import Answer, Here, asked_of
from tutorial_lib.checks.gradings import find_exercise
from tutorial_lib.checks.guard import explain_crash, guarded
from tutorial_lib.checks.hide import hide_the_course, without_answers
from tutorial_lib.checks.notebook import Cell, definitions
from tutorial_lib.checks.pipe import receive, send
from tutorial_lib.checks.plain import pack, readable, unpack

__all__ = ["load", "load_symbol", "main", "serve"]

PACKAGE = Path(__file__).resolve().parents[1]


def load_symbol(cells: Sequence[Cell], symbol: str) -> Any:
    """Run the definitions of the cells, in order, and return what `symbol` is at the end.

    A cell with an error does not stop the others: it matters only if `symbol` then is missing.

    Raises:
        Exception: the learner's own error, if it left `symbol` undefined.
        LookupError: if no cell defines it.
    """
    module = types.ModuleType("__learner__")
    sys.modules[module.__name__] = module  # dataclasses and inspect look a class's module up
    first_error: BaseException | None = None
    for cell in cells:
        lines = cell.source.splitlines(keepends=True)
        linecache.cache[cell.filename] = (len(cell.source), None, lines, cell.filename)
        try:
            statements = definitions(cell)
        except SyntaxError as error:
            if _names(cell.source, symbol):
                first_error = first_error or error
            continue
        for statement in statements:
            try:
                exec(compile(ast.Module([statement], []), cell.filename, "exec"), module.__dict__)
            except Exception as error:  # e.g. an import that was deleted: remember the first
                first_error = first_error or error
    if symbol in module.__dict__:
        return module.__dict__[symbol]
    if first_error is not None:
        raise first_error
    raise LookupError(f"no cell of the notebook defines `{symbol}` any more")


def _names(source: str, symbol: str) -> bool:
    return any(f"{keyword} {symbol}" in source for keyword in ("def", "class")) or f"{symbol} =" in source


def load(cells: Sequence[Cell], symbol: str, seconds: float) -> tuple[Any, str]:
    """The learner's object, and "", or the sentence on why there is none."""
    try:
        with guarded(seconds):
            return load_symbol(cells, symbol), ""
    except SyntaxError as error:
        line = readable((error.text or "").strip()[:200])
        return None, f"Python cannot read the cell: {error.msg}" + (f", at `{line}`" if line else "")
    except BaseException as error:
        if type(error) is LookupError:
            return None, str(error)
        return None, explain_crash(error, seconds)


def serve(
    requests: int, answers: int, here: Here, cells: Sequence[Cell], seconds: float, scratch: str = ""
) -> None:
    """Answer until the parent has no more requests. It never returns: no exit handler of the learner's runs.

    Args:
        requests, answers: Ends of two pipes.
        here: Has the probes, and gets the learner's object.
        scratch: The only folder to write to, under strict; else "".
    """
    os.setsid() if hasattr(os, "setsid") else None  # so that its own children can be ended with it
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    builtins.input = _no_input  # type: ignore[assignment]
    torch.set_num_threads(1)
    confine.limit(bool(scratch))
    if scratch:
        confine.close_the_doors(Path(scratch), [PACKAGE])
    here.learner, sentence = load(cells, here.symbol, seconds)
    send(answers, pack(vars(Answer("crashed" if sentence else "given", None, sentence))))
    while not sentence and (request := receive(requests)) is not None:
        what, number, seconds = unpack(request)
        try:
            found = vars(here.to(number, seconds)) if what == "to" else here.forgot(number)
            answer = pack(found)
        except BaseException as error:
            answer = pack(vars(Answer("crashed", None, explain_crash(error, seconds))))
        send(answers, answer)
    os._exit(0)


def _no_input(prompt: object = "") -> str:
    raise EOFError("an exercise is graded with nobody at the keyboard: take input() out")


# ── under strict, in an interpreter of its own ────────────────────────────────────────────────────────────


def main() -> None:
    """Take the first request from stdin, which names the exercise, and serve it; answers go to stdout."""
    requests, answers = os.dup(0), os.dup(1)
    request = unpack(receive(requests) or b"")
    confine.die_with_parent(request["parent"])
    tempfile.tempdir = request["scratch"] or None
    here = _here(request["exercise"], request["modules"], strict=bool(request["scratch"]))
    cells = [Cell(number, source) for number, source in request["cells"]]
    serve(requests, answers, here, cells, request["seconds"], request["scratch"])


def _here(exercise_id: str, modules: Sequence[str], strict: bool) -> Here:
    """What is to be asked. Under strict the exercise itself lives no longer than this call: frames can be walked."""
    exercise = find_exercise(exercise_id)
    here = Here(exercise.probes, exercise.symbol, asked_of(exercise), None)
    for name in modules:  # what the exercise's own notebook imports from the course
        importlib.import_module(name)
    if strict:
        here.probes = without_answers(exercise)
        hide_the_course(modules)
    return here
