"""How git puts a learner's notebook and the course's news together: cell by cell, and not line by line.

    python -m tutorial_lib.nb.merge BASE OURS THEIRS [NAME]     git's merge driver: the result goes to OURS

A cell that one side wrote is taken from that side; what both sides added, stays. Git does not say which side is the
learner's (a rebase turns them round), so nothing here depends on it: code is kept before a docstring, and a stub that
one side has filled in before one that nobody has; otherwise a cell that both sides rewrote holds both texts, between git's own marks, and exit status 1 says
so. `make setup` tells git of this driver, and `.gitattributes` which files it is for.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from nbformat import NotebookNode

from tutorial_lib.nb.digests import DEFINITIONS
from tutorial_lib.nb.notebooks import dumps, read_notebook
from tutorial_lib.nb.stubs import STUB

__all__ = ["merge", "merge_files"]

Cells = Mapping[str, NotebookNode]  # by their ids, in order


def merge(base: NotebookNode, ours: NotebookNode, theirs: NotebookNode) -> tuple[NotebookNode, list[str]]:
    """The merged notebook, and the ids of cells whose two texts are both in it."""
    before, mine, other = ({cell.id: cell for cell in nb.cells} for nb in (base, ours, theirs))
    conflicts: list[str] = []
    cells = [
        _cell(before.get(name), mine.get(name), other.get(name), conflicts) for name in _order(mine, other)
    ]
    merged = NotebookNode(theirs if ours.metadata == base.metadata else ours)
    merged.cells = [cell for cell in cells if cell is not None]
    return merged, conflicts


def _order(mine: Cells, other: Cells) -> list[str]:
    """All cells of both: in the order of `other`, and what only `mine` has below the cell that it stood below."""
    order, last = list(other), None
    for name in mine:
        if name not in other:
            order.insert(order.index(last) + 1 if last is not None else 0, name)
        last = name
    return order


def _cell(
    base: NotebookNode | None, mine: NotebookNode | None, other: NotebookNode | None, conflicts: list[str]
) -> NotebookNode | None:
    """One cell from its three versions; None is a cell that is not there."""
    if mine is None or other is None:
        rest = mine or other
        # Deleted by one side: gone if the other had not written in it.
        return None if base is not None and rest is not None and _same_text(rest, base) else rest
    if base is not None:
        # A side that only ran a cell gives way to one that wrote in it; one that mended a docstring, to code.
        for same in (_equal, _same_text, _same_code):
            if same(other, base):
                return mine
            if same(mine, base):
                return other
    if _same_text(mine, other):
        return mine
    if (STUB in mine.source) != (STUB in other.source):
        return mine if STUB in other.source else other
    conflicts.append(mine.id)
    both = NotebookNode(mine)
    both.source = f"<<<<<<< ours\n{mine.source}\n=======\n{other.source}\n>>>>>>> theirs"
    return both


def _equal(one: NotebookNode, other: NotebookNode) -> bool:
    return one == other


def _same_text(one: NotebookNode, other: NotebookNode) -> bool:
    return (one.cell_type, one.source) == (other.cell_type, other.source)


def _same_code(one: NotebookNode, other: NotebookNode) -> bool:
    """The same lines, comments too, but for the docstrings."""
    if one.cell_type != other.cell_type or one.cell_type != "code":
        return False
    try:
        return _without_docstrings(one.source) == _without_docstrings(other.source)
    except SyntaxError:  # lines of IPython's own, or work that is not finished
        return False


def _without_docstrings(source: str) -> list[str]:
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
            doc = node.body[0]
            lines[doc.lineno - 1 : doc.end_lineno] = [""] * (doc.end_lineno - doc.lineno + 1)
    return [line.rstrip() for line in lines if line.strip()]


def merge_files(base: Path, ours: Path, theirs: Path, name: str) -> int:
    """Git's merge driver: 0 if `ours` now holds the merged notebook, 1 if someone must look at it."""
    try:
        versions = [read_notebook(path) for path in (base, ours, theirs)]
        merged, conflicts = merge(*versions)
    except (ValueError, AttributeError):  # no notebook, or one of before cells had ids: as git does by itself
        return min(1, abs(subprocess.call(["git", "merge-file", str(ours), str(base), str(theirs)])))
    ours.write_text(dumps(merged), encoding="utf-8")
    if conflicts:
        print(
            f"{name}: both sides rewrote cell {', '.join(conflicts)}: choose in it what stays",
            file=sys.stderr,
        )
    return 1 if conflicts else 0


if __name__ == "__main__":
    *paths, shown = sys.argv[1:] if len(sys.argv) > 4 else [*sys.argv[1:], sys.argv[2]]
    sys.exit(merge_files(*map(Path, paths), shown))
