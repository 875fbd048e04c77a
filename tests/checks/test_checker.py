"""The checker itself: whatever learner code does, one sentence comes out and the others are still graded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch

from tutorial_lib.checks import check, gradings, progress
from tutorial_lib.checks.__main__ import main
from tutorial_lib.checks.grade import grade
from tutorial_lib.checks.gradings import all_exercises, find_exercise
from tutorial_lib.checks.mutate import mutants
from tutorial_lib.checks.notebook import Cell, code_cells, definitions, notebook_of
from tutorial_lib.checks.probes import equals, fill_by_name, holds, leaks, same_shape
from tutorial_lib.checks.report import as_html, as_text
from tutorial_lib.checks.sandbox import grade_notebook
from tutorial_lib.checks.spec import Exercise, Misconception, Probe, same_value

ROOT = Path(__file__).resolve().parents[2]
GOOD = "def split_heads(x, n):\n    B, T, D = x.shape\n    return x.view(B, T, n, D // n).transpose(1, 2)"


@pytest.fixture(autouse=True)
def away_from_the_real_progress(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(progress, "_file", lambda: tmp_path / "state" / "progress.json")
    (tmp_path / "state").mkdir()


def graded(tmp_path: Path, *cells: str, imports: str = "import torch"):
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(source) for source in (imports, *cells)]
    path = tmp_path / "1_4_x.ipynb"
    nbformat.write(nb, path)
    [result] = grade_notebook(path, [find_exercise("1.4.a")])
    return result


def test_a_right_answer_passes_and_nothing_else_of_the_notebook_runs(tmp_path):
    marker = tmp_path / "ran"
    result = graded(
        tmp_path,
        GOOD,
        f"open({str(marker)!r}, 'w')",
        'check("1.4.a", split_heads)\nwhile True:\n    pass',
        "x = split_heads(torch.zeros(1, 2, 4), 2)",
        "%matplotlib inline\n!ls\nraise SystemExit",
    )
    assert result.passed, repr(result)
    assert not marker.exists()


def body(code: str) -> str:
    return "import sys, os, ctypes\n\ndef split_heads(x, n):\n    " + code


HOSTILE = {
    "never ends": (body("while True: pass"), "did not finish within"),
    "swallows everything": (
        body("while True:\n        try:\n            while True: pass\n        except BaseException: pass"),
        "did not finish within",
    ),
    "never ends when defined": ("class A:\n    while True: pass\n" + GOOD, "did not finish within"),
    "sys.exit": (body("sys.exit(0)"), "called sys.exit()"),
    "os._exit": (body("os._exit(0)"), "ended the Python process (exit code 0)"),
    "crash of the interpreter": (body("ctypes.string_at(0)"), "crashed the Python interpreter (SIGSEGV)"),
    "50 GB tensor": (
        body("return torch.zeros(50 * 2**30 // 4)"),
        "more memory than an exercise may have (50 GiB",
    ),
    "huge list": (body("return [0] * 10**10"), "more memory than an exercise may have"),
    "print storm": (body("while True: print('hello')"), "printed more than 100,000 characters"),
    "input": (body("return input()"), "nobody at the keyboard"),
    "recursion": (body("return split_heads(x, n)"), "calls itself without end"),
    "syntax": ("def split_heads(x, n):\n    return x.view(", "Python cannot read the cell"),
    "deleted": ("pass", "no cell of the notebook defines `split_heads`"),
    "wrong type": ("split_heads = 7", "TypeError"),
    "error": (body("return x.view(3, 3, 3)"), "RuntimeError at `return x.view(3, 3, 3)`"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_becomes_one_sentence(tmp_path, monkeypatch, name):
    from tutorial_lib.checks import sandbox

    monkeypatch.setattr(sandbox, "SECONDS", 2.0)
    monkeypatch.setattr(sandbox, "GRACE", 3.0)
    source, sentence = HOSTILE[name]
    result = graded(tmp_path, source)
    assert result.status == "crashed", repr(result)
    assert sentence in result.sentence and "\n" not in result.sentence
    assert "Traceback" not in as_text(result)


def test_a_deleted_import_is_said(tmp_path):
    result = graded(tmp_path, "def split_heads(x, n):\n    return torch.zeros(3)", imports="pass")
    assert result.status == "crashed"
    assert "'torch' is not defined" in result.sentence and "import cell at the top" in result.sentence


def test_the_others_are_graded_all_the_same(tmp_path, monkeypatch):
    from tutorial_lib.checks import sandbox

    monkeypatch.setattr(sandbox, "SECONDS", 2.0)
    bad = graded(tmp_path, body("os._exit(3)"))
    good = graded(tmp_path, "def broken(:\n    pass", GOOD)
    assert bad.status == "crashed" and good.passed


def test_not_started_wrong_and_diagnosed(tmp_path):
    assert graded(tmp_path, "def split_heads(x, n):\n    raise NotImplementedError").status == "not started"
    named = graded(tmp_path, body("B, T, D = x.shape; return x.view(B, n, T, D // n)"))
    assert named.status == "wrong" and named.diagnosis == "reshape without transpose"
    unknown = graded(tmp_path, GOOD + " * 1.01")
    assert unknown.status == "wrong" and unknown.diagnosis == "", "claimed without a numeric match"
    text = as_text(named)
    assert "What happened" in text and "expected" in text and "make hint 1.4.a" in text


def test_no_solution_code_and_no_traceback_unless_asked(tmp_path):
    result = graded(tmp_path, body("return x.view(3, 3, 3)"))
    assert "Traceback" not in repr(result) and "Traceback" not in as_html(result)
    assert "Traceback" in as_text(result, verbose=True)


def test_check_in_a_notebook_survives_what_it_can(monkeypatch):
    monkeypatch.setattr(grade, "__defaults__", (1.0,))

    def for_ever(x, n):
        while True:
            pass

    result = check("1.4.a", for_ever)
    assert result.status == "crashed" and "did not finish" in result.sentence

    def leaves(x, n):
        sys.exit(1)

    assert "sys.exit" in check("1.4.a", leaves).sentence
    assert sys.stdout is not None and print("still here") is None
    with pytest.raises(KeyError, match="nearest is 1.4.a"):
        check("1.4.A", leaves)


def test_html_is_escaped():
    def wrong(x, n):
        raise ValueError("<script>alert(1)</script>")

    page = as_html(grade(find_exercise("1.4.a"), wrong))
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_inputs_a_learner_writes_into_do_not_spoil_later_probes():
    def add(x):
        return x.add_(1)

    exercise = Exercise(
        "9.9.a", "add", lambda x: x + 1,
        [Probe("a", lambda f: f(torch.zeros(2)), equals()), Probe("b", lambda f: f(torch.zeros(2)), equals())],
        [], "",
    )  # fmt: skip
    assert grade(exercise, add).passed


def test_gradients_left_switched_off_are_noticed_and_switched_on_again():
    exercise = find_exercise("3.7.b")

    def careless(tensors, config):
        torch.set_grad_enabled(False)
        return exercise.reference(tensors, config)

    result = grade(exercise, careless)
    assert result.status == "wrong" and "still switched off" in result.sentence, repr(result)
    assert torch.is_grad_enabled()
    with torch.no_grad():  # in a notebook, the learner's own cell may have switched them off before
        assert not grade(exercise, careless).passed and grade(exercise, exercise.reference).passed
        assert not torch.is_grad_enabled(), "what the notebook's other cells have set is theirs"

    def run(f):
        w = torch.ones(2, requires_grad=True)
        f(w).sum().backward()
        return w.grad

    needs_them = Exercise("9.9.e", "f", lambda w: 2 * w, [Probe("the gradient", run, equals())], [], "")
    result = grade(needs_them, lambda w: (torch.set_grad_enabled(False), 2 * w)[1])
    assert result.status == "crashed" and "still switched off" in result.sentence, repr(result)


@pytest.mark.parametrize(
    ("returns", "blamed"),
    [
        ("torch.Tensor", True),
        ("None", False),
        ("'torch.Tensor | None'", False),
        ("'Optional[torch.Tensor]'", False),
    ],
)
def test_a_forgotten_return_is_a_guess_only_where_none_cannot_be_meant(returns, blamed):
    def function(x):
        pass

    function.__annotations__["return"] = eval(returns)
    exercise = Exercise(
        "9.9.c",
        "function",
        lambda x: x + 1,
        [Probe("a", lambda f: f(torch.zeros(2)).sum(), equals())],
        [],
        "",
    )
    result = grade(exercise, function)
    assert result.status == "crashed"
    assert ("`function` returned None: is a `return` missing?" == result.sentence) is blamed, repr(result)


def test_where_an_error_is_right_none_is_no_forgotten_return():
    def prints_only(d_head, base, factor):
        if d_head % 2:
            print("d_head must be even")
            return None
        return find_exercise("3.2.d").reference(d_head, base, factor)

    result = grade(find_exercise("3.2.d"), prints_only)
    assert result.status == "wrong" and "return" not in result.sentence, repr(result)
    assert "ValueError" in result.table["expected"], repr(result)


def test_a_class_is_blamed_for_the_method_without_return_only():
    class Right:
        def add(self, x):
            self.x = x

        def total(self):
            return self.x

    class Forgets(Right):
        def add(self, x):
            self.x = x

        def total(self):
            self.x + 0

    def run(cls):
        counter = cls()
        counter.add(torch.ones(2))
        total = counter.total()
        counter.add(torch.ones(2))
        return total.sum()

    result = grade(Exercise("9.9.d", "Forgets", Right, [Probe("a", run, equals())], [], ""), Forgets)
    assert result.sentence == "`total` returned None: is a `return` missing?", repr(result)


def test_a_diagnosis_needs_all_probes_when_two_ideas_look_alike():
    exercise = Exercise(
        "9.9.b",
        "double",
        lambda x: 2 * x,
        [Probe("at 3", lambda f: f(3.0), equals()), Probe("at 5", lambda f: f(5.0), equals())],
        [Misconception("square", lambda x: x * x, "."), Misconception("plus 6", lambda x: x + 6, ".")],
        "",
    )
    assert grade(exercise, lambda x: x + 6).diagnosis == "plus 6"
    assert grade(exercise, lambda x: x * x).diagnosis == "square"
    assert grade(exercise, lambda x: x + 7).diagnosis == ""


# ── where the gradings come from ──────────────────────────────────────────────────────────────────────────


GRADING = """
from tutorial_lib.checks.spec import Exercise

