"""The exercise generator, on small trees: what a stub looks like, and that no learner ever loses work."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tutorial_lib import files
from tutorial_lib.nb.digests import cells_digest, stub_digest
from tutorial_lib.nb.exercises import main, regenerate
from tutorial_lib.nb.form import normalise
from tutorial_lib.nb.graph import ROOT
from tutorial_lib.nb.notebooks import dumps
from tutorial_lib.nb.stubs import STUB, ExerciseError, make_stub

NAME = "part_1_core/1_1_add.ipynb"
ADD = '''def add(a, b):
    """a + b, elementwise."""
    ### BEGIN SOLUTION
    total = a + b
    return total
    ### END SOLUTION


print(add(1, 2))'''
STUB_OF_ADD = f'''def add(a, b):
    """a + b, elementwise."""
    {STUB}


print(add(1, 2))'''


def solution(*sources: str):
    return new_notebook(cells=[new_markdown_cell("# Adding"), *map(new_code_cell, sources)])


def stub_of(source: str) -> str:
    nb = solution(source)
    make_stub(nb)
    return nb.cells[1].source


def write(path: Path, nb) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(nb), encoding="utf-8")


@pytest.fixture
def repo(tmp_path) -> Path:
    """A repository with one solution and its generated exercise."""
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/a/b"\n')
    write(tmp_path / "solutions" / NAME, solution(ADD))
    run(tmp_path)
    return tmp_path


def run(root: Path, *options: str) -> int:
    return main(["--root", str(root), *options])


def exercise(root: Path):
    return nbformat.read(root / "exercises" / NAME, as_version=4)


def manifest(root: Path) -> dict:
    return json.loads((root / "exercises/manifest.json").read_text())["notebooks"]


STAMPED = ("colab", "setup")


def written(root: Path) -> list[str]:
    """The sources of the exercise's cells, but for those that are stamped."""
    return [cell.source for cell in exercise(root).cells if cell.id not in STAMPED]


def work(root: Path, edit=None) -> str:
    """Let a learner solve the exercise; the file's text."""
    nb = exercise(root)
    cell = next(cell for cell in nb.cells if "def add" in cell.source)
    cell.source = edit(cell.source) if edit else cell.source.replace(STUB, "return b + a")
    write(root / "exercises" / NAME, nb)
    return (root / "exercises" / NAME).read_text()


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- the stub -----------------------------------------------------------------------------------------------


def test_solution_becomes_a_stub_and_the_rest_stays():
    assert stub_of(ADD) == STUB_OF_ADD


def test_regions_at_any_depth_and_several_in_one_cell():
    source = """class Layer:
    def forward(self, x):
        if x:
            ### BEGIN SOLUTION
            return 1
            ### END SOLUTION
        return 0

    def extra(self):
        y = 1
        ### BEGIN SOLUTION
        y = 2
        ### END SOLUTION
        return y"""
    assert stub_of(source) == (
        f"class Layer:\n    def forward(self, x):\n        if x:\n            {STUB}\n        return 0\n\n"
        f"    def extra(self):\n        y = 1\n        {STUB}\n        return y"
    )


def test_given_code_takes_the_place_of_the_solution():
    source = '''def attend(q, k, v):
    """Attention."""
    ### BEGIN SOLUTION
    return right(q, k, v)
    ### END SOLUTION
    ### BEGIN GIVEN
    # scores = q @ k.T
    # for row in scores:
    #     if row:
    #         row += 1  # nested
    #
    # # why: a comment that stays

    # return scores.softmax(0) @ v
    ### END GIVEN

attend(1, 2, 3)'''
    assert (
        stub_of(source)
        == '''def attend(q, k, v):
    """Attention."""
    scores = q @ k.T
    for row in scores:
        if row:
            row += 1  # nested

    # why: a comment that stays

    return scores.softmax(0) @ v

attend(1, 2, 3)'''
    )


def test_given_and_build_regions_mix_in_one_cell():
    source = """### BEGIN SOLUTION
def first():
    return "right"


### END SOLUTION

### BEGIN GIVEN
# def first():
#     return "wrong"
### END GIVEN


class Second:
    def build(self):
        ### BEGIN SOLUTION
        return 1
        ### END SOLUTION

    def debug(self):
        ### BEGIN SOLUTION
        return 2
        ### END SOLUTION
        ### BEGIN GIVEN
        # return 3
        ### END GIVEN
        # a note that is nobody's region"""
    stub = stub_of(source)
    assert stub == (
        'def first():\n    return "wrong"\n\n\nclass Second:\n    def build(self):\n'
        f"        {STUB}\n\n    def debug(self):\n        return 3\n        # a note that is nobody's region"
    )
    assert "GIVEN" not in stub and "SOLUTION" not in stub and "right" not in stub


