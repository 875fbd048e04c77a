"""Finds the gradings: `grading/part_3_modernizing/3_2_rope.py` says how that lesson's exercises are checked."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from functools import cache
from pathlib import Path

from tutorial_lib.checks.spec import Exercise

__all__ = ["all_exercises", "find_exercise", "forget", "grading_files"]

PACKAGE = Path(__file__).resolve().parents[1]
PLACES = (PACKAGE.parent / "grading", PACKAGE / "grading")
"""Beside the package, in a clone; inside it, where a wheel was installed: setup.py takes the folder along."""


def grading_files() -> dict[str, Path]:
    """Each lesson's grading, in the order of the course: `"3.2"` -> `…/3_2_rope.py`.

    Raises:
        FileNotFoundError: if there is none, in none of `PLACES`.
        ValueError: if a lesson has two.
    """
    files = next((found for place in PLACES if (found := list(place.glob("part_*/[0-9]*_[0-9]*_*.py")))), [])
    if not files:
        places = " nor ".join(map(str, PLACES))
        raise FileNotFoundError(f"the gradings are neither in {places}: clone or install the course again")
    by_lesson: dict[str, Path] = {}
    for file in sorted(files, key=_in_the_course):
        lesson = ".".join(file.stem.split("_")[:2])
        if lesson in by_lesson:
            raise ValueError(f"lesson {lesson} has two gradings, {by_lesson[lesson].name} and {file.name}")
        by_lesson[lesson] = file
    return by_lesson


def _in_the_course(file: Path) -> tuple[int, int, str]:
    part, lesson, name = file.stem.split("_", 2)
    return int(part), int(lesson), name


@cache
def _exercises_in(file: Path, lesson: str) -> dict[str, Exercise]:
    """Run a grading; its name starts with a digit, so `import` cannot."""
    name = f"grading_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    spec.loader.exec_module(module)
    found: dict[str, Exercise] = {}
    for exercise in module.EXERCISES:
        if exercise.lesson != lesson:
            raise ValueError(f"{file.name} defines exercise {exercise.id}, which is not of lesson {lesson}")
        if exercise.id in found:
            raise ValueError(f"exercise {exercise.id} is defined twice in {file.name}")
        found[exercise.id] = exercise
    return dict(sorted(found.items()))


def forget(exercise: Exercise) -> str:
    """Keep no exercise in this process, but for who holds one; the name of the grading's module, which stays."""
    _exercises_in.cache_clear()
    return f"grading_{grading_files()[exercise.lesson].stem}"


def all_exercises() -> dict[str, Exercise]:
    """Every exercise by id, in the order of the course."""
    found: dict[str, Exercise] = {}
    for lesson, file in grading_files().items():
        found |= _exercises_in(file, lesson)
    return found


def find_exercise(exercise_id: str) -> Exercise:
    """The exercise with this id, of which only the lesson's own grading is run.

    Raises:
        KeyError: if there is none; it names the nearest.
        FileNotFoundError: if the gradings are not here.
    """
    lesson = exercise_id.rpartition(".")[0]
    files = grading_files()
    mine = _exercises_in(files[lesson], lesson) if lesson in files else {}
    if exercise_id not in mine:
        [near] = difflib.get_close_matches(exercise_id.lower(), all_exercises(), n=1, cutoff=0.0)
        raise KeyError(f"there is no exercise {exercise_id!r}; the nearest is {near}")
    return mine[exercise_id]
