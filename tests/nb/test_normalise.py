"""The normaliser: one form for every notebook, and nobody's code is touched."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from queue import Empty
from typing import ClassVar

import nbformat
import pytest
from nbformat import NotebookNode, v4

from tutorial_lib.nb.form import normalise, setup_source
from tutorial_lib.nb.normalise import _look_again, execute, main
from tutorial_lib.nb.notebooks import TREES, dumps, read_notebook

STATE = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[project.urls]\nHomepage = "https://no"\nRepository = "https://example.org/a/b"\n'
    )
    for tree in TREES:
        (tmp_path / tree / "part_1").mkdir(parents=True)
    return tmp_path


def messy() -> NotebookNode:
    """A notebook as Jupyter and people leave it."""
    streams = [v4.new_output("stream", name="stdout", text=text) for text in ("1\n", "2\n")]
    result = v4.new_output("execute_result", {"text/plain": "3 ✓"}, execution_count=7)
    code = v4.new_code_cell("x = 1 ;print( x )\n\n", execution_count=7, outputs=[*streams, result])
    code.metadata = NotebookNode(tags=["keep"], collapsed=True, execution={"a": "2020"})
    cells = [v4.new_markdown_cell("# Title", id="title"), code, v4.new_code_cell(""), v4.new_raw_cell("raw")]
    cells[1].id, cells[2].id = "title", "not a valid id"
    nb = v4.new_notebook()
    nb.cells = cells  # afterwards: new_notebook would refuse the ids
    nb.metadata = nbformat.from_dict(
        {
            "kernelspec": {"name": "venv", "display_name": "Mine"},
            "language_info": {"name": "python", "version": "3.11.7"},
            "colab": {"provenance": []},
        }
    )
    return nb


def write(path: Path, nb: NotebookNode) -> Path:
    path.write_text(dumps(nb), encoding="utf-8")
    return path


@pytest.mark.parametrize("tree", TREES)
def test_normalise_is_idempotent_valid_and_pure(root: Path, tree: str) -> None:
    nb = messy()
    before = dumps(nb)
    once = normalise(nb, tree, root)
    assert dumps(nb) == before
    assert dumps(normalise(once, tree, root)) == dumps(once)
    nbformat.validate(once)


def test_metadata_ids_and_counts_have_one_form(root: Path) -> None:
    nb = normalise(messy(), "chapters", root)
    assert nb.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert (nb.nbformat, nb.nbformat_minor) == (4, 5)
    assert [cell.id for cell in nb.cells][:5] == ["colab", "title", "setup", "c04", "c05"]
    tags = [["colab"], None, ["setup"], ["keep"], None, None]
    assert [dict(cell.metadata) for cell in nb.cells] == [{"tags": t} if t else {} for t in tags]
    counts = [cell.execution_count for cell in nb.cells if cell.cell_type == "code"]
    assert counts == [None, 2, None] and nb.cells[3].outputs[-1].execution_count == 2


def test_ids_stay_when_a_cell_is_inserted_above(root: Path) -> None:
    nb = normalise(messy(), "chapters", root)
    before = [cell.id for cell in nb.cells]
    nb.cells.insert(2, v4.new_markdown_cell("new", id="new"))
    assert [cell.id for cell in normalise(nb, "chapters", root).cells if cell.id != "new"] == before


def test_outputs_stay_in_lessons_only(root: Path) -> None:
    lesson = normalise(messy(), "chapters", root).cells[3]
    assert [output.output_type for output in lesson.outputs] == ["stream", "execute_result"]
    assert lesson.outputs[0].text == "1\n2\n"  # one stream, however the kernel flushed it
    for tree in ("solutions", "exercises"):
        assert all(not cell.get("outputs") for cell in normalise(messy(), tree, root).cells)


@pytest.mark.parametrize("tree", TREES)
def test_no_other_source_changes(root: Path, tree: str) -> None:
    nb = messy()
    after = normalise(nb, tree, root)
    assert [c.source for c in after.cells if c.id not in ("colab", "setup")] == [c.source for c in nb.cells]


@pytest.mark.parametrize("tree", TREES)
def test_the_setup_cell_is_stamped_renewed_and_first(root: Path, tree: str) -> None:
    nb = normalise(messy(), tree, root)
    first = next(cell for cell in nb.cells if cell.cell_type == "code")
    assert first.source == setup_source(root) and first.metadata.tags == ["setup"]
    assert '"llm-from-scratch[lessons] @ git+https://example.org/a/b"' in first.source
    first.source = first.source.replace("example.org", "old.example.org")
    renewed = normalise(nb, tree, root)
    assert renewed.cells[2].source == setup_source(root) and len(renewed.cells) == len(nb.cells)


def test_the_badge_is_first_and_leads_to_the_notebook_that_it_stands_in(root: Path) -> None:
    (root / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/a/b"\n')
    nb = normalise(messy(), "solutions/part_1/1_1_x.ipynb", root)
    nb = normalise(nb, "exercises/part_1/1_1_x.ipynb", root)
    there = "https://colab.research.google.com/github/a/b/blob/main/exercises/part_1/1_1_x.ipynb"
    badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    assert nb.cells[0].source == f"{badge}({there})" and nb.cells[0].cell_type == "markdown"
    assert sum("colab.research" in cell.source for cell in nb.cells) == 1


def test_a_learners_lines_in_the_setup_cell_survive(root: Path) -> None:
    nb = normalise(messy(), "exercises", root)
    nb.cells[2].source = setup_source(root).replace("example.org", "old.org") + "\nimport mine"
    assert normalise(nb, "exercises", root).cells[2].source == setup_source(root) + "\nimport mine"
    nb.cells[2].source = "all = 'mine'"
    assert normalise(nb, "exercises", root).cells[2].source == "all = 'mine'"
    assert normalise(nb, "chapters", root).cells[2].source == setup_source(root)


@pytest.mark.parametrize(
    ("cells", "where"),
    [([], 0), (["code"], 0), (["markdown"], 1), (["raw", "markdown", "code"], 2), (["code", "markdown"], 0)],
)
def test_the_setup_cell_finds_its_place(root: Path, cells: list[str], where: int) -> None:
    nb = v4.new_notebook(cells=[getattr(v4, f"new_{kind}_cell")("x") for kind in cells])
    assert normalise(nb, "chapters", root).cells[where + 1].id == "setup"


def widget_notebook(slider: str, layout: str, link: str) -> NotebookNode:
    """A displayed slider with its layout, and a link that no output displays, under the given model ids."""
    code = v4.new_code_cell("slider", outputs=[v4.new_output("display_data", {VIEW: {"model_id": slider}})])
    state = {
        slider: {"model_name": "IntSlider", "state": {"layout": f"IPY_MODEL_{layout}", "value": 3}},
        layout: {"model_name": "Layout", "state": {}},
        link: {"model_name": "Link", "state": {"source": [f"IPY_MODEL_{slider}", "value"]}},
    }
    nb = v4.new_notebook(cells=[code])
    nb.metadata.widgets = nbformat.from_dict({STATE: {"state": state, "version_major": 2}})
    return nb


def test_widget_state_is_kept_under_stable_ids(root: Path) -> None:
    one = normalise(widget_notebook("a" * 32, "b" * 32, "c" * 32), "chapters", root)
    two = normalise(widget_notebook("f" * 32, "1" * 32, "0" * 31 + "1"), "chapters", root)
    for nb in (one, two):
        nb.cells[2].id = "same"
    assert dumps(one) == dumps(two)
    state = one.metadata.widgets[STATE].state
    shown = state[one.cells[2].outputs[0].data[VIEW].model_id]
    assert shown.model_name == "IntSlider"
    assert state[shown.state.layout.removeprefix("IPY_MODEL_")].model_name == "Layout"
    assert dumps(normalise(one, "chapters", root)) == dumps(one)
    assert "widgets" not in normalise(one, "solutions", root).metadata  # its outputs are gone as well


def test_files_are_indented_by_one_and_keep_their_letters(root: Path) -> None:
    text = dumps(normalise(messy(), "chapters", root))
    assert text.endswith("}\n") and '\n "cells"' in text and "✓" in text


def test_ids_are_stable_in_files_without_ids(root: Path) -> None:
    nb = json.loads(dumps(messy()))
    for cell in nb["cells"]:
        del cell["id"]
    path = root / "chapters/part_1/1_1_x.ipynb"
    path.write_text(json.dumps({**nb, "nbformat_minor": 4}))
    assert [c.id for c in normalise(read_notebook(path), "chapters", root).cells][3:] == ["c04", "c05", "c06"]


def test_check_lists_and_writes_nothing(root: Path, capsys) -> None:
    paths = [write(root / tree / "part_1/1_1_x.ipynb", messy()) for tree in TREES]
    before = [path.read_text() for path in paths]
    options = ["--root", str(root)]
    for how in ("--check", "--published"):
        assert main([*options, how]) == 1
        assert [path.read_text() for path in paths] == before
        out = capsys.readouterr().out
        assert all(f"{tree}/part_1/1_1_x.ipynb is not in normal form" in out for tree in TREES[:2])
        assert "exercises" not in out, "they are the learner's"
    assert main([*options, str(paths[0])]) == 0  # only the one named
    assert [path.read_text() == old for path, old in zip(paths, before, strict=True)] == [False, True, True]
    assert main(options) == 0 and main([*options, "--check"]) == 0 and main([*options, "--published"]) == 0
    assert paths[2].read_text() == before[2]


def test_a_lesson_that_was_run_is_in_order_but_not_to_be_published(root: Path, capsys) -> None:
    path = root / "chapters/part_1/1_1_x.ipynb"
    write(path, normalise(messy(), "chapters/part_1/1_1_x.ipynb", root))
    options = ["--root", str(root)]
    assert main([*options, "--published"]) == 0
    nb = read_notebook(path)
    nb.cells[3].execution_count, nb.metadata.language_info.version = 12, "3.13.1"
    nb.cells[3].outputs = [v4.new_output("error", ename="KeyboardInterrupt", evalue="", traceback=[])]
    write(path, nb)
    write(root / "chapters/part_1/Untitled.ipynb", messy())
    assert main([*options, "--check"]) == 0
    capsys.readouterr()
    assert main([*options, "--published"]) == 1
    out = capsys.readouterr().out
    assert "is not in normal form" in out and "shows an error" in out and "Untitled" not in out
    nb.cells[3].outputs = []
    write(path, nb)
    assert main([*options, "--published"]) == 1 and "has no outputs" in capsys.readouterr().out
    nb.cells[3].outputs = [v4.new_output("stream", text="in /home/" + "anna/x.py")]
    write(path, nb)
    assert main([*options, "--published"]) == 1 and "a folder of one machine" in capsys.readouterr().out
    nb.cells[3].outputs = [v4.new_output("stream", text="x" * 600_001)]
    write(path, nb)
    assert main([*options, "--published"]) == 1 and "is larger than 600 KB" in capsys.readouterr().out
    nb.cells[2].source += " "
    write(path, nb)
    assert main([*options, "--check"]) == 1, "a setup cell that is not the course's"


def test_what_cannot_be_normalised_is_one_sentence(root: Path, capsys) -> None:
    good = write(root / "chapters/part_1/1_1_x.ipynb", messy())
    before = good.read_text()
    (root / "solutions/part_1/1_2_y.ipynb").write_text("{")
    assert main(["--root", str(root)]) == 1
    assert "1_2_y.ipynb is not a notebook" in capsys.readouterr().err
    assert good.read_text() == before
    assert main(["--root", str(root), str(root / "chapters/none.ipynb")]) == 1
    assert "none.ipynb does not exist" in capsys.readouterr().err
    assert main(["--root", str(root), str(write(root / "stray.ipynb", messy()))]) == 1
    assert "stray.ipynb is in none of chapters, solutions, exercises" in capsys.readouterr().err
    assert main(["--root", str(root), "--execute", str(root / "exercises")]) == 0  # holds no notebook
    write(root / "exercises/part_1/1_1_x.ipynb", messy())
    assert main(["--root", str(root), "--execute", str(root / "exercises")]) == 1
    assert "only chapters/ are executed" in capsys.readouterr().err


@pytest.mark.slow  # starts two kernels
def test_execute_stores_outputs_and_a_failure_writes_nothing(root: Path) -> None:
    cells = [v4.new_code_cell("import os\nprint(os.path.basename(os.getcwd()))"), v4.new_code_cell("6 * 7")]
    path = write(root / "chapters/part_1/1_1_x.ipynb", v4.new_notebook(cells=cells))
    line = execute(path, root)
    assert line.startswith("chapters/part_1/1_1_x.ipynb   ") and " KB   slowest: cell " in line
    nb = read_notebook(path)
    *_, where, product = nb.cells  # after the badge and the setup cell
    assert where.outputs[0].text == "part_1\n"
    assert product.outputs[0].data["text/plain"] == "42"
    assert main(["--root", str(root), "--check"]) == 0
    product.source = "1 / 0"
    before = write(path, nb).read_text()
    with pytest.raises(ValueError, match=r"1_1_x.ipynb, cell 4, failed; nothing was written"):
        execute(path, root)
    assert path.read_text() == before


def test_the_real_notebooks_are_in_normal_form(capsys) -> None:
    assert main(["--check"]) == 0, "".join(capsys.readouterr())


def test_a_reply_whose_wake_up_was_swallowed_is_found_soon() -> None:
    class Channel:
        """Answers only if looked at a second time; the first look lasts its whole timeout."""

        looks: ClassVar[list[float]] = []

        async def get_msg(self, timeout: float) -> dict:
            self.looks.append(timeout)
            if len(self.looks) == 1:
                raise Empty
            return {"reply": 1}

    channel = Channel()
    _look_again(channel)
    assert asyncio.run(channel.get_msg(timeout=300)) == {"reply": 1}
    assert max(Channel.looks) <= 0.2
    Channel.looks.clear()
    with pytest.raises(Empty):
        asyncio.run(channel.get_msg(timeout=0))
