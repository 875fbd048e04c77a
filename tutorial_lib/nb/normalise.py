"""Bring every notebook to one form, so that running it again gives a small diff.

    python -m tutorial_lib.nb.normalise [--check] [PATH…]     notebooks or folders; default: all three trees
    python -m tutorial_lib.nb.normalise --execute PATH…       run lessons, store outputs, say what was slow

The one source it writes is that of the setup cell; every other cell keeps its text to the letter.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
from nbformat import NotebookNode

TREES = ("chapters", "solutions", "exercises")
WITHOUT_OUTPUTS = ("solutions", "exercises")
ROOT = Path(__file__).resolve().parents[2]
SIZE_LIMIT_KB = 600
CELL_TIMEOUT = 300

# find_spec and not try/import: ruff would call the import unused.
SETUP_TEMPLATE = """\
# On Colab this fetches the course; anywhere else it does nothing.
from importlib.util import find_spec

if not find_spec("tutorial_lib"):
    %pip install -q git+{url}"""
# A stamp of any age: from the comment to the end of the line that installs.
_OLD_STAMP = re.compile(r"\A# On Colab .*?%pip install[^\n]*", re.DOTALL)

_VALID_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
_MODEL_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_MODEL_REF = re.compile(r"IPY_MODEL_([0-9a-f]{32})\b")


def setup_source(root: Path = ROOT) -> str:
    """The setup cell, with the repository's address as pyproject.toml gives it."""
    # A regular expression, because tomllib is new in Python 3.11.
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^\[project\.urls\][^\[]*?^Repository\s*=\s*"([^"]+)"', text, re.MULTILINE)
    if not found:
        raise ValueError(f"{root / 'pyproject.toml'} has no Repository under [project.urls]: add it.")
    return SETUP_TEMPLATE.format(url=found[1])


def normalise(nb: NotebookNode, tree: str, root: Path = ROOT) -> NotebookNode:
    """A normalised copy of `nb`, a notebook of `tree` (chapters, solutions or exercises)."""
    nb = copy.deepcopy(nb)
    keep_outputs = tree not in WITHOUT_OUTPUTS
    _stamp_setup(nb, setup_source(root), learners=tree == "exercises")
    _name_cells(nb.cells)
    count = 0
    for cell in nb.cells:
        tags = cell.get("metadata", {}).get("tags")
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
    if code and "setup" in nb.cells[first].get("metadata", {}).get("tags", []):
        cell = nb.cells[first]
        cell.source = _OLD_STAMP.sub(lambda _: source, cell.source) if learners and cell.source else source
        return
    title = next((i + 1 for i, cell in enumerate(nb.cells) if cell.cell_type == "markdown"), 0)
    cell = nbformat.v4.new_code_cell(source, id="setup", metadata=NotebookNode(tags=["setup"]))
    nb.cells.insert(min(title, first), cell)


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


def notebooks(root: Path, paths: Iterable[Path] = ()) -> list[Path]:
    """The notebooks at or below `paths`, in order (default: the three trees)."""
    found: list[Path] = []
    for path in [Path(p).resolve() for p in paths] or [root / tree for tree in TREES]:
        if path.suffix == ".ipynb" and not path.is_file():
            raise ValueError(f"{path} does not exist: check its name.")
        found += [path] if path.is_file() else sorted(path.rglob("*.ipynb"))
    return [path for path in dict.fromkeys(found) if ".ipynb_checkpoints" not in path.parts]


def tree_of(path: Path, root: Path) -> str:
    """Which of the three trees a notebook stands in."""
    tree = path.relative_to(root).parts[0] if path.is_relative_to(root) else ""
    if tree not in TREES:
        raise ValueError(f"{path} is in none of {', '.join(TREES)} below {root}: move it there.")
    return tree