def test_only_code_cells_are_cleared():
    prose = "nbgrader writes\n\n### BEGIN SOLUTION\n\nand here is prose about it."
    nb = solution(ADD)
    nb.cells.append(new_markdown_cell(prose))
    nb.cells.append(nbformat.v4.new_raw_cell(prose))
    make_stub(nb)
    assert [cell.source for cell in nb.cells[2:]] == [prose, prose]


def test_explanations_of_the_solution_stay_behind():
    nb = solution(ADD)
    nb.cells.insert(1, new_markdown_cell("Because.", metadata={"tags": ["solution-only"]}))
    nb.cells.append(new_code_cell("show(add)", metadata={"tags": ["solution-only", "slow"]}))
    nb.cells.append(new_markdown_cell("Hints", metadata={"tags": ["hint"]}))
    make_stub(nb)
    assert [cell.source for cell in nb.cells] == ["# Adding", STUB_OF_ADD, "Hints"]


def test_ipython_lines_and_code_without_definitions():
    nb = solution("%timeit 1\nx = 1\n### BEGIN SOLUTION\nx = 2\n### END SOLUTION\n!ls")
    assert make_stub(nb) == {} and nb.cells[1].source == f"%timeit 1\nx = 1\n{STUB}\n!ls"


BEGIN, END, GIVEN, GIVEN_END = "### BEGIN SOLUTION", "### END SOLUTION", "### BEGIN GIVEN", "### END GIVEN"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (f"{BEGIN}\nx = 1", f"`{BEGIN}` has no `{END}`"),
        (f"x = 1\n{END}", f"line 2 is `{END}` where `{BEGIN}` should be"),
        (f"{BEGIN}\n{BEGIN}\n{END}", f"line 2 is `{BEGIN}` where `{END}` should be"),
        (f"{BEGIN}\n{END}\n{GIVEN}\n# x = 1", f"`{GIVEN}` has no `{GIVEN_END}`"),
        (f"{GIVEN}\n# x = 1\n{GIVEN_END}", f"line 1 is `{GIVEN}` where `{BEGIN}` should be"),
        (f"{BEGIN}\n{GIVEN}\n{GIVEN_END}\n{END}", f"line 2 is `{GIVEN}` where `{END}` should be"),
        (f"{BEGIN}\n{END}\n{GIVEN}\n# x\n{GIVEN_END}\n{GIVEN}\n# x\n{GIVEN_END}", "line 6 is"),
        (f"{BEGIN}\n{END}\nx = 1\n{GIVEN}\n# x = 1\n{GIVEN_END}", "must follow"),
        (f"if x:\n    {BEGIN}\n    {END}\n{GIVEN}\n# x = 1\n{GIVEN_END}", "as far indented"),
        (f"{BEGIN}\n{END}\n{GIVEN}\nx = 1\n{GIVEN_END}", "the GIVEN line 'x = 1' does not start with '# '"),
        (f"{BEGIN}\n{END}\n{GIVEN}\n#x = 1\n{GIVEN_END}", "does not start with '# '"),
        (f"{BEGIN}\nx = 1\n## END SOLUTION", "line 3 looks like a marker"),
        (f"{BEGIN}\nx = 1\n### End solution", "line 3 looks like a marker"),
        (f"x = 1  {BEGIN}\n{END}", "line 1 looks like a marker"),
        (
            f"def f():\n    {BEGIN}\n    {END}\n    {GIVEN}\n    # return (\n    {GIVEN_END}",
            "would not parse",
        ),
        (f"def f():\n    {BEGIN}\n    {END}\ndef add():\n    pass", "defines add again"),
    ],
)
def test_malformed_cells_are_one_sentence_with_the_place(repo, capsys, source, says):
    nb = solution(ADD, source)
    nb.cells[2].id = "here"
    write(repo / "solutions" / NAME, nb)
    before = snapshot(repo)
    assert run(repo) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"solutions/{NAME}, cell 3 (here): ") and says in err and "\n" not in err
    assert snapshot(repo) == before


def test_a_solution_without_a_region_would_give_itself_away(repo, capsys):
    write(repo / "solutions" / NAME, solution("def add(a, b):\n    return a + b"))
    assert run(repo) == 1 and "BEGIN SOLUTION" in capsys.readouterr().err


