"""A learner's work and the course's news: merged cell by cell, whichever side git calls ours."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode, v4

from tutorial_lib.nb.merge import merge, merge_files
from tutorial_lib.nb.notebooks import dumps, read_notebook
from tutorial_lib.nb.stubs import STUB


def notebook(**cells: str) -> NotebookNode:
    """Code cells by their ids."""
    nb = v4.new_notebook(cells=[v4.new_code_cell(source, id=name) for name, source in cells.items()])
    nb.metadata = NotebookNode(language_info=NotebookNode(name="python"))
    return nb


def sources(nb: NotebookNode) -> dict[str, str]:
    return {cell.id: cell.source for cell in nb.cells}


def both_ways(base: NotebookNode, one: NotebookNode, other: NotebookNode) -> dict[str, str]:
    """The merged sources, which must not depend on whose side is whose."""
    found = [merge(base, *sides) for sides in itertools.permutations((one, other))]
    assert [conflicts for _, conflicts in found] == [[], []]
    first, second = (sources(nb) for nb, _ in found)
    assert first == second
    for nb, _ in found:
        nbformat.validate(nb)
    return first


BASE = notebook(a=f"def a():\n    {STUB}", b=f"def b():\n    {STUB}", c="text")


def test_each_sides_cells_are_in_the_result():
    mine = notebook(a="def a():\n    return 1", b=f"def b():\n    {STUB}", note="my note", c="text")
    news = notebook(a=f"def a():\n    {STUB}", new="new", b=f"def b(x):\n    {STUB}", c="better text")
    assert both_ways(BASE, mine, news) == {
        "a": "def a():\n    return 1",
        "new": "new",
        "b": f"def b(x):\n    {STUB}",
        "note": "my note",
        "c": "better text",
    }


def test_a_filled_stub_stays_when_the_course_writes_its_stub_anew():
    mine = notebook(a="def a():\n    return 1", b=f"def b():\n    {STUB}", c="text")
    news = notebook(a=f'def a():\n    """Better."""\n    {STUB}', b=f"def b():\n    {STUB}", c="text")
    assert both_ways(BASE, mine, news)["a"] == "def a():\n    return 1"


def test_mended_code_stays_when_the_course_writes_its_docstring_anew():
    """A debug exercise has no stub to be known by."""
    code = 'def a(x):\n    """{}\n\n    More."""\n\n    # why\n    return {}'
    base = notebook(a=code.format("Old.", "wrong"), b="x = 1", c="text")
    mine = notebook(a=code.format("Old.", "right"), b="x = 1", c="text")
    news = notebook(a=code.format("New, and longer:\n    two lines.", "wrong"), b="x = 2", c="text")
    merged = both_ways(base, mine, news)
    assert merged == {"a": code.format("Old.", "right"), "b": "x = 2", "c": "text"}


@pytest.mark.parametrize(
    "mine", ["def a():\n    # my plan\n    return 0", "def a(:", "%time a()", "def a():\n    return 1"]
)
def test_a_thought_in_a_comment_or_half_a_line_is_never_dropped(mine):
    base, news = notebook(a="def a():\n    return 0"), notebook(a="def a(x):\n    return 0")
    for sides in itertools.permutations((notebook(a=mine), news)):
        merged, conflicts = merge(base, *sides)
        assert conflicts == ["a"] and mine in sources(merged)["a"] and "def a(x)" in sources(merged)["a"]


def test_deleted_cells_go_unless_somebody_wrote_in_them():
    mine = notebook(a="def a():\n    return 1", c="text")
    news = notebook(b=f"def b(x):\n    {STUB}")
    assert both_ways(BASE, mine, news) == {"a": "def a():\n    return 1", "b": f"def b(x):\n    {STUB}"}


def test_cells_that_both_rewrote_hold_both_texts():
    mine, news = notebook(a="x", b="mine", c="text"), notebook(a="y", b="mine", c="text")
    merged, conflicts = merge(BASE, mine, news)
    assert conflicts == ["a"]
    assert sources(merged) == {"a": "<<<<<<< ours\nx\n=======\ny\n>>>>>>> theirs", "b": "mine", "c": "text"}
    nbformat.validate(merged)


def test_outputs_stay_where_the_course_has_nothing_new():
    base, mine, news = notebook(a="1", b="2"), notebook(a="1", b="2"), notebook(a="1", b="2")
    mine.cells[0].outputs = [v4.new_output("stream", text="mine")]
    news.cells[1].outputs = [v4.new_output("stream", text="news")]
    mine.metadata.language_info.version = "3.13"
    merged, _ = merge(base, mine, news)
    assert [cell.outputs[0].text for cell in merged.cells] == ["mine", "news"]
    assert merged.metadata.language_info.version == "3.13"


@pytest.mark.parametrize("lines", [["first", "last, theirs"], ["first, theirs", "last"]])
def test_what_is_no_notebook_is_merged_as_git_does_it(tmp_path, lines, capfd):
    base, ours, theirs = (tmp_path / name for name in ("base", "ours", "theirs"))
    middle = ["1", "2", "3", "4", "5"]
    for path, (first, last) in ((base, ("first", "last")), (ours, ("first, ours", "last")), (theirs, lines)):
        path.write_text("\n".join([first, *middle, last]))
    clean = lines[0] == "first"
    assert merge_files(base, ours, theirs, "x.ipynb") == (0 if clean else 1)
    assert ("<<<<<<<" in ours.read_text()) != clean and "first, ours" in ours.read_text()
    assert lines[0 if not clean else 1] in ours.read_text()


def test_git_is_told_of_a_conflict_by_name_and_the_file_can_still_be_opened(tmp_path, capsys):
    paths = [tmp_path / name for name in ("base", "ours", "theirs")]
    for path, nb in zip(paths, (BASE, notebook(a="x"), notebook(a="y")), strict=True):
        path.write_text(dumps(nb))
    assert merge_files(*paths, "exercises/1_1.ipynb") == 1
    assert "exercises/1_1.ipynb: both sides rewrote cell a: choose" in capsys.readouterr().err
    assert "x\n=======\ny" in sources(read_notebook(Path(paths[1])))["a"]


def test_notebooks_without_ids_are_merged_as_text(tmp_path):
    paths = [tmp_path / name for name in ("base", "ours", "theirs")]
    for path, source in zip(paths, ("x", "x", "y"), strict=True):
        nb = notebook(a=source)
        del nb.cells[0]["id"]
        path.write_text(dumps(nb))
    assert merge_files(*paths, "x.ipynb") == 0 and '"y"' in paths[1].read_text()


def test_git_hands_notebooks_to_the_driver():
    root = Path(__file__).resolve().parents[2]
    asked = ["git", "check-attr", "merge", "exercises/part_1/1_1_x.ipynb"]
    done = subprocess.run(asked, cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert done.stdout.endswith("merge: notebook\n")
    assert "merge.notebook.driver" in (root / "Makefile").read_text(encoding="utf-8")