def double(x):
    return 2 * x

def square(x):
    \"\"\"You multiplied x with itself;
    double it.\"\"\"
    return x * x

class PlusTwo:
    "You added 2."

EXERCISES = [Exercise(id, "double", double, [], [square, PlusTwo], "") for id in {ids}]
"""


@pytest.fixture
def write_grading(tmp_path, monkeypatch):
    """Writes gradings into an installed package's place; there is no clone beside it."""
    monkeypatch.setattr(gradings, "PLACES", (tmp_path / "clone", tmp_path / "installed"))

    def write(path: str, *ids: str) -> None:
        file = tmp_path / "installed" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(GRADING.replace("{ids}", repr(ids)), encoding="utf-8")

    return write


def test_gradings_are_found_where_they_were_installed_and_run_when_asked_for(write_grading):
    write_grading("part_9_x/9_10_late.py", "9.10.b", "9.10.a")
    write_grading("part_9_x/9_2_early.py", "9.2.a")
    write_grading("part_8_x/8_1_broken.py")
    broken = gradings.grading_files()["8.1"]
    broken.write_text("raise RuntimeError('run')", encoding="utf-8")
    assert find_exercise("9.10.a").id == "9.10.a"
    with pytest.raises(RuntimeError, match="run"):
        all_exercises()
    broken.unlink()
    assert list(all_exercises()) == ["9.2.a", "9.10.a", "9.10.b"]
    with pytest.raises(KeyError, match=r"no exercise '9.2.b'; the nearest is 9.2.a"):
        find_exercise("9.2.b")


