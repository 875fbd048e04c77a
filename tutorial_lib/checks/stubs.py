"""Is an exercise's cell still the stub as it came? Compared by syntax, so white space does not count."""

from __future__ import annotations

import ast
import inspect
import json
import linecache
from functools import cache
from pathlib import Path
from typing import Any

from tutorial_lib.checks.gradings import PACKAGE, grading_files
from tutorial_lib.checks.notebook import Cell, definitions, find_home
from tutorial_lib.nb.digests import stub_digest

__all__ = ["is_untouched", "is_untouched_object", "top_level_source"]


def _manifest() -> dict[str, dict[str, Any]]:
    """The stubs as they came: the clone's list of them, or the one that a wheel brings along."""
    home = find_home()
    file = (home or PACKAGE) / "exercises" / "manifest.json"
    try:
        return _read_manifest(file)
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # without it, a stub is still known by its NotImplementedError


@cache
def _read_manifest(file: Path) -> dict[str, dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))["notebooks"]


def top_level_source(cells: list[Cell], symbol: str) -> str | None:
    """The source of the last definition of `symbol` in the cells."""
    for cell in reversed(cells):
        try:
            found = [s for s in definitions(cell) if getattr(s, "name", None) == symbol]
        except SyntaxError:
            if symbol in cell.source:
                return None
            continue
        if found:
            return ast.get_source_segment(cell.source, found[-1])
    return None


def is_untouched(lesson: str, symbol: str, source: str | None) -> bool:
    """Whether `source` is the stub that `make exercises` wrote for this lesson."""
    grading = grading_files()[lesson]  # at the notebook's own path, in its tree
    entry = _manifest().get(f"{grading.parent.name}/{grading.stem}.ipynb", {})
    stub = entry.get("stubs", {}).get(symbol)
    try:
        return source is not None and stub is not None and stub_digest(source) == stub
    except (ValueError, RecursionError):  # digests do not go as deep as Python's syntax may
        return False


def is_untouched_object(lesson: str, symbol: str, learner: Any) -> bool:
    """The same for a live function or class from a notebook's kernel."""
    return is_untouched(lesson, symbol, _live_source(learner, symbol))


def _live_source(learner: Any, symbol: str) -> str | None:
    # inspect.getsource cannot find a notebook's class before Python 3.13; its methods know their cell.
    functions = [learner, *vars(learner).values()] if isinstance(learner, type) else [learner]
    for function in functions:
        code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
        if code is not None:
            lines = linecache.getlines(code.co_filename)
            return top_level_source([Cell(0, "".join(lines))], symbol) if lines else None
    return None
