"""Grade a notebook's exercises, each in a process of its own with a limit on time and on memory.

Learner code may loop for ever, ask for 50 GB, call `sys.exit` or crash the interpreter: its process ends, one
sentence is left, and the other exercises are graded all the same. Only definitions run (imports, functions,
classes, constants), never the notebook's experiments. The process gives numbers, and they are judged here, where no
learner code runs.

`strict` is for the work of others: their process reaches nothing but Python and a folder of its own (`confine`),
and what it may import from the course is what the exercise's own notebook imports. SECURITY.md says what remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tutorial_lib.checks import child
from tutorial_lib.checks.answers import Here, asked_of
from tutorial_lib.checks.apart import Apart, scratch_folder
from tutorial_lib.checks.grade import Result, judge
from tutorial_lib.checks.gradings import PACKAGE
from tutorial_lib.checks.notebook import Cell, code_cells, course_imports, find_home, notebook_of
from tutorial_lib.checks.plain import readable
from tutorial_lib.checks.spec import Exercise
from tutorial_lib.checks.stubs import is_untouched, top_level_source

__all__ = ["grade_cells", "grade_notebook"]

SECONDS = 20.0
GRACE = 10.0  # seconds beyond the limit, for the child to say so itself
UNTOUCHED = (
    "the notebook's file holds the stub as it came: if you have written there, save the notebook (Ctrl-S)"
)


def _result(exercise: Exercise, status: str, sentence: str, details: str = "") -> Result:
    probes = {probe.name: "not run" for probe in exercise.probes}
    return Result(
        exercise.id,
        exercise.symbol,
        status,
        probes,
        sentence,
        look_again=exercise.look_again,
        details=details,
    )


def grade_cells(exercise: Exercise, cells: list[Cell]) -> Result:
    """Grade one exercise here and now, in this process."""
    learner, sentence = child.load(cells, exercise.symbol, SECONDS)
    if sentence:
        return _result(exercise, "crashed", sentence)
    return judge(exercise, Here(exercise.probes, exercise.symbol, asked_of(exercise), learner), SECONDS)


def _grade_apart(exercise: Exercise, cells: list[Cell], modules: Sequence[str], strict: bool) -> Result:
    with scratch_folder(strict) as scratch:
        apart = Apart(exercise, cells, modules, scratch, SECONDS, GRACE)
        try:
            ready = apart.ready()
            if ready.status == "crashed":
                return _result(exercise, "crashed", ready.sentence)
            return judge(exercise, apart, SECONDS)
        finally:
            apart.end()


def grade_notebook(path: Path, exercises: list[Exercise], strict: bool = False) -> list[Result]:
    """Grade the given exercises of one notebook, each apart from the others.

    Args:
        strict: The notebook is somebody else's: bound it on all sides.
    """
    try:
        cells = code_cells(path)
    except (OSError, ValueError) as error:
        return [_result(exercise, "crashed", readable(str(error))) for exercise in exercises]
    results = []
    for exercise in exercises:
        if is_untouched(exercise.lesson, exercise.symbol, top_level_source(cells, exercise.symbol)):
            results.append(_result(exercise, "not started", UNTOUCHED))
            continue
        allowed = _imports_of_the_stub(exercise.lesson) if strict else set()
        if strict and (more := sorted(course_imports(cells) - allowed)):
            name = ".".join(filter(None, more[0]))
            sentence = f"it imports {name}, which the exercise's own notebook does not: build it yourself"
            results.append(_result(exercise, "crashed", sentence))
            continue
        results.append(_grade_apart(exercise, cells, _modules(allowed), strict))
    return results


def _imports_of_the_stub(lesson: str) -> set[tuple[str, str]]:
    """What the exercise's own notebook imports from the course.

    Raises:
        FileNotFoundError: if it is not here.
    """
    home = find_home()
    notebook = notebook_of(lesson, home / "solutions") if home else None
    if notebook is None:
        raise FileNotFoundError(
            "strict grading needs the course's solutions: run it in a clone of the course"
        )
    return course_imports(code_cells(notebook))


def _modules(imports: set[tuple[str, str]]) -> list[str]:
    """The modules among what is imported: in `from a import b`, b may be one."""
    names = {module for module, _ in imports} | {f"{module}.{name}" for module, name in imports if name}
    return sorted(n for n in names if (PACKAGE.parent / n.replace(".", "/")).with_suffix(".py").exists())