def test_what_a_grading_must_not_do_is_said(write_grading):
    with pytest.raises(FileNotFoundError, match="the gradings are neither in .*clone or install"):
        find_exercise("9.1.a")
    write_grading("part_9_x/9_1_twice.py", "9.1.a", "9.1.a")
    with pytest.raises(ValueError, match="exercise 9.1.a is defined twice in 9_1_twice.py"):
        find_exercise("9.1.a")
    write_grading("part_9_x/9_2_x.py", "9.3.a")
    with pytest.raises(ValueError, match="9_2_x.py defines exercise 9.3.a, which is not of lesson 9.2"):
        find_exercise("9.2.a")
    write_grading("part_9_x/9_2_y.py", "9.2.a")
    with pytest.raises(ValueError, match="lesson 9.2 has two gradings, 9_2_x.py and 9_2_y.py"):
        all_exercises()


def test_a_misconception_is_named_by_its_definition(write_grading):
    write_grading("part_9_x/9_4_names.py", "9.4.a")
    square, plus_two = find_exercise("9.4.a").misconceptions
    assert (square.name, square.sentence) == ("square", "You multiplied x with itself; double it.")
    assert (plus_two.name, plus_two.sentence) == ("plus two", "You added 2.")
    assert square.wrong(3) == 9

    def p_of_one_without_GELU():
        "Said."

    assert Misconception.of(p_of_one_without_GELU).name == "p of one without GELU"
    with pytest.raises(ValueError, match="the misconception <lambda> needs a docstring"):
        Exercise("9.9.f", "f", None, [], [lambda x: x], "")


