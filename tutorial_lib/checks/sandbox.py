"""Grade a notebook's exercises, each in a process of its own with a limit on time and on memory.

Learner code may loop for ever, ask for 50 GB, call `sys.exit` or crash the interpreter: its process ends, one
sentence is left, and the other exercises are graded all the same. Only definitions run (imports, functions,
classes, constants), never the notebook's experiments.
"""

from __future__ import annotations

import ast
import builtins
import linecache
import multiprocessing
import os
import signal
import sys
import types
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tutorial_lib.checks.grade import Result, grade
from tutorial_lib.checks.gradings import find_exercise
from tutorial_lib.checks.guard import explain_crash, guarded
from tutorial_lib.checks.notebook import Cell, code_cells, definitions
from tutorial_lib.checks.spec import Exercise
from tutorial_lib.checks.stubs import is_untouched, top_level_source

__all__ = ["grade_cells", "grade_notebook", "load_symbol"]

SECONDS = 20.0
MEMORY_GIB = 2.0
GRACE = 10.0  # seconds beyond the limit, for the child to say so itself


def load_symbol(cells: list[Cell], symbol: str) -> Any:
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


def _crashed(exercise: Exercise, sentence: str) -> Result:
    probes = {probe.name: "not run" for probe in exercise.probes}
    return Result(exercise.id, exercise.symbol, "crashed", probes, sentence, look_again=exercise.look_again)


def grade_cells(exercise: Exercise, cells: list[Cell]) -> Result:
    """Grade one exercise here and now, in this process."""
    try:
        with guarded(SECONDS):
            learner = load_symbol(cells, exercise.symbol)
    except SyntaxError as error:
        line = (error.text or "").strip()
        return _crashed(exercise, f"Python cannot read the cell: {error.msg}, at `{line}`")
    except LookupError as error:
        if type(error) is LookupError:
            return _crashed(exercise, str(error))
        return _crashed(exercise, explain_crash(error, SECONDS))
    except BaseException as error:
        return _crashed(exercise, explain_crash(error, SECONDS))
    return grade(exercise, learner, SECONDS)


def _limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = used + int(MEMORY_GIB * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # no such limits here (Windows, macOS): time still is
        pass


def _child(exercise_id: str, cells: list[Cell], answer: Connection) -> None:
    os.setsid() if hasattr(os, "setsid") else None  # so that its own children can be ended with it
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    builtins.input = _no_input  # type: ignore[assignment]
    torch.set_num_threads(1)
    _limit_memory()
    answer.send(grade_cells(find_exercise(exercise_id), cells))
    answer.close()
    os._exit(0)  # no exit handlers of the learner's


def _no_input(prompt: object = "") -> str:
    raise EOFError("an exercise is graded with nobody at the keyboard: take input() out")


def _grade_apart(exercise: Exercise, cells: list[Cell]) -> Result:
    """Grade in a child process; whatever becomes of it, a result comes back."""
    fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(exercise.id, cells, theirs), daemon=True)
    torch.set_num_threads(1)  # a fork must not inherit a pool of threads
    child.start()
    theirs.close()
    try:
        # The child's own alarm gives the better sentence; this one is for code that blocks alarms.
        if ours.poll(SECONDS + GRACE):
            return ours.recv()
        return _crashed(exercise, f"it did not finish within {SECONDS:.0f} seconds, and had to be ended")
    except EOFError:
        child.join(5)
        return _crashed(exercise, _how_it_died(child.exitcode))
    finally:
        _end(child)


def _end(child: Any) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        child.kill()
    child.join()


def _how_it_died(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        why = "it ran out of memory" if name == "SIGKILL" else "it crashed the Python interpreter"
        return f"{why} ({name}): does it reach outside of Python, or ask for too much?"
    return f"it ended the Python process (exit code {exitcode}): use return, or raise an error"


def grade_notebook(path: Path, exercises: list[Exercise]) -> list[Result]:
    """Grade the given exercises of one notebook, each apart from the others."""
    try:
        cells = code_cells(path)
    except (OSError, ValueError) as error:
        return [_crashed(exercise, str(error)) for exercise in exercises]
    results = []
    for exercise in exercises:
        if is_untouched(exercise.symbol, top_level_source(cells, exercise.symbol), path):
            result = _crashed(exercise, "the stub is as it came")
            result.status = "not started"
        else:
            result = _grade_apart(exercise, cells)
        results.append(result)
    return results
