"""The grader is tested harder than the learner: solution, stub, misconceptions, mutants of each exercise."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tutorial_lib.checks.answers import run_probe
from tutorial_lib.checks.grade import Result, grade
from tutorial_lib.checks.gradings import all_exercises, grading_files
from tutorial_lib.checks.mutate import mutants
from tutorial_lib.checks.notebook import code_cells, notebook_of, statements
from tutorial_lib.checks.probes import equals, same_parameters, same_shape
from tutorial_lib.checks.sandbox import grade_cells, grade_notebook
from tutorial_lib.checks.spec import Exercise, Probe
from tutorial_lib.checks.stubs import top_level_source

ROOT = Path(__file__).resolve().parents[2]
EXERCISES = list(all_exercises().values())
COMPARISONS = (same_shape.__qualname__, same_parameters.__qualname__, equals().__qualname__)
PROPERTIES = [(e, p) for e in EXERCISES for p in e.probes if p.judge.__qualname__ not in COMPARISONS]
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=[e.id for e in EXERCISES])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # grading forks


def notebook(exercise: Exercise, tree: str | Path) -> Path:
    path = notebook_of(exercise.lesson, ROOT / tree)
    assert path is not None, f"lesson {exercise.lesson} has no notebook in {tree}/"
    return path


@each_exercise
def test_the_solution_passes(exercise: Exercise):
    [result] = grade_notebook(notebook(exercise, "solutions"), [exercise])
    assert result.passed, repr(result)


@pytest.mark.parametrize(("exercise", "probe"), PROPERTIES, ids=[f"{e.id} {p.name}" for e, p in PROPERTIES])
def test_the_reference_has_the_properties_that_it_asks_for(exercise: Exercise, probe: Probe):
    """Where a judge compares with the reference, it cannot be wrong about itself: the solution is held to it."""
    result = run_probe(probe, exercise.reference)
    assert (failure := probe.judge(result, result)) is None, failure


@each_exercise
def test_the_stub_is_not_started(exercise: Exercise, fresh_exercises: Path):
    [result] = grade_notebook(notebook(exercise, fresh_exercises), [exercise])
    assert result.status == "not started", repr(result)


@each_exercise
def test_a_forgotten_return_is_named(exercise: Exercise):
    """A solution that computes its last line and does not return it; of a class, one method at a time."""
    cells = code_cells(notebook(exercise, "solutions"))
    tree = ast.parse(top_level_source(cells, exercise.symbol) or "")
    [top] = tree.body
    for function in filter(_gives_back, top.body if isinstance(top, ast.ClassDef) else [top]):
        last = function.body[-1]
        function.body[-1] = ast.Expr(last.value)
        result = _grade_mutant(exercise, cells, ast.unparse(ast.fix_missing_locations(tree)))
        assert result.sentence == f"`{function.name}` returned None: is a `return` missing?", repr(result)
        function.body[-1] = last


def _gives_back(node: ast.stmt) -> bool:
    """A function that ends in a `return`, and whose signature does not allow None."""
    if not isinstance(node, ast.FunctionDef) or not isinstance(node.body[-1], ast.Return):
        return False
    return node.returns is not None and "None" not in ast.unparse(node.returns)


@each_exercise
def test_every_misconception_is_rejected_and_named(exercise: Exercise):
    assert 3 <= len(exercise.misconceptions) <= 10
    for misconception in exercise.misconceptions:
        result = grade(exercise, misconception.wrong)
        assert result.status == "wrong", f"{misconception.name}: {result!r}"
        assert result.diagnosis == misconception.name, f"{misconception.name}: {result!r}"
        assert misconception.sentence in repr(result)
        assert misconception.sentence.endswith((".", "?", "!", ".)"))


@each_exercise
def test_the_text_is_complete(exercise: Exercise):
    path = notebook(exercise, "solutions")
    statement = statements(path)[exercise.id]
    assert len(statement.hints) == 3 and all(statement.hints)
    assert 1 <= statement.stars <= 3 and statement.minutes > 0 and statement.importance
    sources = [cell.source for cell in code_cells(path)]
    assert any(f'check("{exercise.id}", {exercise.symbol})' in source for source in sources)
    chapter = json.loads(notebook(exercise, "chapters").read_text(encoding="utf-8"))
    text = "\n".join("".join(c["source"]) for c in chapter["cells"] if c["cell_type"] == "markdown")
    headings = [h.strip() for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    assert exercise.look_again in headings, f"no such heading in the lesson: {exercise.look_again!r}"


def test_every_lesson_has_its_grading_at_the_same_path():
    def tails(tree: str, ending: str) -> list[Path]:
        files = (p.relative_to(ROOT / tree).with_suffix("") for p in (ROOT / tree).rglob(f"[0-9]*{ending}"))
        return sorted(tail for tail in files if ".ipynb_checkpoints" not in tail.parts)

    assert tails("grading", ".py") == tails("chapters", ".ipynb")


@pytest.mark.parametrize("file", grading_files().values(), ids=grading_files())
def test_a_grading_stands_alone(file: Path):
    """It imports no other grading, and nothing that comes with neither the package nor Python."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("" if node.level else (node.module or "").partition(".")[0])
    loaders = {"importlib", "runpy", "imp", "pkgutil"}
    assert imported <= {"tutorial_lib", "torch", "numpy", *sys.stdlib_module_names} - loaders


def test_every_lesson_has_at_least_two_exercises():
    for path in sorted((ROOT / "chapters").glob("part_*/*.ipynb")):
        part, lesson = path.name.split("_")[:2]
        mine = [e for e in EXERCISES if e.lesson == f"{part}.{lesson}"]
        assert len(mine) >= 2, f"{path.name} has {len(mine)} exercises"
        stated = set(statements(ROOT / "solutions" / path.relative_to(ROOT / "chapters")))
        assert stated == {e.id for e in mine}, "the notebook and the checker disagree"


@each_exercise
@pytest.mark.slow
def test_mutants_of_the_solution_are_killed(exercise: Exercise, record_property):
    cells = code_cells(notebook(exercise, "solutions"))
    source = top_level_source(cells, exercise.symbol)
    assert source is not None
    killed, survivors = 0, []
    for mutant in mutants(source):
        if _grade_mutant(exercise, cells, mutant.source).passed:
            survivors.append(mutant.description)
        else:
            killed += 1
    record_property("mutants", (exercise.id, killed, len(survivors)))
    for survivor in survivors:
        print(f"  survived: {survivor}: {exercise.equivalent_mutants.get(survivor, 'NOT EXPLAINED')}")
    unexplained = [s for s in survivors if s not in exercise.equivalent_mutants]
    stale = [s for s in exercise.equivalent_mutants if s not in survivors]
    assert not unexplained, f"let through: {unexplained}"
    assert not stale, f"listed as equivalent, but killed or gone: {stale}"


def _grade_mutant(exercise: Exercise, cells, source: str) -> Result:
    """The solution's cells, with the definition replaced by the mutant; in this process, for speed."""
    from tutorial_lib.checks import sandbox
    from tutorial_lib.checks.notebook import Cell

    seconds, sandbox.SECONDS = sandbox.SECONDS, 2.0
    try:
        number = max(c.number for c in cells) + 1
        ast.parse(source)
        return grade_cells(exercise, [*cells, Cell(number, source)])
    finally:
        sandbox.SECONDS = seconds