def test_one_bad_notebook_does_not_hold_up_the_others(repo, capsys):
    write(repo / "solutions/part_1_core/1_0_bad.ipynb", solution(f"{BEGIN}"))
    (repo / "solutions/part_1_core/1_2_broken.ipynb").write_text("{")
    write(repo / "solutions/part_1_core/1_3_good.ipynb", solution(ADD))
    assert run(repo) == 1
    assert {Path(name).name for name in manifest(repo)} == {"1_1_add.ipynb", "1_3_good.ipynb"}
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_nbgrader_missing_is_one_sentence(repo, monkeypatch, capsys):
    real = builtins.__import__

    def without_nbgrader(name, *args):
        if name.startswith("nbgrader"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_nbgrader)
    assert run(repo) == 1
    err = capsys.readouterr().err.strip()
    assert "pip install nbgrader" in err and "\n" not in err


# --- the digests --------------------------------------------------------------------------------------------


def test_cells_digest_sees_work_and_nothing_else():
    nb = normalise(solution(ADD), "exercises", ROOT)
    before = cells_digest(nb)
    assert cells_digest(json.loads(dumps(nb))) == before, "plain JSON, with its lists of lines"
    code = nb.cells[-1]
    code.execution_count, code.outputs = 7, [nbformat.v4.new_output("stream", text="3")]
    code.metadata.collapsed = True
    nb.metadata.language_info.version = "3.13"
    nb.cells.insert(1, new_code_cell(" \n"))
    nb.cells.append(new_markdown_cell(""))
    code.source += "\n\n"
    assert cells_digest(nb) == before
    code.source = "\n" + code.source
    assert cells_digest(nb) != before


def test_cells_digest_ignores_the_stamp_but_not_what_was_added_to_it():
    nb = normalise(solution(ADD), "exercises", ROOT)
    before = cells_digest(nb)
    setup = next(cell for cell in nb.cells if "setup" in cell.metadata.get("tags", []))
    setup.source = setup.source.replace("github.com", "example.org")
    assert cells_digest(nb) == before
    setup.source += "\nimport torch"
    assert cells_digest(nb) != before


def test_stub_digest_is_about_syntax():
    base = stub_digest("def f(x: int, *, y=None):\n    return f'{x:>3}' + y")
    assert base == stub_digest('def f( x:int,*,y = None ):\n  "Doc."\n\n  # why\n  return f"{x:>3}"+y')
    assert base != stub_digest("def f(x: int, *, y=None):\n    return f'{x:>4}' + y")
    assert base != stub_digest("def g(x: int, *, y=None):\n    return f'{x:>3}' + y")
    in_class = "class A(B):\n    def f(self):\n        {}return [1.0, ..., b'x', None]"
    assert stub_digest(in_class.format("")) == stub_digest(in_class.format("'''Doc.'''\n        "))
    with pytest.raises(SyntaxError):
        stub_digest("def f(:")


def test_stub_digest_is_the_same_on_every_python():
    """The manifest is committed, and learners run 3.10 to 3.13."""
    method = "async def f(self, *a, b=None, **c): return f'{a!r:{b}}', {**c}, -1j"
    source = f"@d\nclass A(B, k=1):\n    x: int = 2\n    {method}"
    assert stub_digest(source)[:16] == "6850584035486d3d"


# --- the tree -----------------------------------------------------------------------------------------------


def test_the_manifest_knows_each_stub(repo):
    nb = exercise(repo)
    nbformat.validate(nb)
    assert written(repo) == ["# Adding", STUB_OF_ADD]
    digest = stub_digest(STUB_OF_ADD)
    assert manifest(repo) == {NAME: {"sha256": cells_digest(nb), "stubs": {"add": digest}}}
    assert digest != stub_digest(ADD)


def test_outputs_and_counts_are_stripped(repo):
    nb = solution(ADD)
    nb.cells[1].outputs, nb.cells[1].execution_count = [nbformat.v4.new_output("stream", text="3")], 4
    write(repo / "solutions" / NAME, nb)
    run(repo)
    assert all(
        not cell.outputs and cell.execution_count is None
        for cell in exercise(repo).cells
        if "outputs" in cell
    )
    assert run(repo, "--check") == 0


def test_running_twice_changes_nothing(repo, capsys):
    before = snapshot(repo)
    assert run(repo) == 0 and run(repo, "--check") == 0
    assert snapshot(repo) == before and capsys.readouterr().out == ""