def read_notebook(path: Path) -> NotebookNode:
    """Read without nbformat's repairs, which would give random ids to cells that have none."""
    try:
        nb = nbformat.reader.reads(path.read_text(encoding="utf-8"))
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise ValueError(f"{path} is not a notebook (it does not parse): restore it from git.") from error
    if nb.get("nbformat") != 4:
        raise ValueError(f"{path} is not in notebook format 4: open it in JupyterLab and save it.")
    return nb


def dumps(nb: NotebookNode) -> str:
    """The text of a notebook file: indent 1, real characters, a newline at the end."""
    return nbformat.v4.writes(nb, indent=1, ensure_ascii=False).rstrip("\n") + "\n"


def _look_again(channel: Any) -> None:
    """Make the kernel's shell channel look for replies five times a second, and not only when it is woken.

    A lesson with `interact` makes nbclient send widget messages on the very socket on which it waits for the
    cell's reply. Now and then that swallows the wake-up, and the finished cell waits for its whole timeout.
    """
    once = channel.get_msg

    async def get_msg(timeout: float | None = None) -> dict[str, Any]:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            try:
                return await once(timeout=max(0.0, min(0.2, deadline - time.monotonic())))
            except Empty:
                if time.monotonic() >= deadline:
                    raise

    channel.get_msg = get_msg


def execute(path: Path, root: Path = ROOT) -> str:
    """Run a lesson, store its normalised outputs, and return one line: seconds, size, slowest cells."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    path = path.resolve()
    if tree_of(path, root) != "chapters":
        raise ValueError(f"{path}: only lessons keep their outputs, so only chapters/ are executed.")
    nb = normalise(read_notebook(path), "chapters", root)
    started: dict[int, float] = {}
    took: dict[int, float] = {}

    def tick(cell: NotebookNode, cell_index: int) -> None:
        started[cell_index] = time.perf_counter()

    def tock(cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        took[cell_index] = time.perf_counter() - started[cell_index]

    client = NotebookClient(
        nb,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        on_notebook_start=lambda notebook: _look_again(client.kc.shell_channel),
        on_cell_start=tick,
        on_cell_executed=tock,  # not on_cell_complete, which comes before the reply
    )
    begin = time.perf_counter()
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise ValueError(
            f"{path}, cell {max(started, default=0) + 1}, failed; nothing was written.\n{error}"
        ) from error
    seconds = time.perf_counter() - begin
    text = dumps(normalise(nb, "chapters", root))
    path.write_text(text, encoding="utf-8")
    size = len(text.encode()) / 1024
    slowest = ", ".join(f"cell {i + 1} {took[i]:.1f} s" for i in sorted(took, key=took.__getitem__)[:-4:-1])
    warning = f"   over the limit of {SIZE_LIMIT_KB} KB!" if size > SIZE_LIMIT_KB else ""
    return f"{path.relative_to(root)}   {seconds:.1f} s   {size:.0f} KB   slowest: {slowest}{warning}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tutorial_lib.nb.normalise", description=__doc__.split("\n")[0]
    )
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or folders (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; list what would change")
    parser.add_argument(
        "--execute", action="store_true", help="run the lessons named and store their outputs"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    args = parser.parse_args(argv)
    if args.execute and (args.check or not args.paths):
        parser.error("--execute takes the lessons to run, and no --check")
    root = args.root.resolve()
    try:
        files = notebooks(root, args.paths)
        if args.execute:
            for path in files:
                print(execute(path, root), flush=True)
            return 0
        new = {path: dumps(normalise(read_notebook(path), tree_of(path, root), root)) for path in files}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    changed = [path for path in files if path.read_text(encoding="utf-8") != new[path]]
    verdict = "is not in normal form, run: make notebooks" if args.check else "normalised"
    for path in changed:
        print(f"{path.relative_to(root)} {verdict}")
        if not args.check:
            path.write_text(new[path], encoding="utf-8")
    print(f"{len(files)} notebooks, {len(changed)} {'would change' if args.check else 'changed'}")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
