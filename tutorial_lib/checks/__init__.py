"""The exercise checker: `check("1.4.a", split_heads)` in a notebook, `make check-chapter 1` in a shell."""

from __future__ import annotations

import sys
from typing import Any

from tutorial_lib.checks.grade import Result, grade
from tutorial_lib.checks.gradings import find_exercise
from tutorial_lib.checks.progress import record
from tutorial_lib.checks.stubs import is_untouched_object

__all__ = ["check"]


def check(exercise_id: str, learner: Any) -> Result:
    """Check what you built for an exercise; the result displays itself, or, in a plain script, is printed.

    Raises:
        KeyError: if there is no such exercise.
        FileNotFoundError: if the gradings are not here.
    """
    exercise = find_exercise(exercise_id)
    if is_untouched_object(exercise.lesson, exercise.symbol, learner):
        probes = {probe.name: "not run" for probe in exercise.probes}
        result = Result(exercise.id, exercise.symbol, "not started", probes, "the stub is as it came")
    else:
        result = grade(exercise, learner)
    record([result])
    if not _shows_values():
        print(result)
    return result


def _shows_values() -> bool:
    """Whether Python shows what a line gives: in a notebook, in IPython and at the prompt, and in no script."""
    ipython = sys.modules.get("IPython")
    return hasattr(sys, "ps1") or bool(ipython and ipython.get_ipython())