def test_changed_solution_replaces_an_untouched_stub(repo, capsys):
    write(repo / "solutions" / NAME, solution(ADD.replace("add", "plus")))
    assert run(repo, "--check") == 1
    out = capsys.readouterr().out
    assert f"exercises/{NAME} differs from what its solution generates, run: make exercises" in out
    assert run(repo) == 0 and f"wrote exercises/{NAME}" in capsys.readouterr().out
    assert list(manifest(repo)[NAME]["stubs"]) == ["plus"]
    assert run(repo, "--check") == 0


def test_a_stub_that_was_only_run_counts_as_untouched(repo):
    nb = exercise(repo)
    nb.cells[-1].outputs, nb.cells[-1].execution_count = [nbformat.v4.new_output("stream", text="3")], 4
    nb.cells.append(new_code_cell("  "))
    nb.metadata.widgets = {}
    write(repo / "exercises" / NAME, nb)
    write(repo / "solutions" / NAME, solution(ADD.replace("add", "plus")))
    run(repo)
    assert "plus" in exercise(repo).cells[-1].source


def test_a_learners_work_is_never_overwritten(repo, capsys):
    old = manifest(repo)
    mine = work(repo)
    assert run(repo) == 0
    assert "left alone: exercises/" in (out := capsys.readouterr().out) and "stub has not changed" in out
    write(repo / "solutions" / NAME, solution(ADD.replace("add", "plus")))
    for _ in range(2):
        assert run(repo) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"left alone: exercises/{NAME} holds your work (a newer stub waits)")
        assert "move it away" in out and out.count("\n") == 1
    assert (repo / "exercises" / NAME).read_text() == mine
    assert manifest(repo) == old, "the checker compares this file with the stub it grew from"
    assert run(repo, "--check") == 0 and capsys.readouterr().out == "", "a learner's work is no fault"
    assert run(repo, "--published") == 1 and "holds your work" in capsys.readouterr().out
    assert (repo / "exercises" / NAME).read_text() == mine

    (repo / "exercises" / NAME).rename(repo / "mine.ipynb")
    assert run(repo) == 0
    assert "plus" in exercise(repo).cells[-1].source and manifest(repo) != old


@pytest.mark.parametrize(
    "edit",
    [lambda s: s + "\n# a thought", lambda s: s.replace("1, 2", "1, 3"), lambda s: "", lambda s: "\n" + s],
)
def test_every_edit_of_a_cell_is_work(repo, edit):
    mine = work(repo, edit)
    write(repo / "solutions" / NAME, solution(ADD.replace("add", "plus")))
    run(repo)
    assert (repo / "exercises" / NAME).read_text() == mine


def test_an_added_cell_is_work(repo):
    nb = exercise(repo)
    nb.cells.append(new_markdown_cell("A note."))
    write(repo / "exercises" / NAME, nb)
    before = (repo / "exercises" / NAME).read_bytes()
    write(repo / "solutions" / NAME, solution(ADD.replace("add", "plus")))
    run(repo)
    assert (repo / "exercises" / NAME).read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", "my notes", '{"cells": 3}', '{"cells": [{}]}', "\udcff"])
def test_a_file_that_is_no_notebook_is_left_alone(repo, content):
    path = repo / "exercises" / NAME
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    before = path.read_bytes()
    assert run(repo) == 0 and path.read_bytes() == before


def test_without_the_manifest_whatever_differs_is_work(repo, capsys):
    write(repo / "solutions/part_1_core/1_2_same.ipynb", solution(ADD))
    run(repo)
    mine = work(repo)
    (repo / "exercises/manifest.json").unlink()
    capsys.readouterr()
    assert run(repo) == 0
    assert (repo / "exercises" / NAME).read_text() == mine
    assert f"left alone: exercises/{NAME}" in capsys.readouterr().out
    assert list(manifest(repo)) == ["part_1_core/1_2_same.ipynb"], "what equals its stub is known again"


@pytest.mark.parametrize("content", ["<<<<<<< HEAD", "[]", '{"notebooks": 1}', '{"notebooks": {"a": 1}}'])
def test_an_unreadable_manifest_stops_everything(repo, capsys, content):
    (repo / "exercises/manifest.json").write_text(content)
    before = snapshot(repo)
    for options in ([], ["--check"]):
        assert run(repo, *options) == 1
        err = capsys.readouterr().err
        assert "manifest.json cannot be read: restore it" in err and err.count("\n") == 1
    assert snapshot(repo) == before


