"""The one form of every notebook: the way to Colab, the setup cell, the cells' names, counts, outputs and metadata."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tutorial_lib.nb.digests import tags_of
from tutorial_lib.nb.graph import ROOT

__all__ = ["badge_source", "normalise", "setup_source"]

WITHOUT_OUTPUTS = ("solutions", "exercises")

# find_spec and not try/import: ruff would call the import unused.
SETUP_TEMPLATE = """\
# On Colab this fetches the course; anywhere else it does nothing.
from importlib.util import find_spec

if not find_spec("tutorial_lib"):
    %pip install "llm-from-scratch[lessons] @ git+{url}" -q"""
BADGE_TEMPLATE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{place}/blob/main/{name})"
)
BADGE, SETUP = "colab", "setup"  # the tags, and the ids, of the two cells that are stamped
# A stamp of any age: from the comment to the end of the line that installs.
_OLD_STAMP = re.compile(r"\A# On Colab .*?%pip install[^\n]*", re.DOTALL)

_VALID_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
_MODEL_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_MODEL_REF = re.compile(r"IPY_MODEL_([0-9a-f]{32})\b")


def setup_source(root: Path = ROOT) -> str:
    """The setup cell: on a machine without the course it installs all that a lesson may import."""
    return SETUP_TEMPLATE.format(url=_address(root))


def badge_source(name: str, root: Path = ROOT) -> str:
    """The badge that opens a notebook on Colab, which reads it from GitHub; `name` is its path below the root."""
    return BADGE_TEMPLATE.format(place=_address(root).removeprefix("https://github.com/"), name=name)


def _address(root: Path) -> str:
    """The repository's address as pyproject.toml gives it."""
    # A regular expression, because tomllib is new in Python 3.11.
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^\[project\.urls\][^\[]*?^Repository\s*=\s*"([^"]+)"', text, re.MULTILINE)
    if not found:
        raise ValueError(f"{root / 'pyproject.toml'} has no Repository under [project.urls]: add it.")
    return found[1]


def normalise(nb: NotebookNode, name: str, root: Path = ROOT) -> NotebookNode:
    """A normalised copy of `nb`, which is `name` below the root: `chapters/part_3_modernizing/3_2_rope.ipynb`."""
    nb = copy.deepcopy(nb)
    tree = name.partition("/")[0]
    keep_outputs = tree not in WITHOUT_OUTPUTS
    _stamp_setup(nb, setup_source(root), learners=tree == "exercises")
    _stamp_badge(nb, badge_source(name, root))
    _name_cells(nb.cells)
    count = 0
    for cell in nb.cells:
        tags = tags_of(cell)
        cell.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
        if cell.cell_type == "code":
            count += 1
            outputs = cell.get("outputs", []) if keep_outputs else []
            # As "restart and run all" counts; nbval refuses a cell with outputs that has no count.
            cell.execution_count = count if outputs else None
            cell.outputs = _tidy_outputs(outputs, count)
    # A widget's state belongs to the outputs: with it, a slider reads well without a kernel.
    widgets = nb.metadata.get("widgets") if keep_outputs else None
    nb.metadata = NotebookNode(
        kernelspec=NotebookNode(display_name="Python 3", language="python", name="python3"),
        language_info=NotebookNode(name="python"),
    )
    if widgets:
        nb.metadata.widgets = widgets
        _number_widgets(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def _stamp_setup(nb: NotebookNode, source: str, learners: bool) -> None:
    """Make the first code cell the setup cell. In a learner's notebook, renew only what we once stamped."""
    code = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code"]
    first = code[0] if code else len(nb.cells)
    if code and SETUP in tags_of(nb.cells[first]):
        cell = nb.cells[first]
        cell.source = _OLD_STAMP.sub(lambda _: source, cell.source) if learners and cell.source else source
        return
    title = next(
        (i + 1 for i, c in enumerate(nb.cells) if c.cell_type == "markdown" and BADGE not in tags_of(c)), 0
    )
    cell = nbformat.v4.new_code_cell(source, id=SETUP, metadata=NotebookNode(tags=[SETUP]))
    nb.cells.insert(min(title, first), cell)


def _stamp_badge(nb: NotebookNode, source: str) -> None:
    """Make the first cell the badge, on every notebook the one of its own place."""
    others = [cell for cell in nb.cells if BADGE not in tags_of(cell)]
    badge = nbformat.v4.new_markdown_cell(source, id=BADGE, metadata=NotebookNode(tags=[BADGE]))
    nb.cells = [badge, *others]


def _name_cells(cells: list[NotebookNode]) -> None:
    """Keep each valid id at its first use; name the other cells by position (`c07`)."""
    taken: set[str] = set()
    nameless = []
    for position, cell in enumerate(cells, 1):
        name = cell.get("id")
        if isinstance(name, str) and _VALID_ID.fullmatch(name) and name not in taken:
            taken.add(name)
        else:
            nameless.append((position, cell))
    for position, cell in nameless:
        name = f"c{position:02d}"
        while name in taken:
            name += "x"
        taken.add(name)
        cell.id = name


def _tidy_outputs(outputs: list[NotebookNode], count: int) -> list[NotebookNode]:
    """Give results their cell's count, and join what the kernel happened to flush in pieces."""
    tidy: list[NotebookNode] = []
    for output in outputs:
        output.pop("transient", None)
        if "execution_count" in output:
            output.execution_count = count
        last = tidy[-1] if tidy else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            tidy.append(output)
    return tidy


def _number_widgets(nb: NotebookNode) -> None:
    """Number widget models in the order in which a reader meets them: ipywidgets draws random ids."""
    state = nb.metadata.widgets.get(_WIDGET_STATE, {}).get("state", {})
    views = [
        o.data[_WIDGET_VIEW]
        for c in nb.cells
        for o in c.get("outputs", [])
        if _WIDGET_VIEW in o.get("data", {})
    ]
    order = list(dict.fromkeys(v.model_id for v in views if v.model_id in state))
    for model in order:  # grows as we walk: a box leads to its children, a child to its layout
        refs = _MODEL_REF.findall(json.dumps(state[model], sort_keys=True))
        order += [ref for ref in dict.fromkeys(refs) if ref in state and ref not in order]
    number = {old: f"{i:032x}" for i, old in enumerate(order)}

    def renumbered(text: str, otherwise: str | None = None) -> str:
        return _MODEL_ID.sub(lambda m: number.get(m[0], m[0] if otherwise is None else otherwise), text)

    # No view shows the rest (a link between two sliders, say), so order them by their content.
    rest = sorted(
        set(state) - set(order), key=lambda m: renumbered(json.dumps(state[m], sort_keys=True), "?")
    )
    number.update({old: f"{i:032x}" for i, old in enumerate(rest, len(order))})
    nb.metadata.widgets = nbformat.from_dict(json.loads(renumbered(json.dumps(nb.metadata.widgets))))
    for view in views:
        view.model_id = number.get(view.model_id, view.model_id)