# Runs where no clone is, as on Colab: the package and its gradings come from the wheel.
FROM_A_WHEEL = """
import tutorial_lib
from tutorial_lib.checks import check
from tutorial_lib.checks.__main__ import main
from tutorial_lib.checks.gradings import grading_files

assert all("tutorial_lib/grading" in file.as_posix() for file in grading_files().values())

def split_heads(x, n):
    B, T, D = x.shape
    return x.view(B, T, n, D // n).transpose(1, 2)

assert check("1.4.a", split_heads).passed

def split_heads(x, n):
    B, T, D = x.shape
    return x.view(B, n, T, D // n)

result = check("1.4.a", split_heads)
assert result.diagnosis == "reshape without transpose"
assert "make hint" not in repr(result) and "make hint" not in result._repr_html_()

def split_heads(x, n):
    raise NotImplementedError

assert check("1.4.a", split_heads).status == "not started"
for words in (["hint", "1.4.a"], ["progress"], ["chapter", "1"]):
    assert main(words) == 2
"""


@pytest.mark.slow
def test_a_wheel_brings_the_gradings_along(tmp_path):
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    for folder in ("tutorial_lib", "grading"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "exercises").mkdir()
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "exercises/manifest.json"):
        shutil.copy(ROOT / file, source / file)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    run = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(run, cwd=source, capture_output=True, check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    shipped = {file.relative_to(site / "tutorial_lib") for file in site.rglob("*.py")}
    ours = {file.relative_to(source) for file in (source / "grading").rglob("*.py")}
    ours |= {file.relative_to(source / "tutorial_lib") for file in (source / "tutorial_lib").rglob("*.py")}
    assert shipped == ours
    environment = os.environ | {"PYTHONPATH": str(site)}
    run = [sys.executable, "-c", FROM_A_WHEEL]
    done = subprocess.run(run, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentence = "the course's folder is not here: run this inside a clone of it"
    assert done.stderr.splitlines() == [sentence] * 3
    assert not list(empty.iterdir()), "nothing is left where nothing was asked for"
    cells = code_cells(notebook_of("3.2", ROOT / "exercises"))
    wanted = ("import torch", "def rotary_attention", 'check("3.2.b"')  # a debug exercise, as it was given
    script = "\n".join(cell.source for cell in cells if any(words in cell.source for words in wanted))
    (tmp_path / "debug.py").write_text(script, encoding="utf-8")
    run = [sys.executable, str(tmp_path / "debug.py")]
    done = subprocess.run(run, cwd=empty, env=environment, capture_output=True, text=True)
    assert "3.2.b  rotary_attention" in done.stdout and "not started" in done.stdout, (
        done.stdout + done.stderr
    )


# ── the command line ──────────────────────────────────────────────────────────────────────────────────────


def copy_tree(tree: str | Path, to: Path) -> Path:
    shutil.copytree(ROOT / tree, to / "exercises")
    return to / "exercises"


@pytest.mark.parametrize("part", sorted({e.part for e in all_exercises().values()}))
def test_chapter_with_solutions_passes_and_pristine_is_not_started(part, fresh_exercises, tmp_path, capsys):
    n = sum(e.part == part for e in all_exercises().values())
    assert main(["chapter", str(part), "--tree", str(copy_tree("solutions", tmp_path / "s"))]) == 0
    assert f"{n} passed" in capsys.readouterr().out
    assert main(["chapter", str(part), "--tree", str(copy_tree(fresh_exercises, tmp_path / "e"))]) == 1
    out = capsys.readouterr().out
    assert f"Chapter {part}: {n} not started" in out and "✗" not in out


def test_json_and_exit_codes(fresh_exercises, tmp_path, capsys):
    tree = copy_tree(fresh_exercises, tmp_path)
    assert main(["chapter", "1", "--tree", str(tree), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {e["status"] for e in found["exercises"]} == {"not started"}
    assert main(["chapter", "77"]) == 2
    assert main(["chapter", ""]) == 2
    assert main(["hint", "7.7.z"]) == 2
    err = capsys.readouterr().err
    assert "there is no chapter '77'" in err and "nearest" in err
    path = notebook_of("1.4", tree)
    path.write_text("not a notebook", encoding="utf-8")
    assert main(["chapter", "1", "--tree", str(tree)]) == 1
    assert "not a notebook that can be read" in capsys.readouterr().out
    path.unlink()
    assert main(["chapter", "1", "--tree", str(tree)]) == 2
    assert "make exercises" in capsys.readouterr().err


def test_hints_climb_and_progress_counts(capsys, tmp_path):
    for i in (1, 2, 3):
        main(["hint", "1.4.a"])
        assert f"Hint {i} of 3" in capsys.readouterr().out
    main(["hint", "1.4.a"])
    assert "solutions/" in capsys.readouterr().out
    main(["progress"])
    before = capsys.readouterr().out
    first, second = list(all_exercises())[:2]
    assert "0 of" in before and f"Next    {first}" in before
    check(first, find_exercise(first).reference)
    main(["progress"])
    assert f"Next    {second}" in capsys.readouterr().out
    (tmp_path / "state" / "progress.json").write_text("{damaged", encoding="utf-8")
    assert main(["progress"]) == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_takes_the_number_either_way():
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    for words in (["check-chapter", "3"], ["check-chapter", "N=3"]):
        run = ["make", "--dry-run", *words]
        out = subprocess.run(
            run, cwd=ROOT, capture_output=True, text=True, env=environment, check=True
        ).stdout
        assert 'tutorial_lib.checks chapter "3"' in out, out
    out = subprocess.run(
        ["make", "--dry-run", "hint", "1.4.b"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    ).stdout
    assert 'tutorial_lib.checks hint "1.4.b"' in out


def test_a_notebook_that_was_not_saved_is_said_to_be_one(tmp_path, capsys, monkeypatch):
    tree = copy_tree("exercises", tmp_path)
    main(["chapter", "1", "--tree", str(tree)])
    assert "save the notebook (Ctrl-S)" in capsys.readouterr().out
    check("1.4.a", find_exercise("1.4.a").reference)
    main(["chapter", "1", "--tree", str(tree)])
    assert "1.4.a: solved when check() saw it, and in the file as it came" in capsys.readouterr().out
    assert progress.recorded("1.4.a") == "passed", "what was solved in the kernel is not forgotten"


SCRIPT = """
from tutorial_lib.checks import check

def split_heads(x, n):
    B, T, D = x.shape
    return x.view(B, n, T, D // n)

check("1.4.a", split_heads)
"""


def test_check_prints_itself_in_a_plain_script(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = [sys.executable, str(script)]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.count("reshape without transpose") == 1, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (GOOD + "\n    '\ud800'", "half a character stands in it, at `'"),
        (GOOD + "\0", "Python cannot read the cell"),
        ("def split_heads(x, n):\n    return " + "-" * 100_000 + "x", "Python cannot read the cell"),
        (
            "def split_heads(x, n):\n    return " + "(" * 5000 + "x" + ")" * 5000,
            "Python cannot read the cell",
        ),
        ("# " + "x" * 500_001, "characters in its cells, and a notebook at most 500,000"),
    ],
    ids=["lone surrogate", "null", "minus", "brackets", "long"],
)
def test_a_cell_that_python_cannot_take_is_one_sentence(tmp_path, capsys, source, sentence):
    tree = copy_tree("exercises", tmp_path)
    path = notebook_of("1.4", tree)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    [stub] = [cell for cell in notebook["cells"] if "def split_heads" in "".join(cell["source"])]
    stub["source"] = source
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert main(["chapter", "1", "--tree", str(tree)]) == 1
    out = capsys.readouterr().out
    assert sentence in out, out
    out.encode()  # a terminal can show it


def test_a_notebook_that_is_no_file_is_one_sentence(tmp_path):
    [result] = grade_notebook(Path("/dev/zero"), [find_exercise("1.4.a")])
    assert result.status == "crashed" and result.sentence == "/dev/zero is no file"


# ── the pieces ────────────────────────────────────────────────────────────────────────────────────────────


def test_definitions_leave_work_out():
    cell = Cell(
        1, "import torch\nEPS = 1e-5\nf = lambda x: torch.exp(x)\nx = torch.zeros(3)\nprint(x)\ndef g(): ..."
    )
    assert [type(s).__name__ for s in definitions(cell)] == ["Import", "Assign", "Assign", "FunctionDef"]


def test_two_results_are_the_same_in_shape_and_value_whatever_holds_them():
    assert same_value(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
    assert not same_value(torch.zeros(2), torch.zeros(1, 2))
    assert same_value({"a": (1, 2.0)}, {"a": [1, 2.0 + 1e-9]})
    assert not same_value(None, torch.zeros(1)) and not same_value("a", 1.0)


def test_judges_say_what_is_wrong():
    assert same_shape(torch.zeros(2), torch.zeros(2)) is None
    assert "NoneType" in same_shape(None, torch.zeros(2)).sentence
    assert "dtype" in same_shape(torch.zeros(2).double(), torch.zeros(2)).sentence
    assert "NaN" in equals()(torch.tensor([float("nan")]), torch.tensor([1.0])).sentence
    big = torch.zeros(5, 8)
    off = big.clone()
    off[3, 2] = 1
    assert "first at [3, 2]" in equals()(off, big).sentence
    assert holds(lambda r: None)(1, 1) is None


def test_leaks_finds_a_leak_and_passes_a_causal_layer():
    x = torch.randn(2, 6, 3)
    assert leaks(lambda x: x.cumsum(1), x) is None
    assert "sees the future" in leaks(lambda x: x.flip(1).cumsum(1).flip(1), x)
    ids = torch.randint(0, 9, (2, 6))
    assert leaks(lambda ids: ids.float().cumsum(1), ids) is None
    assert "output 0 changed when only input 5" in leaks(lambda i: i.float() + i.float().mean(1, True), ids)


def test_fill_by_name_does_not_depend_on_order():
    class A(torch.nn.Module):
        def __init__(self, flip):
            super().__init__()
            for name in ("q", "k")[:: -1 if flip else 1]:
                setattr(self, name, torch.nn.Linear(3, 2))

    a, b = fill_by_name(A(False)), fill_by_name(A(True))
    assert torch.equal(a.q.weight, b.q.weight) and not torch.equal(a.q.weight, a.k.weight)
    assert a.q.bias.abs().sum() > 0


def test_mutants_change_one_thing_and_leave_texts_alone():
    source = 'def f(a: int, b=2) -> int:\n    """Doc 1."""\n    if a < 1:\n        raise ValueError(f"{a - 1}")\n    return g(a, b) - 3'
    found = {m.description for m in mutants(source)}
    assert "`a < 1` became `a <= 1`" in found and "`g(a, b)` became `g(b, a)`" in found
    assert "`2` became `3`" in found and not any("Doc" in m or "ValueError" in m for m in found)
    assert all(compile(m.source, "m", "exec") for m in mutants(source))