def test_a_renewed_stamp_does_not_count_as_work(repo):
    """`make notebooks` may stamp a new address into an exercise before `make exercises` runs."""
    (repo / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/new/home"\n')
    write(repo / "exercises" / NAME, normalise(exercise(repo), "exercises", repo))
    write(repo / "solutions" / NAME, solution(ADD.replace("add", "plus")))
    run(repo)
    assert "plus" in exercise(repo).cells[-1].source and run(repo, "--check") == 0


def test_stale_and_untouched_is_removed(repo, capsys):
    write(repo / "solutions/part_1_core/1_2_other.ipynb", solution(ADD))
    (repo / "solutions" / NAME).unlink()
    assert run(repo, "--check") == 1
    assert f"exercises/{NAME} has no solution any more, run: make exercises" in capsys.readouterr().out
    assert run(repo) == 0 and f"removed exercises/{NAME}" in capsys.readouterr().out
    assert not (repo / "exercises" / NAME).exists() and NAME not in manifest(repo)
    assert run(repo, "--check") == 0


def test_stale_with_work_is_left(repo, capsys):
    old = manifest(repo)
    mine = work(repo)
    (repo / "solutions" / NAME).unlink()
    assert run(repo) == 0 and "left alone" in capsys.readouterr().out
    assert (repo / "exercises" / NAME).read_text() == mine and manifest(repo) == old
    assert run(repo, "--check") == 0 and run(repo, "--published") == 1


def test_a_notebook_of_the_learners_own_is_left(repo):
    write(repo / "exercises/scratch.ipynb", solution("1 + 1"))
    before = snapshot(repo)
    assert run(repo) == 0 and run(repo, "--check") == 0 and run(repo, "--published") == 1
    assert snapshot(repo) == before


def test_a_stub_that_was_only_run_is_no_drift_until_its_solution_changes(repo, capsys):
    nb = exercise(repo)
    nb.cells[-1].outputs, nb.cells[-1].execution_count = [nbformat.v4.new_output("stream", text="3")], 4
    write(repo / "exercises" / NAME, nb)
    assert run(repo, "--check") == 0 and run(repo, "--published") == 1
    write(repo / "solutions" / NAME, solution(ADD.replace("add", "plus")))
    capsys.readouterr()
    assert run(repo, "--check") == 1
    assert f"exercises/{NAME} differs from what its solution generates" in capsys.readouterr().out


def test_check_finds_a_missing_exercise_and_a_wrong_manifest(repo, capsys):
    (repo / "exercises" / NAME).unlink()
    assert run(repo, "--check") == 1
    assert capsys.readouterr().out == f"exercises/{NAME} is missing, run: make exercises\n"
    assert run(repo) == 0
    (repo / "exercises/manifest.json").write_text('{"notebooks": {}}')
    capsys.readouterr()
    assert run(repo, "--check") == 1
    assert capsys.readouterr().out == "exercises/manifest.json is not up to date, run: make exercises\n"
    assert run(repo) == 0 and run(repo, "--check") == 0


def test_check_writes_nothing(repo):
    write(repo / "solutions" / NAME, solution(ADD.replace("add", "plus")))
    write(repo / "solutions/new/2_1_new.ipynb", solution(ADD))
    write(repo / "exercises/old.ipynb", solution(ADD))
    before = snapshot(repo)
    assert run(repo, "--check") == 1 and snapshot(repo) == before


def test_exercises_without_a_solutions_folder(repo, capsys):
    """A learner may have been handed the exercises alone; they must not vanish as stale."""
    shutil.rmtree(repo / "solutions")
    before = snapshot(repo)
    assert run(repo) == 1 and "no solutions/" in capsys.readouterr().err
    assert snapshot(repo) == before


def test_without_notebooks_nothing_is_written(tmp_path):
    assert run(tmp_path, "--check") == 0 and run(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_nobodys_notebooks(repo):
    for tree in ("solutions", "exercises"):
        write(repo / tree / "part_1_core/.ipynb_checkpoints/1_1_add-checkpoint.ipynb", solution(ADD))
    assert run(repo, "--check") == 0


def test_a_failed_write_leaves_the_old_file_whole(repo, monkeypatch, capsys):
    write(repo / "solutions" / NAME, solution(ADD.replace("add", "plus")))
    before = snapshot(repo)

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(files.os, "replace", full)
    assert run(repo) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1
    assert snapshot(repo) == before


def test_errors_are_values_too():
    with pytest.raises(ExerciseError):
        make_stub(solution("x = 1"))


def test_the_real_exercises_are_up_to_date():
    done = regenerate(check=True)
    assert not done.errors and not done.drift, "\n".join(done.errors + done.drift)
