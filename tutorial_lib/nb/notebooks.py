"""The course's notebooks: where they stand, and how they are read and written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

__all__ = ["TREES", "dumps", "notebooks", "read_notebook", "tree_of"]

TREES = ("chapters", "solutions", "exercises")


def notebooks(root: Path, paths: Iterable[Path] = ()) -> list[Path]:
    """The notebooks at or below `paths`, in order (default: the two trees that people write).

    A learner's `Untitled.ipynb` is none of the course's.
    """
    found: list[Path] = []
    for path in [Path(p).resolve() for p in paths] or [root / tree for tree in TREES[:2]]:
        if path.suffix == ".ipynb" and not path.is_file():
            raise ValueError(f"{path} does not exist: check its name.")
        found += [path] if path.is_file() else sorted(path.rglob("*.ipynb"))
    ours = [path for path in dict.fromkeys(found) if ".ipynb_checkpoints" not in path.parts]
    return [path for path in ours if not path.name.startswith("Untitled")]


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
