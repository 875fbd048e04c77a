"""What a process forgets before somebody else's code runs in it: the course's modules, and a grading's answers.

Python has no walls within a process, so this only takes away what lies open; the answers that are judged are
numbers, and those have to be right.
"""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tutorial_lib.checks.gradings import forget
from tutorial_lib.checks.spec import Exercise, Probe

__all__ = ["hide_the_course", "without_answers"]


def hide_the_course(modules: Sequence[str]) -> None:
    """Leave these modules of the course to be imported, and no others, though they go on working.

    `from tutorial_lib.checks import check` stands in every notebook: it gets one that nothing calls here.
    """
    kept = {"tutorial_lib", *modules, *(name.rpartition(".")[0] for name in modules)}
    for name in [name for name in sys.modules if name.split(".")[0] == "tutorial_lib" and name not in kept]:
        package, _, last = name.rpartition(".")
        if package in kept:
            vars(sys.modules[package]).pop(last, None)
        del sys.modules[name]
    checks = sys.modules["tutorial_lib.checks"] = types.ModuleType("tutorial_lib.checks")
    checks.check = lambda exercise_id, learner: None  # type: ignore[attr-defined]


def without_answers(exercise: Exercise) -> list[Probe]:
    """The exercise's probes; all of its grading that they do not need is gone, above all the reference."""
    grading = sys.modules.pop(forget(exercise))
    needed = _reached([probe.run for probe in exercise.probes], vars(grading))
    for name in [name for name in vars(grading) if not name.startswith("__") and name not in needed]:
        del vars(grading)[name]
    probes = [replace(probe, judge=lambda yours, expected: None, given=None) for probe in exercise.probes]
    del exercise
    gc.collect()
    return probes


def _reached(runs: Sequence[Any], names: dict[str, Any]) -> set[str]:
    """The globals that functions and classes may look up, and those that these look up."""
    found: set[str] = set()
    todo, seen = list(runs), set()
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        for part in _parts(thing):
            if isinstance(part, str) and part in names:
                found.add(part)
                part = names[part]
            todo.append(part)
    return found


def _parts(thing: Any) -> Iterator[Any]:
    if isinstance(thing, types.CodeType):
        yield from (*thing.co_names, *thing.co_consts)
    elif isinstance(thing, types.FunctionType):
        yield from (
            thing.__code__,
            *(thing.__defaults__ or ()),
            *(cell.cell_contents for cell in thing.__closure__ or ()),
        )
    elif isinstance(thing, (tuple, list)):
        yield from thing
    elif isinstance(thing, type):
        yield from (*vars(thing).values(), *(base.__name__ for base in thing.__bases__))
