"""A learner works in this repository: solves, errs, plays, commits and pulls. The gates stay open, nothing is lost."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.clones import READY, commit_all, make_clone, make_course, run
from tutorial_lib.nb.stubs import STUB

LESSON = "part_1_core_transformer/1_4_multi_head_attention.ipynb"
PLAYED = "part_1_core_transformer/1_5_feed_forward.ipynb"
MINE = "# my note: heads stand before time"
NEWS = "The course has something new."


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """The course, and a branch of it with what is new."""
    course = make_course(tmp_path_factory.mktemp("home") / "course")
    run(course, "git", "switch", "-qc", "news")
    write_news(course)
    return course


@pytest.fixture
def clone(course: Path, tmp_path: Path) -> Path:
    run(course, "git", "switch", "-q", "main")  # before any news
    return make_clone(course, tmp_path / "clone")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path: Path, change) -> None:
    """Change a notebook with `change(cells)`, and save it as Jupyter does after a run: outputs, counts, its kernel."""
    nb = read(path)
    change(nb["cells"])
    for count, cell in enumerate((c for c in nb["cells"] if c["cell_type"] == "code"), 4):
        told = {"output_type": "stream", "name": "stdout", "text": ["in /home/anna/course\n"]}
        cell |= {"execution_count": count, "outputs": [told]}
        cell["metadata"]["execution"] = {"iopub.status.busy": "2026-01-01"}
    error = {"output_type": "error", "ename": "KeyboardInterrupt", "evalue": "", "traceback": []}
    nb["cells"][-1] |= {"outputs": [error]} if nb["cells"][-1]["cell_type"] == "code" else {}
    nb["metadata"]["language_info"] = {"name": "python", "version": "3.13.1", "mimetype": "text/x-python"}
    nb["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    path.write_text(json.dumps(nb, indent=1), encoding="utf-8")


def stubs_in(cells: list[dict]) -> list[dict]:
    return [cell for cell in cells if cell["cell_type"] == "code" and STUB in "".join(cell["source"])]


def sources(path: Path) -> dict[str, str]:
    return {cell["id"]: "".join(cell["source"]) for cell in read(path)["cells"]}


def work(clone: Path) -> dict[str, str]:
    """One exercise solved, one wrong, the others left; a note; a lesson run. The cells that the learner wrote, by id."""
    solved = sources(clone / "solutions" / LESSON)
    mine: dict[str, str] = {}

    def fill_in(cells: list[dict]) -> None:
        right, wrong, *_ = stubs_in(cells)
        right["source"] = solved[right["id"]]
        wrong["source"] = "".join(wrong["source"]).replace(STUB, "return 42")
        note = {"cell_type": "markdown", "id": "4d794e6f", "metadata": {}, "source": MINE}
        cells.insert(cells.index(wrong) + 1, note)
        mine.update({cell["id"]: cell["source"] for cell in (right, wrong, note)})

    edit(clone / "exercises" / LESSON, fill_in)
    edit(clone / "exercises" / PLAYED, lambda cells: None)
    edit(clone / "chapters" / PLAYED, lambda cells: None)
    for tree in ("chapters", "exercises"):
        shutil.copy(clone / "exercises" / LESSON, (clone / tree / LESSON).with_name("Untitled.ipynb"))
    return mine


def write_news(course: Path) -> None:
    """The course goes on: in every statement, every docstring of an exercise, in the lessons."""
    for tree in ("solutions", "chapters"):
        for name in (LESSON, PLAYED):
            nb = read(course / tree / name)
            for cell in nb["cells"][1:]:
                if cell["cell_type"] == "markdown":
                    cell["source"] = "".join(cell["source"]) + f"\n\n{NEWS}"
                elif tree == "solutions" and "### BEGIN SOLUTION" in "".join(cell["source"]):
                    cell["source"] = re.sub('"""', f'"""{NEWS} ', "".join(cell["source"]), count=1)
            (course / tree / name).write_text(json.dumps(nb), encoding="utf-8")
    run(course, sys.executable, "-m", "tutorial_lib.nb.normalise")
    run(course, sys.executable, "-m", "tutorial_lib.nb.exercises")
    commit_all(course, "feat: news")


@pytest.mark.slow
def test_the_gates_are_open_to_a_learner(clone: Path):
    """lint, the tests that look at the notebooks, and a commit through the hooks, which changes nothing of the work."""
    work(clone)
    before = (clone / "exercises" / LESSON).read_bytes()
    run(clone, *READY, "lint")
    looked_at = [
        "tests/test_house.py",
        "tests/nb",
        "tests/checks/test_exercises.py",
        "tests/checks/test_checker.py",
    ]
    chosen = "house or real or stub_is or chapter_with or json_and or grading_at_the_same"
    words = ["-p", "no:cacheprovider", "-m", "not slow", "-k", chosen, *looked_at]
    out = run(clone, ".venv/bin/python", "-m", "pytest", *words)
    assert "passed" in out and "failed" not in out
    assert "1 passed" in run(clone, *READY, "check-chapter", "1", rc=2)
    run(clone, ".venv/bin/python", "-m", "pre_commit", "install")
    run(clone, "git", "commit", "-qam", "1.4: two of three")
    assert (clone / "exercises" / LESSON).read_bytes() == before
    assert run(clone, "git", "status", "--porcelain") == ""


@pytest.mark.slow
def test_what_is_published_holds_nobodys_work(clone: Path):
    run(clone, *READY, "lint", "ARGS=--published")
    work(clone)
    out = run(clone, *READY, "-k", "lint", "ARGS=--published", rc=2)
    assert f"chapters/{PLAYED} is not in normal form" in out and "a folder of one machine" in out
    for words in (["normalise", "--published"], ["exercises", "--published"]):
        out = run(clone, ".venv/bin/python", "-m", f"tutorial_lib.nb.{words[0]}", *words[1:], rc=1)
    assert f"exercises/{LESSON} holds your work" in out
    assert f"exercises/{PLAYED} differs from what its solution generates" in out


UPDATES = {
    "make update": [*READY, "update"],
    "git pull --rebase": ["git", "pull", "-q", "--rebase", "--autostash", "origin", "HEAD"],
}


@pytest.mark.slow
@pytest.mark.parametrize("committed", [True, False], ids=["committed", "not committed"])
@pytest.mark.parametrize("how", UPDATES)
def test_news_come_in_around_the_work(course: Path, clone: Path, how: str, committed: bool):
    mine = work(clone)
    if committed:
        run(clone, "git", "switch", "-qc", "mine")
        run(clone, "git", "commit", "-qam", "1.4: two of three")
    run(course, "git", "switch", "-q", "news")
    assert NEWS not in (clone / "exercises" / LESSON).read_text()
    run(clone, *UPDATES[how])
    assert not re.search(r"^(UU|AA|U|.U)", run(clone, "git", "status", "--porcelain"), re.MULTILINE)
    here, there = sources(clone / "exercises" / LESSON), sources(course / "exercises" / LESSON)
    assert {name: here[name] for name in mine} == mine, "what the learner wrote is there to the letter"
    others = {name: source for name, source in here.items() if name not in mine}
    assert others == {name: source for name, source in there.items() if name not in mine}
    assert any("def " in source and NEWS in source for source in others.values()), "one that was left"
    assert sources(clone / "exercises" / PLAYED) == sources(course / "exercises" / PLAYED)
    assert sources(clone / "chapters" / PLAYED) == sources(course / "chapters" / PLAYED)
    assert "anna" in (clone / "chapters" / PLAYED).read_text(), "and what the lesson had printed"
    run(clone, ".venv/bin/python", "-m", "tutorial_lib.nb.normalise", "--check")
    run(clone, ".venv/bin/python", "-m", "tutorial_lib.nb.exercises", "--check")


@pytest.mark.slow
@pytest.mark.parametrize("committed", [True, False], ids=["committed", "not committed"])
def test_a_cell_that_both_rewrote_holds_both_texts(course: Path, clone: Path, committed: bool):
    path = clone / "exercises" / LESSON

    def annotate(cells: list[dict]) -> None:
        task = next(cell for cell in cells if "## 1.4.a" in "".join(cell["source"]))
        task["source"] = "".join(task["source"]) + "\n\nin my own words"

    edit(path, annotate)
    if committed:
        run(clone, "git", "commit", "-qam", "in my own words")
    run(course, "git", "switch", "-q", "news")
    out = run(clone, *READY, "update", rc=2)
    assert f"both rewrote a cell in: exercises/{LESSON}" in out and "choose what stays" in out
    [both] = [source for source in sources(path).values() if "<<<<<<<" in source]
    assert NEWS in both and "in my own words" in both
    edit(path, lambda cells: None)  # as after a choice
    run(clone, "git", "commit", "-qam", "chosen")
    assert run(clone, *READY, "update") and run(clone, "git", "status", "--porcelain") == ""
